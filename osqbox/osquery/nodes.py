"""Nodes: who is enrolled, under which key, in which tenant."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from osqbox import tenants
from osqbox.clock import rfc3339
from osqbox.errors import BadUsage, Refused
from osqbox.exchange import Peer
from osqbox.store import Tx

RESEND_WINDOW_S = 60.0
FIELD_MAX_CHARS = 1024
DETAIL_MAX_CHARS = 4096
REVOKED_BYTES = 16
"""Length of the digest of a revoked key: no SHA-256 is that short, so no key fits, not even a blank one."""
PLATFORM_BITS = ((2, "windows"), (16, "darwin"), (32, "freebsd"), (8, "linux"))


@dataclass(frozen=True, slots=True)
class Enrollment:
    """An enrollment request, parsed."""

    secrets: tuple[str, ...]
    host_identifier: str
    platform_type: str
    details: dict[str, dict[str, str]]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    tenant: str
    status: str
    host_identifier: str
    hostname: str
    platform: str
    platform_like: str
    tags: tuple[str, ...]
    certificate_name: str | None


@dataclass(frozen=True, slots=True)
class Enrolled:
    node: Node
    node_key: str


_NODE = "id, tenant, status, host_identifier, hostname, platform, platform_like, tags, certificate_name"


def _node(row: Sequence[Any]) -> Node:
    return Node(row[0], row[1], row[2], row[3], row[4], row[5], row[6], tuple(msgspec.json.decode(row[7])), row[8])


def parse_enrollment(body: dict[str, Any], secrets: Iterable[str], digest: bytes) -> Enrollment:
    """An enrollment from its decoded body. Members of wrong types are refused; unknown ones are kept out."""
    details = body.get("host_details")
    if details is not None and not isinstance(details, dict):
        raise Refused("wrong_type", f"host_details: expected an object, got {type(details).__name__}")
    tables = {
        str(table): {str(column): _text(value)[:DETAIL_MAX_CHARS] for column, value in row.items()}
        for table, row in (details or {}).items()
        if isinstance(row, dict)
    }
    return Enrollment(tuple(secrets), _member(body, "host_identifier"), _member(body, "platform_type"), tables, digest)


def _member(body: dict[str, Any], name: str) -> str:
    value = body.get(name, "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Refused("wrong_type", f"{name}: expected a string, got {type(value).__name__}")
    return str(value)[:FIELD_MAX_CHARS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def enroll(tx: Tx, request: Enrollment, peer: Peer, new_key: Callable[[], str], new_id: Callable[[], str]) -> Enrolled:
    """Let a host in, or raise Refused with ``node_invalid``.

    The secret chooses the tenant; without one, a tenant that is open or takes client certificates does. A host
    that is known already keeps its row, its tags and its history, and gets a new key.
    """
    secret = tenants.find_secret(tx.db, request.secrets)
    tenant = _tenant_for(tx.db, secret, request, peer)
    bound = peer.certificate_name if secret is None and tenant.options.client_cert else None
    known = _known_host(tx.db, tenant.name, request, bound)
    resend = known is not None and _is_resend(tx, known, request)
    if secret is not None and not resend:
        _check_secret(tx, secret)
    if known is not None and tenant.options.reenroll == "refuse" and not resend:
        raise _no("already_enrolled", "this host is enrolled already, and its tenant refuses a second enrollment")
    if known is not None and known.status == "rejected":
        raise _no("rejected", "this node was rejected")
    node_key = "" if bound and tenant.options.blank_keys else new_key()
    node = _save(tx, tenant, secret, known, request, peer, bound, node_key, new_id)
    tx.emit(
        "node_enrolled",
        tenant=node.tenant,
        node=node.id,
        hostname=node.hostname,
        host_identifier=node.host_identifier,
        status=node.status,
        again=known is not None,
    )
    return Enrolled(node, node_key)


def _no(reason: str, message: str) -> Refused:
    return Refused(reason, message, status=401, node_invalid=True)


def _tenant_for(
    db: sqlite3.Connection, secret: tenants.Secret | None, request: Enrollment, peer: Peer
) -> tenants.Tenant:
    if secret is not None:
        tenant = tenants.get(db, secret.tenant)
        if tenant.closed_at is not None:
            raise _no("tenant_closed", "the tenant of this enroll secret is closed")
        return tenant
    wanted = (peer.certificate_tenant if peer.certificate_name else None) or tenants.DEFAULT
    found = tenants.find(db, wanted)
    if found is not None and found.closed_at is None:
        if peer.certificate_name and found.options.client_cert:
            return found
        if found.options.open and not any(request.secrets):
            return found
    if any(request.secrets):
        raise _no("wrong_secret", "enroll secret: not one this server knows")
    raise _no("secret_missing", "enroll secret: expected one, got none")


def _check_secret(tx: Tx, secret: tenants.Secret) -> None:
    if why := tenants.why_unusable(secret, tx.now):
        raise _no("secret_unusable", why)
    tenants.use_secret(tx, secret)


def _known_host(db: sqlite3.Connection, tenant: str, request: Enrollment, certificate: str | None) -> Node | None:
    """The row of this host, if it has enrolled before.

    One osquery database (instance_id) is one host whatever it is called now. Otherwise the host identifier
    decides, unless both sides name their hardware and it differs: two machines may share a host name. A host that
    enrolls by its certificate is known by that and its identifier.
    """
    if certificate is not None:
        row = db.execute(
            f"SELECT {_NODE} FROM osquery_nodes WHERE tenant = ? AND certificate_name = ? AND host_identifier = ?",
            (tenant, certificate, request.host_identifier),
        ).fetchone()
        return _node(row) if row else None
    instance = request.details.get("osquery_info", {}).get("instance_id", "")
    hardware = request.details.get("system_info", {}).get("uuid", "")
    if instance:
        row = db.execute(
            f"SELECT {_NODE} FROM osquery_nodes WHERE tenant = ? AND instance_id = ? AND certificate_name IS NULL",
            (tenant, instance),
        ).fetchone()
        if row:
            return _node(row)
    if not request.host_identifier:
        return None
    row = db.execute(
        f"SELECT {_NODE} FROM osquery_nodes WHERE tenant = ?1 AND host_identifier = ?2 "
        "AND certificate_name IS NULL AND (hardware_uuid = ?3 OR hardware_uuid = '' OR ?3 = '') "
        "ORDER BY hardware_uuid = ?3 DESC, enrolled_at DESC",
        (tenant, request.host_identifier, hardware),
    ).fetchone()
    return _node(row) if row else None


def _is_resend(tx: Tx, known: Node, request: Enrollment) -> bool:
    """osqueryd sends an enrollment again, byte for byte, when the answer to the first got lost."""
    row = tx.db.execute("SELECT enroll_digest, enrolled_at FROM osquery_nodes WHERE id = ?", (known.id,)).fetchone()
    return bool(row[0] == request.digest and tx.now - row[1] <= RESEND_WINDOW_S)


def _save(
    tx: Tx,
    tenant: tenants.Tenant,
    secret: tenants.Secret | None,
    known: Node | None,
    request: Enrollment,
    peer: Peer,
    bound: str | None,
    node_key: str,
    new_id: Callable[[], str],
) -> Node:
    system = request.details.get("system_info", {})
    release = request.details.get("os_version", {})
    osquery = request.details.get("osquery_info", {})
    status = known.status if known else ("pending" if tenant.options.approve else "active")
    tags = dict.fromkeys((*(known.tags if known else ()), *(secret.tags if secret else ())))
    columns: dict[str, Any] = {
        "key_digest": tenants.digest(node_key) if node_key else None,
        "status": status,
        "host_identifier": request.host_identifier,
        "hostname": system.get("hostname") or system.get("computer_name") or request.host_identifier or "unknown",
        "hardware_uuid": system.get("uuid", ""),
        "instance_id": osquery.get("instance_id", ""),
        "platform": release.get("platform") or _platform(request.platform_type),
        "platform_like": release.get("platform_like", ""),
        "os": " ".join(filter(None, (release.get("name"), release.get("version")))),
        "osquery_version": osquery.get("version", ""),
        "host_details": msgspec.json.encode(request.details).decode(),
        "tags": msgspec.json.encode(list(tags)).decode(),
        "address": peer.address,
        "certificate_name": bound,
        "secret_id": secret.id if secret else None,
        "enroll_digest": request.digest,
        "enrolled_at": tx.now,
        "last_seen_at": tx.now,
    }
    if known:
        sets = ", ".join(f"{name} = ?" for name in columns)
        tx.db.execute(
            f"UPDATE osquery_nodes SET {sets}, enrollments = enrollments + 1 WHERE id = ?",
            (*columns.values(), known.id),
        )
        return find(tx.db, known.id)
    columns |= {"id": new_id(), "tenant": tenant.name, "enrollments": 1}
    marks = ", ".join("?" * len(columns))
    tx.db.execute(
        f"INSERT INTO osquery_nodes({', '.join(columns)}) VALUES ({marks})",
        tuple(columns.values()),
    )
    return find(tx.db, columns["id"])


def _platform(platform_type: str) -> str:
    """A platform from osquery's bit mask, for agents that send no os_version."""
    bits = int(platform_type) if platform_type.isascii() and platform_type.isdigit() else 0
    return next((name for bit, name in PLATFORM_BITS if bits & bit), "")


_AUTH = (
    "SELECT n.id, n.tenant, n.status, n.host_identifier, n.hostname, n.platform, n.platform_like, n.tags, "
    "n.certificate_name, t.closed_at FROM osquery_nodes n JOIN tenants t ON t.name = n.tenant "
)


def authenticate(db: sqlite3.Connection, node_key: str, peer: Peer, uri_secrets: Sequence[str] = ()) -> Node:
    """The active node behind a key, or Refused. Called for every request, so it is one lookup by key."""
    node, closed_at = _find_by_key(db, node_key, peer)
    if closed_at is not None:
        raise Refused("tenant_closed", "the tenant of this node is closed", status=401, node_invalid=True)
    if node.certificate_name is not None and peer.certificate_name != node.certificate_name:
        raise Refused("certificate_required", "this node must present its client certificate", status=403)
    if uri_secrets and (secret := tenants.find_secret(db, uri_secrets)) and secret.tenant != node.tenant:
        raise Refused(
            "foreign_secret", "the enroll secret belongs to another tenant than the node key", status=401,
            node_invalid=True,
        )  # fmt: skip
    if node.status == "pending":
        raise Refused("approval_pending", "this node awaits approval", status=403)
    if node.status != "active":
        raise Refused("rejected", "this node was rejected", status=401, node_invalid=True)
    return node


def _find_by_key(db: sqlite3.Connection, node_key: str, peer: Peer) -> tuple[Node, float | None]:
    """The node and when its tenant was closed. A blank key will do where a certificate belongs to just one node."""
    if node_key:
        row = db.execute(f"{_AUTH} WHERE n.key_digest = ?", (tenants.digest(node_key),)).fetchone()
        if row is None:
            raise Refused("node_key_unknown", "node_key: not one this server gave", status=401, node_invalid=True)
    else:
        rows: list[Any] = []
        if peer.certificate_name:
            rows = db.execute(
                f"{_AUTH} WHERE n.certificate_name = ? AND (n.key_digest IS NULL OR length(n.key_digest) <> ?) LIMIT 2",
                (peer.certificate_name, REVOKED_BYTES),
            ).fetchall()
        if len(rows) != 1:
            raise Refused("node_key_missing", "node_key: expected one, got none", status=401, node_invalid=True)
        row = rows[0]
    return _node(row), row[9]


def find(db: sqlite3.Connection, node_id: str) -> Node:
    """The node of that id. Raises BadUsage."""
    row = db.execute(f"SELECT {_NODE} FROM osquery_nodes WHERE id = ?", (node_id,)).fetchone()
    if row is None:
        raise BadUsage(f"no node {node_id!r}", hint="osqbox nodes")
    return _node(row)


def resolve(db: sqlite3.Connection, word: str, tenant: str | None = None) -> Node:
    """A node by its id, hostname or host identifier, or an unambiguous beginning of its id. Raises BadUsage."""
    scope, args = ("AND tenant = ?", (tenant,)) if tenant else ("", ())
    rows = (
        db.execute(
            f"SELECT {_NODE} FROM osquery_nodes "
            f"WHERE (id = ?1 OR hostname = ?1 OR host_identifier = ?1) {scope} LIMIT 3",
            (word, *args),
        ).fetchall()
        or db.execute(
            f"SELECT {_NODE} FROM osquery_nodes WHERE substr(id, 1, length(?1)) = ?1 {scope} LIMIT 3",
            (word, *args),
        ).fetchall()
    )
    if not rows:
        raise BadUsage(f"no node called {word!r}: expected an id, hostname or host identifier", hint="osqbox nodes")
    if len(rows) > 1:
        raise BadUsage(f"{word!r} fits {len(rows)} nodes or more; use an id", hint="osqbox nodes")
    return _node(rows[0])


@dataclass(frozen=True, slots=True)
class Selector:
    """Which nodes; empty kinds do not restrict, given kinds must all match."""

    nodes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    tenant: str | None = None
    statuses: tuple[str, ...] = ()

    def is_empty(self) -> bool:
        return not (self.nodes or self.tags or self.platforms)


def select(db: sqlite3.Connection, selector: Selector) -> list[Node]:
    """Nodes that fit, oldest first. A name that fits nothing raises BadUsage."""
    ids = {resolve(db, word, selector.tenant).id for word in selector.nodes}
    where, args = ["1"], []
    if selector.tenant:
        tenants.get(db, selector.tenant)
        where.append("tenant = ?")
        args.append(selector.tenant)
    rows = db.execute(
        f"SELECT {_NODE} FROM osquery_nodes WHERE {' AND '.join(where)} ORDER BY rowid",
        args,
    )
    return [node for node in map(_node, rows) if _fits(node, selector, ids)]


def _fits(node: Node, selector: Selector, ids: set[str]) -> bool:
    return (
        (not selector.nodes or node.id in ids)
        and (not selector.tags or bool(set(selector.tags) & set(node.tags)))
        and (not selector.platforms or node.platform in selector.platforms or _like(node, selector.platforms))
        and (not selector.statuses or node.status in selector.statuses)
    )


def _like(node: Node, platforms: tuple[str, ...]) -> bool:
    if "linux" in platforms and node.platform not in ("", "darwin", "windows", "freebsd"):
        return True
    return bool(set(node.platform_like.split()) & set(platforms))


def facts_json(
    db: sqlite3.Connection, selector: Selector, *, seen: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Everything about the chosen nodes for people and programs; ``seen`` are newer sightings than the database's."""
    wanted = {node.id: node for node in select(db, selector)}
    rows = db.execute(
        "SELECT id, os, osquery_version, hardware_uuid, instance_id, address, enrollments, enrolled_at, last_seen_at, "
        "host_details FROM osquery_nodes ORDER BY rowid"
    )
    return [_as_json(wanted[row[0]], row, (seen or {}).get(row[0], 0.0)) for row in rows if row[0] in wanted]


def _as_json(node: Node, row: Sequence[Any], seen_at: float) -> dict[str, Any]:
    return {
        "id": node.id,
        "tenant": node.tenant,
        "hostname": node.hostname,
        "host_identifier": node.host_identifier,
        "platform": node.platform,
        "status": node.status,
        "tags": list(node.tags),
        "os": row[1],
        "osquery_version": row[2],
        "hardware_uuid": row[3],
        "instance_id": row[4],
        "address": row[5],
        "certificate_name": node.certificate_name,
        "enrollments": row[6],
        "enrolled_at": rfc3339(row[7]),
        "last_seen_at": rfc3339(max(row[8], seen_at)),
        "host_details": msgspec.json.decode(row[9]),
    }


def set_tags(tx: Tx, node_id: str, tags: Sequence[str]) -> Node:
    """Replace a node's tags; its config may change with them."""
    node = find(tx.db, node_id)
    tx.db.execute(
        "UPDATE osquery_nodes SET tags = ? WHERE id = ?",
        (msgspec.json.encode(list(dict.fromkeys(tags))).decode(), node_id),
    )
    tx.emit("node_tagged", tenant=node.tenant, node=node_id, tags=list(tags))
    return find(tx.db, node_id)


def decide(tx: Tx, node_id: str, status: str) -> Node:
    """Approve (``active``) or reject (``rejected``) a node."""
    node = find(tx.db, node_id)
    tx.db.execute("UPDATE osquery_nodes SET status = ? WHERE id = ?", (status, node_id))
    tx.emit("node_approved" if status == "active" else "node_rejected", tenant=node.tenant, node=node_id)
    return find(tx.db, node_id)


def revoke_key(tx: Tx, node_id: str) -> None:
    """The next request gets ``node_invalid`` and the agent enrolls again; its row and history stay."""
    node = find(tx.db, node_id)
    tx.db.execute("UPDATE osquery_nodes SET key_digest = randomblob(?) WHERE id = ?", (REVOKED_BYTES, node_id))
    tx.emit("node_key_revoked", tenant=node.tenant, node=node_id)


def delete(tx: Tx, node_id: str) -> None:
    """Forget a node. Its key becomes unknown, so a living agent enrolls again as a new node."""
    node = find(tx.db, node_id)
    tx.db.execute("DELETE FROM osquery_nodes WHERE id = ?", (node_id,))
    tx.emit("node_deleted", tenant=node.tenant, node=node_id, hostname=node.hostname)


def save_seen(tx: Tx, seen: dict[str, tuple[float, float | None]]) -> None:
    """Write when nodes were last heard of, and the seconds between their latest distributed reads."""
    tx.db.executemany(
        "UPDATE osquery_nodes SET last_seen_at = max(last_seen_at, ?), "
        "read_interval_s = coalesce(?, read_interval_s) WHERE id = ?",
        [(at, interval_s, node) for node, (at, interval_s) in seen.items()],
    )


def sightings(db: sqlite3.Connection) -> list[tuple[str, float, float | None]]:
    """``(node, last_seen_at, read_interval_s)`` of every node."""
    return db.execute("SELECT id, last_seen_at, read_interval_s FROM osquery_nodes").fetchall()


def is_repeated(tx: Tx, node: str, kind: str, digest: bytes, connection: str) -> bool:
    """True when this body is the re-send of the node's previous one of that kind; remembers it otherwise.

    osqueryd re-sends a request at once on a new connection when the old one breaks before the answer
    (osquery/remote/http_client.cpp), so only another connection within a minute makes a repetition.
    """
    row = tx.db.execute(
        "SELECT digest, connection, at FROM osquery_last_bodies WHERE node = ? AND kind = ?", (node, kind)
    ).fetchone()
    if row and row[0] == digest and row[1] != connection and tx.now - row[2] <= RESEND_WINDOW_S:
        return True
    tx.db.execute(
        "INSERT INTO osquery_last_bodies VALUES (?, ?, ?, ?, ?) ON CONFLICT(node, kind) DO UPDATE SET "
        "digest = excluded.digest, connection = excluded.connection, at = excluded.at",
        (node, kind, digest, connection, tx.now),
    )
    return False
