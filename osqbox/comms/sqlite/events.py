"""Stateless events: stored once each, searched by word, dropped oldest first."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox.comms.messages import Event
from osqbox.store import Store, Tx, count_dropped

KEEP_ROWS = 1_000_000
KEEP_BYTES = 4096 * 1024 * 1024
"""Of the events' data."""
PRUNE_ROWS = 5_000
PRUNE_BYTES = 2 * 1024 * 1024
"""Dropped in one transaction, so that others need not wait for long; one more event may pass it."""
PAGE_MAX = 1000
WORDS_MAX = 32
"""Of a search."""

migrations = Migrations("comms_events")


@migrations()
def m001_events(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE comms_events (
            number INTEGER PRIMARY KEY AUTOINCREMENT,  -- grows by one along the arrival, never reused
            id TEXT NOT NULL UNIQUE,     -- the same for an event that was sent again
            tenant TEXT NOT NULL,
            agent TEXT NOT NULL,         -- its uuid
            module TEXT NOT NULL,
            collector TEXT NOT NULL,
            received_at REAL NOT NULL,   -- seconds since the epoch
            data TEXT NOT NULL           -- JSON, as the agent sent it
        )"""
    )
    db.conn.execute("CREATE INDEX comms_events_agent ON comms_events(agent)")
    db.conn.execute("CREATE INDEX comms_events_tenant ON comms_events(tenant)")
    db.conn.execute(
        """CREATE TABLE comms_event_size (
            events INTEGER NOT NULL,     -- that are kept
            bytes INTEGER NOT NULL       -- of their data
        )"""
    )
    db.conn.execute("INSERT INTO comms_event_size VALUES (0, 0)")
    if _has_fts5(db.conn):
        # The words only: the rows themselves are in comms_events.
        db.conn.execute("CREATE VIRTUAL TABLE comms_event_words USING fts5(words, content='', columnsize=0)")


def _has_fts5(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None


def _is_indexed(db: sqlite3.Connection) -> bool:
    table = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'comms_event_words'").fetchone()
    return table is not None and _has_fts5(db)


class SqliteEvents:
    """`seams.Events` on the box's own database. ``indexed`` False: searches scan, as without FTS5."""

    def __init__(self, store: Store, *, indexed: bool = True) -> None:
        self._store = store
        self._indexed = indexed and store.peek(_is_indexed)

    async def add(self, events: Sequence[Event]) -> None:
        rows = [
            (event.id, event.tenant, event.agent, event.module, event.collector, event.received_at, _text(event.data))
            for event in events
        ]
        weight_bytes = sum(len(row[-1]) + 128 for row in rows)
        await self._store.write(lambda tx: add(tx, rows, self._indexed), bulk=True, weight_bytes=weight_bytes)

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
        which = EventFilter(tenant=tenant, agent=agent, module=module, text=text, since=since, until=until)
        limit = max(1, min(limit, PAGE_MAX))
        return await self._store.read(lambda db: search(db, which, before, limit, indexed=self._indexed))

    async def after(
        self,
        number: int,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        module: str | None = None,
        text: str = "",
        limit: int = PAGE_MAX,
    ) -> tuple[int, list[tuple[int, Event]]]:
        which = EventFilter(tenant=tenant, agent=agent, module=module, text=text)
        limit = max(1, min(limit, PAGE_MAX))
        return await self._store.read(lambda db: after(db, which, number, limit, indexed=self._indexed))

    async def last(self) -> int:
        return self._store.peek(last_number)


class EventFilter(msgspec.Struct, frozen=True, kw_only=True):
    tenant: str | None = None
    agent: str | None = None
    module: str | None = None
    text: str = ""
    """Words that must all be in the data, the last characters of each may be missing."""
    since: float | None = None
    until: float | None = None


def add(tx: Tx, rows: Sequence[Sequence[Any]], indexed: bool) -> None:
    """Rows of id, tenant, agent, module, collector, received_at and data as JSON."""
    before = last_number(tx.db)
    # Not OR IGNORE: that would use up a number for each that is stored already.
    tx.db.executemany(
        "INSERT INTO comms_events(id, tenant, agent, module, collector, received_at, data) "
        "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE NOT EXISTS (SELECT 1 FROM comms_events WHERE id = ?1)",
        rows,
    )
    if indexed:
        tx.db.execute(
            f"INSERT INTO comms_event_words(rowid, words) SELECT number, {_WORDS} FROM comms_events WHERE number > ?",
            (before,),
        )
    stored = tx.db.execute(
        f"SELECT tenant, count(*), sum({_SIZE}) FROM comms_events WHERE number > ? GROUP BY tenant", (before,)
    ).fetchall()
    _resize(tx, sum(count for _, count, _ in stored), sum(data_bytes for *_, data_bytes in stored))
    for tenant, count, _ in stored:
        tx.emit("comms_events_stored", tenant=tenant, count=count)


_SIZE = "length(CAST(data AS BLOB))"
_WORDS = r"replace(replace(replace(replace(data, '\\', ' '), '\n', ' '), '\r', ' '), '\t', ' ')"
"""The text that is indexed: JSON without the escapes that would stick to a word."""


def last_number(db: sqlite3.Connection) -> int:
    """The number given last, also when its event is gone: how many were ever stored."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'comms_events'").fetchone()
    return int(row[0]) if row else 0


class _Plan(msgspec.Struct):
    """Where the wanted events are found."""

    where: list[str]
    values: list[Any]
    source: str = "comms_events"
    number: str = "number"
    """The column that numbers them: with the index its own, so that it is walked in order and nothing is sorted."""


def search(
    db: sqlite3.Connection, which: EventFilter, before: int | None, limit: int, *, indexed: bool
) -> list[tuple[int, Event]]:
    """Newest first, from before the number ``before``."""
    plan = _plan(which, indexed)
    if before is not None:
        plan.where.append(f"{plan.number} < ?")
        plan.values.append(before)
    return _select(db, plan, "DESC", limit)


def after(
    db: sqlite3.Connection, which: EventFilter, number: int, limit: int, *, indexed: bool
) -> tuple[int, list[tuple[int, Event]]]:
    """The number from behind which to go on, and the events behind ``number``, oldest first."""
    reached = last_number(db)
    plan = _plan(which, indexed)
    plan.where.append(f"{plan.number} > ?")
    plan.values.append(number)
    found = _select(db, plan, "ASC", limit)
    return (found[-1][0] if len(found) == limit else max(number, reached)), found


def _select(db: sqlite3.Connection, plan: _Plan, order: str, limit: int) -> list[tuple[int, Event]]:
    rows = db.execute(
        f"SELECT number, id, tenant, agent, module, collector, received_at, data FROM {plan.source} "
        f"WHERE {' AND '.join(plan.where) or '1'} ORDER BY {plan.number} {order} LIMIT ?",
        (*plan.values, limit),
    )
    return [(row[0], _event(row)) for row in rows]


def _plan(which: EventFilter, indexed: bool) -> _Plan:
    plan = _Plan([], [])
    for clause, value in (
        # "+" keeps the many events of a tenant from being looked through for the few of its agent.
        ("tenant = ?" if which.agent is None else "+tenant = ?", which.tenant),
        ("agent = ?", which.agent),
        ("module = ?", which.module),
        ("received_at >= ?", which.since),
        ("received_at <= ?", which.until),
    ):
        if value is not None:
            plan.where.append(clause)
            plan.values.append(value)
    words = which.text.replace("\0", " ").split()[:WORDS_MAX]
    if indexed and words and all(re.search(r"[^\W_]", word) for word in words):
        plan.where.append("comms_event_words MATCH ?")
        plan.values.append(" ".join('"' + word.replace('"', '""') + '"*' for word in words))
        plan.number = "comms_event_words.rowid"
        plan.source = f"comms_event_words CROSS JOIN comms_events ON number = {plan.number}"
    else:
        plan.where += ["instr(lower(data), lower(?)) > 0"] * len(words)
        plan.values += words
    return plan


def prune(tx: Tx, keep_rows: int = KEEP_ROWS, keep_bytes: int = KEEP_BYTES) -> bool:
    """Drop events beyond the bounds, oldest first, PRUNE_ROWS or PRUNE_BYTES at most. True when there may be more."""
    kept_rows, kept_bytes = size(tx.db)
    end, rows, dropped_bytes = 0, 0, 0
    if kept_rows > keep_rows or kept_bytes > keep_bytes:
        for number, row_bytes in tx.db.execute(
            f"SELECT number, {_SIZE} FROM comms_events ORDER BY number LIMIT ?", (PRUNE_ROWS,)
        ):
            is_enough = kept_rows - rows <= keep_rows and kept_bytes - dropped_bytes <= keep_bytes
            if is_enough or dropped_bytes >= PRUNE_BYTES:
                break
            end, rows, dropped_bytes = number, rows + 1, dropped_bytes + row_bytes
    if rows:
        _drop(tx, end)
        _resize(tx, -rows, -dropped_bytes)
        count_dropped(tx, "comms_events", rows)
        tx.emit("comms_events_dropped", count=rows)
    return rows == PRUNE_ROWS or dropped_bytes >= PRUNE_BYTES


def _drop(tx: Tx, end: int) -> None:
    if _is_indexed(tx.db):
        tx.db.execute(
            "INSERT INTO comms_event_words(comms_event_words, rowid, words) "
            f"SELECT 'delete', number, {_WORDS} FROM comms_events WHERE number <= ?",
            (end,),
        )
    tx.db.execute("DELETE FROM comms_events WHERE number <= ?", (end,))


def size(db: sqlite3.Connection) -> tuple[int, int]:
    """How many events are kept, and the bytes of their data; counted as they come and go."""
    events, data_bytes = db.execute("SELECT events, bytes FROM comms_event_size").fetchone()
    return int(events), int(data_bytes)


def _resize(tx: Tx, by_events: int, by_bytes: int) -> None:
    if by_events:
        tx.db.execute("UPDATE comms_event_size SET events = events + ?, bytes = bytes + ?", (by_events, by_bytes))


def _text(data: Any) -> str:
    return msgspec.json.encode(data).decode()


def _event(row: Sequence[Any]) -> Event:
    return Event(
        id=row[1],
        tenant=row[2],
        agent=row[3],
        module=row[4],
        collector=row[5],
        received_at=row[6],
        data=msgspec.json.decode(row[7]),
    )
