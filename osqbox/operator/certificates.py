"""Client certificates for those who bring a one-time token."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.jobs import login

from .answers import answered
from .operations import Body, operation
from .parts import Parts


class NewToken(Body):
    """Whom the certificate will be for, and what it will carry."""

    name: str
    tenant: str = tenants.DEFAULT
    roles: tuple[str, ...] = ()
    principals: Annotated[
        tuple[str, ...], Meta(description="Unix users it may run jobs as; the first is default.")
    ] = ()
    valid_s: Annotated[float, Meta(description="Validity of the certificate.")] = login.DAY_S
    ttl_s: Annotated[float, Meta(description="How long the token can be used.")] = login.TTL_S


class MadeToken(msgspec.Struct):
    """The token is told only now; the box keeps its digest."""

    token: str
    id: str
    name: str
    tenant: str
    roles: list[str]
    principals: list[str]
    valid_s: float
    expires_at: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/certificates/tokens")
    @operation(MadeToken, status=201, body=NewToken)
    async def make_token(body: NewToken) -> TrioResponse:
        """Make a one-time token that `cmdctl login` turns into a client certificate."""
        secret, token_id = parts.new_key(), parts.new_id()
        order = login.Order(body.name, body.tenant, body.roles, body.principals, body.valid_s)
        token = await parts.store.write(lambda tx: login.create_token(tx, order, secret, token_id, body.ttl_s))
        return answered({"token": secret, **token.as_json()}, 201)
