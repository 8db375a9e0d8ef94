"""How a job ends by itself: the code, the signal, the last byte, and whoever it leaves behind."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import tree
from osqbox.jobs.keeper.cgroups import remove_empty

ENDS = [
    ("exit 0", "exited", 0, None),
    ("exit 3", "exited", 3, None),
    ("exit 137", "exited", 137, None),
    ("kill -9 $$", "signaled", None, 9),
    ("kill -15 $$", "signaled", None, 15),
    ("kill -s RTMIN $$", "signaled", None, 34),
]


@pytest.mark.parametrize(("script", "state", "code", "number"), ENDS)
def test_codes_and_signals_are_kept_apart(
    keepers: Any, script: str, state: str, code: int | None, number: int | None
) -> None:
    ended = keepers.run(script).end()
    assert (ended["state"], ended["exit_code"], ended["signal"]) == (state, code, number)
    assert (ended["reason"], ended["core_dumped"], ended["output_drained"]) == ("exit", False, True)
    assert ended["started_at"] <= ended["ended_at"] <= time.time()


def test_a_core_is_told(keepers: Any, tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("cores are forbidden here")
    kept = keepers.run("ulimit -c unlimited; kill -QUIT $$", cwd=str(tmp_path))
    ended = kept.end()
    assert (ended["signal"], ended["core_dumped"]) == (3, True)


def test_short_jobs_lose_nothing(keepers: Any) -> None:
    """Every one of them gives its byte and its code. KEEPER_JOBS=2000 for the whole campaign."""
    total, batch = int(os.environ.get("KEEPER_JOBS", "200")), 20
    for _ in range(0, total, batch):
        jobs = [keepers.run("printf x; exit 3") for _ in range(batch)]
        for kept in jobs:
            ended = kept.end()
            assert (ended["state"], ended["exit_code"], ended["output_bytes"]) == ("exited", 3, 1)
            assert kept.output == b"x"
            assert [record[:3] for record in kept.records] == [(0, 1, 0)]


def test_many_at_once(keepers: Any) -> None:
    """More than the zygote takes at a time: whoever waits for it loses nothing."""
    args = ["x" * 1000] * 50
    jobs = [keepers.run(command="sh", args=["-c", "read x; exit 4", *args], stdin=True) for _ in range(150)]
    for kept in jobs:
        kept.until_running()
    assert len({kept.status["pid"] for kept in jobs}) == 150
    for kept in jobs:
        kept.send("input", eof=True)
    assert {kept.end()["exit_code"] for kept in jobs} == {4}


def test_streams_are_kept_apart_or_mixed(keepers: Any) -> None:
    script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done"
    split, merged = keepers.run(script), keepers.run(script, merged=True)
    ended = split.end()
    by_stream = {0: b"", 1: b""}
    for offset, length, stream, _ in split.records:
        by_stream[stream] += split.output[offset : offset + length]
    assert by_stream == {0: b"out1\nout2\nout3\n", 1: b"err1\nerr2\nerr3\n"}
    assert (ended["stdout_bytes"], ended["stderr_bytes"], ended["output_bytes"]) == (15, 15, 30)
    ended = merged.end()
    assert merged.output == b"out1\nerr1\nout2\nerr2\nout3\nerr3\n"
    assert {record[2] for record in merged.records} == {2}
    assert (ended["stdout_bytes"], ended["stderr_bytes"]) == (30, 0)


def test_every_byte_value_in_any_amount(keepers: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_001))
    kept = keepers.run(command="cat", args=[str(source)])
    assert kept.end()["output_bytes"] == 3_000_001
    assert kept.output == source.read_bytes()


def test_a_job_that_writes_single_bytes_keeps_its_pace_and_a_short_index(keepers: Any) -> None:
    kept = keepers.run(command="dd", args=["if=/dev/zero", "bs=1", "count=200000", "status=none"])
    ended = kept.end()
    assert ended["output_bytes"] == 200_000
    assert len(kept.records) < 20_000


@pytest.mark.parametrize("script", ["sleep 60 & echo x", "setsid sleep 60 & echo x", "(sleep 60 &) ; echo x"])
def test_a_background_child_does_not_keep_a_job_alive(keepers: Any, containment: str | None, script: str) -> None:
    """Though it holds the pipes."""
    started = time.monotonic()
    kept = keepers.run(script, containment=containment)
    ended = kept.end()
    assert (ended["exit_code"], ended["reason"], ended["output_drained"]) == (0, "exit", True)
    assert ended["leftover_processes"] == 1
    assert time.monotonic() - started < 1.5
    assert (kept.family(), kept.output) == (set(), b"x\n")
    assert not any(Path(group).exists() for group in kept.status["cgroups"])


@pytest.mark.parametrize("containment", [None, "process_group"])
def test_leftovers_are_spared_on_request(keepers: Any, containment: str | None) -> None:
    started = time.monotonic()
    kept = keepers.run("sleep 60 & echo x", keep_leftovers=True, containment=containment)
    ended = kept.end()
    assert 1.9 < time.monotonic() - started < 4
    assert (ended["exit_code"], ended["output_drained"], ended["leftover_processes"]) == (0, False, 1)
    assert len(kept.family()) == 1
    assert remove_empty(ended["cgroups"]) == ended["cgroups"]
    tree.end_orphans(kept.id, [])
    assert remove_empty(ended["cgroups"]) == []


def test_spared_leftovers_that_let_go_of_the_pipes_end_the_job_at_once(keepers: Any) -> None:
    started = time.monotonic()
    kept = keepers.run("sleep 60 >/dev/null 2>&1 & echo x", keep_leftovers=True)
    ended = kept.end()
    assert time.monotonic() - started < 1.5
    assert (ended["output_drained"], ended["leftover_processes"]) == (True, 1)


def test_what_a_job_used_is_counted_with_its_children(keepers: Any) -> None:
    ended = keepers.run("sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'; true").end()
    assert ended["usage"]["user_s"] > 0.02
    assert ended["usage"]["max_rss_bytes"] > 100_000


def test_the_output_bound_kills_by_request(keepers: Any) -> None:
    kept = keepers.run("yes", max_output_bytes=100_000, overflow="kill")
    ended = kept.end()
    assert (ended["state"], ended["signal"], ended["reason"]) == ("signaled", 9, "output_limit")
    assert (ended["output_bytes"], len(kept.output)) == (100_000, 100_000)
    assert ended["dropped"][0] == 100_000


def test_head_and_tail_of_a_long_output(keepers: Any) -> None:
    kept = keepers.run(command="seq", args=["1000000"], max_output_bytes=100_000)
    ended = kept.end()
    whole = b"".join(b"%d\n" % number for number in range(1, 1_000_001))
    start, end = ended["dropped"]
    assert ended["output_bytes"] == len(whole)
    assert kept.output[:start] == whole[:start]
    assert kept.output[end:] == whole[end:]
    assert 80_000 < start + len(whole) - end <= 100_000
    assert (kept.directory / "output").stat().st_blocks * 512 < 600_000
