"""Commands in SQLite: published, offered, answered, ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import audit
from osqbox.comms.errors import CommsError
from osqbox.comms.messages import CommandStatus, KnownCommand, Result, ResultOutcome
from osqbox.comms.results import DATABASE_FAILURE
from osqbox.comms.sqlite import commands as table
from osqbox.store import drops

from ._commands import NOW, Rig, open_rig


def with_rig(folder: Path, test: Any) -> None:
    async def run() -> None:
        async with open_rig(folder) as rig:
            await test(rig)

    trio.run(run)


async def offered(rig: Rig, agent: str = "a", after: int = 0, limit: int = 100) -> list[str]:
    return [each.id for each in await rig.commands.after(agent, after, limit=limit)]


def test_an_agent_is_offered_its_own_commands_in_the_order_of_publication(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        first = await rig.publish("b", "a", "a")
        second = await rig.publish("a")
        assert [each.seq for each in first + second] == [1, 2, 3, 4]
        assert await offered(rig) == ["c2", "c3", "c4"]
        assert await offered(rig, after=2) == ["c3", "c4"]
        assert await offered(rig, limit=1) == ["c2"]
        assert first[1] == await rig.found("c2")

    with_rig(tmp_path, test)


def test_a_publication_tells_its_agents_once_and_is_one_event_and_one_row_of_the_audit(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("b", "a", "b")
        assert [(each.kind, each.agents, each.tenant) for each in rig.changes] == [("commands", ("b", "a"), "default")]
        assert await rig.events("command_published") == [
            {"request_id": "r1", "name": "restart", "count": 3, "ids": ["c1", "c2", "c3"]}
        ]
        rows = await rig.store.read(audit.rows)
        assert [(row["actor"], row["action"], row["data"]["count"]) for row in rows] == [
            ("operator", "command.publish", 3)
        ]

    with_rig(tmp_path, test)


@pytest.mark.parametrize("taken", ["c1", "mine"])
def test_a_taken_id_refuses_the_whole_publication(tmp_path: Path, taken: str) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        new = [rig.new("a", id="mine"), rig.new("a", id=taken)]
        with pytest.raises(CommsError, match=taken) as refused:
            await rig.commands.publish(new, actor="operator")
        assert refused.value.status == 409
        assert await offered(rig) == ["c1"]
        assert len(rig.changes) == 1

    with_rig(tmp_path, test)


def test_open_commands_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "OPEN_COMMANDS", 1500)

    async def test(rig: Rig) -> None:
        published = await rig.publish(*["a"] * 1500)
        with pytest.raises(CommsError, match="expected at most 1,500 commands without a result") as refused:
            await rig.publish(*["a"] * 1000)
        assert refused.value.status == 503
        await rig.commands.cancel([each.id for each in published], actor="operator")
        assert len(await rig.publish(*["a"] * 1000)) == 1000

    with_rig(tmp_path, test)


def test_numbers_are_never_used_twice(tmp_path: Path) -> None:
    """A Last-Event-ID of a command that retention removed must not mean another one."""

    async def test(rig: Rig) -> None:
        await rig.publish("a", "a")
        await rig.commands.cancel(["c1", "c2"], actor="operator")
        assert await rig.store.write(lambda tx: table.prune(tx, 0)) == 2
        assert (await rig.store.read(drops)) == {"comms_commands": 2}
        assert [each.seq for each in await rig.publish("a")] == [3]
        assert [await rig.commands.known_seq("a", seq) for seq in (0, 1, 2, 3, 4, -1, 2**70)] == [
            *(True, False, False, True, False, False, False)
        ]
        assert not await rig.commands.known_seq("b", 3)

    with_rig(tmp_path, test)


def test_a_sent_command_is_offered_until_it_is_acknowledged(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        await rig.commands.note_sent("a", ["c1"], NOW)
        await rig.commands.note_answered("a", ["c1"], written=True)
        command = await rig.found("c1")
        assert (command.status, command.deliveries, command.sent_at, command.answered) == ("sent", 1, NOW, True)
        assert await offered(rig) == ["c1"]
        assert await rig.commands.take_result("a", "c1", Result(code=2, message="at it"), NOW) == "taken"
        assert await offered(rig) == []
        assert await rig.commands.take_result("a", "c1", Result(code=0, message="done", data=[1]), NOW + 1) == "taken"
        ended = await rig.found("c1")
        assert (ended.status, ended.ended_at, ended.result) == (
            "success",
            NOW + 1,
            Result(code=0, message="done", data=[1]),
        )
        assert [each["status"] for each in await rig.events("command_ended")] == ["success"]

    with_rig(tmp_path, test)


def test_a_write_that_failed_makes_a_command_pending_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "a")
        await rig.commands.note_sent("a", ["c1", "c2"], NOW)
        await rig.commands.take_result("a", "c2", Result(code=0), NOW)
        await rig.commands.note_answered("a", ["c1", "c2"], written=False)
        assert [(await rig.found(each)).status for each in ("c1", "c2")] == ["pending", "success"]

    with_rig(tmp_path, test)


def test_another_agents_notes_change_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        before = await rig.publish("a")
        await rig.commands.note_sent("b", ["c1"], NOW)
        await rig.commands.note_answered("b", ["c1"], written=True)
        assert await rig.commands.take_result("b", "c1", Result(code=0), NOW) is ResultOutcome.FOREIGN
        assert await rig.commands.take_result("a", "nothing", Result(code=0), NOW) is ResultOutcome.FOREIGN
        assert [await rig.found("c1")] == before

    with_rig(tmp_path, test)


@pytest.mark.parametrize(("code", "status"), [(0, "success"), (1, "failed"), (3, "failed"), (77, "failed")])
def test_the_first_final_result_wins(tmp_path: Path, code: int, status: str) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a")
        first = Result(code=code, message="first")
        assert await rig.commands.take_result("a", "c1", first, NOW) is ResultOutcome.TAKEN
        for again in (0, 1, 2, 3):
            assert await rig.commands.take_result("a", "c1", Result(code=again), NOW + 9) is ResultOutcome.REPEATED
        command = await rig.found("c1")
        assert (command.status, command.result, command.ended_at) == (status, first, NOW)

    with_rig(tmp_path, test)


def test_a_database_failure_after_redelivery_is_no_failure(tmp_path: Path) -> None:
    """The agent says with it that it had the command already; what became of it comes, or came, by itself."""

    async def test(rig: Rig) -> None:
        await rig.publish("a", "a")
        await rig.commands.note_sent("a", ["c1", "c2"], NOW)
        await rig.commands.note_sent("a", ["c1"], NOW)
        failure = Result(code=1, message=DATABASE_FAILURE)
        assert await rig.commands.take_result("a", "c1", failure, NOW) is ResultOutcome.REPEATED
        assert (await rig.found("c1")).status is CommandStatus.SENT
        assert await rig.commands.take_result("a", "c1", Result(code=0), NOW) is ResultOutcome.TAKEN
        assert await rig.commands.take_result("a", "c1", failure, NOW) is ResultOutcome.REPEATED
        assert (await rig.found("c1")).status is CommandStatus.SUCCESS
        assert await rig.commands.take_result("a", "c2", failure, NOW) is ResultOutcome.TAKEN
        assert (await rig.found("c2")).status is CommandStatus.FAILED

    with_rig(tmp_path, test)


def test_a_command_expires_at_its_time_and_with_an_event(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", expires_at=NOW + 10)
        await rig.publish("a", expires_at=NOW + 20)
        rig.clock.at = NOW + 10
        assert await offered(rig) == ["c2"]
        assert [await rig.commands.expire(NOW + 10), await rig.commands.expire(NOW + 10)] == [1, 0]
        assert [(each["id"], each["status"]) for each in await rig.events("command_ended")] == [("c1", "expired")]
        assert await rig.commands.take_result("a", "c1", Result(code=0), NOW) is ResultOutcome.ENDED
        assert (await rig.found("c1")).status is CommandStatus.EXPIRED

    with_rig(tmp_path, test)


def test_many_expire_in_bounded_pieces(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish(*["a"] * (table.EXPIRE_COMMANDS + 1))
        assert await rig.commands.expire(NOW + 86400) == table.EXPIRE_COMMANDS
        assert await rig.commands.expire(NOW + 86400) == 1

    with_rig(tmp_path, test)


def test_only_open_commands_are_cancelled(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "a", "b")
        await rig.commands.take_result("a", "c1", Result(code=0), NOW)
        cancelled = await rig.commands.cancel(["c1", "c2", "c3", "nothing"], actor="me")
        assert [(each.id, each.status) for each in cancelled] == [("c2", "cancelled"), ("c3", "cancelled")]
        assert cancelled[0] == await rig.found("c2")
        assert await offered(rig) == []
        assert await rig.commands.take_result("b", "c3", Result(code=0), NOW) is ResultOutcome.ENDED
        assert [row["actor"] for row in await rig.store.read(audit.rows)] == ["operator", "me"]

    with_rig(tmp_path, test)


def test_a_deleted_agents_commands_are_cancelled_with_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "b", "a")
        assert await rig.store.write(lambda tx: table.cancel_of_agent(tx, "a", "operator")) == 2
        assert (await offered(rig, "a"), await offered(rig, "b")) == ([], ["c2"])

    with_rig(tmp_path, test)


def test_commands_are_listed_newest_first_by_what_is_asked(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.publish("a", "b", "a")
        await rig.publish("a", tenant="other", request_id="r2")
        await rig.commands.cancel(["c3"], actor="operator")

        async def listed(**asked: Any) -> list[str]:
            return [each.id for each in await rig.commands.page(**asked)]

        assert await listed() == ["c4", "c3", "c2", "c1"]
        assert await listed(limit=1, before=3) == ["c2"]
        assert await listed(tenant="default", agent="a") == ["c3", "c1"]
        assert await listed(status=CommandStatus.CANCELLED) == ["c3"]
        assert await listed(request_id="r2") == ["c4"]

    with_rig(tmp_path, test)


def test_a_new_box_knows_four_commands_and_can_be_taught(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert [each.name for each in await rig.commands.known()] == ["fetch-config", "restart", "set-group", "upgrade"]
        scan = KnownCommand(name="scan", version="v2", description="look", required_args=("path",))
        await rig.commands.put_known(KnownCommand(name="scan"), actor="operator")
        await rig.commands.put_known(scan, actor="operator")
        assert scan in await rig.commands.known()
        await rig.commands.remove_known("scan", actor="operator")
        assert len(await rig.commands.known()) == 4
        with pytest.raises(CommsError, match="'scan' does not exist"):
            await rig.commands.remove_known("scan", actor="operator")
        assert [each.kind for each in rig.changes] == ["known_commands"] * 3

    with_rig(tmp_path, test)


def test_everything_outlives_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_rig(tmp_path) as rig:
            published = await rig.publish("a", "a", args={"x": ["ü", 1.5, None]})
        async with open_rig(tmp_path) as rig:
            assert await rig.commands.after("a", 0, limit=100) == published

    trio.run(run)
