"""Stop, timeout, suspend: the whole tree, in time, whatever it tries."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper.capabilities import capabilities

STUBBORN = """
trap '' TERM
(trap '' TERM; setsid sh -c 'trap "" TERM; echo one; sleep 60; sleep 60' &)
setsid setsid sh -c 'trap "" TERM; (sleep 61; sleep 62) & echo two; sleep 60' &
nohup sh -c 'trap "" TERM HUP; echo three; sleep 63' 2>/dev/null &
sh -c 'echo four; kill -STOP $$' &
sleep 60; sleep 60; sleep 60
"""


def test_a_stubborn_tree_is_gone_after_stop(keepers: Any, containment: str | None) -> None:
    kept = keepers.run(STUBBORN, containment=containment, stop_grace_s=0.3)
    for word in (b"one", b"two", b"three", b"four"):
        kept.until_output(word)
    assert len(kept.family()) >= 6
    started = time.monotonic()
    assert kept.ask("stop", by="alice")["ok"]
    assert kept.status["state"] == "stopping"
    ended = kept.end()
    assert 0.25 < time.monotonic() - started < 2
    assert kept.family() == set()
    assert (ended["state"], ended["signal"], ended["reason"], ended["stopped_by"]) == (
        "signaled",
        9,
        "stopped",
        "alice",
    )
    assert ended["containment"] == (containment or capabilities()["containment"])
    assert ended["cgroups"] == []


def test_a_fork_storm_is_gone_after_stop(keepers: Any, containment: str | None) -> None:
    fork = "n=0; while [ $n -lt 100000 ]; do (setsid sleep 60 &); n=$((n+1)); done"
    kept = keepers.run(f"({fork}) & ({fork}) & echo storm; sleep 60", containment=containment)
    kept.until_output(b"storm")
    assert kept.ask("stop", signal=9)["ok"]
    assert kept.end()["signal"] == 9
    assert kept.family() == set()


BOMB = """
import os
print("up", flush=True)
while True:
    try:
        if os.fork() == 0:
            os.setsid()
        os.waitpid(-1, os.WNOHANG)
    except OSError:
        pass
"""


def test_a_fork_bomb_is_gone_after_stop(keepers: Any) -> None:
    """Each with a session of its own, as many as its limit allows, and always trying."""
    if not capabilities()["pids"]:
        pytest.skip("no writable pids cgroup to hold it")
    kept = keepers.run(command=sys.executable, args=["-I", "-S", "-c", BOMB], limits={"processes": 30})
    kept.until_output(b"up")
    time.sleep(0.3)
    assert len(kept.family()) > 10
    kept.ask("stop", signal=9)
    assert kept.end()["signal"] == 9
    assert kept.family() == set()


def test_who_listens_ends_by_itself(keepers: Any) -> None:
    kept = keepers.run("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done").until_output(b"up")
    kept.ask("stop", by="bob", reason="shutdown")
    ended = kept.end()
    assert (ended["state"], ended["exit_code"], ended["reason"], ended["stopped_by"]) == (
        "exited",
        5,
        "shutdown",
        "bob",
    )
    assert kept.output.endswith(b"bye\n")


def test_the_signal_and_whom_it_reaches_can_be_chosen(keepers: Any) -> None:
    loop = "while :; do sleep 0.02; done"
    script = f"trap 'echo int; exit 0' INT; (trap 'echo child' INT; {loop}) & echo up; {loop}"
    alone, group = keepers.run(script), keepers.run(script)
    for kept, leader_only in ((alone, True), (group, False)):
        kept.until_output(b"up")
        kept.ask("stop", signal=signal.SIGINT, leader_only=leader_only)
        assert kept.end()["exit_code"] == 0
    assert b"child" not in alone.output
    assert b"int" in group.output


def test_stopping_twice_keeps_the_earlier_end_and_the_first_name(keepers: Any) -> None:
    kept = keepers.run("trap '' TERM; echo up; sleep 60; sleep 60").until_output(b"up")
    started = time.monotonic()
    assert kept.ask("stop", by="first", grace_s=30)["ok"]
    assert kept.ask("stop", by="second", grace_s=0.2)["ok"]
    assert kept.ask("stop", by="third", grace_s=60)["ok"]
    ended = kept.end()
    assert time.monotonic() - started < 3
    assert ended["stopped_by"] == "first"


def test_a_kill_may_follow_a_stop(keepers: Any) -> None:
    kept = keepers.run("trap '' TERM; echo up; sleep 60; sleep 60").until_output(b"up")
    kept.ask("stop", grace_s=30)
    kept.ask("stop", signal=9)
    assert kept.end()["signal"] == 9


def test_timeout(keepers: Any) -> None:
    ended = keepers.run("sleep 60", timeout_s=0.2).end()
    assert (ended["signal"], ended["reason"], ended["stopped_by"]) == (15, "timeout", None)
    ended = keepers.run("trap '' TERM; sleep 60; sleep 60", timeout_s=0.2, stop_grace_s=0.2).end()
    assert (ended["signal"], ended["reason"]) == (9, "timeout")


def ticks(pids: set[int]) -> int:
    """CPU time of these processes."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


def test_suspended_is_the_whole_tree_and_it_goes_on(keepers: Any, containment: str | None) -> None:
    kept = keepers.run("setsid sh -c 'while :; do :; done' & echo up; while :; do :; done", containment=containment)
    kept.until_output(b"up")
    assert kept.ask("suspend")["ok"]
    assert kept.ask("suspend")["ok"]
    assert kept.status["state"] == "suspended"
    time.sleep(0.1)
    family = kept.family()
    before = ticks(family)
    time.sleep(0.3)
    assert (len(family), ticks(family) - before) == (2, 0)
    assert kept.ask("resume")["ok"]
    assert kept.ask("status")["status"]["state"] == "running"
    time.sleep(0.3)
    assert ticks(family) > before
    kept.ask("stop", signal=9)
    kept.end()


def test_stop_while_suspended(keepers: Any, containment: str | None) -> None:
    kept = keepers.run("trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.02; done", containment=containment)
    kept.until_output(b"up")
    kept.ask("suspend")
    kept.ask("stop")
    assert kept.end()["exit_code"] == 4
    assert kept.output.endswith(b"bye\n")
    kept = keepers.run("trap '' TERM; echo up; sleep 60; sleep 60", containment=containment).until_output(b"up")
    kept.ask("suspend")
    kept.ask("stop", grace_s=0.2)
    assert kept.end()["signal"] == 9


def test_a_signal_reaches_the_leader(keepers: Any) -> None:
    kept = keepers.run("trap 'echo usr1' USR1; echo up; while :; do sleep 0.02; done").until_output(b"up")
    assert kept.ask("signal", signal=signal.SIGUSR1)["ok"]
    kept.until_output(b"usr1")
    for number in (0, -1, 65, "TERM", None, True):
        assert kept.ask("signal", signal=number)["error"] == "INVALID"
    kept.ask("stop", signal=9)
    kept.end()


def test_a_hundred_processes_are_gone_at_once(keepers: Any, containment: str | None) -> None:
    kept = keepers.run("for i in $(seq 100); do sleep 60 & done; echo up; wait", containment=containment)
    kept.until_output(b"up")
    started = time.monotonic()
    kept.ask("stop", signal=9)
    kept.end()
    assert time.monotonic() - started < 2
    assert kept.family() == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="leaving a cgroup takes root")
def test_who_leaves_the_cgroup_does_not_escape(keepers: Any) -> None:
    kept = keepers.run(
        "setsid sh -c 'echo 0 > /sys/fs/cgroup/unified/cgroup.procs || echo 0 > /sys/fs/cgroup/cgroup.procs;"
        " echo out; sleep 60' 2>/dev/null & sleep 60"
    )
    kept.until_output(b"out")
    kept.ask("stop", signal=9)
    kept.end()
    assert kept.family() == set()


def test_years_are_not_too_long(keepers: Any) -> None:
    kept = keepers.run("sleep 60", timeout_s=1e8).until_running()
    assert kept.ask("stop", signal=signal.SIGCONT, grace_s=1e300)["ok"]
    assert kept.ask("status")["status"]["state"] == "stopping"
    assert kept.ask("stop", signal=signal.SIGCONT, grace_s=float("inf"))["ok"]
    assert kept.ask("stop", signal=signal.SIGCONT, grace_s=float("nan"))["ok"]  # no time at all
    assert kept.end()["signal"] == 9
