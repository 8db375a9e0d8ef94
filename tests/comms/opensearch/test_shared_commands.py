"""Commands of boxes that share an indexer: one order, each command once, whichever box an agent is at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.hub import Bye, Deliver
from osqbox.comms.messages import Command, CommandStatus, KnownCommand, Result, ResultOutcome
from osqbox.comms.opensearch.entries import NUMBERS, publication_of
from osqbox.comms.results import DATABASE_FAILURE

from ._boxes import Box, Boxes, ids, level, offered, tail_gone, until, with_boxes
from .standin import StandIn


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


# one order


def test_commands_published_on_two_boxes_have_one_order_on_both(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        published = []
        for turn in range(12):
            published += await (a, b)[turn % 2].publish("a", "b" if turn % 3 else "c")
        assert [each.seq for each in published] == sorted(each.seq for each in published)
        await level(a, b)
        mine = [each for each in published if each.agent == "a"]
        for box in (a, b):
            assert await offered(box) == ids(mine)
            assert await offered(box, limit=3) == ids(mine[:3])
            assert await offered(box, after=mine[4].seq) == ids(mine[5:])
            assert ids(await box.commands.page(agent="a", limit=4)) == ids(mine[:-5:-1])

    with_boxes(standin.url, tmp_path, test)


def test_publications_of_two_boxes_at_the_same_time_get_numbers_of_their_own(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        published: list[Command] = []

        async def publish(box: Box) -> None:
            for _ in range(15):
                published.extend(await box.publish("a", "a"))

        async with trio.open_nursery() as nursery:
            for box in (a, b, a, b):
                nursery.start_soon(publish, box)
        await level(a, b)
        assert len({each.seq for each in published}) == 4 * 15 * 2
        in_order = ids(sorted(published, key=lambda each: each.seq))
        assert await offered(a, limit=1000) == in_order
        assert await offered(b, limit=1000) == in_order

    with_boxes(standin.url, tmp_path, test)


def test_waiting_publications_share_an_entry_of_the_journal(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(a.publish, "a")
        assert a.journal.head < 10
        seqs = [each.seq for each in await a.commands.after("a", 0, limit=100)]
        assert len(seqs) == 50
        assert seqs == sorted(set(seqs))

    with_boxes(standin.url, tmp_path, test, "A")


def test_a_large_publication_is_one_whole_on_every_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        fleet = [f"agent{number}" for number in range(6000)]
        published = await a.publish(*fleet, "agent7")
        assert [each.seq for each in published] == list(range(published[0].seq, published[0].seq + 6001))
        await level(a, b)
        mine = [published[7].id, published[-1].id]
        assert await offered(a, "agent7") == mine
        assert await offered(b, "agent7") == mine
        assert [each.agents for each in b.heard("commands") if each.agents] == [tuple(fleet)]
        assert len(standin.documents(boxes.index("commands"))) == 6001

    with_boxes(standin.url, tmp_path, test)


def test_a_large_publication_that_could_not_be_staged_is_none(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish("a")
        standin.fail(503, r"journal/_doc/\w+-1")
        with pytest.raises(IndexerDown):
            await a.publish(*["a"] * 6000)
        await b.publish("a")
        await level(a, b)
        assert await offered(a) == await offered(b) == ["A1", "B1"]

    with_boxes(standin.url, tmp_path, test)


def test_one_agents_long_queue_comes_in_pages(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        published = ids(await a.publish(*["a"] * 1100))
        for box in (a, b, await boxes.start("C")):  # from the tail, and by search alone
            await level(a, box)
            assert await offered_in_pages(box) == published

    async def offered_in_pages(box: Box) -> list[str]:
        found: list[str] = []
        seq = 0
        while page := await box.commands.after("a", seq, limit=100):
            found += ids(page)
            seq = page[-1].seq
        return found

    with_boxes(standin.url, tmp_path, test)


@pytest.mark.parametrize("taken", ["A1", "mine"])
def test_a_taken_id_refuses_the_whole_publication(standin: StandIn, tmp_path: Path, taken: str) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish("a")
        with pytest.raises(CommsError, match=taken) as refused:
            await b.commands.publish([b.new("a", id="mine"), b.new("a", id=taken)], actor="operator")
        assert refused.value.status == 409
        await level(a, b)
        assert await offered(b) == ["A1"]

    with_boxes(standin.url, tmp_path, test)


def test_the_same_id_on_two_boxes_at_once_is_one_command(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        outcomes: list[Any] = []

        async def publish(box: Box) -> None:
            try:
                outcomes.extend(await box.commands.publish([box.new("a", id="same")], actor="operator"))
            except CommsError as error:
                outcomes.append(error.status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, a)
            nursery.start_soon(publish, b)
        await level(a, b)
        assert outcomes.count(409) == 1
        assert await offered(a) == await offered(b) == ["same"]

    with_boxes(standin.url, tmp_path, test)


def test_a_publication_that_lands_after_its_repetition_is_not_offered_again(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        assert await offered(b) == []
        new = [a.new("a", id="same"), a.new("a", id="too")]
        first = await a.commands.publish(new, actor="operator")
        await level(a, b)
        await tail_gone(a)
        await tail_gone(b)
        await a.journal.publish(publication_of("late", new))
        await level(a, b)
        for box in (a, b):
            assert await offered(box) == ids(first)
            assert await offered(box, after=first[-1].seq) == []

    with_boxes(standin.url, tmp_path, test)


# what is offered


def test_a_command_is_offered_on_every_box_before_any_search_sees_it(tmp_path: Path) -> None:
    with StandIn(refresh_interval="-1") as standin:

        async def test(_: Boxes, a: Box, b: Box) -> None:
            assert await offered(b) == []
            await a.publish("a")
            await level(a, b)
            assert await offered(b) == ["A1"]
            assert await b.commands.known_seq("a", (await b.found("A1")).seq)

        with_boxes(standin.url, tmp_path, test)


def test_who_comes_back_to_another_box_at_once_is_known_there(standin: StandIn, tmp_path: Path) -> None:
    """The other box has not looked at the journal yet."""

    async def test(_: Boxes, a: Box, b: Box) -> None:
        for _ in range(5):
            [command] = await a.publish("a")
            assert await b.commands.known_seq("a", command.seq)
            assert not await b.commands.known_seq("b", command.seq)
        assert [await b.commands.known_seq("a", seq) for seq in (0, 1, command.seq + 1, -1, 2**70)] == [
            *(True, False, False, False, False)
        ]

    with_boxes(standin.url, tmp_path, test)


def test_an_idle_agent_needs_one_search(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        seq = 0
        for box in (a, b):
            await box.journal.catch_up()
        before = standin.count_seen("commands/_search")
        for turn in range(6):
            await a.publish("a")
            await level(a, b)
            [command] = await b.commands.after("a", seq, limit=100)
            seq = command.seq
            assert await offered(b, after=seq) == []
            if turn == 3:  # what was read from the tail needs no search when it is let go
                await tail_gone(b)
        assert standin.count_seen("commands/_search") == before + 1

    with_boxes(standin.url, tmp_path, test)


def test_what_left_the_tail_unread_is_found_by_a_search(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        assert await offered(a) == []
        await a.publish("a", "b")
        await tail_gone(a)
        await a.publish("a")
        assert await offered(a) == ["A1", "A3"]

    with_boxes(standin.url, tmp_path, test, "A")


def test_expired_and_ended_commands_are_not_offered(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        now = a.clock.now()
        await a.publish("a", expires_at=now - 1)
        await a.publish("a", "a", "a", "a")
        await level(a, b)
        await b.commands.take_result("a", "A2", Result(code=2), now)
        await a.commands.cancel(["A3"], actor="operator")
        assert await offered(a) == await offered(b) == ["A4", "A5"]
        assert [(await b.found(f"A{n}")).status for n in range(1, 5)] == [
            "pending",
            "in_progress",
            "cancelled",
            "pending",
        ]

    with_boxes(standin.url, tmp_path, test)


# results, over boxes


def test_of_results_at_two_boxes_the_first_final_one_wins(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        commands = await a.publish(*["a"] * 10)
        await level(a, b)
        outcomes: dict[str, list[tuple[int, str]]] = {}

        async def report(box: Box, id: str, code: int) -> None:
            outcome = await box.commands.take_result("a", id, Result(code=code), box.clock.now())
            outcomes.setdefault(id, []).append((code, outcome))

        async with trio.open_nursery() as nursery:
            for each in commands:
                nursery.start_soon(report, a, each.id, 0)
                nursery.start_soon(report, b, each.id, 1)
        for name, told in outcomes.items():
            assert sorted(outcome for _, outcome in told) == ["repeated", "taken"]
            [code] = [code for code, outcome in told if outcome == "taken"]
            for box in (a, b):
                found = await box.found(name)
                assert (found.status, found.result) == ("failed" if code else "success", Result(code=code))
        ended = [each["id"] for box in (a, b) for each in await box.events("command_ended")]
        assert sorted(ended) == sorted(ids(commands))

    with_boxes(standin.url, tmp_path, test)


def test_results_are_judged_as_ever_on_whichever_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        now = a.clock.now()
        await a.publish("a", "a", "a")
        await level(a, b)

        async def take(box: Box, agent: str, id: str, result: Result) -> ResultOutcome:
            return await box.commands.take_result(agent, id, result, now)

        assert await take(b, "b", "A1", Result(code=0)) == "foreign"
        assert await take(b, "a", "none", Result(code=0)) == "foreign"
        assert await take(b, "a", "x" * 600, Result(code=0)) == "foreign"
        assert await take(a, "a", "A1", Result(code=2, message="at it")) == "taken"
        assert await take(b, "a", "A1", Result(code=0, message="done", data={"deep": [1, None]})) == "taken"
        assert await take(a, "a", "A1", Result(code=1)) == "repeated"
        assert (await a.found("A1")).result == Result(code=0, message="done", data={"deep": [1, None]})
        await b.commands.cancel(["A2"], actor="operator")
        assert await take(a, "a", "A2", Result(code=0)) == "ended"
        await a.commands.note_sent("a", ["A3"], now)
        await b.commands.note_sent("a", ["A3"], now)
        assert (await a.found("A3")).deliveries == 2
        assert await take(b, "a", "A3", Result(code=1, message=DATABASE_FAILURE)) == "repeated"
        assert (await a.found("A3")).status == "sent"

    with_boxes(standin.url, tmp_path, test)


def test_sent_and_answered_are_known_on_the_other_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        now = a.clock.now()
        await a.publish("a", "a")
        await level(a, b)
        await offered(b)
        await a.commands.note_sent("a", ["A1", "A2"], now)
        sent = await b.found("A1")
        assert (sent.status, sent.sent_at, sent.deliveries, sent.answered) == ("sent", now, 1, False)
        await a.commands.note_answered("a", ["A1"], written=True)
        await b.commands.note_answered("a", ["A2"], written=False)
        assert [(each.status, each.answered) for each in await b.commands.after("a", 0, limit=9)] == [
            ("sent", True),
            ("pending", False),
        ]
        await b.commands.note_sent("another", ["A2"], now)
        assert (await a.found("A2")).status == "pending"

    with_boxes(standin.url, tmp_path, test)


def test_what_runs_out_is_told_by_one_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish(*["a"] * 30)
        await a.commands.page()
        a.clock.at += 7200
        counts: list[int] = []

        async def expire(box: Box) -> None:
            counts.append(await box.commands.expire(box.clock.now()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expire, a)
            nursery.start_soon(expire, b)
        assert sum(counts) == 30
        told = [each for box in (a, b) for each in await box.events("command_ended")]
        assert sorted(each["id"] for each in told) == sorted(f"A{n}" for n in range(1, 31))
        assert {each["status"] for each in told} == {"expired"}
        assert (await a.commands.page(status=CommandStatus.EXPIRED, limit=1))[0].ended_at is not None

    with_boxes(standin.url, tmp_path, test)


def test_the_commands_of_a_deleted_agent_are_cancelled(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish("a", "b")
        await b.publish("a")
        await level(a, b)
        assert await b.commands.cancel_of_agent("a", actor="operator") == 2
        assert await offered(a) == []
        assert await offered(a, "b") == ["A2"]
        assert await b.commands.cancel_of_agent("a", actor="operator") == 0

    with_boxes(standin.url, tmp_path, test)


def test_retention_removes_what_ended_first(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        await a.publish(*["a"] * 4)
        for name in ("A3", "A1", "A2"):
            a.clock.at += 1
            await a.commands.cancel([name], actor="operator")
        await tail_gone(a)
        assert await a.commands.prune(1) == 0  # they ended a moment ago
        a.clock.at += 7200
        assert await a.commands.prune(1) == 2
        assert [await a.commands.find(f"A{n}") is None for n in range(1, 5)] == [True, False, True, False]

    with_boxes(standin.url, tmp_path, test, "A")


def test_pages_are_by_tenant_status_and_publication(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        await a.publish("a", tenant="other", request_id="r2")
        await a.publish("a", "b")
        [last] = await b.publish("c")
        assert ids(await b.commands.page(tenant="default")) == ["B1", "A3", "A2"]
        assert ids(await b.commands.page(request_id="r2")) == ["A1"]
        assert ids(await a.commands.page(before=last.seq, limit=2)) == ["A3", "A2"]
        await a.commands.cancel(["A2"], actor="operator")
        assert ids(await b.commands.page(status=CommandStatus.CANCELLED)) == ["A2"]

    with_boxes(standin.url, tmp_path, test)


def test_known_commands_are_the_same_on_both(standin: StandIn, tmp_path: Path) -> None:
    async def test(boxes: Boxes, a: Box, b: Box) -> None:
        seeded = ["fetch-config", "restart", "set-group", "upgrade"]
        assert [each.name for each in await b.commands.known()] == seeded
        extra = KnownCommand(name="isolate", version="2", description="leave the network", required_args=("until",))
        await a.commands.put_known(extra, actor="operator")
        assert extra in await b.commands.known()
        await b.commands.remove_known("restart", actor="operator")
        assert "restart" not in [each.name for each in await a.commands.known()]
        with pytest.raises(CommsError, match="restart") as refused:
            await a.commands.remove_known("restart", actor="operator")
        assert refused.value.status == 404
        assert "restart" not in [each.name for each in await (await boxes.start("C")).commands.known()]

    with_boxes(standin.url, tmp_path, test)


# streams and polls


async def read(box: Box, into: list[str], *, after: int | None, count: int) -> int:
    """An agent that listens until it has ``count``; returns its Last-Event-ID."""
    seq = after or 0
    async with box.attach(after=after) as stream:
        while count > 0:
            item = await stream.next(5)
            assert isinstance(item, Deliver), item
            for each in item.commands[:count]:
                into.append(each.id)
                seq = each.seq
            await stream.written(ids(item.commands))
            count -= len(item.commands)
    return seq


def test_an_agent_that_changes_boxes_gets_each_command_once_in_order(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        published: list[Command] = []

        async def publish() -> None:
            for turn in range(24):
                published.extend(await (a, b)[turn % 2].publish("a"))
                await trio.sleep(0.01)

        received: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            after: int | None = None
            for turn in range(12):
                after = await read((b, a)[turn % 2], received, after=after, count=min(2, 24 - len(received)))
                if len(received) == 24:
                    break
        assert received == ids(sorted(published, key=lambda each: each.seq))[: len(received)]
        assert len(received) == 24

    with_boxes(standin.url, tmp_path, test)


def test_polls_at_alternating_boxes_get_each_command_once(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        received: list[str] = []

        async def publish() -> None:
            for turn in range(20):
                await (a, b)[turn % 2].publish("a")
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            turn = 0
            while len(received) < 20:
                box, turn = (a, b)[turn % 2], turn + 1
                taken = await box.poll(wait_s=5)
                received += taken
                await box.commands.note_answered("a", taken, written=True)
        assert sorted(received) == sorted([f"A{n}" for n in range(1, 11)] + [f"B{n}" for n in range(1, 11)])
        assert await a.poll() == await b.poll() == []

    with_boxes(standin.url, tmp_path, test)


def test_the_newest_connection_ends_the_one_at_the_other_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        for older, newer in ((a, b), (b, a), (a, a)):
            older.changes.clear()
            async with older.attach() as old:
                await until(lambda: bool(older.heard("attached")))  # noqa: B023 - else the other may be said to be older
                async with newer.attach() as new:
                    bye = await old.next(5)
                    assert isinstance(bye, Bye)
                    assert bye.reason == "replaced"
                    await a.publish("a")
                    delivered = await new.next(5)
                    assert isinstance(delivered, Deliver)
                    for each in delivered.commands:
                        await a.commands.take_result("a", each.id, Result(code=0), 0)

    with_boxes(standin.url, tmp_path, test)


def test_of_two_connections_at_the_same_time_one_is_left(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        for _ in range(2):
            ends: list[str] = []

            async def listen(box: Box, ends: list[str] = ends) -> None:
                async with box.attach() as stream:
                    item = await stream.next(30)
                    ends.append(item.reason if isinstance(item, Bye) else "?")

            for box in (a, b):
                box.changes.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, a)
                nursery.start_soon(listen, b)
                await until(lambda: all(len(box.heard("attached")) == 2 for box in (a, b)))
                await until(lambda: bool(ends))  # noqa: B023
                await trio.sleep(0.05)
                assert ends == ["replaced"]
                nursery.cancel_scope.cancel()

    with_boxes(standin.url, tmp_path, test)


def test_only_the_addressed_agents_streams_look(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box, b: Box) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(listen, b, f"agent{number}")
            await until(lambda: b.hub.statistics().streams == 30 and len(b.heard("attached")) == 30)
            await trio.sleep(0.3)
            wakes = b.hub.statistics().wakes
            await a.publish("agent3")
            await until(lambda: b.hub.statistics().delivered == 1)
            assert b.hub.statistics().wakes == wakes + 1
            nursery.cancel_scope.cancel()

    async def listen(box: Box, uuid: str) -> None:
        async with box.attach(uuid) as stream:
            async for _ in stream:
                pass

    with_boxes(standin.url, tmp_path, test)


def test_the_first_number_is_that_of_the_first_entry(standin: StandIn, tmp_path: Path) -> None:
    async def test(_: Boxes, a: Box) -> None:
        assert [each.seq for each in await a.publish("a", "a")] == [NUMBERS, NUMBERS + 1]

    with_boxes(standin.url, tmp_path, test, "A")
