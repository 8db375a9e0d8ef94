"""The configuration of a group of agents, as publishers on the comms socket read and change it."""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from osqbox.comms import configuration, protocol, registration
from osqbox.comms.messages import Group

from .agents import OfTenant
from .answers import JSON
from .operations import operation
from .parts import OPERATOR, Parts


class OfGroup(OfTenant, kw_only=True):
    group: str = registration.DEFAULT_GROUP


class ConfigurationFile(msgspec.Struct):
    """A group's configuration as it was given."""

    group: str
    version: int
    sha256: str
    configuration: str


class Configuration(msgspec.Struct):
    """What agents of the group are told."""

    groups: list[str]
    version: int
    hash: str
    configuration: dict[str, Any]
    files: list[ConfigurationFile]


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/configuration")
    @operation(Configuration, query=OfGroup)
    async def show_configuration(query: OfGroup) -> TrioResponse:
        """The configuration of a group."""
        return await _told(await parts.served_comms().group(query.tenant, query.group))

    @routes.put("/configuration")
    @operation(Configuration, query=OfGroup, takes_text=True)
    async def put_configuration(query: OfGroup, text: str) -> TrioResponse:
        """Change a group's configuration and tell its agents; ``If-Match: "3"`` changes version 3 or nothing."""
        comms = parts.served_comms()
        registration.check_group_name(query.group)
        group = await comms.configure(
            query.tenant,
            query.group,
            text,
            actor=OPERATOR,
            expected_version=protocol.version_wanted(request.headers.get("If-Match")),
        )
        return await _told(group)


async def _told(group: Group) -> TrioResponse:
    found = await trio.to_thread.run_sync(configuration.configuration_of, [group])
    return TrioResponse(found.body, content_type=JSON, headers={"ETag": f'"{found.sha256}"'})
