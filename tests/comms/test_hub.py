"""Who is listening for commands, who is woken, and how it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from osqbox.clock import SystemClock
from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.hub import DOUBT_S, Bye, HubBounds, Reset
from osqbox.comms.messages import Change, Result
from osqbox.comms.sqlite.commands import SqliteCommands

from ._commands import NOW, Rig, agent, ids, open_rig

Test = Callable[[Rig], Awaitable[None]]


def with_rig(folder: Path, test: Test, **kwargs: Any) -> None:
    async def run() -> None:
        async with open_rig(folder, **kwargs) as rig:
            await test(rig)

    trio.run(run)


async def read_to_end(stream: Any, into: list[Any]) -> None:
    async for item in stream:
        into.append(item)  # noqa: PERF401 - seen by others as it comes


# streams


def test_a_stream_gives_what_is_waiting_and_then_what_comes(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "b", "a")
        async with rig.attach("a") as stream:
            assert ids(await stream.next()) == ["c1", "c3"]
            assert await stream.next(0) is None
            await rig.publish("b", "a")
            assert ids(await stream.next()) == ["c5"]
            assert (await rig.found("c5")).status == "sent"

    with_rig(tmp_path, test)


def test_a_backlog_is_read_in_pages(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish(*["a"] * 250)
        async with rig.attach("a") as stream:
            found = [f"c{n}" for n in range(1, 251)]
            for page in (found[:100], found[100:200], found[200:]):
                assert ids(await stream.next()) == page
            assert await stream.next(0) is None

    with_rig(tmp_path, test)


def test_who_says_where_it_was_gets_what_is_behind_and_who_does_not_all_that_is_open(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "a", "a")
        async with rig.attach("a") as stream:
            assert ids(await stream.next()) == ["c1", "c2", "c3"]
        await rig.commands.take_result("a", "c1", Result(code=0), NOW)
        async with rig.attach("a", after=2) as stream:
            assert ids(await stream.next()) == ["c3"]
        for nowhere in (None, 0):
            async with rig.attach("a", after=nowhere) as stream:
                assert ids(await stream.next()) == ["c2", "c3"]
        assert (await rig.found("c3")).deliveries == 4

    with_rig(tmp_path, test)


@pytest.mark.parametrize("unknown", [-1, 1, 99, 2**70])
def test_an_unknown_number_is_told_and_everything_open_comes_again(tmp_path: Path, unknown: int) -> None:
    """1 is the number of another agent's command."""

    async def test(rig: Rig) -> None:
        await rig.publish("b", "a")
        async with rig.attach("a", after=unknown) as stream:
            assert await stream.next() == Reset()
            assert ids(await stream.next()) == ["c2"]

    with_rig(tmp_path, test)


def test_the_newest_connection_wins_and_the_older_hears_bye(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with rig.attach("a") as older, rig.attach("a") as newer:
            await rig.publish("a")
            farewell = await older.next()
            assert isinstance(farewell, Bye)
            assert (farewell.reason, farewell.retry_ms >= 30_000) == ("replaced", True)
            assert await older.next(0) is None
            assert ids(await newer.next()) == ["c1"]
            assert rig.hub.statistics().ended == {"replaced": 1}

    with_rig(tmp_path, test)


def test_a_connection_on_another_box_wins_only_if_it_is_newer(tmp_path: Path) -> None:
    """Announcements arrive in one order everywhere: one that comes before our own is of an older connection."""

    async def test(rig: Rig) -> None:
        def announced(connection: str) -> None:
            rig.hub.changed(Change(kind="attached", agents=("a",), connection=connection))

        async with rig.attach("a", connection="ours") as stream:
            assert rig.attached == [("a", "ours")]
            announced("older, elsewhere")
            assert await stream.next(0) is None
            announced("ours")
            announced("ours")
            assert await stream.next(0) is None
            announced("newer, elsewhere")
            assert (await stream.next()).reason == "replaced"

    with_rig(tmp_path, test)


def test_only_the_addressed_stream_wakes(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        heard: dict[str, list[Any]] = {f"agent-{n}": [] for n in range(1000)}

        async def listen(uuid: str) -> None:
            async with rig.attach(uuid) as stream:
                await read_to_end(stream, heard[uuid])

        async with trio.open_nursery() as nursery:
            for uuid in heard:
                nursery.start_soon(listen, uuid)
            await trio.testing.wait_all_tasks_blocked()
            assert rig.hub.statistics().wakes == 0
            await rig.publish("agent-7", "nobody")
            while not heard["agent-7"]:
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()
            statistics = rig.hub.statistics()
            assert (statistics.streams, statistics.wakes, statistics.delivered) == (1000, 1, 1)
            rig.hub.stop()
        assert {uuid for uuid, items in heard.items() if len(items) > 1} == {"agent-7"}
        assert {items[-1].reason for items in heard.values()} == {"box_stopping"}
        assert rig.hub.statistics().streams == 0

    with_rig(tmp_path, test)


@pytest.mark.parametrize("gone", [False, True])
def test_revocation_ends_a_stream_at_once(tmp_path: Path, gone: bool) -> None:
    async def test(rig: Rig) -> None:
        async with rig.attach("a") as stream, rig.attach("b") as other:
            items: list[Any] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_to_end, stream, items)
                await trio.testing.wait_all_tasks_blocked()
                rig.revoke("a", gone=gone)
            assert [item.reason for item in items] == ["revoked"]
            assert await other.next(0) is None

    with_rig(tmp_path, test)


def test_who_was_revoked_after_its_token_was_checked_gets_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        rig.revoke("a", gone=False)  # before there is a seat that could be told
        async with rig.attach("a") as stream:
            assert (await stream.next()).reason == "revoked"
        with pytest.raises(CommsError) as refused:
            await rig.poll("a")
        assert (refused.value.status, refused.value.code) == (403, 2706)

    with_rig(tmp_path, test)


def test_a_new_key_ends_a_stream_and_another_change_does_not(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with rig.attach("a") as stream:
            rig.agents.changed["a"] = agent("a", groups=("web",), name="renamed")
            rig.hub.changed(Change(kind="agents", agents=("a",)))
            assert await stream.next(0) is None
            rig.agents.changed["a"] = agent("a", key_version=2)
            rig.hub.changed(Change(kind="agents", tenant="other"))
            assert await stream.next(0) is None
            rig.hub.changed(Change(kind="agents", tenant="default"))
            assert (await stream.next()).reason == "revoked"

    with_rig(tmp_path, test)


def test_a_stream_ends_with_its_token_and_goes_on_without_a_gap(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        items: list[Any] = []
        async with rig.attach("a", valid_s=0.2) as stream:
            await rig.publish("a", "a")
            await read_to_end(stream, items)
        assert ids(items[0]) == ["c1", "c2"]
        assert items[1:] == [Bye("token_expired", 0)]
        await rig.publish("a")
        async with rig.attach("a", after=items[0].commands[0].seq) as stream:
            assert ids(await stream.next()) == ["c2", "c3"]

    with_rig(tmp_path, test, clock=SystemClock())


def test_a_token_that_is_over_gets_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        async with rig.attach("a", valid_s=0) as stream:
            assert await stream.next() == Bye("token_expired", 0)
        assert await rig.poll("a", valid_s=0) == []
        assert (await rig.found("c1")).status == "pending"

    with_rig(tmp_path, test)


def test_a_stopping_box_ends_everything_and_takes_nobody_in(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        items: list[Any] = []
        polled: list[Any] = []

        async def poll() -> None:
            polled.append(await rig.poll("b", wait_s=20))

        async with rig.attach("a") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(read_to_end, stream, items)
            nursery.start_soon(poll)
            await trio.testing.wait_all_tasks_blocked()
            rig.hub.stop()
        assert [item.reason for item in items] == ["box_stopping"]
        assert polled == [[]]
        async with rig.attach("a") as late:
            assert (await late.next()).reason == "box_stopping"
        assert rig.hub.statistics().ended == {"box_stopping": 3}

    with_rig(tmp_path, test)


def test_more_than_the_bound_are_told_to_come_later(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with rig.attach("a"):
            with pytest.raises(CommsError) as refused:
                await rig.poll("b")
            assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
        assert await rig.poll("b") == []

    with_rig(tmp_path, test, bounds=HubBounds(seats=1))


def test_a_stream_outlives_an_indexer_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        away = {"after", "note_sent", "note_answered"}
        for name in tuple(away):
            real = getattr(SqliteCommands, name)

            async def perhaps(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
                if name in away:
                    raise IndexerDown("away")
                return await real(*args, **kwargs)

            monkeypatch.setattr(SqliteCommands, name, perhaps)
        await rig.publish("a", "a")
        async with rig.attach("a") as stream:
            with pytest.raises(CommsError, match="away"):
                await rig.poll("b")
            assert await stream.next(0) is None
            away.remove("after")
            assert await stream.next(0) is None
            away.remove("note_sent")
            assert ids(await stream.next(5)) == ["c1", "c2"]
            await stream.written(["c1"])
            away.clear()
            await stream.not_written(["c2"])
        assert (await rig.found("c2")).status == "pending"
        assert (await rig.found("c1")).deliveries == 1

    monkeypatch.setattr("osqbox.comms.hub.INDEXER_RETRY_S", 0.01)
    with_rig(tmp_path, test)


# long polls


def test_a_poll_takes_all_that_is_offered_and_nothing_twice(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish(*["a"] * 150)
        assert len(await rig.poll()) == 150
        assert await rig.poll() == []
        assert rig.hub.statistics().delivered == 150

    with_rig(tmp_path, test)


def test_a_polls_answer_is_bounded_and_the_rest_comes_next(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish(*["a"] * 5, args={"x": "y" * 400})
        assert [await rig.poll() for _ in range(4)] == [["c1", "c2"], ["c3", "c4"], ["c5"], []]
        await rig.publish("a", args={"x": "y" * 4000})
        assert await rig.poll() == ["c6"]
        await rig.publish(*["a"] * 12)
        assert [len(await rig.poll()) for _ in range(3)] == [10, 2, 0]

    with_rig(tmp_path, test, bounds=HubBounds(poll_bytes=1000, poll_commands=10, page_commands=3))


def test_a_poll_waits_and_is_woken(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.testing.wait_all_tasks_blocked()
                await rig.publish("b")
                await rig.publish("a")

            nursery.start_soon(later)
            assert await rig.poll(wait_s=20) == ["c2"]
        assert rig.hub.statistics().wakes == 1

    with_rig(tmp_path, test)


def test_a_command_is_polled_again_only_if_its_answer_did_not_get_out(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        published = await rig.publish("a")
        assert await rig.poll() == ["c1"]
        await rig.hub.answered("a", published, written=False)
        assert await rig.poll() == ["c1"]
        await rig.hub.answered("a", published, written=True)
        rig.clock.at += 10 * DOUBT_S
        assert await rig.poll() == []
        assert (await rig.found("c1")).deliveries == 2

    with_rig(tmp_path, test)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_command_of_which_nobody_can_say_whether_it_went_out_is_polled_again(tmp_path: Path, restarted: bool) -> None:
    """Its box was started anew, or is another that has been silent for too long."""

    async def run() -> None:
        async with open_rig(tmp_path) as rig:
            await rig.publish("a")
            assert await rig.poll() == ["c1"]
            if not restarted:
                assert await rig.poll() == []
                rig.clock.at += DOUBT_S + 1
                assert await rig.poll() == ["c1"]
        if restarted:
            async with open_rig(tmp_path) as rig:
                rig.clock.at = rig.hub._started_at = NOW + 1
                assert await rig.poll() == ["c1"]

    trio.run(run)


def test_the_newest_poll_wins(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        older: list[Any] = []

        async def poll() -> None:
            older.append(await rig.poll(wait_s=20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.testing.wait_all_tasks_blocked()
            assert await rig.poll(wait_s=0) == []
        assert older == [[]]

    with_rig(tmp_path, test)


def test_a_poll_whose_client_has_gone_takes_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        gone = trio.Event()
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.testing.wait_all_tasks_blocked()
                gone.set()

            nursery.start_soon(later)
            assert await rig.poll(wait_s=20, wait_gone=gone.wait) == []
        await rig.publish("a")
        assert await rig.poll(wait_gone=gone.wait, wait_s=20) in ([], ["c1"])
        assert rig.hub.statistics().polls == 0

    with_rig(tmp_path, test)


def test_what_a_cancelled_poll_had_taken_is_pending_again(tmp_path: Path) -> None:
    """Cancelled at every moment of its life in turn."""

    async def test(rig: Rig) -> None:
        await rig.publish("a")
        polled: list[str] = []
        for moment in range(100):
            with trio.CancelScope() as scope:

                async def cancel_later(after: int = moment, scope: trio.CancelScope = scope) -> None:
                    for _ in range(after):
                        await trio.sleep(0.0002)
                    scope.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_later)
                    polled = await rig.poll(wait_gone=trio.sleep_forever)
                    nursery.cancel_scope.cancel()
            if polled:
                break
            assert (await rig.found("c1")).status == "pending"
        assert polled == ["c1"]

    with_rig(tmp_path, test)


def test_a_revoked_agents_poll_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.testing.wait_all_tasks_blocked()
                rig.revoke("a")

            nursery.start_soon(later)
            for wait_gone in (None, trio.sleep_forever):
                with pytest.raises(CommsError) as refused:
                    await rig.poll(wait_s=20, wait_gone=wait_gone)
                assert (refused.value.status, refused.value.code) == (403, 2706)
                nursery.start_soon(later)

    with_rig(tmp_path, test)


def test_polls_without_a_wish_are_spread(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        holds = {rig.hub._hold_s(None) for _ in range(100)}
        assert len(holds) > 50
        assert 48 <= min(holds) <= max(holds) <= 60
        assert [rig.hub._hold_s(asked) for asked in (-1, 5, 1e9)] == [0, 5, 570]

    with_rig(tmp_path, test)
