"""Jobs outlive the process that started them: by a clean end, by SIGKILL, and with their keeper lost as well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.jobs import open_jobs
from osqbox.jobs.errors import Code
from osqbox.jobs.messages import Chunk, End, OutputRequest, Reason, State, Status
from osqbox.jobs.orphans import end_jobs
from osqbox.running import OWNER, ephemeral_data_dir

from .runner_rig import ALICE, Rig, alive, assert_whole, data_of, in_trio, refused, running, sha256, until, with_job_id

SERVER = """
import json, sys, trio
from osqbox.jobs import open_jobs

async def main():
    async with open_jobs(sys.argv[1]) as jobs:
        for line in sys.stdin:
            job = await jobs.run(["sh", "-c", json.loads(line)], open_stdin=True)
            print(json.dumps({"id": job.id, "pid": job.pid}), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


class Server:
    """A program with a runner, as a box is one; `kill` gives it no chance to say anything."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(script) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    server = Server(directory)
    try:
        yield server
    finally:
        server.kill()


def test_killed_in_the_middle_nothing_is_lost(tmp_path: Path) -> None:
    """The job goes on, a follower resumes where it was, the bytes are equal, the exit code is known."""
    random = tmp_path / "random"
    random.write_bytes(os.urandom(3_000_000))
    script = f"head -c 1000000 {random}; read go; tail -c +1000001 {random}; exit 42"

    async def test() -> None:
        with serving(tmp_path / "box") as server:
            job = server.run(script)["id"]
            log = tmp_path / "box" / "jobs" / job / "output"
            await until(lambda: log.stat().st_size == 1_000_000)
        assert with_job_id(job)
        async with open_jobs(tmp_path / "box", stop_jobs=True) as jobs:
            async with jobs.output(job, OutputRequest(offset=400_000)) as events:
                seen = b""
                while len(seen) < 600_000:
                    event = await anext(events)
                    assert isinstance(event, Chunk)
                    seen += event.data
                await jobs.send_input(job, b"\n")
                rest = [event async for event in events]
            assert_whole(rest, 1_000_000, 3_000_000)
            assert sha256(seen + data_of(rest)) == sha256(random.read_bytes()[400_000:])
            assert isinstance(rest[-1], End)
            assert (rest[-1].status.exit_code, rest[-1].status.state) == (42, State.EXITED)

    in_trio(test)


def test_what_ended_while_nobody_was_there_is_known_afterwards(tmp_path: Path) -> None:
    async def test() -> None:
        with serving(tmp_path / "box") as server:
            ended = server.run("read x; echo late")
            killed = server.run("sleep 60")
            server.run("sleep 0.01; echo quick; exit 9")
        os.kill(killed["pid"], signal.SIGSEGV)
        directory = tmp_path / "box" / "jobs"
        await until(lambda: not (directory / killed["id"] / "socket").exists())
        async with open_jobs(tmp_path / "box", stop_jobs=True) as jobs:
            await jobs.send_input(ended["id"], b"\n")
            assert (await jobs.wait(ended["id"], 10)).exit_code == 0
            status = await jobs.wait(killed["id"], 10)
            assert (status.state, status.signal, status.reason) == (State.SIGNALED, signal.SIGSEGV, Reason.EXIT)
            for job in (await jobs.list()).jobs:
                assert (await jobs.wait(job.id, 10)).has_ended

    in_trio(test)


def test_killed_while_it_starts_jobs_every_row_gets_its_end(tmp_path: Path) -> None:
    """Whatever the moment: a row is attached, ended or lost, and no process runs without a row that says so."""

    async def test() -> None:
        for n in range(6):
            server = Server(tmp_path / "box")
            server.run("true")
            assert server._process.stdin is not None
            server._process.stdin.write((json.dumps("sleep 61") + "\n") * 8)
            server._process.stdin.flush()
            await trio.sleep(0.008 * n)
            server.kill()
        async with open_jobs(tmp_path / "box", stop_jobs=True) as jobs:
            found = (await jobs.list(limit=1000)).jobs
            await trio.sleep(0.3)
            for job in found:
                status = await jobs.status(job.id)
                assert status.state in (State.RUNNING, State.EXITED, State.LOST)
                if status.state is State.LOST:
                    assert with_job_id(job.id) == []
        for job in found:
            assert with_job_id(job.id) == []

    in_trio(test)


def keeper_of(pid: int | None) -> int:
    """The parent of a job's leader."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


async def lose_keeper(rig: Rig, script: str) -> Status:
    job = await rig.shell(script)
    async with rig.runner.output(job.id, ALICE) as events:
        await anext(events)
    os.kill(keeper_of(job.pid), signal.SIGKILL)
    return job


def test_a_job_whose_keeper_is_killed_is_lost_and_its_tree_gone(tmp_path: Path) -> None:
    script = "setsid sh -c 'trap \"\" TERM; sleep 60' & (setsid sleep 61 &); echo up; wait"

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await lose_keeper(rig, script)
            status = await rig.ended(job)
            assert (status.state, status.reason, status.exit_code) == (State.LOST, Reason.LOST, None)
            assert with_job_id(job.id) == []
            events = await rig.events(job)
            assert data_of(events) == b"up\n"
            assert events[-1] == End(status)
            assert ("osqbox", "job.end", "lost") in rig.audited(job.id)
            after = await rig.run("echo", "fine")
            assert await rig.text(after) == b"fine\n"

    in_trio(test)


def test_a_lost_job_whose_log_is_damaged_as_well_still_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("echo up; sleep 60")
            async with rig.runner.output(job.id, ALICE) as events:
                await anext(events)
            os.truncate(rig.jobs / job.id / "index", 3)
            os.kill(keeper_of(job.pid), signal.SIGKILL)
            assert (await rig.ended(job)).state is State.LOST
            async with refused(Code.DATA_LOSS, "LOG_DAMAGED"):
                await rig.events(job)

    in_trio(test)


def test_a_keeper_lost_while_nobody_was_there(tmp_path: Path) -> None:
    async def test() -> None:
        with serving(tmp_path / "box") as server:
            found = server.run("setsid sleep 60 & sleep 61")
        job = found["id"]
        await until(lambda: len(with_job_id(job)) >= 3)
        os.kill(keeper_of(found["pid"]), signal.SIGKILL)
        async with open_jobs(tmp_path / "box", stop_jobs=True) as jobs:
            assert (await jobs.wait(job, 10)).state is State.LOST
            assert with_job_id(job) == []

    in_trio(test)


def test_the_zygote_may_die_and_is_made_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            first = await rig.run("sleep", "60")
            zygote = rig.runner._zygote._process
            assert zygote is not None
            zygote.kill()
            await zygote.wait()
            second = await rig.run("echo", "again")
            assert await rig.text(second) == b"again\n"
            assert (await rig.runner.status(first.id, ALICE)).state is State.RUNNING

    in_trio(test)


def test_an_orderly_end_leaves_jobs_to_the_next_runner(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, stop_jobs=False) as rig:
            job = await rig.shell("read a; echo one; read b; exit 6", open_stdin=True)
        for _ in range(3):
            async with running(tmp_path, stop_jobs=False) as rig:
                assert rig.runner.statistics().running == 1
                assert (await rig.runner.status(str(job.pid), ALICE)).id == job.id
                await rig.runner.suspend(job.id, ALICE)
        async with running(tmp_path) as rig:
            status = await rig.runner.status(job.id, ALICE)
            assert status.state is State.SUSPENDED
            await rig.runner.resume(job.id, ALICE)
            await rig.runner.send_input(job.id, ALICE, b"\n\n")
            assert await rig.text(job) == b"one\n"
            assert (await rig.ended(job)).exit_code == 6
            kinds = [kind for kind, _ in rig.told()]
            assert kinds == ["job_created", "job_started", "job_suspended", "job_resumed", "job_ended"]

    in_trio(test)


def test_a_row_that_never_got_its_keeper_is_lost_and_its_rest_swept(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("true")
            await rig.ended(job)
            await rig.store.write(
                lambda tx: (
                    tx.db.execute("UPDATE jobs SET state = 'pending', ended_at = NULL, exit_code = NULL") and None
                )
            )
        for path in (rig.jobs / job.id).iterdir():
            path.unlink()
        (rig.jobs / "kwithoutarow").mkdir()
        async with running(tmp_path) as rig:
            assert (await rig.ended(job)).state is State.LOST
            await until(lambda: not list(rig.jobs.iterdir()))

    in_trio(test)


def test_a_follower_survives_its_process_by_its_offset_alone(tmp_path: Path) -> None:
    """Killed again and again: the pieces, put together by offset, are the output."""

    async def test() -> None:
        with serving(tmp_path / "box") as server:
            job = server.run("read go; for i in $(seq 400); do printf %05d $i; sleep 0.002; done")["id"]
        seen = b""
        for turn in range(5):
            async with open_jobs(tmp_path / "box") as jobs:
                if not turn:
                    await jobs.send_input(job, b"\n")
                with trio.move_on_after(0.2):
                    async with jobs.output(job, OutputRequest(offset=len(seen))) as events:
                        async for event in events:
                            if isinstance(event, Chunk):
                                assert event.offset == len(seen)
                                seen += event.data
        async with open_jobs(tmp_path / "box", stop_jobs=True) as jobs:
            following = jobs.output(job, OutputRequest(offset=len(seen)))
            async with following as rest:
                seen += data_of([event async for event in rest])
        assert seen == b"".join(b"%05d" % n for n in range(1, 401))

    in_trio(test)


def test_jobs_of_a_box_that_is_given_up_are_ended(tmp_path: Path) -> None:
    """Its directory goes; one has lost its keeper as well."""

    async def test() -> None:
        with serving(tmp_path / "box") as server:
            jobs = [server.run("trap '' TERM; setsid sleep 60 & sleep 61") for _ in range(3)]
            ended = server.run("true")["id"]
        await until(lambda: all(len(with_job_id(job["id"])) >= 3 for job in jobs))
        await until(lambda: not (tmp_path / "box" / "jobs" / ended / "socket").exists())
        os.kill(keeper_of(jobs[0]["pid"]), signal.SIGKILL)
        assert await trio.to_thread.run_sync(end_jobs, tmp_path / "box" / "jobs") == 3
        for job in jobs:
            assert with_job_id(job["id"]) == []
        assert end_jobs(tmp_path / "nowhere") == 0

    in_trio(test)


def test_the_sweep_behind_a_killed_box_ends_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"osqbox-{os.getuid()}" / "data-left"

    async def test() -> None:
        left.mkdir(parents=True)
        left.parent.chmod(0o700)
        (left / OWNER).touch()
        with serving(left) as server:
            job = server.run("sleep 60")["id"]
        with ephemeral_data_dir():
            assert with_job_id(job) == []
            assert not left.exists()

    in_trio(test)


def test_nothing_of_a_stopped_job_is_alive(tmp_path: Path) -> None:
    async def test() -> None:
        with serving(tmp_path / "box") as server:
            job = server.run("sleep 60")
        async with open_jobs(tmp_path / "box") as jobs:
            await jobs.stop(job["id"], grace_s=0)
            await jobs.wait(job["id"], 10)
        assert not alive(job["pid"])

    in_trio(test)
