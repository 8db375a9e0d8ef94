"""A comms agent's connections: HTTP/1.1 requests, event streams and WebSockets over TLS."""

from __future__ import annotations

import contextlib
import math
import os
import ssl
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import h11
import trio

from osqbox.agent.comms.effects import WEBSOCKET, Follow, Reply, Send, ServerEvent
from osqbox.agent.comms.messages import packed, read_object
from osqbox.agent.comms.sse import EventParser, TooLarge
from osqbox.errors import BadUsage

MAX_HEADER_BYTES = 16 * 1024
MAX_REPLY_BYTES = 16 * 1024 * 1024
MAX_FRAME_BYTES = 4 * 1024 * 1024
SUBPROTOCOL = "commands.v1"
_CHUNK_BYTES = 64 * 1024
_CLOSE_S = 1.0

Stream = trio.SSLStream[trio.SocketStream]


class _Broken(Exception):
    """No answer, or not to its end: the text says why."""

    def __init__(self, reason: str, *, before_answer: bool = False) -> None:
        super().__init__(reason)
        self.before_answer = before_answer
        """Nothing of the answer had come."""


class Target:
    """Where ``https://host:port`` is. Raises BadUsage for anything else."""

    __slots__ = ("host", "port", "prefix")

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 443
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme != "https" or parts.query or parts.fragment or parts.username is not None:
            raise BadUsage(
                f"expected the comms API as https://HOST:PORT, got {url!r}",
                hint="osqbox agent --comms https://localhost:27000",
            )
        self.host, self.port, self.prefix = host, port, parts.path.rstrip("/")


class Wire:
    """One agent's requests. A kept connection is for one request at a time; others have their own."""

    __slots__ = ("_context", "_host", "_keep_alive", "_kept", "_strict_close", "_target", "connections")

    def __init__(self, target: Target, context: ssl.SSLContext, *, keep_alive: bool, as_g1: bool) -> None:
        self._target, self._context, self._keep_alive = target, context, keep_alive
        shown = f"[{target.host}]" if ":" in target.host else target.host
        self._host = shown if as_g1 or target.port == 443 else f"{shown}:{target.port}"
        self._strict_close = as_g1
        self._kept: tuple[Stream, h11.Connection] | None = None
        self.connections = 0
        """Opened so far."""

    async def exchange(self, send: Send) -> Reply:
        """The answer; status 0 and a reason when there is none within ``timeout_s``."""
        with trio.move_on_after(send.timeout_s) as scope:
            try:
                return await self._exchange(send)
            except _Broken as error:
                return Reply(0, reason=str(error))
        assert scope.cancelled_caught
        return Reply(0, reason="timeout")

    async def _exchange(self, send: Send) -> Reply:
        lent, self._kept = self._kept, None
        if lent is not None:
            try:
                return await self._over(*lent, send)
            except _Broken as error:
                if not error.before_answer:
                    raise  # else the server closed it while it was idle
        stream, connection = await self._open(), _client()
        return await self._over(stream, connection, send)

    async def _over(self, stream: Stream, connection: h11.Connection, send: Send) -> Reply:
        try:
            reply = await self._ask(stream, connection, send)
            reusable = connection.our_state is h11.DONE and connection.their_state is h11.DONE
            if self._keep_alive and reusable and self._kept is None:
                connection.start_next_cycle()
                self._kept = stream, connection
                return reply
            await self._close(stream)
        except BaseException:
            await _close_now(stream)
            raise
        return reply

    async def _close(self, stream: Stream) -> None:
        """With close_notify from both sides; with ``strict_close`` an end without is a failed request, as upstream."""
        try:
            with trio.move_on_after(math.inf if self._strict_close else _CLOSE_S), _broken_when_it_breaks():
                transport, _ = await stream.unwrap()
                await trio.aclose_forcefully(transport)
                vars(stream).clear()
                return
        except _Broken:
            if self._strict_close:
                raise
        await _close_now(stream)

    async def _ask(self, stream: Stream, connection: h11.Connection, send: Send) -> Reply:
        headers = [("Host", self._host), *send.headers]
        if send.body:
            headers.append(("Content-Length", str(len(send.body))))
        try:
            request = h11.Request(method=send.method, target=self._target.prefix + send.path, headers=headers)
            data = connection.send(request) or b""
        except h11.LocalProtocolError as error:
            raise _Broken(f"cannot be sent: {error}") from error
        data += (connection.send(h11.Data(data=send.body)) or b"") if send.body else b""
        data += connection.send(h11.EndOfMessage()) or b""
        with _broken_when_it_breaks(before_answer=True):
            await stream.send_all(data)
            event = await _next_event(stream, connection)
        while isinstance(event, h11.InformationalResponse):
            with _broken_when_it_breaks():
                event = await _next_event(stream, connection)
        if not isinstance(event, h11.Response):
            raise _Broken("closed without an answer", before_answer=True)
        return await self._read_body(stream, connection, send, event)

    async def _read_body(self, stream: Stream, connection: h11.Connection, send: Send, response: h11.Response) -> Reply:
        reply = Reply(response.status_code, headers=_headers(response))
        sink = send.sink if response.status_code in (200, 206) else None
        if sink is not None and not sink.begin(reply):
            raise _Broken("not the range that was asked for")
        pieces, size = list[bytes](), 0
        while True:
            with _broken_when_it_breaks():
                event = await _next_event(stream, connection)
            if isinstance(event, h11.EndOfMessage):
                return Reply(reply.status, b"".join(pieces), reply.headers)
            if not isinstance(event, h11.Data):
                raise _Broken("closed in the middle of an answer")
            piece = bytes(event.data)
            size += len(piece)
            if sink is not None:
                if not sink.write(piece):
                    raise _Broken("more than may be downloaded")
            elif size > MAX_REPLY_BYTES:
                raise _Broken(f"an answer of more than {MAX_REPLY_BYTES} bytes")
            else:
                pieces.append(piece)

    async def _open(self) -> Stream:
        target = self._target
        with _broken_when_it_breaks(before_answer=True):
            socket = await trio.open_tcp_stream(target.host, target.port)
            stream = trio.SSLStream(socket, self._context, server_hostname=target.host)
            try:
                await stream.do_handshake()
            except BaseException:
                await _close_now(stream)
                raise
        self.connections += 1
        return stream

    async def aclose(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            await _close_now(kept[0])

    # -- streams -------------------------------------------------------------------------------------------------

    async def follow(self, follow: Follow) -> Reply:
        """Hold a stream until it ends; status 0 and a reason when it was open, else the refusal."""
        try:
            with trio.fail_after(follow.timeout_s):
                stream = await self._open()
        except (_Broken, trio.TooSlowError) as error:
            return Reply(0, reason=str(error) or "timeout")
        talk = self._follow_websocket if follow.transport == WEBSOCKET else self._follow_sse
        try:
            return await talk(stream, follow)
        except (_Broken, TooLarge) as error:
            return Reply(0, reason=str(error))
        except trio.TooSlowError:
            return Reply(0, reason="silence")
        finally:
            await _close_now(stream)

    async def _follow_sse(self, stream: Stream, follow: Follow) -> Reply:
        connection, parser = _client(), EventParser()
        headers = [("Host", self._host), *follow.headers, ("Cache-Control", "no-cache")]
        request = h11.Request(method="GET", target=self._target.prefix + follow.path, headers=headers)
        data = (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")
        with _broken_when_it_breaks():
            with trio.fail_after(follow.timeout_s):
                await stream.send_all(data)
                event = await _next_event(stream, connection)
                if not isinstance(event, h11.Response):
                    raise _Broken("closed without an answer")
                if event.status_code != 200 or not _headers(event).get("content-type", "").startswith(
                    "text/event-stream"
                ):
                    send = Send("commands", "GET", follow.path, ())
                    return await self._read_body(stream, connection, send, event)
            follow.opened()
            while True:
                with trio.fail_after(follow.silence_s):
                    event = await _next_event(stream, connection)
                if not isinstance(event, h11.Data):
                    raise _Broken("the stream ended")
                for found in parser.feed(bytes(event.data)):
                    if not follow.heard(found):
                        return Reply(0, reason="the stream was ended")

    async def _follow_websocket(self, stream: Stream, follow: Follow) -> Reply:
        talk = _WebSocketTalk(follow)
        with _broken_when_it_breaks():
            await stream.send_all(talk.request(self._host, self._target.prefix + follow.path))
            while True:
                with trio.fail_after(talk.patience_s):
                    data = bytes(await stream.receive_some(_CHUNK_BYTES))
                answer, ended = talk.receive(data)
                if answer:
                    with trio.move_on_after(_CLOSE_S if ended else follow.silence_s):
                        await stream.send_all(answer)
                if ended is not None:
                    return ended


class _WebSocketTalk:
    """wsproto by hand: no task and no queue beside the one that reads, which thousands of agents would pay for."""

    def __init__(self, follow: Follow) -> None:
        from wsproto import ConnectionType, WSConnection

        self._connection = WSConnection(ConnectionType.CLIENT)
        self._follow = follow
        self._message = bytearray()
        self._refusal = Reply(0)
        self.patience_s = follow.timeout_s

    def request(self, host: str, path: str) -> bytes:
        from wsproto.events import Request

        headers = [(name.encode(), value.encode()) for name, value in self._follow.headers]
        return self._connection.send(Request(host, path, subprotocols=[SUBPROTOCOL], extra_headers=headers))

    def receive(self, data: bytes) -> tuple[bytes, Reply | None]:
        """What to send, and how it ended if it did. Raises _Broken."""
        from wsproto.utilities import RemoteProtocolError

        answer = b""
        try:
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                more, ended = self._take(event)
                answer += more
                if ended is not None:
                    return answer, ended
        except RemoteProtocolError as error:
            raise _Broken(f"not a WebSocket: {error}") from error
        return answer, None if data else Reply(0, reason="the stream ended")

    def _take(self, event: object) -> tuple[bytes, Reply | None]:
        from wsproto import events as ws

        match event:
            case ws.AcceptConnection():
                self.patience_s = self._follow.silence_s
                self._follow.opened()
            case ws.RejectConnection():
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers}
                self._refusal = Reply(event.status_code, headers=headers)
                return b"", None if event.has_body else self._refusal
            case ws.RejectData():
                self._message += event.data
                is_over = event.body_finished or len(self._message) > MAX_HEADER_BYTES
                return b"", replace(self._refusal, body=bytes(self._message)) if is_over else None
            case ws.Ping():
                return self._connection.send(event.response()), None
            case ws.TextMessage():
                return b"", self._text(event.data, is_last=event.message_finished)
            case ws.CloseConnection():
                return self._connection.send(event.response()), Reply(0, reason=f"closed with code {event.code}")
        return b"", None

    def _text(self, text: str, *, is_last: bool) -> Reply | None:
        self._message += text.encode()
        if len(self._message) > MAX_FRAME_BYTES:
            raise _Broken(f"a message of more than {MAX_FRAME_BYTES} bytes")
        if not is_last:
            return None
        found = read_object(bytes(self._message))
        self._message.clear()
        if found is None:
            return None
        event = ServerEvent(str(found.get("event", "")), str(found.get("id", "")), packed(found.get("data")))
        return None if self._follow.heard(event) else Reply(0, reason="the stream was ended")


def _client() -> h11.Connection:
    return h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)


def _headers(response: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


async def _next_event(stream: Stream, connection: h11.Connection) -> object:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        connection.receive_data(bytes(await stream.receive_some(_CHUNK_BYTES)))


async def _close_now(stream: Stream) -> None:
    """May be called again. The stream is emptied, as it refers to itself: what TLS holds of each would stay until the
    garbage collector comes, which a process with many connections lets come seldom."""
    transport = getattr(stream, "transport_stream", None)
    if transport is not None:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(transport)
    vars(stream).clear()


@contextlib.contextmanager
def _broken_when_it_breaks(*, before_answer: bool = False) -> Iterator[None]:
    """Foreign exceptions of a connection as `_Broken`."""
    try:
        yield
    except h11.RemoteProtocolError as error:
        raise _Broken(f"not HTTP: {error}", before_answer=before_answer) from error
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, ValueError) as error:
        raise _Broken(_cause(error), before_answer=before_answer) from error


def _cause(error: BaseException) -> str:
    """What TLS or the socket said, without addresses and numbers that differ each time."""
    while True:
        if isinstance(error, BaseExceptionGroup):  # of all addresses of a host
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    if isinstance(error, ssl.SSLError):
        return getattr(error, "verify_message", "") or error.reason or "TLS failed"
    if isinstance(error, OSError):
        if error.errno is not None and error.errno > 0:
            return os.strerror(error.errno)  # Trio puts the address into its own
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
