"""A store with something in it, a collector that misbehaves as told, and waiting with a limit."""

from __future__ import annotations

import gzip
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trio

from osqbox import box
from osqbox.clock import SystemClock
from osqbox.comms.sqlite.events import migrations as event_migrations
from osqbox.feed import Feed
from osqbox.forward.forwarding import Forwarding, open_forwarding
from osqbox.forward.messages import ReadOutput, SinkStatistics, SourceName, parse_sink
from osqbox.forward.tables import migrations as forward_migrations
from osqbox.store import Store, Tx

LIMIT_S = 10.0
LOGS = (SourceName.LOGS,)


def migrations() -> list[Any]:
    """Of a whole box, and of forwarding."""
    found = [*box.MIGRATIONS]
    return [*found, *(each for each in (event_migrations, forward_migrations) if each not in found)]


@asynccontextmanager
async def open_store(path: Path) -> AsyncIterator[Store]:
    store = Store.open(path / "osqbox.db", migrations(), SystemClock(), Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            yield store
        finally:
            await store.aclose()


async def log_lines(store: Store, lines: Sequence[Any]) -> None:
    """As `osquery.logs.receive` stores them."""

    def write(tx: Tx) -> None:
        tx.db.executemany(
            "INSERT INTO osquery_logs(tenant, node, log_type, received_at, line) VALUES ('acme', 'n1', 'result', ?, ?)",
            [(tx.now, json.dumps(line)) for line in lines],
        )
        tx.emit("log_received", tenant="acme", node="n1", log_type="result", lines=len(lines))

    await store.write(write, bulk=True)


async def drop_lines(store: Store, until: int) -> None:
    """As retention does."""
    await store.write(lambda tx: tx.db.execute("DELETE FROM osquery_logs WHERE seq <= ?", (until,)))


async def add_events(store: Store, data: Sequence[Any]) -> None:
    def write(tx: Tx) -> None:
        first = tx.db.execute("SELECT count(*) FROM comms_events").fetchone()[0]
        tx.db.executemany(
            "INSERT INTO comms_events(id, tenant, agent, module, collector, received_at, data) "
            "VALUES (?, 'acme', 'a1', 'inventory', 'ports', ?, ?)",
            [(f"e{first + number}", tx.now, json.dumps(each)) for number, each in enumerate(data)],
        )
        tx.emit("comms_events_stored", count=len(data))

    await store.write(write, bulk=True)


@asynccontextmanager
async def forwarding(
    store: Store,
    *places: str,
    sources: Sequence[SourceName] = LOGS,
    read_output: ReadOutput | None = None,
    **settings: Any,
) -> AsyncIterator[Forwarding]:
    sinks = [parse_sink(place, directory=Path("/"), sources=sources, **settings) for place in places]
    async with open_forwarding(store, sinks, SystemClock(), read_output=read_output) as opened:
        yield opened


async def until(condition: Callable[[], Any], what: str = "what was waited for") -> Any:
    """What the condition gives once it is true."""
    with trio.move_on_after(LIMIT_S):
        while True:
            if found := condition():
                return found
            await trio.sleep(0.01)
    raise AssertionError(f"not in {LIMIT_S} s: {what}")


async def all_sent(opened: Forwarding, count: int) -> SinkStatistics:
    """The statistics of the only sink, once so many records were confirmed."""

    def look() -> SinkStatistics | None:
        (only,) = opened.statistics()
        return only if only.forwarded + only.set_aside >= count else None

    found: SinkStatistics = await until(look, f"{count} confirmed, have {opened.statistics()}")
    return found


@dataclass
class Posted:
    path: str
    headers: dict[str, str]
    records: list[dict[str, Any]]
    body: bytes


@dataclass
class Said:
    """An answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang: threading.Event | None = None
    """Waited for before anything is said."""
    cut: bool = False
    """Close without an answer."""


Script = Callable[[Posted], Said]


@dataclass
class Collector:
    url: str = ""
    posted: list[Posted] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    """Records answered with 2xx."""
    script: Script = lambda _: Said()
    connections: int = 0

    def ids(self) -> list[str]:
        return [record["id"] for record in self.taken]

    def lines(self) -> list[Any]:
        return [record["line"] for record in self.taken]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    collector: Collector

    def setup(self) -> None:
        super().setup()
        self.collector.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        plain = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        records = [json.loads(line) for line in plain.splitlines()]
        posted = Posted(self.path, {k.lower(): v for k, v in self.headers.items()}, records, plain)
        self.collector.posted.append(posted)
        said = self.collector.script(posted)
        if said.hang is not None:
            said.hang.wait(20)
        if said.cut:
            self.close_connection = True
            return
        if 200 <= said.status < 300:
            self.collector.taken += records
        self.send_response(said.status)
        for name, value in {"Content-Length": str(len(said.body)), **said.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.body)

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that leaves early is no error here."""


@contextmanager
def collector(script: Script | None = None, *, context: ssl.SSLContext | None = None) -> Iterator[Collector]:
    found = Collector()
    if script is not None:
        found.script = script
    handler: Any = type("Handler", (_Handler,), {"collector": found})
    with _Server(("127.0.0.1", 0), handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/in"
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            found.url = f"https://localhost:{server.server_port}/in"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
