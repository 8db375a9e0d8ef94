"""The listener: bind, accept, shake hands, hand over, count, drain."""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType

import trio

from osqbox.errors import BadSetup
from osqbox.exchange import Handler, Peer

from .asgi import ASGIApp, Lifespan, StreamsBody, agents_asgi, guarded
from .connection import (
    Books,
    Budget,
    Connection,
    HttpDate,
    Limits,
    Shared,
    Statistics,
    enter_connection,
    kinds_of,
)
from .inline import serve_inline
from .sockets import bound_unacknowledged, notice_vanished_peers, open_sockets, open_unix_socket, unix_user
from .tls import certificate_authority, certificate_identity

logger = logging.getLogger("osqbox.listen")

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_ACCEPT_PAUSE_S = 0.1
_MAPPED_V4 = "::ffff:"
_PLAINTEXT = {"HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER"}
_NOTHING_IN_COMMON = {"UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER", "VERSION_TOO_LOW", "NO_PROTOCOLS_AVAILABLE"}

_VERDICTS = MappingProxyType(
    {
        9: "certificate_not_yet_valid",
        10: "certificate_expired",
        23: "certificate_revoked",
        26: "certificate_purpose",
        66: "certificate_weak",
        67: "certificate_weak",
        68: "certificate_weak",
    }
)
"""X509_V_ERR_ codes of openssl/x509_vfy.h; every other one is a certificate that our client CA did not sign."""


class Listener:
    """One bound address, TLS or clear.

    With a ``handler``, ordinary HTTP/1.x requests are answered inline by it, and ``app`` (by default
    `agents_asgi` of the same handler) serves HTTP/2 and WebSockets. Without one, ``app`` serves everything, within
    the bounds of ``limits``.
    ``on_event`` is told the reason of every refusal, failed handshake and error, in one word to be counted.
    ``check_peer`` says in one word why a peer may not be served (``certificate_revoked``), or None; it is asked after
    the handshake, before every request, and of every open connection by `recheck`. ``on_refused_peer`` is told the peer
    and the word, once for each connection.

    Raises BadSetup when the installed Hypercorn is not the one whose repairs are here.
    """

    def __init__(
        self,
        name: str,
        *,
        ssl_context: ssl.SSLContext | None = None,
        handler: Handler | None = None,
        app: ASGIApp | None = None,
        limits: Limits | None = None,
        on_event: Callable[[str], None] | None = None,
        check_peer: Callable[[Peer], str | None] | None = None,
        on_refused_peer: Callable[[Peer, str], None] | None = None,
        streams_body: StreamsBody | None = None,
    ) -> None:
        if app is None:
            if handler is None:
                raise ValueError("a listener needs a handler, an app, or both")
            app = agents_asgi(handler)
        repairs = _load_repairs()
        self.name = name
        self.limits = limits or Limits()
        self._books = Books(on_event or _ignore)
        self._shared = Shared(
            name,
            self.limits,
            self._books,
            Budget(self.limits.inflight_body_bytes),
            check_peer,
            on_refused_peer or _ignore,
            HttpDate(),
        )
        self._ssl_context = ssl_context
        self._handler = handler
        self._app = app
        self._served_app = (
            app if handler else guarded(app, body_limit_bytes=self.limits.app_body_bytes, streams_body=streams_body)
        )
        self._config = repairs.hypercorn_config(self.limits)
        self._context = repairs.WorkerContext(None)
        self._repairs = repairs
        self._id_prefix = secrets.token_hex(6)
        self._sockets: list[trio.socket.SocketType] = []
        self._files: list[tuple[Path, int]] = []
        """Of unix sockets, with their inodes."""
        self._port: int | None = None
        self._connections: set[Connection] = set()
        self._nursery: trio.Nursery | None = None
        self._accepting = trio.CancelScope()
        self._stopping = False
        self._emptied = trio.Event()

    # before

    async def bind(self, host: str, port: int) -> None:
        """Listen; connections wait in the kernel until `run`. ``localhost`` means IPv4 and IPv6 on the same port.

        Raises AddressInUse or BadSetup with the command to try next.
        """
        self._sockets += await open_sockets(self.name, host, port)
        if self.limits.vanished_after_s is not None:
            for sock in self._sockets:
                notice_vanished_peers(sock, self.limits.vanished_after_s)
        if self.limits.unacknowledged_after_s is not None:
            for sock in self._sockets:
                bound_unacknowledged(sock, self.limits.unacknowledged_after_s)
        self._port = self._sockets[0].getsockname()[1]

    def bind_unix(self, path: Path) -> None:
        """Listen at a unix socket's path, for this user only. The file goes when `stop_accepting` is called.

        Raises AddressInUse or BadSetup.
        """
        sock = open_unix_socket(self.name, path)
        self._sockets.append(trio.socket.from_stdlib_socket(sock))
        self._files.append((path, path.stat().st_ino))

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError(f"{self.name}: bind() before asking for the port")
        return self._port

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Every address listened on."""
        return [sock.getsockname()[:2] for sock in self._sockets]

    # running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `drain`, or `stop_accepting` and the last connection. Started when the application is.

        Raises BadSetup when that says that it cannot start.
        """
        lifespan = Lifespan(self._app, self.name, self.limits)
        try:
            async with trio.open_nursery() as outer:
                await lifespan.start(outer)
                if lifespan.failure is None:
                    await self._serve_until_stopped(task_status)
                    await lifespan.stop()
            if lifespan.failure is not None:  # raised out here, where it is in no exception group
                raise BadSetup(f"{self.name}: the application cannot start: {lifespan.failure}")
        finally:
            self.stop_accepting()

    async def _serve_until_stopped(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            with self._accepting:
                async with trio.open_nursery() as acceptors:
                    for sock in self._sockets:
                        acceptors.start_soon(self._accept, trio.SocketListener(sock), self._nursery)

    def stop_accepting(self) -> None:
        """Close the listening sockets. Open connections are served on."""
        self._stopping = True
        self._accepting.cancel()
        for sock in self._sockets:
            sock.close()
        for path, inode in self._files:
            with suppress(OSError):
                if path.lstat().st_ino == inode:  # nobody has put another there meanwhile
                    path.unlink()
        self._files.clear()

    async def drain(self) -> None:
        """Stop: idle connections at once, requests in flight within ``drain_timeout_s``, then whatever is left.

        Returns when no connection is open. Never waits for a client.
        """
        self.stop_accepting()
        await self._context.terminated.set()
        for connection in list(self._connections):
            connection.retire()
        if await self._is_empty_within(self.limits.drain_timeout_s):
            return
        for connection in self._connections:
            connection.gone = True  # or Hypercorn answers 500 for what is cancelled
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        if await self._is_empty_within(self.limits.close_timeout_s):
            return
        for connection in list(self._connections):
            connection.abort()
        if not await self._is_empty_within(self.limits.close_timeout_s):
            logger.warning("%s: %d connections do not end", self.name, len(self._connections))

    async def _is_empty_within(self, timeout_s: float) -> bool:
        with trio.move_on_after(timeout_s):
            while self._connections:
                self._emptied = trio.Event()
                await self._emptied.wait()
        return not self._connections

    def recheck(self) -> int:
        """End every connection that ``check_peer`` refuses by now, whatever it is doing; returns how many."""
        refused = [(each, reason) for each in self._connections if (reason := each.refusal_of_peer()) is not None]
        for connection, reason in refused:
            self._books.refuse(reason)
            connection.cut()
        return len(refused)

    def statistics(self) -> Statistics:
        books = self._books
        return Statistics(
            open_connections=len(self._connections),
            accepted=books.accepted,
            requests=books.requests,
            dropped=books.dropped,
            errors=books.errors,
            handshake_failures=dict(books.handshake_failures),
            refused=dict(books.refused),
        )

    # one connection

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                transport = await listener.accept()
            except trio.ClosedResourceError:
                return  # by `stop_accepting`, while a connection was coming in
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                logger.warning("%s: cannot accept: %s", self.name, error.strerror)
                self._books.refuse("accept_resources")
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._connections) >= self.limits.max_connections:
                self._books.refuse("connections_full")
                transport.socket.close()
            else:
                self._books.accepted += 1
                peer = Peer(address="", connection=f"{self._id_prefix}-{self._books.accepted:x}")
                nursery.start_soon(self._serve, Connection(self._shared, transport, peer))

    async def _serve(self, connection: Connection) -> None:
        """A connection from accept to close. Whatever goes wrong in it stays in it."""
        self._connections.add(connection)
        enter_connection(connection)
        try:
            try:
                with connection.whole:
                    await self._converse(connection)
            finally:
                await connection.close()
        except* Exception as group:
            self._books.error()
            kinds = kinds_of(group)
            logger.error("%s: connection from %s ended by %s", self.name, connection.peer.address, kinds)
            logger.debug("%s: connection ended", self.name, exc_info=group)
        finally:
            self._connections.discard(connection)
            if not self._connections:
                self._emptied.set()

    async def _converse(self, connection: Connection) -> None:
        sock = connection.transport.socket
        if sock.family == socket.AF_UNIX:
            connection.peer = replace(connection.peer, address="unix", unix_user=unix_user(sock))
        else:
            connection.peer = replace(connection.peer, address=_address(connection.transport))
        stream = None
        if self._ssl_context is not None:
            stream = await self._handshake(connection, self._ssl_context)
            if stream is None:
                return
        if connection.retiring:
            return
        if (refusal := connection.refusal_of_peer()) is not None:
            self._books.refuse(refusal)
            return
        http2 = stream is not None and stream.selected_alpn_protocol() == "h2"
        already_read: bytes | None = b""
        if self._handler is not None and not http2:
            already_read = await serve_inline(connection, self._handler)
            connection.scope = trio.CancelScope()
        if already_read is not None:
            hypercorn = self._repairs.HypercornConnection(connection, self._served_app, self._config, self._context)
            await hypercorn.run(http2=http2, already_read=already_read)

    async def _handshake(
        self, connection: Connection, context: ssl.SSLContext
    ) -> trio.SSLStream[trio.SocketStream] | None:
        """The TLS stream of a peer that is known now; None when there is none, which is counted."""
        stream = trio.SSLStream(connection.transport, context, server_side=True)
        connection.stream = stream
        failure: ssl.SSLError | None = None
        reason = "timeout"
        with connection.scope:
            connection.until(self.limits.handshake_timeout_s)
            try:
                await stream.do_handshake()
                reason = ""
            except trio.BrokenResourceError as error:
                failure = error.__cause__ if isinstance(error.__cause__, ssl.SSLError) else None
                reason = handshake_failure(failure)
                await _send_alert(stream)
        connection.scope = trio.CancelScope()
        if reason:
            if not connection.retiring:
                self._fail_handshake(connection, reason, failure)
            return None
        try:
            connection.peer = _introduced(connection.peer, stream)
        except ValueError as error:  # verified, yet with names that are not text
            self._books.fail_handshake("certificate_untrusted")
            logger.info("%s: no TLS with %s: certificate: %s", self.name, connection.peer.address, error)
            return None
        return stream

    def _fail_handshake(self, connection: Connection, reason: str, failure: ssl.SSLError | None) -> None:
        self._books.fail_handshake(reason)
        detail = f" ({failure.reason})" if failure is not None and failure.reason else ""
        logger.info("%s: no TLS with %s: %s%s", self.name, connection.peer.address, reason, detail)


def handshake_failure(error: ssl.SSLError | None) -> str:
    """One word for why a handshake failed; None stands for a peer that left."""
    reason = (error.reason or "") if error is not None else ""
    if not reason or "EOF" in reason:
        return "gone"
    if reason in _PLAINTEXT:
        return "plaintext"
    if "ALERT" in reason:
        return "refused_by_client"  # most often: it does not know our CA
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERDICTS.get(error.verify_code, "certificate_untrusted")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "no_certificate"
    if "CERTIFICATE" in reason:
        return "certificate_untrusted"
    if reason in _NOTHING_IN_COMMON:
        return "version_or_cipher"
    return "other"


async def _send_alert(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Send what OpenSSL has to say about a failed handshake, which Trio leaves unsent.

    Without it the client reads "connection reset" instead of "certificate required".
    """
    outgoing = getattr(stream, "_outgoing", None)
    alert = outgoing.read() if outgoing is not None else b""
    if alert:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.transport_stream.send_all(alert)


def _introduced(peer: Peer, stream: trio.SSLStream[trio.SocketStream]) -> Peer:
    identity = certificate_identity(stream.getpeercert())
    der = stream.getpeercert(binary_form=True) if identity.serial is not None else None
    return replace(
        peer,
        certificate_name=identity.name,
        certificate_serial=identity.serial,
        certificate_tenant=identity.tenant,
        certificate_uris=identity.uris,
        certificate_common_names=identity.common_names,
        certificate_authority=certificate_authority(der) if der else None,
        certificate_expires_at=identity.expires_at,
        tls_version=stream.version(),
    )


def _address(transport: trio.SocketStream) -> str:
    """The other end's IP address; empty when it has left already."""
    try:
        address = str(transport.socket.getpeername()[0])
    except OSError:
        return ""
    return address.removeprefix(_MAPPED_V4)


def _load_repairs() -> ModuleType:
    """Hypercorn and its repairs, imported by who really listens only: they take a third of the start-up time."""
    try:
        from . import hypercorn_repairs
    except ImportError as error:
        raise BadSetup(f"this Hypercorn cannot be used: {error}", hint="pip install 'hypercorn~=0.18.0'") from error
    hypercorn_repairs.check_seams()
    return hypercorn_repairs


def _ignore(*_: object) -> None:
    return
