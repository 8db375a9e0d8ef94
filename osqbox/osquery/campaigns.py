"""Campaigns: one live query to many nodes, with an account for every target.

    pending ──read──▶ sent ──write──▶ answered | failed
       └───────────────┴──────────▶ expired | cancelled

A target that was read but not written is offered again at the node's next read: osqueryd reads only when it has
finished, so a second read means that the answer got lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.errors import BadUsage
from osqbox.osquery import nodes
from osqbox.osquery.messages import Answer
from osqbox.osquery.nodes import Node, Selector
from osqbox.store import Tx, count_dropped

OFFER_QUERIES = 1000
OFFER_BYTES = 4 * 1024 * 1024
"""SQL offered at once, far within the 8 MiB that osqueryd reads; one query may pass it, the rest comes next time."""
ANSWERS_BYTES = 4 * 1024 * 1024
"""Answers read at once; one more may pass it."""
SQL_MAX_BYTES = 1024 * 1024
TIMEOUT_MAX_S = 7 * 86400
DISCOVERY_OFFERS = 2
"""A target with a discovery query that was offered this often and read again was dropped by its discovery."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of whom."""

    sql: str
    selector: Selector
    timeout_s: float
    everyone: bool = False
    """Also nodes that have not been heard of lately, until the campaign expires."""
    accelerate_s: int | None = None
    discovery: str | None = None


@dataclass(frozen=True, slots=True)
class Campaign:
    id: str
    tenant: str | None
    sql: str
    created_at: float
    expires_at: float
    ended_at: float | None
    first_at: float | None
    last_at: float | None
    counts: dict[str, int]
    """Number of targets by state."""

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "tenant": self.tenant,
            "sql": self.sql,
            "created_at": rfc3339(self.created_at),
            "expires_at": rfc3339(self.expires_at),
            "ended_at": rfc3339(self.ended_at),
            "summary": self.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """``{targets, answered, failed, expired, cancelled, open, first_ms, last_ms}``; the times since creation."""
        return {
            "targets": sum(self.counts.values()),
            "answered": self.counts.get("answered", 0),
            "failed": self.counts.get("failed", 0),
            "expired": self.counts.get("expired", 0),
            "cancelled": self.counts.get("cancelled", 0),
            "open": self.counts.get("pending", 0) + self.counts.get("sent", 0),
            "first_ms": self._since_ms(self.first_at),
            "last_ms": self._since_ms(self.last_at),
        }

    def _since_ms(self, at: float | None) -> float | None:
        return None if at is None else round((at - self.created_at) * 1000, 3)


def start(
    tx: Tx, order: Order, reachable: Callable[[Sequence[Node]], Collection[str]], new_id: Callable[[], str]
) -> tuple[Campaign, list[str]]:
    """Create a campaign with its targets; returns it with the ids of its nodes. Raises BadUsage.

    Without a selector it goes to every active node that ``reachable`` names.
    """
    _check(order)
    active = Selector(
        order.selector.nodes,
        order.selector.tags,
        order.selector.platforms,
        order.selector.tenant,
        ("active",),
    )
    closed = {tenant.name for tenant in tenants.all_tenants(tx.db) if tenant.closed_at is not None}
    chosen = [node for node in nodes.select(tx.db, active) if node.tenant not in closed]
    if order.selector.is_empty() and not order.everyone:
        heard = reachable(chosen)
        chosen = [node for node in chosen if node.id in heard]
    campaign = new_id()
    tx.db.execute(
        "INSERT INTO osquery_campaigns(id, tenant, sql, discovery, accelerate_s, created_at, expires_at, ended_at, "
        "targets) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            campaign,
            order.selector.tenant,
            order.sql,
            order.discovery,
            order.accelerate_s,
            tx.now,
            tx.now + order.timeout_s,
            None if chosen else tx.now,
            len(chosen),
        ),
    )
    tx.db.executemany(
        "INSERT INTO osquery_targets(campaign, node, hostname, state) VALUES (?, ?, ?, 'pending')",
        [(campaign, node.id, node.hostname) for node in chosen],
    )
    tx.emit("campaign_started", tenant=order.selector.tenant, campaign=campaign, targets=len(chosen))
    _tell_if_ended(tx, campaign)
    return get(tx.db, campaign), [node.id for node in chosen]


def _check(order: Order) -> None:
    if not order.sql.strip():
        raise BadUsage("sql: expected a query, got nothing")
    if len(order.sql.encode("utf-8", "surrogatepass")) > SQL_MAX_BYTES:
        raise BadUsage(f"sql: expected at most {SQL_MAX_BYTES} bytes")
    if not 0 < order.timeout_s <= TIMEOUT_MAX_S:
        raise BadUsage(f"timeout_s: expected more than 0 and at most {TIMEOUT_MAX_S}, got {order.timeout_s}")
    if order.accelerate_s is not None and not 0 < order.accelerate_s <= TIMEOUT_MAX_S:
        raise BadUsage(f"accelerate: expected 1 to {TIMEOUT_MAX_S} seconds, got {order.accelerate_s}")


def has_work(db: sqlite3.Connection, node_id: str) -> bool:
    """Whether a distributed read of this node has something to return; one lookup by key."""
    return (
        db.execute(
            "SELECT 1 FROM osquery_targets WHERE node = ? AND state IN ('pending', 'sent') LIMIT 1",
            (node_id,),
        ).fetchone()
        is not None
    )


def offer(tx: Tx, node: Node) -> dict[str, Any]:
    """The members of a distributed read's answer: ``queries``, and ``discovery`` and ``accelerate`` if wanted."""
    rows = tx.db.execute(
        "SELECT t.campaign, c.sql, c.discovery, c.accelerate_s, t.offers FROM osquery_targets t "
        "JOIN osquery_campaigns c ON c.id = t.campaign "
        "WHERE t.node = ? AND t.state IN ('pending', 'sent') AND c.expires_at > ? ORDER BY c.created_at LIMIT ?",
        (node.id, tx.now, OFFER_QUERIES),
    ).fetchall()
    dropped = [row for row in rows if row[2] and row[4] >= DISCOVERY_OFFERS]
    for row in dropped:
        note = Answer(row[0], True, 0, [], "not run: its discovery query returned no rows", {})
        _end(tx, row[0], node.id, "answered", note)
    offered = _within(OFFER_BYTES, [row for row in rows if row not in dropped])
    tx.db.executemany(
        "UPDATE osquery_targets SET state = 'sent', offers = offers + 1, sent_at = ? WHERE campaign = ? AND node = ?",
        [(tx.now, row[0], node.id) for row in offered],
    )
    answer: dict[str, Any] = {"queries": {row[0]: row[1] for row in offered}}
    if discovery := {row[0]: row[2] for row in offered if row[2]}:
        answer["discovery"] = discovery
    if accelerate := max((row[3] or 0 for row in offered), default=0):
        answer["accelerate"] = accelerate
    return answer


def _within(limit_bytes: int, rows: list[Any]) -> list[Any]:
    """The first rows, until the SQL in them is ``limit_bytes``; at least one."""
    size_bytes = 0
    for count, row in enumerate(rows):
        size_bytes += len(row[1]) + len(row[2] or "")
        if size_bytes > limit_bytes and count:
            return rows[:count]
    return rows


def write(tx: Tx, node: Node, answers: Sequence[Answer]) -> int:
    """Account for a node's answers; returns how many ended a target.

    An answer to something this node was not asked, or that has ended already (a re-send, a late answer), changes
    nothing: refusing it would make osqueryd send it for ever.
    """
    ended = 0
    for answer in answers:
        state = "answered" if answer.ok else "failed"
        ended += _end(tx, answer.name, node.id, state, answer)
    if ended < len(answers):
        tx.emit("answers_ignored", tenant=node.tenant, node=node.id, answers=len(answers) - ended)
    return ended


def _end(tx: Tx, campaign: str, node_id: str, state: str, answer: Answer | None, message: str = "") -> bool:
    cursor = tx.db.execute(
        "UPDATE osquery_targets SET state = ?, ended_at = ?, status = ?, rows = ?, message = ?, stats = ?, "
        "end_seq = (SELECT ended + 1 FROM osquery_campaigns WHERE id = campaign) "
        "WHERE campaign = ? AND node = ? AND state IN ('pending', 'sent')",
        (
            state,
            tx.now,
            answer.status if answer else None,
            msgspec.json.encode(answer.rows).decode() if answer else None,
            answer.message if answer else message,
            msgspec.json.encode(answer.stats).decode() if answer else None,
            campaign,
            node_id,
        ),
    )
    if cursor.rowcount == 0:
        return False
    answered_at = tx.now if answer else None
    tx.db.execute(
        "UPDATE osquery_campaigns SET ended = ended + 1, first_at = coalesce(first_at, ?1), "
        "last_at = coalesce(?1, last_at), ended_at = CASE WHEN ended + 1 = targets THEN ?2 END WHERE id = ?3",
        (answered_at, tx.now, campaign),
    )
    owner = tx.db.execute("SELECT tenant FROM osquery_nodes WHERE id = ?", (node_id,)).fetchone()
    tenant = owner[0] if owner else None
    tx.emit("target_ended", tenant=tenant, node=node_id, campaign=campaign, state=state)
    _tell_if_ended(tx, campaign)
    return True


def _tell_if_ended(tx: Tx, campaign: str) -> None:
    row = tx.db.execute("SELECT tenant, ended_at FROM osquery_campaigns WHERE id = ?", (campaign,)).fetchone()
    if row[1] is not None:
        tx.emit("campaign_ended", tenant=row[0], campaign=campaign)


def _end_open(tx: Tx, campaign: str, state: str, message: str) -> int:
    open_nodes = tx.db.execute(
        "SELECT node FROM osquery_targets WHERE campaign = ? AND state IN ('pending', 'sent')", (campaign,)
    ).fetchall()
    for (node_id,) in open_nodes:
        _end(tx, campaign, node_id, state, None, message)
    return len(open_nodes)


def cancel(tx: Tx, campaign: str) -> Campaign:
    """End every open target as cancelled. Raises BadUsage when there is no such campaign."""
    get(tx.db, campaign)
    _end_open(tx, campaign, "cancelled", "cancelled by the operator")
    return get(tx.db, campaign)


def cancel_for_node(tx: Tx, node_id: str) -> None:
    """A deleted or rejected node answers no more: end its open targets."""
    rows = tx.db.execute(
        "SELECT campaign FROM osquery_targets WHERE node = ? AND state IN ('pending', 'sent')", (node_id,)
    ).fetchall()
    for (campaign,) in rows:
        _end(tx, campaign, node_id, "cancelled", None, "the node was removed")


def expire(tx: Tx) -> int:
    """End the open targets of campaigns whose time is over; returns how many."""
    rows = tx.db.execute(
        "SELECT id FROM osquery_campaigns WHERE ended_at IS NULL AND expires_at <= ?", (tx.now,)
    ).fetchall()
    return sum(_end_open(tx, campaign, "expired", "not answered in time") for (campaign,) in rows)


def next_expiry(db: sqlite3.Connection) -> float | None:
    """When the next open campaign expires; None when none is open."""
    row = db.execute("SELECT min(expires_at) FROM osquery_campaigns WHERE ended_at IS NULL").fetchone()
    return None if row[0] is None else float(row[0])


def get(db: sqlite3.Connection, campaign: str) -> Campaign:
    """The campaign of that id; ``latest`` is the newest. Raises BadUsage."""
    where = "1 ORDER BY created_at DESC, rowid DESC LIMIT 1" if campaign == "latest" else "id = ?"
    row = db.execute(
        "SELECT id, tenant, sql, created_at, expires_at, ended_at, first_at, last_at "
        f"FROM osquery_campaigns WHERE {where}",
        () if campaign == "latest" else (campaign,),
    ).fetchone()
    if row is None:
        raise BadUsage(f"no campaign {campaign!r}", hint="osqbox query --list")
    counts = db.execute("SELECT state, count(*) FROM osquery_targets WHERE campaign = ? GROUP BY state", (row[0],))
    return Campaign(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], dict(counts.fetchall()))


def count_open(db: sqlite3.Connection) -> int:
    """How many campaigns still wait for an answer."""
    return int(db.execute("SELECT count(*) FROM osquery_campaigns WHERE ended_at IS NULL").fetchone()[0])


def latest(db: sqlite3.Connection, limit: int, tenant: str | None = None) -> list[Campaign]:
    """The newest campaigns first."""
    rows = db.execute(
        "SELECT id FROM osquery_campaigns WHERE ?1 IS NULL OR tenant = ?1 "
        "ORDER BY created_at DESC, rowid DESC LIMIT ?2",
        (tenant, limit),
    )
    return [get(db, row[0]) for row in rows.fetchall()]


@dataclass(frozen=True, slots=True)
class Ended:
    """One target's account."""

    order: int
    node: str
    encoded: bytes
    """JSON object ``{node, hostname, status, rows, message, ...}``."""


def ended_after(db: sqlite3.Connection, campaign: str, after: int, limit: int = 500) -> list[Ended]:
    """Targets that ended after the ``after``-th, in the order in which they ended.

    At most ``limit``, and no more once they are ANSWERS_BYTES: call again until there are none.
    """
    rows = db.execute(
        "SELECT end_seq, node, hostname, state, status, rows, message, stats, ended_at FROM osquery_targets "
        "WHERE campaign = ? AND end_seq > ? ORDER BY end_seq LIMIT ?",
        (campaign, after, limit),
    )
    found: list[Ended] = []
    size_bytes = 0
    for row in rows:
        found.append(Ended(row[0], row[1], _encode(row)))
        size_bytes += len(found[-1].encoded)
        if size_bytes >= ANSWERS_BYTES:
            break
    return found


def _encode(row: Sequence[Any]) -> bytes:
    return msgspec.json.encode(
        {
            "node": row[1],
            "hostname": row[2],
            "status": row[3],
            "rows": msgspec.Raw((row[5] or "[]").encode()),
            "message": row[6],
            "osquery_status": row[4],
            "stats": msgspec.Raw((row[7] or "{}").encode()),
            "ended_at": rfc3339(row[8]),
        }
    )


def open_targets(db: sqlite3.Connection, campaign: str) -> list[dict[str, Any]]:
    """Who has not answered yet: ``{node, hostname, status}`` with status pending or sent."""
    rows = db.execute(
        "SELECT node, hostname, state, offers FROM osquery_targets WHERE campaign = ? AND end_seq IS NULL",
        (campaign,),
    )
    return [{"node": row[0], "hostname": row[1], "status": row[2], "offers": row[3]} for row in rows]


def prune(tx: Tx, keep: int) -> None:
    """Drop ended campaigns beyond the newest ``keep``, with their answers."""
    cursor = tx.db.execute(
        "DELETE FROM osquery_campaigns WHERE ended_at IS NOT NULL AND rowid <= "
        "(SELECT rowid FROM osquery_campaigns ORDER BY rowid DESC LIMIT 1 OFFSET ?)",
        (keep,),
    )
    count_dropped(tx, "campaigns", cursor.rowcount)
