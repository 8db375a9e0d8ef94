"""Agents and groups of boxes that share an indexer: what one changes the others know, and remember while it is down."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from osqbox import tenants
from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.messages import Agent, AgentStatus
from osqbox.comms.opensearch import agents as agents_module
from osqbox.comms.opensearch import groups as groups_module
from osqbox.comms.opensearch.kept import KEEP_S, Kept
from tests.comms.contract import HandClock, World, at_once, open_world, refused
from tests.comms.opensearch.test_contract import opener

from .standin import StandIn

HEARD_S = 8.0
"""News take a tenth of a second; a busy machine may take longer."""


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def run(test: Callable[[World, World], Awaitable[None]], standin: StandIn, folder: Path) -> None:
    """With two boxes of one tenant."""

    async def main() -> None:
        with trio.fail_after(25):
            async with AsyncExitStack() as stack:
                here = await stack.enter_async_context(open_world(folder, opener(standin.url)))
                there = await stack.enter_async_context(open_world(folder, opener(standin.url)))
                await there.store.write(lambda tx: tenants.create(tx, here.tenant, tenants.TenantOptions()))
                there.name, there.numbers = here.name, here.numbers
                await test(here, there)

    trio.run(main)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(HEARD_S):
        while not await holds():
            await trio.sleep(0.01)


def test_a_revocation_on_one_box_bites_on_the_other(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        agent = await here.add("web")
        assert await there.found(agent.uuid) == agent
        await here.indexer.agents.change(agent.uuid, actor="operator", status=AgentStatus.REVOKED)
        assert (await here.found(agent.uuid)).status is AgentStatus.REVOKED, "here at once"

        async def is_revoked() -> bool:
            return (await there.found(agent.uuid)).status is AgentStatus.REVOKED

        await until(is_revoked)
        assert there.told("agents")[-1].agents == (agent.uuid,)
        await here.indexer.agents.delete(agent.uuid, actor="operator")

        async def is_gone() -> bool:
            return await there.indexer.agents.find(agent.uuid) is None

        await until(is_gone)

    run(test, standin, tmp_path)


def test_a_configuration_put_on_one_box_is_that_of_the_other(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        await here.put("web", "a: 1")
        found = await there.indexer.groups.find(here.tenant, "web")
        assert found is not None
        await there.put("web", "a: 2", found.version)

        async def is_second() -> bool:
            group = await here.indexer.groups.find(here.tenant, "web")
            return group is not None and group.configuration == "a: 2"

        await until(is_second)
        await here.indexer.groups.delete(here.tenant, "web", actor="operator")

        async def is_gone() -> bool:
            return await there.indexer.groups.find(here.tenant, "web") is None

        await until(is_gone)

    run(test, standin, tmp_path)


def test_one_name_is_taken_on_one_box(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        calls = [
            partial(box.indexer.agents.add, here.new("web"), "hash", actor="operator")
            for box in (here, there)
            for _ in range(5)
        ]
        results = await at_once(*calls)
        assert sum(isinstance(result, Agent) for result in results) == 1
        assert {result.code for result in results if isinstance(result, CommsError)} == {1705}

    run(test, standin, tmp_path)


def test_a_name_that_a_dead_box_took_is_free_after_a_while(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        standin.fail(503, "PUT /contract-agents/_create")
        with pytest.raises(IndexerDown):
            await here.add("web")
        with refused(409, 1705):
            await there.add("web")
        there.clock.at += agents_module.CLAIM_S + 1
        assert (await there.add("web")).name == "web"

    run(test, standin, tmp_path)


def test_an_agent_whose_registration_was_not_confirmed_keeps_its_name(standin: StandIn, tmp_path: Path) -> None:
    """The document was stored and nobody was told: whoever tries again is told that it exists, nobody gets its name."""

    async def test(here: World, there: World) -> None:
        agent = here.new("web")
        standin.drop("PUT /contract-agents/_create")
        with pytest.raises(IndexerDown):
            await here.indexer.agents.add(agent, "hash", actor="operator")
        there.clock.at += agents_module.CLAIM_S + 1
        with refused(409, 1705):
            await there.add("web")
        with refused(409, 1708):
            await there.indexer.agents.add(agent, "hash", actor="operator")

    run(test, standin, tmp_path)


def test_who_is_kept_is_found_while_the_indexer_is_down(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        known, stranger = await here.add(), await here.add()
        await here.found(known.uuid)
        await here.put("web", "a: 1")
        await here.indexer.groups.find(here.tenant, "web")
        await here.indexer.groups.find(here.tenant, "default")
        standin.stop()
        with pytest.raises(IndexerDown):
            await here.found(stranger.uuid)
        here.clock.at += KEEP_S + 1
        assert (await here.found(known.uuid)).uuid == known.uuid
        assert await here.indexer.groups.find(here.tenant, "web") is not None
        assert await here.indexer.groups.find(here.tenant, "default") is not None
        for call in (
            partial(here.indexer.agents.credentials, known.uuid),
            partial(here.indexer.agents.change, known.uuid, actor="operator", name="x"),
            partial(here.indexer.agents.delete, known.uuid, actor="operator"),
            partial(here.indexer.agents.note_login, known.uuid, 1.0, {}),
            partial(here.indexer.agents.note_seen, {known.uuid: 1.0}),
            partial(here.indexer.agents.page),
            partial(here.indexer.groups.page, here.tenant),
            partial(here.put, "web", "a: 2"),
            partial(here.add),
        ):
            with pytest.raises(IndexerDown):
                await call()
        standin.start()
        assert isinstance(await here.found(known.uuid), Agent)

    run(test, standin, tmp_path)


def test_a_fleet_that_logs_in_at_once_shares_a_few_writes(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        added = [await here.add() for _ in range(30)]
        before = standin.count_seen("agents/_bulk")
        await at_once(*(partial(here.indexer.agents.note_login, agent.uuid, 5.0, {}) for agent in added))
        assert standin.count_seen("agents/_bulk") - before <= 4
        assert {agent.last_login_at for agent in await there.indexer.agents.page(tenant=here.tenant)} == {5.0}

    run(test, standin, tmp_path)


def test_a_login_loses_no_change_made_at_the_same_time(standin: StandIn, tmp_path: Path) -> None:
    async def test(here: World, there: World) -> None:
        agent = await here.add()
        results = await at_once(
            *(partial(here.indexer.agents.change, agent.uuid, actor="operator", key_hash="k") for _ in range(4)),
            *(partial(there.indexer.agents.note_login, agent.uuid, float(n), {"version": str(n)}) for n in range(4)),
            *(partial(here.indexer.agents.note_seen, {agent.uuid: 100.0 + n}) for n in range(4)),
        )
        assert not [result for result in results if isinstance(result, CommsError)]
        [after] = await there.indexer.agents.page(tenant=here.tenant)
        assert (after.key_version, after.status, after.last_seen_at) == (5, AgentStatus.ACTIVE, 103.0)

    run(test, standin, tmp_path)


def test_old_versions_of_a_configuration_are_forgotten(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "KEPT_VERSIONS", 3)

    async def test(here: World, there: World) -> None:
        for number in range(1, 7):
            await here.put("web", f"a: {number}")
        versions = await there.indexer.groups.versions(here.tenant, "web")
        assert [(group.version, group.configuration) for group in versions] == [(6, "a: 6"), (5, "a: 5"), (4, "a: 4")]
        assert len(standin.documents("contract-group-versions")) == 2

    run(test, standin, tmp_path)


# what is kept


def kept_of(values: dict[str, str], clock: HandClock, size: int = 10) -> tuple[Kept[str, str], list[str]]:
    reads: list[str] = []

    async def read(key: str) -> str | None:
        reads.append(key)
        await trio.lowlevel.checkpoint()
        return values.get(key)

    return Kept(read, clock, size), reads


def test_what_is_kept_is_read_once_until_it_changes_or_is_old() -> None:
    async def test() -> None:
        clock, values = HandClock(), {"a": "1"}
        kept, reads = kept_of(values, clock)
        assert [await kept.find("a"), await kept.find("a"), await kept.find("b"), await kept.find("b")] == [
            *("1", "1"),
            *(None, None),
        ]
        assert reads == ["a", "b", "b"], "nothing is not kept"
        values["a"] = "2"
        assert await kept.find("a") == "1"
        kept.forget("a")
        assert await kept.find("a") == "2"
        values["a"] = "3"
        clock.at += KEEP_S
        assert await kept.find("a") == "3"

    trio.run(test)


def test_the_longest_unasked_for_goes_first() -> None:
    async def test() -> None:
        kept, reads = kept_of({key: key for key in "abc"}, HandClock(), size=2)
        for key in "abacab":
            await kept.find(key)
        assert reads == ["a", "b", "c", "b"]
        assert len(kept) == 2

    trio.run(test)


def test_news_during_a_reading_are_not_lost() -> None:
    async def test() -> None:
        values, may_answer = {"a": "old"}, trio.Event()

        async def read(key: str) -> str | None:
            value = values[key]
            await may_answer.wait()
            return value

        kept = Kept(read, HandClock())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.find, "a")
            await trio.testing.wait_all_tasks_blocked()
            values["a"] = "new"
            kept.forget("a")
            may_answer.set()
        assert await kept.find("a") == "new"

    trio.run(test)
