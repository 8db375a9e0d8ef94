"""What is forwarded: rows of other systems' tables after a cursor, and the output of jobs.

The tables are read by their documented columns (docs/database.md). A number is never given twice, and numbers become
visible in their order. Retention removes the oldest: what lies between a cursor and the oldest row is gone.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from osqbox.clock import rfc3339

from .messages import Output, Page, Record, SourceName
from .tables import JobCursor

PAGE_RECORDS = 2000


class Table(NamedTuple):
    """A source that is one table with one growing number."""

    name: str
    number: str
    """Its column."""
    columns: str
    encode: Callable[[str, tuple[Any, ...]], bytes]
    """A row whose first columns are its number and its time, as a JSON object with this id."""


def _log(id: str, row: tuple[Any, ...]) -> bytes:
    seq, at, tenant, node, log_type, line = row
    return msgspec.json.encode(
        {
            "id": id,
            "source": "logs",
            "seq": seq,
            "at": rfc3339(at),
            "tenant": tenant,
            "node": node,
            "log_type": log_type,
            "line": msgspec.Raw(line.encode()),
        }
    )


def _event(id: str, row: tuple[Any, ...]) -> bytes:
    seq, at, tenant, agent, module, collector, event_id, data = row
    return msgspec.json.encode(
        {
            "id": id,
            "source": "events",
            "seq": seq,
            "at": rfc3339(at),
            "tenant": tenant,
            "agent": agent,
            "module": module,
            "collector": collector,
            "event_id": event_id,
            # An object also where the agent sent something else: an index knows a field by one kind of value.
            "data": msgspec.Raw(data.encode() if data.startswith("{") else b'{"value":%s}' % data.encode()),
        }
    )


TABLES: Mapping[SourceName, Table] = MappingProxyType(
    {
        SourceName.LOGS: Table("osquery_logs", "seq", "seq, received_at, tenant, node, log_type, line", _log),
        SourceName.EVENTS: Table(
            "comms_events", "number", "number, received_at, tenant, agent, module, collector, id, data", _event
        ),
    }
)


def read_table(db: sqlite3.Connection, source: SourceName, origin: str, after: int, limit_bytes: int) -> Page:
    """The next records, until they are ``limit_bytes``; the last may pass it."""
    table = TABLES[source]
    gone = before_oldest(db, source)
    records: list[Record] = []
    size_bytes = 0
    query = f"SELECT {table.columns} FROM {table.name} WHERE {table.number} > ? ORDER BY {table.number} LIMIT ?"
    with closing(db.execute(query, (after, PAGE_RECORDS))) as rows:
        for row in rows:
            record_id = f"{origin}:{source}:{row[0]}"
            text = table.encode(record_id, row)
            records.append(Record(record_id, source, "", row[0], text))
            size_bytes += len(text)
            if size_bytes >= limit_bytes:
                break
    return Page(records, max(0, gone - after))


def last_number(db: sqlite3.Connection, source: SourceName) -> int:
    """The number given last, also when its row is gone."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (TABLES[source].name,)).fetchone()
    return int(row[0]) if row else 0


def before_oldest(db: sqlite3.Connection, source: SourceName) -> int:
    """One less than the number of the oldest record that is kept; where there is none, the number given last."""
    row = db.execute(f"SELECT min({TABLES[source].number}) FROM {TABLES[source].name}").fetchone()
    return last_number(db, source) if row[0] is None else int(row[0]) - 1


def oldest_at(db: sqlite3.Connection, source: SourceName, after: int) -> float | None:
    """When the oldest record after this number was received."""
    table = TABLES[source]
    query = f"SELECT received_at FROM {table.name} WHERE {table.number} > ? ORDER BY {table.number} LIMIT 1"
    row = db.execute(query, (after,)).fetchone()
    return float(row[0]) if row else None


def output_records(job: JobCursor, origin: str, pieces: Sequence[tuple[int, int, str, float, bytes]]) -> list[Record]:
    """Pieces of a job's output, each as it was written by the job."""
    records = []
    for number, offset, stream, at, data in pieces:
        record_id = f"{origin}:jobs:{job.job}:{number}"
        facts = {
            "id": record_id,
            "source": "jobs",
            "at": rfc3339(at),
            "tenant": job.tenant,
            "owner": job.owner,
            "job": job.job,
            "stream": stream,
            "offset": offset,
            **_content(data),
        }
        records.append(Record(record_id, SourceName.JOBS, job.job, number + 1, msgspec.json.encode(facts)))
    return records


def _content(data: bytes) -> dict[str, str]:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


class OutputRead(NamedTuple):
    """What there is of the jobs' output, as far as a page takes it."""

    records: list[Record]
    ended: list[str]
    """Jobs that have ended and of whose output there is no more than these records."""
    reached: dict[str, int]
    """Where each job's cursor stands after them."""
    missing: int
    left: int
    """Pieces known to be behind these."""


def read_jobs(
    jobs: Sequence[JobCursor], origin: str, limit_bytes: int, read: Callable[[str, int, int], Output]
) -> OutputRead:
    """A share of each job's new output in turn; blocks."""
    found = OutputRead([], [], {}, 0, 0)
    records, ended, reached = found.records, found.ended, found.reached
    missing = left = size_bytes = 0
    for job in jobs:
        room_bytes = min(limit_bytes - size_bytes, max(64 * 1024, limit_bytes // 4))
        if room_bytes <= 0:
            break
        try:
            pieces, next_number, behind, gone = read(job.job, job.position, room_bytes)
        except FileNotFoundError:
            if job.has_ended:
                ended.append(job.job)
            continue
        records += output_records(job, origin, pieces)
        size_bytes += sum(len(data) for *_, data in pieces)
        missing, left = missing + gone, left + behind
        if next_number > job.position:
            reached[job.job] = next_number
        if job.has_ended and not behind:
            ended.append(job.job)
    return found._replace(missing=missing, left=left)
