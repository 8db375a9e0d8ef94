"""Stateless events of the comms API: searched, followed."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.comms.messages import Event
from osqbox.comms.seams import Events
from osqbox.feed import Gap

from .answers import NDJSON, answered, encoded, streamed
from .ear import Ear, Heard
from .operations import SEQ_MAX, Query, operation
from .parts import Parts

NEWEST_EVENTS = 100
PAGE_EVENTS = 1000
EVENTS_MAX = 10_000_000

Number = Annotated[int, Meta(ge=0, le=SEQ_MAX)]
Time = Annotated[dt.datetime, Meta(tz=True)]


class Filter(Query):
    tenant: str = tenants.DEFAULT
    agent: Annotated[str | None, Meta(description="UUID.")] = None
    module: str | None = None
    text: Annotated[
        str, Meta(max_length=1000, description="Words that are all in the event; each may be cut short.")
    ] = ""

    def words(self) -> dict[str, Any]:
        return {"tenant": self.tenant, "agent": self.agent, "module": self.module, "text": self.text}


class Page(Filter, kw_only=True):
    since: Time | None = None
    until: Time | None = None
    before: Annotated[Number | None, Meta(description="The `next` of the page before.")] = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_EVENTS)] = NEWEST_EVENTS


class Lines(Filter, kw_only=True):
    after: Annotated[Number | None, Meta(description="The number of the last event the reader has.")] = None
    limit: (
        Annotated[int, Meta(ge=1, le=EVENTS_MAX, description="The newest so many (100), or at most so many after.")]
        | None
    ) = None
    follow: Annotated[bool, Meta(description="Go on with new events as they arrive.")] = False


class EventFacts(msgspec.Struct):
    """A stateless event as its agent sent it, and what the box knows about it."""

    number: int
    """Grows by one along the arrival."""
    id: str
    """The same for an event that was sent again."""
    tenant: str
    agent: str
    module: str
    collector: str
    received_at: str
    data: Any


class FoundEvents(msgspec.Struct):
    """Newest first; `next` is null when these were the last."""

    events: list[EventFacts]
    next: int | None


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/events")
    @operation(FoundEvents, query=Page)
    async def find_events(query: Page) -> TrioResponse:
        """Events that fit, newest first, a page at a time."""
        found = await parts.served_comms().events.search(
            since=None if query.since is None else query.since.timestamp(),
            until=None if query.until is None else query.until.timestamp(),
            before=query.before,
            limit=query.limit,
            **query.words(),
        )
        is_last = len(found) < query.limit
        return answered({"events": [_facts(*each) for each in found], "next": None if is_last else found[-1][0]})

    @routes.get("/events.ndjson")
    @operation(EventFacts, media=NDJSON, query=Lines)
    async def list_events(query: Lines) -> TrioResponse:
        """The newest events that fit, oldest first, or those after a number; with ``follow`` those to come as well."""
        tail = _Tail(parts.served_comms().events, query)
        await tail.begin()
        return streamed(_followed(parts, tail) if query.follow else _stored(tail), NDJSON)


class _Tail:
    """A place among the events, moving on page by page."""

    def __init__(self, events: Events, which: Lines) -> None:
        self._events = events
        self.which = which
        self._first: list[tuple[int, Event]] = []
        self._after = which.after or 0
        self._until = 0
        self._left = which.limit if which.after is not None and not which.follow else None

    async def begin(self) -> None:
        """Find the place: behind the newest events, unless the reader said after which."""
        self._until = await self._events.last()
        if self.which.after is None:
            self._first = await self._newest(self.which.limit or NEWEST_EVENTS)
            self._after = self._first[-1][0] if self._first else self._until

    async def _newest(self, wanted: int) -> list[tuple[int, Event]]:
        found: list[tuple[int, Event]] = []
        before: int | None = None
        while len(found) < wanted:
            limit = min(PAGE_EVENTS, wanted - len(found))
            page = await self._events.search(before=before, limit=limit, **self.which.words())
            found += page
            if len(page) < limit:
                break
            before = page[-1][0]
        return found[::-1]

    @property
    def is_done(self) -> bool:
        return not self._first and (self._left == 0 or self._after >= self._until)

    async def page(self) -> bytes:
        """The next events in lines; nothing when there are none now."""
        found, self._first = self._first, []
        if not found:
            limit = PAGE_EVENTS if self._left is None else min(PAGE_EVENTS, self._left)
            self._after, found = await self._events.after(self._after, limit=limit, **self.which.words())
            self._left = None if self._left is None else self._left - len(found)
        return b"".join(encoded(_facts(*each)) + b"\n" for each in found)


async def _stored(tail: _Tail) -> AsyncGenerator[bytes, None]:
    while not tail.is_done:
        yield await tail.page()


async def _followed(parts: Parts, tail: _Tail) -> AsyncGenerator[bytes, None]:
    def hear(heard: Heard) -> bool:
        return isinstance(heard, Gap) or (heard.kind == "comms_events_stored" and heard.tenant == tail.which.tenant)

    with Ear(parts.feed, parts.stopping) as ear:
        yield b"\n"  # Hypercorn sends the head with the first bytes of the body
        while not ear.stopped:
            if lines := await tail.page():
                yield lines
            elif not await ear.wait(hear):
                yield b"\n"


def _facts(number: int, event: Event) -> dict[str, Any]:
    return {
        "number": number,
        "id": event.id,
        "tenant": event.tenant,
        "agent": event.agent,
        "module": event.module,
        "collector": event.collector,
        "received_at": rfc3339(event.received_at),
        "data": event.data,
    }
