"""`osqbox agent --instances` as a program: its verbs, its signals, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from osqbox.agent.instances.control import ask, control_path, serve_control
from osqbox.agent.instances.manager import open_runner
from osqbox.agent.instances.options import RunnerOptions
from osqbox.testing import Osqbox, OsqboxServer

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OSQBOX_")}
TIMEOUT_S = 30


class Machine:
    """Runs agents and verbs against one box, each in a process of its own, all on one root."""

    def __init__(self, server: OsqboxServer, root: Path) -> None:
        self.root = root
        self.env = {**CLEAN, "OSQBOX_URL": server.operator_url, "OSQBOX_TOKEN": server.token, "OSQBOX_HOME": str(root)}
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        agent = subprocess.Popen(
            [sys.executable, "-m", "osqbox", "agent", "--json", "--root", str(self.root / "a"), *words],
            env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.agents.append(agent)
        return agent

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "osqbox", "agent", words[0], "--root", str(self.root / "a"), *words[1:]],
            env=self.env, text=True, capture_output=True, timeout=TIMEOUT_S,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.verb("status", "--json").stdout)
        return found

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
            agent.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def machine(osqbox_server: OsqboxServer) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="ob") as folder:
        machine = Machine(osqbox_server, Path(folder))
        yield machine
        machine.close()


def until(agent: subprocess.Popen[str], instance: str | None, event: str) -> dict[str, Any]:
    assert agent.stdout is not None
    for line in agent.stdout:
        facts: dict[str, Any] = json.loads(line)
        if (facts["event"], facts.get("instance")) == (event, instance):
            return facts
        assert facts["event"] != "ended", facts
    raise AssertionError(f"the agent ended before {instance} {event}: {agent.communicate()[1]}")


def is_alive(pid: int) -> bool:
    """A process that only waits for its parent to take notice is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_instances_are_asked_added_and_removed_while_the_agent_runs(machine: Machine) -> None:
    """The box makes the tenants and their secrets; zero instances is a running agent; SIGTERM leaves nothing."""
    agent = machine.start("--instances", "cli-one", "--profile", "ubuntu", "--seed", "7")
    pid = until(agent, "cli-one", "connected")["pid"]
    done = machine.verb("add-instance", "cli-two")
    assert done.returncode == 0, done.stderr
    until(agent, "cli-two", "connected")
    status = machine.status()
    assert [(one["name"], one["status"]) for one in status["instances"]] == [
        ("cli-one", "healthy"),
        ("cli-two", "healthy"),
    ]
    assert status["instances"][0]["pid"] == pid
    assert [row["enrollment_id"] for row in status["history"]] == ["cli-one", "cli-two"]
    assert "cli-two" in machine.verb("status").stdout
    asked = machine.verb("query", "select platform from os_version", "--instance", "cli-two", "--json")
    assert json.loads(asked.stdout) == [{"platform": "ubuntu"}]
    wrong = machine.verb("query", "select * from nothing_there", "--instance", "cli-one")
    assert (wrong.returncode, "no such table: nothing_there" in wrong.stderr) == (1, True)
    unclear = machine.verb("query", "select 1")
    assert (unclear.returncode, "cli-one, cli-two" in unclear.stderr) == (2, True)
    assert machine.verb("remove-instance", "cli-one").returncode == 0
    assert not is_alive(pid)
    assert machine.verb("remove-instance", "cli-two").returncode == 0
    assert machine.status()["instances"] == []
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(TIMEOUT_S) == 0
    assert agent.stderr is not None
    assert agent.stderr.read() == ""
    gone = machine.verb("status")
    assert (gone.returncode, "no agent" in gone.stderr, "--instances" in gone.stderr) == (1, True, True)
    assert [path.name for path in (machine.root / "a").iterdir() if "sock" in path.name or path.suffix == ".pid"] == []


def test_the_next_agent_ends_what_a_killed_one_left_running(machine: Machine) -> None:
    """And a second agent on the same root is refused while the first lives."""
    agent = machine.start("--instances", "cli-kill")
    orphan = until(agent, "cli-kill", "connected")["pid"]
    second = machine.start("--instances", "")
    assert second.wait(TIMEOUT_S) == 4
    assert second.stderr is not None
    assert "already runs" in second.stderr.read()
    agent.kill()
    agent.wait(TIMEOUT_S)
    assert is_alive(orphan)
    again = machine.start("--instances", "cli-kill", "--in-process", "--shared-client")
    until(again, "cli-kill", "connected")
    assert not is_alive(orphan)
    again.send_signal(signal.SIGINT)
    assert until(again, "cli-kill", "ended")["reason"] == "stopped"
    assert again.wait(TIMEOUT_S) == 0
    killed, stopped = json.loads((machine.root / "a" / "history.json").read_text())
    assert (killed["exit_time"], killed["errors"]) == ("", "")
    assert (bool(stopped["exit_time"]), stopped["errors"]) == (True, "stopped")


def test_a_program_given_by_its_path_runs_as_every_instance(machine: Machine) -> None:
    """A stand-in at a path of its own, as a real osqueryd would be; the machine's real data comes back."""
    program = machine.root / "osqueryd"
    words = [sys.executable, "-m", "osqbox", "osqueryd", f"--osqbox_install={program}"]
    subprocess.run(words, env=machine.env, check=True, timeout=TIMEOUT_S)
    agent = machine.start("--instances", "cli-path", "--osqueryd", str(program), "--shared-client")
    pid = until(agent, "cli-path", "connected")["pid"]
    asked = json.loads(machine.verb("query", "select pid from osquery_info", "--json").stdout)
    assert asked == [{"pid": str(pid)}]


@pytest.mark.parametrize("dialect", ["osquery", "launcher"])
def test_without_instances_it_is_one_agent_of_a_pretended_machine(
    machine: Machine, osqbox: Osqbox, dialect: str
) -> None:
    words = ["--profile", "ubuntu", "--host-identifier", "cli-alone", "--enroll-secret", osqbox.enroll_secret]
    words += ["--dialect", dialect]
    agent = subprocess.Popen(
        [sys.executable, "-m", "osqbox", "agent", "--json", "--interval", "1", *words],
        env=machine.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    machine.agents.append(agent)
    assert until(agent, None, "enrolled")["host_identifier"] == "cli-alone"
    answer = osqbox.query("select platform from os_version", timeout=TIMEOUT_S)
    assert answer.rows == [{"platform": "ubuntu"}], (answer.accounts, agent.poll(), osqbox.events)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\n", "one JSON object"),
        (b"[]\n", "one JSON object"),
        (b"[" * 100_000 + b"\n", "one JSON object"),
        (b'{"do":"dance"}\n', "got 'dance'"),
        (b'{"do":"query","sql":5}\n', "sql to be text"),
        (b'{"do":"remove_instance","name":"x"}\n', "got 'x'"),
        (b'{"do":"add_instance","name":"../x"}\n', "instance's name"),
        (b"x" * (1024 * 1024 + 1), "at most"),
    ],
)
def test_what_the_control_socket_does_not_understand_is_refused(line: bytes, said: str) -> None:
    async def main(root: Path) -> None:
        async with (
            open_runner(RunnerOptions("localhost:1", root, in_process=True)) as runner,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(serve_control, runner)
            assert control_path(root).stat().st_mode & 0o777 == 0o600
            async with await trio.open_unix_socket(str(control_path(root))) as stream:
                await stream.send_all(line)
                reply = b"".join([chunk async for chunk in stream])
            assert said in json.loads(reply)["error"]
            assert await trio.to_thread.run_sync(lambda: ask(root, "status")["instances"]) == []
            nursery.cancel_scope.cancel()

    with tempfile.TemporaryDirectory(prefix="ob") as folder:
        trio.run(main, Path(folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--in-process",), "--in-process goes with --instances"),
        (("--secret", "a=b"), "--secret goes with --instances"),
        (("--instances", "a,a", "--tls-hostname", "h:1", "--enroll-secret", "s"), "each instance once"),
        (("--instances", "../x", "--tls-hostname", "h:1", "--enroll-secret", "s"), "instance's name"),
        (("--instances", "a", "--tls-hostname", "h:1"), "enroll secret of a"),
        (("--instances", "a", "--tls-hostname", "h:1", "--secret", "private"), "expected NAME=SECRET"),
        (("--instances", "a", "--tls-hostname", "h:1", "--secret", "b=private"), "one of --instances a"),
        (("--instances", "a", "--osqueryd", "/x", "--profile", "ubuntu"), "--osqueryd goes without --profile"),
        (("--instances", "a", "--state", "/x"), "--state goes without --instances"),
        (("--instances", "a", "--dialect", "launcher"), "--dialect launcher goes without --instances"),
    ],
)
def test_words_that_do_not_go_together_are_refused(run: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    """With exit code 2, and no secret is repeated."""
    result = run("agent", *words)
    assert result.exit_code == 2
    assert said in str(result.exception or result.output)
    assert "private" not in str(result.exception)


def test_the_root_may_stand_before_the_verb(run: Callable[..., Any], tmp_path: Path) -> None:
    for words in (("--root", str(tmp_path), "status"), ("status", "--root", str(tmp_path))):
        assert str(tmp_path) in str(run("agent", *words).exception)


def test_its_verbs_are_listed_without_being_imported(run: Callable[..., Any]) -> None:
    for verb in ("status", "add-instance", "remove-instance", "query", "capture"):
        assert verb in run("agent", "--help").output
