"""YARA rules that agents fetch."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.osquery import yara

from .answers import answered, read_answer
from .operations import Query, operation
from .parts import Parts


class Of(Query):
    tenant: str | None = None


class Where(Query):
    tenant: str = tenants.DEFAULT


class Put(Where):
    public: Annotated[bool, Meta(description="Answer a plain GET, as osqueryd sends without a node key.")] = False


class Rule(msgspec.Struct):
    """A YARA rule, without its text."""

    name: str
    tenant: str
    public: bool
    bytes: int
    updated_at: str


class PutRule(msgspec.Struct):
    """A rule that nodes get from now on."""

    name: str
    tenant: str
    public: bool


class DeletedRule(msgspec.Struct):
    """The rule is gone."""

    deleted: str
    tenant: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/yara")
    @operation(list[Rule], query=Of)
    async def list_rules(query: Of) -> TrioResponse:
        """Every rule, by tenant and name."""
        return await read_answer(parts.store, lambda db: yara.listing(db, query.tenant))

    @routes.put("/yara/<name>")
    @operation(PutRule, query=Put, takes_text=True)
    async def put_rule(name: str, query: Put, text: str) -> TrioResponse:
        """Keep a rule's text under a name."""
        await parts.store.write(lambda tx: yara.put(tx, query.tenant, name, text, public=query.public))
        return answered(PutRule(name, query.tenant, query.public))

    @routes.delete("/yara/<name>")
    @operation(DeletedRule, query=Where)
    async def delete_rule(name: str, query: Where) -> TrioResponse:
        """Delete a rule."""
        await parts.store.write(lambda tx: yara.delete(tx, query.tenant, name))
        return answered(DeletedRule(deleted=name, tenant=query.tenant))
