"""Commands in an indexer that several boxes share: one document each, published through the journal.

    publish ──▶ entry of the journal ──▶ every box: its tail, then the streams of the addressed agents
                       └──▶ documents in `commands`, by the publisher; by whoever needs one that is missing

The entry makes a publication durable and gives it its place; the documents say what became of each command, and are
changed only over the state that was read, so of two boxes that take results one is first. Which commands an agent is
offered is found by a search and in the `Tail`; what they are now is read by id, which needs no refresh.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from osqbox import audit
from osqbox.clock import Clock
from osqbox.comms.errors import CommsError, IndexerDown, bad_request, conflict, not_found
from osqbox.comms.messages import (
    OFFERED_STATES,
    OPEN_STATES,
    Change,
    Command,
    CommandStatus,
    KnownCommand,
    NewCommand,
    Result,
    ResultOutcome,
)
from osqbox.comms.publication import SEEDED
from osqbox.comms.results import judge
from osqbox.comms.seams import OnChange
from osqbox.comms.sqlite import commands as told
from osqbox.store import Store, Tx, count_dropped

from .client import Client, Conflict, Document, Source, Together
from .entries import NUMBERS, Entry, Publication, command_of, publication_of
from .journal import Journal
from .tail import Tail

INDEX, KNOWN_INDEX = "commands", "known-commands"

TRIES = 10
"""How often a change is tried anew when another box was quicker."""
EXPIRE_COMMANDS = 1000
PRUNE_COMMANDS = 5000
PRUNE_AFTER_S = 3600.0
"""Commands that ended later stay: a box that is behind may still look for them."""
SETTLE_COMMANDS = 1000
VERSIONS = 20_000
TIDY_COMMANDS = 5_000
"""A tail as long as this is shortened at once, a shorter one after TIDY_S."""
TIDY_S = 5.0
SEARCH_MAX = 10_000
KNOWN_MAX = 10_000

OPEN = sorted(OPEN_STATES)
OFFERED = sorted(OFFERED_STATES)
ENDED = sorted(set(CommandStatus) - OPEN_STATES)


class _Reading(msgspec.Struct, eq=False):
    ids: Sequence[str]
    found: dict[str, Document] = {}


class _Writing(msgspec.Struct, eq=False):
    changes: list[tuple[Document, Source]]
    """Each over the state that was read."""
    late: list[str] = []
    """Those that somebody else changed before."""


class OpenSearchCommands:
    """The seam `Commands`, and the journal's `Ledger`."""

    def __init__(
        self,
        client: Client,
        journal: Journal,
        store: Store,
        clock: Clock,
        new_id: Callable[[], str],
        on_change: OnChange,
    ) -> None:
        self._client, self._journal, self._store, self._clock = client, journal, store, clock
        self._new_id, self._on_change = new_id, on_change
        self._tail = Tail()
        self._settling: set[str] = set()
        """Publications of this box: whoever publishes wakes the agents, as soon as the documents are there."""
        self._versions: OrderedDict[str, Document] = OrderedDict()
        """The latest state this box has seen of a document; a change over an older one is refused and tried anew."""
        self._known: list[KnownCommand] | None = None
        self._known_changes = 0
        self._tidied_at = clock.now()
        self._expires_at = 0.0
        """No open command expires before."""
        self._unseen = 0
        """Not 0: a search may not see what other boxes stored before this one followed the journal."""
        self._readings: Together[_Reading] = Together(self._read_together)
        self._writings: Together[_Writing] = Together(self._write_together)
        journal.follow(self)

    # publishing

    async def publish(self, commands: Sequence[NewCommand], *, actor: str) -> list[Command]:
        if not commands:
            return []
        if len(commands) > NUMBERS:
            raise bad_request(f"expected at most {NUMBERS} commands at once, got {len(commands)}")
        await self._refuse_taken(commands)
        publication = publication_of(self._new_id(), commands)
        self._settling.add(publication.id)
        published: list[Command] = []
        try:
            n, first = await self._journal.publish(publication)
            published = [
                command_of(seq, row, publication.templates[row[2]]) for seq, row in enumerate(publication.rows, first)
            ]
            await self._settle_published(n, published)
        finally:
            self._settling.discard(publication.id)
            if published:
                self._wake(publication)
        await self._store.write(lambda tx: told.tell_published(tx, commands, actor))
        return published

    async def _refuse_taken(self, commands: Sequence[NewCommand]) -> None:
        ids = [new.id for new in commands]
        if len(set(ids)) < len(ids):
            twice = next(each for each, count in Counter(ids).items() if count > 1)
            raise conflict(f"expected a document_id of its own for every command, got {twice!r} twice")
        for found in await self._client.mget(INDEX, ids):
            if found is not None:
                raise conflict(f"expected a new document_id, got {found.id!r}, which a command has already")

    async def _settle_published(self, n: int, published: Sequence[Command]) -> None:
        """Publication is over when the entry is there: documents that cannot be stored now are stored later."""
        try:
            with self._client.whole_answer():
                lost = await self._store_new(published)
        except IndexerDown:
            return
        self._journal.note_settled(n)
        if lost:  # somebody published the same id on another box between the look and the entry
            raise conflict(f"expected a new document_id, got {lost[0]!r}, which a command has already")

    async def _store_new(self, commands: Sequence[Command]) -> list[str]:
        """Store their documents, where missing; the ids that belong to commands with other numbers."""
        others: list[str] = []
        for some in _pieces(commands, SETTLE_COMMANDS):
            items = await self._client.bulk(INDEX, [({"create": {"_id": each.id}}, _source(each)) for each in some])
            taken = [each for each, item in zip(some, items, strict=True) if item["status"] == 409]
            if taken:
                there = await self._client.mget(INDEX, [each.id for each in taken])
                others += [
                    each.id
                    for each, document in zip(taken, there, strict=True)
                    if document is not None and document.source["seq"] != each.seq
                ]
            for each, item in zip(some, items, strict=True):
                if item["status"] < 300:
                    self._keep(Document(each.id, _source(each), item["_seq_no"], item["_primary_term"]))
        return others

    def _wake(self, publication: Publication) -> None:
        agents = tuple(dict.fromkeys(agent for _, agent, _ in publication.rows))
        tenants = {each.tenant for each in publication.templates}
        self._on_change(Change(kind="commands", agents=agents, tenant=tenants.pop() if len(tenants) == 1 else None))

    # following the journal

    async def found(self) -> int:
        await self._client.bulk(
            KNOWN_INDEX, [({"create": {"_id": each.name}}, msgspec.to_builtins(each)) for each in SEEDED]
        )
        await self._client.refresh(INDEX)
        newest = await self._search({"match_all": {}}, limit=1, newest=True)
        return newest[0].seq // NUMBERS if newest else 0

    def take(self, n: int, entry: Entry) -> None:
        if entry.publications:
            self._tail.take(n, entry)
        for publication in entry.publications:
            if publication.id not in self._settling:
                self._wake(publication)
        if any(change.kind == "known_commands" for change in entry.changes):
            self._forget_known()

    def jump(self) -> None:
        self._unseen += 1
        self._expires_at = 0.0
        self._tail.clear()
        self._versions.clear()
        self._forget_known()

    async def settle(self, n: int) -> None:
        await self._store_new([found for each in self._tail.of_entry(n) if (found := self._tail.find(each))])

    async def tidy(self, settled: int) -> None:
        """Let go of the tail's settled entries, once a search sees them."""
        if self._tail.first is None or self._tail.first > settled:
            return
        now = self._clock.now()
        if len(self._tail) < TIDY_COMMANDS and 0 <= now - self._tidied_at < TIDY_S:
            return
        self._tidied_at = now
        await self._client.refresh(INDEX)
        self._tail.forget(settled)

    # reading

    async def after(self, agent: str, seq: int, *, limit: int) -> list[Command]:
        now = self._clock.now()
        offered: list[Command] = []
        is_all = False
        while len(offered) < limit and not is_all:
            places, is_all = await self._candidates(agent, seq, limit, now)
            numbers = {seq for seq, _ in places}  # not that of an entry that came late with ids that were there
            commands = [each for each in await self._read([one for _, one in places]) if each.seq in numbers]
            offered += [each for each in commands if each.status in OFFERED_STATES and each.expires_at > now]
            seq = places[-1][0] if places else seq
        return offered[:limit]

    async def _candidates(self, agent: str, seq: int, limit: int, now: float) -> tuple[list[tuple[int, str]], bool]:
        """seq and id of the agent's next commands that may be offered, in order, and whether these are all."""
        if not self._tail.needs_search(agent, seq):
            self._tail.note_searched(agent, seq)
            places = self._tail.of_agent(agent, seq, limit)
            return places, len(places) < limit
        query: list[Source] = [{"term": {"agent": agent}}, {"range": {"seq": {"gt": seq}}}]
        query += [{"terms": {"status": OFFERED}}, {"range": {"expires_at": {"gt": now}}}]
        await self._see_all()
        # The tail before and after: an entry may leave it, or come, while the search is under way.
        both = dict(self._tail.of_agent(agent, seq))
        found = await self._search({"bool": {"filter": query}}, limit=limit)
        both |= dict(self._tail.of_agent(agent, seq)) | {each.seq: each.id for each in found}
        places = sorted(both.items())
        if len(found) == limit:
            return [each for each in places if each[0] <= found[-1].seq], False
        older = [at for at, each in places if self._tail.find(each) is None]
        self._tail.note_searched(agent, max(older, default=seq))
        return places, True

    async def known_seq(self, agent: str, seq: int) -> bool:
        if seq == 0:
            return True
        if not 0 < seq < 2**63:
            return False
        if seq // NUMBERS > self._journal.head:
            await self._journal.catch_up()
        if any(at == seq for at, _ in self._tail.of_agent(agent, seq - 1, 1)):
            return True
        await self._see_all()
        query = {"bool": {"filter": [{"term": {"agent": agent}}, {"term": {"seq": seq}}]}}
        return bool(await self._search(query, limit=1))

    async def _see_all(self) -> None:
        while unseen := self._unseen:
            await self._client.refresh(INDEX)
            if unseen == self._unseen:
                self._unseen = 0

    async def find(self, id: str) -> Command | None:
        return next(iter(await self._read([id])), None) if _is_id(id) else None

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
        asked = {"tenant": tenant, "agent": agent, "status": status, "request_id": request_id}
        query: list[Source] = [{"term": {name: value}} for name, value in asked.items() if value is not None]
        if before is not None:
            query.append({"range": {"seq": {"lt": before}}})
        await self._client.refresh(INDEX)
        return await self._search({"bool": {"filter": query}}, limit=min(limit, SEARCH_MAX), newest=True)

    async def _search(self, query: Source, *, limit: int, newest: bool = False, by: str = "seq") -> list[Command]:
        body = {"query": query, "sort": [{by: "desc" if newest else "asc"}], "size": limit, "track_total_hits": False}
        found = await self._client.search(INDEX, body)
        return [_command(hit["_source"]) for hit in found["hits"]["hits"]]

    async def _read(self, ids: Sequence[str]) -> list[Command]:
        """As they are now, in order, without those that are not there."""
        found = await self._documents(ids)
        return [_command(found[each].source) for each in dict.fromkeys(ids) if each in found]

    async def _documents(self, ids: Sequence[str]) -> dict[str, Document]:
        """As they are now. One that its publisher has not stored yet is stored."""
        if not ids:
            return {}
        reading = _Reading(ids)
        await self._readings.add(reading)
        missing = [new for each in ids if each not in reading.found and (new := self._tail.find(each))]
        if missing:
            await self._store_new(missing)
            again = _Reading([each.id for each in missing])
            await self._readings.add(again)
            reading.found |= again.found
        return reading.found

    async def _read_together(self, readings: list[_Reading]) -> None:
        """Those who ask at the same time share a request."""
        ids = list(dict.fromkeys(one for each in readings for one in each.ids))
        found = {each.id: each for each in await self._client.mget(INDEX, ids) if each is not None}
        for document in found.values():
            self._keep(document)
        for reading in readings:
            reading.found = {each: found[each] for each in reading.ids if each in found}

    def _keep(self, document: Document) -> None:
        self._versions[document.id] = document
        self._versions.move_to_end(document.id)
        if len(self._versions) > VERSIONS:
            self._versions.popitem(last=False)

    # changing

    async def note_sent(self, agent: str, ids: Sequence[str], at: float) -> None:
        def sent(command: Command) -> Command | None:
            if command.agent != agent or command.status not in OFFERED_STATES:
                return None
            more = command.deliveries + 1
            return msgspec.structs.replace(command, status=CommandStatus.SENT, sent_at=at, deliveries=more)

        changed = await self._change(ids, sent)
        if changed:
            tenant = changed[0].tenant
            sent_ids = [each.id for each in changed]
            await self._store.write(lambda tx: tx.emit("command_sent", tenant=tenant, agent=agent, ids=sent_ids))

    async def note_answered(self, agent: str, ids: Sequence[str], *, written: bool) -> None:
        def answered(command: Command) -> Command | None:
            if command.agent != agent:
                return None
            if written:
                return None if command.answered else msgspec.structs.replace(command, answered=True)
            if command.status is not CommandStatus.SENT:
                return None
            return msgspec.structs.replace(command, status=CommandStatus.PENDING)

        await self._change(ids, answered)

    async def take_result(self, agent: str, id: str, result: Result, at: float) -> ResultOutcome:
        outcome = ResultOutcome.FOREIGN

        def taken(command: Command) -> Command | None:
            nonlocal outcome
            outcome, status = judge(command, agent, result)
            if status is None:
                return None
            ended_at = None if status is CommandStatus.IN_PROGRESS else at
            return msgspec.structs.replace(command, status=status, ended_at=ended_at, result=result)

        if not _is_id(id):
            return outcome
        changed = await self._change([id], taken)
        await self._tell_ended([each for each in changed if each.ended_at is not None])
        return outcome

    async def cancel(self, ids: Sequence[str], *, actor: str) -> list[Command]:
        ended_at = self._clock.now()
        cancelled = await self._change(
            [each for each in ids if _is_id(each)], lambda command: _ended(command, CommandStatus.CANCELLED, ended_at)
        )
        if cancelled:
            await self._tell_ended(cancelled, lambda tx: told.record_cancelled(tx, cancelled, actor))
        return sorted(cancelled, key=lambda each: each.seq)

    async def cancel_of_agent(self, agent: str, *, actor: str) -> int:
        """When an agent is deleted: its open commands are cancelled. Returns how many."""
        await self._client.refresh(INDEX)
        count = 0
        query = {"bool": {"filter": [{"term": {"agent": agent}}, {"terms": {"status": OPEN}}]}}
        ids = [each for _, each in self._tail.of_agent(agent, 0)]
        while found := [*ids, *(each.id for each in await self._search(query, limit=SETTLE_COMMANDS))]:
            ids = []
            cancelled = await self.cancel(found, actor=actor)
            count += len(cancelled)
            await self._client.refresh(INDEX)
        return count

    async def expire(self, now: float) -> int:
        if now < min(self._expires_at, self._tail.expires_at):
            return 0
        before = self._tail.expires_at
        self._expires_at = float("inf")  # a jump meanwhile makes it 0 again
        try:
            first = await self._search({"terms": {"status": OPEN}}, limit=EXPIRE_COMMANDS, by="expires_at")
        except BaseException:
            self._expires_at = 0.0
            raise
        late = [each.id for each in first if each.expires_at <= now]
        nearest = min((each.expires_at for each in first), default=float("inf"))
        self._expires_at = min(self._expires_at, nearest, before)
        expired = await self._change(late, lambda command: _ended(command, CommandStatus.EXPIRED, now))
        await self._tell_ended(expired)
        return len(expired)

    async def prune(self, keep: int) -> int:
        """Retention: remove the ended commands beyond ``keep``, those that ended first, bounded; returns how many."""
        query: Source = {"terms": {"status": ENDED}}
        counted: Source = await self._client.call("POST", self._client.path(INDEX, "_count"), body={"query": query})
        excess = min(int(counted["count"]) - keep, PRUNE_COMMANDS)
        if excess <= 0:
            return 0
        old = {"range": {"ended_at": {"lt": self._clock.now() - PRUNE_AFTER_S}}}
        late = await self._search({"bool": {"filter": [query, old]}}, limit=excess, by="ended_at")
        items = await self._client.bulk(INDEX, [({"delete": {"_id": each.id}}, None) for each in late])
        removed = [item["status"] for item in items].count(200)
        await self._store.write(lambda tx: count_dropped(tx, "comms_commands", removed))
        return removed

    async def _tell_ended(self, commands: Sequence[Command], also: Callable[[Tx], None] | None = None) -> None:
        def tell(tx: Tx) -> None:
            for each in commands:
                told.tell_ended(tx, each, each.status, None if each.result is None else each.result.code)
            if also is not None:
                also(tx)

        if commands:
            await self._store.write(tell)

    async def _change(self, ids: Sequence[str], change: Callable[[Command], Command | None]) -> list[Command]:
        """Change each over the state it is found in; None leaves it. Returns the changed, in order."""
        changed: dict[str, Command] = {}
        left = list(dict.fromkeys(ids))
        with self._client.whole_answer():
            for attempt in range(TRIES):
                left = await self._try_change(left, change, changed, fresh=attempt > 0)
                if not left:
                    return [changed[each] for each in dict.fromkeys(ids) if each in changed]
        raise Conflict(f"command {left[0]!r}")

    async def _try_change(
        self, ids: list[str], change: Callable[[Command], Command | None], changed: dict[str, Command], *, fresh: bool
    ) -> list[str]:
        """Those that somebody else changed at the same time."""
        kept = {} if fresh else {each: self._versions[each] for each in ids if each in self._versions}
        found = kept | await self._documents([each for each in ids if each not in kept])
        writing = _Writing([])
        for each in ids:
            if each in found and (new := change(_command(found[each].source))) is not None:
                changed[each] = new
                writing.changes.append((found[each], _source(new)))
        if writing.changes:
            await self._writings.add(writing)
        # What a kept state says against a change is looked up: it may be an old one.
        doubtful = [each for each in kept if each not in changed]
        for each in writing.late:
            del changed[each]
        return writing.late + doubtful

    async def _write_together(self, writings: list[_Writing]) -> None:
        changes = [(each, over, source) for each in writings for over, source in each.changes]
        operations: list[tuple[Source, Source | None]] = []
        for _, over, source in changes:
            self._versions.pop(over.id, None)
            only = {"if_seq_no": over.seq_no, "if_primary_term": over.primary_term}
            operations.append(({"index": {"_id": over.id, **only}}, source))
        items = await self._client.bulk(INDEX, operations)
        for each in writings:
            each.late = []  # an earlier try may have failed
        for (writing, over, source), item in zip(changes, items, strict=True):
            if item["status"] == 409:
                writing.late.append(over.id)
            elif item["status"] < 300:
                self._keep(Document(over.id, source, item["_seq_no"], item["_primary_term"]))
            else:
                raise CommsError(500, "indexer_refused", f"the indexer refused a command's change: {item['error']}")

    # known commands

    async def known(self) -> list[KnownCommand]:
        await self._journal.catch_up()
        if self._known is not None:
            return self._known
        changes = self._known_changes
        await self._client.refresh(KNOWN_INDEX)
        found = await self._client.search(
            KNOWN_INDEX, {"query": {"match_all": {}}, "sort": [{"name": "asc"}], "size": KNOWN_MAX}
        )
        known = [msgspec.convert(hit["_source"], KnownCommand) for hit in found["hits"]["hits"]]
        if changes == self._known_changes:
            self._known = known
        return known

    async def put_known(self, command: KnownCommand, *, actor: str) -> None:
        await self._journal.catch_up()
        await self._client.put(KNOWN_INDEX, command.name, msgspec.to_builtins(command))
        await self._tell_known("command.allow", command.name, actor)

    async def remove_known(self, name: str, *, actor: str) -> None:
        await self._journal.catch_up()
        if not (_is_id(name) and await self._client.delete(KNOWN_INDEX, name)):
            raise not_found(f"known command {name!r}")
        await self._tell_known("command.disallow", name, actor)

    async def _tell_known(self, action: str, name: str, actor: str) -> None:
        self._forget_known()
        await self._journal.tell(Change(kind="known_commands"))
        await self._store.write(lambda tx: audit.record(tx, actor, action, name))

    def _forget_known(self) -> None:
        self._known = None
        self._known_changes += 1

    def statistics(self) -> dict[str, Any]:
        return {"tail": len(self._tail), "journal": self._journal.statistics()}


def _ended(command: Command, status: CommandStatus, at: float) -> Command | None:
    if command.status not in OPEN_STATES:
        return None
    return msgspec.structs.replace(command, status=status, ended_at=at)


def _source(command: Command) -> Source:
    """Null fields stay: a field that was set may be unset again."""
    source: Source = msgspec.to_builtins(command)
    return source


def _command(source: Source) -> Command:
    return msgspec.convert(source, Command)


def _is_id(id: str) -> bool:
    """Whether the indexer could have it."""
    return 0 < len(id.encode()) <= 512


def _pieces(commands: Sequence[Command], size: int) -> Iterable[Sequence[Command]]:
    return (commands[start : start + size] for start in range(0, len(commands), size))
