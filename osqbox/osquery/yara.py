"""YARA rules that agents fetch by ``sigurl``."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.errors import BadUsage, Refused
from osqbox.osquery.nodes import Node
from osqbox.store import Tx

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RULE_MAX_BYTES = 4 * 1024 * 1024


def put(tx: Tx, tenant: str, name: str, content: str, *, public: bool) -> None:
    """Keep a rule. ``public`` answers a plain GET, which is what osquery sends without
    ``--yara_sigurl_authenticate``; otherwise only nodes of the tenant get it. Raises BadUsage."""
    tenants.get(tx.db, tenant)
    if not NAME.fullmatch(name):
        raise BadUsage(f"rule name: expected letters, digits, . _ -, got {name!r}")
    if len(content.encode()) > RULE_MAX_BYTES:
        raise BadUsage(f"rule: expected at most {RULE_MAX_BYTES} bytes")
    if public and _public_owner(tx.db, name) not in (None, tenant):
        raise BadUsage(f"a public rule {name!r} exists in another tenant; a plain GET could not tell them apart")
    tx.db.execute(
        "INSERT INTO osquery_yara_rules VALUES (?, ?, ?, ?, ?) ON CONFLICT(tenant, name) DO UPDATE SET "
        "content = excluded.content, public = excluded.public, updated_at = excluded.updated_at",
        (name, tenant, content, int(public), tx.now),
    )
    tx.emit("yara_rule_changed", tenant=tenant, rule=name, public=public)


def _public_owner(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT tenant FROM osquery_yara_rules WHERE name = ? AND public = 1", (name,)).fetchone()
    return row[0] if row else None


def delete(tx: Tx, tenant: str, name: str) -> None:
    cursor = tx.db.execute("DELETE FROM osquery_yara_rules WHERE tenant = ? AND name = ?", (tenant, name))
    if cursor.rowcount == 0:
        raise BadUsage(f"tenant {tenant!r} has no YARA rule {name!r}")
    tx.emit("yara_rule_deleted", tenant=tenant, rule=name)


def listing(db: sqlite3.Connection, tenant: str | None = None) -> list[dict[str, Any]]:
    rows = db.execute(
        "SELECT name, tenant, public, length(content), updated_at FROM osquery_yara_rules "
        "WHERE ?1 IS NULL OR tenant = ?1 ORDER BY tenant, name",
        (tenant,),
    )
    return [
        {
            "name": row[0],
            "tenant": row[1],
            "public": bool(row[2]),
            "bytes": row[3],
            "updated_at": rfc3339(row[4]),
        }
        for row in rows
    ]


def rule_for(db: sqlite3.Connection, name: str, node: Node | None) -> str:
    """A rule's text for a node, or for a stranger when it is public. Raises Refused."""
    row = db.execute(
        "SELECT r.content FROM osquery_yara_rules r JOIN tenants t ON t.name = r.tenant AND t.closed_at IS NULL "
        "WHERE r.name = ?1 AND (r.tenant = ?2 OR r.public = 1) ORDER BY r.tenant = ?2 DESC",
        (name, node.tenant if node else None),
    ).fetchone()
    if row is None:
        raise Refused("rule_unknown", "no such YARA rule for this node", status=404)
    return str(row[0])
