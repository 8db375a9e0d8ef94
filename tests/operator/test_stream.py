"""The feed as server-sent events and as an array."""

from __future__ import annotations

import json
import math

import pytest
import trio
import trio.testing

from osqbox.operator import ear
from osqbox.operator import stream as operator_stream


class Reader:
    """Server-sent events of an answer, parsed as a browser would."""

    def __init__(self, answer):
        assert answer.headers["content-type"].startswith("text/event-stream")
        self._answer = answer

    async def next(self):
        fields = {}
        while (line := await self._answer.line()) is not None:
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields and not line:
                return {**fields, "data": json.loads(fields["data"])}
        return None

    async def started(self):
        """The head and the first comment are here, so that whatever happens next is live."""
        assert await self._answer.line() == ":"


async def happen(box, kind="tested", tenant=None, node=None, **data):
    await box.store.write(lambda tx: tx.emit(kind, tenant=tenant, node=node, **data))


def test_events_come_live_from_now_on(rig, stream):
    async def test(box):
        await happen(box, number=0)
        async with box.served() as client, stream(client, "/api/v1/stream") as answer:
            reader = Reader(answer)
            await reader.started()
            await happen(box, "thing_done", "default", "node1", number=1)
            event = await reader.next()
            assert (event["event"], event["id"]) == ("thing_done", str(event["data"]["seq"]))
            assert event["data"] == {
                "seq": 3,
                "at": "2023-11-14T22:13:20.000000Z",
                "kind": "thing_done",
                "tenant": "default",
                "node": "node1",
                "data": {"number": 1},
            }

    rig(test)


@pytest.mark.parametrize("how", ["query", "header", "both"])
def test_a_reader_resumes_where_it_was(rig, stream, monkeypatch, how):
    monkeypatch.setattr(operator_stream, "PAGE_EVENTS", 2)

    async def test(box):
        for number in range(10):
            await happen(box, number=number)
        path = "/api/v1/stream" + {"query": "?after=6", "header": "", "both": "?after=1"}[how]
        headers = {} if how == "query" else {"Last-Event-ID": "6"}
        async with box.served() as client, stream(client, path, headers) as answer:
            reader = Reader(answer)
            assert [(await reader.next())["id"] for _ in range(5)] == ["7", "8", "9", "10", "11"]
            await happen(box)
            assert (await reader.next())["id"] == "12"

    rig(test)


def test_a_reader_is_told_what_is_gone(rig, stream):
    async def test(box):
        for _ in range(10):
            await happen(box)
        await box.store.write(lambda tx: tx.db.execute("DELETE FROM feed_events WHERE seq <= 8"))
        async with box.served() as client:
            async with stream(client, "/api/v1/stream?after=3") as answer:
                reader = Reader(answer)
                assert await reader.next() == {"event": "gap", "data": {"missed": 5}}
                assert [(await reader.next())["id"] for _ in range(3)] == ["9", "10", "11"]
            async with stream(client, "/api/v1/stream?after=8") as answer:
                assert (await Reader(answer).next())["id"] == "9"

    rig(test)


def test_numbers_may_jump(rig, stream):
    async def test(box):
        async with box.served() as client, stream(client, "/api/v1/stream") as answer:
            reader = Reader(answer)
            await reader.started()
            await happen(box)
            assert (await reader.next())["id"] == "2"
            await box.store.write(lambda tx: tx.db.execute("UPDATE sqlite_sequence SET seq = 99"))
            await happen(box)
            with trio.fail_after(5):
                assert (await reader.next())["id"] == "100"

    rig(test)


def test_a_number_of_another_database_begins_anew(rig, stream):
    async def test(box):
        await happen(box)
        async with box.served() as client, stream(client, "/api/v1/stream?after=5000") as answer:
            reader = Reader(answer)
            assert await reader.next() == {"event": "gap", "data": {"missed": 0}}
            assert [(await reader.next())["id"] for _ in range(2)] == ["1", "2"]

    rig(test)


def test_filters_hold_for_kept_and_for_live_events(rig, stream):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        for number in range(3):
            await happen(box, "wanted", "blue", number=number)
            await happen(box, "wanted", "default")
            await happen(box, "unwanted", "blue")
        async with (
            box.served() as client,
            stream(client, "/api/v1/stream?after=0&tenant=blue&kind=wanted") as answer,
        ):
            reader = Reader(answer)
            assert [(await reader.next())["data"]["data"]["number"] for _ in range(3)] == [0, 1, 2]
            for number in range(3, 6):
                await happen(box, "unwanted", "blue")
                await happen(box, "wanted", "blue", number=number)
            assert [(await reader.next())["data"]["data"]["number"] for _ in range(3)] == [3, 4, 5]

    rig(test)


def test_kept_and_live_meet_without_loss_or_repetition(rig, stream, monkeypatch):
    monkeypatch.setattr(operator_stream, "PAGE_EVENTS", 7)

    async def test(box):
        for _ in range(200):
            await happen(box)
        async with box.served() as client:
            seen = []

            async def follow(started):
                async with stream(client, "/api/v1/stream?after=0") as answer:
                    reader = Reader(answer)
                    while len(seen) < 501:
                        event = await reader.next()
                        assert event["event"] != "gap"
                        seen.append(int(event["id"]))
                        started.set()

            async with trio.open_nursery() as nursery:
                started = trio.Event()
                nursery.start_soon(follow, started)
                await started.wait()
                for _ in range(300):
                    await happen(box)
        assert seen == list(range(1, 502))

    rig(test)


def test_a_slow_reader_reads_again_what_it_missed(rig, stream, monkeypatch):
    """Its queue overflows while it does not read; the database has what was not delivered."""
    from osqbox import feed

    monkeypatch.setattr(feed, "FOLLOWER_QUEUE_EVENTS", 3)

    async def test(box):
        async with box.served() as client, stream(client, "/api/v1/stream") as answer:
            reader = Reader(answer)
            await reader.started()

            def burst(tx):
                for number in range(50):
                    tx.emit("tested", number=number)

            await box.store.write(burst)
            numbers = [(await reader.next())["data"]["data"]["number"] for _ in range(50)]
            assert numbers == list(range(50))
            assert box.parts.feed.statistics().skipped > 40

    rig(test)


def test_silence_is_filled_with_comments(rig, stream, monkeypatch):
    monkeypatch.setattr(ear, "KEEP_ALIVE_S", 0.01)

    async def test(box):
        box.app.config["RESPONSE_TIMEOUT"] = 0.02
        async with box.served() as client:
            async with stream(client, "/api/v1/stream?kind=never") as answer:
                assert [await answer.line() for _ in range(20)] == [":", ""] * 10
            async with stream(client, "/api/v1/logs?follow=1") as answer:
                assert [await answer.line() for _ in range(3)] == [""] * 3

    rig(test)


def test_streams_end_at_once_when_the_box_stops_or_the_reader_leaves(rig, stream):
    async def test(box):
        async with box.served() as client:
            async with stream(client, "/api/v1/stream") as answer:
                await Reader(answer).started()
                assert box.parts.feed.statistics().followers == 1
            with trio.fail_after(5):
                while box.parts.feed.statistics().followers:
                    await trio.testing.wait_all_tasks_blocked()
            async with stream(client, "/api/v1/stream") as answer:
                reader = Reader(answer)
                await reader.started()
                box.parts.stop()
                with trio.fail_after(2):
                    assert await reader.next() is None
            async with stream(client, "/api/v1/stream") as answer:
                with trio.fail_after(2):
                    assert await Reader(answer).next() is None

    rig(test)


def test_kept_events_are_an_array_when_nobody_follows(rig):
    async def test(box):
        for number in range(5):
            await happen(box, "tested", "default", number=number)
        events = (await box.get("/api/v1/stream?follow=0&after=1&limit=3")).json
        assert [event["data"]["number"] for event in events] == [0, 1, 2]
        rest = (await box.get(f"/api/v1/stream?follow=0&after={events[-1]['seq']}")).json
        assert [event["data"]["number"] for event in rest] == [3, 4]
        assert (await box.get("/api/v1/stream?follow=0")).json[0]["kind"] == "tenant_created"
        assert (await box.get("/api/v1/stream?follow=0&kind=none")).json == []

    rig(test)


def test_an_ear_hears_everything_once_and_in_order():
    from osqbox.feed import Event, Feed

    async def main():
        feed, stopping, heard = Feed(), trio.Event(), []
        events = [Event(number, 0.0, "tested", None, None, {}) for number in range(6)]

        def hear(event):
            heard.append(event.seq)
            return event.seq % 2 == 1

        with ear.Ear(feed, stopping) as listening:
            feed.publish(events[:2])
            assert await listening.wait(hear)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listening.wait, hear)
                await trio.testing.wait_all_tasks_blocked()
                feed.publish(events[2:3])
                await trio.testing.wait_all_tasks_blocked()
                feed.publish(events[3:4])
            assert heard == [0, 1, 2, 3]
            before = trio.current_time()
            assert not await listening.wait(hear)
            assert math.isclose(trio.current_time() - before, ear.KEEP_ALIVE_S, abs_tol=0.5)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listening.wait, hear)
                await trio.testing.wait_all_tasks_blocked()
                stopping.set()
            assert listening.stopped
        assert feed.statistics().followers == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
