"""The comms API as one thing: the indexer, identities, streams and queues, opened and closed in order.

signing keys ─▶ indexer ─▶ hub ─▶ engine, intake, upkeep ─▶ served
stop: streams told goodbye ─▶ (the listeners drain) ─▶ the intake drained ─▶ the indexer closed
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from osqbox import tenants
from osqbox.clock import Clock
from osqbox.errors import BadSetup
from osqbox.settings import CommsSettings, Retention
from osqbox.store import Store

from . import configuration
from .engine import SocketEngine, StandIn
from .errors import conflict, not_found
from .hashing import Hasher
from .hub import Hub, HubBounds
from .intake import Intake
from .keys import DIRECTORY, SigningKeys
from .login import Login
from .messages import Action, Change, Group
from .publication import Order, Publication
from .publisher import Publisher
from .registration import Enrollment
from .routes import CommsApi, PublishersApi
from .seams import Events, Indexer
from .sqlite import SqliteIndexer
from .sqlite.events import SqliteEvents
from .tokens import Tokens
from .upgrades import Upgrades
from .upkeep import Upkeep

DRAIN_S = 2.0
"""For events that are queued when the box stops."""
FLUSH_S = 1.0
"""For writing when agents were last heard of."""
FETCH_CONFIG = "fetch-config"
UPGRADES = "upgrades"
"""Beside the database."""


@dataclass(eq=False, slots=True)
class Comms:
    """What routes and the operator API use."""

    store: Store
    clock: Clock
    settings: CommsSettings
    new_id: Callable[[], str]
    indexer: Indexer
    events: Events
    keys: SigningKeys
    tokens: Tokens
    hasher: Hasher
    login: Login
    enrollment: Enrollment
    hub: Hub
    publisher: Publisher
    engine: StandIn | SocketEngine
    intake: Intake
    upgrades: Upgrades
    api: CommsApi = field(init=False)
    """Of the comms listener."""
    publishers: PublishersApi = field(init=False)
    """Of the unix socket."""

    def __post_init__(self) -> None:
        self.api, self.publishers = CommsApi(self), PublishersApi(self)

    async def configure(
        self, tenant: str, name: str, text: str, *, actor: str, expected_version: int | None = None
    ) -> Group:
        """Change a group's configuration and tell its agents. Raises CommsError 400, 404, 409, 413; IndexerDown."""
        await trio.to_thread.run_sync(configuration.read, text)
        before = await self.indexer.groups.find(tenant, name)
        group = await self.indexer.groups.put(tenant, name, text, actor=actor, expected_version=expected_version)
        if before is None or before.sha256 != group.sha256:
            await self._tell_to_fetch(tenant, name, actor)
        return group

    async def _tell_to_fetch(self, tenant: str, group: str, actor: str) -> None:
        """Nothing where the operator has removed that command."""
        if all(known.name != FETCH_CONFIG for known in await self.indexer.commands.known()):
            return
        order = Order(action=Action(name=FETCH_CONFIG), groups=(group,))
        await self.publisher.publish(Publication(orders=(order,)), tenant=tenant, actor=actor)

    def check_tenant(self, name: str) -> None:
        """Raises CommsError 404 for one that there is not, 409 for a closed one."""
        found = self.store.peek(lambda db: tenants.find(db, name))
        if found is None:
            raise not_found(f"Tenant {name[:80]!r}")
        if found.closed_at is not None:
            raise conflict(f"tenant {name!r} is closed")

    def statistics(self) -> dict[str, Any]:
        """The indexer, streams, queues and requests: for `info` and the metrics."""
        return {
            "indexer": self.indexer.statistics(),
            "engine": self.engine.statistics(),
            "hub": msgspec.to_builtins(self.hub.statistics()),
            "intake": msgspec.to_builtins(self.intake.statistics()),
            "hashing": self.hasher.statistics(),
            "upgrades": {"downloads": self.upgrades.downloads, "sent_bytes": self.upgrades.sent_bytes},
            **self.api.statistics(),
            "publishers": self.publishers.statistics(),
        }


@asynccontextmanager
async def open_comms(
    settings: CommsSettings,
    retention: Retention,
    store: Store,
    clock: Clock,
    *,
    data_dir: Path,
    certs_dir: Path,
    new_id: Callable[[], str],
) -> AsyncIterator[Comms]:
    """Runs inside the block; listeners that serve it are closed before its end. Raises BadSetup."""
    keys = await trio.to_thread.run_sync(
        SigningKeys.open, settings.keys_dir or certs_dir / DIRECTORY, settings.token_algorithm, clock.now()
    )
    heard = _Heard()
    async with AsyncExitStack() as stack:
        indexer = await stack.enter_async_context(_open_indexer(settings, store, clock, heard))
        comms = await _assemble(settings, store, clock, indexer, keys, heard, data_dir, new_id)
        upkeep = Upkeep(comms, retention)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comms.intake.run)
            nursery.start_soon(upkeep.run)
            try:
                yield comms
            finally:
                with trio.CancelScope(shield=True):
                    await comms.intake.drain(DRAIN_S)
                    await upkeep.finish(FLUSH_S)
                nursery.cancel_scope.cancel()


class _Heard:
    """Between the indexer and the hub, which is made after it."""

    def __init__(self) -> None:
        self.hub: Hub | None = None
        self.announce: Callable[[str, str], None] | None = None
        """Tells other boxes of an agent's new stream."""

    def is_needed(self) -> bool:
        """Whether an agent waits for commands here."""
        return self.hub is not None and self.hub.is_occupied

    def attached(self, agent: str, connection: str) -> None:
        if self.announce is not None:
            self.announce(agent, connection)

    def __call__(self, change: Change) -> None:
        if self.hub is not None:
            self.hub.changed(change)


@asynccontextmanager
async def _open_indexer(settings: CommsSettings, store: Store, clock: Clock, heard: _Heard) -> AsyncIterator[Indexer]:
    if settings.indexer_url is None:
        yield SqliteIndexer(store, heard, clock)
        return
    from .opensearch import open_opensearch  # heavy

    async with open_opensearch(
        settings.indexer_url,
        ca=settings.indexer_ca,
        auth=None if settings.indexer_auth_file is None else _credentials(settings.indexer_auth_file),
        store=store,
        clock=clock,
        on_change=heard,
        is_needed=heard.is_needed,
    ) as indexer:
        heard.announce = indexer.announce
        yield indexer


def _credentials(file: Path) -> tuple[str, str]:
    """User and password from a file's first line. Raises BadSetup, which quotes nothing of it."""
    try:
        user, colon, password = file.read_text().partition("\n")[0].strip().partition(":")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"cannot read the indexer's user and password from {file}: {error}") from None
    if not (user and colon):
        raise BadSetup(f"{file}: expected one line user:password, got another one")
    return user, password


async def _assemble(
    settings: CommsSettings,
    store: Store,
    clock: Clock,
    indexer: Indexer,
    keys: SigningKeys,
    heard: _Heard,
    data_dir: Path,
    new_id: Callable[[], str],
) -> Comms:
    tokens, hasher = Tokens(keys, lifetime_s=settings.token_lifetime_s), Hasher()
    events = SqliteEvents(store)
    engine: StandIn | SocketEngine = StandIn(events)
    if settings.engine_socket is not None:
        engine = SocketEngine(settings.engine_socket, indexer.agents.find)
    heard.hub = Hub(indexer, clock, HubBounds(poll_hold_s=settings.hold_s), heard.attached)
    upgrades = Upgrades(data_dir / UPGRADES, store, clock)
    await trio.to_thread.run_sync(upgrades.sweep)
    return Comms(
        store=store,
        clock=clock,
        settings=settings,
        new_id=new_id,
        indexer=indexer,
        events=events,
        keys=keys,
        tokens=tokens,
        hasher=hasher,
        login=Login(indexer.agents, tokens, hasher, clock, store),
        enrollment=Enrollment(indexer.agents, keys, hasher, clock, store),
        hub=heard.hub,
        publisher=Publisher(indexer, clock, new_id),
        engine=engine,
        intake=Intake(engine),
        upgrades=upgrades,
    )
