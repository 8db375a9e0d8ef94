"""A WebSocket over the agent's own TLS: its trust, its certificate, its proxy."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import trio
from trio_websocket import ConnectionRejected, WebSocketConnection, wrap_client_stream

from osqbox.agent.wire import CallFailed, Transport, open_stream
from osqbox.shell_frames import AGENT_FRAME_BYTES

CLOSE_S = 1.0
"""For saying goodbye: the other end may be gone."""
_QUEUE_MESSAGES = 16
_RECEIVE_BYTES = 64 * 1024


class JoinFailed(Exception):
    """No WebSocket. ``status`` is the HTTP status it was refused with, 0 when nobody answered."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Dialer:
    hostname: Callable[[], str]
    """``localhost:8443``"""
    context: ssl.SSLContext
    transport: Transport

    @contextlib.asynccontextmanager
    async def dial(
        self, path: str, *, headers: Sequence[tuple[str, str]] = (), subprotocol: str | None = None, polite: bool = True
    ) -> AsyncIterator[WebSocketConnection]:
        """An open WebSocket, closed at the end; unless ``polite`` without a word. Raises JoinFailed."""
        hostname = self.hostname()
        try:
            stream = await open_stream(hostname, self.context, self.transport)
        except CallFailed as error:
            raise JoinFailed(str(error)) from error
        line = Line(stream)
        try:
            async with _one_exception(), trio.open_nursery() as nursery:
                with trio.move_on_after(self.transport.timeout_s) as line.waiting:
                    connection = await wrap_client_stream(
                        nursery,
                        line,  # type: ignore[arg-type] # any stream will do
                        hostname.removesuffix(":443"),
                        path,
                        subprotocols=[subprotocol] if subprotocol else None,
                        extra_headers=[(name.encode(), value.encode()) for name, value in headers],
                        message_queue_size=_QUEUE_MESSAGES,
                        max_message_size=AGENT_FRAME_BYTES,
                        receive_buffer_size=_RECEIVE_BYTES,
                    )
                if line.waiting.cancelled_caught:
                    nursery.cancel_scope.cancel()
                    raise JoinFailed("closed during the handshake" if line.has_ended else "timeout")
                try:
                    yield connection
                finally:
                    if polite:
                        with trio.move_on_after(CLOSE_S, shield=True):
                            await connection.aclose()
                    nursery.cancel_scope.cancel()
        except ConnectionRejected as error:
            raise JoinFailed(f"refused with HTTP status {error.status_code}", error.status_code) from error
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


class Line(trio.abc.Stream):
    """The stream below a WebSocket; ends the wait for a handshake that cannot come any more."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream] | trio.SocketStream) -> None:
        self._stream = stream
        self.waiting = trio.CancelScope()
        self.has_ended = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            self._end()
            raise
        if not data:
            self._end()
        return data

    async def aclose(self) -> None:
        self._end()
        await self._stream.aclose()

    def _end(self) -> None:
        self.has_ended = True
        self.waiting.cancel()


@contextlib.asynccontextmanager
async def _one_exception() -> AsyncIterator[None]:
    """What a nursery wraps into groups comes out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
            found = found.exceptions[0]
        raise found from found.__cause__
