"""States: the documents that agents keep here with stateful events."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.comms.messages import StateDocument

from .answers import answered
from .operations import Query, operation
from .parts import Parts


class Which(Query):
    tenant: str = tenants.DEFAULT
    agent: Annotated[str | None, Meta(description="UUID.")] = None
    index: Annotated[str | None, Meta(description="Such as wazuh-states-inventory-packages.")] = None
    text: Annotated[str, Meta(max_length=1000, description="Found in the id or the data.")] = ""
    after: Annotated[str, Meta(max_length=4000, description="The `next` of the page before.")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class StateFacts(msgspec.Struct):
    """A document and the agent it belongs to."""

    index: str
    id: str
    agent: str
    tenant: str
    version: int
    """Grows by one with every change."""
    changed_at: str
    data: dict[str, Any]


class FoundStates(msgspec.Struct):
    """In the order of agent, index and id; `next` is null when these were the last."""

    states: list[StateFacts]
    next: str | None


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/states")
    @operation(FoundStates, query=Which)
    async def find_states(query: Which) -> TrioResponse:
        """Documents that fit, a page at a time."""
        found, cursor = await parts.served_comms().indexer.states.search(
            tenant=query.tenant,
            agent=query.agent,
            index=query.index,
            text=query.text,
            limit=query.limit,
            after=query.after,
        )
        return answered({"states": [_facts(each) for each in found], "next": cursor or None})


def _facts(document: StateDocument) -> dict[str, Any]:
    return {**msgspec.to_builtins(document), "changed_at": rfc3339(document.changed_at)}
