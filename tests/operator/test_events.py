"""Events and states of the comms API as operators see them: searched, paged, followed, apart by tenant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from sqlite_utils import Database

from osqbox.comms.messages import Agent, Event, Operation, StateChange
from osqbox.comms.sqlite import MIGRATIONS, SqliteIndexer
from osqbox.comms.sqlite.events import SqliteEvents

Test = Callable[[Any], Awaitable[None]]


@pytest.fixture
def desk(rig: Any) -> Callable[[Test], None]:
    """Runs a test with the operator API of a box that keeps events and states."""

    async def run(without: Any, test: Test) -> None:
        def migrate(tx: Any) -> None:
            for step in MIGRATIONS:
                step.apply(Database(tx.db))

        await without.store.write(migrate)
        indexer = SqliteIndexer(without.store, lambda _: None, without.clock)
        comms: Any = SimpleNamespace(indexer=indexer, events=SqliteEvents(without.store))
        box = type(without)(replace(without.parts, comms=comms), without.clock, without.stops, without._nursery)
        box.hosts = without.hosts  # those it adds are allowed
        await test(box)

    return lambda test: rig(lambda without: run(without, test))


async def keep(box: Any, *numbers: int, agent: str = "a1", tenant: str = "default", **more: Any) -> None:
    events = [
        Event(
            id=f"{agent}-{number}",
            agent=agent,
            tenant=tenant,
            received_at=1_700_000_000.0 + number,
            **{"module": "log", "collector": "file", "data": {"n": number, "text": f"word{number} all"}, **more},
        )
        for number in numbers
    ]
    await box.parts.comms.events.add(events)


def found(answered: Any) -> list[int]:
    events = answered.json["events"] if "events" in answered.headers["Content-Type"] else answered.lines
    return [event["data"]["n"] for event in events]


def test_events_page_by_page(desk: Any) -> None:
    async def test(box: Any) -> None:
        await keep(box, *range(5))
        await keep(box, 7, agent="a2", tenant="blue")
        page = (await box.get("/api/v1/events?limit=2")).json
        assert [event["data"]["n"] for event in page["events"]] == [4, 3]
        assert page["events"][0] == {
            "number": 5,
            "id": "a1-4",
            "tenant": "default",
            "agent": "a1",
            "module": "log",
            "collector": "file",
            "received_at": "2023-11-14T22:13:24.000000Z",
            "data": {"n": 4, "text": "word4 all"},
        }
        seen = []
        path = "/api/v1/events?limit=2"
        while True:
            page = (await box.get(path)).json
            seen += [event["data"]["n"] for event in page["events"]]
            if page["next"] is None:
                break
            path = f"/api/v1/events?limit=2&before={page['next']}"
        assert seen == [4, 3, 2, 1, 0]

    desk(test)


def test_events_are_filtered(desk: Any) -> None:
    async def test(box: Any) -> None:
        await keep(box, *range(5))
        await keep(box, 7, agent="a2", tenant="blue", module="fim")

        async def numbers(query: str) -> list[int]:
            return [event["data"]["n"] for event in (await box.get(f"/api/v1/events?{query}")).json["events"]]

        assert await numbers("tenant=blue") == [7]
        assert await numbers("agent=a2") == [], "of another tenant"
        assert await numbers("text=word3") == [3]
        assert await numbers("text=all%20word3") == [3]
        assert await numbers("module=fim&tenant=blue") == [7]
        assert await numbers("since=2023-11-14T22:13:22Z&until=2023-11-14T22:13:23%2B00:00") == [3, 2]
        for wrong in ("limit=0", "limit=1001", "since=yesterday", "since=2023-11-14T22:13:22", "before=-1", "seach=x"):
            await box.get(f"/api/v1/events?{wrong}", 400)

    desk(test)


def test_lines_oldest_first(desk: Any) -> None:
    async def test(box: Any) -> None:
        assert (await box.get("/api/v1/events.ndjson")).body == b""
        await keep(box, *range(150))
        assert found(await box.get("/api/v1/events.ndjson")) == list(range(50, 150))
        assert found(await box.get("/api/v1/events.ndjson?limit=2")) == [148, 149]
        assert found(await box.get("/api/v1/events.ndjson?after=0&limit=3")) == [0, 1, 2]
        assert found(await box.get("/api/v1/events.ndjson?after=148")) == [148, 149]
        assert found(await box.get("/api/v1/events.ndjson?text=word7")) == [7, *range(70, 80)]
        assert found(await box.get("/api/v1/events.ndjson?limit=10&text=word7")) == list(range(70, 80))
        assert found(await box.get("/api/v1/events.ndjson?after=9999")) == []
        assert found(await box.get("/api/v1/events.ndjson?tenant=blue")) == []

    desk(test)


def test_more_than_a_page(desk: Any) -> None:
    async def test(box: Any) -> None:
        await keep(box, *range(2500))
        assert found(await box.get("/api/v1/events.ndjson?limit=2200")) == list(range(300, 2500))
        assert found(await box.get("/api/v1/events.ndjson?after=0")) == list(range(2500))
        assert found(await box.get("/api/v1/events.ndjson?after=0&limit=1500")) == list(range(1500))

    desk(test)


def test_a_follower_gets_what_was_there_and_what_comes_each_once(desk: Any, stream: Any) -> None:
    async def test(box: Any) -> None:
        await keep(box, *range(3))
        async with box.served() as client, stream(client, "/api/v1/events.ndjson?limit=2&follow=1&agent=a1") as reader:
            assert [each["data"]["n"] for each in await reader.objects(2)] == [1, 2]
            await keep(box, 100, agent="a2")
            await keep(box, 3, 4)
            await keep(box, 4, 5)
            with trio.fail_after(5):
                assert [each["data"]["n"] for each in await reader.objects(3)] == [3, 4, 5]

    desk(test)


def test_a_follower_under_load_loses_and_repeats_nothing(desk: Any, stream: Any) -> None:
    async def test(box: Any) -> None:
        await keep(box, *range(500))
        async with box.served() as client, stream(client, "/api/v1/events.ndjson?after=0&follow=1") as reader:
            async with trio.open_nursery() as nursery:
                for batch in range(20):
                    nursery.start_soon(keep, box, *range(500 + batch * 50, 550 + batch * 50))
            with trio.fail_after(10):
                lines = await reader.objects(1500)
        assert sorted(each["data"]["n"] for each in lines) == list(range(1500))
        numbers = [each["number"] for each in lines]
        assert numbers == sorted(set(numbers))

    desk(test)


def test_states(desk: Any) -> None:
    async def test(box: Any) -> None:
        states = box.parts.comms.indexer.states
        for uuid, tenant in (("a1", "default"), ("a2", "blue")):
            changes = [
                StateChange(
                    index="wazuh-states-fim", id=f"f{n}", operation=Operation.UPDATE, data={"path": f"/etc/{n}"}
                )
                for n in range(3)
            ]
            await states.apply(Agent(uuid=uuid, tenant=tenant, name=uuid), changes, batch="")
        page = (await box.get("/api/v1/states?limit=2")).json
        assert [state["id"] for state in page["states"]] == ["f0", "f1"]
        shown = page["states"][0]
        assert (shown["agent"], shown["version"], shown["data"]["path"]) == ("a1", 1, "/etc/0")
        assert shown["data"]["agent"]["name"] == "a1"
        rest = (await box.get(f"/api/v1/states?limit=2&after={page['next']}")).json
        assert ([state["id"] for state in rest["states"]], rest["next"]) == (["f2"], None)
        assert (await box.get("/api/v1/states?agent=a2")).json["states"] == []
        assert len((await box.get("/api/v1/states?agent=a2&tenant=blue&text=/etc/1")).json["states"]) == 1
        assert (await box.get("/api/v1/states?index=wazuh-states-sca")).json["states"] == []

    desk(test)


def test_a_cursor_that_is_none(desk: Any) -> None:
    async def test(box: Any) -> None:
        answered = await box.ask(
            "GET", "/api/v1/states?after=xyz", headers={"Authorization": "Bearer a-token-of-tests"}
        )
        assert answered.status == 400
        assert b"expected a cursor of the page before" in answered.body

    desk(test)


def test_a_box_without_the_comms_api(rig: Any) -> None:
    async def test(box: Any) -> None:
        for path in ("/api/v1/events", "/api/v1/events.ndjson", "/api/v1/states"):
            await box.get(path, 404)

    rig(test)
