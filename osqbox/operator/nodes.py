"""Nodes: who is enrolled, letting them in and out, and the config each gets."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.osquery import amalgamate, campaigns, configs, nodes
from osqbox.osquery.nodes import Selector
from osqbox.store import Tx

from .answers import answered, read_answer
from .operations import Body, Query, operation
from .parts import Parts

TAGS_MAX = 100

Tag = Annotated[str, Meta(min_length=1, max_length=200)]


class Which(Query):
    """Kinds must all match, of the words of one kind any."""

    tenant: str | None = None
    tag: tuple[str, ...] = ()
    platform: tuple[str, ...] = ()
    status: tuple[Literal["active", "pending", "rejected"], ...] = ()
    node: Annotated[tuple[str, ...], Meta(description="Id, its beginning, hostname or host identifier.")] = ()

    def selector(self) -> Selector:
        return Selector(self.node, self.tag, self.platform, self.tenant, self.status)


class NodeChange(Body):
    """The node's tags from now on; its config may change with them."""

    tags: Annotated[list[Tag], Meta(max_length=TAGS_MAX)]


class NodeFacts(msgspec.Struct):
    """An enrolled host."""

    id: str
    tenant: str
    hostname: str
    host_identifier: str
    platform: str
    status: Literal["active", "pending", "rejected"]
    tags: list[str]
    os: str
    osquery_version: str
    hardware_uuid: str
    instance_id: str
    address: str
    certificate_name: str | None
    enrollments: int
    enrolled_at: str
    last_seen_at: str
    host_details: dict[str, dict[str, str]]


class DeletedNode(msgspec.Struct):
    """The node's key is unknown from now on; a living agent enrolls again as a new node."""

    deleted: str


class Overrode(msgspec.Struct):
    """A value that lost against a stronger source."""

    source: str
    version: int
    value: Any


class ExplainedKey(msgspec.Struct):
    """One leaf of a config: who gave it and over whom it won."""

    key: str
    source: str
    version: int
    value: Any
    overrode: list[Overrode]


class NodeConfig(msgspec.Struct):
    """The config a node gets, and where each of its values comes from."""

    config: dict[str, Any]
    explain: list[ExplainedKey]
    notes: list[str]


def add(routes: Blueprint, parts: Parts) -> None:
    _add_reading(routes, parts)
    _add_deciding(routes, parts)


def _add_reading(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/nodes")
    @operation(list[NodeFacts], query=Which)
    async def list_nodes(query: Which) -> TrioResponse:
        """Nodes that fit, the oldest first."""
        seen, selector = parts.presence.seen(), query.selector()
        return await read_answer(parts.store, lambda db: nodes.facts_json(db, selector, seen=seen))

    @routes.get("/nodes/<word>")
    @operation(NodeFacts)
    async def show_node(word: str) -> TrioResponse:
        """One node by id, its beginning, hostname or host identifier."""
        return await _facts(parts, word)

    @routes.get("/nodes/<word>/config")
    @operation(NodeConfig)
    async def show_node_config(word: str) -> TrioResponse:
        """The config a node gets, with the source of every value."""
        return await read_answer(parts.store, lambda db: _config(db, word))


async def _facts(parts: Parts, word: str) -> TrioResponse:
    seen = parts.presence.seen()
    return await read_answer(parts.store, lambda db: nodes.facts_json(db, Selector(nodes=(word,)), seen=seen)[0])


def _config(db: sqlite3.Connection, word: str) -> NodeConfig:
    merged = configs.config_for(db, nodes.resolve(db, word))
    explained = [
        ExplainedKey(leaf.key, leaf.source, leaf.version, leaf.value, [Overrode(*lost) for lost in leaf.overrode])
        for leaf in amalgamate.explain(merged)
    ]
    return NodeConfig(merged.config, explained, list(merged.notes))


def _add_deciding(routes: Blueprint, parts: Parts) -> None:
    async def change(word: str, work: Callable[[Tx, str], Any]) -> str:
        """Run ``work`` on the node of that name in one transaction; returns its id."""

        def run(tx: Tx) -> str:
            node = nodes.resolve(tx.db, word)
            work(tx, node.id)
            return node.id

        return await parts.store.write(run)

    def put_out(node_id: str) -> None:
        parts.presence.wake([node_id])
        parts.presence.forget(node_id)

    @routes.patch("/nodes/<word>")
    @operation(NodeFacts, body=NodeChange)
    async def tag_node(word: str, body: NodeChange) -> TrioResponse:
        """Replace a node's tags."""
        return await _facts(parts, await change(word, lambda tx, node_id: nodes.set_tags(tx, node_id, body.tags)))

    @routes.post("/nodes/<word>/approve")
    @operation(NodeFacts)
    async def approve_node(word: str) -> TrioResponse:
        """Let a node in that awaits approval or was rejected."""
        return await _facts(parts, await change(word, lambda tx, node_id: nodes.decide(tx, node_id, "active")))

    @routes.post("/nodes/<word>/reject")
    @operation(NodeFacts)
    async def reject_node(word: str) -> TrioResponse:
        """Refuse a node from now on and end its open targets."""
        node_id = await change(word, _reject)
        put_out(node_id)
        return await _facts(parts, node_id)

    @routes.post("/nodes/<word>/reenroll")
    @operation(NodeFacts)
    async def reenroll_node(word: str) -> TrioResponse:
        """Revoke a node's key, so that its agent enrolls again; its row and history stay."""
        node_id = await change(word, nodes.revoke_key)
        parts.presence.wake([node_id])
        return await _facts(parts, node_id)

    @routes.delete("/nodes/<word>")
    @operation(DeletedNode)
    async def delete_node(word: str) -> TrioResponse:
        """Forget a node and end its open targets."""
        node_id = await change(word, _delete)
        put_out(node_id)
        return answered(DeletedNode(deleted=node_id))


def _reject(tx: Tx, node_id: str) -> None:
    nodes.decide(tx, node_id, "rejected")
    campaigns.cancel_for_node(tx, node_id)


def _delete(tx: Tx, node_id: str) -> None:
    campaigns.cancel_for_node(tx, node_id)
    nodes.delete(tx, node_id)
