"""One WebSocket as ASGI has it, below Quart: every message is bounded, and closing never waits for the other end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import trio
from werkzeug.datastructures import Headers

from osqbox.listen.asgi import ClientGone
from osqbox.listen.connection import current_connection

from .answers import JSON, Failure, encoded

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CLOSE_TIMEOUT_S = 1.0
"""For the close frame, when the other end has stopped reading."""
REASON_BYTES = 123
"""A close frame holds no more (RFC 6455, 5.5)."""


class Socket:
    """`refuse` it or `accept` it; then one task may receive while others send."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]])
        self.offered: Sequence[str] = scope.get("subprotocols", ())
        self.address: str = (scope.get("client") or ("",))[0]
        self._extensions = scope.get("extensions", {})
        self._receive = receive
        self._send = send
        self._connection = current_connection()
        self.close_code: int | None = None
        """With what the other end closed; 1006 when it vanished."""
        self.closed = False

    async def refuse(self, failure: Failure, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Answer the handshake as the API answers everything it refuses."""
        self.closed = True
        if "websocket.http.response" not in self._extensions:
            await self._send({"type": "websocket.close", "code": 1008})
            return
        named = [("Content-Type", JSON), *headers]
        fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named]
        await self._send({"type": "websocket.http.response.start", "status": status, "headers": fields})
        await self._send({"type": "websocket.http.response.body", "body": encoded(failure)})

    async def accept(self, subprotocol: str) -> None:
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol})

    async def receive(self) -> bytes | str | None:
        """The next message; None when the other end has gone, and `close_code` says how."""
        if self.close_code is not None:
            return None
        message = await self._receive()
        if message["type"] == "websocket.connect":
            message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self.close_code = int(message.get("code") or 1006)
            self.closed = True
            return None
        data, text = message.get("bytes"), message.get("text")
        return text if data is None and text is not None else data or b""

    async def send(self, message: bytes | str) -> None:
        """Does nothing when the other end has gone: `receive` tells."""
        if self.closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._send({"type": "websocket.send", "bytes" if isinstance(message, bytes) else "text": message})
        except ClientGone:
            self.closed = True
        except Exception:
            if not self.closed:  # closed by another task while this one was on its way: the server minds, nobody else
                raise

    async def close(self, code: int, reason: str = "") -> None:
        """Returns within CLOSE_TIMEOUT_S, also when a write hangs: then the connection is cut."""
        if self.closed:
            return
        self.closed = True
        text = reason.encode()[:REASON_BYTES].decode(errors="ignore")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut_when_late)
            with suppress(ClientGone):
                await self._send({"type": "websocket.close", "code": code, "reason": text})
            nursery.cancel_scope.cancel()

    async def _cut_when_late(self) -> None:
        await trio.sleep(CLOSE_TIMEOUT_S)
        if self._connection is not None:
            self._connection.abort()
