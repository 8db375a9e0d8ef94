"""A real runner with real keepers in a directory of the test's own; nothing is left running after the block."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import audit, feed
from osqbox.clock import SystemClock
from osqbox.feed import Feed
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import Caller, Chunk, End, JobBounds, JobSpec, OutputEvent, OutputRequest, Status, Truncated
from osqbox.jobs.runner import JobRunner, open_runner
from osqbox.jobs.tables import migrations
from osqbox.store import Store

ALICE = Caller("default/alice", "ca-1", serial=0xA11CE, address="192.0.2.1")
BOB = Caller("default/bob", "ca-1")
OTHER_ALICE = Caller("default/alice", "ca-2")
"""The same name, but another CA says so."""
VIEWER = Caller("default/vera", "ca-1", frozenset(("viewer",)))
OPERATOR = Caller("default/olga", "ca-1", frozenset(("operator",)))
LIMIT_S = 25
LEFT_S = 3.0


@dataclass
class Rig:
    runner: JobRunner
    store: Store
    jobs: Path

    async def run(self, *words: str | bytes, caller: Caller = ALICE, **spec: Any) -> Status:
        command, *args = map(os.fsencode, words)
        return await self.runner.run(JobSpec(command, tuple(args), **spec), caller)

    async def shell(self, script: str, *, caller: Caller = ALICE, **spec: Any) -> Status:
        return await self.run("sh", "-c", script, caller=caller, **spec)

    async def ended(self, job: Status, caller: Caller = ALICE) -> Status:
        status = await self.runner.wait(job.id, caller, LIMIT_S)
        assert status.has_ended
        return status

    async def events(self, job: Status, caller: Caller = ALICE, **request: Any) -> list[OutputEvent]:
        async with self.runner.output(job.id, caller, OutputRequest(**request)) as events:
            return [event async for event in events]

    async def text(self, job: Status, **request: Any) -> bytes:
        return data_of(await self.events(job, **request))

    def audited(self, subject: str | None = None) -> list[tuple[str, str, str]]:
        rows = self.store.peek(lambda db: audit.rows(db, subject=subject))
        return [(row["actor"], row["action"], row["result"]) for row in rows]

    def told(self) -> list[tuple[str, str]]:
        events = self.store.peek(lambda db: feed.events_after(db, 0))
        return [(event.kind, event.data["job"]) for event in events]


@asynccontextmanager
async def running(
    directory: Path, bounds: JobBounds | None = None, *, stop_jobs: bool = True, **more: Any
) -> AsyncIterator[Rig]:
    clock = SystemClock()
    with trio.fail_after(LIMIT_S):
        store = Store.open(directory / "test.db", (audit.migrations, migrations), clock, Feed())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                async with open_runner(store, directory / "jobs", clock, bounds, stop_jobs=stop_jobs, **more) as runner:
                    yield Rig(runner, store, directory / "jobs")
            finally:
                await store.aclose()


def data_of(events: list[OutputEvent]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Chunk))


def assert_whole(events: list[OutputEvent], start: int, end: int) -> None:
    """Contiguous, and `End` once and last."""
    place = start
    for event in events[:-1]:
        assert isinstance(event, Chunk | Truncated)
        assert (event.offset if isinstance(event, Chunk) else event.start) == place
        place = event.offset + len(event.data) if isinstance(event, Chunk) else event.end
    assert place == end
    assert isinstance(events[-1], End)
    assert events[-1].status.has_ended


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@asynccontextmanager
async def refused(code: Code, reason: str | None = None) -> AsyncIterator[None]:
    with pytest.raises(JobError) as caught:
        yield
    assert (caught.value.code, caught.value.reason if reason else None) == (code, reason), caught.value


async def until(is_so: Callable[[], bool]) -> None:
    """What another process does."""
    while not is_so():
        await trio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def with_job_id(job_id: str) -> list[int]:
    """Every process of a job, wherever it has hidden."""
    from osqbox.jobs.keeper.tree import with_job_id as find

    return sorted(find(job_id))


def open_files() -> dict[str, str]:
    """Of this process: what each descriptor is."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that was listing them
            found[path.name] = str(path.readlink())
    return found


def children() -> set[int]:
    """Of this process, zombies included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def in_trio(test: Callable[[], Awaitable[None]]) -> None:
    """Run it, and find nothing left behind."""
    gc.collect()  # what earlier tests have left is not ours
    files, processes = set(open_files().items()), children()

    def left_behind() -> tuple[set[tuple[str, str]], set[int]]:
        return set(open_files().items()) - files, children() - processes

    async def main() -> None:
        with trio.fail_after(LIMIT_S):
            await test()

    trio.run(main)
    patience = time.monotonic() + LEFT_S
    while any(left := left_behind()) and time.monotonic() < patience:
        time.sleep(0.01)  # the kernel takes a moment to report the end of a process
    assert not any(left), left
