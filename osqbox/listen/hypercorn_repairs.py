"""Hypercorn 0.18's protocol classes, driven by a connection of our own.

What is repaired, each with a test:

* an exception in the protocol layer ended the process: here it ends its connection (`accept.py`);
* HTTP/2: DATA or a reset after the answer, pseudo headers that are not ASCII, CONNECT without ``:path``, floods of
  PRIORITY frames, and streams ended by trailers or by a reset, which stayed in the priority tree until it was full;
* a reader that stalls, in TCP or by an HTTP/2 window it never opens: every write has a deadline for progress, and
  what waits for that window is bounded;
* a loop of sends, which starved the event loop once the client had left, and never ended;
* keep-alive timeouts: one cancel scope's moving deadline instead of a task that frameworks cancelled by accident;
* frames lost when a task was cancelled while it waited for the send lock;
* a full queue towards an application that no longer reads: it blocked the very task that should have emptied it;
* the ping task of a WebSocket, which outlived its connection by one interval.

These are private names of one series; `check_seams` refuses any other at start-up.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
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
from hypercorn.protocol.events import Body, Data, EndBody, EndData, Trailers
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_LOW_WATER, H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from priority.priority import PriorityError

from osqbox.errors import BadSetup

from .asgi import ASGIApp, ClientGone
from .connection import Connection, Limits, kinds_of

logger = logging.getLogger("osqbox.listen")

SERIES = "0.18."
MAX_REQUESTS = 2**62

_PROTOCOL_ARGUMENTS = ("app", "config", "context", "task_group", "connection_state", "ssl", "client", "server", "send")
_SEAMS: dict[type, tuple[str, ...]] = {
    H2Protocol: (
        *("idle", "initiate", "handle", "stream_send", "send_task", "_send_data"),
        *("_handle_events", "_create_stream", "_close_stream", "_flush"),
    ),
    H11Protocol: ("initiate", "handle", "stream_send"),
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
    config.websocket_ping_interval = limits.websocket_ping_interval_s
    config.websocket_max_message_size = limits.websocket_message_bytes
    return config


# the application's side


class AppQueue:
    """What goes from the protocol to one application task: bounded, and never in the way of its end."""

    def __init__(self, size: int) -> None:
        self._sender, self.receiver = trio.open_memory_channel[Any](size)
        self._disconnect: Any = None

    @property
    def disconnected(self) -> bool:
        return self._disconnect is not None

    async def put(self, event: Any) -> None:
        if event["type"].endswith(".disconnect"):  # not queued: the queue may be full for good
            self._disconnect = event
            self._sender.close()
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._sender.send(event)

    async def get(self) -> Any:
        try:
            return await self.receiver.receive()
        except trio.EndOfChannel:
            return self._disconnect


class Tasks:
    """Hypercorn's task group: applications in one nursery, helpers in another that ends with the connection."""

    def __init__(self, connection: Connection, apps: trio.Nursery, helpers: trio.Nursery) -> None:
        self._connection = connection
        self._apps = apps
        self._helpers = helpers

    async def spawn_app(
        self, app: ASGIApp, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        queue = AppQueue(config.max_app_queue_size)
        self._apps.start_soon(self._run_app, app, scope, queue, send)
        return queue.put

    async def _run_app(self, app: ASGIApp, scope: Any, queue: AppQueue, send: Callable[[Any], Awaitable[None]]) -> None:
        connection, shared = self._connection, self._connection.shared

        async def live_send(message: Any) -> None:
            """A checkpoint, which no framework has here; so a loop of sends can neither starve nor outlive others."""
            await trio.lowlevel.checkpoint()
            if connection.gone or queue.disconnected:
                raise ClientGone("the client has left")
            await send(message)

        try:
            with queue.receiver:
                await app(scope, queue.get, live_send)
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


# the protocols


class RepairedH2(H2Protocol):
    def __init__(self, *args: Any, write_timeout_s: float) -> None:
        super().__init__(*args)
        self._write_timeout_s = write_timeout_s
        self._waiting: dict[int, trio.CancelScope] = {}
        """Streams whose application waits for the client to read."""

    async def goaway(self) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection()
        await self._flush()

    async def stream_send(self, event: StreamEvent) -> None:
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
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self._acknowledge(event)
                continue
            await super()._handle_events([event])
            if isinstance(event, h2.events.StreamReset):
                await self._forget(event.stream_id)
                await self._tell_if_idle()
        await self._flush()

    def _acknowledge(self, event: h2.events.DataReceived) -> None:
        """Of a stream that was answered already: only the connection's window has to know."""
        with suppress(h2.exceptions.ProtocolError, KeyError):
            self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        if _is_well_formed(request.headers):
            await super()._create_stream(request)
        else:
            await self._reset(request.stream_id, ErrorCodes.PROTOCOL_ERROR)

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
        return RepairedH2(*arguments, write_timeout_s=self._limits.write_timeout_s)

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
