"""The agent's shell: a Trio task per osqueryd thread, TLS, the clock, and SQL in worker threads.

For programs that put more around an agent: `AgentOptions.flags` takes every osqueryd flag, and those of plugins,
endpoints, TLS, proxy and enroll secret act; ``call_plugin`` answers for plugins other than tls; ``on_verbose`` gets
stderr's lines; a `SteppedClock` makes two runs with one ``rng`` seed send the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from osqbox.agent import carve as carving
from osqbox.agent import jsonrpc
from osqbox.agent.carve import Archive, Carves, Discard, ReadBlock
from osqbox.agent.client import (
    Call,
    Command,
    ConfigUnavailable,
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
from osqbox.agent.constructed import constructed_tables
from osqbox.agent.flags import Flags
from osqbox.agent.jsonrpc import Dialect
from osqbox.agent.logs import ERROR, WARNING, Status, glog_line
from osqbox.agent.messages import ENDPOINT_FLAGS, LINUX, Endpoints
from osqbox.agent.own import own_tables
from osqbox.agent.sql import DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT_S, Engine, QueryResult, Stats, Tables
from osqbox.agent.store import FileStore, MemoryStore, Store
from osqbox.agent.tables.contents import MachineContents, contents_of
from osqbox.agent.tables.yara import yara_tables
from osqbox.agent.views import ConfiguredTables, view_tables
from osqbox.agent.wire import CALL_TIMEOUT_S, CallFailed, Channel, Transport, client_context, fetch
from osqbox.clock import Clock, SystemClock

if TYPE_CHECKING:
    import ssl

    from osqbox.agent.shell.control import ControlOptions

OnEvent = Callable[[str, dict[str, Any]], None]
OnVerbose = Callable[[str], None]
CallPlugin = Callable[[Call], Awaitable["list[dict[str, str]] | Failure"]]
Around = Callable[["Agent"], contextlib.AbstractAsyncContextManager[None]]
"""Entered when the agent's state is open and nothing has been asked of a server yet."""

_HOST_TABLES = ("os_version", "osquery_info", "platform_info", "system_info")
_SQL_THREADS = 4
_RESTART_PAUSE_S = 1.0
_MAIN = 0
_CERTIFICATE_FLAGS = ("tls_server_certs", "tls_client_cert", "tls_client_key")


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
    call_timeout_s: float = CALL_TIMEOUT_S
    """osqueryd has no flag for its 16 s; tests want less."""
    strict_start: bool = False
    """The rule of older releases: no configuration at the start ends the agent (ConfigUnavailable)."""
    platform_type: int = LINUX
    """Of the pretended host: 21 is macOS, 2 Windows."""
    pid: int | None = None
    """What osquery_info says; None is this process's."""
    launcher: bool = False
    """Speak Kolide Launcher's JSON-RPC instead of osquery's own API."""
    control: ControlOptions | None = None
    """Remote shells; None asks for none."""
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
            **{flag: getattr(self.endpoints, name) for name, flag in ENDPOINT_FLAGS.items()},
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
    on_verbose: OnVerbose | None = None,
    call_plugin: CallPlugin | None = None,
    around: Around | None = None,
    task_status: trio.TaskStatus[Core] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one agent until cancelled; reports its core as started once it is enrolled and has asked for a config.

    ``tables`` replaces this machine's; the agent's own tables are added to them. ``engine`` and ``tls`` may be
    shared by many agents. ``on_event`` hears of everything that happens (``enrolled``, ``enroll_failed``,
    ``config``, ``distributed``, ``written``, ``scheduled``, ``logged``, ``status``, ``call_failed``...).
    ``on_verbose`` gets what osqueryd writes to stderr, glog's lines: those of --verbose when that is on, and every
    status. ``call_plugin`` answers the core's `Call`: config, logger and distributed plugins that are not tls.
    Raises BadSetup for certificates or a directory that cannot be used, EnrollmentFailed when every attempt to
    enroll failed, ConfigUnavailable with ``strict_start``.
    """
    hooks = _Hooks(on_event or (lambda _name, _facts: None), on_verbose, call_plugin)
    async with (
        _open_agent(options, tables, engine, tls, clock, rng, hooks) as agent,
        around(agent) if around else contextlib.nullcontext(),
    ):
        await agent.run(task_status)


@dataclass(frozen=True, slots=True)
class _Hooks:
    event: OnEvent
    verbose: OnVerbose | None
    plugin: CallPlugin | None


class SteppedClock:
    """Time that moves only when every thread of the agent sleeps: then it jumps to the first who wants to wake up.

    One thread runs at a time, in an order that depends on nothing but their sleeps, so two runs against the same
    answers send the same bytes, and a day takes as long as its requests. Its queries cost nothing. One agent each.
    """

    def __init__(self, start: float) -> None:
        self._now = start
        self._running = 1
        self._seats: list[trio.Event] = []
        """Of each thread: its first turn has come."""
        self._sleepers: dict[int, tuple[float, trio.Event]] = {}

    def now(self) -> float:
        return self._now

    def seat(self) -> int:
        """A place in the order, from 1, for a thread that will `take` it; the first thread of all has 0."""
        self._seats.append(trio.Event())
        self._sleepers[len(self._seats)] = (self._now, self._seats[-1])
        return len(self._seats)

    async def take(self, seat: int) -> None:
        """Wait for one's first turn."""
        await self._seats[seat - 1].wait()

    async def sleep(self, seat: int, seconds: float) -> None:
        event = trio.Event()
        self._sleepers[seat] = (self._now + max(0.0, seconds), event)
        self.leave()
        await event.wait()

    def wake(self, seat: int) -> None:
        """Whoever sleeps there is next, at the present time."""
        if seat in self._sleepers:
            self._sleepers[seat] = (self._now, self._sleepers[seat][1])

    def leave(self) -> None:
        """The thread that runs is over, or about to sleep: whose turn is it?"""
        self._running -= 1
        if self._running == 0 and self._sleepers:
            seat = min(self._sleepers, key=lambda each: (self._sleepers[each][0], each))
            at, event = self._sleepers.pop(seat)
            self._now, self._running = max(self._now, at), 1
            event.set()


@contextlib.asynccontextmanager
async def _open_agent(
    options: AgentOptions,
    tables: Tables | None,
    engine: Engine | None,
    tls: ssl.SSLContext | None,
    clock: Clock | None,
    rng: Random | None,
    hooks: _Hooks,
) -> AsyncIterator[Agent]:
    clock = clock or SystemClock()
    rng = rng or random.SystemRandom()
    store: Store = FileStore(options.state_dir) if options.state_dir else MemoryStore()
    with contextlib.closing(store), tempfile.TemporaryDirectory(prefix="osqbox-carve-") as folder:
        core = _core(options, store, clock, rng)
        machine = _machine_tables(core, clock) if tables is None else tables
        contents = contents_of(machine)
        carves = Carves(store, new_id=lambda: _new_id(rng), now=clock.now, flags=core.flags, contents=contents)
        context = tls or _context(options, core)
        transport = _transport(options, core.flags)
        get = functools.partial(_get_rules, context=context, transport=transport)
        yara = yara_tables(core, fetch=get, contents=contents)
        yield Agent(
            core=core,
            carves=carves,
            engine=engine or Engine(),
            tables=ConfiguredTables(
                {**own_tables(core), **carves.tables(), **yara, **machine},
                functools.partial(_added_tables, core, is_this_machine=isinstance(contents, MachineContents)),
            ),
            clock=clock,
            options=options,
            context=context,
            transport=transport,
            folder=Path(folder),
            hooks=hooks,
        )


def _added_tables(core: Core, *, is_this_machine: bool) -> Tables:
    """Those of the config. A pretended host has no SQLite files: it must not show this machine's."""
    views = view_tables(core.views)
    return {**views, **constructed_tables(core.constructed)} if is_this_machine else views


def _new_id(rng: Random) -> str:
    return str(uuid.UUID(int=rng.randint(0, 2**128 - 1), version=4))


def _context(options: AgentOptions, core: Core) -> ssl.SSLContext:
    """Files that fields of the options name must be there; of those that flags name osqueryd only warns."""
    flags, given = core.flags, options.flags.keys()
    if not given & {"tls_server_certs", "tls_client_cert"}:
        return client_context(options.server_certs, options.client_cert, options.client_key)
    files = {name: Path(flags.text(name)) if flags.text(name) else None for name in _CERTIFICATE_FLAGS}
    server = files["tls_server_certs"] if "tls_server_certs" in given else options.server_certs
    client, key = files["tls_client_cert"], files["tls_client_key"]
    if client is None or key is None:  # osqueryd wants both
        client, key = options.client_cert, options.client_key
    return client_context(server, client, key, warn=lambda message: core.status(WARNING, "tls.cpp", message))


def _transport(options: AgentOptions, flags: Flags) -> Transport:
    return Transport(
        timeout_s=options.call_timeout_s,
        session_reuse=flags.true("tls_session_reuse"),
        session_timeout_s=float(flags.integer("tls_session_timeout")),
        accept_gzip=flags.true("tls_accept_gzip"),
        proxy=flags.text("proxy_hostname"),
    )


def _get_rules(url: str, body: bytes | None, *, context: ssl.SSLContext, transport: Transport) -> tuple[int, bytes]:
    """Fetch a URL from a query's thread. Raises OSError."""
    try:
        return trio.from_thread.run(fetch, url, context, transport, body)
    except (CallFailed, RuntimeError) as error:  # Trio's, where no agent runs
        raise OSError(str(error)) from error


def _enroll_secret(options: AgentOptions, flags: Flags) -> str:
    """Read anew for each attempt: the file's text without white space around it, else the variable as it is."""
    path, variable = flags.text("enroll_secret_path"), flags.text("enroll_secret_env")
    if path:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
    return os.environ.get(variable, "") if variable else options.enroll_secret


def _core(options: AgentOptions, store: Store, clock: Clock, rng: Random) -> Core:
    from osqbox.agent.tables import system

    flags = Flags(options.effective_flags())
    instance = options.instance_id or store.get("configurations", "instance_id") or _new_id(rng)
    host_uuid = options.uuid or system.machine_uuid() or store.get("configurations", "uuid") or _new_id(rng).upper()
    store.put("configurations", "instance_id", instance)
    store.put("configurations", "uuid", host_uuid)
    now = clock.now()
    identity = Identity(
        hostname=options.hostname or system.machine_hostname(),
        uuid=host_uuid,
        instance_id=instance,
        ephemeral_id=_new_id(rng),
        pid=os.getpid() if options.pid is None else options.pid,
        started=now,
        platform_type=options.platform_type,
    )
    core = Core(
        identity,
        flags,
        Endpoints(**{name: flags.text(flag) for name, flag in ENDPOINT_FLAGS.items()}),
        store,
        enroll_secret=lambda: _enroll_secret(options, flags),
        rng=rng,
        now=now,
    )
    core.config_plugin = flags.text("config_plugin")
    core.distributed_plugin = flags.text("distributed_plugin")
    core.logger_plugins = tuple(filter(None, (name.strip() for name in flags.text("logger_plugin").split(","))))
    return core


def _machine_tables(core: Core, clock: Clock) -> Tables:
    from osqbox.agent.host import host_tables

    return host_tables(
        hostname=core.identity.hostname,
        uuid=core.identity.uuid,
        now=clock.now,
        read_max_bytes=core.flags.integer("read_max"),
    )


@dataclass(slots=True)
class Agent:
    core: Core
    carves: Carves
    engine: Engine
    tables: Tables
    clock: Clock
    options: AgentOptions
    context: ssl.SSLContext
    transport: Transport
    folder: Path
    hooks: _Hooks
    wakes: dict[str, trio.Event] = field(default_factory=dict)
    sleeping: dict[str, set[int]] = field(default_factory=dict)
    """With a `SteppedClock`: the seats of those who sleep on a wake."""
    limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_SQL_THREADS))
    dialect: Dialect | None = field(init=False)

    def __post_init__(self) -> None:
        self.dialect = Dialect() if self.options.launcher else None

    async def run(self, task_status: trio.TaskStatus[Core]) -> None:
        core = self.core
        await self._drive(core.enroll(), _MAIN)
        await self._supervise(core.first_config, _MAIN)
        if self.options.strict_start and not core.config_valid:
            raise ConfigUnavailable(core.uri(core.endpoints.config), core.config_error)
        task_status.started(core)
        threads: list[Callable[[], Thread[None]]] = [
            core.config_refresh,
            core.log_forwarder,
            core.log_relay,
            core.distributed,
            core.scheduler,
            functools.partial(carving.carver, core, self.carves, period_s=self.options.carve_period_s),
        ]
        async with trio.open_nursery() as nursery:
            for number, thread in enumerate(threads, 1):
                seat = self.clock.seat() if isinstance(self.clock, SteppedClock) else number
                nursery.start_soon(self._supervise, thread, seat)
            if self.options.control is not None:
                seat = self.clock.seat() if isinstance(self.clock, SteppedClock) else len(threads) + 1
                nursery.start_soon(self._control, self.options.control, seat)
            if isinstance(self.clock, SteppedClock):
                self.clock.leave()  # the first thread has done its part

    async def _control(self, control: ControlOptions, seat: int) -> None:
        from osqbox.agent.shell.control import run_control
        from osqbox.agent.shell.socket import Dialer

        dialer = Dialer(lambda: self.core.flags.text("tls_hostname"), self.context, self.transport)
        await run_control(
            control, self.core, dialer, functools.partial(self._supervise, seat=seat), on_event=self.hooks.event
        )

    async def _supervise(self, start: Callable[[], Thread[None]], seat: int) -> None:
        """Run a thread; should one of its steps fail, say so in the status log and begin it again."""
        if isinstance(self.clock, SteppedClock) and seat:
            await self.clock.take(seat)
        while True:
            try:
                await self._drive(start(), seat)
                break
            except Exception as error:  # noqa: BLE001 - whatever a server sent, the agent goes on
                message = f"A thread failed and starts again: {type(error).__name__}: {error}"
                self.core.status(ERROR, "dispatcher.cpp", message)
                self.core.events.append(("thread_failed", {"error": repr(error)}))
                self._settle(seat)
                await self._wait(_RESTART_PAUSE_S, seat)
        if isinstance(self.clock, SteppedClock) and seat:
            self.clock.leave()

    async def _drive(self, thread: Thread[None], seat: int) -> None:
        """Run one thread of the core: perform what it yields, and give it the outcome."""
        hostname = self.core.flags.text("tls_hostname")
        channel = Channel(hostname, self.context, self.transport) if hostname else None
        outcome: Any = None
        try:
            while True:
                self.core.now = self.clock.now()
                command = thread.send(outcome)
                self._settle(seat)
                outcome = await self._perform(command, channel, seat)
        except StopIteration:
            return
        finally:
            thread.close()
            self._settle(seat)
            if channel is not None:
                await channel.aclose()

    def _settle(self, seat: int) -> None:
        """After every step: what changed is durable, sleepers are woken, watchers told."""
        self.core.store.commit()
        wakes, self.core.wakes = self.core.wakes, []
        for name in wakes:
            self.wakes.pop(name, trio.Event()).set()
            for sleeper in self.sleeping.pop(name, ()):
                assert isinstance(self.clock, SteppedClock)
                self.clock.wake(sleeper)
        events, self.core.events = self.core.events, []
        for name, details in events:
            if name == "status" and self.hooks.verbose is not None:
                said = Status(details["severity"], details["filename"], 0, details["message"])
                self.hooks.verbose(glog_line(said, now=details["at"], thread=self.core.identity.pid + seat))
            self.hooks.event(name, details)

    async def _perform(self, command: Command, channel: Channel | None, seat: int) -> Any:
        match command:
            case Send():
                return await self._send(command, channel)
            case Sleep():
                return await self._sleep(command, seat)
            case Call():
                return await self._call(command)
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

    async def _send(self, command: Send, channel: Channel | None) -> bytes | Failure:
        if channel is None:
            return Failure("Request error: no --tls_hostname")
        dump = self.hooks.verbose if self.core.flags.true("tls_dump") and self.core.flags.true("verbose") else None
        is_shells = command.call == "shells"  # which Launcher asks for beside its JSON-RPC service
        call = command if self.dialect is None or is_shells else self.dialect.call(command)
        if isinstance(call, Failure):
            return call
        if dump:
            dump(call.body.decode("utf-8", "replace"))
        try:
            reply = await channel.post(
                call.path, call.body, node_key=call.node_key, compress=call.compress, method=call.method
            )
        except CallFailed as error:
            return Failure(str(error))
        if dump:
            dump(reply.decode("utf-8", "replace"))
        return reply if self.dialect is None or is_shells else jsonrpc.reply(command.call, reply)

    async def _call(self, command: Call) -> list[dict[str, str]] | Failure:
        if self.hooks.plugin is None:
            return Failure(f"Unknown registry plugin: {command.plugin}")
        return await self.hooks.plugin(command)

    async def _sleep(self, command: Sleep, seat: int) -> bool:
        """Whether the core's wake came before the time did."""
        if not command.wake:
            await self._wait(command.seconds, seat)
            return False
        if isinstance(self.clock, SteppedClock):
            sleepers = self.sleeping.setdefault(command.wake, set())
            sleepers.add(seat)
            await self.clock.sleep(seat, command.seconds)
            woken = seat not in self.sleeping.get(command.wake, ())
            self.sleeping.get(command.wake, set()).discard(seat)
            return woken
        event = self.wakes.setdefault(command.wake, trio.Event())
        with trio.move_on_after(command.seconds):
            await event.wait()
            return True
        return False

    async def _wait(self, seconds: float, seat: int) -> None:
        if isinstance(self.clock, SteppedClock):
            await self.clock.sleep(seat, seconds)
        else:
            await trio.sleep(seconds)

    async def query(self, sql: str) -> QueryResult:
        """What somebody other than the core asks."""
        found: QueryResult = await self._query(sql)
        return found

    def settle(self) -> None:
        """After a change to the core from outside its threads: makes it durable, wakes sleepers."""
        self._settle(_MAIN)

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
            result = await self._in_thread(run)
        finally:
            cancelled.set()
        return replace(result, stats=Stats()) if isinstance(self.clock, SteppedClock) else result

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
            contents=self.carves.contents,
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


__all__ = ["AgentOptions", "ConfigUnavailable", "EnrollmentFailed", "SteppedClock", "run_agent"]
