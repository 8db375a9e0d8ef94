"""One thread that waits: for descriptors, and for time."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

LONGEST_WAIT_S = 3600.0
"""The kernel counts milliseconds in an int, which ends at 24 days."""


class Loop:
    """Handlers by descriptor, timers by name; `turn` runs those whose time has come. Making one raises OSError."""

    __slots__ = ("_epoll", "_handlers", "_masks", "_timers")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        """`handler` gets the events; level-triggered. Raises OSError."""
        self._epoll.register(fd, mask)
        self._handlers[fd], self._masks[fd] = handler, mask

    def adjust(self, fd: int, mask: int) -> None:
        if self._masks[fd] != mask:
            self._epoll.modify(fd, mask)
            self._masks[fd] = mask

    def unwatch(self, fd: int) -> None:
        """Before it is closed; also for one that is not watched."""
        self.cancel(f"rest {fd}")
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._masks[fd]

    def rest(self, fd: int, rest_s: float) -> None:
        """Look away from it for a while."""
        if f"rest {fd}" in self._timers:
            return
        mask = self._masks[fd]
        self.adjust(fd, 0)
        self.at(f"rest {fd}", rest_s, lambda: self.adjust(fd, mask))

    def at(self, name: str, delay_s: float, do: Callable[[], None], *, earlier_holds: bool = False) -> None:
        """`do` in a while; a timer of that name is replaced, unless it is due earlier."""
        due = time.monotonic() + delay_s
        if not (earlier_holds and name in self._timers and self._timers[name][0] <= due):
            self._timers[name] = (due, do)

    def cancel(self, *names: str) -> None:
        for name in names:
            self._timers.pop(name, None)

    def cancel_all(self) -> None:
        self._timers.clear()

    def turn(self) -> None:
        """Wait for whatever comes first, and handle all that has come."""
        for fd, events in self._epoll.poll(self._patience_s()):
            if handler := self._handlers.get(fd):
                handler(events)
        now = time.monotonic()
        for name, timer in list(self._timers.items()):
            if timer[0] <= now and self._timers.get(name) is timer:
                del self._timers[name]
                timer[1]()

    def close(self) -> None:
        self._epoll.close()

    def _patience_s(self) -> float:
        if not self._timers:
            return -1
        due = min(due for due, _ in self._timers.values())
        return min(max(0.0, due - time.monotonic()), LONGEST_WAIT_S)
