"""One keep-alive connection to an HTTP/1.1 server: h11 over Trio."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import h11
import trio

from osqbox.errors import BadSetup

from .messages import SinkDown, credentials

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0
"""For a whole call, connecting included."""
ANSWER_BYTES = 32 * 1024 * 1024
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Broken(SinkDown):
    """The connection broke off after it was made: perhaps the body was more than the server would read."""


class Connection:
    """Not for concurrent use; close it with `close`, which any failure does as well."""

    def __init__(self, url: str, context: ssl.SSLContext | None, auth_file: Path | None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._context = context
        self._auth_file = auth_file
        self._prefix = parts.path.rstrip("/")
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        """Of the URL."""
        self._host_header = parts.netloc
        self._stream: trio.abc.Stream | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._authorization: str | None = None

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Answer:
        """``path`` begins with a slash and is taken as it is. Raises SinkDown when there is no whole answer."""
        is_old = self._stream is not None
        with trio.move_on_after(timeout_s):
            try:
                return await self._try(method, path, body, headers)
            except Broken:
                if not is_old:
                    raise
            return await self._try(method, path, body, headers)  # the server had closed the kept connection
        raise SinkDown(f"no answer within {timeout_s:g} s")

    async def _try(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        answered = False
        try:
            stream = self._stream or await self._connect()
            answer = await self._exchange(stream, method, path, body, headers)
            # Credentials that are not taken are read again with the next connection.
            answered = self._http.our_state is self._http.their_state is h11.DONE and answer.status not in (401, 403)
            return answer
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError, EOFError) as error:
            raise Broken(_reason("the connection broke off", error)) from error
        finally:
            if answered:
                self._http.start_next_cycle()
            else:
                await self.close()

    async def _connect(self) -> trio.abc.Stream:
        self._authorization = await self._credentials()
        reason = f"cannot connect to {self.host} port {self._port}"
        tcp: trio.SocketStream | None = None
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                tcp = await trio.open_tcp_stream(self.host, self._port)
                stream: trio.abc.Stream = tcp
                if self._context is not None:
                    stream = secured = trio.SSLStream(
                        tcp, self._context, server_hostname=self.host, https_compatible=True
                    )
                    await secured.do_handshake()
        except BaseException as error:
            if tcp is not None:
                await trio.aclose_forcefully(tcp)
            match error:
                case trio.TooSlowError():
                    raise SinkDown(f"{reason} within {CONNECT_TIMEOUT_S:g} s") from None
                case OSError() | trio.BrokenResourceError():
                    raise SinkDown(_reason(reason, error)) from error
            raise
        self._http = h11.Connection(h11.CLIENT)
        self._stream = stream
        return stream

    async def _credentials(self) -> str | None:
        if self._auth_file is None:
            return None
        try:
            return credentials(await trio.to_thread.run_sync(self._auth_file.read_text))
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise SinkDown(f"cannot use the auth file {self._auth_file}: {what}") from None

    async def _exchange(
        self, stream: trio.abc.Stream, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        fields = [("Host", self._host_header), ("User-Agent", "osqbox"), ("Content-Length", str(len(body)))]
        if self._authorization is not None:
            fields.append(("Authorization", self._authorization))
        request = h11.Request(method=method, target=path, headers=[*fields, *headers.items()])
        data = b"".join(
            sent for event in (request, h11.Data(body), h11.EndOfMessage()) if (sent := self._http.send(event))
        )
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            # A server that refuses a body before it has read it may still say why.
            answer = await self._answer(stream)
            if answer.status < 300:
                raise
            return answer
        return await self._answer(stream)

    async def _answer(self, stream: trio.abc.Stream) -> Answer:
        response = await self._next(stream, h11.Response)
        assert isinstance(response, h11.Response)
        body = bytearray()
        while isinstance(event := await self._next(stream, h11.Data | h11.EndOfMessage), h11.Data):
            body += event.data
            if len(body) > ANSWER_BYTES:
                raise SinkDown(f"expected an answer of at most {ANSWER_BYTES} bytes, got a longer one")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        return Answer(response.status_code, headers, bytes(body))

    async def _next(self, stream: trio.abc.Stream, wanted: object) -> object:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some(CHUNK_BYTES)
                self._http.receive_data(bytes(data))
                if not data and self._http.their_state is h11.SEND_RESPONSE:
                    raise EOFError("the server closed it without an answer")
            elif isinstance(event, wanted):  # type: ignore[arg-type]
                return event
            elif not isinstance(event, h11.InformationalResponse):
                raise EOFError("the server closed it within its answer")

    def at(self, path: str) -> str:
        """A path below that of the URL."""
        return self._prefix + path

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)


def _reason(what: str, error: BaseException) -> str:
    """With the innermost cause in words; a certificate that is not trusted is told as such."""
    cause: BaseException = error
    while (inner := cause.__cause__) is not None or isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else inner or cause
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{what}: its certificate is not trusted: {cause.verify_message}"
    text = str(cause)
    if isinstance(cause, OSError) and cause.strerror:
        is_numbered = (cause.errno or 0) > 0 and not isinstance(cause, ssl.SSLError)
        text = os.strerror(cause.errno) if is_numbered and cause.errno else cause.strerror
    return f"{what}: {text or type(cause).__name__}"


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """Raises BadSetup for a CA file that cannot be used."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSetup(f"--forward-ca: cannot use the CA file {ca_file}: {reason}") from None


Connect = Callable[[], Connection]
