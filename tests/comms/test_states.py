"""Stateful events: one answer per item, stored once however often they are sent, and on disk before the answer."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osqbox.comms import bodies, stateful
from osqbox.comms.errors import CommsError
from osqbox.comms.messages import Action, Applied, NewCommand, Operation, Profile, Result, StateDocument
from osqbox.comms.sqlite import states as table
from osqbox.comms.sqlite.commands import SqliteCommands
from osqbox.comms.stateful import ItemResult

from ._events import MadeUpCommands, Rig, agent, change, line_one, lines, run

PACKAGES = "wazuh-states-inventory-packages"
CREATE, UPDATE, DELETE = Operation.CREATE, Operation.UPDATE, Operation.DELETE


async def applied(rig: Rig, *changes: Any, batch: str = "", uuid: str = "a1") -> list[tuple[str, int]]:
    return [(done.result, done.status) for done in await rig.states.apply(agent(uuid), changes, batch=batch)]


def test_what_becomes_of_each_operation(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        conflict = ("version conflict: it exists already, with other data", 409)
        assert await applied(rig, change("p", CREATE, v=1, w=2)) == [("created", 201)]
        assert await applied(rig, change("p", CREATE, w=2, v=1)) == [("created", 201)], "equal data, in another order"
        assert await applied(rig, change("p", CREATE, v=2)) == [conflict]
        assert await applied(rig, change("p", UPDATE, v=3)) == [("updated", 200)]
        assert await applied(rig, change("q", UPDATE, v=4)) == [("created", 201)]
        assert await applied(rig, change("q", DELETE), change("q", DELETE)) == [("deleted", 200), ("not_found", 404)]
        found = await rig.states.find("default", "a1", PACKAGES, "p")
        assert found is not None
        assert (found.version, found.data["v"]) == (2, 3)
        assert await rig.states.find("default", "a1", PACKAGES, "q") is None
        assert await rig.states.count() == {PACKAGES: 1}

    run(test, tmp_path)


def test_a_document_says_whose_it_is(tmp_path: Path) -> None:
    """Whatever the agent itself put there."""

    async def test(rig: Rig) -> None:
        told = change("p", v=1, agent={"id": "somebody else"})
        await rig.states.apply(agent(groups=("web", "eu"), version="5.0.0"), [told], batch="")
        found = await rig.states.find("default", "a1", PACKAGES, "p")
        assert found == StateDocument(
            index=PACKAGES,
            id="p",
            agent="a1",
            tenant="default",
            version=1,
            changed_at=rig.clock.at,
            data={
                "v": 1,
                "agent": {
                    "id": "a1",
                    "name": "name-of-a1",
                    "type": "Endpoint",
                    "version": "5.0.0",
                    "groups": ["web", "eu"],
                    "host": {},
                },
            },
        )

    run(test, tmp_path)


def test_agents_and_tenants_are_apart(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.states.apply(agent("a1"), [change("p", v=1)], batch="same")
        assert await rig.states.apply(agent("a2", "blue"), [change("p", CREATE, v=2)], batch="same") == [
            Applied(id="p", result="created", status=201)
        ], "another agent's batch of the same name is another batch"
        assert await rig.states.find("default", "a2", PACKAGES, "p") is None
        found, _ = await rig.states.search(tenant="blue")
        assert [(document.agent, document.data["v"]) for document in found] == [("a2", 2)]
        assert (await rig.states.search(tenant="red"))[0] == []

    run(test, tmp_path)


def test_a_batch_sent_again_is_answered_as_before(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        changes = [change("p", UPDATE, v=1), change("q", DELETE), change("r", CREATE, v=3)]
        first = await applied(rig, *changes, batch="key:k")
        await applied(rig, change("q", UPDATE, v=9), batch="key:between")
        assert first == [("created", 201), ("not_found", 404), ("created", 201)]
        assert await applied(rig, *changes, batch="key:k") == first
        found, _ = await rig.states.search()
        assert [(document.id, document.version) for document in found] == [("p", 1), ("q", 1), ("r", 1)]

    run(test, tmp_path)


def test_a_batch_sent_at_the_same_time_is_applied_once(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        answers: list[Any] = []

        async def send(batch: str) -> None:
            answers.append(await applied(rig, change("p", UPDATE, v=1), change("q", DELETE), batch=batch))

        for batch in ("key:k", "sha256:d"):
            answers.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(send, batch)
            assert len(answers) == 20
            assert all(answer == answers[0] for answer in answers)
        found = await rig.states.find("default", "a1", PACKAGES, "p")
        assert found is not None
        assert found.version == 2, "once for each of the two batches"

    run(test, tmp_path)


def test_the_same_body_later_is_meant(tmp_path: Path) -> None:
    """Create, delete, create: the third request equals the first, and is no repetition of it."""

    async def test(rig: Rig) -> None:
        create, delete = [change("p", CREATE, v=1)], [change("p", DELETE)]
        assert await applied(rig, *create, batch="sha256:c") == [("created", 201)]
        assert await applied(rig, *delete, batch="sha256:d") == [("deleted", 200)]
        assert await applied(rig, *delete, batch="sha256:d") == [("deleted", 200)], "sent again at once"
        assert await applied(rig, *create, batch="sha256:c") == [("created", 201)]
        assert await rig.states.count() == {PACKAGES: 1}
        rows = rig.store.peek(lambda db: db.execute("SELECT count(*) FROM comms_batches").fetchone()[0])
        assert rows == 1, "of the digests the last is kept"

    run(test, tmp_path)


one_change = st.tuples(st.sampled_from(list(Operation)), st.sampled_from("pq"), st.integers(0, 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.lists(one_change, min_size=1, max_size=4), st.integers(1, 3)), max_size=8))
def test_documents_are_what_a_dictionary_would_hold(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[list[tuple[Operation, str, int]], int]]
) -> None:
    """Every request is sent one to three times."""
    documents: dict[str, int] = {}

    def expected(operation: Operation, id: str, value: int) -> int:
        before = documents.get(id)
        if operation is DELETE:
            return 404 if documents.pop(id, None) is None else 200
        if operation is CREATE and before is not None:
            return 201 if before == value else 409
        documents[id] = value
        return 201 if before is None else 200

    async def test(rig: Rig) -> None:
        for number, (told, times) in enumerate(requests):
            changes = [change(name, operation, v=value) for operation, name, value in told]
            statuses = [expected(*each) for each in told]
            for _ in range(times):
                answer = await applied(rig, *changes, batch=f"sha256:{number}")
                assert [status for _, status in answer] == statuses
        found, _ = await rig.states.search()
        assert {document.id: document.data["v"] for document in found} == documents
        kept = rig.store.peek(lambda db: db.execute("SELECT coalesce(sum(documents), 0) FROM comms_state_agents"))
        assert kept.fetchone() == (len(documents),)

    run(test, tmp_path_factory.mktemp("model"))


def test_a_batch_is_named_by_its_key_and_its_body() -> None:
    assert stateful.batch_name(b"x").startswith("sha256:")
    assert stateful.batch_name(b"x", "k") != stateful.batch_name(b"y", "k")
    assert stateful.batch_name(b"x", "k") == stateful.batch_name(b"x", "k") != stateful.batch_name(b"x", "l")


def test_an_agents_documents_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DOCUMENTS_MAX", 2)

    async def test(rig: Rig) -> None:
        done = await applied(rig, *(change(name, v=1) for name in "pqr"))
        assert [status for _, status in done] == [201, 201, 429]
        assert "expected at most 2 of one agent" in done[2][0]
        assert await applied(rig, change("p", v=2)) == [("updated", 200)]
        assert await applied(rig, change("p", DELETE), change("r", v=1)) == [("deleted", 200), ("created", 201)]
        assert await applied(rig, change("r", v=1), uuid="a2") == [("created", 201)]

    run(test, tmp_path)


def test_documents_are_found_page_by_page(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.states.apply(agent("a1"), [change(f"p{n}", name=f"Vim {n}") for n in range(5)], batch="")
        await rig.states.apply(agent("a2"), [change("x", name="nano")], batch="")
        seen: list[str] = []
        after = ""
        while True:
            page, after = await rig.states.search(limit=2, after=after)
            seen += [document.id for document in page]
            if not after:
                break
        assert seen == ["p0", "p1", "p2", "p3", "p4", "x"]
        assert [each.id for each in (await rig.states.search(text="vim 3"))[0]] == ["p3"]
        assert [each.id for each in (await rig.states.search(agent="a2", index=PACKAGES))[0]] == ["x"]
        assert (await rig.states.search(index="wazuh-states-fim"))[0] == []
        for cursor in ("%", "e30=", "W10="):
            with pytest.raises(CommsError, match="expected a cursor"):
                await rig.states.search(after=cursor)

    run(test, tmp_path)


def test_answers_are_forgotten_after_a_day(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await applied(rig, change("p", UPDATE, v=1), batch="key:k")
        rig.clock.at += table.BATCH_KEEP_S + 1
        await applied(rig, change("p", UPDATE, v=1), batch="key:l")
        assert await rig.store.write(table.prune_batches) == 1
        await applied(rig, change("p", UPDATE, v=1), batch="key:m")
        assert await rig.store.write(lambda tx: table.prune_batches(tx, keep=1)) == 1
        kept = rig.store.peek(lambda db: db.execute("SELECT batch FROM comms_batches").fetchall())
        assert kept == [("key:m",)]

    run(test, tmp_path)


def test_the_feed_tells_of_what_was_stored(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.states.apply(agent("a1", "blue"), [change("p", v=1), change("q", DELETE)], batch="")
        assert rig.kinds() == [("comms_states_stored", "blue", {"agent": "a1", "count": 1})]

    run(test, tmp_path)


# whole requests


async def post(rig: Rig, body: bytes, key: str | None = None) -> list[ItemResult]:
    parsed = bodies.read_stateful(body)
    return await stateful.apply(rig, agent("a1"), parsed, batch=stateful.batch_name(body, key), now=rig.clock.now())  # type: ignore[arg-type]


def header(id: str, **more: Any) -> dict[str, Any]:
    return {"module": "inventory", "collector": "packages", "id": id, "operation": "create", **more}


def test_one_bad_item_does_not_hide_nine_good_ones(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        told: list[Any] = [line_one()]
        for number in range(10):
            told += [header(f"p{number}", **({"collector": "pakages"} if number == 4 else {})), {"v": number}]
        results = await post(rig, lines(*told))
        assert [result.status for result in results] == [201] * 4 + [400] + [201] * 5
        assert (results[4].id, results[4].code) == ("p4", 1763)
        assert results[4].result.startswith("line 10: collector: expected one of hardware")
        found, _ = await rig.states.search()
        assert [document.id for document in found] == [f"p{n}" for n in range(10) if n != 4]

    run(test, tmp_path)


def test_results_of_commands_among_documents(tmp_path: Path) -> None:
    """Answered in order; a foreign command is not found, a second report of one changes nothing."""

    async def test(rig: Rig) -> None:
        rig.commands = MadeUpCommands(a1={"c1", "c2"}, a2={"c3"})
        rig.commands.ended = {"c2"}

        def report(id: str) -> dict[str, Any]:
            return {"id": id, "module": "command", "data": {"result": {"code": 0}}}

        events = [report("c1"), {"id": "p", "data": {"v": 1}}, report("c3"), {"id": ""}, report("c2"), report("c1")]
        body = json.dumps(events).encode()
        results = await post(rig, body)
        assert [(result.id, result.result.split(":")[0], result.status) for result in results] == [
            ("c1", "updated", 200),
            ("p", "created", 201),
            ("c3", "not_found", 404),
            ("", "event 4", 400),
            ("c2", "the command had ended before its result came", 409),
            ("c1", "updated", 200),
        ]
        assert results[0].index == "wazuh-commands"
        assert await post(rig, body) == results, "the whole request again"
        assert [taken for _, taken, _ in rig.commands.taken] == ["c1"]

    run(test, tmp_path)


def test_a_command_and_its_real_result(tmp_path: Path) -> None:
    """The agent says in progress, then done, and says it again; nobody else may say anything of it."""

    async def test(rig: Rig) -> None:
        rig.commands = SqliteCommands(rig.store, lambda _: None, rig.clock)
        new = NewCommand(
            id="c1",
            agent="a1",
            tenant="default",
            action=Action(name="restart"),
            request_id="r1",
            expires_at=rig.clock.at + 60,
        )
        foreign = msgspec.structs.replace(new, id="c2", agent="a2")
        await rig.commands.publish([new, foreign], actor="operator")
        for code, status in ((2, "in_progress"), (0, "success"), (0, "success"), (1, "success")):
            report = {"command": {"result": {"code": code, "message": "ok"}}}
            operation = {"module": "command", "id": "c1", "operation": "update"}
            [result] = await post(rig, lines(line_one(), operation, report))
            assert (result.result, result.status) == ("updated", 200)
            found = await rig.commands.find("c1")
            assert found.status == status
        assert found.result == Result(code=0, message="ok")
        [result] = await post(rig, lines(line_one(), {**operation, "id": "c2"}, report))
        assert (result.result, result.status) == ("not_found", 404)
        assert (await rig.commands.find("c2")).status == "pending"

    run(test, tmp_path)


def test_the_feed_tells_what_was_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        results = await post(rig, lines(line_one(), header("p", module="x"), {"v": 1}, header("q"), {"v": 1}))
        await rig.store.write(lambda tx: stateful.note_refused(tx, agent("a1", "blue"), results))
        await rig.store.write(lambda tx: stateful.note_refused(tx, agent("a1", "blue"), results[1:]))
        [(tenant, told)] = [(tenant, told) for kind, tenant, told in rig.kinds() if kind == "comms_items_refused"]
        assert (tenant, told["agent"], told["count"]) == ("blue", "a1", 1)
        assert (told["first"][0]["id"], told["first"][0]["code"]) == ("p", 1765)

    run(test, tmp_path)


def test_the_answer_in_both_dialects() -> None:
    good, bad = ItemResult("i", "p", "created", 201), ItemResult("", "q", "line 4: no", 400, 1765)
    told = [
        {"index": "i", "id": "p", "result": "created", "status": 201},
        {"index": "", "id": "q", "result": "line 4: no", "status": 400, "code": 1765},
    ]
    assert json.loads(stateful.answer(Profile.G1, [good, bad])) == {"results": told}
    assert json.loads(stateful.answer(Profile.SPIKE, [good, bad])) == {"results": told, "errors": True}
    assert json.loads(stateful.answer(Profile.SPIKE, [good])) == {"results": told[:1], "errors": False}


def test_documents_know_the_host_as_the_agent_told_it(tmp_path: Path) -> None:
    """Line 1 is believed about the host and the version, not about name and groups."""

    async def test(rig: Rig) -> None:
        one = line_one()
        one["agent"]["host"] = {"hostname": "web-1"}
        await post(rig, lines(one, header("p"), {"v": 1}))
        found = await rig.states.find("default", "a1", PACKAGES, "p")
        assert found is not None
        facts = found.data["agent"]
        assert (facts["host"], facts["version"]) == ({"hostname": "web-1"}, "5.0.0")
        assert (facts["name"], facts["groups"]) == ("name-of-a1", ["default"])

    run(test, tmp_path)


# kill -9

WRITER = Path(__file__).parent / "_events_writer.py"


def test_nothing_acknowledged_is_missing_and_nothing_twice_after_kill_9(tmp_path: Path) -> None:
    """A writer is killed at random moments; the client sends again what was not answered."""
    dice = random.Random(6)
    acknowledged: dict[str, list[Any]] = {}
    rounds, batch = 4, 0
    for _ in range(rounds):
        with subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path), str(batch)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            kill_after = dice.randint(5, 100)
            for count, line in enumerate(writer.stdout):
                name, answer = json.loads(line)
                assert acknowledged.setdefault(name, answer) == answer, "sent again, answered otherwise"
                batch = int(name.removeprefix("b"))
                if count == kill_after:
                    os.kill(writer.pid, signal.SIGKILL)
        # The last answered batch is sent again as well: its answer might have been lost.
    with sqlite3.connect(tmp_path / "osqbox.db") as db:
        versions = dict(db.execute("SELECT id, version FROM comms_states"))
        logged = db.execute("SELECT id, count(*) FROM comms_events GROUP BY id").fetchall()
    db.close()
    assert len(acknowledged) > 5 * rounds
    for name, answer in acknowledged.items():
        assert [result for _, result in answer] == ["created", "created"]
        assert [versions[each] for each, _ in answer] == [1, 1]
        assert (f"e-{name}", 1) in logged
    assert all(version == 1 for version in versions.values())
    assert all(count == 1 for _, count in logged)
