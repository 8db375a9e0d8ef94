"""Jobs without a server: the runner over a directory of one's own, for the one person who runs the program.

async with open_jobs("state/jobs") as jobs:
    job = await jobs.run(["make", "all"], cwd="/src", timeout_s=600)
    async with jobs.output(job.id) as events:
        async for event in events:
            if isinstance(event, Chunk):
                ...
    ended = await jobs.wait(job.id)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from osqbox import audit
from osqbox.clock import SystemClock
from osqbox.feed import Feed
from osqbox.running import locked_data_dir
from osqbox.store import Store

from .messages import Caller, JobBounds, JobSpec, OutputEvent, OutputRequest, Page, State, Status
from .runner import JobRunner, open_runner
from .tables import migrations

LOCAL = Caller(owner="local", authority="local", roles=frozenset(("admin",)))
"""Who asks when there is no server: whoever may write to the directory."""

Word = str | bytes | os.PathLike[str]


class LocalJobs:
    """`JobRunner` with the local caller left out, and a command line for `run`; ``runner`` has everything else."""

    def __init__(self, runner: JobRunner) -> None:
        self.runner = runner

    async def run(self, command: Sequence[Word] | JobSpec, **spec: Any) -> Status:
        """``command`` as one would type it, word by word; further words are fields of `JobSpec`. Raises JobError."""
        return await self.runner.run(_spec(command, spec), LOCAL)

    async def status(self, job: str) -> Status:
        return await self.runner.status(job, LOCAL)

    async def list(
        self,
        *,
        states: Iterable[State] = (),
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> Page:
        return await self.runner.list(LOCAL, states=states, labels=labels, limit=limit, before=before)

    async def stop(self, job: str, *, signal: int | None = None, grace_s: float | None = None) -> Status:
        """Begins to stop it; `wait` tells the end."""
        return (await self.runner.stop(job, LOCAL, signal=signal, grace_s=grace_s))[0]

    async def signal(self, job: str, number: int) -> Status:
        return await self.runner.signal(job, LOCAL, number)

    async def suspend(self, job: str) -> Status:
        return await self.runner.suspend(job, LOCAL)

    async def resume(self, job: str) -> Status:
        return await self.runner.resume(job, LOCAL)

    async def wait(self, job: str, timeout_s: float | None = None) -> Status:
        return await self.runner.wait(job, LOCAL, timeout_s)

    async def send_input(self, job: str, data: bytes, *, eof: bool = False) -> None:
        await self.runner.send_input(job, LOCAL, data, eof=eof)

    async def delete(self, job: str) -> None:
        await self.runner.delete(job, LOCAL)

    def output(
        self, job: str, request: OutputRequest | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputEvent]]:
        return self.runner.output(job, LOCAL, request)


@asynccontextmanager
async def open_jobs(
    directory: str | os.PathLike[str], bounds: JobBounds | None = None, *, stop_jobs: bool = False
) -> AsyncIterator[LocalJobs]:
    """Jobs whose rows are in ``directory/jobs.db`` and whose output is beside it; one process at a time.

    Jobs live on after the block and are found again by the next one, unless ``stop_jobs``. Raises AddressInUse or
    BadSetup; what happens inside the block may come in an exception group.
    """
    path, clock = Path(os.path.abspath(directory)), SystemClock()  # noqa: ASYNC240, PTH100 - touches no disk
    with locked_data_dir(path):
        store = Store.open(path / "jobs.db", (audit.migrations, migrations), clock, Feed())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                async with open_runner(store, path / "jobs", clock, bounds, stop_jobs=stop_jobs) as runner:
                    yield LocalJobs(runner)
            finally:
                await store.aclose()


def _spec(command: Sequence[Word] | JobSpec, words: Mapping[str, Any]) -> JobSpec:
    if isinstance(command, JobSpec):
        return command
    if isinstance(command, str | bytes) or not command:
        raise ValueError(f"expected a command word by word, such as ['ls', '-la'], got {command!r}")
    program, *args = (os.fsencode(word) for word in command)
    given = {**words, "cwd": os.fsencode(words["cwd"])} if words.get("cwd") is not None else words
    return JobSpec(program, tuple(args), **given)
