"""Every refusal of the job runner, with the gRPC status it becomes. Pure."""

from __future__ import annotations

from enum import Enum

from osqbox.errors import OsqboxError


class Code(Enum):
    """gRPC's own numbers (grpc.github.io, status codes); the HTTP status is Connect's."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class JobError(OsqboxError):
    """A call that is refused. ``message`` says expected, got and what to do; it never quotes another owner's job.

    ``reason`` is a stable word for programs (google.rpc.ErrorInfo); ``field`` names the guilty request field
    (google.rpc.BadRequest); ``retry_after_s`` becomes google.rpc.RetryInfo; ``job_id`` is the row that was kept of a
    job that could not start.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        retry_after_s: float | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.job_id = job_id


def invalid(field: str, message: str) -> JobError:
    return JobError(Code.INVALID_ARGUMENT, f"{field}: {message}", reason="INVALID_FIELD", field=field)


def not_found(job_id: str) -> JobError:
    """Also for another owner's job: the same text, so that nobody learns which ids exist."""
    return JobError(Code.NOT_FOUND, f"no job {job_id!r}", reason="JOB_NOT_FOUND")


LATER_S = 5.0
"""When it is worth trying again what is beyond a bound."""


def exhausted(reason: str, message: str) -> JobError:
    """Beyond a bound now; later there may be room."""
    return JobError(Code.RESOURCE_EXHAUSTED, message, reason=reason, retry_after_s=LATER_S)
