"""One keep-alive HTTPS connection as an osqueryd thread holds it: h11 over Trio's TLS.

osquery/remote/http_client.cpp and transports/tls.cpp: headers in upstream's order, one deadline per call, redirects
with method and body kept, and one immediate re-send on a new connection after a transport failure. A proxy is asked to
CONNECT; replies are unpacked where --tls_accept_gzip says so.
"""

from __future__ import annotations

import gzip
import ssl
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
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
DEFAULT_PROXY_PORT = 3128
NEVER_PROXIED = "169.254.169.254"
_TLS12_SUITES = ":".join(
    (
        *(
            f"ECDHE-{kind}-AES{bits}-GCM-SHA{digest}"
            for bits, digest in ((256, 384), (128, 256))
            for kind in ("ECDSA", "RSA")
        ),
        *(f"ECDHE-ECDSA-AES{bits}-CCM{short}" for short in ("", "8") for bits in (256, 128)),
    )
)


class CallFailed(Exception):
    """No reply: the text says why, in a few words."""


class _Broken(Exception):
    """The connection failed; worth one more try on a new one."""


Warn = Callable[[str], None]


def client_context(
    server_certs: Path | None,
    client_cert: Path | None = None,
    client_key: Path | None = None,
    *,
    warn: Warn | None = None,
) -> ssl.SSLContext:
    """TLS 1.2 or newer; the server's certificate is always checked, as release builds of osqueryd do.

    Raises BadSetup when a file cannot be read. With ``warn`` it is told instead, as osqueryd does, which then trusts
    nobody, or sends no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS12_SUITES)
    # A body that only the end of the connection delimits must end with close_notify.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("Cannot read TLS server certificate(s)", lambda: _trust(context, server_certs)),
    ]
    if client_cert is not None:
        key = str(client_key) if client_key else None
        steps.append(("Cannot read TLS client certificate", lambda: context.load_cert_chain(str(client_cert), key)))
    for what, load in steps:
        try:
            load()
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(f) for f in (server_certs, client_cert, client_key) if f)
            if warn is None:
                raise BadSetup(f"cannot use the certificates {files}: {error}", hint="osqbox certs show") from error
            warn(f"{what}: {files}: {error}")
    return context


def _trust(context: ssl.SSLContext, server_certs: Path | None) -> None:
    if server_certs is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cafile=str(server_certs))


@dataclass(frozen=True, slots=True)
class Transport:
    """How connections are made, as osqueryd's flags say."""

    timeout_s: float = CALL_TIMEOUT_S
    """For a whole call: connecting, redirects and the second try included."""
    session_reuse: bool = True
    session_timeout_s: float = SESSION_TIMEOUT_S
    """0 is never."""
    accept_gzip: bool = False
    proxy: str = ""
    """``host[:port]``"""


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    """All but Host, Accept-Encoding and Content-Length."""


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

    def __init__(self, hostname: str, context: ssl.SSLContext, transport: Transport = Transport()) -> None:
        self._home = _target(hostname)
        self._context = context
        self._transport = transport
        self._stream: trio.SSLStream[trio.SocketStream] | None = None
        self._connection: h11.Connection | None = None
        self._connected_to: _Target | None = None
        self._connected_at = 0.0
        self._is_old = False

    async def post(
        self, path: str, body: bytes, *, node_key: str = "", compress: bool = False, method: str = "POST"
    ) -> bytes:
        """The reply's body, whatever its status. Raises CallFailed."""
        if compress:
            body = gzip.compress(body, 9, mtime=0)
        request = _Request(method, path, body, _headers(node_key, compress))
        _, reply = await self._within_deadline(request, tries=2)
        return reply

    async def fetch(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and body of a plain GET, or of a POST; one try. How YARA rules are fetched. Raises CallFailed."""
        headers = (("Content-Type", "application/json"),) if body is not None else ()
        request = _Request("GET" if body is None else "POST", path, body or b"", headers)
        return await self._within_deadline(request, tries=1)

    async def _within_deadline(self, request: _Request, tries: int) -> tuple[int, bytes]:
        with trio.move_on_after(self._transport.timeout_s) as scope:
            while True:
                tries -= 1
                try:
                    return await self._follow_redirects(request)
                except _Broken as error:
                    await self.aclose()
                    if not tries:
                        raise CallFailed(f"Request error: {error}") from error
                except CallFailed:
                    await self.aclose()
                    raise
                finally:
                    if not self._transport.session_reuse:
                        self._drop()
        assert scope.cancelled_caught
        self._drop()
        raise CallFailed("Request error: timeout")

    async def _follow_redirects(self, request: _Request) -> tuple[int, bytes]:
        target = self._home
        for _ in range(MAX_REDIRECTS + 1):
            status, location, reply = await self._exchange(target, request)
            if status not in _REDIRECTS:
                return status, reply
            if not location:
                raise CallFailed("Request error: redirect without a Location")
            target, path = _follow(target, location)
            request = replace(request, path=path)
        raise CallFailed(f"Request error: more than {MAX_REDIRECTS} redirects")

    async def _exchange(self, target: _Target, request: _Request) -> tuple[int, str, bytes]:
        try:
            stream, connection = await self._connect(target)
            await stream.send_all(_written(connection, target, request, self._transport.accept_gzip))
            return await self._receive(stream, connection)
        except h11.LocalProtocolError as error:
            raise CallFailed(f"Request error: cannot be sent: {error}") from error
        except ssl.SSLError as error:
            raise _Broken(getattr(error, "verify_message", "") or error.reason or str(error)) from error
        except trio.BrokenResourceError as error:
            raise _Broken(_cause(error)) from error
        except (OSError, h11.ProtocolError, trio.ClosedResourceError) as error:
            raise _Broken(str(error) or type(error).__name__) from error
        except ValueError as error:  # a name that neither DNS nor TLS can spell
            raise CallFailed(f"Request error: cannot be sent to {target.host[:100]!r}: {error}") from error

    async def _receive(
        self, stream: trio.SSLStream[trio.SocketStream], connection: h11.Connection
    ) -> tuple[int, str, bytes]:
        status, headers, pieces, size = 0, dict[bytes, bytes](), list[bytes](), 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(_CHUNK_BYTES)))
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, dict(event.headers)
                if sum(len(name) + len(value) + 4 for name, value in event.headers) > MAX_HEADER_BYTES:
                    raise CallFailed(f"Request error: header limit of {MAX_HEADER_BYTES} bytes exceeded")
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
        reply = b"".join(pieces)
        if self._transport.accept_gzip and headers.get(b"content-encoding") == b"gzip":
            reply = _unpacked(reply)
        return status, headers.get(b"location", b"").decode("latin-1"), reply

    async def _connect(self, target: _Target) -> tuple[trio.SSLStream[trio.SocketStream], h11.Connection]:
        """The kept connection, or a new one. The first request after --tls_session_timeout still uses the old one."""
        if self._stream is None or self._connection is None or self._connected_to != target or self._is_old:
            await self.aclose()
            socket = await self._open(target)
            stream = trio.SSLStream(socket, self._context, server_hostname=target.host)
            self._stream = stream
            await stream.do_handshake()
            self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
            self._connected_to, self._connected_at, self._is_old = target, trio.current_time(), False
        else:
            limit_s = self._transport.session_timeout_s
            self._is_old = 0 < limit_s < trio.current_time() - self._connected_at
        return self._stream, self._connection

    async def _open(self, target: _Target) -> trio.SocketStream:
        if not self._transport.proxy or target.host == NEVER_PROXIED:
            return await trio.open_tcp_stream(target.host, target.port)
        proxy = _target(self._transport.proxy, DEFAULT_PROXY_PORT)
        stream = await trio.open_tcp_stream(proxy.host, proxy.port)
        try:
            await _ask_to_connect(stream, target)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

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


async def fetch(
    url: str, context: ssl.SSLContext, transport: Transport = Transport(), body: bytes | None = None
) -> tuple[int, bytes]:
    """The status and body of one https URL, on a connection of its own. Raises CallFailed."""
    try:
        parts = urlsplit(url)
        if parts.scheme != "https":
            raise BadSetup("not an https URL")
        channel = Channel(parts.netloc, context, transport)
    except (ValueError, BadSetup) as error:
        raise CallFailed(f"Request error: expected an https URL, got {url[:200]!r}") from error
    try:
        return await channel.fetch((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body)
    finally:
        with trio.CancelScope(shield=True):
            await channel.aclose()


async def open_stream(
    hostname: str, context: ssl.SSLContext, transport: Transport = Transport()
) -> trio.SSLStream[trio.SocketStream]:
    """A TLS connection of its own to ``hostname`` that is not spoken HTTP to yet. Raises CallFailed."""
    channel = Channel(hostname, context, transport)
    try:
        with trio.fail_after(transport.timeout_s):
            stream, _ = await channel._connect(channel._home)
    except BaseException as error:
        channel._drop()
        if isinstance(error, OSError | trio.BrokenResourceError | trio.TooSlowError | ValueError | _Broken):
            reason = "timeout" if isinstance(error, trio.TooSlowError) else _cause(error)
            raise CallFailed(f"Request error: {reason}") from error
        raise
    return stream


async def _ask_to_connect(stream: trio.SocketStream, target: _Target) -> None:
    """CONNECT through a proxy, without authentication."""
    shown = f"[{target.host}]" if ":" in target.host else target.host
    await stream.send_all(f"CONNECT {shown}:{target.port} HTTP/1.1\r\nHost: {shown}:{target.port}\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = bytes(await stream.receive_some(_CHUNK_BYTES))
        answer += piece
        if not piece or len(answer) > MAX_HEADER_BYTES:
            raise _Broken("the proxy did not answer CONNECT")
    words = answer.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].startswith(b"2"):
        raise _Broken(f"the proxy refused to connect: {words[-1].decode('latin-1')[:100]}")


def _written(connection: h11.Connection, target: _Target, request: _Request, accept_gzip: bool) -> bytes:
    """The request's bytes, its headers in osqueryd's order."""
    headers = [*request.headers, ("Host", target.header)]
    if accept_gzip:
        headers.append(("Accept-Encoding", "gzip"))
    if request.method != "GET":
        headers.append(("Content-Length", str(len(request.body))))
    # h11 checks the request and keeps the state, but would write Host first: the bytes are ours.
    connection.send(h11.Request(method=request.method, target=request.path, headers=headers))
    if request.body:
        connection.send(h11.Data(data=request.body))
    connection.send(h11.EndOfMessage())
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{request.method} {request.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + request.body


def _unpacked(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(body, REPLY_MAX_BYTES + 1)
    except zlib.error as error:
        raise CallFailed(f"Request error: bad gzip body: {error}") from error
    if len(plain) > REPLY_MAX_BYTES:
        raise CallFailed(f"Request error: body limit of {REPLY_MAX_BYTES} bytes exceeded")
    if not unpacker.eof:
        raise CallFailed("Request error: bad gzip body: truncated")
    return plain


def _headers(node_key: str, compress: bool) -> tuple[tuple[str, str], ...]:
    headers = [
        ("Content-Type", "application/json"),
        ("Accept", "application/json"),
        ("User-Agent", f"osquery/{VERSION}"),
    ]
    if node_key and node_key.isascii() and node_key.isprintable():
        headers.append(("Authorization", f"NodeKey {node_key}"))
    if compress:
        headers.append(("Content-Encoding", "gzip"))
    return tuple(headers)


def _target(hostname: str, default_port: int = 443) -> _Target:
    """``--tls_hostname``: ``host``, ``host:port`` or ``[v6]:port``. Raises BadSetup."""
    try:
        parts = urlsplit(f"https://{hostname}")
        host, port = parts.hostname, parts.port or default_port
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
    if isinstance(error, ssl.SSLEOFError):
        return "stream truncated"
    return getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error) or "closed"
