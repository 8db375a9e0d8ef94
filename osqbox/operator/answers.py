"""How every answer looks: JSON, a failure in one shape, or a stream."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import trio
from quart import request
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException

from osqbox.comms.errors import CommsError
from osqbox.errors import Refused, UserError
from osqbox.jobs.errors import Code, JobError
from osqbox.store import Store

log = logging.getLogger(__name__)

JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"

# Service functions raise one error for what is asked wrongly; a status wants to know which way.
_MISSING = re.compile(r"no (node|tenant|campaign|carve|config source)\b|.* has no (secret|YARA rule|version) ")
_CONFLICT = re.compile(r".*(exists already|in use already|exists in another tenant|belongs to origin)")


class Problem(msgspec.Struct, frozen=True):
    """Something wrong in a config."""

    path: str
    """Where, such as `schedule.proc.query`; empty for the whole."""
    severity: str
    """`error` or `warning`."""
    message: str


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why nothing was done, and what to type next."""

    error: str
    reason: str
    """One stable word."""
    hint: str | None = None
    problems: list[Problem] | msgspec.UnsetType = msgspec.UNSET
    job: str | msgspec.UnsetType = msgspec.UNSET
    """Of a job that could not be started: its id, under which it is kept."""


class Unacceptable(Exception):
    """A config that is refused for its problems."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("config refused: expected one without errors")
        self.problems = problems


def _plain(value: Any) -> Any:
    """What facts may hold besides JSON's own types."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"not JSON: {type(value).__name__}")


def encoded(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=_plain)


def answered(value: Any, status: int = 200) -> TrioResponse:
    """One JSON answer."""
    return TrioResponse(encoded(value), status=status, content_type=JSON)


async def read_answer(store: Store, work: Callable[[sqlite3.Connection], Any]) -> TrioResponse:
    """What a read returns, also encoded in the reader's thread."""
    return TrioResponse(await store.read(lambda db: encoded(work(db))), content_type=JSON)


def streamed(parts: AsyncGenerator[bytes, None], content_type: str) -> TrioResponse:
    """A body sent as it comes, without a limit in time. HEAD gets the head only, and at once."""
    if request.method == "HEAD":
        return TrioResponse(b"", content_type=content_type)
    response = TrioResponse(parts, content_type=content_type)
    response.timeout = None
    return response


def failed(failure: Failure, status: int) -> TrioResponse:
    return answered(failure, status)


async def explain(error: Exception) -> TrioResponse:
    """The answer to anything that was raised; only what was meant for a reader is shown to one."""
    match error:
        case Refused():
            return failed(Failure(error=error.message, reason=error.reason), error.status)
        case Unacceptable():
            return failed(Failure(error=str(error), reason="bad_config", problems=error.problems), 400)
        case JobError():
            return _explain_job_error(error)
        case CommsError():
            return _explain_comms_error(error)
        case UserError():
            return _explain_user_error(error)
        case HTTPException():
            return _explain_http(error)
        case trio.ClosedResourceError():
            return failed(Failure(error="the box is stopping", reason="stopping"), 503)
        case OverflowError():
            return failed(
                Failure(error="expected numbers of at most 64 bits, got a larger one", reason="bad_usage"), 400
            )
        case sqlite3.OperationalError():
            log.error("the database failed", exc_info=error)
            return failed(
                Failure(error=f"the database cannot be used: {error}", reason="storage", hint="osqbox doctor"), 500
            )
    log.error("internal error", exc_info=error)
    return failed(Failure(error="internal error; the box's log has it", reason="internal"), 500)


_JOB_STATUSES = MappingProxyType(
    {
        Code.INVALID_ARGUMENT: 400,
        Code.UNAUTHENTICATED: 401,
        Code.PERMISSION_DENIED: 403,
        Code.NOT_FOUND: 404,
        Code.ALREADY_EXISTS: 409,
        Code.FAILED_PRECONDITION: 409,
        Code.OUT_OF_RANGE: 416,
        Code.RESOURCE_EXHAUSTED: 429,
        Code.UNIMPLEMENTED: 501,
        Code.UNAVAILABLE: 503,
        Code.DEADLINE_EXCEEDED: 504,
    }
)


def _explain_job_error(error: JobError) -> TrioResponse:
    reason = (error.reason or error.code.name).lower()
    failure = Failure(error=error.message, reason=reason, job=error.job_id or msgspec.UNSET)
    response = failed(failure, _JOB_STATUSES.get(error.code, 500))
    if error.retry_after_s:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return response


_LISTED = MappingProxyType(
    {
        "Agent": "osqbox comms agents",
        "Command": "osqbox comms commands",
        "Group": "osqbox comms config",
        "Tenant": "osqbox tenants",
    }
)
"""Where somebody who asked for what does not exist finds what does."""


def _explain_comms_error(error: CommsError) -> TrioResponse:
    hint = _LISTED.get(error.message.partition(" ")[0]) if error.status == 404 else None
    response = failed(Failure(error=error.message, reason=error.reason, hint=hint), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _explain_user_error(error: UserError) -> TrioResponse:
    text = str(error)
    status, reason = 400, "bad_usage"
    if _MISSING.match(text):
        status, reason = 404, "not_found"
    elif _CONFLICT.match(text):
        status, reason = 409, "conflict"
    return failed(Failure(error=text, reason=reason, hint=error.hint), status)


_HTTP_REASONS = {
    404: ("unknown_path", "no such path; the API is under /api/v1/ and described by /api/v1/openapi.json"),
    405: ("wrong_method", "this path does not take that method"),
    408: ("body_timeout", "the request's body did not arrive in time"),
    413: ("too_large", "the request's body is larger than is accepted"),
}


def _explain_http(error: HTTPException) -> TrioResponse:
    code = error.code if error.code is not None and error.code >= 400 else 404
    reason, text = _HTTP_REASONS.get(code, ("bad_request", error.description or error.name))
    response = failed(Failure(error=text, reason=reason), code)
    for name, value in error.get_headers():
        if name.lower() == "allow":
            response.headers[name] = value
    return response
