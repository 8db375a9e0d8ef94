"""Tenants and their enroll secrets. Everything belongs to one tenant, and a secret is what chooses it.

Secrets are kept as SHA-256 only: a lookup by digest compares nothing that timing could reveal, and a stolen
database enrolls nobody.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox.clock import rfc3339
from osqbox.errors import BadUsage
from osqbox.store import Tx

DEFAULT = "default"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REENROLL_POLICIES = ("replace", "refuse")


class TenantOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a tenant lets nodes in."""

    open: bool = False
    """Enroll without a secret (osquery documents the secret as optional)."""
    approve: bool = False
    """A new node waits for `nodes approve`; until then every answer to it is an error it will retry."""
    client_cert: bool = False
    """Enroll by TLS client certificate alone; the certificate is then required on every request."""
    blank_keys: bool = False
    """With client_cert: hand out an empty node_key. Today's osqueryd takes that as a failed enrollment."""
    reenroll: str = "replace"
    """What an enrollment of a known host does: `replace` its key, or `refuse` until the node is deleted."""


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    options: TenantOptions
    created_at: float
    closed_at: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **msgspec.to_builtins(self.options),
            "created_at": rfc3339(self.created_at),
            "closed_at": rfc3339(self.closed_at),
        }


@dataclass(frozen=True, slots=True)
class Secret:
    id: int
    tenant: str
    label: str
    tags: tuple[str, ...]
    expires_at: float | None
    uses_left: int | None
    used: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "tenant": self.tenant,
            "label": self.label,
            "tags": list(self.tags),
            "expires_at": rfc3339(self.expires_at),
            "uses_left": self.uses_left,
            "used": self.used,
        }


migrations = Migrations("tenants")


@migrations()
def m001_tenants(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE tenants (
            name TEXT PRIMARY KEY,
            options TEXT NOT NULL,       -- JSON, see TenantOptions
            created_at REAL NOT NULL,    -- seconds since the epoch
            closed_at REAL               -- a closed tenant refuses everything; its name stays in the history
        )"""
    )
    db.conn.execute(
        """CREATE TABLE tenants_secrets (
            id INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL REFERENCES tenants(name) ON DELETE CASCADE,
            digest BLOB NOT NULL UNIQUE, -- SHA-256 of the secret; the secret itself is not kept
            label TEXT NOT NULL,
            tags TEXT NOT NULL,          -- JSON array; given to the nodes that enroll with it
            expires_at REAL,             -- seconds since the epoch; NULL = never
            uses_left INTEGER,           -- NULL = any number
            used INTEGER NOT NULL DEFAULT 0
        )"""
    )


def digest(secret: str) -> bytes:
    """What is kept of a secret or key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def create(tx: Tx, name: str, options: TenantOptions) -> Tenant:
    """A new tenant. Raises BadUsage for a bad or taken name."""
    if not NAME.fullmatch(name):
        raise BadUsage(f"tenant name: expected 1-63 of a-z 0-9 . _ -, starting with a letter or digit, got {name!r}")
    _check_options(options)
    if find(tx.db, name) is not None:
        raise BadUsage(f"tenant {name!r} exists already", hint="osqbox tenants list")
    tx.db.execute("INSERT INTO tenants(name, options, created_at) VALUES (?, ?, ?)", (name, _encode(options), tx.now))
    tx.emit("tenant_created", tenant=name)
    return Tenant(name, options, tx.now, None)


def _check_options(options: TenantOptions) -> None:
    if options.reenroll not in REENROLL_POLICIES:
        raise BadUsage(f"reenroll: expected one of {', '.join(REENROLL_POLICIES)}, got {options.reenroll!r}")


def _encode(options: TenantOptions) -> str:
    return msgspec.json.encode(options).decode()


def change(tx: Tx, name: str, options: TenantOptions) -> Tenant:
    """Replace a tenant's options."""
    _check_options(options)
    before = get(tx.db, name)
    tx.db.execute("UPDATE tenants SET options = ? WHERE name = ?", (_encode(options), name))
    tx.emit("tenant_changed", tenant=name)
    return Tenant(name, options, before.created_at, before.closed_at)


def close(tx: Tx, name: str) -> None:
    """From now on every request of this tenant's nodes is refused, and its secrets enroll nobody."""
    if name == DEFAULT:
        raise BadUsage("the default tenant always exists and cannot be closed")
    get(tx.db, name)
    tx.db.execute("UPDATE tenants SET closed_at = ? WHERE name = ? AND closed_at IS NULL", (tx.now, name))
    tx.emit("tenant_closed", tenant=name)


def find(db: sqlite3.Connection, name: str) -> Tenant | None:
    row = db.execute("SELECT name, options, created_at, closed_at FROM tenants WHERE name = ?", (name,)).fetchone()
    return _tenant(row) if row else None


def is_closed(db: sqlite3.Connection, name: str) -> bool:
    """Also false for a tenant that there is not."""
    return db.execute("SELECT 1 FROM tenants WHERE name = ? AND closed_at IS NOT NULL", (name,)).fetchone() is not None


def _tenant(row: Sequence[Any]) -> Tenant:
    return Tenant(row[0], msgspec.json.decode(row[1], type=TenantOptions), row[2], row[3])


def get(db: sqlite3.Connection, name: str) -> Tenant:
    """The tenant of that name. Raises BadUsage when there is none."""
    if (tenant := find(db, name)) is None:
        raise BadUsage(f"no tenant {name!r}", hint="osqbox tenants list")
    return tenant


def all_tenants(db: sqlite3.Connection) -> list[Tenant]:
    rows = db.execute("SELECT name, options, created_at, closed_at FROM tenants ORDER BY created_at, name")
    return [_tenant(row) for row in rows]


def add_secret(
    tx: Tx,
    tenant: str,
    secret: str,
    *,
    label: str = "",
    tags: Sequence[str] = (),
    expires_at: float | None = None,
    uses: int | None = None,
) -> Secret:
    """Let ``secret`` enroll nodes into ``tenant``. Raises BadUsage when any tenant knows it already."""
    get(tx.db, tenant)
    if not secret.strip():
        raise BadUsage("enroll secret: expected at least one visible character, got blanks")
    if uses is not None and uses < 1:
        raise BadUsage(f"uses: expected 1 or more, got {uses}")
    if tx.db.execute("SELECT 1 FROM tenants_secrets WHERE digest = ?", (digest(secret),)).fetchone():
        raise BadUsage("this enroll secret is in use already; a secret chooses one tenant")
    cursor = tx.db.execute(
        "INSERT INTO tenants_secrets(tenant, digest, label, tags, expires_at, uses_left) VALUES (?, ?, ?, ?, ?, ?)",
        (tenant, digest(secret), label, msgspec.json.encode(list(tags)).decode(), expires_at, uses),
    )
    assert cursor.lastrowid is not None
    tx.emit("secret_added", tenant=tenant, label=label)
    return Secret(cursor.lastrowid, tenant, label, tuple(tags), expires_at, uses, 0)


def remove_secret(tx: Tx, tenant: str, secret_id: int) -> None:
    cursor = tx.db.execute("DELETE FROM tenants_secrets WHERE tenant = ? AND id = ?", (tenant, secret_id))
    if cursor.rowcount == 0:
        raise BadUsage(f"tenant {tenant!r} has no secret {secret_id}", hint=f"osqbox tenants secrets {tenant}")
    tx.emit("secret_removed", tenant=tenant, secret=secret_id)


_SECRET = "SELECT id, tenant, label, tags, expires_at, uses_left, used FROM tenants_secrets"  # noqa: S105 - SQL


def _secret(row: Sequence[Any]) -> Secret:
    return Secret(row[0], row[1], row[2], tuple(msgspec.json.decode(row[3])), row[4], row[5], row[6])


def secrets_of(db: sqlite3.Connection, tenant: str) -> list[Secret]:
    return [_secret(row) for row in db.execute(f"{_SECRET} WHERE tenant = ? ORDER BY id", (tenant,))]


def find_secret(db: sqlite3.Connection, candidates: Sequence[str]) -> Secret | None:
    """The first candidate that is a known secret, whatever its state."""
    found = (find_secret_by_digest(db, digest(candidate)) for candidate in candidates)
    return next((secret for secret in found if secret is not None), None)


def find_secret_by_digest(db: sqlite3.Connection, secret_digest: bytes) -> Secret | None:
    row = db.execute(f"{_SECRET} WHERE digest = ?", (secret_digest,)).fetchone()
    return _secret(row) if row else None


def why_unusable(secret: Secret, now: float) -> str | None:
    """The sentence that says why a known secret enrolls nobody now; None when it does."""
    if secret.expires_at is not None and now >= secret.expires_at:
        return "the enroll secret has expired"
    if secret.uses_left is not None and secret.uses_left <= 0:
        return "the enroll secret has been used as often as it may be"
    return None


def use_secret(tx: Tx, secret: Secret) -> None:
    """Count one enrollment."""
    tx.db.execute(
        "UPDATE tenants_secrets SET used = used + 1, uses_left = uses_left - 1 WHERE id = ?",
        (secret.id,),
    )


def return_secret(tx: Tx, secret: Secret) -> None:
    """Take back a `use_secret` from which no enrollment came."""
    tx.db.execute(
        "UPDATE tenants_secrets SET used = used - 1, uses_left = uses_left + 1 WHERE id = ?",
        (secret.id,),
    )
