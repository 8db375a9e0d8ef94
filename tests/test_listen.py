"""The inline path: HTTP/1.x of agents over real sockets. No test waits for time to pass, except for deadlines."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket
import trustme

from osqbox.errors import AddressInUse, BadSetup
from osqbox.exchange import Peer, Request, Response
from osqbox.listen import Limits, Listener, agents_asgi, current_peer, server_context, sockets
from osqbox.listen.inline import response_bytes

GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSING_GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Pki:
    """A CA, the server's files and a client's view of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        self.cert_file, self.key_file = self.issue("server", "localhost", "127.0.0.1", "::1")

    def issue(self, file: str, *names: str, common_name: str | None = None) -> tuple[Path, Path]:
        issued = self.ca.issue_cert(*names, common_name=common_name)
        cert_file, key_file = self.folder / f"{file}.crt", self.folder / f"{file}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert_file))
        issued.private_key_pem.write_to_path(str(key_file))
        return cert_file, key_file

    def server(self, **options: Any) -> ssl.SSLContext:
        return server_context(self.cert_file, self.key_file, client_ca_file=self.ca_file, **options)

    def client(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


Answer = Callable[[Request], Awaitable[Response | None]]


class Recorder:
    """A handler that answers with what it was asked, unless told otherwise."""

    def __init__(self, answer: Answer | None = None, limit_bytes: int = 1_000_000) -> None:
        self.requests: list[Request] = []
        self._answer = answer
        self._limit_bytes = limit_bytes

    def body_limit_bytes(self, method: str, target: str) -> int:
        return self._limit_bytes

    async def answer(self, request: Request) -> Response | None:
        self.requests.append(request)
        if self._answer is not None:
            return await self._answer(request)
        return Response(json.dumps({"method": request.method, "size": len(request.body)}).encode())

    def refuse(
        self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None
    ) -> Response | None:
        if target == "/no-answer":
            return None
        return Response(json.dumps({"error": message, "reason": reason}).encode(), status=status)


class Served(Listener):
    """A listener that knows its test's clients, to close them at the end."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.clients: list[Client] = []

    def client(self, stream: Any) -> Client:
        self.clients.append(Client(stream))
        return self.clients[-1]


@contextlib.asynccontextmanager
async def serving(
    handler: Recorder,
    context: ssl.SSLContext | None,
    *,
    app: Any = None,
    check_peer: Callable[[Peer], str | None] | None = None,
    host: str = "127.0.0.1",
    **limits: Any,
) -> AsyncIterator[Served]:
    listener = Served(
        "agents", ssl_context=context, handler=handler, app=app, check_peer=check_peer, limits=Limits(**limits)
    )
    await listener.bind(host, 0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            try:
                yield listener
                await listener.drain()
            finally:
                for client in listener.clients:
                    await trio.aclose_forcefully(client.stream)
    assert listener.statistics().open_connections == 0


class Client:
    """Half-manual HTTP: sends bytes as given, reads one answer at a time."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError(self.buffer)
        self.buffer += data

    async def answer(self, *, bodiless: bool = False) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self.buffer:
            await self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        size = 0 if bodiless else int(headers.get("content-length", 0))
        while len(self.buffer) < size:
            await self._more()
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return int(lines[0].split(" ")[1]), headers, body

    async def ask(self, data: bytes) -> tuple[int, Any]:
        await self.send(data)
        status, _, body = await self.answer()
        return status, json.loads(body)

    async def rest(self) -> bytes:
        """Everything until the orderly end; a TLS stream cut without close_notify raises."""
        while True:
            try:
                await self._more()
            except EOFError:
                return self.buffer


async def connect(listener: Served, pki: Pki, context: ssl.SSLContext | None = None) -> Client:
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", listener.port, ssl_context=context or pki.client())
    await stream.do_handshake()
    return listener.client(stream)


async def connect_clear(listener: Served, host: str = "127.0.0.1") -> Client:
    return listener.client(await trio.open_tcp_stream(host, listener.port))


async def until(condition: Callable[[], bool]) -> None:
    """For effects on the other side of a socket, which no event announces."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario)


# requests and answers


def test_a_connection_is_kept_and_its_requests_are_answered_in_order(pki: Pki) -> None:
    handler = Recorder()

    async def scenario() -> None:
        async with serving(handler, pki.server()) as listener:
            client = await connect(listener, pki)
            for size in (0, 1, 5):
                post = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
                assert await client.ask(post) == (200, {"method": "POST", "size": size})
            await client.send(GET + GET + CLOSING_GET)
            for _ in range(2):
                status, headers, _ = await client.answer()
                assert (status, "connection" in headers) == (200, False)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.rest() == b""
            assert listener.statistics().accepted == 1
            assert listener.statistics().requests == 6

    run(scenario)


def test_the_handler_sees_the_request_as_sent_and_who_sent_it(pki: Pki) -> None:
    handler = Recorder()

    async def scenario() -> None:
        async with serving(handler, pki.server()) as listener:
            first, second = await connect(listener, pki), await connect(listener, pki)
            await first.ask(
                b"POST /a%20b?c=d HTTP/1.1\r\nHOST: x\r\nX-Two: 1\r\nx-two: 2\r\nContent-Length: 2\r\n\r\nhi"
            )
            await second.ask(GET)

    run(scenario)
    request, other = handler.requests
    assert (request.method, request.target, request.body) == ("POST", "/a%20b?c=d", b"hi")
    assert request.headers == {"host": "x", "x-two": "2", "content-length": "2"}
    assert (request.peer.address, request.peer.tls_version) == ("127.0.0.1", "TLSv1.3")
    assert request.peer.certificate_name is None
    assert request.peer.connection != other.peer.connection


def test_a_clear_listener_serves_the_same_way(pki: Pki) -> None:
    handler = Recorder()

    async def scenario() -> None:
        async with serving(handler, None) as listener:
            client = await connect_clear(listener)
            assert (await client.ask(GET))[0] == 200
            assert handler.requests[0].peer.tls_version is None

    run(scenario)


def test_an_answer_leaves_in_one_piece_with_a_length(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(GET)
            piece = bytes(await client.stream.receive_some(65536))  # one TLS record
            head, _, body = piece.partition(b"\r\n\r\n")
            assert b"content-length: %d" % len(body) in head
            assert json.loads(body)["method"] == "GET"

    run(scenario)


def test_head_gets_the_length_and_no_body(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(GET.replace(b"GET", b"HEAD"))
            _, headers, _ = await client.answer(bodiless=True)
            assert headers["content-length"] == str(len('{"method": "HEAD", "size": 0}'))
            assert (await client.ask(GET))[0] == 200  # nothing left over from before

    run(scenario)


def test_http_1_0_is_answered_and_closed(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            client = await connect(listener, pki)
            assert (await client.ask(b"GET / HTTP/1.0\r\n\r\n"))[0] == 200
            assert await client.rest() == b""

    run(scenario)


def test_the_handler_may_ask_to_close(pki: Pki) -> None:
    async def answer(request: Request) -> Response:
        return Response(b"{}", status=401, headers=(("www-authenticate", "Bearer"),), close=True)

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(GET)
            status, headers, _ = await client.answer()
            assert (status, headers["www-authenticate"], headers["connection"]) == (401, "Bearer", "close")
            assert await client.rest() == b""

    run(scenario)


REQUESTS = [
    pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\nhello world", 11, id="length"),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nT: v\r\n\r\n",
        11,
        id="chunked",
    ),
    pytest.param(b"PUT /x HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", 0, id="h2c ignored"),
]


@pytest.mark.parametrize(("raw", "size"), REQUESTS)
def test_requests_are_read_whole_byte_by_byte_and_with_a_tail(pki: Pki, raw: bytes, size: int) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), None) as listener:
            client = await connect_clear(listener)
            assert (await client.ask(raw))[1]["size"] == size
            client = await connect_clear(listener)
            for position in range(len(raw)):
                await client.send(raw[position : position + 1])
                await trio.lowlevel.checkpoint()
            status, _, body = await client.answer()
            assert (status, json.loads(body)["size"]) == (200, size)
            if b"Upgrade" not in raw:
                client = await connect_clear(listener)
                assert (await client.ask(raw + GET))[1]["size"] == size
                assert (await client.answer())[0] == 200

    run(scenario)


def test_a_large_body_arrives_unchanged(pki: Pki) -> None:
    handler = Recorder(limit_bytes=3_000_000)
    body = bytes(range(256)) * 8192

    async def scenario() -> None:
        async with serving(handler, pki.server()) as listener:
            client = await connect(listener, pki)
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
            assert (await client.ask(head + body))[0] == 200
            assert listener._shared.body_budget.held_bytes == 0

    run(scenario)
    assert handler.requests[0].body == body


def test_expect_100_continue_is_answered_before_the_body(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert (await client.answer())[0] == 100
            assert (await client.ask(b"ok"))[0] == 200
            # a client that does not wait gets no interim answer
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok")
            assert (await client.answer())[0] == 200

    run(scenario)


# refusals: always JSON with a length, then an orderly end

BAD = [
    pytest.param(b"\x00\x01garbage\r\n\r\n", 400, "bad_request", id="garbage"),
    pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request", id="no host"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_request", id="two hosts"),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        400,
        "bad_request",
        id="two lengths",
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "bad_request",
        id="length and chunked",
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc", 400, "bad_request", id="space in name"
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400, "bad_request", id="bad chunk"
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "transfer_encoding", id="coding"
    ),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000, 431, "header_too_large", id="long head"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version", id="h2 prior knowledge"),
    pytest.param(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405, "method_connect", id="proxy"),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n", 413, "body_too_large", id="413 by length"
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n",
        413,
        "body_too_large",
        id="413 instead of 100",
    ),
    pytest.param(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n",
        413,
        "body_too_large",
        id="413 by count",
    ),
]


@pytest.mark.parametrize(("raw", "status", "reason"), BAD)
def test_what_is_not_served_is_refused_as_json_and_closed(pki: Pki, raw: bytes, status: int, reason: str) -> None:
    handler = Recorder(limit_bytes=100)

    async def scenario() -> None:
        async with serving(handler, pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(raw)
            got, headers, body = await client.answer()
            assert (got, json.loads(body)["reason"], headers["connection"]) == (status, reason, "close")
            assert headers["content-type"] == "application/json"
            await client.stream.aclose()
            assert listener.statistics().refused == {reason: 1}
            assert (await (await connect(listener, pki)).ask(GET))[0] == 200
            assert listener.statistics().errors == 0

    run(scenario)
    assert [request.target for request in handler.requests] == ["/hello"]


def test_a_refusal_reaches_a_client_that_is_still_sending(pki: Pki) -> None:
    """Closing with unread data resets the connection, which would destroy the answer on its way."""

    async def scenario() -> None:
        async with serving(Recorder(limit_bytes=100), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\n\r\n" + b"x" * 8_000_000)
            assert (await client.answer())[0] == 413

    run(scenario)


def test_a_handler_may_refuse_by_silence(pki: Pki) -> None:
    """As carve blocks need: any JSON answer to a block reads as accepted."""

    async def scenario() -> None:
        async with serving(Recorder(limit_bytes=1), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(b"POST /no-answer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
            assert await client.rest() == b""
            assert listener.statistics().refused == {"body_too_large": 1}

    run(scenario)


def test_none_drops_the_connection_without_an_answer(pki: Pki) -> None:
    async def answer(request: Request) -> None:
        return None

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(GET)
            assert await client.rest() == b""
            assert listener.statistics().dropped == 1

    run(scenario)


def test_a_failing_handler_answers_500_without_its_text_and_goes_on(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def answer(request: Request) -> Response:
        raise ValueError("secret")

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            client = await connect(listener, pki)
            for _ in range(2):
                status, body = await client.ask(GET)
                assert (status, body["reason"]) == (500, "internal_error")
            assert listener.statistics().errors == 2

    run(scenario)
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_an_exception_ends_its_own_connection_only(pki: Pki) -> None:
    class Broken(Recorder):
        def body_limit_bytes(self, method: str, target: str) -> int:
            if target == "/broken":
                raise ValueError("secret")
            return 0

    async def scenario() -> None:
        async with serving(Broken(), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await client.rest() == b""
            assert (await (await connect(listener, pki)).ask(GET))[0] == 200
            assert listener.statistics().errors == 1

    run(scenario)


def test_a_header_cannot_break_out_of_its_line() -> None:
    with pytest.raises(ValueError, match="line break"):
        response_bytes(Response(b"", headers=(("location", "/\r\nset-cookie: a"),)), "now", head_only=False, keep=True)


def test_no_content_has_no_length() -> None:
    assert b"content-length" not in response_bytes(Response(b"", status=204), "now", head_only=False, keep=True)


# time


def test_a_silent_connection_is_closed_without_a_word(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server(), header_timeout_s=0.05) as listener:
            client = await connect(listener, pki)
            assert await client.rest() == b""
            assert listener.statistics().refused == {}

    run(scenario)


def test_a_head_or_body_that_does_not_come_in_time_gets_408(pki: Pki) -> None:
    async def scenario() -> None:
        limits = {"header_timeout_s": 0.05, "body_timeout_s": 0.05}
        async with serving(Recorder(), pki.server(), **limits) as listener:
            for start, reason in (
                (b"GET / HT", "header_timeout"),
                (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf", "body_timeout"),
            ):
                client = await connect(listener, pki)
                await client.send(start)
                status, _, body = await client.answer()
                assert (status, json.loads(body)["reason"]) == (408, reason)
                await client.stream.aclose()
            assert listener.statistics().refused == {"header_timeout": 1, "body_timeout": 1}
            assert (await (await connect(listener, pki)).ask(GET))[0] == 200

    run(scenario)


def test_a_dripping_head_has_one_deadline(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), None, header_timeout_s=0.1) as listener:
            client = await connect_clear(listener)
            async with trio.open_nursery() as nursery:

                async def drip() -> None:
                    with contextlib.suppress(trio.BrokenResourceError):
                        while True:
                            await client.send(b"x")
                            await trio.sleep(0.02)

                nursery.start_soon(drip)
                assert (await client.answer())[0] == 408
                nursery.cancel_scope.cancel()

    run(scenario)


def test_an_idle_connection_ends_after_the_keep_alive_time(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server(), keep_alive_timeout_s=0.05) as listener:
            client = await connect(listener, pki)
            assert (await client.ask(GET))[0] == 200
            assert await client.rest() == b""  # with close_notify: else this would raise

    run(scenario)


def test_a_held_request_is_not_subject_to_any_read_deadline(pki: Pki) -> None:
    async def answer(request: Request) -> Response:
        await trio.sleep(0.2)
        return Response(b"{}")

    async def scenario() -> None:
        short = {
            "keep_alive_timeout_s": 0.05,
            "header_timeout_s": 0.05,
            "body_timeout_s": 0.05,
            "write_timeout_s": 0.05,
        }
        async with serving(Recorder(answer), pki.server(), **short) as listener:
            client = await connect(listener, pki)
            assert (await client.ask(GET))[0] == 200

    run(scenario)


def test_a_stalled_reader_is_cut_off_and_a_slow_one_is_not(pki: Pki) -> None:
    async def answer(request: Request) -> Response:
        return Response(b"x" * 30_000_000)

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server(), write_timeout_s=0.3) as listener:
            stalled, slow = await connect(listener, pki), await connect(listener, pki)
            await stalled.send(GET)
            await slow.send(GET)
            began = trio.current_time()
            size = 0
            while size < 30_000_000:
                size += len(await slow.stream.receive_some(65536))
                await trio.sleep(0.002)
            assert trio.current_time() - began > 0.3
            await until(lambda: listener.statistics().open_connections == 1)
            with pytest.raises(trio.BrokenResourceError):  # cut off in the middle, so without close_notify
                await stalled.rest()

    run(scenario)


# held requests


def test_wait_gone_returns_when_the_client_leaves(pki: Pki) -> None:
    held, left = trio.Event(), trio.Event()

    async def answer(request: Request) -> Response:
        held.set()
        await request.wait_gone()
        left.set()
        return Response(b"{}")

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            for forcefully in (False, True):
                client = await connect(listener, pki)
                await client.send(GET)
                await held.wait()
                if forcefully:
                    await trio.aclose_forcefully(client.stream)
                else:
                    await client.stream.aclose()
                await left.wait()
            await until(lambda: listener.statistics().open_connections == 0)
            assert listener.statistics().errors == 0

    run(scenario)


def test_what_arrives_while_a_request_is_held_is_served_after_it(pki: Pki) -> None:
    release = trio.Event()

    async def answer(request: Request) -> Response:
        if request.target == "/hold":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(request.wait_gone)
                await release.wait()
                nursery.cancel_scope.cancel()
        return Response(json.dumps(request.target).encode())

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            client = await connect(listener, pki)
            await client.send(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
            await client.send(GET[:9])
            await trio.testing.wait_all_tasks_blocked(0.01)
            await client.send(GET[9:] + b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked(0.01)
            release.set()
            bodies = [json.loads((await client.answer())[2]) for _ in range(3)]
            assert bodies == ["/hold", "/hello", "/last"]

    run(scenario)


def test_a_flood_behind_a_held_request_is_bounded_and_is_no_departure(pki: Pki) -> None:
    seen_gone = False
    kept_bytes: list[int] = []

    async def answer(request: Request) -> Response:
        nonlocal seen_gone
        with trio.move_on_after(0.2):
            await request.wait_gone()
            seen_gone = True
        kept_bytes.append(len(request.wait_gone.__self__._ahead))  # type: ignore[attr-defined]
        return Response(b"{}", close=True)

    async def scenario() -> None:
        async with serving(Recorder(answer), None) as listener:
            client = await connect_clear(listener)
            with trio.move_on_after(0.1):
                await client.send(GET * 1_000_000)
            assert (await client.answer())[0] == 200

    run(scenario)
    assert not seen_gone
    assert 65536 <= kept_bytes[0] < 3 * 65536


# peers, budgets, crowds


def test_the_certificate_makes_the_peer(pki: Pki) -> None:
    handler = Recorder()
    cert_file, key_file = pki.issue("device", "unused.example", common_name="device-7")

    async def scenario() -> None:
        async with serving(handler, pki.server(client_auth="required")) as listener:
            context = pki.client()
            context.load_cert_chain(cert_file, key_file)
            assert (await (await connect(listener, pki, context)).ask(GET))[0] == 200

    run(scenario)
    peer = handler.requests[0].peer
    assert peer.certificate_name == "device-7"
    assert peer.certificate_serial is not None


def test_a_revoked_peer_is_closed_at_once_and_refused_on_an_open_connection(pki: Pki) -> None:
    revoked: list[str] = []

    async def scenario() -> None:
        check = lambda peer: revoked[0] if revoked else None  # noqa: E731
        async with serving(Recorder(), pki.server(), check_peer=check) as listener:
            client = await connect(listener, pki)
            assert (await client.ask(GET))[0] == 200
            revoked.append("certificate_revoked")
            assert await client.ask(GET) == (403, {"error": revoked[0], "reason": "certificate_revoked"})
            late = await connect(listener, pki)
            assert await late.rest() == b""
            assert listener.statistics().refused == {"certificate_revoked": 2}

    run(scenario)


def test_bodies_in_memory_are_bounded_over_all_connections(pki: Pki) -> None:
    release, held = trio.Event(), trio.Event()

    async def answer(request: Request) -> Response:
        if request.target == "/hold":
            held.set()
            await release.wait()
        return Response(b"{}")

    def post(path: bytes) -> bytes:
        return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 600\r\n\r\n" % path + b"x" * 600

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server(), inflight_body_bytes=1000) as listener:
            first = await connect(listener, pki)
            await first.send(post(b"/hold"))
            await held.wait()
            second = await connect(listener, pki)
            status, body = await second.ask(post(b"/"))
            assert (status, body["reason"]) == (503, "busy")
            release.set()
            assert (await first.answer())[0] == 200
            assert (await (await connect(listener, pki)).ask(post(b"/")))[0] == 200

    run(scenario)


def test_more_connections_than_allowed_are_closed_at_once(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), None, max_connections=2) as listener:
            clients = [await connect_clear(listener) for _ in range(2)]
            for client in clients:
                assert (await client.ask(GET))[0] == 200
            extra = await connect_clear(listener)
            assert await extra.rest() == b""
            assert listener.statistics().refused == {"connections_full": 1}
            await clients[0].stream.aclose()
            await until(lambda: listener.statistics().open_connections == 1)
            assert (await (await connect_clear(listener)).ask(GET))[0] == 200

    run(scenario)


# WebSockets from the inline path


async def echo_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan")
    assert (await receive())["type"] == "websocket.connect"
    peer = current_peer()
    assert peer is not None
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": f"{scope['path']} {peer.connection}"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"], "text": message["text"]})


def test_a_websocket_goes_on_to_its_app_with_all_bytes_read_so_far(pki: Pki) -> None:
    handler = Recorder()

    async def scenario() -> None:
        app = agents_asgi(handler, websocket_app=echo_app)
        async with serving(handler, pki.server(), app=app, drain_timeout_s=0.1) as listener:
            url = f"wss://localhost:{listener.port}/shell?x"
            async with trio_websocket.open_websocket_url(url, ssl_context=pki.client()) as ws:
                path, connection = (await ws.get_message()).split(" ")
                await ws.send_message(b"x" * 100_000)
                assert await ws.get_message() == b"x" * 100_000
            assert path == "/shell"
            # after an ordinary request on the same connection, too
            client = await connect(listener, pki)
            await client.ask(GET)
            assert handler.requests[0].peer.connection != connection
            await client.send(UPGRADE)
            status, headers, _ = await client.answer()
            assert (status, headers["sec-websocket-accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
            assert listener.statistics().errors == 0

    run(scenario)


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def test_without_websockets_an_upgrade_is_refused_as_json(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            client = await connect(listener, pki)
            status, body = await client.ask(UPGRADE)
            assert (status, body["reason"]) == (404, "websocket")

    run(scenario)


def test_an_incomplete_upgrade_is_an_ordinary_request(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(Recorder(), pki.server()) as listener:
            for part in (b"Sec-WebSocket-Key", b"Sec-WebSocket-Version", b"keep-alive, Upgrade"):
                client = await connect(listener, pki)
                assert (await client.ask(UPGRADE.replace(part, b"X-Other"))) == (200, {"method": "GET", "size": 0})

    run(scenario)


# binding


def test_localhost_is_both_families_on_one_port() -> None:
    async def scenario() -> None:
        async with serving(Recorder(), None, host="localhost") as listener:
            ports = {port for _, port in listener.addresses}
            assert ports == {listener.port}
            for host, _ in listener.addresses:
                assert (await (await connect_clear(listener, host)).ask(GET))[0] == 200

    run(scenario)


def test_localhost_without_ipv6_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sockets._bind

    def bind(family: Any, host: str, port: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, host, port)

    async def scenario() -> None:
        listener = Listener("agents", handler=Recorder())
        await listener.bind("localhost", 0)
        assert [host for host, _ in listener.addresses] == ["127.0.0.1"]
        listener.stop_accepting()

    monkeypatch.setattr(sockets, "_bind", bind)
    run(scenario)


def test_a_taken_port_names_itself_and_the_way_out() -> None:
    async def scenario() -> None:
        first, second = Listener("agents", handler=Recorder()), Listener("agents", handler=Recorder())
        await first.bind("localhost", 0)
        with pytest.raises(AddressInUse, match=f"agents: port {first.port} on 127.0.0.1 is already taken") as caught:
            await second.bind("localhost", first.port)
        assert caught.value.hint == "osqbox serve --agents-port 0"
        first.stop_accepting()
        await second.bind("localhost", first.port)  # free again at once
        second.stop_accepting()

    run(scenario)


def test_port_0_finds_one_that_is_free_in_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three ports that IPv4 offers are taken on ::1."""
    tried: list[int] = []
    real = sockets._bind

    def bind(family: Any, host: str, port: int) -> socket.socket:
        if family == socket.AF_INET6 and len(tried) < 3:
            tried.append(port)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(family, host, port)

    async def scenario() -> None:
        listener = Listener("agents", handler=Recorder())
        await listener.bind("localhost", 0)
        assert len(listener.addresses) == 2
        listener.stop_accepting()

    monkeypatch.setattr(sockets, "_bind", bind)
    run(scenario)
    assert len(tried) == 3


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", ""])
def test_a_host_that_is_not_ours_is_a_set_up_error(host: str) -> None:
    async def scenario() -> None:
        with pytest.raises(BadSetup, match="agents: "):
            await Listener("agents", handler=Recorder()).bind(host, 0)

    run(scenario)


# stopping


def test_drain_closes_idle_connections_at_once_and_finishes_what_is_in_flight(pki: Pki) -> None:
    release, held = trio.Event(), trio.Event()

    async def answer(request: Request) -> Response:
        if request.target == "/hold":
            held.set()
            await release.wait()
        return Response(b"{}")

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server()) as listener:
            fresh, idle, busy = [await connect(listener, pki) for _ in range(3)]
            handshaking = await connect_clear(listener)
            assert (await idle.ask(GET))[0] == 200
            await busy.send(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
            await held.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.drain)
                assert await fresh.rest() == b""
                assert await idle.rest() == b""
                assert await handshaking.rest() == b""
                with pytest.raises(OSError, match="all attempts to connect"):
                    await trio.open_tcp_stream("127.0.0.1", listener.port)
                assert listener.statistics().open_connections == 1
                release.set()
                status, headers, _ = await busy.answer()
                assert (status, headers["connection"]) == (200, "close")
                assert await busy.rest() == b""

    run(scenario)


def test_drain_cancels_what_does_not_finish(pki: Pki) -> None:
    held, cancelled = trio.Event(), trio.Event()

    async def answer(request: Request) -> Response:
        held.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async def scenario() -> None:
        async with serving(Recorder(answer), pki.server(), drain_timeout_s=0.1) as listener:
            client = await connect(listener, pki)
            await client.send(GET)
            await held.wait()
            await listener.drain()
            assert cancelled.is_set()
            assert await client.rest() == b""  # still with close_notify

    run(scenario)


def test_drain_does_not_wait_for_a_stalled_reader(pki: Pki) -> None:
    async def answer(request: Request) -> Response:
        return Response(b"x" * 50_000_000)

    async def scenario() -> None:
        limits = {"drain_timeout_s": 0.1, "close_timeout_s": 0.1}
        async with serving(Recorder(answer), pki.server(), **limits) as listener:
            client = await connect(listener, pki)
            await client.send(GET)
            await client._more()
            with trio.fail_after(1):
                await listener.drain()

    run(scenario)


def test_drain_works_before_run_and_twice() -> None:
    async def scenario() -> None:
        listener = Listener("agents", handler=Recorder())
        await listener.bind("127.0.0.1", 0)
        await listener.drain()
        await listener.drain()
        await listener.run()

    run(scenario)


def test_stopping_while_connections_come_in_is_orderly() -> None:
    """Of two tasks that wake in the same round either may run first: thirty rounds see both."""

    async def scenario() -> None:
        for _ in range(30):
            listener = Listener("agents", handler=Recorder())
            await listener.bind("127.0.0.1", 0)
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    await nursery.start(listener.run)
                    await trio.testing.wait_all_tasks_blocked()
                    with socket.create_connection(("127.0.0.1", listener.port)):
                        await trio.lowlevel.checkpoint()
                        listener.stop_accepting()

    run(scenario)


def test_cancelling_run_closes_everything(pki: Pki) -> None:
    async def scenario() -> None:
        listener = Served("agents", ssl_context=pki.server(), handler=Recorder())
        await listener.bind("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            client = await connect(listener, pki)
            await client.ask(GET)
            nursery.cancel_scope.cancel()
        assert await client.rest() == b""
        await client.stream.aclose()
        assert listener.statistics().open_connections == 0
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", listener.port)

    run(scenario)
