"""What was read from the indexer and is asked for all the time: kept in memory until it changes, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from osqbox.clock import Clock
from osqbox.comms.errors import IndexerDown

K = TypeVar("K")
V = TypeVar("V")

KEPT = 50_000
KEEP_S = 300.0
"""Then read again, should the news of a change never have come. While the indexer is down, what is kept stays good."""


class Kept(Generic[K, V]):
    def __init__(self, read: Callable[[K], Awaitable[V | None]], clock: Clock, size: int = KEPT) -> None:
        self._read, self._clock, self._size = read, clock, size
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._changes = 0
        self.hits = self.misses = 0

    async def find(self, key: K) -> V | None:
        """None is not kept: who is unknown now may be added on another box a moment later."""
        read_at, kept = self._values.get(key, (0.0, None))
        if kept is not None and 0 <= self._clock.now() - read_at < KEEP_S:
            self._values.move_to_end(key)
            self.hits += 1
            return kept
        self.misses += 1
        changes = self._changes
        try:
            value = await self._read(key)
        except IndexerDown:
            if kept is not None:
                return kept
            raise
        if changes == self._changes:  # what was read may be older than news that came meanwhile
            self._keep(key, value)
        return value

    def _keep(self, key: K, value: V | None) -> None:
        self._values.pop(key, None)
        if value is not None:
            self._values[key] = (self._clock.now(), value)
            if len(self._values) > self._size:
                self._values.popitem(last=False)

    def forget(self, key: K | None = None) -> None:
        """It, or with None everything, has changed somewhere."""
        self._changes += 1
        if key is None:
            self._values.clear()
        else:
            self._values.pop(key, None)

    def __len__(self) -> int:
        return len(self._values)
