"""What the tests of events stand on: a real store with the tables of events and states, and agents made up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from osqbox import audit
from osqbox.comms import bodies
from osqbox.comms.messages import Agent, Event, Operation, Result, ResultOutcome, StateChange
from osqbox.comms.sqlite import commands, events, states
from osqbox.comms.sqlite.events import SqliteEvents
from osqbox.comms.sqlite.states import SqliteStates
from osqbox.feed import Feed
from osqbox.store import Store

NOW = 1_700_000_000.0
MIGRATIONS = (audit.migrations, commands.migrations, states.migrations, events.migrations)


class HandClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> float:
        return self.at


def agent(uuid: str = "a1", tenant: str = "default", **more: Any) -> Agent:
    return Agent(uuid=uuid, tenant=tenant, name=f"name-of-{uuid}", **more)


def event(number: int, agent: str = "a1", *, tenant: str = "default", **more: Any) -> Event:
    facts = {"module": "logcollector", "collector": "file", "data": {"number": number}, "id": f"{agent}-{number}"}
    return Event(agent=agent, tenant=tenant, received_at=NOW + number, **{**facts, **more})


def change(id: str, operation: Operation = Operation.UPDATE, **data: Any) -> StateChange:
    index = "wazuh-states-inventory-packages"
    return StateChange(index=index, id=id, operation=operation, data=None if operation == "delete" else data)


def lines(*objects: Any) -> bytes:
    return b"\n".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in objects)


def line_one(uuid: str = "a1") -> dict[str, Any]:
    return {"agent": {"id": uuid, "name": "web", "type": "Endpoint", "version": "5.0.0", "groups": ["x"], "host": {}}}


class MadeUpCommands:
    """As much of `Commands` as results need: of each agent, the ids it may report on."""

    def __init__(self, **owned: set[str]) -> None:
        self.owned = owned
        self.taken: list[tuple[str, str, Result]] = []
        self.ended: set[str] = set()

    async def take_result(self, agent: str, id: str, result: Result, at: float) -> ResultOutcome:
        await trio.lowlevel.checkpoint()
        if id not in self.owned.get(agent, ()):
            return ResultOutcome.FOREIGN
        if id in self.ended:
            return ResultOutcome.ENDED
        if any(id == taken for _, taken, _ in self.taken):
            return ResultOutcome.REPEATED
        self.taken.append((agent, id, result))
        return ResultOutcome.TAKEN


class Rig:
    def __init__(self, store: Store, clock: HandClock) -> None:
        self.store, self.clock = store, clock
        self.states, self.events = SqliteStates(store), SqliteEvents(store)
        self.commands: Any = MadeUpCommands()
        self.agents = self.groups = None

    def statistics(self) -> dict[str, Any]:
        return {}

    async def keep(self, *wanted: Event) -> None:
        await self.events.add(wanted)

    def kinds(self) -> list[tuple[str, str | None, dict[str, Any]]]:
        rows = self.store.peek(
            lambda db: db.execute("SELECT kind, tenant, data FROM feed_events ORDER BY seq").fetchall()
        )
        return [(kind, tenant, json.loads(data)) for kind, tenant, data in rows]


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Rig]:
    clock = HandClock()
    store = Store.open(directory / "osqbox.db", MIGRATIONS, clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            yield Rig(store, clock)
        finally:
            await store.aclose()


def run(test: Callable[[Rig], Any], directory: Path) -> None:
    async def main() -> None:
        with trio.fail_after(25):
            async with opened(directory) as rig:
                await test(rig)

    trio.run(main)


def items(parsed: bodies.Stateful) -> Iterable[tuple[str, str]]:
    return [(type(item).__name__, item.id) for item in parsed.items]
