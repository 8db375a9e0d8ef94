"""The swarm against a box, and against a plain server of the shape of osquery's own test server."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import trio
import trustme

from osqbox.agent.simulator import load_host_types
from osqbox.agent.swarm.build import Hosts, ProfileHosts, SimulatedHosts
from osqbox.agent.swarm.plan import Growth, SwarmPlan, Trouble, endpoints, read_mix, read_threshold, server
from osqbox.agent.swarm.run import run_swarm
from osqbox.agent.swarm.tally import Tally
from osqbox.agent.wire import client_context
from osqbox.errors import BadUsage, Unsafe
from osqbox.testing import Osqbox

SECRET = "this_is_a_deployment_secret"
START = 1_767_225_600.0


# -- a server of osquery's shape -----------------------------------------------------------------------------------


@dataclass
class PlainServer:
    """Standard library, one thread per connection, which it closes after each answer."""

    ca: Path
    answers: dict[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of every call, in order."""
    enrolled: int = 0
    port: int = 0

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.seen.append((path, body))
        if path in self.answers:
            return self.answers[path](body)
        if path == "/enroll":
            self.enrolled += 1
            return {"node_key": f"key-{self.enrolled}"} if body["enroll_secret"] == SECRET else {"node_invalid": True}
        return {}

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for seen, body in self.seen if seen == path]

    def plan(self, count: int, duration_s: float, **more: Any) -> SwarmPlan:
        return SwarmPlan(
            server=server(f"https://localhost:{self.port}"),
            growth=more.pop("growth", None) or Growth(count, 1000.0, duration_s),
            mix=read_mix(more.pop("mix", "ubuntu")),
            enroll_secret=more.pop("enroll_secret", SECRET),
            endpoints=endpoints("testserver", "", {}),
            **{"interval_s": 1, "log_period_s": 1, **more},
        )


class _Handler(BaseHTTPRequestHandler):
    plain: PlainServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.plain.answer(self.path, body)
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, *_: Any) -> None:
        pass  # agents that are stopped hang up


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return ca, path


@pytest.fixture
def plain(authority: tuple[trustme.CA, Path]) -> Iterator[PlainServer]:
    ca, path = authority
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    plain = PlainServer(path)
    handler: Any = type("Handler", (_Handler,), {"plain": plain})
    with _Server(("127.0.0.1", 0), handler) as listening:
        listening.context, plain.port = context, listening.server_port
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield plain
        listening.shutdown()
        thread.join()


def swarm(plan: SwarmPlan, ca: Path, **more: Any) -> dict[str, Any]:
    return trio.run(partial(run_swarm, plan, ProfileHosts(plan), client_context(ca), **more))


def swarm_until(plan: SwarmPlan, ca: Path, done: Callable[[Tally], bool], **more: Any) -> dict[str, Any]:
    """Run until the tally says so; the plan's duration is how long that may take."""

    async def run() -> dict[str, Any]:
        tally, stop, ended = Tally(), trio.Event(), False

        async def watch() -> None:
            nonlocal ended
            while not done(tally):
                await trio.sleep(0.01)
            ended = True
            stop.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            report = await run_swarm(plan, ProfileHosts(plan), client_context(ca), stop=stop, tally=tally, **more)
            nursery.cancel_scope.cancel()
        assert ended, f"not within {plan.growth.duration_s} s: {report}"
        return report

    return trio.run(run)


# -- against the box -----------------------------------------------------------------------------------------------


def box_plan(box: Osqbox, count: int, **more: Any) -> SwarmPlan:
    return SwarmPlan(
        server=server(box.url),
        growth=Growth(count, 200.0, 40.0),
        mix=read_mix(more.pop("mix", "ubuntu:3,windows:1")),
        enroll_secret=box.enroll_secret,
        **{"interval_s": 1, "log_period_s": 1, **more},
    )


class Background:
    """A swarm in a thread, while the test asks the box."""

    def __init__(self, plan: SwarmPlan, ca: Path, hosts: Hosts | None = None) -> None:
        self.tally = Tally()
        self.report: dict[str, Any] = {}
        self._plan, self._ca = plan, ca
        self._hosts = hosts or ProfileHosts(plan)
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._run))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._stop.set)
        self._thread.join()

    def wait(self, done: Callable[[], bool], timeout_s: float = 20.0) -> None:
        pause, end = threading.Event(), time.monotonic() + timeout_s
        while not done():
            assert self._thread.is_alive()
            assert time.monotonic() < end, f"not within {timeout_s} s: {self.tally.kinds}"
            pause.wait(0.02)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.report = await run_swarm(
            self._plan, self._hosts, client_context(self._ca), stop=self._stop, tally=self.tally
        )


def test_a_crowd_enrolls_and_all_answer_one_campaign(osqbox: Osqbox) -> None:
    """The box's own account: every target answered, each with rows of its own."""
    with Background(box_plan(osqbox, 120), osqbox.ca_file) as crowd:
        crowd.wait(lambda: len(osqbox.nodes) == 120 and crowd.tally.total.latency["config"].count == 120)
        answers = osqbox.query("select hostname, uuid from system_info", timeout=20)
    assert answers.summary["answered"] == answers.summary["targets"] == 120
    assert len({row["hostname"] for row in answers}) == len({row["uuid"] for row in answers}) == 120
    assert {node["host_identifier"] for node in osqbox.nodes} == {row["hostname"] for row in answers}
    assert {node["platform"] for node in osqbox.nodes} == {"ubuntu", "windows"}
    report = crowd.report
    assert (report["agents"], report["enrolled"], report["errors"], report["answers"]) == (120, 120, 0, 120)
    assert report["connections"] == 120
    assert report["errors_by_kind"] == {}


def test_scheduled_results_reach_the_box(osqbox: Osqbox) -> None:
    """On time although the one connection is taken by a read that the box holds: lines wait, schedules do not."""
    osqbox.config({"schedule": {"who": {"query": "select hostname from system_info", "interval": 1, "snapshot": True}}})
    with Background(box_plan(osqbox, 5, connections="thread"), osqbox.ca_file) as crowd:
        crowd.wait(lambda: crowd.tally.log_lines >= 15)
    lines = [json.loads(entry["line"]) if isinstance(entry["line"], str) else entry["line"] for entry in osqbox.logs()]
    by_host = defaultdict(list)
    for line in lines:
        if line.get("name") == "who":
            by_host[line["hostIdentifier"]].append(line)
    assert len(by_host) == 5
    for host, entries in by_host.items():
        assert {row["hostname"] for entry in entries for row in entry["snapshot"]} == {host}
        seconds = [entry["unixTime"] for entry in entries]
        assert seconds == list(range(seconds[0], seconds[0] + len(seconds)))
    assert crowd.report["errors"] == 0


def test_a_held_read_holds_up_no_new_key(osqbox: Osqbox) -> None:
    """On its one connection the box keeps a read open; the agents that lost their keys have new ones at once."""
    plan = box_plan(osqbox, 10, trouble=Trouble(reenroll_every_s=0.7))
    with Background(plan, osqbox.ca_file) as crowd:
        crowd.wait(lambda: crowd.tally.enrollments >= 30, timeout_s=8)
    assert len(osqbox.nodes) == 10
    assert crowd.report["errors"] == 0


def test_a_crowd_of_launchers_by_json_rpc(osqbox: Osqbox, tmp_path: Path) -> None:
    """Hosts of the old simulator's format enroll, are configured, queried and heard, all over Launcher's service."""
    (tmp_path / "base.yaml").write_text(
        "name: base\nqueries:\n"
        "  - {pattern: from system_info, results: [{hostname: '{name}', uuid: 'uuid-{index}'}]}\n"
        "  - {pattern: from os_version, results: [{platform: darwin, name: Mac OS X, version: '10.13'}]}\n"
        "  - {pattern: from broken, error: 'no such table: broken'}\n"
    )
    osqbox.config({"schedule": {"who": {"query": "select * from system_info", "interval": 1}}})
    paths = endpoints("launcher", "", {})
    plan = box_plan(osqbox, 20, endpoints=paths, launcher=True, mix="base:20")
    with Background(plan, osqbox.ca_file, SimulatedHosts(plan, load_host_types(tmp_path))) as crowd:
        crowd.wait(lambda: len(osqbox.nodes) == 20 and crowd.tally.total.latency["config"].count == 20)
        answers = osqbox.query("select * from system_info", timeout=20)
        failed = osqbox.query("select * from broken", timeout=20)
        crowd.wait(lambda: len(osqbox.logs(name="who")) >= 20)
    assert {row["hostname"] for row in answers} == {f"base_{index}" for index in range(20)}
    assert failed.summary["failed"] == 20
    assert {node["platform"] for node in osqbox.nodes} == {"darwin"}
    assert (crowd.report["enrolled"], crowd.report["errors"]) == (20, 0)


def test_a_slow_query_holds_back_nobody(osqbox: Osqbox) -> None:
    """It is run again aside; the short one of another campaign is answered meanwhile."""
    slow = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 300000) select count(*) c from n"
    with Background(box_plan(osqbox, 3), osqbox.ca_file) as crowd:
        crowd.wait(lambda: crowd.tally.total.latency["config"].count == 3)
        answers = osqbox.query(slow, timeout=20)
    assert [row["c"] for row in answers] == ["300000"] * 3
    assert crowd.report["errors"] == 0


# -- against the plain server --------------------------------------------------------------------------------------


def test_the_shape_of_osquerys_test_server(plain: PlainServer) -> None:
    """It hands out one config and the same queries for ever, and closes every connection."""
    plain.answers["/config"] = lambda _: {
        "schedule": {"up": {"query": "select 1 as one", "interval": 1, "snapshot": True}}
    }
    plain.answers["/distributed_read"] = lambda _: {"queries": {"info": "select version from osquery_info"}}
    report = swarm_until(plain.plan(20, 30.0), plain.ca, lambda tally: tally.answers >= 40 and tally.log_lines >= 20)
    assert report["errors"] == 0, report["errors_by_kind"]
    assert report["connections"] == report["requests"]  # it keeps none
    assert len(plain.bodies("/enroll")) == 20
    writes = plain.bodies("/distributed_write")
    assert {json.dumps(body["queries"]) for body in writes} == {'{"info": [{"version": "5.23.1"}]}'}
    assert {body["statuses"]["info"] for body in writes} == {0}
    assert {body["log_type"] for body in plain.bodies("/log")} <= {"result", "status"}


@pytest.mark.parametrize("broken", [b"", b"[]", b"null", b"{", b"\xff", b'{"queries": 7}', b'{"queries": {"a": 5}}'])
def test_what_servers_should_not_say(plain: PlainServer, broken: bytes) -> None:
    """The agents go on as osqueryd does, and enroll, read and log as before."""
    plain.answers["/config"] = lambda _: broken
    plain.answers["/distributed_read"] = lambda _: broken
    once = {"config_tls_max_attempts": "1", "distributed_tls_max_attempts": "1"}
    report = swarm_until(
        plain.plan(3, 20.0, flags=once), plain.ca, lambda tally: tally.total.latency["read"].count >= 3
    )
    assert report["enrolled"] == 3
    assert all(kind.startswith(("config: Request", "read: Request")) for kind in report["errors_by_kind"])


def test_a_wrong_secret_is_an_error_of_its_own_kind(plain: PlainServer) -> None:
    report = swarm_until(plain.plan(4, 20.0, enroll_secret="wrong"), plain.ca, lambda tally: tally.total.errors >= 8)
    assert report["enrolled"] == report["enrollments"] == 0
    (kind,) = report["errors_by_kind"]
    assert kind.startswith("enroll: ")


def test_the_server_is_checked(plain: PlainServer, tmp_path: Path) -> None:
    """Another CA's agents say why, and send nothing."""
    stranger = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    report = swarm_until(plain.plan(2, 20.0), stranger, lambda tally: tally.total.errors >= 2)
    assert plain.seen == []
    assert "certificate" in next(iter(report["errors_by_kind"]))


def test_a_redirect_does_not_lead_the_crowd_to_a_stranger(plain: PlainServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(handler: _Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(307)
        handler.send_header("Location", "https://192.0.2.1/enroll")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setattr(_Handler, "do_POST", redirect)
    report = swarm_until(plain.plan(1, 20.0), plain.ca, lambda tally: tally.total.errors >= 1)
    assert "192.0.2.1 without --allow-remote" in next(iter(report["errors_by_kind"]))


def test_flags_are_osquerys(plain: PlainServer) -> None:
    with pytest.raises(BadUsage, match="speed"):
        swarm(plain.plan(1, 1.0, flags={"speed": "1"}), plain.ca)
    with pytest.raises(Unsafe, match=r"192\.0\.2\.1 is another machine"):
        swarm(plain.plan(1, 1.0, flags={"proxy_hostname": "192.0.2.1:3128"}), plain.ca)


def test_sessions_need_not_be_reused(osqbox: Osqbox) -> None:
    with Background(box_plan(osqbox, 3, flags={"tls_session_reuse": "false"}), osqbox.ca_file) as crowd:
        crowd.wait(lambda: crowd.tally.total.requests >= 6)
    assert crowd.report["connections"] >= crowd.report["requests"]


# -- the same twice ------------------------------------------------------------------------------------------------


def recorded(plain: PlainServer, plan: SwarmPlan) -> dict[str, list[Any]]:
    """What each host said, in order, by host and call: without node keys, and without what queries cost."""
    plain.seen.clear()
    plain.answers["/config"] = lambda _: {
        "schedule": {
            "procs": {"query": "select pid, name, path, cmdline from processes", "interval": 1},
            "time": {"query": "select unix_time from time", "interval": 1, "snapshot": True},
        },
        "options": {"schedule_splay_percent": 0},
    }
    plain.answers["/distributed_read"] = lambda body: (
        {"queries": {"who": "select hostname, uuid, hardware_serial from system_info", "no": "select * from nothing"}}
        if len([one for one in plain.bodies("/distributed_read") if one == body]) == 1
        else {}
    )
    hosts: dict[int, dict[str, list[Any]]] = {number: defaultdict(list) for number in range(plan.growth.count)}

    def trace(index: int, command: Any, _outcome: Any) -> None:
        body = json.loads(command.body)
        body.pop("node_key", None)
        said = hosts[index]
        if command.call == "log":
            said[f"log {body['log_type']}"] += body["data"]
        elif command.call == "write":
            body.pop("stats")
            said["write"].append(body)
        elif command.call == "enroll":
            said["enroll"].append(body)

    swarm(plan, plain.ca, trace=trace)
    return {f"{index} {call}": said for index, calls in hosts.items() for call, said in calls.items()}


def test_a_seed_and_a_start_time_say_the_same_twice(plain: PlainServer) -> None:
    plan = plain.plan(4, 2.6, seed=11, start_time=START, mix="ubuntu:1,windows:1")
    first, second = recorded(plain, plan), recorded(plain, plan)
    assert set(first) == set(second)
    kinds = {name.partition(" ")[2] for name in first}
    assert kinds == {"enroll", "write", "log result", "log status"} or kinds == {"enroll", "write", "log result"}
    for name, said in first.items():
        shorter = min(len(said), len(second[name]))  # the last second may have been cut short
        assert shorter >= (2 if name.endswith("log result") else 1), name
        assert said[:shorter] == second[name][:shorter], name
    times = [line["unixTime"] for name, said in first.items() if name.endswith("log result") for line in said]
    assert START <= min(times) <= max(times) <= START + 5


def test_another_seed_is_another_crowd(plain: PlainServer) -> None:
    plan = plain.plan(1, 0.7, seed=11, start_time=START)
    assert recorded(plain, plan)["0 write"] != recorded(plain, replace(plan, seed=12))["0 write"]


# -- trouble on purpose --------------------------------------------------------------------------------------------


def asking(plain: PlainServer, sql: str) -> None:
    plain.answers["/distributed_read"] = lambda _: {"queries": {"q": sql}}


def test_a_share_of_queries_fails(plain: PlainServer) -> None:
    asking(plain, "select 1 as one")
    swarm_until(plain.plan(40, 30.0, trouble=Trouble(failing_queries=0.5)), plain.ca, lambda tally: tally.answers >= 80)
    statuses = [body["statuses"]["q"] for body in plain.bodies("/distributed_write")]
    assert 0.2 < sum(statuses) / len(statuses) < 0.8
    failed = next(body for body in plain.bodies("/distributed_write") if body["statuses"]["q"])
    assert "--fail-queries" in failed["messages"]["q"]


def test_all_enroll_again_at_once(plain: PlainServer) -> None:
    report = swarm_until(
        plain.plan(10, 30.0, trouble=Trouble(reenroll_every_s=0.5)), plain.ca, lambda tally: tally.enrollments >= 30
    )
    assert report["enrolled"] == 10
    assert report["errors"] == 0


def test_clocks_are_wrong(plain: PlainServer) -> None:
    asking(plain, "select unix_time from time")
    plan = plain.plan(20, 30.0, start_time=START, trouble=Trouble(clock_skew_s=1000))
    swarm_until(plan, plain.ca, lambda tally: tally.answers >= 20)
    told = [int(body["queries"]["q"][0]["unix_time"]) - START for body in plain.bodies("/distributed_write")]
    assert min(told) < -100
    assert max(told) > 100
    assert all(-1000 <= each <= 1030 for each in told)


def test_machines_were_cloned(plain: PlainServer) -> None:
    asking(plain, "select uuid, hostname, hardware_serial from system_info")
    plan = plain.plan(12, 30.0, trouble=Trouble(duplicate_hardware=1.0))
    swarm_until(plan, plain.ca, lambda tally: tally.answers >= 12)
    rows = [body["queries"]["q"][0] for body in plain.bodies("/distributed_write")]
    details = [body["host_details"]["system_info"] for body in plain.bodies("/enroll")]
    assert len({row["uuid"] for row in rows + details}) == 1
    assert len({row["hostname"] for row in rows}) == 12


def test_slow_writers_are_understood(plain: PlainServer) -> None:
    plan = plain.plan(1, 30.0, trouble=Trouble(slow_writes=1.0))
    report = swarm_until(plan, plain.ca, lambda tally: tally.total.latency["config"].count >= 1)
    assert report["errors"] == 0
    assert report["latency_ms"]["enroll"]["p50"] > 400  # five pieces or more, a tenth of a second apart


# -- growing -------------------------------------------------------------------------------------------------------


def test_a_ramp_grows_to_its_end(plain: PlainServer) -> None:
    report = swarm(plain.plan(20, 1.5, growth=Growth(20, 1.0, 1.5, "ramp")), plain.ca)
    assert report["agents"] == 20
    assert 1 <= report["series"]["agents"][0] <= 16
    assert report["duration_s"] == pytest.approx(1.5, abs=1.0)
    assert len(report["series"]["requests"]) == int(report["duration_s"]) + 1


def test_a_sweep_ends_where_it_hurts(plain: PlainServer) -> None:
    """The server knows 12 agents and no more."""
    plain.answers["/enroll"] = lambda _: (
        {"node_key": f"key-{len(plain.bodies('/enroll'))}"} if len(plain.bodies("/enroll")) <= 12 else {"error": "full"}
    )
    growth = Growth(50, 100.0, 30.0, "sweep", step=5, step_s=0.5)
    report = swarm(plain.plan(50, 30.0, growth=growth, stop_if=(read_threshold("errors>0.01"),)), plain.ca)
    assert report["limit"]["agents"] == 10
    assert report["limit"]["stopped_at"] == 15
    assert report["limit"]["stopped_by"][0].startswith("errors>0.01")
    assert report["agents"] == 15


def test_a_sweep_that_never_hurts_says_so(plain: PlainServer) -> None:
    growth = Growth(10, 100.0, 30.0, "sweep", step=5, step_s=0.3)
    report = swarm(plain.plan(10, 30.0, growth=growth, stop_if=(read_threshold("errors>0.5"),)), plain.ca)
    assert report["limit"] == {"agents": 10, "stopped_at": None, "stopped_by": []}


def test_progress_is_told(plain: PlainServer) -> None:
    told: list[Any] = []
    swarm(plain.plan(3, 1.3), plain.ca, on_progress=told.append)
    assert len(told) >= 2
    assert (told[-1].agents, told[-1].wanted, told[-1].enrolled, told[-1].errors) == (3, 3, 3, 0)
    assert told[-1].requests >= 6
