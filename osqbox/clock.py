"""Where time comes from: the one place that reads the clock for protocol decisions and timestamps."""

from __future__ import annotations

import datetime as dt
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch, as every timestamp in the box is kept."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()


def rfc3339(at: float | None) -> str | None:
    """``1700000000.25`` as ``2023-11-14T22:13:20.250000Z``; ``None`` stays ``None``."""
    if at is None:
        return None
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
