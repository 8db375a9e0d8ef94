"""The comms API as one thing: the indexer, identities, streams and queues, opened and closed in order.

signing keys ─▶ indexer ─▶ hub ─▶ engine, intake, upkeep ─▶ served
stop: streams told goodbye ─▶ (the listeners drain) ─▶ the intake drained ─▶ the indexer closed
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from osqbox import tenants
from osqbox.clock import Clock
from osqbox.errors import BadSetup
from osqbox.settings import CommsSettings, Retention
from osqbox.store import Store

from . import configuration, registration
from .engine import SocketEngine, StandIn
from .errors import not_found
from .hashing import Hasher
from .hub import Hub, HubBounds
from .intake import Intake
from .keys import DIRECTORY, SigningKeys
from .login import Login
from .messages import Action, Agent, AgentStatus, Change, Command, Group
from .publication import FETCH_CONFIG, SET_GROUP, Order, Publication
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
NAMES_AT_ONCE = 1000
UPGRADES = "upgrades"
"""Beside the database."""


@dataclass(eq=False, slots=True)
class Comms:
    """What routes and the operator API use."""

    store: Store
    clock: Clock
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

    async def agent(self, tenant: str, word: str) -> Agent:
        """The tenant's agent of that UUID, else of that name. Raises CommsError 404."""
        agents = self.indexer.agents
        found = await agents.find(word)
        if found is not None and found.tenant == tenant:
            return found
        after = ""
        while named := await agents.page(tenant=tenant, text=word, after=after, limit=NAMES_AT_ONCE):
            for agent in named:
                if agent.name == word:
                    return agent
            after = named[-1].uuid
        raise not_found(f"Agent {word[:80]!r}")

    async def group(self, tenant: str, name: str) -> Group:
        """Raises CommsError 404."""
        if (found := await self.indexer.groups.find(tenant, name)) is None:
            raise not_found(f"Group {name[:80]!r}")
        return found

    async def command(self, tenant: str, id: str) -> Command:
        """Raises CommsError 404, also for another tenant's."""
        found = await self.indexer.commands.find(id)
        if found is None or found.tenant != tenant:
            raise not_found(f"Command {id[:80]!r}")
        return found

    async def add_agent(self, agent: Agent, key: str | None, *, actor: str) -> tuple[Agent, str]:
        """An agent that may log in from now on, and its key: made unless given.

        Raises CommsError 400, 404 for a group, 409 for what is taken, 503.
        """
        self.check_tenant(agent.tenant)
        key = registration.key_of(key)
        return await self.indexer.agents.add(agent, await self.hasher.hash(key), actor=actor), key

    async def change_agent(
        self,
        uuid: str,
        *,
        actor: str,
        name: str | None = None,
        groups: Sequence[str] | None = None,
        status: AgentStatus | None = None,
    ) -> Agent:
        """Change what is given, and tell the agent of its groups. Raises CommsError 400, 404, 409; IndexerDown."""
        agent = await self.indexer.agents.change(uuid, actor=actor, name=name, groups=groups, status=status)
        # Also when they were so before: a call that broke off between the change and the telling can be repeated.
        if groups is not None and agent.status is not AgentStatus.REVOKED:
            action = Action(name=SET_GROUP, args={"groups": list(agent.groups)})
            await self._tell(Order(action=action, agents=(uuid,)), agent.tenant, actor)
        return agent

    async def renew_key(self, uuid: str, key: str | None, *, actor: str) -> str:
        """The agent's new key, made unless given; the old one and its tokens are refused. Raises CommsError."""
        key = registration.key_of(key)
        await self.indexer.agents.change(uuid, actor=actor, key_hash=await self.hasher.hash(key))
        return key

    async def configure(
        self, tenant: str, name: str, text: str, *, actor: str, expected_version: int | None = None
    ) -> Group:
        """Change a group's configuration and tell its agents. Raises CommsError 400, 404, 409, 413; IndexerDown."""
        self.check_tenant(tenant)
        await trio.to_thread.run_sync(configuration.read, text)
        before = await self.indexer.groups.find(tenant, name)
        group = await self.indexer.groups.put(tenant, name, text, actor=actor, expected_version=expected_version)
        if before is None or before.sha256 != group.sha256:
            await self._tell(Order(action=Action(name=FETCH_CONFIG), groups=(name,)), tenant, actor)
        return group

    async def _tell(self, order: Order, tenant: str, actor: str) -> None:
        """Nothing where the operator has removed that command."""
        if any(known.name == order.action.name for known in await self.indexer.commands.known()):
            await self.publisher.publish(Publication(orders=(order,)), tenant=tenant, actor=actor)

    def check_tenant(self, name: str) -> None:
        """Raises CommsError 404 for one that there is not, 409 for a closed one."""
        self.store.peek(partial(registration.check_tenant, name=name))

    def tenant_closed(self, tenant: str) -> None:
        """To be called after the commit: ends the streams and polls of its agents."""
        self.hub.changed(Change(kind="agents", tenant=tenant))

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
    heard.hub = Hub(
        indexer,
        clock,
        HubBounds(poll_hold_s=settings.hold_s),
        heard.attached,
        is_closed=lambda tenant: store.peek(partial(tenants.is_closed, name=tenant)),
    )
    upgrades = Upgrades(data_dir / UPGRADES, store, clock)
    await trio.to_thread.run_sync(upgrades.sweep)
    return Comms(
        store=store,
        clock=clock,
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
