"""What comms agents count; one object for an agent, or for all of a swarm. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

MAX_KINDS = 50
MAX_KIND_LETTERS = 160
_OTHER = "other"


@dataclass(slots=True)
class Statistics:
    enrollments: int = 0
    logins: int = 0
    renewals: int = 0
    """Logins that replaced a token before it expired; counted in ``logins`` too."""
    refused_agents: int = 0
    """Agents that ended because the server does not know them or their key."""
    stateless_sent: int = 0
    """Events in requests, every attempt counted."""
    stateless_acknowledged: int = 0
    stateful_sent: int = 0
    stateful_acknowledged: int = 0
    """Accepted with their request, refused ones included."""
    events_refused: int = 0
    """Stateful events whose own status says that they were not stored."""
    events_dropped: int = 0
    """Came to a full queue."""
    commands_received: int = 0
    commands_duplicate: int = 0
    """Received again."""
    commands_out_of_order: int = 0
    """New, but numbered before one that was received earlier."""
    commands_invalid: int = 0
    results_sent: int = 0
    """Results of commands in acknowledged requests."""
    reconnects: int = 0
    """Streams or polls begun again after one that ended early."""
    streams_open: int = 0
    resets: int = 0
    byes: int = 0
    configurations: int = 0
    upgrades: int = 0
    upgrades_resumed: int = 0
    restarts: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """By call and what went wrong."""

    def error(self, call: str, reason: str) -> None:
        kind = f"{call}: {reason}"[:MAX_KIND_LETTERS]
        self.errors[kind if kind in self.errors or len(self.errors) < MAX_KINDS else _OTHER] += 1

    def facts(self) -> dict[str, Any]:
        """By name, for reports."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**found, "errors": dict(self.errors.most_common())}
