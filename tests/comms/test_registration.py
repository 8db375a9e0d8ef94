"""What may be in a registration, and agents that enroll themselves with a tenant's secret."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from osqbox import tenants
from osqbox.comms.errors import CommsError
from osqbox.comms.messages import Agent, AgentStatus
from osqbox.comms.registration import KEY_ALPHABET, new_agent, new_key

from ._identity import NOW, PEER, Rig, refusal, with_rig

KEY = "abcdefghijklmnopqrstuvwxyz012345"
BODY = {
    "id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "name": "web-1",
    "key": KEY,
    "type": "Endpoint",
    "version": "5.0.0",
    "host": {
        "hostname": "web-1",
        "architecture": "x86_64",
        "ip": ["192.0.2.7"],
        "os": {"name": "Ubuntu", "type": "linux", "version": "24.04"},
    },
}


def basic(password: str, user: str = "wazuh") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def enroll(rig: Rig, body: Any = BODY, secret: str = "s", **change: Any) -> Agent:
    token = await rig.enrollment.authenticate(basic(secret), peer=PEER)
    return await rig.enrollment.enroll(f"Bearer {token}", json.dumps({**body, **change}).encode(), peer=PEER)


def test_new_keys_are_32_alphanumerics_each_another() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 32 and set(key) <= set(KEY_ALPHABET) for key in keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uuid": ""}, "id: expected"),
        ({"uuid": "a/b"}, "id: expected"),
        ({"uuid": "a" * 65}, "id: expected"),
        ({"uuid": "ä"}, "id: expected"),
        ({"uuid": "a\n"}, "id: expected"),
        ({"name": ""}, "name: expected"),
        ({"name": "x" * 129}, "name: expected"),
        ({"name": "a\nb"}, "name: expected"),
        ({"name": " a"}, "name: expected"),
        ({"groups": ()}, "groups: expected 1-64, got 0"),
        ({"groups": tuple(f"g{n}" for n in range(65))}, "got 65"),
        ({"type": "x" * 129}, "type: expected"),
        ({"version": "1\x00"}, "version: expected"),
        ({"host": {"hostname": "x" * 20_000}}, "host: expected at most"),
    ],
)
def test_what_an_agent_may_not_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CommsError, match=words) as caught:
        new_agent(**{"uuid": "u", "name": "n", "now": NOW, **change})
    assert caught.value.status == 400


def test_a_secret_becomes_a_token_and_the_token_an_agent_that_logs_in(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("customer", "s")
        agent = await enroll(rig)
        assert agent == await rig.agents.find(BODY["id"])
        assert (agent.tenant, agent.name, agent.groups, agent.status) == (
            "customer",
            "web-1",
            ("default",),
            AgentStatus.NEVER_CONNECTED,
        )
        assert agent.host == BODY["host"]
        token, _ = await rig.login.login(agent.uuid, KEY, peer=PEER)
        assert (await rig.login.authenticate(f"Bearer {token}"))[0].uuid == agent.uuid
        (row,) = await rig.audited("agent.enroll")
        assert (row["subject"], row["tenant"], row["address"], row["result"]) == (agent.uuid, "customer", PEER, "ok")
        secret = await rig.store.read(lambda db: tenants.find_secret(db, ["s"]))
        assert secret is not None
        assert secret.used == 1
        credentials = await rig.agents.credentials(agent.uuid)
        assert credentials is not None
        assert KEY not in credentials.key_hash

    with_rig(tmp_path, test)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in BODY.items() if key != name}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (without("id"), "id"),
        (without("name"), "name"),
        (without("key"), "key"),
        (without("type"), "type"),
        (without("version"), "version"),
        ({**BODY, "key": KEY[:-1]}, "exactly 32 alphanumeric characters, got 31"),
        ({**BODY, "key": KEY + "x"}, "got 33"),
        ({**BODY, "key": "!" * 32}, "alphanumeric"),
        ({**BODY, "key": "é" * 32}, "alphanumeric"),
        ({**BODY, "key": 1}, "key"),
        ({**BODY, "host": []}, "host"),
        ({**BODY, "host": {"ip": "192.0.2.7"}}, "host.ip"),
        ({**BODY, "name": "a\x00b"}, "name"),
        ([], "object"),
        (None, "object"),
    ],
)
def test_a_bad_registration_is_refused_and_uses_nothing_up(body: Any, words: str, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s", uses=1)
        token = await rig.enrollment.authenticate(basic("s"), peer=PEER)
        error = await refusal(lambda: rig.enrollment.enroll(f"Bearer {token}", json.dumps(body).encode(), peer=PEER))
        assert error.status == 400
        assert words in error.message
        assert KEY not in error.message
        assert await enroll(rig)

    with_rig(tmp_path, test)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"id":"\xed\xa0\x80"}'])
def test_a_body_that_is_no_json_is_refused(data: bytes, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s")
        token = await rig.enrollment.authenticate(basic("s"), peer=PEER)
        assert (await refusal(lambda: rig.enrollment.enroll(f"Bearer {token}", data, peer=PEER))).status == 400

    with_rig(tmp_path, test)


def test_a_secret_for_one_use_enrolls_one(tmp_path: Path) -> None:
    """Although its token could be shown twice, and although a refused registration gives the use back."""

    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s", uses=1)
        await rig.add("taken")
        error = await refusal(lambda: enroll(rig, id="taken"))
        assert (error.status, error.code) == (409, 1708)
        token = await rig.enrollment.authenticate(basic("s"), peer=PEER)
        answers: list[int] = []

        async def one(number: int) -> None:
            body = json.dumps({**BODY, "id": f"u{number}", "name": f"n{number}"}).encode()
            try:
                await rig.enrollment.enroll(f"Bearer {token}", body, peer=PEER)
            except CommsError as refused:
                answers.append(refused.status)
            else:
                answers.append(201)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number)
        assert sorted(answers) == [201, 403, 403, 403]
        assert (await refusal(lambda: rig.enrollment.authenticate(basic("s"), peer=PEER))).status == 403
        results = [row["result"] for row in await rig.audited("agent.enroll")]
        assert results == ["conflict", "ok"]

    with_rig(tmp_path, test)


@pytest.mark.parametrize(
    "header",
    [None, "", "Basic", "Basic !!!", basic(""), basic("wrong"), "Basic " + base64.b64encode(b"s").decode(), "Bearer s"],
)
def test_without_a_known_secret_there_is_no_token(header: str | None, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s")
        error = await refusal(lambda: rig.enrollment.authenticate(header, peer=PEER))
        assert (error.status, error.reason) == (401, "unknown_secret")
        assert "wrong" not in error.message
        assert [row["result"] for row in await rig.audited("agent.enroll")] == ["unknown_secret"]

    with_rig(tmp_path, test)


def test_guessing_secrets_is_slowed_down(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s")
        for _ in range(3):
            await refusal(lambda: rig.enrollment.authenticate(basic("wrong"), peer=PEER))
        error = await refusal(lambda: rig.enrollment.authenticate(basic("s"), peer=PEER))
        assert (error.status, error.retry_after_s) == (429, 60)
        assert await rig.enrollment.authenticate(basic("s"), peer="192.0.2.2")

    with_rig(tmp_path, test, per_address=3)


async def expire(rig: Rig) -> None:
    rig.clock.at += 301


async def close(rig: Rig) -> None:
    await rig.store.write(lambda tx: tenants.close(tx, "customer"))


async def remove(rig: Rig) -> None:
    await rig.store.write(lambda tx: tenants.remove_secret(tx, "customer", 1))


@pytest.mark.parametrize("end", [expire, close, remove])
def test_a_token_is_good_for_a_short_while_only(end: Callable[[Rig], Any], tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("customer", "s")
        token = await rig.enrollment.authenticate(basic("s"), peer=PEER)
        await end(rig)
        error = await refusal(lambda: rig.enrollment.enroll(f"Bearer {token}", msgspec.json.encode(BODY), peer=PEER))
        assert error.status == 403
        assert await rig.agents.page() == []

    with_rig(tmp_path, test)


def test_one_kind_of_token_is_not_taken_for_the_other(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("default", "s")
        await enroll(rig)
        own, _ = await rig.login.login(BODY["id"], KEY, peer=PEER)
        data = json.dumps({**BODY, "id": "another", "name": "another"}).encode()
        for header in (f"Bearer {own}", None, "Bearer", basic("s"), "Bearer x.y.z"):
            error = await refusal(lambda header=header: rig.enrollment.enroll(header, data, peer=PEER))
            assert (error.status, error.code) == (403, 2706)
        permit = await rig.enrollment.authenticate(basic("s"), peer=PEER)
        assert (await refusal(lambda: rig.login.authenticate(f"Bearer {permit}"))).code == 2706

    with_rig(tmp_path, test)
