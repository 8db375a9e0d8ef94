"""The feed over HTTP: every event in order, kept ones first, then live."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from osqbox import feed
from osqbox.feed import Event, Gap
from osqbox.store import Store

from .answers import EVENTS, encoded, read_answer, streamed
from .ear import Ear, Heard
from .operations import SEQ_MAX, Query, operation
from .parts import Parts

PAGE_EVENTS = 500
KEEP_ALIVE = b":\n\n"


class Which(Query):
    after: Annotated[int, Meta(ge=0, le=SEQ_MAX, description="Seq of the last event the reader has.")] | None = None
    tenant: str | None = None
    kind: str | None = None
    follow: Annotated[bool, Meta(description="0: an array of kept events instead of a stream.")] = True
    limit: Annotated[int, Meta(ge=1, le=10_000, description="Of the array.")] = 1000


class EventFacts(msgspec.Struct):
    """Something that happened. In the stream `gap` with `{"missed": n}` stands for events that are gone."""

    seq: int
    at: str
    kind: str
    tenant: str | None
    node: str | None
    data: dict[str, Any]


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/stream")
    @operation(EventFacts, media=EVENTS, or_json=list[EventFacts], query=Which)
    async def follow_events(query: Which) -> TrioResponse:
        """Events as server-sent events, or with ``follow=0`` as one JSON array.

        Honours Last-Event-ID. A comment line each 15 s keeps it alive.
        """
        if not query.follow:
            return await read_answer(parts.store, lambda db: _kept(db, query))
        after = _last_event_id()
        tail = _Tail(parts.store, query, query.after if after is None else after)
        return streamed(_followed(parts, tail), EVENTS)


def _last_event_id() -> int | None:
    given = request.headers.get("Last-Event-ID", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None


def _kept(db: sqlite3.Connection, query: Which) -> list[dict[str, Any]]:
    found = feed.events_after(db, query.after or 0, tenant=query.tenant, kind=query.kind, limit=query.limit)
    return [event.as_json() for event in found]


async def _followed(parts: Parts, tail: _Tail) -> AsyncGenerator[bytes, None]:
    with Ear(parts.feed, parts.stopping) as ear:
        yield KEEP_ALIVE  # Hypercorn sends the head with the first bytes of the body
        while not ear.stopped:
            if tail.is_behind:
                await tail.catch_up()
            elif not await ear.wait(tail.hear):
                yield KEEP_ALIVE
            if text := tail.take():
                yield text


class _Tail:
    """A place in the feed. Live events go on from it; where one is missing, it is read from the database."""

    def __init__(self, store: Store, which: Which, after: int | None) -> None:
        self._store = store
        self._which = which
        self._text: list[bytes] = []
        self.is_behind = True
        _, newest = store.peek(feed.bounds)
        self._after = newest if after is None else after
        if self._after > newest:
            # A number of another database: say so, and begin with what this one keeps.
            self._text.append(_gap(0))
            self._after = 0

    def take(self) -> bytes:
        text, self._text = b"".join(self._text), []
        return text

    def hear(self, heard: Heard) -> bool:
        """A live event; true when there is something to send or to catch up with."""
        if not self.is_behind:
            if isinstance(heard, Gap) or heard.seq > self._after + 1:
                self.is_behind = True
            elif heard.seq == self._after + 1:
                self._after = heard.seq
                self._add(heard)
        return self.is_behind or bool(self._text)

    async def catch_up(self) -> None:
        """Read one page of what is stored behind this place."""
        (oldest, newest), events = await self._store.read(self._read)
        if newest and oldest > self._after + 1:
            self._text.append(_gap(oldest - self._after - 1))
            self._after = oldest - 1
        for event in events:
            self._add(event)
        self._after = events[-1].seq if events else max(self._after, newest)
        self.is_behind = bool(events)

    def _read(self, db: sqlite3.Connection) -> tuple[tuple[int, int], list[Event]]:
        # The bounds first: what is not found up to the newest will not be.
        which = self._which
        return feed.bounds(db), feed.events_after(
            db, self._after, tenant=which.tenant, kind=which.kind, limit=PAGE_EVENTS
        )

    def _add(self, event: Event) -> None:
        if self._which.tenant in (None, event.tenant) and self._which.kind in (None, event.kind):
            self._text.append(
                b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.kind.encode(), encoded(event.as_json()))
            )


def _gap(missed: int) -> bytes:
    return b'event: gap\ndata: {"missed":%d}\n\n' % missed
