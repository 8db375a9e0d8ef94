"""Between the wire of `v1/jobs.proto` and the job runner's own words; errors to gRPC's. Pure.

A request that cannot be told in those words (a negative duration, a number no enum has) is INVALID_ARGUMENT with its
field; what a sound request asks for is judged by the runner.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from connectrpc.code import Code as WireCode
from connectrpc.errors import ConnectError
from protobuf import Message, Oneof
from protobuf.wkt import Duration, Timestamp

from .errors import Code, JobError, invalid
from .messages import (
    MIB,
    Chunk,
    Containment,
    End,
    JobSpec,
    Limits,
    OutputEvent,
    OutputMode,
    OutputRequest,
    Overflow,
    Reason,
    State,
    Status,
    Stream,
    Truncated,
)
from .v1 import error_details_pb as details
from .v1 import jobs_pb as wire

DOMAIN = "osqbox"
"""Of every google.rpc.ErrorInfo."""
PAGE_DEFAULT, PAGE_MAX = 100, 1000
PAGE_BYTES = 1 * MIB
"""Of command lines in one page: generated clients take messages of at most 4 MiB."""
DURATION_MAX_S = 100 * 366 * 86400.0
"""A century: beyond it a timeout is a mistake, and no clock of ours overflows."""

_NANOS = 1_000_000_000
_Number = TypeVar("_Number", bound=int)
_Word = TypeVar("_Word")

_STATES: Mapping[State, wire.State] = MappingProxyType({state: wire.State[state.name] for state in State})
_REASONS: Mapping[Reason, wire.EndReason] = MappingProxyType(
    {
        Reason.EXIT: wire.EndReason.EXIT,
        Reason.STOPPED: wire.EndReason.STOPPED_BY_USER,
        Reason.TIMEOUT: wire.EndReason.TIMEOUT,
        Reason.OOM: wire.EndReason.OOM,
        Reason.OUTPUT_LIMIT: wire.EndReason.OUTPUT_LIMIT,
        Reason.SHUTDOWN: wire.EndReason.SERVER_SHUTDOWN,
        Reason.LOST: wire.EndReason.LOST,
    }
)
_CONTAINMENTS: Mapping[Containment, wire.Containment] = MappingProxyType(
    {kind: wire.Containment[kind.name] for kind in Containment}
)
_STREAMS: Mapping[Stream, wire.Stream] = MappingProxyType(
    {Stream.STDOUT: wire.Stream.STDOUT, Stream.STDERR: wire.Stream.STDERR, Stream.MIXED: wire.Stream.MERGED}
)
_MODES: Mapping[wire.OutputMode, OutputMode] = MappingProxyType(
    {wire.OutputMode[mode.name]: mode for mode in OutputMode}
)
_OVERFLOWS: Mapping[wire.OverflowPolicy, Overflow] = MappingProxyType(
    {
        wire.OverflowPolicy.DEFAULT: Overflow.KEEP_HEAD_AND_TAIL,
        wire.OverflowPolicy.KILL: Overflow.KILL,
        wire.OverflowPolicy.DISCARD_NEW: Overflow.DISCARD_NEW,
        wire.OverflowPolicy.KEEP_HEAD_AND_TAIL: Overflow.KEEP_HEAD_AND_TAIL,
    }
)
_STATE_WORDS: Mapping[wire.State, State] = MappingProxyType({number: state for state, number in _STATES.items()})
_STREAM_WORDS: Mapping[wire.Stream, Stream] = MappingProxyType({number: word for word, number in _STREAMS.items()})


# requests


def job_spec(request: wire.RunProcessRequest) -> JobSpec:
    command, args = _command_line(request)
    given: dict[str, Any] = {}
    if (grace_s := _seconds("stop_grace", request.stop_grace)) is not None:
        given["stop_grace_s"] = grace_s
    if request.stop_signal:
        given["stop_signal"] = request.stop_signal
    return JobSpec(
        command=command,
        args=args,
        env=dict(request.env),
        cwd=request.working_dir or None,
        run_as=request.run_as or None,
        limits=_limits(request.limits),
        timeout_s=_seconds("timeout", request.timeout) or None,
        output_mode=_word("output_mode", _MODES, request.output_mode),
        max_output_bytes=request.max_output_bytes or None,
        overflow=_word("overflow", _OVERFLOWS, request.overflow),
        open_stdin=request.open_stdin,
        keep_leftovers=request.keep_leftovers,
        link_output=request.link_output,
        idempotency_key=request.idempotency_key or None,
        labels=dict(request.labels),
        **given,
    )


def _command_line(request: wire.RunProcessRequest) -> tuple[bytes, tuple[bytes, ...]]:
    if not request.argv:
        return request.command, tuple(request.args)
    if request.command or request.args:
        raise invalid("argv", "expected either argv, or command and args, got both")
    command, *args = (word.encode() for word in request.argv)
    return command, tuple(args)


def _limits(limits: wire.Limits | None) -> Limits:
    if limits is None:
        return Limits()
    if not 0 <= limits.cpu_cores < float("inf"):
        raise invalid("limits.cpu_cores", f"expected a share of CPU time such as 0.5, got {limits.cpu_cores}")
    return Limits(
        memory_bytes=limits.memory_bytes or None,
        cpu_cores=limits.cpu_cores or None,
        cpu_time_s=_seconds("limits.cpu_time", limits.cpu_time) or None,
        processes=limits.processes or None,
        open_files=limits.open_files or None,
        file_bytes=limits.file_bytes or None,
    )


def output_request(request: wire.ProcessOutputRequest) -> OutputRequest:
    tail_bytes = request.tail_bytes if request.has_field("tail_bytes") else None
    if tail_bytes is not None and request.offset:
        raise invalid("tail_bytes", "expected either offset or tail_bytes, got both")
    return OutputRequest(
        offset=request.offset,
        tail_bytes=tail_bytes,
        streams=frozenset(_word("streams", _STREAM_WORDS, stream) for stream in request.streams),
        follow=not request.no_follow,
    )


def states(request: wire.ListProcessesRequest) -> tuple[State, ...]:
    return tuple(_word("states", _STATE_WORDS, state) for state in request.states)


def page_size(request: wire.ListProcessesRequest) -> int:
    return min(request.page_size or PAGE_DEFAULT, PAGE_MAX)


def fitting(jobs: Sequence[Status]) -> int:
    """How many of them go into one answer: at least one, whatever its size."""
    total_bytes = 0
    for count, status in enumerate(jobs):
        total_bytes += len(status.command) + sum(map(len, status.args))
        if total_bytes > PAGE_BYTES:
            return max(1, count)
    return len(jobs)


def stop_grace_s(request: wire.StopProcessRequest) -> float | None:
    return _seconds("grace", request.grace)


def wait_timeout_s(request: wire.WaitProcessRequest) -> float | None:
    return _seconds("timeout", request.timeout)


def _word(field: str, words: Mapping[_Number, _Word], number: _Number) -> _Word:
    if number not in words:
        known = ", ".join(str(int(each)) for each in words)
        raise invalid(field, f"expected one of the numbers {known}, got {int(number)}")
    return words[number]


def _seconds(field: str, duration: Duration | None) -> float | None:
    if duration is None:
        return None
    seconds = duration.seconds + duration.nanos / _NANOS
    if not 0 <= seconds <= DURATION_MAX_S or abs(duration.nanos) >= _NANOS:
        raise invalid(field, f"expected 0 to {DURATION_MAX_S:.0f} seconds, got {seconds:g}")
    return seconds


# answers


def status_message(status: Status) -> wire.ProcessStatus:
    return wire.ProcessStatus(
        process_id=status.id,
        owner=status.owner,
        run_as=status.run_as,
        command=status.command,
        args=list(status.args),
        state=_STATES[status.state],
        result=_result(status),
        reason=wire.EndReason.UNSPECIFIED if status.reason is None else _REASONS[status.reason],
        stopped_by=status.stopped_by or "",
        pid=status.pid or 0,
        created_at=_timestamp(status.created_at),
        started_at=_timestamp(status.started_at),
        ended_at=_timestamp(status.ended_at),
        stdout_bytes=status.stdout_bytes,
        stderr_bytes=status.stderr_bytes,
        output_bytes=status.output_bytes,
        output_truncated=status.output_truncated,
        output_drained=status.output_drained,
        usage=wire.Usage(
            user_time=_duration(status.usage.user_s),
            system_time=_duration(status.usage.system_s),
            max_rss_bytes=status.usage.max_rss_bytes,
        ),
        enforced=list(status.enforced),
        containment=(wire.Containment.UNSPECIFIED if status.containment is None else _CONTAINMENTS[status.containment]),
        leftover_processes=status.leftover_processes,
        labels=dict(status.labels),
    )


def _result(status: Status) -> Any:
    if status.exit_code is not None:
        return Oneof("exit_code", status.exit_code)
    if status.signal is not None:
        return Oneof("signaled", wire.Signaled(signal=status.signal, core_dumped=status.core_dumped))
    if status.errno is not None:
        return Oneof("start_failure", wire.StartFailure(error_number=status.errno, message=os.strerror(status.errno)))
    return None


def output_message(event: OutputEvent, *, timestamps: bool) -> wire.ProcessOutput:
    match event:
        case Chunk(stream, offset, data, at):
            time = _timestamp(at) if timestamps else None
            chunk = wire.Chunk(stream=_STREAMS[stream], offset=offset, data=data, time=time)
            message: Any = Oneof("chunk", chunk)
        case Truncated(start, end):
            message = Oneof("truncated", wire.Truncated(start=start, end=end))
        case End(status):
            message = Oneof("end", status_message(status))
    return wire.ProcessOutput(event=message)


def _timestamp(at: float | None) -> Timestamp | None:
    if at is None:
        return None
    seconds, nanos = divmod(round(at * 1_000_000), 1_000_000)  # a float of today is exact to a microsecond
    return Timestamp(seconds=seconds, nanos=nanos * 1000)


def _duration(seconds: float) -> Duration:
    whole, nanos = divmod(round(seconds * 1_000_000), 1_000_000)
    return Duration(seconds=whole, nanos=nanos * 1000)


# errors


def wire_error(error: JobError, **metadata: str) -> ConnectError:
    """``metadata`` goes into the ErrorInfo, beside the id of a job that could not start."""
    message = _encodable(error.message)
    return ConnectError(_wire_code(error.code), message, _details(error, message, metadata))


def _encodable(text: str) -> str:
    """File names that are not UTF-8 are quoted in messages, and cannot be sent as they are."""
    return text.encode(errors="backslashreplace").decode()


def _wire_code(code: Code) -> WireCode:
    return WireCode.CANCELED if code is Code.CANCELLED else WireCode[code.name]


def _details(error: JobError, message: str, metadata: dict[str, str]) -> Iterable[Message]:
    if error.job_id:
        metadata = metadata | {"process_id": error.job_id}
    if error.reason or metadata:
        yield details.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if error.field:
        violation = details.BadRequest.FieldViolation(field=error.field, description=message)
        yield details.BadRequest(field_violations=[violation])
    if error.retry_after_s is not None:
        yield details.RetryInfo(retry_delay=_duration(error.retry_after_s))
