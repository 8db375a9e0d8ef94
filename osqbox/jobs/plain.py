"""Status and output of jobs by plain GET, for whoever has curl and a certificate.

``/api/v1/jobs``, ``/api/v1/jobs/ID`` answer JSON, ``/api/v1/jobs/ID/output`` the bytes as they are, followed to the
end of the job unless ``follow=false``. Bytes that are not kept are left out; the header ``x-output-truncated`` says so.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl

from osqbox.listen.asgi import ClientGone

from .errors import Code, JobError, invalid
from .facts import status_facts
from .messages import Caller, Chunk, OutputEvent, OutputRequest, State, Stream
from .translate import PAGE_DEFAULT, PAGE_MAX

if TYPE_CHECKING:
    from .rpc import Waits
    from .runner import JobRunner

logger = logging.getLogger("osqbox.jobs")

ROOT = "/api/v1/jobs"
OFFSET_MAX = 2**63 - 1
PARAMETERS = 100

Message: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_HTTP_STATUS: Mapping[Code, int] = MappingProxyType(
    {
        Code.INVALID_ARGUMENT: 400,
        Code.UNAUTHENTICATED: 401,
        Code.PERMISSION_DENIED: 403,
        Code.NOT_FOUND: 404,
        Code.ALREADY_EXISTS: 409,
        Code.FAILED_PRECONDITION: 400,
        Code.OUT_OF_RANGE: 416,
        Code.RESOURCE_EXHAUSTED: 429,
        Code.CANCELLED: 499,
        Code.UNIMPLEMENTED: 501,
        Code.UNAVAILABLE: 503,
        Code.DEADLINE_EXCEEDED: 504,
    }
)
_YES, _NO = frozenset(("true", "1", "yes")), frozenset(("false", "0", "no"))


def serves(path: str) -> bool:
    return path == ROOT or path.startswith(ROOT + "/")


class Plain:
    def __init__(self, runner: JobRunner, caller: Callable[[], Caller], waits: Waits) -> None:
        self._runner = runner
        self._caller = caller
        self._waits = waits

    async def answer(self, scope: Message, send: Send) -> None:
        if scope["method"] != "GET":
            wrong = JobError(Code.UNIMPLEMENTED, f"expected GET, got {scope['method']}; to change jobs, use gRPC")
            await refuse(send, wrong, 405, [(b"allow", b"GET")])
            return
        started = _Started(send)
        try:
            self._waits.refuse_when_stopping()
            query = Query(scope["query_string"].decode("latin-1"))
            await self._route(scope["path"], query, started)
        except JobError as error:
            if not started:  # else the connection ends before its body does, which every client takes for broken off
                await refuse(send, error)
        except ClientGone:
            raise
        except Exception as error:  # noqa: BLE001 - a bug answers one call, and says nothing to its client
            told = internal(f"GET {ROOT}", error)
            if not started:
                await refuse(send, told)

    async def _route(self, path: str, query: Query, send: Send) -> None:
        match path.removeprefix(ROOT).split("/")[1:]:
            case [] | [""]:
                await self._list(query, send)
            case [job]:
                query.end()
                await send_json(send, status_facts(await self._runner.status(job, self._caller())))
            case [job, "output"]:
                await self._output(job, query, send)
            case _:
                raise JobError(Code.NOT_FOUND, f"expected {ROOT}, {ROOT}/ID or {ROOT}/ID/output, got {path!r}")

    async def _list(self, query: Query, send: Send) -> None:
        states = tuple(query.word("state", State, text) for text in query.all("state"))
        labels = dict(query.pair("label", text) for text in query.all("label"))
        owner, before = query.one("owner"), query.one("before")
        limit = min(query.number("limit", 1) or PAGE_DEFAULT, PAGE_MAX)
        query.end()
        page = await self._runner.list(
            self._caller(), states=states, owner=owner, labels=labels, limit=limit, before=before
        )
        facts = {"jobs": [status_facts(status) for status in page.jobs], "next_page": page.next_page}
        await send_json(send, facts)

    async def _output(self, job: str, query: Query, send: Send) -> None:
        request = OutputRequest(
            offset=query.number("offset") or 0,
            tail_bytes=query.number("tail"),
            streams=frozenset(query.word("stream", Stream, text) for text in query.all("stream")),
            follow=query.flag("follow", otherwise=True),
        )
        query.end()
        if request.tail_bytes is not None and request.offset:
            raise invalid("tail", "expected either offset or tail, got both")
        caller = self._caller()
        status = await self._runner.status(job, caller)
        async with self._runner.output(status.id, caller, request) as events:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"x-content-type-options", b"nosniff"),
                (b"x-job-id", status.id.encode()),
                (b"x-output-truncated", b"true" if status.output_truncated else b"false"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_chunks(events, send)
        await send({"type": "http.response.body", "body": b""})

    async def _send_chunks(self, events: AsyncIterator[OutputEvent], send: Send) -> None:
        while True:
            with self._waits.interruptible():
                event = await anext(events, None)
            if event is None:
                return
            if isinstance(event, Chunk):
                await send({"type": "http.response.body", "body": event.data, "more_body": True})


class _Started:
    """A ``send`` that knows whether the answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    def __bool__(self) -> bool:
        return self._begun

    async def __call__(self, message: Message) -> None:
        self._begun = True
        await self._send(message)


class Query:
    """A query string, parameter by parameter; `end` refuses what nobody asked for."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, list[str]] = {}
        if text.count("&") >= PARAMETERS:
            raise invalid("query", f"expected at most {PARAMETERS} parameters, got more")
        for name, value in parse_qsl(text, keep_blank_values=True):
            self._values.setdefault(name, []).append(value)

    def all(self, name: str) -> list[str]:
        return self._values.pop(name, [])

    def one(self, name: str) -> str | None:
        values = self.all(name)
        if len(values) > 1:
            raise invalid(name, f"expected once, got {len(values)} times")
        return values[0] if values else None

    def number(self, name: str, least: int = 0) -> int | None:
        text = self.one(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= OFFSET_MAX):
            raise invalid(name, f"expected a number from {least} on, got {text!r}")
        return int(text)

    def flag(self, name: str, *, otherwise: bool) -> bool:
        text = self.one(name)
        if text is None:
            return otherwise
        if text not in _YES | _NO:
            raise invalid(name, f"expected true or false, got {text!r}")
        return text in _YES

    def word(self, name: str, words: Any, text: str) -> Any:
        if text not in list(words):
            raise invalid(name, f"expected one of {', '.join(words)}, got {text!r}")
        return words(text)

    def pair(self, name: str, text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise invalid(name, f"expected KEY=VALUE, got {text!r}")
        return key, value

    def end(self) -> None:
        for name in self._values:
            raise invalid(name, "expected no such parameter")


def internal(what: str, error: Exception) -> JobError:
    """The client gets a number to ask about; what happened, which may quote others' secrets, is for the log."""
    number = secrets.token_hex(6)
    logger.error("%s failed (error %s)", what, number, exc_info=error)
    return JobError(Code.INTERNAL, f"internal error {number}; the server's log says more")


async def refuse(
    send: Send, error: JobError, status: int | None = None, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """The error as JSON: ``error`` is the sentence, ``code`` the gRPC status."""
    facts = {"error": error.message, "code": error.code.name, "reason": error.reason or None, "field": error.field}
    if error.retry_after_s:
        headers = [*headers, (b"retry-after", b"%d" % max(1, round(error.retry_after_s)))]
    await send_json(send, facts, status or _HTTP_STATUS.get(error.code, 500), headers)


async def send_json(
    send: Send, facts: Mapping[str, object], status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    body = json.dumps(facts).encode() + b"\n"
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
