"""Jobs under the operator's own identity: run, watched, stopped, their output as it comes or as a file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

import msgspec
import trio
from msgspec import Meta
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from osqbox.errors import Refused
from osqbox.jobs import access, messages
from osqbox.jobs.errors import JobError, invalid
from osqbox.jobs.facts import status_facts
from osqbox.jobs.messages import Caller, JobSpec, OutputMode, OutputRequest, Overflow, Stream
from osqbox.listen import current_peer

from .answers import EVENTS, answered
from .job_output import OCTETS, Download, Events, sent
from .operations import SEQ_MAX, Body, Query, operation
from .parts import Jobs, Parts

T = TypeVar("T")

WAIT_S = 60.0
WAIT_MAX_S = 3600.0

State = Literal["pending", "running", "suspended", "stopping", "exited", "signaled", "failed_to_start", "lost"]
Reason = Literal["exit", "stopped", "timeout", "oom", "output_limit", "shutdown", "lost"]
StreamName = Literal["stdout", "stderr", "mixed"]
Bytes = Annotated[int, Meta(ge=0, le=SEQ_MAX)]


# what is asked


class NewLimits(Body):
    """What cannot be enforced on this machine is refused, never ignored."""

    memory_bytes: int | None = None
    cpu_cores: float | None = None
    cpu_time_s: float | None = None
    processes: int | None = None
    open_files: int | None = None
    file_bytes: int | None = None


class NewJob(Body):
    """A process to run, never through a shell."""

    command: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    cwd: str | None = None
    run_as: str | None = None
    limits: NewLimits = msgspec.field(default_factory=NewLimits)
    timeout_s: float | None = None
    stop_grace_s: float = 10.0
    stop_signal: int = 15
    output_mode: OutputMode = OutputMode.SPLIT
    max_output_bytes: int | None = None
    overflow: Overflow = Overflow.KEEP_HEAD_AND_TAIL
    open_stdin: bool = False
    keep_leftovers: bool = False
    link_output: bool = False
    idempotency_key: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)

    def spec(self) -> JobSpec:
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return JobSpec(
            **{
                **given,
                "command": _encoded("command", self.command),
                "args": tuple(_encoded("args", word) for word in self.args),
                "cwd": None if self.cwd is None else _encoded("cwd", self.cwd),
                "limits": messages.Limits(**msgspec.structs.asdict(self.limits)),
            }
        )


def _encoded(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise invalid(field, "expected text, got half a surrogate pair") from None


class Which(Query):
    state: tuple[State, ...] = ()
    owner: str | None = None
    label: Annotated[tuple[str, ...], Meta(description="KEY=VALUE; all of them must fit.")] = ()
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    before: Annotated[str | None, Meta(description="The next_page of the answer before.")] = None


class Stop(Body):
    """How to stop: by default the job's own signal and grace, and everything it started."""

    signal: int | None = None
    grace_s: float | None = None
    leader_only: bool = False
    strict: bool = False


class Signal(Body):
    """A signal for the command of the job, not for what it started."""

    number: int


class Nothing(Body):
    """Nothing to say."""


class Input(Body):
    """For the job's stdin: text, or any bytes in base64."""

    text: str = ""
    data: bytes = b""
    eof: bool = False


class Wait(Query):
    timeout_s: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] = WAIT_S


class Output(Query):
    offset: Annotated[Bytes, Meta(description="Where to begin; Last-Event-ID goes before it.")] = 0
    tail: Annotated[Bytes | None, Meta(description="Begin so many bytes before the end instead.")] = None
    stream: Annotated[tuple[StreamName, ...], Meta(description="Only of these.")] = ()
    follow: (
        Annotated[bool, Meta(description="Go on to the end of the job: what events do and a download does not.")] | None
    ) = None

    def request(self, last_event_id: int | None, *, follow: bool) -> OutputRequest:
        if self.tail is not None and self.offset:
            raise invalid("tail", "expected either offset or tail, got both")
        wanted = OutputRequest(
            self.offset,
            self.tail,
            frozenset(map(Stream, self.stream)),
            follow=follow if self.follow is None else self.follow,
        )
        return wanted if last_event_id is None else replace(wanted, offset=last_event_id, tail_bytes=None)


# what is answered


class UsageFacts(msgspec.Struct):
    """CPU time and the largest resident set."""

    user_s: float
    system_s: float
    max_rss_bytes: int


class JobFacts(msgspec.Struct):
    """A job. Of `exit_code`, `signal` and `errno` at most one is set."""

    id: str
    state: State
    owner: str
    run_as: str
    command: str
    args: list[str]
    pid: int | None
    exit_code: int | None
    signal: int | None
    core_dumped: bool
    errno: int | None
    reason: Reason | None
    stopped_by: str | None
    created_at: str | None
    started_at: str | None
    ended_at: str | None
    output_bytes: int
    stdout_bytes: int
    stderr_bytes: int
    output_truncated: bool
    output_drained: bool
    usage: UsageFacts
    containment: Literal["cgroup", "process_group"] | None
    enforced: list[str]
    leftover_processes: int
    labels: dict[str, str]


class StoppedJob(JobFacts):
    """The job once its stop has begun, or, with `already_ended`, as it had ended before."""

    already_ended: bool


class JobPage(msgspec.Struct):
    """The newest first; `next_page` is the `before` of the next question."""

    jobs: list[JobFacts]
    next_page: str | None


class TakenInput(msgspec.Struct):
    """So many bytes were taken by the job's stdin."""

    taken_bytes: int


class DeletedJob(msgspec.Struct):
    """The job and its output are gone."""

    deleted: str


class OutputFacts(msgspec.Struct):
    """What an event of the output carries as JSON; its name is `chunk`, `truncated` or `end`, its id the offset to
    resume at.

    A chunk has `text`, or `base64` when it is not UTF-8; `truncated` has `start` and `end` of bytes that are not kept;
    `end` comes last, with the job.
    """

    stream: StreamName | msgspec.UnsetType = msgspec.UNSET
    offset: int | msgspec.UnsetType = msgspec.UNSET
    at: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    base64: str | msgspec.UnsetType = msgspec.UNSET
    start: int | msgspec.UnsetType = msgspec.UNSET
    end: int | msgspec.UnsetType = msgspec.UNSET
    job: JobFacts | msgspec.UnsetType = msgspec.UNSET


# routes


def add(routes: Blueprint, parts: Parts) -> None:
    _add_jobs(routes, parts)
    _add_controls(routes, parts)
    _add_streams(routes, parts)


def _add_jobs(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/jobs")
    @operation(JobFacts, status=201, body=NewJob)
    async def run_job(body: NewJob) -> TrioResponse:
        """Start a process; answered when it runs."""
        return answered(status_facts(await _jobs(parts).run(body.spec(), _operator())), 201)

    @routes.get("/jobs")
    @operation(JobPage, query=Which)
    async def list_jobs(query: Which) -> TrioResponse:
        """Everybody's jobs, the newest first."""
        page = await _jobs(parts).list(
            _operator(),
            states=tuple(map(messages.State, query.state)),
            owner=query.owner,
            labels=dict(map(_pair, query.label)),
            limit=query.limit,
            before=query.before,
        )
        return answered({"jobs": list(map(status_facts, page.jobs)), "next_page": page.next_page})

    @routes.get("/jobs/<job>")
    @operation(JobFacts)
    async def show_job(job: str) -> TrioResponse:
        """One job by its id or the beginning of it."""
        return answered(status_facts(await _jobs(parts).status(job, _operator())))

    @routes.delete("/jobs/<job>")
    @operation(DeletedJob)
    async def delete_job(job: str) -> TrioResponse:
        """Remove an ended job and its output."""
        found = await _jobs(parts).status(job, _operator())
        await _jobs(parts).delete(found.id, _operator())
        return answered(DeletedJob(deleted=found.id))


def _add_controls(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/jobs/<job>/stop")
    @operation(StoppedJob, body=Stop)
    async def stop_job(job: str, body: Stop) -> TrioResponse:
        """Stop a job and everything it started: its stop signal, then after the grace SIGKILL."""
        status, already_ended = await _jobs(parts).stop(
            job,
            _operator(),
            signal=body.signal,
            grace_s=body.grace_s,
            leader_only=body.leader_only,
            strict=body.strict,
        )
        return answered({**status_facts(status), "already_ended": already_ended})

    @routes.post("/jobs/<job>/signal")
    @operation(JobFacts, body=Signal)
    async def signal_job(job: str, body: Signal) -> TrioResponse:
        """Send a signal to the command of a job; what it started gets none."""
        return answered(status_facts(await _jobs(parts).signal(job, _operator(), body.number)))

    @routes.post("/jobs/<job>/suspend")
    @operation(JobFacts, body=Nothing)
    async def suspend_job(job: str, body: Nothing) -> TrioResponse:  # noqa: ARG001 - it has nothing to say
        """Freeze every process of a job."""
        return answered(status_facts(await _jobs(parts).suspend(job, _operator())))

    @routes.post("/jobs/<job>/resume")
    @operation(JobFacts, body=Nothing)
    async def resume_job(job: str, body: Nothing) -> TrioResponse:  # noqa: ARG001
        """Let a suspended job go on."""
        return answered(status_facts(await _jobs(parts).resume(job, _operator())))

    @routes.post("/jobs/<job>/input")
    @operation(TakenInput, body=Input)
    async def send_input(job: str, body: Input) -> TrioResponse:
        """Write to a job's stdin; answered when the job's pipe has taken it all."""
        if body.text and body.data:
            raise invalid("data", "expected either text or data, got both")
        data = body.data or _encoded("text", body.text)
        await _unless_stopping(parts, lambda: _jobs(parts).send_input(job, _operator(), data, eof=body.eof))
        return answered(TakenInput(taken_bytes=len(data)))


def _add_streams(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/jobs/<job>/wait")
    @operation(JobFacts, query=Wait)
    async def wait_for_job(job: str, query: Wait) -> TrioResponse:
        """The job when it has ended, or as it is after ``timeout_s``."""
        status = await _unless_stopping(parts, lambda: _jobs(parts).wait(job, _operator(), query.timeout_s))
        return answered(status_facts(status))

    @routes.get("/jobs/<job>/output")
    @operation(bytes, media=OCTETS, or_events=OutputFacts, query=Output)
    async def read_output(job: str, query: Output) -> TrioResponse:
        """The bytes of stdout and stderr as one file, or for ``Accept: text/event-stream`` events to the job's end.

        Of the file, bytes that are not kept are left out, and `X-Output-Truncated` is `true`. Events resume at
        Last-Event-ID; a comment line each 15 s keeps them alive.
        """
        caller, jobs = _operator(), _jobs(parts)
        status = await jobs.status(job, caller)
        wants_events = EVENTS in request.headers.get("Accept", "").lower()
        wanted = query.request(_last_event_id() if wants_events else None, follow=wants_events)
        async with jobs.output(status.id, caller, wanted):
            pass  # tried first: once the head is out, a refusal could only break it off
        answer = Events if wants_events else Download
        body = answer(parts, lambda: jobs.output(status.id, caller, wanted), status_facts)
        return sent(body, status)


def _jobs(parts: Parts) -> Jobs:
    if parts.jobs is None:
        raise Refused("no_jobs", "this box runs no jobs", status=404)
    return parts.jobs


def _operator() -> Caller:
    peer = current_peer()
    return replace(access.OPERATOR, address=peer.address if peer else "")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise invalid("label", f"expected KEY=VALUE, got {text[:80]!r}")
    return name, value


def _last_event_id() -> int | None:
    given = request.headers.get("Last-Event-ID", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None


async def _unless_stopping(parts: Parts, work: Callable[[], Awaitable[T]]) -> T:
    """What may take long; a box that stops ends it (trio.ClosedResourceError)."""
    done: list[T] = []
    failure: JobError | None = None

    async with trio.open_nursery() as nursery:

        async def end_at_stop() -> None:
            await parts.stopping.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_at_stop)
        try:
            done.append(await work())
        except JobError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not done:
        raise trio.ClosedResourceError("the box is stopping")
    return done[0]
