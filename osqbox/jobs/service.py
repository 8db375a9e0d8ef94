"""Jobs as rows: made, changed, found, listed and removed. Plain functions inside one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from osqbox import audit
from osqbox.store import Tx, count_dropped

from . import access, protocol
from .errors import Code, JobError, invalid, not_found
from .messages import (
    ENDED,
    Caller,
    Containment,
    JobBounds,
    JobSpec,
    OutputMode,
    Reason,
    State,
    Status,
    Usage,
)

KEEPER = "osqbox"
"""Actor in the audit of what happens by itself."""
LIST_MOST = 1000
REMOVED_AT_ONCE = 500
SHOWN_PREFIX = 2
LISTED_ARGS_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """A job with what only the runner needs to know of it."""

    status: Status
    authority: str
    output_mode: OutputMode = OutputMode.SPLIT
    open_stdin: bool = False
    link_output: bool = False
    failure: Mapping[str, Any] | None = None
    """At which step it could not be started, in the keeper's words."""
    cgroups: tuple[str, ...] = ()
    disk_bytes: int = 0

    @property
    def owner_key(self) -> access.OwnerKey:
        return self.status.owner, self.authority


def create(tx: Tx, job_id: str, spec: JobSpec, caller: Caller, run_as: str) -> tuple[Record, bool]:
    """A pending job; and whether it is new: the same request with the same idempotency key gets the job it made.

    Raises ALREADY_EXISTS when the key was used for another request.
    """
    before = repeated(tx.db, spec, caller)
    if before is not None:
        return before, False
    digest = protocol.digest(spec)
    status = Status(job_id, caller.owner, run_as, spec.command, spec.args, State.PENDING, tx.now, labels=spec.labels)
    record = Record(status, caller.authority, spec.output_mode, spec.open_stdin, spec.link_output)
    facts = {
        "id": job_id,
        "owner": caller.owner,
        "authority": caller.authority,
        "tenant": access.tenant_of(caller.owner),
        "run_as": run_as,
        "command": spec.command,
        "args": b"".join(argument + b"\0" for argument in spec.args),
        "labels": _json(spec.labels),
        "output_mode": spec.output_mode.value,
        "open_stdin": spec.open_stdin,
        "link_output": spec.link_output,
        "idempotency_key": spec.idempotency_key,
        "digest": digest,
        "state": State.PENDING.value,
        "created_at": tx.now,
    }
    columns = ", ".join(facts)
    tx.db.execute(f"INSERT INTO jobs({columns}) VALUES ({', '.join('?' * len(facts))})", tuple(facts.values()))
    _tell(
        tx, record, "job.run", "job_created", caller,
        argv=protocol.shown_command(spec.command, spec.args), cwd=_text(spec.cwd), env=sorted(spec.env),
        limits=spec.limits, timeout_s=spec.timeout_s, run_as=run_as,
    )  # fmt: skip
    return record, True


def repeated(db: sqlite3.Connection, spec: JobSpec, caller: Caller) -> Record | None:
    """The job this very request has already made. Raises ALREADY_EXISTS when its key made another."""
    if (key := spec.idempotency_key) is None:
        return None
    found = db.execute(
        f"SELECT digest, {_COLUMNS} FROM jobs WHERE owner = ? AND authority = ? AND idempotency_key = ?",
        (caller.owner, caller.authority, key),
    ).fetchone()
    if found is None:
        return None
    if found[0] != protocol.digest(spec):
        raise JobError(
            Code.ALREADY_EXISTS,
            f"idempotency_key {key!r}: expected the request it was first used with, got another; use a new key",
            reason="KEY_REUSED",
            field="idempotency_key",
        )
    return _record(found[1:])


_ACTIONS = {
    State.RUNNING: ("job.start", "job_started"),
    State.SUSPENDED: ("job.suspend", "job_suspended"),
    State.STOPPING: ("job.stop", "job_stopping"),
}


def change(tx: Tx, before: Record, after: Record, cause: Caller | None) -> None:
    """Write a new state, and in the same transaction who caused it; without a cause it happened by itself.

    States that were passed too quickly to be written are told all the same.
    """
    values = _changing(after)
    assignments = ", ".join(f"{name} = ?" for name in values)
    tx.db.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*values.values(), after.status.id))
    was, now = before.status.state, after.status.state
    if was is now:
        return
    if was is State.PENDING and now not in (State.RUNNING, State.FAILED_TO_START, State.LOST):
        _tell(tx, after, *_ACTIONS[State.RUNNING], None, pid=after.status.pid)
    if now in ENDED:
        if cause is not None and was is not State.STOPPING:
            _tell(tx, after, *_ACTIONS[State.STOPPING], cause)
        _tell(tx, after, "job.end", "job_ended", None, **_end_facts(after))
    elif now is State.RUNNING and was is not State.PENDING:
        _tell(tx, after, "job.resume", "job_resumed", cause)
    else:
        _tell(tx, after, *_ACTIONS[now], cause, pid=after.status.pid)


def _end_facts(record: Record) -> dict[str, Any]:
    status = record.status
    return {
        "result": protocol.result_of(status),
        "reason": status.reason,
        "stopped_by": status.stopped_by,
        "output_bytes": status.output_bytes,
    }


def note(tx: Tx, record: Record, caller: Caller, action: str, result: str = "ok", **facts: Any) -> None:
    """Something that was done to a job and changed no row: a signal, input, somebody else's output read."""
    audit.record(
        tx, caller.owner, action, record.status.id, result,
        tenant=access.tenant_of(record.status.owner), serial=caller.serial, address=caller.address, **facts,
    )  # fmt: skip


def note_refused(tx: Tx, caller: Caller, action: str, subject: str, reason: str) -> None:
    audit.record(tx, caller.owner, action, subject[:64], reason, serial=caller.serial, address=caller.address)


def _tell(tx: Tx, record: Record, action: str, kind: str, cause: Caller | None, **facts: Any) -> None:
    status, tenant = record.status, access.tenant_of(record.status.owner)
    result = str(facts.pop("result", "ok"))
    audit.record(
        tx, cause.owner if cause else KEEPER, action, status.id, result, tenant=tenant,
        serial=cause.serial if cause else None, address=cause.address if cause else "", **facts,
    )  # fmt: skip
    tx.emit(
        kind, tenant=tenant, job=status.id, owner=status.owner, state=status.state.value, result=result,
        command=protocol.shown_command(status.command, (), 256)[0], exit_code=status.exit_code, signal=status.signal,
    )  # fmt: skip


# looking


def find(db: sqlite3.Connection, job: str, caller: Caller) -> Record:
    """By id, or by the beginning of one that only one job has of those the caller sees.

    Raises NOT_FOUND (EXPIRED to the owner of a job that retention removed) or INVALID_ARGUMENT.
    """
    protocol.check_id(job)
    rows: list[Sequence[Any]] = []
    if not protocol.is_pid(job):
        scope, values = _scope(caller)
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE id >= ? AND id < ? {scope} LIMIT ?",
            (job, job + "~", *values, SHOWN_PREFIX),
        ).fetchall()
    if not rows:
        raise _expired(db, job, caller) or not_found(job)
    if len(rows) > 1:
        raise invalid("process_id", f"expected a beginning that only one job has, got {job!r}, which several have; "
                                    "type more of it")  # fmt: skip
    return _record(rows[0])


def _scope(caller: Caller) -> tuple[str, tuple[str, ...]]:
    if access.sees_all(caller):
        return "", ()
    return "AND owner = ? AND authority = ?", (caller.owner, caller.authority)


def _expired(db: sqlite3.Connection, job: str, caller: Caller) -> JobError | None:
    found = db.execute(
        "SELECT 1 FROM jobs_removed WHERE id = ? AND owner = ? AND authority = ?",
        (job, caller.owner, caller.authority),
    ).fetchone()
    if found is None:
        return None
    return JobError(Code.NOT_FOUND, f"job {job!r} is no longer kept: retention has removed it", reason="EXPIRED")


def listing(
    db: sqlite3.Connection,
    caller: Caller,
    *,
    states: Iterable[State] = (),
    owner: str | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int = 100,
    before: str | None = None,
) -> tuple[list[Record], str | None]:
    """What the caller sees, the newest first, and the ``before`` of the next page. Raises INVALID_ARGUMENT.

    Long command lines are cut to whole arguments of LISTED_ARGS_BYTES together.
    """
    if not 1 <= limit <= LIST_MOST:
        raise invalid("page_size", f"expected 1 to {LIST_MOST}, got {limit}")
    protocol.check_labels(labels or {})
    scope, values = _scope(caller)
    where: list[str] = [scope.removeprefix("AND ")] if scope else []
    args: list[Any] = [*values]
    wanted = [State(state).value for state in states]
    if wanted:
        where.append(f"state IN ({', '.join('?' * len(wanted))})")
        args += wanted
    if owner is not None:
        where.append("owner = ?")
        args.append(owner)
    for name, value in (labels or {}).items():
        where.append("json_extract(labels, ?) = ?")
        args += [f'$."{name}"', value]
    if before is not None:
        where.append("(created_at, id) < (?, ?)")
        args += _page(before)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = db.execute(
        f"SELECT {_LISTED} FROM jobs {condition} ORDER BY created_at DESC, id DESC LIMIT ?", (*args, limit + 1)
    ).fetchall()
    records = [_record(row) for row in rows[:limit]]
    more = f"{records[-1].status.created_at!r}_{records[-1].status.id}" if len(rows) > limit else None
    return records, more


def _page(before: str) -> tuple[float, str]:
    at, _, job = before.partition("_")
    try:
        protocol.check_id(job)
        if not 0 <= float(at) < float("inf"):
            raise ValueError(at)
        return float(at), job
    except (ValueError, JobError):
        raise invalid("page_token", f"expected the next_page of an earlier answer, got {before[:80]!r}") from None


def unfinished(db: sqlite3.Connection) -> list[Record]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE ended_at IS NULL ORDER BY seq")
    return [_record(row) for row in rows.fetchall()]


def ids(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT id FROM jobs")}


def spared_groups(db: sqlite3.Connection) -> list[str]:
    """Control groups that ended jobs have left behind, gone or not."""
    rows = db.execute("SELECT cgroups FROM jobs WHERE ended_at IS NOT NULL AND cgroups != '[]'")
    return [directory for (cgroups,) in rows for directory in msgspec.json.decode(cgroups)]


def kept(db: sqlite3.Connection) -> tuple[int, int, float | None]:
    """Ended jobs: how many, their bytes on disk, and when the oldest ended."""
    row = db.execute(
        "SELECT count(*), coalesce(sum(disk_bytes), 0), min(ended_at) FROM jobs WHERE ended_at IS NOT NULL"
    ).fetchone()
    return row[0], row[1], row[2]


# removing


def delete(tx: Tx, record: Record, caller: Caller) -> None:
    """The row of an ended job. Raises NOT_FOUND when somebody else was quicker."""
    if not tx.db.execute("DELETE FROM jobs WHERE id = ?", (record.status.id,)).rowcount:
        raise not_found(record.status.id)
    _tell(tx, record, "job.delete", "job_deleted", caller)


def expire(tx: Tx, bounds: JobBounds) -> list[Record]:
    """Remove ended jobs beyond the bounds, the oldest first, some at a time; returns those removed."""
    count, size_bytes, _ = kept(tx.db)
    gone: list[Record] = []
    rows = tx.db.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE ended_at IS NOT NULL ORDER BY ended_at, seq LIMIT ?", (REMOVED_AT_ONCE,)
    ).fetchall()
    for record in map(_record, rows):
        old = (record.status.ended_at or 0) <= tx.now - bounds.kept_age_s
        if not (old or count > bounds.kept_jobs or size_bytes > bounds.kept_bytes):
            break
        gone.append(record)
        count, size_bytes = count - 1, size_bytes - record.disk_bytes
    for record in gone:
        _forget(tx, record)
    if gone:
        tx.db.execute(
            "DELETE FROM jobs_removed WHERE seq <= (SELECT max(seq) FROM jobs_removed) - ?", (bounds.remembered,)
        )
        count_dropped(tx, "jobs", len(gone))
    return gone


def _forget(tx: Tx, record: Record) -> None:
    status = record.status
    tx.db.execute("DELETE FROM jobs WHERE id = ?", (status.id,))
    tx.db.execute(
        "INSERT INTO jobs_removed(id, owner, authority, removed_at) VALUES (?, ?, ?, ?)",
        (status.id, status.owner, record.authority, tx.now),
    )
    _tell(tx, record, "job.expire", "job_removed", None)


# rows


def _changing(record: Record) -> dict[str, Any]:
    status = record.status
    return {
        "state": status.state.value,
        "started_at": status.started_at,
        "ended_at": status.ended_at,
        "pid": status.pid,
        "exit_code": status.exit_code,
        "signal": status.signal,
        "core_dumped": status.core_dumped,
        "errno": status.errno,
        "failure": None if record.failure is None else _json(record.failure),
        "reason": status.reason,
        "stopped_by": status.stopped_by,
        "output_bytes": status.output_bytes,
        "stdout_bytes": status.stdout_bytes,
        "stderr_bytes": status.stderr_bytes,
        "output_truncated": status.output_truncated,
        "output_drained": status.output_drained,
        "user_s": status.usage.user_s,
        "system_s": status.usage.system_s,
        "max_rss_bytes": status.usage.max_rss_bytes,
        "containment": status.containment,
        "enforced": _json(status.enforced),
        "leftover_processes": status.leftover_processes,
        "cgroups": _json(record.cgroups),
        "disk_bytes": record.disk_bytes,
    }


_COLUMNS = (
    "id, owner, authority, run_as, command, args, labels, output_mode, open_stdin, link_output, state, created_at, "
    "started_at, ended_at, pid, exit_code, signal, core_dumped, errno, failure, reason, stopped_by, output_bytes, "
    "stdout_bytes, stderr_bytes, output_truncated, output_drained, user_s, system_s, max_rss_bytes, containment, "
    "enforced, leftover_processes, cgroups, disk_bytes"
)
_LISTED = _COLUMNS.replace(" args,", f" coalesce(substr(args, 1, {LISTED_ARGS_BYTES}), x''),")


def _record(row: Sequence[Any]) -> Record:
    facts = dict(zip(_COLUMNS.split(", "), row, strict=True))
    status = Status(
        id=facts["id"],
        owner=facts["owner"],
        run_as=facts["run_as"],
        command=facts["command"],
        args=tuple(facts["args"].split(b"\0")[:-1]),
        state=State(facts["state"]),
        created_at=facts["created_at"],
        pid=facts["pid"],
        started_at=facts["started_at"],
        ended_at=facts["ended_at"],
        exit_code=facts["exit_code"],
        signal=facts["signal"],
        core_dumped=bool(facts["core_dumped"]),
        errno=facts["errno"],
        reason=Reason(facts["reason"]) if facts["reason"] else None,
        stopped_by=facts["stopped_by"],
        output_bytes=facts["output_bytes"],
        stdout_bytes=facts["stdout_bytes"],
        stderr_bytes=facts["stderr_bytes"],
        output_truncated=bool(facts["output_truncated"]),
        output_drained=bool(facts["output_drained"]),
        usage=Usage(facts["user_s"], facts["system_s"], facts["max_rss_bytes"]),
        containment=Containment(facts["containment"]) if facts["containment"] else None,
        enforced=tuple(msgspec.json.decode(facts["enforced"])),
        leftover_processes=facts["leftover_processes"],
        labels=msgspec.json.decode(facts["labels"]),
    )
    return Record(
        status,
        facts["authority"],
        OutputMode(facts["output_mode"]),
        bool(facts["open_stdin"]),
        bool(facts["link_output"]),
        msgspec.json.decode(facts["failure"]) if facts["failure"] else None,
        tuple(msgspec.json.decode(facts["cgroups"])),
        facts["disk_bytes"],
    )


def lost(record: Record, now: float) -> Record:
    """What is left of a job whose keeper is gone."""
    status = replace(record.status, state=State.LOST, reason=Reason.LOST, ended_at=now)
    return replace(record, status=status)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")
