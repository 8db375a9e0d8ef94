"""Stateful batches on a shared indexer: whatever is lost on the way, the same batch sent again is applied once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from osqbox.comms.errors import IndexerDown
from osqbox.comms.opensearch import OpenSearchIndexer, client, states
from tests.comms import contract
from tests.comms.contract import CREATE, DELETE, PACKAGES, World, change
from tests.comms.opensearch.test_contract import opener

from .standin import StandIn


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def run(test: Callable[[World], Awaitable[None]], standin: StandIn, folder: Path) -> None:
    contract.run(test, folder, opener(standin.url))


async def until_acknowledged(world: World, send: Callable[[], Awaitable[list[tuple[str, int]]]]) -> tuple[int, object]:
    """How often it was refused, and the answer."""
    assert isinstance(world.indexer, OpenSearchIndexer)
    refused = 0
    while True:
        try:
            return refused, await send()
        except IndexerDown:
            refused += 1
            await world.indexer.client.wait_up()


@pytest.mark.parametrize("batch", ["key:k", "sha256:d"])
@pytest.mark.parametrize("request_number", range(5))
@pytest.mark.parametrize("is_processed", [True, False], ids=["answer lost", "request refused"])
def test_a_batch_that_broke_off_anywhere_is_applied_once(
    batch: str,
    request_number: int,
    is_processed: bool,
    standin: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its requests: read, note what is deleted, store, store the answer; and none at all."""
    monkeypatch.setattr(client, "PROBE_S", 0.1)

    async def test(world: World) -> None:
        agent = await world.add()
        await world.apply(agent, change("old", v=1), change("gone", v=1), change("twice", v=1), batch="key:before")
        changes = [
            change("new", CREATE, v=1),
            change("old", v=2),
            change("gone", DELETE),
            change("missing", DELETE),
            change("twice", DELETE),
            change("twice", v=2),
            change("old", CREATE, v=7),
        ]
        path = ("_mget", "batches/_doc/.*intent", "batches/_bulk", "batches/_bulk", "no such request")[request_number]
        if request_number == 3:
            standin.slow(0, path, times=1)  # the first of the two goes through
        if is_processed:
            standin.drop(path, times=2 if path == "_mget" else 1)  # reading is tried twice
        else:
            standin.fail(503, path)
        refused, answer = await until_acknowledged(world, lambda: world.apply(agent, *changes, batch=batch))
        assert refused == (request_number != 4)
        expected = [201, 200, 200, 404, 200, 201, 409]
        assert isinstance(answer, list)
        assert [status for _, status in answer] == expected
        assert await world.apply(agent, *changes, batch=batch) == answer
        found, _ = await world.indexer.states.search(agent=agent.uuid)
        assert {document.id: (document.version, document.data["v"]) for document in found} == {
            "new": (1, 1),
            "old": (2, 2),
            "twice": (1, 2),
        }

    run(test, standin, tmp_path)


def test_an_index_that_is_just_being_made_is_waited_for(standin: StandIn, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        agent = await world.add()
        standin.miss_shards(3)
        assert await world.apply(agent, change("p"), batch="key:k") == [("created", 201)]
        standin.miss_shards(1000)
        with pytest.raises(IndexerDown, match="no_shard"):
            await world.apply(agent, change("q"), batch="key:l")

    run(test, standin, tmp_path)


def test_one_item_the_indexer_refuses_for_good_harms_no_other(standin: StandIn, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        agent = await world.add()
        standin.reject_items(1, 400)
        changes = [change(f"p{number}", number=number) for number in range(3)]
        answer = await world.apply(agent, *changes, batch="key:k")
        assert [status for _, status in answer] == [400, 201, 201]
        assert "refused" in answer[0][0]
        found, _ = await world.indexer.states.search(agent=agent.uuid)
        assert [document.id for document in found] == ["p1", "p2"]

    run(test, standin, tmp_path)


def test_one_item_refused_for_now_makes_the_whole_batch_wait(standin: StandIn, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        agent = await world.add()
        standin.reject_items(1, 429)
        changes = [change(f"p{number}", number=number) for number in range(3)]
        with pytest.raises(IndexerDown):
            await world.apply(agent, *changes, batch="key:k")
        assert await world.apply(agent, *changes, batch="key:k") == [("created", 201)] * 3
        found, _ = await world.indexer.states.search(agent=agent.uuid)
        assert [document.version for document in found] == [1, 1, 1]

    run(test, standin, tmp_path)


def test_an_agents_documents_are_bounded(standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "DOCUMENTS_MAX", 2)

    async def test(world: World) -> None:
        agent = await world.add()
        changes = [change("a"), change("b"), change("c"), change("a", DELETE), change("d")]
        assert [status for _, status in await world.apply(agent, *changes)] == [201, 201, 429, 200, 201]
        assert [status for _, status in await world.apply(agent, change("e"), change("b"))] == [429, 200]
        assert [status for _, status in await world.apply(agent, change("b", DELETE), change("e"))] == [200, 201]
        other = await world.add()
        assert [status for _, status in await world.apply(other, change("a"))] == [201]

    run(test, standin, tmp_path)


def test_answers_are_forgotten_in_time_but_the_last_of_an_agent(standin: StandIn, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        indexer = world.indexer
        assert isinstance(indexer, OpenSearchIndexer)
        agent = await world.add()
        await world.apply(agent, change("a"), change("b"), batch="key:1")
        await world.apply(agent, change("a", DELETE), batch="key:2")
        before = len(standin.documents("contract-batches"))
        await indexer.client.refresh("batches")
        assert await indexer.states.forget_answers(3600) == 0
        world.clock.at += 3601
        await world.apply(agent, change("c"), batch="key:3")
        await indexer.client.refresh("batches")
        assert await indexer.states.forget_answers(3600) == 3, "two answers and an intent"
        assert len(standin.documents("contract-batches")) == before - 3 + 1
        assert standin.documents("contract-batches")[agent.uuid]["documents"] == 2

    run(test, standin, tmp_path)


def test_a_bad_index_is_refused_by_itself(standin: StandIn, tmp_path: Path) -> None:
    """An index is made when its first document comes, so its name is not the agent's to choose."""

    async def test(world: World) -> None:
        agent = await world.add()
        names = ["osqbox-agents", "wazuh-states-../x", "wazuh-states-" + "x" * 300, "", "wazuh-states-X", PACKAGES]
        answer = await world.apply(agent, *(change("p", index=name) for name in names))
        assert [status for _, status in answer] == [400] * 5 + [201]
        states_there = [name for name in standin.cluster.indices if "states" in name]
        assert states_there == [f"contract-{PACKAGES}"]

    run(test, standin, tmp_path)


def test_a_request_is_three_round_trips(standin: StandIn, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        agent = await world.add()
        await world.apply(agent, change("first"))
        with trio.fail_after(5):
            before = len(standin.seen)
            await world.apply(agent, *(change(f"p{number}") for number in range(100)))
        mine = [line for line in standin.seen[before:] if "batches" in line or line == "POST /_mget"]
        assert mine == ["POST /_mget", *["POST /contract-batches/_bulk"] * 2]

    run(test, standin, tmp_path)
