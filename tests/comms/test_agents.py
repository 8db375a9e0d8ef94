"""Agents in SQLite: added, changed, revoked, deleted, listed, addressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.comms.messages import Action, Agent, AgentStatus, Change, CommandStatus, NewCommand
from osqbox.comms.registration import new_agent

from ._identity import NOW, Rig, refusal, with_rig


def test_an_agent_is_found_as_it_was_added_also_after_a_restart(tmp_path: Path) -> None:
    host = {"hostname": "web-1", "os": {"name": "Ubuntu", "version": "24.04"}, "ip": ["192.0.2.7", "::1"]}
    made = new_agent(
        uuid="01890a5d-ac96", name="Büro, Etage 2", now=NOW, version="4.9", groups=("web", "default"), host=host
    )

    async def add(rig: Rig) -> None:
        await rig.groups.put("default", "web", "", actor="operator", expected_version=None)
        assert await rig.agents.add(made, "hash", actor="operator") == made
        assert rig.changes[-1] == Change(kind="agents", agents=(made.uuid,), tenant="default")

    async def look(rig: Rig) -> None:
        assert await rig.agents.find(made.uuid) == made
        assert made.status is AgentStatus.NEVER_CONNECTED
        found = await rig.agents.credentials(made.uuid)
        assert found is not None
        assert (found.agent, found.key_hash) == (made, "hash")
        assert await rig.agents.find("another") is None
        assert await rig.agents.credentials("another") is None

    with_rig(tmp_path, add)
    with_rig(tmp_path, look)


def test_what_is_taken_or_missing_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("other")
        await rig.add("u1", name="web")
        await rig.add("u2", name="web", tenant="other")
        rig.changes.clear()
        same_uuid = await refusal(lambda: rig.add("u1", name="another"))
        assert (same_uuid.status, same_uuid.code) == (409, 1708)
        elsewhere = await refusal(lambda: rig.add("u2", name="another"))
        assert (elsewhere.status, elsewhere.code) == (409, 1708)
        same_name = await refusal(lambda: rig.add("u3", name="web"))
        assert (same_name.status, same_name.code) == (409, 1705)
        group = await refusal(lambda: rig.add("u4", groups=("default", "nowhere")))
        assert (group.status, group.message) == (404, "Group 'nowhere' does not exist")
        tenant = await refusal(lambda: rig.add("u5", tenant="nowhere"))
        assert (tenant.status, tenant.message) == (404, "Tenant 'nowhere' does not exist")
        assert [agent.uuid for agent in await rig.agents.page()] == ["u1", "u2"]
        assert rig.changes == []

    with_rig(tmp_path, test)


def test_changes_tell_audit_and_feed(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.groups.put("default", "web", "a: 1", actor="op", expected_version=None)
        await rig.add("u1")
        changed = await rig.agents.change("u1", actor="op", name="new", groups=["web", "default"])
        assert (changed.name, changed.groups, changed.key_version) == ("new", ("web", "default"), 1)
        assert changed == await rig.agents.find("u1")
        revoked = await rig.agents.change("u1", actor="op", status=AgentStatus.REVOKED)
        await rig.agents.change("u1", actor="op", key_hash="fresh")
        await rig.agents.delete("u1", actor="op")
        assert revoked.key_version == 2
        rows = await rig.audited("agent")
        assert [(row["actor"], row["action"], row["subject"], row["result"]) for row in rows] == [
            ("operator", "agent.add", "u1", "ok"),
            ("op", "agent.change", "u1", "ok"),
            ("op", "agent.revoke", "u1", "ok"),
            ("op", "agent.change", "u1", "ok"),
            ("op", "agent.delete", "u1", "ok"),
        ]
        assert "fresh" not in str(rows)
        kinds = [(kind, data["agent"]) for kind, data in await rig.told() if kind.startswith("comms_agent")]
        assert kinds == [
            ("comms_agent_added", "u1"),
            *[("comms_agent_changed", "u1")] * 3,
            ("comms_agent_deleted", "u1"),
        ]
        assert [change.agents for change in rig.changes if change.kind == "agents"] == [("u1",)] * 5

    with_rig(tmp_path, test)


def test_key_versions_grow_with_keys_and_revocations_only(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add("u1")
        steps: list[tuple[dict[str, Any], AgentStatus, int]] = [
            ({"name": "other"}, AgentStatus.NEVER_CONNECTED, 1),
            ({"status": AgentStatus.ACTIVE}, AgentStatus.NEVER_CONNECTED, 1),
            ({"key_hash": "second"}, AgentStatus.NEVER_CONNECTED, 2),
            ({"status": AgentStatus.REVOKED}, AgentStatus.REVOKED, 3),
            ({"status": AgentStatus.REVOKED}, AgentStatus.REVOKED, 3),
            ({"key_hash": "third"}, AgentStatus.REVOKED, 4),
            ({"status": AgentStatus.ACTIVE}, AgentStatus.NEVER_CONNECTED, 4),
            ({"status": AgentStatus.REVOKED, "key_hash": "fourth"}, AgentStatus.REVOKED, 5),
        ]
        for change, status, key_version in steps:
            agent = await rig.agents.change("u1", actor="op", **change)
            assert (agent.status, agent.key_version) == (status, key_version), change
        found = await rig.agents.credentials("u1")
        assert found is not None
        assert found.key_hash == "fourth"

    with_rig(tmp_path, test)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"name": "name of u2"}, 409, "exists already"),
        ({"name": " "}, 400, "name: expected"),
        ({"groups": ["nowhere"]}, 404, "Group 'nowhere'"),
        ({"groups": []}, 400, "groups: expected 1-64, got 0"),
        ({"groups": ["default", "default"]}, 400, "each once"),
        ({"groups": ["../etc"]}, 400, "group: expected"),
    ],
)
def test_a_bad_change_changes_nothing(change: dict[str, Any], status: int, words: str, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        before = await rig.add("u1")
        await rig.add("u2")
        rig.changes.clear()
        error = await refusal(lambda: rig.agents.change("u1", actor="op", **change))
        assert error.status == status
        assert words in error.message
        assert await rig.agents.find("u1") == before
        assert rig.changes == []

    with_rig(tmp_path, test)


def test_nobody_changes_or_deletes_who_does_not_exist(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert (await refusal(lambda: rig.agents.change("u1", actor="op", name="x"))).status == 404
        assert (await refusal(lambda: rig.agents.delete("u1", actor="op"))).status == 404
        await rig.agents.note_login("u1", NOW, {})
        await rig.agents.note_seen({"u1": NOW})
        assert await rig.agents.find("u1") is None

    with_rig(tmp_path, test)


def test_deleting_cancels_open_commands_in_the_same_transaction(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add("u1")
        await rig.add("u2")
        commands = [
            NewCommand(
                id=f"c{n}", agent=uuid, tenant="default", action=Action(name="restart"), request_id="r",
                created_at=NOW, expires_at=NOW + 60,
            )
            for n, uuid in enumerate(("u1", "u2", "u1"))
        ]  # fmt: skip
        await rig.indexer.commands.publish(commands, actor="op")
        await rig.agents.delete("u1", actor="op")
        statuses = [each.status for n in range(3) if (each := await rig.indexer.commands.find(f"c{n}"))]
        assert statuses == [CommandStatus.CANCELLED, CommandStatus.PENDING, CommandStatus.CANCELLED]
        again = await rig.add("u1")
        assert again.groups == ("default",)
        assert await rig.indexer.commands.after("u1", 0, limit=10) == []

    with_rig(tmp_path, test)


def test_logins_and_sightings_are_noted(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add("u1", version="1", host={"hostname": "a"})
        await rig.agents.note_login("u1", NOW + 1, {"version": "2"})
        agent = await found(rig, "u1")
        assert (agent.status, agent.last_login_at, agent.last_seen_at) == (AgentStatus.ACTIVE, NOW + 1, NOW + 1)
        assert (agent.version, agent.type, agent.host) == ("2", "Endpoint", {"hostname": "a"})
        await rig.agents.note_seen({"u1": NOW + 9, "gone": NOW})
        await rig.agents.note_seen({"u1": NOW + 5})
        await rig.agents.note_login("u1", NOW + 7, {"type": "Server", "host": {"hostname": "b"}})
        agent = await found(rig, "u1")
        assert (agent.last_login_at, agent.last_seen_at) == (NOW + 7, NOW + 9)
        assert (agent.version, agent.type, agent.host) == ("2", "Server", {"hostname": "b"})
        await rig.agents.change("u1", actor="op", status=AgentStatus.REVOKED)
        await rig.agents.note_login("u1", NOW + 20, {})
        assert (await found(rig, "u1")).status is AgentStatus.REVOKED
        allowed = await rig.agents.change("u1", actor="op", status=AgentStatus.ACTIVE)
        assert allowed.status is AgentStatus.ACTIVE

    async def found(rig: Rig, uuid: str) -> Agent:
        agent = await rig.agents.find(uuid)
        assert agent is not None
        return agent

    with_rig(tmp_path, test)


def test_pages_are_in_order_and_show_one_tenant(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("other")
        for tenant in ("default", "other"):
            await rig.groups.put(tenant, "web", "", actor="op", expected_version=None)
        for number in range(5):
            await rig.add(f"u{number}", name=f"Name_{number}", groups=("web",) if number % 2 else ("default",))
        await rig.add("u9", tenant="other", groups=("web",))
        pages = [await rig.agents.page(tenant="default", limit=2)]
        while pages[-1]:
            pages.append(await rig.agents.page(tenant="default", limit=2, after=pages[-1][-1].uuid))
        assert [[agent.uuid for agent in page] for page in pages] == [["u0", "u1"], ["u2", "u3"], ["u4"], []]
        assert [agent.uuid for agent in await rig.agents.page(tenant="default", group="web")] == ["u1", "u3"]
        assert [agent.uuid for agent in await rig.agents.page(tenant="other", group="web")] == ["u9"]
        assert [agent.uuid for agent in await rig.agents.page(text="NAME_3")] == ["u3"]
        assert [agent.uuid for agent in await rig.agents.page(text="U4")] == ["u4"]
        assert await rig.agents.page(text="%") == []
        assert len(await rig.agents.page()) == 6

    with_rig(tmp_path, test)


def test_a_publication_reaches_each_once_and_never_a_part(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("other")
        await rig.groups.put("default", "web", "", actor="op", expected_version=None)
        for uuid, groups in (("a", ("web",)), ("b", ("web", "default")), ("c", ("default",)), ("d", ("default",))):
            await rig.add(uuid, groups=groups)
        await rig.add("x", tenant="other")
        await rig.agents.change("d", actor="op", status=AgentStatus.REVOKED)
        ask = rig.agents.addressed
        assert await ask("default", agents=["c", "a", "a"]) == ["a", "c"]
        assert await ask("default", agents=["a"], groups=["web", "default"]) == ["a", "b", "c"]
        assert await ask("default", everyone=True, groups=["web"]) == ["a", "b", "c"]
        assert await ask("default", agents=["d"]) == []
        assert await ask("default") == []
        assert await ask("other", everyone=True) == ["x"]
        for wanted, named in (
            ({"agents": ["a", "nobody"]}, "Agent 'nobody'"),
            ({"agents": ["x"]}, "Agent 'x'"),
            ({"groups": ["web", "nowhere"], "everyone": True}, "Group 'nowhere'"),
        ):
            error = await refusal(lambda wanted=wanted: ask("default", **wanted))
            assert (error.status, error.message) == (404, f"{named} does not exist")

    with_rig(tmp_path, test)


def test_forty_thousand_are_addressed_by_name_within_seconds(tmp_path: Path) -> None:
    """Far more than SQLite takes as variables of one statement."""
    count = 40_000

    async def test(rig: Rig) -> None:
        uuids = [f"agent-{number:06}" for number in range(count)]

        def fill(tx: Any) -> None:
            tx.db.executemany(
                "INSERT INTO comms_agents SELECT ?, 'default', ?, '', '', '{}', 'active', 1, '', 0, NULL, NULL",
                [(uuid, uuid) for uuid in uuids],
            )

        await rig.store.write(fill)
        with trio.fail_after(20):
            assert await rig.agents.addressed("default", agents=uuids) == uuids
            assert len(await rig.agents.addressed("default", everyone=True)) == count
            assert [agent.uuid for agent in await rig.agents.page(after=uuids[-2])] == uuids[-1:]

    with_rig(tmp_path, test)
