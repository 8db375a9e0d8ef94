"""The indexer of several boxes: agents, groups, commands and states in OpenSearch, behind the seams."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from osqbox.clock import Clock
from osqbox.comms.messages import Change
from osqbox.comms.seams import OnChange
from osqbox.settings import Retention
from osqbox.store import Store

if TYPE_CHECKING:
    from .client import Client
    from .journal import Journal

PREFIX = "osqbox-"
"""Boxes that share an indexer and a prefix are one fleet."""


class OpenSearchIndexer:
    """The seam `Indexer`."""

    def __init__(
        self, client: Client, journal: Journal, store: Store, clock: Clock, new_id: Callable[[], str], tell: OnChange
    ) -> None:
        from .agents import OpenSearchAgents
        from .commands import OpenSearchCommands
        from .groups import OpenSearchGroups
        from .states import OpenSearchStates

        self.client, self.journal = client, journal
        self.groups = OpenSearchGroups(client, journal, store, clock)
        self.commands = OpenSearchCommands(client, journal, store, clock, new_id, tell)
        self.agents = OpenSearchAgents(client, journal, self.groups, self.commands, store, clock)
        self.states = OpenSearchStates(client, store, clock)

    def heard(self, change: Change) -> None:
        """News from the journal: what this box keeps of it is out of date."""
        self.groups.heard(change)
        self.agents.heard(change)

    def announce(self, agent: str, connection: str) -> None:
        """The agent is at this box now: an older connection, wherever it is, ends."""
        self.journal.announce(agent, connection)

    async def prune(self, retention: Retention) -> None:
        """Drop what is beyond its bound; any box of the fleet may, also several at once."""
        while await self.commands.prune(retention.comms_commands):
            pass
        await self.states.forget_answers(retention.comms_batches_s)

    def statistics(self) -> dict[str, Any]:
        return {
            "kind": "opensearch",
            **self.client.statistics(),
            "agents": self.agents.statistics(),
            "commands": self.commands.statistics(),
        }


@asynccontextmanager
async def open_opensearch(
    url: str,
    *,
    ca: Path | None,
    auth: tuple[str, str] | None,
    store: Store,
    clock: Clock,
    on_change: OnChange,
    prefix: str = PREFIX,
    new_id: Callable[[], str] = lambda: uuid4().hex,
    is_needed: Callable[[], bool] = lambda: True,
) -> AsyncGenerator[OpenSearchIndexer]:
    """The shared indexer; if it cannot be reached it is down at first, and there by itself as soon as it can.

    ``is_needed``: whether an agent waits on this box, so that the journal is looked at often. ``prefix`` is that of
    the fleet's indices. Raises BadSetup, BadUsage, Unsafe.
    """
    from .client import open_client, running
    from .journal import Journal
    from .mapping import prepare

    def tell(change: Change) -> None:
        indexer.heard(change)
        on_change(change)

    async with open_client(url, prepare, ca=ca, auth=auth, prefix=prefix) as client:
        journal = Journal(client, clock, new_id, tell, is_needed)
        indexer = OpenSearchIndexer(client, journal, store, clock, new_id, tell)
        async with running(journal.run):
            yield indexer
