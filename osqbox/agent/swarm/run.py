"""A swarm on Trio: one task wakes the sleepers, one more for each call that is on its way; idle agents have none."""

from __future__ import annotations

import contextlib
import os
import resource
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from osqbox.agent import jsonrpc
from osqbox.agent.client import Failure, Query, Send, Thread
from osqbox.agent.flags import Flags
from osqbox.agent.jsonrpc import Dialect
from osqbox.agent.profile.dice import Dice
from osqbox.agent.sql import QueryResult
from osqbox.agent.swarm.build import Hosts, Nursery, swarm_flags
from osqbox.agent.swarm.member import (
    MAX_LAG_S,
    MAY_BE_HELD,
    SHELLS,
    SLOW_PAUSE_S,
    SLOW_PIECE_BYTES,
    Member,
    Shared,
    Strand,
    Timeline,
    Work,
    counted_as,
)
from osqbox.agent.swarm.plan import SwarmPlan, is_loopback, met, server
from osqbox.agent.swarm.tally import Cost, Tally, report
from osqbox.agent.wire import CallFailed, Channel, Transport

PROGRESS_EVERY_S = 0.5
DRAIN_S = 2.0
_STEPS_AT_ONCE = 16
_THREADS = 2
_URGENT = frozenset({"enroll", "config"})

Trace = Callable[[int, Send, bytes | Failure], None]
"""Sees every call: the agent's number, what it sent, what came of it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How it goes, every half second."""

    elapsed_s: float
    agents: int
    wanted: int
    enrolled: int
    requests: int
    errors: int
    requests_per_s: float
    """Since the last time."""
    errors_per_s: float
    answers: int


OnProgress = Callable[[Progress], None]


async def run_swarm(
    plan: SwarmPlan,
    hosts: Hosts,
    tls: ssl.SSLContext,
    *,
    on_progress: OnProgress | None = None,
    trace: Trace | None = None,
    stop: trio.Event | None = None,
    tally: Tally | None = None,
) -> dict[str, Any]:
    """Run a whole swarm and return its report; a set ``stop`` ends it early. ``tally`` may be watched meanwhile.

    Raises BadUsage for flags that osqueryd would not take, Unsafe for a proxy elsewhere.
    """
    stop, tally = trio.Event() if stop is None else stop, Tally() if tally is None else tally
    swarm = _Swarm(plan, hosts, tls, on_progress, trace, stop, tally)
    return await swarm.run()


def _transport(plan: SwarmPlan) -> Transport:
    """What osqueryd's flags say about connections. Raises Unsafe for a proxy on another machine."""
    flags = Flags(swarm_flags(plan))
    proxy = flags.text("proxy_hostname")
    if proxy and not plan.allow_remote:
        server(f"https://{proxy}")
    return Transport(
        session_reuse=flags.true("tls_session_reuse"),
        session_timeout_s=float(flags.integer("tls_session_timeout")),
        accept_gzip=flags.true("tls_accept_gzip"),
        proxy=proxy,
    )


class _Wire(Channel):
    """A member's connection; its calls take turns."""

    def __init__(
        self, plan: SwarmPlan, tls: ssl.SSLContext, transport: Transport, tally: Tally, *, is_slow: bool
    ) -> None:
        super().__init__(plan.server.hostname, tls, transport)
        self.turn = trio.Lock()
        self._allow_remote = plan.allow_remote
        self._tally = tally
        self._is_slow = is_slow

    async def _connect(self, target: Any) -> Any:
        if not self._allow_remote and not is_loopback(target.host):  # a redirect must not lead the crowd astray
            raise CallFailed(f"Request error: not following to {target.host} without --allow-remote")
        before = self._stream
        stream, connection = await super()._connect(target)
        self._tally.connections += stream is not before
        return (_SlowStream(stream) if self._is_slow else stream), connection


@dataclass(frozen=True, slots=True)
class _SlowStream:
    """A stream that is written to a few bytes at a time."""

    stream: trio.abc.Stream

    async def send_all(self, message: bytes) -> None:
        for at in range(0, len(message), SLOW_PIECE_BYTES):
            await self.stream.send_all(message[at : at + SLOW_PIECE_BYTES])
            await trio.sleep(SLOW_PAUSE_S)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.stream.receive_some(max_bytes)


@dataclass(slots=True, eq=False)
class _Swarm:
    plan: SwarmPlan
    hosts: Hosts
    tls: ssl.SSLContext
    on_progress: OnProgress | None
    trace: Trace | None
    stop: trio.Event
    tally: Tally
    members: list[Member] = field(default_factory=list)
    wires: dict[tuple[int, str], _Wire] = field(default_factory=dict)
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_THREADS))
    earlier: trio.Event = field(default_factory=trio.Event)
    """Set when somebody is due before the clock task thinks so."""
    sleeps_until: float = float("-inf")
    answered: trio.Event = field(default_factory=trio.Event)
    """Set when a call is over."""
    in_flight: int = 0
    wanted: int = 0
    limit: dict[str, Any] | None = None
    calls: trio.Nursery = field(init=False)
    shared: Shared = field(init=False)
    nursery: Nursery = field(init=False)
    transport: Transport = field(init=False)
    dialect: Dialect | None = field(init=False)
    started: float = field(init=False)
    began: float = field(init=False)

    # -- the whole run -------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        self.began = time.time() if self.plan.start_time is None else self.plan.start_time
        self.started = time.perf_counter()
        plan = self.plan
        self.shared = Shared(
            timeline=Timeline(),
            tally=self.tally,
            dice=Dice("swarm", plan.seed),
            trouble=plan.trouble,
            stopwatch=time.perf_counter,
            began=self.began,
        )
        self.nursery = Nursery(plan, self.hosts, self.shared)
        self.transport = _transport(plan)
        self.shared.shells = self._shells if plan.control is not None else None
        self.dialect = Dialect() if plan.launcher else None
        rss_before, cpu_before = resident_bytes(), cpu_s()
        async with self._open_tasks():
            with trio.move_on_after(plan.growth.duration_s):
                await self.stop.wait()
            duration_s = self.elapsed_s()
            cost = Cost(resident_bytes(), rss_before, cpu_s() - cpu_before, duration_s)
            self.tally.series.at(duration_s)  # quiet seconds at the end are part of the picture
        facts = {"mode": plan.growth.mode, "seed": plan.seed, "server": plan.server.hostname}
        return report(self.tally, cost, {**facts, **({"limit": self.limit} if self.limit else {})})

    @contextlib.asynccontextmanager
    async def _open_tasks(self) -> AsyncIterator[None]:
        """Everything that runs beside the clock of the run; at the end calls are let finish, held reads are not."""
        async with trio.open_nursery() as self.calls:
            async with trio.open_nursery() as clockwork:
                clockwork.start_soon(self._wake_sleepers)
                clockwork.start_soon(self._sweep if self.plan.growth.mode == "sweep" else self._grow)
                if self.plan.trouble.reenroll_every_s > 0:
                    clockwork.start_soon(self._storm)
                if self.on_progress:
                    clockwork.start_soon(show_progress, self.on_progress, self.tally, self._facts)
                yield
                clockwork.cancel_scope.cancel()
            with trio.move_on_after(DRAIN_S):
                while self.in_flight:
                    self.answered = trio.Event()
                    await self.answered.wait()
            self.calls.cancel_scope.cancel()
        for wire in self.wires.values():
            await wire.aclose()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def now(self) -> float:
        return self.began + self.elapsed_s()

    # -- growing -------------------------------------------------------------------------------------------------

    async def _grow(self) -> None:
        growth = self.plan.growth
        self.wanted = growth.count
        for index in range(growth.count):
            await self._spawn(growth.starts_at_s(index))

    async def _spawn(self, due_s: float) -> None:
        late_s = self.elapsed_s() - due_s
        await trio.sleep(max(0.0, -late_s))
        now = self.began + due_s if late_s < MAX_LAG_S else self.now()
        member = self.nursery.member(len(self.members), now)
        self.members.append(member)
        member.begin(now)
        self._wake_clock()

    async def _sweep(self) -> None:
        """Grow step by step, and stop at the first step on which a threshold is met."""
        growth = self.plan.growth
        while self.wanted < growth.count:
            self.wanted = min(growth.count, self.wanted + growth.step)
            self.tally.begin_window()
            step_began_s = self.elapsed_s()
            while len(self.members) < self.wanted:
                await self._spawn(step_began_s + (len(self.members) % growth.step) / growth.spawn_rate)
            await trio.sleep(max(0.0, step_began_s + growth.step_s - self.elapsed_s()))
            metrics = {**self.tally.metrics(self.elapsed_s()), **self.tally.begin_window().metrics()}
            reasons = met(self.plan.stop_if, metrics)
            if reasons:
                self.limit = {**(self.limit or {"agents": 0}), "stopped_at": self.wanted, "stopped_by": reasons}
                break
            self.limit = {"agents": self.wanted, "stopped_at": None, "stopped_by": []}
        self.stop.set()

    async def _storm(self) -> None:
        """Every member loses its key at once, again and again."""
        while True:
            await trio.sleep(self.plan.trouble.reenroll_every_s)
            for member in self.members:
                member.forget_key(self.now())
            self._wake_clock()

    # -- waking --------------------------------------------------------------------------------------------------

    async def _wake_sleepers(self) -> None:
        timeline = self.shared.timeline
        while True:
            self._wake_due()
            self.sleeps_until = float("inf") if timeline.next_due is None else timeline.next_due
            self.earlier = trio.Event()
            with trio.move_on_after(max(0.0, self.sleeps_until - self.now())):
                await self.earlier.wait()
            await trio.lowlevel.checkpoint()

    def _wake_clock(self) -> None:
        """After anything that may have put somebody on the timeline."""
        next_due = self.shared.timeline.next_due
        if next_due is not None and next_due < self.sleeps_until:
            self.earlier.set()

    def _wake_due(self) -> None:
        """Some of those whose time has come; the loop's other tasks have to live as well."""
        for _ in range(_STEPS_AT_ONCE):
            found = self.shared.timeline.pop(self.now())
            if found is None:
                return
            now, member, strand, outcome = found
            self._resume(member, strand, outcome, now)

    def _resume(self, member: Member, strand: Strand, outcome: Any, now: float) -> None:
        work = member.resume(strand, outcome, now)
        if work is not None:
            self.calls.start_soon(self._work, member, strand, work)

    async def _work(self, member: Member, strand: Strand, work: Work | None) -> None:
        """Perform what a thread waits for, until it sleeps."""
        while work is not None:
            match work:
                case Send():
                    outcome: Any = await self._send(member, strand, work)
                case Query():
                    outcome = await self._query(member, work)
            work = member.resume(strand, outcome, self.now())
            self._wake_clock()

    async def _query(self, member: Member, query: Query) -> QueryResult:
        cancelled = threading.Event()
        run = member.long_query(query.sql, self.now(), cancelled)
        try:
            return await trio.to_thread.run_sync(run, limiter=self.threads, abandon_on_cancel=True)
        finally:
            cancelled.set()

    async def _send(self, member: Member, strand: Strand, command: Send) -> bytes | Failure:
        finishes = (
            command.call not in MAY_BE_HELD
        )  # the end of the run waits for everything but reads, which may be held
        async with self._turn(member, strand, command) as wire:
            began = time.perf_counter()
            self.in_flight += finishes
            outcome = await self._exchange(wire, command)
            self.in_flight -= finishes
        self.answered.set()
        took_s = time.perf_counter() - began
        self.tally.request(counted_as(command, outcome, took_s), took_s, self.elapsed_s())
        if self.trace:
            self.trace(member.index, command, outcome)
        return outcome

    async def _exchange(self, wire: _Wire, command: Send) -> bytes | Failure:
        if self.dialect is None or command.call == SHELLS:
            return await _post(wire, command)
        call = self.dialect.call(command)
        outcome = call if isinstance(call, Failure) else await _post(wire, call)
        return outcome if isinstance(outcome, Failure) else jsonrpc.reply(command.call, outcome)

    @contextlib.asynccontextmanager
    async def _turn(self, member: Member, strand: Strand, command: Send) -> AsyncIterator[_Wire]:
        """The connection, when it is this call's turn. Enrollment and configs do not wait for a read that is held:
        they get a connection of their own for that one call."""
        kept = self._wire(member, strand)
        if kept.turn.locked() and command.call in _URGENT:
            spare = self._new_wire(member)
            try:
                yield spare
            finally:
                await spare.aclose()
            return
        async with kept.turn:
            yield kept

    def _wire(self, member: Member, strand: Strand) -> _Wire:
        is_own = self.plan.connections == "thread" or strand.name == SHELLS  # which is held most of the time
        key = (member.index, strand.name if is_own else "")
        wire = self.wires.get(key)
        if wire is None:
            wire = self.wires[key] = self._new_wire(member)
        return wire

    def _new_wire(self, member: Member) -> _Wire:
        return _Wire(self.plan, self.tls, self.transport, self.tally, is_slow=member.is_slow)

    def _shells(self, member: Member) -> Thread[None]:
        """Its sessions are tasks beside the calls, and end with them."""
        from osqbox.agent.shell.control import INTERVAL_S, Poller, Sessions
        from osqbox.agent.shell.socket import Dialer

        assert self.plan.control is not None
        dialer = Dialer(lambda: self.plan.server.hostname, self.tls, self.transport)
        core = member.core
        sessions = Sessions(
            self.plan.control, dialer, self._heard, hostname=core.identity.hostname, node_key=lambda: core.node_key
        )
        return Poller(core, self.plan.control.interval_s or INTERVAL_S, sessions.within(self.calls).start).run()

    def _heard(self, kind: str, _facts: dict[str, Any]) -> None:
        self.tally.shells += kind == "shell_started"

    # -- telling -------------------------------------------------------------------------------------------------

    def _facts(self) -> tuple[float, int, int]:
        return self.elapsed_s(), self.wanted, self.tally.answers


async def show_progress(show: OnProgress, tally: Tally, facts: Callable[[], tuple[float, int, int]]) -> None:
    """Until cancelled. ``facts``: seconds since the start, agents wanted, answers."""
    requests, errors, at_s = 0, 0, 0.0
    while True:
        await trio.sleep(PROGRESS_EVERY_S)
        now_s, wanted, answers = facts()
        took_s = max(1e-9, now_s - at_s)
        show(
            Progress(
                elapsed_s=now_s,
                agents=tally.agents,
                wanted=wanted,
                enrolled=tally.enrolled,
                requests=tally.total.requests,
                errors=tally.total.errors,
                requests_per_s=(tally.total.requests - requests) / took_s,
                errors_per_s=(tally.total.errors - errors) / took_s,
                answers=answers,
            )
        )
        requests, errors, at_s = tally.total.requests, tally.total.errors, now_s


async def _post(wire: _Wire, command: Send) -> bytes | Failure:
    try:
        return await wire.post(
            command.path, command.body, node_key=command.node_key, compress=command.compress, method=command.method
        )
    except CallFailed as error:
        return Failure(str(error))
    except Exception as error:  # noqa: BLE001 - one agent's trouble is not the others'
        return Failure(f"Request error: {type(error).__name__}: {error}")


def resident_bytes() -> int:
    """Of this process; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - as Linux spells it
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
