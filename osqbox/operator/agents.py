"""Agents of the comms API: adding them, their groups and keys, letting them in and out."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from quart import Blueprint, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.comms import registration
from osqbox.comms.errors import bad_request
from osqbox.comms.messages import Agent, AgentStatus

from .answers import answered
from .operations import Body, Query, operation
from .parts import OPERATOR, Parts

LIMIT_MAX = 1000

Tenant = Annotated[str, Meta(max_length=63)]


class OfTenant(Query):
    """Agents of other tenants look as if there were none."""

    tenant: Tenant = tenants.DEFAULT


class Which(OfTenant, kw_only=True):
    group: str | None = None
    text: Annotated[str, Meta(max_length=200, description="Found in the name or the UUID.")] = ""
    after: Annotated[str, Meta(description="The last UUID of the page before.")] = ""
    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = 100


class NewAgent(Body):
    """An agent; its UUID and key are made unless given."""

    name: str
    group: str | None = None
    groups: tuple[str, ...] = ()
    """In order: a later one's configuration overrides an earlier one's."""
    uuid: str | None = None
    key: str | None = None
    type: str = "Endpoint"
    version: str = ""
    tenant: Tenant | None = None
    """Here or in the query."""

    def in_groups(self) -> tuple[str, ...]:
        if self.group is not None and self.groups:
            raise bad_request("body: expected either group or groups, got both")
        return self.groups or (self.group or registration.DEFAULT_GROUP,)


class AgentChange(Body):
    """What is left out stays as it is."""

    name: str | None = None
    groups: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """All of them from now on, in order; the agent is told."""
    status: Literal["active", "revoked"] | None = None
    """``revoked`` refuses its key and ends its tokens and streams at once; ``active`` allows it again."""


class NewKey(Body):
    """A key; made unless given."""

    key: str | None = None


class AgentFacts(msgspec.Struct):
    """An agent of the comms API."""

    uuid: str
    tenant: str
    name: str
    type: str
    version: str
    groups: list[str]
    host: dict[str, Any]
    status: Literal["never_connected", "active", "revoked"]
    key_version: int
    created_at: str
    last_login_at: str | None
    last_seen_at: str | None


class AddedAgent(AgentFacts):
    """A new agent with its key, which is shown only now."""

    key: str


class KeyOfAgent(msgspec.Struct):
    """An agent's new key, which is shown only now; tokens got with the old one are refused from now on."""

    uuid: str
    key: str


class DeletedAgent(msgspec.Struct):
    """The agent is unknown from now on; its open commands are cancelled, its states and events stay."""

    deleted: str


class TokenData(msgspec.Struct):
    token: str


class ManagementToken(msgspec.Struct):
    """For ``POST /agents``: what the caller has shown already."""

    data: TokenData


class EnrolledAgent(Body, forbid_unknown_fields=False):
    """A registration as agents send it that enroll themselves."""

    id: str
    name: str
    key: str
    type: str
    version: str
    host: registration.Host = registration.Host()


class Enrolled(msgspec.Struct):
    """The agent may log in from now on."""

    uuid: str


def add(routes: Blueprint, parts: Parts) -> None:
    _add_reading(routes, parts)
    _add_changing(routes, parts)


def _add_reading(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/agents")
    @operation(list[AgentFacts], query=Which)
    async def list_agents(query: Which) -> TrioResponse:
        """Agents in the order of their UUIDs, a page at a time."""
        found = await parts.served_comms().indexer.agents.page(
            tenant=query.tenant, group=query.group, after=query.after, limit=query.limit, text=query.text
        )
        return answered([_facts(agent) for agent in found])

    @routes.get("/agents/<word>")
    @operation(AgentFacts, query=OfTenant)
    async def show_agent(word: str, query: OfTenant) -> TrioResponse:
        """One agent by UUID or name."""
        return answered(_facts(await parts.served_comms().agent(query.tenant, word)))


def _add_changing(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/agents")
    @operation(AddedAgent, status=201, query=OfTenant, body=NewAgent)
    async def add_agent(query: OfTenant, body: NewAgent) -> TrioResponse:
        """Add an agent that may log in from now on."""
        comms = parts.served_comms()
        agent = registration.new_agent(
            uuid=str(uuid.uuid4()) if body.uuid is None else body.uuid,
            name=body.name,
            tenant=body.tenant or query.tenant,
            groups=body.in_groups(),
            type=body.type,
            version=body.version,
            now=comms.clock.now(),
        )
        added, key = await comms.add_agent(agent, body.key, actor=OPERATOR)
        return answered({**_facts(added), "key": key}, 201)

    @routes.patch("/agents/<word>")
    @operation(AgentFacts, query=OfTenant, body=AgentChange)
    async def change_agent(word: str, query: OfTenant, body: AgentChange) -> TrioResponse:
        """Change an agent's name or groups, revoke it or allow it again."""
        comms = parts.served_comms()
        agent = await comms.agent(query.tenant, word)
        changed = await comms.change_agent(
            agent.uuid,
            actor=OPERATOR,
            name=body.name,
            groups=body.groups,
            status=None if body.status is None else AgentStatus(body.status),
        )
        return answered(_facts(changed))

    @routes.post("/agents/<word>/key")
    @operation(KeyOfAgent, query=OfTenant, body=NewKey)
    async def renew_agent_key(word: str, query: OfTenant, body: NewKey) -> TrioResponse:
        """Give an agent a new key; the old one and its tokens are refused from now on."""
        comms = parts.served_comms()
        agent = await comms.agent(query.tenant, word)
        key = await comms.renew_key(agent.uuid, body.key, actor=OPERATOR)
        return answered(KeyOfAgent(uuid=agent.uuid, key=key))

    @routes.delete("/agents/<word>")
    @operation(DeletedAgent, query=OfTenant)
    async def delete_agent(word: str, query: OfTenant) -> TrioResponse:
        """Forget an agent and cancel its open commands."""
        comms = parts.served_comms()
        agent = await comms.agent(query.tenant, word)
        await comms.indexer.agents.delete(agent.uuid, actor=OPERATOR)
        return answered(DeletedAgent(deleted=agent.uuid))


def add_enrollment(app: QuartTrio, parts: Parts) -> None:
    """Where agents enroll that are started with ``--enroll-url``: the paths and statuses of their management API."""

    @app.post("/security/user/authenticate")
    @operation(ManagementToken, query=OfTenant, takes_basic=True)
    async def authenticate_manager(query: OfTenant) -> TrioResponse:  # noqa: ARG001 - agents may say it here too
        """A token for ``POST /agents``, for the box's token as the password of HTTP Basic."""
        parts.served_comms()
        return answered(ManagementToken(data=TokenData(token=parts.token)))

    @app.post("/agents")
    @operation(Enrolled, status=201, query=OfTenant, body=EnrolledAgent)
    async def enroll_agent(query: OfTenant, body: EnrolledAgent) -> TrioResponse:
        """Register an agent under the UUID and key that it made itself."""
        comms = parts.served_comms()
        asked = msgspec.convert(body, registration.Registration, from_attributes=True)
        agent = registration.agent_of(asked, query.tenant, comms.clock.now())
        await comms.add_agent(agent, asked.key, actor=request.remote_addr or OPERATOR)
        return answered(Enrolled(uuid=agent.uuid), 201)


def _facts(agent: Agent) -> dict[str, Any]:
    """As `AgentFacts`."""
    return {
        **msgspec.structs.asdict(agent),
        "created_at": rfc3339(agent.created_at),
        "last_login_at": rfc3339(agent.last_login_at),
        "last_seen_at": rfc3339(agent.last_seen_at),
    }
