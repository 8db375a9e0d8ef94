"""An agent's commands on the wire: as server-sent events, and as a WebSocket.

Both hold the page that is being written and nothing else. A piece that does not leave within WRITE_S ends the stream as
``too_slow``; what was not written is pending again.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import msgspec
import trio

from osqbox.exchange import Write

from .hub import Bye, CommandStream, Deliver, Item, Reset
from .messages import Command, Json

KEEP_ALIVE_S = 15.0
"""Proxies cut idle streams at 29 to 60 s; a comment also finds out about a peer that has vanished."""
WRITE_S = 20.0
"""The longest that one write may take, which is also how long a stuck reader is kept."""
PIECE_BYTES = 64 * 1024
RECONNECT_MS = 2000
SSE_HEADERS = (
    ("Cache-Control", "no-cache, no-store"),
    ("X-Accel-Buffering", "no"),
)
SSE_TYPE = "text/event-stream; charset=utf-8"
SSE_OPENING = b"retry: %d\n:\n\n" % RECONNECT_MS
SSE_COMMENT = b":\n\n"
RESET = {"reason": "unknown_last_event_id"}
SEQ_MAX = 2**63 - 1
UNKNOWN_SEQ = -1

GOING_AWAY, POLICY, TRY_LATER = 1001, 1008, 1013
CLOSE_CODES = {
    "replaced": POLICY,
    "token_expired": POLICY,
    "revoked": POLICY,
    "box_stopping": GOING_AWAY,
    "too_slow": TRY_LATER,
}


class TooSlow(trio.BrokenResourceError):
    """A write did not end in time: the connection is of no use any more and must be cut."""


def last_event_id(text: str | None) -> int | None:
    """Of the header or query parameter; None: the agent does not say where it was.

    What is no number of ours is a number that nobody knows, so that the agent is told by a reset.
    """
    if text is None or not text.strip():
        return None
    text = text.strip()
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(SEQ_MAX)):
        return UNKNOWN_SEQ
    return int(text)


def wire(command: Command) -> dict[str, Json]:
    """A command as agents know it; what is not set is left out."""
    facts: dict[str, Any] = {
        "document_id": command.id,
        "request_id": command.request_id,
        "order_id": command.id,
        "source": command.source,
        "user": command.user or None,
        "target": {"type": command.target_type, "id": command.target_id or command.agent},
        "action": {"name": command.action.name, "version": command.action.version, "args": command.action.args},
        "timeout": max(0, round(command.expires_at - command.created_at)),
        "status": command.status.value,
        "result": None if command.result is None else _without_null(msgspec.structs.asdict(command.result)),
    }
    return _without_null(facts)


def _without_null(facts: dict[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in facts.items() if value is not None}


def wire_stream(command: Command) -> dict[str, Json]:
    return {"id": command.id, **wire(command)}


# server-sent events


def sse_event(kind: str, data: Json, *, id: int | None = None, retry_ms: int | None = None) -> bytes:
    """One event, whole; JSON in one line."""
    lines = [b"id: %d" % id] if id is not None else []
    if retry_ms is not None:
        lines.append(b"retry: %d" % retry_ms)
    return b"\n".join((*lines, b"event: " + kind.encode(), b"data: " + msgspec.json.encode(data), b"", b""))


def sse_pieces(item: Item) -> Iterator[bytes]:
    """Whole events, so many in a piece that each can be written in time over a slow line."""
    piece = b""
    for event in _sse_events(item):
        if piece and len(piece) + len(event) > PIECE_BYTES:
            yield piece
            piece = b""
        piece += event
    yield piece


def _sse_events(item: Item) -> Iterator[bytes]:
    match item:
        case Deliver(commands):
            for each in commands:
                yield sse_event("command", wire_stream(each), id=each.seq)
        case Bye(reason, retry_ms):
            # A browser keeps the last `retry` for every later failure too: none is told to hurry for ever.
            yield sse_event("bye", {"reason": reason, "retry_ms": retry_ms}, retry_ms=retry_ms or None)
        case Reset():
            yield sse_event("reset", RESET, id=0)


async def sse(
    stream: CommandStream, send: Write, *, keep_alive_s: float = KEEP_ALIVE_S, write_s: float = WRITE_S
) -> None:
    """Write the body of a stream until it says bye.

    Raises TooSlow, or what ``send`` raises when the reader has gone; the connection is to be cut then.
    """

    async def write(pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            with _deadline(stream, write_s):
                await send(piece)

    await write((SSE_OPENING,))
    while not stream.has_ended:
        item = await stream.next(keep_alive_s)
        if item is None:
            await write((SSE_COMMENT,))
        else:
            await _deliver(stream, item, partial(write, sse_pieces(item)))


# WebSocket


class Socket(Protocol):
    """As much of `osqbox.listen.websocket.WebSocket` as a stream uses."""

    @property
    def is_closed(self) -> bool: ...

    async def receive(self) -> bytes | str | None: ...

    async def send(self, message: bytes | str) -> None: ...

    async def aclose(self, code: int, reason: str = "") -> None: ...


def frame(kind: str, data: Json, id: int | None = None) -> str:
    facts = {"event": kind, "data": data} if id is None else {"event": kind, "id": id, "data": data}
    return msgspec.json.encode(facts).decode()


def frames_of(item: Item) -> Iterator[str]:
    match item:
        case Deliver(commands):
            for each in commands:
                yield frame("command", wire_stream(each), each.seq)
        case Bye(reason, retry_ms):
            yield frame("bye", {"reason": reason, "retry_ms": retry_ms})
        case Reset():
            yield frame("reset", RESET, 0)


async def websocket(stream: CommandStream, socket: Socket, *, write_s: float = WRITE_S) -> None:
    """Serve an accepted WebSocket until the stream says bye or the agent has gone, and close it.

    Pings are the listener's; only the server has something to say, so a message from the agent ends it with 1008.
    """

    in_time = trio.CancelScope()

    async def write(frames: Iterable[str]) -> None:
        for each in frames:
            in_time.deadline = trio.current_time() + write_s
            await socket.send(each)
            in_time.deadline = math.inf
            if socket.is_closed:
                raise trio.BrokenResourceError("the agent has gone")

    code, reason = POLICY, "only the server sends on this connection"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_heard, socket, nursery.cancel_scope)
        nursery.start_soon(_close_when_slow, socket, in_time, stream)
        with suppress(trio.BrokenResourceError):
            async for item in stream:
                await _deliver(stream, item, partial(write, frames_of(item)))
                if isinstance(item, Bye):
                    code, reason = CLOSE_CODES[item.reason], item.reason
        nursery.cancel_scope.cancel()
    await socket.aclose(code, reason)


async def _until_heard(socket: Socket, stream: trio.CancelScope) -> None:
    """An agent that speaks, or goes, ends its stream."""
    await socket.receive()
    stream.cancel()


async def _close_when_slow(socket: Socket, in_time: trio.CancelScope, stream: CommandStream) -> None:
    """A write to a socket cannot be cancelled half-way: closing it ends one that hangs."""
    with in_time:
        await trio.sleep_forever()
    stream.end("too_slow")
    await socket.aclose(CLOSE_CODES["too_slow"], "too_slow")


# both


@contextmanager
def _deadline(stream: CommandStream, write_s: float) -> Iterator[None]:
    with trio.move_on_after(write_s) as in_time:
        yield
    if in_time.cancelled_caught:
        stream.end("too_slow")
        raise TooSlow(f"expected the reader to take a piece within {write_s:g} s")


async def _deliver(stream: CommandStream, item: Item, write: Callable[[], Awaitable[None]]) -> None:
    """Write an item, and say of its commands whether they went out."""
    ids = [each.id for each in item.commands] if isinstance(item, Deliver) else []
    try:
        await write()
    except BaseException:  # Cancelled too: the box stops, or the agent has gone
        await stream.not_written(ids)
        raise
    await stream.written(ids)
