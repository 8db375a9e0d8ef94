"""A swarm of comms agents: the same agents as `osqbox agent --comms` runs, each with its own state and connections."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from osqbox.agent.comms.core import RefusedByServer
from osqbox.agent.comms.driver import CommsAgent
from osqbox.agent.comms.effects import POLL, SSE, WEBSOCKET, Reply
from osqbox.agent.comms.hosts import RawRows, TablesHost
from osqbox.agent.comms.options import G1, SPIKE, Load, Options, Pace
from osqbox.agent.comms.statistics import Statistics
from osqbox.agent.comms.wire import Target
from osqbox.agent.profile.dice import Dice
from osqbox.agent.store import MemoryStore
from osqbox.agent.swarm.build import Hosts
from osqbox.agent.swarm.member import HELD_AFTER_S
from osqbox.agent.swarm.plan import SwarmPlan, read_mix
from osqbox.agent.swarm.run import OnProgress, cpu_s, resident_bytes, show_progress
from osqbox.agent.swarm.tally import HELD, Cost, Tally, report
from osqbox.errors import BadUsage

KINDS = (SSE, WEBSOCKET, POLL, G1)
_NO_ERROR = (304, 408)
"""Nothing has changed, nothing came: answers like any other."""


def read_kinds(text: str) -> tuple[str, ...]:
    """``sse:3,g1:1``: how an agent hears its commands, by weight. Raises BadUsage."""
    kinds = read_mix(text).round
    for kind in kinds:
        if kind not in KINDS:
            raise BadUsage(f"expected kinds of comms agents among {', '.join(KINDS)}, got {kind!r}")
    return kinds


@dataclass(frozen=True, slots=True)
class CommsPlan:
    swarm: SwarmPlan
    """Its server is the comms listener."""
    kinds: tuple[str, ...] = (SSE,)
    """Dealt in rounds, as hosts are."""
    pace: Pace = field(default_factory=Pace)
    load: Load = field(default_factory=lambda: Load(inventory_items=5, logs_every_s=10.0, logs_items=1))

    def options(self, index: int) -> Options:
        kind = self.kinds[index % len(self.kinds)]
        profile = G1 if kind == G1 else SPIKE
        # The stream of commands is an agent's one lasting connection.
        return Options(profile, POLL if kind == G1 else kind, self.pace, load=self.load, keep_alive=False)


def identity(secret: str, seed: int, index: int) -> tuple[str, str]:
    """Uuid and key of an agent: the same in every run with that secret and seed, and nobody's guess without."""

    def digits(what: str) -> str:
        return hmac.new(secret.encode(), f"{what} {seed} {index}".encode(), hashlib.sha256).hexdigest()

    u = digits("uuid")
    return f"{u[:8]}-{u[8:12]}-4{u[13:16]}-a{u[17:20]}-{u[20:32]}", digits("key")[:32]


async def run_comms_swarm(
    plan: CommsPlan,
    hosts: Hosts,
    tls: ssl.SSLContext,
    *,
    on_progress: OnProgress | None = None,
    stop: trio.Event | None = None,
    tally: Tally | None = None,
    statistics: Statistics | None = None,
) -> dict[str, Any]:
    """Run a whole swarm and return its report, with what comms agents count as ``comms``; ``stop`` ends it early."""
    swarm = _Swarm(
        plan, hosts, tls, Tally() if tally is None else tally, Statistics() if statistics is None else statistics
    )
    return await swarm.run(trio.Event() if stop is None else stop, on_progress)


@dataclass(slots=True, eq=False)
class _Swarm:
    plan: CommsPlan
    hosts: Hosts
    tls: ssl.SSLContext
    tally: Tally
    statistics: Statistics
    agents: list[CommsAgent] = field(default_factory=list)
    logged_in: bytearray = field(default_factory=bytearray)
    """By index, 1 once it has been."""
    target: Target = field(init=False)
    dice: Dice = field(init=False)
    began: float = field(init=False)
    started: float = field(init=False)

    async def run(self, stop: trio.Event, on_progress: OnProgress | None) -> dict[str, Any]:
        swarm = self.plan.swarm
        self.target = Target(f"https://{swarm.server.hostname}{swarm.server.prefix}")
        self.dice = Dice("comms", swarm.seed)
        self.logged_in = bytearray(swarm.growth.count)
        self.began, self.started = time.time(), trio.current_time()
        rss_before, cpu_before = resident_bytes(), cpu_s()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._grow, nursery)
            if on_progress:
                nursery.start_soon(show_progress, on_progress, self.tally, self._facts)
            with trio.move_on_after(swarm.growth.duration_s):
                await stop.wait()
            duration_s = self.elapsed_s()
            cost = Cost(resident_bytes(), rss_before, cpu_s() - cpu_before, duration_s)
            counted = self.statistics.facts()  # while streams are open
            nursery.cancel_scope.cancel()
        self.tally.series.at(duration_s)
        self.tally.connections += sum(agent.connections for agent in self.agents)
        self.tally.enrollments += self.statistics.enrollments
        facts = {"mode": swarm.growth.mode, "seed": swarm.seed, "server": swarm.server.hostname}
        return report(self.tally, cost, {**facts, "comms": counted})

    def elapsed_s(self) -> float:
        return trio.current_time() - self.started

    def now(self) -> float:
        return self.began + self.elapsed_s()

    async def _grow(self, nursery: trio.Nursery) -> None:
        growth = self.plan.swarm.growth
        for index in range(growth.count):
            await trio.sleep(max(0.0, growth.starts_at_s(index) - self.elapsed_s()))
            nursery.start_soon(self._live, index)

    async def _live(self, index: int) -> None:
        """One agent, until the server says that it is none."""
        agent, plan = self._agent(index), self.plan.swarm
        self.agents.append(agent)
        self.tally.agents += 1
        self.tally.series.at(self.elapsed_s()).agents = self.tally.agents
        try:
            await agent.enroll(*identity(plan.enroll_secret, plan.seed, index), plan.enroll_secret, adopt=True)
            await agent.run()
        except RefusedByServer as error:
            self.tally.error("agent", str(error), self.elapsed_s())

    def _agent(self, index: int) -> CommsAgent:
        machine = self.hosts.host(index)
        engine: RawRows = self.hosts.engine(index)
        throws = _Throws(self.dice, index)
        return CommsAgent(
            self.target,
            self.tls,
            TablesHost(machine.tables(self.now), engine, light=True),
            self.plan.options(index),
            MemoryStore(),
            now=self.now,
            throw=throws.throw,
            statistics=self.statistics,
            on_event=partial(self._heard, index),
            on_request=self._requested,
        )

    def _heard(self, index: int, kind: str, _facts: dict[str, Any]) -> None:
        if kind == "logged_in" and not self.logged_in[index]:
            self.logged_in[index] = 1
            self.tally.enrolled += 1

    def _requested(self, call: str, took_s: float, reply: Reply) -> None:
        is_fine = reply.ok or reply.status in _NO_ERROR
        is_held = call == "commands" and took_s >= HELD_AFTER_S and is_fine
        self.tally.request(HELD if is_held else call, took_s, self.elapsed_s())
        if not is_fine:
            self.tally.error(call, reply.told, self.elapsed_s())

    def _facts(self) -> tuple[float, int, int]:
        return self.elapsed_s(), self.plan.swarm.growth.count, self.statistics.results_sent


class _Throws:
    """Random enough to spread agents, the same in every run, in a few bytes."""

    __slots__ = ("_count", "_dice", "_index")

    def __init__(self, dice: Dice, index: int) -> None:
        self._dice, self._index, self._count = dice, index, 0

    def throw(self) -> float:
        self._count += 1
        return self._dice.share(self._index, self._count)
