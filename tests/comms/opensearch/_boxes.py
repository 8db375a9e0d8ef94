"""Boxes that share an indexer, each with its own store, journal, commands and hub, in one loop."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from osqbox import audit
from osqbox.comms.hub import Hub
from osqbox.comms.messages import Change, Command
from osqbox.comms.opensearch import mapping
from osqbox.comms.opensearch.client import Client, open_client
from osqbox.comms.opensearch.commands import OpenSearchCommands
from osqbox.comms.opensearch.journal import Journal
from osqbox.comms.sqlite import commands as table
from osqbox.feed import Feed
from osqbox.store import Store
from tests.comms._commands import HandClock, Rig

LIMIT_S = 100


class Box(Rig):
    def __init__(self, name: str, store: Store, clock: HandClock, client: Client) -> None:
        super().__init__(store, clock)
        self.name, self.client = name, client
        self.needed = True
        self.journal = Journal(client, clock, self.new_id, self._changed, lambda: self.needed)
        self.commands: Any = OpenSearchCommands(client, self.journal, store, clock, self.new_id, self._changed)
        self.indexer.commands = self.commands
        self.hub = Hub(self.indexer, clock, None, self.journal.announce)
        self._connections = itertools.count(1)
        self._ids = itertools.count(1)
        self.life: trio.CancelScope | None = None
        self._scopes: list[trio.CancelScope] = []

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(8)

    def new(self, agent: str, name: str = "restart", args: Any = None, **facts: Any) -> Any:
        """Ids are unique over boxes."""
        facts.setdefault("id", f"{self.name}{next(self._ids)}")
        return super().new(agent, name, args, **facts)

    def attach(self, uuid: str = "a", after: int | None = None, *, connection: str = "", valid_s: float = 900) -> Any:
        name = connection or f"{self.name} {next(self._connections)}"
        return super().attach(uuid, after, connection=name, valid_s=valid_s)

    def heard(self, kind: str) -> list[Change]:
        return [each for each in self.changes if each.kind == kind]

    def ends_with(self, scope: trio.CancelScope) -> None:
        """What is in it ends when the box is killed."""
        self._scopes.append(scope)

    def kill(self) -> None:
        """Everything of it ends where it is."""
        assert self.life is not None
        for scope in (*self._scopes, self.life):
            scope.cancel()


async def _live(
    name: str, url: str, prefix: str, folder: Path, clock: HandClock, *, task_status: Any = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as life:
        async with open_client(url, mapping.prepare, ca=None, auth=None, prefix=prefix) as client:
            path = folder / f"{name}-{secrets.token_hex(4)}.db"
            store = Store.open(path, [audit.migrations, table.migrations], clock, Feed())
            box = Box(name, store, clock, client)
            box.life = life
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                try:
                    nursery.start_soon(box.journal.run)
                    task_status.started(box)
                    await trio.sleep_forever()
                finally:
                    await store.aclose()


class Boxes:
    def __init__(self, url: str, prefix: str, folder: Path, nursery: trio.Nursery) -> None:
        self.url, self.prefix, self.folder, self.nursery = url, prefix, folder, nursery
        self.clock = HandClock(time.time())
        """Stands still but for the test, so that nothing is tidied up just then."""

    async def start(self, name: str) -> Box:
        box: Box = await self.nursery.start(_live, name, self.url, self.prefix, self.folder, self.clock)
        return box

    def index(self, name: str) -> str:
        return self.prefix + name


@asynccontextmanager
async def open_boxes(url: str, folder: Path, names: Iterable[str] = "AB") -> AsyncIterator[tuple[Boxes, list[Box]]]:
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        boxes = Boxes(url, f"t{secrets.token_hex(4)}-", folder, nursery)
        with trio.fail_after(LIMIT_S):
            yield boxes, [await boxes.start(name) for name in names]
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool], within_s: float = 30) -> None:
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.005)


def with_boxes(url: str, folder: Path, test: Callable[..., Awaitable[None]], names: str = "AB") -> None:
    async def run() -> None:
        async with open_boxes(url, folder, names) as (boxes, started):
            await test(boxes, *started)

    trio.run(run)


async def offered(box: Box, agent: str = "a", after: int = 0, limit: int = 100) -> list[str]:
    return [each.id for each in await box.commands.after(agent, after, limit=limit)]


async def level(*boxes: Box) -> None:
    await until(lambda: len({each.journal.head for each in boxes}) == 1)


async def tail_gone(box: Box) -> None:
    await until(lambda: box.journal.settled == box.journal.head)
    box.clock.at += 60
    await until(lambda: len(box.commands._tail) == 0)


def ids(commands: list[Command]) -> list[str]:
    return [each.id for each in commands]
