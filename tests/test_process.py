"""The box as a program: real processes, signals, ready files, exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OSQBOX_")}
FREE = ("--agents-port", "0", "--operator-port", "0")


class Machine:
    """A user's machine: its own home and temporary directory, and the processes started on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "tmp").mkdir()
        self.env = {**CLEAN, "OSQBOX_HOME": str(home / "osqbox"), "TMPDIR": str(home / "tmp")}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "osqbox", *words],
            env=self.env, cwd=self.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *words: str, timeout: float = 40) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "osqbox", *words],
            env=self.env, cwd=self.home, text=True, capture_output=True, timeout=timeout,
        )  # fmt: skip

    def serve(self, *words: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A box that is ready, and its ready object from the first line of ``--json``."""
        process = self.start("serve", "--json", *words)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        return process, json.loads(line)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=10)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def curl(ready: dict[str, Any], path: str, body: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "--cacert", ready["ca"], f"{ready['agents']}{path}", "-d", json.dumps(body)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_serve_tells_where_it_is_and_stops_on_sigterm(machine: Machine) -> None:
    """The ready object names everything; SIGTERM ends with 0 and takes the ready file away."""
    ready_file = machine.home / "ready.json"
    process, ready = machine.serve(*FREE, "--ready-file", str(ready_file))
    assert json.loads(ready_file.read_text()) == ready
    assert ready_file.stat().st_mode & 0o777 == 0o600
    documented = "pid version data agents operator comms jobs comms_socket token ca client_cert client_key"
    assert set(ready) >= {*documented.split(" "), "enroll_secret", "flagfile"}
    assert ready["pid"] == process.pid
    for name in ("ca", "client_cert", "client_key", "flagfile", "data"):
        assert Path(ready[name]).exists(), name
    assert curl(ready, "/enroll", {"enroll_secret": ready["enroll_secret"], "host_identifier": "a"})["node_key"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not ready_file.exists()
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_an_interrupt_answers_held_reads_before_it_ends(machine: Machine) -> None:
    """Ctrl-C drains: a held read gets an empty answer, not a broken connection."""
    process, ready = machine.serve(*FREE)
    key = curl(ready, "/enroll", {"enroll_secret": ready["enroll_secret"], "host_identifier": "a"})["node_key"]
    reader = subprocess.Popen(
        ["curl", "-sS", "--http1.1", "--cacert", ready["ca"], f"{ready['agents']}/distributed/read",
         "-d", json.dumps({"node_key": key})], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    status = {"statistics": {"presence": {"reads_held": 0}}}
    deadline = time.monotonic() + 20
    while not status["statistics"]["presence"]["reads_held"]:
        assert time.monotonic() < deadline
        status = json.loads(machine.run("status", "--json").stdout)
    process.send_signal(signal.SIGINT)
    answer, _ = reader.communicate(timeout=10)
    assert json.loads(answer)["queries"] == {}
    assert process.wait(10) == 0


def test_kept_data_and_identity_outlive_a_kill(machine: Machine) -> None:
    """After SIGKILL the next serve has the same CA, secret and nodes, and nothing in its way."""
    process, before = machine.serve(*FREE)
    curl(before, "/enroll", {"enroll_secret": before["enroll_secret"], "host_identifier": "kept"})
    process.kill()
    process.wait()
    process, after = machine.serve(*FREE)
    same = ("ca", "data", "enroll_secret")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    nodes = json.loads(machine.run("nodes", "--json").stdout)
    assert [node["host_identifier"] for node in nodes] == ["kept"]


def test_what_a_killed_ephemeral_box_left_is_swept(machine: Machine) -> None:
    """Ephemeral data of a killed box goes at the next start; that of a living one stays."""
    process, killed = machine.serve(*FREE, "--ephemeral")
    process.kill()
    process.wait()
    assert Path(killed["data"]).exists()
    process, living = machine.serve(*FREE, "--ephemeral")
    machine.serve(*FREE, "--ephemeral")
    assert not Path(killed["data"]).exists()
    assert Path(living["data"]).exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not Path(living["data"]).exists()


def test_a_busy_port_is_said_with_the_next_command(machine: Machine) -> None:
    """Exit 4, the port, and what to type; the other listener's port is not left bound."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = machine.run("serve", "--ephemeral", "--agents-port", "0", "--operator-port", str(port))
    assert done.returncode == 4, done.stderr
    assert str(port) in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_box_on_the_same_data_is_refused(machine: Machine) -> None:
    """Exit 4 with the first one's pid and address."""
    process, ready = machine.serve(*FREE)
    done = machine.run("serve", *FREE)
    assert done.returncode == 4
    assert str(process.pid) in done.stderr
    assert ready["operator"] in done.stderr


@pytest.mark.parametrize("flag", ["--data", "--certs"])
def test_an_unusable_directory_is_said(machine: Machine, flag: str) -> None:
    """Exit 3 and the path, for data and for certificates."""
    file = machine.home / "a-file"
    file.write_text("")
    done = machine.run("serve", *FREE, flag, str(file / "inside"))
    assert done.returncode == 3, done.stderr
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_config_file_is_said(machine: Machine) -> None:
    """Exit 3 with file and line, before anything listens."""
    file = machine.home / "pack.json"
    file.write_text('{"schedule": {\n  "a" "b"}}')
    done = machine.run("serve", "--ephemeral", *FREE, "--config", str(file))
    assert done.returncode == 3, done.stderr
    assert f"{file}:2" in done.stderr


def test_a_non_loopback_operator_is_refused(machine: Machine) -> None:
    """The operator side carries a token in the clear: exit 7."""
    done = machine.run("serve", "--ephemeral", *FREE, "--operator-host", "0.0.0.0")
    assert done.returncode == 7, done.stderr


def test_demo_and_a_query_started_together(machine: Machine) -> None:
    """The first screen of the README: the query waits for the demo and gets real rows."""
    ready_file = machine.home / "r.json"
    demo = machine.start("demo", *FREE, "--ready-file", str(ready_file))
    done = machine.run("query", "select pid, name from processes order by pid limit 3", "--json")
    assert done.returncode == 0, done.stderr
    *accounts, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(account) for account in accounts] == [{"node", "hostname", "status", "rows", "message"}]
    assert accounts[0]["status"] == "answered"
    assert len(accounts[0]["rows"]) == 3
    assert accounts[0]["rows"][0]["pid"] == "1"
    assert last["summary"]["answered"] == last["summary"]["targets"] == 1
    assert json.loads(ready_file.read_text())["pid"] == demo.pid
    follow = machine.start("logs", "--json", "--type", "result", "--follow")
    assert follow.stdout is not None
    assert set(json.loads(follow.stdout.readline())) == {"seq", "tenant", "node", "log_type", "received_at", "line"}
    follow.kill()
    stopped = machine.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert demo.wait(10) == 0


def test_exec_gives_the_command_a_box_and_returns_its_code(machine: Machine) -> None:
    """The child finds the box in its environment; its exit code is ours; nothing is left."""
    script = (
        "import os, ssl, sys, urllib.request\n"
        "tls = ssl.create_default_context(cafile=os.environ['OSQBOX_CA_FILE'])\n"
        "print(urllib.request.urlopen(os.environ['OSQBOX_AGENTS'] + '/version', context=tls).status)\n"
        "sys.exit(42)"
    )
    done = machine.run("exec", "--", sys.executable, "-c", script)
    assert done.stdout.strip() == "200", done.stderr
    assert done.returncode == 42
    left = [path.name for path in Path(machine.env["TMPDIR"]).glob("osqbox-*/data-*")]
    assert left == []


def test_exec_says_when_there_is_no_such_program(machine: Machine) -> None:
    done = machine.run("exec", "--", "no-such-program-here")
    assert done.returncode == 2
    assert "no-such-program-here" in done.stderr


def test_exec_ends_its_command_when_told_to_stop(machine: Machine) -> None:
    """SIGTERM reaches the child; nothing is orphaned."""
    marker = machine.home / "child"
    process = machine.start("exec", "--", sys.executable, "-c", (
        f"import os, pathlib, signal; pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); signal.pause()"
    ))  # fmt: skip
    deadline = time.monotonic() + 20
    while not marker.exists() or not marker.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int(marker.read_text())
    process.send_signal(signal.SIGTERM)
    process.wait(15)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_wait_and_verbs_without_a_box(machine: Machine) -> None:
    """`wait` ends with 5 in time; other verbs say which command starts a box."""
    assert machine.run("wait", "--timeout", "0.5").returncode == 5
    done = machine.run("nodes")
    assert done.returncode != 0
    assert "osqbox serve" in done.stderr


def test_nothing_is_written_to_the_working_directory(machine: Machine) -> None:
    process, _ = machine.serve(*FREE)
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert {path.name for path in machine.home.iterdir()} == {"tmp", "osqbox"}


def test_the_temporary_directory_of_another_user_is_not_used(tmp_path: Path) -> None:
    """A link planted where ephemeral data goes is refused."""
    machine = Machine(tmp_path)
    (tmp_path / "tmp" / f"osqbox-{os.getuid()}").symlink_to(tempfile.gettempdir())
    done = machine.run("serve", "--ephemeral", *FREE)
    assert done.returncode == 3, done.stderr
