"""Operators add agents, put them in groups, take their keys away, and turn the keys that sign tokens."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlite_utils import Database

from osqbox import audit, tenants
from osqbox.comms.errors import CommsError
from osqbox.comms.front import Comms, open_comms
from osqbox.comms.hub import Bye
from osqbox.comms.keys import DIRECTORY
from osqbox.comms.sqlite import MIGRATIONS
from osqbox.settings import CommsSettings, Retention

Test = Callable[[Any, Comms], Awaitable[None]]
PEER = "192.0.2.1"
KEY = "abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def desk(rig: Any, tmp_path: Path) -> Callable[[Test], None]:
    """Runs a test with the operator API of a box that serves the comms API."""

    async def run(without: Any, test: Test) -> None:
        def migrate(tx: Any) -> None:
            for step in MIGRATIONS:
                step.apply(Database(tx.db))
            tenants.create(tx, "other", tenants.TenantOptions())

        await without.store.write(migrate)
        key = ec.generate_private_key(ec.SECP256R1())
        keys = tmp_path / DIRECTORY
        keys.mkdir()
        (keys / "1.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        async with open_comms(
            CommsSettings(token_algorithm="ES256"),
            Retention(),
            without.store,
            without.clock,
            data_dir=tmp_path,
            certs_dir=tmp_path,
            new_id=without.parts.new_id,
        ) as comms:
            parts = replace(without.parts, comms=comms)
            made = type(without)(parts, without.clock, without.stops, without._nursery)
            await test(made, comms)

    return lambda test: rig(lambda without: run(without, test))


def test_an_added_agent_logs_in_with_the_key_it_was_told(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        added = (await rig.post("/api/v1/agents", {"name": "web-1", "group": "default"}, 201)).json
        assert (len(added["uuid"]), len(added["key"])) == (36, 32)
        assert (added["status"], added["groups"], added["tenant"]) == ("never_connected", ["default"], "default")
        token, agent = await comms.login.login(added["uuid"], added["key"], peer=PEER)
        assert agent.name == "web-1"
        shown = (await rig.get(f"/api/v1/agents/{added['uuid']}")).json
        assert shown["status"] == "active"
        assert "key" not in shown
        assert (await rig.get("/api/v1/agents/web-1")).json == shown
        assert (await rig.get("/api/v1/agents")).json == [shown]
        assert await comms.login.authenticate(f"Bearer {token}")

    desk(test)


def test_uuid_and_key_may_be_given(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        body = {"name": "web-1", "uuid": "u1", "key": KEY, "groups": ["default"], "type": "Server", "version": "5"}
        added = (await rig.post("/api/v1/agents", body, 201)).json
        assert (added["uuid"], added["key"], added["type"], added["version"]) == ("u1", KEY, "Server", "5")
        assert await comms.login.login("u1", KEY, peer=PEER)

    desk(test)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "name"),
        ({"name": ""}, 400, "name: expected"),
        ({"name": "n", "key": "short"}, 400, "exactly 32 alphanumeric characters, got 5"),
        ({"name": "n", "uuid": "a/b"}, 400, "id: expected a UUID"),
        ({"name": "n", "group": "nowhere"}, 404, "Group 'nowhere' does not exist"),
        ({"name": "n", "group": "a", "groups": ["b"]}, 400, "either group or groups"),
        ({"name": "n", "tenant": "nowhere"}, 404, "Tenant 'nowhere' does not exist"),
        ({"name": "n", "role": "admin"}, 400, "role"),
        ({"name": "taken"}, 409, "an agent named 'taken' exists already"),
        ({"name": "n", "uuid": "taken"}, 409, "an agent with the id 'taken' exists already"),
    ],
)
def test_a_bad_agent_is_refused(body: dict[str, Any], status: int, words: str, desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "taken", "uuid": "taken"}, 201)
        assert words in (await rig.post("/api/v1/agents", body, status)).json["error"]
        assert len(await comms.indexer.agents.page()) == 1

    desk(test)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("agents/nobody", "osqbox comms agents"),
        ("groups/nowhere", "osqbox comms config"),
        ("commands/nothing", "osqbox comms commands"),
    ],
)
def test_what_does_not_exist_says_where_to_look(path: str, hint: str, desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        assert (await rig.get(f"/api/v1/{path}", 404)).json["hint"] == hint

    desk(test)


def test_a_revoked_agent_is_out_until_it_is_allowed_again(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "key": KEY}, 201)
        token, _ = await comms.login.login("u1", KEY, peer=PEER)
        assert (await rig.patch("/api/v1/agents/web-1", {"status": "revoked"})).json["status"] == "revoked"
        with pytest.raises(CommsError, match="revoked"):
            await comms.login.authenticate(f"Bearer {token}")
        assert (await rig.patch("/api/v1/agents/u1", {"status": "active"})).json["status"] == "active"
        with pytest.raises(CommsError, match="log in again"):
            await comms.login.authenticate(f"Bearer {token}")
        assert await comms.login.login("u1", KEY, peer=PEER)
        await rig.patch("/api/v1/agents/u1", {"status": "never_connected"}, 400)

    desk(test)


def test_a_new_key_ends_the_old_one(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "key": KEY}, 201)
        token, _ = await comms.login.login("u1", KEY, peer=PEER)
        renewed = (await rig.post("/api/v1/agents/u1/key")).json
        assert renewed["uuid"] == "u1"
        with pytest.raises(CommsError):
            await comms.login.authenticate(f"Bearer {token}")
        with pytest.raises(CommsError, match="Invalid key"):
            await comms.login.login("u1", KEY, peer=PEER)
        assert await comms.login.login("u1", renewed["key"], peer=PEER)
        await rig.post("/api/v1/agents/u1/key", {"key": "short"}, 400)
        rows = await rig.store.read(lambda db: audit.rows(db, limit=100))
        assert renewed["key"] not in str(rows)

    desk(test)


def test_changed_groups_are_told_to_the_agent(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1"}, 201)
        await rig.put("/api/v1/groups/web", {"configuration": ""})
        changed = (await rig.patch("/api/v1/agents/u1", {"groups": ["default", "web"], "name": "web-2"})).json
        assert (changed["groups"], changed["name"]) == (["default", "web"], "web-2")
        (told,) = await comms.indexer.commands.page(agent="u1")
        assert (told.action.name, told.action.args) == ("set-group", {"groups": ["default", "web"]})
        await rig.patch("/api/v1/agents/u1", {"name": "web-3"})
        await rig.patch("/api/v1/agents/u1", {"groups": []}, 400)
        await rig.patch("/api/v1/agents/u1", {"groups": ["nowhere"]}, 404)
        await rig.patch("/api/v1/agents/u1", {"status": "revoked", "groups": ["web"]})
        assert len(await comms.indexer.commands.page(agent="u1")) == 1
        assert [agent["uuid"] for agent in (await rig.get("/api/v1/agents?group=web")).json] == ["u1"]
        assert (await rig.get("/api/v1/agents?group=default")).json == []

    desk(test)


def test_groups_are_changed_without_the_command_where_it_was_removed(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1"}, 201)
        await comms.indexer.commands.remove_known("set-group", actor="op")
        await rig.patch("/api/v1/agents/u1", {"groups": ["default"]})
        assert await comms.indexer.commands.page() == []

    desk(test)


def test_a_deleted_agent_is_gone(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "key": KEY}, 201)
        await comms.login.login("u1", KEY, peer=PEER)
        assert (await rig.delete("/api/v1/agents/web-1")).json == {"deleted": "u1"}
        await rig.delete("/api/v1/agents/web-1", 404)
        await rig.get("/api/v1/agents/u1", 404)
        await rig.patch("/api/v1/agents/u1", {"name": "x"}, 404)
        await rig.post("/api/v1/agents/u1/key", {}, 404)
        with pytest.raises(CommsError, match="Agent does not exist"):
            await comms.login.login("u1", KEY, peer=PEER)

    desk(test)


def test_agents_of_another_tenant_look_as_if_there_were_none(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents?tenant=other", {"name": "web-1", "uuid": "u1"}, 201)
        await rig.post("/api/v1/agents", {"name": "web-2", "uuid": "u2", "tenant": "other"}, 201)
        assert (await rig.get("/api/v1/agents")).json == []
        for word in ("u1", "web-1"):
            await rig.get(f"/api/v1/agents/{word}", 404)
            await rig.delete(f"/api/v1/agents/{word}", 404)
        found = (await rig.get("/api/v1/agents?tenant=other")).json
        assert [agent["uuid"] for agent in found] == ["u1", "u2"]
        assert (await rig.get("/api/v1/agents/web-1?tenant=other")).json["uuid"] == "u1"
        await rig.put("/api/v1/groups/web?tenant=other", {"configuration": "a: 1"})
        await rig.get("/api/v1/groups/web", 404)
        await rig.put("/api/v1/groups/web?tenant=nowhere", {"configuration": "a: 1"}, 404)
        assert await comms.indexer.commands.page() == []

    desk(test)


def test_closing_a_tenant_ends_its_streams_and_no_other(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        agents = {}
        for tenant in ("default", "other"):
            added = (await rig.post("/api/v1/agents", {"name": "web-1", "tenant": tenant}, 201)).json
            agents[tenant] = await comms.indexer.agents.find(added["uuid"])
        until = comms.clock.now() + 900
        async with (
            comms.hub.attach(agents["default"], connection="c1", after=None, expires_at=until) as kept,
            comms.hub.attach(agents["other"], connection="c2", after=None, expires_at=until) as ended,
        ):
            assert (await kept.next(0), await ended.next(0)) == (None, None)
            await rig.delete("/api/v1/tenants/other")
            with trio.fail_after(5):
                bye = await ended.next()
            assert isinstance(bye, Bye)
            assert bye.reason == "revoked"
            assert await kept.next(0) is None

    desk(test)


def test_many_agents_are_listed_a_page_at_a_time(desk: Any) -> None:
    async def test(rig: Any, _: Comms) -> None:
        for number in range(5):
            await rig.post("/api/v1/agents", {"name": f"n{number}", "uuid": f"u{number}", "key": KEY}, 201)
        found = (await rig.get("/api/v1/agents?limit=3")).json
        found += (await rig.get(f"/api/v1/agents?limit=3&after={found[-1]['uuid']}")).json
        assert [agent["name"] for agent in found] == ["n0", "n1", "n2", "n3", "n4"]
        assert [agent["name"] for agent in (await rig.get("/api/v1/agents?text=N4")).json] == ["n4"]
        for bad in ("limit=0", "limit=1001", "colour=red"):
            await rig.get(f"/api/v1/agents?{bad}", 400)

    desk(test)


# groups


def test_a_changed_configuration_is_told_to_the_groups_agents(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        made = (await rig.put("/api/v1/groups/web", {"configuration": "a: 1", "expected_version": 0})).json
        assert (made["version"], made["configuration"], made["changed_by"]) == (1, "a: 1", "operator")
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "group": "web"}, 201)
        await rig.post("/api/v1/agents", {"name": "web-2", "uuid": "u2"}, 201)
        await rig.put("/api/v1/groups/web", {"configuration": "a: 1"})
        assert await comms.indexer.commands.page() == []
        await rig.put("/api/v1/groups/web", {"configuration": "a: 2"})
        (told,) = await comms.indexer.commands.page()
        assert (told.agent, told.action.name) == ("u1", "fetch-config")
        refused = await rig.put("/api/v1/groups/web", {"configuration": "a: 3", "expected_version": 1}, 409)
        assert "expected version 1, got 2" in refused.json["error"]
        assert (await rig.get("/api/v1/groups/web")).json["configuration"] == "a: 2"
        assert [each["version"] for each in (await rig.get("/api/v1/groups/web/versions")).json] == [2, 1]
        listed = (await rig.get("/api/v1/groups")).json
        assert [(each["name"], each["version"]) for each in listed] == [("default", 0), ("web", 2)]
        assert "configuration" not in listed[0]

    desk(test)


def test_a_bad_configuration_is_refused(desk: Any) -> None:
    async def test(rig: Any, _: Comms) -> None:
        for text in ("a: [", "- a list", "a: &x [*x]"):
            await rig.put("/api/v1/groups/web", {"configuration": text}, 400)
        await rig.put("/api/v1/groups/.hidden", {"configuration": "a: 1"}, 400)
        await rig.get("/api/v1/groups/web", 404)
        await rig.get("/api/v1/groups/web/versions", 404)

    desk(test)


def test_a_group_is_deleted_when_nobody_is_in_it(desk: Any) -> None:
    async def test(rig: Any, _: Comms) -> None:
        await rig.put("/api/v1/groups/web", {})
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "group": "web"}, 201)
        assert "move them first" in (await rig.delete("/api/v1/groups/web", 409)).json["error"]
        await rig.delete("/api/v1/agents/u1")
        assert (await rig.delete("/api/v1/groups/web")).json == {"deleted": "web"}
        await rig.delete("/api/v1/groups/web", 404)
        await rig.delete("/api/v1/groups/default", 409)

    desk(test)


# keys


def test_signing_keys_are_turned_and_removed(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        await rig.post("/api/v1/agents", {"name": "web-1", "uuid": "u1", "key": KEY}, 201)
        token, _ = await comms.login.login("u1", KEY, peer=PEER)
        (first,) = (await rig.get("/api/v1/comms/keys")).json
        assert (first["signs"], first["algorithm"]) == (True, "ES256")
        keys = (await rig.post("/api/v1/comms/keys", status=201)).json
        assert [key["signs"] for key in keys] == [False, True]
        assert await comms.login.authenticate(f"Bearer {token}")
        await rig.delete(f"/api/v1/comms/keys/{keys[1]['kid']}", 409)
        await rig.delete(f"/api/v1/comms/keys/{first['kid']}")
        await rig.delete(f"/api/v1/comms/keys/{first['kid']}", 404)
        with pytest.raises(CommsError, match="no key of that kid"):
            await comms.login.authenticate(f"Bearer {token}")
        rows = await rig.store.read(lambda db: audit.rows(db, action="keys"))
        assert [(row["action"], row["subject"]) for row in rows] == [
            ("keys.rotate", keys[1]["kid"]),
            ("keys.remove", first["kid"]),
        ]

    desk(test)


# enrollment as agents do it on their management API


REGISTRATION = {
    "id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "name": "web-1",
    "key": KEY,
    "type": "Endpoint",
    "version": "5.0.0",
    "host": {"hostname": "web-1", "ip": ["192.0.2.7"], "os": {"name": "Ubuntu"}},
    "unknown": "is passed over",
}


def test_an_agent_enrolls_with_the_boxs_token_as_its_password(desk: Any) -> None:
    async def test(rig: Any, comms: Comms) -> None:
        password = base64.b64encode(f"wazuh:{rig.parts.token}".encode()).decode()
        headers = {"Authorization": f"Basic {password}"}
        answered = await rig.ask("POST", "/security/user/authenticate", headers=headers)
        assert answered.status == 200
        token = answered.json["data"]["token"]
        enrolled = await rig.ask("POST", "/agents", headers={"Authorization": f"Bearer {token}"}, json=REGISTRATION)
        assert enrolled.status == 201
        logged_in, agent = await comms.login.login(REGISTRATION["id"], KEY, peer=PEER)
        assert agent.host == REGISTRATION["host"]
        again = await rig.post("/agents", REGISTRATION, 409)
        assert "exists already" in again.json["error"]
        await rig.post("/agents", {**REGISTRATION, "id": "u2", "name": "n2", "key": "short"}, 400)
        for header in (f"Bearer {logged_in}", "Basic " + base64.b64encode(b"a:b").decode()):
            refused = await rig.ask("POST", "/agents", headers={"Authorization": header}, json=REGISTRATION)
            assert refused.status == 401
        refused = await rig.ask("POST", "/security/user/authenticate", headers={"Authorization": "Basic YTpi"})
        assert refused.status == 401
        assert "Basic" in refused.headers["WWW-Authenticate"]

    desk(test)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/agents"),
        ("POST", "/api/v1/agents"),
        ("GET", "/api/v1/groups"),
        ("PUT", "/api/v1/groups/web"),
        ("POST", "/api/v1/comms/keys"),
        ("POST", "/security/user/authenticate"),
    ],
)
def test_a_box_without_the_comms_api_says_so(method: str, path: str, rig: Any) -> None:
    async def test(box: Any) -> None:
        body = {"json": {"name": "n"} if path.endswith("agents") else {}} if method != "GET" else {}
        answered = await box.call(method, path, status=404, **body)
        assert "serves no comms API" in answered.json["error"]

    rig(test)
