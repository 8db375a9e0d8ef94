"""Log lines: stored once as osquery wrote them, searched, followed, exported."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from osqbox.clock import rfc3339
from osqbox.osquery import nodes
from osqbox.osquery.messages import LogLine
from osqbox.osquery.nodes import Node
from osqbox.settings import Retention
from osqbox.store import Tx, count_dropped

PRUNE_LINES = 5_000
PRUNE_BYTES = 2 * 1024 * 1024
"""Dropped in one transaction, so that others need not wait for long; one more line may pass it."""
FOUND_BYTES = 4 * 1024 * 1024
"""Lines read at once; one more may pass it."""


def receive(tx: Tx, node: Node, log_type: str, lines: Sequence[LogLine], digest: bytes, connection: str) -> int:
    """Store a batch; returns the number of lines stored, 0 for the re-send of a batch that is stored already."""
    if nodes.is_repeated(tx, node.id, f"log:{log_type}", digest, connection):
        return 0
    tx.db.executemany(
        "INSERT INTO osquery_logs(tenant, node, log_type, name, action, unix_time, received_at, line) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [(node.tenant, node.id, log_type, line.name, line.action, line.unix_time, tx.now, line.text) for line in lines],
    )
    if lines:
        _resize(tx, sum(len(line.text.encode()) for line in lines))
        tx.emit("log_received", tenant=node.tenant, node=node.id, log_type=log_type, lines=len(lines))
    return len(lines)


@dataclass(frozen=True, slots=True)
class LogFilter:
    log_type: str | None = None
    node: str | None = None
    tenant: str | None = None
    name: str | None = None
    search: str | None = None
    """A piece of text that the line contains, case-insensitively for ASCII."""
    actions: tuple[str, ...] = ()
    snapshots: bool | None = None
    """True: only snapshot results; False: none of them (differences, single or as a batch); None: both."""


def _where(which: LogFilter) -> tuple[list[str], list[Any]]:
    parts: list[str] = []
    args: list[Any] = []
    for column, value in (
        ("log_type", which.log_type),
        ("node", which.node),
        ("tenant", which.tenant),
        ("name", which.name),
    ):
        if value is not None:
            parts.append(f"{column} = ?")
            args.append(value)
    if which.search:
        parts.append("instr(lower(line), lower(?)) > 0")
        args.append(which.search)
    if which.actions:
        parts.append(f"action IN ({', '.join('?' * len(which.actions))})")
        args.extend(which.actions)
    if which.snapshots is not None:
        parts.append("action = 'snapshot'" if which.snapshots else "action IS NOT 'snapshot'")
    return parts, args


def find(db: sqlite3.Connection, which: LogFilter, *, after: int = 0, limit: int = 1000) -> list[bytes]:
    """Lines with a greater seq, oldest first, each a JSON object ``{seq, tenant, node, log_type, received_at, line}``.

    At most ``limit``, and no more once they are FOUND_BYTES: call again until there are none.
    """
    parts, args = _where(which)
    rows = db.execute(
        "SELECT seq, tenant, node, log_type, received_at, line FROM osquery_logs "
        f"WHERE {' AND '.join(['seq > ?', *parts])} ORDER BY seq LIMIT ?",
        (after, *args, limit),
    )
    found: list[bytes] = []
    size_bytes = 0
    for row in rows:
        found.append(_encode(row))
        size_bytes += len(found[-1])
        if size_bytes >= FOUND_BYTES:
            break
    return found


def before_latest(db: sqlite3.Connection, which: LogFilter, count: int) -> int:
    """The seq after which the newest ``count`` lines that fit are found."""
    parts, args = _where(which)
    row = db.execute(
        f"SELECT min(seq) FROM (SELECT seq FROM osquery_logs WHERE {' AND '.join(parts) or '1'} "
        "ORDER BY seq DESC LIMIT ?)",
        (*args, count),
    ).fetchone()
    return last_seq(db) if row[0] is None else int(row[0]) - 1


def latest(db: sqlite3.Connection, which: LogFilter, *, limit: int) -> list[bytes]:
    """The newest lines that fit, oldest first."""
    parts, args = _where(which)
    rows = db.execute(
        "SELECT seq, tenant, node, log_type, received_at, line FROM osquery_logs "
        f"WHERE {' AND '.join(parts) or '1'} ORDER BY seq DESC LIMIT ?",
        (*args, limit),
    ).fetchall()
    return [_encode(row) for row in reversed(rows)]


def _encode(row: Sequence[Any]) -> bytes:
    return msgspec.json.encode(
        {
            "seq": row[0],
            "tenant": row[1],
            "node": row[2],
            "log_type": row[3],
            "received_at": rfc3339(row[4]),
            "line": msgspec.Raw(row[5].encode()),
        }
    )


def export(db: sqlite3.Connection, which: LogFilter) -> Iterator[str]:
    """Lines exactly as osquery's filesystem logger writes them, oldest first."""
    parts, args = _where(which)
    for row in db.execute(
        f"SELECT line FROM osquery_logs WHERE {' AND '.join(parts) or '1'} ORDER BY seq",
        args,
    ):
        yield row[0]


def last_seq(db: sqlite3.Connection) -> int:
    """The seq given last, also when its line is gone: how many lines were ever stored."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'osquery_logs'").fetchone()
    return int(row[0]) if row else 0


def size_bytes(db: sqlite3.Connection) -> int:
    """Size of all lines that are kept; counted as they come and go."""
    return int(db.execute("SELECT bytes FROM osquery_log_size").fetchone()[0])


def _resize(tx: Tx, by_bytes: int) -> None:
    tx.db.execute("UPDATE osquery_log_size SET bytes = bytes + ?", (by_bytes,))


def prune(tx: Tx, keep: Retention) -> bool:
    """Drop lines beyond the bounds, oldest first, PRUNE_LINES or PRUNE_BYTES at most. True when there may be more."""
    cut = last_seq(tx.db) - keep.log_lines
    oldest = tx.db.execute("SELECT seq, received_at FROM osquery_logs ORDER BY seq LIMIT ?", (PRUNE_LINES,)).fetchall()
    cut = max((seq for seq, at in oldest if seq <= cut or at < tx.now - keep.log_age_s), default=0)
    excess_bytes = size_bytes(tx.db) - keep.log_bytes
    end, lines, dropped_bytes = 0, 0, 0
    if cut or excess_bytes > 0:
        for seq, line_bytes in tx.db.execute(
            "SELECT seq, length(CAST(line AS BLOB)) FROM osquery_logs ORDER BY seq LIMIT ?", (PRUNE_LINES,)
        ):
            if (seq > cut and dropped_bytes >= excess_bytes) or dropped_bytes >= PRUNE_BYTES:
                break
            end, lines, dropped_bytes = seq, lines + 1, dropped_bytes + line_bytes
    if lines:
        tx.db.execute("DELETE FROM osquery_logs WHERE seq <= ?", (end,))
        _resize(tx, -dropped_bytes)
        count_dropped(tx, "logs", lines)
        tx.emit("logs_dropped", lines=lines)
    return lines == PRUNE_LINES or dropped_bytes >= PRUNE_BYTES
