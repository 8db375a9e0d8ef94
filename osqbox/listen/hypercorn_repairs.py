"""Hypercorn 0.18's protocol classes, driven by a connection of our own.

What is repaired, each with a test:

* an exception in the protocol layer ended the process: here it ends its connection (`accept.py`);
* HTTP/2: DATA or a reset after the answer, pseudo headers that are not ASCII, CONNECT without ``:path``, floods of
  PRIORITY frames, and streams ended by trailers or by a reset, which stayed in the priority tree until it was full;
* HTTP/2: streams that had to wait for seconds while others were served again and again (`RoundRobin`);
* a reader that stalls, in TCP or by an HTTP/2 window it never opens: every write has a deadline for progress, and
  what waits for that window is bounded;
* a loop of sends, which starved the event loop once the client had left, and never ended;
* keep-alive timeouts: one cancel scope's moving deadline instead of a task that frameworks cancelled by accident;
* frames lost when a task was cancelled while it waited for the send lock;
* a full queue towards an application that no longer reads: it blocked the very task that should have emptied it;
* HTTP/1: an answer given before the body was read, after which the client sent its next request into a connection
  that was about to close;
* HTTP/2: a body that its application does not read, which blocked every other stream of the connection (`BodyQueue`),
  and an application that gave up in the middle of its answer, whose client was left waiting for the rest;
* the ping task of a WebSocket, which outlived its connection by one interval;
* the code with which a WebSocket's client closed, which was 1006 for the application whatever the client had said.

These are private names of one series; `check_seams` refuses any other at start-up.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import h2.events
import h2.exceptions
import h11
import trio
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.logging import Logger
from hypercorn.protocol.events import Body, Data, EndBody, EndData, StreamClosed, Trailers
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_LOW_WATER, H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from priority.priority import DeadlockError, DuplicateStreamError, MissingStreamError, PriorityError
from wsproto.connection import ConnectionState as WebSocketState
from wsproto.events import CloseConnection

from osqbox.errors import BadSetup

from .asgi import ASGIApp, ClientGone
from .connection import MIB, Connection, Limits, kinds_of

logger = logging.getLogger("osqbox.listen")

SERIES = "0.18."
MAX_REQUESTS = 2**62
H2_WINDOW_BYTES = 65_535
"""Of a stream, and of a connection at first (RFC 9113, 6.9.2)."""
CONNECTION_WINDOW_BYTES = 16 * MIB
"""Of bodies not read yet, over all streams of a connection."""

_PROTOCOL_ARGUMENTS = ("app", "config", "context", "task_group", "connection_state", "ssl", "client", "server", "send")
_SEAMS: dict[type, tuple[str, ...]] = {
    H2Protocol: (
        *("idle", "initiate", "handle", "stream_send", "send_task", "_send_data"),
        *("_handle_events", "_create_stream", "_close_stream", "_flush"),
    ),
    H11Protocol: ("initiate", "handle", "stream_send"),
    WSStream: ("app_send", "_send_wsproto_event"),
    WorkerContext: ("event_class", "mark_request", "sleep"),
}


def check_seams() -> None:
    """Raise BadSetup unless the installed Hypercorn has the private names that are repaired here."""
    from importlib.metadata import version

    installed = version("hypercorn")
    absent = [
        f"{owner.__name__}.{name}" for owner, names in _SEAMS.items() for name in names if not hasattr(owner, name)
    ]
    absent += [
        f"{owner.__name__}({', '.join(_PROTOCOL_ARGUMENTS)})"
        for owner in (H2Protocol, H11Protocol)
        if tuple(inspect.signature(owner).parameters) != _PROTOCOL_ARGUMENTS
    ]
    buffer = vars(StreamBuffer(WorkerContext.event_class))
    absent += [f"StreamBuffer.{name}" for name in ("buffer", "_paused", "_is_empty") if name not in buffer]
    if absent or not installed.startswith(SERIES):
        missing = f", which lacks {', '.join(absent)}" if absent else ""
        raise BadSetup(
            f"expected Hypercorn {SERIES}x, got {installed}{missing}", hint="pip install 'hypercorn~=0.18.0'"
        )


class QuietLogger(Logger):
    """Says in one line that an application failed; the traceback, which may quote secrets, only for debugging."""

    async def exception(self, message: str, *args: Any, **_kwargs: Any) -> None:
        logger.error(message, *args)
        logger.debug(message, *args, exc_info=sys.exc_info())


def hypercorn_config(limits: Limits) -> Config:
    config = Config()
    config.logger_class = QuietLogger
    config.errorlog = logger
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_max_requests = MAX_REQUESTS
    config.h11_max_incomplete_size = limits.max_header_bytes
    config.h2_max_header_list_size = limits.max_header_bytes
    config.h2_max_concurrent_streams = limits.h2_streams
    config.websocket_max_message_size = limits.websocket_message_bytes
    config.websocket_ping_interval = limits.websocket_ping_s
    return config


# the application's side


class AppQueue:
    """What goes from the protocol to one application task: bounded, and never in the way of its end."""

    def __init__(self, size: int) -> None:
        self._sender, self._receiver = trio.open_memory_channel[Any](size)
        self._disconnect: Any = None
        self._callbacks: list[Callable[[], object]] = []
        self.is_whole = False
        """The end of the request's body has come."""

    @property
    def disconnected(self) -> bool:
        return self._disconnect is not None

    def on_disconnect(self, callback: Callable[[], object]) -> None:
        """Call it when the client has left, or has its answer."""
        self._callbacks.append(callback)

    async def put(self, event: Any) -> None:
        if event["type"].endswith(".disconnect"):  # not queued: the queue may be full for good
            self._disconnect = event
            self._sender.close()
            for callback in self._callbacks:
                callback()
            return
        self.is_whole = not event.get("more_body", True)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._sender.send(event)

    async def get(self) -> Any:
        try:
            return await self._receiver.receive()
        except trio.EndOfChannel:
            return self._disconnect

    async def aclose(self) -> None:
        self._receiver.close()


class BodyQueue:
    """The body of one HTTP/2 request. Its window opens again as the application reads, so what waits here is bounded
    by that window, and an application that does not read stops its own client only, not the connection's reader."""

    def __init__(self) -> None:
        self._body = bytearray()
        self.is_whole = False
        self._is_told = False
        """The application has seen the end of the body."""
        self._is_closed = False
        self._disconnect: Any = None
        self._changed = trio.Event()
        self._callbacks: list[Callable[[], object]] = []
        self.acknowledge: Callable[[int], Awaitable[None]] = _acknowledge_nothing

    @property
    def disconnected(self) -> bool:
        return self._disconnect is not None

    def on_disconnect(self, callback: Callable[[], object]) -> None:
        """Call it when the client has left, or has its answer."""
        self._callbacks.append(callback)

    async def put(self, event: Any) -> None:
        if event["type"].endswith(".disconnect"):
            self._disconnect = event
            for callback in self._callbacks:
                callback()
        elif self._is_closed:
            await self.acknowledge(len(event["body"]))
        else:
            self._body += event["body"]
            self.is_whole = not event["more_body"]
        self._changed.set()

    async def get(self) -> Any:
        while not self._body and (self._is_told or not self.is_whole):
            if self._disconnect is not None:
                return self._disconnect
            self._changed = trio.Event()
            await self._changed.wait()
        message: dict[str, Any] = {"type": "http.request", "body": bytes(self._body), "more_body": not self.is_whole}
        self._body.clear()
        self._is_told = self.is_whole
        await self.acknowledge(len(message["body"]))  # meanwhile more may come
        return message

    async def aclose(self) -> None:
        """The application reads no more: what is and what will be left over counts for the connection's window."""
        self._is_closed = True
        unread_bytes = len(self._body)
        self._body.clear()
        await self.acknowledge(unread_bytes)


async def _acknowledge_nothing(_size_bytes: int) -> None:
    pass


class Tasks:
    """Hypercorn's task group: applications in one nursery, helpers in another that ends with the connection."""

    def __init__(self, connection: Connection, apps: trio.Nursery, helpers: trio.Nursery) -> None:
        self._connection = connection
        self._apps = apps
        self._helpers = helpers

    async def spawn_app(
        self, app: ASGIApp, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        is_h2_body = scope["type"] == "http" and scope["http_version"] == "2"
        queue = BodyQueue() if is_h2_body else AppQueue(config.max_app_queue_size)
        scope["extensions"]["osqbox.on_disconnect"] = queue.on_disconnect
        self._apps.start_soon(self._run_app, app, scope, queue, send)
        return queue.put if scope["type"] != "websocket" else _with_close_code(send.__self__, queue.put)  # type: ignore[attr-defined]

    async def _run_app(
        self, app: ASGIApp, scope: Any, queue: AppQueue | BodyQueue, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        connection, shared = self._connection, self._connection.shared

        async def live_send(message: Any) -> None:
            """A checkpoint, which no framework has here; so a loop of sends can neither starve nor outlive others."""
            await trio.lowlevel.checkpoint()
            if connection.gone or queue.disconnected:
                raise ClientGone("the client has left")
            if message["type"] == "http.response.start" and not queue.is_whole and scope["http_version"] != "2":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            try:
                await app(scope, queue.get, live_send)
            finally:
                await queue.aclose()
        except* ClientGone:
            pass
        except* Exception as group:
            shared.books.error()
            logger.error("%s: the application failed: %s", shared.name, kinds_of(group))
            logger.debug("%s: the application failed", shared.name, exc_info=group)
        finally:
            await send(None)

    def spawn(self, func: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._helpers.start_soon(func, *args)


def _with_close_code(stream: WSStream, put: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Tells the application the client's own close code; it can be seen only where Hypercorn answers the close."""
    answer = stream._send_wsproto_event
    codes: list[int] = []

    async def watching_answer(event: Any) -> None:
        if isinstance(event, CloseConnection) and stream.connection.state is WebSocketState.REMOTE_CLOSING:
            codes.append(int(event.code))
        await answer(event)

    async def put_with_code(event: Any) -> None:
        if codes and event["type"] == "websocket.disconnect":
            event = {**event, "code": codes[0]}
        await put(event)

    stream._send_wsproto_event = watching_answer  # type: ignore[method-assign]
    return put_with_code


# the protocols


class RoundRobin:
    """Which HTTP/2 stream may write next, with the interface of the priority tree that it replaces.

    The tree serves what is new first: under a stream of short calls it let others wait for seconds, and it ended the
    connection at a thousand streams. Clients' priorities are of the past (RFC 9113, 5.3).
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._ready: OrderedDict[int, None] = OrderedDict()

    def insert_stream(self, stream_id: int) -> None:
        if stream_id in self._known:
            raise DuplicateStreamError(stream_id)
        self._known.add(stream_id)
        self._ready[stream_id] = None

    def remove_stream(self, stream_id: int) -> None:
        self._check(stream_id)
        self._known.remove(stream_id)
        self._ready.pop(stream_id, None)

    def block(self, stream_id: int) -> None:
        self._check(stream_id)
        self._ready.pop(stream_id, None)

    def unblock(self, stream_id: int) -> None:
        self._check(stream_id)
        self._ready.setdefault(stream_id)

    def _check(self, stream_id: int) -> None:
        if stream_id not in self._known:
            raise MissingStreamError(stream_id)

    def __next__(self) -> int:
        if not self._ready:
            raise DeadlockError("nothing to send")
        stream_id, _ = self._ready.popitem(last=False)
        self._ready[stream_id] = None
        return stream_id


class RepairedH2(H2Protocol):
    def __init__(self, *args: Any, write_timeout_s: float) -> None:
        super().__init__(*args)
        self.priority = RoundRobin()  # type: ignore[assignment]
        self._write_timeout_s = write_timeout_s
        self._waiting: dict[int, trio.CancelScope] = {}
        """Streams whose application waits for the client to read."""

    async def goaway(self) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection()
        await self._flush()

    async def initiate(self, *upgrade: Any) -> None:
        await super().initiate(*upgrade)
        most_bytes = min(CONNECTION_WINDOW_BYTES, self.config.h2_max_concurrent_streams * H2_WINDOW_BYTES)
        self.connection.increment_flow_control_window(max(1, most_bytes - H2_WINDOW_BYTES))
        await self._flush()

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed) and self._is_unfinished(event.stream_id):
            await self._reset(event.stream_id, ErrorCodes.INTERNAL_ERROR)
        if not isinstance(event, (Body, Data, EndBody, EndData, Trailers)):
            await super().stream_send(event)
            return
        with trio.move_on_after(self._write_timeout_s) as scope:
            self._waiting[event.stream_id] = scope
            await super().stream_send(event)
        self._waiting.pop(event.stream_id, None)
        if scope.cancelled_caught:  # the window stays shut
            await self._reset(event.stream_id, ErrorCodes.CANCEL)
        elif isinstance(event, Trailers):
            await self._forget(event.stream_id)

    def _is_unfinished(self, stream_id: int) -> bool:
        buffer = self.stream_buffers.get(stream_id)
        return buffer is not None and not buffer.complete

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        try:
            if buffer is None:
                raise KeyError(stream_id)
            window_bytes = self.connection.local_flow_control_window(stream_id)
            data = await _take(buffer, min(window_bytes, self.connection.max_outbound_frame_size))
            ended = buffer.complete  # asked now: it may change while this is written
            if data:
                self.connection.send_data(stream_id, data, end_stream=ended)
                if (waiting := self._waiting.get(stream_id)) is not None:
                    waiting.deadline = trio.current_time() + self._write_timeout_s
            elif ended:
                self.connection.end_stream(stream_id)
            else:
                self.priority.block(stream_id)
            await self._flush()
        except (KeyError, PriorityError, h2.exceptions.ProtocolError):
            await self._forget(stream_id)
        else:
            if ended:
                await self._forget(stream_id)

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.PriorityUpdated):
                continue  # deprecated by RFC 9113, 5.3, and of use to attackers only
            if isinstance(event, h2.events.DataReceived) and await self._take_body(event):
                continue
            await super()._handle_events([event])
            if isinstance(event, h2.events.StreamReset):
                await self._forget(event.stream_id)
                await self._tell_if_idle()
        await self._flush()

    async def _take_body(self, event: h2.events.DataReceived) -> bool:
        stream = self.streams.get(event.stream_id)
        if isinstance(stream, WSStream):
            return False
        unread_bytes = 0
        if stream is not None:
            unread_bytes = len(event.data)
            await stream.handle(Body(stream_id=event.stream_id, data=event.data))
        await self._acknowledge(event.stream_id, event.flow_controlled_length - unread_bytes)  # padding, or all of it
        return True

    async def _acknowledge(self, stream_id: int, size_bytes: int) -> None:
        """Bytes that take no room any more; of a stream that is over, the connection's window still has to know."""
        if size_bytes:
            with suppress(h2.exceptions.ProtocolError, KeyError):
                self.connection.acknowledge_received_data(size_bytes, stream_id)
            await self._flush()

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        if not _is_well_formed(request.headers):
            await self._reset(request.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        await super()._create_stream(request)
        stream = self.streams.get(request.stream_id)
        if isinstance(stream, HTTPStream):
            queue: BodyQueue = stream.app_put.__self__  # type: ignore[attr-defined]  # what `spawn_app` has given it
            queue.acknowledge = partial(self._acknowledge, request.stream_id)

    async def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, error_code=code)
        await self._flush()
        await self._close_stream(stream_id)
        await self._forget(stream_id)
        await self._tell_if_idle()

    async def _forget(self, stream_id: int) -> None:
        """Remove what outlives the stream: its buffer, waking who waits for it, and its place in the tree."""
        buffer = self.stream_buffers.pop(stream_id, None)
        if buffer is not None:
            await buffer.close()
        with suppress(PriorityError):
            self.priority.remove_stream(stream_id)

    async def _tell_if_idle(self) -> None:
        if self.idle:
            await self.send(Updated(idle=True))


async def _take(buffer: StreamBuffer, size_bytes: int) -> bytes:
    """The next bytes of a stream. Hypercorn's own `pop` calls for more even when nothing could be sent."""
    data = bytes(buffer.buffer[: max(0, size_bytes)])
    del buffer.buffer[: len(data)]
    if len(buffer.buffer) < BUFFER_LOW_WATER:
        await buffer._paused.set()
    if not buffer.buffer:
        await buffer._is_empty.set()
    return data


def _is_well_formed(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if not (method and path and method.isascii() and path.isascii()):
        return False
    return method.upper() != b"CONNECT" or pseudo.get(b":protocol") == b"websocket"


class HypercornConnection:
    """Reads a connection into Hypercorn's protocol and writes what that says, until either end is through."""

    def __init__(self, connection: Connection, app: ASGIApp, config: Config, context: WorkerContext) -> None:
        self._connection = connection
        self._app = app
        self._config = config
        self._context = context
        self._limits = connection.shared.limits
        self._protocol: H11Protocol | RepairedH2
        self._send_lock = trio.Lock()
        self._discarding = False
        """The answer is out; what still arrives of the request's body is read and thrown away."""

    async def run(self, *, http2: bool, already_read: bytes = b"") -> None:
        connection = self._connection
        async with trio.open_nursery() as helpers:
            async with trio.open_nursery() as apps:
                self._tasks = Tasks(connection, apps, helpers)
                self._protocol = self._new_protocol(RepairedH2 if http2 else H11Protocol)
                with connection.scope:
                    connection.until(self._limits.header_timeout_s)
                    await self._protocol.initiate()
                    await self._read(already_read)
                await self._say_goodbye()
            helpers.cancel_scope.cancel()

    def _new_protocol(self, kind: type[H11Protocol | RepairedH2]) -> Any:
        sock = self._connection.transport.socket
        arguments: tuple[Any, ...] = (
            self._app,
            self._config,
            self._context,
            self._tasks,
            ConnectionState({}),
            self._connection.peer.tls_version is not None,
            parse_socket_addr(sock.family, sock.getpeername()),
            parse_socket_addr(sock.family, sock.getsockname()),
            self._take,
        )
        if kind is H11Protocol:
            return H11Protocol(*arguments)
        stall_s = self._limits.h2_stall_timeout_s or self._limits.write_timeout_s
        return RepairedH2(*arguments, write_timeout_s=stall_s)

    async def _say_goodbye(self) -> None:
        if isinstance(self._protocol, RepairedH2):
            await self._protocol.goaway()
        self._connection.gone = True
        await self._protocol.handle(Closed())
        await self._connection.close()

    # reading

    async def _read(self, already_read: bytes) -> None:
        connection = self._connection
        data: bytes | bytearray = already_read
        while True:
            if data and not self._discarding:
                await self._handle(bytes(data))
            try:
                data = await connection.stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            if connection.idle and isinstance(self._protocol, H11Protocol):  # a head begins, or goes on
                soon = trio.current_time() + self._limits.header_timeout_s
                connection.scope.deadline = min(connection.scope.deadline, soon)

    async def _handle(self, data: bytes) -> None:
        try:
            await self._protocol.handle(RawData(data))
        except H2ProtocolAssumedError as prior_knowledge:
            await self._switch_to_h2(prior_knowledge.data)
        except H2CProtocolRequiredError as upgrade:
            await self._switch_to_h2(upgrade.data, upgrade.headers, upgrade.settings)

    async def _switch_to_h2(self, data: bytes, *upgrade: Any) -> None:
        self._protocol = self._new_protocol(RepairedH2)
        await self._protocol.initiate(*upgrade)
        if data:
            await self._protocol.handle(RawData(data))

    # what the protocol says

    async def _take(self, event: Event) -> None:
        connection = self._connection
        if isinstance(event, RawData):
            if event.data:
                await self._write(event.data)
        elif isinstance(event, Closed):
            await self._end()
        elif isinstance(event, Updated):
            connection.idle = event.idle
            if not event.idle:
                connection.scope.deadline = inf
            elif connection.retiring:
                connection.scope.cancel()
            else:
                connection.until(self._idle_timeout_s())

    def _idle_timeout_s(self) -> float:
        if isinstance(self._protocol, H11Protocol) and self._protocol.connection.trailing_data[0]:
            return self._limits.header_timeout_s  # the next head has begun
        return self._limits.keep_alive_timeout_s

    async def _write(self, data: bytes) -> None:
        connection = self._connection
        with trio.CancelScope(shield=True) as scope:  # shielded: half a frame would spoil the connection
            async with self._send_lock:
                if connection.gone:
                    return
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await connection.send(data, scope)
                    return
        connection.abort()  # gone or stalled; the reader wakes and ends the rest

    async def _end(self) -> None:
        """The protocol is through with this connection."""
        connection = self._connection
        unread = isinstance(self._protocol, H11Protocol) and self._protocol.connection.their_state is h11.SEND_BODY
        await self._protocol.handle(Closed())
        if unread and not connection.retiring:
            self._discarding = True
            connection.idle = True
            connection.until(self._limits.linger_timeout_s)
        else:
            connection.scope.cancel()
