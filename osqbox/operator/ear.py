"""How a stream waits: woken by the feed, silent no longer than KEEP_ALIVE_S, ended when the box stops."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

import trio

from osqbox.feed import Event, Feed, Follower, Gap

from .parts import Stopping

KEEP_ALIVE_S = 15.0

Heard: TypeAlias = "Event | Gap"


class Ear:
    """A subscription for as long as the block lasts. Read what is stored after entering it, and nothing is lost."""

    def __init__(self, feed: Feed, stopping: Stopping) -> None:
        self._feed = feed
        self._stopping = stopping
        self._follower: Follower = feed.subscribe()
        self._first: Heard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._feed.unsubscribe(self._follower)

    @property
    def stopped(self) -> bool:
        return self._stopping.is_set()

    async def wait(self, hear: Callable[[Heard], bool], *, within_s: float | None = None) -> bool:
        """True after events of which ``hear`` says that they matter; False when silence was long or the box stops.

        Every event is given to ``hear`` once, in order, also those that came with one that matters.
        """
        silent_until = trio.current_time() + (KEEP_ALIVE_S if within_s is None else within_s)
        while not self.stopped:
            if self._drain(hear):
                return True
            if trio.current_time() >= silent_until:
                return False
            await self._sleep(silent_until)
        return False

    def _drain(self, hear: Callable[[Heard], bool]) -> bool:
        matters = False
        heard, self._first = self._first or self._follower.next_nowait(), None
        while heard is not None:
            matters = hear(heard) or matters
            heard = self._follower.next_nowait()
        return matters

    async def _sleep(self, until: float) -> None:
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = until
            nursery.start_soon(self._end_at_stop, nursery.cancel_scope)
            self._first = await self._follower.next()
            nursery.cancel_scope.cancel()

    async def _end_at_stop(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        scope.cancel()
