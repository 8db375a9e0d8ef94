"""Live queries: started, followed to the summary, cancelled."""

from __future__ import annotations

import json
import threading

import pytest
import trio
import trio.testing

from osqbox import feed
from osqbox.exchange import Peer, Request
from osqbox.osquery import campaigns
from osqbox.osquery.messages import Answer
from osqbox.osquery.routes import OsqueryApi
from osqbox.settings import Bounds


def test_a_campaign_goes_to_who_is_reachable_and_wakes_their_held_reads(rig):
    async def test(box):
        web, lost = await box.enroll("web"), await box.enroll("lost")
        box.clock.at += 3600
        box.presence.heard(web.id, box.clock.at)
        held, held_lost = box.presence.hold(web.id), box.presence.hold("somebody else")
        made = (await box.post("/api/v1/campaigns", {"sql": "select 1"}, 201)).json
        assert (made["summary"]["targets"], made["summary"]["open"], made["ended_at"]) == (1, 1, None)
        assert (held.is_set(), held_lost.is_set()) == (True, False)
        everybody = (await box.post("/api/v1/campaigns", {"sql": "select 1", "all": True}, 201)).json
        assert everybody["summary"]["targets"] == 2
        named = (await box.post("/api/v1/campaigns", {"sql": "select 1", "nodes": [lost.id]}, 201)).json
        assert named["summary"]["targets"] == 1

    rig(test)


def test_a_held_read_is_woken_also_when_the_operator_has_left(rig):
    """The campaign is written all the same; its nodes must not learn it only when their reads end."""

    async def test(box):
        web = await box.enroll("web")
        held = box.presence.hold(web.id)
        writing, go_on = threading.Event(), threading.Event()

        def block(tx):
            writing.set()
            assert go_on.wait(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(box.store.write, block)
            await trio.to_thread.run_sync(writing.wait, 10)
            async with trio.open_nursery() as operator:
                operator.start_soon(box.post, "/api/v1/campaigns", {"sql": "select 1", "all": True}, 201)
                with trio.fail_after(5):
                    while not box.store.statistics().queued_jobs:
                        await trio.sleep(0.001)
                operator.cancel_scope.cancel()
            go_on.set()
        with trio.fail_after(5):
            await held.wait()
        assert box.store.peek(campaigns.count_open) == 1

    rig(test)


def test_a_held_read_is_answered_by_the_campaign(rig):
    async def test(box):
        await box.enroll("web")
        agents = OsqueryApi(
            box.store, box.presence, box.clock, Bounds(), read_hold_s=10, new_key=lambda: "k", new_id=lambda: "i"
        )
        answers = []

        async def read():
            path = "/api/v1/osquery/distributed/read"
            body = b'{"node_key": "key 1"}'
            answered = await agents.answer(Request("POST", path, {}, body, Peer("192.0.2.1", "c"), trio.sleep_forever))
            answers.append(json.loads(answered.body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            while not box.presence.statistics().reads_held:
                await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(2):
                campaign = (await box.post("/api/v1/campaigns", {"sql": "select 1"}, 201)).json["id"]
        assert [each["queries"] for each in answers] == [{campaign: "select 1"}]

    rig(test)


def test_selectors_narrow(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        await box.enroll("web", tags=("prod",))
        await box.enroll("lab", "blue", tags=("prod",))

        async def count(**which):
            return (await box.post("/api/v1/campaigns", {"sql": "select 1", **which}, 201)).json["summary"]["targets"]

        assert await count(tags=["prod"]) == 2
        assert await count(tags=["prod"], tenant="blue") == 1
        assert await count(platforms=["darwin"]) == 0
        await box.post("/api/v1/campaigns", {"sql": "select 1", "nodes": ["none"]}, 404)
        await box.post("/api/v1/campaigns", {"sql": "select 1", "tenant": "none"}, 404)

    rig(test)


@pytest.mark.parametrize(
    "body", [{}, {"sql": " "}, {"sql": "select 1", "timeout_s": 0}, {"sql": "select 1", "accelerate": -1}, {"sql": 1}]
)
def test_a_bad_order_starts_nothing(rig, body):
    async def test(box):
        await box.post("/api/v1/campaigns", body, 400)
        assert (await box.get("/api/v1/campaigns")).json == []

    rig(test)


def test_results_are_in_the_order_of_their_coming(rig):
    async def test(box):
        web, db, lab = [await box.enroll(name) for name in ("web", "db", "lab")]
        campaign = (await box.post("/api/v1/campaigns", {"sql": "select 1 as one"}, 201)).json["id"]
        assert (await box.get(f"/api/v1/campaigns/{campaign}/results")).json == []
        await box.answer(db, campaign, [{"one": "1"}])
        await box.answer(web, campaign, [], ok=False)
        results = (await box.get("/api/v1/campaigns/latest/results")).json
        assert [(each["hostname"], each["status"], each["rows"]) for each in results] == [
            ("db", "answered", [{"one": "1"}]),
            ("web", "failed", []),
        ]
        assert (results[1]["message"], results[1]["osquery_status"]) == ("no such table", 1)
        assert (await box.get(f"/api/v1/campaigns/{campaign}/results?after=1")).json == results[1:]
        shown = (await box.get("/api/v1/campaigns/latest")).json
        assert [(each["node"], each["status"]) for each in shown["open"]] == [(lab.id, "pending")]
        cancelled = (await box.post(f"/api/v1/campaigns/{campaign}/cancel")).json
        assert (cancelled["summary"]["cancelled"], cancelled["summary"]["open"]) == (1, 0)
        assert [each["id"] for each in (await box.get("/api/v1/campaigns?limit=1")).json] == [campaign]

    rig(test)


@pytest.mark.parametrize("path", ["", "/results", "/stream"])
def test_an_unknown_campaign_is_not_found(rig, path):
    async def test(box):
        answered = await box.get(f"/api/v1/campaigns/none{path}", 404)
        assert answered.json["hint"]
        await box.get(f"/api/v1/campaigns/latest{path}", 404)

    rig(test)


def test_the_stream_of_an_ended_campaign_is_whole(rig):
    async def test(box):
        web = await box.enroll("web")
        campaign = (await box.post("/api/v1/campaigns", {"sql": "select 1", "nodes": ["web"]}, 201)).json["id"]
        await box.answer(web, campaign, [{"one": "1"}])
        answered = await box.get("/api/v1/campaigns/latest/stream")
        account, end = answered.lines
        assert (account["node"], account["status"]) == (web.id, "answered")
        assert (end["summary"]["answered"], end["summary"]["targets"]) == (1, 1)

    rig(test)


def test_a_campaign_nobody_was_asked_ends_at_once(rig):
    async def test(box):
        await box.post("/api/v1/campaigns", {"sql": "select 1"}, 201)
        (end,) = (await box.get("/api/v1/campaigns/latest/stream")).lines
        assert end["summary"]["targets"] == 0

    rig(test)


def test_a_reader_gets_each_answer_as_it_comes_and_then_the_summary(rig, stream):
    async def test(box):
        nodes = [await box.enroll(f"host-{number}") for number in range(3)]
        async with box.served() as client:
            campaign = (await client.post("/api/v1/campaigns", json={"sql": "select 1"})).json()["id"]
            await box.answer(nodes[0], campaign, [{"one": "0"}])
            async with stream(client, f"/api/v1/campaigns/{campaign}/stream") as reader:
                assert reader.headers["content-type"] == "application/x-ndjson"
                assert (await reader.object())["node"] == nodes[0].id
                for number in (2, 1):
                    await box.answer(nodes[number], campaign, [{"one": str(number)}])
                    account = await reader.object()
                    assert (account["node"], account["rows"]) == (nodes[number].id, [{"one": str(number)}])
                assert (await reader.object())["summary"]["answered"] == 3
                assert await reader.line() is None
        assert box.parts.feed.statistics().followers == 0

    rig(test)


def test_many_answers_at_once_come_each_exactly_once(rig, stream):
    async def test(box):
        nodes = [await box.enroll(f"host-{number}") for number in range(300)]
        async with box.served() as client:
            campaign = (await client.post("/api/v1/campaigns", json={"sql": "select 1"})).json()["id"]
            seen = []

            async def follow(started):
                async with stream(client, f"/api/v1/campaigns/{campaign}/stream") as reader:
                    started.set()
                    while item := await reader.object():
                        seen.append(item)

            async with trio.open_nursery() as nursery:
                started = trio.Event()
                nursery.start_soon(follow, started)
                await started.wait()
                for node in nodes:
                    nursery.start_soon(box.answer, node, campaign, [{"host": node.hostname}])
        assert seen.pop()["summary"]["answered"] == 300
        assert sorted(account["node"] for account in seen) == sorted(node.id for node in nodes)

    rig(test)


def test_a_reader_whose_queue_overflowed_still_gets_the_end(rig, stream, monkeypatch):
    monkeypatch.setattr(feed, "FOLLOWER_QUEUE_EVENTS", 3)

    async def test(box):
        web = await box.enroll("web")
        async with box.served() as client:
            campaign = (await client.post("/api/v1/campaigns", json={"sql": "select 1"})).json()["id"]

            def burst(tx):
                for _ in range(50):
                    tx.emit("unrelated")
                campaigns.write(tx, web, [Answer(campaign, True, 0, [], "", {})])

            async with stream(client, f"/api/v1/campaigns/{campaign}/stream") as reader:
                assert await reader.line() == ""
                await trio.testing.wait_all_tasks_blocked(0.05)
                await box.store.write(burst)
                with trio.fail_after(5):
                    assert [await reader.object() for _ in range(2)][1]["summary"]["answered"] == 1

    rig(test)


def test_large_answers_are_read_in_pieces(rig, monkeypatch):
    monkeypatch.setattr(campaigns, "ANSWERS_BYTES", 1000)

    async def test(box):
        nodes = [await box.enroll(f"host-{number}") for number in range(5)]
        campaign = (await box.post("/api/v1/campaigns", {"sql": "select 1"}, 201)).json["id"]
        for node in nodes:
            await box.answer(node, campaign, [{"text": "x" * 900}])
        assert len(box.store.peek(lambda db: campaigns.ended_after(db, campaign, 0))) == 1
        assert len((await box.get(f"/api/v1/campaigns/{campaign}/results")).json) == 5
        assert len((await box.get(f"/api/v1/campaigns/{campaign}/stream")).lines) == 6

    rig(test)


def test_a_stream_ends_when_the_box_stops(rig, stream):
    async def test(box):
        await box.enroll("web")
        async with box.served() as client:
            campaign = (await client.post("/api/v1/campaigns", json={"sql": "select 1"})).json()["id"]
            async with stream(client, f"/api/v1/campaigns/{campaign}/stream") as reader:
                assert await reader.line() == ""
                await client.post("/api/v1/stop", json={})
                with trio.fail_after(2):
                    assert await reader.object() is None

    rig(test)
