"""What happened, in order: every system appends events inside its transactions, everybody else follows them.

An event gets its sequence number in the transaction that causes it and is published after the commit, so a
follower never sees something that did not happen, and a number survives a restart.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from osqbox.clock import rfc3339

FOLLOWER_QUEUE_EVENTS = 4096


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, named in the past tense: ``node_enrolled``, ``log_received``, ``target_ended``."""

    seq: int
    at: float
    kind: str
    tenant: str | None
    node: str | None
    data: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "at": rfc3339(self.at),
            "kind": self.kind,
            "tenant": self.tenant,
            "node": self.node,
            "data": self.data,
        }


@dataclass(frozen=True, slots=True)
class FeedStatistics:
    followers: int
    last_seq: int
    skipped: int
    """Events that slow followers were told they missed."""


class Feed:
    """Fans committed events out to followers; each has a bounded queue and is told how many it missed."""

    def __init__(self) -> None:
        self._followers: set[Follower] = set()
        self._last_seq = 0
        self._skipped = 0

    def publish(self, events: list[Event]) -> None:
        """Called by the store after the commit, on the loop's thread."""
        for event in events:
            self._last_seq = max(self._last_seq, event.seq)
            for follower in self._followers:
                self._skipped += follower.offer(event)

    def subscribe(self) -> Follower:
        """Every event from now on; pair with `unsubscribe`. A `Gap` stands for events missed by being slow."""
        follower = Follower()
        self._followers.add(follower)
        return follower

    def unsubscribe(self, follower: Follower) -> None:
        self._followers.discard(follower)

    def statistics(self) -> FeedStatistics:
        return FeedStatistics(len(self._followers), self._last_seq, self._skipped)


@dataclass(frozen=True, slots=True)
class Gap:
    """This many events were not delivered to this follower."""

    missed: int


class Follower:
    """One subscription: what happens from now on, in order."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Event](FOLLOWER_QUEUE_EVENTS)
        self._missed = 0

    def offer(self, event: Event) -> int:
        """How many events were missed by this: 0 or 1."""
        if not self._missed:
            try:
                self._send.send_nowait(event)
            except trio.WouldBlock:
                pass
            else:
                return 0
        self._missed += 1  # and so all until the gap is told: it stands where the events are missing
        return 1

    def next_nowait(self) -> Event | Gap | None:
        """What is waiting already, or None."""
        try:
            return self._receive.receive_nowait()
        except trio.WouldBlock:
            missed, self._missed = self._missed, 0
            return Gap(missed) if missed else None

    async def next(self) -> Event | Gap:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._missed and not self._receive.statistics().current_buffer_used:
            missed, self._missed = self._missed, 0
            return Gap(missed)
        return await self._receive.receive()


def create_tables(db: sqlite3.Connection) -> None:
    """Migration 1 of the feed."""
    db.execute(
        """CREATE TABLE feed_events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- grows by one per event, never reused
            at REAL NOT NULL,                       -- seconds since the epoch
            kind TEXT NOT NULL,                     -- past tense: node_enrolled, log_received, ...
            tenant TEXT,
            node TEXT,                              -- osquery_nodes.id
            data TEXT NOT NULL                      -- JSON object
        )"""
    )
    db.execute("CREATE INDEX feed_events_tenant ON feed_events(tenant, seq)")


def append(
    db: sqlite3.Connection, at: float, kind: str, tenant: str | None, node: str | None, data: dict[str, Any]
) -> Event:
    """Insert one event in the caller's transaction."""
    cursor = db.execute(
        "INSERT INTO feed_events(at, kind, tenant, node, data) VALUES (?, ?, ?, ?, ?)",
        (at, kind, tenant, node, msgspec.json.encode(data).decode()),
    )
    assert cursor.lastrowid is not None
    return Event(cursor.lastrowid, at, kind, tenant, node, data)


def events_after(
    db: sqlite3.Connection, seq: int, *, tenant: str | None = None, kind: str | None = None, limit: int = 1000
) -> list[Event]:
    """Kept events with a greater sequence number, oldest first."""
    where, args = ["seq > ?"], [seq]
    words: list[Any] = args
    for column, value in (("tenant", tenant), ("kind", kind)):
        if value is not None:
            where.append(f"{column} = ?")
            words.append(value)
    rows = db.execute(
        f"SELECT seq, at, kind, tenant, node, data FROM feed_events WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?",
        (*words, limit),
    )
    return [Event(row[0], row[1], row[2], row[3], row[4], msgspec.json.decode(row[5])) for row in rows]


def bounds(db: sqlite3.Connection) -> tuple[int, int]:
    """Sequence numbers of the oldest and newest kept event, ``(0, 0)`` when there is none."""
    row = db.execute("SELECT coalesce(min(seq), 0), coalesce(max(seq), 0) FROM feed_events").fetchone()
    return int(row[0]), int(row[1])
