"""Stateful events: the documents that agents keep here, and the answers to requests that may be repeated."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox.comms.bodies import agent_facts
from osqbox.comms.errors import bad_request
from osqbox.comms.messages import Agent, Applied, Operation, StateChange, StateDocument
from osqbox.store import Store, Tx, count_dropped

from .durable import durably

DOCUMENTS_MAX = 1_000_000
"""Of one agent; a new one beyond is refused with 429."""
BATCH_KEEP_S = 24 * 3600.0
BATCHES_MAX = 1_000_000
DIGEST = "sha256:"
"""How the name of a batch begins that was made from the body alone."""
PAGE_MAX = 1000

migrations = Migrations("comms_states")


@migrations()
def m001_states(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE comms_states (
            number INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL,
            agent TEXT NOT NULL,         -- its uuid
            state_index TEXT NOT NULL,   -- such as wazuh-states-inventory-packages
            id TEXT NOT NULL,            -- the agent's own name for it
            version INTEGER NOT NULL,    -- grows by one with every change
            data TEXT NOT NULL,          -- JSON object as the agent sent it, members sorted
            changed_at REAL NOT NULL,    -- seconds since the epoch
            UNIQUE (agent, state_index, id)
        )"""
    )
    db.conn.execute("CREATE INDEX comms_states_index ON comms_states(tenant, state_index)")
    db.conn.execute(
        """CREATE TABLE comms_state_agents (
            agent TEXT PRIMARY KEY,
            documents INTEGER NOT NULL,  -- how many it has
            facts TEXT NOT NULL          -- JSON object: the agent as it was known at its last change
        ) WITHOUT ROWID"""
    )
    db.conn.execute(
        """CREATE TABLE comms_batches (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            agent TEXT NOT NULL,
            batch TEXT NOT NULL,         -- what a request is recognised by when it is sent again
            at REAL NOT NULL,            -- seconds since the epoch
            answer TEXT NOT NULL,        -- JSON array of what became of each change
            UNIQUE (agent, batch)
        )"""
    )
    db.conn.execute("CREATE INDEX comms_batches_agent ON comms_batches(agent)")
    db.conn.execute("CREATE INDEX comms_batches_at ON comms_batches(at)")


class _Row(msgspec.Struct, frozen=True):
    """A change as it is written."""

    index: str
    id: str
    operation: Operation
    text: str


class SqliteStates:
    """`seams.States` on the box's own database; what was answered is committed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def apply(self, agent: Agent, changes: Sequence[StateChange], *, batch: str) -> list[Applied]:
        rows = [_Row(change.index, change.id, change.operation, _canonical(change.data)) for change in changes]
        weight_bytes = sum(len(row.text) + 128 for row in rows)
        return await durably(
            self._store, lambda tx: apply(tx, agent, rows, batch), bulk=True, weight_bytes=weight_bytes
        )

    async def find(self, tenant: str, agent: str, index: str, id: str) -> StateDocument | None:
        return self._store.peek(lambda db: find(db, tenant, agent, index, id))

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
        last = _read_cursor(after)
        limit = max(1, min(limit, PAGE_MAX))

        def work(db: sqlite3.Connection) -> list[StateDocument]:
            return search(db, tenant=tenant, agent=agent, index=index, text=text, limit=limit + 1, last=last)

        found = await self._store.read(work)
        return found[:limit], _cursor(found[limit - 1]) if len(found) > limit else ""

    async def count(self) -> dict[str, int]:
        return await self._store.read(count)


def apply(tx: Tx, agent: Agent, rows: Sequence[_Row], batch: str) -> list[Applied]:
    """Each change by itself, unless this batch was applied already: then its answer again."""
    if batch and (answer := _answered(tx.db, agent.uuid, batch)) is not None:
        return answer
    documents = _documents(tx.db, agent.uuid)
    answer = []
    for row in rows:
        applied, more = _apply_one(tx, agent, row, is_full=documents >= DOCUMENTS_MAX)
        documents += more
        answer.append(applied)
    tx.db.execute(
        "INSERT OR REPLACE INTO comms_state_agents(agent, documents, facts) VALUES (?, ?, ?)",
        (agent.uuid, documents, msgspec.json.encode(agent_facts(agent)).decode()),
    )
    if batch:
        _remember(tx, agent.uuid, batch, answer)
    stored = sum(applied.status < 300 for applied in answer)
    if stored:
        tx.emit("comms_states_stored", tenant=agent.tenant, agent=agent.uuid, count=stored)
    return answer


def _apply_one(tx: Tx, agent: Agent, row: _Row, *, is_full: bool) -> tuple[Applied, int]:
    """What became of a change, and by how many documents the agent has more now."""
    found = tx.db.execute(
        "SELECT number, data FROM comms_states WHERE agent = ? AND state_index = ? AND id = ?",
        (agent.uuid, row.index, row.id),
    ).fetchone()
    if row.operation is Operation.DELETE:
        if found is None:
            return Applied(id=row.id, result="not_found", status=404), 0
        tx.db.execute("DELETE FROM comms_states WHERE number = ?", (found[0],))
        return Applied(id=row.id, result="deleted", status=200), -1
    if found is None:
        if is_full:
            why = f"too many documents: expected at most {DOCUMENTS_MAX} of one agent; delete some first"
            return Applied(id=row.id, result=why, status=429), 0
        tx.db.execute(
            "INSERT INTO comms_states(tenant, agent, state_index, id, version, data, changed_at) "
            "VALUES (?, ?, ?, ?, 1, ?, ?)",
            (agent.tenant, agent.uuid, row.index, row.id, row.text, tx.now),
        )
        return Applied(id=row.id, result="created", status=201), 1
    if row.operation is Operation.CREATE:
        if found[1] == row.text:
            return Applied(id=row.id, result="created", status=201), 0
        return Applied(id=row.id, result="version conflict: it exists already, with other data", status=409), 0
    tx.db.execute(
        "UPDATE comms_states SET tenant = ?, version = version + 1, data = ?, changed_at = ? WHERE number = ?",
        (agent.tenant, row.text, tx.now, found[0]),
    )
    return Applied(id=row.id, result="updated", status=200), 0


def _documents(db: sqlite3.Connection, agent: str) -> int:
    row = db.execute("SELECT documents FROM comms_state_agents WHERE agent = ?", (agent,)).fetchone()
    return int(row[0]) if row else 0


def _answered(db: sqlite3.Connection, agent: str, batch: str) -> list[Applied] | None:
    """A body's digest means a repetition only while nothing else of the agent came after it.

    An agent that creates, deletes and creates again sends the same body twice and means it.
    """
    if batch.startswith(DIGEST):
        row = db.execute(
            "SELECT answer, batch FROM comms_batches WHERE agent = ? ORDER BY number DESC LIMIT 1", (agent,)
        ).fetchone()
        row = row if row and row[1] == batch else None
    else:
        row = db.execute("SELECT answer FROM comms_batches WHERE agent = ? AND batch = ?", (agent, batch)).fetchone()
    return msgspec.json.decode(row[0], type=list[Applied]) if row else None


def _remember(tx: Tx, agent: str, batch: str, answer: list[Applied]) -> None:
    # Of the digests only the last matters.
    tx.db.execute("DELETE FROM comms_batches WHERE agent = ? AND substr(batch, 1, 7) = ?", (agent, DIGEST))
    tx.db.execute(
        "INSERT INTO comms_batches(agent, batch, at, answer) VALUES (?, ?, ?, ?)",
        (agent, batch, tx.now, msgspec.json.encode(answer).decode()),
    )


def prune_batches(tx: Tx, keep_s: float = BATCH_KEEP_S, keep: int = BATCHES_MAX) -> int:
    """Forget answers that nobody asks for any more; returns how many."""
    old = tx.db.execute("DELETE FROM comms_batches WHERE at < ?", (tx.now - keep_s,)).rowcount
    many = tx.db.execute(
        "DELETE FROM comms_batches WHERE number <= "
        "(SELECT number FROM comms_batches ORDER BY number DESC LIMIT 1 OFFSET ?)",
        (keep,),
    ).rowcount
    count_dropped(tx, "comms_batches", old + many)
    return old + many


_DOCUMENTS = (
    "SELECT state_index, id, agent, tenant, version, data, facts, changed_at "
    "FROM comms_states JOIN comms_state_agents USING (agent)"
)


def find(db: sqlite3.Connection, tenant: str, agent: str, index: str, id: str) -> StateDocument | None:
    row = db.execute(
        f"{_DOCUMENTS} WHERE agent = ? AND state_index = ? AND id = ? AND tenant = ?",
        (agent, index, id, tenant),
    ).fetchone()
    return _document(row) if row else None


def search(
    db: sqlite3.Connection,
    *,
    tenant: str | None,
    agent: str | None,
    index: str | None,
    text: str,
    limit: int,
    last: tuple[str, str, str] | None,
) -> list[StateDocument]:
    """In the order of agent, index and id, from behind ``last``; ``text`` is found anywhere in the data or the id."""
    where, values = ["1"], list[Any]()
    for column, value in (("tenant", tenant), ("agent", agent), ("state_index", index)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if text:
        where.append("(instr(lower(data), lower(?)) > 0 OR instr(lower(id), lower(?)) > 0)")
        values += [text, text]
    if last is not None:
        where.append("(agent, state_index, id) > (?, ?, ?)")
        values += last
    rows = db.execute(
        f"{_DOCUMENTS} WHERE {' AND '.join(where)} ORDER BY agent, state_index, id LIMIT ?",
        (*values, limit),
    )
    return [_document(row) for row in rows]


def count(db: sqlite3.Connection) -> dict[str, int]:
    """Documents by index."""
    rows = db.execute("SELECT state_index, count(*) FROM comms_states GROUP BY state_index ORDER BY state_index")
    return dict(rows.fetchall())


def _document(row: Sequence[Any]) -> StateDocument:
    data = {**msgspec.json.decode(row[5]), "agent": msgspec.json.decode(row[6])}
    return StateDocument(
        index=row[0], id=row[1], agent=row[2], tenant=row[3], version=row[4], data=data, changed_at=row[7]
    )


def _canonical(data: dict[str, Any] | None) -> str:
    return "" if data is None else msgspec.json.encode(data, order="sorted").decode()


def _cursor(last: StateDocument) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((last.agent, last.index, last.id))).decode()


def _read_cursor(after_untrusted: str) -> tuple[str, str, str] | None:
    if not after_untrusted:
        return None
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(after_untrusted), type=tuple[str, str, str])
    except (ValueError, msgspec.DecodeError):
        raise bad_request(f"after: expected a cursor of the page before, got {after_untrusted[:40]!r}") from None
