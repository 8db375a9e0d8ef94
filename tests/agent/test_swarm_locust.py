"""The agents under Locust: a real master and two workers against a box."""

from __future__ import annotations

import csv
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from osqbox.agent.swarm.locustfile import locustfile
from osqbox.agent.swarm.plan import Growth, SwarmPlan, read_mix, server
from osqbox.testing import Osqbox

pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")

USERS = 6


def plan_for(box: Osqbox, secret: str = "") -> SwarmPlan:
    return SwarmPlan(
        server=server(box.url),
        growth=Growth(USERS, 10.0, 30.0),
        mix=read_mix("ubuntu"),
        enroll_secret=secret or box.enroll_secret,
        interval_s=1,
        log_period_s=1,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def locust(directory: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A Locust process; killed at the end if it has not ended by itself."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OSQBOX_")}
    program = subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(directory / "locustfile.py"), "--headless", *words],
        cwd=directory,
        env=variables | {"PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield program
    finally:
        if program.poll() is None:
            program.kill()
        program.communicate()


def finished(program: subprocess.Popen[str]) -> None:
    _, said = program.communicate(timeout=40)
    assert program.returncode == 0, said


def statistics(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "out_stats.csv").open() as lines:
        return {row["Name"]: row for row in csv.DictReader(lines)}


def test_a_master_and_two_workers(osqbox: Osqbox, tmp_path: Path) -> None:
    """Each worker's agents are hosts of their own; all of them answer a campaign; Locust counts no failure."""
    (tmp_path / "locustfile.py").write_text(locustfile(plan_for(osqbox), osqbox.ca_file, "ubuntu"))
    port = str(free_port())
    master = ["--master", "--master-bind-port", port, "--master-bind-host", "127.0.0.1", "--expect-workers", "2"]
    load = ["--users", str(USERS), "--spawn-rate", "10", "--run-time", "4s", "--stop-timeout", "1", "--csv", "out"]
    worker = ["--worker", "--master-host", "127.0.0.1", "--master-port", port]
    with (
        locust(tmp_path, *master, *load) as leader,
        locust(tmp_path, *worker) as first,
        locust(tmp_path, *worker) as second,
    ):
        after = 0
        for _ in range(USERS):
            after = osqbox.wait_for("enroll", timeout=30, after=after).seq
        answers = osqbox.query("select hostname from system_info", timeout=15)
        for program in (leader, first, second):
            finished(program)
    assert answers.summary["answered"] == USERS
    assert len({row["hostname"] for row in answers}) == USERS
    counted = statistics(tmp_path)
    assert counted["Aggregated"]["Failure Count"] == "0"
    for call in ("enroll", "config", "write"):
        assert int(counted[call]["Request Count"]) == USERS
    assert {"read", "held"} & set(counted)


def test_refusals_are_failures_in_locusts_statistics(osqbox: Osqbox, tmp_path: Path) -> None:
    text = locustfile(plan_for(osqbox, "a wrong secret"), osqbox.ca_file, "ubuntu")
    (tmp_path / "locustfile.py").write_text(text)
    load = ["--users", "2", "--spawn-rate", "10", "--run-time", "1s", "--stop-timeout", "1", "--csv", "out"]
    with locust(tmp_path, *load, "--exit-code-on-error", "0") as alone:
        finished(alone)
    enroll = statistics(tmp_path)["enroll"]
    assert int(enroll["Failure Count"]) == int(enroll["Request Count"]) >= 2
    assert osqbox.nodes == []
