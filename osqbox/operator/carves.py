"""Carves: files that agents sent."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.errors import OsqboxError, Refused
from osqbox.osquery import carves
from osqbox.store import Tx

from .answers import answered, read_answer, streamed
from .operations import Query, operation
from .parts import Parts

READ_BYTES = 4 * 1024 * 1024
"""Read at once for a download; at least one block."""
OCTETS = "application/octet-stream"


class Newest(Query):
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 100
    tenant: str | None = None


class CarveFacts(msgspec.Struct):
    """A carve: an archive sent in blocks."""

    id: str
    tenant: str
    node: str
    hostname: str | None
    carve_id: str
    request_id: str
    block_count: int
    block_size: int
    carve_size: int
    received_blocks: int
    status: Literal["receiving", "complete", "expired"]
    sha256: str | None
    compressed: bool | None
    created_at: str
    updated_at: str


class Member(msgspec.Struct):
    """An entry of a carve's archive."""

    name: str
    type: Literal["file", "directory", "link", "other"]
    size: int
    mode: int
    mtime: str


class DeletedCarve(msgspec.Struct):
    """The carve is gone; the room its blocks took is freed within seconds."""

    deleted: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/carves")
    @operation(list[CarveFacts], query=Newest)
    async def list_carves(query: Newest) -> TrioResponse:
        """The newest carves first."""
        return await read_answer(parts.store, lambda db: carves.latest(db, query.limit, query.tenant))

    @routes.get("/carves/<carve>")
    @operation(CarveFacts)
    async def show_carve(carve: str) -> TrioResponse:
        """One carve by its session id, the agent's carve id, or ``latest``."""
        return await read_answer(parts.store, lambda db: carves.get(db, carve))

    @routes.get("/carves/<carve>/members")
    @operation(list[Member])
    async def list_members(carve: str) -> TrioResponse:
        """What a complete carve's archive holds."""
        return await read_answer(parts.store, lambda db: carves.members(db, carve))

    @routes.get("/carves/<carve>/archive")
    @operation(bytes, media=OCTETS)
    async def download_carve(carve: str) -> TrioResponse:
        """The archive as the agent sent it: tar, or tar in zstd when ``compressed``."""
        facts = await parts.store.read(lambda db: carves.get(db, carve))
        if facts["status"] != "complete":
            got = f"{facts['received_blocks']} of {facts['block_count']} blocks"
            raise Refused("incomplete", f"carve {facts['id']} is {facts['status']}: {got}", status=409)
        response = streamed(_archive(parts, facts), OCTETS)
        response.content_length = facts["carve_size"]
        response.headers["Content-Disposition"] = f'attachment; filename="{file_name(facts)}"'
        return response

    @routes.delete("/carves/<carve>")
    @operation(DeletedCarve)
    async def delete_carve(carve: str) -> TrioResponse:
        """Remove a carve and its blocks."""

        def delete(tx: Tx) -> str:
            session: str = carves.get(tx.db, carve)["id"]
            carves.delete(tx, session)
            return session

        return answered(DeletedCarve(deleted=await parts.store.write(delete)))


def file_name(facts: dict[str, Any]) -> str:
    """For the reader's disk: whatever an agent calls itself, only letters, digits, dash and underscore."""
    words = (facts["hostname"] or facts["node"], facts["carve_id"] or facts["id"])
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", word)[:64].strip("_") for word in words]
    return "-".join(("carve", *filter(None, plain))) + (".tar.zst" if facts["compressed"] else ".tar")


async def _archive(parts: Parts, facts: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """Blocks in pages of their own reads, so that a slow download holds no reader."""
    session, count = facts["id"], facts["block_count"]
    step = max(1, READ_BYTES // facts["block_size"])
    for start in range(0, count, step):
        blocks = await parts.store.read(partial(carves.blocks, session=session, start=start, limit=step))
        if len(blocks) != min(step, count - start):
            raise OsqboxError(f"carve {session} was deleted during its download")
        yield b"".join(blocks)
