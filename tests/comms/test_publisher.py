"""From what was asked to one command for every agent that is meant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.comms.errors import CommsError, not_found
from osqbox.comms.messages import Command
from osqbox.comms.publication import parse_publication
from osqbox.comms.publisher import Publisher

from ._commands import NOW, MadeUpAgents, Rig, open_rig

RESTART = {"name": "restart"}


class Register(MadeUpAgents):
    """Three agents in two groups, one of them revoked; counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.members = {"web": ["a", "b"], "db": ["b", "revoked"], "empty": []}
        self.asked = 0

    async def addressed(
        self, tenant: str, *, agents: Sequence[str] = (), groups: Sequence[str] = (), everyone: bool = False
    ) -> list[str]:
        self.asked += 1
        for uuid in agents:
            if tenant != "default" or uuid not in ("a", "b", "revoked"):
                raise not_found(f"Agent {uuid!r}")
        found = await super().addressed(tenant, agents=agents, groups=groups, everyone=everyone)
        return [uuid for uuid in found if uuid != "revoked"]


def with_publisher(folder: Path, test: Any) -> None:
    async def run() -> None:
        async with open_rig(folder) as rig:
            rig.indexer.agents = rig.agents = Register()
            numbers = itertools.count(1)
            publisher = Publisher(rig.indexer, rig.clock, lambda: f"id{next(numbers)}")

            async def publish(body: Any, tenant: str = "default") -> list[Command]:
                return await publisher.publish(parse_publication(body), tenant=tenant, actor="me")

            await test(rig, publish)

    trio.run(run)


def test_a_publication_is_one_request_with_a_command_for_each_agent_once(tmp_path: Path) -> None:
    async def test(rig: Rig, publish: Any) -> None:
        found = await publish({"agents": ["b"], "groups": ["web", "db"], "action": RESTART, "timeout": 60})
        assert [(each.agent, each.request_id, each.target_type, each.target_id) for each in found] == [
            ("b", "id1", "group", "web,db"),
            ("a", "id1", "group", "web,db"),
        ]
        assert {each.expires_at for each in found} == {NOW + 60}
        assert found[0] == await rig.found(found[0].id)
        (named,) = await publish({"command": "restart", "uuids": ["a"]})
        assert (named.target_type, named.target_id, named.expires_at) == ("agent", "a", NOW + 86400)
        everyone = await publish({"command": "restart", "uuids": "all"})
        assert [(each.agent, each.target_type) for each in everyone] == [("a", "all"), ("b", "all")]
        assert await publish({"groups": ["empty"], "action": RESTART}) == []
        assert [change.agents for change in rig.changes] == [("b", "a"), ("a",), ("a", "b")]

    with_publisher(tmp_path, test)


def g1(uuid: str, **facts: Any) -> dict[str, Any]:
    return {"target": {"type": "agent", "id": uuid}, "action": RESTART, **facts}


def test_many_orders_in_one_publication_keep_their_ids_and_order_and_are_looked_up_once(tmp_path: Path) -> None:
    async def test(rig: Rig, publish: Any) -> None:
        found = await publish({"commands": [g1("b", document_id="x", request_id="mine"), g1("a"), g1("b")] + [
            g1("a") for _ in range(500)
        ]})  # fmt: skip
        assert [each.agent for each in found[:4]] == ["b", "a", "b", "a"]
        assert (found[0].id, found[0].request_id, found[1].request_id) == ("x", "mine", "id1")
        assert [each.seq for each in found] == list(range(1, 504))
        assert rig.agents.asked == 1  # type: ignore[attr-defined]

    with_publisher(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "tenant", "status", "words"),
    [
        ({"commands": [g1("a"), g1("nobody")]}, "default", 404, "'nobody'"),
        ({"commands": [g1("a"), g1("revoked")]}, "default", 409, "'revoked' is revoked"),
        ({"agents": ["revoked"], "groups": ["web"], "action": RESTART}, "default", 409, "'revoked' is revoked"),
        ({"commands": [g1("a"), g1("b", action={"name": "rm"})]}, "default", 400, "got 'rm'"),
        ({"commands": [g1("a", document_id="x"), g1("b", document_id="x")]}, "default", 409, "'x' twice"),
        ({"agents": ["a"], "action": RESTART}, "other", 404, "'a'"),
    ],
)
def test_all_or_none(tmp_path: Path, body: Any, tenant: str, status: int, words: str) -> None:
    async def test(rig: Rig, publish: Any) -> None:
        with pytest.raises(CommsError) as refused:
            await publish(body, tenant)
        assert refused.value.status == status
        assert words in refused.value.message
        assert await rig.commands.page() == []
        assert rig.changes == []

    with_publisher(tmp_path, test)


def test_a_large_publication_lets_others_run(tmp_path: Path) -> None:
    async def test(rig: Rig, publish: Any) -> None:
        rig.agents.members["all"] = [f"agent-{n}" for n in range(20_000)]
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await trio.lowlevel.checkpoint()
                ticks += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            assert len(await publish({"groups": ["all"], "action": RESTART})) == 20_000
            nursery.cancel_scope.cancel()
        assert ticks > 20

    with_publisher(tmp_path, test)


def test_a_publication_with_a_key_is_sent_again_safely(tmp_path: Path) -> None:
    async def test(rig: Rig, _: Any) -> None:
        numbers = itertools.count(1)
        publisher = Publisher(rig.indexer, rig.clock, lambda: f"id{next(numbers)}")

        async def publish(body: Any, key: str = "k", tenant: str = "default") -> list[str]:
            found = await publisher.publish(parse_publication(body), tenant=tenant, actor="me", key=key)
            return [each.id for each in found]

        body = {"commands": [g1("b"), g1("a", document_id="x"), g1("b")]}
        first = await publish(body)
        assert first[1] == "x"
        assert len(set(first)) == 3
        assert await publish(body) == first
        again = await publish({"agents": ["b"], "action": RESTART}, key="other")
        assert {each.id for each in await rig.commands.page()} == {*first, *again}
        for other in (
            {"agents": ["b"], "action": {"name": "restart", "args": {"now": True}}},
            {"commands": [g1("b"), g1("a")]},
        ):
            with pytest.raises(CommsError, match="another one") as refused:
                await publish(other)
            assert refused.value.status == 409
        with pytest.raises(CommsError, match="another one"):
            await publish(body, key="third")  # x is taken by the first
        assert len(await rig.commands.page()) == 4

    with_publisher(tmp_path, test)
