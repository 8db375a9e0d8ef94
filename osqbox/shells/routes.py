"""The agents' side of the shell API: get-shells, and joining by WebSocket, below /api/v1/shells and /api/shells.

The control server's design shows a POST with a bearer token to join; the Launcher that was shipped opens a WebSocket
and sends the secret as its first message. Both are served: the POST only learns which WebSocket to open.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import trio

from osqbox import shell_frames as frames
from osqbox import shell_legacy as legacy
from osqbox.errors import Refused
from osqbox.exchange import Peer, Request, Response
from osqbox.listen.asgi import Receive, Send
from osqbox.listen.connection import current_peer
from osqbox.listen.websocket import WebSocket
from osqbox.shell_frames import SUBPROTOCOL, AgentHello, CloseCode, FrameError, FrameType
from osqbox.shell_legacy import AgentFrame, LegacyError
from osqbox.shells import protocol
from osqbox.shells.broker import Broker
from osqbox.shells.links import FrameLink, LauncherLink, Link
from osqbox.shells.messages import GetShells, JoinBody
from osqbox.shells.service import Claim

T = TypeVar("T")

log = logging.getLogger(__name__)

Authenticate = Callable[[str, Peer], tuple[str, str, str]]
"""Node key and peer to the node's id, its tenant and its host name. Raises Refused, with ``node_invalid`` where due."""

CLOSE_CODES = {
    401: CloseCode.UNAUTHORIZED,
    403: CloseCode.FORBIDDEN,
    404: CloseCode.NOT_FOUND,
    410: CloseCode.ENDED,
    429: CloseCode.BUSY,
    503: CloseCode.GOING_AWAY,
}
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


class ShellsApi:
    """Implements `exchange.Handler` for the shells' paths of the agents listener; `join` is its WebSocket app."""

    def __init__(self, broker: Broker, authenticate: Authenticate) -> None:
        self._broker = broker
        self._authenticate = authenticate
        self.requests: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def serves(self, target: str) -> bool:
        return protocol.serves(target)

    def body_limit_bytes(self, method: str, target: str) -> int:  # noqa: ARG002 - the Handler's shape
        return protocol.BODY_BYTES

    def refuse(
        self,
        status: int,
        reason: str,
        message: str,
        peer: Peer | None,  # noqa: ARG002 - the Handler's shape
        target: str | None = None,  # noqa: ARG002
    ) -> Response | None:
        answer = protocol.failure(Refused(reason, message, status=status))
        answer.close = True
        return answer

    async def answer(self, request: Request) -> Response | None:
        try:
            return await self._dispatch(request)
        except Refused as refused:
            failed = refused
        except Exception:
            log.exception("internal error in the shell API")
            failed = Refused("internal", "internal error; the server's log has it", status=500)
        self.refused[failed.reason] += 1
        return protocol.failure(failed)

    async def _dispatch(self, request: Request) -> Response:
        session = protocol.session_id(request.target)
        if session is None:
            raise Refused("unknown_path", "no such path; the shells' are under /api/v1/shells", status=404)
        if request.method not in ("POST", "PUT"):
            if session:
                raise Refused("no_websocket", "expected a WebSocket handshake, or POST to be told where", status=426)
            raise Refused("wrong_method", f"method: expected POST, got {request.method[:20]}", status=405)
        self.requests["join" if session else "get_shells"] += 1
        return await self._where(request, session) if session else await self._get_shells(request)

    def _node(self, node_key: str, peer: Peer) -> tuple[str, str, str]:
        return self._authenticate(node_key, peer)

    async def _get_shells(self, request: Request) -> Response:
        node_key = _parse(request.body, GetShells).node_key
        node, tenant, _ = self._node(node_key, request.peer)
        offers = await self._broker.poll(
            node,
            tenant,
            request.wait_gone,
            certificate_name=request.peer.certificate_name,
        )
        return protocol.sessions(offers)

    async def _where(self, request: Request, session: str) -> Response:
        """The design's join: the right bearer is told the WebSocket's URL, and keeps its secret."""
        body = _parse(request.body, JoinBody) if request.body.strip() else JoinBody()
        token = protocol.bearer(request.headers)
        await self._broker.check(self._claim(session, token, request.peer, body.node_key))
        host = request.headers.get("host", "")
        if not _HOST.fullmatch(host):
            raise Refused("bad_host", "Host: expected a host name and port", status=400)
        scheme = "ws" if request.peer.tls_version is None else "wss"
        return protocol.where(f"{scheme}://{host}{request.target.partition('?')[0]}")

    def _claim(self, session: str, token: str | None, peer: Peer | None, node_key: str | None = None) -> Claim:
        facts: dict[str, Any] = {}
        if peer is not None:
            facts = {"certificate_name": peer.certificate_name, "address": peer.address}
            if node_key is not None:
                facts["node"] = self._node(node_key, peer)[0]
        if token is None:
            return Claim(session, None, **facts)
        return self._broker.claim(session, token, **facts)

    # joining

    async def join(self, scope: Any, receive: Receive, send: Send) -> None:
        """ASGI application for WebSockets."""
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        await receive()  # websocket.connect
        try:
            session, token, offered = self._admit(scope)
            if token is not None:
                await self._broker.check(self._claim(session, token, current_peer()))
        except Refused as refused:
            self.refused[refused.reason] += 1
            await _refuse_handshake(scope, send, refused)
            return
        self.requests["websocket"] += 1
        is_v1 = SUBPROTOCOL in offered
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if is_v1 else None})
        socket = WebSocket(receive, send)
        await (self._join_v1 if is_v1 else self._join_launcher)(session, token, socket)

    def _admit(self, scope: Any) -> tuple[str, str | None, list[str]]:
        """Session, bearer token and offered subprotocols. Raises Refused."""
        session = protocol.session_id(scope.get("raw_path", scope["path"].encode()).decode("latin-1"))
        if not session:
            raise Refused("unknown_path", "no WebSocket is served here", status=404)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if "origin" in headers:  # every browser sends it, no agent does
            raise Refused("foreign_origin", "Origin: expected none, as agents send none", status=403)
        offered = list(scope.get("subprotocols") or ())
        if offered and SUBPROTOCOL not in offered:
            message = f"Sec-WebSocket-Protocol: expected {SUBPROTOCOL}, or none as the Launcher of 2018 sends"
            raise Refused("wrong_subprotocol", message, status=400)
        return session, protocol.bearer(headers), offered

    async def _join_v1(self, session: str, token: str | None, socket: WebSocket) -> None:
        link = FrameLink(socket)
        try:
            with trio.move_on_after(self._broker.bounds.hello_s) as patience:
                frame = await link.receive()
            if patience.cancelled_caught:
                raise FrameError("expected HELLO, got nothing", CloseCode.TOO_SLOW)
            if frame is None:
                return
            if frame.type is not FrameType.HELLO:
                raise FrameError(f"expected HELLO first, got {frame.type.name}")
            hello = frames.parse(frame, AgentHello)
            await self._broker.join(self._claim_of_hello(session, token, hello), link, hello)
        except Refused as refused:
            await link.send(frames.error(refused.reason, refused.message))
            await self._close(link, refused)
        except FrameError as wrong:
            await self._close(link, wrong)

    def _claim_of_hello(self, session: str, token: str | None, hello: AgentHello) -> Claim:
        """What HELLO says counts; where it says nothing, the bearer token."""
        peer = current_peer()
        claim = self._claim(session, token, peer, hello.node_key)
        if hello.session != session:
            return Claim("", hello.secret, hello.resume, claim.node, claim.certificate_name, claim.address)
        if hello.resume is None and hello.secret is None:
            return claim
        secret = None if hello.resume is not None else hello.secret
        return Claim(session, secret, hello.resume, claim.node, claim.certificate_name, claim.address)

    async def _join_launcher(self, session: str, token: str | None, socket: WebSocket) -> None:
        link = LauncherLink(socket)
        try:
            if token is None:
                token = await self._first_message(socket)
            if token is not None:
                await self._broker.join(self._claim(session, token, current_peer()), link, None)
        except Refused as refused:
            await self._close(link, refused)
        except (FrameError, LegacyError) as wrong:
            await self._close(link, wrong)

    async def _first_message(self, socket: WebSocket) -> str | None:
        """The secret of a Launcher; None when it left. Raises FrameError or LegacyError."""
        with trio.move_on_after(self._broker.bounds.hello_s) as patience:
            message = await socket.receive()
        if patience.cancelled_caught:
            raise FrameError("expected the secret, got nothing", CloseCode.TOO_SLOW)
        if message is None:
            return None
        if isinstance(message, bytes):
            raise FrameError("expected the secret as text, got a binary message", CloseCode.UNSUPPORTED_DATA)
        kind, secret = legacy.decode_agent(message)
        if kind is not AgentFrame.AUTHENTICATE:
            raise FrameError("expected the secret first")
        return secret

    async def _close(self, link: Link, error: Refused | FrameError | LegacyError) -> None:
        if isinstance(error, Refused):
            self.refused[error.reason] += 1
            code = CLOSE_CODES.get(error.status, CloseCode.INTERNAL_ERROR)
        else:
            self.refused["bad_frame"] += 1
            code = error.code if isinstance(error, FrameError) else CloseCode.PROTOCOL_ERROR
        await link.aclose(code, str(error))

    def statistics(self) -> dict[str, Any]:
        return {"requests": dict(self.requests), "refused": dict(self.refused)}


def _parse(body: bytes, kind: type[T]) -> T:
    """Raises Refused, which quotes nothing."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as wrong:
        raise Refused("bad_body", f"body: expected a JSON object, got: {wrong}") from None


async def _refuse_handshake(scope: Any, send: Send, refused: Refused) -> None:
    """Answered as everything that is refused to agents: a JSON object with ``error``."""
    await trio.lowlevel.checkpoint()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"error": refused.message, "node_invalid": refused.node_invalid}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
