"""One keep-alive HTTPS connection as an osqueryd thread holds it: h11 over Trio's TLS.

osquery/remote/http_client.cpp and transports/tls.cpp: headers in upstream's order, one deadline per call, redirects
with method and body kept, and one immediate re-send on a new connection after a transport failure.
"""

from __future__ import annotations

import gzip
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import h11
import trio

from osqbox.agent.messages import REPLY_MAX_BYTES, VERSION
from osqbox.errors import BadSetup

CALL_TIMEOUT_S = 16.0
SESSION_TIMEOUT_S = 3600.0  # --tls_session_timeout
MAX_REDIRECTS = 10
MAX_HEADER_BYTES = 8 * 1024
_REDIRECTS = frozenset({301, 302, 303, 304, 305, 307, 308})
_CHUNK_BYTES = 64 * 1024


class CallFailed(Exception):
    """No reply: the text says why, in a few words."""


class _Broken(Exception):
    """The connection failed; worth one more try on a new one."""


def client_context(
    server_certs: Path | None, client_cert: Path | None = None, client_key: Path | None = None
) -> ssl.SSLContext:
    """TLS 1.2 or newer; the server's certificate is always checked, as release builds of osqueryd do.

    Raises BadSetup when a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(server_certs) if server_certs else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if client_cert is not None:
            context.load_cert_chain(str(client_cert), str(client_key) if client_key else None)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(f) for f in (server_certs, client_cert, client_key) if f)
        raise BadSetup(f"cannot use the certificates {files}: {error}", hint="osqbox certs show") from error
    return context


@dataclass(frozen=True, slots=True)
class _Target:
    host: str
    port: int

    @property
    def header(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return shown if self.port == 443 else f"{shown}:{self.port}"


class Channel:
    """The connection of one thread. Not for concurrent use."""

    def __init__(self, hostname: str, context: ssl.SSLContext) -> None:
        self._home = _target(hostname)
        self._context = context
        self._stream: trio.SSLStream[trio.SocketStream] | None = None
        self._connection: h11.Connection | None = None
        self._connected_to: _Target | None = None
        self._connected_at = 0.0

    async def post(self, path: str, body: bytes, *, node_key: str = "", compress: bool = False) -> bytes:
        """The reply's body, whatever its status. Raises CallFailed."""
        if compress:
            body = gzip.compress(body, 9, mtime=0)
        with trio.move_on_after(CALL_TIMEOUT_S) as scope:
            try:
                return await self._post(path, body, node_key, compress)
            except _Broken:
                await self.aclose()
            try:
                return await self._post(path, body, node_key, compress)
            except _Broken as error:
                await self.aclose()
                raise CallFailed(f"Request error: {error}") from error
        assert scope.cancelled_caught
        self._drop()
        raise CallFailed("Request error: timeout")

    async def _post(self, path: str, body: bytes, node_key: str, compress: bool) -> bytes:
        target = self._home
        for _ in range(MAX_REDIRECTS + 1):
            status, location, reply = await self._exchange(target, path, body, node_key, compress)
            if status not in _REDIRECTS:
                return reply
            if not location:
                raise CallFailed("Request error: redirect without a Location")
            target, path = _follow(target, location)
        raise CallFailed(f"Request error: more than {MAX_REDIRECTS} redirects")

    async def _exchange(
        self, target: _Target, path: str, body: bytes, node_key: str, compress: bool
    ) -> tuple[int, str, bytes]:
        try:
            stream, connection = await self._connect(target)
            headers = _headers(target, body, node_key, compress)
            # h11 checks the request and keeps the state, but would write Host first: the bytes are ours.
            connection.send(h11.Request(method="POST", target=path, headers=headers))
            connection.send(h11.Data(data=body))
            connection.send(h11.EndOfMessage())
            head = "".join(f"{name}: {value}\r\n" for name, value in headers)
            await stream.send_all(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
            return await self._receive(stream, connection)
        except ssl.SSLError as error:
            raise _Broken(getattr(error, "verify_message", "") or error.reason or str(error)) from error
        except trio.BrokenResourceError as error:
            raise _Broken(_cause(error)) from error
        except (OSError, h11.ProtocolError, trio.ClosedResourceError) as error:
            raise _Broken(str(error) or type(error).__name__) from error

    async def _receive(
        self, stream: trio.SSLStream[trio.SocketStream], connection: h11.Connection
    ) -> tuple[int, str, bytes]:
        status, location, pieces, size = 0, "", list[bytes](), 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(_CHUNK_BYTES)))
            elif isinstance(event, h11.Response):
                status = event.status_code
                location = dict(event.headers).get(b"location", b"").decode("latin-1")
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > REPLY_MAX_BYTES:
                    raise CallFailed(f"Request error: body limit of {REPLY_MAX_BYTES} bytes exceeded")
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise _Broken("partial message")
        if connection.their_state is not h11.DONE or connection.our_state is not h11.DONE:
            await self.aclose()
        else:
            connection.start_next_cycle()
        return status, location, b"".join(pieces)

    async def _connect(self, target: _Target) -> tuple[trio.SSLStream[trio.SocketStream], h11.Connection]:
        expired = trio.current_time() - self._connected_at > SESSION_TIMEOUT_S
        if self._stream is None or self._connection is None or self._connected_to != target or expired:
            await self.aclose()
            socket = await trio.open_tcp_stream(target.host, target.port)
            stream = trio.SSLStream(socket, self._context, server_hostname=target.host, https_compatible=True)
            self._stream = stream
            await stream.do_handshake()
            self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
            self._connected_to, self._connected_at = target, trio.current_time()
        return self._stream, self._connection

    async def aclose(self) -> None:
        stream = self._stream
        self._stream = self._connection = None
        if stream is not None:
            await trio.aclose_forcefully(stream)

    def _drop(self) -> None:
        """Close without waiting."""
        stream = self._stream
        self._stream = self._connection = None
        if stream is not None:
            stream.transport_stream.socket.close()


def _headers(target: _Target, body: bytes, node_key: str, compress: bool) -> list[tuple[str, str]]:
    headers = [
        ("Content-Type", "application/json"),
        ("Accept", "application/json"),
        ("User-Agent", f"osquery/{VERSION}"),
    ]
    if node_key and node_key.isascii() and node_key.isprintable():
        headers.append(("Authorization", f"NodeKey {node_key}"))
    if compress:
        headers.append(("Content-Encoding", "gzip"))
    return [*headers, ("Host", target.header), ("Content-Length", str(len(body)))]


def _target(hostname: str) -> _Target:
    """``--tls_hostname``: ``host``, ``host:port`` or ``[v6]:port``. Raises BadSetup."""
    try:
        parts = urlsplit(f"https://{hostname}")
        host, port = parts.hostname, parts.port or 443
    except ValueError:
        host = None
    if not host or parts.path or parts.query:
        raise BadSetup(
            f"expected a host and port such as localhost:8443, got {hostname!r}",
            hint="osqbox agent --tls-hostname localhost:8443",
        )
    return _Target(host, port)


def _follow(target: _Target, location: str) -> tuple[_Target, str]:
    if location.startswith("/") and not location.startswith("//"):
        return target, location
    try:
        parts = urlsplit(location)
        if parts.scheme != "https" or not parts.hostname:
            raise ValueError
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.hostname, parts.port or 443), path
    except ValueError:
        raise CallFailed(f"Request error: cannot follow the redirect to {location[:200]!r}") from None


def _cause(error: BaseException) -> str:
    """The reason Trio wraps: what TLS or the socket said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error) or "closed"
