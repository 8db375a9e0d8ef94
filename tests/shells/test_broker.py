"""Sessions through real sockets: an agent, operators, and what becomes of every byte between them."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import trio

from osqbox import shell_frames as frames
from osqbox.errors import Refused
from osqbox.shell_frames import CloseCode, FrameType, Role, Size
from osqbox.shells.messages import EndReason, Grant, ShellBounds, State


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
