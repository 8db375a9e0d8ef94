"""The words of the shell broker. Times are seconds, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

KIB = 1024
MIB = 1024 * KIB


class State(StrEnum):
    REQUESTED = "requested"
    """An operator asked; the agent has not fetched the secret."""
    OFFERED = "offered"
    """The agent has the secret and some time to join."""
    OPEN = "open"
    DETACHED = "detached"
    """The agent's connection dropped, or the box restarted; the agent has some time to come back."""
    ENDED = "ended"


class EndReason(StrEnum):
    EXIT = "exit"
    OPERATOR_LEFT = "operator_left"
    KILLED = "killed"
    AGENT_LOST = "agent_lost"
    EXPIRED = "expired"
    """The agent never came."""
    REFUSED = "refused"
    """The agent would not run the shell, or broke the protocol."""
    SECRET_REUSED = "secret_reused"  # noqa: S105 - the reason's name
    IDLE = "idle"
    MAX_TIME = "max_time"
    RECORDING_FAILED = "recording_failed"
    BOX_STOPPED = "box_stopped"


class Grant(StrEnum):
    """What an operator may do in a session, and what a viewer does now."""

    CONTROLLER = "controller"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class ShellBounds:
    ring_bytes: int = 4 * MIB
    """Output of a session kept in memory; it grows on demand."""
    sessions: int = 2000
    sessions_per_node: int = 8
    sessions_per_operator: int = 64
    viewers_per_session: int = 32
    clients_per_session: int = 256
    """Names under which input is counted, connected or not."""
    tickets: int = 10_000
    pending_s: float = 300
    """From the request until the agent must have joined."""
    join_s: float = 60
    """From the pick-up of a secret until it is void."""
    hello_s: float = 10
    """From the upgrade until the first frame."""
    hold_s: float = 12
    """How long a poll without work is held open; agents give up after 16 s."""
    held_polls_per_node: int = 4
    agent_grace_s: float = 60
    viewer_grace_s: float = 60
    """How long a session waits for its last operator, who dropped."""
    unwatched_s: float = 300
    """How long an open shell waits for its first operator."""
    idle_s: float | None = 15 * 60
    """Without a byte in either direction; None is for ever."""
    max_s: float | None = 8 * 3600
    notice_s: float = 60
    """The notice before an end for either of these."""
    ticket_s: float = 30
    input_bytes_per_s: int = 64 * KIB
    input_burst_bytes: int = MIB
    """Input beyond rate and burst waits; none is cut."""
    input_queue_bytes: int = MIB
    """Input that waits for the agent; then the controller is no longer read."""
    lag_bytes: int = 2 * MIB
    """A viewer further behind than this is moved forward."""
    viewer_stall_s: float = 8
    """A viewer with something to read that acknowledges nothing for so long is closed."""
    controller_stall_s: float = 30
    send_stall_s: float = 20
    """A send to an agent that takes longer means that it is gone."""
    resize_every_s: float = 0.1
    flush_s: float = 5
    """Without progress, what viewers get after the end to read the rest."""
    close_s: float = 2
    """For saying goodbye to everybody when the broker stops."""
    recordings_age_s: float = 30 * 24 * 3600
    recordings_bytes: int = 2 * 1024 * MIB
    """Recordings of ended sessions that are older, or more than this in all, are deleted, the oldest first."""


@dataclass(frozen=True, slots=True)
class Session:
    """The facts of one session as they are now."""

    id: str
    node: str
    tenant: str
    hostname: str
    state: State
    by: str
    reason: str
    created_at: float
    opened_at: float | None = None
    ended_at: float | None = None
    end_reason: EndReason | None = None
    exit_code: int | None = None
    signal: int | None = None
    cols: int = 80
    rows: int = 24
    shell: str | None = None
    user: str | None = None
    title: str = ""
    protocol: str | None = None
    """``shell.v1`` or ``launcher``; None until the agent has joined."""
    viewers: tuple[tuple[str, Grant], ...] = ()
    """Who is connected, and what each does."""
    controller: str | None = None
    output_bytes: int = 0
    recording: bool = True
    record_input: bool = False
    dropped_input_bytes: int = 0
    """Typed by those who may only watch."""

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED


@dataclass(frozen=True, slots=True)
class Ticket:
    """A one-time right to watch or type in one session, for a browser that cannot send a token."""

    ticket: str = field(repr=False)
    expires_at: float


@dataclass(frozen=True, slots=True)
class Redeemed:
    """Whom a ticket was given to, and for what."""

    by: str
    grant: Grant


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    sessions: dict[str, int]
    """Live ones by state."""
    viewers: int
    held_polls: int
    output_bytes: int
    input_bytes: int
    dropped_input_bytes: int
    skipped_bytes: int
    """Output that slow viewers were moved past."""
    refused: dict[str, int]


class GetShells(msgspec.Struct, frozen=True):
    """The body of get-shells."""

    node_key: str = ""


class JoinBody(msgspec.Struct, frozen=True):
    """The body of the POST that asks where to join; any object will do."""

    node_key: str | None = None
