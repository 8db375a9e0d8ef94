"""The agent's shell: a Trio task per osqueryd thread, TLS, the clock, and SQL in worker threads."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from osqbox.agent import carve as carving
from osqbox.agent.carve import Archive, Carves, Discard, ReadBlock
from osqbox.agent.client import (
    Command,
    Core,
    EnrollmentFailed,
    Failure,
    HostDetails,
    Identity,
    Query,
    Random,
    Send,
    Sleep,
    Thread,
)
from osqbox.agent.flags import Flags
from osqbox.agent.logs import ERROR
from osqbox.agent.messages import Endpoints
from osqbox.agent.own import own_tables
from osqbox.agent.sql import DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT_S, Engine, Tables
from osqbox.agent.store import FileStore, MemoryStore, Store
from osqbox.agent.wire import CallFailed, Channel, client_context
from osqbox.clock import Clock, SystemClock

if TYPE_CHECKING:
    import ssl

OnEvent = Callable[[str, dict[str, Any]], None]

_HOST_TABLES = ("os_version", "osquery_info", "platform_info", "system_info")
_SQL_THREADS = 4
_RESTART_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How one agent runs; the defaults are what a demo wants, where osqueryd's own are slower."""

    tls_hostname: str
    """``localhost:8443``"""
    server_certs: Path | None
    """PEM of the CA; None is the system's."""
    enroll_secret: str = ""
    client_cert: Path | None = None
    client_key: Path | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    host_identifier: str = "hostname"
    """``hostname``, ``uuid``, ``instance``, ``ephemeral`` or ``specified``."""
    specified_identifier: str = ""
    distributed_interval: int = 10
    config_refresh: int = 60
    logger_period: int = 4
    state_dir: Path | None = None
    """Where key, results and unsent logs survive a restart; None keeps them in memory."""
    hostname: str | None = None
    uuid: str | None = None
    instance_id: str | None = None
    carve_period_s: int = 60
    sql_timeout_s: float = DEFAULT_TIMEOUT_S
    sql_max_rows: int = DEFAULT_MAX_ROWS
    flags: Mapping[str, str] = field(default_factory=dict)
    """Further osqueryd flags, without dashes; they win over the fields above."""

    def effective_flags(self) -> dict[str, str]:
        return {
            "tls_hostname": self.tls_hostname,
            "host_identifier": self.host_identifier,
            "specified_identifier": self.specified_identifier,
            "distributed_interval": str(self.distributed_interval),
            "config_refresh": str(self.config_refresh),
            "logger_tls_period": str(self.logger_period),
            "config_plugin": "tls",
            "logger_plugin": "tls",
            "disable_distributed": "false",
            "disable_carver": "false",
            "disable_events": "true",
            "disable_extensions": "true",
            "disable_watchdog": "true",
            "enroll_tls_endpoint": self.endpoints.enroll,
            "config_tls_endpoint": self.endpoints.config,
            "logger_tls_endpoint": self.endpoints.log,
            "distributed_tls_read_endpoint": self.endpoints.read,
            "distributed_tls_write_endpoint": self.endpoints.write,
            "carver_start_endpoint": self.endpoints.carve_start,
            "carver_continue_endpoint": self.endpoints.carve_block,
            **self.flags,
        }


async def run_agent(
    options: AgentOptions,
    *,
    tables: Tables | None = None,
    engine: Engine | None = None,
    tls: ssl.SSLContext | None = None,
    clock: Clock | None = None,
    rng: Random | None = None,
    on_event: OnEvent | None = None,
    task_status: trio.TaskStatus[Core] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one agent until cancelled; reports its core as started once it is enrolled and has asked for a config.

    ``tables`` replaces this machine's; the agent's own tables are added to them. ``engine`` and ``tls`` may be
    shared by many agents. ``on_event`` hears of everything that happens (``enrolled``, ``enroll_failed``,
    ``config``, ``distributed``, ``written``, ``scheduled``, ``logged``, ``status``, ``call_failed``...).
    Raises BadSetup for certificates or a directory that cannot be used, EnrollmentFailed when every attempt to
    enroll failed.
    """
    context = tls or client_context(options.server_certs, options.client_cert, options.client_key)
    async with _open_agent(options, tables, engine, context, clock, rng, on_event) as agent:
        await agent.run(task_status)


@contextlib.asynccontextmanager
async def _open_agent(
    options: AgentOptions,
    tables: Tables | None,
    engine: Engine | None,
    context: ssl.SSLContext,
    clock: Clock | None,
    rng: Random | None,
    on_event: OnEvent | None,
) -> AsyncIterator[_Agent]:
    clock = clock or SystemClock()
    store: Store = FileStore(options.state_dir) if options.state_dir else MemoryStore()
    with contextlib.closing(store), tempfile.TemporaryDirectory(prefix="osqbox-carve-") as folder:
        carves = Carves(store, new_id=lambda: str(uuid.uuid4()), now=clock.now)
        core = _core(options, store, clock, rng or random.SystemRandom())
        machine = _machine_tables(core, clock) if tables is None else tables
        yield _Agent(
            core=core,
            carves=carves,
            engine=engine or Engine(),
            tables={**own_tables(core), **carves.tables(), **machine},
            clock=clock,
            options=options,
            context=context,
            folder=Path(folder),
            on_event=on_event or (lambda _name, _details: None),
        )


def _core(options: AgentOptions, store: Store, clock: Clock, rng: Random) -> Core:
    from osqbox.agent.tables import system

    instance = options.instance_id or store.get("configurations", "instance_id") or str(uuid.uuid4())
    host_uuid = (
        options.uuid or system.machine_uuid() or store.get("configurations", "uuid") or str(uuid.uuid4()).upper()
    )
    store.put("configurations", "instance_id", instance)
    store.put("configurations", "uuid", host_uuid)
    now = clock.now()
    identity = Identity(
        hostname=options.hostname or system.machine_hostname(),
        uuid=host_uuid,
        instance_id=instance,
        ephemeral_id=str(uuid.uuid4()),
        pid=os.getpid(),
        started=now,
    )
    return Core(
        identity,
        Flags(options.effective_flags()),
        options.endpoints,
        store,
        enroll_secret=lambda: options.enroll_secret,
        rng=rng,
        now=now,
    )


def _machine_tables(core: Core, clock: Clock) -> Tables:
    from osqbox.agent.host import host_tables

    return host_tables(
        hostname=core.identity.hostname,
        uuid=core.identity.uuid,
        now=clock.now,
        read_max_bytes=core.flags.integer("read_max"),
    )


@dataclass(slots=True)
class _Agent:
    core: Core
    carves: Carves
    engine: Engine
    tables: Tables
    clock: Clock
    options: AgentOptions
    context: ssl.SSLContext
    folder: Path
    on_event: OnEvent
    wakes: dict[str, trio.Event] = field(default_factory=dict)
    limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_SQL_THREADS))

    async def run(self, task_status: trio.TaskStatus[Core]) -> None:
        core = self.core
        await self._drive(core.enroll())
        await self._supervise(core.first_config)
        task_status.started(core)
        period_s = self.options.carve_period_s
        async with trio.open_nursery() as nursery:
            for thread in (
                core.config_refresh,
                core.log_forwarder,
                core.distributed,
                core.scheduler,
                functools.partial(carving.carver, core, self.carves, period_s=period_s),
            ):
                nursery.start_soon(self._supervise, thread)

    async def _supervise(self, start: Callable[[], Thread[None]]) -> None:
        """Run a thread; should one of its steps fail, say so in the status log and begin it again."""
        while True:
            try:
                return await self._drive(start())
            except Exception as error:  # noqa: BLE001 - whatever a server sent, the agent goes on
                message = f"A thread failed and starts again: {type(error).__name__}: {error}"
                self.core.status(ERROR, "dispatcher.cpp", message)
                self.core.events.append(("thread_failed", {"error": repr(error)}))
                await trio.sleep(_RESTART_PAUSE_S)

    async def _drive(self, thread: Thread[None]) -> None:
        """Run one thread of the core: perform what it yields, and give it the outcome."""
        channel = Channel(self.options.tls_hostname, self.context)
        outcome: Any = None
        try:
            while True:
                self.core.now = self.clock.now()
                command = thread.send(outcome)
                self._settle()
                outcome = await self._perform(command, channel)
        except StopIteration:
            return
        finally:
            thread.close()
            self._settle()
            await channel.aclose()

    def _settle(self) -> None:
        """After every step: what changed is durable, sleepers are woken, watchers told."""
        self.core.store.commit()
        wakes, self.core.wakes = self.core.wakes, []
        for name in wakes:
            self.wakes.pop(name, trio.Event()).set()
        events, self.core.events = self.core.events, []
        for name, details in events:
            self.on_event(name, details)

    async def _perform(self, command: Command, channel: Channel) -> Any:
        match command:
            case Send():
                return await self._send(command, channel)
            case Sleep():
                return await self._sleep(command)
            case Query():
                return await self._query(command.sql)
            case HostDetails():
                return await self._in_thread(self._host_details)
            case Archive():
                return await self._archive(command)
            case ReadBlock():
                return await self._in_thread(functools.partial(self._read_block, command))
            case Discard():
                self._archive_path(command.guid).unlink(missing_ok=True)
                return None
        raise AssertionError(f"unknown command {command!r}")

    async def _send(self, command: Send, channel: Channel) -> bytes | Failure:
        try:
            return await channel.post(command.path, command.body, node_key=command.node_key, compress=command.compress)
        except CallFailed as error:
            return Failure(str(error))

    async def _sleep(self, command: Sleep) -> bool:
        """Whether the core's wake came before the time did."""
        if not command.wake:
            await trio.sleep(command.seconds)
            return False
        event = self.wakes.setdefault(command.wake, trio.Event())
        with trio.move_on_after(command.seconds):
            await event.wait()
            return True
        return False

    async def _query(self, sql: str) -> Any:
        cancelled = threading.Event()
        run = functools.partial(
            self.engine.query,
            sql,
            tables=self.tables,
            timeout_s=self.options.sql_timeout_s,
            max_rows=self.options.sql_max_rows,
            cancelled=cancelled,
        )
        try:
            return await self._in_thread(run)
        finally:
            cancelled.set()

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(call, limiter=self.limiter, abandon_on_cancel=True)

    def _host_details(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name in _HOST_TABLES:
            rows = self.engine.raw_rows(name, tables=self.tables)
            if rows:
                found[name] = rows[0]
        return found

    def _archive_path(self, guid: str) -> Path:
        return self.folder / f"carve_{guid}.tar"

    async def _archive(self, command: Archive) -> carving.Archived | Failure:
        build = functools.partial(
            carving.build_archive,
            self._archive_path(command.guid),
            command.guid,
            command.paths,
            compress=command.compress,
        )
        try:
            packed: carving.Archived = await self._in_thread(build)
        except OSError as error:
            return Failure(str(error))
        return packed

    def _read_block(self, command: ReadBlock) -> bytes | Failure:
        try:
            with self._archive_path(command.guid).open("rb") as content:
                content.seek(command.offset)
                return content.read(command.size_bytes)
        except OSError as error:
            return Failure(str(error))


__all__ = ["AgentOptions", "EnrollmentFailed", "run_agent"]
