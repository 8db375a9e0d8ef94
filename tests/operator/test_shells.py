"""Shell sessions over REST: asked for, listed, killed, replayed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from osqbox.operator.app import make_app
from osqbox.shells.recording import read_cast

from .shell_desk import Viewer, opened, websocket

BEARER = {"Authorization": "Bearer a-token-of-tests"}


@pytest.fixture
def desk(rig, tmp_path):
    """Runs an async test with a `Desk`."""

    def run(test, **bounds):
        async def main(box):
            async with opened(box, tmp_path / "shells", **bounds) as desk:
                await test(desk)

        rig(main)

    return run


def test_a_session_from_the_request_to_its_end(desk):
    async def test(desk):
        box = desk.box
        node = await box.enroll("web-1", tenant="default")
        wish = {"node": "web-1", "reason": "ticket 7", "cols": 100, "rows": 30, "shell": "/bin/zsh", "user": "app"}
        made = (await box.post("/api/v1/shells", wish, 201)).json
        assert {name: made[name] for name in ("node", "hostname", "tenant", "state", "by", "reason", "cols")} == {
            "node": node.id,
            "hostname": "web-1",
            "tenant": "default",
            "state": "requested",
            "by": "operator",
            "reason": "ticket 7",
            "cols": 100,
        }
        session = made["id"]
        agent = await desk.agent(session)
        now = (await box.get(f"/api/v1/shells/{session}")).json
        assert (now["state"], now["protocol"], now["viewers"], now["recording"]) == ("open", "shell.v1", [], True)
        assert now["opened_at"].endswith("Z")
        agent.exit(None, signal=9)
        await agent.hung_up.wait()
        ended = (await box.get(f"/api/v1/shells/{session}")).json
        assert (ended["state"], ended["exit_code"], ended["signal"], ended["end_reason"]) == ("ended", None, 9, "exit")

    desk(test)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({}, "bad_body"),
        ({"node": "web-1", "cols": 0}, "bad_body"),
        ({"node": "web-1", "rows": 1001}, "bad_body"),
        ({"node": "web-1", "cols": "80"}, "bad_body"),
        ({"node": "web-1", "shell": ""}, "bad_body"),
        ({"node": "web-1", "user": "x" * 257}, "bad_body"),
        ({"node": "web-1", "reason": "x" * 1001}, "bad_body"),
        ({"node": "web-1", "command": "rm"}, "bad_body"),
        ({"node": 7}, "bad_body"),
    ],
)
def test_a_bad_wish_opens_nothing(desk, wish, reason):
    async def test(desk):
        await desk.box.enroll("web-1")
        assert (await desk.box.post("/api/v1/shells", wish, 400)).json["reason"] == reason
        assert (await desk.box.get("/api/v1/shells")).json == []

    desk(test)


def test_an_unknown_or_ambiguous_node_is_named(desk):
    async def test(desk):
        for name in ("twin", "twin"):
            await desk.box.enroll(name)
        assert "nope" in (await desk.box.post("/api/v1/shells", {"node": "nope"}, 404)).json["error"]
        assert "fits 2 nodes" in (await desk.box.post("/api/v1/shells", {"node": "twin"}, 400)).json["error"]

    desk(test)


def test_the_metrics_count_sessions(desk):
    async def test(desk):
        box = desk.box
        await box.enroll("web-1", tenant="default")
        await box.post("/api/v1/shells", {"node": "web-1"}, 201)
        lines = (await box.get("/metrics")).body.decode().splitlines()
        assert 'osqbox_shells{state="requested"} 1' in lines
        assert "osqbox_shell_viewers 0" in lines

    desk(test)


def test_more_sessions_than_allowed_are_refused(desk):
    async def test(desk):
        node = await desk.box.enroll("web-1")
        await desk.box.post("/api/v1/shells", {"node": node.id}, 201)
        assert (await desk.box.post("/api/v1/shells", {"node": node.id}, 429)).json["reason"] == "shell_quota"

    desk(test, sessions_per_node=1)


def test_the_list_tells_sessions_apart(desk):
    async def test(desk):
        box = desk.box
        one, _ = await desk.open("web-1")
        box.parts.clock.at += 1
        two = await desk.session("web-2")
        await box.delete(f"/api/v1/shells/{one}")
        node = (await box.get(f"/api/v1/shells/{two}")).json["node"]

        async def listed(query=""):
            return [each["id"] for each in (await box.get(f"/api/v1/shells{query}")).json]

        assert await listed() == [two, one]
        assert await listed("?live=1") == [two]
        assert await listed("?state=ended") == [one]
        assert await listed(f"?node={node}") == [two]
        assert await listed("?tenant=other") == []
        assert await listed("?limit=1") == [two]
        assert (await box.get("/api/v1/shells?state=nope", 400)).json["reason"] == "bad_query"

    desk(test)


def test_killing_ends_it_and_is_audited_and_may_be_repeated(desk):
    async def test(desk):
        box = desk.box
        session, agent = await desk.open()
        for _ in range(2):
            killed = (await box.delete(f"/api/v1/shells/{session}")).json
            assert (killed["state"], killed["end_reason"]) == ("ended", "killed")
        await agent.hung_up.wait()
        rows = (await box.get(f"/api/v1/audit?subject={session}")).lines
        assert [(row["action"], row["actor"]) for row in rows if row["action"] in ("shell.open", "shell.kill")] == [
            ("shell.open", "operator"),
            ("shell.kill", "operator"),
        ]
        assert (await box.call("DELETE", "/api/v1/shells/nope", status=404)).json["reason"] == "unknown_session"

    desk(test)


def test_a_ticket_needs_a_live_session_and_a_known_role(desk):
    async def test(desk):
        session = await desk.session()
        ticket = (await desk.box.post(f"/api/v1/shells/{session}/tickets", {"role": "viewer"}, 201)).json
        assert len(ticket["ticket"]) > 5
        await desk.box.post(f"/api/v1/shells/{session}/tickets", {"role": "root"}, 400)
        await desk.box.post("/api/v1/shells/nope/tickets", {}, 404)
        await desk.box.delete(f"/api/v1/shells/{session}")
        await desk.box.post(f"/api/v1/shells/{session}/tickets", {}, 410)

    desk(test)


def test_the_recording_can_be_had_live_and_afterwards(desk):
    async def test(desk):
        box = desk.box
        session, agent = await desk.open()
        data = b"caf\xc3\xa9 \xff" + bytes(range(256)) * 4000
        async with box.served() as client:
            async with websocket(client, f"/api/v1/shells/{session}/terminal", BEARER, ["shell.v1"]) as socket:
                await Viewer(socket).greet()
                live = await box.get(f"/api/v1/shells/{session}/bytes")
                assert live.body == b"$ "
                agent.say(data[:150_000])
                agent.exit(0)
                await agent.hung_up.wait()
            spool = await box.get(f"/api/v1/shells/{session}/bytes")
            assert spool.body == b"$ " + data[:150_000]
            assert spool.headers["Content-Length"] == str(len(spool.body))
            cast = await box.get(f"/api/v1/shells/{session}/recording")
            assert cast.headers["Content-Disposition"] == f'attachment; filename="shell-{session}.cast"'
            recorded = read_cast(cast.body.splitlines(keepends=True))
            events = list(recorded.events)
            text = "".join(event.data for event in events if event.code == "o")
            assert text == spool.body.decode("utf-8", "replace")
            assert (events[-1].code, events[-1].data) == ("x", "0")
            assert json.loads(cast.body.splitlines()[0])["version"] == 3

    desk(test)


def test_why_there_is_no_recording_is_told(desk):
    async def test(desk):
        box = desk.box
        pending = await desk.session("web-1")
        assert "has not joined" in (await box.get(f"/api/v1/shells/{pending}/recording", 404)).json["error"]
        without, _ = await desk.open("web-2", record=False)
        for name in ("recording", "bytes"):
            assert "without" in (await box.get(f"/api/v1/shells/{without}/{name}", 404)).json["error"]
        await box.get("/api/v1/shells/nope/recording", 404)
        await box.get("/api/v1/shells/..%2F..%2Fosqbox.db/bytes", 404)

    desk(test)


@pytest.mark.parametrize(
    ("of_the_box", "wish", "recorded"),
    [(True, {}, True), (False, {}, False), (False, {"record": True}, True), (True, {"record": False}, False)],
)
def test_a_request_that_does_not_say_is_recorded_as_the_box_is_set(desk, of_the_box, wish, recorded):
    async def test(desk):
        box = desk.box
        box.parts = replace(box.parts, record_shells=of_the_box)
        box.app = make_app(box.parts)
        session = await desk.session(**wish)
        assert (await box.get(f"/api/v1/shells/{session}")).json["recording"] is recorded

    desk(test)


def test_what_is_typed_is_recorded_only_when_asked(desk):
    async def test(desk):
        for record_input in (False, True):
            session, agent = await desk.open(f"web-{record_input}", record_input=record_input)
            path = f"/api/v1/shells/{session}/terminal"
            async with desk.box.served() as client, websocket(client, path, BEARER, ["shell.v1"]) as socket:
                viewer = Viewer(socket)
                await viewer.greet()
                await viewer.type(b"hunter2\r")
                await viewer.until(b"ran hunter2")
                agent.exit(0)
                await agent.hung_up.wait()
            cast = (await desk.box.get(f"/api/v1/shells/{session}/recording")).body.splitlines(keepends=True)
            typed = [event.data for event in read_cast(cast).events if event.code == "i"]
            assert typed == (["hunter2\r"] if record_input else [])
            assert (await desk.box.get(f"/api/v1/shells/{session}")).json["record_input"] == record_input

    desk(test)


def test_without_control_everything_answers_that_it_is_off(rig):
    async def test(box):
        await box.enroll("web-1")
        for method, path in (
            ("POST", "/api/v1/shells"),
            ("GET", "/api/v1/shells"),
            ("GET", "/api/v1/shells/x"),
            ("DELETE", "/api/v1/shells/x"),
            ("POST", "/api/v1/shells/x/tickets"),
            ("GET", "/api/v1/shells/x/recording"),
            ("GET", "/api/v1/shells/x/gotty/config.js"),
        ):
            body = {"json": {"node": "web-1"} if path == "/api/v1/shells" else {}} if method == "POST" else {}
            answered = await box.call(method, path, status=404, **body)
            assert (path, answered.json["reason"]) == (path, "control_off")
            assert "--control" in answered.json["error"]

    rig(test)
