"""A blocking gRPC channel: HTTP/2 by ``h2`` over TLS 1.3 with a client certificate, one call at a time.

The wire is grpc/doc/PROTOCOL-HTTP2.md: five bytes (not compressed, length) before every message, the status in the
trailers. Everything that goes wrong is a `JobError`; UNAVAILABLE is worth another attempt on a new channel, unless its
reason is one of `FINAL`. A channel belongs to one thread; whoever needs two calls at once opens two.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import unquote

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from osqbox.errors import BadSetup, BadUsage
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.grpc_status import status_error
from osqbox.jobs.messages import KIB, MIB

CONNECT_S = 10.0
"""Longest time for TCP connect and TLS handshake."""
SILENCE_S = 15.0
"""After so long without a byte the server is asked for a sign of life; after twice as long it is taken for gone."""
MESSAGE_BYTES = 16 * MIB
"""The largest message taken; those of the service are at most 64 KiB, but for jobs with all their arguments."""
STREAM_WINDOW_BYTES = 1 * MIB
CONNECTION_WINDOW_BYTES = 4 * MIB
READ_BYTES = 64 * KIB

UNREACHABLE, BROKEN, REFUSED_CERTIFICATE, UNTRUSTED = "UNREACHABLE", "BROKEN", "REFUSED_CERTIFICATE", "UNTRUSTED"
UNWELCOME = "UNWELCOME"
"""The handshake went well, and then the server hung up without a word: a box that stops does, and one that was told
not to serve this certificate any more."""
TOO_LARGE = "TOO_LARGE"
FINAL = frozenset({REFUSED_CERTIFICATE, UNTRUSTED})
"""Reasons of UNAVAILABLE that another attempt would only meet again."""

_OF_HTTP = {401: Code.UNAUTHENTICATED, 403: Code.PERMISSION_DENIED, 404: Code.UNIMPLEMENTED} | dict.fromkeys(
    (429, 502, 503, 504), Code.UNAVAILABLE
)
"""HTTP status to code for answers without a grpc-status (grpc/doc/http-grpc-status-mapping.md)."""
_OF_RESET = {7: Code.UNAVAILABLE, 8: Code.CANCELLED, 11: Code.RESOURCE_EXHAUSTED, 12: Code.PERMISSION_DENIED}
"""HTTP/2 error of RST_STREAM to code; any other is INTERNAL."""
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """``HOST:PORT`` or ``[IPV6]:PORT``. Raises BadUsage."""
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or (":" in host and bare == host) or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
            raise BadUsage(f"expected a server as HOST:PORT, got {text!r}")
        return Address(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def client_context(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 and nothing older, the server's name checked, ours proved. Raises BadSetup."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise BadSetup(f"the CA file {ca} cannot be used: {_why(error)}") from None
    try:
        context.load_cert_chain(cert, key, password=lambda: _refuse_password(key))
    except OSError as error:
        raise BadSetup(f"the certificate {cert} with its key {key} cannot be used: {_why(error)}") from None
    return context


def _refuse_password(key: Path) -> NoReturn:
    """OpenSSL would ask the terminal."""
    raise BadSetup(f"the key {key} has a password; expected one without", hint=f"openssl pkey -in {key} -out plain.key")


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return error.strerror or str(error)


@dataclass(slots=True)
class _Call:
    stream: int
    deadline: float | None
    """On the monotonic clock."""
    timeout_s: float | None
    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    received: bytearray = field(default_factory=bytearray)
    sent: bool = False
    ended: bool = False

    def remaining_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


class Channel:
    """Connected from the start; raises JobError when the server cannot be reached or either side is not trusted."""

    def __init__(self, address: Address, context: ssl.SSLContext, *, connect_s: float = CONNECT_S) -> None:
        self._address = address
        self.has_heard = False
        """Whether the server said anything yet: it accepted our certificate."""
        self._probed = False
        self._call: _Call | None = None
        with self._explained():
            plain = socket.create_connection((address.host, address.port), connect_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = context.wrap_socket(plain, server_hostname=address.host)
        try:
            self._http = self._begin()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Break the connection; a call that is under way ends with it."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_usable(self) -> bool:
        """Whether another call may start here: open, and nothing came meanwhile that says otherwise."""
        if self._call is not None or self._socket.fileno() < 0:
            return False
        self._socket.settimeout(0)
        try:
            while data := self._socket.recv(READ_BYTES):
                self._take(data)
        except (ssl.SSLWantReadError, BlockingIOError):
            return True
        except (OSError, JobError):
            pass
        self.close()
        return False

    def one_answer(self, method: str, messages: Iterable[bytes], *, timeout_s: float | None) -> bytes:
        """As `call`, where the server has one message to say."""
        answers = list(self.call(method, messages, timeout_s=timeout_s))
        if len(answers) != 1:
            raise JobError(Code.INTERNAL, f"{method}: expected one message, got {len(answers)}")
        return answers[0]

    def call(self, method: str, messages: Iterable[bytes], *, timeout_s: float | None = None) -> Iterator[bytes]:
        """Send every message, then give the answers as they come, until the server says OK.

        ``method`` is ``/package.Service/Method``. Raises JobError with the server's own code, DEADLINE_EXCEEDED
        after ``timeout_s``, UNAVAILABLE when the connection breaks. A caller that leaves early cancels the call.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        call = self._call = _Call(self._http.get_next_available_stream_id(), deadline, timeout_s)
        try:
            self._http.send_headers(call.stream, self._headers(method, timeout_s))
            for message in messages:
                self._send(call, b"\0" + len(message).to_bytes(4, "big") + message)
                if call.ended:  # the server has heard enough
                    break
            if not call.ended:
                self._http.end_stream(call.stream)
                call.sent = True
            self._flush(call)
            yield from self._answers(call)
        finally:
            self._call = None
            if not (call.sent and call.ended):
                self._cancel(call)
        _check_status(call)

    def _begin(self) -> H2Connection:
        if self._socket.selected_alpn_protocol() != "h2":
            raise _unavailable(UNTRUSTED, f"{self._address} does not speak gRPC: it did not agree to HTTP/2")
        http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        http.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: 64 * KIB,
            },
        )
        http.initiate_connection()
        http.increment_flow_control_window(CONNECTION_WINDOW_BYTES)
        return http

    def _headers(self, method: str, timeout_s: float | None) -> list[tuple[str, str]]:
        headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", method),
            (":authority", str(self._address)),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "osqbox"),
        ]
        return headers if timeout_s is None else [*headers, ("grpc-timeout", _grpc_timeout(timeout_s))]

    def _send(self, call: _Call, data: bytes) -> None:
        """As the server's windows allow; meanwhile whatever it says is taken in."""
        view = memoryview(data)
        while view and not call.ended:
            size = min(self._http.local_flow_control_window(call.stream), self._http.max_outbound_frame_size)
            if size <= 0:
                self._flush(call)
                self._receive(call)
                continue
            self._http.send_data(call.stream, bytes(view[:size]))
            view = view[size:]
        self._flush(call)

    def _answers(self, call: _Call) -> Iterator[bytes]:
        while True:
            while (message := _take_message(call.received)) is not None:
                yield message
            if call.ended:
                break
            self._receive(call)
        if call.received and call.trailers.get("grpc-status") == "0":
            raise JobError(Code.INTERNAL, "the server's last message is cut short")

    def _receive(self, call: _Call) -> None:
        """Wait for the next bytes and take them in."""
        self._check_deadline(call)
        with self._explained():
            self._socket.settimeout(max(min(call.remaining_s(), SILENCE_S), 0.001))
            try:
                data = self._socket.recv(READ_BYTES)
            except TimeoutError:
                self._probe(call)
                return
        if not data:
            self.close()
            raise self._hung_up()
        self._probed = False
        self._take(data)
        self._flush(call)

    def _check_deadline(self, call: _Call) -> None:
        if call.remaining_s() <= 0:
            raise JobError(Code.DEADLINE_EXCEEDED, f"no answer from {self._address} within {call.timeout_s:g} s")

    def _probe(self, call: _Call) -> None:
        if call.remaining_s() <= 0:
            return
        if self._probed:
            self.close()
            raise _unavailable(BROKEN, f"{self._address} is silent since {2 * SILENCE_S:g} s")
        self._probed = True
        self._http.ping(b"osqbox..")
        self._flush(call)

    def _take(self, data: bytes) -> None:
        try:
            happened = self._http.receive_data(data)
        except ProtocolError as error:
            self.close()
            raise _unavailable(BROKEN, f"{self._address} broke the rules of HTTP/2: {error}") from None
        self.has_heard = True
        for event in happened:
            self._apply(event)

    def _apply(self, event: events.Event) -> None:
        if isinstance(event, events.ConnectionTerminated):
            self._going_away()
        call = self._call
        if call is None or getattr(event, "stream_id", None) != call.stream:
            return
        if isinstance(event, events.ResponseReceived):
            call.headers = _words(event.headers)
        elif isinstance(event, events.DataReceived):
            if call.headers.get("content-type", "").startswith("application/grpc"):
                call.received += event.data
            self._http.acknowledge_received_data(event.flow_controlled_length, call.stream)
        elif isinstance(event, events.TrailersReceived):
            call.trailers = _words(event.headers)
        elif isinstance(event, events.StreamEnded):
            call.ended = True
        elif isinstance(event, events.StreamReset) and not call.ended:  # after the end it only says: stop sending
            call.ended = True
            code = _OF_RESET.get(int(event.error_code), Code.INTERNAL)
            raise JobError(code, f"{self._address} broke the call off: HTTP/2 error {int(event.error_code)}")

    def _going_away(self) -> None:
        """h2 takes nothing in after GOAWAY, so a call that is not over is lost with the connection."""
        if self._call is None or not self._call.ended:
            self.close()
            raise _unavailable(BROKEN, f"{self._address} is shutting down")

    def _flush(self, call: _Call) -> None:
        if data := self._http.data_to_send():
            with self._explained():
                self._socket.settimeout(max(min(call.remaining_s(), 2 * SILENCE_S), 0.001))
                try:
                    self._socket.sendall(data)
                except TimeoutError:  # what was sent of it is not known
                    self.close()
                    self._check_deadline(call)
                    raise

    def _cancel(self, call: _Call) -> None:
        if self._socket.fileno() >= 0:
            with suppress(JobError, ProtocolError):
                self._http.reset_stream(call.stream, 8)
                self._flush(_Call(call.stream, time.monotonic() + 1.0, 1.0))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong on the way, in words, and whether it may pass."""
        try:
            yield
        except OSError as error:
            if hasattr(self, "_socket"):
                self._socket.close()
            raise self._in_words(error) from None

    def _hung_up(self) -> JobError:
        if self.has_heard or not hasattr(self, "_socket"):
            return _unavailable(BROKEN, f"{self._address} closed the connection")
        why = "it may not accept our certificate, or be stopping"
        return _unavailable(UNWELCOME, f"{self._address} closed the connection without a word: {why}")

    def _in_words(self, error: OSError) -> JobError:
        where = self._address
        match error:
            case ssl.SSLCertVerificationError():
                return _unavailable(UNTRUSTED, f"the certificate of {where} is not trusted: {error.verify_message}")
            case ssl.SSLError() if _is_about_certificates(error):
                why = _why(error).removeprefix("tlsv13 ").removeprefix("tlsv1 ").removeprefix("sslv3 ")
                return _unavailable(REFUSED_CERTIFICATE, f"{where} refused our certificate: {why}")
            case ssl.SSLError() if "VERSION" in (error.reason or ""):
                return _unavailable(UNTRUSTED, f"{where} does not speak TLS 1.3")
            case ssl.SSLEOFError() | ConnectionResetError() | BrokenPipeError():
                return self._hung_up()
            case ssl.SSLError() if error.reason:
                return _unavailable(UNTRUSTED, f"no TLS with {where}: {_why(error)}")
            case TimeoutError():
                return _unavailable(UNREACHABLE, f"{where} does not answer")
            case ConnectionRefusedError():
                return _unavailable(UNREACHABLE, f"nothing answers at {where}")
            case socket.gaierror():
                return _unavailable(UNTRUSTED, f"no address for {where.host!r}: {error.strerror}")
        return _unavailable(BROKEN, f"no connection to {where}: {error.strerror or error}")


def _is_about_certificates(error: ssl.SSLError) -> bool:
    reason = error.reason or ""
    return "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS)


def _unavailable(reason: str, message: str) -> JobError:
    return JobError(Code.UNAVAILABLE, message, reason=reason)


def _words(headers: Iterable[tuple[object, object]]) -> dict[str, str]:
    return {str(name): str(value) for name, value in headers}


def _take_message(received: bytearray) -> bytes | None:
    """The first whole message, taken out of what came; None while there is none."""
    if len(received) < 5:
        return None
    compressed, size = received[0], int.from_bytes(received[1:5], "big")
    if compressed:
        raise JobError(Code.INTERNAL, "expected a plain message, got a compressed one")
    if size > MESSAGE_BYTES:
        raise JobError(
            Code.INTERNAL, f"expected a message of at most {MESSAGE_BYTES} bytes, got {size} bytes", reason=TOO_LARGE
        )
    if len(received) < 5 + size:
        return None
    message = bytes(received[5 : 5 + size])
    del received[: 5 + size]
    return message


def _grpc_timeout(seconds: float) -> str:
    """At most eight digits and a unit."""
    milliseconds = max(1, round(seconds * 1000))
    return f"{milliseconds}m" if milliseconds < 10**8 else f"{min(round(seconds), 10**8 - 1)}S"


def _check_status(call: _Call) -> None:
    """Raises JobError unless the server said OK."""
    trailers = call.trailers or call.headers
    status = trailers.get("grpc-status", "")
    if not status.isdecimal():
        http = int(call.headers.get(":status", "0"))
        code = _OF_HTTP.get(http, Code.INTERNAL)
        raise JobError(code, f"expected a gRPC answer, got HTTP {http} without a grpc-status")
    if int(status):
        message = unquote(trailers.get("grpc-message", ""), errors="replace")
        raise status_error(int(status), message, trailers.get("grpc-status-details-bin", ""))
