"""osquery's remote API as it is on the wire: bytes to frozen messages and back. Pure.

Shapes follow osquery 5.23 (``plugins/remote/enroll``, ``plugins/logger``, ``plugins/distributed``,
``osquery/carver``) and the oddities of older agents and simulators: string statuses, missing members, gzip.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from osqbox.errors import Refused

M = TypeVar("M")

GZIP_MAGIC = b"\x1f\x8b"
LOG_TYPES = ("result", "status")
GZIP_MEMBERS = 16
DEPTH_MAX = 64
"""Levels of JSON; osquery itself reads 32."""
ONE_KIND = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
VALUES_MAX = 6_000_000
"""Values in one body: a list of nothing much takes twenty times its length in memory."""
VALUES_COUNTED_BYTES = 1024 * 1024
"""Shorter bodies hold too few values to be counted."""


class Keyed(msgspec.Struct, frozen=True):
    """Config and distributed read: only who is asking."""

    node_key: str | None = None


class LogBatch(msgspec.Struct, frozen=True):
    log_type: str
    data: list[msgspec.Raw] | None
    node_key: str | None = None


class WriteBody(msgspec.Struct, frozen=True):
    queries: dict[str, Any] | None = None
    statuses: dict[str, int | str | None] | None = None
    messages: dict[str, str | None] | None = None
    stats: dict[str, Any] | None = None
    node_key: str | None = None


class CarveBegin(msgspec.Struct, frozen=True):
    block_count: int | str
    block_size: int | str
    carve_size: int | str
    carve_id: str = ""
    request_id: str = ""
    node_key: str | None = None


class CarveBlock(msgspec.Struct, frozen=True):
    block_id: int | str
    session_id: str
    data: str
    request_id: str = ""
    node_key: str | None = None


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """One line as it is kept: the text exactly as osquery wrote it, and what is looked up by."""

    text: str
    name: str | None
    action: str | None
    unix_time: int | None


class Answer(msgspec.Struct, frozen=True):
    """What one node said to one query."""

    name: str
    ok: bool
    status: int
    rows: list[dict[str, Any]]
    message: str
    stats: dict[str, Any]


def decoded_body(headers: Mapping[str, str], body: bytes, limit_bytes: int) -> bytes:
    """The body without its gzip. Raises Refused for a bad, truncated or over-long stream."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise Refused("bad_encoding", f"Content-Encoding: expected gzip or none, got {encoding[:40]!r}", status=415)
    if not body.startswith(GZIP_MAGIC) and encoding in ("", "identity"):
        return body
    return _gunzip(body, limit_bytes)


def _gunzip(body: bytes, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    left_bytes = limit_bytes
    for _ in range(GZIP_MEMBERS):
        stream = zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(body, left_bytes + 1)
        except zlib.error as error:
            raise Refused("bad_gzip", f"body: expected gzip, got a broken stream ({error})") from None
        left_bytes -= len(part)
        if left_bytes < 0:
            raise Refused("too_large", f"body: more than {limit_bytes} bytes after gunzip", status=413)
        if not stream.eof:
            raise Refused("truncated_gzip", "body: the gzip stream ends before its end")
        parts.append(part)
        body = stream.unused_data
        if not body:
            return b"".join(parts)
    raise Refused("bad_gzip", f"body: expected at most {GZIP_MEMBERS} gzip streams, got more")


def decode(body: bytes, shape: type[M]) -> M:
    """A message from a body. Raises Refused with expected, got and where; an empty body is no message."""
    if not body.strip():
        raise Refused("empty_body", "body: expected a JSON object, got nothing")
    if len(body) > VALUES_COUNTED_BYTES and sum(body.count(mark) for mark in b",[{") > VALUES_MAX:
        raise Refused("too_large", f"body: expected at most {VALUES_MAX} JSON values", status=413)
    try:
        message = msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise Refused("wrong_type", f"body: {error}") from None
    except UnicodeDecodeError:
        raise Refused("invalid_utf8", "body: expected UTF-8, got bytes that are not") from None
    except msgspec.DecodeError as error:
        raise Refused("bad_json", f"body: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if _is_deeper_than(body, DEPTH_MAX):  # how deep msgspec itself goes depends on the Python version
        raise _too_deep()
    return message


def _too_deep() -> Refused:
    return Refused("too_deep", f"body: expected at most {DEPTH_MAX} levels of JSON")


def _is_deeper_than(valid: bytes, levels: int) -> bool:
    """Whether valid JSON nests deeper: without its strings, each pass over its brackets takes one level off."""
    if valid.count(b"[") + valid.count(b"{") <= levels:
        return False
    brackets = b"".join(valid.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = brackets.translate(ONE_KIND, NO_BRACKETS)
    for _ in range(levels):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def as_utf8(body: bytes) -> bytes:
    """The body with a replacement character for each byte that is no UTF-8.

    Rows hold any bytes of a host and osqueryd writes them as they are; refused, it would send them again for ever.
    """
    return body if body.isascii() else body.decode(errors="replace").encode()


def decode_object(body: bytes) -> dict[str, Any]:
    """A body whose member names are not fixed: enrollment."""
    return decode(body, dict[str, Any])


def log_lines(batch: LogBatch) -> list[LogLine]:
    """The batch's lines. Raises Refused naming the first that is not an object."""
    if batch.log_type not in LOG_TYPES:
        raise Refused("wrong_type", f"log_type: expected result or status, got {batch.log_type[:40]!r}")
    return [_log_line(raw, index) for index, raw in enumerate(batch.data or ())]


def _log_line(raw: msgspec.Raw, index: int) -> LogLine:
    encoded = bytes(raw)
    line = decode(encoded, dict[str, Any]) if encoded[:1] == b"{" else None
    if line is None:
        raise Refused("wrong_type", f"data[{index}]: expected an object, got {encoded[:20].decode(errors='replace')!r}")
    if b"\n" in encoded or b"\r" in encoded:
        encoded = msgspec.json.format(encoded, indent=-1)
    name, action, unix_time = line.get("name"), line.get("action"), line.get("unixTime")
    return LogLine(
        encoded.decode(),
        name if isinstance(name, str) else None,
        action if isinstance(action, str) else ("snapshot" if "snapshot" in line else None),
        _whole(unix_time),
    )


def _whole(value: Any) -> int | None:
    """An integer that some agents send as a string; None when it is neither or beyond 64 bits."""
    if isinstance(value, str):
        try:
            value = int(value[:20])
        except ValueError:
            return None
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def whole(value: int | str, name: str, least: int, most: int) -> int:
    """A bounded integer member. Raises Refused."""
    number = _whole(value)
    if number is None or not least <= number <= most:
        raise Refused("wrong_type", f"{name}: expected an integer from {least} to {most}, got {str(value)[:40]!r}")
    return number


def answers(body: WriteBody) -> list[Answer]:
    """What the write says of each query it names, in its order.

    A status is 0 or not, as int or string; a query without a status succeeded, as servers have always read it.
    """
    queries, statuses = body.queries or {}, body.statuses or {}
    messages, stats = body.messages or {}, body.stats or {}
    return [
        _answer(name, queries.get(name), statuses.get(name, 0), messages.get(name), stats.get(name))
        for name in dict.fromkeys((*queries, *statuses))
    ]


def _answer(name: str, rows: Any, status: int | str | None, message: str | None, stats: Any) -> Answer:
    number = 0 if status is None or status == "" else _whole(status)
    number = 1 if number is None else number
    kept = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return Answer(name, number == 0, number, kept, message or "", stats if isinstance(stats, dict) else {})
