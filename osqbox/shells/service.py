"""Sessions as rows: asked for, offered, joined, ended. Plain functions inside one transaction.

Secrets and resume tokens are kept as SHA-256 only. A refusal that must leave its own trace is returned, not raised:
raising would undo the audit row that tells of it.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from osqbox import audit
from osqbox.errors import Refused
from osqbox.shells.messages import EndReason, Session, ShellBounds, State
from osqbox.store import Tx

LAUNCHER = "launcher"
V1 = "shell.v1"

_COLUMNS = (
    "id, node, tenant, hostname, state, by, reason, created_at, opened_at, ended_at, end_reason, exit_code, signal, "
    "cols, rows, shell, user, protocol, output_bytes, record, record_input"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What an operator asks for."""

    node: str
    tenant: str
    hostname: str
    by: str
    reason: str
    cols: int
    rows: int
    shell: str | None
    user: str | None
    record: bool
    record_input: bool


@dataclass(frozen=True, slots=True)
class Offer:
    session: Session
    secret: str


@dataclass(frozen=True, slots=True)
class Claim:
    """With what an agent comes to a session's door."""

    session: str
    secret: str | None
    resume: str | None = None
    node: str | None = None
    """Proved by a node key, where one was sent."""
    certificate_name: str | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class End:
    reason: EndReason
    by: str
    exit_code: int | None = None
    signal: int | None = None


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


# asking


def request(tx: Tx, wish: Wish, bounds: ShellBounds, new_id: Callable[[], str]) -> Session:
    """A new session that waits for its agent. Raises Refused (429) beyond a quota."""
    live = "SELECT count(*) FROM shells_sessions WHERE state <> 'ended'"
    for name, limit, where, values in (
        ("sessions in all", bounds.sessions, "", ()),
        ("sessions of this node", bounds.sessions_per_node, " AND node = ?", (wish.node,)),
        ("sessions of this operator", bounds.sessions_per_operator, " AND by = ?", (wish.by,)),
    ):
        if tx.db.execute(live + where, values).fetchone()[0] >= limit:
            message = f"expected at most {limit} {name}, this would be one more; end one first"
            raise Refused("shell_quota", message, status=429)
    session = new_id()
    tx.db.execute(
        "INSERT INTO shells_sessions(id, tenant, node, hostname, state, by, reason, cols, rows, shell, user, record, "
        "record_input, secret_used, created_at, output_bytes) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,0,?,0)",
        (session, wish.tenant, wish.node, wish.hostname, State.REQUESTED, wish.by, wish.reason, wish.cols, wish.rows,
         wish.shell, wish.user, wish.record, wish.record_input, tx.now),
    )  # fmt: skip
    audit.record(
        tx, wish.by, "shell.open", session, tenant=wish.tenant, node=wish.node, reason=wish.reason,
        recording=wish.record, input_recorded=wish.record_input,
    )  # fmt: skip
    tx.emit("shell_requested", tenant=wish.tenant, node=wish.node, session=session, by=wish.by, reason=wish.reason)
    return _must(tx.db, session)


def has_work(db: sqlite3.Connection, node: str) -> bool:
    """Whether a poll of this node has something to fetch."""
    return (
        db.execute("SELECT 1 FROM shells_sessions WHERE node = ? AND state = 'requested' LIMIT 1", (node,)).fetchone()
        is not None
    )


def offer(
    tx: Tx, node: str, tenant: str, certificate_name: str | None, join_s: float, new_key: Callable[[], str]
) -> list[Offer]:
    """Secrets for what waits for this node, each told this once."""
    waiting = tx.db.execute(
        f"SELECT {_COLUMNS} FROM shells_sessions WHERE node = ? AND tenant = ? AND state = 'requested' ORDER BY "
        "created_at, id",
        (node, tenant),
    ).fetchall()
    offers = []
    for row in waiting:
        secret = new_key()
        tx.db.execute(
            "UPDATE shells_sessions SET state = 'offered', secret_digest = ?, secret_void_at = ?, "
            "certificate_name = ? WHERE id = ?",
            (digest(secret), tx.now + join_s, certificate_name, row[0]),
        )
        offers.append(Offer(_must(tx.db, row[0]), secret))
        audit.record(tx, node, "shell.offer", row[0], tenant=tenant)
    return offers


def withdraw(tx: Tx, session: str) -> bool:
    """The secret was fetched and not used in time: it is void, and the next poll gets another."""
    changed = tx.db.execute(
        "UPDATE shells_sessions SET state = 'requested', secret_digest = NULL, secret_void_at = NULL "
        "WHERE id = ? AND state = 'offered'",
        (session,),
    )
    return changed.rowcount > 0


# joining


def check(db: sqlite3.Connection, claim: Claim, now: float) -> Refused | None:
    """Why this claim would be refused; None when it opens the door. Changes nothing."""
    row = db.execute(
        "SELECT node, state, secret_digest, secret_void_at, secret_used, certificate_name, resume_digest "
        "FROM shells_sessions WHERE id = ?",
        (claim.session,),
    ).fetchone()
    if row is None:
        return _refusal("unknown_session")
    node, state, secret_digest, void_at, used, certificate, resume_digest = row
    if (claim.node is not None and claim.node != node) or (certificate and certificate != claim.certificate_name):
        return _refusal("foreign_node")
    if claim.resume is not None:
        if not _same(resume_digest, claim.resume):
            return _refusal("wrong_token")
        return _refusal("ended") if state == State.ENDED else None
    if claim.secret is None:
        return _refusal("no_secret")
    if not _same(secret_digest, claim.secret):
        other = db.execute("SELECT 1 FROM shells_sessions WHERE secret_digest = ?", (digest(claim.secret),)).fetchone()
        return _refusal("foreign_session" if other else "wrong_secret")
    if used:
        return _refusal("used_secret")
    if state != State.OFFERED:
        return _refusal("ended")
    return _refusal("expired_secret") if now > void_at else None


def is_resume_token(db: sqlite3.Connection, session: str, token: str) -> bool:
    row = db.execute("SELECT resume_digest FROM shells_sessions WHERE id = ?", (session,)).fetchone()
    return row is not None and _same(row[0], token)


def join(tx: Tx, claim: Claim, protocol: str, resume: str) -> Session | Refused:
    """The session, now open, its secret used up and ``resume`` good for coming back; or why not, which is audited."""
    refused = check(tx.db, claim, tx.now)
    if refused is not None:
        refuse(tx, claim, refused)
        return refused
    before = _must(tx.db, claim.session)
    tx.db.execute(
        "UPDATE shells_sessions SET state = 'open', secret_used = 1, resume_digest = ?, protocol = ?, "
        "opened_at = coalesce(opened_at, ?) WHERE id = ?",
        (digest(resume), protocol, tx.now, claim.session),
    )
    facts: dict[str, Any] = {"protocol": protocol, "resumed": claim.resume is not None}
    audit.record(tx, before.node, "shell.join", claim.session, tenant=before.tenant, address=claim.address, **facts)
    if claim.resume is None:
        tx.emit("shell_opened", tenant=before.tenant, node=before.node, session=claim.session, by=before.by)
    return _must(tx.db, claim.session)


def refuse(tx: Tx, claim: Claim, refused: Refused) -> None:
    """Tell the audit of a claim that did not open its door."""
    found = find(tx.db, claim.session)
    audit.record(
        tx, claim.node or claim.certificate_name or "agent", "shell.join", claim.session[:128], refused.reason,
        tenant=found.tenant if found else None, address=claim.address,
    )  # fmt: skip


_WORDS = {
    "unknown_session": (404, "no such shell session"),
    "foreign_node": (403, "this session is another node's"),
    "foreign_session": (403, "this secret is another session's"),
    "wrong_token": (403, "the resume token is wrong"),
    "no_secret": (401, "expected the session's secret, got none"),
    "wrong_secret": (403, "the secret is wrong"),
    "used_secret": (403, "the secret was used before; the session is ended"),
    "expired_secret": (403, "the secret was not used in time"),
    "ended": (410, "the session has ended"),
}


def _refusal(reason: str) -> Refused:
    status, message = _WORDS[reason]
    return Refused(reason, message, status=status)


def _same(kept_digest: bytes | None, secret: str) -> bool:
    return kept_digest is not None and hmac.compare_digest(kept_digest, digest(secret))


# what happens later


def detach(tx: Tx, session: str, output_bytes: int) -> None:
    """The agent's connection is gone, and what was received of its output is known."""
    tx.db.execute(
        "UPDATE shells_sessions SET state = 'detached', output_bytes = ? WHERE id = ? AND state = 'open'",
        (output_bytes, session),
    )


def describe(tx: Tx, session: str, shell: str | None, user: str | None) -> None:
    """What the agent says it runs, and as whom."""
    tx.db.execute(
        "UPDATE shells_sessions SET shell = coalesce(?, shell), user = coalesce(?, user) WHERE id = ?",
        (shell or None, user or None, session),
    )


def note(tx: Tx, session: str, tenant: str | None, actor: str, action: str, result: str = "ok", **facts: Any) -> None:
    """An audit row about a session."""
    audit.record(tx, actor, action, session, result, tenant=tenant, **facts)


def end(tx: Tx, session: str, how: End, output_bytes: int, cols: int, rows: int) -> None:
    """Ended, once and for all; audited and told."""
    before = _must(tx.db, session)
    if before.ended:
        return
    tx.db.execute(
        "UPDATE shells_sessions SET state = 'ended', ended_at = ?, end_reason = ?, exit_code = ?, signal = ?, "
        "output_bytes = ?, cols = ?, rows = ? WHERE id = ?",
        (tx.now, how.reason, how.exit_code, how.signal, output_bytes, cols, rows, session),
    )
    outcome: dict[str, Any] = {
        "exit_code": how.exit_code, "signal": how.signal, "output_bytes": output_bytes,
        "seconds": None if before.opened_at is None else round(tx.now - before.opened_at, 3),
    }  # fmt: skip
    action = "shell.kill" if how.reason is EndReason.KILLED else "shell.end"
    audit.record(tx, how.by, action, session, how.reason, tenant=before.tenant, node=before.node, **outcome)
    tx.emit("shell_ended", tenant=before.tenant, node=before.node, session=session, reason=how.reason, **outcome)


def keep_recording(tx: Tx, session: str, size_bytes: int | None, sha256: str | None) -> None:
    """What an ended session's recording takes on the disk; None when there is none, or no longer."""
    before = _must(tx.db, session)
    tx.db.execute(
        "UPDATE shells_sessions SET recording_bytes = ?, recording_sha256 = coalesce(?, recording_sha256) WHERE id = ?",
        (size_bytes, sha256, session),
    )
    result = "deleted" if size_bytes is None else "kept"
    audit.record(
        tx, "box", "shell.recording", session, result, tenant=before.tenant, size_bytes=size_bytes, sha256=sha256
    )


# looking


def find(db: sqlite3.Connection, session: str) -> Session | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM shells_sessions WHERE id = ?", (session,)).fetchone()
    return None if row is None else _session(row)


def _must(db: sqlite3.Connection, session: str) -> Session:
    found = find(db, session)
    if found is None:
        raise Refused("unknown_session", f"no shell session {session[:128]!r}", status=404)
    return found


def sessions(
    db: sqlite3.Connection,
    *,
    tenant: str | None = None,
    node: str | None = None,
    states: tuple[str, ...] = (),
    limit: int = 1000,
) -> list[Session]:
    """Newest first."""
    where: list[str] = ["1"]
    values: list[Any] = []
    for column, value in (("tenant", tenant), ("node", node)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if states:
        where.append(f"state IN ({','.join('?' * len(states))})")
        values += states
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM shells_sessions WHERE {' AND '.join(where)} ORDER BY created_at DESC, id LIMIT ?",
        (*values, limit),
    )
    return [_session(row) for row in rows.fetchall()]


def recordings(db: sqlite3.Connection) -> list[tuple[str, float, int]]:
    """Kept recordings of ended sessions: id, when it ended, bytes on the disk."""
    return db.execute(
        "SELECT id, ended_at, recording_bytes FROM shells_sessions WHERE state = 'ended' AND recording_bytes > 0"
    ).fetchall()


def unfinished(db: sqlite3.Connection) -> list[str]:
    """Ended sessions whose recording was not measured: the box was killed in between."""
    rows = db.execute(
        "SELECT id FROM shells_sessions WHERE state = 'ended' AND record = 1 AND opened_at IS NOT NULL "
        "AND recording_bytes IS NULL AND recording_sha256 IS NULL"
    )
    return [row[0] for row in rows.fetchall()]


def _session(row: tuple[Any, ...]) -> Session:
    return Session(
        id=row[0], node=row[1], tenant=row[2], hostname=row[3], state=State(row[4]), by=row[5], reason=row[6],
        created_at=row[7], opened_at=row[8], ended_at=row[9],
        end_reason=None if row[10] is None else EndReason(row[10]), exit_code=row[11], signal=row[12],
        cols=row[13], rows=row[14], shell=row[15], user=row[16], protocol=row[17], output_bytes=row[18],
        recording=bool(row[19]), record_input=bool(row[20]),
    )  # fmt: skip
