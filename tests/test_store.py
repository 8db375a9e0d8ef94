"""The store: group commit, acknowledged means on disk, and everything that can go wrong on the way there."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import trio
import trio.testing
from sqlite_utils import Database, Migrations

from osqbox import store as store_module
from osqbox.errors import BadSetup
from osqbox.feed import Feed
from osqbox.store import Store, Tx, count_dropped, drops

T0 = 1_700_000_000.0


class StoppedClock:
    def now(self) -> float:
        return T0


def notes() -> Migrations:
    migrations = Migrations("notes")

    @migrations()
    def m001(db: Database) -> None:
        db.conn.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT UNIQUE)")

    return migrations


def open_store(path: Path, *more: Migrations) -> Store:
    return Store.open(path, (notes(), *more), StoppedClock(), Feed())


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Store]:
    store = open_store(path)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                yield store
            finally:
                await store.aclose()


def add(text: str) -> Callable[[Tx], int | None]:
    return lambda tx: tx.db.execute("INSERT INTO notes(text) VALUES (?)", (text,)).lastrowid


def texts(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT text FROM notes ORDER BY id")]


def stored(path: Path) -> list[str]:
    """What another process would find in the file."""
    db = sqlite3.connect(path)
    try:
        return texts(db)
    finally:
        db.close()


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


class Gate:
    """Keeps the writer's thread busy with one job until it is opened."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self._store = store
        self._nursery = nursery
        self._entered = threading.Event()
        self._opened = threading.Event()

    def _work(self, tx: Tx) -> None:
        self._entered.set()
        assert self._opened.wait(10)

    async def __aenter__(self) -> Self:
        self._nursery.start_soon(self._store.write, self._work)
        assert await trio.to_thread.run_sync(self._entered.wait, 10)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened.set()

    def open(self) -> None:
        self._opened.set()


def test_a_written_value_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "a.db"
        async with running(path) as store:
            assert await store.write(add("one")) == 1
            assert stored(path) == ["one"]
            assert store.peek(texts) == ["one"]
            assert await store.read(texts) == ["one"]

    trio.run(main)


def test_the_file_survives_power_loss_and_is_private(tmp_path: Path) -> None:
    """synchronous=FULL in WAL mode; nobody else may read the file or its log, whatever the umask."""

    async def main() -> None:
        path = tmp_path / "a.db"
        async with running(path) as store:
            settings = await store.write(
                lambda tx: [tx.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
            )
            assert settings == [2, "wal"]
            await store.write(add("one"))
            assert modes(tmp_path) == {"a.db": 0o600, "a.db-shm": 0o600, "a.db-wal": 0o600}

    trio.run(main)


def test_a_failing_job_undoes_only_itself(tmp_path: Path) -> None:
    """Neighbours of the same commit stay; the caller gets the job's own exception, its events never happened."""

    def fails_late(tx: Tx) -> None:
        add("half")(tx)
        tx.emit("half_done")
        raise LookupError("not this one")

    async def main() -> None:
        path = tmp_path / "a.db"
        errors: list[Exception] = []

        async def attempt(store: Store, work: Callable[[Tx], Any]) -> None:
            try:
                await store.write(work)
            except (LookupError, sqlite3.IntegrityError) as error:
                errors.append(error)

        async with running(path) as store:
            follower = store.feed.subscribe()
            async with trio.open_nursery() as nursery, Gate(store, nursery):
                for work in (add("a"), fails_late, add("b"), add("a"), add("c")):
                    nursery.start_soon(attempt, store, work)
                await trio.testing.wait_all_tasks_blocked(0.01)
            await store.write(lambda tx: tx.emit("all_done"))
            assert sorted(store.peek(texts)) == ["a", "b", "c"]
            assert {type(error) for error in errors} == {LookupError, sqlite3.IntegrityError}
            assert follower.next_nowait().kind == "all_done"  # type: ignore[union-attr]

    trio.run(main)


def test_many_callers_share_one_commit(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a.db") as store, trio.open_nursery() as nursery:
            async with Gate(store, nursery):
                for number in range(200):
                    nursery.start_soon(store.write, add(str(number)))
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert store.statistics().queued_jobs == 200
            await store.write(lambda tx: None)
            statistics = store.statistics()
            assert statistics.jobs == 202
            assert statistics.commits <= 3
            assert len(store.peek(texts)) == 200

    trio.run(main)


def test_urgent_jobs_pass_waiting_bulk_jobs(tmp_path: Path) -> None:
    async def main() -> None:
        order: list[str] = []

        def mark(word: str) -> Callable[[Tx], None]:
            return lambda tx: order.append(word)

        async with running(tmp_path / "a.db") as store, trio.open_nursery() as nursery, Gate(store, nursery):
            for _ in range(3):
                nursery.start_soon(lambda: store.write(mark("bulk"), bulk=True))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(store.write, mark("urgent"))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert order == ["urgent", "bulk", "bulk", "bulk"]

    trio.run(main)


def test_a_cancelled_caller_leaves_and_the_others_are_acknowledged(tmp_path: Path) -> None:
    """Of callers with random deadlines, none that was acknowledged is missing and nothing is there twice."""

    async def main() -> None:
        path = tmp_path / "a.db"
        acknowledged: list[str] = []

        async def impatient(store: Store, number: int) -> None:
            with trio.move_on_after((number % 7) / 1000):
                await store.write(add(str(number)))
                acknowledged.append(str(number))

        async with running(path) as store:
            async with trio.open_nursery() as nursery:
                for number in range(500):
                    nursery.start_soon(impatient, store, number)
            assert await store.write(lambda tx: 1) == 1
        found = stored(path)
        assert set(acknowledged) <= set(found)
        assert len(found) == len(set(found))

    trio.run(main)


def test_bulk_jobs_wait_for_room_and_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "QUEUE_JOBS", 5)

    async def main() -> None:
        path = tmp_path / "a.db"
        async with running(path) as store, trio.open_nursery() as nursery, Gate(store, nursery):
            for number in range(40):
                nursery.start_soon(lambda number=number: store.write(add(str(number)), bulk=True, weight_bytes=10))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert store.statistics().queued_jobs == 5
            assert store.statistics().queued_bytes == 50
        assert len(stored(path)) == 40

    trio.run(main)


def test_one_job_heavier_than_the_queue_is_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "QUEUE_BYTES", 100)

    async def main() -> None:
        async with running(tmp_path / "a.db") as store:
            assert await store.write(add("heavy"), bulk=True, weight_bytes=1000) == 1
            assert store.statistics().queued_bytes == 0

    trio.run(main)


def test_close_writes_what_is_queued_and_refuses_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who still waited for room are refused, not forgotten."""
    monkeypatch.setattr(store_module, "QUEUE_JOBS", 3)

    async def main() -> None:
        path = tmp_path / "a.db"
        outcomes: list[str] = []

        async def attempt(store: Store, number: int) -> None:
            try:
                await store.write(add(str(number)), bulk=True)
            except trio.ClosedResourceError:
                outcomes.append("refused")
            else:
                outcomes.append("written")

        with trio.fail_after(10):
            store = open_store(path)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                gate = await Gate(store, nursery).__aenter__()
                for number in range(10):
                    nursery.start_soon(attempt, store, number)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.start_soon(store.aclose)
                await trio.testing.wait_all_tasks_blocked(0.01)
                gate.open()
            assert outcomes.count("written") == len(stored(path)) >= 3
            assert len(outcomes) == 10
            with pytest.raises(trio.ClosedResourceError):
                await store.write(add("late"))
            await store.aclose()

    trio.run(main)


def test_reading_goes_on_while_the_writer_is_busy(tmp_path: Path) -> None:
    """A long transaction blocks neither readers nor lookups on the loop, and they see only what is committed."""

    async def main() -> None:
        async with running(tmp_path / "a.db") as store, trio.open_nursery() as nursery:
            await store.write(add("before"))
            async with Gate(store, nursery):
                nursery.start_soon(store.write, add("after"))
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert await store.read(texts) == ["before"]
                assert store.peek(texts) == ["before"]

    trio.run(main)


def test_readers_cannot_write(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a.db") as store:
            for attempt in (lambda: store.read(lambda db: db.execute("DELETE FROM notes")), None):
                with pytest.raises(sqlite3.OperationalError):
                    await attempt() if attempt else store.peek(lambda db: db.execute("DELETE FROM notes"))

    trio.run(main)


def test_a_reader_sees_one_moment(tmp_path: Path) -> None:
    """Two statements of one read agree, even when a write is committed between them."""

    async def main() -> None:
        entered, go_on = threading.Event(), threading.Event()

        def twice(db: sqlite3.Connection) -> tuple[list[str], list[str]]:
            first = texts(db)
            entered.set()
            assert go_on.wait(10)
            return first, texts(db)

        async with running(tmp_path / "a.db") as store, trio.open_nursery() as nursery:
            await store.write(add("one"))
            seen: list[Any] = []

            async def read() -> None:
                seen.append(await store.read(twice))

            nursery.start_soon(read)
            assert await trio.to_thread.run_sync(entered.wait, 10)
            await store.write(add("two"))
            go_on.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            while not seen:
                await trio.sleep(0.001)
            assert seen == [(["one"], ["one"])]
            assert await store.read(texts) == ["one", "two"]

    trio.run(main)


def test_a_read_that_fails_halfway_leaves_no_reader_in_the_past(tmp_path: Path) -> None:
    """The exception keeps the half-read statement alive; later reads must see later writes all the same."""

    def half(db: sqlite3.Connection) -> None:
        rows = db.execute("SELECT text FROM notes ORDER BY id")
        next(rows)
        raise LookupError

    async def main() -> None:
        async with running(tmp_path / "a.db") as store:
            for number in range(10):
                await store.write(add(str(number)))
            kept: list[Exception] = []
            for _ in range(6):
                try:
                    await store.read(half)
                except LookupError as error:
                    kept.append(error)
            await store.write(add("new"))
            for _ in range(6):
                assert (await store.read(texts))[-1] == "new"

    trio.run(main)


class BrokenCommit(sqlite3.Connection):
    """A disk that is full whenever something is committed."""

    is_full = False

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and BrokenCommit.is_full:
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *args)


def test_a_failed_commit_reaches_every_caller_and_nothing_of_it_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and the store works again when the disk does."""
    real_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **named: real_connect(*args, factory=BrokenCommit, **named))
    monkeypatch.setattr(BrokenCommit, "is_full", False)

    async def main() -> None:
        path = tmp_path / "a.db"
        told: list[str] = []

        async def attempt(store: Store, text: str) -> None:
            with pytest.raises(sqlite3.OperationalError, match="disk is full"):
                await store.write(add(text))
            told.append(text)

        async with running(path) as store:
            follower = store.feed.subscribe()
            BrokenCommit.is_full = True
            async with trio.open_nursery() as nursery:
                for text in ("a", "b", "c"):
                    nursery.start_soon(attempt, store, text)
            BrokenCommit.is_full = False
            assert sorted(told) == ["a", "b", "c"]
            assert store.peek(texts) == []
            assert follower.next_nowait() is None
            await store.write(add("a"))
            assert stored(path) == ["a"]

    trio.run(main)


def test_a_writer_that_breaks_leaves_nobody_waiting(tmp_path: Path) -> None:
    """A bug in what runs after a commit ends the store loudly; who waits is told, and closing does not hang."""

    def poison(tx: Tx) -> None:
        tx.after_commit.append(lambda: 1 // 0)

    async def main() -> None:
        store = open_store(tmp_path / "a.db")
        outcomes: list[str] = []

        async def attempt(work: Callable[[Tx], Any]) -> None:
            with trio.CancelScope(shield=True):
                try:
                    await store.write(work)
                    outcomes.append("written")
                except trio.ClosedResourceError:
                    outcomes.append("refused")

        async def live_and_break() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                try:
                    async with Gate(store, nursery):
                        nursery.start_soon(attempt, poison)
                        await trio.testing.wait_all_tasks_blocked(0.01)
                        for number in range(store_module.BATCH_JOBS + 1):
                            nursery.start_soon(attempt, add(str(number)))
                        await trio.testing.wait_all_tasks_blocked(0.01)
                    await trio.sleep_forever()
                finally:
                    await store.aclose()

        with trio.fail_after(10):
            try:
                await live_and_break()
            except* ZeroDivisionError:
                outcomes.append("broken")
        assert {"written", "broken", "refused"} == set(outcomes)
        assert outcomes.count("written") == len(stored(tmp_path / "a.db")) + 1

    trio.run(main)


def test_migrations_are_applied_once_and_added_later(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    more = Migrations("more")

    @more()
    def m001(db: Database) -> None:
        db.conn.execute("CREATE TABLE more (id INTEGER PRIMARY KEY)")

    async def once(*migrations: Migrations) -> list[str]:
        store = open_store(path, *migrations)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                await store.write(lambda tx: tx.db.execute("INSERT INTO notes(text) VALUES (NULL)"))
                tables = store.peek(
                    lambda db: db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
                )
                return [name for (name,) in tables]
            finally:
                await store.aclose()

    assert "more" not in trio.run(once)
    assert "more" in trio.run(once, more)
    assert len(trio.run(once, more)) == len(set(trio.run(once, more)))
    assert len(stored(path)) == 4


def test_a_failing_migration_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    broken = Migrations("broken")

    @broken()
    def m001(db: Database) -> None:
        db.conn.execute("CREATE TABLE half (id INTEGER)")
        db.conn.execute("CREATE TABLE notes (id INTEGER)")

    with pytest.raises(BadSetup, match="already exists"):
        open_store(path, broken)
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    db.close()


@pytest.mark.parametrize("how", ["text", "directory", "missing folder", "not writable"])
def test_an_unusable_file_is_told_with_a_hint(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    if how == "text":
        path.write_text("this is no database, and long enough to be sure of that\n" * 50)
    elif how == "directory":
        path.mkdir()
    elif how == "missing folder":
        path = tmp_path / "nowhere" / "a.db"
    else:
        monkeypatch.setattr(Path, "chmod", lambda self, mode: (_ for _ in ()).throw(PermissionError(1, "not yours")))
    with pytest.raises(BadSetup, match=r"cannot use the database .*expected .*got") as caught:
        open_store(path)
    assert "--data" in str(caught.value.hint)


def test_drops_are_counted_by_kind(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a.db") as store:
            await store.write(lambda tx: [count_dropped(tx, "logs", n) for n in (5, 0, 7)])
            await store.write(lambda tx: count_dropped(tx, "events", 0))
            assert store.peek(drops) == {"logs": 12}

    trio.run(main)


def test_statistics_tell_queue_and_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a.db") as store:
            await store.write(add("one"))
            statistics = store.statistics()
            assert (statistics.commits, statistics.jobs, statistics.queued_jobs) == (1, 1, 0)
            assert statistics.file_bytes > 0

    trio.run(main)
