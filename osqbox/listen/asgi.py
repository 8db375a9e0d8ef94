"""The ASGI side: agents over HTTP/2, what every application is wrapped in, and its lifespan."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

import trio

from osqbox.errors import Refused
from osqbox.exchange import Handler, Request, Response, Write

from .connection import SLICE_BYTES, Connection, Limits, current_connection
from .inline import answer_safely, stream_safely

logger = logging.getLogger("osqbox.listen")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


StreamsBody: TypeAlias = Callable[[MutableMapping[str, Any]], bool]
"""Whether a request, by its scope, has a body that its application takes piece by piece and bounds itself."""


class ClientGone(OSError):
    """Raised by ``send`` after the client has left, as ASGI 2.4 asks: a loop of sends must end."""


# agents


def agents_asgi(handler: Handler, *, websocket_app: ASGIApp | None = None) -> ASGIApp:
    """An ASGI application that answers by the handler which also answers inline; for HTTP/2.

    WebSockets go to ``websocket_app``, whose lifespan it shares; without one they are refused. Runs only under
    `Listener`, which says whose connection it is.
    """

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _AgentExchange(handler, _connection(), scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await (websocket_app or _empty_lifespan)(scope, receive, send)
        elif (reason := _connection().refusal_of_peer()) is not None:
            await _refuse_peer(_connection(), reason, "websocket", send)
        elif websocket_app is not None:
            await websocket_app(scope, receive, send)
        else:
            await _refuse_websocket(handler, _connection(), _target(scope), send)

    return app


def _connection() -> Connection:
    connection = current_connection()
    if connection is None:
        raise RuntimeError("this application serves only behind osqbox.listen.Listener")
    return connection


class _AgentExchange:
    def __init__(
        self, handler: Handler, connection: Connection, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        self._handler = handler
        self._connection = connection
        self._shared = connection.shared
        self._receive = receive
        self._send = send
        self._method: str = scope["method"]
        self._target = _target(scope)
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

    async def run(self) -> None:
        self._shared.books.requests += 1
        pieces: list[bytes] = []
        try:
            response = await self._answer(pieces)
        except Refused as refused:
            self._shared.books.refuse(refused.reason)
            response = self._handler.refuse(
                refused.status, refused.reason, refused.message, self._connection.peer, self._target
            )
        except ClientGone:
            return
        finally:
            self._shared.body_budget.give_back(sum(map(len, pieces)))
        if response is None:
            self._shared.books.dropped += 1
            await _drop(self._connection)
        self._connection.retiring |= response.close  # before: the end of the answer is when it counts
        if response.stream is not None and self._method != "HEAD":
            await self._stream(response, response.stream)
        else:
            await _send_response(self._send, response)

    async def _stream(self, response: Response, stream: Callable[[Write], Awaitable[None]]) -> None:
        left_bytes = response.length_bytes

        async def write(data: bytes) -> None:
            nonlocal left_bytes
            if left_bytes is not None:
                left_bytes -= len(data)
                if left_bytes < 0:
                    raise ValueError(f"a streamed answer is longer than it said, by {-left_bytes} bytes")
            for start in range(0, len(data), SLICE_BYTES):
                piece = data[start : start + SLICE_BYTES]
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})

        await _send_start(self._send, response)
        length_bytes = response.length_bytes
        if await stream_safely(self._connection, stream, write, self._wait_gone, length_bytes) and not left_bytes:
            await self._send({"type": "http.response.body", "body": b""})
        # else: the application ends without the end of its answer, and the stream is reset

    async def _answer(self, pieces: list[bytes]) -> Response | None:
        if (reason := self._connection.refusal_of_peer()) is not None:
            self._connection.retiring = True
            raise Refused(reason, reason, status=403)
        limit_bytes = self._handler.body_limit_bytes(self._method, self._target)
        with _body_deadline(self._shared.limits.body_timeout_s):
            await self._read_body(limit_bytes, pieces)
        request = Request(
            self._method, self._target, self._headers, b"".join(pieces), self._connection.peer, self._wait_gone
        )
        return await answer_safely(self._connection, self._handler, request)

    async def _read_body(self, limit_bytes: int, pieces: list[bytes]) -> None:
        """Collect the body in ``pieces``, each of them paid for from the listener's budget."""
        declared = self._headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        size_bytes, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            piece, more = message.get("body", b""), message.get("more_body", False)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                raise _too_large(limit_bytes)
            if not self._shared.body_budget.take(len(piece)):
                raise Refused("busy", "too many large requests at once, try again later", status=503)
            pieces.append(piece)

    async def _wait_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _target(scope: MutableMapping[str, Any]) -> str:
    path: str = scope["raw_path"].decode("latin-1")
    return f"{path}?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else path


def _too_large(limit_bytes: int) -> Refused:
    return Refused("body_too_large", f"expected a body of at most {limit_bytes} bytes, got more", status=413)


@contextmanager
def _body_deadline(timeout_s: float) -> Iterator[None]:
    """Raises Refused (408) when its block takes longer."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise Refused("body_timeout", "the request's body did not arrive in time", status=408)


async def _send_response(send: Send, response: Response, prefix: str = "http.response") -> None:
    await _send_start(send, response, prefix)
    await send({"type": f"{prefix}.body", "body": response.body})


async def _send_start(send: Send, response: Response, prefix: str = "http.response") -> None:
    length_bytes = len(response.body) if response.stream is None else response.length_bytes
    fields = [("content-type", response.content_type)]
    if length_bytes is not None:
        fields.append(("content-length", str(length_bytes)))
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (*fields, *response.headers)
    ]
    await send({"type": f"{prefix}.start", "status": response.status, "headers": headers})


async def _refuse_websocket(handler: Handler, connection: Connection, target: str, send: Send) -> None:
    connection.shared.books.refuse("websocket")
    response = handler.refuse(404, "websocket", "no WebSocket is served here", connection.peer, target)
    if response is None:
        await _drop(connection)
    else:
        await _send_response(send, response, prefix="websocket.http.response")


async def _drop(connection: Connection) -> NoReturn:
    connection.drop()
    await trio.sleep_forever()  # cancelled with everything else of the connection


async def _empty_lifespan(_scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


# every application


def guarded(app: ASGIApp, *, body_limit_bytes: int | None, streams_body: StreamsBody | None = None) -> ASGIApp:
    """Wrap an application that has no `Handler` in front of it.

    HTTP bodies are bounded in size and time, unless ``body_limit_bytes`` is None or ``streams_body`` says that the
    application does that by itself; a peer that may not be served any more is refused before every request.
    """

    async def guarded_app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        connection = _connection()
        connection.shared.books.requests += 1
        reason = connection.refusal_of_peer()
        if reason is not None:
            await _refuse_peer(connection, reason, scope["type"], send)
        elif scope["type"] == "http" and body_limit_bytes is not None and not (streams_body and streams_body(scope)):
            await _BoundedExchange(connection, body_limit_bytes, receive, send).run(app, scope)
        else:
            await app(scope, receive, send)

    return guarded_app


async def _refuse_peer(connection: Connection, reason: str, kind: str, send: Send) -> None:
    connection.shared.books.refuse(reason)
    connection.retiring = True
    prefix = "http.response" if kind == "http" else "websocket.http.response"
    await _send_response(send, _error(403, reason), prefix)


def _error(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}).encode(), status=status)


class _BoundedExchange:
    """One HTTP request of an application: its body counted and timed, a violation answered over its head."""

    def __init__(self, connection: Connection, limit_bytes: int, receive: Receive, send: Send) -> None:
        self._connection = connection
        self._limit_bytes = limit_bytes
        self._receive = receive
        self._send = send
        self._scope = trio.CancelScope()
        self._deadline = trio.current_time() + connection.shared.limits.body_timeout_s
        self._read_bytes = 0
        self._complete = False
        self._started = False
        self._refused: Refused | None = None

    async def run(self, app: ASGIApp, scope: MutableMapping[str, Any]) -> None:
        with self._scope:
            await app(scope, self._counted_receive, self._noted_send)
        if self._refused is not None:
            self._connection.shared.books.refuse(self._refused.reason)
            if not self._started:
                await _send_response(self._send, _error(self._refused.status, self._refused.message))

    async def _noted_send(self, message: Message) -> None:
        self._started = True
        await self._send(message)

    async def _counted_receive(self) -> Message:
        if self._complete:
            return await self._receive()
        with trio.move_on_at(self._deadline) as scope:
            message = await self._receive()
            self._read_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._read_bytes <= self._limit_bytes:
                return message
        self._refused = (
            Refused("body_timeout", "the request's body did not arrive in time", status=408)
            if scope.cancelled_caught
            else _too_large(self._limit_bytes)
        )
        self._scope.cancel()
        return await trio.sleep_forever()


# lifespan


class Lifespan:
    """An application's start-up and shut-down; Quart-Trio keeps its nursery open in between."""

    def __init__(self, app: ASGIApp, name: str, limits: Limits) -> None:
        self._app = app
        self._name = name
        self._limits = limits
        self._scope = trio.CancelScope()
        self._asked = False
        self._ready = trio.Event()
        self._stop = trio.Event()
        self._ended = trio.Event()
        self.failure: str | None = None

    async def start(self, nursery: trio.Nursery) -> None:
        """Returns when the application is ready, or has told its ``failure``."""
        nursery.start_soon(self._run)
        await self._ready.wait()

    async def stop(self) -> None:
        """Let the application shut down, within the time that requests get to drain."""
        self._stop.set()
        with trio.move_on_after(self._limits.drain_timeout_s) as scope:
            await self._ended.wait()
        if scope.cancelled_caught:
            logger.warning("%s: the application did not shut down in time", self._name)
        self._scope.cancel()

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        try:
            with self._scope:
                await self._app(scope, self._receive, self._send)
        except Exception:
            if self._ready.is_set():
                raise
            # an application that raises at once does without lifespan (ASGI, lifespan protocol)
        finally:
            self._ready.set()
            self._ended.set()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self._stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        kind, text = message["type"], message.get("message", "")
        if kind == "lifespan.startup.complete":
            self._ready.set()
        elif kind == "lifespan.startup.failed":
            self.failure = text or "no reason given"
            self._scope.cancel()
        elif kind == "lifespan.shutdown.complete":
            self._ended.set()
        elif kind == "lifespan.shutdown.failed":
            logger.error("%s: the application failed to shut down: %s", self._name, text)
            self._ended.set()
