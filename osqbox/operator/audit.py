"""The audit: who did what, followed, and its chain walked."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import audit

from .answers import NDJSON, encoded, read_answer, streamed
from .ear import KEEP_ALIVE_S, Ear
from .operations import SEQ_MAX, Query, operation
from .parts import Parts

NEWEST_ROWS = 100
PAGE_ROWS = 1000
LOOK_S = 1.0
"""A row without an event of the feed is seen by followers within this time."""


class Which(Query):
    after: Annotated[int, Meta(ge=0, le=SEQ_MAX, description="The seq of the last row the reader has.")] | None = None
    limit: (
        Annotated[int, Meta(ge=1, le=10_000_000, description="The newest so many (100), or at most so many after.")]
        | None
    ) = None
    action: Annotated[str | None, Meta(description="Such as job.run, or all of a system, such as job.")] = None
    actor: str | None = None
    subject: Annotated[str | None, Meta(description="Id of what was acted on.")] = None
    follow: Annotated[bool, Meta(description="Go on with new rows as they come.")] = False

    def filters(self) -> dict[str, str | None]:
        return {"action": self.action, "actor": self.actor, "subject": self.subject}


class AuditRow(msgspec.Struct):
    """Who did what to what, with which certificate, and what came of it."""

    seq: int
    at: str
    tenant: str | None
    actor: str
    serial: str | None
    address: str
    action: str
    subject: str
    result: str
    data: dict[str, Any]
    chain: str


class ChainVerdict(msgspec.Struct):
    """`broken_at` is the seq of the first row that does not fit the one before it, null when all do.

    Rows cut off at the end leave a chain that fits: note `last_seq` and `chain` elsewhere to notice that.
    """

    rows: int
    broken_at: int | None
    last_seq: int
    chain: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/audit")
    @operation(AuditRow, media=NDJSON, query=Which)
    async def list_audit(query: Which) -> TrioResponse:
        """The newest rows that fit, oldest first, or those after a seq; with ``follow`` the ones to come as well."""
        tail = _Tail(parts, query)
        await tail.begin()
        return streamed(_followed(parts, tail) if query.follow else _stored(tail), NDJSON)

    @routes.get("/audit/verify")
    @operation(ChainVerdict)
    async def verify_audit() -> TrioResponse:
        """Whether a row was changed, removed or slipped in since it was written."""
        return await read_answer(parts.store, _verdict)


def _verdict(db: sqlite3.Connection) -> ChainVerdict:
    verdict = audit.verify(db)
    last_seq, chain = audit.last(db)
    return ChainVerdict(verdict.rows, verdict.broken_at, last_seq, chain)


class _Tail:
    """A place in the audit, moving on page by page."""

    def __init__(self, parts: Parts, which: Which) -> None:
        self._store = parts.store
        self._which = which
        self._after = which.after or 0
        self._until = 0
        self._left = which.limit

    async def begin(self) -> None:
        """Find the place: the newest rows, unless the reader said after which."""
        if self._which.after is None:
            newest = self._which.limit or NEWEST_ROWS
            rows = await self._store.read(
                lambda db: audit.rows(db, limit=newest, newest=True, **self._which.filters())  # type: ignore[arg-type]
            )
            self._after = rows[0]["seq"] - 1 if rows else self._store.peek(audit.last)[0]
            self._left = None
        self._until = self._store.peek(audit.last)[0]

    @property
    def is_done(self) -> bool:
        return self._left == 0 or self._after >= self._until

    @property
    def is_behind(self) -> bool:
        return self._left != 0 and self._store.peek(audit.last)[0] > self._after

    async def page(self) -> bytes:
        """The next rows in lines; nothing when there are none now."""
        limit = PAGE_ROWS if self._left is None else min(PAGE_ROWS, self._left)

        def read(db: sqlite3.Connection) -> tuple[int, list[dict[str, Any]]]:
            reached = audit.last(db)[0]
            return reached, audit.rows(db, after=self._after, limit=limit, **self._which.filters())  # type: ignore[arg-type]

        reached, rows = await self._store.read(read)
        # Fewer than asked for: there are no others up to the end, so they need not be looked through again.
        self._after = rows[-1]["seq"] if len(rows) == limit else max(self._after, reached)
        self._left = None if self._left is None else self._left - len(rows)
        return b"".join(encoded(row) + b"\n" for row in rows)


async def _stored(tail: _Tail) -> AsyncGenerator[bytes, None]:
    while not tail.is_done:
        yield await tail.page()


async def _followed(parts: Parts, tail: _Tail) -> AsyncGenerator[bytes, None]:
    with Ear(parts.feed, parts.stopping) as ear:
        yield b"\n"  # Hypercorn sends the head with the first bytes of the body
        alive_at = trio.current_time()
        while not ear.stopped:
            text = await tail.page() if tail.is_behind else b""
            if text or trio.current_time() >= alive_at + KEEP_ALIVE_S:
                yield text or b"\n"
                alive_at = trio.current_time()
            else:
                await ear.wait(lambda _: True, within_s=LOOK_S)
