"""Jobs as rows, in hand-made transactions at a time of the test's choosing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlite_utils import Database

from osqbox import audit, feed
from osqbox.jobs import protocol, service
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import (
    Caller,
    Containment,
    JobBounds,
    JobSpec,
    OutputMode,
    Reason,
    State,
    Usage,
)
from osqbox.jobs.service import Record
from osqbox.jobs.tables import migrations
from osqbox.store import Tx

from .runner_rig import ALICE, BOB, OTHER_ALICE, VIEWER

START = 1_700_000_000.0
LS = JobSpec(b"ls", (b"-la", b"", b"\xff"), labels={"team": "blue"})


class World:
    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.now = START
        self.events: list[feed.Event] = []
        self._made = 0

    def do(self, work: Callable[..., Any], *args: Any) -> Any:
        tx = Tx(self.db, self.now)
        value = work(tx, *args)
        self.events += tx.events
        return value

    def create(self, caller: Caller = ALICE, **spec: Any) -> Record:
        self._made += 1
        job_id = protocol.new_id(self._made.to_bytes(16, "big"))
        record: Record = self.do(service.create, job_id, replace(LS, **spec), caller, "root")[0]
        return record

    def ended(self, record: Record, disk_bytes: int = 100, state: State = State.EXITED) -> Record:
        status = replace(record.status, state=state, exit_code=0, ended_at=self.now, started_at=self.now, pid=7)
        after = replace(record, status=status, disk_bytes=disk_bytes)
        self.do(service.change, record, after, None)
        return after


@pytest.fixture
def world() -> Iterator[World]:
    db = sqlite3.connect(":memory:", isolation_level=None)
    feed.create_tables(db)
    db.execute("CREATE TABLE store_drops (kind TEXT PRIMARY KEY, count INTEGER NOT NULL, last_at REAL NOT NULL)")
    for step in (audit.migrations, migrations):
        step.apply(Database(db))
    yield World(db)
    db.close()


def test_a_record_comes_back_as_it_was_written(world: World) -> None:
    before = world.create(output_mode=OutputMode.MERGED, open_stdin=True, link_output=True)
    status = replace(
        before.status, state=State.SIGNALED, pid=7, started_at=START, ended_at=START + 1, signal=9, core_dumped=True,
        reason=Reason.OOM, stopped_by="default/olga", output_bytes=10, stdout_bytes=6, stderr_bytes=4,
        output_truncated=True, output_drained=False, usage=Usage(1.5, 0.5, 4096), containment=Containment.CGROUP,
        enforced=("memory:cgroup1", "open_files:rlimit"), leftover_processes=3,
    )  # fmt: skip
    after = replace(before, status=status, cgroups=("/sys/fs/cgroup/x",), disk_bytes=8192, failure={"step": "exec"})
    world.do(service.change, before, after, None)
    assert service.find(world.db, before.status.id, ALICE) == after
    assert service.unfinished(world.db) == []


def test_states_that_were_passed_too_quickly_are_told_all_the_same(world: World) -> None:
    world.ended(world.create())
    assert [event.kind for event in world.events] == ["job_created", "job_started", "job_ended"]
    assert [row["action"] for row in audit.rows(world.db)] == ["job.run", "job.start", "job.end"]


def test_a_job_that_never_ran_is_not_told_to_have_started(world: World) -> None:
    record = world.create()
    world.ended(record, state=State.FAILED_TO_START)
    assert [event.kind for event in world.events] == ["job_created", "job_ended"]


def test_events_belong_to_the_tenant_of_the_owner(world: World) -> None:
    world.create()
    world.create(caller=Caller("spiffe://elsewhere/alice", "ca-9"))
    assert [event.tenant for event in world.events] == ["default", None]


def test_a_key_belongs_to_its_owner(world: World) -> None:
    one = world.create(idempotency_key="k")
    assert world.create(idempotency_key="k").status.id == one.status.id
    assert world.create(caller=BOB, idempotency_key="k").status.id != one.status.id
    assert world.create(caller=OTHER_ALICE, idempotency_key="k").status.id != one.status.id
    with pytest.raises(JobError) as caught:
        world.create(idempotency_key="k", args=(b"other",))
    assert caught.value.code is Code.ALREADY_EXISTS


def test_no_row_is_left_of_a_reused_key(world: World) -> None:
    world.create(idempotency_key="k")
    with pytest.raises(JobError):
        world.create(idempotency_key="k", args=())
    assert len(service.ids(world.db)) == 1


@pytest.mark.parametrize("job", ["k%", "k_aa", "kaaa~", "'; --", "kaaa*"])
def test_a_prefix_is_no_pattern(world: World, job: str) -> None:
    world.create()
    with pytest.raises(JobError):
        service.find(world.db, job, VIEWER)


def test_pages_do_not_depend_on_what_is_made_or_removed_between_them(world: World) -> None:
    jobs = []
    for _ in range(6):
        jobs.append(world.create())
        world.now += 1
    first, before = service.listing(world.db, ALICE, limit=2)
    assert [record.status.id for record in first] == [jobs[5].status.id, jobs[4].status.id]
    world.create()
    world.do(service.delete, jobs[4], ALICE)
    second, before = service.listing(world.db, ALICE, limit=2, before=before)
    assert [record.status.id for record in second] == [jobs[3].status.id, jobs[2].status.id]
    last, before = service.listing(world.db, ALICE, limit=2, before=before)
    assert ([record.status.id for record in last], before) == ([jobs[1].status.id, jobs[0].status.id], None)


def test_jobs_of_the_same_moment_are_all_listed(world: World) -> None:
    made = {world.create().status.id for _ in range(7)}
    seen, before = [], None
    while True:
        records, before = service.listing(world.db, ALICE, limit=3, before=before)
        seen += [record.status.id for record in records]
        if before is None:
            break
    assert (len(seen), set(seen)) == (7, made)


def test_retention_takes_the_oldest_and_remembers_so_many(world: World) -> None:
    records = []
    for _ in range(8):
        records.append(world.ended(world.create()))
        world.now += 1
    running = world.create()
    gone = world.do(service.expire, JobBounds(kept_jobs=3, remembered=2))
    assert [record.status.id for record in gone] == [record.status.id for record in records[:5]]
    assert service.ids(world.db) == {record.status.id for record in (*records[5:], running)}
    reasons = []
    for record in records[:5]:
        with pytest.raises(JobError) as caught:
            service.find(world.db, record.status.id, ALICE)
        reasons.append(caught.value.reason)
    assert reasons == ["JOB_NOT_FOUND"] * 3 + ["EXPIRED"] * 2
    assert world.db.execute("SELECT count FROM store_drops WHERE kind = 'jobs'").fetchone() == (5,)
    assert world.do(service.expire, JobBounds(kept_jobs=3)) == []


def test_retention_by_bytes_counts_what_is_on_disk(world: World) -> None:
    for size in (500, 300, 200):
        world.ended(world.create(), size)
        world.now += 1
    assert [record.disk_bytes for record in world.do(service.expire, JobBounds(kept_bytes=500))] == [500]
    assert service.kept(world.db) == (2, 500, START + 1)


def test_what_a_job_is_run_with_is_looked_up_by_key(world: World) -> None:
    """These run inline on the loop: an index answers each of them."""
    plans = [
        ("SELECT * FROM jobs WHERE id >= ? AND id < ? AND owner = ? AND authority = ? LIMIT 2", ("k", "l", "a", "b")),
        ("SELECT * FROM jobs WHERE owner = ? AND authority = ? AND idempotency_key = ?", ("a", "b", "c")),
        ("SELECT * FROM jobs WHERE ended_at IS NULL ORDER BY seq", ()),
        ("SELECT 1 FROM jobs_removed WHERE id = ?", ("k",)),
    ]
    for sql, values in plans:
        plan = " ".join(row[3] for row in world.db.execute(f"EXPLAIN QUERY PLAN {sql}", values))
        assert "SCAN jobs" not in plan.replace("SCAN jobs USING INDEX jobs_unfinished", ""), plan
