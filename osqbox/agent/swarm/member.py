"""One agent of a swarm: a core, and its threads on a heap that all agents share.

A thread runs until it sleeps or has to wait for the world; short queries are answered on the spot. Who drives it
performs the one command that comes back and resumes the thread with the outcome. Pure.
"""

from __future__ import annotations

import heapq
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from osqbox.agent.client import SETTINGS, Core, Failure, HostDetails, Query, Send, Sleep, Thread
from osqbox.agent.own import own_tables
from osqbox.agent.profile.dice import Dice
from osqbox.agent.sql import Cancelled, QueryResult, Tables
from osqbox.agent.swarm.plan import Trouble
from osqbox.agent.swarm.tally import HELD, Tally
from osqbox.agent.views import view_tables

MAX_LAG_S = 1.0
"""A thread that wakes up later than this is told the real time instead of the one it asked for."""
RESTART_PAUSE_S = 1.0
HELD_AFTER_S = 1.0
SHELLS = "shells"
MAY_BE_HELD = frozenset({"read", SHELLS})
"""Calls a server keeps open until there is something to say."""
ON_THE_SPOT_S = 0.02
"""Queries that take longer are run again in a thread, so that they hold back nobody else."""
QUERY_TIMEOUT_S = 60.0
SLOW_PIECE_BYTES = 256
SLOW_PAUSE_S = 0.1
"""A slow agent pauses after each piece: 40 kB are all it can send within osqueryd's 16 s."""
_HOST_TABLES = ("os_version", "osquery_info", "platform_info", "system_info")

Work = Send | Query
"""What a member cannot do by itself."""


class Host(Protocol):
    """The machine an agent pretends to be."""

    def tables(self, now: Callable[[], float]) -> Tables: ...


class Patience:
    """A `Cancelled` that ends a query which takes longer than `ON_THE_SPOT_S` of ``clock``."""

    __slots__ = ("_clock", "_until", "is_over")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = clock() + ON_THE_SPOT_S
        self.is_over = False
        """Whether it has ended one."""

    def is_set(self) -> bool:
        self.is_over = self.is_over or self._clock() > self._until
        return self.is_over


@dataclass(slots=True, eq=False)
class Strand:
    """One of an agent's threads."""

    name: str
    start: Callable[[], Thread[None]]
    running: Thread[None]
    wake: str = ""
    """What it sleeps on besides time."""
    turn: int = 0
    """Counts its sleeps: an entry of the heap for an earlier one is void."""
    queries: int = 0


class Timeline:
    """Who wakes up when."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Member, Strand, int, bool | None]] = []
        self._number = 0

    def add(self, due: float, member: Member, strand: Strand, outcome: bool | None) -> None:
        """``outcome`` is what the thread is resumed with: None starts it, True is a wake, False the end of a sleep."""
        self._number += 1
        heapq.heappush(self._heap, (due, self._number, member, strand, strand.turn, outcome))

    @property
    def next_due(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> tuple[float, Member, Strand, bool | None] | None:
        """The earliest sleeper whose time has come: the time to tell it, who it is, and the outcome.

        Punctual agents see the time they asked for: the same seed and start give the same logs.
        """
        while self._heap and self._heap[0][0] <= now:
            due, _, member, strand, turn, outcome = heapq.heappop(self._heap)
            if turn == strand.turn:
                strand.wake = ""
                return due if now - due < MAX_LAG_S else now, member, strand, outcome
        return None


@dataclass(slots=True)
class Shared:
    """What all members of a swarm have in common."""

    timeline: Timeline
    tally: Tally
    dice: Dice
    trouble: Trouble
    stopwatch: Callable[[], float]
    """Seconds from anywhere, never back."""
    began: float
    """The agents' time at the start."""
    shells: Callable[[Member], Thread[None]] | None = None
    """The thread that asks for remote shells, where the swarm gives some."""


class SqlEngine(Protocol):
    """As much of `osqbox.agent.sql.Engine` as a member needs."""

    def query(
        self, sql: str, *, tables: Tables | None = None, timeout_s: float = ..., cancelled: Cancelled | None = None
    ) -> QueryResult: ...

    def raw_rows(self, name: str, *, tables: Tables | None = None) -> list[dict[str, str]]: ...


class Member:
    __slots__ = ("_shared", "_strands", "core", "engine", "host", "index", "is_slow", "skew_s")

    def __init__(self, index: int, core: Core, host: Host, engine: SqlEngine, shared: Shared) -> None:
        self.index = index
        self.core = core
        self.host = host
        self.engine = engine
        self._shared = shared
        dice, trouble = shared.dice, shared.trouble
        self.skew_s = trouble.clock_skew_s * (2 * dice.share("skew", index) - 1)
        self.is_slow = dice.share("slow", index) < trouble.slow_writes
        self._strands: list[Strand] = []

    def begin(self, now: float) -> None:
        """Join the timeline: enrollment first, the rest when that is done."""
        self._shared.tally.agents += 1
        self._shared.tally.series.at(now - self._shared.began).agents = self._shared.tally.agents
        self._add("start", self._enrolled_and_configured, now)

    def _enrolled_and_configured(self) -> Thread[None]:
        yield from self.core.enroll()
        yield from self.core.first_config()

    def _add(self, name: str, start: Callable[[], Thread[None]], now: float) -> None:
        strand = Strand(name, start, start())
        self._strands.append(strand)
        self._shared.timeline.add(now, self, strand, None)

    # -- running -------------------------------------------------------------------------------------------------

    def resume(self, strand: Strand, outcome: Any, now: float) -> Work | None:
        """Run a thread until it waits; None when it sleeps or is over."""
        while True:
            self.core.now = now + self.skew_s
            try:
                command = strand.running.send(outcome)
            except StopIteration:
                self._ended(strand, now)
                return None
            except Exception as error:  # noqa: BLE001 - whatever a server sent, the agent goes on
                self._failed(strand, error, now)
                return None
            finally:
                self._settle(now)
            match command:
                case Sleep():
                    strand.turn += 1
                    strand.wake = command.wake
                    self._shared.timeline.add(now + command.seconds, self, strand, False)
                    return None
                case HostDetails():
                    outcome = self._host_details(now)
                case Query():
                    outcome = self._query(strand, command.sql, now)
                    if outcome is None:
                        return command
                case Send():
                    return command
                case _:
                    raise AssertionError(f"unknown command {command!r}")

    def wake(self, name: str, now: float) -> None:
        """Wake the threads that sleep on ``name``."""
        for strand in self._strands:
            if strand.wake == name:
                strand.wake = ""
                strand.turn += 1
                self._shared.timeline.add(now, self, strand, True)

    def forget_key(self, now: float) -> None:
        """Lose the node key, as a wiped database does, and ask for the config, which enrolls first."""
        if self.core.node_key:
            self.core.store.delete(SETTINGS, "nodeKey")
            self._shared.tally.enrolled -= 1
            self.wake("config", now)

    def _ended(self, strand: Strand, now: float) -> None:
        self._strands.remove(strand)
        if strand.name == "start":
            core = self.core
            self._add("config", core.config_refresh, now)
            self._add("log", core.log_forwarder, now)
            self._add("distributed", core.distributed, now)
            self._add("scheduler", core.scheduler, now)
            if self._shared.shells is not None:
                self._add(SHELLS, partial(self._shared.shells, self), now)

    def _failed(self, strand: Strand, error: Exception, now: float) -> None:
        self._shared.tally.error(strand.name, f"{type(error).__name__}: {error}", now - self._shared.began)
        strand.running = strand.start()
        strand.turn += 1
        self._shared.timeline.add(now + RESTART_PAUSE_S, self, strand, None)

    def _settle(self, now: float) -> None:
        """After every step: sleepers are woken, what happened is counted."""
        core = self.core
        if core.wakes:
            wakes, core.wakes = core.wakes, []
            for name in wakes:
                self.wake(name, now)
        if core.events:
            events, core.events = core.events, []
            for kind, facts in events:
                self._count(kind, facts, now)

    def _count(self, kind: str, facts: Mapping[str, Any], now: float) -> None:
        tally = self._shared.tally
        match kind:
            case "enrolled":
                tally.enrollments += 1
                tally.enrolled += 1
            case "node_invalid":
                tally.node_invalid += 1
                tally.enrolled -= 1
            case "call_failed":
                tally.error(facts["call"], facts["reason"], now - self._shared.began)
            case "enroll_failed":
                tally.error("enroll", facts["reason"], now - self._shared.began)
            case "written":
                tally.answers += len(facts["queries"])
            case "logged":
                tally.log_lines += facts["lines"]

    # -- SQL -----------------------------------------------------------------------------------------------------

    def tables(self, now: float) -> Tables:
        """Made for one query, so that an idle agent holds none."""
        own, views = own_tables(self.core), view_tables(self.core.views)
        return ChainMap(own, self.host.tables(lambda: now + self.skew_s), views)  # type: ignore[arg-type]

    def long_query(self, sql: str, now: float, cancelled: Cancelled | None = None) -> Callable[[], QueryResult]:
        """Runs a query that takes longer than the rest of the swarm should wait; to be called in a thread."""
        return partial(self.engine.query, sql, tables=self.tables(now), timeout_s=QUERY_TIMEOUT_S, cancelled=cancelled)

    def _query(self, strand: Strand, sql: str, now: float) -> QueryResult | None:
        """The result; None when the query takes longer than the rest of the swarm should wait."""
        shared = self._shared
        strand.queries += 1
        if shared.dice.share("query", self.index, strand.name, strand.queries) < shared.trouble.failing_queries:
            return QueryResult(status=1, message="a failure asked for by --fail-queries")
        patience = Patience(shared.stopwatch)
        result = self.engine.query(sql, tables=self.tables(now), cancelled=patience)
        return None if patience.is_over else result

    def _host_details(self, now: float) -> dict[str, dict[str, str]]:
        tables = self.tables(now)
        found = {name: self.engine.raw_rows(name, tables=tables) for name in _HOST_TABLES}
        return {name: rows[0] for name, rows in found.items() if rows}


def counted_as(command: Send, outcome: bytes | Failure, took_s: float) -> str:
    """The name a call's duration is counted under: a read that the server kept open is not a slow one."""
    is_held = command.call in MAY_BE_HELD and took_s >= HELD_AFTER_S and isinstance(outcome, bytes)
    return HELD if is_held else command.call
