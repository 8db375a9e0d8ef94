"""Commands to agents that wait: latency among idle streams, memory, event posts beside them, long queues, the end.

    python tests/bench/bench_comms.py [--quick] [--streams 1000]

In process first: a hub, its store and streams that write to memory. Then over real TLS: the comms listener runs in a
process of its own on the first core, a thousand agents and the publisher (on the unix socket) in this one. The
yardstick is the agents' poll of 2024-25 against a server that looks every 10 s: 0 to 10 s and the gap between polls.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import trio
import trio.testing
import trustme

from osqbox import audit, tenants
from osqbox.cli.tune import tune_process
from osqbox.clock import SystemClock
from osqbox.comms.front import open_comms
from osqbox.comms.hub import Hub
from osqbox.comms.messages import Action, Change, NewCommand
from osqbox.comms.registration import new_agent
from osqbox.comms.sqlite import MIGRATIONS, SqliteIndexer, agents
from osqbox.comms.streams import sse
from osqbox.feed import Feed
from osqbox.listen import Limits, Listener, agents_asgi, server_context
from osqbox.settings import CommsSettings, Retention
from osqbox.store import Store

EVENT = json.dumps({"module": "bench", "collector": "line", "data": {"message": "x" * 200}}).encode()
CORES = sorted(os.sched_getaffinity(0))


def percentiles(seconds: list[float]) -> str:
    found = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return f"p50 {found[49] * 1000:6.2f} ms, p99 {found[98] * 1000:6.2f} ms, max {max(seconds) * 1000:6.2f} ms"


@asynccontextmanager
async def open_store(folder: Path) -> AsyncIterator[Store]:
    steps = [tenants.migrations, audit.migrations, *MIGRATIONS]
    store = Store.open(folder / "osqbox.db", steps, SystemClock(), Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        await store.write(lambda tx: tenants.create(tx, tenants.DEFAULT, tenants.TenantOptions()))
        yield store
        await store.aclose()


def add_agents(store: Store, number: int) -> Awaitable[list[Any]]:
    made = [new_agent(uuid=f"agent-{n:05}", name=f"agent-{n:05}", now=time.time()) for n in range(number)]
    return store.write(lambda tx: [agents.add(tx, each, "no login", actor="bench") for each in made])


def new_commands(uuids: list[str], numbers: Any, wanted: int = 1) -> list[NewCommand]:
    now, restart = time.time(), Action(name="restart", args={})
    return [
        NewCommand(
            id=f"c{next(numbers)}", agent=uuid, tenant="default", action=restart, request_id="bench",
            created_at=now, expires_at=now + 86400,
        )
        for uuid in uuids
        for _ in range(wanted)
    ]  # fmt: skip


# in process


async def in_process(folder: Path, streams: int, rounds: int, queued: int) -> None:
    numbers = count()
    async with open_store(folder) as store:
        told: list[Callable[[Change], None]] = []
        indexer = SqliteIndexer(store, lambda change: told[0](change), SystemClock())  # noqa: PLW0108 - there is none yet
        hub = Hub(indexer, SystemClock())
        told.append(hub.changed)
        everyone = await add_agents(store, streams)
        arrived: dict[str, trio.Event] = {each.uuid: trio.Event() for each in everyone}

        async def listen(agent: Any) -> None:
            async def write(piece: bytes) -> None:
                if b"event: command" in piece:
                    arrived[agent.uuid].set()

            async with hub.attach(agent, connection=agent.uuid, after=None, expires_at=time.time() + 900) as stream:
                await sse(stream, write)

        async with trio.open_nursery() as nursery:
            for each in everyone:
                nursery.start_soon(listen, each)
            await trio.testing.wait_all_tasks_blocked(0.01)
            took = []
            woken = hub.statistics().wakes
            for n in range(rounds):
                uuid = everyone[n * 7 % streams].uuid
                arrived[uuid] = trio.Event()
                began = time.perf_counter()
                await indexer.commands.publish(new_commands([uuid], numbers), actor="bench")
                await arrived[uuid].wait()
                took.append(time.perf_counter() - began)
            print(f"in process, {streams} idle streams: publish to one: {percentiles(took)}")
            print(f"in process, wakes for each publication: {(hub.statistics().wakes - woken) / rounds:.2f}")
            began = time.perf_counter()
            hub.stop()
        print(f"in process, stop with {streams} streams: {time.perf_counter() - began:.3f} s")
        await long_queue(store, indexer, numbers, queued)


async def long_queue(store: Store, indexer: SqliteIndexer, numbers: Any, queued: int) -> None:
    hub, left = Hub(indexer, SystemClock()), queued
    others: list[float] = []

    async def write_beside(done: trio.Event) -> None:
        while not done.is_set():
            began = time.perf_counter()
            await store.write(lambda tx: None)
            others.append(time.perf_counter() - began)
            await trio.sleep(0.005)

    async def write(piece: bytes) -> None:
        nonlocal left
        left -= piece.count(b"event: command")
        if left <= 0:
            hub.stop()

    published = trio.Event()
    async with trio.open_nursery() as nursery:
        new = new_commands(["agent-00000"], numbers, queued)
        nursery.start_soon(write_beside, published)
        began = time.perf_counter()
        await indexer.commands.publish(new, actor="bench")
        took = time.perf_counter() - began
        published.set()
    print(
        f"{queued} commands published in one call: {took:.2f} s; the longest other write meanwhile {max(others):.2f} s"
    )
    agent = await indexer.agents.find("agent-00000")
    assert agent is not None
    began = time.perf_counter()
    async with hub.attach(agent, connection="drain", after=None, expires_at=time.time() + 900) as stream:
        await sse(stream, write)
    took = time.perf_counter() - began
    print(f"{queued} queued commands over one stream: {took:.2f} s, {queued / took:,.0f}/s")


# over TLS: the server


def say(fact: dict[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


def cost() -> dict[str, Any]:
    import gc

    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {"rss_kib": int(status.split("VmRSS:")[1].split()[0]), "cpu_s": time.process_time()}


async def serve(folder: Path, number: int) -> None:
    """Answers every line on stdin with what it costs; ``stop`` ends."""
    numbers = count()
    async with open_store(folder) as store:
        everyone = await add_agents(store, number)
        async with open_comms(
            CommsSettings(token_algorithm="ES256"), Retention(), store, SystemClock(),
            data_dir=folder, certs_dir=folder, new_id=lambda: f"id-{next(numbers)}",
        ) as comms, trio.open_nursery() as nursery:  # fmt: skip
            listener = Listener(
                "comms",
                ssl_context=server_context(folder / "cert", folder / "key"),
                handler=comms.api,
                app=agents_asgi(comms.api, websocket_app=comms.api.websocket),
                limits=Limits(),
            )
            await listener.bind("127.0.0.1", 0)
            publishers = Listener("comms_socket", handler=comms.publishers)
            publishers.bind_unix(folder / "comms.sock")
            await nursery.start(listener.run)
            await nursery.start(publishers.run)
            now = comms.clock.now()
            (folder / "tokens").write_text("\n".join(comms.tokens.issue(each, now) for each in everyone))
            say({"port": listener.port})
            while (await trio.to_thread.run_sync(sys.stdin.readline)).strip() not in ("", "stop"):
                hub = comms.hub.statistics()
                say({**cost(), "streams": hub.streams, "wakes": hub.wakes})
            began = time.perf_counter()
            comms.hub.stop()
            await publishers.drain()
            await listener.drain()
            say({"stop_s": time.perf_counter() - began, "ended": comms.hub.statistics().ended})


# over TLS: the agents


class Server:
    def __init__(self, folder: Path, number: int) -> None:
        ca = trustme.CA()
        issued = ca.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.ECDSA)
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
        issued.private_key_pem.write_to_path(str(folder / "key"))
        self.folder = folder
        self.tls = ssl.create_default_context()
        ca.configure_trust(self.tls)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), "--streams", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._hear()["port"]
        self.tokens = (folder / "tokens").read_text().split("\n")

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fact: dict[str, Any] = json.loads(self._process.stdout.readline())
        return fact

    def tell(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._hear()

    async def atell(self, line: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(self.tell, line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
        tcp = await trio.open_tcp_stream("127.0.0.1", self.port)
        try:
            stream = trio.SSLStream(tcp, self.tls, server_hostname="localhost", https_compatible=True)
            await stream.do_handshake()
            yield stream
        finally:
            await trio.aclose_forcefully(tcp)


def request(method: str, path: str, token: str | None, body: bytes = b"", accept: str = "*/*") -> bytes:
    bearer = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n{bearer}Content-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def exchange(stream: Any, sent: bytes, expected: bytes) -> None:
    """One request on a connection that is kept; its answer's head says how long it is."""
    await stream.send_all(sent)
    got = b""
    while b"\r\n\r\n" not in got:
        got += await stream.receive_some(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    assert expected in head.split(b"\r\n")[0], got
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    left = int(lengths[0].split(b":")[1]) - len(body)
    while left > 0:
        left -= len(await stream.receive_some(65536))


class Fleet:
    """Agents that hold a stream open, and when they heard of a command."""

    def __init__(self, server: Server, number: int) -> None:
        self.server = server
        self.number = number
        self.open = 0
        self.heard: dict[int, int] = dict.fromkeys(range(number), 0)
        self.farewells = 0
        self.news: Callable[[int], None] = lambda _: None

    async def listen(self, n: int, limit: trio.CapacityLimiter) -> None:
        async with limit:
            connecting = self.server.connection()
            stream = await connecting.__aenter__()
        try:
            token = self.server.tokens[n]
            await stream.send_all(request("GET", "/commands", token, accept="text/event-stream"))
            self.open += 1
            while piece := await stream.receive_some(65536):
                if got := piece.count(b"event: command"):
                    self.heard[n] += got
                    self.news(n)
                self.farewells += piece.count(b"event: bye")
        except (trio.BrokenResourceError, ssl.SSLError):
            pass
        finally:
            await connecting.__aexit__(None, None, None)

    async def publish(self, socket: trio.SocketStream, body: dict[str, Any]) -> None:
        await exchange(socket, request("POST", "/commands", None, json.dumps(body).encode()), b"202")

    async def publish_to_one(self, socket: trio.SocketStream, n: int) -> float:
        """Seconds from the request to the event at the agent."""
        arrived = trio.Event()

        def note(who: int) -> None:
            if who == n:
                arrived.set()

        self.news = note
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.publish, socket, {"command": "restart", "uuids": [f"agent-{n:05}"]})
            await arrived.wait()
            return time.perf_counter() - began

    async def publish_to_all(self, socket: trio.SocketStream) -> float:
        waiting, done = set(range(self.number)), trio.Event()

        def note(who: int) -> None:
            waiting.discard(who)
            if not waiting:
                done.set()

        self.news = note
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.publish, socket, {"command": "restart", "uuids": "all"})
            await done.wait()
        return time.perf_counter() - began


async def post_events(server: Server, token: str, took: list[float], done: trio.Event) -> None:
    async with server.connection() as stream:
        while not done.is_set():
            began = time.perf_counter()
            await exchange(stream, request("POST", "/events/stateless", token, EVENT), b"202")
            took.append(time.perf_counter() - began)
            await trio.sleep(0.002)


async def post_alone(server: Server, seconds: float) -> list[float]:
    took: list[float] = []
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post_events, server, server.tokens[0], took, done)
        await trio.sleep(seconds)
        done.set()
    return took


async def over_tls(folder: Path, streams: int, rounds: int) -> None:
    if len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[0]})  # inherited by the server
    server = await trio.to_thread.run_sync(Server, folder, streams)
    if len(CORES) > 1:
        os.sched_setaffinity(0, set(CORES[1:]))
    try:
        alone = await post_alone(server, rounds / 100)
        print(f"TLS, no streams:        POST event: {percentiles(alone)}")
        before = await server.atell("cost")
        fleet, limit = Fleet(server, streams), trio.CapacityLimiter(32)
        async with trio.open_nursery() as nursery:
            began = time.perf_counter()
            for n in range(streams):
                nursery.start_soon(fleet.listen, n, limit)
            while (after := await server.atell("cost"))["streams"] < streams:
                await trio.sleep(0.01)
            took = time.perf_counter() - began
            print(f"TLS, {streams} streams opened in {took:.2f} s ({streams / took:,.0f}/s)")
            kib = (after["rss_kib"] - before["rss_kib"]) / streams
            print(f"TLS, server memory for each idle stream: {kib:.1f} KiB")
            await measure(server, fleet, streams, rounds)
            ended = await server.atell("stop")
            print(f"TLS, stop with {streams} streams: {ended['stop_s']:.2f} s, {ended['ended']}")
        assert fleet.farewells == streams, fleet.farewells
    finally:
        server.close()


async def measure(server: Server, fleet: Fleet, streams: int, rounds: int) -> None:
    idle = await post_alone(server, rounds / 100)
    print(f"TLS, {streams} idle streams: POST event: {percentiles(idle)}")
    async with await trio.open_unix_socket(str(server.folder / "comms.sock")) as socket:
        before = await server.atell("cost")
        took = []
        for n in range(rounds):
            took.append(await fleet.publish_to_one(socket, n * 7 % streams))
            await trio.sleep(0.002)
        after = await server.atell("cost")
        print(f"TLS, {streams} idle streams: publish to one, until it has it: {percentiles(took)}")
        print(f"TLS, wakes for each publication: {(after['wakes'] - before['wakes']) / rounds:.2f}")
        assert sum(fleet.heard.values()) == rounds
        took, posted, done = [], [], trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post_events, server, server.tokens[0], posted, done)
            for n in range(rounds):
                took.append(await fleet.publish_to_one(socket, n * 11 % streams))
                await trio.sleep(0.002)
            done.set()
        print(f"TLS, the same while events are posted:        {percentiles(took)}")
        print(f"TLS, the events meanwhile:         POST event: {percentiles(posted)}")
        print(f"TLS, publish to all {streams}, until the last has it: {await fleet.publish_to_all(socket):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--serve", type=Path)
    options = parser.parse_args()
    tune_process()
    if options.serve:
        trio.run(serve, options.serve, options.streams)
        return
    streams, rounds, queued = (50, 20, 2000) if options.quick else (options.streams, 500, 100_000)
    for part in (lambda folder: in_process(folder, streams, rounds, queued), lambda f: over_tls(f, streams, rounds)):
        with tempfile.TemporaryDirectory() as folder:
            trio.run(part, Path(folder))


if __name__ == "__main__":
    main()
