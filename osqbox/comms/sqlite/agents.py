"""Agents in the box's own database: who they are, what their keys hash to, which groups they are in."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlite_utils import Database, Migrations

from osqbox import audit
from osqbox.comms.errors import conflict, not_found
from osqbox.comms.messages import Agent, AgentStatus, Change, Credentials, Json
from osqbox.comms.registration import check_groups, check_name, check_tenant
from osqbox.comms.seams import OnChange
from osqbox.store import Store, Tx

from . import groups as group_table
from .commands import cancel_of_agent
from .durable import durably

TAKEN_NAME, TAKEN_UUID = 1705, 1708

migrations = Migrations("comms_agents")


@migrations()
def m001_agents(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE comms_agents (
            uuid TEXT PRIMARY KEY,
            tenant TEXT NOT NULL REFERENCES tenants(name),
            name TEXT NOT NULL,
            type TEXT NOT NULL,           -- such as Endpoint
            version TEXT NOT NULL,        -- of the agent's program
            host TEXT NOT NULL,           -- JSON object: hostname, architecture, ip, os, as the agent told
            status TEXT NOT NULL,         -- never_connected, active, revoked
            key_version INTEGER NOT NULL, -- grows with every new key and revocation; older tokens are refused
            key_hash TEXT NOT NULL,       -- base64(16-byte salt + PBKDF2-HMAC-SHA256, 100,000 rounds)
            created_at REAL NOT NULL,     -- seconds since the epoch, as all times here
            last_login_at REAL,
            last_seen_at REAL,
            UNIQUE (tenant, name)
        ) WITHOUT ROWID"""
    )
    db.conn.execute(
        """CREATE TABLE comms_agent_groups (
            agent TEXT NOT NULL REFERENCES comms_agents(uuid) ON DELETE CASCADE,
            position INTEGER NOT NULL,    -- a later group's configuration overrides an earlier one's
            tenant TEXT NOT NULL,
            "group" TEXT NOT NULL,
            PRIMARY KEY (agent, position)
        ) WITHOUT ROWID"""
    )
    db.conn.execute('CREATE INDEX comms_agent_groups_group ON comms_agent_groups(tenant, "group", agent)')


COLUMNS = (
    "uuid, tenant, name, type, version, host, status, key_version, created_at, last_login_at, last_seen_at, "
    '(SELECT json_group_array("group") FROM '
    '(SELECT "group" FROM comms_agent_groups WHERE agent = uuid ORDER BY position))'
)


class SqliteAgents:
    """The seam `Agents`."""

    def __init__(self, store: Store, on_change: OnChange) -> None:
        self._store, self._on_change = store, on_change

    async def find(self, uuid: str) -> Agent | None:
        return self._store.peek(partial(find, uuid=uuid))

    async def credentials(self, uuid: str) -> Credentials | None:
        return self._store.peek(partial(credentials, uuid=uuid))

    async def add(self, agent: Agent, key_hash: str, *, actor: str) -> Agent:
        return await self._change(lambda tx: add(tx, agent, key_hash, actor=actor))

    async def change(
        self,
        uuid: str,
        *,
        actor: str,
        name: str | None = None,
        groups: Sequence[str] | None = None,
        status: AgentStatus | None = None,
        key_hash: str | None = None,
    ) -> Agent:
        def work(tx: Tx) -> Agent:
            return change(tx, uuid, actor=actor, name=name, groups=groups, status=status, key_hash=key_hash)

        return await self._change(work)

    async def delete(self, uuid: str, *, actor: str) -> None:
        def work(tx: Tx) -> Agent:
            agent = delete(tx, uuid, actor=actor)
            cancel_of_agent(tx, uuid, actor)
            return agent

        await self._change(work)

    async def _change(self, work: Callable[[Tx], Agent]) -> Agent:
        def run(tx: Tx) -> Agent:
            agent = work(tx)
            told = Change(kind="agents", agents=(agent.uuid,), tenant=agent.tenant)
            tx.after_commit.append(partial(self._on_change, told))
            return agent

        return await durably(self._store, run)

    async def note_login(self, uuid: str, at: float, facts: Mapping[str, Json]) -> None:
        await durably(self._store, lambda tx: note_login(tx, uuid, at, facts))

    async def note_seen(self, seen: Mapping[str, float]) -> None:
        rows = [(at, at, uuid) for uuid, at in seen.items()]
        await durably(self._store, lambda tx: note_seen(tx, rows), bulk=True)

    async def page(
        self, *, tenant: str | None = None, group: str | None = None, after: str = "", limit: int = 100, text: str = ""
    ) -> list[Agent]:
        return await self._store.read(
            partial(page, tenant=tenant, group=group, after=after, limit=limit, text=text),
        )

    async def addressed(
        self, tenant: str, *, agents: Sequence[str] = (), groups: Sequence[str] = (), everyone: bool = False
    ) -> list[str]:
        return await self._store.read(
            partial(addressed, tenant=tenant, agents=agents, groups=groups, everyone=everyone)
        )


def find(db: sqlite3.Connection, uuid: str) -> Agent | None:
    row = db.execute(f"SELECT {COLUMNS} FROM comms_agents WHERE uuid = ?", (uuid,)).fetchone()
    return None if row is None else _agent(row)


def credentials(db: sqlite3.Connection, uuid: str) -> Credentials | None:
    row = db.execute(f"SELECT {COLUMNS}, key_hash FROM comms_agents WHERE uuid = ?", (uuid,)).fetchone()
    return None if row is None else Credentials(agent=_agent(row[:-1]), key_hash=row[-1])


def add(tx: Tx, agent: Agent, key_hash: str, *, actor: str) -> Agent:
    check_tenant(tx.db, agent.tenant)
    if tx.db.execute("SELECT 1 FROM comms_agents WHERE uuid = ?", (agent.uuid,)).fetchone():
        raise conflict(f"an agent with the id {agent.uuid!r} exists already", code=TAKEN_UUID)
    _check_name_is_free(tx.db, agent.tenant, agent.name)
    tx.db.execute(
        "INSERT INTO comms_agents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(agent.uuid, agent.tenant, agent.name, agent.type, agent.version, _json(agent.host), agent.status.value),
            *(agent.key_version, key_hash, agent.created_at, agent.last_login_at, agent.last_seen_at),
        ),
    )
    _set_groups(tx, agent.uuid, agent.tenant, agent.groups)
    audit.record(tx, actor, "agent.add", agent.uuid, tenant=agent.tenant, name=agent.name, groups=agent.groups)
    tx.emit("comms_agent_added", tenant=agent.tenant, agent=agent.uuid, name=agent.name)
    return agent


def change(
    tx: Tx,
    uuid: str,
    *,
    actor: str,
    name: str | None = None,
    groups: Sequence[str] | None = None,
    status: AgentStatus | None = None,
    key_hash: str | None = None,
) -> Agent:
    before = _get(tx.db, uuid)
    is_revoked_now = status is AgentStatus.REVOKED is not before.status
    if name is not None and name != before.name:
        check_name(name)
        _check_name_is_free(tx.db, before.tenant, name)
    if groups is not None:
        _set_groups(tx, uuid, before.tenant, groups)
    after = msgspec.structs.replace(
        before,
        name=before.name if name is None else name,
        groups=before.groups if groups is None else tuple(groups),
        status=_status(before, status),
        key_version=before.key_version + (is_revoked_now or key_hash is not None),
    )
    tx.db.execute(
        "UPDATE comms_agents SET name = ?, status = ?, key_version = ?, key_hash = coalesce(?, key_hash) "
        "WHERE uuid = ?",
        (after.name, after.status.value, after.key_version, key_hash, uuid),
    )
    changed: dict[str, Any] = {
        each: getattr(after, each)
        for each in ("name", "groups", "status", "key_version")
        if getattr(after, each) != getattr(before, each)
    }
    audit.record(
        tx, actor, "agent.revoke" if is_revoked_now else "agent.change", uuid, tenant=after.tenant, changed=changed
    )
    tx.emit("comms_agent_changed", tenant=after.tenant, agent=uuid, name=after.name, changed=sorted(changed))
    return after


def _status(before: Agent, wanted: AgentStatus | None) -> AgentStatus:
    """An agent that is allowed again is what it was before."""
    if wanted is None or wanted is AgentStatus.REVOKED:
        return wanted or before.status
    return AgentStatus.NEVER_CONNECTED if before.last_login_at is None else AgentStatus.ACTIVE


def delete(tx: Tx, uuid: str, *, actor: str) -> Agent:
    agent = _get(tx.db, uuid)
    tx.db.execute("DELETE FROM comms_agents WHERE uuid = ?", (uuid,))
    audit.record(tx, actor, "agent.delete", uuid, tenant=agent.tenant, name=agent.name)
    tx.emit("comms_agent_deleted", tenant=agent.tenant, agent=uuid, name=agent.name)
    return agent


def note_login(tx: Tx, uuid: str, at: float, facts: Mapping[str, Json]) -> None:
    host = facts.get("host")
    tx.db.execute(
        "UPDATE comms_agents SET last_login_at = ?, last_seen_at = max(coalesce(last_seen_at, 0), ?), "
        "type = coalesce(?, type), version = coalesce(?, version), host = coalesce(?, host), "
        "status = CASE status WHEN 'revoked' THEN status ELSE 'active' END WHERE uuid = ?",
        (at, at, facts.get("type"), facts.get("version"), None if host is None else _json(host), uuid),
    )


def note_seen(tx: Tx, rows: Sequence[tuple[float, float, str]]) -> None:
    tx.db.executemany("UPDATE comms_agents SET last_seen_at = ? WHERE coalesce(last_seen_at, 0) < ? AND uuid = ?", rows)


def page(
    db: sqlite3.Connection, *, tenant: str | None, group: str | None, after: str, limit: int, text: str
) -> list[Agent]:
    where, values = ["uuid > ?"], [after]
    if tenant is not None:
        where.append("tenant = ?")
        values.append(tenant)
    if group is not None:
        where.append('uuid IN (SELECT agent FROM comms_agent_groups WHERE "group" = ?)')
        values.append(group)
    if text:
        where.append("(instr(lower(name), lower(?)) OR instr(lower(uuid), lower(?)))")
        values += [text, text]
    rows = db.execute(
        f"SELECT {COLUMNS} FROM comms_agents WHERE {' AND '.join(where)} ORDER BY uuid LIMIT ?", (*values, limit)
    )
    return [_agent(row) for row in rows]


def addressed(
    db: sqlite3.Connection, tenant: str, *, agents: Sequence[str], groups: Sequence[str], everyone: bool
) -> list[str]:
    """Sorted; unknown names are told first, so that nothing is published to only a part of those meant."""
    where, values = ["0"], [tenant]
    if agents:
        _check_known(db, tenant, agents)
        where.append("uuid IN (SELECT value FROM json_each(?))")
        values.append(_json(agents))
    for group in groups:
        if group_table.find(db, tenant, group) is None:
            raise not_found(f"Group {group!r}")
        where.append('uuid IN (SELECT agent FROM comms_agent_groups WHERE tenant = ? AND "group" = ?)')
        values += [tenant, group]
    if everyone:
        where.append("1")
    rows = db.execute(
        f"SELECT uuid FROM comms_agents WHERE tenant = ? AND status != 'revoked' AND ({' OR '.join(where)}) "
        "ORDER BY uuid",
        values,
    )
    return [uuid for (uuid,) in rows]


def _check_known(db: sqlite3.Connection, tenant: str, agents: Sequence[str]) -> None:
    unknown = db.execute(
        "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT uuid FROM comms_agents WHERE tenant = ?) LIMIT 1",
        (_json(agents), tenant),
    ).fetchone()
    if unknown is not None:
        raise not_found(f"Agent {unknown[0]!r}")


def _get(db: sqlite3.Connection, uuid: str) -> Agent:
    if (agent := find(db, uuid)) is None:
        raise not_found(f"Agent {uuid!r}")
    return agent


def _check_name_is_free(db: sqlite3.Connection, tenant: str, name: str) -> None:
    if db.execute("SELECT 1 FROM comms_agents WHERE tenant = ? AND name = ?", (tenant, name)).fetchone():
        raise conflict(f"an agent named {name!r} exists already", code=TAKEN_NAME)


def _set_groups(tx: Tx, uuid: str, tenant: str, names: Sequence[str]) -> None:
    check_groups(names)
    for name in names:
        if group_table.find(tx.db, tenant, name) is None:
            raise not_found(f"Group {name!r}")
    tx.db.execute("DELETE FROM comms_agent_groups WHERE agent = ?", (uuid,))
    tx.db.executemany(
        "INSERT INTO comms_agent_groups VALUES (?, ?, ?, ?)",
        [(uuid, position, tenant, name) for position, name in enumerate(names)],
    )


def _json(value: Json) -> str:
    return msgspec.json.encode(value).decode()


def _agent(row: Sequence[Any]) -> Agent:
    uuid, tenant, name, kind, version, host, status, key_version, created_at, last_login_at, last_seen_at, groups = row
    return Agent(
        uuid=uuid,
        tenant=tenant,
        name=name,
        type=kind,
        version=version,
        groups=msgspec.json.decode(groups, type=tuple[str, ...]),
        host=msgspec.json.decode(host),
        status=AgentStatus(status),
        key_version=key_version,
        created_at=created_at,
        last_login_at=last_login_at,
        last_seen_at=last_seen_at,
    )
