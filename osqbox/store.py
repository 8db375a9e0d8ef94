"""The one SQLite file: one writer with group commit, readers that never block the loop.

    service functions ──write()──▶ urgent │ bulk queues ──▶ writer task ──▶ one thread: BEGIN, savepoint per job,
                                                                            COMMIT ──▶ wake the callers, publish
    pages, scans      ──read()───▶ reader threads, one read-only connection each
    point lookups     ──peek()───▶ inline on the loop, its own read-only connection

A caller of `write` continues after the COMMIT of its job (``synchronous=FULL``), so acknowledged means on disk.
Many callers share one commit, which is what keeps that fast. A job that raises undoes only itself.
A caller that is cancelled while it waits may still have its job written.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import trio
from sqlite_utils import Database, Migrations

from osqbox import feed
from osqbox.clock import Clock
from osqbox.errors import BadSetup
from osqbox.feed import Event, Feed

T = TypeVar("T")

BATCH_JOBS = 256
BATCH_BYTES = 8 * 1024 * 1024
QUEUE_JOBS = 4096
QUEUE_BYTES = 256 * 1024 * 1024
READER_THREADS = 4
BUSY_TIMEOUT_S = 10.0
READER_PRAGMAS = ("query_only=ON",)
WRITER_PRAGMAS = ("foreign_keys=ON", "journal_mode=WAL", "synchronous=FULL", "journal_size_limit=67108864")


class Tx:
    """One job's view of the open transaction: the connection, the time, and the events it causes."""

    __slots__ = ("after_commit", "db", "events", "now")

    def __init__(self, db: sqlite3.Connection, now: float) -> None:
        self.db = db
        self.now = now
        self.events: list[Event] = []
        self.after_commit: list[Callable[[], None]] = []

    def emit(self, kind: str, *, tenant: str | None = None, node: str | None = None, **data: Any) -> None:
        """Append an event to the feed in this transaction; followers see it after the commit."""
        self.events.append(feed.append(self.db, self.now, kind, tenant, node, data))


@dataclass(eq=False, slots=True)
class _Job(Generic[T]):
    work: Callable[[Tx], T]
    weight_bytes: int
    done: trio.Event = field(default_factory=trio.Event)
    value: T | None = None
    error: Exception | None = None
    tx: Tx | None = None


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    commits: int
    jobs: int
    queued_jobs: int
    queued_bytes: int
    file_bytes: int


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}{'?mode=ro' if read_only else ''}"
    db = sqlite3.connect(
        uri,
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_TIMEOUT_S,
        cached_statements=256,
    )
    try:
        for pragma in READER_PRAGMAS if read_only else WRITER_PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _own_migrations() -> Migrations:
    migrations = Migrations("feed")

    @migrations()
    def m001_events(db: Database) -> None:
        feed.create_tables(db.conn)
        db.conn.execute(
            """CREATE TABLE store_drops (
                kind TEXT PRIMARY KEY,       -- what was dropped by retention: logs, events, carves, ...
                count INTEGER NOT NULL,      -- how many since the file was made
                last_at REAL NOT NULL        -- seconds since the epoch
            )"""
        )

    return migrations


class Store:
    """Open with `Store.open`, run `writer` in a nursery, close with `aclose`."""

    def __init__(self, path: Path, clock: Clock, events: Feed) -> None:
        self.path = path
        self._clock = clock
        self.feed = events
        self._write_db: sqlite3.Connection | None = None
        self._peek_db: sqlite3.Connection | None = None
        self._urgent: deque[_Job[Any]] = deque()
        self._bulk: deque[_Job[Any]] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._room = trio.Condition()
        self._closing = False
        self._drained = trio.Event()
        self._readers = trio.CapacityLimiter(READER_THREADS)
        self._writer_thread = trio.CapacityLimiter(1)
        self._idle_readers: deque[sqlite3.Connection] = deque()
        self._closed = False
        self._commits = 0
        self._jobs = 0

    @classmethod
    def open(cls, path: Path, migrations: Sequence[Migrations], clock: Clock, events: Feed) -> Store:
        """Create or upgrade the file. Raises BadSetup when it cannot be used."""
        store = cls(path, clock, events)
        try:
            path.touch(mode=0o600)  # before SQLite: it gives the -wal file the mode of this one
            path.chmod(0o600)
            db = store._write_db = _connect(path, read_only=False)
            for step in (_own_migrations(), *migrations):
                step.apply(Database(db))
            store._peek_db = _connect(path, read_only=True)
        except (sqlite3.DatabaseError, OSError) as error:
            store._close_connections()
            raise BadSetup(
                f"cannot use the database {path}: expected a SQLite file osqbox may write, got: {error}",
                hint=f"move {path} away, or choose another place with --data DIR",
            ) from error
        return store

    async def write(self, work: Callable[[Tx], T], *, bulk: bool = False, weight_bytes: int = 0) -> T:
        """Run ``work`` inside the next transaction and return its value after the COMMIT.

        Bulk jobs (log batches, carve blocks) let state changes pass before them and wait for room when more than
        QUEUE_BYTES are queued.
        """
        if self._closing:
            raise trio.ClosedResourceError("the store is closing")
        job: _Job[T] = _Job(work, weight_bytes)
        if bulk:
            await self._wait_room(weight_bytes)
            if self._closing:  # meanwhile; the writer may have ended already
                raise trio.ClosedResourceError("the store is closing")
        (self._bulk if bulk else self._urgent).append(job)
        self._queued_bytes += weight_bytes
        self._wake.set()
        await job.done.wait()
        if job.error is not None:
            raise job.error
        return cast("T", job.value)

    async def _wait_room(self, weight_bytes: int) -> None:
        if len(self._bulk) < QUEUE_JOBS and self._queued_bytes + weight_bytes <= QUEUE_BYTES:
            return
        async with self._room:
            while self._bulk and (len(self._bulk) >= QUEUE_JOBS or self._queued_bytes + weight_bytes > QUEUE_BYTES):
                await self._room.wait()

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query in a reader thread; for scans and anything that is not a lookup by key.

        All its statements see the same moment. ``work`` returns values, not iterators over open statements.
        """
        return await trio.to_thread.run_sync(self._run_read, work, limiter=self._readers, abandon_on_cancel=False)

    def _run_read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            db = self._idle_readers.pop()
        except IndexError:
            db = _connect(self.path, read_only=True)
        try:
            db.execute("BEGIN")
            value = work(db)
            db.execute("COMMIT")
        except BaseException:
            db.close()  # a statement left half-read would keep this connection in the past
            raise
        self._idle_readers.append(db)
        if self._closed:  # while this read was under way
            self._close_readers()
        return value

    def peek(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a lookup by key right here; it must take microseconds."""
        assert self._peek_db is not None
        return work(self._peek_db)

    async def writer(self) -> None:
        """The one writer. Returns after `aclose` when everything queued is committed."""
        with trio.CancelScope(shield=True):
            try:
                while True:
                    batch = self._take()
                    if batch:
                        await self._commit(batch)
                    elif self._closing:
                        break
                    else:
                        self._wake = trio.Event()
                        await self._wake.wait()
            finally:
                self._end_writer()

    def _end_writer(self) -> None:
        """Should the writer itself have failed, nobody waits for it for ever."""
        self._closing = True
        for job in (*self._urgent, *self._bulk):
            job.error = trio.ClosedResourceError("the store's writer has failed")
            job.done.set()
        self._urgent.clear()
        self._bulk.clear()
        self._drained.set()

    def _take(self) -> list[_Job[Any]]:
        batch: list[_Job[Any]] = []
        size_bytes = 0
        while len(batch) < BATCH_JOBS and size_bytes < BATCH_BYTES and (self._urgent or self._bulk):
            job = (self._urgent or self._bulk).popleft()
            size_bytes += job.weight_bytes
            batch.append(job)
        self._queued_bytes -= size_bytes
        return batch

    async def _commit(self, batch: list[_Job[Any]]) -> None:
        try:
            await trio.to_thread.run_sync(self._run_batch, batch, limiter=self._writer_thread)
        except sqlite3.Error as error:
            # The COMMIT itself failed (disk full, I/O error): nothing of the batch happened, everybody is told.
            for job in batch:
                job.error = error
        self._commits += 1
        self._jobs += len(batch)
        for job in batch:
            job.done.set()
        for job in batch:
            if job.error is None and job.tx is not None:
                self.feed.publish(job.tx.events)
                for call in job.tx.after_commit:
                    call()
        async with self._room:
            self._room.notify_all()

    def _run_batch(self, batch: list[_Job[Any]]) -> None:
        db = self._write_db
        assert db is not None
        now = self._clock.now()
        db.execute("BEGIN IMMEDIATE")
        try:
            for job in batch:
                self._run_job(db, job, now)
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    @staticmethod
    def _run_job(db: sqlite3.Connection, job: _Job[Any], now: float) -> None:
        job.tx = Tx(db, now)
        db.execute("SAVEPOINT job")
        try:
            job.value = job.work(job.tx)
        except Exception as error:  # noqa: BLE001 - handed to the caller that is waiting for it
            db.execute("ROLLBACK TO job")
            job.error = error
        db.execute("RELEASE job")

    def statistics(self) -> StoreStatistics:
        size_bytes = self.path.stat().st_size if self.path.exists() else 0
        return StoreStatistics(
            self._commits, self._jobs, len(self._urgent) + len(self._bulk), self._queued_bytes, size_bytes
        )

    async def aclose(self) -> None:
        """Commit what is queued, end the writer, close every connection."""
        with trio.CancelScope(shield=True):
            self._closing = True
            self._wake.set()
            await self._drained.wait()
            self._close_connections()

    def _close_connections(self) -> None:
        self._closed = True
        self._close_readers()
        for db in (self._peek_db, self._write_db):
            if db is not None:
                db.close()
        self._peek_db = self._write_db = None

    def _close_readers(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle_readers.pop().close()


def count_dropped(tx: Tx, kind: str, count: int) -> None:
    """Remember that retention removed ``count`` things, for `status` and the metrics."""
    if count > 0:
        tx.db.execute(
            "INSERT INTO store_drops(kind, count, last_at) VALUES (?, ?, ?) "
            "ON CONFLICT(kind) DO UPDATE SET count = count + excluded.count, last_at = excluded.last_at",
            (kind, count, tx.now),
        )


def drops(db: sqlite3.Connection) -> dict[str, int]:
    """How much retention has removed, by kind."""
    return dict(db.execute("SELECT kind, count FROM store_drops ORDER BY kind").fetchall())
