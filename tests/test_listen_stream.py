"""Answers that are written as they come, over HTTP/1.1 and HTTP/2, and listeners on unix sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing
import trustme

from osqbox.errors import AddressInUse, BadSetup
from osqbox.exchange import Peer, Request, Response, Write
from osqbox.listen import Limits, Listener, server_context
from osqbox.listen.sockets import UNIX_PATH_BYTES, reachable_path

Stream = Callable[[Write], Awaitable[None]]
GET = b"GET /s HTTP/1.1\r\nHost: localhost\r\n\r\n"
PIECES = [b"one", b"", b"two" * 100_000, b"\r\n"]
WHOLE = b"".join(PIECES)


async def write_pieces(write: Write) -> None:
    for piece in PIECES:
        await write(piece)


class Streamer:
    """Answers /s with its stream, anything else plainly."""

    def __init__(self, stream: Stream, length_bytes: int | None = None) -> None:
        self._stream = stream
        self._length_bytes = length_bytes
        self.peers: list[Peer] = []

    def body_limit_bytes(self, method: str, target: str) -> int:
        return 1000

    async def answer(self, request: Request) -> Response | None:
        self.peers.append(request.peer)
        if request.target != "/s":
            return Response(b"plain", content_type="text/plain")
        return Response(b"", content_type="text/plain", stream=self._stream, length_bytes=self._length_bytes)

    def refuse(
        self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None
    ) -> Response | None:
        return Response(reason.encode(), status=status)


@contextlib.asynccontextmanager
async def serving(
    handler: Streamer, *, context: ssl.SSLContext | None = None, unix: Path | None = None, **limits: float
) -> AsyncIterator[Listener]:
    listener = Listener("comms_socket", ssl_context=context, handler=handler, limits=Limits(**limits))  # type: ignore[arg-type]
    if unix:
        listener.bind_unix(unix)
    else:
        await listener.bind("127.0.0.1", 0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            try:
                yield listener
            finally:
                with trio.CancelScope(shield=True):
                    await listener.drain()
    assert listener.statistics().open_connections == 0


async def received(stream: trio.SocketStream, until: bytes = b"") -> bytes:
    """What comes up to ``until``, or to the end."""
    data = b""
    while not (until and data.endswith(until)):
        piece = await stream.receive_some()
        if not piece:
            break
        data += piece
    return data


async def tcp(listener: Listener) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", listener.port)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder, ca = tmp_path_factory.mktemp("pki"), trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
    issued.private_key_pem.write_to_path(str(folder / "key"))
    client = ssl.create_default_context()
    ca.configure_trust(client)
    return server_context(folder / "cert", folder / "key"), client


@pytest.mark.parametrize("length_bytes", [None, len(WHOLE)])
@pytest.mark.parametrize("http2", [False, True])
def test_a_streamed_body_arrives_whole_and_the_connection_goes_on(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], length_bytes: int | None, http2: bool
) -> None:
    """Chunked, or with the length it was told; HEAD gets the same head without it."""

    async def main() -> None:
        async with serving(Streamer(write_pieces, length_bytes), context=tls[0]) as listener:
            url = f"https://localhost:{listener.port}"
            async with httpx.AsyncClient(verify=tls[1], http2=http2, trust_env=False, timeout=10) as client:
                first = await client.get(f"{url}/s")
                again = await client.get(f"{url}/s")
                head = await client.head(f"{url}/s")
                plain = await client.get(f"{url}/plain")
            assert first.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
            assert first.content == again.content == WHOLE
            assert first.headers.get("content-length") == (None if length_bytes is None else str(length_bytes))
            assert head.headers.get("content-length") == first.headers.get("content-length")
            assert (head.content, plain.content) == (b"", b"plain")
            assert listener.statistics().accepted == 1
            assert listener.statistics().errors == 0

    trio.run(main)


def test_each_piece_leaves_at_once_and_the_next_request_may_be_sent_meanwhile() -> None:
    """A command stream is read piece by piece; what the client sends ahead is answered afterwards."""
    go_on = trio.Event()

    async def stream(write: Write) -> None:
        await write(b"first")
        await go_on.wait()
        await write(b"last")

    async def main() -> None:
        async with serving(Streamer(stream)) as listener, await tcp(listener) as client:
            await client.send_all(GET)
            assert (await received(client, b"5\r\nfirst\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
            await client.send_all(b"GET /plain HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            go_on.set()
            rest = await received(client)
            assert rest.startswith(b"4\r\nlast\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n")
            assert rest.endswith(b"plain")

    trio.run(main)


def test_http_1_0_gets_the_end_of_the_connection_for_the_end_of_the_body() -> None:
    async def main() -> None:
        async with serving(Streamer(write_pieces)) as listener, await tcp(listener) as client:
            await client.send_all(b"GET /s HTTP/1.0\r\n\r\n")
            head, _, body = (await received(client)).partition(b"\r\n\r\n")
            assert b"chunked" not in head
            assert b"connection: close" in head
            assert body == WHOLE

    trio.run(main)


@pytest.mark.parametrize("http2", [False, True])
def test_a_client_that_leaves_ends_an_endless_stream(tls: tuple[ssl.SSLContext, ssl.SSLContext], http2: bool) -> None:
    """Although nothing is ever written: somebody watches."""
    begun, ended = trio.Event(), trio.Event()

    async def stream(write: Write) -> None:
        try:
            await write(b"hello")
            begun.set()
            await trio.sleep_forever()
        finally:
            ended.set()

    async def main() -> None:
        async with serving(Streamer(stream), context=tls[0]) as listener:
            async with (
                httpx.AsyncClient(verify=tls[1], http2=http2, trust_env=False) as client,
                client.stream("GET", f"https://localhost:{listener.port}/s"),
            ):
                await begun.wait()
            await ended.wait()
            assert listener.statistics().errors == 0

    trio.run(main)


@pytest.mark.parametrize(("length_bytes", "written"), [(10, b"short"), (3, b"too long"), (None, None)])
@pytest.mark.parametrize("http2", [False, True])
def test_a_stream_that_fails_is_never_taken_for_whole(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], length_bytes: int | None, written: bytes | None, http2: bool
) -> None:
    """Less than was told, more than was told, or an exception: the client sees an error, not a short body."""

    async def stream(write: Write) -> None:
        if written is None:
            await write(b"so far")
            raise RuntimeError("secret detail")
        await write(written)

    async def main() -> None:
        async with (
            serving(Streamer(stream, length_bytes), context=tls[0]) as listener,
            httpx.AsyncClient(verify=tls[1], http2=http2, trust_env=False) as client,
        ):
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                await client.get(f"https://localhost:{listener.port}/s")
            assert (await client.get(f"https://localhost:{listener.port}/plain")).content == b"plain"

    trio.run(main)


def test_a_reader_that_stalls_is_cut_in_the_middle_of_a_stream() -> None:
    """Its writer is cancelled, so whatever it held is free."""
    ended = trio.Event()

    async def stream(write: Write) -> None:
        try:
            while True:
                await write(b"x" * 1_000_000)
        finally:
            ended.set()

    async def main() -> None:
        async with serving(Streamer(stream), write_timeout_s=0.2) as listener, await tcp(listener) as client:
            await client.send_all(GET)
            await ended.wait()

    trio.run(main)


def test_a_write_given_up_half_way_spoils_the_answer_and_nothing_follows_it() -> None:
    """A handler may have a deadline of its own; afterwards nobody knows what the client has."""
    tried = trio.Event()

    async def stream(write: Write) -> None:
        with trio.move_on_after(0.2):
            while True:
                await write(b"x" * 1_000_000)
        with pytest.raises(trio.BrokenResourceError):
            await write(b"more")
        tried.set()

    async def main() -> None:
        async with serving(Streamer(stream)) as listener, await tcp(listener) as client:
            await client.send_all(GET)
            await tried.wait()
            data = b""
            with contextlib.suppress(trio.BrokenResourceError):
                data = await received(client)
            assert not data.endswith(b"0\r\n\r\n")

    trio.run(main)


def test_draining_waits_for_a_stream_only_so_long() -> None:
    async def stream(write: Write) -> None:
        await write(b"hello")
        await trio.sleep_forever()

    async def main() -> None:
        async with serving(Streamer(stream), drain_timeout_s=0.1) as listener, await tcp(listener) as client:
            await client.send_all(GET)
            await received(client, b"hello\r\n")
            await listener.drain()
            with contextlib.suppress(trio.BrokenResourceError):
                assert not (await received(client)).endswith(b"0\r\n\r\n")

    trio.run(main)


def test_a_request_line_without_end_is_414() -> None:
    async def main() -> None:
        async with serving(Streamer(write_pieces), max_header_bytes=2000) as listener, await tcp(listener) as client:
            await client.send_all(b"GET /" + b"x" * 3000)
            assert (await received(client, b"target_too_long")).startswith(b"HTTP/1.1 414 ")

    trio.run(main)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
def test_connections_to_machines_that_vanished_are_given_up_in_a_minute() -> None:
    """Both when nothing is on its way to them, and when something is."""

    async def main() -> None:
        async with (
            serving(Streamer(write_pieces), vanished_after_s=60, unacknowledged_after_s=60) as listener,
            await tcp(listener) as client,
        ):
            await client.send_all(GET)
            await client.receive_some()
            (connection,) = listener._connections
            ours = connection.transport.socket
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

    trio.run(main)


# unix sockets


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A folder whose path does not fit into an address."""
    folder = tmp_path.joinpath(*["d" * 40] * 4)
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder)) > UNIX_PATH_BYTES
    return folder


async def ask_unix(path: Path) -> bytes:
    with reachable_path(path) as address:
        stream = await trio.open_unix_socket(address)
    async with stream:
        await stream.send_all(b"GET /s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return await received(stream)


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_unix_socket_is_for_its_user_only_and_knows_who_asks(tmp_path: Path, deep: Path, is_deep: bool) -> None:
    """Mode 0600 under any umask; however long its path is; gone at the end."""
    path = (deep if is_deep else tmp_path) / "c.sock"
    handler = Streamer(write_pieces)

    async def main() -> None:
        before = os.umask(0)
        try:
            async with serving(handler, unix=path) as listener:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert (await ask_unix(path)).startswith(b"HTTP/1.1 200 OK")
                assert listener.statistics().requests == 1
        finally:
            os.umask(before)

    trio.run(main)
    assert not path.exists()
    assert [(peer.address, peer.unix_user) for peer in handler.peers] == [("unix", os.getuid())]


def test_the_socket_file_of_a_killed_box_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()

    async def main() -> None:
        async with serving(Streamer(write_pieces), unix=path):
            assert (await ask_unix(path)).startswith(b"HTTP/1.1 200 OK")

    trio.run(main)


def test_a_socket_in_use_and_a_file_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    """Nothing is removed that is not known to be dead."""
    path, other = tmp_path / "c.sock", tmp_path / "notes.txt"
    other.write_text("mine")

    async def main() -> None:
        async with serving(Streamer(write_pieces), unix=path):
            second = Listener("comms_socket", handler=Streamer(write_pieces))
            with pytest.raises(AddressInUse, match="somebody listens at"):
                second.bind_unix(path)
            with pytest.raises(BadSetup, match="another kind of file"):
                second.bind_unix(other)
            second.stop_accepting()
            assert (await ask_unix(path)).startswith(b"HTTP/1.1 200 OK")

    trio.run(main)
    assert other.read_text() == "mine"


def test_a_socket_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    """The end of one box takes nothing from the next."""
    path = tmp_path / "c.sock"

    async def main() -> None:
        async with serving(Streamer(write_pieces), unix=path):
            path.rename(tmp_path / "kept.sock")  # so that its inode is not given to the next
            with socket.socket(socket.AF_UNIX) as newer:
                newer.bind(str(path))

    trio.run(main)
    assert path.exists()
