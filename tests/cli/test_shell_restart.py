"""``osqbox shell`` while the box it goes through is stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .conftest import JobsBox, start_jobs_box

WAIT_S = 20.0
STOP = "stop"
COUNT = 'stty -echo -opost; PS1=; n=0; while [ ! -e {stop} ]; do n=$((n+1)); echo "line $n"; done; exit 7\n'


def wait_for(fact: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def verb(box: JobsBox, *words: str) -> bytes:
    command = [sys.executable, "-m", "osqbox", *words]
    return subprocess.run(
        command, env=box.environment(), cwd=box.home, capture_output=True, timeout=WAIT_S, check=True
    ).stdout


@contextmanager
def running(box: JobsBox, *words: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "osqbox", *words],
        env={**box.environment(), "PS1": "", "ENV": ""}, cwd=box.home, **streams,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()


def test_output_is_contiguous_over_restarts_and_the_exit_code_arrives(tmp_path: Path) -> None:
    """The box is stopped, then killed, in the middle of a stream; another box of the same user runs beside it."""
    options = ["--control", "--data", str(tmp_path / "data")]
    serve, box = start_jobs_box(tmp_path, *options)
    ports = [f"--{name}-port={box.ready[name].rpartition(':')[2]}" for name in ("agents", "operator", "jobs")]
    log = (tmp_path / "agent.log").open("wb")
    agent = ["agent", "--control", "--allow-real-shell", "--shell", "/bin/sh"]
    seen, others = bytearray(), list[subprocess.Popen[bytes]]()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with log, running(box, *agent, stdout=log, stderr=log):
        try:
            wait_for(lambda: json.loads(verb(box, "nodes", "--json")))
            [node] = json.loads(verb(box, "nodes", "--json"))
            with running(box, "shell", node["id"], **pipes) as shell:
                assert shell.stdin
                assert shell.stdout
                assert shell.stderr
                reader = threading.Thread(target=read, args=(shell.stdout, seen))
                reader.start()
                shell.stdin.write(COUNT.format(stop=tmp_path / STOP).encode())
                shell.stdin.flush()
                for how in (signal.SIGTERM, signal.SIGKILL):
                    before = len(seen)
                    wait_for(lambda before=before: len(seen) > before + 100_000)
                    serve.send_signal(how)
                    serve.wait(WAIT_S)
                    if not others:
                        others.append(start_jobs_box(tmp_path, "--ephemeral")[0])
                    serve, _ = start_jobs_box(tmp_path, *options, *ports)
                before = len(seen)
                wait_for(lambda: len(seen) > before + 100_000)
                (tmp_path / STOP).touch()
                assert shell.wait(WAIT_S) == 7
                reader.join(WAIT_S)
                assert shell.stderr.read().count(b"the connection was lost") == 2
            lines = bytes(seen).partition(b"line 1\n")[2].splitlines()
            assert lines == [b"line %d" % number for number in range(2, len(lines) + 2)]
            here = ["--data", str(tmp_path / "data")]
            [facts] = json.loads(verb(box, "shell", "list", "--json", *here))
            assert (facts["exit_code"], facts["end_reason"], facts["output_bytes"]) == (7, "exit", len(seen))
            assert verb(box, "shell", "replay", facts["id"], "--no-wait", *here) == bytes(seen)
        finally:
            for each in (serve, *others):
                each.terminate()
                each.wait(WAIT_S)


def read(pipe: IO[bytes], into: bytearray) -> None:
    while piece := os.read(pipe.fileno(), 65536):
        into += piece
