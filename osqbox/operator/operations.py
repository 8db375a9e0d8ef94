"""One decorator per route: what it reads, what it answers, and so what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec
import trio
from quart import request
from quart_schema.documentation import document_querystring, document_request, document_response
from quart_trio.wrappers import TrioResponse

from osqbox.errors import Refused

from .answers import JSON

SEQ_MAX = 2**63 - 1
"""The largest number SQLite keeps."""

S = TypeVar("S")
Handler = Callable[..., Awaitable[TrioResponse]]

INLINE_DECODE_BYTES = 256 * 1024
"""Larger bodies are decoded in a thread, so that one big config delays nobody."""
SLASH = "\0"
"""Stands for a slash inside a path's word while Quart looks for the route (see `app.one_piece`)."""


class Query(msgspec.Struct, forbid_unknown_fields=True):
    """Base of query strings: an unknown or misspelt parameter is refused. A tuple is a parameter given repeatedly."""


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of request bodies."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What quart-schema has no place for."""

    media: dict[int, str]
    """Media type of each documented answer."""
    or_json: Any
    """Shape of the answer in JSON, where a parameter chooses between the two; else None."""
    or_events: Any
    """Shape of an event, where the Accept header chooses between the two; else None."""
    takes_text: bool
    takes_octets: bool
    """The body is not the route's to read: see `upgrades`."""
    is_open: bool
    """Answered without a token."""
    takes_basic: bool = False
    """For programs that know only Basic: the token may be the password. Such a GET is guarded like a change, because
    browsers send what they once asked for along with every page's requests."""


def operation(
    answer: Any,
    *,
    status: int = 200,
    media: str = JSON,
    or_json: Any = None,
    or_events: Any = None,
    query: type[Query] | None = None,
    body: type[Body] | None = None,
    takes_text: bool = False,
    takes_octets: bool = False,
    is_open: bool = False,
    takes_basic: bool = False,
    also: dict[int, Any] | None = None,
) -> Callable[[Handler], Handler]:
    """Parses ``query`` and ``body`` and hands them to the handler under these names.

    ``answer`` is the shape of the answer, of one line or event of it when ``media`` is a stream; ``also`` are other
    statuses that are no failure, ``or_json`` is the shape when a parameter turns a stream into one JSON answer, and
    ``or_events`` that of an event for who accepts events only.
    With ``takes_text`` the body is plain text and comes as ``text``.
    """

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def run(**words: str) -> TrioResponse:
            arguments: dict[str, Any] = {name: word.replace(SLASH, "/") for name, word in words.items()}
            if query is not None:
                arguments["query"] = _parse_query(query)
            if body is not None:
                arguments["body"] = await _parse_body(body)
            if takes_text:
                arguments["text"] = await _parse_text()
            return await handler(**arguments)

        if query is not None:
            document_querystring(query)(run)
        if body is not None:
            document_request(body)(run)
        answers = {status: answer, **(also or {})}
        for code, shape in answers.items():
            document_response(shape, code)(run)
        run.operation = Operation(  # type: ignore[attr-defined]
            dict.fromkeys(answers, media), or_json, or_events, takes_text, takes_octets, is_open, takes_basic
        )
        return run

    return decorate


def open_page(handler: Handler) -> Handler:
    """A page: no part of the API, and answered without its token, for it asks for a cookie of its own."""
    handler.operation = Operation({}, None, None, takes_text=False, takes_octets=False, is_open=True)  # type: ignore[attr-defined]
    return handler


def operation_of(handler: Any) -> Operation | None:
    return getattr(handler, "operation", None)


@lru_cache(maxsize=64)
def _lists(shape: type[Query]) -> frozenset[str]:
    return frozenset(field.name for field in msgspec.structs.fields(shape) if _is_list(field.type))


def _is_list(kind: Any) -> bool:
    return get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) is tuple


def _parse_query(shape: type[S]) -> S:
    lists = _lists(shape)  # type: ignore[arg-type]
    given = {name: request.args.getlist(name) if name in lists else value for name, value in request.args.items()}
    try:
        return msgspec.convert(given, shape, strict=False)
    except msgspec.ValidationError as error:
        raise Refused("bad_query", f"query: {error}") from None


async def _parse_body(shape: type[S]) -> S:
    data = await _data()
    if data and request.mimetype != JSON:
        raise Refused("wrong_media", f"Content-Type: expected {JSON}, got {request.mimetype[:40]!r}", status=415)
    if len(data) > INLINE_DECODE_BYTES:
        return await trio.to_thread.run_sync(_decode, data, shape)
    return _decode(data, shape)


def _decode(data: bytes, shape: type[S]) -> S:
    try:
        return msgspec.json.decode(data or b"{}", type=shape)
    except msgspec.ValidationError as error:
        raise Refused("bad_body", f"body: {error}") from None
    except UnicodeDecodeError:
        raise Refused("bad_body", "body: expected UTF-8, got bytes that are not") from None
    except msgspec.DecodeError as error:
        raise Refused("bad_body", f"body: expected JSON: {error}") from None
    except RecursionError:
        raise Refused("bad_body", "body: JSON nested deeper than is read") from None


async def _parse_text() -> str:
    data = await _data()
    if request.mimetype not in ("", "text/plain", "application/octet-stream"):
        raise Refused("wrong_media", f"Content-Type: expected text/plain, got {request.mimetype[:40]!r}", status=415)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Refused("bad_body", "body: expected UTF-8, got bytes that are not") from None


async def _data() -> bytes:
    data = await request.get_data(cache=False)
    assert isinstance(data, bytes)
    return data
