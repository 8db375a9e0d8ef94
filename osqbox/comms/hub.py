"""Who is listening for commands on this box, and how exactly the addressed are woken.

    publish ──COMMIT──▶ Change ──▶ Hub.changed ──▶ the seats of the addressed agents ──▶ each reads its own commands

An agent has one *seat*: a stream (`Hub.attach`) or a long poll (`Hub.poll`), the newest wins. A seat keeps no queue:
when it is woken it reads the agent's next commands from the indexer, a page at a time, so that a reader who is slow, or
away for a week, costs one page of memory.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec
import trio

from osqbox.clock import Clock

from .errors import CommsError, IndexerDown, busy
from .messages import Agent, AgentStatus, Change, Command, CommandStatus
from .seams import Indexer

Reason: TypeAlias = Literal["replaced", "token_expired", "revoked", "box_stopping", "too_slow"]

RETRY_S: dict[Reason, tuple[float, float]] = {
    "replaced": (30, 60),  # two programs with one identity must not throw each other out without end
    "token_expired": (0, 0),
    "revoked": (60, 120),
    "box_stopping": (0.5, 5),  # spread: everybody is told at once
    "too_slow": (1, 10),
}
"""Least and most of what a stream that ends suggests to wait before the next."""
INDEXER_RETRY_S = 1.0
"""A stream outlives an indexer that is away: it asks again after this time."""
DOUBT_S = 60.0
"""A command that was sent by a box of which nothing has been heard since: longer than any answer may take to write."""


@dataclass(frozen=True, slots=True)
class HubBounds:
    seats: int = 50_000
    """Streams and polls together; file descriptors are the real bound."""
    page_commands: int = 100
    """Read and written at once."""
    poll_commands: int = 1000
    """In one answer to a long poll."""
    poll_bytes: int = 4 * 1024 * 1024
    """Of arguments in one answer to a long poll, unless a single command has more."""
    poll_hold_s: float = 60.0
    """How long an empty poll is held at most when it does not say; polls get 0.8 to 1 of it."""
    poll_hold_most_s: float = 570.0
    """Below the 11 minutes after which the agents of 2024 give up, with room for their network."""


@dataclass(frozen=True, slots=True)
class Deliver:
    commands: list[Command]


@dataclass(frozen=True, slots=True)
class Reset:
    """The number the agent says it was at is unknown: everything it has not acknowledged comes again."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The last item of a stream."""

    reason: Reason
    retry_ms: int


Item: TypeAlias = Deliver | Reset | Bye


@dataclass(frozen=True, slots=True)
class HubStatistics:
    streams: int
    polls: int
    wakes: int
    """How often a seat woke, for whatever reason but its own time-outs."""
    delivered: int
    redelivered: int
    ended: dict[str, int]
    """Streams and polls that were ended, by reason."""


@dataclass(eq=False, slots=True)
class _Seat:
    """One live connection of an agent."""

    agent: Agent
    connection: str
    expires_at: float
    is_poll: bool
    after: int | None = None
    """Of a poll that keeps its place: the seq behind which it reads."""
    wake: trio.Event = field(default_factory=trio.Event)
    is_behind: bool = True
    """There may be commands that it has not read."""
    is_doubtful: bool = True
    """The agent may have been revoked, at first since its token was checked."""
    is_announced: bool = False
    """Every box knows of it: from here on another connection's announcement is a newer one's."""
    taken: list[Command] = field(default_factory=list)
    """Of a poll: noted as sent, or about to be."""
    has_gone: bool = False
    """Of a poll: the client has left."""
    bye: Bye | None = None

    def end(self, bye: Bye) -> None:
        self.bye = self.bye or bye
        self.wake.set()


class Hub:
    """`changed` may be called from wherever the loop is; everything else by the tasks of connections."""

    def __init__(
        self,
        indexer: Indexer,
        clock: Clock,
        bounds: HubBounds | None = None,
        on_attached: Callable[[str, str], None] | None = None,
        is_closed: Callable[[str], bool] | None = None,
    ) -> None:
        """``on_attached``: told the uuid and connection of every new seat, so that other boxes end the agent's older
        one; returns at once. ``is_closed``: whether a tenant is."""
        self.indexer = indexer
        self._commands = indexer.commands
        self._clock = clock
        self._bounds = bounds or HubBounds()
        self._on_attached = on_attached
        self._is_closed = is_closed or (lambda _: False)
        self._seats: dict[str, _Seat] = {}
        self._taken = 0
        self._polls = 0
        self._stopping = False
        self._started_at = clock.now()
        self._wakes = self._delivered = self._redelivered = 0
        self._ended: Counter[str] = Counter()

    # what others tell

    def changed(self, change: Change) -> None:
        """Something is durable that concerns these agents: wakes them, and nobody else."""
        match change.kind:
            case "commands":
                for seat in self._addressed(change):
                    seat.is_behind = True
                    seat.wake.set()
            case "agents":
                for seat in self._addressed(change):
                    seat.is_doubtful = True
                    seat.wake.set()
            case "attached":
                for seat in self._addressed(change):
                    if seat.connection == change.connection:
                        seat.is_announced = True
                    elif seat.is_announced:
                        self._end(seat, "replaced")

    def stop(self) -> None:
        """End every stream and poll; later ones end at once."""
        self._stopping = True
        for seat in list(self._seats.values()):
            self._end(seat, "box_stopping")

    def _addressed(self, change: Change) -> Iterable[_Seat]:
        if change.agents is not None:
            return [seat for agent in change.agents if (seat := self._seats.get(agent))]
        seats = self._seats.values()
        return [seat for seat in seats if change.tenant in (None, seat.agent.tenant)]

    # seats

    @property
    def is_occupied(self) -> bool:
        """Somebody waits for commands."""
        return self._taken > 0

    def check_room(self) -> None:
        """Raises CommsError 503 when one more agent could not wait here."""
        if self._taken >= self._bounds.seats:
            raise busy(f"expected at most {self._bounds.seats} agents waiting for commands: try again later")

    def _sit(self, seat: _Seat) -> None:
        self.check_room()
        older = self._seats.get(seat.agent.uuid)
        if older is not None:
            self._end(older, "replaced")
        self._seats[seat.agent.uuid] = seat
        self._taken += 1
        self._polls += seat.is_poll
        if self._stopping:
            self._end(seat, "box_stopping")
        elif self._on_attached is not None:
            self._on_attached(seat.agent.uuid, seat.connection)

    def _leave(self, seat: _Seat) -> None:
        self._taken -= 1
        self._polls -= seat.is_poll
        if self._seats.get(seat.agent.uuid) is seat:
            del self._seats[seat.agent.uuid]

    def _end(self, seat: _Seat, reason: Reason) -> None:
        if seat.bye is None:
            self._ended[reason] += 1
            seat.end(Bye(reason, round(random.uniform(*RETRY_S[reason]) * 1000)))  # noqa: S311 - spreads a herd

    async def _settle(self, seat: _Seat) -> None:
        """End it if its token is over or the agent is no longer welcome."""
        if self._clock.now() >= seat.expires_at:
            self._end(seat, "token_expired")
        if seat.is_doubtful and seat.bye is None:
            agent = await self.indexer.agents.find(seat.agent.uuid)
            seat.is_doubtful = False
            if agent is None or not self._is_welcome(agent, seat):
                self._end(seat, "revoked")

    def _is_welcome(self, agent: Agent, seat: _Seat) -> bool:
        is_same_key = agent.key_version == seat.agent.key_version
        return is_same_key and agent.status is not AgentStatus.REVOKED and not self._is_closed(agent.tenant)

    async def _rest(self, seat: _Seat, within_s: float) -> None:
        """Until somebody wakes it, its token is over, or ``within_s`` have passed."""
        left_s = min(within_s, seat.expires_at - self._clock.now())
        with trio.move_on_after(max(0.0, left_s)):
            await seat.wake.wait()
            self._wakes += 1
        if seat.wake.is_set():
            seat.wake = trio.Event()

    # streams

    @asynccontextmanager
    async def attach(
        self, agent: Agent, *, connection: str, after: int | None, expires_at: float
    ) -> AsyncIterator[CommandStream]:
        """The agent's commands behind ``after`` as a stream; None: all that it has not acknowledged.

        ``connection`` is unique among all boxes, ``expires_at`` that of the token. Ends the agent's older stream or
        poll. Raises CommsError 503 when too many are attached.
        """
        seat = _Seat(agent, connection, expires_at, is_poll=False)
        self._sit(seat)
        try:
            yield CommandStream(self, seat, after)
        finally:
            self._leave(seat)

    # long polls

    async def poll(
        self,
        agent: Agent,
        *,
        connection: str,
        wait_s: float | None = None,
        expires_at: float,
        wait_gone: Callable[[], Awaitable[None]] | None = None,
        after: int | None = None,
    ) -> list[Command]:
        """What is offered to an agent that keeps commands by id; nothing: answer 408.

        With ``after`` it keeps its place as a stream's agent does: everything behind it that is not acknowledged, also
        what was given before; from the beginning when that number is unknown.

        The commands are noted as sent: the caller says with `answered` how the answer ended. ``wait_s``: None is a
        jittered default. Raises CommsError 403 when the agent is revoked meanwhile, IndexerDown.
        """
        seat = _Seat(agent, connection, expires_at, is_poll=True, after=after)
        self._sit(seat)
        try:
            return await self._while_there(seat, self._hold_s(wait_s), wait_gone)
        except BaseException:  # Cancelled, also in a group; or the indexer did not say whether it noted them
            if seat.taken:
                await self.answered(agent.uuid, seat.taken, written=False)
            raise
        finally:
            self._leave(seat)

    async def _while_there(
        self, seat: _Seat, hold_s: float, wait_gone: Callable[[], Awaitable[None]] | None
    ) -> list[Command]:
        """What the poll gets; nothing when the client has gone."""
        if wait_gone is None:
            return await self._wait_commands(seat, hold_s)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_gone, seat, wait_gone)
            try:
                await self._wait_commands(seat, hold_s)
            except Exception as error:  # noqa: BLE001 - raised again past the nursery, which would wrap it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return seat.taken

    async def answered(self, agent: str, commands: Sequence[Command], *, written: bool) -> None:
        """How the answer to a poll ended. Also when the caller is being cancelled."""
        with trio.CancelScope(shield=True), suppress(IndexerDown, trio.ClosedResourceError):
            await self._commands.note_answered(agent, [each.id for each in commands], written=written)

    @staticmethod
    async def _heed_gone(seat: _Seat, wait_gone: Callable[[], Awaitable[None]]) -> None:
        await wait_gone()
        seat.has_gone = True
        seat.wake.set()

    def _hold_s(self, wait_s: float | None) -> float:
        most_s = self._bounds.poll_hold_most_s
        if wait_s is not None:
            return min(max(0.0, wait_s), most_s)
        return min(self._bounds.poll_hold_s, most_s) * random.uniform(0.8, 1.0)  # noqa: S311 - spreads a herd

    async def _wait_commands(self, seat: _Seat, hold_s: float) -> list[Command]:
        until = trio.current_time() + hold_s
        while True:
            await self._settle(seat)
            if seat.bye is not None:
                return self._farewell(seat.bye)
            if seat.is_behind and not seat.has_gone:
                seat.is_behind = False
                if commands := await self._take(seat):
                    return commands
            if seat.has_gone or trio.current_time() >= until:
                return []
            await self._rest(seat, until - trio.current_time())

    @staticmethod
    def _farewell(bye: Bye) -> list[Command]:
        if bye.reason == "revoked":
            raise CommsError(403, "invalid_token", "Invalid JWT token", code=2706)
        return []

    async def _take(self, seat: _Seat) -> list[Command]:
        """What may be sent to this poll, noted as sent."""
        if offered := await self._offered(seat.agent.uuid, seat.after):
            seat.taken = offered
            await self._commands.note_sent(seat.agent.uuid, [each.id for each in offered], self._clock.now())
            self._count(offered)
        return offered

    async def _offered(self, agent: str, after: int | None) -> list[Command]:
        offered: list[Command] = []
        seq, page = 0, self._bounds.page_commands
        if after is not None and await self._commands.known_seq(agent, after):
            seq = after
        while len(offered) < self._bounds.poll_commands:
            commands = await self._commands.after(agent, seq, limit=page)
            offered += [each for each in commands if after is not None or self._may_poll(each)]
            if len(commands) < page:
                break
            seq = commands[-1].seq
        return self._bounded(offered[: self._bounds.poll_commands])

    def _bounded(self, commands: list[Command]) -> list[Command]:
        """From the first on, as many as one answer may hold."""
        left_bytes = self._bounds.poll_bytes
        for place, each in enumerate(commands):
            left_bytes -= len(msgspec.json.encode(each.action.args))
            if left_bytes < 0 and place:
                return commands[:place]
        return commands

    def _may_poll(self, command: Command) -> bool:
        """An agent that keeps commands by id takes a second copy for a failure, so none is sent twice without need.

        Again only if the answer did not get out, or nobody is left who could say: its box was started anew, or is
        another that has been silent for longer than an answer takes.
        """
        if command.status is CommandStatus.PENDING:
            return True
        sent_at = command.sent_at or 0.0
        return not command.answered and (sent_at < self._started_at or self._clock.now() - sent_at > DOUBT_S)

    def _count(self, commands: Sequence[Command]) -> None:
        self._delivered += len(commands)
        self._redelivered += sum(each.deliveries > 0 for each in commands)

    def statistics(self) -> HubStatistics:
        return HubStatistics(
            self._taken - self._polls, self._polls, self._wakes, self._delivered, self._redelivered, dict(self._ended)
        )


class CommandStream:
    """An agent's commands in order, as they come: iterate, or ask with `next`. The last item is a `Bye`."""

    def __init__(self, hub: Hub, seat: _Seat, after: int | None) -> None:
        self._hub = hub
        self._seat = seat
        self._after = after
        self._position: int | None = None
        """The seq behind which it reads; None before the first look."""
        self._has_ended = False

    @property
    def agent(self) -> Agent:
        return self._seat.agent

    def __aiter__(self) -> CommandStream:
        return self

    async def __anext__(self) -> Item:
        while not self._has_ended:
            if (item := await self.next()) is not None:
                return item
        raise StopAsyncIteration

    async def next(self, within_s: float = float("inf")) -> Item | None:
        """The next item; None when there is none ``within_s``, or for good after the Bye."""
        until = trio.current_time() + within_s
        while not self._has_ended:
            try:
                if (item := await self._look()) is not None:
                    return item
                pause_s = within_s
            except IndexerDown:
                self._seat.is_behind = True
                pause_s = INDEXER_RETRY_S
            left_s = until - trio.current_time()
            if left_s <= 0:
                break
            await self._hub._rest(self._seat, min(pause_s, left_s))
        return None

    @property
    def has_ended(self) -> bool:
        """It has said bye."""
        return self._has_ended

    async def written(self, ids: Sequence[str]) -> None:
        """These went out completely. That is no acknowledgement: their results are."""
        await self._note(ids, written=True)

    async def not_written(self, ids: Sequence[str]) -> None:
        """The write of these failed: they are pending again. Also when the caller is being cancelled."""
        with trio.CancelScope(shield=True):
            await self._note(ids, written=False)

    def end(self, reason: Reason) -> None:
        """From the writer's side, such as for a reader that is too slow."""
        self._hub._end(self._seat, reason)

    async def _note(self, ids: Sequence[str], *, written: bool) -> None:
        # Should it fail, they stay as sent: offered again to a stream that begins anew.
        with suppress(IndexerDown, trio.ClosedResourceError):
            if ids:
                await self._hub._commands.note_answered(self.agent.uuid, ids, written=written)

    async def _look(self) -> Item | None:
        seat, hub = self._seat, self._hub
        await hub._settle(seat)
        if seat.bye is not None:
            self._has_ended = True
            return seat.bye
        if self._position is None and await self._begin():
            return Reset()
        if not seat.is_behind:
            return None
        seat.is_behind = False
        commands = await hub._commands.after(self.agent.uuid, self._position or 0, limit=hub._bounds.page_commands)
        if not commands:
            return None
        seat.is_behind = True  # there may be another page; and should noting it fail, this one is read again
        await hub._commands.note_sent(self.agent.uuid, [each.id for each in commands], hub._clock.now())
        self._position = commands[-1].seq
        hub._count(commands)
        return Deliver(commands)

    async def _begin(self) -> bool:
        """Find the place; whether it is unknown where the agent was."""
        known = self._after is None or await self._hub._commands.known_seq(self.agent.uuid, self._after)
        self._position = self._after or 0 if known else 0
        return not known
