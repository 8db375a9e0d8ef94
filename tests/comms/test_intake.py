"""The queue between agents and the engine: bounded, in order, and every event accounted for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from osqbox.comms import bodies
from osqbox.comms import intake as room
from osqbox.comms.engine import StandIn
from osqbox.comms.errors import CommsError
from osqbox.comms.intake import Delivery, EngineDown, Intake
from osqbox.comms.messages import Event

from . import _events
from ._events import Rig, run


def event(number: int, agent: str = "a1", *, size_bytes: int = 10) -> Event:
    """As `bodies.stored_events` makes them: the data is encoded already."""
    data = b'"' + b"x" * (size_bytes - 2) + b'"'
    return _events.event(number, agent, data=msgspec.Raw(data))


@pytest.fixture(autouse=True)
def only_data_weighs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVENT_BYTES", 0)


class MadeUpEngine:
    """Takes everything, until told otherwise; remembers what it took."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.behave: Callable[[Sequence[Event]], Delivery] | None = None
        self.takes_s = 0.0

    async def deliver(self, events: Sequence[Event]) -> Delivery:
        await trio.sleep(self.takes_s)
        done = Delivery(len(events)) if self.behave is None else self.behave(events)
        left = set(done.left)
        self.seen += [event for place, event in enumerate(events) if place not in left][: done.delivered]
        return done

    def statistics(self) -> dict[str, Any]:
        return {}


def balanced(intake: Intake) -> bool:
    now = intake.statistics()
    return now.accepted == now.delivered + now.dropped + now.waiting


def in_mock_time(test: Callable[[], Any]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def down(_: Sequence[Event]) -> Delivery:
    raise EngineDown("gone fishing")


def test_events_are_taken_at_once_however_slow_the_engine_is() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        engine.takes_s = 60
        intake = Intake(engine, events_max=5, agent_share=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            began = trio.current_time()
            for number in range(5):
                intake.take([event(number)])
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(CommsError) as caught:
                intake.take([event(5)])
            assert trio.current_time() == began
            assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
            assert (intake.statistics().waiting, intake.statistics().refused) == (5, 1)
            assert await intake.drain(200) == 0
        assert [each.id for each in engine.seen] == [f"a1-{n}" for n in range(5)]
        assert intake.statistics().waiting_bytes == 0

    in_mock_time(main)


def test_a_request_is_taken_whole_or_not() -> None:
    async def main() -> None:
        intake = Intake(MadeUpEngine(), events_max=5, bytes_max=100, agent_share=1)
        intake.take([event(n, size_bytes=20) for n in range(3)])
        for wanted, size_bytes in ((3, 2), (1, 41)):
            with pytest.raises(CommsError) as caught:
                intake.take([event(n, size_bytes=size_bytes) for n in range(wanted)])
            assert caught.value.status == 503
        intake.take([event(n, size_bytes=20) for n in range(2)])
        assert intake.statistics().accepted == intake.statistics().waiting == 5
        for wanted, size_bytes in ((6, 2), (1, 101)):
            with pytest.raises(CommsError) as caught:
                intake.take([event(n, size_bytes=size_bytes) for n in range(wanted)])
            assert caught.value.status == 413, "that will never fit"

    in_mock_time(main)


def test_a_flood_of_one_agent_leaves_room_for_the_others() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        engine.behave = down
        intake = Intake(engine, events_max=40, bytes_max=4000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            for number in range(10):
                intake.take([event(number, "loud")])
            with pytest.raises(CommsError, match="too many events of this agent") as caught:
                intake.take([event(10, "loud")])
            assert caught.value.status == 503
            intake.take([event(0, "fat", size_bytes=1000)])
            with pytest.raises(CommsError, match="too many events of this agent"):
                intake.take([event(1, "fat")])
            with pytest.raises(CommsError, match="at most 10 events and 1000 bytes"):
                intake.take([event(1, "new", size_bytes=1001)])
            intake.take([event(0, "quiet")])
            engine.behave = None
            await trio.sleep(room.RETRY_MAX_S)
            assert intake.statistics().waiting == 0
            intake.take([event(n, "loud") for n in range(10, 20)])
            await intake.drain(1)
        assert intake.statistics().delivered == 22

    in_mock_time(main)


def test_an_engine_that_is_down_gets_the_same_events_again() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        engine.behave = down
        intake = Intake(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(n) for n in range(10)])
            await trio.sleep(20)
            before = intake.statistics()
            assert (before.waiting, before.trouble) == (10, "gone fishing")
            assert 5 < before.retries < 12, "with growing pauses"
            engine.behave = None
            intake.take([event(10)])
            await trio.sleep(room.RETRY_MAX_S + 1)
            assert [each.id for each in engine.seen] == [f"a1-{n}" for n in range(11)]
            assert intake.statistics().trouble == ""
            await intake.drain(1)

    in_mock_time(main)


def test_what_is_left_of_a_batch_goes_first() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        intake = Intake(engine)

        def half(events: Sequence[Event]) -> Delivery:
            engine.behave = None
            return Delivery(2, 1, left=range(3, len(events)), why="away for a moment")

        engine.behave = half
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(n, size_bytes=100) for n in range(6)])
            await trio.testing.wait_all_tasks_blocked()
            intake.take([event(6, size_bytes=100)])
            assert (intake.statistics().waiting, intake.statistics().waiting_bytes) == (4, 400)
            assert await intake.drain(10) == 0
        assert [each.id for each in engine.seen] == ["a1-0", "a1-1", "a1-3", "a1-4", "a1-5", "a1-6"]
        now = intake.statistics()
        assert (now.accepted, now.delivered, now.dropped, now.waiting) == (7, 6, 1, 0)

    in_mock_time(main)


def test_at_the_end_what_could_not_be_delivered_is_counted() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        engine.behave = down
        intake = Intake(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(n) for n in range(3)])
            began = trio.current_time()
            assert await intake.drain(2) == 3
            assert trio.current_time() - began == 2
        now = intake.statistics()
        assert (now.accepted, now.dropped, now.waiting, now.waiting_bytes) == (3, 3, 0, 0)
        with pytest.raises(CommsError, match="the box is stopping"):
            intake.take([event(4)])

    in_mock_time(main)


def test_the_end_waits_for_no_answer_longer_than_it_was_told() -> None:
    async def main() -> None:
        engine = MadeUpEngine()
        engine.takes_s = trio.lowlevel.current_clock().current_time() + 1000
        intake = Intake(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(1)])
            await trio.testing.wait_all_tasks_blocked()
            assert await intake.drain(1) == 1
        assert balanced(intake)
        assert await Intake(engine).drain(1) == 0, "one that never ran"

    in_mock_time(main)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_the_account_is_exact_and_order_is_kept(seed: int) -> None:
    dice = random.Random(seed)

    def moody(events: Sequence[Event]) -> Delivery:
        if dice.random() < 0.3:
            raise dice.choice((EngineDown("a mood"), ValueError("a mistake in the engine")))
        taken = dice.randint(0, len(events))
        dropped = dice.randint(0, taken)
        # The first ones are delivered, then some are dropped, the others are left.
        return Delivery(taken - dropped, dropped, left=range(taken, len(events)), why="tired")

    async def main() -> None:
        engine = MadeUpEngine()
        engine.behave = moody
        intake = Intake(engine, events_max=200, bytes_max=10_000)
        accepted: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            for number in range(300):
                uuid, count = f"a{dice.randint(1, 3)}", dice.randint(1, 9)
                events = [event(number * 10 + each, uuid, size_bytes=dice.randint(2, 150)) for each in range(count)]
                try:
                    intake.take(events)
                    accepted += [each.id for each in events]
                except CommsError:
                    pass
                assert balanced(intake)
                assert intake.statistics().waiting <= 200
                assert 0 <= intake.statistics().waiting_bytes <= 10_000
                await trio.sleep(dice.random() * 0.2)
            engine.behave = None
            assert await intake.drain(60) == 0
        now = intake.statistics()
        assert now.accepted == len(accepted) == now.delivered + now.dropped
        assert now.refused > 0
        seen = [each.id for each in engine.seen]
        assert len(seen) == now.delivered
        assert seen == [each for each in accepted if each in set(seen)]

    in_mock_time(main)


# into SQLite


def test_events_go_into_the_database(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        intake = Intake(StandIn(rig.events))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            for number in range(50):
                intake.take([event(number * 100 + each) for each in range(100)])
            assert await intake.drain(20) == 0
        found = [each.id for _, each in await rig.events.search(limit=1000)]
        assert found == [f"a1-{n}" for n in range(4999, 3999, -1)]
        assert (await rig.events.after(0, limit=1000))[1][0][1].id == "a1-0"
        assert intake.statistics().delivered == 5000

    run(test, tmp_path)


@pytest.mark.parametrize(
    ("body", "key", "stored"),
    [
        (b'[{"m": 1}, {"m": 1}]', "k1", 2),
        (b'[{"id": "e1", "m": 1}, {"id": "e2", "m": 1}]', "", 2),
        (b'{"agent":{"id":"a1"}}\n{"module":"m","id":"e1"}\n{"m":1}\n{"module":"m","id":"e2"}\n{"m":1}', "", 2),
        (b'[{"m": 1}, {"m": 1}]', "", 6),
    ],
)
def test_a_client_that_names_what_it_sends_may_send_it_again(
    tmp_path: Path, body: bytes, key: str, stored: int
) -> None:
    """By an id of each event, or by a key of the request; without either, equal events all count."""

    async def test(rig: Rig) -> None:
        intake, numbers = Intake(StandIn(rig.events)), iter(range(100))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            for _ in range(3):
                parsed = bodies.read_stateless(body)
                intake.take(
                    bodies.stored_events(parsed, _events.agent(), now=1.0, new_id=lambda: f"r{next(numbers)}", key=key)
                )
            assert await intake.drain(10) == 0
        found = await rig.events.search()
        assert len(found) == stored
        assert intake.statistics().delivered == 6

    run(test, tmp_path)


def test_an_event_that_cannot_be_stored_holds_up_nobody(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        intake = Intake(StandIn(rig.events))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(1), _events.event(2, data=msgspec.Raw(b"\xff")), event(3)])
            assert await intake.drain(20) == 0
        assert [each.id for _, each in await rig.events.search()] == ["a1-3", "a1-1"]
        assert (intake.statistics().delivered, intake.statistics().dropped) == (2, 1)

    run(test, tmp_path)


def test_a_database_that_fails_for_a_while_loses_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.store.write(lambda tx: tx.db.execute("ALTER TABLE comms_events RENAME TO elsewhere") and None)
        intake = Intake(StandIn(rig.events))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intake.run)
            intake.take([event(1), event(2)])
            while not intake.statistics().trouble:
                await trio.sleep(0.01)
            assert "no such table" in intake.statistics().trouble
            assert intake.statistics().waiting == 2
            await rig.store.write(lambda tx: tx.db.execute("ALTER TABLE elsewhere RENAME TO comms_events") and None)
            assert await intake.drain(20) == 0
        assert [each.id for _, each in await rig.events.search()] == ["a1-2", "a1-1"]

    run(test, tmp_path)
