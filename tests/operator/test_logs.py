"""Log lines: the newest, after a seq, followed, exported."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from osqbox.osquery import logs


def line(name, action="added", **more):
    return {"name": name, "action": action, "hostIdentifier": "web", **more}


def named(lines):
    return [each["line"].get("name") for each in lines]


def test_the_newest_lines_come_oldest_first(rig):
    async def test(box):
        node = await box.enroll("web")
        assert (await box.get("/api/v1/logs")).body == b""
        await box.send_log(node, *(line(f"q{number}") for number in range(150)))
        lines = (await box.get("/api/v1/logs")).lines
        assert named(lines) == [f"q{number}" for number in range(50, 150)]
        assert lines[0]["node"] == node.id
        assert named((await box.get("/api/v1/logs?limit=2")).lines) == ["q148", "q149"]
        after = lines[-3]["seq"]
        assert named((await box.get(f"/api/v1/logs?after={after}")).lines) == ["q148", "q149"]
        assert named((await box.get(f"/api/v1/logs?after={after}&limit=1")).lines) == ["q148"]
        assert len((await box.get("/api/v1/logs?after=0")).lines) == 150
        assert (await box.get("/api/v1/logs?after=100000")).lines == []

    rig(test)


def test_lines_are_filtered(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        web, lab = await box.enroll("web"), await box.enroll("lab", "blue")
        await box.send_log(web, line("a", columns={"path": "/Etc/passwd"}), line("b", "removed"), line("s", "snapshot"))
        await box.send_log(web, {"severity": "0", "message": "hello"}, log_type="status")
        await box.send_log(lab, line("a"))
        assert named((await box.get("/api/v1/logs?name=a")).lines) == ["a", "a"]
        assert named((await box.get("/api/v1/logs?node=lab")).lines) == ["a"]
        assert named((await box.get("/api/v1/logs?tenant=blue")).lines) == ["a"]
        assert named((await box.get("/api/v1/logs?type=result&node=web")).lines) == ["a", "b", "s"]
        assert named((await box.get("/api/v1/logs?type=snapshot")).lines) == ["s"]
        assert (await box.get("/api/v1/logs?type=status")).lines[0]["line"]["message"] == "hello"
        assert named((await box.get("/api/v1/logs?search=etc/PASSWD")).lines) == ["a"]
        await box.get("/api/v1/logs?node=none", 404)
        await box.delete("/api/v1/nodes/lab")
        assert named((await box.get(f"/api/v1/logs?node={lab.id}")).lines) == ["a"]
        await box.get("/api/v1/logs?node=lab", 404)

    rig(test)


def test_an_export_is_what_osquery_would_have_written(rig):
    async def test(box):
        node = await box.enroll("web")
        batch = {"name": "b", "diffResults": {"added": [{"a": "1"}], "removed": []}, "unixTime": 5}
        added, shot = line("a", columns={"x": "ü"}), {"name": "s", "snapshot": [{"a": "1"}], "action": "snapshot"}
        status = {"severity": "0", "message": "hello"}
        await box.send_log(node, added, batch, shot)
        await box.send_log(node, status, log_type="status")
        exported = await box.get("/api/v1/logs/export?type=result")
        assert exported.body == b"".join(json.dumps(each).encode() + b"\n" for each in (added, batch))
        assert (await box.get("/api/v1/logs/export")).body == exported.body
        assert (await box.get("/api/v1/logs/export?type=snapshot&node=web")).lines == [shot]
        assert (await box.get("/api/v1/logs/export?type=status&tenant=default")).lines == [status]
        await box.get("/api/v1/logs/export?name=a", 400)

    rig(test)


@pytest.mark.parametrize("bound", ["FOUND_BYTES", "PAGE_LINES"])
def test_many_lines_are_read_in_pieces(rig, monkeypatch, bound):
    from osqbox.operator import logs as operator_logs

    monkeypatch.setattr(logs if bound == "FOUND_BYTES" else operator_logs, bound, 3)

    async def test(box):
        node = await box.enroll("web")
        await box.send_log(node, *(line(f"q{number}") for number in range(20)))
        async with box.served() as client:
            for path, count in (("logs?after=0", 20), ("logs?after=0&limit=7", 7), ("logs/export", 20)):
                assert len((await client.get(f"/api/v1/{path}")).text.splitlines()) == count

    rig(test)


def test_a_follower_gets_what_was_there_and_what_comes_each_once(rig, stream):
    async def test(box):
        web, other = await box.enroll("web"), await box.enroll("other")
        await box.send_log(web, *(line(f"old{number}") for number in range(5)))
        async with box.served() as client, stream(client, "/api/v1/logs?limit=2&follow=1&node=web") as reader:
            assert named(await reader.objects(2)) == ["old3", "old4"]
            await box.send_log(other, line("elsewhere"))
            await box.send_log(web, line("new0"), line("new1"))
            await box.send_log(web, line("new2"))
            with trio.fail_after(5):
                assert named(await reader.objects(3)) == ["new0", "new1", "new2"]

    rig(test)


def test_a_follower_under_load_loses_and_repeats_nothing(rig, stream):
    async def test(box):
        node = await box.enroll("web")
        await box.send_log(node, *(line(f"{number}") for number in range(500)))
        async with box.served() as client:
            seen = []

            async def follow(started):
                async with stream(client, "/api/v1/logs?after=0&follow=1") as reader:
                    started.set()
                    seen.extend([each["seq"] for each in await reader.objects(2500)])

            async with trio.open_nursery() as nursery:
                started = trio.Event()
                nursery.start_soon(follow, started)
                await started.wait()
                for batch in range(40):
                    await box.send_log(node, *(line(f"{batch}-{number}") for number in range(50)))
        assert seen == list(range(1, 2501))

    rig(test)


def test_a_follower_that_left_leaves_nothing_behind(rig, stream):
    async def test(box):
        async with box.served() as client:
            async with stream(client, "/api/v1/logs?follow=1") as reader:
                assert await reader.line() == ""
                assert box.parts.feed.statistics().followers == 1
            with trio.fail_after(5):
                while box.parts.feed.statistics().followers:
                    await trio.testing.wait_all_tasks_blocked()

    rig(test)


def test_a_head_request_of_a_stream_ends_at_once(rig):
    async def test(box):
        async with box.served() as client:
            for path in ("/api/v1/logs?follow=1", "/api/v1/stream"):
                with trio.fail_after(5):
                    assert (await client.head(path)).status_code == 200

    rig(test)
