"""What one connection is, and what all connections of a listener share."""

from __future__ import annotations

import email.utils
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass

import trio

from osqbox.exchange import Peer

KIB = 1024
MIB = 1024 * KIB

SLICE_BYTES = 256 * KIB
"""Largest piece written under one write deadline: a reader that moves at all is not stalled."""

_connection: ContextVar[Connection] = ContextVar("osqbox_connection")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one listener. Times are in seconds, sizes in bytes."""

    handshake_timeout_s: float = 10
    header_timeout_s: float = 10
    """For the first byte of the first request, and for a head that has begun."""
    body_timeout_s: float = 60
    """For the whole body of a request, after its head."""
    keep_alive_timeout_s: float = 180
    """Between requests; longer than any agent's poll interval, so that it keeps its connection."""
    write_timeout_s: float = 30
    """Without progress while writing, before the reader counts as stalled."""
    h2_stall_timeout_s: float | None = None
    """The same for the window of one HTTP/2 stream, where a reader may want to pause; None: no longer than that."""
    vanished_after_s: int | None = None
    """After about so long without a sign of life from the other machine, an idle connection is over (TCP keepalive)."""
    unacknowledged_after_s: int | None = None
    """How long what was written may stay without the other machine's acknowledgement; None: as TCP likes, which is a
    quarter of an hour. Also for a reader that lets its window stay shut."""
    h2_streams: int = 100
    """Requests at once on one HTTP/2 connection."""
    drain_timeout_s: float = 3
    """What requests in flight get when the listener stops."""
    close_timeout_s: float = 1
    """For saying goodbye (close_notify, GOAWAY)."""
    linger_timeout_s: float = 2
    """For reading on after a refusal: a reset would destroy the answer before a sending client reads it."""
    max_header_bytes: int = 64 * KIB
    max_connections: int = 20_000
    inflight_body_bytes: int = 256 * MIB
    """Bodies held in memory at once, over all connections of the listener."""
    app_body_bytes: int | None = 16 * MIB
    """Largest body for the ASGI application of a listener without handler; None when bodies are streams (gRPC),
    which are then not bounded in time either."""
    websocket_message_bytes: int = 16 * MIB
    websocket_ping_s: float | None = None
    """Between pings; None sends none."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """A listener, counted. The keys of the three mappings are the reasons given to ``on_event``."""

    open_connections: int
    accepted: int
    requests: int
    dropped: int
    """Requests whose connection was dropped instead of answered, as their handler wished."""
    errors: int
    """Connections or handlers that ended in an exception: bugs, ours or a library's."""
    handshake_failures: Mapping[str, int]
    refused: Mapping[str, int]


class Books:
    """Counts of one listener; every refusal and failure is also told to ``on_event``."""

    def __init__(self, on_event: Callable[[str], None]) -> None:
        self.on_event = on_event
        self.accepted = 0
        self.requests = 0
        self.dropped = 0
        self.errors = 0
        self.handshake_failures: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1
        self.on_event(reason)

    def fail_handshake(self, reason: str) -> None:
        self.handshake_failures[reason] += 1
        self.on_event(f"handshake_{reason}")

    def error(self) -> None:
        self.errors += 1
        self.on_event("error")


class Budget:
    """Bytes that may be held at once."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, count_bytes: int) -> bool:
        if self.held_bytes + count_bytes > self.limit_bytes:
            return False
        self.held_bytes += count_bytes
        return True

    def give_back(self, count_bytes: int) -> None:
        self.held_bytes -= count_bytes


class HttpDate:
    """The ``Date`` header's value, formatted once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, email.utils.formatdate(second, usegmt=True)
        return self._text


@dataclass(slots=True)
class Shared:
    """What all connections of one listener have in common."""

    name: str
    limits: Limits
    books: Books
    body_budget: Budget
    check_peer: Callable[[Peer], str | None] | None
    on_refused_peer: Callable[[Peer, str], None]
    date: HttpDate


class Connection:
    """One accepted connection: its stream, who is at the other end, and the ways to end it.

    ``scope`` is the cancel scope of whatever reads the connection at the moment: deadlines are kept by moving its
    deadline, not by opening scopes. ``whole`` spans the connection with all its tasks.
    """

    def __init__(self, shared: Shared, transport: trio.SocketStream, peer: Peer) -> None:
        self.shared = shared
        self.transport = transport
        self.stream: trio.abc.Stream = transport
        self.peer = peer
        self.scope = trio.CancelScope()
        self.whole = trio.CancelScope()
        self.idle = True
        """No request has begun: closing now loses nothing."""
        self.retiring = False
        """To be closed after the exchange in flight."""
        self.gone = False
        """Nothing more can be written."""
        self.is_refused = False
        """Its peer may not be served any more."""

    def until(self, timeout_s: float) -> None:
        """Move the deadline of what is awaited now."""
        self.scope.deadline = trio.current_time() + timeout_s

    async def send(self, data: bytes, scope: trio.CancelScope) -> None:
        """Write all of it; each slice renews ``scope``'s deadline. Raises Trio's Broken- or ClosedResourceError."""
        for start in range(0, len(data), SLICE_BYTES):
            scope.deadline = trio.current_time() + self.shared.limits.write_timeout_s
            await self.stream.send_all(data[start : start + SLICE_BYTES])

    def refusal_of_peer(self) -> str | None:
        """Why this peer may not be served (any more), in one word, or None. Its first refusal is told."""
        check = self.shared.check_peer
        reason = None if check is None else check(self.peer)
        if reason is not None and not self.is_refused:
            self.is_refused = True
            self.shared.on_refused_peer(self.peer, reason)
        return reason

    def retire(self) -> None:
        """Close as soon as nothing is in flight: at once if that is now."""
        self.retiring = True
        if self.idle:
            self.scope.cancel()

    def drop(self) -> None:
        """End the connection without another byte of answer; its tasks are cancelled."""
        self.gone = True
        self.whole.cancel()

    def abort(self) -> None:
        """Close the socket now. Whoever reads or writes wakes with ClosedResourceError, shielded or not."""
        self.gone = True
        self.transport.socket.close()

    def cut(self) -> None:
        """End the connection this moment, with whatever is being written."""
        self.drop()
        self.abort()

    async def close(self) -> None:
        """Close with close_notify if the other end takes it in time."""
        ended = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
        with trio.move_on_after(self.shared.limits.close_timeout_s, shield=True), suppress(*ended):
            await self.stream.aclose()
        self.abort()


def enter_connection(connection: Connection) -> None:
    """Make it known to this task and to all that are started from it."""
    _connection.set(connection)


def current_connection() -> Connection | None:
    return _connection.get(None)


def current_peer() -> Peer | None:
    """Who sent the request that this task serves; None outside a listener, as under a framework's test client."""
    connection = _connection.get(None)
    return None if connection is None else connection.peer


def kinds_of(error: BaseException) -> str:
    """The exception types in a group: what a log line may say, since messages can quote a peer's secrets."""
    if isinstance(error, BaseExceptionGroup):
        return ", ".join(map(kinds_of, error.exceptions))
    return type(error).__name__
