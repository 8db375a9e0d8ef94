"""What the tests of agents, keys and logins stand on: a real store with the indexer on it, and a clock set by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import trio

from osqbox import audit, tenants
from osqbox.attempts import Attempts
from osqbox.comms.errors import CommsError
from osqbox.comms.hashing import Hasher
from osqbox.comms.keys import SigningKeys, _new_key
from osqbox.comms.login import Login
from osqbox.comms.messages import Agent, Change
from osqbox.comms.registration import Enrollment, new_agent
from osqbox.comms.sqlite import MIGRATIONS, SqliteIndexer
from osqbox.comms.tokens import Tokens
from osqbox.feed import Event, Feed
from osqbox.store import Store

NOW = 1_700_000_000.0
PEER = "192.0.2.1"


class HandClock:
    def __init__(self, at: float = NOW) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


@cache
def pem(algorithm: Any, number: int) -> bytes:
    """A private key; the same one for the same words, since making one takes its time."""
    return _new_key(algorithm)


def lay_key(directory: Path, algorithm: str = "RS256", number: int = 0, at: float = NOW) -> Path:
    """A key in the directory as if it had been made at that time."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{int(at * 1000)}.key"
    file.write_bytes(pem(algorithm, number))
    return file


class Rig:
    """A box without its listeners. The two agents' key is ``KEY``."""

    def __init__(self, store: Store, clock: HandClock, keys: SigningKeys, attempts: Attempts) -> None:
        self.store, self.clock, self.keys = store, clock, keys
        self.changes: list[Change] = []
        self.indexer = SqliteIndexer(store, self.changes.append, clock)
        self.agents, self.groups = self.indexer.agents, self.indexer.groups
        self.tokens = Tokens(keys)
        self.hasher = Hasher()
        self.login = Login(self.agents, self.tokens, self.hasher, clock, store, attempts)
        self.enrollment = Enrollment(self.agents, keys, self.hasher, clock, store, attempts)

    async def add(self, uuid: str, *, key_hash: str = "unset", **facts: Any) -> Agent:
        made = new_agent(uuid=uuid, name=facts.pop("name", f"name of {uuid}"), now=self.clock.now(), **facts)
        return await self.agents.add(made, key_hash, actor="operator")

    async def add_tenant(self, name: str, secret: str | None = None, **options: Any) -> None:
        def work(tx: Any) -> None:
            if tenants.find(tx.db, name) is None:
                tenants.create(tx, name, tenants.TenantOptions())
            if secret is not None:
                tenants.add_secret(tx, name, secret, **options)

        await self.store.write(work)

    async def audited(self, action: str) -> list[dict[str, Any]]:
        return await self.store.read(lambda db: audit.rows(db, action=action))

    async def told(self) -> list[tuple[str, dict[str, Any]]]:
        """What is in the feed of agents and configurations."""
        from osqbox import feed

        events: list[Event] = await self.store.read(lambda db: feed.events_after(db, 0))
        return [(event.kind, event.data) for event in events if event.kind.startswith(("comms_", "configuration_"))]


def with_rig(folder: Path, test: Callable[[Rig], Awaitable[None]], *, per_address: int = 1000) -> None:
    """Runs ``test`` with a `Rig` on ``folder``, within 25 s; a second run finds what the first has left."""

    async def main() -> None:
        clock = HandClock()
        lay_key(folder / "keys")
        keys = SigningKeys.open(folder / "keys", "RS256", NOW)
        steps = (tenants.migrations, audit.migrations, *MIGRATIONS)
        store = Store.open(folder / "osqbox.db", steps, clock, Feed())
        with trio.fail_after(25):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                rig = Rig(store, clock, keys, Attempts(per_address=per_address))
                try:
                    await rig.add_tenant(tenants.DEFAULT)
                    await test(rig)
                finally:
                    await store.aclose()

    trio.run(main)


async def refusal(work: Callable[[], Awaitable[object]]) -> CommsError:
    """What it is refused with."""
    try:
        await work()
    except CommsError as error:
        return error
    raise AssertionError("expected a CommsError, got an answer")
