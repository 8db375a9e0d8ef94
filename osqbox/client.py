"""A small blocking client of the operator API, on the standard library alone so that a verb starts at once.

One connection per request; the token travels in a header and is never part of a URL or a message.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from osqbox.errors import BadSetup, BadUsage, NotInTime, UserError

API = "/api/v1/"
ANSWER_BYTES = 512 * 1024 * 1024
"""The largest answer read into memory."""
LINE_BYTES = 256 * 1024 * 1024
"""The longest line of a stream: one host's answer to a query."""
COPY_BYTES = 256 * 1024
CANNOT_GET_TO = "osqbox doctor"


class _Upload(NamedTuple):
    """A body that is read from a file while it is sent."""

    file: BinaryIO
    size_bytes: int


def at(*words: str | int) -> str:
    """A path from its words, each kept in one piece: ``at("nodes", "web/01")`` is ``nodes/web%2F01``.

    Raises BadUsage for a word that would mean another path.
    """
    for word in words:
        if word in ("", ".", ".."):
            raise BadUsage(f"expected a name or an id, got {word!r}")
    return "/".join(quote(str(word), safe="", errors="surrogateescape") for word in words)


class Client:
    """Talks to one box.

    Paths are relative to ``/api/v1/`` unless they start with a slash. Parameters that are None are left out,
    booleans become 1 and 0, lists are repeated. Everything raises UserError: with BadUsage when the API says that
    what was asked for is wrong or unknown, NotInTime when it does not answer within ``timeout_s``.
    """

    def __init__(
        self, url: str, token: str | None, timeout_s: float = 30.0, *, ca_file: str | Path | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise BadUsage("expected the box's URL as http://HOST:PORT", hint="osqbox status")
        # http.client would quote a bad header value in its error.
        if token is not None and not (token.isascii() and token.isprintable()):
            raise BadUsage("expected a token of printable ASCII characters")
        try:
            self._port = parts.port
        except ValueError as error:
            raise BadUsage(f"expected the box's URL as http://HOST:PORT, got a bad port: {error}") from None
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.timeout_s = timeout_s
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")
        self.token = token
        self._context = _tls_context(ca_file) if parts.scheme == "https" else None

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, None, params)

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        return self._call("POST", path, {} if body is None else body, params)

    def put(self, path: str, body: Any, **params: Any) -> Any:
        """``body``: text goes as ``text/plain``, anything else as JSON."""
        return self._call("PUT", path, body, params)

    def upload(self, path: str, file: BinaryIO, size_bytes: int, **params: Any) -> Any:
        """PUT what is left to read of ``file``, which must be ``size_bytes``."""
        return self._call("PUT", path, _Upload(file, size_bytes), params)

    def patch(self, path: str, body: Any, **params: Any) -> Any:
        return self._call("PATCH", path, body, params)

    def delete(self, path: str, **params: Any) -> Any:
        return self._call("DELETE", path, None, params)

    def lines(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """The objects of an NDJSON answer as they arrive; waits as long as the box keeps the answer open."""
        with self._open("GET", path, None, params, stream=True) as response:
            for line in self._lines(response):
                if line.strip():
                    yield _decode(line)

    def events(self, after: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """Events of the feed from now on, or after a sequence number, for as long as the caller wants them.

        Events that are gone show as ``{"kind": "gap", "missed": n}``.
        """
        with self._open("GET", "stream", None, {"after": after, **params}, stream=True) as response:
            kind, data = "", b""
            for line in self._lines(response):
                name, _, value = line.rstrip(b"\r").partition(b":")
                value = value.removeprefix(b" ")
                if name == b"event":
                    kind = value.decode(errors="replace")
                elif name == b"data":
                    data += value
                elif not line.strip():
                    if data:
                        yield {"kind": kind, **_decode(data)}
                    kind, data = "", b""

    def download(self, path: str, file: IO[bytes], **params: Any) -> int:
        """Copy an answer's body to ``file``; returns its bytes. Raises UserError when it ends too early."""
        with self._open("GET", path, None, params) as response:
            expected, copied = response.length, 0
            while chunk := self._read(response.read1, COPY_BYTES):
                file.write(chunk)
                copied += len(chunk)
        if expected is not None and copied != expected:
            raise UserError(f"the download broke off after {copied} of {expected} bytes; try again")
        return copied

    def is_up(self, path: str = "/readyz") -> bool:
        """Whether the box answers that path with 200; False also when nothing answers."""
        try:
            with self._open("GET", path, None, {}):
                return True
        except UserError:
            return False

    def _call(self, method: str, path: str, body: Any, params: dict[str, Any]) -> Any:
        with self._open(method, path, body, params) as response:
            text = self._read(response.read, ANSWER_BYTES)
        return None if response.status == http.client.NO_CONTENT else _decode(text)

    @contextmanager
    def _open(
        self, method: str, path: str, body: Any, params: dict[str, Any], *, stream: bool = False
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            with self._explained():
                with suppress(BrokenPipeError):  # refused before it was all sent: the answer says why
                    connection.request(method, self._target(path, params), *self._payload(body))
                sock = connection.sock
                response = connection.getresponse()
            with response:
                if response.status >= 300:
                    raise self._refused(response)
                if stream:
                    sock.settimeout(None)
                yield response
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=self.timeout_s, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=self.timeout_s)

    def _target(self, path: str, params: dict[str, Any]) -> str:
        pairs = [
            (name, int(value) if isinstance(value, bool) else value)
            for name, given in params.items()
            for value in (given if isinstance(given, list | tuple) else [given])
            if value is not None
        ]
        path = path if path.startswith("/") else API + path
        return f"{self._prefix}{path}" + (f"?{urlencode(pairs, errors='surrogateescape')}" if pairs else "")

    def _payload(self, body: Any) -> tuple[bytes | BinaryIO | None, dict[str, str]]:
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        if body is None:
            return None, headers
        if isinstance(body, _Upload):
            length = {"Content-Length": str(body.size_bytes), "Content-Type": "application/octet-stream"}
            return body.file, {**headers, **length}
        if isinstance(body, str):
            return body.encode(), {**headers, "Content-Type": "text/plain; charset=utf-8"}
        return json.dumps(body).encode(), {**headers, "Content-Type": "application/json"}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong on the way, in words."""
        try:
            yield
        except ConnectionRefusedError:
            raise UserError(f"nothing answers at {self.url}", hint="osqbox serve") from None
        except TimeoutError:
            raise NotInTime(f"no answer from {self.url} within {self.timeout_s:g} s", hint=CANNOT_GET_TO) from None
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"the certificate at {self.url} is not trusted: {error.verify_message}",
                hint="OSQBOX_CA_FILE=ca.pem osqbox ...",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            what = str(error) or type(error).__name__
            raise UserError(f"the connection to {self.url} broke off: {what}", hint=CANNOT_GET_TO) from None

    def _read(self, read: Callable[[int], bytes], limit_bytes: int) -> bytes:
        with self._explained():
            return read(limit_bytes)

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Lines without their ends. Not `readline`, which takes a connection that broke off for the end."""
        pending = bytearray()
        while chunk := self._read(response.read1, COPY_BYTES):
            head, *more = chunk.split(b"\n")
            pending += head
            for part in more:
                yield bytes(pending)
                pending = bytearray(part)
            if len(pending) > LINE_BYTES:
                raise UserError(f"expected lines of at most {LINE_BYTES} bytes, got a longer one")
        if pending:
            yield bytes(pending)

    def _refused(self, response: http.client.HTTPResponse) -> UserError:
        try:
            answer = json.loads(self._read(response.read, ANSWER_BYTES))
            message, hint = str(answer["error"]), answer.get("hint")
            problems = [_problem(each) for each in answer.get("problems") or ()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return UserError(
                f"expected an osqbox at {self.url}, got HTTP {response.status} without a reason", hint=CANNOT_GET_TO
            )
        if response.status == 401 and hint is None:
            hint = "unset OSQBOX_URL OSQBOX_TOKEN, or take them from: osqbox env"
        kind = BadUsage if response.status in (400, 404) else UserError
        return kind("\n  ".join([message, *problems]), hint=hint)


def _tls_context(ca_file: str | Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise BadSetup(f"the CA file {ca_file} cannot be used: {error.strerror or error}") from None


def _problem(problem: Any) -> str:
    if not isinstance(problem, dict):
        return str(problem)
    place = problem.get("path") or "config"
    return f"{problem.get('severity', 'error')}: {place}: {problem.get('message', '')}"


def _decode(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"expected JSON from the box, got {text[:60]!r}", hint=CANNOT_GET_TO) from None
