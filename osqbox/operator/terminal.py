"""Terminals over WebSocket: ``shell.v1`` for our own clients and pages, ``webtty`` for those of GoTTY.

A WebSocket is outside CORS, and a browser sends what it knows along with any page's requests. So every handshake must
name an origin of ours to the letter, or none together with the token, before anything else is looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

import trio

from osqbox.errors import Refused
from osqbox.listen.asgi import Receive, Send
from osqbox.shell_frames import (
    SUBPROTOCOL,
    VIEWER_FRAME_BYTES,
    CloseCode,
    Frame,
    FrameError,
    decode,
    encode,
    error,
)
from osqbox.shell_legacy import GOTTY_V1, GOTTY_V2, GottyTable
from osqbox.shells.messages import Grant, Redeemed

from .answers import Failure
from .gotty import WEBTTY, GottyLink
from .guard import Unwelcome, check_own, check_token
from .parts import OPERATOR, Parts, Shells
from .socket import Scope, Socket

TICKET = "ticket."
"""Prefix of the subprotocol that carries a ticket: the one header a page's script can choose."""
CLOSE_CODES = {
    403: CloseCode.FORBIDDEN,
    404: CloseCode.NOT_FOUND,
    410: CloseCode.ENDED,
    429: CloseCode.BUSY,
    503: CloseCode.GOING_AWAY,
}

BEARER = Redeemed(OPERATOR, Grant.CONTROLLER)
"""What the box's token gives."""

_PATH = re.compile(r"/api/v1/shells/([^/]+)/(terminal|gotty/ws|gotty1/ws)")
_TABLES = {"gotty/ws": GOTTY_V2, "gotty1/ws": GOTTY_V1}


class TerminalLink:
    """A viewer that speaks ``shell.v1``, as the broker sees it."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    @property
    def close_code(self) -> int | None:
        """With what the viewer closed, once it has."""
        return self._socket.close_code

    async def receive(self) -> Frame | None:
        """None when the viewer has gone. Raises FrameError."""
        message = await self._socket.receive()
        return None if message is None else decode(message, VIEWER_FRAME_BYTES)

    async def send(self, frame: Frame) -> None:
        await self._socket.send(encode(frame))

    async def aclose(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)


async def serve(parts: Parts, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one WebSocket handshake, and stay until the terminal is left."""
    socket = Socket(scope, receive, send)
    try:
        shells, asked = _admit(parts, socket, scope.get("raw_path", scope["path"].encode()).decode("latin-1"))
        shells.session(asked.session)
        visitor = BEARER if asked.ticket is None else await shells.redeem(asked.session, asked.ticket)
    except Unwelcome as unwelcome:
        await socket.refuse(unwelcome.failure, unwelcome.status, unwelcome.headers)
    except Refused as refused:
        await socket.refuse(Failure(error=refused.message, reason=refused.reason), refused.status, ())
    else:
        await socket.accept(asked.subprotocol)
        if asked.table is None:
            await _view(shells, asked.session, visitor, TerminalLink(socket))
        else:
            await _run_gotty(shells, asked.session, GottyLink(socket, asked.table, parts.new_id()))


@dataclass(frozen=True, slots=True)
class _Asked:
    session: str
    ticket: str | None
    """None: the box's token was shown."""
    table: GottyTable | None

    @property
    def subprotocol(self) -> str:
        return SUBPROTOCOL if self.table is None else WEBTTY


def _admit(parts: Parts, socket: Socket, path: str) -> tuple[Shells, _Asked]:
    """Raises Unwelcome. First what a stranger may know, so that he learns nothing else."""
    check_own(socket.headers, parts.allowed_hosts(), changes=True)
    found = _PATH.fullmatch(path.partition("?")[0])
    table = _TABLES.get(found[2]) if found else None
    ticket = next((word.removeprefix(TICKET) for word in socket.offered if word.startswith(TICKET)), None)
    if ticket is None or found is None or table is not None:
        check_token(socket.headers, parts.token, basic=table is not None)
    elif "Origin" not in socket.headers:
        failure = Failure(error="Origin: expected this box's own beside a ticket, got none", reason="foreign")
        raise Unwelcome(failure, 403)
    if found is None or parts.shells is None:
        raise Unwelcome(Failure(error="no WebSocket is served here", reason="unknown_path"), 404)
    asked = _Asked(unquote(found[1]), ticket if table is None else None, table)
    if asked.subprotocol not in socket.offered:
        got = f"Sec-WebSocket-Protocol: expected {asked.subprotocol}, got another or none"
        raise Unwelcome(Failure(error=got, reason="wrong_subprotocol"), 400)
    return parts.shells, asked


async def _run_gotty(shells: Shells, session: str, link: GottyLink) -> None:
    """The token of the first message is a ticket like any, in addition to the box's token that opened the socket."""
    token = await link.read_token()
    if token is None:
        return
    try:
        visitor = await shells.redeem(session, token)
    except Refused as refused:
        await link.aclose(CloseCode.FORBIDDEN, refused.message)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.pump)
        await _view(shells, session, visitor, link)
        nursery.cancel_scope.cancel()


async def _view(shells: Shells, session: str, visitor: Redeemed, link: TerminalLink | GottyLink) -> None:
    """What the broker refuses after the handshake is told in a frame, and by the close code."""
    try:
        await shells.view(session, visitor.by, visitor.grant, link)
    except Refused as refused:
        await link.send(error(refused.reason, refused.message))
        await link.aclose(CLOSE_CODES.get(refused.status, CloseCode.INTERNAL_ERROR), refused.message)
    except FrameError as wrong:
        await link.aclose(wrong.code, str(wrong))
    finally:
        with trio.CancelScope(shield=True):
            await link.aclose(CloseCode.NORMAL)
