"""Figures of the box beside yardsticks measured in the same run. Prints; never judges.

    python tests/bench/bench_box.py [--seconds 3] [--only reads,logs,start,live]

Servers run on the first core, the load on the last one. The yardsticks are a bare ASGI app on an unchanged
Hypercorn-Trio, and a single-threaded standard-library HTTPS server that closes every connection, which is the
shape of osquery's own test server; both answer without looking anything up.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECTIONS = 32
CALLERS = 4
CORES = sorted(os.sched_getaffinity(0))

BARE = """
import sys, trio
from hypercorn.config import Config
from hypercorn.trio import serve
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": kind + ".complete"})
            if kind == "lifespan.shutdown":
                return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-type", b"application/json"), (b"content-length", b"35")]})
    await send({"type": "http.response.body", "body": b'{"queries":{},"node_invalid":false}'})
config = Config()
config.bind, config.certfile, config.keyfile, config.accesslog = ["127.0.0.1:0"], sys.argv[1], sys.argv[2], None
config.keep_alive_max_requests = 10**9
async def main():
    async with trio.open_nursery() as nursery:
        binds = await nursery.start(serve, app, config)
        print(binds[0].rsplit(":", 1)[1], flush=True)
trio.run(main)
"""

STDLIB = """
import json, ssl, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"queries":{},"node_invalid":false}')
    def log_message(self, *args):
        pass
class Server(HTTPServer):
    request_queue_size = 128
    def get_request(self):
        connection, address = super().get_request()
        return context.wrap_socket(connection, server_side=True), address
    def handle_error(self, request, client_address):
        pass
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def _on(core: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, {core})


@contextmanager
def box(directory: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """A box as a program on the first core; yields its ready object and ``start_s``."""
    ready_file = directory / "ready.json"
    ready_file.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "osqbox", "serve",
         "--data", str(directory / "data"), "--certs", str(directory / "certs"), "-q",
         "--agents-port", "0", "--operator-port", "0", "--ready-file", str(ready_file), *flags],
        preexec_fn=_on(CORES[0]),  # noqa: PLW1509 - nothing else runs yet
    )  # fmt: skip
    try:
        while not ready_file.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the box ended with {process.returncode}")
            time.sleep(0.002)
        start_s = time.perf_counter() - started
        yield {**json.loads(ready_file.read_text()), "start_s": start_s}
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def yardstick(code: str, certs: Path) -> Iterator[tuple[int, int]]:
    """A yardstick server on the first core; yields port and pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(certs / "server.pem"), str(certs / "server.key")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=_on(CORES[0]),  # noqa: PLW1509 - nothing else runs yet
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


class Load:
    """Requests over TLS without a client library in the way: send on every connection, then read every answer."""

    def __init__(self, port: int, ca: str) -> None:
        self._port = port
        self._tls = ssl.create_default_context(cafile=ca)

    def _connect(self) -> ssl.SSLSocket:
        import socket

        plain = socket.create_connection(("127.0.0.1", self._port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._tls.wrap_socket(plain, server_hostname="localhost")

    def keep_alive(self, messages: list[bytes], seconds: float) -> float:
        """Requests per second, one kept connection for each message."""
        connections = [self._connect() for _ in messages]
        done, end, begun = 0, time.perf_counter() + seconds, time.perf_counter()
        while time.perf_counter() < end:
            for connection, message in zip(connections, messages, strict=True):
                connection.sendall(message)
            for connection in connections:
                self._read_answer(connection)
            done += len(connections)
        rate = done / (time.perf_counter() - begun)
        for connection in connections:
            connection.close()
        return rate

    def new_connections(self, message: bytes, seconds: float) -> float:
        """Requests per second, each on a new connection with a full handshake, CALLERS at a time."""
        end, begun = time.perf_counter() + seconds, time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as callers:
            done = sum(callers.map(lambda _: self._connect_until(end, message), range(CALLERS)))
        return done / (time.perf_counter() - begun)

    def _connect_until(self, end: float, message: bytes) -> int:
        done = 0
        while time.perf_counter() < end:
            connection = self._connect()
            connection.sendall(message)
            self._read_answer(connection)
            connection.close()
            done += 1
        return done

    @staticmethod
    def _read_answer(connection: ssl.SSLSocket) -> None:
        answer = b""
        while not answer.endswith(b"}"):  # every body here is one small object
            part = connection.recv(65536)
            if not part:
                break
            answer += part
        if b" 200 " not in answer[:20]:
            raise RuntimeError(f"expected 200, got {answer[:200]!r}")


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def post(ready: dict[str, Any], path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One call to the agents listener."""
    url = urlsplit(ready["agents"])
    connection = http.client.HTTPSConnection(
        "localhost", url.port, context=ssl.create_default_context(cafile=ready["ca"]), timeout=20
    )
    connection.request("POST", f"/api/v1/osquery/{path}", json.dumps(body), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def enroll(ready: dict[str, Any], name: str) -> str:
    body = {"enroll_secret": ready["enroll_secret"], "host_identifier": name, "platform_type": "9", "host_details": {}}
    key: str = post(ready, "enroll", body)["node_key"]
    return key


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def bench_reads(directory: Path, seconds: float) -> None:
    with box(directory, "--read-hold", "0") as ready:
        port, key = urlsplit(ready["agents"]).port, enroll(ready, "bench")
        assert port is not None
        message = request("/api/v1/osquery/distributed/read", {"node_key": key})
        ours_kept = Load(port, ready["ca"]).keep_alive([message] * CONNECTIONS, seconds)
        ours_new = Load(port, ready["ca"]).new_connections(message, seconds)
    certs = directory / "certs"
    with yardstick(BARE, certs) as (port, _):
        bare_kept = Load(port, str(certs / "ca.pem")).keep_alive([message] * CONNECTIONS, seconds)
        bare_new = Load(port, str(certs / "ca.pem")).new_connections(message, seconds)
    with yardstick(STDLIB, certs) as (port, _):
        stdlib_new = Load(port, str(certs / "ca.pem")).new_connections(message, seconds)
    print(f"empty distributed/read, TLS, keep-alive: {ours_kept:,.0f}/s")
    print(f"    bare Hypercorn-Trio {bare_kept:,.0f}/s: ratio {ours_kept / bare_kept:.2f}")
    print(
        f"    standard library, which closes each connection, {stdlib_new:,.0f}/s: ratio {ours_kept / stdlib_new:.2f}"
    )
    print(f"empty distributed/read, TLS, new connection each: {ours_new:,.0f}/s")
    print(f"    bare Hypercorn-Trio {bare_new:,.0f}/s: ratio {ours_new / bare_new:.2f}")
    print(f"    standard library {stdlib_new:,.0f}/s: ratio {ours_new / stdlib_new:.2f}")


def bench_logs(directory: Path, seconds: float) -> None:
    line = {"name": "pack_bench_processes", "hostIdentifier": "bench", "calendarTime": "Fri Nov 20 12:00:00 2026 UTC",
            "unixTime": 1795176000, "epoch": 0, "counter": 1, "numerics": False, "action": "added",
            "columns": {f"column_{index}": "x" * 20 for index in range(8)}}  # fmt: skip
    for lines in (10, 100):
        with box(directory, "--read-hold", "0") as ready:
            port = urlsplit(ready["agents"]).port
            assert port is not None
            # a node for each connection: one body of one node on two connections would be a re-send
            storm = [_batch(enroll(ready, f"bench-{index}"), [line] * lines) for index in range(CONNECTIONS)]
            before, begun = _count_lines(ready), time.perf_counter()
            rate = Load(port, ready["ca"]).keep_alive(storm, seconds)
            elapsed = time.perf_counter() - begun
            stored = _count_lines(ready) - before
        single = _one_transaction_each(directory, line, lines)
        print(f"durable log lines, {lines} per request: {stored / elapsed:,.0f} lines/s acknowledged after COMMIT")
        print(f"    answers/s {rate:,.0f}; one transaction per request without a server: {single:,.0f} lines/s: "
              f"ratio {stored / elapsed / single:.2f}")  # fmt: skip


def _batch(key: str, lines: list[dict[str, Any]]) -> bytes:
    return request("/api/v1/osquery/log", {"node_key": key, "log_type": "result", "data": lines})


def _count_lines(ready: dict[str, Any]) -> int:
    with sqlite3.connect(f"file:{ready['data']}/osqbox.db?mode=ro", uri=True) as db:
        return int(db.execute("SELECT count(*) FROM osquery_logs").fetchone()[0])


def _one_transaction_each(directory: Path, line: dict[str, Any], lines: int) -> float:
    path = directory / "single.db"
    path.unlink(missing_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE lines(seq INTEGER PRIMARY KEY, line TEXT)")
    text, done, end, begun = json.dumps(line), 0, time.perf_counter() + 1, time.perf_counter()
    while time.perf_counter() < end:
        db.execute("BEGIN")
        db.executemany("INSERT INTO lines(line) VALUES (?)", [(text,)] * lines)
        db.execute("COMMIT")
        done += lines
    rate = done / (time.perf_counter() - begun)
    db.close()
    return rate


def bench_start(directory: Path, _seconds: float) -> None:
    with box(directory) as _:
        pass  # certificates are made, byte code is compiled
    starts, stops, memory = [], [], 0.0
    for _ in range(5):
        with box(directory) as ready:
            starts.append(ready["start_s"])
            time.sleep(0.5)
            memory = rss_mib(ready["pid"])
            begun = time.perf_counter()
        stops.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import trio, hypercorn.trio, quart_trio"], check=True, preexec_fn=_on(CORES[0])
    )
    imports_s = time.perf_counter() - begun
    with yardstick(BARE, directory / "certs") as (_, pid):
        time.sleep(0.5)
        bare = rss_mib(pid)
    middle, stop_ms = statistics.median(starts), statistics.median(stops) * 1000
    print(f"serve, start to ready: {middle * 1000:.0f} ms (median of 5); importing trio, hypercorn, quart_trio alone "
          f"{imports_s * 1000:.0f} ms: ratio {middle / imports_s:.2f}; stop {stop_ms:.0f} ms")  # fmt: skip
    print(f"idle memory: {memory:.1f} MiB; bare Hypercorn-Trio {bare:.1f} MiB: ratio {memory / bare:.2f}")


def bench_live(directory: Path, seconds: float) -> None:
    with box(directory) as ready:
        key = enroll(ready, "held")
        times_ms = _ask_held_node(ready, key, count=max(10, int(seconds * 30)))
    print(f"live query, one held node, asked to answered: p50 {statistics.median(times_ms):.1f} ms, "
          f"worst of {len(times_ms)} {max(times_ms):.1f} ms; a server polled each 10 s: 5,000 ms")  # fmt: skip


def _ask_held_node(ready: dict[str, Any], key: str, count: int) -> list[float]:
    agent = subprocess.Popen(
        [sys.executable, __file__, "--held-agent", json.dumps({**ready, "key": key, "count": count})]
    )
    url = urlsplit(ready["operator"])
    connection = http.client.HTTPConnection("127.0.0.1", url.port, timeout=30)
    headers = {"Authorization": f"Bearer {ready['token']}", "Content-Type": "application/json"}
    times_ms = []
    for _ in range(count):
        _wait_held(connection, headers)
        begun = time.perf_counter()
        connection.request("POST", "/api/v1/campaigns", json.dumps({"sql": "select 1", "timeout_s": 20}), headers)
        campaign = json.loads(connection.getresponse().read())
        connection.request("GET", f"/api/v1/campaigns/{campaign['id']}/stream", headers=headers)
        stream = connection.getresponse().read()
        times_ms.append((time.perf_counter() - begun) * 1000)
        if b'"answered":1' not in stream.replace(b" ", b""):
            raise RuntimeError(f"not answered: {stream!r}")
    agent.wait(30)
    return times_ms


def _wait_held(connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
    for _ in range(1000):
        connection.request("GET", "/api/v1/info", headers=headers)
        if json.loads(connection.getresponse().read())["statistics"]["presence"]["reads_held"]:
            return
        time.sleep(0.002)
    raise RuntimeError("no read is held")


def held_agent(ready: dict[str, Any]) -> None:
    """An agent that reads, answers, and reads again, as osqueryd's distributed thread does, on one connection."""
    url = urlsplit(ready["agents"])
    tls = ssl.create_default_context(cafile=ready["ca"])
    connection = http.client.HTTPSConnection("localhost", url.port, context=tls, timeout=30)

    def call(path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection.request("POST", f"/api/v1/osquery/{path}", json.dumps(body), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer

    answered = 0
    while answered < ready["count"]:
        for name in call("distributed/read", {"node_key": ready["key"]})["queries"]:
            call(
                "distributed/write", {"node_key": ready["key"], "queries": {name: [{"1": "1"}]}, "statuses": {name: 0}}
            )
            answered += 1


BENCHES: dict[str, Callable[[Path, float], None]] = {
    "reads": bench_reads,
    "logs": bench_logs,
    "start": bench_start,
    "live": bench_live,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=3)
    arguments.add_argument("--only", default=",".join(BENCHES))
    arguments.add_argument("--held-agent", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.held_agent:
        held_agent(json.loads(given.held_agent))
        return
    os.sched_setaffinity(0, {CORES[-1]})
    for name in given.only.split(","):
        with tempfile.TemporaryDirectory() as directory:
            BENCHES[name](Path(directory), given.seconds)


if __name__ == "__main__":
    main()
