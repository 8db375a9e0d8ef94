"""Stateless events between their receipt and the engine: one bounded queue, drained in order, every event counted.

    take() ──▶ queue (events and bytes bounded) ──▶ run(): batches, again while the engine is down ──▶ Engine.deliver
       └─▶ busy (503) when full

An agent is answered when its events are in the queue. A crash loses at most what waits there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from .errors import CommsError, busy
from .messages import Event

log = logging.getLogger(__name__)

EVENTS_MAX = 100_000
BYTES_MAX = 64 * 1024 * 1024
EVENT_BYTES = 128
"""Counted for an event besides its data."""
AGENT_SHARE = 0.25
"""Of the queue, for one agent: a flood of one leaves room for the others."""
BATCH_EVENTS = 1_000
BATCH_BYTES = 1024 * 1024
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0


class EngineDown(Exception):
    """The engine did not confirm; the same events are given to it again. The text says why, without their content."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How much of a batch has an end. What is left is given again, in order."""

    delivered: int
    dropped: int = 0
    """Refused by the engine for what they are."""
    left: Sequence[int] = ()
    """Their places in the batch, ascending."""
    why: str = ""
    """Why something is left."""


class Engine(Protocol):
    """Where stateless events go. Events of one agent arrive in order."""

    async def deliver(self, events: Sequence[Event]) -> Delivery:
        """Returns when every event has an end or is left. Raises EngineDown when none has."""
        ...

    def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class IntakeStatistics:
    """``accepted`` is always ``delivered + dropped + waiting``."""

    accepted: int
    delivered: int
    dropped: int
    waiting: int
    waiting_bytes: int
    refused: int
    """Requests that found no room; none of their events was accepted."""
    retries: int
    trouble: str
    """Why the engine takes nothing now; empty when it does."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    event: Event
    weight_bytes: int
    """Its data is encoded already (see `bodies.stored_events`)."""


@dataclass(frozen=True, slots=True)
class _Room:
    events: int
    bytes: int

    def plus(self, other: _Room | None, sign: int = 1) -> _Room:
        return self if other is None else _Room(self.events + sign * other.events, self.bytes + sign * other.bytes)

    def fits(self, into: _Room) -> bool:
        return self.events <= into.events and self.bytes <= into.bytes


def _by_agent(waiting: Sequence[_Waiting]) -> dict[str, _Room]:
    found: dict[str, list[int]] = {}
    for each in waiting:
        room = found.setdefault(each.event.agent, [0, 0])
        room[0] += 1
        room[1] += each.weight_bytes
    return {agent: _Room(*room) for agent, room in found.items()}


class Intake:
    """Run `run` in a nursery; `drain` ends it."""

    def __init__(
        self,
        engine: Engine,
        *,
        events_max: int = EVENTS_MAX,
        bytes_max: int = BYTES_MAX,
        agent_share: float = AGENT_SHARE,
    ) -> None:
        self._engine = engine
        self._whole = _Room(events_max, bytes_max)
        self._share = _Room(int(events_max * agent_share), int(bytes_max * agent_share))
        self._used = _Room(0, 0)
        self._used_by: dict[str, _Room] = {}
        self._queue: deque[_Waiting] = deque()
        self._in_flight: list[_Waiting] = []
        self._accepted = self._delivered = self._dropped = self._refused = self._retries = 0
        self._trouble = ""
        self._wake = trio.Event()
        self._empty = trio.Event()
        self._empty.set()
        self._closing = False
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()

    def take(self, events: Sequence[Event]) -> None:
        """One agent's request: all of its events or none. Raises CommsError 503 without room, 413 if it never fits."""
        waiting = [_Waiting(event, len(memoryview(event.data)) + EVENT_BYTES) for event in events]
        try:
            if self._closing:
                raise busy("the box is stopping; send the events again")
            self._check_room(waiting)
        except CommsError:
            self._refused += 1
            raise
        self._queue.extend(waiting)
        self._accepted += len(events)
        self._account(waiting, 1)
        if events:
            self._empty = trio.Event() if self._empty.is_set() else self._empty
            self._wake.set()

    def _check_room(self, waiting: Sequence[_Waiting]) -> None:
        for agent, new in _by_agent(waiting).items():
            if not new.fits(self._share):
                expected = f"at most {self._share.events} events and {self._share.bytes} bytes at once"
                got = f"{new.events} events of {new.bytes} bytes"
                raise CommsError(413, "too_large", f"body: expected {expected}, got {got}; send less at once")
            if not new.plus(self._used).fits(self._whole):
                raise busy(f"{self._used.events} events wait for the engine, no more fit; send these again later")
            if not new.plus(self._used_by.get(agent)).fits(self._share):
                raise busy("too many events of this agent wait for the engine; send these again later")

    def _account(self, waiting: Sequence[_Waiting], sign: int) -> None:
        """Of events that came into the queue (1) or left it (-1)."""
        for agent, more in _by_agent(waiting).items():
            self._used = self._used.plus(more, sign)
            left = self._used_by[agent] = self._used_by.get(agent, _Room(0, 0)).plus(more, sign)
            if not left.events:
                del self._used_by[agent]

    async def run(self) -> None:
        """Deliver until `drain` has ended."""
        self._ended = trio.Event()
        try:
            with self._scope:
                await self._deliver_all()
        finally:
            self._ended.set()

    async def _deliver_all(self) -> None:
        pause_s = RETRY_MIN_S
        while True:
            if not self._in_flight and not self._queue:
                self._empty.set()
                self._wake = trio.Event()
                await self._wake.wait()
            if await self._deliver(self._next_batch()):
                pause_s = RETRY_MIN_S
            else:
                self._retries += 1
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _next_batch(self) -> list[_Waiting]:
        """What was left of the last batch, and the next events behind it, in order."""
        size_bytes = sum(each.weight_bytes for each in self._in_flight)
        while self._queue and len(self._in_flight) < BATCH_EVENTS and size_bytes < BATCH_BYTES:
            self._in_flight.append(self._queue.popleft())
            size_bytes += self._in_flight[-1].weight_bytes
        return self._in_flight

    async def _deliver(self, batch: list[_Waiting]) -> bool:
        """True when all of the batch has an end."""
        try:
            done = await self._engine.deliver([waiting.event for waiting in batch])
        except EngineDown as error:
            self._note(str(error))
            return False
        except Exception as error:  # it must not end the box: what waits is given to the engine again
            if not self._trouble:
                log.exception("events could not be given to the engine")
            self._note(f"{type(error).__name__}: {error}")
            return False
        self._delivered += done.delivered
        self._dropped += done.dropped
        left = set(done.left)
        self._in_flight = [each for place, each in enumerate(batch) if place in left]
        self._account([each for place, each in enumerate(batch) if place not in left], -1)
        self._note(done.why)
        return not self._in_flight

    def _note(self, trouble: str) -> None:
        if trouble and not self._trouble:
            log.warning("events wait, the engine does not take them: %s", trouble)
        elif self._trouble and not trouble:
            log.info("the engine takes events again")
        self._trouble = trouble

    async def drain(self, timeout_s: float) -> int:
        """Take no more, and wait for what is queued; how many events had to be given up, which are counted as dropped.

        `run` has ended when this returns.
        """
        self._closing = True
        with trio.move_on_after(timeout_s):
            await self._empty.wait()
        with trio.CancelScope(shield=True):
            self._scope.cancel()
            await self._ended.wait()
        given_up = self._accepted - self._delivered - self._dropped
        if given_up:
            log.warning("%d events were not taken by the engine before the end: %s", given_up, self._trouble)
        self._dropped += given_up
        self._queue.clear()
        self._in_flight.clear()
        self._used, self._used_by = _Room(0, 0), {}
        return given_up

    def statistics(self) -> IntakeStatistics:
        return IntakeStatistics(
            accepted=self._accepted,
            delivered=self._delivered,
            dropped=self._dropped,
            waiting=self._accepted - self._delivered - self._dropped,
            waiting_bytes=self._used.bytes,
            refused=self._refused,
            retries=self._retries,
            trouble=self._trouble,
        )
