"""What needs no process: states, history, command lines, and an extension's threads driven by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from osqbox.agent import logs
from osqbox.agent.client import Core, Failure, Identity, Send, Thread
from osqbox.agent.flags import Flags
from osqbox.agent.instances import history as histories
from osqbox.agent.instances.forwarder import NO_QUERIES, Forwarder, for_extension
from osqbox.agent.instances.history import COLUMNS, History
from osqbox.agent.instances.options import EXTENSION, Files, InstanceSpec, RunnerOptions, command_line, run_id
from osqbox.agent.instances.state import TRANSITIONS, Happening, Phase, Status, after, status_of
from osqbox.agent.messages import Endpoints
from osqbox.agent.store import MemoryStore
from osqbox.errors import BadUsage

NOW = 1_700_000_000.0


# -- states ------------------------------------------------------------------------------------------------------


def test_a_run_that_was_connected_is_followed_at_once_and_a_failed_launch_by_a_pause() -> None:
    assert after(Phase.LAUNCHING, Happening.END) is Phase.PAUSING
    assert after(after(Phase.LAUNCHING, Happening.CONNECT), Happening.END) is Phase.LAUNCHING


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_can_be_stopped_and_ends_stopped(phase: Phase) -> None:
    """Also while launching, and twice."""
    stopping = after(after(phase, Happening.STOP), Happening.STOP)
    ended = after(stopping, Happening.END) if stopping is Phase.STOPPING else stopping
    assert ended is Phase.STOPPED


def test_what_cannot_happen_is_said() -> None:
    assert (Phase.PAUSING, Happening.CONNECT) not in TRANSITIONS
    with pytest.raises(ValueError, match="pausing cannot connect"):
        after(Phase.PAUSING, Happening.CONNECT)


def test_statuses_are_launchers() -> None:
    assert status_of(Phase.STOPPED, healthy=True) is Status.NOT_STARTED
    assert status_of(Phase.LAUNCHING, healthy=True) is Status.UNHEALTHY
    assert status_of(Phase.CONNECTED, healthy=False) is Status.UNHEALTHY
    assert status_of(Phase.CONNECTED, healthy=True) is Status.HEALTHY


# -- history -----------------------------------------------------------------------------------------------------


def test_a_run_is_written_down_from_start_to_end() -> None:
    history = History()
    history.started("kolide", "R1", NOW)
    history.connected("R1", NOW + 1, hostname="h", instance_id="i", version="5.23.1")
    history.ended("R1", NOW + 2.5, "osqueryd was killed by SIGKILL")
    assert history.rows() == [
        {
            "enrollment_id": "kolide",
            "instance_run_id": "R1",
            "start_time": "2023-11-14T22:13:20.000Z",
            "connect_time": "2023-11-14T22:13:21.000Z",
            "exit_time": "2023-11-14T22:13:22.500Z",
            "hostname": "h",
            "instance_id": "i",
            "version": "5.23.1",
            "errors": "osqueryd was killed by SIGKILL",
        }
    ]
    assert tuple(history.rows()[0]) == COLUMNS


def test_one_that_keeps_failing_does_not_push_out_its_neighbour() -> None:
    history = History(runs_kept=3)
    history.started("quiet", "Q", NOW)
    for number in range(9):
        history.started("loud", f"L{number}", NOW + number)
    history.ended("L0", NOW, "too late to matter")
    assert [run.instance_run_id for run in history.runs()] == ["Q", "L6", "L7", "L8"]


@pytest.mark.parametrize("text", ["", "{", "[1, null]", '{"a": 1}', '[{"enrollment_id": 5}]'])
def test_a_history_file_that_is_none_is_an_empty_history(text: str) -> None:
    assert histories.load(text).rows() == []


def test_a_history_survives_its_file() -> None:
    history = History()
    history.started("a", "R", NOW)
    history.ended("R", NOW, "stopped")
    assert histories.load(histories.dump(history)).rows() == history.rows()


# -- names and command lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a b", "x" * 65, "ü"])
def test_a_name_that_cannot_be_part_of_a_files_is_refused(name: str) -> None:
    with pytest.raises(BadUsage, match="name"):
        InstanceSpec(name)


def test_run_ids_sort_by_time() -> None:
    early, late = run_id(NOW, 2**80 - 1), run_id(NOW + 0.001, 0)
    assert early < late
    assert (len(early), late[10:]) == (26, "0" * 16)


def test_an_instances_own_files_and_plugins_cannot_be_taken_away() -> None:
    """They come last and once, whatever flags were given."""
    root = Path("/r")
    files = Files.of(root, root, "kolide", "RUN")
    flags = {"database_path": "/etc", "logger_plugin": "tls", "verbose": "true"}
    line = command_line(
        RunnerOptions("h:1", root, program=("osqueryd",), flags=flags), InstanceSpec("kolide", flags=flags), files
    )
    assert line[0] == "osqueryd"
    assert "--verbose=true" in line
    assert [
        word for word in line if word.startswith(("--database", "--logger", "--pidfile", "--extensions_socket"))
    ] == [
        "--pidfile=/r/osquery-RUN.pid",
        "--database_path=/r/osquery-kolide.db",
        "--extensions_socket=/r/osquery-RUN.sock",
        f"--logger_plugin={EXTENSION}",
    ]


# -- the extension's threads -------------------------------------------------------------------------------------


class Server:
    """Answers what an extension sends, and keeps it."""

    def __init__(self, **replies: Any) -> None:
        self.replies = {"enroll": {"node_key": "K"}, **replies}
        self.sent: list[tuple[str, Any]] = []

    def drive(self, thread: Thread[Any]) -> Any:
        outcome: Any = None
        try:
            while True:
                outcome = self._perform(thread.send(outcome))
        except StopIteration as done:
            return done.value

    def _perform(self, command: Any) -> Any:
        if not isinstance(command, Send):
            return {} if type(command).__name__ == "HostDetails" else False
        self.sent.append((command.call, json.loads(command.body)))
        reply = self.replies[command.call]
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        return reply if isinstance(reply, Failure) else json.dumps(reply).encode()


@pytest.fixture
def forwarder() -> Forwarder:
    options = RunnerOptions("localhost:1", Path("/r"))
    core = Core(
        Identity("host", "U", "I", "E", 1, NOW),
        Flags(options.extension_flags()),
        Endpoints(),
        MemoryStore(),
        enroll_secret=lambda: "secret of this tenant",
        rng=random.Random(1),
        now=NOW,
    )
    return Forwarder(core)


def test_config_goes_through_without_what_would_take_the_plugins_away(forwarder: Forwarder) -> None:
    given = {"options": {"logger_plugin": "tls", "verbose": True}, "schedule": {}, "node_invalid": False}
    server = Server(config=given)
    assert json.loads(server.drive(forwarder.config())) == {"options": {"verbose": True}, "schedule": {}}
    assert server.sent[0][1]["enroll_secret"] == "secret of this tenant"
    assert given == {"options": {"logger_plugin": "tls", "verbose": True}, "schedule": {}, "node_invalid": False}
    assert for_extension({"options": 5}) == {"options": 5}


def test_a_server_in_trouble_leaves_the_last_config(forwarder: Forwarder) -> None:
    """And before there was one, an empty one; the trouble is in the tenant's status log."""
    assert Server(config=Failure("down")).drive(forwarder.config()) == "{}"
    Server(config={"schedule": {"a": 1}}).drive(forwarder.config())
    assert json.loads(Server(config={"error": "x"}).drive(forwarder.config())) == {"schedule": {"a": 1}}
    statuses = forwarder.core.buffer.batch(10)[logs.STATUS].values()
    assert any("down" in line for line in statuses)


def test_queries_go_through_and_nothing_else_of_the_reply(forwarder: Forwarder) -> None:
    reply = {"queries": {"q": "select 1"}, "discovery": {"q": "select 2"}, "accelerate": 5, "node_key": "K", "x": 1}
    found = json.loads(Server(read=reply).drive(forwarder.queries()))
    assert found == {"queries": {"q": "select 1"}, "discovery": {"q": "select 2"}, "accelerate": 5}
    assert Server(read=Failure("down")).drive(forwarder.queries()) == NO_QUERIES
    assert json.loads(Server(read={}).drive(forwarder.queries())) == {"queries": {}}
    assert (forwarder.counts.reads, forwarder.counts.queries) == (2, 1)


def test_results_carry_the_enrollments_key_and_no_other(forwarder: Forwarder) -> None:
    server = Server(write={})
    text = json.dumps({"queries": {"q": [{"a": "1"}]}, "statuses": {"q": 0}, "node_key": "somebody else's"})
    assert server.drive(forwarder.results(text)) == ""
    assert server.sent[-1] == ("write", {"queries": {"q": [{"a": "1"}]}, "statuses": {"q": 0}, "node_key": "K"})
    assert "JSON object" in server.drive(forwarder.results("[]"))


def test_results_the_server_did_not_take_stay_with_the_osquery_process(forwarder: Forwarder) -> None:
    assert Server(write=Failure("down")).drive(forwarder.results('{"queries":{}}')) == "down"
    assert forwarder.counts.results == 0


def test_an_invalid_node_enrolls_again_and_goes_on(forwarder: Forwarder) -> None:
    server = Server(config=[{"node_invalid": True}, {"schedule": {}}])
    assert json.loads(server.drive(forwarder.config())) == {"schedule": {}}
    assert [call for call, _ in server.sent] == ["enroll", "config", "enroll", "config"]


def test_lines_wait_for_the_server_and_what_is_no_line_is_counted(forwarder: Forwarder) -> None:
    assert forwarder.log_result('{"name":"x"}')
    assert not forwarder.log_result("no json")
    assert not forwarder.log_result("[]")
    forwarder.log_status([{"s": "2", "f": "a.cpp", "i": "7", "m": "text", "h": "host", "u": str(int(NOW))}, {}])
    waiting = forwarder.core.buffer.batch(10)
    assert list(waiting[logs.RESULT].values()) == ['{"name":"x"}']
    first = json.loads(next(iter(waiting[logs.STATUS].values())))
    assert (first["severity"], first["line"], first["message"], first["unixTime"]) == (2, 7, "text", int(NOW))
    assert (forwarder.counts.lines, forwarder.counts.lines_refused) == (3, 2)
