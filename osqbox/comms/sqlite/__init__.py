"""The indexer on the box's own database."""

from __future__ import annotations

from functools import partial
from typing import Any

from osqbox.clock import Clock
from osqbox.comms.seams import OnChange
from osqbox.settings import Retention
from osqbox.store import Store

from . import agents, commands, events, groups, states
from .agents import SqliteAgents
from .commands import SqliteCommands
from .durable import durably
from .groups import SqliteGroups
from .states import SqliteStates

MIGRATIONS = (groups.migrations, agents.migrations, commands.migrations, states.migrations, events.migrations)
"""After those of tenants and the audit."""


class SqliteIndexer:
    """The seam `Indexer`: what one box alone needs."""

    def __init__(self, store: Store, on_change: OnChange, clock: Clock) -> None:
        self._store = store
        self.agents = SqliteAgents(store, on_change)
        self.groups = SqliteGroups(store, on_change)
        self.commands = SqliteCommands(store, on_change, clock)
        self.states = SqliteStates(store)

    async def prune(self, retention: Retention) -> None:
        """Oldest first, in small writes that let the others pass."""
        while await durably(self._store, partial(commands.prune, keep=retention.comms_commands), bulk=True):
            pass
        await durably(self._store, partial(states.prune_batches, keep_s=retention.comms_batches_s), bulk=True)

    def statistics(self) -> dict[str, Any]:
        found = self._store.statistics()
        return {"kind": "sqlite", "up": True, "queued_writes": found.queued_jobs, "commits": found.commits}
