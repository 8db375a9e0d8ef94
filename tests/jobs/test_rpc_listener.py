"""Who gets as far as a handler of the jobs listener, and how much one connection carries."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import h2.connection
import pytest
import trio
import trustme
from priority import DeadlockError, DuplicateStreamError, MissingStreamError, PriorityTree

from osqbox.jobs.rpc import make_jobs_app
from osqbox.listen import Listener
from osqbox.listen.hypercorn_repairs import RoundRobin

from .rig import Pki, Served, serving, until, whole


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def run(pki: Pki, scenario: Callable[[Served], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(pki) as served:
            await scenario(served)

    trio.run(main)


# who


def stranger(folder: Path) -> tuple[Path, Path]:
    """Alice, as somebody else's CA sees it."""
    issued = trustme.CA().issue_cert("alice", common_name="alice")
    cert, key = folder / "stranger.pem", folder / "stranger.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    return cert, key


CERTIFICATES: dict[str, Callable[[Pki, Path], tuple[Path, Path] | None]] = {
    "none": lambda _pki, _folder: None,
    "of another CA": lambda _pki, folder: stranger(folder),
    "expired": lambda pki, _folder: pki.client("late", age_days=40, days=30),
    "not yet valid": lambda pki, _folder: pki.client("early", age_days=-2),
    "for servers": lambda pki, _folder: (pki.identity.server_cert, pki.identity.server_key),
}


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_these_never_reach_a_handler(pki: Pki, tmp_path: Path, certificate: str) -> None:
    async def scenario(served: Served) -> None:
        pair = CERTIFICATES[certificate](pki, tmp_path)
        context = pki.client_context(None)
        if pair:
            context.load_cert_chain(*pair)
        assert await trio.to_thread.run_sync(first_bytes, served.listener.port, context) == b""
        assert served.listener.statistics().handshake_failures

        cert, key = (file.read_bytes() for file in pair) if pair else (None, None)
        client = served.client()
        client.channel.close()
        credentials = grpc.ssl_channel_credentials(pki.ca.read_bytes(), key, cert)
        client.channel = grpc.secure_channel(f"localhost:{served.listener.port}", credentials)
        error = await client.fails("RunProcess", command=b"true", within_s=5)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert served.listener.statistics().requests == 0
        assert served.runner.specs == []

        assert await served.client().run("true")

    run(pki, scenario)


def first_bytes(port: int, context: ssl.SSLContext) -> bytes:
    """What a server sends to whom it lets speak HTTP/2; empty when it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as stream:
                h2_client = h2.connection.H2Connection()
                h2_client.initiate_connection()
                stream.sendall(h2_client.data_to_send())
                return stream.recv(10)
        except OSError:
            return b""


def test_tls_1_3_with_aes_256_only(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        port = served.listener.port
        old = pki.client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await trio.to_thread.run_sync(first_bytes, port, old) == b""
        assert served.listener.statistics().handshake_failures == {"version_or_cipher": 1}
        assert await trio.to_thread.run_sync(first_bytes, port, pki.client_context()) != b""
        assert served.listener.statistics().requests == 0

        cert, key = pki.client("alice")
        tool = shutil.which("openssl")
        if tool is None:
            return
        suites = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"
        command = [tool, "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", pki.ca, "-cert", cert, "-key", key,
                   "-ciphersuites", suites, "-alpn", "h2", "-brief"]  # fmt: skip
        asked = partial(subprocess.run, command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        told = await trio.to_thread.run_sync(asked)
        assert b"TLSv1.3" in told.stderr + told.stdout
        assert b"TLS_AES_256_GCM_SHA384" in told.stderr + told.stdout

    run(pki, scenario)


def test_the_kernel_asks_after_silent_followers(pki: Pki) -> None:
    """A machine that is gone says nothing: after 4 s it is asked, three times in 6 s."""

    async def scenario(served: Served) -> None:
        await served.client().run("true")
        (connection,) = served.listener._connections
        sock = connection.transport.socket
        options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [4, 2, 3]

    run(pki, scenario)


def test_an_application_needs_its_listener(pki: Pki) -> None:
    """Identity comes from the connection: without one there is no caller."""

    async def scenario(served: Served) -> None:
        def nobody() -> Any:
            raise AssertionError("never asked")

        app = make_jobs_app(served.runner, caller=nobody, stopping=served.stopping)
        assert Listener("jobs", app=app).statistics().requests == 0
        with pytest.raises(KeyError):
            await app({"type": "http", "extensions": {}}, trio.sleep_forever, trio.sleep)

    run(pki, scenario)


# how much


def turns_until_served(scheduler: Any) -> int:
    """Of a stream with something to say, while on every turn a new call begins and the one just served ends."""
    scheduler.insert_stream(1)
    for _ in range(1_000):  # it has said a lot before
        assert next(scheduler) == 1
    scheduler.block(1)
    for other in range(3, 67, 2):
        scheduler.insert_stream(other)
    scheduler.unblock(1)
    for turn in range(1_000):
        served = next(scheduler)
        if served == 1:
            return turn
        scheduler.remove_stream(served)
        scheduler.insert_stream(101 + 2 * turn)
    return 1_000


def test_a_stream_waits_for_one_round_only() -> None:
    """Not for whoever came later, as in the tree of priorities."""
    assert turns_until_served(RoundRobin()) == 32
    assert turns_until_served(PriorityTree()) == 1_000


def test_round_robin_minds_what_it_does_not_know() -> None:
    scheduler = RoundRobin()
    with pytest.raises(DeadlockError):
        next(scheduler)
    for change in (scheduler.block, scheduler.unblock, scheduler.remove_stream):
        with pytest.raises(MissingStreamError):
            change(1)
    scheduler.insert_stream(1)
    with pytest.raises(DuplicateStreamError):
        scheduler.insert_stream(1)
    scheduler.block(1)
    scheduler.block(1)
    with pytest.raises(DeadlockError):
        next(scheduler)
    scheduler.unblock(1)
    scheduler.unblock(1)
    assert [next(scheduler), next(scheduler)] == [1, 1]
    scheduler.remove_stream(1)
    with pytest.raises(DeadlockError):
        next(scheduler)


def test_thousands_of_calls_on_one_connection(pki: Pki) -> None:
    """32 in flight all the time; the plain Hypercorn ends after the first thousand."""
    calls, in_flight = 3_200, 32

    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sleep", "60")
        call, request = alice.bound("GetProcessStatus")
        room, failures, done = threading.Semaphore(in_flight), [], []

        def finished(future: Any) -> None:
            room.release()
            (failures if future.exception() else done).append(future.exception())

        def work() -> None:
            for _ in range(calls):
                assert room.acquire(timeout=10)
                call.future(request(process_id=job), timeout=20).add_done_callback(finished)
            for _ in range(in_flight):
                assert room.acquire(timeout=10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, work)
            await until(lambda: len(done) > 2 * in_flight)
            while len(done) + len(failures) < calls / 2:  # meanwhile nobody else waits for long
                with trio.fail_after(2):
                    other = await alice.run("sh", "-c", "echo x; sleep 0.05; echo y")
                    assert (await alice.follow(process_id=other))[0] == b"x\ny\n"
                    await alice.ask("DeleteProcess", process_id=other)
        assert (failures, len(done)) == ([], calls)
        assert served.listener.statistics().accepted == 1

    run(pki, scenario)


def test_bodies_that_nobody_reads_use_up_no_window(pki: Pki) -> None:
    """24 MB of them, of a connection whose window is 16."""

    async def scenario(served: Served) -> None:
        alice = served.client()
        nowhere = alice.channel.unary_unary("/no.Such/Method", bytes, bytes)

        def waste() -> set[grpc.StatusCode]:
            return {nowhere.future(b"x" * 60_000, timeout=10).exception().code() for _ in range(400)}

        assert await trio.to_thread.run_sync(waste) == {grpc.StatusCode.UNIMPLEMENTED}
        assert await alice.run("true", *[b"x" * 100_000] * 20)
        assert served.listener.statistics().accepted == 1

    run(pki, scenario)


def test_a_thousand_followers_on_one_connection(pki: Pki) -> None:
    followers = 1_100

    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "echo first; read go; echo second; exit 5", open_stdin=True)
        streams = [alice.stream("GetProcessOutput", process_id=job) for _ in range(followers)]
        await until(lambda: served.runner.followers == followers, 15)
        call, chunk = alice.bound("SendInput")
        await trio.to_thread.run_sync(lambda: call(iter([chunk(process_id=job, data=b"go\n")]), timeout=10))
        for stream in streams:
            output, end = await trio.to_thread.run_sync(whole, stream)
            assert (output, end.exit_code) == (b"first\nsecond\n", 5)
        await until(lambda: served.runner.followers == 0)
        assert served.listener.statistics().accepted == 1

    run(pki, scenario)
