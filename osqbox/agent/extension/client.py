"""Calling somebody's extension socket: a manager's or an extension's. For Trio, and for threads."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import trio

from osqbox.agent.extension import messages
from osqbox.agent.extension.messages import (
    ExtensionInfo,
    OptionInfo,
    Registry,
    Response,
    Row,
    Status,
)
from osqbox.agent.extension.sockets import CHUNK_BYTES, ExtensionGone, NotListening
from osqbox.agent.extension.thrift import ProtocolError

CALL_TIMEOUT_S = 30.0
POLL_S = 0.02
_WAKE_S = 0.1
_FULL = (BlockingIOError, TimeoutError)
_ABSENT = (FileNotFoundError, ConnectionRefusedError)


class ExtensionClient:
    """The calls of the API, each on a connection of its own; inside ``async with client:`` all share one.

    That a peer may serve one connection at a time (the Python package does) is why nothing is held open otherwise.
    ``timeout_s`` bounds a call, connecting included. Every call raises ExtensionGone or UnknownMethod.
    """

    def __init__(self, path: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._held: trio.SocketStream | None = None
        self._turn = trio.Lock()

    async def __aenter__(self) -> Self:
        with self._deadline():
            self._held = await _connect(self.path)
        return self

    async def __aexit__(self, *_error: object) -> None:
        held, self._held = self._held, None
        if held is not None:
            await trio.aclose_forcefully(held)

    async def wait_listening(self, timeout_s: float) -> None:
        """Return once the peer answers a ping. Raises NotListening, or what the last ping raised."""
        until = trio.current_time() + timeout_s
        while True:
            try:
                await self.ping()
                return
            except NotListening:
                if trio.current_time() >= until:
                    raise
            await trio.sleep(POLL_S)

    async def ping(self) -> Status:
        return messages.read_status(await self._exchange("ping"))

    async def call(self, registry: str, item: str, request: Row) -> Response:
        return messages.read_response(await self._exchange("call", registry, item, request))

    async def shutdown(self) -> None:
        """Ask an extension to end. A manager takes no notice."""
        await self._exchange("shutdown")

    async def extensions(self) -> dict[int, ExtensionInfo]:
        """Those registered, by uuid; without the core."""
        return {uuid: messages.read_info(info) for uuid, info in (await self._exchange("extensions")).items()}

    async def options(self) -> dict[str, OptionInfo]:
        return {name: messages.read_option(option) for name, option in (await self._exchange("options")).items()}

    async def register(self, info: ExtensionInfo, plugins: Registry) -> Status:
        """OK with the uuid to listen under, or why not."""
        return messages.read_status(await self._exchange("registerExtension", info.wire(), plugins))

    async def deregister(self, uuid: int) -> Status:
        return messages.read_status(await self._exchange("deregisterExtension", uuid))

    async def query(self, sql: str) -> Response:
        return messages.read_response(await self._exchange("query", sql))

    async def columns(self, sql: str) -> Response:
        """One row ``{name: TYPE}`` per column of the result ``sql`` would have."""
        return messages.read_response(await self._exchange("getQueryColumns", sql))

    async def _exchange(self, name: str, *given: Any) -> Any:
        request = messages.encode_call(name, *given)
        async with self._stream() as stream:
            decoder = messages.replies()
            await stream.send_all(request)
            while True:
                data = await stream.receive_some(CHUNK_BYTES)
                if not data:
                    raise ExtensionGone(f"{self.path} closed the connection without a reply to {name}")
                for reply in decoder.feed(data):
                    return messages.result(name, reply)

    @contextlib.asynccontextmanager
    async def _stream(self) -> AsyncIterator[trio.SocketStream]:
        """The held connection when it is our turn, or a new one. One that failed is of no further use."""
        with self._deadline():
            if self._held is None:
                async with await _connect(self.path) as stream:
                    yield stream
                return
            async with self._turn:
                held = self._held
                try:
                    yield held
                except BaseException:
                    await trio.aclose_forcefully(held)
                    raise

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        try:
            with trio.fail_after(self.timeout_s):
                yield
        except trio.TooSlowError:
            raise ExtensionGone(f"{self.path} did not answer within {self.timeout_s:g} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ExtensionGone(f"{self.path}: the connection broke") from error
        except ProtocolError as error:
            raise ExtensionGone(f"{self.path}: {error}") from error


async def _connect(path: Path) -> trio.SocketStream:
    try:
        return await trio.open_unix_socket(str(path))
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: Path, error: OSError) -> ExtensionGone:
    kind = NotListening if isinstance(error, _ABSENT) else ExtensionGone
    return kind(f"cannot connect to {path}: {error.strerror or error}")


# -- from a thread -----------------------------------------------------------------------------------------------


def call_from_thread(
    path: Path,
    registry: str,
    item: str,
    request: Mapping[str, str],
    *,
    checkpoint: Callable[[], None],
    timeout_s: float = CALL_TIMEOUT_S,
    wait_listening_s: float = 0.0,
) -> Response:
    """``call`` for the thread a query runs in, which must not wait for the loop.

    ``checkpoint`` is called several times a second and may raise to give up. A socket that is not there yet is
    waited for as long as told. Raises ExtensionGone, UnknownMethod.
    """
    until = time.monotonic() + timeout_s
    payload = messages.encode_call("call", registry, item, request)
    try:
        listening_by = min(until, time.monotonic() + wait_listening_s)
        with _connect_from_thread(path, checkpoint, listening_by, until) as connection:
            _send(connection, payload, checkpoint, until)
            return _receive(connection, checkpoint, until)
    except (OSError, ProtocolError) as error:
        raise ExtensionGone(f"{path}: {error}") from error


def _connect_from_thread(path: Path, checkpoint: Callable[[], None], until: float, deadline: float) -> socket.socket:
    """A peer that is not there is waited for until ``until``, one whose queue is full until ``deadline``."""
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_WAKE_S)
        try:
            connection.connect(str(path))
            return connection
        except OSError as error:
            connection.close()
            give_up_at = until if isinstance(error, _ABSENT) else deadline if isinstance(error, _FULL) else 0.0
            if time.monotonic() >= give_up_at:
                raise _unreachable(path, error) from error
        except BaseException:
            connection.close()
            raise
        checkpoint()
        time.sleep(POLL_S)  # noqa: TID251 - this is a thread, not the loop


def _send(connection: socket.socket, payload: bytes, checkpoint: Callable[[], None], until: float) -> None:
    rest = memoryview(payload)
    while rest:
        with contextlib.suppress(TimeoutError):
            rest = rest[connection.send(rest) :]
        _check(checkpoint, until)


def _receive(connection: socket.socket, checkpoint: Callable[[], None], until: float) -> Response:
    decoder = messages.replies()
    while True:
        with contextlib.suppress(TimeoutError):
            data = connection.recv(CHUNK_BYTES)
            if not data:
                raise ProtocolError("the connection was closed without a reply")
            for reply in decoder.feed(data):
                return messages.read_response(messages.result("call", reply))
        _check(checkpoint, until)


def _check(checkpoint: Callable[[], None], until: float) -> None:
    checkpoint()
    if time.monotonic() > until:
        raise ProtocolError("no answer in time")
