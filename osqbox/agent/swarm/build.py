"""Members of a swarm, from their number and a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from osqbox.agent.client import Core, Identity
from osqbox.agent.flags import Flags
from osqbox.agent.messages import ENDPOINT_FLAGS
from osqbox.agent.profile import Profile, load_profile
from osqbox.agent.profile.host import AgentProcess, HostIdentity
from osqbox.agent.simulator import HostType, SimulatedEngine, SimulatedHost
from osqbox.agent.sql import Engine, Tables
from osqbox.agent.store import MemoryStore
from osqbox.agent.swarm.member import Member, Shared, SqlEngine
from osqbox.agent.swarm.plan import SwarmPlan, Throws
from osqbox.errors import BadSetup


class Machine(Protocol):
    """A pretended machine: a host of a profile, or one of a simulator's types."""

    @property
    def identity(self) -> HostIdentity: ...

    def agent_process(self, now: float) -> AgentProcess: ...

    def tables(self, now: Callable[[], float]) -> Tables: ...


class Hosts(Protocol):
    """Where the machines come from; the same number is always the same machine."""

    def host(self, index: int, *, hardware_of: int | None = None) -> Machine:
        """``hardware_of`` is the machine whose hardware uuid and serial numbers it has."""
        ...

    def engine(self, index: int) -> SqlEngine:
        """SQL over the tables such a machine has; shared by all of its kind."""
        ...


class ProfileHosts:
    """Hosts of a plan's profiles. Raises BadSetup for a profile that cannot be read."""

    def __init__(self, plan: SwarmPlan) -> None:
        self._mix, self._seed = plan.mix, plan.seed
        self._profiles: dict[str, Profile] = {name: load_profile(name) for name in sorted(set(plan.mix.round))}
        self._engines = {name: Engine(schema=profile.schema) for name, profile in self._profiles.items()}

    def host(self, index: int, *, hardware_of: int | None = None) -> Machine:
        profile = self._profiles[self._mix.profile(index)]
        return profile.host(seed=self._seed, index=index, hardware_of=hardware_of)

    def engine(self, index: int) -> Engine:
        return self._engines[self._mix.profile(index)]


class SimulatedHosts:
    """Hosts of the types that Launcher's old simulator described. Raises BadSetup for an unknown type."""

    def __init__(self, plan: SwarmPlan, types: Mapping[str, HostType]) -> None:
        for name in plan.mix.round:
            if name not in types:
                raise BadSetup(f"expected a host type among {', '.join(sorted(types))}, got {name!r}")
        self._mix, self._seed, self._types = plan.mix, plan.seed, types

    def host(self, index: int, *, hardware_of: int | None = None) -> SimulatedHost:
        return SimulatedHost(self._types[self._mix.profile(index)], self._seed, index, hardware_of)

    def engine(self, index: int) -> SimulatedEngine:
        return SimulatedEngine(self.host(index))


def swarm_flags(plan: SwarmPlan) -> dict[str, str]:
    """osqueryd's flags, the same for every agent."""
    return {
        "tls_hostname": plan.server.hostname,
        **{flag: getattr(plan.endpoints, call) for call, flag in ENDPOINT_FLAGS.items()},
        **dict.fromkeys(("config_plugin", "logger_plugin", "distributed_plugin"), "tls"),
        "disable_distributed": "false",
        **dict.fromkeys(("disable_carver", "disable_events", "disable_extensions", "disable_watchdog"), "true"),
        "distributed_interval": str(plan.interval_s),
        "logger_tls_period": str(plan.log_period_s),
        "config_refresh": str(plan.config_refresh_s),
        # A swarm outlasts its server's troubles: it enrolls for ever, and asks for a config again soon.
        "config_accelerated_refresh": str(plan.config_refresh_s),
        "tls_enroll_max_attempts": "0",
        **plan.flags,
    }


class Nursery:
    """Makes members. Raises BadUsage for flags that osqueryd would not take."""

    def __init__(self, plan: SwarmPlan, hosts: Hosts, shared: Shared) -> None:
        self._plan = plan
        self._hosts = hosts
        self._shared = shared
        self._flags = swarm_flags(plan)
        Flags(self._flags)

    def member(self, index: int, now: float) -> Member:
        plan, dice = self._plan, self._shared.dice
        is_clone = index > 0 and dice.share("hardware", index) < plan.trouble.duplicate_hardware
        host = self._hosts.host(index, hardware_of=0 if is_clone else None)
        who, process = host.identity, host.agent_process(now)
        core = Core(
            Identity(
                hostname=who.hostname,
                uuid=who.uuid,
                instance_id=who.instance_id,
                ephemeral_id=dice.uuid("ephemeral", index).lower(),
                pid=process.pid,
                started=process.started,
                platform_type=who.platform_type,
            ),
            Flags(self._flags),
            plan.endpoints,
            MemoryStore(),
            enroll_secret=lambda: plan.enroll_secret,
            rng=Throws(dice, index),
            now=now,
        )
        return Member(index, core, host, self._hosts.engine(index), self._shared)
