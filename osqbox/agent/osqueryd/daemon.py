"""``osqueryd`` proper: what is opened in which order, what runs, and the exit code it ends with.

osquery/core/init.cpp of osquery 5.23. Not imitated: the watcher and its worker are one process here, so nothing
is restarted by itself and no resource limit is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import trio

from osqbox.agent.client import EnrollmentFailed
from osqbox.agent.logs import ERROR, INFO
from osqbox.agent.messages import VERSION
from osqbox.agent.osqueryd import configs
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.groups import ungrouped
from osqbox.agent.osqueryd.hosts import Choice, Host, HostClock, enabled_tables, open_host
from osqbox.agent.osqueryd.loggers import FilesystemLogger, Logger, StderrLog, StdoutLogger, logger_mode
from osqbox.agent.osqueryd.pidfile import PidfileBusy, held_pidfile
from osqbox.agent.osqueryd.plugins import FILESYSTEM, STDOUT, PluginMissing, Plugins, is_built_in, names
from osqbox.agent.runner import Agent, AgentOptions, run_agent
from osqbox.agent.sql import DEFAULT_TIMEOUT_S, Engine
from osqbox.agent.store import FileStore, MemoryStore, Store
from osqbox.errors import BadSetup, UserError

EXIT_FAILURE, EXIT_CATASTROPHIC = 1, 78
MIN_ALARM_S = 10
_DOMAINS = ("configurations", "queries", "carves", "logs", "distributed", "distributed_running")
"""Of the store, in upstream's order."""
_UNLIMITED_S = 365 * 86400.0


def run_daemon(line: CommandLine, choice: Choice) -> int:
    """Run until a signal; returns the exit code."""
    if line.true("config_dump") and line.text("config_plugin") == FILESYSTEM:
        print(configs.dump(line.text("config_path")), end="")
        return 0
    if line.true("config_check") and line.text("config_plugin") == FILESYSTEM:
        return _check_config(line)
    if line.true("database_dump"):
        return _dump_database(line)
    end_on_signals()
    if line.true("daemonize"):
        _detach()
    clock = HostClock(choice.start_time, time.time())
    daemon = Daemon(line, choice, clock)
    try:
        with contextlib.ExitStack() as stack:
            if not line.true("ephemeral") and not line.true("config_check"):
                stack.enter_context(held_pidfile(Path(line.text("pidfile")), force=line.true("force")))
                daemon.stderr.say(INFO, "system.cpp", f"Writing osqueryd pid ({os.getpid()}) to {line.text('pidfile')}")
            return trio.run(daemon.run)
    except PidfileBusy as error:
        daemon.stderr.say(ERROR, "init.cpp", f"osqueryd Pidfile check failed: {error}")
        return EXIT_FAILURE


def _check_config(line: CommandLine) -> int:
    reason = configs.check(line.text("config_path"))
    if reason:
        print(f"Error reading config: {reason}", file=sys.stderr)
    return EXIT_FAILURE if reason else 0


def _dump_database(line: CommandLine) -> int:
    """``domain[key]: value`` for everything kept. Raises BadSetup for a database in use."""
    with contextlib.closing(FileStore(Path(line.text("database_path")))) as store:
        for domain in _DOMAINS:
            for key, value in store.scan(domain):
                print(f"{domain}[{key}]: {value}")
    return 0


def _detach() -> None:
    """daemon(0, 0): on in the background, without a terminal."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


@dataclass(slots=True)
class Daemon:
    line: CommandLine
    choice: Choice
    clock: HostClock
    stderr: StderrLog = field(init=False)
    _code: int = field(default=0, init=False)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)

    def __post_init__(self) -> None:
        self.stderr = StderrLog(
            verbose=self.line.true("verbose"),
            enabled=self.line.true("logger_stderr"),
            min_severity=self.line.integer("logger_min_stderr"),
            now=self.clock.now,
            pid=os.getpid(),
        )

    async def run(self) -> int:
        self.stderr.say(INFO, "init.cpp", f"osquery initialized [version={VERSION}]")
        for passed_over in self.line.ignored:
            self.stderr.say(INFO, "init.cpp", f"Passed over in the flag file: {passed_over}")
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on, signals)
                with self._scope:
                    await self._run_agent()
                nursery.cancel_scope.cancel()
        return self._code

    async def _stop_on(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            _set_alarm(self.line.integer("alarm_timeout"))
            self._scope.cancel()

    async def _run_agent(self) -> None:
        try:
            with ungrouped():
                await self._with_host(self._host())
        except EnrollmentFailed as error:
            self._end(EXIT_CATASTROPHIC, f"{error}: No node key, TLS logging disabled.")
        except PluginMissing as error:
            self._end(EXIT_CATASTROPHIC, str(error))
        except UserError as error:
            self._end(EXIT_FAILURE, f"osqueryd initialize failed: {error}")

    def _end(self, code: int, reason: str) -> None:
        self._code = code
        self.stderr.say(ERROR, "init.cpp", reason)

    def _host(self) -> Host:
        """The host; this machine's uuid is kept where the hardware does not tell one. Raises BadSetup."""
        with contextlib.closing(self._open_store()) as store:
            read_max_bytes = self.line.integer("read_max")
            host = open_host(self.choice, store, read_max_bytes=read_max_bytes, started=self.clock.now())
            store.put("configurations", "uuid", host.uuid)
            store.commit()
        return host

    def _open_store(self) -> Store:
        directory = self._state_dir()
        try:
            return FileStore(directory) if directory else MemoryStore()
        except BadSetup as error:
            raise BadSetup(f"Could not initialize database: {error}", hint="--database_path DIR") from error

    async def _with_host(self, host: Host) -> None:
        plugins = Plugins(self.line.text("config_path"), self._loggers(host))
        run = functools.partial(
            run_agent,
            self._options(host),
            tables=host.tables(self.clock.now),
            engine=Engine(schema=enabled_tables(host.schema, self.line)),
            clock=self.clock,
            on_verbose=self.stderr.write,
            call_plugin=plugins.call,
            around=functools.partial(self._opened, plugins),
        )
        if not self.line.true("config_check"):
            await run()
            return
        async with trio.open_nursery() as nursery:
            core = await nursery.start(run)
            if core.config_error:
                self._code = EXIT_FAILURE
                print(f"Error reading config: {core.config_error}", file=sys.stderr)
            nursery.cancel_scope.cancel()

    # -- what the flags come to ----------------------------------------------------------------------------------

    def _options(self, host: Host) -> AgentOptions:
        line = self.line
        options = AgentOptions(
            tls_hostname=line.text("tls_hostname"),
            server_certs=None,
            state_dir=self._state_dir(),
            hostname=host.hostname,
            uuid=host.uuid,
            instance_id=host.instance_id or None,
            platform_type=host.platform_type,
            pid=host.pid,
            carve_period_s=max(1, line.integer("osqbox_carve_period")),
            strict_start=line.true("osqbox_strict_start"),
            sql_timeout_s=_UNLIMITED_S if line.true("disable_watchdog") else DEFAULT_TIMEOUT_S,
        )
        # osqueryd's own defaults, where those of AgentOptions are a demo's.
        certs = ["tls_server_certs"] if line.text("tls_hostname") else []
        defaults = {name: line.text(name) for name in (*options.effective_flags(), *certs)}
        return dataclasses.replace(options, flags={**defaults, **line.osquery_flags})

    def _state_dir(self) -> Path | None:
        """Where state is kept; None keeps it in memory."""
        line = self.line
        if line.true("disable_database") or (line.true("ephemeral") and not line.is_given("database_path")):
            return None
        return Path(line.text("database_path"))

    # -- plugins -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _opened(self, plugins: Plugins, agent: Agent) -> AsyncIterator[None]:
        """The state is open: next come the extension socket, then the plugins, then the config."""
        core, line = agent.core, self.line
        if line.true("disable_logging") or line.true("config_check"):
            core.logger_plugins = ()
        if line.true("disable_distributed"):
            core.distributed_plugin = ""
        wanted = [("config", core.config_plugin), *(("logger", name) for name in core.logger_plugins)]
        if core.distributed_plugin:
            wanted.append(("distributed", core.distributed_plugin))
        foreign = [each for each in wanted if not is_built_in(*each)]
        async with self._extensions(agent, plugins, foreign):
            yield

    def _loggers(self, host: Host) -> dict[str, Logger]:
        """Those built in besides tls. Raises PluginMissing for one that cannot write."""
        silent = self.line.true("disable_logging") or self.line.true("config_check")
        wanted = () if silent else names(self.line.text("logger_plugin"))
        found: dict[str, Logger] = {}
        if FILESYSTEM in wanted:
            found[FILESYSTEM] = FilesystemLogger(
                Path(self.line.text("logger_path")),
                logger_mode(self.line.text("logger_mode")),
                self.clock.now,
                host.hostname,
                os.getpid(),
            )
        if STDOUT in wanted:
            found[STDOUT] = StdoutLogger()
        for name, logger in found.items():
            if reason := logger.check():
                raise PluginMissing(f"Cannot activate {name} logger plugin: {reason}", hint="--logger_path DIR")
        return found

    @contextlib.asynccontextmanager
    async def _extensions(self, agent: Agent, plugins: Plugins, foreign: list[tuple[str, str]]) -> AsyncIterator[None]:
        if self.line.true("disable_extensions"):
            if foreign:
                raise PluginMissing(_inactive(foreign[0], "extensions are disabled"))
            yield
            return
        from osqbox.agent.osqueryd.extensions import open_manager

        async with open_manager(self.line, agent, plugins, foreign, self.stderr):
            yield


def _inactive(plugin: tuple[str, str], reason: str) -> str:
    registry, name = plugin
    return f"Cannot activate {name} {registry} plugin: {reason}"


def end_on_signals() -> None:
    """A stop is no failure, also while the program still starts."""

    def ended(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, ended)


def _set_alarm(seconds: int) -> None:
    """A stop that takes longer ends the program with 78."""

    def ended(_number: int, _frame: FrameType | None) -> None:
        os._exit(EXIT_CATASTROPHIC)

    signal.signal(signal.SIGALRM, ended)
    signal.alarm(max(MIN_ALARM_S, seconds))
