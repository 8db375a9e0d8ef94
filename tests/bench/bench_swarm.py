"""A thousand agents against a box. Prints; never judges.

    python tests/bench/bench_swarm.py [--agents 1000] [--spawn-rate 250] [--hold 15] [--plain] [--schedule]

The box runs on the first core, the swarm on the last one. When all are enrolled and nine in ten reads are held, one
campaign asks them all; the box's own account says how many answered and when the last one did. Memory is the swarm's,
above the same process before its first agent, with every agent's TLS connection open. ``--plain`` swarms against a
single-threaded standard-library server of the shape of osquery's test server instead, which asks everybody the same
query at every read and closes every connection.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_box import CORES, box

AWAKE = 0.9
"""Share of agents whose read is held when a campaign begins: the others are between two reads, a second apart."""

PLAIN = """
import json, ssl, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
enrolled, answered = 0, set()
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global enrolled
        body, answer = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), {}
        if self.path == "/enroll":
            enrolled += 1
            answer = {"node_key": str(enrolled)}
        elif self.path == "/distributed_read":
            answer = {"queries": {"info": "select hostname from system_info"}}
        elif self.path == "/distributed_write":
            answered.add(body["node_key"])
        elif self.path == "/answered":
            answer = {"answered": len(answered)}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args):
        pass
class Server(HTTPServer):
    request_queue_size = 4096
    def get_request(self):
        connection, address = super().get_request()
        connection.settimeout(5)
        return context.wrap_socket(connection, server_side=True), address
    def handle_error(self, request, client_address):
        pass
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
SCHEDULE = {
    "schedule": {
        "processes": {"query": "select pid, name, path from processes", "interval": 10},
        "uptime": {"query": "select total_seconds from uptime", "interval": 5, "snapshot": True},
    }
}

SQL = "select s.hostname, count(*) processes from processes, system_info s"


class Operator:
    def __init__(self, ready: dict[str, Any]) -> None:
        self._at = urlsplit(ready["operator"])
        self._headers = {"Authorization": f"Bearer {ready['token']}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._at.port, timeout=60)
        connection.request(method, f"/api/v1/{path}", json.dumps(body) if body else None, self._headers)
        answer = connection.getresponse().read()
        connection.close()
        return answer

    def held(self) -> int:
        return int(json.loads(self.call("GET", "info"))["statistics"]["presence"]["reads_held"])

    def campaign(self, sql: str) -> tuple[float, dict[str, Any]]:
        """Seconds from asking to the last account, and the summary."""
        begun = time.perf_counter()
        campaign = json.loads(self.call("POST", "campaigns", {"sql": sql, "timeout_s": 30}))
        lines = self.call("GET", f"campaigns/{campaign['id']}/stream").splitlines()
        took_s = time.perf_counter() - begun
        return took_s, json.loads(lines[-1])["summary"]


def nodes(ready: dict[str, Any]) -> int:
    with sqlite3.connect(f"file:{ready['data']}/osqbox.db?mode=ro", uri=True) as db:
        return int(db.execute("SELECT count(*) FROM osquery_nodes").fetchone()[0])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--agents", type=int, default=1000)
    arguments.add_argument("--spawn-rate", type=float, default=250)
    arguments.add_argument("--hold", type=float, default=15, help="seconds to go on after the last agent has started")
    arguments.add_argument("--profiles", default="ubuntu:3,windows:1")
    arguments.add_argument("--connections", default="shared")
    arguments.add_argument("--plain", action="store_true")
    arguments.add_argument(
        "--schedule", action="store_true", help="with a schedule, so that agents keep results and log"
    )
    given = arguments.parse_args()
    os.sched_setaffinity(0, {CORES[-1]})
    with tempfile.TemporaryDirectory() as name, box(Path(name)) as ready:
        if given.plain:
            against_plain(Path(name), ready, given)
        else:
            against_box(Path(name), ready, given)


def swarm(directory: Path, given: argparse.Namespace, *where: str) -> subprocess.Popen[bytes]:
    duration_s = given.agents / given.spawn_rate + given.hold
    return subprocess.Popen(
        [sys.executable, "-m", "osqbox", "swarm", *where, "--count", str(given.agents), "--interval", "1",
         "--spawn-rate", str(given.spawn_rate), "--duration", str(duration_s), "--profiles", given.profiles,
         "--connections", given.connections, "--json", str(directory / "report.json"), "--fail-if", "errors>0"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def against_plain(directory: Path, ready: dict[str, Any], given: argparse.Namespace) -> None:
    """The box has only made the certificates."""
    certs = directory / "certs"
    plain = subprocess.Popen(
        [sys.executable, "-c", PLAIN, str(certs / "server.pem"), str(certs / "server.key")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    os.sched_setaffinity(plain.pid, {CORES[0]})
    try:
        assert plain.stdout is not None
        server = f"https://localhost:{int(plain.stdout.readline())}"
        where = ("--server", server, "--ca", ready["ca"], "--enroll-secret", "any", "--dialect", "testserver")
        swarm(directory, given, *where).wait()
        answered = http.client.HTTPSConnection(
            server.removeprefix("https://"), context=ssl.create_default_context(cafile=ready["ca"])
        )
        answered.request("POST", "/answered", "{}")
        print(f"agents whose answer the plain server has: {json.loads(answered.getresponse().read())['answered']}")
        answered.close()
    finally:
        plain.terminate()
        plain.wait(10)
        plain.stdout.close()
    show(json.loads((directory / "report.json").read_text()))


def against_box(directory: Path, ready: dict[str, Any], given: argparse.Namespace) -> None:
    operator = Operator(ready)
    if given.schedule:
        operator.call("PUT", "configs/bench", {"content": SCHEDULE})
    begun = time.perf_counter()
    running = swarm(
        directory, given, "--server", ready["agents"], "--ca", ready["ca"], "--enroll-secret", ready["enroll_secret"]
    )
    try:
        while (held := operator.held()) < AWAKE * given.agents or nodes(ready) < given.agents:
            if running.poll() is not None:
                raise RuntimeError(f"the swarm ended with {running.returncode} while {held} reads were held")
            time.sleep(0.05)
        enrolled_s, cpu_enrolled_s = time.perf_counter() - begun, cpu_s(running.pid)
        print(f"{given.agents} agents started, enrolled, configured, held: {enrolled_s:.2f} s at "
              f"{given.spawn_rate:g}/s, processor {cpu_enrolled_s:.2f} s")  # fmt: skip
        for sql in (SQL, "select name, version from os_version"):
            before_s = cpu_s(running.pid)
            took_s, summary = operator.campaign(sql)
            print(f"one campaign: all accounts after {took_s:.2f} s, processor {cpu_s(running.pid) - before_s:.2f} s: "
                  f"{summary}")  # fmt: skip
            while operator.held() < AWAKE * given.agents and running.poll() is None:
                time.sleep(0.05)
    finally:
        running.wait(given.agents / given.spawn_rate + given.hold + 30)
    show(json.loads((directory / "report.json").read_text()))


def show(report: dict[str, Any]) -> None:
    print(f"memory per agent: {report['rss_bytes_per_agent'] / 1000:.1f} kB above the process before its first one, "
          f"process {report['rss_bytes'] / 1e6:.1f} MB; {report['connections']} TLS connections opened")  # fmt: skip
    print(f"errors {report['errors']} of {report['requests']} requests {report['errors_by_kind']}; enrolled "
          f"{report['enrolled']}; answers {report['answers']}; log lines {report['log_lines']}; "
          f"processor {report['cpu_s']:.1f} s in {report['duration_s']:.1f} s")  # fmt: skip
    for call, values in report["latency_ms"].items():
        print(f"    {call:7} x {report['calls'][call]:<6} p50 {values['p50']:9.1f} ms  p95 {values['p95']:9.1f} ms  "
              f"p99 {values['p99']:9.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
