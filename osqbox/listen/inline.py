"""HTTP/1.x answered in the connection's own task: the hot path of agents.

h11 only parses, one `h11.Connection` per request (cheaper than driving its writer, and just as strict about
framing); answers are formatted here and leave in one piece. Deadlines are kept by moving one cancel scope's
deadline, and no task is started per request.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum, auto
from http import HTTPStatus
from math import inf

import h11
import trio

from osqbox.errors import Refused
from osqbox.exchange import Handler, Request, Response, Write

from .connection import Connection, kinds_of

logger = logging.getLogger("osqbox.listen")

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_WEBSOCKET_VERSION = "13"
_HEADER_TOO_LARGE = 431
_REASONS = {_HEADER_TOO_LARGE: "header_too_large", 501: "transfer_encoding"}

GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class _Stage(Enum):
    """What the connection waits for; tells what a missed deadline means."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    SEND = auto()


_TOO_SLOW = {
    _Stage.HEAD: Refused("header_timeout", "the request's head did not arrive in time", status=408),
    _Stage.BODY: Refused("body_timeout", "the request's body did not arrive in time", status=408),
}


async def serve_inline(connection: Connection, handler: Handler) -> bytes | None:
    """Answer requests until the connection is through.

    Returns None, or, when the client asks for a WebSocket, all bytes read from that request's first on: they are
    for Hypercorn to parse again.
    """
    return await Inline(connection, handler).run()


class Inline:
    def __init__(self, connection: Connection, handler: Handler) -> None:
        self._connection = connection
        self._shared = connection.shared
        self._handler = handler
        self._http = h11.Connection(h11.SERVER)
        self._stage = _Stage.IDLE
        self._head_only = False
        self._knows_chunks = True
        self._target: str | None = None
        self._seen: list[bytes] = []
        """Raw pieces of the request being read."""
        self._ahead = bytearray()
        """What arrived while a handler waited for the client to leave: the next requests."""
        self._eof = False

    async def run(self) -> bytes | None:
        connection = self._connection
        try:
            with connection.scope:
                return await self._converse()
            refusal = _TOO_SLOW.get(self._stage)
        except Refused as refused:
            refusal = refused
        except GONE:
            return None
        if refusal is not None:
            await self._refuse(refusal)
        return None

    async def _converse(self) -> bytes | None:
        connection, limits = self._connection, self._shared.limits
        connection.until(limits.header_timeout_s)
        ahead = b""
        while not connection.retiring:
            self._http = h11.Connection(h11.SERVER, limits.max_header_bytes)
            head = await self._read_head(ahead)
            if head is None:
                return None
            headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers.raw_items()
            }
            self._admit(head, headers)
            if _wants_websocket(head, headers):
                return b"".join(self._seen)
            if not await self._exchange(head, headers):
                return None
            ahead = self._http.trailing_data[0]
            if self._ahead:
                ahead += self._ahead
                self._ahead = bytearray()
            connection.until(limits.keep_alive_timeout_s)
        return None

    # reading

    async def _read_head(self, ahead: bytes) -> h11.Request | None:
        """The next request's head; None when the client has left or the listener stops."""
        connection, http = self._connection, self._http
        self._seen = [ahead] if ahead else []
        self._head_only, self._target = False, None
        if ahead:
            http.receive_data(ahead)
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                connection.idle = not self._seen
                self._stage = _Stage.HEAD if self._seen else _Stage.IDLE
                if len(self._seen) == 1:
                    connection.until(self._shared.limits.header_timeout_s)
                data = await self._receive()
                connection.idle = False
                if connection.scope.cancel_called:
                    return None  # retired in the moment the data came: not begun, so the client may safely repeat it
                self._seen.append(data)
            elif isinstance(event, h11.Request):
                return event
            else:
                return None

    def _next_event(self) -> object:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            if self._eof:
                return h11.ConnectionClosed()
            status = error.error_status_hint
            if status == _HEADER_TOO_LARGE and b"\n" not in b"".join(self._seen):
                message = f"expected a request line of at most {self._shared.limits.max_header_bytes} bytes, got more"
                raise Refused("target_too_long", message, status=414) from None
            raise Refused(_REASONS.get(status, "bad_request"), f"not HTTP/1.1: {error}", status=status) from None

    async def _receive(self) -> bytes:
        try:
            data = bytes(await self._connection.stream.receive_some())
        except trio.BrokenResourceError:
            data = b""  # without close_notify: common, and no less of an end
        if not data:
            self._eof = True
        self._http.receive_data(data)
        return data

    def _admit(self, head: h11.Request, headers: dict[str, str]) -> None:
        """Raise Refused for what is refused before its body is read."""
        self._head_only, self._target = head.method == b"HEAD", head.target.decode("ascii")
        self._knows_chunks = head.http_version != b"1.0"
        if head.http_version not in (b"1.1", b"1.0"):
            raise Refused("http_version", "expected HTTP/1.0 or HTTP/1.1", status=505)
        if head.method == b"CONNECT":
            raise Refused("method_connect", "this is no proxy", status=405)
        if "transfer-encoding" in headers and "content-length" in headers:  # RFC 9112, 6.1: possible smuggling
            raise Refused("bad_request", "got both Transfer-Encoding and Content-Length, expected one of them")
        if (reason := self._connection.refusal_of_peer()) is not None:
            raise Refused(reason, reason, status=403)

    async def _read_body(self, limit_bytes: int, headers: dict[str, str], pieces: list[bytes]) -> None:
        """Collect the body in ``pieces``, each of them paid for from the listener's budget."""
        size_bytes = int(headers.get("content-length", "0"))
        if size_bytes > limit_bytes:
            raise _too_large(size_bytes, limit_bytes)
        size_bytes = 0
        while True:
            event = self._next_event()
            if isinstance(event, h11.Data):
                size_bytes += len(event.data)
                if size_bytes > limit_bytes:
                    raise _too_large(size_bytes, limit_bytes)
                if not self._shared.body_budget.take(len(event.data)):
                    raise Refused("busy", "too many large requests at once, try again later", status=503)
                pieces.append(event.data)
            elif event is h11.NEED_DATA:
                if self._stage is not _Stage.BODY:
                    await self._begin_body()
                await self._receive()
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise trio.BrokenResourceError("the client left in the middle of its request")

    async def _begin_body(self) -> None:
        connection = self._connection
        if self._http.they_are_waiting_for_100_continue:
            self._stage = _Stage.SEND
            await connection.send(_CONTINUE, connection.scope)
        self._stage = _Stage.BODY
        connection.until(self._shared.limits.body_timeout_s)

    async def _wait_gone(self) -> None:
        """`Request.wait_gone`: read on until the end; bytes that arrive are the next requests."""
        while not self._eof and len(self._ahead) < self._shared.limits.max_header_bytes:
            try:
                data = await self._connection.stream.receive_some()
            except GONE:
                data = b""
            self._eof = not data
            self._ahead += data
        if self._eof:
            await trio.lowlevel.checkpoint()
        else:  # it sends and sends, so it is there; what it sends further waits in the socket
            await trio.sleep_forever()

    # answering

    async def _exchange(self, head: h11.Request, headers: dict[str, str]) -> bool:
        """Read the rest of a request and answer it. True when the connection goes on."""
        connection = self._connection
        method, target = head.method.decode("ascii"), head.target.decode("ascii")
        pieces: list[bytes] = []
        try:
            await self._read_body(self._handler.body_limit_bytes(method, target), headers, pieces)
            self._stage = _Stage.ANSWER
            connection.scope.deadline = inf
            self._shared.books.requests += 1
            body = b"".join(pieces)
            request = Request(method, target, headers, body, connection.peer, self._wait_gone)
            response = await answer_safely(connection, self._handler, request)
        finally:
            if pieces:
                self._shared.body_budget.give_back(sum(map(len, pieces)))
        if response is None:
            self._shared.books.dropped += 1
            return False
        keep = not (response.close or connection.retiring or self._eof) and self._http.their_state is h11.DONE
        if response.stream is not None and not self._head_only:
            return await self._stream(response, response.stream, keep=keep)
        await self._send(response, keep=keep)
        return keep

    async def _stream(self, response: Response, stream: Callable[[Write], Awaitable[None]], *, keep: bool) -> bool:
        """An answer that is written as it comes. True when the connection goes on."""
        connection = self._connection
        is_chunked = response.length_bytes is None and self._knows_chunks
        keep = keep and (is_chunked or response.length_bytes is not None)
        pieces = _Pieces(connection, response.length_bytes, is_chunked=is_chunked)
        self._stage = _Stage.SEND
        head = stream_head_bytes(response, self._shared.date(), is_chunked=is_chunked, keep=keep)
        await connection.send(head, connection.scope)
        connection.scope.deadline = inf
        is_whole = await stream_safely(connection, stream, pieces.write, self._wait_gone, response.length_bytes)
        if not (is_whole and await pieces.end()):
            connection.cut()
            await trio.lowlevel.checkpoint()
            return False
        return keep and not (connection.retiring or self._eof)

    async def _send(self, response: Response, *, keep: bool) -> None:
        self._stage = _Stage.SEND
        data = response_bytes(response, self._shared.date(), head_only=self._head_only, keep=keep)
        await self._connection.send(data, self._connection.scope)

    async def _refuse(self, refused: Refused) -> None:
        """Answer what never became a request, and read on a little so that the answer arrives."""
        connection = self._connection
        self._shared.books.refuse(refused.reason)
        response = self._handler.refuse(refused.status, refused.reason, refused.message, connection.peer, self._target)
        if response is None:
            return
        connection.scope = trio.CancelScope()
        try:
            with connection.scope:
                await self._send(response, keep=False)
                connection.idle = True
                if not connection.retiring:
                    connection.until(self._shared.limits.linger_timeout_s)
                    while await connection.stream.receive_some():
                        pass
        except GONE:
            return


class _Pieces:
    """The body of a streamed answer on its way: framed, each piece under the write deadline."""

    def __init__(self, connection: Connection, length_bytes: int | None, *, is_chunked: bool) -> None:
        self._connection = connection
        self._left_bytes = length_bytes
        self._is_chunked = is_chunked
        self._is_intact = True
        """No write was given up half-way."""

    async def write(self, data: bytes) -> None:
        if self._left_bytes is not None:
            if len(data) > self._left_bytes:
                raise ValueError(f"a streamed answer is longer than it said, by {len(data) - self._left_bytes} bytes")
            self._left_bytes -= len(data)
        if data:
            await self._send(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    async def end(self) -> bool:
        """Whether the client has got the whole body."""
        if self._is_intact and self._is_chunked:
            await self._send(b"0\r\n\r\n")
        return self._is_intact and not self._left_bytes

    async def _send(self, data: bytes) -> None:
        if not self._is_intact:
            raise trio.BrokenResourceError("an earlier write was given up half-way")
        connection = self._connection
        self._is_intact = False
        await connection.send(data, connection.scope)
        connection.scope.deadline = inf
        self._is_intact = True


async def stream_safely(
    connection: Connection,
    stream: Callable[[Write], Awaitable[None]],
    write: Write,
    wait_gone: Callable[[], Awaitable[None]],
    length_bytes: int | None,
) -> bool:
    """Let a handler write its answer. False when it failed or the client left, so that there is no whole answer.

    An answer without a length may be silent for hours, so somebody watches meanwhile whether the client is there.
    """
    is_whole = False
    try:
        if length_bytes is not None:
            await stream(write)
            is_whole = True
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_gone, wait_gone, nursery.cancel_scope)
                await stream(write)
                is_whole = True
                nursery.cancel_scope.cancel()
    except* GONE:
        pass
    except* Exception as group:
        shared = connection.shared
        shared.books.error()
        logger.error("%s: a streamed answer failed: %s", shared.name, kinds_of(group))
        logger.debug("%s: a streamed answer failed", shared.name, exc_info=group)
    return is_whole


async def _cancel_when_gone(wait_gone: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait_gone()
    scope.cancel()


async def answer_safely(connection: Connection, handler: Handler, request: Request) -> Response | None:
    """The handler's answer; should it break its promise never to raise, an internal error without the text."""
    try:
        return await handler.answer(request)
    except Exception as error:
        shared = connection.shared
        shared.books.error()
        logger.error("%s: handler failed: %s", shared.name, type(error).__name__)
        logger.debug("%s: handler failed", shared.name, exc_info=error)
        return handler.refuse(500, "internal_error", "internal error", request.peer, request.target)


def response_bytes(response: Response, date: str, *, head_only: bool, keep: bool) -> bytes:
    """A whole HTTP/1.1 answer. Raises ValueError for a header that would break out of its line."""
    status = response.status
    bodiless = status in (204, 304)  # RFC 9110, 8.6: no Content-Length either
    head = "".join(_head_lines(response, date, None if bodiless else _length_line(response), keep=keep))
    if head_only or bodiless:
        return head.encode("latin-1")
    return head.encode("latin-1") + response.body


def stream_head_bytes(response: Response, date: str, *, is_chunked: bool, keep: bool) -> bytes:
    """What goes before a streamed body. Raises ValueError as `response_bytes` does."""
    framing = "transfer-encoding: chunked\r\n" if is_chunked else _length_line(response)
    return "".join(_head_lines(response, date, framing, keep=keep)).encode("latin-1")


def _length_line(response: Response) -> str:
    if response.stream is None:
        return f"content-length: {len(response.body)}\r\n"
    return "" if response.length_bytes is None else f"content-length: {response.length_bytes}\r\n"


def _head_lines(response: Response, date: str, framing: str | None, *, keep: bool) -> Iterator[str]:
    yield f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, '')}\r\ndate: {date}\r\n"
    if framing is not None:
        yield f"content-type: {response.content_type}\r\n{framing}"
    for name, value in response.headers:
        if "\n" in name or "\r" in name or "\n" in value or "\r" in value:
            raise ValueError(f"line break in the value of response header {name!r}")
        yield f"{name}: {value}\r\n"
    yield "\r\n" if keep else "connection: close\r\n\r\n"


def _wants_websocket(head: h11.Request, headers: dict[str, str]) -> bool:
    """Whether this is a complete WebSocket opening handshake (RFC 6455, 4.2.1).

    An incomplete one is an ordinary request, so that its refusal is worded by the handler.
    """
    return (
        "upgrade" in headers
        and head.method == b"GET"
        and head.http_version == b"1.1"
        and headers["upgrade"].lower() == "websocket"
        and "upgrade" in headers.get("connection", "").lower().replace(" ", "").split(",")
        and headers.get("sec-websocket-version") == _WEBSOCKET_VERSION
        and bool(headers.get("sec-websocket-key"))
        and not ("content-length" in headers or "transfer-encoding" in headers)
    )


def _too_large(size_bytes: int, limit_bytes: int) -> Refused:
    return Refused(
        "body_too_large", f"expected a body of at most {limit_bytes} bytes, got {size_bytes} or more", status=413
    )
