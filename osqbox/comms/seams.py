"""The indexer behind four seams: who the agents are, their groups, what they are told, what they have said.

`sqlite/` implements them on the box's own database, `opensearch/` on an indexer that several boxes share. Everything
else in this system calls these methods and knows neither. Every method raises `IndexerDown` when the indexer does not
confirm in time; what returned is durable (SQLite: after the COMMIT; OpenSearch: after the translog's sync). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from osqbox.settings import Retention

from .messages import (
    Agent,
    AgentStatus,
    Applied,
    Change,
    Command,
    CommandStatus,
    Credentials,
    Event,
    Group,
    Json,
    KnownCommand,
    NewCommand,
    Result,
    ResultOutcome,
    StateChange,
    StateDocument,
)

OnChange = Callable[[Change], None]
"""Called on the loop, after the change is durable, whichever box made it; must not block or raise."""


class Agents(Protocol):
    async def find(self, uuid: str) -> Agent | None:
        """Fast: asked for every request (SQLite: a peek; OpenSearch: kept in memory until its `Change` arrives).

        While the indexer is down an agent that is kept is still found.
        """
        ...

    async def credentials(self, uuid: str) -> Credentials | None:
        """Fresh, for a login."""
        ...

    async def add(self, agent: Agent, key_hash: str, *, actor: str) -> Agent:
        """Raises CommsError 409 (code 1708 a taken uuid, 1705 a taken name in its tenant), 404 for an unknown group."""
        ...

    async def change(
        self,
        uuid: str,
        *,
        actor: str,
        name: str | None = None,
        groups: Sequence[str] | None = None,
        status: AgentStatus | None = None,
        key_hash: str | None = None,
    ) -> Agent:
        """A new key or a revocation also adds one to ``key_version``. Raises CommsError 404, 409."""
        ...

    async def delete(self, uuid: str, *, actor: str) -> None:
        """The agent; its open commands are cancelled, its states and events stay. Raises CommsError 404."""
        ...

    async def note_login(self, uuid: str, at: float, facts: Mapping[str, Json]) -> None:
        """``last_login_at``, status active; ``facts``: version, host, type where the agent told them."""
        ...

    async def note_seen(self, seen: Mapping[str, float]) -> None:
        """``last_seen_at`` of many agents at once; batched by the caller, and allowed to be lost."""
        ...

    async def page(
        self, *, tenant: str | None = None, group: str | None = None, after: str = "", limit: int = 100, text: str = ""
    ) -> list[Agent]:
        """In the order of uuid, from behind ``after``; ``text`` is found in name or uuid."""
        ...

    async def addressed(
        self, tenant: str, *, agents: Sequence[str] = (), groups: Sequence[str] = (), everyone: bool = False
    ) -> list[str]:
        """The uuids a publication is for, each once, without the revoked. CommsError 404 names what is unknown."""
        ...


class Groups(Protocol):
    async def find(self, tenant: str, name: str) -> Group | None:
        """``default`` always exists. Fast, as `Agents.find`."""
        ...

    async def put(
        self, tenant: str, name: str, configuration: str, *, actor: str, expected_version: int | None
    ) -> Group:
        """Create or change; the same text again changes nothing. CommsError 409 if the version is not as expected."""
        ...

    async def page(self, tenant: str) -> list[Group]: ...

    async def versions(self, tenant: str, name: str) -> list[Group]:
        """Every kept version of a group's configuration, newest first."""
        ...

    async def delete(self, tenant: str, name: str, *, actor: str) -> None:
        """Raises CommsError 404, and 409 while agents are in it."""
        ...


class Commands(Protocol):
    async def publish(self, commands: Sequence[NewCommand], *, actor: str) -> list[Command]:
        """All or none, durable, in order; gives each its ``seq``. Then a `Change` of kind commands names the agents."""
        ...

    async def after(self, agent: str, seq: int, *, limit: int) -> list[Command]:
        """The agent's commands behind ``seq`` that are pending or sent and not expired, in order."""
        ...

    async def known_seq(self, agent: str, seq: int) -> bool:
        """Whether ``seq`` is the number of a command of this agent that is still kept, or 0."""
        ...

    async def note_sent(self, agent: str, ids: Sequence[str], at: float) -> None:
        """About to be written: pending becomes sent, ``deliveries`` grows by one."""
        ...

    async def note_answered(self, agent: str, ids: Sequence[str], *, written: bool) -> None:
        """How the write ended. Not ``written``: those that are still sent become pending again."""
        ...

    async def take_result(self, agent: str, id: str, result: Result, at: float) -> ResultOutcome:
        """The first final result wins; code 2 makes it in_progress and may be followed.

        The agent's ``Agent's database failure`` for a command that was delivered more than once is REPEATED: it says
        only that the agent had it already.
        """
        ...

    async def find(self, id: str) -> Command | None: ...

    async def page(
        self,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        status: CommandStatus | None = None,
        request_id: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Command]:
        """Newest first, from before the seq ``before``."""
        ...

    async def cancel(self, ids: Sequence[str], *, actor: str) -> list[Command]:
        """Those that were open, now cancelled."""
        ...

    async def expire(self, now: float) -> int:
        """Open commands past ``expires_at`` become expired, each with an event in the feed; how many, bounded."""
        ...

    async def known(self) -> list[KnownCommand]: ...

    async def put_known(self, command: KnownCommand, *, actor: str) -> None: ...

    async def remove_known(self, name: str, *, actor: str) -> None: ...


class States(Protocol):
    async def apply(self, agent: Agent, changes: Sequence[StateChange], *, batch: str) -> list[Applied]:
        """Each change by itself, one `Applied` per change in order; a bad one does not touch the others.

        ``batch`` identifies the request: the same batch of the same agent again gives the same answer and is not
        applied twice. Creating what exists with equal data is ``created`` again, with other data a conflict (409);
        updating what does not exist creates it; deleting what does not exist is ``not_found`` (404).
        """
        ...

    async def find(self, tenant: str, agent: str, index: str, id: str) -> StateDocument | None: ...

    async def search(
        self,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        index: str | None = None,
        text: str = "",
        limit: int = 100,
        after: str = "",
    ) -> tuple[list[StateDocument], str]:
        """Documents, and the cursor for the next page (empty: that was all)."""
        ...

    async def count(self) -> dict[str, int]:
        """Documents by index."""
        ...


class Events(Protocol):
    async def add(self, events: Sequence[Event]) -> None:
        """Store stateless events; the sink of the engine stand-in. An id that is stored already is skipped."""
        ...

    async def search(
        self,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        module: str | None = None,
        text: str = "",
        since: float | None = None,
        until: float | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[tuple[int, Event]]:
        """Newest first with their numbers, from before the number ``before``."""
        ...

    async def after(
        self,
        number: int,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        module: str | None = None,
        text: str = "",
        limit: int = 1000,
    ) -> tuple[int, list[tuple[int, Event]]]:
        """Oldest first, from behind ``number``; before them the number to go on from."""
        ...

    async def last(self) -> int:
        """The number given last."""
        ...


class Indexer(Protocol):
    """All of it, and its own life. ``Events`` is always this box's own SQLite; the forwarder takes it further."""

    @property
    def agents(self) -> Agents: ...

    @property
    def groups(self) -> Groups: ...

    @property
    def commands(self) -> Commands: ...

    @property
    def states(self) -> States: ...

    async def prune(self, retention: Retention) -> None:
        """Drop what is beyond its bound: ended commands, answers to stateful requests."""
        ...

    def statistics(self) -> dict[str, Any]:
        """kind, up, latencies, queue lengths: for `status` and the metrics."""
        ...
