"""Groups of agents and every kept version of their configuration, in the box's own database."""

from __future__ import annotations

import hashlib
import sqlite3
from functools import partial
from typing import Any

from sqlite_utils import Database, Migrations

from osqbox import audit
from osqbox.comms.errors import bad_request, conflict, not_found
from osqbox.comms.messages import Change, Group
from osqbox.comms.protocol import CONFIGURATION_BYTES
from osqbox.comms.registration import DEFAULT_GROUP, check_group_name, check_tenant
from osqbox.comms.seams import OnChange
from osqbox.store import Store, Tx

from .durable import durably

KEPT_VERSIONS = 100
"""Of one group; older ones are forgotten."""
GROUPS_MAX = 10_000
"""In one tenant."""

migrations = Migrations("comms_groups")


@migrations()
def m001_groups(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE comms_groups (
            tenant TEXT NOT NULL REFERENCES tenants(name),
            name TEXT NOT NULL,          -- `default` exists without a row
            configuration TEXT NOT NULL, -- YAML, as it was given
            version INTEGER NOT NULL,    -- 0 before the first configuration
            sha256 TEXT NOT NULL,        -- of the configuration, hexadecimal
            changed_at REAL NOT NULL,    -- seconds since the epoch
            changed_by TEXT NOT NULL,
            PRIMARY KEY (tenant, name)
        ) WITHOUT ROWID"""
    )
    db.conn.execute(
        """CREATE TABLE comms_group_versions (
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            configuration TEXT NOT NULL,
            version INTEGER NOT NULL,    -- the last 100 are kept
            sha256 TEXT NOT NULL,
            changed_at REAL NOT NULL,
            changed_by TEXT NOT NULL,
            PRIMARY KEY (tenant, name, version),
            FOREIGN KEY (tenant, name) REFERENCES comms_groups(tenant, name) ON DELETE CASCADE
        ) WITHOUT ROWID"""
    )


COLUMNS = "tenant, name, configuration, version, sha256, changed_at, changed_by"


class SqliteGroups:
    """The seam `Groups`."""

    def __init__(self, store: Store, on_change: OnChange) -> None:
        self._store, self._on_change = store, on_change

    async def find(self, tenant: str, name: str) -> Group | None:
        return self._store.peek(partial(find, tenant=tenant, name=name))

    async def put(
        self, tenant: str, name: str, configuration: str, *, actor: str, expected_version: int | None
    ) -> Group:
        def work(tx: Tx) -> Group:
            group, is_changed = put(tx, tenant, name, configuration, actor=actor, expected_version=expected_version)
            if is_changed:
                self._tell(tx, tenant)
            return group

        return await durably(self._store, work)

    async def page(self, tenant: str) -> list[Group]:
        return await self._store.read(partial(page, tenant=tenant))

    async def versions(self, tenant: str, name: str) -> list[Group]:
        return await self._store.read(partial(versions, tenant=tenant, name=name))

    async def delete(self, tenant: str, name: str, *, actor: str) -> None:
        def work(tx: Tx) -> None:
            delete(tx, tenant, name, actor=actor)
            self._tell(tx, tenant)

        await durably(self._store, work)

    def _tell(self, tx: Tx, tenant: str) -> None:
        tx.after_commit.append(partial(self._on_change, Change(kind="groups", tenant=tenant)))


def find(db: sqlite3.Connection, tenant: str, name: str) -> Group | None:
    row = db.execute(f"SELECT {COLUMNS} FROM comms_groups WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    if row is not None:
        return _group(row)
    return Group(tenant=tenant, name=name) if name == DEFAULT_GROUP else None


def put(
    tx: Tx, tenant: str, name: str, configuration: str, *, actor: str, expected_version: int | None
) -> tuple[Group, bool]:
    """The group as it is now, and whether anything changed."""
    check_group_name(name)
    data = encoded(configuration)
    check_tenant(tx.db, tenant)
    before = find(tx.db, tenant, name)
    version = before.version if before else 0
    if expected_version is not None and expected_version != version:
        raise conflict(f"group {name!r}: expected version {expected_version}, got {version}; read it again first")
    if before is not None and configuration == before.configuration:
        return before, False
    if before is None:
        _check_room(tx.db, tenant)
    digest = hashlib.sha256(data).hexdigest()
    is_configured = bool(version or configuration)
    group = Group(
        tenant=tenant,
        name=name,
        configuration=configuration,
        version=version + is_configured,
        sha256=digest if is_configured else "",
        changed_at=tx.now,
        changed_by=actor,
    )
    _save(tx, group)
    audit.record(tx, actor, "group.put", name, tenant=tenant, version=group.version, sha256=group.sha256)
    tx.emit("configuration_changed", tenant=tenant, group=name, version=group.version, sha256=group.sha256)
    return group, True


def page(db: sqlite3.Connection, tenant: str) -> list[Group]:
    """Every group of a tenant by name, `default` first."""
    rows = db.execute(f"SELECT {COLUMNS} FROM comms_groups WHERE tenant = ? ORDER BY name", (tenant,))
    found = {group.name: group for group in map(_group, rows)}
    default = found.pop(DEFAULT_GROUP, None) or Group(tenant=tenant, name=DEFAULT_GROUP)
    return [default, *found.values()]


def versions(db: sqlite3.Connection, tenant: str, name: str) -> list[Group]:
    if find(db, tenant, name) is None:
        raise not_found(f"Group {name!r}")
    rows = db.execute(
        f"SELECT {COLUMNS} FROM comms_group_versions WHERE tenant = ? AND name = ? ORDER BY version DESC",
        (tenant, name),
    )
    return [_group(row) for row in rows]


def delete(tx: Tx, tenant: str, name: str, *, actor: str) -> None:
    if name == DEFAULT_GROUP:
        raise conflict(f"the group {DEFAULT_GROUP!r} always exists and cannot be deleted")
    if find(tx.db, tenant, name) is None:
        raise not_found(f"Group {name!r}")
    members = tx.db.execute(
        'SELECT count(*) FROM comms_agent_groups WHERE tenant = ? AND "group" = ?', (tenant, name)
    ).fetchone()[0]
    if members:
        raise conflict(f"group {name!r}: expected one without agents, got one with {members}; move them first")
    tx.db.execute("DELETE FROM comms_groups WHERE tenant = ? AND name = ?", (tenant, name))
    audit.record(tx, actor, "group.delete", name, tenant=tenant)
    tx.emit("configuration_changed", tenant=tenant, group=name, deleted=True)


def encoded(configuration: str) -> bytes:
    try:
        data = configuration.encode()
    except UnicodeEncodeError:
        raise bad_request("configuration: expected text, got half a surrogate pair") from None
    if len(data) > CONFIGURATION_BYTES:
        raise bad_request(f"configuration: expected at most {CONFIGURATION_BYTES} bytes, got {len(data)}")
    return data


def _check_room(db: sqlite3.Connection, tenant: str) -> None:
    count = db.execute("SELECT count(*) FROM comms_groups WHERE tenant = ?", (tenant,)).fetchone()[0]
    if count >= GROUPS_MAX:
        raise conflict(f"expected at most {GROUPS_MAX} groups in a tenant; delete one first")


def _save(tx: Tx, group: Group) -> None:
    values = tuple(getattr(group, name) for name in COLUMNS.split(", "))
    tx.db.execute(
        f"INSERT INTO comms_groups({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT(tenant, name) DO UPDATE SET "
        "configuration = excluded.configuration, version = excluded.version, sha256 = excluded.sha256, "
        "changed_at = excluded.changed_at, changed_by = excluded.changed_by",
        values,
    )
    if group.version:
        tx.db.execute(f"INSERT INTO comms_group_versions({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        tx.db.execute(
            "DELETE FROM comms_group_versions WHERE tenant = ? AND name = ? AND version <= ?",
            (group.tenant, group.name, group.version - KEPT_VERSIONS),
        )


def _group(row: tuple[Any, ...]) -> Group:
    return Group(**dict(zip(COLUMNS.split(", "), row, strict=True)))
