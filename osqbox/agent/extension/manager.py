"""The extension manager of an agent: its socket, the extensions registered there, and their tables in its SQL."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from osqbox.agent.client import Random
from osqbox.agent.extension import messages, sockets
from osqbox.agent.extension.client import POLL_S, ExtensionClient, call_from_thread
from osqbox.agent.extension.live import LiveTables
from osqbox.agent.extension.messages import (
    ExtensionInfo,
    OptionInfo,
    Registry,
    Response,
    Row,
    Status,
    refused,
)
from osqbox.agent.extension.registry import MAX_UUID, Extension, Extensions, Items
from osqbox.agent.extension.sockets import ExtensionGone, NotListening
from osqbox.agent.extension.thrift import Message
from osqbox.errors import OsqboxError

INTERVAL_S = 3.0
"""--extensions_interval"""
MIN_INTERVAL_S = 0.2
TIMEOUT_S = 3.0
"""--extensions_timeout: how long an extension that registered may take to listen."""
PING_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0
_SHUTDOWN_S = 1.0

OnEvent = Callable[[str, dict[str, Any]], None]


class Host(Protocol):
    """The agent whose manager it is."""

    def items(self) -> Items:
        """Names of the core's own plugins by registry: extensions may not take them."""
        ...

    def options(self) -> Mapping[str, OptionInfo]: ...

    async def query(self, sql: str) -> Response: ...

    async def columns(self, sql: str) -> Response: ...

    async def call(self, registry: str, item: str, request: Row) -> Response:
        """A call to one of the core's plugins."""
        ...


@dataclass(frozen=True, slots=True)
class Statistics:
    extensions: int
    connections: int
    calls: int
    dropped: int


class RequiredExtensionMissing(OsqboxError):
    """An extension or plugin did not appear in time; osqueryd exits 78 over it."""


class ExtensionManagerServer:
    """Serves ``path`` while ``run`` does. ``tables``, when given, shows the extensions' tables as they come and go.

    ``on_event`` hears of ``extension_registered``, ``extension_deregistered`` and ``extension_gone``, each with
    name, uuid and reason.
    """

    def __init__(
        self,
        path: Path,
        host: Host,
        *,
        rng: Random,
        tables: LiveTables | None = None,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        on_event: OnEvent | None = None,
    ) -> None:
        self.path = path
        self.interval_s = max(interval_s, MIN_INTERVAL_S)
        self.timeout_s = timeout_s
        self._host = host
        self._rng = rng
        self._tables = tables
        self._ping_timeout_s = ping_timeout_s
        self._call_timeout_s = call_timeout_s
        self._on_event = on_event or (lambda _name, _details: None)
        self._extensions = Extensions(host.items())
        self._service = sockets.Service(self._answer)
        self._changed = trio.Event()
        self._watchers: dict[int, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._busy: Counter[int] = Counter()
        self._busy_lock = threading.Lock()
        self._met: set[int] = set()
        """Extensions that have answered once: their silence from then on is their end."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; at the end every extension is asked to shut down. Raises BadSetup for the path."""
        sockets.check_path(self.path, sockets.MAX_MANAGER_PATH_BYTES)
        sockets.remove_sockets(self.path)
        listener = await sockets.listen(self.path)
        identity = _identity(self.path)
        try:
            async with listener, trio.open_nursery() as self._nursery:
                task_status.started()
                await self._service.serve(listener)
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self._stop()
            if _identity(self.path) in (identity, None):  # a successor's socket is not ours to remove
                sockets.remove_sockets(self.path)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def extensions(self) -> Mapping[int, Extension]:
        return self._extensions.by_uuid

    def statistics(self) -> Statistics:
        service = self._service
        return Statistics(len(self.extensions), service.connections, service.calls, service.dropped)

    def find(self, registry: str, item: str) -> Extension | None:
        """The extension that has the plugin, or None."""
        return self._extensions.find(registry, item)

    async def wait_extensions(self, names: Iterable[str], timeout_s: float) -> None:
        """Return once all are registered (--extensions_require). Raises RequiredExtensionMissing."""
        wanted = list(names)

        def missing() -> list[str]:
            known = {extension.name for extension in self.extensions.values()}
            return [f"Required extension not found or not loaded: {name}" for name in wanted if name not in known]

        await self._wait_none(missing, timeout_s)

    async def wait_plugins(self, wanted: Sequence[tuple[str, str]], timeout_s: float) -> None:
        """Return once all (registry, name) are there, of the core or an extension. Raises RequiredExtensionMissing."""
        core = self._host.items()

        def missing() -> list[str]:
            return [
                f"Active {registry} plugin not found: {name}"
                for registry, name in wanted
                if name not in core.get(registry, ()) and self.find(registry, name) is None
            ]

        await self._wait_none(missing, timeout_s)

    async def _wait_none(self, missing: Callable[[], list[str]], timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            while missing():
                await self._changed.wait()
        if found := missing():
            raise RequiredExtensionMissing("; ".join(found))

    # -- calls to plugins ----------------------------------------------------------------------------------------

    async def call(self, registry: str, item: str, request: Row) -> Response:
        """Call a plugin of an extension or of the core. Raises ExtensionGone, UnknownMethod."""
        to_core = registry == "config" and request.get("action") in ("update", "option")
        extension = None if to_core else self.find(registry, item)
        if extension is not None:
            async with self.client(extension) as client:
                return await client.call(registry, item, request)
        if not to_core and item not in self._host.items().get(registry, ()):
            return refused(f"Cannot call registry item: {item}")
        return await self._host.call(registry, item, request)

    @contextlib.asynccontextmanager
    async def client(self, extension: Extension) -> AsyncIterator[ExtensionClient]:
        """A connection to an extension, waited for when it has only just registered. Hold it briefly."""
        client = ExtensionClient(sockets.extension_path(self.path, extension.uuid), timeout_s=self._call_timeout_s)
        with self._in_use(extension.uuid):
            if self._is_new(extension):
                await client.wait_listening(self.timeout_s)
                self._meet(extension)
            async with client:
                yield client

    def call_table(self, extension: Extension, item: str, request: Row, checkpoint: Callable[[], None]) -> Response:
        """The same for the thread of a query."""

        def check() -> None:
            checkpoint()
            if extension.uuid not in self.extensions:
                raise ExtensionGone(f"{extension.name} has been deregistered")

        with self._in_use(extension.uuid):
            response = call_from_thread(
                sockets.extension_path(self.path, extension.uuid),
                "table",
                item,
                request,
                checkpoint=check,
                timeout_s=self._call_timeout_s,
                wait_listening_s=self.timeout_s if self._is_new(extension) else 0.0,
            )
            self._meet(extension)
            return response

    @contextlib.contextmanager
    def _in_use(self, uuid: int) -> Iterator[None]:
        """An extension that serves one connection at a time cannot answer a ping meanwhile."""
        with self._busy_lock:
            self._busy[uuid] += 1
        try:
            yield
        finally:
            with self._busy_lock:
                self._busy[uuid] -= 1
                self._busy += Counter()  # forget those that are no longer in use

    def _is_new(self, extension: Extension) -> bool:
        """Registered, and perhaps not listening yet."""
        return extension.uuid in self.extensions and extension.uuid not in self._met

    def _meet(self, extension: Extension) -> None:
        if extension.uuid in self.extensions:
            self._met.add(extension.uuid)

    # -- the watcher ---------------------------------------------------------------------------------------------

    async def _watch(self, extension: Extension) -> None:
        """Ping on a new connection each interval; the first failure removes the extension (extensions.cpp)."""
        client = ExtensionClient(sockets.extension_path(self.path, extension.uuid), timeout_s=self._ping_timeout_s)
        with trio.CancelScope() as self._watchers[extension.uuid]:
            try:
                listening_by = trio.current_time() + self.timeout_s
                while True:
                    met = extension.uuid in self._met  # before the ping: a query may meet it while the ping fails
                    try:
                        await self._check(extension, client)
                    except NotListening:
                        if met or trio.current_time() > listening_by:
                            raise
                        await trio.sleep(POLL_S)
                    else:
                        await trio.sleep(self.interval_s)
            except (ExtensionGone, messages.UnknownMethod) as error:
                self._remove(extension.uuid, "extension_gone", str(error))

    async def _check(self, extension: Extension, client: ExtensionClient) -> None:
        if self._busy[extension.uuid]:
            return
        try:
            status = await client.ping()
        except NotListening:
            raise
        except ExtensionGone:
            if self._busy[extension.uuid]:  # a call came first, and it serves one at a time
                return
            raise
        self._meet(extension)
        if status.code:
            raise ExtensionGone(f"{client.path}: ping brought {status.code} {status.message}")

    def _remove(self, uuid: int, event: str, reason: str) -> Status:
        known = self.extensions.get(uuid)
        status = self._extensions.deregister(uuid)
        if known is not None:
            self._met.discard(uuid)
            self._watchers.pop(uuid, trio.CancelScope()).cancel()
            self._publish(event, known, reason)
        return status

    def _publish(self, event: str, extension: Extension, reason: str = "") -> None:
        if self._tables is not None:
            self._tables.publish(self.path, self.extensions, self.call_table)
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        self._on_event(event, {"name": extension.name, "uuid": extension.uuid, "reason": reason})

    async def _stop(self) -> None:
        async def shutdown(extension: Extension) -> None:
            client = ExtensionClient(sockets.extension_path(self.path, extension.uuid), timeout_s=_SHUTDOWN_S)
            with contextlib.suppress(ExtensionGone, messages.UnknownMethod):
                await client.shutdown()

        async with trio.open_nursery() as nursery:
            for extension in self.extensions.values():
                nursery.start_soon(shutdown, extension)
        for uuid in list(self.extensions):
            self._remove(uuid, "extension_deregistered", "the manager stops")

    # -- answers -------------------------------------------------------------------------------------------------

    async def _answer(self, call: Message) -> bytes:
        given = messages.arguments(call)
        match call.name:
            case "ping":
                result: Any = Status(message="pong").wire()
            case "call":
                result = (await self._call(*given)).wire()
            case "extensions":
                result = {uuid: extension.info.wire() for uuid, extension in self.extensions.items()}
            case "options":
                result = {name: option.wire() for name, option in self._host.options().items()}
            case "registerExtension":
                result = self._register(messages.read_info(given[0]), given[1]).wire()
            case "deregisterExtension":
                result = self._remove(given[0], "extension_deregistered", "asked to").wire()
            case "query":
                result = (await self._host.query(given[0])).wire()
            case "getQueryColumns":
                result = (await self._host.columns(given[0])).wire()
            case _:  # shutdown: no effect on a manager
                result = None
        return messages.encode_reply(call, result)

    async def _call(self, registry: str, item: str, request: Row) -> Response:
        try:
            return await self.call(registry, item, request)
        except (ExtensionGone, messages.UnknownMethod) as error:
            return refused(str(error))

    def _register(self, info: ExtensionInfo, plugins: Registry) -> Status:
        new_uuid = functools.partial(self._rng.randint, 1, MAX_UUID)
        status = self._extensions.register(info, plugins, new_uuid)
        if status.code == messages.OK and self._nursery is not None:
            extension = self.extensions[status.uuid]
            self._publish("extension_registered", extension)
            self._nursery.start_soon(self._watch, extension)
        return status


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.lstat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
