"""One-time tokens: whoever brings one, with a certificate signing request, gets the client certificate it stands for.

Only the SHA-256 of a token is kept, and looked up by: nothing for timing to reveal, nothing for a stolen file to use.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox import audit, tenants
from osqbox.certs.names import client_uris, identity_uri
from osqbox.clock import rfc3339
from osqbox.errors import BadUsage
from osqbox.store import Tx

from .access import OPERATOR_NAME, ROLES

TTL_S = 15 * 60.0
DAY_S = 86_400.0
TTL_MAX_S = 7 * DAY_S
LIVE_TOKENS = 10_000
KEPT_S = 7 * DAY_S
"""How long a used or expired token is remembered."""

migrations = Migrations("login")


@migrations()
def m001_tokens(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE login_tokens (
            digest TEXT PRIMARY KEY,   -- SHA-256 of the token
            id TEXT NOT NULL UNIQUE,   -- what the audit calls it
            name TEXT NOT NULL,        -- whom the certificate is for
            tenant TEXT NOT NULL,
            roles TEXT NOT NULL,       -- JSON array
            principals TEXT NOT NULL,  -- JSON array
            valid_s REAL NOT NULL,     -- validity of the certificate
            created_at REAL NOT NULL,  -- of the token; seconds since the epoch, as all times here
            expires_at REAL NOT NULL,
            used_at REAL
        ) WITHOUT ROWID"""
    )


@dataclass(frozen=True, slots=True)
class Order:
    """What a token stands for."""

    name: str
    tenant: str = tenants.DEFAULT
    roles: tuple[str, ...] = ()
    principals: tuple[str, ...] = ()
    valid_s: float = DAY_S

    @property
    def owner(self) -> str:
        return identity_uri(self.tenant, self.name).removeprefix("osqbox://")

    def check(self) -> None:
        """Raises BadUsage for words that no certificate may carry."""
        from osqbox.certs import validity_s

        client_uris(self.name, self.tenant, self.roles, self.principals)
        validity_s(self.valid_s / DAY_S)
        if unknown := sorted(set(self.roles) - ROLES.keys()):
            raise BadUsage(f"roles: expected some of {', '.join(ROLES)}, got {unknown[0]!r}")


@dataclass(frozen=True, slots=True)
class Token:
    id: str
    order: Order
    created_at: float
    expires_at: float

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.order.name,
            "tenant": self.order.tenant,
            "roles": list(self.order.roles),
            "principals": list(self.order.principals),
            "valid_s": self.order.valid_s,
            "expires_at": rfc3339(self.expires_at),
        }


def create_token(tx: Tx, order: Order, secret: str, token_id: str, ttl_s: float = TTL_S) -> Token:
    """Make ``secret`` good for one certificate. Raises BadUsage for an order that could not be carried out."""
    order.check()
    if not 1 <= ttl_s <= TTL_MAX_S:
        raise BadUsage(f"ttl_s: expected 1 to {TTL_MAX_S:.0f} seconds, got {ttl_s:g}")
    if tenants.get(tx.db, order.tenant).closed_at is not None:
        raise BadUsage(f"tenant {order.tenant!r} is closed", hint="osqbox tenants list")
    tx.db.execute("DELETE FROM login_tokens WHERE expires_at < ?", (tx.now - KEPT_S,))
    live = tx.db.execute("SELECT count(*) FROM login_tokens WHERE used_at IS NULL AND expires_at > ?", (tx.now,))
    if live.fetchone()[0] >= LIVE_TOKENS:
        raise BadUsage(f"expected at most {LIVE_TOKENS} unused tokens at once; wait until some expire")
    token = Token(token_id, order, tx.now, tx.now + ttl_s)
    lists = (msgspec.json.encode(order.roles).decode(), msgspec.json.encode(order.principals).decode())
    tx.db.execute(
        "INSERT INTO login_tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
        (digest(secret), token_id, order.name, order.tenant, *lists, order.valid_s, tx.now, token.expires_at),
    )
    audit.record(
        tx,
        OPERATOR_NAME,
        "login.token",
        token_id,
        tenant=order.tenant,
        owner=order.owner,
        roles=order.roles,
        principals=order.principals,
        valid_s=order.valid_s,
        ttl_s=ttl_s,
    )
    return token


def find_token(db: sqlite3.Connection, secret: str, now: float) -> Token | None:
    """What a token stands for, while it can be used."""
    row = db.execute(
        "SELECT id, name, tenant, roles, principals, valid_s, created_at, expires_at FROM login_tokens "
        "WHERE digest = ? AND used_at IS NULL AND expires_at > ?",
        (digest(secret), now),
    ).fetchone()
    if row is None:
        return None
    token_id, name, tenant, roles, principals, valid_s, created_at, expires_at = row
    order = Order(name, tenant, _words(roles), _words(principals), valid_s)
    return Token(token_id, order, created_at, expires_at)


def redeem(tx: Tx, secret: str) -> Token | None:
    """Use a token up: of any number who bring it, one gets it."""
    token = find_token(tx.db, secret, tx.now)
    if token is not None:
        tx.db.execute("UPDATE login_tokens SET used_at = ? WHERE id = ?", (tx.now, token.id))
    return token


def note_unsigned(tx: Tx, token: Token, why: str, address: str, *, is_usable: bool) -> None:
    """No certificate could be signed; where that was not the token's fault, it can be used again."""
    if is_usable:
        tx.db.execute("UPDATE login_tokens SET used_at = NULL WHERE id = ?", (token.id,))
    order = token.order
    audit.record(tx, order.owner, "login.issue", token.id, why, tenant=order.tenant, address=address)


def note_issued(tx: Tx, token: Token, serial: int, expires_at: float, address: str) -> None:
    order = token.order
    audit.record(
        tx,
        order.owner,
        "login.issue",
        token.id,
        tenant=order.tenant,
        serial=serial,
        address=address,
        roles=order.roles,
        principals=order.principals,
        expires_at=rfc3339(expires_at),
    )
    tx.emit("certificate_issued", tenant=order.tenant, owner=order.owner, serial=f"{serial:x}")


def note_refused(tx: Tx, reason: str, address: str) -> None:
    audit.record(tx, "", "login.issue", "", reason, address=address)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _words(text: str) -> tuple[str, ...]:
    return tuple(msgspec.json.decode(text, type=Sequence[str]))
