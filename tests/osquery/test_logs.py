"""Log lines: stored as they came, once, found again, and dropped with a count."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from sqlite_utils import Database

from osqbox.osquery import logs, nodes
from osqbox.osquery.logs import LogFilter
from osqbox.osquery.messages import LogBatch, LogLine, decode, log_lines
from osqbox.osquery.tables import migrations
from osqbox.settings import Retention


def line(text: str, name: str | None = "q", action: str | None = "added") -> LogLine:
    return LogLine(text, name, action, 1)


def receive(world: Any, node: Any, *texts: str, log_type: str = "result", body: bytes = b"", at: str = "c1") -> int:
    lines = [line(text) for text in texts]
    stored: int = world.do(logs.receive, node, log_type, lines, body or "".join(texts).encode(), at)
    return stored


def kept(world: Any, which: LogFilter | None = None) -> list[str]:
    return list(logs.export(world.db, which or LogFilter()))


def test_lines_are_exported_as_osquery_wrote_them(world: Any) -> None:
    raw = b'{ "b":"\\u0041\xc3\xa9\\/",  "a": 1.50,"columns":{"z":"1","a":"2"} }'
    lines = log_lines(decode(b'{"log_type":"result","data":[' + raw + b"]}", LogBatch))
    node = world.node()
    world.do(logs.receive, node, "result", lines, b"", "c1")
    assert kept(world) == [raw.decode()]
    (found,) = logs.find(world.db, LogFilter())
    assert raw in found
    assert json.loads(found) == {
        "seq": 1, "tenant": "default", "node": node.id, "log_type": "result",
        "received_at": "2023-11-14T22:13:20.000000Z", "line": json.loads(raw),
    }  # fmt: skip


def test_equal_lines_all_count_but_a_body_sent_again_does_not(world: Any) -> None:
    """Sent again means: by the same node, of the same kind, on another connection, within a minute."""
    node, other = world.node("a"), world.node("b")
    assert receive(world, node, "x", "x") == 2
    assert receive(world, node, "x", "x") == 2
    assert receive(world, node, "x", "x", at="c2") == 0
    assert receive(world, node, "x", "x", at="c2", log_type="status") == 2
    assert receive(world, other, "x", "x", at="c2") == 2
    world.now += 61
    assert receive(world, node, "x", "x", at="c3") == 2
    assert kept(world) == ["x"] * 10


def test_an_empty_batch_is_fine_and_no_event(world: Any) -> None:
    node = world.node()
    assert receive(world, node) == 0
    assert "log_received" not in world.kinds()
    receive(world, node, "x", "y")
    assert world.events[-1].data == {"log_type": "result", "lines": 2}


@pytest.fixture
def filled(world: Any) -> Any:
    world.web, world.db_host = world.node("web"), world.node("db")
    receive(world, world.web, '{"n":"One"}', '{"n":"Two"}')
    receive(world, world.db_host, '{"n":"three"}', log_type="status")
    snapshot = LogLine('{"n":"four"}', "pack_x", "snapshot", None)
    batch = LogLine('{"n":"five"}', "pack_x", None, None)
    world.do(logs.receive, world.web, "result", [snapshot, batch], b"s", "c9")
    return world


def names(found: list[bytes]) -> list[str]:
    return [json.loads(one)["line"]["n"] for one in found]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({}, ["One", "Two", "three", "four", "five"]),
        ({"log_type": "status"}, ["three"]),
        ({"name": "pack_x"}, ["four", "five"]),
        ({"search": "t"}, ["Two", "three"]),
        ({"search": "TW"}, ["Two"]),
        ({"search": "%"}, []),
        ({"actions": ("added", "snapshot")}, ["One", "Two", "three", "four"]),
        ({"snapshots": True}, ["four"]),
        ({"snapshots": False}, ["One", "Two", "three", "five"]),
        ({"tenant": "acme"}, []),
        ({"tenant": "default", "log_type": "result", "search": "f"}, ["four", "five"]),
    ],
)
def test_lines_are_found_by_what_they_are(filled: Any, which: dict[str, Any], expected: list[str]) -> None:
    wanted = LogFilter(**which)
    assert names(logs.find(filled.db, wanted)) == expected
    assert names(logs.latest(filled.db, wanted, limit=100)) == expected
    assert len(kept(filled, wanted)) == len(expected)


def test_lines_are_found_by_node_and_place(filled: Any) -> None:
    web = LogFilter(node=filled.web.id)
    assert names(logs.find(filled.db, web, after=2)) == ["four", "five"]
    assert names(logs.find(filled.db, web, limit=3)) == ["One", "Two", "four"]
    assert names(logs.latest(filled.db, web, limit=3)) == ["Two", "four", "five"]
    assert logs.before_latest(filled.db, web, 3) == 1
    assert logs.before_latest(filled.db, LogFilter(tenant="acme"), 3) == logs.last_seq(filled.db) == 5


def test_a_page_of_large_lines_ends_early(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FOUND_BYTES", 500)
    receive(world, world.node(), *(json.dumps({"n": "x" * 300}) for _ in range(5)))
    assert len(logs.find(world.db, LogFilter())) == 2
    assert len(logs.find(world.db, LogFilter(), after=4)) == 1


def test_the_oldest_lines_are_dropped_and_counted(world: Any) -> None:
    node = world.node()
    for number in range(20):
        receive(world, node, f"{number}")
    world.do(logs.prune, Retention(log_lines=15, log_age_s=3600))
    assert kept(world) == [str(number) for number in range(5, 20)]
    assert world.db.execute("SELECT count FROM store_drops WHERE kind = 'logs'").fetchone() == (5,)
    assert world.events[-1].data == {"lines": 5}
    assert world.do(logs.prune, Retention(log_lines=15, log_age_s=3600)) is False
    assert logs.last_seq(world.db) == 20


def test_old_lines_are_dropped_and_counted(world: Any) -> None:
    node = world.node()
    receive(world, node, "old")
    world.now += 100
    receive(world, node, "new")
    world.do(logs.prune, Retention(log_lines=1000, log_age_s=50))
    assert kept(world) == ["new"]


def test_what_is_dropped_is_counted_also_when_the_clock_was_set_back(world: Any) -> None:
    node = world.node()
    for step in (0, 500, -500, 500):
        world.now += step
        receive(world, node, str(world.now))
    world.now += 60
    world.do(logs.prune, Retention(log_lines=1000, log_age_s=100))
    dropped = world.db.execute("SELECT count FROM store_drops WHERE kind = 'logs'").fetchone()[0]
    assert dropped + len(kept(world)) == 4


def test_a_great_pile_is_dropped_in_steps(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step must not keep everybody else from writing."""
    monkeypatch.setattr(logs, "PRUNE_LINES", 4)
    receive(world, world.node(), *map(str, range(10)))
    steps = 1
    while world.do(logs.prune, Retention(log_lines=1, log_age_s=3600)):
        steps += 1
    assert (steps, kept(world)) == (3, ["9"])


def real_bytes(world: Any) -> int:
    return sum(len(text.encode()) for text in kept(world))


def test_lines_are_bounded_in_bytes(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, just as many as must; what is counted is what is kept, whatever else is dropped."""
    node = world.node()
    monkeypatch.setattr(logs, "PRUNE_BYTES", 150)
    for number in range(9):
        receive(world, node, f"{number}" * 40, f"é\x00{number}" * 10)
    assert logs.size_bytes(world.db) == real_bytes(world) == 9 * 80
    assert world.do(logs.prune, Retention(log_bytes=720)) is False
    assert len(kept(world)) == 18
    assert world.do(logs.prune, Retention(log_bytes=330)) is True  # a step, then the rest
    assert world.do(logs.prune, Retention(log_bytes=330)) is True
    assert world.do(logs.prune, Retention(log_bytes=330)) is False
    assert logs.size_bytes(world.db) == real_bytes(world) == 320
    assert kept(world)[0] == "5" * 40
    assert world.db.execute("SELECT count FROM store_drops WHERE kind = 'logs'").fetchone() == (10,)
    while world.do(logs.prune, Retention(log_lines=3)):
        pass
    assert logs.size_bytes(world.db) == real_bytes(world) == 120
    world.now += 100
    while world.do(logs.prune, Retention(log_age_s=50)):
        pass
    assert logs.size_bytes(world.db) == real_bytes(world) == 0
    receive(world, node, "x" * 500)
    world.do(logs.prune, Retention(log_bytes=1))
    assert kept(world) == []


def test_a_batch_that_is_not_stored_is_not_counted(world: Any) -> None:
    node = world.node()
    receive(world, node, "abc")
    receive(world, node, "abc", at="c2")
    assert logs.size_bytes(world.db) == 3


def test_a_database_from_before_is_measured_once() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrations.apply(Database(db), stop_before="m006_log_bytes")
        insert = "INSERT INTO osquery_logs(tenant, node, log_type, received_at, line) VALUES ('', '', '', 0, ?)"
        db.executemany(insert, [("é",), ("a\x00b",)])
        migrations.apply(Database(db))
        assert logs.size_bytes(db) == 5


def test_what_is_kept_is_looked_at_by_key(world: Any) -> None:
    """With nothing to drop no line's text is read, and nothing is added up."""
    receive(world, world.node(), "x", "y")
    seen: list[str] = []
    world.db.set_trace_callback(seen.append)
    world.do(logs.prune, Retention())
    world.db.set_trace_callback(None)
    assert not [sql for sql in seen if "line" in sql or "sum" in sql]


def test_lines_of_a_deleted_node_stay(world: Any) -> None:
    node = world.node()
    receive(world, node, "x")
    world.do(nodes.delete, node.id)
    assert kept(world, LogFilter(node=node.id)) == ["x"]
