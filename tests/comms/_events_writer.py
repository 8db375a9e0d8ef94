"""A process that stores batches, one event each, and prints every answer after it may be given; made to be killed.

``python _events_writer.py DIRECTORY FIRST``: batches from the number FIRST on, each with an Idempotency-Key of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from osqbox.clock import SystemClock
from osqbox.comms.messages import Agent, Event, Operation, StateChange
from osqbox.comms.sqlite import events, states
from osqbox.comms.sqlite.events import SqliteEvents
from osqbox.comms.sqlite.states import SqliteStates
from osqbox.feed import Feed
from osqbox.store import Store

BATCHES_MAX = 5_000


class Writer:
    def __init__(self, store: Store) -> None:
        self.states, self.events = SqliteStates(store), SqliteEvents(store)
        self.agent = Agent(uuid="a1", tenant="default", name="web")

    async def batch(self, name: str) -> None:
        changes = [
            StateChange(index="i", id=f"{name}-{each}", operation=Operation.UPDATE, data={"v": each})
            for each in range(2)
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.log, name)
            done = await self.states.apply(self.agent, changes, batch=f"key:{name}")
        sys.stdout.write(json.dumps([name, [[each.id, each.result] for each in done]]) + "\n")
        sys.stdout.flush()

    async def log(self, name: str) -> None:
        facts = {"agent": "a1", "tenant": "default", "module": "m", "collector": "c"}
        await self.events.add([Event(id=f"e-{name}", data={}, received_at=0.0, **facts)])


async def main(directory: Path, first: int) -> None:
    store = Store.open(directory / "osqbox.db", (states.migrations, events.migrations), SystemClock(), Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        writer = Writer(store)
        for number in range(first, first + BATCHES_MAX):
            await writer.batch(f"b{number}")
        await store.aclose()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
