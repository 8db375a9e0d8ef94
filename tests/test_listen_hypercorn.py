"""Hypercorn behind the listener: every probe that breaks the plain one, and afterwards a normal request.

`ask` ends each probe: an independent client that must be answered by the same listener.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest
import trio
import trio.testing
import trio_websocket
import trustme
from quart import request as quart_request
from quart import websocket
from quart_trio import QuartTrio

from osqbox.errors import BadSetup
from osqbox.exchange import Peer, Request, Response
from osqbox.listen import Limits, Listener, agents_asgi, current_peer, hypercorn_repairs, server_context

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Pki:
    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        issued = ca.issue_cert("localhost", "127.0.0.1")
        self.ca_file, self.cert_file, self.key_file = folder / "ca", folder / "cert", folder / "key"
        ca.cert_pem.write_to_path(str(self.ca_file))
        issued.cert_chain_pems[0].write_to_path(str(self.cert_file))
        issued.private_key_pem.write_to_path(str(self.key_file))

    def server(self) -> ssl.SSLContext:
        return server_context(self.cert_file, self.key_file)

    def client(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.set_alpn_protocols(list(alpn or ("http/1.1",)))
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


class Served(Listener):
    """A listener that knows its test's clients, to close them at the end."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.streams: list[Any] = []

    async def connect(self, pki: Pki, *alpn: str) -> Any:
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", self.port, ssl_context=pki.client(*alpn))
        self.streams.append(stream)
        await stream.do_handshake()
        return stream


@contextlib.asynccontextmanager
async def serving(
    pki: Pki, app: Any = None, handler: Any = None, *, tls: bool = True, check_peer: Any = None, **limits: Any
) -> AsyncIterator[Served]:
    listener = Served(
        "operator",
        ssl_context=pki.server() if tls else None,
        app=app,
        handler=handler,
        check_peer=check_peer,
        limits=Limits(**limits),
    )
    await listener.bind("127.0.0.1", 0)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            try:
                yield listener
                with trio.fail_after(8):
                    await listener.drain()
            finally:
                for stream in listener.streams:
                    await trio.aclose_forcefully(stream)
    assert listener.statistics().open_connections == 0


async def ask(listener: Listener, pki: Pki, path: str = "/", *, http2: bool = True, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(verify=pki.client(*(("h2",) if http2 else ())), http2=http2) as client:
        answer = await client.request(
            options.pop("method", "GET"), f"https://localhost:{listener.port}{path}", **options
        )
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    return answer


async def until(condition: Callable[[], bool]) -> None:
    """For effects on the other side of a socket, which no event announces."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)


async def read_to_end(stream: Any) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


async def read_until(stream: Any, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = await stream.receive_some()
        assert piece, data
        data += piece
    return data


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario)


# applications


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Raw ASGI with one path per way to be used."""
    if scope["type"] == "lifespan":
        raise RuntimeError("without lifespan")
    path = scope["path"]
    if path == "/ws-flood":
        await send({"type": "websocket.accept"})
        while True:
            await send({"type": "websocket.send", "text": "x" * 1000})
    if path == "/ws":
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    if path == "/crash":
        raise ValueError("secret")
    if path == "/body":
        body = b""
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            body += message["body"]
        await reply(send, str(len(body)).encode())
    elif path == "/hold":
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass
    elif path == "/ignore-body":
        await trio.testing.wait_all_tasks_blocked(0.02)  # until the queue of the body is full
        await reply(send, b"hello")
    elif path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    elif path == "/trailers":
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x", "more_body": False})
        await send({"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]})
    else:
        await reply(send, b"hello")


async def reply(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class H2Client:
    """An HTTP/2 client that checks nothing of what it sends."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        config = h2.config.H2Configuration(
            client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def request(self, path: bytes = b"/", *, end: bool = True, **pseudo: bytes) -> int:
        fields = {b"method": b"GET", b"scheme": b"https", b"authority": b"localhost", b"path": path}
        fields |= {name.encode(): value for name, value in pseudo.items()}
        headers = [(b":" + name, value) for name, value in fields.items() if value]
        return await self.send(headers, end=end)

    async def send(self, headers: list[tuple[bytes, bytes]], *, end: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers, end_stream=end)
        await self.flush()
        return stream_id

    async def wait_for(self, kind: type[Any], stream_id: int | None = None) -> Any:
        """The next such event; all others are kept acknowledged and forgotten."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if isinstance(event, h2.events.DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    await self.flush_if_any()
                    return event
            await self.flush_if_any()
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self.events += self.h2.receive_data(bytes(data))

    async def flush_if_any(self) -> None:
        if data := self.h2.data_to_send():
            await self.stream.send_all(data)


async def h2_client(listener: Served, pki: Pki) -> H2Client:
    client = H2Client(await listener.connect(pki, "h2"))
    await client.flush()
    return client


# HTTP/2 probes. Each leaves its connection usable (or ended), and the listener unharmed


async def data_after_the_answer(client: H2Client) -> None:
    stream_id = await client.request(end=False, method=b"POST")
    await client.wait_for(h2.events.StreamEnded, stream_id)
    for _ in range(5):
        client.h2.send_data(stream_id, b"late" * 100)
    client.h2.end_stream(stream_id)
    await client.flush()


async def path_not_ascii(client: H2Client) -> None:
    stream_id = await client.request(b"/\xff\xfe")
    await client.wait_for(h2.events.StreamReset, stream_id)


async def method_not_ascii(client: H2Client) -> None:
    stream_id = await client.request(method=b"G\xc3\x8bT")
    await client.wait_for(h2.events.StreamReset, stream_id)


async def connect_without_path(client: H2Client) -> None:
    stream_id = await client.request(b"", method=b"CONNECT", scheme=b"")
    await client.wait_for(h2.events.StreamReset, stream_id)


async def connect_to_no_websocket(client: H2Client) -> None:
    stream_id = await client.request(method=b"CONNECT", protocol=b"telnet")
    await client.wait_for(h2.events.StreamReset, stream_id)


async def priority_flood(client: H2Client) -> None:
    for stream_id in range(1001, 4001, 2):
        client.h2.prioritize(stream_id, weight=16, depends_on=0)
        if stream_id % 200 == 1:
            await client.flush()
    await client.flush()


async def priority_on_itself(client: H2Client) -> None:
    frame = b"\x00\x00\x05\x02\x00\x00\x00\x00\x07" + (7).to_bytes(4, "big") + b"\x10"
    await client.stream.send_all(frame)


async def many_resets(client: H2Client) -> None:
    for number in range(1100):
        stream_id = await client.request(b"/hold")
        client.h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        if number % 50 == 0:
            await client.flush()
            client.h2.ping(b"12345678")
            await client.flush()
            await client.wait_for(h2.events.PingAckReceived)
    await client.flush()


async def many_trailers_in_flight(client: H2Client) -> None:
    headers = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/trailers")]
    streams = [await client.send([*headers, (b"te", b"trailers")]) for _ in range(40)]
    for _ in range(1100):
        ended = streams.pop(0)
        trailers = await client.wait_for(h2.events.TrailersReceived, ended)
        assert (b"grpc-status", b"0") in trailers.headers
        streams.append(await client.send([*headers, (b"te", b"trailers")]))
    await client.wait_for(h2.events.TrailersReceived, streams[-1])


async def app_that_fails(client: H2Client) -> None:
    answer = await client.wait_for(h2.events.ResponseReceived, await client.request(b"/crash"))
    assert (b":status", b"500") in answer.headers


async def window_never_opened(client: H2Client) -> None:
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    await client.flush()
    stream_id = await client.request(b"/stream")
    reset = await client.wait_for(h2.events.StreamReset, stream_id)
    assert reset.error_code == h2.errors.ErrorCodes.CANCEL
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 65535})
    await client.flush()


@pytest.mark.parametrize(
    "probe",
    [
        data_after_the_answer,
        path_not_ascii,
        method_not_ascii,
        connect_without_path,
        connect_to_no_websocket,
        priority_flood,
        many_resets,
        many_trailers_in_flight,
        app_that_fails,
        window_never_opened,
    ],
)
def test_http2_probe_leaves_connection_and_listener_in_service(
    pki: Pki, probe: Callable[[H2Client], Awaitable[None]]
) -> None:
    limits = {"write_timeout_s": 0.3} if probe is window_never_opened else {}

    async def scenario() -> None:
        async with serving(pki, app, **limits) as listener:
            client = await h2_client(listener, pki)
            await probe(client)
            await client.wait_for(h2.events.StreamEnded, await client.request())
            assert (await ask(listener, pki)).text == "hello"
            assert listener.statistics().errors == (1 if probe is app_that_fails else 0)

    run(scenario)


def test_what_waits_for_an_http2_window_is_bounded(pki: Pki) -> None:
    """Hypercorn's buffer asks for more whenever the sender looks, sent or not: it would grow without end."""
    sent_bytes = 0

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent_bytes
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
            sent_bytes += 50_000

    async def lifeless_flood(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await flood(scope, receive, send)

    async def scenario() -> None:
        async with serving(pki, lifeless_flood, drain_timeout_s=0.1) as listener:
            client = await h2_client(listener, pki)
            client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
            await client.flush()
            stream_id = await client.request()
            for _ in range(20):  # byte by byte
                client.h2.increment_flow_control_window(1, stream_id)
                await client.flush()
                await client.wait_for(h2.events.DataReceived, stream_id)
            assert sent_bytes <= 100_000
            client.h2.increment_flow_control_window(1_000_000, stream_id)
            await client.flush()
            while sent_bytes < 900_000:
                await client.wait_for(h2.events.DataReceived, stream_id)

    run(scenario)


BREAKING = {
    "priority on itself": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05\x02\x00\x00\x00\x00\x07\x00\x00\x00\x07\x10",
    "no preface": b"hello, is this HTTP/2?\r\n\r\n" * 10,
    "oversized frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"x" * 20_000,
    "bad header block": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff",
    "half a frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x09\x01",
}


@pytest.mark.parametrize("raw", BREAKING.values(), ids=BREAKING.keys())
def test_broken_http2_ends_its_own_connection_only(pki: Pki, raw: bytes) -> None:
    async def scenario() -> None:
        async with serving(pki, app, header_timeout_s=0.3) as listener:
            stream = await listener.connect(pki, "h2")
            await stream.send_all(raw)
            await read_to_end(stream)
            assert (await ask(listener, pki)).text == "hello"

    run(scenario)


def test_http2_without_alpn_and_an_h2c_upgrade_are_repaired_too(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app) as listener:
            client = H2Client(await listener.connect(pki))
            await client.flush()
            await data_after_the_answer(client)
            await client.wait_for(h2.events.StreamEnded, await client.request())
            for settings in (b"AAMAAABkAAQAoAAAAAIAAAAA", b"%%%"):
                stream = await listener.connect(pki)
                await stream.send_all(
                    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                    b"HTTP2-Settings: " + settings + b"\r\n\r\n"
                )
                await stream.receive_some()
            assert (await ask(listener, pki)).text == "hello"

    run(scenario)


def test_a_reset_leaves_the_connection_idle_so_that_it_times_out(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app, keep_alive_timeout_s=0.1) as listener:
            client = await h2_client(listener, pki)
            stream_id = await client.request(b"/hold")
            await until(lambda: listener.statistics().requests == 1)
            client.h2.reset_stream(stream_id)
            await client.flush()
            await client.wait_for(h2.events.ConnectionTerminated)

    run(scenario)


# HTTP/1.1 through Hypercorn


def test_an_application_that_ignores_a_body_does_not_block_its_connection_for_ever(pki: Pki) -> None:
    """The queue towards it fills up; the end of the exchange must not wait in that queue."""

    async def scenario() -> None:
        async with serving(pki, app, linger_timeout_s=0.3) as listener:
            for http2 in (False, True):
                body = b"x" * 3_000_000
                answer = await ask(listener, pki, "/ignore-body", http2=http2, method="POST", content=body)
                assert answer.text == "hello"
            await until(lambda: listener.statistics().open_connections == 0)

    run(scenario)


def test_a_body_over_the_limit_gets_413_as_json(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app, app_body_bytes=100_000) as listener:
            for http2 in (False, True):
                answer = await ask(listener, pki, "/body", http2=http2, method="POST", content=b"x" * 100_000)
                assert answer.text == "100000"
                answer = await ask(listener, pki, "/body", http2=http2, method="POST", content=b"x" * 100_001)
                assert (answer.status_code, list(answer.json())) == (413, ["error"])
            assert listener.statistics().refused == {"body_too_large": 2}

    run(scenario)


def test_half_a_body_gets_408(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app, body_timeout_s=0.05, linger_timeout_s=0.05) as listener:
            stream = await listener.connect(pki)
            await stream.send_all(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
            assert (await read_to_end(stream)).startswith(b"HTTP/1.1 408 ")
            assert (await ask(listener, pki)).text == "hello"

    run(scenario)


def test_bodies_that_are_streams_are_not_bounded(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app, app_body_bytes=None, body_timeout_s=0.01) as listener:

            async def slow() -> AsyncIterator[bytes]:
                for _ in range(3):
                    await trio.sleep(0.02)
                    yield b"x" * 100

            answer = await ask(listener, pki, "/body", method="POST", content=slow())
            assert answer.text == "300"

    run(scenario)


def test_silent_and_slow_connections_are_closed(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app, header_timeout_s=0.1) as listener:
            silent, silent_h2, slow = [await listener.connect(pki, alpn) for alpn in ("http/1.1", "h2", "http/1.1")]
            await slow.send_all(b"GET / HT")
            for stream in (silent, silent_h2, slow):
                await read_to_end(stream)
            # and on a connection that has been used
            used = await listener.connect(pki)
            await used.send_all(GET)
            await read_until(used, b"hello")
            await used.send_all(b"GET / HT")
            await read_to_end(used)
            # both at once: the second head has begun before the first answer is out
            eager = await listener.connect(pki)
            await eager.send_all(GET + b"GET / HT")
            assert (await read_to_end(eager)).endswith(b"hello")

    run(scenario)


def make_quart() -> QuartTrio:
    quart = QuartTrio("test")
    quart.config["events"] = []

    @quart.before_serving
    async def start() -> None:
        quart.config["events"].append("start")
        quart.nursery.start_soon(trio.sleep, 0)

    @quart.after_serving
    async def stop() -> None:
        quart.config["events"].append("stop")

    @quart.get("/")
    async def root() -> str:
        return "hello"

    @quart.get("/peer")
    async def peer() -> dict[str, Any]:
        found = current_peer()
        assert found is not None
        return {"connection": found.connection, "tls": found.tls_version, "address": found.address}

    @quart.post("/echo")
    async def echo() -> bytes:
        data: bytes = await quart_request.get_data()
        return data

    @quart.get("/sse")
    async def sse() -> Any:
        async def events() -> AsyncIterator[bytes]:
            quart.config["events"].append("sse")
            try:
                while True:
                    yield b"data: x\n\n"
                    await trio.sleep(0.01)
            finally:
                quart.config["events"].append("sse ended")

        response = await quart.make_response(events())
        response.timeout = None  # type: ignore[union-attr]
        return response

    @quart.websocket("/ws")
    async def ws() -> None:
        while True:
            await websocket.send(await websocket.receive())

    @quart.websocket("/ws-flood")
    async def ws_flood() -> None:
        while True:
            await websocket.send("x" * 1000)

    return quart


def test_quart_keep_alive_times_out_after_a_request(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, make_quart(), keep_alive_timeout_s=0.1) as listener:
            stream = await listener.connect(pki)
            for _ in range(2):
                await stream.send_all(GET)
                assert (await read_until(stream, b"hello")).startswith(b"HTTP/1.1 200 ")
            await read_to_end(stream)  # an orderly end
            client = await h2_client(listener, pki)
            await client.wait_for(h2.events.StreamEnded, await client.request())
            await client.wait_for(h2.events.ConnectionTerminated)
            assert (await ask(listener, pki)).text == "hello"

    run(scenario)


def test_quart_has_its_lifespan_once_and_around_all_requests(pki: Pki) -> None:
    quart = make_quart()

    async def scenario() -> None:
        async with serving(pki, quart) as listener:
            assert quart.config["events"] == ["start"]
            for http2 in (False, True):
                peer = (await ask(listener, pki, "/peer", http2=http2)).json()
                assert (peer["tls"], peer["address"]) == ("TLSv1.3", "127.0.0.1")
                echoed = await ask(listener, pki, "/echo", http2=http2, method="POST", content=b"x" * 200_000)
                assert len(echoed.content) == 200_000

    run(scenario)
    assert quart.config["events"] == ["start", "stop"]


def test_an_application_that_cannot_start_is_a_set_up_error(pki: Pki) -> None:
    quart = QuartTrio("test")

    @quart.before_serving
    async def start() -> None:
        raise ValueError("no disk")

    async def scenario() -> None:
        listener = Listener("operator", app=quart)
        await listener.bind("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            with pytest.raises(BadSetup, match="operator: the application cannot start: no disk"):
                await nursery.start(listener.run)
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", listener.port)

    run(scenario)


def test_every_peer_is_checked_before_every_request(pki: Pki) -> None:
    revoked: list[str] = []

    async def scenario() -> None:
        async with serving(pki, app, check_peer=lambda peer: revoked[0] if revoked else None) as listener:
            client = await h2_client(listener, pki)
            await client.wait_for(h2.events.StreamEnded, await client.request())
            revoked.append("certificate 7 is revoked")
            answer = await client.wait_for(h2.events.ResponseReceived, await client.request())
            assert (b":status", b"403") in answer.headers
            await client.wait_for(h2.events.ConnectionTerminated)

    run(scenario)


# readers that stall, writers that do not stop


@pytest.mark.parametrize("path", ["/stream", "/ws-flood"])
def test_a_stalled_reader_is_cut_off(pki: Pki, path: str) -> None:
    async def scenario() -> None:
        async with serving(pki, app, write_timeout_s=0.2) as listener:
            stream = await listener.connect(pki)
            await stream.send_all(upgrade(path) if "ws" in path else GET.replace(b"/ ", path.encode() + b" "))
            await stream.receive_some()
            await until(lambda: listener.statistics().open_connections == 0)
            assert (await ask(listener, pki)).text == "hello"
            assert listener.statistics().errors == 0

    run(scenario)


def upgrade(path: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("make_app", [lambda: app, make_quart], ids=["asgi", "quart"])
def test_a_websocket_that_only_sends_ends_with_its_client(pki: Pki, make_app: Callable[[], Any]) -> None:
    async def scenario() -> None:
        async with serving(pki, make_app()) as listener:
            url = f"wss://localhost:{listener.port}/ws-flood"
            async with trio_websocket.open_websocket_url(url, ssl_context=pki.client()) as ws:
                await ws.get_message()
                await trio.aclose_forcefully(ws._stream)
            await until(lambda: listener.statistics().open_connections == 0)
            assert (await ask(listener, pki)).text == "hello"

    run(scenario)


def test_a_stream_ends_with_its_client(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, app) as listener:
            stream = await listener.connect(pki)
            await stream.send_all(GET.replace(b"/ ", b"/stream "))
            await stream.receive_some()
            await trio.aclose_forcefully(stream)
            await until(lambda: listener.statistics().open_connections == 0)

    run(scenario)


def test_a_websocket_that_was_left_leaves_nothing_open(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, make_quart()) as listener:
            url = f"wss://localhost:{listener.port}/ws"
            async with trio_websocket.open_websocket_url(url, ssl_context=pki.client()) as ws:
                await ws.send_message("hi")
                assert await ws.get_message() == "hi"
            await until(lambda: listener.statistics().open_connections == 0)

    run(scenario)


# draining


def test_drain_with_streams_websockets_and_stalled_readers_open(pki: Pki) -> None:
    quart = make_quart()

    async def scenario() -> None:
        async with serving(pki, quart, drain_timeout_s=0.2, close_timeout_s=0.2) as listener:
            sse, stalled, ws, idle = [await listener.connect(pki) for _ in range(4)]
            sse_h2, idle_h2 = await h2_client(listener, pki), await h2_client(listener, pki)
            await sse.send_all(GET.replace(b"/ ", b"/sse "))
            await sse.receive_some()
            await stalled.send_all(upgrade("/ws-flood"))
            await ws.send_all(upgrade("/ws"))
            await idle.send_all(GET)
            await read_until(idle, b"hello")
            await sse_h2.wait_for(h2.events.DataReceived, await sse_h2.request(b"/sse"))
            await idle_h2.wait_for(h2.events.StreamEnded, await idle_h2.request())
            await until(lambda: listener.statistics().requests == 6)
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.drain)
                await read_to_end(idle)
                await idle_h2.wait_for(h2.events.ConnectionTerminated)
                assert trio.current_time() - began < 0.15
                await read_to_end(sse)
                await read_to_end(ws)
            assert trio.current_time() - began < 1.5

    run(scenario)
    assert quart.config["events"] == ["start", "sse", "sse", "sse ended", "sse ended", "stop"]


def test_drain_cuts_a_stalled_reader_off(pki: Pki) -> None:
    """Its write is shielded from cancellation, so only closing the socket ends it."""

    async def scenario() -> None:
        limits = {"drain_timeout_s": 0.1, "close_timeout_s": 0.1, "write_timeout_s": 60}
        async with serving(pki, app, **limits) as listener:
            stream = await listener.connect(pki)
            await stream.send_all(GET.replace(b"/ ", b"/stream "))
            await trio.testing.wait_all_tasks_blocked(0.1)
            with trio.fail_after(2):
                await listener.drain()
            assert listener.statistics().open_connections == 0

    run(scenario)


def test_drain_invents_no_answer_for_what_it_cancels(pki: Pki) -> None:
    async def lasting(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await trio.sleep_forever()

    async def scenario() -> None:
        async with serving(pki, lasting, drain_timeout_s=0.05) as listener:
            stream = await listener.connect(pki)
            await stream.send_all(GET)
            await until(lambda: listener.statistics().requests == 1)
            await listener.drain()
            assert await read_to_end(stream) == b""

    run(scenario)


def test_drain_lets_an_http2_request_in_flight_finish(pki: Pki) -> None:
    release = trio.Event()

    class Holding(Handler):
        async def answer(self, request: Request) -> Response:
            await release.wait()
            return Response(b'{"held": true}')

    async def scenario() -> None:
        async with serving(pki, handler=Holding()) as listener:
            client = await h2_client(listener, pki)
            held = await client.request()
            await until(lambda: listener.statistics().requests == 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.drain)
                await trio.testing.wait_all_tasks_blocked(0.01)
                refused = await client.request()
                await client.wait_for(h2.events.StreamReset, refused)
                release.set()
                data = await client.wait_for(h2.events.DataReceived, held)
                assert data.data == b'{"held": true}'
                await client.wait_for(h2.events.ConnectionTerminated)

    run(scenario)


# agents over HTTP/2


class Handler:
    limit_bytes = 1000

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def body_limit_bytes(self, method: str, target: str) -> int:
        return self.limit_bytes

    async def answer(self, request: Request) -> Response | None:
        self.requests.append(request)
        if request.target == "/drop":
            return None
        if request.target == "/fail":
            raise ValueError("secret")
        if request.target == "/gone":
            await request.wait_gone()
        return Response(json.dumps({"size": len(request.body)}).encode(), close=request.target == "/close")

    def refuse(
        self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None
    ) -> Response | None:
        if target == "/no-answer":
            return None
        return Response(json.dumps({"error": message, "reason": reason}).encode(), status=status)


def test_agents_are_answered_over_http2_by_the_same_handler(pki: Pki) -> None:
    handler = Handler()

    async def scenario() -> None:
        async with serving(pki, handler=handler) as listener:
            for http2 in (False, True):
                answer = await ask(listener, pki, "/a%20b?c=d", http2=http2, method="POST", content=b"x" * 10)
                assert answer.json() == {"size": 10}
                assert answer.headers["content-length"] == "12"
            assert listener.statistics().requests == 2

    run(scenario)
    inline, http2 = handler.requests
    assert inline.target == http2.target == "/a%20b?c=d"
    assert inline.body == http2.body
    assert http2.headers["host"] == inline.headers["host"]
    assert http2.peer.tls_version == "TLSv1.3"


@pytest.mark.parametrize(
    ("path", "size", "status", "reason"),
    [("/", 1001, 413, "body_too_large"), ("/fail", 0, 500, "internal_error")],
)
def test_agents_get_the_same_refusals_over_http2(pki: Pki, path: str, size: int, status: int, reason: str) -> None:
    async def scenario() -> None:
        async with serving(pki, handler=Handler()) as listener:
            for http2 in (False, True):
                answer = await ask(listener, pki, path, http2=http2, method="POST", content=b"x" * size)
                assert (answer.status_code, answer.json()["reason"]) == (status, reason)
                assert "secret" not in answer.text
            assert listener._shared.body_budget.held_bytes == 0

    run(scenario)


def test_an_agents_body_over_http2_is_bounded_by_count_and_time(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, handler=Handler(), body_timeout_s=0.1) as listener:
            client = await h2_client(listener, pki)
            stream_id = await client.request(method=b"POST", end=False)
            client.h2.send_data(stream_id, b"x" * 1001)
            await client.flush()
            answer = await client.wait_for(h2.events.ResponseReceived, stream_id)
            assert (b":status", b"413") in answer.headers
            stream_id = await client.request(method=b"POST", end=False)
            answer = await client.wait_for(h2.events.ResponseReceived, stream_id)
            assert (b":status", b"408") in answer.headers
            assert listener.statistics().refused == {"body_too_large": 1, "body_timeout": 1}
            assert listener._shared.body_budget.held_bytes == 0

    run(scenario)


@pytest.mark.parametrize(("path", "size"), [(b"/drop", 0), (b"/no-answer", 2000)])
def test_silence_closes_the_whole_http2_connection(pki: Pki, path: bytes, size: int) -> None:
    async def scenario() -> None:
        async with serving(pki, handler=Handler()) as listener:
            client = await h2_client(listener, pki)
            await client.wait_for(h2.events.StreamEnded, await client.request())
            stream_id = await client.request(path, method=b"POST", end=False)
            client.h2.send_data(stream_id, b"x" * size, end_stream=True)
            await client.flush()
            with pytest.raises(EOFError):
                await client.wait_for(h2.events.ResponseReceived)
            assert (await ask(listener, pki)).json() == {"size": 0}
            assert listener.statistics().errors == 0

    run(scenario)


def test_close_and_wait_gone_mean_the_same_over_http2(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki, handler=Handler()) as listener:
            client = await h2_client(listener, pki)
            await client.wait_for(h2.events.StreamEnded, await client.request(b"/close"))
            await client.wait_for(h2.events.ConnectionTerminated)
            leaving = await h2_client(listener, pki)
            await leaving.request(b"/gone")
            await until(lambda: listener.statistics().requests == 2)
            await leaving.stream.aclose()
            await until(lambda: listener.statistics().open_connections == 0)
            resetting = await h2_client(listener, pki)
            stream_id = await resetting.request(b"/gone")
            await until(lambda: listener.statistics().requests == 3)
            resetting.h2.reset_stream(stream_id)
            await resetting.flush()
            await resetting.wait_for(h2.events.StreamEnded, await resetting.request())

    run(scenario)


def test_websockets_over_http2_are_refused_as_json_and_served_with_an_app(pki: Pki) -> None:
    async def scenario() -> None:
        handler = Handler()
        for listening, status in ((None, b"404"), (agents_asgi(handler, websocket_app=app), b"200")):
            async with serving(pki, listening, handler, drain_timeout_s=0.1) as listener:
                client = await h2_client(listener, pki)
                fields = {
                    "method": "CONNECT",
                    "protocol": "websocket",
                    "scheme": "https",
                    "authority": "a",
                    "path": "/ws",
                }
                headers = [(b":" + name.encode(), value.encode()) for name, value in fields.items()]
                stream_id = await client.send([*headers, (b"sec-websocket-version", b"13")], end=False)
                answer = await client.wait_for(h2.events.ResponseReceived, stream_id)
                assert (b":status", status) in answer.headers

    run(scenario)


# Hypercorn itself


def test_the_seams_fit_this_hypercorn_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hypercorn_repairs.check_seams()
    with monkeypatch.context() as patched:
        patched.setattr("importlib.metadata.version", lambda name: "0.19.1")
        with pytest.raises(BadSetup, match=r"expected Hypercorn 0\.18\.x, got 0\.19\.1"):
            hypercorn_repairs.check_seams()
    with monkeypatch.context() as patched:
        patched.delattr(hypercorn_repairs.H2Protocol, "_send_data")
        with pytest.raises(BadSetup, match=r"which lacks H2Protocol\._send_data"):
            Listener("agents", app=app)


def test_nothing_in_hypercorn_is_assigned_globally(pki: Pki) -> None:
    """Other projects' test suites import us, and may serve with a plain Hypercorn in the same process."""
    import hypercorn.protocol
    import hypercorn.trio.run
    import hypercorn.trio.tcp_server
    from hypercorn.config import Config

    before = {name: value for name, value in vars(Config).items() if not name.startswith("__")}

    async def scenario() -> None:
        async with serving(pki, app) as listener:
            await ask(listener, pki)

    run(scenario)
    assert {name: value for name, value in vars(Config).items() if not name.startswith("__")} == before
    for module in (hypercorn.protocol, hypercorn.trio.run, hypercorn.trio.tcp_server):
        assert "osqbox" not in " ".join(str(getattr(value, "__module__", "")) for value in vars(module).values())


def test_failures_are_logged_without_their_text(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with serving(pki, app) as listener:
            assert (await ask(listener, pki, "/crash")).status_code == 500

    run(scenario)
    assert "operator: the application failed: ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert "Traceback" not in caplog.text
