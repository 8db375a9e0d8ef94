"""The indexer on the box's own database."""

from __future__ import annotations

from typing import Any

from osqbox.clock import Clock
from osqbox.comms.seams import OnChange
from osqbox.store import Store

from . import agents, commands, events, groups, states
from .agents import SqliteAgents
from .commands import SqliteCommands, cancel_of_agent
from .groups import SqliteGroups
from .states import SqliteStates

MIGRATIONS = (groups.migrations, agents.migrations, commands.migrations, states.migrations, events.migrations)
"""After those of tenants and the audit."""


class SqliteIndexer:
    """The seam `Indexer`: what one box alone needs."""

    def __init__(self, store: Store, on_change: OnChange, clock: Clock) -> None:
        self._store = store
        self.agents = SqliteAgents(store, on_change, cancel_of_agent)
        self.groups = SqliteGroups(store, on_change)
        self.commands = SqliteCommands(store, on_change, clock)
        self.states = SqliteStates(store)

    def statistics(self) -> dict[str, Any]:
        found = self._store.statistics()
        return {"kind": "sqlite", "up": True, "queued_writes": found.queued_jobs, "commits": found.commits}
