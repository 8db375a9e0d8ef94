"""What happens by itself: commands expire, sightings are written, what is beyond its bound is dropped."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from osqbox.settings import Retention

from .errors import IndexerDown
from .sqlite import events

if TYPE_CHECKING:
    from .front import Comms

log = logging.getLogger(__name__)

EXPIRE_S = 1.0
SAVE_S = 5.0
PRUNE_S = 60.0


class Upkeep:
    """`run` until cancelled, then `finish`."""

    def __init__(self, comms: Comms, retention: Retention) -> None:
        self._comms = comms
        self._retention = retention

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._every, EXPIRE_S, self.expire)
            nursery.start_soon(self._every, SAVE_S, self.flush)
            nursery.start_soon(self._every, PRUNE_S, self.prune)

    @staticmethod
    async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await trio.sleep(seconds)
            await _try(work)

    async def finish(self, within_s: float) -> None:
        """The last sightings, unless the indexer is slow: they may be lost, and the box is about to end."""
        with trio.move_on_after(within_s):
            await _try(self.flush)

    async def expire(self) -> None:
        while await self._comms.indexer.commands.expire(self._comms.clock.now()):
            await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        """Write when agents were last heard of."""
        if seen := self._comms.api.take_seen():
            await self._comms.indexer.agents.note_seen(seen)

    async def prune(self) -> None:
        """Oldest first, in small writes that let the others pass."""
        drop_events = partial(events.prune, keep_rows=self._retention.comms_events)
        while await self._comms.store.write(drop_events, bulk=True):
            pass
        await self._comms.indexer.prune(self._retention)


async def _try(work: Callable[[], Awaitable[None]]) -> None:
    """A full disk or an indexer that is away must not end the box."""
    try:
        await work()
    except IndexerDown:
        pass  # its client has said so in the log, once
    except Exception:
        log.exception("upkeep of the comms API failed; it is tried again")
