"""One order of events for all boxes that share an indexer.

    document 1, 2, 3, ... of the index `journal`: created only (`_create`), each by whoever was first at head + 1
    document `mark`: up to where every entry is settled, and up to where entries may be gone

A box reads the entries behind the last one it knows by number, which needs no refresh of the index, and takes them in
order; so does the box that wrote one. What is in an entry is news (`Change`) or a publication of commands. An entry is
*settled* when what it stands for is stored in documents of its own; should its author die first, whoever reads it
makes them. A box that starts begins behind the mark.

An entry whose creation was not confirmed is looked for by its id before it is written again, so it is there once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, Protocol

import msgspec
import trio

from osqbox.clock import Clock
from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.messages import Change
from osqbox.comms.seams import OnChange

from .client import Client, Conflict, Document, Source
from .entries import INLINE_COMMANDS, NUMBERS, Entry, Part, Publication, part_ids, parts_of

INDEX = "journal"
MARK = "mark"

POLL_S = 0.1
"""While somebody on this box wants to know; the greater part of the time from a publication to another box's agents."""
IDLE_POLL_S = 1.0
LOOK = (1, 8, 32)
"""How many numbers are asked for, one look after the other while all are there."""
STALE_S = 5.0
"""Before a box that has not looked for so long writes, it looks."""
CONFIRM_S = 20.0
"""How long it is tried to learn what became of an entry that was not confirmed."""
RETRY_S = 0.02
GATHER_S = 0.02
"""Announcements of connections wait so long for others to share their entry."""
ENTRY_CHANGES = 500

SETTLE_S = 2.0
"""An entry that its author has not settled by then is settled here,"""
SETTLE_COMMANDS_PER_S = 1000
"""or later where it has many commands. Who asks for one of them does not wait for that."""
UPKEEP_S = 0.5
KEEP_S = 600.0
"""Entries are kept at least so long after this box has read them."""
TRIM_S = 60.0
KEEP_PARTS_S = 3600.0


class Ledger(Protocol):
    """Who keeps what the publications say."""

    async def found(self) -> int:
        """Called once per index: what is there at the beginning; returns the number of the last entry ever used."""
        ...

    def take(self, n: int, entry: Entry) -> None:
        """Entries come in order; at once, must not raise."""
        ...

    def jump(self) -> None:
        """Entries are missing between the last one and the next: only the documents tell what they said."""
        ...

    async def settle(self, n: int) -> None:
        """Store what an entry that was taken stands for, as far as it is not stored."""
        ...

    async def tidy(self, settled: int) -> None:
        """Now and then: entries up to ``settled`` are settled, whoever did it."""
        ...


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    epoch: str
    """Another one: the index was made anew."""
    settled: int = 0
    trimmed: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    """Somebody who waits until what he says is in the journal."""

    changes: list[Change] = field(default_factory=list)
    publication: Publication | None = None
    done: trio.Event = field(default_factory=trio.Event)
    n: int = 0
    first_seq: int = 0
    error: CommsError | None = None

    @property
    def weight(self) -> int:
        return 1 if self.publication is None else len(self.publication.rows)


class Journal:
    """Runs as long as `run` does. ``is_needed``: whether anybody on this box waits for news."""

    def __init__(
        self,
        client: Client,
        clock: Clock,
        new_id: Callable[[], str],
        on_change: OnChange,
        is_needed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._client, self._clock, self._new_id = client, clock, new_id
        self._on_change, self._is_needed = on_change, is_needed
        self._ledger: Ledger | None = None
        self.box = new_id()
        self._head = 0
        self._mark = Mark(epoch="")
        self._mark_document: Document | None = None
        self._looked_at = -STALE_S
        self._waiting: deque[_Waiting] = deque()
        self._announced: dict[str, str] = {}
        """Connections that other boxes have to hear of, by agent."""
        self._work = trio.Event()
        self._look_now = trio.Event()
        self._landed: dict[str, int] = {}
        """Entries of this box that are being written: where they were found."""
        self._due: dict[int, float] = {}
        """Entries behind the mark, and from when on this box settles them."""
        self._read: deque[tuple[int, float]] = deque()
        """Which entries were read by when, for the trimming."""
        self._counts: Counter[str] = Counter()
        self._problem = ""
        self._is_running = self._is_idle = False

    def follow(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def ledger(self) -> Ledger:
        assert self._ledger is not None, "follow() comes first"
        return self._ledger

    @property
    def head(self) -> int:
        """The number of the last entry that this box has taken."""
        return self._head

    @property
    def settled(self) -> int:
        """Every entry up to here is settled."""
        return self._mark.settled

    async def run(self) -> None:
        self._is_running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_reading)
                nursery.start_soon(self._keep_writing)
                nursery.start_soon(self._keep_tidy)
        finally:
            self._is_running = False
            self._refuse_waiting(IndexerDown("this box is stopping"))

    # writing

    async def tell(self, *changes: Change) -> None:
        """Returns when every box is going to hear of it, and this one has. Raises IndexerDown."""
        await self._submit(_Waiting(changes=list(changes)))

    def announce(self, agent: str, connection: str) -> None:
        """The agent has this connection now: every box hears of it soon, this one too."""
        self._announced[agent] = connection
        self._work.set()
        if self._is_idle:
            self._look_now.set()

    async def publish(self, publication: Publication) -> tuple[int, int]:
        """All or nothing; returns the number of the entry and the seq of the first command.

        It is durable then, and taken on this box, but not settled: see `note_settled`. Raises IndexerDown.
        """
        if len(publication.rows) > INLINE_COMMANDS:
            publication = await self._stage(publication)
        waiting = _Waiting(publication=publication)
        await self._submit(waiting)
        return waiting.n, waiting.first_seq

    def note_settled(self, n: int) -> None:
        if n in self._due:
            self._due[n] = -1.0

    async def _submit(self, waiting: _Waiting) -> None:
        if not (self._client.up and self._is_running):
            raise IndexerDown("the indexer cannot be reached")
        self._waiting.append(waiting)
        self._work.set()
        with self._client.whole_answer():
            await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error

    async def _stage(self, publication: Publication) -> Publication:
        """Its rows in documents of their own, which mean nothing until an entry names them."""
        parts = parts_of(publication)
        staged = msgspec.structs.replace(publication, parts=len(parts))
        for name, part in zip(part_ids(staged), parts, strict=True):
            source = {"kind": "part", "at": self._clock.now(), "entry": msgspec.to_builtins(part)}
            await self._client.put(INDEX, name, source)  # again is the same
        return staged

    async def _keep_writing(self) -> None:
        while True:
            await self._work.wait()
            if not self._waiting:
                await trio.sleep(GATHER_S)
            self._work = trio.Event()
            while self._waiting or self._announced:
                await self._write_some()

    async def _write_some(self) -> None:
        """One entry with what is waiting, as much as it may hold."""
        taken = self._take_waiting()
        announced = dict(list(self._announced.items())[:ENTRY_CHANGES])
        for agent in announced:
            del self._announced[agent]
        entry = Entry(
            id=self._new_id(),
            box=self.box,
            changes=[each for waiting in taken for each in waiting.changes]
            + [Change(kind="attached", agents=(agent,), connection=each) for agent, each in announced.items()],
            publications=[each.publication for each in taken if each.publication is not None],
        )
        try:
            n = await self._append(entry)
        except trio.Cancelled:
            self._waiting.extendleft(reversed(taken))  # whoever ends this tells them
            raise
        except CommsError as error:
            self._counts["not_written"] += 1
            self._problem = error.message
            self._announced = announced | self._announced
            self._waiting.extendleft(reversed(taken))
            self._refuse_waiting(error)
            await self._pause()
            return
        first_seq = n * NUMBERS
        for waiting in taken:
            waiting.n, waiting.first_seq = n, first_seq
            first_seq += 0 if waiting.publication is None else waiting.weight
            waiting.done.set()

    def _refuse_waiting(self, error: CommsError) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            waiting.error = error
            waiting.done.set()

    def _take_waiting(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        room = max(INLINE_COMMANDS, self._waiting[0].weight if self._waiting else 0)
        while self._waiting and self._waiting[0].weight <= room:
            room -= self._waiting[0].weight
            taken.append(self._waiting.popleft())
        return taken

    async def _append(self, entry: Entry) -> int:
        """The number it got. Raises IndexerDown when the indexer does not say what became of it."""
        await self._be_current()
        encoded = _encoded(entry)
        self._landed[entry.id] = 0
        try:
            with trio.move_on_after(CONFIRM_S):
                return await self._append_somewhere(entry, encoded)
        finally:
            del self._landed[entry.id]
        raise IndexerDown(f"the indexer did not confirm an entry of the journal within {CONFIRM_S:.0f} s")

    async def _append_somewhere(self, entry: Entry, encoded: Source) -> int:
        while True:
            n = self._head + 1
            was_up = self._client.up
            try:
                source = {"n": n, "kind": "entry", "at": self._clock.now(), "entry": encoded}
                await self._client.create(INDEX, str(n), source)
            except Conflict:
                self._counts["conflicts"] += 1
                await self._look_again(n)
            except IndexerDown:
                if not was_up:
                    raise
                self._counts["unconfirmed"] += 1
                await self._client.wait_up()
                await self._look_again(n)
            else:
                self._take(n, entry)
                return n
            if found := self._landed[entry.id]:
                return found

    async def _look_again(self, n: int) -> None:
        """Somebody may be at ``n``; who, the next entries tell."""
        try:
            await self.catch_up()
        except IndexerDown:
            await self._client.wait_up()
        if self._head < n:
            await trio.sleep(RETRY_S)

    async def _be_current(self) -> None:
        if not self._mark.epoch or trio.current_time() - self._looked_at > STALE_S:
            await self.catch_up()

    # reading

    async def _keep_reading(self) -> None:
        while True:
            try:
                await self.catch_up()
                self._problem = ""
            except CommsError as error:
                self._counts["not_read"] += 1
                self._problem = error.message
                await self._pause()
            self._is_idle = not self._is_needed()
            with trio.move_on_after(IDLE_POLL_S if self._is_idle else POLL_S):
                await self._look_now.wait()
            self._look_now = trio.Event()

    async def _pause(self) -> None:
        await trio.sleep(POLL_S)
        await self._client.wait_up()

    async def catch_up(self) -> None:
        """Take everything that was in the journal when this was called. Raises IndexerDown."""
        if not self._mark.epoch:
            await self._begin()
        for count in chain(LOOK, repeat(LOOK[-1])):
            first = self._head + 1
            asked = [MARK, *(str(n) for n in range(first, first + count))]
            mark, *found = await self._client.mget(INDEX, asked)
            self._counts["looks"] += 1
            self._looked_at = trio.current_time()
            if not self._heed(mark):
                continue
            for n, document in enumerate(found, first):
                if document is None:
                    return
                self._take(n, await self._entry(document))

    async def _begin(self) -> None:
        document = await self._client.get(INDEX, MARK)
        if document is None:
            last = await self.ledger.found()
            try:
                mark = Mark(epoch=self._new_id(), settled=last, trimmed=last)
                document = await self._client.create(INDEX, MARK, _mark_source(mark, self._clock.now()))
            except Conflict:
                document = await self._client.get(INDEX, MARK)
        if document is None:
            raise IndexerDown("the journal's mark cannot be read")
        if not self._mark.epoch:  # nobody else meanwhile
            self._jump(document)

    def _heed(self, document: Document | None) -> bool:
        """Whether this box can go on from where it is."""
        if document is None:
            self._mark = Mark(epoch="")
            raise IndexerDown("the journal is gone; it is begun anew")
        mark = _mark(document)
        if mark.epoch != self._mark.epoch or mark.trimmed > self._head:
            self._counts["jumps"] += 1
            self._jump(document)
            return False
        if mark.settled >= self._mark.settled:
            self._mark, self._mark_document = mark, document
            for n in [n for n in self._due if n <= mark.settled]:
                del self._due[n]
        return True

    def _jump(self, document: Document) -> None:
        """Go on behind the mark, not knowing what was said before it."""
        self._mark, self._mark_document = _mark(document), document
        self._head = self._mark.settled
        self._due.clear()
        self._read.clear()
        self.ledger.jump()
        for kind in ("known_commands", "groups", "agents", "commands"):
            self._on_change(Change(kind=kind))

    async def _entry(self, document: Document) -> Entry:
        """With the rows of its publications."""
        try:
            entry = msgspec.convert(document.source["entry"], Entry, strict=False)
        except (msgspec.ValidationError, KeyError):
            self._counts["unreadable"] += 1
            return Entry(id="", box="")
        whole = [await self._whole(each) for each in entry.publications]
        return msgspec.structs.replace(entry, publications=whole)

    async def _whole(self, publication: Publication) -> Publication:
        if not publication.parts:
            return publication
        rows = []
        for name in part_ids(publication):
            document = await self._client.get(INDEX, name)
            if document is None:
                self._counts["missing_parts"] += 1
                continue
            rows += msgspec.convert(document.source["entry"], Part).rows
        return msgspec.structs.replace(publication, rows=rows)

    def _take(self, n: int, entry: Entry) -> None:
        """If it is the next one: others may have taken it meanwhile."""
        if n != self._head + 1:
            return
        self._head = n
        self._counts["entries"] += 1
        now = trio.current_time()
        is_own = entry.box == self.box
        rows = sum(len(each.rows) for each in entry.publications)
        self._due[n] = now + SETTLE_S + rows / SETTLE_COMMANDS_PER_S if rows or not is_own else -1.0
        if not self._read or now - self._read[-1][1] >= TRIM_S:
            self._read.append((n, now))
        if entry.id in self._landed:
            self._landed[entry.id] = n
        self.ledger.take(n, entry)
        for change in entry.changes:
            self._on_change(change)

    # upkeep

    async def _keep_tidy(self) -> None:
        while True:
            await trio.sleep(UPKEEP_S)
            try:
                await self._settle_some()
                await self._trim_some()
                await self.ledger.tidy(self._mark.settled)
            except CommsError as error:
                self._problem = error.message
                await self._pause()

    async def _settle_some(self) -> None:
        """Move the mark over the entries that are settled; settle those whose author has not."""
        settled = self._mark.settled
        while (due := self._due.get(settled + 1)) is not None and due <= trio.current_time():
            if due >= 0:
                await self.ledger.settle(settled + 1)
            settled += 1
        if settled > self._mark.settled:
            await self._put_mark(msgspec.structs.replace(self._mark, settled=settled))

    async def _put_mark(self, mark: Mark) -> bool:
        if self._mark_document is None or mark.epoch != self._mark.epoch:
            return False
        try:
            source = _mark_source(mark, self._clock.now())
            document = await self._client.put(INDEX, MARK, source, over=self._mark_document)
        except Conflict:  # another box; the next look shows to where
            return False
        self._heed(document)
        return True

    async def _trim_some(self) -> None:
        """Entries that this box read long ago, if they are settled. The mark says so before they go."""
        until, now = 0, trio.current_time()
        while self._read and now - self._read[0][1] > KEEP_S and self._read[0][0] <= self._mark.settled:
            until = self._read.popleft()[0]
        if until <= self._mark.trimmed or not await self._put_mark(msgspec.structs.replace(self._mark, trimmed=until)):
            return
        self._counts["trimmings"] += 1
        await self._client.refresh(INDEX)
        await self._delete({"bool": {"filter": [{"term": {"kind": "entry"}}, {"range": {"n": {"lte": until}}}]}})
        if self._mark.settled == self._head:  # no entry needs a part any more
            old = {"range": {"at": {"lt": self._clock.now() - KEEP_PARTS_S}}}
            await self._delete({"bool": {"filter": [{"term": {"kind": "part"}}, old]}})

    async def _delete(self, query: Source) -> None:
        path = self._client.path(INDEX, "_delete_by_query")
        await self._client.call("POST", path, params={"conflicts": "proceed"}, body={"query": query})

    def statistics(self) -> dict[str, Any]:
        return {
            "head": self._head,
            "settled": self._mark.settled,
            "trimmed": self._mark.trimmed,
            "waiting": len(self._waiting) + len(self._announced),
            "problem": self._problem,
            "counts": dict(self._counts),
        }


def _encoded(entry: Entry) -> Source:
    """Without the rows that are in parts."""
    bare = [msgspec.structs.replace(each, rows=[]) if each.parts else each for each in entry.publications]
    encoded: Source = msgspec.to_builtins(msgspec.structs.replace(entry, publications=bare))
    return encoded


def _mark(document: Document) -> Mark:
    return msgspec.convert(document.source["entry"], Mark)


def _mark_source(mark: Mark, at: float) -> Source:
    return {"n": mark.settled, "kind": MARK, "at": at, "entry": msgspec.to_builtins(mark)}
