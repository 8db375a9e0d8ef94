"""The client against real sockets: what is sent, what comes back, and what is said when it goes wrong."""

from __future__ import annotations

import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from osqbox.client import Client, at
from osqbox.errors import BadSetup, BadUsage, NotInTime, UserError

TOKEN = "very-secret-token"


class Peer:
    """A server for one connection at a time that answers each request with the next of some bytes."""

    def __init__(self, answers: list[bytes], context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._answers = answers
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                try:
                    stream = self._context.wrap_socket(connection, server_side=True) if self._context else connection
                    self.requests.append(_read_request(stream))
                    stream.sendall(answer)
                    stream.shutdown(socket.SHUT_WR)
                    stream.close()
                except OSError:
                    pass


def _read_request(stream: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += stream.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
    )
    while len(body) < length:
        body += stream.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def peer(*answers: bytes, context: ssl.SSLContext | None = None) -> Iterator[Peer]:
    server = Peer(list(answers), context)
    try:
        yield server
    finally:
        server.close()


def answer(body: bytes, status: str = "200 OK", head: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + end


def client(server: Peer, timeout_s: float = 10) -> Client:
    return Client(f"http://127.0.0.1:{server.port}", TOKEN, timeout_s)


def test_get_sends_the_token_only_in_its_header() -> None:
    """A token in a URL would end in logs."""
    with peer(answer(b'{"a": 1}')) as server:
        assert client(server).get("nodes", tag="web front", tenant=None, public=True, node=["a", "b"]) == {"a": 1}
    head = server.requests[0].split(b"\r\n")
    assert head[0] == b"GET /api/v1/nodes?tag=web+front&public=1&node=a&node=b HTTP/1.1"
    assert f"Authorization: Bearer {TOKEN}".encode() in head
    assert server.requests[0].count(TOKEN.encode()) == 1


@pytest.mark.parametrize(
    ("call", "first_line", "content_type", "body"),
    [
        (lambda c: c.post("stop"), b"POST /api/v1/stop HTTP/1.1", b"application/json", b"{}"),
        (lambda c: c.post("/x", {"sql": "ü"}), b"POST /x HTTP/1.1", b"application/json", b'{"sql": "\\u00fc"}'),
        (lambda c: c.put("yara/r", "rule ü"), b"PUT /api/v1/yara/r HTTP/1.1", b"text/plain", "rule ü".encode()),
        (lambda c: c.patch("nodes/n", {"tags": []}), b"PATCH /api/v1/nodes/n HTTP/1.1", b"json", b'{"tags": []}'),
    ],
)
def test_bodies(call: Callable[[Client], object], first_line: bytes, content_type: bytes, body: bytes) -> None:
    """Text goes as text, everything else as JSON."""
    with peer(answer(b"{}")) as server:
        call(client(server))
    head, _, sent = server.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == first_line
    assert content_type in next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-type"))
    assert sent == body


def test_at_keeps_each_word_in_one_piece() -> None:
    """A host name cannot become another path."""
    assert at("nodes", "web/../01 ü", "config") == "nodes/web%2F..%2F01%20%C3%BC/config"
    for word in ("", ".", ".."):
        with pytest.raises(BadUsage, match="expected a name or an id"):
            at("nodes", word)


@pytest.mark.parametrize(
    ("status", "kind"), [("400 X", BadUsage), ("404 X", BadUsage), ("409 X", UserError), ("500 X", UserError)]
)
def test_a_refusal_keeps_its_words_and_hint(status: str, kind: type[UserError]) -> None:
    """What the box says is what the person reads."""
    body = b'{"error": "no node \'x\'", "reason": "no_node", "hint": "osqbox nodes"}'
    with peer(answer(body, status)) as server, pytest.raises(UserError) as caught:
        client(server).get("nodes/x")
    assert (type(caught.value), str(caught.value), caught.value.hint) == (kind, "no node 'x'", "osqbox nodes")


def test_problems_of_a_config_are_listed() -> None:
    """A refused config says every reason at once."""
    body = b'{"error": "bad", "problems": [{"path": "schedule.q", "severity": "error", "message": "no such table"}]}'
    with peer(answer(body, "400 Bad")) as server, pytest.raises(BadUsage) as caught:
        client(server).put("configs/a", {})
    assert str(caught.value) == "bad\n  error: schedule.q: no such table"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"other": 1}', b'"x"', b"\xff"])
def test_a_stranger_is_named_as_one(body: bytes) -> None:
    """Another program on that port is not reported as a box."""
    with peer(answer(body, "404 Not Found")) as server, pytest.raises(UserError, match="expected an osqbox at"):
        client(server).get("nodes")
    with peer(answer(b"<html>")) as server, pytest.raises(UserError, match="expected JSON"):
        client(server).get("nodes")


def test_an_early_refusal_of_a_large_body_is_read() -> None:
    """A box that refuses half-way has said why."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer(b'{"error": "too large", "reason": "large", "hint": null}', "413 X"))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

    thread = threading.Thread(target=refuse)
    thread.start()
    try:
        with pytest.raises(UserError, match="too large"):
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN).put("yara/r", "x" * 20_000_000)
    finally:
        thread.join()
        listener.close()


def test_lines_come_one_by_one_and_blank_ones_are_skipped() -> None:
    """A chunk may hold half a line or several; a blank line keeps a quiet stream alive."""
    with peer(chunked(b'{"a"', b': 1}\n\n{"a": 2}\n', b'{"a": 3}\n')) as server:
        assert list(client(server).lines("logs", limit=3)) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_line_is_there_before_the_next_is_sent() -> None:
    """Rows show as hosts answer, not when all have."""
    listener = socket.create_server(("127.0.0.1", 0))
    go_on = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            _read_request(connection)
            connection.sendall(chunked(b'{"a": 1}\n', end=b""))
            assert go_on.wait(10)
            connection.sendall(b'9\r\n{"a": 2}\n\r\n0\r\n\r\n')

    thread = threading.Thread(target=serve)
    thread.start()
    stream = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN, timeout_s=5).lines("x")
    assert next(stream) == {"a": 1}
    go_on.set()
    assert list(stream) == [{"a": 2}]
    thread.join()
    listener.close()


def test_a_stream_that_breaks_off_is_an_error() -> None:
    """Half an answer is not taken for a whole one."""
    with peer(chunked(b'{"a": 1}\n', end=b"")) as server:
        stream = client(server).lines("logs")
        assert next(stream) == {"a": 1}
        with pytest.raises(UserError, match="broke off"):
            next(stream)


def test_events_with_a_gap() -> None:
    """Comments are skipped, ids ignored, and what was missed is told."""
    sent = (
        b': hello\n\nid: 5\nevent: node_enrolled\ndata: {"seq": 5, "kind": "node_enrolled"}\n\n'
        b': 15 s\n\nevent: gap\r\ndata: {"missed": 3}\r\n\r\ndata: {"kind":\ndata: "x"}\n\n'
    )
    with peer(chunked(sent)) as server:
        events = list(client(server).events(after=4, tenant="t"))
    assert events == [{"seq": 5, "kind": "node_enrolled"}, {"kind": "gap", "missed": 3}, {"kind": "x"}]
    assert server.requests[0].startswith(b"GET /api/v1/stream?after=4&tenant=t ")


def test_download_copies_every_byte() -> None:
    """Whichever way the length is told."""
    data = bytes(range(256)) * 4000
    with peer(answer(data), chunked(data[:1000], data[1000:])) as server:
        for _ in range(2):
            target = io.BytesIO()
            assert client(server).download("carves/c/archive", target) == len(data)
            assert target.getvalue() == data


def test_a_short_download_is_an_error() -> None:
    """A broken archive is not left as a good one."""
    short = answer(b"12345").replace(b"Content-Length: 5", b"Content-Length: 9")
    with peer(short) as server, pytest.raises(UserError, match="broke off"):
        client(server).download("x", io.BytesIO())


def test_an_error_of_the_file_is_not_blamed_on_the_box() -> None:
    """A full disk says so."""

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    with peer(answer(b"12345")) as server, pytest.raises(OSError, match="No space"):
        client(server).download("x", Full())


def test_nobody_there() -> None:
    """The hint is the command that starts a box."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="nothing answers at") as caught:
        Client(f"http://127.0.0.1:{port}", TOKEN).get("info")
    assert caught.value.hint == "osqbox serve"
    assert not Client(f"http://127.0.0.1:{port}", TOKEN).is_up()


def test_a_silent_box_is_given_up() -> None:
    """With the exit code of waiting in vain."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NotInTime, match=r"within 0\.05 s"):
        Client(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, timeout_s=0.05).get("info")


@pytest.mark.parametrize("garbage", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_garbage_instead_of_http(garbage: bytes) -> None:
    """One error in words, never a traceback."""
    with peer(garbage) as server, pytest.raises(UserError, match=r"broke off|expected"):
        client(server).get("info")


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://h", "http://", "http://u:p@h:1", "http://h:99999"])
def test_a_url_that_is_none(url: str) -> None:
    """Said before anything is sent, without repeating what may hold a password."""
    with pytest.raises(BadUsage, match="URL") as caught:
        Client(url, TOKEN)
    assert "u:p" not in str(caught.value)


def test_a_token_that_no_header_can_hold_is_not_quoted() -> None:
    """The standard library would put it into its error."""
    with pytest.raises(BadUsage) as caught:
        Client("http://127.0.0.1:1", "secret\r\nX: y")
    assert "secret" not in str(caught.value)


def test_https_trusts_the_given_ca_only(tmp_path: Path) -> None:
    """A stranger's certificate is refused before the token is sent."""
    ours, theirs = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert("127.0.0.1").configure_cert(context)
    for name, ca in (("ours", ours), ("theirs", theirs)):
        ca.cert_pem.write_to_path(str(tmp_path / name))
    with peer(answer(b'{"a": 1}'), answer(b"{}"), context=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        assert Client(url, TOKEN, ca_file=tmp_path / "ours").get("info") == {"a": 1}
        with pytest.raises(UserError, match="not trusted"):
            Client(url, TOKEN, ca_file=tmp_path / "theirs").get("info")
    assert len(server.requests) == 1
    with pytest.raises(BadSetup, match="cannot be used"):
        Client("https://127.0.0.1:1", TOKEN, ca_file=tmp_path / "none")
