"""What a query gives, and what it cost."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from typing import Self

from osqbox.agent.functions import SqlValue, render


@dataclass(frozen=True, slots=True)
class Stats:
    """What a query cost, in the units of distributed write."""

    wall_time_ms: int = 0
    user_time: int = 0
    system_time: int = 0
    memory: int = 0
    """Bytes the process grew by."""


@dataclass(frozen=True)
class QueryResult:
    columns: tuple[str, ...] = ()
    """Names in select order."""
    typed_rows: list[dict[str, SqlValue]] = field(default_factory=list)
    """NULL is already the empty text; of columns with one name the last wins, as in osqueryd."""
    status: int = 0
    message: str = ""
    stats: Stats = Stats()
    warnings: tuple[str, ...] = ()
    event_based: bool = False
    """A table of events was read."""

    @functools.cached_property
    def rows(self) -> list[dict[str, str]]:
        """Every value as text, as osqueryd sends them."""
        return [{name: render(value) for name, value in row.items()} for row in self.typed_rows]


class Meter:
    """Wall and processor time of this thread, and growth of the process, over a ``with`` block."""

    stats = Stats()

    def __enter__(self) -> Self:
        self._wall, self._cpu, self._memory = time.monotonic(), _thread_times(), _resident_bytes()
        return self

    def __exit__(self, *_error: object) -> None:
        user, system = _thread_times()
        self.stats = Stats(
            wall_time_ms=int((time.monotonic() - self._wall) * 1000),
            user_time=int((user - self._cpu[0]) * 1000),
            system_time=int((system - self._cpu[1]) * 1000),
            memory=max(0, _resident_bytes() - self._memory),
        )


def _thread_times() -> tuple[float, float]:
    import resource

    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_utime, usage.ru_stime


def _resident_bytes() -> int:
    """0 where /proc does not say."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - a hot path
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
