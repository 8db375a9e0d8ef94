"""The runner with real keepers: running, telling, stopping, following, and every refusal."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from osqbox import audit
from osqbox.jobs import service
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import (
    Caller,
    Chunk,
    End,
    JobBounds,
    JobSpec,
    Limits,
    OutputMode,
    Overflow,
    Reason,
    State,
    Status,
    Stream,
)
from osqbox.jobs.service import Record
from osqbox.store import Tx

from .runner_rig import (
    ALICE,
    BOB,
    OPERATOR,
    OTHER_ALICE,
    VIEWER,
    Rig,
    alive,
    assert_whole,
    data_of,
    in_trio,
    open_files,
    refused,
    running,
    sha256,
    until,
    with_job_id,
)

# running


def test_a_job_runs_ends_and_says_how(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("echo out; echo err >&2; exit 3", labels={"team": "blue"})
            assert job.state in (State.RUNNING, State.EXITED)
            status = await rig.ended(job)
            assert (status.state, status.exit_code, status.signal, status.reason) == (
                State.EXITED,
                3,
                None,
                Reason.EXIT,
            )
            assert (status.stdout_bytes, status.stderr_bytes, status.output_bytes) == (4, 4, 8)
            assert (status.owner, status.labels, status.args[0]) == ("default/alice", {"team": "blue"}, b"-c")
            assert await rig.runner.status(job.id, ALICE) == status

    in_trio(test)


def test_every_change_is_in_the_audit_and_in_the_feed(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60", env={"TOKEN": "hunter2"})
            await rig.runner.suspend(job.id, ALICE)
            await rig.runner.resume(job.id, ALICE)
            await rig.runner.stop(job.id, OPERATOR)
            await rig.ended(job)
            assert rig.audited(job.id) == [
                ("default/alice", "job.run", "ok"),
                ("osqbox", "job.start", "ok"),
                ("default/alice", "job.suspend", "ok"),
                ("default/alice", "job.resume", "ok"),
                ("default/olga", "job.stop", "ok"),
                ("osqbox", "job.end", "signaled 15"),
            ]
            kinds = ["job_created", "job_started", "job_suspended", "job_resumed", "job_stopping", "job_ended"]
            assert rig.told() == [(kind, job.id) for kind in kinds]
            rows = rig.store.peek(lambda db: audit.rows(db, action="job.run"))
            assert rows[0]["data"]["env"] == ["TOKEN"]
            assert (rows[0]["serial"], rows[0]["address"], rows[0]["tenant"]) == ("a11ce", "192.0.2.1", "default")
            assert "hunter2" not in str(rig.store.peek(lambda db: list(db.iterdump())))
            assert rig.store.peek(audit.verify).broken_at is None

    in_trio(test)


def test_a_stop_that_is_over_at_once_still_says_who_asked(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")
            await rig.runner.stop(job.id, ALICE, signal=signal.SIGKILL, grace_s=0)
            status = await rig.ended(job)
            assert (status.signal, status.reason, status.stopped_by) == (9, Reason.STOPPED, "default/alice")
            assert ("default/alice", "job.stop", "ok") in rig.audited(job.id)

    in_trio(test)


def test_the_environment_is_clean_and_the_job_has_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSQBOX_TOKEN", "secret")

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("env", env={"EXTRA": "é"}, cwd=b"/")
            lines = dict(line.split("=", 1) for line in (await rig.text(job)).decode().splitlines())
            lines.pop("_", None)
            assert set(lines) == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "JOB_ID", "EXTRA"}
            assert (lines["JOB_ID"], lines["EXTRA"]) == (job.id, "é")

    in_trio(test)


@pytest.mark.parametrize(
    ("spec", "code", "reason"),
    [
        (JobSpec(b"/no/such/program"), Code.FAILED_PRECONDITION, "COMMAND_NOT_FOUND"),
        (JobSpec(b"no-such-program"), Code.FAILED_PRECONDITION, "COMMAND_NOT_FOUND"),
        (JobSpec(b"/etc/passwd"), Code.FAILED_PRECONDITION, "NOT_EXECUTABLE"),
        (JobSpec(b"/etc"), Code.FAILED_PRECONDITION, "NOT_EXECUTABLE"),
        (JobSpec(b"ls", cwd=b"/no/such/folder"), Code.FAILED_PRECONDITION, "BAD_WORKING_DIR"),
        (JobSpec(b"ls", cwd=b"/etc/passwd"), Code.FAILED_PRECONDITION, "BAD_WORKING_DIR"),
    ],
)
def test_what_cannot_start_is_refused_and_keeps_its_row(tmp_path: Path, spec: JobSpec, code: Code, reason: str) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            with pytest.raises(JobError) as caught:
                await rig.runner.run(spec, ALICE)
            assert (caught.value.code, caught.value.reason) == (code, reason)
            assert caught.value.job_id is not None
            status = await rig.runner.status(caught.value.job_id, ALICE)
            assert status.state is State.FAILED_TO_START
            assert status.errno
            async with rig.runner.output(status.id, ALICE) as events:
                assert [event async for event in events] == [End(status)]
            await until(lambda: not list(rig.jobs.iterdir()))
            assert with_job_id(status.id) == []

    in_trio(test)


def test_an_unknown_user_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    caller = Caller("default/alice", "ca-1", principals=("no-such-user",))

    async def test() -> None:
        async with running(tmp_path) as rig:
            async with refused(Code.FAILED_PRECONDITION):
                await rig.run("true", caller=caller)
            async with refused(Code.PERMISSION_DENIED):
                await rig.run("true", caller=caller, run_as="root")
            assert (await rig.runner.list(ALICE)).jobs == ()
            assert ("default/alice", "job.run", "ok") not in rig.audited()

    in_trio(test)


def test_large_arguments_arrive(tmp_path: Path) -> None:
    words = [os.urandom(50_000).replace(b"\0", b"x") for _ in range(30)]

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("printf", "%s", *words)
            assert await rig.text(job) == b"".join(words)

    in_trio(test)


def test_a_caller_that_gives_up_leaves_the_job_running(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            with trio.CancelScope() as scope:
                scope.cancel()
                await rig.run("sleep", "60", idempotency_key="k")
            with trio.move_on_after(0.003):
                await rig.run("sleep", "60", idempotency_key="k")
            job = await rig.run("sleep", "60", idempotency_key="k")
            assert job.state is State.RUNNING
            assert len((await rig.runner.list(ALICE)).jobs) == 1

    in_trio(test)


def test_the_same_key_and_request_is_the_same_job(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            found, states = [], set()

            async def run() -> None:
                job = await rig.run("sleep", "60", idempotency_key="k")
                found.append(job.id)
                states.add(job.state)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(run)
            assert len(set(found)) == 1
            assert states == {State.RUNNING}
            assert rig.runner.statistics().running == 1
            assert rig.runner._keys == {}
            async with refused(Code.ALREADY_EXISTS, "KEY_REUSED"):
                await rig.run("sleep", "61", idempotency_key="k")
            other = await rig.run("sleep", "60", idempotency_key="k", caller=BOB)
            assert other.id not in found

    in_trio(test)


def test_the_same_key_of_a_job_that_could_not_start_is_refused_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            ids = set()
            for _ in range(2):
                with pytest.raises(JobError) as caught:
                    await rig.run("/no/such", idempotency_key="k")
                assert caught.value.reason == "COMMAND_NOT_FOUND"
                ids.add(caught.value.job_id)
            assert len(ids) == 1

    in_trio(test)


# bounds


def test_beyond_the_bounds_nothing_is_started_and_nothing_is_left(tmp_path: Path) -> None:
    """Ten thousand at once: as many run as may, the others are told when to come again."""

    async def test() -> None:
        async with running(tmp_path, JobBounds(running=12, running_per_owner=10)) as rig:
            ran: list[str] = []
            errors: list[JobError] = []

            async def run() -> None:
                try:
                    ran.append((await rig.run("sleep", "60")).id)
                except JobError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                for _ in range(10_000):
                    nursery.start_soon(run)
            assert (len(ran), len(errors)) == (10, 9_990)
            assert {(error.code, error.reason) for error in errors} == {(Code.RESOURCE_EXHAUSTED, "TOO_MANY_JOBS")}
            assert all(error.retry_after_s for error in errors)
            assert {path.name for path in rig.jobs.iterdir()} == set(ran)
            assert len((await rig.runner.list(ALICE, limit=1000)).jobs) == 10
            assert rig.runner.statistics().refused == {"TOO_MANY_JOBS": 9_990}
            for _ in range(2):  # one owner leaves room for the others, up to what all may
                await rig.run("sleep", "60", caller=BOB)
            async with refused(Code.RESOURCE_EXHAUSTED, "TOO_MANY_JOBS"):
                await rig.run("sleep", "60", caller=BOB)
            await rig.runner.stop(ran[0], ALICE, grace_s=0)
            await rig.runner.wait(ran[0], ALICE)
            await until(lambda: rig.runner.statistics().running == 11)
            await rig.run("sleep", "60", caller=BOB)

    in_trio(test)


def test_arguments_of_all_jobs_together_are_bounded_and_lists_are_short(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(args_bytes=1_500_000)) as rig:
            words = ["x" * 100_000] * 8
            job = await rig.run("sh", "-c", "sleep 60", "short", *words)
            async with refused(Code.RESOURCE_EXHAUSTED, "TOO_MANY_ARGUMENTS"):
                await rig.run("sh", "-c", "sleep 60", "short", *words)
            for state in (State.RUNNING, State.SIGNALED):
                (listed,) = (await rig.runner.list(ALICE)).jobs
                assert (listed.state, listed.args) == (state, (b"-c", b"sleep 60", b"short"))
                assert len((await rig.runner.status(job.id, ALICE)).args) == 11
                await rig.runner.stop(job.id, ALICE, grace_s=0)
                await rig.ended(job)

    in_trio(test)


def test_a_full_quota_starts_no_job_until_one_is_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(disk_bytes=1_000_000)) as rig:
            job = await rig.run("head", "-c", "1200000", "/dev/zero")
            await rig.ended(job)
            async with refused(Code.RESOURCE_EXHAUSTED, "DISK_QUOTA"):
                await rig.run("true")
            await rig.runner.delete(job.id, ALICE)
            assert (await rig.ended(await rig.run("true"))).exit_code == 0

    in_trio(test)


def test_a_nearly_full_disk_starts_no_job(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(free_bytes=2**60)) as rig, refused(Code.RESOURCE_EXHAUSTED, "DISK_FULL"):
            await rig.run("true")

    in_trio(test)


def test_a_database_that_is_full_starts_no_job_and_forgets_no_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")
            full(rig)
            async with refused(Code.RESOURCE_EXHAUSTED, "DISK_FULL"):
                await rig.run("true", *["x" * 100_000] * 10)
            assert {path.name for path in rig.jobs.iterdir()} == {job.id}
            assert rig.runner.statistics().running == 1
            assert job.pid is not None
            os.kill(job.pid, signal.SIGKILL)
            await trio.sleep(0.1)
            full(rig, pages=1_000_000)
            assert (await rig.ended(job)).signal == 9

    in_trio(test)


def full(rig: Rig, pages: int = 1) -> None:
    """As a disk without room would be; SQLite never goes below what it has."""
    db = rig.store._write_db
    assert db is not None
    db.execute(f"PRAGMA max_page_count={pages}")


def test_without_descriptors_jobs_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            await rig.ended(await rig.run("true"))
            await until(lambda: rig.runner.statistics().running == 0)
            for spare in range(4):
                with few_descriptors(spare), pytest.raises(JobError) as caught:
                    await several(rig, 5)
                assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "NO_RESOURCES")
                assert caught.value.retry_after_s
                assert caught.value.job_id is not None
                await until(partial(is_gone, rig.jobs / caught.value.job_id))
            assert (await rig.ended(await rig.run("true"))).exit_code == 0

    in_trio(test)


async def several(rig: Rig, count: int) -> None:
    for _ in range(count):
        await rig.run("sleep", "60")


def is_gone(path: Path) -> bool:
    return not path.exists()


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """So many are left to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    while fillers[-1] < highest:
        fillers.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


# who sees what


def test_others_jobs_are_not_there(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60", open_stdin=True)
            runner = rig.runner
            for stranger in (BOB, OTHER_ALICE):
                messages = set()
                for call in (
                    lambda who: runner.status(job.id, who),
                    lambda who: runner.status(job.id[:8], who),
                    lambda who: runner.status(str(job.pid), who),
                    lambda who: runner.stop(job.id, who),
                    lambda who: runner.signal(job.id, who, 10),
                    lambda who: runner.suspend(job.id, who),
                    lambda who: runner.resume(job.id, who),
                    lambda who: runner.wait(job.id, who),
                    lambda who: runner.send_input(job.id, who, b"x"),
                    lambda who: runner.delete(job.id, who),
                ):
                    with pytest.raises(JobError) as caught:
                        await call(stranger)
                    assert caught.value.code is Code.NOT_FOUND
                    messages.add(
                        caught.value.message.replace(job.id[:8] + "'", job.id + "'").replace(str(job.pid), job.id)
                    )
                async with refused(Code.NOT_FOUND), runner.output(job.id, stranger):
                    pass
                with pytest.raises(JobError) as caught:
                    await runner.status("k" * 26, stranger)
                assert messages == {caught.value.message.replace("k" * 26, job.id)}
                assert (await runner.list(stranger)).jobs == ()
            assert (await runner.status(job.id, ALICE)).state is State.RUNNING

    in_trio(test)


def test_roles_see_and_touch_what_they_may(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")
            assert (await rig.runner.status(job.id, VIEWER)).id == job.id
            assert [each.id for each in (await rig.runner.list(VIEWER)).jobs] == [job.id]
            async with refused(Code.PERMISSION_DENIED):
                await rig.runner.stop(job.id, VIEWER)
            async with refused(Code.PERMISSION_DENIED):
                await rig.run("true", caller=VIEWER)
            async with refused(Code.PERMISSION_DENIED):
                await rig.runner.delete(job.id, OPERATOR)
            assert await rig.events(job, VIEWER, follow=False) == []
            await rig.runner.stop(job.id, OPERATOR)
            assert (await rig.ended(job)).stopped_by == "default/olga"
            await until(lambda: ("default/vera", "job.run", "NOT_ALLOWED") in rig.audited())
            await rig.events(job, VIEWER, follow=False)
            assert rig.audited(job.id).count(("default/vera", "job.output", "ok")) == 1  # though they look twice

    in_trio(test)


def test_a_job_is_found_by_the_beginning_of_its_id_and_by_its_pid(tmp_path: Path) -> None:
    async def test() -> None:
        ids = iter(["kaaaaaaaaaaaaaaaaaaaaaaa1b", "kaaaaaaaaaaaaaaaaaaaaaaa1c", "kaaab" + "2" * 21])
        async with running(tmp_path, new_id=lambda: next(ids)) as rig:
            one, two = await rig.run("sleep", "60"), await rig.run("sleep", "60", caller=BOB)
            assert (await rig.runner.status("kaaa", ALICE)).id == one.id  # Bob's does not make it ambiguous
            assert (await rig.runner.status(str(one.pid), ALICE)).id == one.id
            three = await rig.run("sleep", "60")
            async with refused(Code.INVALID_ARGUMENT):
                await rig.runner.status("kaaa", ALICE)
            assert (await rig.runner.status("kaaab", ALICE)).id == three.id
            async with refused(Code.INVALID_ARGUMENT):
                await rig.runner.status("kaaaaaaa", VIEWER)
            assert (await rig.runner.status(two.id, VIEWER)).id == two.id
            await rig.runner.stop(one.id, ALICE, grace_s=0)
            await rig.ended(one)
            async with refused(Code.NOT_FOUND):  # another process may have that number now
                await rig.runner.status(str(one.pid), ALICE)
            async with refused(Code.INVALID_ARGUMENT):
                await rig.runner.status("../x", ALICE)

    in_trio(test)


def test_the_control_group_of_spared_processes_goes_with_them(tmp_path: Path) -> None:
    """When the next job ends or the next box looks; the box itself was not there when they ended."""

    def groups(job: Status) -> list[Path]:
        with closing(sqlite3.connect(tmp_path / "test.db")) as db:
            (found,) = db.execute("SELECT cgroups FROM jobs WHERE id = ?", (job.id,)).fetchone()
        return [Path(group) for group in json.loads(found)]

    def has_members(group: Path) -> bool:
        try:
            return bool((group / "cgroup.procs").read_text())
        except FileNotFoundError:  # the box was quicker
            return False

    async def kill_rest(job: Status) -> None:
        for pid in with_job_id(job.id):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not any(map(has_members, groups(job))))

    async def test() -> None:
        jobs = []
        async with running(tmp_path) as rig:
            for _ in range(2):
                jobs.append(await rig.shell("sleep 60 >/dev/null 2>&1 & echo x", keep_leftovers=True))
                await rig.ended(jobs[-1])
            if not groups(jobs[0]):
                pytest.skip("no control groups here")
            assert all(group.exists() for job in jobs for group in groups(job))
            await kill_rest(jobs[0])
            while any(group.exists() for group in groups(jobs[0])):
                await rig.ended(await rig.run("true"))
            assert len(with_job_id(jobs[1].id)) == 1
        await kill_rest(jobs[1])
        async with running(tmp_path):
            await until(lambda: not any(group.exists() for group in groups(jobs[1])))

    in_trio(test)


def test_lists_are_filtered_and_come_in_pages(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            jobs = [await rig.run("true", labels={"n": str(n % 2), "a.b/c": "x"}) for n in range(7)]
            for job in jobs:
                await rig.ended(job)
            kept = await rig.run("sleep", "60")
            seen, before = [], None
            while True:
                page = await rig.runner.list(ALICE, limit=3, before=before)
                seen += [job.id for job in page.jobs]
                if (before := page.next_page) is None:
                    break
            assert seen == [kept.id, *(job.id for job in reversed(jobs))]
            odd = await rig.runner.list(ALICE, labels={"n": "1", "a.b/c": "x"})
            assert [job.id for job in odd.jobs] == [jobs[n].id for n in (5, 3, 1)]
            assert [job.id for job in (await rig.runner.list(ALICE, states=(State.RUNNING,))).jobs] == [kept.id]
            assert (await rig.runner.list(ALICE, owner="default/bob")).jobs == ()
            for bad in ("nonsense", "x_y", f"nan_{kept.id}", f"inf_{kept.id}", f"-1_{kept.id}"):
                async with refused(Code.INVALID_ARGUMENT):
                    await rig.runner.list(ALICE, before=bad)
            async with refused(Code.INVALID_ARGUMENT):
                await rig.runner.list(ALICE, limit=0)

    in_trio(test)


# stopping


def test_a_tree_that_hides_and_ignores_is_gone_after_stop(tmp_path: Path) -> None:
    script = """
        trap '' TERM
        setsid sh -c 'trap "" TERM; (sleep 61 & sleep 62) & sleep 63' &
        (setsid sleep 64 &)
        echo up; wait; sleep 65
    """

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell(script)
            async with rig.runner.output(job.id, ALICE) as events:
                assert isinstance(await anext(events), Chunk)
            await until(lambda: len(with_job_id(job.id)) >= 6)
            status, already = await rig.runner.stop(job.id, ALICE, grace_s=0.2)
            assert (status.state, already) == (State.STOPPING, False)
            ended = await rig.ended(job)
            assert (ended.state, ended.signal, ended.reason) == (State.SIGNALED, 9, Reason.STOPPED)
            assert with_job_id(job.id) == []

    in_trio(test)


def test_stopping_twice_and_stopping_what_has_ended(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("trap '' TERM; echo up; sleep 60; sleep 60")
            async with rig.runner.output(job.id, ALICE) as events:
                await anext(events)
            assert (await rig.runner.stop(job.id, ALICE, grace_s=0.5))[1] is False
            assert (await rig.runner.stop(job.id, OPERATOR, grace_s=60))[1] is False
            await rig.ended(job)
            assert (await rig.runner.stop(job.id, ALICE))[1] is True
            async with refused(Code.FAILED_PRECONDITION, "NOT_RUNNING"):
                await rig.runner.stop(job.id, ALICE, strict=True)
            actions = [action for _, action, _ in rig.audited(job.id)]
            assert actions.count("job.stop") == 2

    in_trio(test)


def test_stopping_while_it_ends_is_always_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:

            async def race(n: int) -> None:
                job = await rig.run("sleep", f"0.0{n % 10}")
                await trio.sleep(0.002 * (n % 13))
                await rig.runner.stop(job.id, ALICE)
                assert (await rig.ended(job)).state in (State.EXITED, State.SIGNALED)

            async with trio.open_nursery() as nursery:
                for n in range(40):
                    nursery.start_soon(race, n)

    in_trio(test)


def test_suspend_resume_and_stop_while_suspended(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("while :; do echo x; sleep 0.01; done")
            status = await rig.runner.suspend(job.id, ALICE)
            assert status.state is State.SUSPENDED
            assert (await rig.runner.suspend(job.id, ALICE)).state is State.SUSPENDED
            before = len(await rig.text(job, follow=False))
            await trio.sleep(0.1)
            assert len(await rig.text(job, follow=False)) <= before + 2
            assert (await rig.runner.resume(job.id, ALICE)).state is State.RUNNING
            await rig.runner.suspend(job.id, ALICE)
            await rig.runner.stop(job.id, ALICE)
            assert (await rig.ended(job)).reason is Reason.STOPPED
            for call in (rig.runner.suspend, rig.runner.resume):
                async with refused(Code.FAILED_PRECONDITION, "NOT_RUNNING"):
                    await call(job.id, ALICE)

    in_trio(test)


def test_signals_reach_the_leader(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("trap 'echo got; exit 5' USR1; echo up; while :; do sleep 0.02; done")
            async with rig.runner.output(job.id, ALICE) as events:
                await anext(events)
                await rig.runner.signal(job.id, ALICE, signal.SIGUSR1)
                rest = [event async for event in events]
            assert data_of(rest) == b"got\n"
            assert (await rig.ended(job)).exit_code == 5
            for bad in (0, 65, -1):
                async with refused(Code.INVALID_ARGUMENT):
                    await rig.runner.signal(job.id, ALICE, bad)

    in_trio(test)


def test_a_timeout_is_told_apart(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            status = await rig.ended(await rig.run("sleep", "60", timeout_s=0.1))
            assert (status.reason, status.signal) == (Reason.TIMEOUT, 15)

    in_trio(test)


def test_waiting_has_an_end_of_its_own(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")
            assert (await rig.runner.wait(job.id, ALICE, 0.02)).state is State.RUNNING
            assert (await rig.runner.wait(job.id, ALICE, 0)).state is State.RUNNING

    in_trio(test)


def test_deleting_takes_row_and_files(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("echo", "x")
            running_job = await rig.run("sleep", "60")
            async with refused(Code.FAILED_PRECONDITION, "STILL_RUNNING"):
                await rig.runner.delete(running_job.id, ALICE)
            await rig.ended(job)
            await until(lambda: rig.runner.statistics().running == 1)
            async with rig.runner.output(job.id, ALICE) as events:  # who reads already reads to the end
                await rig.runner.delete(job.id, ALICE)
                assert data_of([event async for event in events]) == b"x\n"
            async with refused(Code.NOT_FOUND, "JOB_NOT_FOUND"):
                await rig.runner.status(job.id, ALICE)
            assert not (rig.jobs / job.id).exists()

    in_trio(test)


# stdin


def test_input_of_any_size_arrives_and_ends(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sha256sum", open_stdin=True)
            await rig.runner.send_input(job.id, ALICE, data, eof=True)
            assert (await rig.text(job)).decode().split()[0] == sha256(data)
            assert [action for _, action, _ in rig.audited(job.id)].count("job.input") == 1

    in_trio(test)


def test_input_waits_for_a_job_that_does_not_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60", open_stdin=True)
            with trio.move_on_after(0.3) as scope:
                await rig.runner.send_input(job.id, ALICE, bytes(1_000_000))
            assert scope.cancelled_caught
            assert (await rig.runner.status(job.id, ALICE)).state is State.RUNNING
            await rig.runner.stop(job.id, ALICE, grace_s=0)
            await rig.ended(job)

    in_trio(test)


def test_input_is_refused_where_nobody_reads_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")
            async with refused(Code.FAILED_PRECONDITION, "STDIN_NOT_OPEN"):
                await rig.runner.send_input(job.id, ALICE, b"x")
            closed = await rig.run("sleep", "60", open_stdin=True)
            await rig.runner.send_input(closed.id, ALICE, b"x", eof=True)
            async with refused(Code.FAILED_PRECONDITION, "STDIN_CLOSED"):
                await rig.runner.send_input(closed.id, ALICE, b"y")
            ended = await rig.run("true", open_stdin=True)
            await rig.ended(ended)
            async with refused(Code.FAILED_PRECONDITION):
                await rig.runner.send_input(ended.id, ALICE, b"x")

    in_trio(test)


def test_a_job_that_ends_lets_go_of_who_writes_to_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "0.2", open_stdin=True)
            async with refused(Code.FAILED_PRECONDITION):
                await rig.runner.send_input(job.id, ALICE, bytes(5_000_000))

    in_trio(test)


# output


def test_a_follower_sees_each_line_as_it_is_written_and_a_late_one_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("read a; echo 1; read a; echo 2; read a; echo 3; exit 7", open_stdin=True)
            async with rig.runner.output(job.id, ALICE) as events:
                for n in (b"1\n", b"2\n"):
                    await rig.runner.send_input(job.id, ALICE, b"\n")
                    event = await anext(events)
                    assert isinstance(event, Chunk)
                    assert event.data == n
                async with rig.runner.output(job.id, ALICE) as late:
                    await rig.runner.send_input(job.id, ALICE, b"\n")
                    both = [[event async for event in each] for each in (events, late)]
            assert [data_of(each) for each in both] == [b"3\n", b"1\n2\n3\n"]
            for each in both:
                assert isinstance(each[-1], End)
                assert each[-1].status.exit_code == 7

    in_trio(test)


def test_many_followers_of_random_bytes_all_get_the_same_and_memory_stays_flat(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("sleep 0.1; head -c 8000000 /dev/urandom")
            digests: list[str] = []

            async def follow(n: int) -> None:
                await trio.sleep(n * 0.005)
                digest, place = hashlib.sha256(), 0
                async with rig.runner.output(job.id, ALICE) as events:
                    async for event in events:
                        if isinstance(event, Chunk):
                            assert event.offset == place
                            digest.update(event.data)
                            place += len(event.data)
                assert isinstance(event, End)
                digests.append(digest.hexdigest())

            before = resident_bytes()
            async with trio.open_nursery() as nursery:
                for n in range(30):
                    nursery.start_soon(follow, n)
            assert resident_bytes() - before < 32_000_000
            assert digests == [sha256((rig.jobs / job.id / "output").read_bytes())] * 30

    in_trio(test)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_follower_that_stands_still_holds_up_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("head", "-c", "20000000", "/dev/zero")
            async with rig.runner.output(job.id, ALICE) as still:
                first = await anext(still)
                events = await rig.events(job)
                assert_whole(events, 0, 20_000_000)
                rest = [event async for event in still]
            assert_whole([first, *rest], 0, 20_000_000)

    in_trio(test)


def test_short_jobs_never_lose_a_byte_nor_their_code(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:

            async def one() -> None:
                events = await rig.events(await rig.shell("printf x; exit 3"))
                assert data_of(events) == b"x"
                assert isinstance(events[-1], End)
                assert (events[-1].status.exit_code, events[-1].status.state) == (3, State.EXITED)

            async def several() -> None:
                for _ in range(10):
                    await one()

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(several)

    in_trio(test)


def test_offsets_tails_and_streams(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("printf 0123; sleep 0.02; printf abc >&2; sleep 0.02; printf 456")
            await rig.ended(job)
            assert await rig.text(job) == b"0123abc456"
            assert await rig.text(job, offset=6) == b"c456"
            assert await rig.text(job, offset=10) == b""
            assert await rig.text(job, tail_bytes=4) == b"c456"
            assert await rig.text(job, tail_bytes=0) == b""
            assert await rig.text(job, tail_bytes=999) == b"0123abc456"
            assert await rig.text(job, streams=frozenset((Stream.STDERR,))) == b"abc"
            assert await rig.text(job, streams=frozenset((Stream.STDOUT,)), offset=5) == b"456"
            async with refused(Code.OUT_OF_RANGE, "BEYOND_END"):
                await rig.events(job, offset=11)
            async with refused(Code.INVALID_ARGUMENT):
                await rig.events(job, offset=1, tail_bytes=1)
            async with refused(Code.FAILED_PRECONDITION, "NO_SUCH_STREAM"):
                await rig.events(job, streams=frozenset((Stream.MIXED,)))

    in_trio(test)


def test_merged_output_is_in_exact_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done", output_mode=OutputMode.MERGED)
            events = await rig.events(job)
            assert data_of(events) == b"".join(b"o%d\ne%d\n" % (n, n) for n in range(1, 6))
            assert {event.stream for event in events if isinstance(event, Chunk)} == {Stream.MIXED}

    in_trio(test)


def test_an_offset_beyond_a_log_that_grows_waits_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("sleep 0.1; printf 0123456789")
            assert await rig.text(job, offset=7) == b"789"
            short = await rig.shell("sleep 0.1; printf 0123456789")
            async with refused(Code.OUT_OF_RANGE):
                await rig.events(short, offset=11)

    in_trio(test)


def test_without_following_only_what_is_there_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("echo here; while :; do head -c 100000 /dev/zero; done")
            async with rig.runner.output(job.id, ALICE) as events:
                await anext(events)
            events_now = await rig.events(job, follow=False)  # a flood does not keep it for ever
            assert data_of(events_now)[:5] == b"here\n"
            assert not any(isinstance(event, End) for event in events_now)
            await rig.runner.stop(job.id, ALICE, grace_s=0)
            await rig.ended(job)
            assert isinstance((await rig.events(job, follow=False))[-1], End)

    in_trio(test)


@pytest.mark.parametrize("overflow", list(Overflow))
def test_beyond_the_cap_what_is_missing_is_told(tmp_path: Path, overflow: Overflow) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("seq", "200000", max_output_bytes=100_000, overflow=overflow)
            events = await rig.events(job)
            status = await rig.ended(job)
            assert status.output_truncated
            whole = b"".join(b"%d\n" % n for n in range(1, 200_001))
            for event in events:
                if isinstance(event, Chunk):
                    assert event.data == whole[event.offset : event.offset + len(event.data)]
            assert status.reason is (Reason.OUTPUT_LIMIT if overflow is Overflow.KILL else Reason.EXIT)
            assert len(data_of(events)) <= 300_000
            place = 0
            for event in events[:-1]:
                first = event.offset if isinstance(event, Chunk) else event.start  # type: ignore[union-attr]
                assert first == place
                place = first + len(event.data) if isinstance(event, Chunk) else event.end  # type: ignore[union-attr]
            if overflow is not Overflow.KILL:
                assert place == len(whole)

    in_trio(test)


def test_damaged_logs_are_data_loss(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            jobs = [await rig.run("seq", "10000") for _ in range(3)]
            for job in jobs:
                await rig.ended(job)
            os.truncate(rig.jobs / jobs[0].id / "output", 100)
            (rig.jobs / jobs[1].id / "index").unlink()
            os.truncate(rig.jobs / jobs[2].id / "index", 3)
            for job in jobs:
                async with refused(Code.DATA_LOSS, "LOG_DAMAGED"):
                    await rig.events(job)

    in_trio(test)


def test_too_many_followers_are_told_to_come_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(followers=3, followers_per_owner=2)) as rig:
            job = await rig.run("sleep", "60")
            async with rig.runner.output(job.id, ALICE), rig.runner.output(job.id, ALICE):
                async with refused(Code.RESOURCE_EXHAUSTED, "TOO_MANY_FOLLOWERS"):
                    await rig.events(job)
                async with rig.runner.output(job.id, VIEWER), refused(Code.RESOURCE_EXHAUSTED, "TOO_MANY_FOLLOWERS"):
                    await rig.events(job, OPERATOR)
            assert rig.runner.statistics().followers == 0

    in_trio(test)


def test_silent_followers_cost_nothing(tmp_path: Path) -> None:
    """A thousand of them wake up for nothing and hold two descriptors between them."""

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sleep", "60")

            async def follow() -> None:
                async with rig.runner.output(job.id, ALICE) as events:
                    async for _ in events:
                        pass

            before = len(open_files())  # of other tests in this process too
            async with trio.open_nursery() as nursery:
                for _ in range(1000):
                    nursery.start_soon(follow)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert len(open_files()) <= before + 10
                wakeups = Wakeups()
                trio.lowlevel.add_instrument(wakeups)
                await trio.sleep(0.5)
                trio.lowlevel.remove_instrument(wakeups)
                assert wakeups.tasks <= 3
                nursery.cancel_scope.cancel()

    in_trio(test)


class Wakeups(trio.abc.Instrument):
    def __init__(self) -> None:
        self.tasks = 0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.tasks += 1


def test_followers_that_leave_in_the_middle_leave_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("sh", "-c", "while :; do echo x; sleep 0.001; done")

            async def follow(n: int) -> None:
                with trio.move_on_after(0.01 * (n % 10)):
                    await rig.events(job)

            before = len(open_files())
            async with trio.open_nursery() as nursery:
                for n in range(100):
                    nursery.start_soon(follow, n)
            assert len(open_files()) <= before
            assert rig.runner.statistics().followers == 0

    in_trio(test)


# limits


def test_limits_are_enforced_or_refused_and_never_ignored(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.shell("ulimit -n; ulimit -f", limits=Limits(open_files=33, file_bytes=1024 * 512))
            assert (await rig.text(job)).split()[0] == b"33"
            assert any(each.startswith("open_files:") for each in (await rig.ended(job)).enforced)

    in_trio(test)


# closing


def test_a_runner_that_closes_ends_its_followers_and_takes_no_job(tmp_path: Path) -> None:
    async def test() -> None:
        errors: list[JobError] = []

        async def follow(rig: Rig, job: str) -> None:
            try:
                async with rig.runner.output(job, ALICE) as events:
                    async for _ in events:
                        pass
            except JobError as error:
                errors.append(error)

        async def wait(rig: Rig, job: str) -> None:
            try:
                await rig.runner.wait(job, ALICE)
            except JobError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery, running(tmp_path, stop_jobs=False) as rig:
            job = await rig.run("sleep", "60")
            nursery.start_soon(follow, rig, job.id)
            nursery.start_soon(wait, rig, job.id)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert [error.code for error in errors] == [Code.UNAVAILABLE] * 2
        assert all(error.retry_after_s for error in errors)
        async with refused(Code.UNAVAILABLE):
            await rig.runner.run(JobSpec(b"true"), ALICE)
        assert job.pid is not None
        assert alive(job.pid)
        async with running(tmp_path):
            pass
        assert not alive(job.pid)

    in_trio(test)


def test_a_runner_that_stops_its_jobs_says_so_in_their_rows(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as rig:
            quick = await rig.run("sleep", "60")
            stubborn = await rig.shell("trap '' TERM; echo up; while :; do sleep 0.1; done")
            async with rig.runner.output(stubborn.id, ALICE) as events:
                await anext(events)
        async with running(tmp_path) as rig:
            for job, number in ((quick, 15), (stubborn, 9)):
                status = await rig.runner.status(job.id, ALICE)
                assert (status.state, status.signal, status.reason) == (State.SIGNALED, number, Reason.SHUTDOWN)
                assert with_job_id(job.id) == []

    in_trio(test)


# retention


def test_ended_jobs_go_by_number_and_only_their_owner_is_told_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(kept_jobs=2)) as rig:
            jobs = []
            for _ in range(5):
                jobs.append(await rig.run("echo", "x"))
                await rig.ended(jobs[-1])
            await until(lambda: len(list(rig.jobs.iterdir())) == 2)
            await until(lambda: rig.runner.statistics().removed == 3)
            assert [job.id for job in (await rig.runner.list(ALICE)).jobs] == [jobs[4].id, jobs[3].id]
            async with refused(Code.NOT_FOUND, "EXPIRED"):
                await rig.runner.status(jobs[0].id, ALICE)
            async with refused(Code.NOT_FOUND, "EXPIRED"):
                await rig.events(jobs[0])
            async with refused(Code.NOT_FOUND, "JOB_NOT_FOUND"):
                await rig.runner.status(jobs[0].id, BOB)
            async with refused(Code.NOT_FOUND, "JOB_NOT_FOUND"):
                await rig.runner.status(jobs[0].id, OTHER_ALICE)

    in_trio(test)


def test_a_retention_that_fails_once_does_not_end_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("osqbox.jobs.upkeep.AGAIN_S", 0.05)
    expire, failures = service.expire, iter([sqlite3.OperationalError("disk I/O error")])

    def fail_first(tx: Tx, bounds: JobBounds) -> list[Record]:
        for failure in failures:
            raise failure
        return expire(tx, bounds)

    monkeypatch.setattr("osqbox.jobs.service.expire", fail_first)

    async def test() -> None:
        async with running(tmp_path, JobBounds(kept_jobs=0)) as rig:
            await rig.ended(await rig.run("true"))
            await until(lambda: rig.runner.statistics().removed == 1)
            assert "tried again" in caplog.text

    in_trio(test)


def test_ended_jobs_go_by_age(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(kept_age_s=0.3)) as rig:
            job, stays = await rig.run("true"), await rig.run("sleep", "60")
            await rig.ended(job)
            await until(lambda: rig.runner.statistics().removed == 1)
            assert {path.name for path in rig.jobs.iterdir()} == {stays.id}

    in_trio(test)


def test_ended_jobs_go_by_the_bytes_they_hold(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, JobBounds(kept_bytes=1_500_000)) as rig:
            jobs = []
            for _ in range(3):
                jobs.append(await rig.run("head", "-c", "1000000", "/dev/zero"))
                await rig.ended(jobs[-1])
            await until(lambda: {path.name for path in rig.jobs.iterdir()} == {jobs[-1].id})

    in_trio(test)
