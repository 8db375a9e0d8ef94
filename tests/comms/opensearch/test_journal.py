"""The journal when things go wrong: nothing twice, nothing lost, no box left behind without knowing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.comms.errors import IndexerDown
from osqbox.comms.messages import Change, KnownCommand, Result
from osqbox.comms.opensearch import journal

from ._boxes import Box, Boxes, ids, level, offered, tail_gone, until, with_boxes
from .standin import StandIn

CREATED = r"PUT /\S*journal/_create/\d"
STORED = r"/t\w+-commands/_bulk"


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def _soon_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a box does not settle, another one does after a moment."""
    monkeypatch.setattr(journal, "SETTLE_S", 0.3)
    monkeypatch.setattr(journal, "SETTLE_COMMANDS_PER_S", 10_000)


def entries(standin: StandIn, boxes: Boxes) -> list[int]:
    return sorted(
        document["n"] for document in standin.documents(boxes.index("journal")).values() if document["kind"] == "entry"
    )


# an answer that did not come


@pytest.mark.parametrize("times", [1, 3])
def test_an_entry_whose_creation_was_not_confirmed_is_there_once(standin: StandIn, tmp_path: Path, times: int) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        await a.publish("a")
        standin.drop(CREATED, times=times)
        [command] = await a.publish("a")
        await b.publish("a")
        await level(a, b)
        assert await offered(a) == await offered(b) == ["A1", command.id, "B1"]
        assert entries(standin, boxes) == [1, 2, 3]
        assert a.journal.statistics()["counts"]["unconfirmed"] == 1

    with_boxes(standin.url, tmp_path, test)


def test_an_entry_that_came_late_is_not_written_again(standin: StandIn, tmp_path: Path, monkeypatch: Any) -> None:
    """The indexer processes it after the box has given up waiting for the answer."""
    monkeypatch.setattr("osqbox.comms.opensearch.client.REQUEST_S", 0.3)

    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        await a.publish("a")
        standin.slow(0.6, CREATED, times=1)
        await a.publish("a")
        await b.publish("a")
        await trio.sleep(0.5)
        await level(a, b)
        assert await offered(a) == await offered(b) == ["A1", "A2", "B1"]
        assert entries(standin, boxes) == [1, 2, 3]

    with_boxes(standin.url, tmp_path, test)


def test_publications_in_a_storm_of_failures_are_once_or_refused(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        acknowledged: list[tuple[int, str]] = []
        refused = 0

        async def publish(box: Box) -> None:
            nonlocal refused
            for _ in range(12):
                try:
                    acknowledged.extend((each.seq, each.id) for each in await box.publish("a"))
                except IndexerDown:
                    refused += 1
                    await box.client.wait_up()

        async def trouble() -> None:
            for turn in range(6):
                standin.drop(CREATED, times=1)
                standin.fail(503, STORED, times=1)
                standin.fail(429, CREATED, times=1)
                standin.reject_items(1)
                await trio.sleep(0.1)
                if turn == 3:
                    standin.stop()
                    await trio.sleep(0.3)
                    standin.start()
            standin.mend()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trouble)
            for box in (a, b):
                nursery.start_soon(publish, box)
        await a.client.wait_up()
        await b.client.wait_up()
        await a.publish("a")
        await level(a, b)
        there = await offered(a, limit=1000)
        assert there == await offered(b, limit=1000)
        assert len(there) == len(set(there))
        told = [name for _, name in sorted(acknowledged)]
        assert [each for each in there if each in told] == told

    with_boxes(standin.url, tmp_path, test)


def test_while_the_indexer_is_down_a_publication_is_refused_at_once(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        await a.publish("a")
        standin.stop()
        with pytest.raises(IndexerDown):
            await a.publish("a")
        with trio.fail_after(0.5), pytest.raises(IndexerDown):
            await a.publish("a")
        with pytest.raises(IndexerDown):
            await a.journal.tell(Change(kind="agents"))
        standin.start()
        await a.client.wait_up()
        await a.publish("a")
        assert (await offered(a))[0] == "A1"

    with_boxes(standin.url, tmp_path, test, "A")


def test_a_stream_lives_through_an_indexer_that_was_away(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        async with b.attach() as stream:
            assert await stream.next(0.05) is None
            standin.stop()
            await trio.sleep(0.2)
            standin.start()
            await a.client.wait_up()
            await a.publish("a")
            item: Any = await stream.next(5)
            assert ids(item.commands) == ["A1"]

    with_boxes(standin.url, tmp_path, test)


# boxes that die


def test_who_reads_an_entry_stores_what_its_dead_author_could_not(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        standin.slow(30, STORED, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, a, "a", "b")
            await until(lambda: b.journal.head == 1)
            a.kill()
        assert standin.documents(boxes.index("commands")) == {}
        async with b.attach() as stream:
            item: Any = await stream.next(5)
            assert ids(item.commands) == ["A1"]
        assert set(standin.documents(boxes.index("commands"))) == {"A1"}
        await until(lambda: b.journal.settled >= 1)  # also for an agent that nobody asks for
        assert set(standin.documents(boxes.index("commands"))) == {"A1", "A2"}

    with_boxes(standin.url, tmp_path, test)


@pytest.mark.usefixtures("_soon_settled")
def test_a_box_that_starts_settles_what_the_last_one_left(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box) -> None:
        await a.publish("a")
        await until(lambda: a.journal.settled == 1)
        standin.slow(30, STORED, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, a, "a", "b")
            await until(lambda: a.journal.head == 2)
            a.kill()
        b = await boxes.start("B")
        await until(lambda: b.journal.head == 2)
        assert await offered(b) == ["A1", "A2"]
        assert await b.commands.take_result("b", "A3", Result(code=0), 0) == "taken"
        await until(lambda: b.journal.settled == 2)
        assert (await b.found("A3")).status == "success"

    with_boxes(standin.url, tmp_path, test, "A")


@pytest.mark.usefixtures("_soon_settled")
def test_a_large_publication_of_a_dead_box_is_settled_whole(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        standin.slow(30, STORED, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(quietly, a, *["a"] * 1500)
            await until(lambda: b.journal.head == 1)
            a.kill()
        await until(lambda: b.journal.settled == 1)
        assert len(standin.documents(boxes.index("commands"))) == 1500
        assert await offered(b, limit=2000) == [f"A{n}" for n in range(1, 1501)]

    with_boxes(standin.url, tmp_path, test)


async def quietly(box: Box, *agents: str) -> None:
    """Publish as a request whose box is killed: no answer."""
    with trio.CancelScope() as scope:
        box.ends_with(scope)
        await box.publish(*agents)


def test_who_waits_when_the_box_stops_is_told(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        async def refused() -> None:
            with pytest.raises(IndexerDown):
                await a.publish("a")

        standin.slow(30, CREATED, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            await until(lambda: standin.count_seen(CREATED) == 1)
            nursery.start_soon(refused)
            await trio.sleep(0.05)
            a.kill()
        await refused()

    with_boxes(standin.url, tmp_path, test, "A")


# starting, falling behind, beginning anew


def test_a_box_that_starts_begins_behind_what_is_settled(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box) -> None:
        for _ in range(5):
            await a.publish("a")
        await until(lambda: a.journal.settled == 5)
        before = standin.count_seen("journal/_create|_mget")
        b = await boxes.start("B")
        await until(lambda: b.journal.head == 5)
        assert b.journal.statistics()["counts"].get("entries", 0) == 0
        assert standin.count_seen("journal/_create|_mget") < before + 20
        assert await offered(b) == [f"A{n}" for n in range(1, 6)]
        assert [each.seq for each in await b.publish("a")] == [6_000_000]

    with_boxes(standin.url, tmp_path, test, "A")


def test_old_entries_go_and_a_box_that_missed_them_starts_over(
    standin: StandIn, tmp_path: Path, monkeypatch: Any
) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        await b.commands.after("a", 0, limit=1)
        asleep = trio.Event()
        mget = b.client.mget

        async def sleep(*asked: Any) -> Any:
            await asleep.wait()
            return await mget(*asked)

        monkeypatch.setattr(b.client, "mget", sleep)
        await trio.sleep(0.2)
        monkeypatch.setattr(journal, "KEEP_S", 0.0)
        monkeypatch.setattr(journal, "TRIM_S", 0.0)
        for _ in range(4):
            await a.publish("a", "b")
        await a.publish(*["c"] * 600)
        await until(lambda: a.journal.statistics()["trimmed"] >= 4)
        await until(lambda: len(entries(standin, boxes)) < 2)
        b.changes.clear()
        monkeypatch.setattr(b.client, "mget", mget)
        asleep.set()
        await level(a, b)
        assert b.journal.statistics()["counts"]["jumps"] == 1
        assert [each.kind for each in b.changes[:4]] == ["known_commands", "groups", "agents", "commands"]
        assert await offered(b) == ["A1", "A3", "A5", "A7"]
        await b.publish("a")
        await level(a, b)
        assert (await offered(a))[-1] == "B1"

    with_boxes(standin.url, tmp_path, test)


def test_a_journal_that_was_deleted_is_begun_anew_with_greater_numbers(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        [old] = await a.publish("a")
        await a.commands.remove_known("restart", actor="operator")
        await level(a, b)
        with standin.cluster.lock:
            del standin.cluster.indices[boxes.index("journal")]
        for box in (a, b):
            box.changes.clear()
        await until(lambda: bool(a.heard("agents") and b.heard("agents")), 10)
        [new] = await b.publish("a")
        assert new.seq > old.seq
        await until(lambda: bool(a.heard("commands")))
        await level(a, b)
        assert await offered(a) == await offered(b) == ["A1", "B1"]
        assert await a.commands.known() == await b.commands.known()

    with_boxes(standin.url, tmp_path, test)


@pytest.mark.usefixtures("_soon_settled")
def test_an_entry_nobody_can_read_does_not_stop_the_others(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        await a.publish("a")
        await level(a, b)
        broken = {"n": 2, "kind": "entry", "at": 0.0, "entry": {"publications": "of another make"}}
        await b.client.create("journal", "2", broken)
        await a.publish("a")
        await level(a, b)
        assert await offered(b) == ["A1", "A2"]
        await until(lambda: b.journal.settled == 3)

    with_boxes(standin.url, tmp_path, test)


# news


def test_news_reach_every_box_in_one_order(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        for number in range(10):
            box = (a, b)[number % 2]
            await box.journal.tell(Change(kind="agents", agents=(f"agent{number}",), tenant="default"))
            assert box.heard("agents")[-1].agents == (f"agent{number}",)
        await until(lambda: len(a.heard("agents")) == len(b.heard("agents")) == 11)  # one of the start
        assert a.heard("agents") == b.heard("agents")

    with_boxes(standin.url, tmp_path, test)


def test_announcements_share_entries(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        for number in range(1200):
            a.journal.announce(f"agent{number}", f"connection {number}")
        await until(lambda: len(b.heard("attached")) == 1200)
        assert a.journal.head == 3
        assert {(each.agents, each.connection) for each in a.heard("attached")} == {
            ((f"agent{number}",), f"connection {number}") for number in range(1200)
        }

    with_boxes(standin.url, tmp_path, test)


def test_an_announcement_survives_an_indexer_that_is_away(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish("x")
        standin.stop()
        a.journal.announce("a", "older")
        await trio.sleep(0.15)
        a.journal.announce("a", "newer")
        standin.start()
        # The older one may have been on its way already: it may come before the newer one, and never behind it.
        await until(lambda: "newer" in [each.connection for each in b.heard("attached")])
        await a.publish("y")
        await until(lambda: b.journal.head == a.journal.head)
        assert [each.connection for each in b.heard("attached")][-1] == "newer"

    with_boxes(standin.url, tmp_path, test)


def test_a_known_command_that_was_removed_stays_removed(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box) -> None:
        await a.commands.remove_known("upgrade", actor="operator")
        await a.commands.put_known(KnownCommand(name="ping"), actor="operator")
        b = await boxes.start("B")
        names = [each.name for each in await b.commands.known()]
        assert names == ["fetch-config", "ping", "restart", "set-group"]

    with_boxes(standin.url, tmp_path, test, "A")


def test_who_is_not_needed_looks_seldom(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        await tail_gone(a)
        a.needed = False
        await trio.sleep(0.2)
        before = standin.count_seen("_mget")
        await trio.sleep(1.0)
        assert standin.count_seen("_mget") - before <= 2

    with_boxes(standin.url, tmp_path, test, "A")
