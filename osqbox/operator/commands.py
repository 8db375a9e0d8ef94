"""Commands: published to agents, followed to their results, cancelled; and which commands there are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from osqbox.clock import rfc3339
from osqbox.comms.errors import conflict
from osqbox.comms.messages import Command, CommandStatus, KnownCommand
from osqbox.comms.protocol import idempotency_key
from osqbox.comms.publication import ARGS_BYTES, EXPIRY_MAX_S, TARGETS_MAX, WORD_MAX, parse_publication, word
from osqbox.comms.seams import Commands

from .agents import OfTenant
from .answers import answered
from .operations import SEQ_MAX, Body, operation
from .parts import OPERATOR, Parts

SHOWN_COMMANDS = 1000
"""Of one publication in its answer; the others are listed by its request_id."""

StatusName = Literal["pending", "sent", "in_progress", "success", "failed", "expired", "cancelled"]
Word = Annotated[str, Meta(min_length=1, max_length=WORD_MAX)]
Targets = Annotated[list[Word], Meta(max_length=TARGETS_MAX)]
Seconds = Annotated[float, Meta(gt=0, le=EXPIRY_MAX_S)]


class ActionFacts(msgspec.Struct):
    """What an agent is told to do."""

    name: Word
    version: Annotated[str, Meta(max_length=WORD_MAX)] = ""
    args: Annotated[dict[str, Any], Meta(description=f"At most {ARGS_BYTES} bytes as JSON.")] = {}


class NewCommands(Body, omit_defaults=True):
    """One action for agents, groups or all agents of a tenant."""

    action: ActionFacts
    agents: Annotated[Targets, Meta(description="Ids.")] = msgspec.field(default_factory=list)
    groups: Targets = msgspec.field(default_factory=list)
    all: bool = False
    timeout: Annotated[Seconds | None, Meta(description="Seconds until they expire; 24 hours.")] = None
    expires_in: Annotated[Seconds | None, Meta(description="The same, and stronger.")] = None
    request_id: Annotated[Word | None, Meta(description="Of this publication; made unless given.")] = None
    source: Word | None = None
    user: Word | None = None
    tenant: Word = "default"


class Which(OfTenant, kw_only=True):
    agent: Annotated[str | None, Meta(description="Id.")] = None
    status: StatusName | None = None
    request_id: Annotated[str | None, Meta(description="Those of one publication.")] = None
    before: Annotated[int, Meta(ge=0, le=SEQ_MAX, description="Those with a smaller seq.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 100


class NewKnownCommand(Body):
    """A command that may be published."""

    version: Annotated[str, Meta(max_length=WORD_MAX, description="Empty: any.")] = ""
    description: Annotated[str, Meta(max_length=1000)] = ""
    required_args: Annotated[tuple[Word, ...], Meta(max_length=100)] = ()


class TargetFacts(msgspec.Struct):
    """What the publication named: an agent, groups or all."""

    type: str
    id: str


class ResultFacts(msgspec.Struct):
    """What the agent says became of it: 0 success, 1 failure, 2 in progress, 3 timeout."""

    code: int
    message: str
    data: Any


class CommandFacts(msgspec.Struct):
    """One command for one agent."""

    id: str
    seq: int
    agent: str
    tenant: str
    request_id: str
    action: ActionFacts
    source: str
    user: str
    target: TargetFacts
    created_at: str
    expires_at: str
    status: StatusName
    sent_at: str | None
    deliveries: int
    ended_at: str | None
    result: ResultFacts | None


class PublishedCommands(msgspec.Struct):
    """What was published, one command for each agent; `commands` shows the first of them."""

    request_id: str
    count: int
    commands: list[CommandFacts]


class KnownCommandFacts(msgspec.Struct):
    """A command that may be published; an empty version is any."""

    name: str
    version: str
    description: str
    required_args: list[str]


class RemovedKnownCommand(msgspec.Struct):
    """No more to be published; what was published stays."""

    removed: str


def facts_of(command: Command) -> CommandFacts:
    """A command as the API shows it."""
    action, result = command.action, command.result
    times = {name: rfc3339(getattr(command, name)) for name in ("created_at", "expires_at", "sent_at", "ended_at")}
    same = ("id", "seq", "agent", "tenant", "request_id", "source", "user", "deliveries")
    facts: dict[str, Any] = {name: getattr(command, name) for name in same} | times
    return CommandFacts(
        **facts,
        status=command.status.value,
        action=ActionFacts(action.name, action.version, action.args),
        target=TargetFacts(command.target_type, command.target_id),
        result=None if result is None else ResultFacts(result.code, result.message, result.data),
    )


def add(routes: Blueprint, parts: Parts) -> None:
    _add_commands(routes, parts)
    _add_known_commands(routes, parts)


def _commands(parts: Parts) -> Commands:
    return parts.served_comms().indexer.commands


def _add_commands(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/commands")
    @operation(PublishedCommands, status=201, body=NewCommands)
    async def publish_commands(body: NewCommands) -> TrioResponse:
        """Tell agents to do something: all of those meant, or on an error none.

        With an Idempotency-Key header the request may be sent again: then it answers with the commands there are.
        """
        comms = parts.served_comms()
        comms.check_tenant(body.tenant)
        asked = msgspec.to_builtins(body)
        asked.pop("tenant", None)
        publication = parse_publication(asked)
        key = idempotency_key(request.headers.get("Idempotency-Key"))
        published = await comms.publisher.publish(publication, tenant=body.tenant, actor=OPERATOR, key=key)
        request_id = published[0].request_id if published else body.request_id or ""
        shown = [facts_of(each) for each in published[:SHOWN_COMMANDS]]
        return answered(PublishedCommands(request_id, len(published), shown), 201)

    @routes.get("/commands")
    @operation(list[CommandFacts], query=Which)
    async def list_commands(query: Which) -> TrioResponse:
        """The newest first."""
        asked = {name: getattr(query, name) for name in ("tenant", "agent", "request_id", "before", "limit")}
        status = None if query.status is None else CommandStatus(query.status)
        found = await _commands(parts).page(**asked, status=status)
        return answered([facts_of(each) for each in found])

    @routes.get("/commands/<id>")
    @operation(CommandFacts, query=OfTenant)
    async def show_command(id: str, query: OfTenant) -> TrioResponse:
        """One command, with its result once there is one."""
        return answered(facts_of(await parts.served_comms().command(query.tenant, id)))

    @routes.delete("/commands/<id>")
    @operation(CommandFacts, query=OfTenant)
    async def cancel_command(id: str, query: OfTenant) -> TrioResponse:
        """End a command that has no final result. An agent that has it already may still carry it out."""
        comms = parts.served_comms()
        found = await comms.command(query.tenant, id)
        cancelled = await comms.indexer.commands.cancel([id], actor=OPERATOR)
        if not cancelled:
            raise conflict(f"command {id!r} has ended: {(await comms.command(found.tenant, id)).status.value}")
        return answered(facts_of(cancelled[0]))


def _add_known_commands(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/known-commands")
    @operation(list[KnownCommandFacts])
    async def list_known_commands() -> TrioResponse:
        """The commands that may be published; all others are refused."""
        return answered([_known_facts(each) for each in await _commands(parts).known()])

    @routes.put("/known-commands/<name>")
    @operation(KnownCommandFacts, body=NewKnownCommand)
    async def put_known_command(name: str, body: NewKnownCommand) -> TrioResponse:
        """Let a command be published, or change what it needs."""
        known = KnownCommand(name=word(name, "name"), **msgspec.structs.asdict(body))
        await _commands(parts).put_known(known, actor=OPERATOR)
        return answered(_known_facts(known))

    @routes.delete("/known-commands/<name>")
    @operation(RemovedKnownCommand)
    async def remove_known_command(name: str) -> TrioResponse:
        """Refuse it from now on."""
        await _commands(parts).remove_known(name, actor=OPERATOR)
        return answered(RemovedKnownCommand(removed=name))


def _known_facts(known: KnownCommand) -> KnownCommandFacts:
    return KnownCommandFacts(known.name, known.version, known.description, list(known.required_args))
