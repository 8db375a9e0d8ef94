"""A small honest job runner: real processes of this test's own, logs in memory, the contract of JobRunner."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import trio

from osqbox.jobs.access import admit, allow, sees
from osqbox.jobs.errors import Code, JobError, invalid
from osqbox.jobs.messages import (
    CHUNK_BYTES,
    Caller,
    Chunk,
    End,
    JobSpec,
    OutputEvent,
    OutputRequest,
    Page,
    Reason,
    State,
    Status,
    Stream,
)


@dataclass
class Job:
    status: Status
    owner: tuple[str, str]
    process: trio.Process
    log: list[Chunk] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    def update(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        self.changed.set()
        self.changed = trio.Event()


class FakeRunner:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.jobs: dict[str, Job] = {}
        self.followers = 0
        self.specs: list[JobSpec] = []
        self.failure: Exception | None = None
        """Raised by the next call of `status`."""

    def _find(self, job: str, caller: Caller, verb: str) -> Job:
        allow(caller, verb)
        found = [each for name, each in self.jobs.items() if job and name.startswith(job)]
        admit(caller, verb, found[0].owner if found else None, job)
        return found[0]

    async def run(self, spec: JobSpec, caller: Caller) -> Status:
        allow(caller, "run")
        if not spec.command:
            raise invalid("command", "expected a program, got nothing")
        self.specs.append(spec)
        name = f"job-{len(self.jobs)}"
        pipe = subprocess.PIPE
        stdin = pipe if spec.open_stdin else subprocess.DEVNULL
        words = [spec.command, *spec.args]
        try:
            process = await trio.lowlevel.open_process(
                words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError as error:
            raise JobError(
                Code.FAILED_PRECONDITION,
                "command: no such program",
                reason="COMMAND_NOT_FOUND",
                field="command",
                job_id=name,
            ) from error
        status = Status(
            name, caller.owner, "somebody", spec.command, spec.args, State.RUNNING,
            created_at=1_700_000_000.25, started_at=1_700_000_000.5, pid=process.pid, labels=spec.labels,
            output_drained=True,
        )  # fmt: skip
        job = self.jobs[name] = Job(status, (caller.owner, caller.authority), process)
        self.nursery.start_soon(self._look_after, job)
        return status

    async def _look_after(self, job: Job) -> None:
        async with trio.open_nursery() as readers:
            readers.start_soon(self._read, job, job.process.stdout, Stream.STDOUT)
            readers.start_soon(self._read, job, job.process.stderr, Stream.STDERR)
        code = await job.process.wait()
        if job.process.stdin is not None:
            await job.process.stdin.aclose()
        how = {"exit_code": code, "state": State.EXITED} if code >= 0 else {"signal": -code, "state": State.SIGNALED}
        reason = Reason.STOPPED if job.status.state is State.STOPPING else Reason.EXIT
        job.update(reason=reason, ended_at=1_700_000_009.0, **how)

    async def _read(self, job: Job, pipe: trio.abc.ReceiveStream | None, stream: Stream) -> None:
        assert pipe is not None
        async with pipe:
            while data := await pipe.receive_some(CHUNK_BYTES):
                start = job.status.output_bytes
                job.log.append(Chunk(stream, start, bytes(data), 1_700_000_001.5))
                counted = f"{stream}_bytes"
                job.update(output_bytes=start + len(data), **{counted: getattr(job.status, counted) + len(data)})

    async def status(self, job: str, caller: Caller) -> Status:
        if self.failure is not None:
            raise self.failure
        return self._find(job, caller, "status").status

    async def list(
        self,
        caller: Caller,
        *,
        states: tuple[State, ...] = (),
        owner: str | None = None,
        labels: dict[str, str] | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> Page:
        allow(caller, "list")
        seen = [
            job.status for name, job in sorted(self.jobs.items(), reverse=True)
            if sees(caller, job.owner) and (before is None or name < before)
            and (not states or job.status.state in states) and (owner in (None, job.status.owner))
            and (labels or {}).items() <= job.status.labels.items()
        ]  # fmt: skip
        return Page(tuple(seen[:limit]), seen[limit - 1].id if len(seen) > limit else None)

    async def stop(
        self,
        job: str,
        caller: Caller,
        *,
        signal: int | None = None,
        grace_s: float | None = None,
        leader_only: bool = False,
        strict: bool = False,
    ) -> tuple[Status, bool]:
        found = self._find(job, caller, "stop")
        if found.status.has_ended:
            if strict:
                raise JobError(Code.FAILED_PRECONDITION, "the job has ended", reason="ENDED")
            return found.status, True
        found.update(state=State.STOPPING, stopped_by=caller.owner)
        found.process.send_signal(signal or 15)
        with trio.move_on_after(10 if grace_s is None else grace_s):
            await self._ended(found)
        if not found.status.has_ended:
            found.process.kill()
        await self._ended(found)
        return found.status, False

    async def _ended(self, job: Job) -> None:
        while not job.status.has_ended:
            await job.changed.wait()

    async def signal(self, job: str, caller: Caller, number: int) -> Status:
        found = self._find(job, caller, "signal")
        found.process.send_signal(number)
        return found.status

    async def suspend(self, job: str, caller: Caller) -> Status:
        found = self._find(job, caller, "suspend")
        found.update(state=State.SUSPENDED)
        return found.status

    async def resume(self, job: str, caller: Caller) -> Status:
        found = self._find(job, caller, "resume")
        found.update(state=State.RUNNING)
        return found.status

    async def wait(self, job: str, caller: Caller, timeout_s: float | None = None) -> Status:
        found = self._find(job, caller, "wait")
        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            await self._ended(found)
        return found.status

    async def send_input(self, job: str, caller: Caller, data: bytes, *, eof: bool = False) -> None:
        found = self._find(job, caller, "send_input")
        if found.process.stdin is None:
            raise JobError(Code.FAILED_PRECONDITION, "stdin: not open", reason="STDIN_NOT_OPEN")
        await found.process.stdin.send_all(data)
        if eof:
            await found.process.stdin.aclose()

    async def delete(self, job: str, caller: Caller) -> None:
        found = self._find(job, caller, "delete")
        if not found.status.has_ended:
            raise JobError(Code.FAILED_PRECONDITION, "the job runs", reason="RUNNING")
        del self.jobs[found.status.id]

    @asynccontextmanager
    async def output(
        self, job: str, caller: Caller, request: OutputRequest
    ) -> AsyncIterator[AsyncIterator[OutputEvent]]:
        found = self._find(job, caller, "output")
        if found.status.has_ended and request.offset > found.status.output_bytes:
            raise JobError(Code.OUT_OF_RANGE, "offset: beyond the end", field="offset")
        self.followers += 1
        try:
            async with aclosing(self._events(found, request)) as events:
                yield events
        finally:
            self.followers -= 1

    async def _events(self, job: Job, request: OutputRequest) -> AsyncIterator[OutputEvent]:
        offset = request.offset
        if request.tail_bytes is not None:
            offset = max(0, job.status.output_bytes - request.tail_bytes)
        position = 0
        while True:
            changed, ended = job.changed, job.status.has_ended
            while position < len(job.log):
                chunk, position = job.log[position], position + 1
                data = chunk.data[max(0, offset - chunk.offset) :]
                if data and (not request.streams or chunk.stream in request.streams):
                    yield Chunk(chunk.stream, max(offset, chunk.offset), data, chunk.at)
            if ended:
                yield End(job.status)
            if ended or not request.follow:
                return
            await changed.wait()


@asynccontextmanager
async def open_fake_runner() -> AsyncIterator[FakeRunner]:
    async with trio.open_nursery() as nursery:
        runner = FakeRunner(nursery)
        try:
            yield runner
        finally:
            nursery.start_soon(partial(_kill_all, runner))


async def _kill_all(runner: FakeRunner) -> None:
    for job in runner.jobs.values():
        job.process.kill()
