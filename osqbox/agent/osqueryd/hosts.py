"""Which host a stand-in answers for: this machine, or a pretended one chosen by options osqueryd does not have."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from osqbox.agent.messages import LINUX
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.errors import BadUsage
from osqbox.schema import Schema, load_schema

if TYPE_CHECKING:
    from osqbox.agent.sql import TableSource
    from osqbox.agent.store import Store

MakeTables = Callable[[Callable[[], float]], "Mapping[str, TableSource]"]


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its tables; the ``osquery_*`` ones are the agent's own and not among them."""

    hostname: str
    uuid: str
    tables: MakeTables
    """Given the clock, the tables."""
    instance_id: str = ""
    """Empty is: whatever the agent's state says."""
    platform_type: int = LINUX
    schema: Schema = field(default_factory=load_schema)
    """The tables its platform has."""
    pid: int | None = None
    """Of osqueryd in its table of processes; None is ours."""


@dataclass(frozen=True, slots=True)
class Choice:
    """``--osqbox_profile`` and its companions, or OSQBOX_PROFILE, OSQBOX_SEED, OSQBOX_INDEX, OSQBOX_START_TIME."""

    profile: str = ""
    seed: int = 0
    index: int = 0
    start_time: float | None = None
    """Where the host's clock starts, in seconds since the epoch; None is now."""

    @staticmethod
    def read(line: CommandLine, environ: Mapping[str, str]) -> Choice:
        """A flag beats its variable. Raises BadUsage for a value that is none."""

        def text(name: str) -> str:
            if line.is_given(f"osqbox_{name}"):
                return line.text(f"osqbox_{name}")
            return environ.get(f"OSQBOX_{name.upper()}", "")

        return Choice(text("profile"), _integer("seed", text("seed")), _integer("index", text("index")),
                      _moment(text("start_time")))  # fmt: skip


def _integer(name: str, text: str) -> int:
    try:
        return int(text or "0")
    except ValueError:
        raise BadUsage(f"expected a whole number for osqbox_{name}, got {text!r}", hint="--osqbox_seed=7") from None


def _moment(text: str) -> float | None:
    import datetime as dt

    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise BadUsage(
            f"expected seconds since 1970 or a time such as 2026-01-31T08:00:00Z, got {text!r}",
            hint="--osqbox_start_time=2026-01-31T08:00:00Z",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


class HostClock:
    """The machine's time, shifted so that it began at the chosen start."""

    def __init__(self, start_time: float | None, real_now: float) -> None:
        self._shift_s = 0.0 if start_time is None else start_time - real_now

    def now(self) -> float:
        return time.time() + self._shift_s


def open_host(choice: Choice, store: Store, *, read_max_bytes: int, started: float) -> Host:
    """The host ``choice`` names. Raises UserError for a profile that is not there."""
    if choice.profile:
        return _pretended(choice, started)
    return _this_machine(store, read_max_bytes)


def _pretended(choice: Choice, started: float) -> Host:
    from osqbox.agent.profile import load_profile

    profile = load_profile(choice.profile)
    host = profile.host(seed=choice.seed, index=choice.index)
    who = host.identity
    pid = host.agent_process(started).pid or None
    return Host(who.hostname, who.uuid, host.tables, who.instance_id, who.platform_type, profile.schema, pid)


def _this_machine(store: Store, read_max_bytes: int) -> Host:
    from osqbox.agent.host import host_tables
    from osqbox.agent.tables import system

    hostname = system.machine_hostname()
    host_uuid = system.machine_uuid() or store.get("configurations", "uuid") or str(uuid.uuid4()).upper()

    def tables(now: Callable[[], float]) -> dict[str, TableSource]:
        return host_tables(hostname=hostname, uuid=host_uuid, now=now, read_max_bytes=read_max_bytes)

    return Host(hostname, host_uuid, tables)


def enabled_tables(schema: Schema, line: CommandLine) -> Schema:
    """The schema without --disable_tables, or with nothing but --enable_tables; disabling wins."""
    enabled, disabled = _names(line.text("enable_tables")), _names(line.text("disable_tables"))
    if not enabled and not disabled:
        return schema
    kept = (name for name in schema.tables if (not enabled or name in enabled) and name not in disabled)
    return Schema({name: schema.tables[name] for name in kept})


def _names(flag: str) -> set[str]:
    return {name.strip() for name in flag.split(",") if name.strip()}


def name_process() -> None:
    """Let ps, pidof and the managers that look for ``osqueryd`` see one. Linux; elsewhere the name stays."""
    try:
        with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 - a file of the kernel's
            comm.write("osqueryd")
    except OSError:
        return
