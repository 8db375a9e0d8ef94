"""The runner's words as the client sends and reads them in protobuf. What a newer server says in words unknown here
is left out rather than refused."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING

from protobuf import Oneof
from protobuf.wkt.google.protobuf.duration_pb import Duration

from osqbox.jobs.messages import (
    Chunk,
    Containment,
    End,
    JobSpec,
    Limits,
    OutputEvent,
    OutputRequest,
    Reason,
    State,
    Status,
    Stream,
    Truncated,
    Usage,
)
from osqbox.jobs.v1 import jobs_pb as pb

if TYPE_CHECKING:
    from protobuf.wkt.google.protobuf.timestamp_pb import Timestamp

_TO_STREAM = MappingProxyType(
    {Stream.STDOUT: pb.Stream.STDOUT, Stream.STDERR: pb.Stream.STDERR, Stream.MIXED: pb.Stream.MERGED}
)
_STREAM = MappingProxyType({wire: word for word, wire in _TO_STREAM.items()})
_REASON = MappingProxyType(
    {
        pb.EndReason.EXIT: Reason.EXIT,
        pb.EndReason.STOPPED_BY_USER: Reason.STOPPED,
        pb.EndReason.TIMEOUT: Reason.TIMEOUT,
        pb.EndReason.OOM: Reason.OOM,
        pb.EndReason.OUTPUT_LIMIT: Reason.OUTPUT_LIMIT,
        pb.EndReason.SERVER_SHUTDOWN: Reason.SHUTDOWN,
        pb.EndReason.LOST: Reason.LOST,
    }
)


def duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else Duration.from_seconds(seconds)


def to_states(states: Iterable[State]) -> list[pb.State]:
    return [pb.State[state.name] for state in states]


def to_run(spec: JobSpec) -> pb.RunProcessRequest:
    return pb.RunProcessRequest(
        command=spec.command,
        args=list(spec.args),
        env=dict(spec.env),
        working_dir=spec.cwd or b"",
        run_as=spec.run_as or "",
        limits=_to_limits(spec.limits),
        timeout=duration(spec.timeout_s),
        stop_grace=duration(spec.stop_grace_s),
        stop_signal=spec.stop_signal,
        output_mode=pb.OutputMode[spec.output_mode.name],
        max_output_bytes=spec.max_output_bytes or 0,
        overflow=pb.OverflowPolicy[spec.overflow.name],
        open_stdin=spec.open_stdin,
        keep_leftovers=spec.keep_leftovers,
        idempotency_key=spec.idempotency_key or "",
        labels=dict(spec.labels),
        link_output=spec.link_output,
    )


def _to_limits(limits: Limits) -> pb.Limits:
    return pb.Limits(
        memory_bytes=limits.memory_bytes or 0,
        cpu_cores=limits.cpu_cores or 0.0,
        cpu_time=duration(limits.cpu_time_s),
        processes=limits.processes or 0,
        open_files=limits.open_files or 0,
        file_bytes=limits.file_bytes or 0,
    )


def to_output(job: str, request: OutputRequest) -> pb.ProcessOutputRequest:
    return pb.ProcessOutputRequest(
        process_id=job,
        offset=request.offset,
        streams=[_TO_STREAM[stream] for stream in sorted(request.streams)],
        no_follow=not request.follow,
        tail_bytes=request.tail_bytes,
        timestamps=True,
    )


def status(wire: pb.ProcessStatus | None) -> Status:
    wire = wire or pb.ProcessStatus()
    exit_code = signal = errno = None
    core_dumped = False
    match wire.result:
        case Oneof("exit_code", int() as code):
            exit_code = code
        case Oneof("signaled", pb.Signaled() as signaled):
            signal, core_dumped = signaled.signal, signaled.core_dumped
        case Oneof("start_failure", pb.StartFailure() as failure):
            errno = failure.error_number
    return Status(
        id=wire.process_id,
        owner=wire.owner,
        run_as=wire.run_as,
        command=wire.command,
        args=tuple(wire.args),
        state=_state(wire.state),
        created_at=_seconds(wire.created_at) or 0.0,
        pid=wire.pid or None,
        started_at=_seconds(wire.started_at),
        ended_at=_seconds(wire.ended_at),
        exit_code=exit_code,
        signal=signal,
        core_dumped=core_dumped,
        errno=errno,
        reason=_REASON.get(wire.reason),
        stopped_by=wire.stopped_by or None,
        output_bytes=wire.output_bytes,
        stdout_bytes=wire.stdout_bytes,
        stderr_bytes=wire.stderr_bytes,
        output_truncated=wire.output_truncated,
        output_drained=wire.output_drained,
        usage=_usage(wire.usage),
        containment=_containment(wire.containment),
        enforced=tuple(wire.enforced),
        leftover_processes=wire.leftover_processes,
        labels=dict(wire.labels),
    )


def event(wire: pb.ProcessOutput) -> OutputEvent | None:
    """None for a kind of event that is not known here."""
    match wire.event:
        case Oneof("chunk", pb.Chunk() as chunk):
            stream = _STREAM.get(chunk.stream, Stream.MIXED)
            return Chunk(stream, chunk.offset, chunk.data, _seconds(chunk.time) or 0.0)
        case Oneof("truncated", pb.Truncated() as truncated):
            return Truncated(truncated.start, truncated.end)
        case Oneof("end", pb.ProcessStatus() as end):
            return End(status(end))
    return None


def _state(wire: pb.State) -> State:
    return State.__members__.get(wire.name, State.PENDING)


def _containment(wire: pb.Containment) -> Containment | None:
    return Containment.__members__.get(wire.name)


def _usage(wire: pb.Usage | None) -> Usage:
    if wire is None:
        return Usage()
    user, system = wire.user_time, wire.system_time
    return Usage(user.to_seconds() if user else 0.0, system.to_seconds() if system else 0.0, wire.max_rss_bytes)


def _seconds(wire: Timestamp | None) -> float | None:
    return None if wire is None else wire.to_seconds()
