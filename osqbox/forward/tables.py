"""How far each sink has got, and what it has been given."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlite_utils import Database, Migrations

from osqbox.store import Tx

from .messages import Record, SourceName

migrations = Migrations("forward")


@migrations()
def m001_forward(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE forward_cursors (
            sink TEXT NOT NULL,
            source TEXT NOT NULL,              -- logs, events, jobs
            position INTEGER NOT NULL,         -- number of the last record that is confirmed; 0 for jobs
            forwarded INTEGER NOT NULL,        -- records the sink has confirmed
            dropped INTEGER NOT NULL,          -- records retention removed before they were confirmed
            set_aside INTEGER NOT NULL,        -- records the sink refused for what they are
            moved_at REAL NOT NULL,            -- seconds since the epoch
            PRIMARY KEY (sink, source)
        ) WITHOUT ROWID"""
    )
    db.conn.execute(
        """CREATE TABLE forward_jobs (
            sink TEXT NOT NULL,
            job TEXT NOT NULL,                 -- jobs.id
            position INTEGER NOT NULL,         -- how many records of its output log are confirmed
            ended INTEGER NOT NULL,            -- 1 = it has ended and all of its output is confirmed
            PRIMARY KEY (sink, job)
        ) WITHOUT ROWID"""
    )
    db.conn.execute(
        """CREATE TABLE forward_origin (
            origin TEXT NOT NULL               -- random; begins the id of every record, as others number theirs alike
        )"""
    )
    db.conn.execute("INSERT INTO forward_origin VALUES (lower(hex(randomblob(6))))")


class Cursor(NamedTuple):
    """Of one source, for one sink."""

    position: int
    forwarded: int
    dropped: int
    set_aside: int
    moved_at: float


class JobCursor(NamedTuple):
    job: str
    tenant: str | None
    owner: str
    has_ended: bool
    position: int


def origin(db: sqlite3.Connection) -> str:
    return str(db.execute("SELECT origin FROM forward_origin").fetchone()[0])


def open_cursor(tx: Tx, sink: str, source: SourceName, before_oldest: int) -> Cursor:
    """Where the sink was; a new one begins with the oldest record that is kept."""
    tx.db.execute(
        "INSERT OR IGNORE INTO forward_cursors VALUES (?, ?, ?, 0, 0, 0, ?)", (sink, source, before_oldest, tx.now)
    )
    row = tx.db.execute(
        "SELECT position, forwarded, dropped, set_aside, moved_at FROM forward_cursors WHERE sink = ? AND source = ?",
        (sink, source),
    ).fetchone()
    return Cursor._make(row)


def confirm(
    tx: Tx,
    sink: str,
    source: SourceName,
    records: Sequence[Record],
    *,
    reached: int = 0,
    missing: int = 0,
    set_aside: int = 0,
) -> None:
    """The sink has these records, in the order they were read in; what it refused is among them."""
    position = max(reached, max((record.number for record in records if not record.part), default=0))
    tx.db.execute(
        "UPDATE forward_cursors SET position = max(position, ?), forwarded = forwarded + ?, dropped = dropped + ?, "
        "set_aside = set_aside + ?, moved_at = ? WHERE sink = ? AND source = ?",
        (position, len(records) - set_aside, missing, set_aside, tx.now, sink, source),
    )
    if parts := {record.part: record.number for record in records if record.part}:
        close_jobs(tx, sink, parts, ())
    if missing:
        tx.emit("forward_missed", sink=sink, source=source, records=missing)
    if set_aside:
        tx.emit("forward_set_aside", sink=sink, source=source, records=set_aside)


def close_jobs(tx: Tx, sink: str, reached: Mapping[str, int], ended: Sequence[str]) -> None:
    """Move cursors; of the ended ones all output is confirmed or gone."""
    tx.db.executemany(
        "UPDATE forward_jobs SET position = max(position, ?) WHERE sink = ? AND job = ?",
        [(position, sink, job) for job, position in reached.items()],
    )
    tx.db.executemany("UPDATE forward_jobs SET ended = 1 WHERE sink = ? AND job = ?", [(sink, job) for job in ended])


def unfinished_jobs(db: sqlite3.Connection, sink: str) -> tuple[list[JobCursor], bool]:
    """Jobs whose output the sink does not have to its end, and whether `note_jobs` has something to do."""
    rows = db.execute(
        "SELECT id, tenant, owner, ended_at IS NOT NULL, position, ended FROM jobs "
        "LEFT JOIN forward_jobs ON sink = ? AND job = id WHERE ended IS NOT 1 ORDER BY seq",
        (sink,),
    ).fetchall()
    gone = db.execute(
        "SELECT EXISTS (SELECT 1 FROM forward_jobs WHERE sink = ? AND job NOT IN (SELECT id FROM jobs))", (sink,)
    ).fetchone()[0]
    known = [JobCursor(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows if row[5] is not None]
    return known, bool(gone) or len(known) < len(rows)


def note_jobs(tx: Tx, sink: str) -> int:
    """New jobs get a cursor; that of a removed one goes. Returns how many of those had output to come: they count."""
    tx.db.execute("INSERT OR IGNORE INTO forward_jobs SELECT ?, id, 0, 0 FROM jobs", (sink,))
    gone = tx.db.execute(
        "DELETE FROM forward_jobs WHERE sink = ? AND job NOT IN (SELECT id FROM jobs) RETURNING ended", (sink,)
    ).fetchall()
    missed = sum(not ended for (ended,) in gone)
    if missed:
        confirm(tx, sink, SourceName.JOBS, (), missing=missed)
    return missed
