"""One run of an osquery instance: its program or task, its extension, its enrollment, its statistics.

An instance makes everything it owns when it is launched, and takes it along when it ends: whoever runs it learns only
why. It ends by itself when its program exits, its extension is gone or a health check fails, and when `stop` is called.
"""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any, Protocol

import trio

from osqbox.agent.client import Core, Identity
from osqbox.agent.extension.client import ExtensionClient
from osqbox.agent.extension.messages import UnknownMethod
from osqbox.agent.extension.server import ExtensionServer
from osqbox.agent.extension.sockets import ExtensionGone
from osqbox.agent.flags import Flags
from osqbox.agent.instances.bridge import plugins_of
from osqbox.agent.instances.forwarder import Forwarder
from osqbox.agent.instances.history import History
from osqbox.agent.instances.options import EXTENSION, Files, InstanceSpec, RunnerOptions, command_line
from osqbox.agent.instances.transport import Driver, HttpClient, OnEvent
from osqbox.agent.messages import LINUX
from osqbox.agent.store import FileStore
from osqbox.clock import Clock
from osqbox.errors import UserError

Rows = list[dict[str, str]]

_HOST_TABLES = ("os_version", "osquery_info", "platform_info", "system_info")
_LAST_WORDS_S = 1.0
_OUTPUT_LINES_KEPT = 20
_MAX_LINE_LENGTH = 1000
STOPPED = "stopped"


class QueryFailed(UserError):
    """The instance answered with an error, in SQLite's words, or could not be asked."""


class Unhealthy(Exception):
    """What a health check found."""


class Instance(Protocol):
    """What the runner needs of a run, whether it is a process or a task."""

    run_id: str

    async def run(self, connected: Callable[[], None]) -> str:
        """Launch, call ``connected`` when it is in use, live; returns why it ended. Never raises for its own faults."""
        ...

    def stop(self, reason: str = STOPPED) -> None:
        """Make `run` end, in order. May be called at any time, and again."""
        ...

    async def check(self) -> None:
        """Raises Unhealthy."""
        ...

    async def query(self, sql: str) -> Rows:
        """Raises QueryFailed."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `osqbox agent status` shows of it."""
        ...


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class BaseInstance:
    """What a run has, whether it is a process or a task: what it was given, why it ends, how its enrollment goes."""

    spec: InstanceSpec
    options: RunnerOptions
    files: Files
    run_id: str
    history: History
    clock: Clock
    on_event: OnEvent
    _over: trio.Event = field(init=False, default_factory=trio.Event)
    _reason: str = field(init=False, default="")
    _enroll_error: str = field(init=False, default="")

    def stop(self, reason: str = STOPPED) -> None:
        """The first reason stays."""
        self._reason = self._reason or reason
        self._over.set()

    @contextmanager
    def _in_history(self) -> Iterator[None]:
        self.history.started(self.spec.name, self.run_id, self.clock.now())
        try:
            yield
        finally:
            self.history.ended(self.run_id, self.clock.now(), self._reason or "cancelled")

    def _heard(self, kind: str, facts: dict[str, Any]) -> None:
        if kind in ("enrolled", "enroll_failed"):
            self._enroll_error = str(facts.get("reason", ""))
        self.on_event(kind, facts)


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class ProcessInstance(BaseInstance):
    """A program of its own, fed through its extension."""

    client: HttpClient
    _process: trio.Process | None = field(init=False, default=None)
    _output: deque[str] = field(init=False, default_factory=partial(deque, maxlen=_OUTPUT_LINES_KEPT))
    _output_ended: trio.Event = field(init=False, default_factory=trio.Event)
    _osquery: ExtensionClient = field(init=False)
    _server: ExtensionServer | None = field(init=False, default=None)
    _forwarder: Forwarder | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._osquery = ExtensionClient(self.files.socket, timeout_s=self.options.timing.query_timeout_s)

    # -- its life ------------------------------------------------------------------------------------------------

    async def run(self, connected: Callable[[], None]) -> str:
        with self._in_history():
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, partial(self._launch, nursery, connected))
                    await self._over.wait()
                    # The extension serves on while the program ends: its last log lines are still taken.
                    await self._stop_program()
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await self._clean_up()
        return self._reason

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run one of its parts; should it fail, the instance ends, and nobody else."""
        try:
            await part()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong here is this instance's end only
            self.stop(described(error))

    async def _launch(self, nursery: trio.Nursery, connected: Callable[[], None]) -> None:
        timing = self.options.timing
        try:
            with trio.fail_after(timing.launch_timeout_s):
                await self._start_program(nursery)
                await self._connect(nursery)
        except trio.TooSlowError:
            self.stop(f"not ready within {timing.launch_timeout_s:g} s of its launch{self._last_words()}")
            return
        connected()

    async def _start_program(self, nursery: trio.Nursery) -> None:
        command = command_line(self.options, self.spec, self.files)
        # A session of its own: a Ctrl-C at the terminal is the runner's to pass on.
        self._process = await trio.lowlevel.open_process(
            command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
        )
        self.on_event("program_started", {"pid": self._process.pid})
        nursery.start_soon(self._guard, self._read_output)
        nursery.start_soon(self._guard, self._watch_program)

    async def _watch_program(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        with trio.move_on_after(_LAST_WORDS_S):  # a child of it may hold the pipe open
            await self._output_ended.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        self.stop(f"osqueryd {how}{self._last_words()}")

    async def _read_output(self) -> None:
        """Keep what the program says last, for the reason it may end by."""
        assert self._process is not None
        assert self._process.stdout is not None
        pending = b""
        async for chunk in self._process.stdout:
            *lines, pending = (pending + chunk).split(b"\n")
            for line in filter(None, (line.decode(errors="replace").strip()[:_MAX_LINE_LENGTH] for line in lines)):
                self._output.append(line)
                self.on_event("output", {"line": line})
            pending = pending[-_MAX_LINE_LENGTH:]
        self._output_ended.set()

    def _last_words(self) -> str:
        return f": {self._output[-1]}" if self._output else ""

    async def _connect(self, nursery: trio.Nursery) -> None:
        """Ask the program who it is, make the extension for it, and let the program use it."""
        await self._osquery.wait_listening(self.options.timing.launch_timeout_s)
        details = await self._host_details()
        self._forwarder = forwarder = Forwarder(self._core(details))
        driver = Driver(forwarder.core, self.client, self.spec.name, self.clock, self._host_details, self._heard)
        nursery.start_soon(self._guard, partial(self._forward, driver))
        plugins = plugins_of(forwarder, driver, self.history, self.options.timing)
        await nursery.start(self._serve, ExtensionServer(EXTENSION, plugins, self.files.socket))
        info = details.get("osquery_info", {})
        self.history.connected(
            self.run_id,
            self.clock.now(),
            hostname=forwarder.core.identity.hostname,
            instance_id=info.get("instance_id", ""),
            version=info.get("version", ""),
        )
        nursery.start_soon(self._guard, self._watch_health)

    async def _serve(self, server: ExtensionServer, *, task_status: trio.TaskStatus[None]) -> None:
        async def serve() -> None:
            async with server:
                self._server = server
                task_status.started()
                reason = await server.wait_ended()
                # A program that ends says goodbye to its extension first: its exit code tells more.
                with trio.move_on_after(2 * _LAST_WORDS_S):
                    await self._over.wait()
                self.stop(f"the extension ended: {reason}")
                await trio.sleep_forever()

        await self._guard(serve)

    def _core(self, details: Mapping[str, Mapping[str, str]]) -> Core:
        system, info = details.get("system_info", {}), details.get("osquery_info", {})
        identity = Identity(
            hostname=system.get("hostname", ""),
            uuid=system.get("uuid", ""),
            instance_id=info.get("instance_id", ""),
            ephemeral_id=str(uuid.uuid4()),
            pid=self.pid or 0,
            started=self.clock.now(),
            platform_type=int(info.get("platform_mask") or LINUX),
        )
        return Core(
            identity,
            Flags(self.options.extension_flags()),
            self.options.endpoints,
            FileStore(self.files.extension),
            enroll_secret=lambda: self.spec.enroll_secret,
            rng=random.SystemRandom(),
            now=self.clock.now(),
        )

    async def _host_details(self) -> dict[str, dict[str, str]]:
        found = {name: await self._rows(f"SELECT * FROM {name} LIMIT 1") for name in _HOST_TABLES}
        return {name: rows[0] for name, rows in found.items() if rows}

    async def _forward(self, driver: Driver) -> None:
        await driver.run(driver.core.enroll())
        await driver.run(driver.core.log_forwarder())

    async def _watch_health(self) -> None:
        timing = self.options.timing
        await trio.sleep(timing.health_startup_delay_s)
        while True:
            problem = await self._check_repeatedly()
            if problem:
                self.stop(f"health check failed: {problem}")
                return
            await trio.sleep(timing.health_interval_s)

    async def _check_repeatedly(self) -> str:
        """What the last of several tries found; "" as soon as one finds nothing."""
        timing, problem = self.options.timing, ""
        for attempt in range(timing.health_tries):
            if attempt:
                await trio.sleep(timing.health_try_pause_s)
            try:
                await self.check()
            except Unhealthy as error:
                problem = str(error)
            else:
                return ""
        return problem

    # -- its end -------------------------------------------------------------------------------------------------

    async def _stop_program(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            with trio.move_on_after(self.options.timing.stop_grace_s):
                await process.wait()

    async def _clean_up(self) -> None:
        """Leave nothing: the program's whole process group, its socket and its pidfile, the store's lock."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            if self._process.stdout is not None:
                await self._process.stdout.aclose()
        if self._forwarder is not None:
            self._forwarder.core.store.close()
        if not self.options.shared_client:
            await self.client.aclose()
        else:
            await self.client.forget(self.spec.name)
        socket = self.files.socket
        for path in (self.files.pidfile, socket, *socket.parent.glob(f"{socket.name}.*")):
            path.unlink(missing_ok=True)

    # -- asking it -----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def check(self) -> None:
        """Its own extension answers, and the program knows it."""
        if self._server is None or self._over.is_set():
            raise Unhealthy("not connected yet")
        timeout_s = self.options.timing.health_timeout_s
        try:
            await ExtensionClient(self._server.path, timeout_s=timeout_s).ping()
            known = await ExtensionClient(self.files.socket, timeout_s=timeout_s).extensions()
        except (ExtensionGone, UnknownMethod) as error:
            raise Unhealthy(str(error)) from error
        if EXTENSION not in {info.name for info in known.values()}:
            raise Unhealthy(f"osqueryd does not list the extension {EXTENSION}")

    async def query(self, sql: str) -> Rows:
        if self._server is None or self._over.is_set():
            raise QueryFailed(f"instance {self.spec.name} is not connected", hint="osqbox agent status")
        try:
            return await self._rows(sql)
        except (ExtensionGone, UnknownMethod) as error:
            raise QueryFailed(f"instance {self.spec.name}: {error}") from error

    async def _rows(self, sql: str) -> Rows:
        response = await self._osquery.query(sql)
        if not response.ok:
            raise QueryFailed(response.status.message)
        return [dict(row) for row in response.rows]

    def facts(self) -> dict[str, Any]:
        forwarder = self._forwarder
        core = forwarder.core if forwarder else None
        return {
            "run_id": self.run_id,
            "pid": self.pid,
            "socket": str(self.files.socket),
            "database": str(self.files.database),
            "host_identifier": core.host_identifier if core else None,
            "enrolled": bool(core and not self._over.is_set() and core.node_key),
            "enroll_error": self._enroll_error or None,
            "statistics": {
                **(asdict(forwarder.counts) if forwarder else {}),
                "requests": self.client.requests,
                "requests_failed": self.client.failures,
                **({"lines_waiting": len(core.buffer), "lines_dropped": core.buffer.dropped} if core else {}),
            },
        }


def described(error: BaseException) -> str:
    """An error in one line; of a group its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def sweep(root: Path) -> list[int]:
    """Kill what a killed agent left running in ``root`` and remove its sockets and pidfiles; returns the pids."""
    killed = []
    for pidfile in root.glob("osquery-*.pid"):
        with suppress(OSError, ValueError):
            pid = int(pidfile.read_text())
            if str(pidfile).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                # Its own group, as `_start_program` made it; anything else is not ours.
                os.killpg(pid, signal.SIGKILL)
                killed.append(pid)
        pidfile.unlink(missing_ok=True)
    for socket in root.glob("osquery-*.sock*"):
        socket.unlink(missing_ok=True)
    return killed
