"""The agents' door: several systems behind one listener, each answering the paths it serves."""

from __future__ import annotations

from typing import Protocol

from osqbox.exchange import Handler, Peer, Request, Response


class Part(Handler, Protocol):
    def serves(self, target: str) -> bool:
        """Whether this path is its own."""
        ...


class Door:
    """Implements `exchange.Handler`: the first part that serves a path answers it, ``otherwise`` the rest."""

    def __init__(self, otherwise: Handler, *parts: Part) -> None:
        self._otherwise = otherwise
        self._parts = parts

    def _for(self, target: str | None) -> Handler:
        for part in self._parts:
            if target is not None and part.serves(target):
                return part
        return self._otherwise

    def body_limit_bytes(self, method: str, target: str) -> int:
        return self._for(target).body_limit_bytes(method, target)

    async def answer(self, request: Request) -> Response | None:
        return await self._for(request.target).answer(request)

    def refuse(
        self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None
    ) -> Response | None:
        return self._for(target).refuse(status, reason, message, peer, target)
