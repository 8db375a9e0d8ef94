"""Commands on the wire: server-sent events and WebSocket frames, cut, stuck, and ended."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from osqbox.clock import SystemClock
from osqbox.comms.hub import Bye, Deliver, Reset
from osqbox.comms.messages import Change, Result
from osqbox.comms.streams import (
    PIECE_BYTES,
    SSE_COMMENT,
    SSE_OPENING,
    UNKNOWN_SEQ,
    TooSlow,
    last_event_id,
    sse,
    sse_pieces,
    websocket,
    wire,
)

from ._commands import Rig, agent, open_rig

Test = Callable[[Rig], Awaitable[None]]


def with_rig(folder: Path, test: Test, **kwargs: Any) -> None:
    async def run() -> None:
        async with open_rig(folder, **kwargs) as rig:
            await test(rig)

    trio.run(run)


class EventSource:
    """A client that parses what has arrived as the standard says: half an event at the end does not exist."""

    def __init__(self, cut_after_bytes: int | None = None, *, is_noticed: bool = True) -> None:
        """``is_noticed``: the server's write fails; else the rest got lost behind the server's back."""
        self.received = b""
        self.sent_bytes = 0
        self._cut_after_bytes = cut_after_bytes
        self._is_noticed = is_noticed
        self.arrived = trio.Event()

    async def send(self, piece: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.received += piece
        self.sent_bytes += len(piece)
        if self._cut_after_bytes is not None and self.sent_bytes > self._cut_after_bytes:
            self.received = self.received[: self._cut_after_bytes]
            if self._is_noticed:
                raise trio.BrokenResourceError("cut")
        self.arrived.set()
        self.arrived = trio.Event()

    @property
    def events(self) -> list[dict[str, str]]:
        found = []
        for block in self.received.decode(errors="ignore").split("\n\n")[:-1]:
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            fields = {name: value.removeprefix(" ") for name, _, value in (line.partition(":") for line in lines)}
            if "data" in fields:
                found.append(fields)
        return found

    @property
    def last_event_id(self) -> str | None:
        return next((event["id"] for event in reversed(self.events) if "id" in event), None)

    def commands(self) -> list[str]:
        return [json.loads(event["data"])["document_id"] for event in self.events if event["event"] == "command"]

    async def wait_for(self, count: int) -> None:
        while len(self.events) < count:
            await self.arrived.wait()


# server-sent events


def test_an_event_is_whole_and_says_what_agents_need(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        (command,) = await rig.publish("a", name="upgrade", args={"file_name": "ü\n\u2028.wpk"}, user="ann")
        assert wire(command) == {
            "document_id": "c1",
            "request_id": "r1",
            "order_id": "c1",
            "source": "Users/Services",
            "user": "ann",
            "target": {"type": "agent", "id": "a"},
            "action": {"name": "upgrade", "version": "", "args": {"file_name": "ü\n\u2028.wpk"}},
            "timeout": 3600,
            "status": "pending",
        }
        (piece,) = sse_pieces(Deliver([command]))
        head, data, *end = piece.split(b"\ndata: ")[0], *piece.split(b"\ndata: ")[1].split(b"\n")
        assert (head, json.loads(data), end) == (b"id: 1\nevent: command", {"id": "c1", **wire(command)}, [b"", b""])

    with_rig(tmp_path, test)


def test_the_other_items() -> None:
    assert b"".join(sse_pieces(Reset())) == b'id: 0\nevent: reset\ndata: {"reason":"unknown_last_event_id"}\n\n'
    bye = b"".join(sse_pieces(Bye("box_stopping", 700)))
    assert bye == b'retry: 700\nevent: bye\ndata: {"reason":"box_stopping","retry_ms":700}\n\n'


def test_a_page_of_large_commands_goes_out_in_pieces_of_whole_events(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        commands = await rig.publish(*["a"] * 20, args={"x": "y" * (PIECE_BYTES // 3)})
        pieces = list(sse_pieces(Deliver(commands)))
        assert len(pieces) == 10
        assert {piece.count(b"event: command") for piece in pieces} == {2}
        assert all(len(piece) <= PIECE_BYTES and piece.endswith(b"\n\n") for piece in pieces)

    with_rig(tmp_path, test)


@pytest.mark.parametrize(
    ("sent", "seq"),
    [
        *((None, None), ("", None), (" ", None), ("0", 0), ("17", 17), (" 17 ", 17)),
        *((each, UNKNOWN_SEQ) for each in ("-1", "1.0", "x", "1" * 30, "٣", "0x1", "1 2", "+1")),
    ],
)
def test_what_an_agent_says_of_where_it_was(sent: str | None, seq: int | None) -> None:
    assert last_event_id(sent) == seq


def test_a_stream_opens_at_once_and_is_kept_alive(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        source = EventSource()
        async with rig.attach("a") as stream, trio.open_nursery() as nursery:

            async def write() -> None:
                await sse(stream, source.send, keep_alive_s=0.02)

            nursery.start_soon(write)
            while source.received.count(SSE_COMMENT) < 3:
                await source.arrived.wait()
            assert source.received.startswith(SSE_OPENING)
            assert b"retry: 2000\n" in SSE_OPENING
            await rig.publish("a")
            await source.wait_for(1)
            rig.hub.stop()
        assert [event["event"] for event in source.events] == ["command", "bye"]
        assert (await rig.found("c1")).answered

    with_rig(tmp_path, test)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_cut_at_any_byte_loses_nothing_and_repeats_nothing(tmp_path: Path, is_noticed: bool) -> None:
    """As many agents as there are bytes in a stream of three commands, each cut somewhere else."""

    async def listen(rig: Rig, uuid: str, source: EventSource, after: int | None) -> None:
        async with rig.attach(uuid, after) as stream:
            try:
                await sse(stream, source.send)
            except trio.BrokenResourceError:
                return

    async def one(rig: Rig, uuid: str, published: list[str], cut: int, length: int) -> None:
        first, second = EventSource(cut, is_noticed=is_noticed), EventSource()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, rig, uuid, first, None)
            while not is_noticed and first.sent_bytes < length:
                await first.arrived.wait()
            if not is_noticed:
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, rig, uuid, second, last_event_id(first.last_event_id))
            await second.wait_for(3 - len(first.events))
            nursery.cancel_scope.cancel()
        assert first.commands() + second.commands() == published, cut

    async def test(rig: Rig) -> None:
        sample = await rig.publish(*["sample"] * 3)
        length = len(SSE_OPENING) + sum(map(len, sse_pieces(Deliver(sample))))
        agents = [f"a{n:05}" for n in range(length)]
        published = await rig.publish(*[each for each in agents for _ in range(3)])
        of_agent: dict[str, list[str]] = {each: [] for each in agents}
        for command in published:
            of_agent[command.agent].append(command.id)
        async with trio.open_nursery() as nursery:
            for cut, uuid in enumerate(agents):
                nursery.start_soon(one, rig, uuid, of_agent[uuid], cut, length)

    with_rig(tmp_path, test)


def test_after_a_cut_without_last_event_id_only_the_unacknowledged_comes_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "a", "a")
        first = EventSource(10_000)
        async with rig.attach("a") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(sse, stream, first.send)
            await first.wait_for(3)
            nursery.cancel_scope.cancel()
        await rig.commands.take_result("a", "c2", Result(code=2), 0)
        await rig.publish("a")
        second = EventSource()
        async with rig.attach("a") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(sse, stream, second.send)
            await second.wait_for(3)
            nursery.cancel_scope.cancel()
        assert (first.commands(), second.commands()) == (["c1", "c2", "c3"], ["c1", "c3", "c4"])

    with_rig(tmp_path, test)


def test_a_write_that_failed_is_pending_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        async with rig.attach("a") as stream:
            with pytest.raises(trio.BrokenResourceError, match="cut"):
                await sse(stream, EventSource(len(SSE_OPENING) + 5).send)
        command = await rig.found("c1")
        assert (command.status, command.answered, command.deliveries) == ("pending", False, 1)

    with_rig(tmp_path, test)


def test_a_stuck_reader_is_ended_holds_one_page_and_slows_nobody(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish(*["stuck"] * 1000)
        ended = trio.Event()

        async def send(piece: bytes) -> None:
            if piece != SSE_OPENING:
                await trio.sleep_forever()

        async def stuck() -> None:
            async with rig.attach("stuck") as stream:
                with pytest.raises(TooSlow):
                    await sse(stream, send, write_s=1.5)
                assert (await stream.next()).reason == "too_slow"
            ended.set()

        source = EventSource()
        async with rig.attach("a") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stuck)
            nursery.start_soon(sse, stream, source.send)
            for n in range(5):
                await rig.publish("a")
                await source.wait_for(n + 1)
            assert not ended.is_set()
            assert rig.hub.statistics().delivered == 100 + 5
            await ended.wait()
            nursery.cancel_scope.cancel()
        assert rig.hub.statistics().ended == {"too_slow": 1}
        assert [each.status for each in await rig.commands.page(agent="stuck", limit=1000)] == ["pending"] * 1000

    with_rig(tmp_path, test)


def test_a_stream_ends_with_its_token(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        source = EventSource()
        async with rig.attach("a", valid_s=0.1) as stream:
            await sse(stream, source.send)
        assert json.loads(source.events[0]["data"]) == {"reason": "token_expired", "retry_ms": 0}
        assert source.received.count(b"retry: ") == 1  # a browser would keep a 0 for every later failure

    with_rig(tmp_path, test, clock=SystemClock())


# WebSocket


class FakeSocket:
    """An accepted WebSocket in memory, whose other end is the test."""

    def __init__(self) -> None:
        self.frames: list[Any] = []
        self.closed: tuple[int, str] | None = None
        self.is_closed = False
        self.is_stuck = False
        self.cut = trio.Event()
        self.arrived = trio.Event()
        self._say, self._hear = trio.open_memory_channel[str | None](1)

    def say(self, message: str | None) -> None:
        self._say.send_nowait(message)

    async def receive(self) -> str | None:
        message = await self._hear.receive()
        self.is_closed = message is None
        return message

    async def send(self, message: bytes | str) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_stuck:
            with trio.CancelScope(shield=True):  # as the listener's: half a frame must not be left behind
                await self.cut.wait()
        if not self.is_closed:
            self.frames.append(json.loads(message))
            self.arrived.set()
            self.arrived = trio.Event()

    async def aclose(self, code: int, reason: str = "") -> None:
        await trio.lowlevel.checkpoint()
        self.closed = self.closed or (code, reason)
        self.is_closed = True
        self.cut.set()

    async def wait_for(self, count: int) -> None:
        while len(self.frames) < count:
            await self.arrived.wait()

    @property
    def heard(self) -> list[tuple[str, Any]]:
        return [(frame["event"], frame.get("id")) for frame in self.frames]


async def serve(rig: Rig, socket: FakeSocket, after: int | None = None, valid_s: float = 900, **kwargs: Any) -> None:
    async with rig.attach("a", after, valid_s=valid_s) as stream:
        await websocket(stream, socket, **kwargs)


def test_frames_are_commands_as_they_come_and_a_bye(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        socket = FakeSocket()
        (command,) = await rig.publish("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, rig, socket, 99)
            await socket.wait_for(2)
            await rig.publish("a")
            await socket.wait_for(3)
            rig.hub.stop()
        assert socket.heard == [("reset", 0), ("command", 1), ("command", 2), ("bye", None)]
        assert socket.frames[1]["data"] == {"id": "c1", **wire(command)}
        assert socket.frames[-1]["data"]["reason"] == "box_stopping"
        assert socket.closed == (1001, "box_stopping")
        assert (await rig.found("c2")).answered

    with_rig(tmp_path, test)


@pytest.mark.parametrize(("said", "code"), [("hello", 1008), (None, 1008)])
def test_an_agent_that_speaks_or_goes_ends_its_stream(tmp_path: Path, said: str | None, code: int) -> None:
    async def test(rig: Rig) -> None:
        socket = FakeSocket()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, rig, socket)
            await trio.testing.wait_all_tasks_blocked()
            socket.say(said)
        assert socket.closed == (code, "only the server sends on this connection")
        assert rig.hub.statistics().streams == 0

    with_rig(tmp_path, test)


def test_what_is_sent_to_an_agent_that_has_gone_is_pending_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        socket = FakeSocket()
        socket.is_closed = True
        await rig.publish("a")
        with trio.fail_after(5):
            await serve(rig, socket)
        assert (await rig.found("c1")).status == "pending"

    with_rig(tmp_path, test)


def test_a_stuck_socket_is_closed_for_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        socket = FakeSocket()
        socket.is_stuck = True
        await rig.publish("a")
        await serve(rig, socket, write_s=0.05)
        assert socket.closed == (1013, "too_slow")
        assert (await rig.found("c1")).status == "pending"
        assert rig.hub.statistics().ended == {"too_slow": 1}

    with_rig(tmp_path, test)


def test_a_socket_hears_that_it_was_replaced_or_is_not_welcome(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        older, newer = FakeSocket(), FakeSocket()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, rig, older)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(serve, rig, newer)
            await older.wait_for(1)
            rig.agents.changed["a"] = agent("a", key_version=2)
            rig.hub.changed(Change(kind="agents", agents=("a",)))
        assert (older.closed, newer.closed) == ((1008, "replaced"), (1008, "revoked"))

    with_rig(tmp_path, test)
