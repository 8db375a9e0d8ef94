"""Tenants and their enroll secrets."""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.errors import BadUsage
from osqbox.osquery import campaigns, nodes
from osqbox.osquery.nodes import Selector
from osqbox.store import Tx
from osqbox.tenants import TenantOptions

from .answers import answered, read_answer
from .operations import Body, operation
from .parts import Comms, Parts

SECRET_MAX_CHARS = 1024
CENTURY_S = 100 * 365.25 * 86400

Secret = Annotated[str, Meta(max_length=SECRET_MAX_CHARS)]


class Options(Body):
    """How a tenant lets nodes in; what is left out stays as it is."""

    open: bool | UnsetType = UNSET
    approve: bool | UnsetType = UNSET
    client_cert: bool | UnsetType = UNSET
    blank_keys: bool | UnsetType = UNSET
    reenroll: str | UnsetType = UNSET

    def over(self, options: TenantOptions) -> TenantOptions:
        given = {name: getattr(self, name) for name in TenantOptions.__struct_fields__}
        return msgspec.structs.replace(options, **{name: value for name, value in given.items() if value is not UNSET})


class NewTenant(Options, kw_only=True):
    """A tenant; its first enroll secret is made unless given."""

    name: str
    enroll_secret: Secret | None = None


class NewSecret(Body):
    """An enroll secret; made unless given."""

    secret: Secret | None = None
    label: Annotated[str, Meta(max_length=200)] = ""
    tags: tuple[str, ...] = ()
    expires_in_s: Annotated[float, Meta(gt=0, le=CENTURY_S)] | None = None
    uses: Annotated[int, Meta(ge=1)] | None = None


class TenantFacts(msgspec.Struct):
    """A tenant and how it lets nodes in."""

    name: str
    open: bool
    approve: bool
    client_cert: bool
    blank_keys: bool
    reenroll: str
    created_at: str
    closed_at: str | None


class CreatedTenant(TenantFacts):
    """A new tenant with its enroll secret, which is shown only now."""

    enroll_secret: str


class SecretFacts(msgspec.Struct):
    """An enroll secret, without itself."""

    id: int
    tenant: str
    label: str
    tags: list[str]
    expires_at: str | None
    uses_left: int | None
    used: int


class AddedSecret(SecretFacts):
    """A new enroll secret, which is shown only now."""

    enroll_secret: str


class ClosedTenant(msgspec.Struct):
    """The tenant refuses everything from now on; its name stays in the history."""

    closed: str


class RemovedSecret(msgspec.Struct):
    """The secret enrolls nobody any more; nodes that did stay."""

    deleted: int


def add(routes: Blueprint, parts: Parts) -> None:
    _add_tenants(routes, parts)
    _add_secrets(routes, parts)


def _add_tenants(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/tenants")
    @operation(list[TenantFacts])
    async def list_tenants() -> TrioResponse:
        """Every tenant, also closed ones, the oldest first."""
        return await read_answer(parts.store, lambda db: [each.as_json() for each in tenants.all_tenants(db)])

    @routes.post("/tenants")
    @operation(CreatedTenant, status=201, body=NewTenant)
    async def create_tenant(body: NewTenant) -> TrioResponse:
        """Create a tenant with an enroll secret."""
        secret = body.enroll_secret or parts.new_key()
        return answered(await parts.store.write(lambda tx: _create(tx, body, secret)), 201)

    @routes.get("/tenants/<name>")
    @operation(TenantFacts)
    async def show_tenant(name: str) -> TrioResponse:
        """One tenant."""
        return await read_answer(parts.store, lambda db: tenants.get(db, name).as_json())

    @routes.patch("/tenants/<name>")
    @operation(TenantFacts, body=Options)
    async def change_tenant(name: str, body: Options) -> TrioResponse:
        """Change how a tenant lets nodes in."""

        def change(tx: Tx) -> dict[str, Any]:
            return tenants.change(tx, name, body.over(tenants.get(tx.db, name).options)).as_json()

        return answered(await parts.store.write(change))

    @routes.delete("/tenants/<name>")
    @operation(ClosedTenant)
    async def close_tenant(name: str) -> TrioResponse:
        """Close a tenant: its nodes and agents are refused, open targets are cancelled, command streams end."""
        parts.presence.wake(await parts.store.write(lambda tx: _close(tx, name, parts.comms)))
        return answered(ClosedTenant(closed=name))


def _create(tx: Tx, body: NewTenant, secret: str) -> dict[str, Any]:
    tenant = tenants.create(tx, body.name, body.over(TenantOptions()))
    tenants.add_secret(tx, tenant.name, secret)
    return {**tenant.as_json(), "enroll_secret": secret}


def _close(tx: Tx, name: str, comms: Comms | None) -> list[str]:
    tenants.close(tx, name)
    if comms is not None:
        tx.after_commit.append(partial(comms.tenant_closed, name))
    ids = [node.id for node in nodes.select(tx.db, Selector(tenant=name))]
    for node_id in ids:
        campaigns.cancel_for_node(tx, node_id)
    return ids


def _add_secrets(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/tenants/<name>/secrets")
    @operation(list[SecretFacts])
    async def list_secrets(name: str) -> TrioResponse:
        """A tenant's enroll secrets; of the secrets themselves only digests are kept."""
        return await read_answer(parts.store, lambda db: _secrets(db, name))

    @routes.post("/tenants/<name>/secrets")
    @operation(AddedSecret, status=201, body=NewSecret)
    async def add_secret(name: str, body: NewSecret) -> TrioResponse:
        """Let one more secret enroll nodes into a tenant."""
        secret = body.secret or parts.new_key()
        return answered(await parts.store.write(lambda tx: _add_secret(tx, name, body, secret)), 201)

    @routes.delete("/tenants/<name>/secrets/<number>")
    @operation(RemovedSecret)
    async def remove_secret(name: str, number: str) -> TrioResponse:
        """Remove an enroll secret."""
        if not (number.isascii() and number.isdigit()):
            raise BadUsage(
                f"secret: expected its id, a number, got {number[:40]!r}", hint=f"osqbox tenants secrets {name}"
            )
        await parts.store.write(lambda tx: tenants.remove_secret(tx, name, int(number)))
        return answered(RemovedSecret(deleted=int(number)))


def _secrets(db: sqlite3.Connection, name: str) -> list[dict[str, Any]]:
    tenants.get(db, name)
    return [secret.as_json() for secret in tenants.secrets_of(db, name)]


def _add_secret(tx: Tx, name: str, body: NewSecret, secret: str) -> dict[str, Any]:
    expires_at = None if body.expires_in_s is None else tx.now + body.expires_in_s
    added = tenants.add_secret(
        tx, name, secret, label=body.label, tags=body.tags, expires_at=expires_at, uses=body.uses
    )
    return {**added.as_json(), "enroll_secret": secret}
