"""A blocking client of the job runner: its calls in the runner's own words, and its patience.

A server that restarts is waited for: following goes on at the next byte, waiting goes on, a run that was under way is
asked for again under the same idempotency key. Input and signals are never repeated, because doing them twice is not
doing them once. Every call raises `JobError`, as the runner itself does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar

from protobuf import Message, Oneof

from osqbox.jobs import client_wire as wire
from osqbox.jobs.errors import Code, JobError, invalid
from osqbox.jobs.grpc_h2 import BROKEN, FINAL, TOO_LARGE, UNWELCOME, Channel
from osqbox.jobs.messages import KIB, Chunk, End, JobSpec, OutputEvent, OutputRequest, State, Status, Truncated
from osqbox.jobs.v1 import jobs_pb as pb

A = TypeVar("A", bound=Message[Any])
T = TypeVar("T")

SERVICE = "/osqbox.jobs.v1.JobService/"
CALL_S = 30.0
"""For an answer to a call that does not wait for a job."""
STOP_S = 30.0
"""For a stop, on top of the grace."""
WAIT_S = 60.0
"""One call of WaitProcess; a longer wait is several."""
RECONNECT_S = 60.0
"""How long a server that was there before is waited for."""
UNWELCOME_TIMES = 4
"""A server that hangs up without a word so often in a row means us."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
INPUT_BYTES = 48 * KIB
PAGE_JOBS = 1000


class JobClient:
    """Calls one server. ``open_channel`` connects, each time anew: the server may have moved.

    ``on_break`` hears of every break that is about to be mended. A server that never spoke to this client is not
    waited for.
    """

    def __init__(
        self,
        open_channel: Callable[[], Channel],
        *,
        reconnect_s: float = RECONNECT_S,
        on_break: Callable[[JobError], None] | None = None,
    ) -> None:
        self._open_channel = open_channel
        self._reconnect_s = reconnect_s
        self._on_break = on_break
        self._channel: Channel | None = None
        self._has_spoken = False

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, spec: JobSpec) -> Status:
        """Start a job; its status once it runs. ``job_id`` of the error is the job that could not be started."""
        request = wire.to_run(replace(spec, idempotency_key=spec.idempotency_key or os.urandom(16).hex()))
        return wire.status(self._repeatable("RunProcess", request, pb.RunProcessResponse).status)

    def status(self, job: str) -> Status:
        """``job`` here and below: an id, a unique beginning of one, or the pid of a running job."""
        return wire.status(
            self._repeatable("GetProcessStatus", pb.ProcessStatusRequest(process_id=job), pb.ProcessStatus)
        )

    def list(
        self,
        *,
        states: Iterable[State] = (),
        owner: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
    ) -> list[Status]:
        """The newest first, at most ``limit``."""
        request = pb.ListProcessesRequest(states=wire.to_states(states), owner=owner or "", labels=dict(labels or {}))
        found: list[Status] = []
        page_jobs = PAGE_JOBS
        while True:
            request.page_size = min(limit - len(found), page_jobs)
            try:
                page = self._repeatable("ListProcesses", request, pb.ListProcessesResponse)
            except JobError as error:
                if error.reason != TOO_LARGE or request.page_size == 1:
                    raise
                page_jobs = request.page_size // 2  # jobs with very long command lines
                continue
            found += map(wire.status, page.processes)
            request.page_token = page.next_page_token
            if not page.next_page_token or len(found) >= limit:
                return found

    def stop(
        self,
        job: str,
        *,
        signal: int | None = None,
        grace_s: float | None = None,
        leader_only: bool = False,
        strict: bool = False,
    ) -> tuple[Status, bool]:
        """Ask a job to end, with all its processes; its status then, and whether it had ended before."""
        request = pb.StopProcessRequest(
            process_id=job, signal=signal or 0, grace=wire.duration(grace_s), leader_only=leader_only, strict=strict
        )
        timeout_s = None if grace_s is None else grace_s + STOP_S
        answer = self._repeatable("StopProcess", request, pb.StopProcessResponse, timeout_s=timeout_s)
        return wire.status(answer.status), answer.already_ended

    def signal(self, job: str, number: int) -> Status:
        """Send a signal to the command itself, not to what it started."""
        action: Oneof[Literal["signal"], int] = Oneof("signal", number)
        request = pb.SignalProcessRequest(process_id=job, action=action)
        return wire.status(self._once("SignalProcess", request, pb.ProcessStatus))

    def suspend(self, job: str) -> Status:
        return self._control(job, pb.Control.SUSPEND)

    def resume(self, job: str) -> Status:
        return self._control(job, pb.Control.RESUME)

    def wait(self, job: str, timeout_s: float | None = None) -> Status:
        """The status when the job has ended, or after ``timeout_s``."""
        ends_at = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            part_s = max(min(ends_at - time.monotonic(), WAIT_S), 0.001)
            request = pb.WaitProcessRequest(process_id=job, timeout=wire.duration(part_s))
            found = wire.status(self._repeatable("WaitProcess", request, pb.ProcessStatus, timeout_s=part_s + CALL_S))
            if found.has_ended or time.monotonic() >= ends_at:
                return found
            job = found.id  # a pid means nothing once its job has ended

    def send_input(self, job: str, data: bytes, *, eof: bool = False) -> None:
        """Returns when the job's stdin took everything, however long that takes."""
        pieces = [data[at : at + INPUT_BYTES] for at in range(0, len(data), INPUT_BYTES)] or [b""]
        chunks = [pb.InputChunk(process_id=job, data=piece) for piece in pieces]
        chunks[-1].eof = eof
        self._call("SendInput", [chunk.to_binary() for chunk in chunks], timeout_s=None)

    def delete(self, job: str) -> None:
        """Remove a job that has ended, with its output."""
        self._once("DeleteProcess", pb.DeleteProcessRequest(process_id=job), pb.DeleteProcessResponse)

    def output(self, job: str, request: OutputRequest | None = None) -> Generator[OutputEvent]:
        """The output from where ``request`` says, each byte once; `End` last if the job has ended.

        Breaks are mended by going on at the next byte. It has a channel of its own, which closes with the iterator.
        """
        wanted = request or OutputRequest()
        patience = self._patience()
        while True:
            try:
                for event in self._output_once(job, wanted):
                    patience.renew()
                    wanted = _after(event, wanted)
                    yield event
                    if isinstance(event, End):
                        return
                if not wanted.follow:
                    return
                raise JobError(Code.UNAVAILABLE, "the output ended before the job did", reason=BROKEN)
            except JobError as error:
                patience.bear(error)

    def _output_once(self, job: str, wanted: OutputRequest) -> Iterator[OutputEvent]:
        with self._open_channel() as channel:
            try:
                for answer in channel.call(f"{SERVICE}GetProcessOutput", [_binary(wire.to_output(job, wanted))]):
                    if found := wire.event(_parsed(pb.ProcessOutput, answer)):
                        yield found
            finally:
                self._has_spoken |= channel.has_heard

    def _control(self, job: str, control: pb.Control) -> Status:
        action: Oneof[Literal["control"], pb.Control] = Oneof("control", control)
        request = pb.SignalProcessRequest(process_id=job, action=action)
        return wire.status(self._repeatable("SignalProcess", request, pb.ProcessStatus))

    def _repeatable(self, name: str, request: Message[Any], answer: type[A], *, timeout_s: float | None = CALL_S) -> A:
        """The answer to a call that may be made twice."""
        patience = self._patience()
        while True:
            try:
                return self._once(name, request, answer, timeout_s=timeout_s)
            except JobError as error:
                patience.bear(error)

    def _once(self, name: str, request: Message[Any], answer: type[A], *, timeout_s: float | None = CALL_S) -> A:
        return _parsed(answer, self._call(name, [_binary(request)], timeout_s=timeout_s))

    def _call(self, name: str, messages: Iterable[bytes], *, timeout_s: float | None) -> bytes:
        if self._channel is None or not self._channel.is_usable():
            self.close()
            self._channel = self._open_channel()
        channel = self._channel
        try:
            return channel.one_answer(SERVICE + name, messages, timeout_s=timeout_s)
        except BaseException as error:
            if not isinstance(error, JobError):  # interrupted in the middle of something
                self.close()
            raise
        finally:
            self._has_spoken |= channel.has_heard

    def _patience(self) -> _Patience:
        return _Patience(lambda: self._reconnect_s if self._has_spoken else 0.0, self._on_break)


class _Patience:
    """How long breaks in a row are borne."""

    def __init__(self, limit_s: Callable[[], float], on_break: Callable[[JobError], None] | None) -> None:
        self._limit_s = limit_s
        self._on_break = on_break
        self.renew()

    def renew(self) -> None:
        self._began: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._unwelcome = 0

    def bear(self, error: JobError) -> None:
        """Wait until it is time for another attempt; raises ``error`` when there is none to be made."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        self._unwelcome = self._unwelcome + 1 if error.reason == UNWELCOME else 0
        is_final = error.reason in FINAL or self._unwelcome >= UNWELCOME_TIMES
        if error.code is not Code.UNAVAILABLE or is_final or now >= self._began + self._limit_s():
            raise error
        if self._on_break is not None:
            self._on_break(error)
        threading.Event().wait(self._pause_s)  # a server that is not there sends no event
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _after(event: OutputEvent, wanted: OutputRequest) -> OutputRequest:
    """What is still to be asked for once ``event`` was given."""
    match event:
        case Chunk():
            return replace(wanted, offset=event.offset + len(event.data), tail_bytes=None)
        case Truncated():
            return replace(wanted, offset=event.end, tail_bytes=None)
    return wanted


def _binary(message: Message[Any]) -> bytes:
    """Raises INVALID_ARGUMENT for what has no place on the wire: a number too large, text that is not UTF-8."""
    try:
        return message.to_binary()
    except (OverflowError, ValueError) as error:
        raise invalid("request", f"expected numbers and text that the protocol can carry: {error}") from None


def _parsed(kind: type[A], data: bytes) -> A:
    try:
        return kind.from_binary(data)
    except ValueError as error:
        raise JobError(Code.INTERNAL, f"expected a {kind.__name__}, got something else: {error}") from None
