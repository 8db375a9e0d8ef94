"""Log lines: searched, followed, exported."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.errors import BadUsage
from osqbox.feed import Gap
from osqbox.osquery import logs, nodes
from osqbox.osquery.logs import LogFilter

from .answers import NDJSON, streamed
from .ear import Ear, Heard
from .operations import SEQ_MAX, Query, operation
from .parts import Parts

NEWEST_LINES = 100
PAGE_LINES = 1000
LINES_MAX = 10_000_000

Kind = Literal["result", "snapshot", "status"]


class Exported(Query):
    """One kind of line, as osqueryd's own log files keep them apart."""

    type: Annotated[Kind, Meta(description="result: differences, single or in batches; snapshot; status.")] = "result"
    tenant: str | None = None
    node: Annotated[str | None, Meta(description="Id, its beginning, hostname or host identifier.")] = None


class Wanted(Query):
    type: Annotated[Kind | None, Meta(description="result includes snapshots, which are stored as results.")] = None
    tenant: str | None = None
    node: Annotated[str | None, Meta(description="Id, its beginning, hostname or host identifier.")] = None
    name: Annotated[str | None, Meta(description="Name of the scheduled query.")] = None
    search: Annotated[str | None, Meta(description="Text that the line contains.")] = None
    after: Annotated[int, Meta(ge=0, le=SEQ_MAX, description="The seq of the last line the reader has.")] | None = None
    limit: (
        Annotated[int, Meta(ge=1, le=LINES_MAX, description="The newest so many (100), or at most so many after.")]
        | None
    ) = None
    follow: Annotated[bool, Meta(description="Go on with new lines as they arrive.")] = False


class LogLine(msgspec.Struct):
    """A line as osquery wrote it, and what the box knows about it."""

    seq: int
    tenant: str
    node: str
    log_type: Literal["result", "status"]
    received_at: str
    line: dict[str, Any]


class _Row(msgspec.Struct):
    seq: int
    line: msgspec.Raw


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/logs")
    @operation(LogLine, media=NDJSON, query=Wanted)
    async def find_logs(query: Wanted) -> TrioResponse:
        """The newest lines that fit, oldest first, or those after a seq; with ``follow`` the ones to come as well."""
        tail = await parts.store.read(lambda db: _tail(parts, db, query))
        return streamed(_followed(parts, tail) if query.follow else _stored(tail), NDJSON)

    @routes.get("/logs/export")
    @operation(dict[str, Any], media=NDJSON, query=Exported)
    async def export_logs(query: Exported) -> TrioResponse:
        """Lines exactly as osquery's filesystem logger writes them, oldest first."""
        tail = await parts.store.read(lambda db: _exported_tail(parts, db, query))
        return streamed(_exported(tail), NDJSON)


class _Tail:
    """A place in the log, moving on page by page."""

    def __init__(self, parts: Parts, which: LogFilter, after: int, until: int, limit: int | None = None) -> None:
        self._store = parts.store
        self.which = which
        self._after = after
        self._until = until
        self._left = limit

    async def page(self) -> list[bytes]:
        """The next lines; none when there are none now."""
        reached, lines = await self._store.read(self._read)
        self._left = None if self._left is None else self._left - len(lines)
        self._after = _seq(lines[-1]) if lines else max(self._after, reached)
        return lines

    def _read(self, db: sqlite3.Connection) -> tuple[int, list[bytes]]:
        # The end first: what is not found before it will not be, so that it need not be searched again.
        limit = PAGE_LINES if self._left is None else min(PAGE_LINES, self._left)
        return logs.last_seq(db), logs.find(db, self.which, after=self._after, limit=limit)

    @property
    def done(self) -> bool:
        """All that was there at the beginning, or as much as was wanted, was read."""
        return self._left == 0 or self._after >= self._until


def _seq(line: bytes) -> int:
    return msgspec.json.decode(line, type=_Row).seq


async def _stored(tail: _Tail) -> AsyncGenerator[bytes, None]:
    while not tail.done and (lines := await tail.page()):
        yield b"".join(line + b"\n" for line in lines)


async def _exported(tail: _Tail) -> AsyncGenerator[bytes, None]:
    while not tail.done and (lines := await tail.page()):
        yield b"".join(bytes(msgspec.json.decode(line, type=_Row).line) + b"\n" for line in lines)


async def _followed(parts: Parts, tail: _Tail) -> AsyncGenerator[bytes, None]:
    def hear(heard: Heard) -> bool:
        return isinstance(heard, Gap) or (heard.kind == "log_received" and _concerns(tail.which, heard))

    with Ear(parts.feed, parts.stopping) as ear:
        yield b"\n"  # Hypercorn sends the head with the first bytes of the body
        while not ear.stopped:
            if lines := await tail.page():
                yield b"".join(line + b"\n" for line in lines)
            elif not await ear.wait(hear):
                yield b"\n"


def _concerns(which: LogFilter, heard: Any) -> bool:
    return which.node in (None, heard.node) and which.tenant in (None, heard.tenant)


def _tail(parts: Parts, db: sqlite3.Connection, query: Wanted) -> _Tail:
    which = LogFilter(
        "result" if query.type == "snapshot" else query.type,
        _node(db, query.node),
        query.tenant,
        query.name,
        query.search,
        snapshots=True if query.type == "snapshot" else None,
    )
    until = logs.last_seq(db)
    if query.after is None:
        return _Tail(parts, which, logs.before_latest(db, which, query.limit or NEWEST_LINES), until)
    return _Tail(parts, which, query.after, until, None if query.follow else query.limit)


def _exported_tail(parts: Parts, db: sqlite3.Connection, query: Exported) -> _Tail:
    is_result = query.type != "status"
    which = LogFilter(
        "result" if is_result else "status",
        _node(db, query.node),
        query.tenant,
        snapshots=(query.type == "snapshot") if is_result else None,
    )
    return _Tail(parts, which, 0, logs.last_seq(db))


def _node(db: sqlite3.Connection, word: str | None) -> str | None:
    """A node's id from any of its names; a deleted node's id is good while its lines are kept. Raises BadUsage."""
    if word is None:
        return None
    try:
        return nodes.resolve(db, word).id
    except BadUsage:
        if logs.find(db, LogFilter(node=word), limit=1):
            return word
        raise
