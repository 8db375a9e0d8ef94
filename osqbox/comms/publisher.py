"""Publishing: from what was asked to one command for every agent that is meant."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from osqbox.clock import Clock

from .errors import CommsError, conflict
from .messages import Command, NewCommand
from .publication import Order, Publication, check_known
from .seams import Agents, Indexer

CONFLICT = 409
COMMANDS_AT_ONCE = 1000
"""Made without letting other tasks run."""


class Publisher:
    def __init__(self, indexer: Indexer, clock: Clock, new_id: Callable[[], str]) -> None:
        self._indexer = indexer
        self._clock = clock
        self._new_id = new_id

    async def publish(self, publication: Publication, *, tenant: str, actor: str, key: str = "") -> list[Command]:
        """All or none, durable. A group without agents gives no command.

        With a ``key`` the commands' ids follow from it: the same publication again gives the commands that are there,
        also when the first one was answered with an error and landed after that.

        Raises CommsError 400 for a command that is not known, 404 for an unknown agent or group, 409 for a revoked
        agent, a document_id that is taken or a key that was used for something else; IndexerDown.
        """
        known = await self._indexer.commands.known()
        for order in publication.orders:
            check_known(order.action, known)
        now, request_id = self._clock.now(), self._new_id()
        name = _names_by(tenant, key) if key else lambda _: self._new_id()
        found: list[NewCommand] = []
        addressed = _Addressed(self._indexer.agents, tenant, publication)
        for order in publication.orders:
            found += await self._new_commands(order, await addressed.by(order), tenant, name, request_id, now)
        if not found:
            return []
        try:
            return await self._indexer.commands.publish(found, actor=actor)
        except CommsError as error:
            if not (key and error.status == CONFLICT):
                raise
            return await self._published(found)

    async def _published(self, wanted: Sequence[NewCommand]) -> list[Command]:
        """What is there of exactly these commands. Raises CommsError 409 where the key was used for others."""
        found: list[Command] = []
        for new in wanted:
            there = await self._indexer.commands.find(new.id)
            if there is None or (there.action, there.agent) != (new.action, new.agent):
                raise conflict("Idempotency-Key: expected the publication it was first used with, got another one")
            found.append(there)
            if len(found) % COMMANDS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return found

    async def _new_commands(
        self,
        order: Order,
        addressed: Sequence[str],
        tenant: str,
        name: Callable[[str], str],
        request_id: str,
        now: float,
    ) -> list[NewCommand]:
        target_type, target_id = order.target
        made: list[NewCommand] = []
        for uuid in addressed:
            made.append(
                NewCommand(
                    id=order.document_id or name(uuid),
                    agent=uuid,
                    tenant=tenant,
                    action=order.action,
                    request_id=order.request_id or request_id,
                    source=order.source,
                    user=order.user,
                    target_type=target_type,
                    target_id=target_id or (uuid if target_type == "agent" else ""),
                    created_at=now,
                    expires_at=now + order.expires_in_s,
                )
            )
            if len(made) % COMMANDS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return made


def _names_by(tenant: str, key: str) -> Callable[[str], str]:
    """Gives an agent's first, second, ... command of a publication its id."""
    counts: Counter[str] = Counter()

    def name(agent: str) -> str:
        counts[agent] += 1
        return hashlib.sha256("\n".join((tenant, key, agent, str(counts[agent]))).encode()).hexdigest()[:32]

    return name


class _Addressed:
    """Who is meant by the orders of a publication; those that name agents only are looked up all at once."""

    def __init__(self, agents: Agents, tenant: str, publication: Publication) -> None:
        self._agents = agents
        self._tenant = tenant
        self._named = [uuid for order in publication.orders if _is_plain(order) for uuid in order.agents]
        self._welcome: frozenset[str] | None = None

    async def by(self, order: Order) -> Sequence[str]:
        """Each once. Raises CommsError 404, and 409 for a named agent that is revoked."""
        if _is_plain(order):
            if self._welcome is None:
                named = list(dict.fromkeys(self._named))
                self._welcome = frozenset(await self._agents.addressed(self._tenant, agents=named))
            welcome, addressed = self._welcome, order.agents
        else:
            addressed = tuple(
                await self._agents.addressed(
                    self._tenant, agents=order.agents, groups=order.groups, everyone=order.everyone
                )
            )
            welcome = frozenset(addressed)
        if revoked := [uuid for uuid in order.agents if uuid not in welcome]:
            raise conflict(f"Agent {revoked[0]!r} is revoked: expected agents that may connect")
        return addressed


def _is_plain(order: Order) -> bool:
    return not (order.groups or order.everyone)
