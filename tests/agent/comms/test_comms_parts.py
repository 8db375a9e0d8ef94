"""The pure parts of comms agents: event streams, queues, tokens, what a host has to tell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from osqbox.agent.comms.download import digest_of
from osqbox.agent.comms.effects import ServerEvent
from osqbox.agent.comms.facts import Fact, host_of, inventory, log_lines
from osqbox.agent.comms.messages import About, Stateful, code_of, read_order, read_orders, read_token, refused_items
from osqbox.agent.comms.queue import Queue
from osqbox.agent.comms.sse import MAX_EVENT_BYTES, EventParser, TooLarge
from osqbox.agent.comms.statistics import MAX_KINDS, Statistics
from osqbox.agent.profile import load_profile
from osqbox.agent.sql import Engine
from osqbox.agent.store import FileStore, MemoryStore, Store

from .strict_server import token_until

NOW = 1_767_225_600.0

# -- event streams -----------------------------------------------------------------------------------------------

STREAM = (
    b'retry: 2000\n\n: hello\n\nid: 7\nevent: command\ndata: {"a":1}\n\n'
    b"data: one\r\ndata:two\r\n\r\nid: 8\revent: reset\rdata: {}\r\rdata\n\n"
    b"id: x\x00y\ndata:  \xc3\xa9\n\nevent: half\ndata: ..."
)
EVENTS = [
    ServerEvent("command", "7", b'{"a":1}'),
    ServerEvent("message", "7", b"one\ntwo"),
    ServerEvent("reset", "8", b"{}"),
    ServerEvent("message", "8", b""),
    ServerEvent("message", "8", " é".encode()),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_a_stream_is_the_same_however_it_is_cut(size: int) -> None:
    parser = EventParser()
    pieces = (STREAM[at : at + size] for at in range(0, len(STREAM), size))
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
    assert parser.retry_ms == 2000


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 1000 + b"\n", b"x" * 1000])
def test_an_event_without_an_end_is_bounded(piece: bytes) -> None:
    parser = EventParser()
    pieces = [piece * 4] * (MAX_EVENT_BYTES // 500)
    with pytest.raises(TooLarge):
        [event for piece in pieces for event in parser.feed(piece)]


# -- queues ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Gives the same store again, as after a restart."""
    if request.param == "memory":
        store: Store = MemoryStore()
        yield lambda: store
        return
    stores: list[FileStore] = []

    def again() -> Store:
        if stores:
            stores.pop().close()
        stores.append(FileStore(tmp_path))
        return stores[0]

    yield again
    stores[0].close()


def test_a_queue_outlasts_a_restart_in_order(reopen: Any) -> None:
    queue = Queue("stateless", reopen(), 100)
    for number in range(30):
        assert queue.push(f"event {number} é".encode())
    queue.accepted(queue.head(40))
    left, size = len(queue), queue.size_bytes
    again = Queue("stateless", reopen(), 100)
    assert (len(again), again.size_bytes) == (left, size) == (26, size)
    assert again.head(10**6) == [f"event {number} é".encode() for number in range(4, 30)]
    assert again.push(b"last")
    assert again.head(10**6)[-1] == b"last"


def test_a_queue_hands_out_at_least_one_and_at_most_what_fits() -> None:
    queue = Queue("q", MemoryStore(), 10)
    assert queue.head(100) == []
    for item in (b"x" * 50, b"y" * 50, b"z"):
        queue.push(item)
    assert [len(item) for item in queue.head(10)] == [50]
    assert [len(item) for item in queue.head(100)] == [50, 50]
    queue.accepted(queue.head(10**6))
    assert (len(queue), queue.size_bytes, queue.head(1)) == (0, 0, [])


# -- words -------------------------------------------------------------------------------------------------------


def test_a_token_tells_when_it_expires() -> None:
    token = token_until(1234.5)
    assert read_token(json.dumps({"token": token}).encode()) == (token, 1234.5)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"token": 5}', b'{"token": "a.b"}', b'{"token": "a.e30.c"}', b'{"token": "a.W10.c"}', b"[" * 99999,
     b'{"token": "e30.\\n.x"}', b'{"token": "\\u00e9.e30.x"}'],
)  # fmt: skip
def test_what_is_no_token(body: bytes) -> None:
    assert read_token(body) is None


@pytest.mark.parametrize(
    "found", [None, 5, [], {}, {"document_id": "d"}, {"document_id": 5, "action": {"name": "x"}},
              {"document_id": "d", "action": "x"}, {"document_id": "d", "action": {"name": None}}],
)  # fmt: skip
def test_what_is_no_command(found: Any) -> None:
    assert read_order(found) is None
    assert read_orders(json.dumps({"commands": [found]}).encode()) == []


def test_refused_items_and_codes_of_odd_bodies() -> None:
    assert refused_items(b'{"results": [{"status": 409}, {"status": 201}, {}, 5, {"status": "x"}]}') == 2
    assert refused_items(b"nonsense") == refused_items(b'{"results": 5}') == code_of(b"[]") == 0


def test_a_deletion_has_no_data_line() -> None:
    gone = Stateful("inventory", "packages", "p1", "delete", None)
    assert gone.g1().count(b"\n") == 0
    assert "data" not in json.loads(gone.spike())


def test_digests_in_either_header() -> None:
    assert digest_of({"x-checksum-sha256": "AB" * 32}) == "ab" * 32
    assert digest_of({"repr-digest": "md5=:AAAA:, sha-256=:q6s=:"}) == "abab"
    assert digest_of({"repr-digest": "sha-256=:###:"}) is None
    assert digest_of({}) is None


def test_kinds_of_errors_are_bounded() -> None:
    statistics = Statistics()
    for number in range(3 * MAX_KINDS):
        statistics.error("login", f"{number}" + "x" * 1000)
    assert len(statistics.errors) == MAX_KINDS + 1
    assert sum(statistics.facts()["errors"].values()) == 3 * MAX_KINDS
    assert max(map(len, statistics.errors)) <= 160


# -- what a host has to tell -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ubuntu", "debian", "rhel", "macos", "windows"])
def test_every_profile_has_an_inventory_that_stays_and_logs(name: str) -> None:
    profile = load_profile(name)
    engine = Engine(schema=profile.schema)

    def read_at(at: float) -> Any:
        tables = profile.host(seed=1, index=2).tables(lambda: at)
        return lambda table: engine.raw_rows(table, tables=tables)

    host = host_of(read_at(NOW))
    assert host["hostname"]
    assert host["architecture"]
    assert host["os"]["type"] == {"macos": "macOS", "windows": "Windows"}.get(name, "Linux")
    assert About("a", host=host).user_agent("X").startswith("X/5.0.0 (Endpoint; ")
    facts, later = (list(inventory(read_at(at))) for at in (NOW, NOW + 1))
    keys = [(fact.collector, fact.id) for fact in facts]
    assert len(set(keys)) == len(keys), "ids are unique"
    assert {"hardware", "system", "networks", "packages", "processes"} <= {fact.collector for fact in facts}
    assert _unchanged(facts, later) > 0.9, "nothing that changes with every look"
    events = log_lines(read_at(NOW), NOW - 86_400 * 30, NOW, limit=5)
    assert 1 <= len(events) <= 5
    assert all(host["hostname"] in event.data["event"]["original"] for event in events)
    assert len(list(inventory(read_at(NOW), limit=2))) <= 14


def _unchanged(facts: list[Fact], later: list[Fact]) -> float:
    before = {(fact.collector, fact.id): fact.data for fact in facts}
    return sum(before.get((fact.collector, fact.id)) == fact.data for fact in later) / len(before)


def test_odd_rows_are_told_without_a_failure() -> None:
    odd = [{"pid": "x", "port": "1e999", "protocol": "6", "address": "", "start_time": "", "type_name": "user-process"}]
    facts = list(inventory(lambda _table: odd))
    assert {fact.collector for fact in facts} >= {"ports", "processes", "packages"}
    assert log_lines(lambda _table: odd, 0, time.time(), limit=3)
