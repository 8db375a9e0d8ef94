"""What the operator API may touch, handed over by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from osqbox.clock import Clock
from osqbox.feed import Feed
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.store import Store


class Stopping(Protocol):
    """As much of `trio.Event` as a stream needs."""

    def is_set(self) -> bool: ...

    async def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    store: Store
    feed: Feed
    clock: Clock
    presence: Presence
    osquery: OsqueryApi
    token: str = field(repr=False)
    info: Callable[[], dict[str, Any]]
    """The ready facts and ``statistics``, by part; those of listeners have ``open_connections``."""
    ready: Callable[[], bool]
    stop: Callable[[], None]
    """Asks the box to stop."""
    stopping: Stopping
    """Set when the box drains: streams end at once."""
    allowed_hosts: Callable[[], frozenset[str]]
    """Values of the Host header that mean this listener, in lower case, such as ``localhost:8080``."""
    new_id: Callable[[], str]
    new_key: Callable[[], str]
