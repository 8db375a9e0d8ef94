"""The words of the comms API, as frozen values. Times are seconds since the epoch. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

Json: TypeAlias = Any
"""Whatever JSON can say."""


class Profile(StrEnum):
    """Which dialect a request is in: the design spike's, or that of the C++ agent of 2024-25."""

    SPIKE = "spike"
    G1 = "g1"


# agents


class AgentStatus(StrEnum):
    NEVER_CONNECTED = "never_connected"
    ACTIVE = "active"
    """Has logged in at least once."""
    REVOKED = "revoked"
    """Its tokens and its key are refused; it can be allowed again."""


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    uuid: str
    tenant: str
    name: str
    type: str = "Endpoint"
    version: str = ""
    groups: tuple[str, ...] = ("default",)
    """In order: the configuration of a later group overrides that of an earlier one."""
    host: dict[str, Json] = {}
    """As the agent told at its registration: hostname, architecture, ip, os."""
    status: AgentStatus = AgentStatus.NEVER_CONNECTED
    key_version: int = 1
    """Grows with every new key and every revocation; tokens carry it, so older ones are refused."""
    created_at: float = 0.0
    last_login_at: float | None = None
    last_seen_at: float | None = None


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a login is checked against."""

    agent: Agent
    key_hash: str
    """base64(16-byte salt + PBKDF2-HMAC-SHA256, 100,000 rounds), as upstream keeps it."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    tenant: str
    name: str
    configuration: str = ""
    """YAML text, as it was given."""
    version: int = 0
    """Grows by one with every change of the configuration; 0 before the first."""
    sha256: str = ""
    """Of the text, in hexadecimal."""
    changed_at: float = 0.0
    changed_by: str = ""


# commands


class Action(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str = ""
    args: Json = {}


class KnownCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that may be published."""

    name: str
    version: str = ""
    """Empty: any version."""
    description: str = ""
    required_args: tuple[str, ...] = ()


class CommandStatus(StrEnum):
    PENDING = "pending"
    SENT = "sent"
    """Written to a stream or an answer: no acknowledgement yet."""
    IN_PROGRESS = "in_progress"
    """The agent said code 2: acknowledged, not ended."""
    SUCCESS = "success"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


OPEN_STATES = frozenset((CommandStatus.PENDING, CommandStatus.SENT, CommandStatus.IN_PROGRESS))
"""A command in one of these may still change."""

OFFERED_STATES = frozenset((CommandStatus.PENDING, CommandStatus.SENT))
"""Not acknowledged: offered again to an agent that comes back without saying where it was."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says became of a command: 0 success, 1 failure, 2 in progress, 3 timeout."""

    code: int
    message: str = ""
    data: Json = None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One command for one agent. A publication to many agents makes one for each."""

    id: str
    """The agents' `document_id`."""
    seq: int
    """Grows along the publications; the SSE id. A later command of an agent has a greater one, on every box."""
    agent: str
    tenant: str
    action: Action
    request_id: str
    """The same for every command of one publication."""
    source: str = "Users/Services"
    user: str = ""
    target_type: str = "agent"
    """What the publication named: agent, group or all."""
    target_id: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0
    status: CommandStatus = CommandStatus.PENDING
    sent_at: float | None = None
    deliveries: int = 0
    """How often it was written to the agent."""
    answered: bool = False
    """Whether a write to the agent is known to have been completed."""
    ended_at: float | None = None
    result: Result | None = None


class NewCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that is to be published; the seam gives it its ``seq``."""

    id: str
    agent: str
    tenant: str
    action: Action
    request_id: str
    source: str = "Users/Services"
    user: str = ""
    target_type: str = "agent"
    target_id: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0


class ResultOutcome(StrEnum):
    """What a reported result did."""

    TAKEN = "taken"
    REPEATED = "repeated"
    """The command had its final result already: nothing changed."""
    FOREIGN = "foreign"
    """No such command for this agent."""
    ENDED = "ended"
    """Expired or cancelled before the result came: nothing changed."""


# events


class Operation(StrEnum):
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


class StateChange(msgspec.Struct, frozen=True, kw_only=True):
    """One stateful event: a change of a document in an index, addressed by ``(agent, index, id)``."""

    index: str
    """Such as ``wazuh-states-inventory-packages``."""
    id: str
    operation: Operation
    data: dict[str, Json] | None = None
    """None for a delete."""


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one stateful event."""

    id: str
    result: str
    """created, updated, deleted; else the reason of the refusal in words."""
    status: int
    """200-206 when it was stored, else as the indexer said: 404, 409, 400."""


class StateDocument(msgspec.Struct, frozen=True, kw_only=True):
    index: str
    id: str
    agent: str
    tenant: str
    version: int
    """Grows by one with every change."""
    data: dict[str, Json]
    changed_at: float


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One stateless event."""

    agent: str
    tenant: str
    module: str
    collector: str
    data: Json
    received_at: float
    id: str = ""
    """Given at receipt; what a consumer recognises a repetition by."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something every box that serves the same agents has to know. ``agents`` None: all of the tenant, or everyone."""

    kind: str
    """commands, agents, groups, attached, known_commands"""
    agents: tuple[str, ...] | None = None
    tenant: str | None = None
    connection: str = ""
    """attached: the connection that now has the agent's stream; an older one anywhere ends."""
