"""The shell broker against a naive relay in the same process: echo, throughput, idle memory, stop with a stalled peer.

    python tests/bench/bench_shells.py [--quick]

The server runs in a process of its own; agent and operator are in this one. The relay passes WebSocket messages on and
does nothing else: no frames, flow control, recording or audit. Both speak TLS on loopback through the same listener.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import trio
import trio_websocket
import trustme

from osqbox import audit
from osqbox import shell_frames as frames
from osqbox.clock import SystemClock
from osqbox.errors import Refused
from osqbox.feed import Feed
from osqbox.listen import Limits, Listener, agents_asgi, server_context
from osqbox.listen.websocket import WebSocket
from osqbox.shell_frames import SUBPROTOCOL, AgentHello, AgentWelcome, Exit, FrameType, ViewerHello
from osqbox.shells import tables
from osqbox.shells.broker import open_broker
from osqbox.shells.links import FrameLink
from osqbox.shells.messages import Grant, ShellBounds
from osqbox.shells.recording import RecordingRules
from osqbox.shells.routes import ShellsApi
from osqbox.store import Store

MIB = 1024 * 1024
MESSAGE_BYTES = 16 * 1024
SOCKET_BUFFER_BYTES = 4096


# the server


def relay(otherwise: Any) -> Any:
    """Two WebSockets on /relay/NAME/a and /b, joined."""
    waiting: dict[str, tuple[Any, Any, trio.Event]] = {}

    async def pump(receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "websocket.receive":
            await trio.lowlevel.checkpoint()
            await send({"type": "websocket.send", "bytes": message["bytes"]})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket" or not scope["path"].startswith("/relay/"):
            await otherwise(scope, receive, send)
            return
        name = scope["path"].split("/")[2]
        await receive()
        await send({"type": "websocket.accept"})
        if name not in waiting:
            done = trio.Event()
            waiting[name] = (receive, send, done)
            await done.wait()
            return
        other_receive, other_send, done = waiting.pop(name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump, receive, other_send)
            await pump(other_receive, send)
            nursery.cancel_scope.cancel()
        done.set()

    return app


def viewers(broker: Any, otherwise: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket" or not scope["path"].startswith("/view/"):
            await otherwise(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        link = FrameLink(WebSocket(receive, send), frames.VIEWER_FRAME_BYTES)
        try:
            await broker.view(scope["path"].split("/")[2], "bench", Grant.CONTROLLER, link)
        except (Refused, frames.FrameError) as error:
            await link.aclose(1011, str(error))

    return app


async def serve(folder: Path) -> None:
    """Obeys JSON lines on stdin: how many sessions to open; ``stop`` ends."""
    numbers = count()
    store = Store.open(folder / "osqbox.db", [audit.migrations, tables.migrations], SystemClock(), Feed())
    bounds = ShellBounds(sessions=10**5, sessions_per_node=10**5, sessions_per_operator=10**5, hold_s=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        async with open_broker(
            store,
            folder / "shells",
            SystemClock(),
            bounds,
            new_id=lambda: f"s{next(numbers)}",
            rules=RecordingRules(reserve_bytes=0),
        ) as broker:
            api = ShellsApi(broker, lambda _key, _peer: ("n1", "default", "bench"))
            listener = Listener(
                "agents",
                ssl_context=server_context(folder / "cert", folder / "key"),
                handler=api,
                app=agents_asgi(api, websocket_app=relay(viewers(broker, api.join))),
                limits=Limits(websocket_message_bytes=2 * MIB),
            )
            await listener.bind("127.0.0.1", 0)
            await nursery.start(listener.run)
            say({"port": listener.port})
            while (line := await trio.to_thread.run_sync(sys.stdin.readline)).strip() not in ("", "stop"):
                wanted = json.loads(line)
                for _ in range(wanted):
                    await broker.open("n1", "default", "bench", "bench")
                offers = await broker.poll("n1", "default", trio.sleep_forever) if wanted else []
                say({"offers": offers, "rss_kib": rss_kib(), "cpu_s": time.process_time()})
            began = time.perf_counter()
            await broker.stop()
            await listener.drain()
            say({"stop_s": time.perf_counter() - began})
        await store.aclose()


def say(fact: dict[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


def rss_kib() -> int:
    import gc

    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


# the clients


class Server:
    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        issued = ca.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.ECDSA)
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
        issued.private_key_pem.write_to_path(str(folder / "key"))
        self.tls = ssl.create_default_context()
        ca.configure_trust(self.tls)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = self._hear()["port"]

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fact: dict[str, Any] = json.loads(self._process.stdout.readline())
        return fact

    def _tell(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._hear()

    def open(self, sessions: int) -> list[tuple[str, str]]:
        """New sessions and their secrets."""
        offers: list[tuple[str, str]] = self._tell(str(sessions))["offers"]
        return offers

    def cost(self) -> tuple[int, float]:
        """KiB of memory now, seconds of CPU so far."""
        fact = self._tell("0")
        return fact["rss_kib"], fact["cpu_s"]

    def stop(self) -> float:
        stop_s: float = self._tell("stop")["stop_s"]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.wait(10)
        self._process.stdin.close()
        self._process.stdout.close()
        return stop_s

    @asynccontextmanager
    async def socket(
        self, path: str, subprotocol: str | None = SUBPROTOCOL, *, narrow: bool = False
    ) -> AsyncIterator[Any]:
        tcp = await trio.open_tcp_stream("127.0.0.1", self.port)
        if narrow:
            tcp.setsockopt(1, 8, SOCKET_BUFFER_BYTES)  # SOL_SOCKET, SO_RCVBUF
        stream = trio.SSLStream(tcp, self.tls, server_hostname="localhost", https_compatible=True)
        try:
            async with trio.open_nursery() as nursery:
                yield await trio_websocket.wrap_client_stream(
                    nursery,
                    stream,
                    "localhost",
                    path,
                    subprotocols=[subprotocol] if subprotocol else None,
                    message_queue_size=1 if narrow else 16,
                    max_message_size=2 * MIB,
                )
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(tcp)

    async def join(self, socket: Any, session: str, secret: str) -> AgentWelcome:
        await socket.send_message(frames.encode(frames.hello(AgentHello(session=session, secret=secret))))
        return frames.parse(frames.decode(await socket.get_message()), AgentWelcome)

    async def watch(self, socket: Any) -> None:
        await socket.send_message(frames.encode(frames.hello(ViewerHello(client="bench"))))


async def next_frame(socket: Any) -> frames.Frame:
    while (frame := frames.decode(await socket.get_message())).type is FrameType.PING:
        await socket.send_message(frames.encode(frames.pong(frame)))
    return frame


async def echo(server: Server, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of key strokes through the relay and through the broker, taken in turns."""
    [(session, secret)] = server.open(1)
    async with (
        server.socket("/relay/x/a", None) as far,
        server.socket("/relay/x/b", None) as near,
        server.socket(f"/api/v1/shells/{session}") as agent,
        server.socket(f"/view/{session}") as viewer,
        trio.open_nursery() as nursery,
    ):

        async def relay_echo() -> None:
            while True:
                await far.send_message(await far.get_message())

        async def agent_echo() -> None:
            await server.join(agent, session, secret)
            head = 0
            while True:
                frame = await next_frame(agent)
                if frame.type is FrameType.DATA_IN:
                    await agent.send_message(frames.encode(frames.data_out(head, frame.payload)))
                    head += len(frame.payload)
                    if head % 100 == 0:
                        await agent.send_message(frames.encode(frames.ack(head)))

        nursery.start_soon(relay_echo)
        nursery.start_soon(agent_echo)
        await server.watch(viewer)
        naive, ours = [], []
        for number in range(rounds):
            await trio.sleep(0.001)
            began = time.perf_counter()
            await near.send_message(b"k" * 11)
            await near.get_message()
            naive.append(time.perf_counter() - began)
            await trio.sleep(0.001)
            began = time.perf_counter()
            await viewer.send_message(frames.encode(frames.data_in(number, b"k")))
            while (await next_frame(viewer)).type is not FrameType.DATA_OUT:
                pass
            ours.append(time.perf_counter() - began)
            await viewer.send_message(frames.encode(frames.ack(number + 1)))
        nursery.cancel_scope.cancel()
    return naive, ours


async def relay_throughput(server: Server, size_bytes: int) -> float:
    """Seconds for so many bytes through the relay."""
    async with server.socket("/relay/y/a", None) as far, server.socket("/relay/y/b", None) as near:
        data, left = bytes(MESSAGE_BYTES), size_bytes
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:

            async def produce() -> None:
                for _ in range(size_bytes // MESSAGE_BYTES):
                    await far.send_message(data)

            nursery.start_soon(produce)
            while left:
                left -= len(await near.get_message())
        return time.perf_counter() - began


async def throughput(server: Server, size_bytes: int, block: bytes) -> float:
    """Seconds for so many bytes through a recorded session, checked."""
    [(session, secret)] = server.open(1)
    sent, got = hashlib.sha256(), hashlib.sha256()
    async with server.socket(f"/api/v1/shells/{session}") as agent, server.socket(f"/view/{session}") as viewer:
        welcome = await server.join(agent, session, secret)
        await server.watch(viewer)
        acked = welcome.wanted
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:

            async def produce() -> None:
                nonlocal acked
                for head in range(0, size_bytes, MESSAGE_BYTES):
                    while head + MESSAGE_BYTES - acked > welcome.window_bytes:
                        frame = await next_frame(agent)
                        acked = frame.offset if frame.type is FrameType.ACK else acked
                    sent.update(block)
                    await agent.send_message(frames.encode(frames.data_out(head, block)))
                await agent.send_message(frames.encode(frames.exit_frame(Exit(code=0), size_bytes)))

            nursery.start_soon(produce)
            shown = acknowledged = 0
            while (frame := await next_frame(viewer)).type is not FrameType.EXIT:
                if frame.type is FrameType.DATA_OUT:
                    got.update(frame.payload)
                    shown += len(frame.payload)
                    if shown - acknowledged >= 64 * 1024 or shown == size_bytes:
                        acknowledged = shown
                        await viewer.send_message(frames.encode(frames.ack(shown)))
            took = time.perf_counter() - began
    assert got.digest() == sent.digest()
    return took


async def idle(server: Server, sessions: int, seconds: float) -> tuple[float, float]:
    """Of each open, recorded session in which nothing happens: KiB of memory; of all: the share of a core."""
    before, _ = server.cost()
    offers = server.open(sessions)
    limit = trio.CapacityLimiter(20)
    joined = trio.Event()
    left = len(offers)

    async def stay(session: str, secret: str) -> None:
        nonlocal left
        async with limit:
            context = server.socket(f"/api/v1/shells/{session}")
            agent = await context.__aenter__()
            await server.join(agent, session, secret)
        left -= 1
        if not left:
            joined.set()
        try:
            while True:
                await next_frame(agent)
        finally:
            with trio.CancelScope(shield=True):
                await context.__aexit__(None, None, None)

    async with trio.open_nursery() as nursery:
        for session, secret in offers:
            nursery.start_soon(stay, session, secret)
        await joined.wait()
        await trio.sleep(1)
        after, began_s = server.cost()
        await trio.sleep(seconds)
        _, ended_s = server.cost()
        nursery.cancel_scope.cancel()
    return (after - before) / sessions, (ended_s - began_s) / seconds


async def stop_s(server: Server) -> float:
    """Seconds the server takes to stop while a viewer with a full socket does not read."""
    [(session, secret)] = server.open(1)
    async with (
        server.socket(f"/api/v1/shells/{session}") as agent,
        server.socket(f"/view/{session}", narrow=True) as viewer,
    ):
        await server.join(agent, session, secret)
        await server.watch(viewer)
        for head in range(0, frames.AGENT_WINDOW_BYTES, MESSAGE_BYTES):
            await agent.send_message(frames.encode(frames.data_out(head, bytes(MESSAGE_BYTES))))
        await trio.sleep(0.3)
        return await trio.to_thread.run_sync(server.stop)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def main(quick: bool, report: Callable[[str], None] = print) -> None:
    rounds, size_bytes, sessions = (200, 4 * MIB, 50) if quick else (2000, 64 * MIB, 1000)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        naive, ours = trio.run(echo, server, rounds)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            before, after = percentile(naive, share), percentile(ours, share)
            report(f"echo {name}: relay {before:.2f} ms, broker {after:.2f} ms, added {after - before:.2f} ms")
        relays = [trio.run(relay_throughput, server, size_bytes) for _ in range(3)]
        before = size_bytes / statistics.median(relays) / 1e6
        text = (b"\x1b[32m-rw-r--r--\x1b[0m 1 root root 4096 Jan  1 00:00 caf\xc3\xa9.txt\r\n" * 512)[:MESSAGE_BYTES]
        for name, block in (("text", text), ("random bytes", os.urandom(MESSAGE_BYTES))):
            took = [trio.run(throughput, server, size_bytes, block) for _ in range(3)]
            after = size_bytes / statistics.median(took) / 1e6
            report(f"{name}: relay {before:.0f} MB/s, broker with recording {after:.0f} MB/s, {after / before:.2f}x")
        kib, share = trio.run(idle, server, sessions, 1 if quick else 16)
        report(f"idle: {kib:.0f} KiB each of {sessions} sessions, {share:.1%} of a core for all, pings included")
        report(f"stop with a stalled viewer: {trio.run(stop_s, server):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve)
    else:
        main(options.quick)
