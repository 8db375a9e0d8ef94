"""A real OpenSearch frozen, killed and started again in the middle of a storm of stateful batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from osqbox.comms.errors import IndexerDown
from osqbox.comms.messages import Agent
from osqbox.comms.opensearch import OpenSearchIndexer, open_opensearch
from osqbox.comms.seams import Indexer, OnChange
from osqbox.store import Store
from tests.comms import contract
from tests.comms.contract import PACKAGES, World, change

from ._real import Real

pytestmark = pytest.mark.timeout(300)

AGENTS = 12
FREEZE_S = 7.5
"""Longer than it takes the probe to see it; requests under way end then, before their own limit."""
PROMISED_S = 30.0


@dataclass
class Storm:
    """Every agent sends one batch after the other, and each again until it is acknowledged."""

    world: World
    agents: list[Agent]
    acknowledged: Counter[str] = field(default_factory=Counter)
    """Batches by agent."""
    refused: int = 0
    slowest_s: float = 0.0
    since_up: int = 0
    is_over: bool = False

    async def rage(self) -> None:
        async with trio.open_nursery() as nursery:
            for agent in self.agents:
                nursery.start_soon(self._send, agent)

    async def _send(self, agent: Agent) -> None:
        while not self.is_over:
            number = self.acknowledged[agent.uuid]
            batch = [change("counter", number=number), change(f"item-{number}", number=number)]
            if number % 3 == 2:
                batch.append(change(f"item-{number - 1}", contract.DELETE))
            while (answer := await self._try(agent, batch, f"key:{number}")) is None:
                await trio.sleep(0.1)
            expected = [200 if number else 201, 201, *([200] if number % 3 == 2 else [])]
            assert [status for _, status in answer] == expected, (number, answer)
            self.acknowledged[agent.uuid] += 1
            self.since_up += 1

    async def _try(self, agent: Agent, batch: list[contract.StateChange], name: str) -> list[tuple[str, int]] | None:
        began = trio.current_time()
        try:
            return await self.world.apply(agent, *batch, batch=name)
        except IndexerDown:
            self.refused += 1
            return None
        finally:
            self.slowest_s = max(self.slowest_s, trio.current_time() - began)

    async def check(self) -> None:
        """What was acknowledged is there, once; nothing is there that was not."""
        for agent in self.agents:
            count = self.acknowledged[agent.uuid]
            counter = await self.world.indexer.states.find(agent.tenant, agent.uuid, PACKAGES, "counter")
            assert counter is not None
            assert (counter.version, counter.data["number"]) == (count, count - 1), "each batch was applied once"
            kept = {f"item-{n}" for n in range(count)} - {f"item-{n - 1}" for n in range(count) if n % 3 == 2}
            found, _ = await self.world.indexer.states.search(agent=agent.uuid, limit=1000)
            assert {document.id for document in found} == kept | {"counter"}
            assert all(document.version == 1 for document in found if document.id != "counter")


def opener(url: str) -> contract.OpenIndexer:
    @asynccontextmanager
    async def open_it(store: Store, clock: contract.HandClock, on_change: OnChange) -> AsyncIterator[Indexer]:
        async with open_opensearch(
            url, ca=None, auth=None, store=store, clock=clock, on_change=on_change, prefix=f"storm{time.time_ns()}-"
        ) as indexer:
            yield indexer

    return open_it


async def until_up(indexer: OpenSearchIndexer, within_s: float) -> float:
    began = trio.current_time()
    with trio.fail_after(within_s):
        await indexer.client.wait_up()
    return trio.current_time() - began


async def longest_pause(pauses_s: list[float]) -> None:
    """How long the loop was not free."""
    while True:
        began = trio.current_time()
        await trio.sleep(0.005)
        pauses_s.append(trio.current_time() - began - 0.005)


def test_what_was_acknowledged_survives_a_frozen_and_a_killed_indexer(own_opensearch: Real, tmp_path: Path) -> None:
    async def storm_over(world: World) -> None:
        indexer = world.indexer
        assert isinstance(indexer, OpenSearchIndexer)
        agents = [await world.add() for _ in range(AGENTS)]
        for agent in agents:
            await indexer.agents.find(agent.uuid)
        storm, pauses_s = Storm(world, agents), list[float]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(longest_pause, pauses_s)
            nursery.start_soon(storm.rage)
            await trio.sleep(1.5)
            before = sum(storm.acknowledged.values())

            own_opensearch.freeze()
            down_after_s = await frozen(storm, indexer)
            own_opensearch.thaw()
            up_after_s = await until_up(indexer, 20)
            storm.since_up = 0
            await trio.sleep(1)
            assert storm.since_up > 0, "the storm goes on by itself"

            own_opensearch.kill()
            with trio.fail_after(8):
                while indexer.client.up:
                    await trio.sleep(0.01)
            await fails_fast(world, agents)
            await trio.to_thread.run_sync(own_opensearch.start)
            again_after_s = await until_up(indexer, 20)
            storm.since_up = 0
            await trio.sleep(1)
            assert storm.since_up > 0

            storm.is_over = True
            with trio.fail_after(PROMISED_S):
                while nursery.child_tasks - {None} and len(nursery.child_tasks) > 1:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        await storm.check()
        assert storm.refused > 0
        assert storm.slowest_s < PROMISED_S / 2
        assert max(pauses_s) < 2.0
        print(
            f"\n{before} batches in the first 1.5 s, {sum(storm.acknowledged.values())} acknowledged, {storm.refused} "
            f"refused; frozen: seen after {down_after_s:.1f} s, back {up_after_s:.1f} s after; killed: back "
            f"{again_after_s:.1f} s after it had started; slowest call {storm.slowest_s:.1f} s; longest pause of "
            f"the loop {1000 * max(pauses_s):.0f} ms; {indexer.client.statistics()['latency_ms']}"
        )

    async def frozen(storm: Storm, indexer: OpenSearchIndexer) -> float:
        """How long until calls failed at once."""
        began, down_after_s = trio.current_time(), 0.0
        while trio.current_time() - began < FREEZE_S:
            if not indexer.client.up and not down_after_s:
                down_after_s = trio.current_time() - began
                await fails_fast(storm.world, storm.agents)
            await trio.sleep(0.05)
        assert 0 < down_after_s < FREEZE_S
        return down_after_s

    async def fails_fast(world: World, agents: list[Agent]) -> None:
        """Those who can be served are, the others are told at once."""
        began = trio.current_time()
        for agent in agents:
            assert (await world.found(agent.uuid)).uuid == agent.uuid
        assert await world.indexer.groups.find(world.tenant, "default") is not None
        for _ in range(20):
            with pytest.raises(IndexerDown):
                await world.indexer.agents.credentials(agents[0].uuid)
        assert trio.current_time() - began < 1.0

    contract.run(storm_over, tmp_path, opener(own_opensearch.url))
