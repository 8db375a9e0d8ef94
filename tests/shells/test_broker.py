"""Sessions through real sockets: an agent, operators, and what becomes of every byte between them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import shell_frames as frames
from osqbox.errors import Refused
from osqbox.listen.asgi import ClientGone
from osqbox.listen.websocket import WebSocket
from osqbox.shell_frames import CloseCode, FrameType, Role, Size
from osqbox.shells.messages import EndReason, Grant, ShellBounds, State
from osqbox.shells.recording import RecordingRules, read_cast
from osqbox.shells.session import LiveSession
from osqbox.store import drops


def test_a_shell_from_request_to_exit(shells: Any, run: Any) -> None:
    """What the agent prints is shown, what the operator types arrives, and EXIT comes last."""

    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered(reason="disk full")
            async with box.agent(session, secret, host="web-1") as agent, box.viewer(session) as viewer:
                await viewer.has_role(Grant.CONTROLLER)
                await agent.print(b"$ ")
                assert await viewer.read(2) == b"$ "
                await viewer.type(b"exit 7\r")
                assert await agent.read_typed(7) == b"exit 7\r"
                await agent.print(b"logout\r\n")
                await agent.exit(code=7, reason="exit")
                how = await viewer.read_exit()
                assert (how.code, how.signal, how.reason) == (7, None, "exit")
                assert viewer.shown == b"$ logout\r\n"
                assert await viewer.close_code() == CloseCode.NORMAL
            facts = await box.state_becomes(session, State.ENDED)
            assert (facts.end_reason, facts.exit_code, facts.output_bytes) == (EndReason.EXIT, 7, 10)

    run(main)


def test_a_held_poll_is_answered_at_once(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells() as box, trio.open_nursery() as nursery:
            offers: list[Any] = []

            async def poll() -> None:
                offers.extend(await box.offers())

            nursery.start_soon(poll)
            while not box.broker.statistics().held_polls:
                await trio.sleep(0.01)
            began = trio.current_time()
            session = await box.open()
            while not offers:
                await trio.sleep(0.005)
            assert offers[0]["session_id"] == session.id
            assert trio.current_time() - began < 1

    run(main)


def test_many_megabytes_arrive_exactly(shells: Any, run: Any, tmp_path: Any) -> None:
    """With a recording on, and while a second viewer never reads: the same bytes for the first, and on the disk."""
    size_bytes = 8 * 2**20
    block = os.urandom(2**20)

    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as viewer,
                box.viewer(session, "deaf", grant=Grant.VIEWER),
                trio.open_nursery() as nursery,
            ):
                expected = hashlib.sha256()

                async def produce() -> None:
                    for _ in range(size_bytes // len(block)):
                        expected.update(block)
                        await agent.print(block)
                    await agent.exit(code=0)

                nursery.start_soon(produce)
                got = hashlib.sha256()
                while viewer.exit is None:
                    await viewer.heed()
                    got.update(viewer.shown)
                    viewer.shown.clear()
                assert viewer.offset == size_bytes
                assert got.digest() == expected.digest()
                assert hashlib.sha256((tmp_path / "shells" / session / "bytes").read_bytes()).digest() == got.digest()

    run(main, 60)


def test_read_only_viewers_change_nothing(shells: Any, run: Any) -> None:
    """Input of a viewer is dropped and counted, its size ignored, and asking for control refused."""

    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session, cols=100, rows=30) as alice,
                box.viewer(session, "c2", by="bob", grant=Grant.VIEWER) as bob,
            ):
                await bob.has_role(Grant.VIEWER)
                await bob.type(b"rm -rf /\r")
                await bob.send(frames.resize(Size(10, 10)), frames.role(Role(want="controller")))
                await bob.until(lambda me: any(notice.code == "read_only" for notice in me.notices))
                await bob.until(lambda me: me.input_acked == 9)
                await alice.type(b"ls\r")
                assert await agent.read_typed(3) == b"ls\r"
                facts = box.broker.session(session)
                assert facts.dropped_input_bytes == 9
                assert (facts.cols, facts.rows, facts.controller) == (100, 30, "alice")
                assert set(agent.sizes) <= {Size(100, 30)}
            assert any(row["result"] == "read_only" for row in await box.audited("shell.control"))

    run(main)


def test_control_is_handed_over(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as alice,
                box.viewer(session, "c2", by="bob") as bob,
            ):
                await bob.has_role(Grant.VIEWER)
                await alice.type(b"a")
                await agent.read_typed(1)
                await bob.send(frames.role(Role(want="controller")))
                await bob.has_role(Grant.CONTROLLER)
                await alice.has_role(Grant.VIEWER)
                assert alice.role.controller == "bob"
                await alice.type(b"x")
                await alice.until(lambda me: me.input_acked == 2)
                await bob.type(b"b")
                assert await agent.read_typed(2) == b"ab"
                await bob.send(frames.role(Role(want="viewer")))
                await alice.has_role(Grant.CONTROLLER)

    run(main)


def test_an_operator_who_dropped_goes_on_where_it_was(shells: Any, run: Any) -> None:
    """Output contiguous, input once: what was sent twice around the break counts once."""

    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                async with box.viewer(session) as viewer:
                    await agent.print(b"0123456789")
                    await viewer.read(10)
                    await viewer.type(b"abc")
                    await agent.read_typed(3)
                    await viewer.socket.aclose(1001)
                await agent.print(b"while you were away")
                async with box.viewer(session, resume=10) as viewer:
                    assert viewer.welcome.input == 3
                    await viewer.send(frames.data_in(1, b"bcd"))
                    assert await viewer.read(19) == b"while you were away"
                    assert await agent.read_typed(4) == b"abcd"
                    await viewer.has_role(Grant.CONTROLLER)

    run(main)


def test_leaving_on_purpose_ends_the_session_at_once(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                async with box.viewer(session):
                    pass  # closes with 1000
                frame = await agent.next(FrameType.EXIT)
                assert frames.parse(frame, frames.Exit).reason == EndReason.OPERATOR_LEFT
                assert await agent.close_code() == CloseCode.NORMAL
            assert box.broker.session(session).end_reason is EndReason.OPERATOR_LEFT

    run(main)


def test_a_dropped_operator_is_waited_for(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(viewer_grace_s=0.3)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                async with box.viewer(session) as viewer:
                    await viewer.socket.aclose(1001)
                assert box.broker.session(session).state is State.OPEN
                await agent.next(FrameType.EXIT)
            assert box.broker.session(session).end_reason is EndReason.OPERATOR_LEFT

    run(main)


def test_an_agent_that_dropped_comes_back(shells: Any, run: Any) -> None:
    """Unacknowledged output comes again and is shown once; input goes on where the agent says it is."""

    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with box.viewer(session) as viewer:
                async with box.agent(session, secret) as agent:
                    resume = agent.welcome.resume
                    await agent.print(b"one ")
                    await viewer.read(4)
                    await agent.socket.aclose(1001)
                await box.state_becomes(session, State.DETACHED)
                await viewer.type(b"typed meanwhile")
                async with box.agent(session, resume=resume, head=8) as agent:
                    assert (agent.welcome.wanted, agent.welcome.input) == (4, 0)
                    await agent.send(frames.data_out(0, b"one two "))
                    assert await viewer.read(8) == b"one two "
                    assert await agent.read_typed(15) == b"typed meanwhile"
                    await agent.exit(signal=9)
                    assert (await viewer.read_exit()).signal == 9

    run(main)


def test_an_agent_that_stays_away_loses_its_shell(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(agent_grace_s=0.2)) as box:
            session, secret = await box.offered()
            async with box.viewer(session) as viewer:
                async with box.agent(session, secret) as agent:
                    resume = agent.welcome.resume
                assert (await viewer.read_exit()).reason == EndReason.AGENT_LOST
                assert await viewer.close_code() == CloseCode.ENDED
            async with box.socket(f"/api/v1/shells/{session}") as socket:
                await socket.send_message(
                    frames.encode(frames.hello(frames.AgentHello(session=session, resume=resume)))
                )
                refused = frames.decode(await socket.get_message())
                assert frames.parse(refused, frames.Error).code == "ended"

    run(main)


def test_the_kill_switch(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells() as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await box.broker.kill(session, "root")
                await agent.next(FrameType.EXIT)
                assert (await viewer.read_exit()).reason == EndReason.KILLED
                assert await viewer.close_code() == CloseCode.ENDED
            [row] = await box.audited("shell.kill")
            assert (row["actor"], row["subject"]) == ("root", session)
            await box.broker.kill(session, "root")
            with pytest.raises(Refused):
                await box.broker.kill("nobody", "root")

    run(main)


def test_tickets_are_good_once(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(ticket_s=0.2)) as box:
            first, second = (await box.open()).id, (await box.open()).id
            ticket = await box.broker.ticket(first, "bob", Grant.VIEWER)
            redeemed = await box.broker.redeem(first, ticket.ticket)
            assert (redeemed.by, redeemed.grant) == ("bob", Grant.VIEWER)
            foreign = await box.broker.ticket(first, "bob", Grant.VIEWER)
            late = await box.broker.ticket(first, "bob", Grant.VIEWER)
            for session, text in ((first, ticket.ticket), (second, foreign.ticket), (first, "guess")):
                with pytest.raises(Refused, match="ticket"):
                    await box.broker.redeem(session, text)
            await trio.sleep(0.25)
            with pytest.raises(Refused, match="ticket"):
                await box.broker.redeem(first, late.ticket)
            assert len([row for row in await box.audited("shell.view") if row["result"] == "ticket"]) == 4

    run(main)


def test_quotas(shells: Any, run: Any) -> None:
    async def main() -> None:
        bounds = ShellBounds(sessions=4, sessions_per_node=2, sessions_per_operator=3)
        async with shells(bounds) as box:
            await box.open("n1")
            second = await box.open("n1")
            for node, by, words in (("n1", "bob", "node"), ("n2", "alice", None), ("n3", "alice", "operator")):
                if words is None:
                    await box.open(node, by)
                    continue
                with pytest.raises(Refused, match=words) as refused:
                    await box.open(node, by)
                assert refused.value.status == 429
            await box.open("n4", "bob")
            with pytest.raises(Refused, match="in all"):
                await box.open("n5", "carol")
            await box.broker.kill(second.id, "alice")
            await box.open("n5", "carol")

    run(main)


def test_a_session_that_nobody_fetches_expires(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(pending_s=0.2, hold_s=0.1)) as box:
            session = (await box.open()).id
            facts = await box.state_becomes(session, State.ENDED)
            assert facts.end_reason is EndReason.EXPIRED
            assert await box.offers() == []

    run(main)


def test_viewers_that_do_not_read_harm_nobody(shells: Any, run: Any) -> None:
    """They are gone in time, the session goes on, and stopping does not wait for them."""

    async def main() -> None:
        async with shells(ShellBounds(viewer_stall_s=0.5, hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as viewer,
                box.viewer(session, "deaf", by="bob", grant=Grant.VIEWER) as deaf,
            ):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(agent.print, bytes(600_000))
                    await viewer.read(600_000)
                while len(box.broker.session(session).viewers) > 1:
                    await trio.sleep(0.05)
                assert await deaf.close_code() == CloseCode.TOO_SLOW
                await agent.print(b"on")
                await viewer.read(600_002)
            left = [row["result"] for row in await box.audited("shell.leave", actor="bob")]
            assert left == ["too_slow"]

    run(main)


def test_a_slow_viewer_is_moved_forward(shells: Any, run: Any) -> None:
    """It is told what it missed, its terminal is reset, and it goes on at the begin of a line."""

    async def main() -> None:
        async with shells(ShellBounds(lag_bytes=300_000, hold_s=0.05), rules=None) as box:
            session, secret = await box.offered()
            line = b"0123456789" * 7 + b"\r\n"
            size_bytes = 20_000 * len(line)
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as fast,
                box.viewer(session, "slow", by="bob", grant=Grant.VIEWER) as slow,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(agent.print, line * 20_000)
                while fast.offset < size_bytes:
                    await fast.heed()
                    fast.shown.clear()
                await slow.until(lambda me: me.offset == size_bytes)
                assert slow.resets
                assert all(end % len(line) == 0 for _, end in slow.resets)
                assert len(slow.shown) == size_bytes - sum(end - start for start, end in slow.resets)
                assert box.broker.statistics().skipped_bytes > 0

    run(main)


def test_the_controller_slows_the_shell_and_nobody_else_does(shells: Any, run: Any) -> None:
    """An agent runs at most a window ahead of what the controller has acknowledged, and freely without one."""

    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                async with box.viewer(session) as viewer, trio.open_nursery() as nursery:
                    nursery.start_soon(agent.print, bytes(4 * 2**20))
                    with trio.move_on_after(0.5):
                        while True:
                            await viewer.heed(ack=False)
                    assert box.broker.session(session).output_bytes <= frames.AGENT_WINDOW_BYTES
                    await viewer.socket.aclose(1001)
                assert agent.head == 4 * 2**20

    run(main)


def test_a_viewer_that_is_further_back_is_served_from_the_recording(shells: Any, run: Any) -> None:
    async def main() -> None:
        data = os.urandom(3 * 2**20)
        async with shells(ShellBounds(ring_bytes=2**18, hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                await agent.print(data)
                while box.broker.session(session).output_bytes < len(data):
                    await trio.sleep(0.01)
                async with (
                    box.viewer(session, resume=5) as viewer,
                    box.viewer(session, "c2", grant=Grant.VIEWER) as newcomer,
                ):
                    assert (viewer.welcome.floor, viewer.welcome.offset) == (0, 5)
                    assert await viewer.read(len(data) - 5) == data[5:]
                    assert newcomer.welcome.offset == len(data) - 256 * 1024

    run(main)


def test_a_flood_of_input_is_queued_and_never_cut(shells: Any, run: Any) -> None:
    """1 MiB goes at once; what is beyond comes at the rate, whole."""
    paste = os.urandom(300_000)

    async def main() -> None:
        bounds = ShellBounds(input_bytes_per_s=200_000, input_burst_bytes=100_000, hold_s=0.05)
        async with shells(bounds) as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as viewer,
                trio.open_nursery() as nursery,
            ):
                began = trio.current_time()
                nursery.start_soon(viewer.type, paste)
                assert await agent.read_typed(len(paste)) == paste
                assert trio.current_time() - began > 0.9

    run(main)


def test_resize_storms_end_with_the_right_size(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                for cols in range(20, 220):
                    await viewer.send(frames.resize(Size(cols, 50)))
                while not agent.sizes or agent.sizes[-1] != Size(219, 50):
                    await agent.heed()
                assert len(agent.sizes) < 20

    run(main)


@pytest.mark.parametrize("reason", [EndReason.IDLE, EndReason.MAX_TIME])
def test_idle_and_maximum_time(shells: Any, run: Any, reason: EndReason) -> None:
    """With a notice before the end."""
    limits = {EndReason.IDLE: {"idle_s": 1.2}, EndReason.MAX_TIME: {"max_s": 1.2}}[reason]

    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05, **limits)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret), box.viewer(session) as viewer:
                assert (await viewer.read_exit()).reason == reason
                assert [notice.code for notice in viewer.notices] == [reason]

    run(main)


def test_half_open_connections_are_found(shells: Any, run: Any, monkeypatch: Any) -> None:
    """An agent that answers no ping is detached, a viewer is closed."""
    monkeypatch.setattr("osqbox.shells.sides.PING_INTERVAL_S", 0.3)
    monkeypatch.setattr("osqbox.shells.session.PEER_LOST_S", 0.9)

    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with (
                box.agent(session, secret) as agent,
                box.viewer(session) as viewer,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(viewer.until, lambda me: bool(me.notices))
                assert await agent.close_code() == CloseCode.TOO_SLOW
                await box.state_becomes(session, State.DETACHED)
                assert await viewer.close_code() == CloseCode.TOO_SLOW

    run(main)


def test_the_box_stops_with_stalled_peers(shells: Any, run: Any) -> None:
    """Neither a viewer nor an agent that has stopped reading holds it up."""

    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await agent.print(bytes(frames.AGENT_WINDOW_BYTES))
                await viewer.send(frames.data_in(0, bytes(60_000)))
                await trio.sleep(0.2)
                began = trio.current_time()
                await box.broker.stop()
                await box.listener.drain()
                assert trio.current_time() - began < 3

    run(main)


@pytest.mark.parametrize(("closed_here", "code"), [(True, 1006), (False, 1000)])
def test_what_the_box_closed_was_not_left_on_purpose(run: Any, closed_here: bool, code: int) -> None:
    """The server says 1000 to its application after either."""

    async def main() -> None:
        async def receive() -> Any:
            await trio.lowlevel.checkpoint()
            return {"type": "websocket.disconnect", "code": 1000}

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            if message["type"] == "websocket.send":
                raise ClientGone

        socket = WebSocket(receive, send)
        await socket.send(b"to nobody")
        if closed_here:
            socket = WebSocket(receive, send)
            await socket.aclose(1001, "the box stops")
        assert await socket.receive() is None
        assert socket.close_code == code

    run(main)


def test_titles_are_filtered(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05)) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await agent.send(frames.Frame(FrameType.TITLE, 0, b"vim\x1b]52;c;eA==\x07\x9b\xe2\x80\xae"))
                title = await viewer.next(FrameType.TITLE)
                assert title.payload.decode() == box.broker.session(session).title
                assert title.payload.decode().isprintable()

    run(main)


def test_a_strict_recording_that_fails_ends_the_session(shells: Any, run: Any) -> None:
    async def main() -> None:
        rules = RecordingRules(strict=True, max_bytes=1000, reserve_bytes=0)
        async with shells(ShellBounds(hold_s=0.05), rules=rules) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await agent.print(bytes(2000))
                assert (await viewer.read_exit()).reason == EndReason.RECORDING_FAILED
                assert [notice.code for notice in viewer.notices] == ["recording_failed"]
                await agent.next(FrameType.EXIT)

    run(main)


def test_recordings_say_who_was_there_and_are_kept_by_retention(shells: Any, run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05, recordings_age_s=0)) as box:
            session, secret = await box.offered(record_input=True)
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await viewer.type(b"ls\r")
                await agent.read_typed(3)
                await agent.print(b"ok")
                await viewer.read(2)
                await agent.exit(code=0)
                await viewer.read_exit()
            while not (rows := await box.audited("shell.recording")):
                await trio.sleep(0.05)
            folder = box.broker.recording_directory(session)
            with (folder / "cast").open("rb") as lines:
                told = [(event.code, event.data) for event in read_cast(lines).events]
            assert ("m", "alice joined as controller") in told
            assert ("i", "ls\r") in told
            assert rows[0]["data"]["sha256"] == hashlib.sha256(b"ok").hexdigest()
            await box.broker.prune_recordings()
            assert not folder.exists()
            assert [row["result"] for row in await box.audited("shell.recording")] == ["kept", "deleted"]
            assert (await box.store.read(drops))["recordings"] == 1

    run(main)


def test_what_goes_wrong_in_one_session_stays_there(
    shells: Any, run: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the clock's work nor the writing of what happened stops for the others."""
    tick = LiveSession.tick

    def stumbling(live: LiveSession, now: float) -> None:
        if live.node == "n1":
            raise RuntimeError("a bug")
        tick(live, now)

    monkeypatch.setattr(LiveSession, "tick", stumbling)

    async def main() -> None:
        async with shells(ShellBounds(pending_s=0.1)) as box:
            first, second = (await box.open("n1")).id, (await box.open("n2")).id
            await box.state_becomes(second, State.ENDED)
            assert box.broker.session(first).state is State.REQUESTED
            assert [row["subject"] for row in await box.audited("shell.end")] == [second]

    run(main)
    assert "a bug" in caplog.text
