"""Campaigns: a live query to many nodes, its answers as they come."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.feed import Gap
from osqbox.osquery import campaigns
from osqbox.osquery.campaigns import Campaign, Ended, Order
from osqbox.osquery.nodes import Selector
from osqbox.store import Tx

from .answers import JSON, NDJSON, answered, encoded, read_answer, streamed
from .ear import Ear, Heard
from .operations import SEQ_MAX, Body, Query, operation
from .parts import Parts

TIMEOUT_S = 600.0
PAGE_ACCOUNTS = 200

State = Literal["answered", "failed", "expired", "cancelled"]


class NewCampaign(Body):
    """What is asked of whom. Without nodes, tags and platforms: every active node that is reachable."""

    sql: str
    nodes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    tenant: str | None = None
    all: bool = False
    timeout_s: float = TIMEOUT_S
    accelerate: int | None = None
    discovery: str | None = None

    def order(self) -> Order:
        selector = Selector(self.nodes, self.tags, self.platforms, self.tenant)
        return Order(self.sql, selector, self.timeout_s, self.all, self.accelerate, self.discovery)


class Newest(Query):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    tenant: str | None = None


class After(Query):
    after: Annotated[int, Meta(ge=0, le=SEQ_MAX, description="How many accounts the reader has already.")] = 0


class Summary(msgspec.Struct):
    """Targets by how they ended; times in milliseconds since the campaign began."""

    targets: int
    answered: int
    failed: int
    expired: int
    cancelled: int
    open: int
    first_ms: float | None
    last_ms: float | None


class CampaignFacts(msgspec.Struct):
    """A live query."""

    id: str
    tenant: str | None
    sql: str
    created_at: str
    expires_at: str
    ended_at: str | None
    summary: Summary


class OpenTarget(msgspec.Struct):
    """A node that has not answered yet."""

    node: str
    hostname: str
    status: Literal["pending", "sent"]
    offers: int


class CampaignDetails(CampaignFacts):
    """A live query and who has not answered it yet."""

    open: list[OpenTarget]


class Account(msgspec.Struct):
    """How one target ended."""

    node: str
    hostname: str
    status: State
    rows: list[dict[str, Any]]
    message: str
    osquery_status: int | None
    stats: dict[str, Any]
    ended_at: str


class AccountLine(msgspec.Struct):
    """A line of a campaign's stream: an account, or at the end the summary."""

    node: str | UnsetType = UNSET
    hostname: str | UnsetType = UNSET
    status: State | UnsetType = UNSET
    rows: list[dict[str, Any]] | UnsetType = UNSET
    message: str | UnsetType = UNSET
    osquery_status: int | UnsetType | None = UNSET
    stats: dict[str, Any] | UnsetType = UNSET
    ended_at: str | UnsetType = UNSET
    summary: Summary | UnsetType = UNSET


def add(routes: Blueprint, parts: Parts) -> None:
    _add_starting(routes, parts)
    _add_answers(routes, parts)


def _add_starting(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/campaigns")
    @operation(CampaignFacts, status=201, body=NewCampaign)
    async def start_campaign(body: NewCampaign) -> TrioResponse:
        """Send a live query to nodes."""
        order = body.order()

        def start(tx: Tx) -> Campaign:
            campaign, asked = campaigns.start(
                tx, order, lambda chosen: parts.presence.reachable(chosen, parts.clock.now()), parts.new_id
            )
            tx.after_commit.append(partial(parts.presence.wake, asked))  # also when the caller has left meanwhile
            return campaign

        return answered((await parts.store.write(start)).as_json(), 201)

    @routes.get("/campaigns")
    @operation(list[CampaignFacts], query=Newest)
    async def list_campaigns(query: Newest) -> TrioResponse:
        """The newest campaigns first."""
        return await read_answer(
            parts.store, lambda db: [each.as_json() for each in campaigns.latest(db, query.limit, query.tenant)]
        )

    @routes.post("/campaigns/<campaign>/cancel")
    @operation(CampaignFacts)
    async def cancel_campaign(campaign: str) -> TrioResponse:
        """End every target that has not answered."""

        def cancel(tx: Tx) -> Campaign:
            return campaigns.cancel(tx, campaigns.get(tx.db, campaign).id)

        return answered((await parts.store.write(cancel)).as_json())


def _add_answers(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/campaigns/<campaign>")
    @operation(CampaignDetails)
    async def show_campaign(campaign: str) -> TrioResponse:
        """One campaign by id, or ``latest``, with the targets still open."""
        return await read_answer(parts.store, lambda db: _details(db, campaign))

    @routes.get("/campaigns/<campaign>/results")
    @operation(list[Account], query=After)
    async def list_results(campaign: str, query: After) -> TrioResponse:
        """How targets have ended up to now, in the order in which they did."""
        found = await parts.store.read(lambda db: campaigns.get(db, campaign))
        return streamed(_array(parts, found.id, query.after), JSON)

    @routes.get("/campaigns/<campaign>/stream")
    @operation(AccountLine, media=NDJSON)
    async def follow_campaign(campaign: str) -> TrioResponse:
        """One account per line as targets end; the last line is ``{"summary": {...}}``. Blank lines keep it alive."""
        found = await parts.store.read(lambda db: campaigns.get(db, campaign))
        return streamed(_lines(parts, found.id), NDJSON)


def _details(db: sqlite3.Connection, campaign: str) -> dict[str, Any]:
    found = campaigns.get(db, campaign)
    return {**found.as_json(), "open": campaigns.open_targets(db, found.id)}


async def _page(parts: Parts, campaign: str, after: int) -> tuple[Campaign, list[Ended]]:
    """The campaign, then accounts: when it has ended and there are none, there will be none."""
    return await parts.store.read(
        lambda db: (campaigns.get(db, campaign), campaigns.ended_after(db, campaign, after, PAGE_ACCOUNTS))
    )


async def _array(parts: Parts, campaign: str, after: int) -> AsyncGenerator[bytes, None]:
    before = b"["
    while accounts := (await _page(parts, campaign, after))[1]:
        yield before + b",".join(account.encoded for account in accounts)
        before, after = b",", accounts[-1].order
    yield b"]" if before == b"," else b"[]"


async def _lines(parts: Parts, campaign: str) -> AsyncGenerator[bytes, None]:
    def hear(heard: Heard) -> bool:
        return isinstance(heard, Gap) or heard.data.get("campaign") == campaign

    with Ear(parts.feed, parts.stopping) as ear:
        yield b"\n"  # Hypercorn sends the head with the first bytes of the body
        after = 0
        while not ear.stopped:
            facts, accounts = await _page(parts, campaign, after)
            if accounts:
                after = accounts[-1].order
                yield b"".join(account.encoded + b"\n" for account in accounts)
            elif facts.ended_at is not None:
                yield encoded({"summary": facts.summary()}) + b"\n"
                return
            elif not await ear.wait(hear):
                yield b"\n"
