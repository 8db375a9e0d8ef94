"""A whole agent over real TLS against a small scripted server: connections, headers, and what survives."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import queue
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from osqbox.agent.client import Call, EnrollmentFailed, Failure
from osqbox.agent.runner import AgentOptions, SteppedClock, run_agent
from osqbox.agent.sql import Context, Row, source
from osqbox.agent.wire import CallFailed, Channel, Transport, client_context
from osqbox.errors import BadSetup

TIMEOUT_S = 20


@dataclass
class Seen:
    path: str
    body: Any
    headers: list[tuple[str, str]]
    connection: int
    """The client's port."""
    raw: bytes = b""


@dataclass
class Server:
    """An osquery TLS server whose answers a test scripts; every request can be waited for."""

    ca_file: Path
    port: int = 0
    replies: dict[str, Any] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    news: queue.Queue[Seen] = field(default_factory=queue.Queue)
    tls: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    @property
    def hostname(self) -> str:
        return f"localhost:{self.port}"

    def options(self, **changes: Any) -> AgentOptions:
        given: dict[str, Any] = {"tls_hostname": self.hostname, "server_certs": self.ca_file, "enroll_secret": "s"}
        return AgentOptions(**{**given, "distributed_interval": 1, "logger_period": 1, **changes})

    def calls(self, ending: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.endswith(ending)]

    def reply(self, seen: Seen) -> Any:
        ending = next((e for e in self.replies if seen.path.endswith(e)), None)
        if ending is None:
            return {"node_key": "key"} if seen.path.endswith("enroll") else {}
        found = self.replies[ending]
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found(seen) if callable(found) else found


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                raw = gzip.decompress(raw)
            seen = Seen(self.path, json.loads(raw), self.headers.items(), self.client_address[1], raw)
            server.seen.append(seen)
            reply = server.reply(seen)
            server.news.put(seen)
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
            content = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: Any) -> None:
            pass

    return Handler


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(ca: trustme.CA, tmp_path: Path) -> Iterator[Server]:
    with serving(ca, tmp_path) as made:
        yield made


@contextmanager
def serving(ca: trustme.CA, tmp_path: Path) -> Iterator[Server]:
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    made = Server(ca_file)
    ca.issue_cert("localhost").configure_cert(made.tls)
    listening = QuietServer(("127.0.0.1", 0), handler(made))
    listening.socket = made.tls.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
    made.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    listening.shutdown()
    listening.server_close()


def run_until(server: Server, done: Callable[[], bool], options: AgentOptions, **given: Any) -> list[tuple[str, Any]]:
    """Run an agent until the server has seen enough; returns the agent's events."""
    events: list[tuple[str, Any]] = []

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent)
                while not done():
                    await trio.to_thread.run_sync(wait_for_news, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()

    async def agent() -> None:
        await run_agent(options, on_event=lambda kind, facts: events.append((kind, facts)), **given)

    def wait_for_news() -> None:
        server.news.get(timeout=TIMEOUT_S)

    trio.run(main)
    assert [facts for kind, facts in events if kind == "thread_failed"] == []
    return events


def test_a_live_query_is_answered_with_this_machines_data(server: Server) -> None:
    sql = "select pid, name from processes order by pid limit 3"
    server.replies["distributed/read"] = [{"queries": {"q": sql, "bad": "select * from nope"}}, {}]
    started = time.monotonic()
    run_until(server, lambda: bool(server.calls("write")), server.options())
    assert time.monotonic() - started < 5
    write = server.calls("write")[0].body
    assert [len(row) for row in write["queries"]["q"]] == [2, 2, 2]
    assert write["messages"] == {"bad": "no such table: nope", "q": ""}
    enroll = server.calls("enroll")[0].body
    assert {"os_version", "osquery_info", "system_info"} <= set(enroll["host_details"])
    info = enroll["host_details"]["osquery_info"]
    assert list(info) == sorted(info)
    assert (info["version"], info["config_hash"], info["config_valid"]) == ("5.23.1", "", "0")
    assert [seen.path.rsplit("/", 1)[1] for seen in server.seen[:2]] == ["enroll", "config"]


def test_headers_are_osqueryds_in_its_order(server: Server) -> None:
    run_until(server, lambda: bool(server.calls("read")), server.options())
    common = [("Content-Type", "application/json"), ("Accept", "application/json"), ("User-Agent", "osquery/5.23.1")]
    for ending, extra in (("enroll", []), ("config", [("Authorization", "NodeKey key")])):
        seen = server.calls(ending)[0]
        length = str(len(json.dumps(seen.body, separators=(",", ":"), ensure_ascii=False).encode()))
        assert seen.headers == [*common, *extra, ("Host", server.hostname), ("Content-Length", length)]


def test_each_thread_keeps_its_connection(server: Server) -> None:
    server.replies["config"] = {
        "schedule": {"q": {"query": "select days from uptime", "interval": 1, "snapshot": True}}
    }
    done = lambda: len(server.calls("read")) >= 2 and len(server.calls("log")) >= 2  # noqa: E731
    run_until(server, done, server.options())
    assert len({seen.connection for seen in server.calls("read")}) == 1
    assert len({seen.connection for seen in server.calls("log")}) == 1
    assert {seen.connection for seen in server.calls("read")} != {seen.connection for seen in server.calls("log")}


def test_scheduled_results_are_logged_compressed(server: Server) -> None:
    query = {"query": "select pid, version from osquery_info", "interval": 1}
    options = {"logger_tls_compress": True, "schedule_splay_percent": 0}
    server.replies["config"] = {
        "schedule": {"info": query},
        "options": options,
        "decorators": {"load": ["select uuid as host_uuid from osquery_info"]},
    }
    run_until(
        server,
        lambda: any(seen.body["log_type"] == "result" for seen in server.calls("log")),
        server.options(uuid="THE-UUID", host_identifier="uuid"),
    )
    (seen,) = [seen for seen in server.calls("log") if seen.body["log_type"] == "result"][:1]
    assert ("Content-Encoding", "gzip") in seen.headers
    (line,) = seen.body["data"]
    assert line["name"] == "info"
    assert line["hostIdentifier"] == "THE-UUID"
    assert line["decorations"] == {"host_uuid": "THE-UUID"}
    assert line["columns"]["version"] == "5.23.1"


def test_a_dropped_connection_is_resent_once_at_once(server: Server) -> None:
    """The first answer to a read is a closed connection: the same body comes again on another one."""
    server.replies["distributed/read"] = [None, {"queries": {"q": "select 1 as a"}}, {}]
    events = run_until(server, lambda: bool(server.calls("write")), server.options())
    first, second = server.calls("read")[:2]
    assert first.body == second.body
    assert first.connection != second.connection
    assert not [facts for kind, facts in events if kind == "call_failed"]


def test_status_codes_are_ignored_and_redirects_followed(server: Server) -> None:
    moved = (307, {"Location": "/elsewhere/enroll2?x=1"}, {"error": "moved"})
    server.replies = {"v1/osquery/enroll": moved, "enroll2?x=1": (500, {}, {"node_key": "k2"})}
    run_until(server, lambda: bool(server.calls("config")), server.options())
    assert [seen.path for seen in server.seen[:2]] == ["/api/v1/osquery/enroll", "/elsewhere/enroll2?x=1"]
    assert server.seen[0].body == server.seen[1].body
    assert ("Authorization", "NodeKey k2") in server.calls("config")[0].headers


def test_a_carve_arrives_whole(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "evidence.bin"
    file.write_bytes(bytes(range(256)) * 100)
    server.replies = {
        "distributed/read": [{"queries": {"c": f"select * from carves where path = '{file}' and carve = 1"}}, {}],
        "carve/begin": {"session_id": "s1"},
    }
    options = server.options(carve_period_s=1)

    def done() -> bool:
        begun = server.calls("carve/begin")
        return bool(begun) and len(server.calls("carve/block")) == begun[0].body["block_count"]

    run_until(server, done, options)
    begin = server.calls("carve/begin")[0].body
    (row,) = server.calls("write")[0].body["queries"]["c"]
    assert (row["status"], row["carve_guid"]) == ("SCHEDULED", begin["carve_id"])
    content = b"".join(b64decode(seen.body["data"]) for seen in server.calls("carve/block"))
    assert len(content) == begin["carve_size"]
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        (member,) = archive.getmembers()
        extracted = archive.extractfile(member)
        assert extracted is not None
        assert extracted.read() == file.read_bytes()


def test_a_restart_goes_on_with_the_same_key_and_the_logs_that_were_left(server: Server, tmp_path: Path) -> None:
    server.replies = {
        "config": {
            "schedule": {"q": {"query": "select 1 as a", "interval": 1}},
            "options": {"schedule_splay_percent": 0},
        },
        "log": {"error": "not now"},
    }
    options = server.options(state_dir=tmp_path / "state")
    run_until(server, lambda: any(seen.body["log_type"] == "result" for seen in server.calls("log")), options)
    left = next(seen.body["data"] for seen in server.calls("log") if seen.body["log_type"] == "result")
    assert left[0]["columns"] == {"a": "1"}
    server.seen.clear()
    server.replies["log"] = {}
    run_until(server, lambda: any(seen.body["log_type"] == "result" for seen in server.calls("log")), options)
    assert server.calls("enroll") == []
    assert next(seen.body["data"] for seen in server.calls("log") if seen.body["log_type"] == "result") == left


def test_other_tables_make_another_host(server: Server) -> None:
    tables = {
        "system_info": source(lambda _c: [{"hostname": "pretend", "uuid": "P"}]),
        "processes": source(lambda _c: [{"pid": 1, "name": "init"}]),
    }
    sql = "select p.name, i.version, u.hostname from processes p, osquery_info i, system_info u"
    server.replies["distributed/read"] = [{"queries": {"q": sql}}, {}]
    run_until(server, lambda: bool(server.calls("write")), server.options(hostname="pretend"), tables=tables)
    assert server.calls("enroll")[0].body["host_identifier"] == "pretend"
    assert set(server.calls("enroll")[0].body["host_details"]) == {"osquery_info", "system_info"}
    assert server.calls("write")[0].body["queries"]["q"] == [
        {"name": "init", "version": "5.23.1", "hostname": "pretend"}
    ]


def test_the_agent_shows_itself(server: Server) -> None:
    server.replies = {
        "config": {
            "schedule": {"q": {"query": "select 1 as a", "interval": 600}},
            "packs": {"p": {"queries": {"x": {"query": "select 2 as a", "interval": 600}}, "platform": "windows"}},
        },
        "distributed/read": [
            {
                "queries": {
                    # run once, should this minute be the one in ten that is due
                    "schedule": "select name, interval, executions <= 1 as counted from osquery_schedule",
                    "packs": "select name, active from osquery_packs",
                    "info": "select config_valid, length(config_hash) as n from osquery_info",
                    "flags": "select value from osquery_flags where name = 'distributed_interval'",
                    "registry": "select count(*) as n from osquery_registry where registry = 'table'",
                }
            },
            {},
        ],
    }
    run_until(server, lambda: bool(server.calls("write")), server.options())
    assert server.calls("write")[0].body["queries"] == {
        "flags": [{"value": "1"}],
        "info": [{"config_valid": "1", "n": "40"}],
        "packs": [{"name": "main", "active": "1"}, {"name": "p", "active": "0"}],
        "registry": [{"n": "156"}],
        "schedule": [{"name": "q", "interval": "600", "counted": "1"}],
    }


def test_a_slow_query_does_not_hold_up_the_others(server: Server) -> None:
    """A query that never ends is stopped at its time; meanwhile logs and stopping work."""
    endless = "with recursive c(x) as (select 1 union all select x+1 from c) select x from c where x < 0"
    server.replies["distributed/read"] = [{"queries": {"slow": endless}}, {}]
    events = run_until(server, lambda: bool(server.calls("write")), server.options(sql_timeout_s=1.5))
    assert server.calls("write")[0].body["messages"]["slow"].startswith("interrupted")
    assert events


def test_stopping_in_the_middle_of_a_query_is_quick(server: Server) -> None:
    endless = "with recursive c(x) as (select 1 union all select x+1 from c) select x from c where x < 0"
    server.replies["distributed/read"] = {"queries": {"slow": endless}}
    started = time.monotonic()
    run_until(server, lambda: bool(server.calls("read")), server.options())
    assert time.monotonic() - started < 10


def test_a_stop_ends_the_query_that_runs(server: Server) -> None:
    """The worker thread is left behind, but told to give up long before the query's own time is over."""
    ended, begun = threading.Event(), threading.Event()

    def endless(_context: Context) -> Iterator[Row]:
        begun.set()
        server.news.put(server.seen[-1])
        try:
            while True:
                yield {"pid": 1}
        finally:
            ended.set()

    server.replies["distributed/read"] = {"queries": {"slow": "select count(*) from processes"}}
    run_until(server, begun.is_set, server.options(), tables={"processes": source(endless)})
    assert ended.wait(TIMEOUT_S)


def test_a_refused_enrollment_ends_with_the_reason(server: Server) -> None:
    server.replies["enroll"] = {"error": "unknown secret"}
    with pytest.raises(
        EnrollmentFailed, match=r"cannot enroll at https://localhost:\d+/.*: Request failed: unknown secret"
    ):
        trio.run(run_agent, server.options(flags={"tls_enroll_max_attempts": "1"}))


def test_a_server_of_another_ca_is_named_as_such(server: Server, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    options = server.options(server_certs=tmp_path / "other.pem", flags={"tls_enroll_max_attempts": "1"})
    with pytest.raises(EnrollmentFailed, match=r"unable to get local issuer certificate|self.signed certificate"):
        trio.run(run_agent, options)


def test_an_unreadable_ca_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="cannot use the certificates") as caught:
        client_context(tmp_path / "nothing.pem")
    assert caught.value.hint


@pytest.mark.parametrize("hostname", ["", "host:port", "host/path", "https://host"])
def test_a_bad_hostname_is_a_clear_error(hostname: str) -> None:
    with pytest.raises(BadSetup, match="expected a host and port"):
        Channel(hostname, ssl.create_default_context())


# -- the connection alone, against hand-made bytes ---------------------------------------------------------------


def answer_with(ca: trustme.CA, raw: bytes) -> str:
    """The error of a call that a server answers with these bytes, on every connection, and then closes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await tls.receive_some(65536)
            await tls.send_all(raw)
        except trio.BrokenResourceError:
            pass
        finally:
            await tls.aclose()

    async def main() -> str:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            channel = Channel(f"localhost:{listeners[0].socket.getsockname()[1]}", trusting)
            try:
                found = (await channel.post("/x", b"{}")).decode()
            except CallFailed as error:
                found = f"failed: {error}"
            await channel.aclose()
            nursery.cancel_scope.cancel()
        return found

    return trio.run(main)


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}", "{}"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "{}"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", "{}"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "failed: Request error: stream truncated"),
        (b"", "failed: Request error: "),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "failed: Request error: "),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "failed: Request error: redirect without a Location"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n",
         "failed: Request error: cannot follow"),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
         "failed: Request error: more than 10 redirects"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * (8 * 1024 * 1024 + 1),
         "failed: Request error: body limit"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", "failed: Request error: "),
    ],
)  # fmt: skip
def test_what_a_server_may_send(ca: trustme.CA, raw: bytes, outcome: str) -> None:
    found = answer_with(ca, raw)
    assert found.startswith(outcome) if outcome.startswith("failed") else found == outcome


def test_nobody_listening_is_told_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def main() -> None:
        await Channel(f"127.0.0.1:{port}", ssl.create_default_context()).post("/", b"")

    with pytest.raises(CallFailed, match="Request error: "):
        trio.run(main)


def test_a_silent_server_is_given_up_after_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hostname = f"localhost:{silent.getsockname()[1]}"
        channel = Channel(hostname, ssl.create_default_context(), Transport(timeout_s=0.2))
        with pytest.raises(CallFailed, match="timeout"):
            trio.run(lambda: channel.post("/", b"{}"))


def test_importing_the_runner_leaves_heavy_libraries_alone() -> None:
    check = (
        "import sys, osqbox.agent.runner;"
        "print([name for name in ('apsw', 'psutil', 'zstandard', 'cryptography', 'quart') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- the verb ----------------------------------------------------------------------------------------------------


def test_the_verb_runs_until_it_is_interrupted(server: Server) -> None:
    command = [sys.executable, "-m", "osqbox", "agent", "--tls-hostname", server.hostname, "--ca", str(server.ca_file)]
    given = ["--enroll-secret", "s", "--host-identifier", "my-laptop", "--json"]
    with subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        first = json.loads(agent.stdout.readline())
        agent.send_signal(signal.SIGINT)
        _, errors = agent.communicate(timeout=TIMEOUT_S)
    assert first == {"event": "enrolled", "host_identifier": "my-laptop", "enrollments": 1}
    assert (agent.returncode, errors) == (0, "")


def test_the_verb_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "osqbox", "agent", "--tls-hostname", "x:1", "--ca", str(tmp_path / "no.pem")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 3
    assert "cannot use the certificates" in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr


# -- flags, plugins and time -------------------------------------------------------------------------------------


def test_endpoints_secret_and_certificates_may_come_from_flags(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program does that is given osqueryd's command line."""
    monkeypatch.setenv("THE_SECRET", " from the environment\n")
    flags = {
        "enroll_tls_endpoint": "/a/enroll",
        "tls_server_certs": str(server.ca_file),
        "enroll_secret_env": "THE_SECRET",
    }
    run_until(server, lambda: bool(server.calls("config")), server.options(server_certs=None, flags=flags))
    assert [seen.path for seen in server.calls("enroll")] == ["/a/enroll"]
    assert server.calls("enroll")[0].body["enroll_secret"] == " from the environment\n"
    server.seen.clear()
    (tmp_path / "secret").write_text(" from a file\n")
    by_file = {**flags, "enroll_secret_path": str(tmp_path / "secret")}
    run_until(server, lambda: bool(server.calls("config")), server.options(server_certs=None, flags=by_file))
    assert server.calls("enroll")[0].body["enroll_secret"] == "from a file"


def test_certificates_that_flags_name_are_only_warned_of(server: Server, tmp_path: Path) -> None:
    """osqueryd goes on, trusts nobody and says why its calls fail."""
    flags = {"tls_server_certs": str(tmp_path / "none.pem"), "tls_enroll_max_attempts": "1"}
    lines: list[str] = []

    async def main() -> None:
        await run_agent(server.options(server_certs=None, flags=flags), on_verbose=lines.append)

    with pytest.raises(EnrollmentFailed, match="unable to get local issuer certificate"):
        trio.run(main)
    assert any("Cannot read TLS server certificate(s)" in line for line in lines)


def test_a_client_certificate_may_come_from_flags(server: Server, ca: trustme.CA, tmp_path: Path) -> None:
    """Both files or none; a key that does not fit is a warning, and nothing is sent."""
    mine, other = ca.issue_cert("me"), ca.issue_cert("other")
    mine.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    mine.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    server.tls.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(server.tls)
    certs = {"tls_client_cert": str(tmp_path / "cert.pem"), "tls_client_key": str(tmp_path / "key.pem")}
    run_until(server, lambda: bool(server.calls("config")), server.options(flags=certs))
    wrong = {**certs, "tls_client_key": str(tmp_path / "other.pem"), "tls_enroll_max_attempts": "1"}
    lines: list[str] = []

    async def main() -> None:
        await run_agent(server.options(flags=wrong), on_verbose=lines.append)

    with pytest.raises(EnrollmentFailed):
        trio.run(main)
    assert any("Cannot read TLS client certificate" in line for line in lines)


def test_verbose_lines_are_glogs_and_bodies_are_dumped_on_demand(server: Server) -> None:
    lines: list[str] = []
    flags = {"verbose": "true", "tls_dump": "true"}
    run_until(
        server, lambda: bool(server.calls("config")), server.options(flags=flags, pid=100), on_verbose=lines.append
    )
    uri = f"https://{server.hostname}/api/v1/osquery/enroll"
    text = "\n".join(lines)
    stamp = r"I\d{4} \d\d:\d\d:\d\d\.\d{6} 100"
    message = f"TLSEnrollPlugin requesting a node enroll key from: {uri}"
    assert re.search(rf"(?m)^{stamp} tls_enroll.cpp:0\] {message}$", text)
    assert f"] TLS/HTTPS POST request to URI: {uri}\n" in text
    assert '{"enroll_secret":"s"' in text
    assert '{"node_key": "key"}' in text


def test_plugins_that_are_not_tls_are_asked_by_name() -> None:
    """Config, queries and logs go elsewhere: no server is needed, not even to enroll."""
    asked: list[Call] = []
    written = trio.Event()

    async def plugin(call: Call) -> list[dict[str, str]] | Failure:
        asked.append(call)
        match call.registry, call.request.get("action"):
            case "config", "genConfig":
                return [{"here": json.dumps({"options": {"schedule_splay_percent": 0}})}]
            case "distributed", "getQueries":
                return [{"results": json.dumps({"queries": {"q": "select 1 as a"}})}]
            case "distributed", "writeResults":
                written.set()
        return []

    flags = {"config_plugin": "ext", "distributed_plugin": "ext", "logger_plugin": "ext,filesystem"}

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                options = AgentOptions("", None, flags=flags)
                await nursery.start(functools.partial(run_agent, options, call_plugin=plugin))
                await written.wait()
                nursery.cancel_scope.cancel()

    trio.run(main)
    (write,) = [call for call in asked if call.request.get("action") == "writeResults"][:1]
    assert json.loads(write.request["results"])["queries"] == {"q": [{"a": "1"}]}


def test_rules_of_a_url_are_fetched_over_the_agents_own_tls(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "evidence"
    file.write_bytes(b"xx hello")
    rule = b'rule greeting { strings: $a = "hello" condition: $a }'
    url = f"https://{server.hostname}/yara/greeting"
    server.replies = {
        "v1/osquery/config": {
            "yara": {"signature_urls": [f"https://{server.hostname}/yara/.*"]},
            "options": {"yara_sigurl_authenticate": True},
        },
        "distributed/read": [{"queries": {"q": f"select * from yara where path='{file}' and sigurl='{url}'"}}, {}],
        "yara/greeting": (200, {}, rule),
    }
    run_until(server, lambda: bool(server.calls("write")), server.options())
    (asked,) = server.calls("yara/greeting")
    assert asked.body == {"node_key": "key"}
    assert [name for name, _ in asked.headers] == ["Content-Type", "Host", "Content-Length"]
    (row,) = server.calls("write")[0].body["queries"]["q"]
    assert (row["matches"], row["count"]) == ("greeting", "1")


@pytest.mark.timeout(30)
def test_with_a_seed_and_a_start_time_the_same_bodies_are_sent_twice(ca: trustme.CA, tmp_path: Path) -> None:
    """Ten minutes of a schedule, queries, logs and a carve pass at once, byte for byte the same."""
    evidence = tmp_path / "evidence"
    evidence.write_bytes(b"0123456789" * 2000)
    os.utime(evidence, (1, 1))
    first, second = [one_life(ca, tmp_path / str(number), evidence) for number in range(2)]
    length = min(len(first), len(second))  # where a life is cut off is a matter of real time
    assert first[:length] == second[:length]
    calls = [path.rsplit("/", 1)[1] for path, _ in first[:length]]
    assert {"enroll", "config", "log", "read", "write", "begin", "block"} <= set(calls)
    assert len([path for path in calls if path == "read"]) > 30


def one_life(ca: trustme.CA, folder: Path, evidence: Path) -> list[tuple[str, bytes]]:
    folder.mkdir()
    with serving(ca, folder) as server:
        clock = SteppedClock(1_700_000_000.0)
        queries = {
            "now": {"query": "select unix_time from time", "interval": 30},
            "info": {
                "query": "select pid, instance_id, start_time from osquery_info",
                "interval": 60,
                "snapshot": True,
            },
        }
        read = {
            "queries": {"c": f"select * from carves where path = '{evidence}' and carve = 1", "q": "select * from time"}
        }
        server.replies = {
            "osquery/config": {"schedule": queries, "decorators": {"load": ["select uuid from system_info"]}},
            "distributed/read": [read, {}],
            "carve/begin": {"session_id": "s"},
        }
        tables = {
            "time": source(lambda _context: [{"unix_time": int(clock.now())}]),
            "system_info": source(lambda _context: [{"uuid": "U", "hostname": "h"}]),
        }
        options = server.options(distributed_interval=15, logger_period=10, hostname="h", uuid="U", pid=7)
        run_until(
            server, lambda: clock.now() > 1_700_000_600, options, tables=tables, clock=clock, rng=random.Random(7)
        )
        return [(seen.path, seen.raw) for seen in server.seen]
