"""Groups of agents, and the configuration that their agents fetch."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.clock import rfc3339
from osqbox.comms.messages import Group

from .agents import OfTenant
from .answers import answered
from .operations import SEQ_MAX, Body, operation
from .parts import OPERATOR, Parts


class NewConfiguration(Body):
    """A group's configuration; the same text again changes nothing."""

    configuration: str = ""
    """A YAML mapping, kept to the letter."""
    expected_version: Annotated[int, Meta(ge=0, le=SEQ_MAX)] | None = None
    """Refused with 409 when the group has another; 0 is a group without any configuration."""


class GroupFacts(msgspec.Struct):
    """A group, without its configuration."""

    tenant: str
    name: str
    version: int
    sha256: str
    changed_at: str | None
    changed_by: str


class GroupConfiguration(GroupFacts):
    """A group with its configuration."""

    configuration: str


class DeletedGroup(msgspec.Struct):
    """The group and its configurations are gone."""

    deleted: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/groups")
    @operation(list[GroupFacts], query=OfTenant)
    async def list_groups(query: OfTenant) -> TrioResponse:
        """A tenant's groups, ``default`` first."""
        return answered([_facts(group) for group in await parts.served_comms().indexer.groups.page(query.tenant)])

    @routes.get("/groups/<name>")
    @operation(GroupConfiguration, query=OfTenant)
    async def show_group(name: str, query: OfTenant) -> TrioResponse:
        """One group with its configuration."""
        return answered(_configuration(await parts.served_comms().group(query.tenant, name)))

    @routes.get("/groups/<name>/versions")
    @operation(list[GroupConfiguration], query=OfTenant)
    async def list_group_versions(name: str, query: OfTenant) -> TrioResponse:
        """Every kept version of a group's configuration, the newest first."""
        found = await parts.served_comms().indexer.groups.versions(query.tenant, name)
        return answered([_configuration(group) for group in found])

    @routes.put("/groups/<name>")
    @operation(GroupConfiguration, query=OfTenant, body=NewConfiguration)
    async def put_group(name: str, query: OfTenant, body: NewConfiguration) -> TrioResponse:
        """Create a group or change its configuration, and tell its agents."""
        comms = parts.served_comms()
        group = await comms.configure(
            query.tenant, name, body.configuration, actor=OPERATOR, expected_version=body.expected_version
        )
        return answered(_configuration(group))

    @routes.delete("/groups/<name>")
    @operation(DeletedGroup, query=OfTenant)
    async def delete_group(name: str, query: OfTenant) -> TrioResponse:
        """Delete a group that no agent is in."""
        await parts.served_comms().indexer.groups.delete(query.tenant, name, actor=OPERATOR)
        return answered(DeletedGroup(deleted=name))


def _facts(group: Group) -> dict[str, Any]:
    return {
        "tenant": group.tenant,
        "name": group.name,
        "version": group.version,
        "sha256": group.sha256,
        "changed_at": rfc3339(group.changed_at or None),
        "changed_by": group.changed_by,
    }


def _configuration(group: Group) -> dict[str, Any]:
    return {**_facts(group), "configuration": group.configuration}
