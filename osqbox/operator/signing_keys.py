"""The keys that sign agents' tokens."""

from __future__ import annotations

from functools import partial
from typing import Literal

import msgspec
import trio
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import audit

from .answers import answered
from .operations import operation
from .parts import OPERATOR, Parts


class KeyFacts(msgspec.Struct):
    """A signing key, without itself."""

    kid: str
    algorithm: Literal["RS256", "ES256"]
    file: str
    made_at: str | None
    signs: bool
    """Whether new tokens are signed with it; the others only verify older ones."""


class RemovedKey(msgspec.Struct):
    """Tokens that were signed with it are refused; their agents log in again."""

    deleted: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/comms/keys")
    @operation(list[KeyFacts])
    async def list_signing_keys() -> TrioResponse:
        """Every key that tokens are checked with, the oldest first."""
        return answered(_facts(parts))

    @routes.post("/comms/keys")
    @operation(list[KeyFacts], status=201)
    async def rotate_signing_key() -> TrioResponse:
        """Make a key that signs from now on; tokens of older ones stay good until those are removed."""
        keys = parts.served_comms().keys
        made = await trio.to_thread.run_sync(keys.rotate, parts.clock.now())
        await parts.store.write(partial(audit.record, actor=OPERATOR, action="keys.rotate", subject=made.kid))
        return answered(_facts(parts), 201)

    @routes.delete("/comms/keys/<kid>")
    @operation(RemovedKey)
    async def remove_signing_key(kid: str) -> TrioResponse:
        """Remove a key that no longer signs; every token of it is refused from now on."""
        await trio.to_thread.run_sync(parts.served_comms().keys.remove, kid)
        await parts.store.write(partial(audit.record, actor=OPERATOR, action="keys.remove", subject=kid))
        return answered(RemovedKey(deleted=kid))


def _facts(parts: Parts) -> list[dict[str, str | bool | None]]:
    keys = parts.served_comms().keys
    signer = keys.signer(parts.clock.now())
    return [{**key.as_json(), "signs": key == signer} for key in keys.all()]
