"""Stateless events in SQLite: once each, found by word, apart by tenant, dropped oldest first and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osqbox.comms.sqlite import events as table
from osqbox.comms.sqlite.events import SqliteEvents
from osqbox.store import drops

from ._events import NOW, Rig, event, run


def numbers(found: Any) -> list[int]:
    return [number for number, _ in found]


def test_an_event_comes_back_as_it_was(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        told = event(1, data={"message": 'ümläut \n \\ "quoted"', "n": [1, {"deep": None}]})
        await rig.keep(told)
        assert await rig.events.search() == [(1, told)]
        await rig.keep(msgspec.structs.replace(told, id="other", data=msgspec.Raw(b'{"raw":1}')))
        assert (await rig.events.search(limit=1))[0][1].data == {"raw": 1}

    run(test, tmp_path)


def test_an_id_that_is_stored_is_skipped(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.keep(event(1), event(2), event(1))
        await rig.keep(event(2), event(3))
        assert [each.id for _, each in await rig.events.search()] == ["a1-3", "a1-2", "a1-1"]
        assert rig.kinds() == [
            ("comms_events_stored", "default", {"count": 2}),
            ("comms_events_stored", "default", {"count": 1}),
        ]
        assert await rig.events.last() == 3
        assert rig.store.peek(table.size)[0] == 3

    run(test, tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_events_are_found(tmp_path: Path, indexed: bool) -> None:
    async def test(rig: Rig) -> None:
        await rig.keep(
            event(1, data={"message": "Accepted password for root from 10.0.0.5 port 22"}),
            event(2, data={"message": "Failed password\nfor Müller", "path": "C:\\new\\table"}),
            event(3, agent="a2", tenant="blue", module="fim", data={"path": "/etc/shadow"}),
        )
        log = SqliteEvents(rig.store, indexed=indexed)
        assert numbers(await log.search()) == [3, 2, 1]
        for text, wanted in {
            "password": [2, 1],
            "PASSWORD accepted": [1],
            "passw": [2, 1],
            "10.0.0.5": [1],
            "/etc/shadow": [3],
            "for": [2, 1],
            "new": [2],
            "table": [2],
            "absent": [],
            "password absent": [],
            '"': [3, 2, 1],
            'x" OR "password': [],
            "NOT": [],
            "*": [],
            "accepted\0pass": [1],
            "\0": [3, 2, 1],
        }.items():
            assert numbers(await log.search(text=text)) == wanted, text
        if indexed:
            assert numbers(await log.search(text="müller")) == [2]
        assert numbers(await log.search(tenant="blue")) == [3]
        assert numbers(await log.search(tenant="default", text="etc")) == []
        assert numbers(await log.search(agent="a1", before=2)) == [1]
        assert numbers(await log.search(module="fim")) == [3]
        assert numbers(await log.search(since=NOW + 2, until=NOW + 2)) == [2]
        assert numbers(await log.search(text="password", limit=1)) == [2]
        assert numbers(await log.search(text="password", before=2)) == [1]

    run(test, tmp_path)


def test_without_fts5_everything_works_but_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_has_fts5", lambda _: False)

    async def test(rig: Rig) -> None:
        tables = rig.store.peek(lambda db: [name for (name,) in db.execute("SELECT name FROM sqlite_master")])
        assert "comms_events" in tables
        assert "comms_event_words" not in tables
        await rig.keep(event(1, data={"message": "password"}), event(2))
        assert numbers(await rig.events.search(text="pass")) == [1]
        await rig.store.write(lambda tx: table.prune(tx, keep_rows=1))
        assert numbers(await rig.events.search(text="pass")) == []

    run(test, tmp_path)


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        ({"tenant": "blue"}, "comms_events_tenant"),
        ({"tenant": "blue", "agent": "a1"}, "comms_events_agent"),
        ({"tenant": "blue", "text": "word"}, "VIRTUAL TABLE"),
    ],
)
def test_nothing_is_sorted_to_be_found(tmp_path: Path, which: Any, wanted: str) -> None:
    async def test(rig: Rig) -> None:
        explained: list[str] = []

        class Explaining:
            def __init__(self, db: Any) -> None:
                self.db = db

            def execute(self, statement: str, values: Any = ()) -> Any:
                if "comms_events" in statement and "LIMIT" in statement:
                    explained.extend(row[3] for row in self.db.execute(f"EXPLAIN QUERY PLAN {statement}", values))
                return self.db.execute(statement, values)

        def look(db: Any) -> None:
            table.search(Explaining(db), table.EventFilter(**which), 10, 5, indexed=True)  # type: ignore[arg-type]
            table.after(Explaining(db), table.EventFilter(**which), 10, 5, indexed=True)  # type: ignore[arg-type]

        await rig.store.read(look)
        assert sum(wanted in step for step in explained) == 2, explained
        assert not [step for step in explained if "TEMP B-TREE" in step]

    run(test, tmp_path)


def test_events_are_followed(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.keep(*(event(n, data={"even" if n % 2 == 0 else "odd": n}) for n in range(1, 8)))
        reached, found = await rig.events.after(2, limit=2)
        assert (reached, numbers(found)) == (4, [3, 4])
        reached, found = await rig.events.after(0, text="even", limit=10)
        assert (reached, numbers(found)) == (7, [2, 4, 6]), "what was looked through is not looked through again"
        assert await rig.events.after(7) == (7, [])
        assert await rig.events.after(99) == (99, [])

    run(test, tmp_path)


def test_the_oldest_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PRUNE_ROWS", 4)

    async def test(rig: Rig) -> None:
        await rig.keep(*(event(n, data={"word": f"w{n}x"}) for n in range(1, 11)))
        steps = 0
        while await rig.store.write(lambda tx: table.prune(tx, keep_rows=3)):
            steps += 1
        assert steps == 1
        assert numbers(await rig.events.search()) == [10, 9, 8]
        assert numbers(await rig.events.search(text="w3x")) == []
        assert numbers(await rig.events.search(text="w9x")) == [9]
        assert rig.store.peek(drops) == {"comms_events": 7}
        assert [data for kind, _, data in rig.kinds() if kind == "comms_events_dropped"] == [{"count": 4}, {"count": 3}]
        left = rig.store.peek(table.size)[1]
        assert left == sum(len(msgspec.json.encode(each.data)) for _, each in await rig.events.search())
        assert not await rig.store.write(lambda tx: table.prune(tx, keep_rows=3))
        await rig.keep(event(11))
        assert numbers(await rig.events.search(limit=1)) == [11], "a number is never given again"

    run(test, tmp_path)


def test_the_index_of_words_holds_nothing_of_what_was_dropped(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        secret = {"message": 'line one\nline\ttwo \\ back\\slash "quoted" ünïcode'}
        await rig.keep(event(1, data=secret), event(2))
        await rig.store.write(lambda tx: table.prune(tx, keep_rows=0))

        def check(tx: Any) -> list[Any]:
            tx.db.execute("INSERT INTO comms_event_words(comms_event_words) VALUES('integrity-check')")
            tx.db.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab(main, comms_event_words, 'row')")
            return tx.db.execute("SELECT term FROM temp.terms").fetchall()  # type: ignore[no-any-return]

        assert await rig.store.write(check) == []

    run(test, tmp_path)


def test_events_are_bounded_in_bytes(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.keep(*(event(n, data="x" * 98) for n in range(1, 11)))
        assert rig.store.peek(table.size) == (10, 1000)
        await rig.store.write(lambda tx: table.prune(tx, keep_bytes=250))
        assert numbers(await rig.events.search()) == [10, 9]
        assert rig.store.peek(table.size) == (2, 200)

    run(test, tmp_path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_any_search_is_answered(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    async def test(rig: Rig) -> None:
        await rig.keep(*(event(n, data={"message": text}) for n, text in enumerate(texts)))
        for text in texts:
            found = await rig.events.search(text=text)
            assert len(found) <= len(texts)

    run(test, tmp_path_factory.mktemp("any"))
