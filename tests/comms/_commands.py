"""What the tests of commands stand on: a real store, agents made up on the spot, and a hub."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from osqbox import audit
from osqbox.clock import Clock
from osqbox.comms.hub import Deliver, Hub, HubBounds, Item
from osqbox.comms.messages import Action, Agent, AgentStatus, Change, Command, NewCommand
from osqbox.comms.sqlite import commands as table
from osqbox.comms.sqlite.commands import SqliteCommands
from osqbox.feed import Feed
from osqbox.store import Store

NOW = 1_700_000_000.0


class HandClock:
    def __init__(self, at: float = NOW) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


class MadeUpAgents:
    """As much of `Agents` as commands need: any uuid exists until the test says otherwise."""

    def __init__(self) -> None:
        self.changed: dict[str, Agent | None] = {}
        self.members: dict[str, list[str]] = {}

    async def find(self, uuid: str) -> Agent | None:
        await trio.lowlevel.checkpoint()
        return self.changed.get(uuid, agent(uuid))

    async def addressed(
        self, tenant: str, *, agents: Sequence[str] = (), groups: Sequence[str] = (), everyone: bool = False
    ) -> list[str]:
        found = [*agents, *(uuid for group in groups for uuid in self.members[group])]
        if everyone:
            found += [uuid for members in self.members.values() for uuid in members]
        return list(dict.fromkeys(found))


class MadeUpIndexer:
    def __init__(self, agents: MadeUpAgents, commands: Any) -> None:
        self.agents, self.commands = agents, commands
        self.groups = self.states = None

    def statistics(self) -> dict[str, Any]:
        return {}


class Rig:
    def __init__(self, store: Store, clock: Any, bounds: HubBounds | None = None) -> None:
        self.store, self.clock = store, clock
        self.changes: list[Change] = []
        self.agents = MadeUpAgents()
        self.commands = SqliteCommands(store, self._changed, clock)
        self.indexer: Any = MadeUpIndexer(self.agents, self.commands)
        self.attached: list[tuple[str, ...]] = []
        self.hub = Hub(self.indexer, clock, bounds, lambda *told: self.attached.append(told))
        self._numbers = itertools.count(1)
        self._connections = itertools.count(1)

    def _changed(self, change: Change) -> None:
        self.changes.append(change)
        self.hub.changed(change)

    async def publish(self, *agents: str, name: str = "restart", args: Any = None, **facts: Any) -> list[Command]:
        return await self.commands.publish([self.new(agent, name, args, **facts) for agent in agents], actor="operator")

    def new(self, agent: str, name: str = "restart", args: Any = None, **facts: Any) -> NewCommand:
        now = self.clock.now()
        facts = {"request_id": "r1", "created_at": now, "expires_at": now + 3600, "tenant": "default", **facts}
        facts.setdefault("id", f"c{next(self._numbers)}")
        return NewCommand(agent=agent, action=Action(name=name, args=args or {}), **facts)

    def attach(self, uuid: str = "a", after: int | None = None, *, connection: str = "", valid_s: float = 900) -> Any:
        return self.hub.attach(
            agent(uuid),
            connection=connection or f"connection {next(self._connections)}",
            after=after,
            expires_at=self.clock.now() + valid_s,
        )

    async def poll(
        self, uuid: str = "a", *, wait_s: float = 0, valid_s: float = 900, wait_gone: Any = None
    ) -> list[str]:
        commands = await self.hub.poll(
            agent(uuid),
            connection=f"connection {next(self._connections)}",
            wait_s=wait_s,
            expires_at=self.clock.now() + valid_s,
            wait_gone=wait_gone,
        )
        return [each.id for each in commands]

    async def found(self, id: str) -> Command:
        command = await self.commands.find(id)
        assert command is not None
        return command

    async def events(self, kind: str) -> list[dict[str, Any]]:
        rows = await self.store.read(
            lambda db: db.execute("SELECT data FROM feed_events WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
        )
        return [msgspec.json.decode(row[0]) for row in rows]

    def revoke(self, uuid: str, *, gone: bool = False) -> None:
        self.agents.changed[uuid] = (
            None if gone else msgspec.structs.replace(agent(uuid), status=AgentStatus.REVOKED, key_version=2)
        )
        self.hub.changed(Change(kind="agents", agents=(uuid,)))


def agent(uuid: str, **facts: Any) -> Agent:
    return Agent(**{"uuid": uuid, "tenant": "default", "name": uuid, "status": AgentStatus.ACTIVE, **facts})


@asynccontextmanager
async def open_rig(
    folder: Path, clock: Clock | None = None, bounds: HubBounds | None = None, *, limit_s: float = 25
) -> AsyncIterator[Rig]:
    """As often as a test wants on the same folder: that is a restart."""
    clock = clock or HandClock()
    store = Store.open(folder / "box.db", [audit.migrations, table.migrations], clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        with trio.fail_after(limit_s):
            try:
                yield Rig(store, clock, bounds)
            finally:
                await store.aclose()


def ids(item: Item | None) -> list[str]:
    assert isinstance(item, Deliver), item
    return [each.id for each in item.commands]
