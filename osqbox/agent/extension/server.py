"""Being an extension of somebody's osqueryd: register with its manager, serve plugins, follow its life."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from osqbox.agent.extension import messages, sockets
from osqbox.agent.extension.client import ExtensionClient
from osqbox.agent.extension.messages import ExtensionInfo, Response, Row, Status, refused
from osqbox.agent.extension.plugins import Plugin
from osqbox.agent.extension.sockets import ExtensionGone
from osqbox.agent.extension.thrift import Message
from osqbox.errors import OsqboxError

CONNECT_TIMEOUT_S = 10.0
INTERVAL_S = 3.0
PING_TIMEOUT_S = 10.0
_GOODBYE_S = 1.0


class RegistrationRefused(OsqboxError):
    """The manager did not take the extension; the text is its reason."""


class ExtensionServer:
    """``async with ExtensionServer(name, plugins, manager_socket) as server:`` serves ``plugins`` within the block.

    Entering waits until the manager listens (``timeout_s``), registers and listens on ``<manager>.<uuid>``; it raises
    ExtensionGone, RegistrationRefused, or BadSetup for the path. A manager that goes away, or asks for a shutdown,
    does not end the block: `wait_ended` says so. Leaving deregisters.
    """

    def __init__(
        self,
        name: str,
        plugins: Sequence[Plugin],
        manager_socket: Path,
        *,
        version: str = "",
        timeout_s: float = CONNECT_TIMEOUT_S,
        interval_s: float = INTERVAL_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.uuid = 0
        self.manager = ExtensionClient(manager_socket)
        """Calls to the manager, such as ``query``."""
        self._plugins = {(plugin.registry, plugin.name): plugin for plugin in plugins}
        self._version = version
        self._timeout_s = timeout_s
        self._interval_s = interval_s
        self._ping_timeout_s = ping_timeout_s
        self._service = sockets.Service(self._answer)
        self._ended = trio.Event()
        self._reason = ""
        self._open: contextlib.AbstractAsyncContextManager[None] | None = None

    @property
    def path(self) -> Path:
        """Where it listens."""
        return sockets.extension_path(self.manager.path, self.uuid)

    @property
    def calls(self) -> int:
        """How many were answered."""
        return self._service.calls

    async def wait_ended(self) -> str:
        """Return once this extension is of no further use to its manager: the reason, for people."""
        await self._ended.wait()
        return self._reason

    async def __aenter__(self) -> Self:
        self._open = self._serving()
        await self._open.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._open is not None
        return await self._open.__aexit__(kind, error, trace)

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        await self.manager.wait_listening(self._timeout_s)
        registry: dict[str, dict[str, messages.Rows]] = {}
        for (kind, name), plugin in self._plugins.items():
            registry.setdefault(kind, {})[name] = plugin.routes()
        status = await self.manager.register(ExtensionInfo(self.name, self._version), registry)
        if status.code:
            raise RegistrationRefused(f"{self.manager.path} refused the extension {self.name}: {status.message}")
        self.uuid = status.uuid
        failure: Exception | None = None
        try:
            async with await sockets.listen(sockets.check_path(self.path)) as listener, trio.open_nursery() as nursery:
                nursery.start_soon(self._service.serve, listener)
                nursery.start_soon(self._watch)
                try:
                    yield
                except Exception as error:  # noqa: BLE001 - raised below, without the nursery's group around it
                    failure = error
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(_GOODBYE_S, shield=True):
                await self._leave()
        if failure is not None:
            raise failure

    async def _leave(self) -> None:
        self.path.unlink(missing_ok=True)
        if not self._ended.is_set():
            with contextlib.suppress(ExtensionGone, messages.UnknownMethod):
                await self.manager.deregister(self.uuid)

    async def _watch(self) -> None:
        """The manager dies without a word: ask it at each interval whether it lives."""
        client = ExtensionClient(self.manager.path, timeout_s=self._ping_timeout_s)
        while not self._ended.is_set():
            await trio.sleep(self._interval_s)
            try:
                status = await client.ping()
            except (ExtensionGone, messages.UnknownMethod) as error:
                self._end(str(error))
            else:
                if status.code:
                    self._end(f"the manager's ping brought {status.code} {status.message}")

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._ended.set()

    async def _answer(self, call: Message) -> bytes:
        given = messages.arguments(call)
        match call.name:
            case "ping":
                result: Any = Status(message="pong", uuid=self.uuid).wire()
            case "call":
                result = (await self._call(*given)).wire()
            case "shutdown":
                self._end("the manager asked for a shutdown")
                result = None
            case _:
                return messages.encode_trouble(call, messages.UNKNOWN_METHOD, f"Invalid method name: '{call.name}'")
        return messages.encode_reply(call, result)

    async def _call(self, registry: str, item: str, request: Row) -> Response:
        plugin = self._plugins.get((registry, item))
        if plugin is None:
            return refused(f"Cannot call registry item: {item}")
        try:
            return await plugin.call(request)
        except Exception as error:  # noqa: BLE001 - a plugin's bug fails its call, never the extension
            return refused(f"{type(error).__name__}: {error}")
