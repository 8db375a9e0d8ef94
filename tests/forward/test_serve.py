"""A real box that forwards: its flags, its stdout, its end, and its death between a confirmation and the cursor."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ._rig import Posted, Said, collector

LIMIT_S = 20


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    lines: list[bytes]
    """Of stdout so far."""
    node_key: str = ""

    def post(self, url: str, body: Any, token: str | None = None) -> bytes:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        context = ssl.create_default_context(cafile=self.ready["ca"]) if url.startswith("https:") else None
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return bytes(response.read())

    def call(self, path: str, body: Any) -> Any:
        return json.loads(self.post(f"{self.ready['agents']}/api/v1/osquery/{path}", body))

    def enroll(self) -> None:
        secret = self.ready["enroll_secret"]
        self.node_key = self.call("enroll", {"enroll_secret": secret, "host_identifier": "h1"})["node_key"]

    def log(self, numbers: range) -> None:
        lines = [{"name": "q", "action": "added", "columns": {"n": str(n)}, "unixTime": 1} for n in numbers]
        answer = self.call("log", {"node_key": self.node_key, "log_type": "result", "data": lines})
        assert "error" not in answer

    def ask(self, path: str, body: Any = None) -> bytes:
        url, token = self.ready["operator"] + path, self.ready["token"]
        if body is not None:
            return self.post(url, body, token)
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=10
        ) as response:
            return bytes(response.read())

    def sinks(self) -> Any:
        """Their statistics."""
        return json.loads(self.ask("/api/v1/info"))["statistics"]["forwarding"]


@contextmanager
def serving(home: Path, *flags: str, reads: bool = True) -> Iterator[Served]:
    ready_file = home / "ready.json"
    ready_file.unlink(missing_ok=True)
    ports = [word for name in ("agents", "operator", "jobs", "comms") for word in (f"--{name}-port", "0")]
    words = ["serve", "--certs", str(home / "certs"), "--data", str(home / "data"), "--ready-file", str(ready_file)]
    with subprocess.Popen(
        [sys.executable, "-m", "osqbox", *words, *ports, *flags],
        env={**os.environ, "OSQBOX_HOME": str(home)}, cwd=home, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        served = Served(process, {}, [])
        reading = threading.Thread(target=lambda: served.lines.extend(process.stdout or ()))
        if reads:
            reading.start()
        try:
            wait_for(lambda: ready_file.exists() or process.poll() is not None)
            assert process.poll() is None
            served.ready = json.loads(ready_file.read_text())
            yield served
        finally:
            process.terminate()
            process.wait(LIMIT_S)
            if reads:
                reading.join(LIMIT_S)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def numbers_of(records: list[dict[str, Any]]) -> list[int]:
    return [int(record["line"]["columns"]["n"]) for record in records]


def test_a_box_forwards_to_every_kind_of_place(tmp_path: Path) -> None:
    """The ready line comes first on stdout, the records behind it; at the end everything has been given on."""
    with collector() as server:
        file = tmp_path / "out.ndjson"
        places = ("--forward", f"file:{file}", "--forward", "stdout:", "--forward", server.url)
        with serving(tmp_path, *places, "--forward-source", "logs", "--json") as served:
            served.enroll()
            served.log(range(100))
            told = [(True, 100, 0)] * 3
            wait_for(lambda: [(s["up"], s["forwarded"], s["dropped"]) for s in served.sinks()] == told)
            assert b'osqbox_forward_forwarded_total{sink="stdout:"} 100\n' in served.ask("/metrics")
            where = ("--url", served.ready["operator"], "--token", served.ready["token"])
            shown = subprocess.run([sys.executable, "-m", "osqbox", "status", *where], capture_output=True, timeout=20)
            assert b"forward stdout:" in shown.stdout
            assert b"0 waiting, 100 forwarded, 0 dropped, 0 set aside, up" in shown.stdout
            served.log(range(100, 200))
        assert served.process.returncode == 0
        assert json.loads(served.lines[0])["event"] == "ready"
        on_stdout = [json.loads(line) for line in served.lines[1:]]
        in_file = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert numbers_of(on_stdout) == numbers_of(in_file) == numbers_of(server.taken) == list(range(200))


def test_a_stdout_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    """The other places go on, and the box ends in its time."""
    file = tmp_path / "out.ndjson"
    with serving(tmp_path, "--forward", "stdout:", "--forward", f"file:{file}", reads=False) as served:
        served.enroll()
        for start in range(0, 5000, 1000):
            served.log(range(start, start + 1000))
        wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") == 5000)
        stuck = served.sinks()[0]
        assert (stuck["waiting"], stuck["forwarded"]) == (5000, 0)
        began = time.monotonic()
    assert served.process.returncode == 0
    assert time.monotonic() - began < 6


def test_events_of_a_comms_agent(tmp_path: Path) -> None:
    """From the agent's request to the file, within moments."""
    file = tmp_path / "out.ndjson"
    with serving(tmp_path, "--forward", f"file:{file}", "--forward-source", "events", "--quiet") as served:
        agent = json.loads(served.ask("/api/v1/agents", {"name": "a1"}))
        comms = f"{served.ready['comms']}/api/v1"
        login = {"uuid": agent["uuid"], "password": agent["key"]}
        token = json.loads(served.post(f"{comms}/login", login))["token"]
        began = time.monotonic()
        served.post(f"{comms}/events/stateless", {"module": "m", "collector": "c", "data": 1, "x": "y"}, token)
        wait_for(lambda: file.exists() and file.read_bytes().endswith(b"\n"))
        assert time.monotonic() - began < 5
    (record,) = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert (record["source"], record["agent"], record["module"]) == ("events", agent["uuid"], "m")


def test_killed_between_confirmation_and_cursor(tmp_path: Path) -> None:
    """Nothing is lost; what comes twice has the same id."""
    served: list[Served] = []

    def script(posted: Posted) -> Said:
        if served and len(posted.records) > 10:
            os.kill(served.pop().process.pid, signal.SIGKILL)
        return Said()

    with collector(script) as server:
        place = ("--forward", server.url, "--forward-source", "logs")
        for round_ in range(3):
            with serving(tmp_path, *place, "--quiet") as box:
                box.enroll()
                served.append(box)
                box.log(range(round_ * 500, round_ * 500 + 500))
                box.process.wait(LIMIT_S)
            assert box.process.returncode == -signal.SIGKILL
        with serving(tmp_path, *place, "--quiet"):
            wait_for(lambda: len(set(numbers_of(server.taken))) == 1500)
        by_id = {record["id"]: record for record in server.taken}
        assert sorted(numbers_of(list(by_id.values()))) == list(range(1500))
        assert len(server.taken) > 1500


def test_job_output_of_a_real_job(tmp_path: Path) -> None:
    """Every byte a job wrote, in order, though it was written while the box looked."""
    file = tmp_path / "out.ndjson"
    with serving(tmp_path, "--forward", f"file:{file}", "--forward-source", "jobs", "--quiet") as served:
        script = "for i in $(seq 300); do echo line $i; done; sleep 0.5; echo end"
        job = json.loads(served.ask("/api/v1/jobs", {"command": "sh", "args": ["-c", script]}))["id"]
        wait_for(lambda: file.exists() and b"end\\n" in file.read_bytes())
    records = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert "".join(each["text"] for each in records) == "".join(f"line {n}\n" for n in range(1, 301)) + "end\n"
    assert {each["job"] for each in records} == {job}


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--forward", "nowhere"), 2, "--forward: expected file:PATH"),
        (("--forward", "file:/no/such/dir/out"), 3, "expected a directory"),
        (("--forward", "file:/tmp"), 3, "got the directory /tmp"),
        (("--forward", "stdout:", "--forward", "stdout:"), 2, "stdout: twice"),
        (("--forward", "http://h.example/", "--forward-auth-file", "x"), 7, "in the clear"),
    ],
)
def test_what_cannot_be_right_is_told_at_the_start(
    tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    words = ["serve", "--ephemeral", "--certs", str(tmp_path / "certs"), "--agents-port", "0", "--operator-port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "osqbox", *words, *flags],
        env={**os.environ, "OSQBOX_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, said in done.stderr.decode()) == (code, True), done.stderr.decode()
