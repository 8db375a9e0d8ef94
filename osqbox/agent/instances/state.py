"""What an osquery instance is at each moment, and what moves it on. Pure.

One instance lives through many runs. A run begins with a launch; it is connected once its extension serves the osquery
process; it ends by itself or because somebody stops it, also in the middle of the launch. A run that was connected is
followed by the next at once, a launch that failed by a fixed pause, so a broken program cannot spin.

        ┌──────────────── pause over ────────────────┐
        ▼                                            │
    launching ── connected ──▶ connected ── ended ─▶ (launching, at once)
        │ └──── ended ───────────────────────────▶ pausing
        └── stop ──▶ stopping ── ended ──▶ stopped ◀── stop ── pausing
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

LAUNCH_RETRY_S = 10.0
"""Between a launch that failed and the next (Launcher: launchRetryDelay)."""


class Phase(StrEnum):
    LAUNCHING = "launching"
    CONNECTED = "connected"
    PAUSING = "pausing"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Happening(StrEnum):
    CONNECT = "connect"
    END = "end"
    RETRY = "retry"
    STOP = "stop"


class Status(StrEnum):
    """What Launcher says of an instance."""

    NOT_STARTED = "not_started"
    UNHEALTHY = "unhealthy"
    HEALTHY = "healthy"


TRANSITIONS: Mapping[tuple[Phase, Happening], Phase] = MappingProxyType(
    {
        (Phase.LAUNCHING, Happening.CONNECT): Phase.CONNECTED,
        (Phase.LAUNCHING, Happening.END): Phase.PAUSING,
        (Phase.LAUNCHING, Happening.STOP): Phase.STOPPING,
        (Phase.CONNECTED, Happening.END): Phase.LAUNCHING,
        (Phase.CONNECTED, Happening.STOP): Phase.STOPPING,
        (Phase.PAUSING, Happening.RETRY): Phase.LAUNCHING,
        (Phase.PAUSING, Happening.STOP): Phase.STOPPED,
        (Phase.STOPPING, Happening.END): Phase.STOPPED,
        (Phase.STOPPING, Happening.CONNECT): Phase.STOPPING,
        (Phase.STOPPING, Happening.STOP): Phase.STOPPING,
        (Phase.STOPPED, Happening.STOP): Phase.STOPPED,
    }
)
"""Stopping twice is stopping once. Any other pair is a mistake of the caller."""


def after(phase: Phase, happening: Happening) -> Phase:
    """The next phase. Raises ValueError for what cannot happen."""
    try:
        return TRANSITIONS[phase, happening]
    except KeyError:
        raise ValueError(f"an instance that is {phase} cannot {happening}") from None


def status_of(phase: Phase, *, healthy: bool) -> Status:
    """``healthy`` is the outcome of a health check, which counts only while connected."""
    if phase is Phase.STOPPED:
        return Status.NOT_STARTED
    return Status.HEALTHY if phase is Phase.CONNECTED and healthy else Status.UNHEALTHY
