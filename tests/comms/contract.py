"""What every indexer promises behind the seams, whichever it is: SQLite, the stand-in, a real OpenSearch.

Each contract is a coroutine that gets a `World`; names are made up anew each time, so that many may share an indexer.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import audit, feed, tenants
from osqbox.comms.errors import CommsError
from osqbox.comms.messages import (
    Action,
    Agent,
    AgentStatus,
    Change,
    CommandStatus,
    KnownCommand,
    NewCommand,
    Operation,
    Result,
    ResultOutcome,
    StateChange,
)
from osqbox.comms.registration import new_agent
from osqbox.comms.seams import Indexer, OnChange
from osqbox.comms.sqlite import MIGRATIONS
from osqbox.feed import Feed
from osqbox.store import Store

NOW = 1_700_000_000.0
LIMIT_S = 50
PACKAGES, PORTS = "wazuh-states-inventory-packages", "wazuh-states-inventory-ports"


class HandClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> float:
        return self.at


OpenIndexer = Callable[[Store, HandClock, OnChange], AbstractAsyncContextManager[Indexer]]


@dataclass
class World:
    indexer: Indexer
    store: Store
    clock: HandClock
    changes: list[Change]
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def tenant(self) -> str:
        return f"t{self.name}"

    @property
    def other_tenant(self) -> str:
        return f"o{self.name}"

    def new(self, name: str = "", **facts: Any) -> Agent:
        uuid = facts.pop("uuid", f"{self.name}-{next(self.numbers):03}")
        return new_agent(uuid=uuid, name=name or uuid, now=NOW, **{"tenant": self.tenant, **facts})

    async def add(self, name: str = "", key_hash: str = "hash", **facts: Any) -> Agent:
        return await self.indexer.agents.add(self.new(name, **facts), key_hash, actor="operator")

    async def found(self, uuid: str) -> Agent:
        agent = await self.indexer.agents.find(uuid)
        assert agent is not None
        return agent

    def told(self, kind: str) -> list[Change]:
        """Of this tenant; a box may also be told that it cannot know what has changed."""
        return [change for change in self.changes if change.kind == kind and change.tenant == self.tenant]

    async def events(self) -> list[str]:
        events = await self.store.read(lambda db: feed.events_after(db, 0))
        return [event.kind for event in events]

    async def audited(self) -> list[str]:
        return [row["action"] for row in await self.store.read(audit.rows)]

    async def put(self, group: str, configuration: str = "", expected: int | None = None) -> Any:
        return await self.indexer.groups.put(
            self.tenant, group, configuration, actor="operator", expected_version=expected
        )

    async def apply(self, agent: Agent, *changes: StateChange, batch: str = "") -> list[tuple[str, int]]:
        applied = await self.indexer.states.apply(agent, changes, batch=batch or f"key:{next(self.numbers)}")
        assert [each.id for each in applied] == [change.id for change in changes]
        return [(each.result, each.status) for each in applied]

    def command(self, agent: str, name: str = "restart", **facts: Any) -> NewCommand:
        facts = {"id": f"c{self.name}{next(self.numbers)}", "request_id": f"r{self.name}", **facts}
        return NewCommand(
            agent=agent,
            tenant=self.tenant,
            action=Action(name=name, args={}),
            created_at=NOW,
            expires_at=NOW + 3600,
            **facts,
        )


@asynccontextmanager
async def open_world(folder: Path, open_indexer: OpenIndexer) -> AsyncIterator[World]:
    clock, changes = HandClock(), list[Change]()
    steps = (tenants.migrations, audit.migrations, *MIGRATIONS)
    store = Store.open(folder / f"{secrets.token_hex(4)}.db", steps, clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            async with open_indexer(store, clock, changes.append) as indexer:
                world = World(indexer, store, clock, changes)
                for name in (world.tenant, world.other_tenant):
                    await store.write(lambda tx, name=name: tenants.create(tx, name, tenants.TenantOptions()))  # type: ignore[misc]
                yield world
        finally:
            await store.aclose()


def run(contract: Callable[[World], Awaitable[None]], folder: Path, open_indexer: OpenIndexer) -> None:
    async def main() -> None:
        with trio.fail_after(LIMIT_S):
            async with open_world(folder, open_indexer) as world:
                await contract(world)

    trio.run(main)


@contextmanager
def refused(status: int, code: int | None = None) -> Iterator[None]:
    with pytest.raises(CommsError) as caught:
        yield
    assert (caught.value.status, caught.value.code) == (status, status if code is None else code)
    assert caught.value.message


async def at_once(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What each returned, or the CommsError it raised."""
    results: list[Any] = [None] * len(calls)

    async def one(number: int) -> None:
        try:
            results[number] = await calls[number]()
        except CommsError as error:
            results[number] = error

    async with trio.open_nursery() as nursery:
        for number in range(len(calls)):
            nursery.start_soon(one, number)
    return results


# agents


async def an_added_agent_is_found(world: World) -> None:
    agent = await world.add("web", "the hash", version="5.0", host={"hostname": "web-1", "os": {"name": "Debian"}})
    assert await world.indexer.agents.find(agent.uuid) == agent
    credentials = await world.indexer.agents.credentials(agent.uuid)
    assert credentials is not None
    assert (credentials.agent, credentials.key_hash) == (agent, "the hash")
    assert await world.indexer.agents.page(tenant=world.tenant) == [agent]
    assert world.told("agents") == [Change(kind="agents", agents=(agent.uuid,), tenant=world.tenant)]
    assert "agent.add" in await world.audited()
    assert "comms_agent_added" in await world.events()


async def who_is_unknown_is_not_found(world: World) -> None:
    agents = world.indexer.agents
    for uuid in (world.new().uuid, "", "..", "_search", "a/b", "x" * 1000, "ü"):
        assert await agents.find(uuid) is None
        assert await agents.credentials(uuid) is None
        with refused(404):
            await agents.change(uuid, actor="operator", name="x")
        with refused(404):
            await agents.delete(uuid, actor="operator")


async def an_id_and_a_name_are_taken_once(world: World) -> None:
    first = await world.add("web")
    with refused(409, 1708):
        await world.add("other", uuid=first.uuid)
    with refused(409, 1705):
        await world.add("web")
    elsewhere = await world.add("web", tenant=world.other_tenant)
    assert await world.found(first.uuid) == first
    assert [agent.uuid for agent in await world.indexer.agents.page(tenant=world.other_tenant)] == [elsewhere.uuid]
    assert await world.add("other"), "the name of a refused registration is free"


async def of_agents_added_at_once_under_one_name_one_is_added(world: World) -> None:
    results = await at_once(*(lambda: world.add("web") for _ in range(8)))
    added = [result for result in results if isinstance(result, Agent)]
    assert len(added) == 1
    assert {result.code for result in results if isinstance(result, CommsError)} == {1705}
    assert await world.indexer.agents.page(tenant=world.tenant) == added


async def an_agent_is_only_in_what_there_is(world: World) -> None:
    with refused(404):
        await world.add(groups=["nowhere"])
    with refused(404):
        await world.add(tenant="nowhere")
    agent = await world.add("web")
    with refused(404):
        await world.indexer.agents.change(agent.uuid, actor="operator", groups=["default", "nowhere"])
    assert await world.found(agent.uuid) == agent


async def an_agent_is_changed(world: World) -> None:
    agents = world.indexer.agents
    await world.put("g1")
    agent = await world.add("web")
    changed = await agents.change(agent.uuid, actor="operator", name="db", groups=["g1", "default"])
    assert (changed.name, changed.groups, changed.key_version) == ("db", ("g1", "default"), 1)
    assert await world.found(agent.uuid) == changed
    assert await world.add("web"), "its old name is free"
    with refused(409, 1705):
        await agents.change(agent.uuid, actor="operator", name="web")
    assert await agents.change(agent.uuid, actor="operator", name="db") == changed
    assert len(world.told("agents")) == 4
    assert "comms_agent_changed" in await world.events()


async def revocation_and_new_keys_end_old_tokens(world: World) -> None:
    agents = world.indexer.agents
    agent = await world.add()
    renewed = await agents.change(agent.uuid, actor="operator", key_hash="another")
    assert renewed.key_version == 2
    credentials = await agents.credentials(agent.uuid)
    assert credentials is not None
    assert credentials.key_hash == "another"
    revoked = await agents.change(agent.uuid, actor="operator", status=AgentStatus.REVOKED)
    assert (revoked.status, revoked.key_version) == (AgentStatus.REVOKED, 3)
    assert await world.found(agent.uuid) == revoked
    again = await agents.change(agent.uuid, actor="operator", status=AgentStatus.REVOKED)
    assert again.key_version == 3
    allowed = await agents.change(agent.uuid, actor="operator", status=AgentStatus.ACTIVE)
    assert (allowed.status, allowed.key_version) == (AgentStatus.NEVER_CONNECTED, 3)
    assert "agent.revoke" in await world.audited()


async def changes_at_once_are_all_made(world: World) -> None:
    agent = await world.add()
    results = await at_once(
        *(lambda: world.indexer.agents.change(agent.uuid, actor="operator", key_hash="new") for _ in range(6)),
        lambda: world.indexer.agents.change(agent.uuid, actor="operator", name="renamed"),
    )
    assert not [result for result in results if isinstance(result, CommsError)]
    after = await world.found(agent.uuid)
    assert (after.key_version, after.name) == (7, "renamed")


async def a_deleted_agent_is_gone_and_its_commands_are_cancelled(world: World) -> None:
    agent = await world.add("web")
    [command] = await world.indexer.commands.publish([world.command(agent.uuid)], actor="operator")
    await world.indexer.agents.delete(agent.uuid, actor="operator")
    assert await world.indexer.agents.find(agent.uuid) is None
    assert await world.indexer.agents.page(tenant=world.tenant) == []
    found = await world.indexer.commands.find(command.id)
    assert found is not None
    assert found.status is CommandStatus.CANCELLED
    with refused(404):
        await world.indexer.agents.delete(agent.uuid, actor="operator")
    assert await world.add("web"), "its name is free"


async def a_login_is_noted(world: World) -> None:
    agents = world.indexer.agents
    agent = await world.add(version="1", host={"hostname": "old", "gone": True})
    await agents.note_login(agent.uuid, NOW + 5, {"version": "2", "host": {"hostname": "new"}})
    after = await world.found(agent.uuid)
    assert (after.status, after.last_login_at, after.last_seen_at) == (AgentStatus.ACTIVE, NOW + 5, NOW + 5)
    assert (after.version, after.host, after.type) == ("2", {"hostname": "new"}, "Endpoint")
    await agents.note_login("nobody", NOW, {})
    await agents.change(agent.uuid, actor="operator", status=AgentStatus.REVOKED)
    await agents.note_login(agent.uuid, NOW + 6, {})
    assert (await world.found(agent.uuid)).status is AgentStatus.REVOKED


async def many_logins_at_once_are_all_noted(world: World) -> None:
    added = [await world.add() for _ in range(12)]
    await at_once(*(partial(world.indexer.agents.note_login, agent.uuid, NOW + 1, {}) for agent in added))
    page = await world.indexer.agents.page(tenant=world.tenant)
    assert [agent.status for agent in page] == [AgentStatus.ACTIVE] * 12


async def who_was_seen_is_noted_and_never_backwards(world: World) -> None:
    agents = world.indexer.agents
    first, second = await world.add(), await world.add()
    await agents.note_seen({first.uuid: NOW + 10, second.uuid: NOW + 20, "nobody": NOW})
    await agents.note_seen({first.uuid: NOW + 5, second.uuid: NOW + 25})
    page = await agents.page(tenant=world.tenant)
    assert [agent.last_seen_at for agent in page] == [NOW + 10, NOW + 25]


async def agents_are_listed_page_by_page(world: World) -> None:
    agents = world.indexer.agents
    await world.put("g1")
    added = [await world.add(f"Web *{number}") for number in range(5)]
    await agents.change(added[2].uuid, actor="operator", groups=["g1"])
    first = await agents.page(tenant=world.tenant, limit=2)
    second = await agents.page(tenant=world.tenant, limit=2, after=first[-1].uuid)
    third = await agents.page(tenant=world.tenant, limit=2, after=second[-1].uuid)
    assert [agent.uuid for agent in (*first, *second, *third)] == [agent.uuid for agent in added]
    assert [agent.name for agent in await agents.page(tenant=world.tenant, group="g1")] == ["Web *2"]
    assert [agent.name for agent in await agents.page(tenant=world.tenant, text="wEB *3")] == ["Web *3"]
    assert len(await agents.page(tenant=world.tenant, text=world.name)) == 5
    assert await agents.page(tenant=world.tenant, text="b?*") == []
    assert await agents.page(tenant=world.other_tenant) == []


async def a_publication_is_for_those_it_names(world: World) -> None:
    agents = world.indexer.agents
    await world.put("g1")
    await world.put("g2")
    a = await world.add(groups=["g1"])
    b = await world.add(groups=["g1", "g2"])
    c = await world.add()
    revoked = await world.add(groups=["g1"])
    await agents.change(revoked.uuid, actor="operator", status=AgentStatus.REVOKED)
    stranger = await world.add(tenant=world.other_tenant)
    assert await agents.addressed(world.tenant, agents=[b.uuid, a.uuid, b.uuid]) == [a.uuid, b.uuid]
    assert await agents.addressed(world.tenant, groups=["g1"], agents=[c.uuid]) == [a.uuid, b.uuid, c.uuid]
    assert await agents.addressed(world.tenant, groups=["g2", "g1"]) == [a.uuid, b.uuid]
    assert await agents.addressed(world.tenant, groups=["default"]) == [c.uuid]
    assert await agents.addressed(world.tenant, everyone=True) == [a.uuid, b.uuid, c.uuid]
    assert await agents.addressed(world.tenant, agents=[revoked.uuid]) == []
    for named in ({"agents": [a.uuid, stranger.uuid]}, {"agents": ["nobody"]}, {"groups": ["g1", "nowhere"]}):
        with refused(404):
            await agents.addressed(world.tenant, **named)  # type: ignore[arg-type]


# groups


async def the_default_group_always_exists(world: World) -> None:
    groups = world.indexer.groups
    default = await groups.find(world.tenant, "default")
    assert default is not None
    assert (default.version, default.configuration) == (0, "")
    assert await groups.find(world.tenant, "other") is None
    assert await groups.page(world.tenant) == [default]
    assert await groups.versions(world.tenant, "default") == []
    with refused(404):
        await groups.versions(world.tenant, "other")
    with refused(409):
        await groups.delete(world.tenant, "default", actor="operator")


async def a_configuration_has_versions(world: World) -> None:
    groups = world.indexer.groups
    empty = await world.put("web")
    assert (empty.version, empty.sha256) == (0, "")
    first = await world.put("web", "a: 1\n", 0)
    assert (first.version, first.configuration, first.changed_by) == (1, "a: 1\n", "operator")
    assert await world.put("web", "a: 1\n") == first, "the same text changes nothing"
    second = await world.put("web", "a: 2\n", 1)
    assert second.version == 2
    assert second.sha256 != first.sha256
    with refused(409):
        await world.put("web", "a: 3\n", 1)
    assert await groups.find(world.tenant, "web") == second
    assert await groups.versions(world.tenant, "web") == [second, first]
    assert [group.name for group in await groups.page(world.tenant)] == ["default", "web"]
    assert await groups.find(world.other_tenant, "web") is None
    assert world.told("groups") == [Change(kind="groups", tenant=world.tenant)] * 3
    assert (await world.events()).count("configuration_changed") == 3


async def configurations_put_at_once_are_all_kept(world: World) -> None:
    await at_once(*(lambda n=n: world.put("web", f"a: {n}") for n in range(5)))  # type: ignore[misc]
    versions = await world.indexer.groups.versions(world.tenant, "web")
    assert [group.version for group in versions] == [5, 4, 3, 2, 1]
    assert {group.configuration for group in versions} == {f"a: {n}" for n in range(5)}


async def of_two_who_expect_the_same_version_one_is_refused(world: World) -> None:
    await world.put("web", "a: 0")
    results = await at_once(*(lambda n=n: world.put("web", f"a: {n}", 1) for n in (1, 2)))  # type: ignore[misc]
    assert sorted(getattr(result, "version", getattr(result, "status", 0)) for result in results) == [2, 409]


async def a_group_with_agents_is_not_deleted(world: World) -> None:
    groups = world.indexer.groups
    await world.put("web", "a: 1")
    await world.put("web", "a: 2")
    agent = await world.add(groups=["web"])
    with refused(409):
        await groups.delete(world.tenant, "web", actor="operator")
    await world.indexer.agents.change(agent.uuid, actor="operator", groups=["default"])
    await groups.delete(world.tenant, "web", actor="operator")
    assert await groups.find(world.tenant, "web") is None
    with refused(404):
        await groups.delete(world.tenant, "web", actor="operator")
    anew = await world.put("web", "a: 3")
    assert anew.version == 1
    assert await groups.versions(world.tenant, "web") == [anew]


async def a_configuration_is_refused_that_is_no_text_or_too_long(world: World) -> None:
    for text in ("\ud800", "x" * (1024 * 1024 + 1)):
        with refused(400):
            await world.put("web", text)
    with refused(400):
        await world.put("../etc", "a: 1")
    with refused(404):
        await world.indexer.groups.put("nowhere", "web", "a: 1", actor="operator", expected_version=None)
    long = "ü" * (512 * 1024)
    assert (await world.put("web", long)).configuration == long


# commands


async def an_agents_commands_come_in_the_order_of_publication(world: World) -> None:
    commands = world.indexer.commands
    a, b = await world.add(), await world.add()
    first = await commands.publish([world.command(a.uuid), world.command(b.uuid)], actor="operator")
    second = await commands.publish([world.command(a.uuid)], actor="operator")
    mine = [first[0], second[0]]
    assert mine[0].seq < mine[1].seq
    assert await commands.after(a.uuid, 0, limit=10) == mine
    assert await commands.after(a.uuid, mine[0].seq, limit=10) == mine[1:]
    assert await commands.after(a.uuid, 0, limit=1) == mine[:1]
    assert await commands.known_seq(a.uuid, mine[0].seq)
    assert not await commands.known_seq(a.uuid, first[1].seq), "another agent's"
    assert (await commands.page(tenant=world.tenant, agent=a.uuid)) == mine[::-1]
    told = {uuid for change in world.told("commands") for uuid in change.agents or ()}
    assert told == {a.uuid, b.uuid}


async def a_result_ends_a_command_once(world: World) -> None:
    commands = world.indexer.commands
    agent, other = await world.add(), await world.add()
    [command] = await commands.publish([world.command(agent.uuid)], actor="operator")
    await commands.note_sent(agent.uuid, [command.id], NOW + 1)
    assert await commands.take_result(other.uuid, command.id, Result(code=0), NOW + 2) is ResultOutcome.FOREIGN
    assert await commands.take_result(agent.uuid, command.id, Result(code=2), NOW + 2) is ResultOutcome.TAKEN
    assert await commands.take_result(agent.uuid, command.id, Result(code=0, message="ok"), NOW + 3) is (
        ResultOutcome.TAKEN
    )
    assert await commands.take_result(agent.uuid, command.id, Result(code=1), NOW + 4) is ResultOutcome.REPEATED
    found = await commands.find(command.id)
    assert found is not None
    assert (found.status, found.result, found.deliveries) == (CommandStatus.SUCCESS, Result(code=0, message="ok"), 1)
    assert await commands.after(agent.uuid, 0, limit=10) == []


async def known_commands_can_be_taught(world: World) -> None:
    commands = world.indexer.commands
    assert {"set-group", "fetch-config", "restart", "upgrade"} <= {known.name for known in await commands.known()}
    mine = KnownCommand(name=f"do-{world.name}", required_args=("what",))
    await commands.put_known(mine, actor="operator")
    assert mine in await commands.known()
    await commands.remove_known(mine.name, actor="operator")
    assert mine not in await commands.known()


# states


def change(id: str, operation: Operation = Operation.UPDATE, index: str = PACKAGES, **data: Any) -> StateChange:
    return StateChange(index=index, id=id, operation=operation, data=None if operation is Operation.DELETE else data)


CREATE, UPDATE, DELETE = Operation.CREATE, Operation.UPDATE, Operation.DELETE


async def what_becomes_of_each_operation(world: World) -> None:
    agent = await world.add()
    assert await world.apply(agent, change("p", CREATE, v=1)) == [("created", 201)]
    assert await world.apply(agent, change("p", CREATE, v=1)) == [("created", 201)]
    [(result, status)] = await world.apply(agent, change("p", CREATE, v=2))
    assert (status, "conflict" in result) == (409, True)
    assert await world.apply(agent, change("p", v=2), change("q", v=1)) == [("updated", 200), ("created", 201)]
    assert await world.apply(agent, change("q", DELETE), change("q", DELETE)) == [("deleted", 200), ("not_found", 404)]
    found = await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "p")
    assert found is not None
    assert (found.version, found.data["v"], found.data["agent"]["id"]) == (2, 2, agent.uuid)
    assert await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "q") is None
    assert "comms_states_stored" in await world.events()


async def changes_of_one_document_in_one_batch_follow_each_other(world: World) -> None:
    agent = await world.add()
    batch = (change("p", CREATE, v=1), change("p", v=2), change("p", DELETE), change("p", CREATE, v=3))
    assert [status for _, status in await world.apply(agent, *batch)] == [201, 200, 200, 201]
    found = await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "p")
    assert found is not None
    assert (found.version, found.data["v"]) == (1, 3)
    gone = (change("p", v=4), change("p", DELETE), change("p", DELETE))
    assert [status for _, status in await world.apply(agent, *gone)] == [200, 200, 404]
    assert await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "p") is None


async def a_bad_change_harms_no_other(world: World) -> None:
    agent = await world.add()
    await world.apply(agent, change("there", v=1))
    batch = [change(f"good-{number}", number=number) for number in range(9)]
    batch[4:4] = [change("there", CREATE, v=2), change("missing", DELETE)]
    statuses = [status for _, status in await world.apply(agent, *batch)]
    assert statuses == [201] * 4 + [409, 404] + [201] * 5
    found, _ = await world.indexer.states.search(tenant=world.tenant, agent=agent.uuid)
    assert [document.id for document in found] == [*(f"good-{number}" for number in range(9)), "there"]


async def a_batch_sent_again_is_answered_as_before(world: World) -> None:
    agent = await world.add()
    batch = [change("p", v=1), change("q", DELETE), change("r", CREATE, v=3)]
    first = await world.apply(agent, *batch, batch="key:k")
    await world.apply(agent, change("q", v=9), batch="key:between")
    assert first == [("created", 201), ("not_found", 404), ("created", 201)]
    assert await world.apply(agent, *batch, batch="key:k") == first
    found, _ = await world.indexer.states.search(tenant=world.tenant, agent=agent.uuid)
    assert [(document.id, document.version) for document in found] == [("p", 1), ("q", 1), ("r", 1)]


async def a_body_sent_again_later_is_meant(world: World) -> None:
    agent = await world.add()
    create, delete = change("p", CREATE, v=1), change("p", DELETE)
    assert await world.apply(agent, create, batch="sha256:c") == [("created", 201)]
    assert await world.apply(agent, delete, batch="sha256:d") == [("deleted", 200)]
    assert await world.apply(agent, delete, batch="sha256:d") == [("deleted", 200)], "sent again at once"
    assert await world.apply(agent, create, batch="sha256:c") == [("created", 201)]
    assert await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "p") is not None


async def a_batch_sent_at_the_same_time_is_applied_once(world: World) -> None:
    agent = await world.add()
    await world.apply(agent, change("gone", v=1), batch="key:before")
    for batch in ("key:k", "sha256:d"):
        changes = (change("p", v=1), change("q", DELETE), change("gone", DELETE))
        answers = await at_once(*[partial(world.apply, agent, *changes, batch=batch)] * 8)
        assert all(answer == answers[0] for answer in answers), answers
    found = await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "p")
    assert found is not None
    assert found.version == 2, "once for each of the two batches"


async def batches_of_many_agents_at_once_do_not_mix(world: World) -> None:
    agents = [await world.add() for _ in range(6)]
    answers = await at_once(
        *(
            partial(world.apply, agent, change("same", n=n), change(f"only-{n}", n=n), batch="key:same")
            for n, agent in enumerate(agents)
        )
    )
    assert answers == [[("created", 201), ("created", 201)]] * 6
    for n, agent in enumerate(agents):
        found, _ = await world.indexer.states.search(tenant=world.tenant, agent=agent.uuid)
        assert [(document.id, document.data["n"]) for document in found] == [(f"only-{n}", n), ("same", n)]


async def agents_and_tenants_are_apart(world: World) -> None:
    mine, other = await world.add(), await world.add(tenant=world.other_tenant)
    await world.apply(mine, change("p", v="mine"))
    await world.apply(other, change("p", v="other"))
    states = world.indexer.states
    assert await states.find(world.tenant, other.uuid, PACKAGES, "p") is None
    found, _ = await states.search(tenant=world.other_tenant)
    assert [document.data["v"] for document in found] == ["other"]
    assert await states.find(world.tenant, mine.uuid, PORTS, "p") is None
    assert await states.find(world.tenant, mine.uuid, "wazuh-states-none-such", "p") is None


async def documents_are_found_page_by_page(world: World) -> None:
    states = world.indexer.states
    agent = await world.add()
    names = [f"package-{number}" for number in range(5)]
    await world.apply(agent, *(change(name, CREATE, name=name, vendor="Debian") for name in names))
    await world.apply(agent, change("tcp-22", index=PORTS, process="sshd"))
    ids, after = list[str](), ""
    for _ in range(4):
        found, after = await states.search(tenant=world.tenant, limit=2, after=after)
        ids += [document.id for document in found]
        if not after:
            break
    assert ids == [*names, "tcp-22"]
    for asked, expected in (({"text": "sshd"}, ["tcp-22"]), ({"text": "AGE-3"}, ["package-3"]), ({"text": "nix"}, [])):
        found, cursor = await states.search(tenant=world.tenant, **asked)  # type: ignore[arg-type]
        assert ([document.id for document in found], cursor) == (expected, "")
    found, _ = await states.search(tenant=world.tenant, index=PORTS)
    assert [document.index for document in found] == [PORTS]
    assert (await states.search(tenant=world.tenant, index="none-such")) == ([], "")
    counted = await states.count()
    assert counted[PACKAGES] >= 5
    assert counted[PORTS] >= 1
    with refused(400):
        await states.search(after="no cursor")


async def whatever_an_event_holds_is_kept_as_it_is(world: World) -> None:
    """Nothing an agent says changes how other documents are understood, or is refused for what others said."""
    agent = await world.add()
    deep: Any = "bottom"
    for _ in range(60):
        deep = {"d": deep}
    data: dict[str, dict[str, Any]] = {
        "text": {"v": "one"},
        "number": {"v": 1},
        "object": {"v": {"v": [1, "two", None, {"x": []}]}},
        "dots": {"a.b": 1, "a": {"b": 2}, "": 3, ".": 4, " ": 5, "_id": "x", "_source": {"x": 1}},
        "wide": {f"field-{number}": number for number in range(3000)},
        "deep": {"v": deep},
        "long": {"v": "x" * 200_000},
        "long word of many bytes": {"v": "ü" * 40_000},
        "numbers": {"v": [2**63, -(2**63), 1.5e300, 0.1, 0]},
        "odd text": {"v": '\x00\x1f\u2028\U0001f600 "quoted" \\ back'},
        "empty": {},
        "agent": {"agent": {"id": "somebody else"}},
        "x" * 512: {"v": 1},
        "日本/語?#%": {"v": 1},
    }
    changes = [StateChange(index=PACKAGES, id=name, operation=CREATE, data=value) for name, value in data.items()]
    assert await world.apply(agent, *changes) == [("created", 201)] * len(data)
    for name, expected in data.items():
        found = await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, name)
        assert found is not None
        assert found.data.pop("agent")["id"] == agent.uuid
        assert found.data == {key: value for key, value in expected.items() if key != "agent"}


async def a_large_batch_is_applied_whole(world: World) -> None:
    agent = await world.add()
    changes = [change(f"{number:05}", CREATE, number=number, pad="x" * 200) for number in range(5000)]
    assert await world.apply(agent, *changes, batch="key:large") == [("created", 201)] * 5000
    assert await world.apply(agent, *changes, batch="key:large") == [("created", 201)] * 5000
    last = await world.indexer.states.find(world.tenant, agent.uuid, PACKAGES, "04999")
    assert last is not None
    assert (last.version, last.data["number"]) == (1, 4999)


CONTRACTS: tuple[Callable[[World], Awaitable[None]], ...] = (
    an_added_agent_is_found,
    who_is_unknown_is_not_found,
    an_id_and_a_name_are_taken_once,
    of_agents_added_at_once_under_one_name_one_is_added,
    an_agent_is_only_in_what_there_is,
    an_agent_is_changed,
    revocation_and_new_keys_end_old_tokens,
    changes_at_once_are_all_made,
    a_deleted_agent_is_gone_and_its_commands_are_cancelled,
    a_login_is_noted,
    many_logins_at_once_are_all_noted,
    who_was_seen_is_noted_and_never_backwards,
    agents_are_listed_page_by_page,
    a_publication_is_for_those_it_names,
    the_default_group_always_exists,
    a_configuration_has_versions,
    configurations_put_at_once_are_all_kept,
    of_two_who_expect_the_same_version_one_is_refused,
    a_group_with_agents_is_not_deleted,
    a_configuration_is_refused_that_is_no_text_or_too_long,
    an_agents_commands_come_in_the_order_of_publication,
    a_result_ends_a_command_once,
    known_commands_can_be_taught,
    what_becomes_of_each_operation,
    changes_of_one_document_in_one_batch_follow_each_other,
    a_bad_change_harms_no_other,
    a_batch_sent_again_is_answered_as_before,
    a_body_sent_again_later_is_meant,
    a_batch_sent_at_the_same_time_is_applied_once,
    batches_of_many_agents_at_once_do_not_mix,
    agents_and_tenants_are_apart,
    documents_are_found_page_by_page,
    whatever_an_event_holds_is_kept_as_it_is,
    a_large_batch_is_applied_whole,
)


def name_of(contract: Callable[[World], Awaitable[None]]) -> str:
    return getattr(contract, "__name__", "contract")
