"""A WebSocket's handshake as ASGI has it, below Quart."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

from werkzeug.datastructures import Headers

from osqbox.listen.asgi import Receive, Send
from osqbox.listen.websocket import WebSocket

from .answers import JSON, Failure, encoded

Scope: TypeAlias = MutableMapping[str, Any]


class Socket(WebSocket):
    """`refuse` it or `accept` it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(receive, send)
        self.headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]])
        self.offered: Sequence[str] = scope.get("subprotocols", ())
        self._extensions = scope.get("extensions", {})

    async def refuse(self, failure: Failure, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Answer the handshake as the API answers everything it refuses."""
        self._closed = self._closed_here = True
        if "websocket.http.response" not in self._extensions:
            await self._send({"type": "websocket.close", "code": 1008})
            return
        named = [("Content-Type", JSON), *headers]
        fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named]
        await self._send({"type": "websocket.http.response.start", "status": status, "headers": fields})
        await self._send({"type": "websocket.http.response.body", "body": encoded(failure)})

    async def accept(self, subprotocol: str) -> None:
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol})
