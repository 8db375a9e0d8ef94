"""Who did what to a shell or a job, with which certificate, and what came of it: append-only and hash-chained.

Every row carries the SHA-256 over the previous row's hash and its own content, so a row that was changed, removed or
slipped in later is found by `verify`. Triggers refuse changes by accident; the chain shows those on purpose.
Retention removes only the oldest rows, and the chain goes on from where it left off.
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox.clock import rfc3339
from osqbox.store import Tx

GENESIS = "0" * 64

migrations = Migrations("audit")


@migrations()
def m001_audit(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE audit (
            seq INTEGER PRIMARY KEY,   -- without gaps, from 1
            at REAL NOT NULL,          -- seconds since the epoch
            tenant TEXT,
            actor TEXT NOT NULL,       -- owner of the certificate, node, or "operator"
            serial TEXT,               -- of the certificate, hexadecimal
            address TEXT NOT NULL,     -- where from; empty when from the box itself
            action TEXT NOT NULL,      -- such as job.run, shell.join
            subject TEXT NOT NULL,     -- id of what was acted on
            result TEXT NOT NULL,      -- ok, or the reason of the refusal
            data TEXT NOT NULL,        -- JSON object: what else is known; never a secret or a keystroke
            chain TEXT NOT NULL        -- SHA-256 over the previous chain and this row
        )"""
    )
    db.conn.execute("CREATE INDEX audit_subject ON audit(subject)")
    db.conn.execute(
        """CREATE TABLE audit_start (
            only INTEGER PRIMARY KEY CHECK (only = 1),
            seq INTEGER NOT NULL,      -- rows up to here were removed by retention
            chain TEXT NOT NULL        -- chain of the last removed row
        )"""
    )
    db.conn.execute("INSERT INTO audit_start VALUES (1, 0, ?)", (GENESIS,))
    db.conn.execute(
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END"
    )
    db.conn.execute(
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit WHEN OLD.seq > (SELECT seq FROM audit_start) "
        "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    rows: int
    broken_at: int | None
    """Number of the first row that does not fit the chain."""


def record(
    tx: Tx,
    actor: str,
    action: str,
    subject: str = "",
    result: str = "ok",
    *,
    tenant: str | None = None,
    serial: int | None = None,
    address: str = "",
    **data: Any,
) -> None:
    """Append a row in this transaction, so it exists exactly if what it tells of does."""
    seq, chain = last(tx.db)
    serial_text = None if serial is None else f"{serial:x}"
    row = (seq + 1, tx.now, tenant, actor, serial_text, address, action, subject, result, _canonical(data))
    tx.db.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?,?,?)", (*row, _link(chain, row)))


def rows(
    db: sqlite3.Connection,
    *,
    after: int = 0,
    limit: int = 1000,
    action: str | None = None,
    actor: str | None = None,
    subject: str | None = None,
    newest: bool = False,
) -> list[dict[str, Any]]:
    """Rows in order as JSON objects; ``action`` may be a system's name, such as ``job``.

    When there are more than ``limit``, the first so many, or with ``newest`` the last.
    """
    where, values = ["seq > ?"], [after]
    for name, value in (("actor", actor), ("subject", subject)):
        if value is not None:
            where.append(f"{name} = ?")
            values.append(value)  # type: ignore[arg-type]
    if action is not None:
        where.append("(action = ? OR substr(action, 1, length(?) + 1) = ? || '.')")
        values += [action, action, action]  # type: ignore[list-item]
    order = "seq DESC" if newest else "seq"
    found = db.execute(f"SELECT * FROM audit WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?", (*values, limit))
    names = [column[0] for column in found.description]
    rows = [_as_json(dict(zip(names, row, strict=True))) for row in found.fetchall()]
    return rows[::-1] if newest else rows


def verify(db: sqlite3.Connection) -> Verdict:
    """Walk the whole chain."""
    seq, chain = db.execute("SELECT seq, chain FROM audit_start").fetchone()
    count = 0
    for *row, linked in db.execute("SELECT * FROM audit ORDER BY seq"):
        if row[0] != seq + 1 or linked != _link(chain, tuple(row)):
            return Verdict(count, seq + 1)
        seq, chain, count = row[0], linked, count + 1
    return Verdict(count, None)


def prune(tx: Tx, keep_rows: int) -> int:
    """Remove the oldest rows beyond ``keep_rows``; returns how many."""
    newest, _ = last(tx.db)
    found = tx.db.execute("SELECT seq, chain FROM audit WHERE seq = ?", (newest - keep_rows,)).fetchone()
    if found is None:
        return 0
    tx.db.execute("UPDATE audit_start SET seq = ?, chain = ?", found)
    return tx.db.execute("DELETE FROM audit WHERE seq <= ?", (found[0],)).rowcount


def last(db: sqlite3.Connection) -> tuple[int, str]:
    """Number and chain of the newest row: where the chain ends."""
    found = db.execute("SELECT seq, chain FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    found = found or db.execute("SELECT seq, chain FROM audit_start").fetchone()
    return int(found[0]), str(found[1])


def _link(chain: str, row: tuple[Any, ...]) -> str:
    return hashlib.sha256(f"{chain}\n{_canonical(list(row))}".encode()).hexdigest()


def _canonical(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "at": rfc3339(row["at"]), "data": msgspec.json.decode(row["data"])}
