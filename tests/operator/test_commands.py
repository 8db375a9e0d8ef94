"""Operators publish commands, follow and cancel them, and say which there are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from sqlite_utils import Database

from osqbox import audit, tenants
from osqbox.comms.front import Comms
from osqbox.comms.messages import Change, Command, Result
from osqbox.comms.publisher import Publisher
from osqbox.comms.registration import new_agent
from osqbox.comms.sqlite import MIGRATIONS, SqliteIndexer

Test = Callable[[Any, SqliteIndexer], Awaitable[None]]


@pytest.fixture
def desk(rig: Any) -> Callable[[Test], None]:
    """Runs a test with the operator API of a box that serves the comms API, and its indexer."""

    async def run(without: Any, test: Test) -> None:
        def migrate(tx: Any) -> None:
            for step in MIGRATIONS:
                step.apply(Database(tx.db))
            tenants.create(tx, "other", tenants.TenantOptions())

        await without.store.write(migrate)
        told: list[Change] = []
        indexer = SqliteIndexer(without.store, told.append, without.clock)
        for name in ("a", "b"):
            await add_agent(indexer, name)
        await add_agent(indexer, "c", "other")
        publisher = Publisher(indexer, without.clock, without.parts.new_id)
        comms: Any = SimpleNamespace(store=without.store, indexer=indexer, publisher=publisher)
        comms.check_tenant, comms.command = partial(Comms.check_tenant, comms), partial(Comms.command, comms)
        made = type(without)(replace(without.parts, comms=comms), without.clock, without.stops, without._nursery)
        await test(made, indexer)

    def start(test: Test) -> None:
        rig(lambda without: run(without, test))

    return start


async def add_agent(indexer: SqliteIndexer, name: str, tenant: str = "default") -> None:
    made = new_agent(uuid=f"uuid-{name}", name=name, tenant=tenant, now=0)
    await indexer.agents.add(made, "a hash", actor="operator")


RESTART = {"name": "restart"}


def test_one_command_is_published_for_every_agent_meant(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        body = {"agents": ["uuid-a"], "groups": ["default"], "action": RESTART, "timeout": 60, "user": "ann"}
        answer = (await rig.post("/api/v1/commands", body, 201)).json
        assert (answer["count"], {each["request_id"] for each in answer["commands"]}) == (2, {answer["request_id"]})
        first, second = answer["commands"]
        assert [each["agent"] for each in (first, second)] == ["uuid-a", "uuid-b"]
        assert first | {"id": "", "request_id": ""} == {
            "id": "",
            "request_id": "",
            "seq": 1,
            "agent": "uuid-a",
            "tenant": "default",
            "action": {"name": "restart", "version": "", "args": {}},
            "source": "Users/Services",
            "user": "ann",
            "target": {"type": "group", "id": "default"},
            "created_at": "2023-11-14T22:13:20.000000Z",
            "expires_at": "2023-11-14T22:14:20.000000Z",
            "status": "pending",
            "sent_at": None,
            "deliveries": 0,
            "ended_at": None,
            "result": None,
        }
        everyone = {"all": True, "action": {"name": "upgrade", "args": {"file_name": "x"}}, "tenant": "other"}
        assert [each["agent"] for each in (await rig.post("/api/v1/commands", everyone, 201)).json["commands"]] == [
            "uuid-c"
        ]
        rows = await rig.store.read(lambda db: audit.rows(db, action="command"))
        assert [(row["action"], row["actor"], row["data"]["count"]) for row in rows] == [
            ("command.publish", "operator", 2),
            ("command.publish", "operator", 1),
        ]

    desk(test)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"action": {"name": "rm"}, "agents": ["uuid-a"]}, 400, "expected one of fetch-config, restart, set-group"),
        ({"action": {"name": "upgrade"}, "all": True}, 400, "expected args with file_name"),
        ({"action": RESTART}, 400, "nobody to tell"),
        ({"agents": ["uuid-a"]}, 400, "missing required field `action`"),
        ({"action": RESTART, "agents": ["uuid-a"], "timeout": 0}, 400, "timeout"),
        ({"action": RESTART, "agents": ["uuid-a", "nobody"]}, 404, "'nobody' does not exist"),
        ({"action": RESTART, "agents": ["uuid-c"]}, 404, "'uuid-c' does not exist"),
        ({"action": RESTART, "groups": ["nothing"]}, 404, "'nothing' does not exist"),
        ({"action": RESTART, "all": True, "tenant": "nowhere"}, 404, "nowhere"),
    ],
)
def test_a_publication_that_cannot_be_is_refused_whole(desk: Any, body: Any, status: int, words: str) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        assert words in (await rig.post("/api/v1/commands", body, status)).json["error"]
        assert await indexer.commands.page() == []

    desk(test)


def test_a_revoked_agent_is_told_nothing(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        from osqbox.comms.messages import AgentStatus

        await indexer.agents.change("uuid-a", actor="operator", status=AgentStatus.REVOKED)
        everyone = await rig.post("/api/v1/commands", {"all": True, "action": RESTART}, 201)
        assert [each["agent"] for each in everyone.json["commands"]] == ["uuid-b"]
        named = await rig.post("/api/v1/commands", {"agents": ["uuid-b", "uuid-a"], "action": RESTART}, 409)
        assert "'uuid-a' is revoked" in named.json["error"]

    desk(test)


def test_a_group_without_agents_is_no_error(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        await indexer.groups.put("default", "empty", "", actor="operator", expected_version=None)
        body = {"groups": ["empty"], "action": RESTART, "request_id": "mine"}
        assert (await rig.post("/api/v1/commands", body, 201)).json == {
            "request_id": "mine",
            "count": 0,
            "commands": [],
        }

    desk(test)


async def published(rig: Any, *agents: str) -> list[str]:
    body = {"agents": list(agents), "action": RESTART, "request_id": "r"}
    return [each["id"] for each in (await rig.post("/api/v1/commands", body, 201)).json["commands"]]


def test_commands_are_followed_to_their_results(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        one, two = await published(rig, "uuid-a", "uuid-b")
        await indexer.commands.note_sent("uuid-a", [one], rig.clock.at)
        await indexer.commands.take_result("uuid-a", one, Result(code=1, message="no", data={"x": 1}), rig.clock.at + 1)
        shown = (await rig.get(f"/api/v1/commands/{one}")).json
        assert (shown["status"], shown["deliveries"], shown["ended_at"]) == (
            "failed",
            1,
            "2023-11-14T22:13:21.000000Z",
        )
        assert shown["result"] == {"code": 1, "message": "no", "data": {"x": 1}}

        async def listed(query: str) -> list[str]:
            return [each["id"] for each in (await rig.get(f"/api/v1/commands?{query}")).json]

        assert await listed("") == await listed("request_id=r") == [two, one]
        assert await listed("agent=uuid-a") == await listed("status=failed") == await listed("before=2") == [one]
        assert await listed("limit=1") == [two]
        assert await listed("tenant=other") == []
        await rig.get("/api/v1/commands?status=lost", 400)

    desk(test)


def test_a_command_is_cancelled_once(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        (one,) = await published(rig, "uuid-a")
        assert (await rig.delete(f"/api/v1/commands/{one}")).json["status"] == "cancelled"
        assert "has ended: cancelled" in (await rig.delete(f"/api/v1/commands/{one}", 409)).json["error"]
        assert await indexer.commands.after("uuid-a", 0, limit=10) == []

    desk(test)


def test_another_tenants_commands_do_not_exist(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        (one,) = await published(rig, "uuid-a")
        for method in (rig.get, rig.delete):
            await method(f"/api/v1/commands/{one}?tenant=other", 404)
            await method("/api/v1/commands/nothing", 404)
        found: Command | None = await indexer.commands.find(one)
        assert found is not None
        assert found.status == "pending"

    desk(test)


def test_the_known_commands_can_be_changed(desk: Any) -> None:
    async def test(rig: Any, indexer: SqliteIndexer) -> None:
        path = "/api/v1/known-commands"
        assert [each["name"] for each in (await rig.get(path)).json] == [
            *("fetch-config", "restart", "set-group", "upgrade")
        ]
        scan = {"version": "v2", "description": "look around", "required_args": ["path"]}
        assert (await rig.put(f"{path}/scan", scan)).json == {"name": "scan", **scan}
        action = {"name": "scan", "version": "v2", "args": {"path": "/"}}
        await rig.post("/api/v1/commands", {"agents": ["uuid-a"], "action": action}, 201)
        assert (await rig.delete(f"{path}/scan")).json == {"removed": "scan"}
        await rig.delete(f"{path}/scan", 404)
        await rig.post("/api/v1/commands", {"agents": ["uuid-a"], "action": action}, 400)
        await rig.put(f"{path}/scan", {"required": []}, 400)

    desk(test)


def test_a_box_without_the_comms_api_says_so(rig: Any) -> None:
    async def test(made: Any) -> None:
        assert "--no-comms" in (await made.get("/api/v1/commands", 404)).json["error"]

    rig(test)
