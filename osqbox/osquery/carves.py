"""Carves: files an agent sends in blocks, kept whole and checked.

    receiving ──last block──▶ receiving, awaits its digest ──▶ complete
        └──────────idle──────▶ expired                    any ──▶ deleted (nobody sees it) ──▶ gone

To hash a large archive, or to drop it, takes seconds that no other write shall wait. So the last block only makes the
carve await its digest: a `Digest` reads the blocks page by page beside the writer, then `complete` is one small write.
And blocks of what has expired or was deleted are dropped few by few. What a crash leaves undone is found with
`awaiting_digest` and `to_drop`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from osqbox.clock import rfc3339
from osqbox.errors import BadUsage, Refused
from osqbox.osquery.messages import CarveBegin, CarveBlock, whole
from osqbox.osquery.nodes import Node
from osqbox.store import Tx, count_dropped

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK_MAX_BYTES = 48 * 1024 * 1024
BLOCKS_MAX = 1_000_000
IDLE_S = 86400.0
OPEN_PER_NODE = 16
"""An agent carves one thing after the other: of more open carves than this, the one idle for longest was given up."""
KEPT_CARVES = 10_000
DIGEST_PAGE_BYTES = 8 * 1024 * 1024
"""Hashed in one read; the last block of a page may pass it."""
DROP_BYTES = 1024 * 1024
"""Dropped in one write."""
LISTED_MEMBERS = 10_000
LISTED_BYTES = 512 * 1024 * 1024


def begin(tx: Tx, node: Node, message: CarveBegin, limit_bytes: int, new_id: Callable[[], str]) -> str:
    """Open a carve; returns its session id. The same carve begun twice goes on in its session."""
    size_bytes = whole(message.carve_size, "carve_size", 0, limit_bytes)
    block_bytes = whole(message.block_size, "block_size", 1, BLOCK_MAX_BYTES)
    count = whole(message.block_count, "block_count", 0, BLOCKS_MAX)
    if count != -(-size_bytes // block_bytes):
        raise Refused(
            "carve_mismatch",
            f"block_count: expected {-(-size_bytes // block_bytes)} for {size_bytes} bytes in blocks of {block_bytes}, "
            f"got {count}",
        )
    again = tx.db.execute(
        "SELECT session_id FROM osquery_carves WHERE node = ? AND carve_id = ? AND carve_id <> '' AND request_id = ? "
        "AND block_count = ? AND block_size = ? AND carve_size = ? AND state = 'receiving'",
        (node.id, message.carve_id, message.request_id, count, block_bytes, size_bytes),
    ).fetchone()
    if again:
        return str(again[0])
    _bound_open(tx, node)
    session = new_id()
    tx.db.execute(
        "INSERT INTO osquery_carves(session_id, tenant, node, carve_id, request_id, block_count, block_size, "
        "carve_size, state, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'receiving', ?, ?)",
        (
            session,
            node.tenant,
            node.id,
            message.carve_id,
            message.request_id,
            count,
            block_bytes,
            size_bytes,
            tx.now,
            tx.now,
        ),
    )
    tx.emit("carve_started", tenant=node.tenant, node=node.id, session=session, bytes=size_bytes)
    if count == 0:
        complete(tx, session, Digest())
    return session


def _bound_open(tx: Tx, node: Node) -> None:
    """Make room for one more open carve of a node."""
    rows = tx.db.execute(
        "SELECT session_id FROM osquery_carves WHERE node = ? AND state = 'receiving' "
        "AND received_blocks < block_count ORDER BY updated_at DESC LIMIT -1 OFFSET ?",
        (node.id, OPEN_PER_NODE - 1),
    ).fetchall()
    for (session,) in rows:
        _give_up(tx, session, node.tenant, node.id)


def block_data(message: CarveBlock) -> bytes:
    """The block's bytes. Raises Refused when they are not base64."""
    try:
        return base64.b64decode(message.data.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused("bad_block", "data: expected standard base64") from None


def receive_block(tx: Tx, message: CarveBlock, data: bytes, node: Node | None, certificate: str | None = None) -> bool:
    """Store one block, in any order; the session id authorises it, as blocks carry no node key.

    True when the carve has all its blocks and awaits its digest: the block is acknowledged after `complete`.

    A node that enrolled by certificate must present it: ``certificate`` is the name in the one presented.
    A block received twice is stored once. Raises Refused for anything that would spoil the archive.
    """
    row = tx.db.execute(
        "SELECT c.tenant, c.node, c.request_id, c.block_count, c.block_size, c.carve_size, c.state, t.closed_at, "
        "n.status, n.certificate_name "
        "FROM osquery_carves c JOIN tenants t ON t.name = c.tenant LEFT JOIN osquery_nodes n ON n.id = c.node "
        "WHERE c.session_id = ?",
        (message.session_id,),
    ).fetchone()
    if row is None or row[7] is not None or row[8] != "active" or (node is not None and node.id != row[1]):
        raise Refused("carve_unknown", "session_id: not an open carve of this node", status=404)
    if row[9] not in (None, certificate):
        raise Refused("certificate_required", "this node must present its client certificate", status=403)
    tenant, owner, request_id, count, block_bytes, size_bytes, state = row[:7]
    if message.request_id and message.request_id != request_id:
        raise Refused("carve_mismatch", "request_id: differs from the one this carve was begun with")
    index = whole(message.block_id, "block_id", 0, count - 1)
    expected = min(block_bytes, size_bytes - index * block_bytes)
    if len(data) != expected:
        raise Refused("bad_block", f"data: expected {expected} bytes in block {index}, got {len(data)}")
    if state not in ("receiving", "complete"):
        raise Refused("carve_unknown", "session_id: this carve has ended", status=404)
    kept = tx.db.execute(
        "SELECT data FROM osquery_carve_blocks WHERE session_id = ? AND block_id = ?",
        (message.session_id, index),
    ).fetchone()
    if kept is not None:
        if kept[0] != data:
            raise Refused("bad_block", f"block {index} came twice with different bytes")
        return awaits_digest(tx.db, message.session_id)
    if state != "receiving":
        raise Refused("carve_unknown", "session_id: this carve has ended", status=404)
    tx.db.execute("INSERT INTO osquery_carve_blocks VALUES (?, ?, ?)", (message.session_id, index, data))
    tx.db.execute(
        "UPDATE osquery_carves SET received_blocks = received_blocks + 1, updated_at = ? WHERE session_id = ?",
        (tx.now, message.session_id),
    )
    tx.emit("carve_block_received", tenant=tenant, node=owner, session=message.session_id, block=index)
    return awaits_digest(tx.db, message.session_id)


_AWAITS_DIGEST = "state = 'receiving' AND received_blocks = block_count"


def awaits_digest(db: sqlite3.Connection, session: str) -> bool:
    """Whether all blocks of a carve are stored but not hashed; one lookup by key."""
    sql = f"SELECT 1 FROM osquery_carves WHERE session_id = ? AND {_AWAITS_DIGEST}"
    return db.execute(sql, (session,)).fetchone() is not None


def awaiting_digest(db: sqlite3.Connection) -> list[str]:
    """Sessions of the carves for which that is so, oldest first."""
    rows = db.execute(f"SELECT session_id FROM osquery_carves WHERE {_AWAITS_DIGEST} ORDER BY updated_at")
    return [row[0] for row in rows]


class Digest:
    """What is known of the bytes of an archive; `feed` it until there are no more."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._next = 0
        self.compressed = False

    def feed(self, db: sqlite3.Connection, session: str) -> bool:
        """Take in the next blocks, about DIGEST_PAGE_BYTES of them. False when there were none."""
        size_bytes = 0
        for data in archive(db, session, self._next):
            self.compressed |= self._next == 0 and data.startswith(ZSTD_MAGIC)
            self._sha256.update(data)
            self._next += 1
            size_bytes += len(data)
            if size_bytes >= DIGEST_PAGE_BYTES:
                break
        return size_bytes > 0

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def complete(tx: Tx, session: str, digest: Digest) -> None:
    """Say that a carve is whole. One that is complete already, or was deleted meanwhile, stays as it is."""
    sha256 = digest.hexdigest()
    changed = tx.db.execute(
        "UPDATE osquery_carves SET state = 'complete', sha256 = ?, compressed = ?, updated_at = ? "
        f"WHERE session_id = ? AND {_AWAITS_DIGEST}",
        (sha256, int(digest.compressed), tx.now, session),
    )
    if changed.rowcount:
        sql = "SELECT tenant, node FROM osquery_carves WHERE session_id = ?"
        tenant, node = tx.db.execute(sql, (session,)).fetchone()
        tx.emit("carve_completed", tenant=tenant, node=node, session=session, sha256=sha256)


def archive(db: sqlite3.Connection, session: str, start: int = 0) -> Iterator[bytes]:
    """The archive's bytes, block by block, from the block ``start`` on."""
    for row in db.execute(
        "SELECT data FROM osquery_carve_blocks WHERE session_id = ? AND block_id >= ? ORDER BY block_id",
        (session, start),
    ):
        yield row[0]


def blocks(db: sqlite3.Connection, session: str, start: int, limit: int) -> list[bytes]:
    """Blocks of a complete carve from ``start`` on, for a download that must not hold a read open."""
    rows = db.execute(
        "SELECT b.data FROM osquery_carves c JOIN osquery_carve_blocks b ON b.session_id = c.session_id "
        "WHERE c.session_id = ? AND c.state = 'complete' AND b.block_id >= ? ORDER BY b.block_id LIMIT ?",
        (session, start, limit),
    )
    return [row[0] for row in rows]


_CARVE = (
    "SELECT c.session_id, c.tenant, c.node, c.carve_id, c.request_id, c.block_count, c.block_size, c.carve_size, "
    "c.received_blocks, c.state, c.sha256, c.compressed, c.created_at, c.updated_at, n.hostname "
    "FROM osquery_carves c LEFT JOIN osquery_nodes n ON n.id = c.node "
)
_NAMES = (
    "id", "tenant", "node", "carve_id", "request_id", "block_count", "block_size", "carve_size", "received_blocks",
    "status", "sha256", "compressed", "created_at", "updated_at", "hostname",
)  # fmt: skip


def _as_json(row: Sequence[Any]) -> dict[str, Any]:
    facts = dict(zip(_NAMES, row, strict=True))
    facts["compressed"] = None if facts["compressed"] is None else bool(facts["compressed"])
    facts["created_at"], facts["updated_at"] = rfc3339(facts["created_at"]), rfc3339(facts["updated_at"])
    return facts


def latest(db: sqlite3.Connection, limit: int, tenant: str | None = None) -> list[dict[str, Any]]:
    """The newest carves first."""
    rows = db.execute(
        f"{_CARVE} WHERE c.state <> 'deleted' AND (?1 IS NULL OR c.tenant = ?1) ORDER BY c.created_at DESC LIMIT ?2",
        (tenant, limit),
    )
    return [_as_json(row) for row in rows]


def get(db: sqlite3.Connection, session: str) -> dict[str, Any]:
    """A carve by session id, the agent's carve id, or ``latest``. Raises BadUsage."""
    row = db.execute(
        f"{_CARVE} WHERE c.state <> 'deleted' AND (c.session_id = ?1 OR c.carve_id = ?1 OR ?1 = 'latest') "
        "ORDER BY c.created_at DESC LIMIT 1",
        (session,),
    ).fetchone()
    if row is None:
        raise BadUsage(f"no carve {session!r}", hint="osqbox carves list")
    return _as_json(row)


def members(db: sqlite3.Connection, session: str) -> list[dict[str, Any]]:
    """What a complete archive holds: ``{name, type, size, mode, mtime}``. Nothing is ever unpacked to disk.

    Raises BadUsage when the carve is incomplete or not a tar archive.
    """
    carve = get(db, session)
    if carve["status"] != "complete":
        raise BadUsage(
            f"carve {session} is {carve['status']}: {carve['received_blocks']} of {carve['block_count']} blocks"
        )
    stream: Any = _BlockStream(archive(db, carve["id"]))
    unreadable: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, ValueError, OSError, RecursionError)
    if carve["compressed"]:
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(stream)
        unreadable = (*unreadable, zstandard.ZstdError)
    try:
        return _list_tar(_Bounded(stream, LISTED_BYTES))
    except unreadable as error:
        raise BadUsage(f"carve {session}: expected a tar archive, got: {error}") from None


def _list_tar(stream: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="replace") as tar:
        for member in tar:
            if len(found) >= LISTED_MEMBERS:
                break
            kind = (
                "file" if member.isfile() else "directory" if member.isdir() else "link" if member.issym() else "other"
            )
            found.append(
                {
                    "name": member.name,
                    "type": kind,
                    "size": member.size,
                    "mode": member.mode,
                    "mtime": _moment(member.mtime),
                }
            )
    return found


def _moment(mtime: float) -> str | None:
    """A time as a pax header may claim it; None when it is beyond the calendar."""
    try:
        return rfc3339(float(mtime))
    except (ValueError, OverflowError, OSError):
        return None


class _BlockStream(io.RawIOBase):
    """The blocks of a carve as one readable file."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


class _Bounded:
    """Ends the listing of an archive that unpacks to more than is read."""

    def __init__(self, stream: Any, limit_bytes: int) -> None:
        self._stream = stream
        self._left_bytes = limit_bytes

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size if size >= 0 else 65536)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise ValueError(f"more than {LISTED_BYTES} bytes when unpacked")
        return data


def delete(tx: Tx, session: str) -> None:
    """Nobody sees the carve any more; its blocks go bit by bit. Raises BadUsage."""
    carve = get(tx.db, session)
    _set_state(tx, carve["id"], "deleted")
    tx.emit("carve_deleted", tenant=carve["tenant"], node=carve["node"], session=carve["id"])


def expire(tx: Tx) -> None:
    """Give up carves that got no block for a day, as osqueryd does (``--carver_expiry``)."""
    rows = tx.db.execute(
        "SELECT session_id, tenant, node FROM osquery_carves "
        "WHERE state = 'receiving' AND received_blocks < block_count AND updated_at < ?",
        (tx.now - IDLE_S,),
    ).fetchall()
    for session, tenant, node in rows:
        _give_up(tx, session, tenant, node)


def _set_state(tx: Tx, session: str, state: str) -> None:
    tx.db.execute("UPDATE osquery_carves SET state = ? WHERE session_id = ?", (state, session))


def to_drop(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """Carves that have blocks nobody can read: session and bytes of a block, for `drop_blocks`."""
    return db.execute(
        "SELECT session_id, block_size FROM osquery_carves c WHERE state = 'deleted' OR state = 'expired' AND EXISTS "
        "(SELECT 1 FROM osquery_carve_blocks b WHERE b.session_id = c.session_id)"
    ).fetchall()


def drop_blocks(tx: Tx, session: str, block_bytes: int) -> bool:
    """Drop about DROP_BYTES of a carve, at least one block. False when nothing is left of it."""
    dropped = tx.db.execute(
        "DELETE FROM osquery_carve_blocks WHERE session_id = ?1 AND block_id IN "
        "(SELECT block_id FROM osquery_carve_blocks WHERE session_id = ?1 ORDER BY block_id LIMIT ?2)",
        (session, max(1, DROP_BYTES // block_bytes)),
    )
    if dropped.rowcount == 0:
        tx.db.execute("DELETE FROM osquery_carves WHERE session_id = ? AND state = 'deleted'", (session,))
    return dropped.rowcount > 0


def _give_up(tx: Tx, session: str, tenant: str, node: str) -> None:
    _set_state(tx, session, "expired")
    tx.emit("carve_expired", tenant=tenant, node=node, session=session)


def prune(tx: Tx, keep_bytes: int) -> None:
    """Drop the oldest carves, ended ones first, until what is stored of the rest is within ``keep_bytes``."""
    rows = tx.db.execute(
        "SELECT session_id, CASE state WHEN 'expired' THEN 0 ELSE min(received_blocks * block_size, carve_size) END "
        "FROM osquery_carves WHERE state <> 'deleted' ORDER BY state = 'receiving', created_at"
    ).fetchall()
    held_bytes, left = sum(row[1] for row in rows), len(rows)
    for session, size_bytes in rows:
        if held_bytes <= keep_bytes and left <= KEPT_CARVES:
            break
        _set_state(tx, session, "deleted")
        held_bytes -= size_bytes
        left -= 1
    count_dropped(tx, "carves", len(rows) - left)
