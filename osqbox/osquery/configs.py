"""Config sources with their versions, and the one config each node gets from them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from osqbox.clock import rfc3339
from osqbox.errors import BadUsage
from osqbox.osquery.amalgamate import Merged, NodeFacts, Source, Target, amalgamate
from osqbox.osquery.nodes import Node
from osqbox.store import Tx

KEPT_VERSIONS = 50


def revision(db: sqlite3.Connection) -> int:
    """Grows with every change of any source; what was amalgamated under the same revision is still right."""
    return int(db.execute("SELECT revision FROM osquery_config_revision").fetchone()[0])


def sources(db: sqlite3.Connection) -> list[Source]:
    """The current version of every source that was not removed."""
    rows = db.execute(
        "SELECT name, content, target, priority, origin, version FROM osquery_config_versions "
        "WHERE current = 1 AND content IS NOT NULL ORDER BY name"
    )
    return [
        Source(
            name=row[0],
            content=msgspec.json.decode(row[1]),
            target=msgspec.convert(msgspec.json.decode(row[2]), Target),
            priority=row[3],
            origin="file" if row[4] == "file" else "api",
            version=row[5],
        )
        for row in rows
    ]


def facts(node: Node) -> NodeFacts:
    """What targets are compared with."""
    return NodeFacts(
        id=node.id,
        tenant=node.tenant,
        hostname=node.hostname,
        host_identifier=node.host_identifier,
        platform=node.platform,
        platform_like=node.platform_like,
        tags=frozenset(node.tags),
    )


def config_for(db: sqlite3.Connection, node: Node) -> Merged:
    """The amalgamated config of a node, with the origin of each key."""
    return amalgamate(sources(db), facts(node))


def put(tx: Tx, source: Source, note: str) -> int:
    """Make this the current version of its source; returns the version. Equal content makes no new one."""
    content = msgspec.json.encode(source.content, order="sorted").decode()
    target = msgspec.json.encode(source.target).decode()
    now = tx.db.execute(
        "SELECT version, content, target, priority, origin FROM osquery_config_versions WHERE name = ? AND current = 1",
        (source.name,),
    ).fetchone()
    if now and now[1:] == (content, target, source.priority, source.origin):
        return int(now[0])
    if now and now[4] != source.origin and now[1] is not None:
        raise BadUsage(f"config source {source.name!r} belongs to origin {now[4]}; choose another name")
    return _add(tx, source.name, source.origin, content, target, source.priority, note)


def remove(tx: Tx, name: str, note: str = "removed") -> None:
    """Stop serving a source; its versions stay for a rollback. Raises BadUsage."""
    row = _current(tx.db, name)
    if row["content"] is not None:
        _add(tx, name, row["origin"], None, row["target"], row["priority"], note)


def rollback(tx: Tx, name: str, to: int | None = None) -> int:
    """Serve an older version again, by default the one before; it becomes the newest version. Raises BadUsage.

    A file source stays rolled back until its file changes or the box starts again.
    """
    current = _current(tx.db, name)
    wanted = tx.db.execute(
        "SELECT version, content, target, priority FROM osquery_config_versions "
        "WHERE name = ?1 AND version < ?2 AND (?3 IS NULL OR version = ?3) ORDER BY version DESC LIMIT 1",
        (name, current["version"], to),
    ).fetchone()
    if wanted is None:
        raise BadUsage(
            f"config source {name!r} has no version {'before ' + str(current['version']) if to is None else to}",
            hint=f"osqbox config versions {name}",
        )
    return _add(tx, name, current["origin"], wanted[1], wanted[2], wanted[3], f"rolled back to version {wanted[0]}")


def _current(db: sqlite3.Connection, name: str) -> dict[str, Any]:
    row = db.execute(
        "SELECT version, origin, content, target, priority FROM osquery_config_versions WHERE name = ? AND current = 1",
        (name,),
    ).fetchone()
    if row is None:
        raise BadUsage(f"no config source {name!r}", hint="osqbox config list")
    return dict(zip(("version", "origin", "content", "target", "priority"), row, strict=True))


def _add(tx: Tx, name: str, origin: str, content: str | None, target: str, priority: int, note: str) -> int:
    version = tx.db.execute(
        "SELECT coalesce(max(version), 0) + 1 FROM osquery_config_versions WHERE name = ?", (name,)
    ).fetchone()[0]
    tx.db.execute("UPDATE osquery_config_versions SET current = 0 WHERE name = ? AND current = 1", (name,))
    tx.db.execute(
        "INSERT INTO osquery_config_versions(name, version, origin, content, target, priority, note, created_at, "
        "current) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1)",
        (name, version, origin, content, target, priority, note, tx.now),
    )
    tx.db.execute(
        "DELETE FROM osquery_config_versions WHERE name = ? AND version <= ?", (name, version - KEPT_VERSIONS)
    )
    tx.db.execute("UPDATE osquery_config_revision SET revision = revision + 1")
    tx.emit("config_changed", source=name, version=version, note=note)
    return int(version)


def listing(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """The current sources for people: name, origin, version, target, priority, note, changed_at."""
    rows = db.execute(
        "SELECT name, origin, version, target, priority, note, created_at, content IS NULL "
        "FROM osquery_config_versions WHERE current = 1 ORDER BY name"
    )
    return [_listed(row) for row in rows]


def _listed(row: Sequence[Any]) -> dict[str, Any]:
    return {
        "name": row[0],
        "origin": row[1],
        "version": row[2],
        "target": msgspec.json.decode(row[3]),
        "priority": row[4],
        "note": row[5],
        "changed_at": rfc3339(row[6]),
        "removed": bool(row[7]),
    }


def versions(db: sqlite3.Connection, name: str) -> list[dict[str, Any]]:
    """A source's kept versions, newest first, with their content. Raises BadUsage."""
    _current(db, name)
    rows = db.execute(
        "SELECT name, origin, version, target, priority, note, created_at, content IS NULL, content, current "
        "FROM osquery_config_versions WHERE name = ? ORDER BY version DESC",
        (name,),
    )
    return [
        {
            **_listed(row),
            "current": bool(row[9]),
            "content": None if row[8] is None else msgspec.json.decode(row[8]),
        }
        for row in rows
    ]
