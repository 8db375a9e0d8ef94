"""Profiles and their hosts: thousands of hosts share one profile, and each holds little more than its own name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from osqbox.agent.profile import machine
from osqbox.agent.profile import tables as sources
from osqbox.agent.profile.compiled import Compiled, compile_description
from osqbox.agent.profile.description import fill, read_description
from osqbox.agent.profile.dice import Dice
from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row, TableSource
from osqbox.schema import Schema, Table

OSQUERY_INFO = "osquery_info"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """What an agent on the host enrolls with."""

    hostname: str
    uuid: str
    hardware_serial: str
    platform: str
    """``ubuntu``, ``rhel``, ``darwin``...: os_version.platform."""
    platform_type: int
    """Bits, as enrollment sends them (in text) and osquery_info shows them in ``platform_mask``."""
    instance_id: str


@dataclass(frozen=True, slots=True)
class AgentProcess:
    """osqueryd as it runs on the host."""

    pid: int
    watcher: int
    started: int


class Profile:
    """A kind of machine. Immutable; may be used from several threads."""

    __slots__ = ("_compiled", "definitions", "table_names")

    definitions: Mapping[str, Table]
    """Of the tables that Linux does not have."""

    table_names: frozenset[str]
    """The tables its hosts have a source for; some may be empty on some hosts."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self.table_names = sources.names(compiled)
        self.definitions = {name: compiled.schema[name] for name in compiled.description.schema}

    @property
    def name(self) -> str:
        return self._compiled.description.name

    @property
    def platform(self) -> str:
        """``linux``, ``macos`` or ``windows``."""
        return self._compiled.description.platform

    @property
    def schema(self) -> Schema:
        """The platform's tables, for ``Engine(schema=...)``: with it a table the platform lacks is unknown, where an
        engine with the default schema has it empty."""
        return self._compiled.schema

    def host(
        self,
        *,
        seed: int | str,
        index: int = 0,
        hostname: str | None = None,
        hardware_of: int | None = None,
        skew_s: float = 0.0,
    ) -> Host:
        """A machine. The same arguments give the same machine; the seeds 7 and "7" are one.

        ``hardware_of`` is the index of the host whose hardware UUID and serial numbers it shares, as cloned virtual
        machines do; ``skew_s`` is how far its clock is ahead.
        """
        return Host(self, self._compiled, seed, index, hostname, hardware_of, skew_s)


class Host:
    """One pretended machine. It keeps no rows: every query makes its own."""

    __slots__ = ("_compiled", "_dice", "_fleet", "_hostname", "_metal", "index", "profile", "skew_s")

    def __init__(
        self,
        profile: Profile,
        compiled: Compiled,
        seed: int | str,
        index: int,
        hostname: str | None,
        hardware_of: int | None,
        skew_s: float,
    ) -> None:
        name = compiled.description.name
        self.profile = profile
        self._compiled = compiled
        self._fleet = Dice(str(seed), name)
        self._dice = Dice(str(seed), name, index)
        self._metal = self._dice if hardware_of is None else Dice(str(seed), name, hardware_of)
        self._hostname = hostname
        self.index = index
        self.skew_s = skew_s

    @property
    def hostname(self) -> str:
        if self._hostname is not None:
            return self._hostname
        description = self._compiled.description
        pattern = self._dice.fill(description.hostname, "hostname")
        text = fill(pattern, {"name": description.name, "domain": description.network.domain})
        return text.replace("{index}", str(self.index)).replace("{index:04d}", f"{self.index:04d}")

    @property
    def identity(self) -> HostIdentity:
        description = self._compiled.description
        return HostIdentity(
            hostname=self.hostname,
            uuid=self._metal.uuid("hardware"),
            hardware_serial=machine.serial(self.at(description.as_of)),
            platform=description.os.platform,
            platform_type=machine.PLATFORM_MASKS[description.platform],
            instance_id=self._dice.uuid("instance").lower(),
        )

    def at(self, now: float) -> Moment:
        """The host at that time of the world; its own clock may say otherwise."""
        at = int(now + self.skew_s)
        return Moment(self._compiled, self._dice, self._metal, self._fleet, self.index, self.hostname, at)

    def agent_process(self, now: float) -> AgentProcess:
        """Where osqueryd is in the process table: what osquery_info must say to agree with it."""
        found = self.at(now).of_agent()
        return AgentProcess(found.pid, found.parent, found.start) if found else AgentProcess(0, -1, int(now))

    def tables(self, now: Callable[[], float], *, standalone: bool = False) -> HostTables:
        """Sources for `Engine.query` and `run_agent`. ``now`` is asked once per table and query.

        ``standalone`` adds osquery_info, which otherwise is the agent's own.
        """
        return HostTables(self, now, standalone)


class HostTables(Mapping[str, TableSource]):
    """Table name -> source, made when asked for: a host that waits costs nothing for its tables."""

    __slots__ = ("_host", "_now", "_standalone")

    def __init__(self, host: Host, now: Callable[[], float], standalone: bool) -> None:
        self._host = host
        self._now = now
        self._standalone = standalone

    def __getitem__(self, name: str) -> TableSource:
        if name not in self._host.profile.table_names and not (self._standalone and name == OSQUERY_INFO):
            raise KeyError(name)
        pushdown = sources.lookup(name)[1]
        return TableSource(_Generate(self, name), pushdown, definition=self._host.profile.definitions.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names()))

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> frozenset[str]:
        names = self._host.profile.table_names
        return names | {OSQUERY_INFO} if self._standalone else names

    def moment(self) -> Moment:
        return self._host.at(self._now())


class _Generate:
    """One table's generator. Not a partial, which takes three times the memory, for agents that copy the mapping."""

    __slots__ = ("_name", "_tables")

    def __init__(self, tables: HostTables, name: str) -> None:
        self._tables = tables
        self._name = name

    def __call__(self, context: Context) -> Iterator[Row]:
        return sources.rows(self._name, self._tables.moment, context)


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name (``ubuntu debian rhel macos windows``), or one's own by a path ending .yaml.

    Raises BadSetup for one that cannot be read or does not agree with itself.
    """
    return Profile(compile_description(read_description(name_or_path)))
