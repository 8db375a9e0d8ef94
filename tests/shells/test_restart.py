"""The broker goes away in mid-session and comes back on the same files: both ends go on where they were."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from osqbox import shell_frames as frames
from osqbox.shell_frames import CloseCode, FrameType
from osqbox.shells.journal import InputJournal
from osqbox.shells.messages import EndReason, Grant, ShellBounds, State
from osqbox.shells.recording import read_cast

QUICK = ShellBounds(hold_s=0.05)


@pytest.mark.parametrize(("record", "killed"), [(True, False), (False, False), (True, True)])
def test_a_session_survives_a_restart(shells: Any, run: Any, tmp_path: Path, record: bool, killed: bool) -> None:
    """Output is contiguous for the viewer and in the recording; input on its way is typed once."""

    async def main() -> None:
        before, after = os.urandom(100_000), os.urandom(100_000)
        async with shells(QUICK) as box:
            session, secret = await box.offered(record=record)
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                resume = agent.welcome.resume
                await agent.print(before)
                shown = await viewer.read(len(before))
                await viewer.type(b"one two")
                await agent.read_typed(7)
                await viewer.until(lambda me: me.input_acked == 7)
                await viewer.type(b" three")
                while len(agent.typed) < 13:
                    await agent.heed(ack=False)
                await box.broker.stop()
                assert await viewer.close_code() == CloseCode.GOING_AWAY
                assert await agent.close_code() == CloseCode.GOING_AWAY
        if killed:
            forget_the_end(tmp_path)
        async with shells(QUICK) as box:
            assert box.broker.session(session).state is State.DETACHED
            async with trio.open_nursery() as nursery:

                async def come_back() -> None:
                    async with box.viewer(session, resume=len(before)) as viewer:
                        # the agent has 10 of 13: from there on this client sends again
                        assert viewer.welcome.input == 10
                        await viewer.send(frames.data_in(10, b"ree four"))
                        assert shown + await viewer.read(len(after)) == before + after
                        await viewer.has_role(Grant.CONTROLLER)
                        assert (await viewer.read_exit()).code == 0

                nursery.start_soon(come_back)
                stream = before + after[:50_000]
                async with box.agent(session, resume=resume, head=len(stream), input=10) as agent:
                    assert agent.welcome.wanted == len(before)
                    await agent.print(after)
                    assert await agent.read_typed(8) == b"ree four"
                    await agent.exit(code=0)
                    await agent.next(FrameType.EXIT)
            await box.state_becomes(session, State.ENDED)
        if record:
            folder = tmp_path / "shells" / session
            assert (folder / "bytes").read_bytes() == before + after
            with (folder / "cast").open("rb") as lines:
                spool = (folder / "bytes").read_bytes()
                places = [event.spool for event in read_cast(lines).events if event.code == "o"]
            assert b"".join(spool[place[0] : place[1]] for place in places if place) == before + after
            assert sorted(path.name for path in folder.iterdir()) == ["bytes", "cast"]

    run(main)


def forget_the_end(folder: Path) -> None:
    """Rows as a box that was killed leaves them."""
    db = sqlite3.connect(folder / "osqbox.db")
    db.execute("UPDATE shells_sessions SET state = 'open', output_bytes = 0")
    db.commit()
    db.close()


def test_without_a_recording_a_crash_costs_output_and_says_so(shells: Any, run: Any, tmp_path: Path) -> None:
    """Nothing was kept, so the viewer is told what it missed; from there on it is exact."""

    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered(record=False)
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                resume = agent.welcome.resume
                await agent.print(b"before")
                await viewer.read(6)
                await box.broker.stop()
        forget_the_end(tmp_path)
        async with shells(QUICK) as box, box.agent(session, resume=resume, head=100) as agent:
            assert agent.welcome.wanted == 100
            async with box.viewer(session, resume=6) as viewer:
                await agent.print(b"after")
                assert await viewer.read(5) == b"after"
                assert viewer.resets == [(6, 100)]

    run(main)


def test_a_request_survives_a_restart(shells: Any, run: Any) -> None:
    """So does a secret that was fetched and not used."""

    async def main() -> None:
        async with shells(QUICK) as box:
            waiting = await box.open()
        async with shells(QUICK) as box:
            [offer] = await box.offers()
            assert offer["session_id"] == waiting.id
        async with shells(QUICK) as box, box.agent(waiting.id, offer["secret"]):
            assert box.broker.session(waiting.id).state is State.OPEN

    run(main)


def test_an_agent_that_does_not_come_back_after_a_restart(shells: Any, run: Any, tmp_path: Path) -> None:
    """Its session ends cleanly, also for a viewer that waits for it."""

    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:
                await agent.print(b"last words")
                await viewer.read(10)
                await box.broker.stop()
        async with shells(ShellBounds(agent_grace_s=0.3)) as box:
            async with box.client(f"/view/{session}/alice/controller") as viewer:
                await viewer.send(frames.hello(frames.ViewerHello(client="c1", resume=10)))
                assert await viewer.close_code() == 4410
            assert (await box.state_becomes(session, State.ENDED)).end_reason is EndReason.AGENT_LOST
            assert (tmp_path / "shells" / session / "bytes").read_bytes() == b"last words"

    run(main)


def test_a_launchers_shell_ends_with_the_box(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.launcher(session, secret) as agent:
                await agent.text()
                await box.broker.stop()
        async with shells(QUICK) as box:
            assert box.broker.session(session).end_reason is EndReason.BOX_STOPPED

    run(main)


# the journal


typists = st.sampled_from([("alice", "c1"), ("alice", "c2"), ("bob", "ü")])


@given(st.lists(st.tuples(typists, st.integers(1, 20), st.booleans()), max_size=30), st.data())
def test_the_journal_knows_from_where_to_send_again(typed: list[Any], data: st.DataObject) -> None:
    """Whatever arrived, everybody goes on at the first byte of theirs that did not."""
    with tempfile.TemporaryDirectory() as folder, InputJournal(Path(folder)) as journal:
        head, counts = 0, Counter[Any]()
        places: list[tuple[Any, int, int]] = []
        for key, size, dropped in typed:
            if not dropped:
                places += [(key, counts[key] + index, head + index) for index in range(size)]
                head += size
            counts[key] += size
            journal.note(head, key, counts[key])
        arrived = data.draw(st.integers(0, head))
        expected = {
            key: min((own for owner, own, place in places if owner == key and place >= arrived), default=count)
            for key, count in counts.items()
        }
        assert journal.received(arrived) == expected
        journal.restart(arrived, expected)
        assert journal.received(arrived) == expected


def test_a_record_that_was_cut_off_is_no_record(tmp_path: Path) -> None:
    with InputJournal(tmp_path) as journal:
        journal.note(3, ("alice", "c1"), 3)
        journal.note(5, ("alice", "c1"), 5)
    path = tmp_path / "input"
    path.write_bytes(path.read_bytes()[:-1])
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    with InputJournal(tmp_path) as journal:
        assert journal.received(5) == {("alice", "c1"): 3}
        journal.remove()
    assert not path.exists()
