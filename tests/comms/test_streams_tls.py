"""Command streams over the real listener with TLS: cut, replaced, stuck, stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed

from osqbox.comms import streams
from osqbox.comms.messages import AgentStatus

from ._commands_tls import EventReader, Served, serve


def with_served(folder: Path, test: Any) -> None:
    async def run() -> None:
        async with serve(folder) as served:
            await test(served)

    trio.run(run)


async def command_ids(reader: EventReader, count: int) -> list[str]:
    found = []
    for _ in range(count):
        event = await reader.event()
        assert event is not None
        assert event["event"] == "command", event
        found.append(json.loads(event["data"])["document_id"])
    return found


def test_a_command_reaches_an_agent_that_waits_and_the_bye_is_the_end(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.add("a", "b")
        async with served.events("a") as reader, served.events("b") as other:
            for each in (reader, other):
                await each.read_bytes(1)
            assert b"200" in reader.head.split(b"\r\n")[0]
            assert {b"content-type: text/event-stream; charset=utf-8", b"cache-control: no-cache, no-store"} <= set(
                reader.head.lower().split(b"\r\n")
            )
            assert b"content-length" not in reader.head.lower()
            await served.publish("a")
            assert await command_ids(reader, 1) == ["c1"]
            served.comms.hub.stop()
            for each in (reader, other):
                farewell = await each.event()
                assert farewell is not None
                assert (farewell["event"], json.loads(farewell["data"])["reason"]) == ("bye", "box_stopping")
                assert await each.event() is None
                assert each.ended

    with_served(tmp_path, test)


def test_connections_cut_anywhere_add_up_to_every_command_once(tmp_path: Path) -> None:
    dice = random.Random(2311)

    async def test(served: Served) -> None:
        await served.add("a")
        published = [each.id for each in await served.publish(*["a"] * 300)]
        heard: list[str] = []
        last: str | None = None
        cuts = 0
        while len(heard) < len(published):
            async with served.events("a", last) as reader:
                await reader.read_bytes(dice.randrange(1, 40))
                wanted = dice.randrange(0, 30)
                cuts += 1
                for _ in range(min(wanted, len(published) - len(heard))):
                    event = await reader.event()
                    assert event is not None
                    heard.append(json.loads(event["data"])["document_id"])
                    last = event["id"]
        assert heard == published
        assert cuts > 10

    with_served(tmp_path, test)


def test_the_newest_connection_wins_over_any_transport(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.add("a")
        async with served.events("a") as first:
            await first.read_bytes(1)
            async with served.socket("a") as second:
                farewell = await first.event()
                assert farewell is not None
                assert json.loads(farewell["data"])["reason"] == "replaced"
                await served.publish("a")
                frame = json.loads(await second.get_message())
                assert (frame["event"], frame["id"], frame["data"]["document_id"]) == ("command", 1, "c1")
                async with served.events("a", "1") as third:
                    await served.publish("a")
                    assert await command_ids(third, 1) == ["c2"]
                    assert json.loads(await second.get_message())["data"]["reason"] == "replaced"
                    with pytest.raises(ConnectionClosed) as closed:
                        await second.get_message()
                    assert (closed.value.reason.code, closed.value.reason.reason) == (1008, "replaced")

    with_served(tmp_path, test)


def test_revocation_bites_at_once(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.add("a", "b")
        async with served.events("a") as events, served.socket("b") as socket:
            await events.read_bytes(1)
            for uuid in ("a", "b"):
                await served.comms.indexer.agents.change(uuid, actor="test", status=AgentStatus.REVOKED)
            with trio.fail_after(2):
                farewell = await events.event()
                assert farewell is not None
                assert json.loads(farewell["data"])["reason"] == "revoked"
                assert json.loads(await socket.get_message())["data"]["reason"] == "revoked"

    with_served(tmp_path, test)


def test_a_websocket_hears_of_an_unknown_place_and_may_say_nothing(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        await served.add("a")
        await served.publish("a")
        async with served.socket("a", "/commands?last_event_id=77") as socket:
            assert socket.subprotocol == "commands.v1"
            assert [json.loads(await socket.get_message())["event"] for _ in range(2)] == ["reset", "command"]
            await socket.send_message("hello")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.get_message()
            assert closed.value.reason.code == 1008
        assert served.comms.hub.statistics().streams == 0

    with_served(tmp_path, test)


@pytest.mark.parametrize("kind", ["events", "socket"])
def test_a_reader_that_is_stuck_is_cut_and_the_others_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for serve_stream in (streams.sse, streams.websocket):
        assert serve_stream.__kwdefaults__ is not None
        monkeypatch.setitem(serve_stream.__kwdefaults__, "write_s", 1.0)

    async def test(served: Served) -> None:
        await served.add("stuck", "a")
        await served.publish(*["stuck"] * 3000, args={"x": "y" * 8000})
        async with served.events("a") as reader, getattr(served, kind)("stuck") as stuck:
            if kind == "events":
                await stuck.read_bytes(1)
            for n in range(20):
                await served.publish("a")
                with trio.fail_after(2):
                    assert await command_ids(reader, 1) == [f"c{3001 + n}"]
            with trio.fail_after(15):
                while served.comms.hub.statistics().ended != {"too_slow": 1}:
                    await trio.sleep(0.02)
            assert served.comms.hub.statistics().delivered < 3000
            with trio.fail_after(5):
                while served.comms.hub.statistics().streams > 1:
                    await trio.sleep(0.02)

    with_served(tmp_path, test)
