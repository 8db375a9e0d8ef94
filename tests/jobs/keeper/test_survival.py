"""Who may die without the job noticing, and what is left when the keeper itself does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import tree

SCRIPT = "echo up; while [ ! -e go ]; do sleep 0.02; done; echo done; exit 8"

BOX = """
import os, subprocess, sys, time
from osqbox.jobs.keeper import wire
ours, theirs = wire.zygote_sockets()
subprocess.Popen(wire.zygote_command(theirs.fileno()), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                 stdout=subprocess.DEVNULL, start_new_session=True, env={})
theirs.close()
fd = os.open(sys.argv[1], os.O_RDONLY)
job = wire.spawn(ours, {"id": "a" * 32, "command": "sh", "args": ["-c", sys.argv[2]],
                        "env": {"PATH": os.environ["PATH"]}, "cwd": sys.argv[1]}, fd)
job.setblocking(True)
print(job.recv(65536).decode(), flush=True)
time.sleep(60)
"""


def wait_for(what: Callable[[], object], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    return pid in tree.processes()


def test_a_job_outlives_a_killed_box(tmp_path: Path) -> None:
    """And its zygote, which ends with the box; the keeper answers the next box and writes the end."""
    box = subprocess.Popen([sys.executable, "-c", BOX, tmp_path, SCRIPT], stdout=subprocess.PIPE)
    assert box.stdout is not None
    status = json.loads(box.stdout.readline())["status"]
    box.kill()
    box.wait(5)
    box.stdout.close()
    assert is_alive(status["pid"])
    (tmp_path / "go").touch()
    wait_for(lambda: not (tmp_path / "socket").exists())
    ended = json.loads((tmp_path / "status.json").read_bytes())
    assert (ended["state"], ended["exit_code"]) == ("exited", 8)
    assert (tmp_path / "output").read_bytes() == b"up\ndone\n"


def test_keepers_outlive_the_zygote(make_keepers: Callable[..., Any], tmp_path: Path) -> None:
    keepers = make_keepers()
    kept = keepers.run(SCRIPT, cwd=str(tmp_path)).until_output(b"up")
    keepers.process.kill()
    keepers.process.wait(5)
    (tmp_path / "go").touch()
    assert kept.end()["exit_code"] == 8


def test_the_zygote_ends_with_its_box_and_leaves_no_zombies(make_keepers: Callable[..., Any]) -> None:
    keepers = make_keepers()
    for _ in range(5):
        keepers.run("true").end()
    wait_for(lambda: not Path(f"/proc/{keepers.process.pid}/task/{keepers.process.pid}/children").read_text())
    keepers.sock.close()
    assert keepers.process.wait(5) == 0


def test_a_terminated_keeper_ends_its_job_in_order(keepers: Any) -> None:
    """As when the machine goes down."""
    kept = keepers.run("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.02; done").until_output(b"up")
    os.kill(kept.keeper_pid, signal.SIGHUP)
    os.kill(kept.keeper_pid, signal.SIGINT)
    os.kill(kept.keeper_pid, signal.SIGTERM)
    ended = kept.end()
    assert (ended["exit_code"], ended["reason"]) == (3, "shutdown")


@pytest.mark.parametrize("is_suspended", [False, True])
def test_what_a_killed_keeper_leaves_can_be_found(keepers: Any, containment: str | None, is_suspended: bool) -> None:
    """The leader dies with it; the rest is found by cgroup or by JOB_ID."""
    kept = keepers.run("setsid sleep 60 & (setsid sleep 61 &); echo up; sleep 62", containment=containment)
    kept.until_output(b"up")
    if is_suspended:
        kept.ask("suspend")
    leader, keeper = kept.status["pid"], kept.keeper_pid
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: not is_alive(keeper))
    if not is_suspended:
        wait_for(lambda: not is_alive(leader))
    assert kept.family()
    status = json.loads((kept.directory / "status.json").read_bytes())
    assert status["state"] == ("suspended" if is_suspended else "running")
    started = time.monotonic()
    assert tree.end_orphans(kept.id, status["cgroups"]) >= 2
    assert time.monotonic() - started < 2
    assert kept.family() == set()
    assert not any(Path(group).exists() for group in status["cgroups"])
    assert tree.end_orphans(kept.id, status["cgroups"]) == 0
    kept.status["ended_at"] = 1


def test_a_keeper_whose_directory_is_gone_ends_with_its_job(keepers: Any) -> None:
    kept = keepers.run("echo up; read x", stdin=True).until_output(b"up")
    keeper = kept.keeper_pid
    shutil.rmtree(kept.directory)
    assert kept.ask("input", eof=True)["ok"]
    assert kept.until(lambda message: "ended" in message)["ended"]["exit_code"] == 1
    wait_for(lambda: not is_alive(keeper))


def test_an_end_that_the_disk_does_not_take_waits_for_somebody(keepers: Any) -> None:
    """The keeper stays and tells the next client."""
    kept = keepers.run("echo up; read x; exit 7", stdin=True).until_output(b"up")
    (kept.directory / "status.json").unlink()
    (kept.directory / "status.json").mkdir()  # no file can take its place
    kept.send("input", eof=True)
    kept.sock.close()
    wait_for(lambda: not is_alive(kept.status["pid"]))
    kept.reconnect()
    assert kept.until(lambda message: "ended" in message)["ended"]["exit_code"] == 7


BUG = (
    "import osqbox.jobs.keeper.keeper as k; call = k.Keeper._do; "
    "k.Keeper._do = lambda self, client, number, message: 1 / 0 if message.get('do') == 'bug' else "
    "call(self, client, number, message)"
)


def test_a_bug_in_the_keeper_leaves_no_job_unwatched(make_keepers: Callable[..., Any]) -> None:
    """Everything ends, and says why."""
    kept = make_keepers(before=BUG).run("setsid sleep 60 & echo up; sleep 60", stdin=True).until_output(b"up")
    kept.send("bug")
    ended = kept.end()
    assert (ended["state"], ended["reason"]) == ("lost", "lost")
    assert "ZeroDivisionError" in ended["failure"]["message"]
    assert (kept.output, kept.family(), ended["cgroups"]) == (b"up\n", set(), [])


def test_descriptors_of_keepers_are_few_and_its_own(keepers: Any) -> None:
    """No keeper holds anything of another job, of the zygote or of the box."""
    first = keepers.run("sleep 60", stdin=True).until_running()
    second = keepers.run("sleep 60", stdin=True).until_running()
    links = [
        {str(entry.readlink()) for entry in Path(f"/proc/{kept.keeper_pid}/fd").iterdir()} for kept in (first, second)
    ]
    assert {link for link in links[0] & links[1] if not link.startswith("anon_inode")} == {"/dev/null"}
    assert [len(each) <= 14 for each in links] == [True, True], links
