"""Forwarded records per second, beside plain reads and writes of the same rows in the same run. Prints; never judges.

    python tests/bench/bench_forward.py [--records 100000] [--opensearch URL]

The rows are log lines of about 400 bytes. The yardstick reads them from SQLite in one statement and appends them to a
file with one fsync per 2,000. The collector is a process of its own that unpacks and counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trio

from osqbox.box import MIGRATIONS
from osqbox.clock import SystemClock
from osqbox.feed import Feed
from osqbox.forward.forwarding import open_forwarding
from osqbox.forward.messages import SourceName, parse_sink
from osqbox.forward.tables import migrations
from osqbox.store import Store, Tx

LIMIT_S = 300


def line(number: int) -> str:
    columns = {"pid": str(number), "name": "sshd", "path": "/usr/sbin/sshd", "cmdline": "sshd: someone [priv] " * 5}
    return json.dumps({"name": "pack/processes", "hostIdentifier": "web-1", "action": "added", "columns": columns})


@asynccontextmanager
async def open_store(directory: Path) -> AsyncIterator[Store]:
    steps = [*MIGRATIONS, *([] if migrations in MIGRATIONS else [migrations])]
    store = Store.open(directory / "osqbox.db", steps, SystemClock(), Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            yield store
        finally:
            await store.aclose()


async def fill(store: Store, records: int) -> None:
    def write(tx: Tx, start: int) -> None:
        tx.db.executemany(
            "INSERT INTO osquery_logs(tenant, node, log_type, received_at, line) VALUES ('acme', 'n', 'result', ?, ?)",
            [(tx.now, line(number)) for number in range(start, min(start + 10_000, records))],
        )

    for start in range(0, records, 10_000):
        await store.write(lambda tx, start=start: write(tx, start))  # type: ignore[misc]


def yardstick(directory: Path) -> float:
    """Seconds to copy all lines to a file."""
    began = time.perf_counter()
    with closing(sqlite3.connect(directory / "osqbox.db")) as db, (directory / "plain").open("wb") as out:
        rows = db.execute("SELECT line FROM osquery_logs ORDER BY seq")
        while page := rows.fetchmany(2000):
            out.write(b"".join(row[0].encode() + b"\n" for row in page))
            out.flush()
            os.fsync(out.fileno())
    return time.perf_counter() - began


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = b""
        if self.path.startswith("/_bulk"):
            items = [{"create": {"status": 201}}] * (body.count(b"\n") // 2)
            answer = json.dumps({"errors": False, "items": items}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST  # noqa: N815 - the name is http.server's

    def log_message(self, *_: Any) -> None:
        pass


def serve(told: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        told.put(server.server_port)
        server.serve_forever()


async def forwarded_s(store: Store, place: str, records: int) -> float:
    """Seconds until the sink has confirmed all."""
    sink = parse_sink(place, directory=Path("/"), sources=[SourceName.LOGS])
    began = time.perf_counter()
    with trio.fail_after(LIMIT_S):
        async with open_forwarding(store, [sink], SystemClock()) as opened:
            opened.begin_stdout()
            while opened.statistics()[0].forwarded < records:
                await trio.sleep(0.005)
            return time.perf_counter() - began


async def main(records: int, opensearch: str | None) -> None:
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        told: Any = multiprocessing.get_context("spawn").Queue()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(told,), daemon=True)
        server.start()
        port = await trio.to_thread.run_sync(told.get)
        async with open_store(directory) as store:
            await fill(store, records)
            plain_s = await trio.to_thread.run_sync(yardstick, directory)
            print(f"{'plain copy to a file':28} {records / plain_s:>10,.0f} records/s")
            places = [f"file:{directory}/out", "stdout:", f"http://127.0.0.1:{port}/in"]
            places += [f"opensearch+http://127.0.0.1:{port}/x", *([f"opensearch+{opensearch}"] if opensearch else [])]
            for place in places:
                kept = os.dup(1)
                if place == "stdout:":
                    reader, writer = os.pipe()
                    threading.Thread(target=drain, args=(reader,), daemon=True).start()
                    os.dup2(writer, 1)
                    os.close(writer)
                took_s = await forwarded_s(store, place, records)
                os.dup2(kept, 1)
                os.close(kept)
                shown = place.replace(str(directory), "").replace(str(port), "PORT")
                print(f"{shown[:28]:28} {records / took_s:>10,.0f} records/s   {plain_s / took_s:.2f} of plain")
        server.terminate()
        server.join()


def drain(fd: int) -> None:
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--opensearch", help="URL of a real one, such as http://127.0.0.1:9200/bench")
    chosen = parser.parse_args()
    trio.run(main, chosen.records, chosen.opensearch)
