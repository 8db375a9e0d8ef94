"""Whatever agents, publishers and restarts do in whatever order: nothing is lost, nothing comes after its end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from osqbox.comms.hub import Deliver, Reset
from osqbox.comms.messages import Result

from ._commands import NOW, HandClock, Rig, open_rig

AGENTS = ("a", "b")


@dataclass
class Model:
    """What must hold: for each agent its commands that have no acknowledgement, in order, and where it says it was."""

    dice: random.Random
    open: dict[str, list[str]] = field(default_factory=lambda: {each: [] for each in AGENTS})
    last: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(AGENTS))
    heard: dict[str, list[str]] = field(default_factory=lambda: {each: [] for each in AGENTS})
    """All that ever arrived."""
    published: int = 0

    async def step(self, rig: Rig) -> None:
        agent = self.dice.choice(AGENTS)
        await self.dice.choice(
            [self.publish, self.publish, self.listen, self.listen, self.listen, self.acknowledge, self.cancel]
        )(rig, agent)

    async def publish(self, rig: Rig, agent: str) -> None:
        names = [f"n{self.published + n}" for n in range(self.dice.randrange(1, 8))]
        self.published += len(names)
        others = [each for each in AGENTS if each != agent and self.dice.random() < 0.5]
        new = [rig.new(each, id=f"{each}-{name}") for name in names for each in (agent, *others)]
        await rig.commands.publish(new, actor="test")
        for each in new:
            self.open[each.agent].append(each.id)

    async def listen(self, rig: Rig, agent: str) -> None:
        """A connection that breaks somewhere: some of what was sent arrives, the rest does not."""
        says = self.last[agent] if self.dice.random() < 0.7 else None
        if self.dice.random() < 0.1:
            says = 10**9
        async with rig.attach(agent, says) as stream:
            if says == 10**9:
                assert await stream.next() == Reset()
                says = None
            expected = [each for each in self.open[agent] if says is None or (await rig.found(each)).seq > says]
            for _ in range(self.dice.randrange(0, 4)):
                item = await stream.next(0)
                if item is None:
                    assert expected == []
                    return
                assert isinstance(item, Deliver)
                found = [each.id for each in item.commands]
                assert found == expected[: len(found)]
                arrives = self.dice.randrange(0, len(found) + 1)
                if arrives:
                    self.last[agent] = item.commands[arrives - 1].seq
                    self.heard[agent] += found[:arrives]
                if arrives < len(found):
                    await (stream.written if self.dice.random() < 0.5 else stream.not_written)(found)
                    return
                await stream.written(found)
                expected = expected[len(found) :]

    async def acknowledge(self, rig: Rig, agent: str) -> None:
        if heard := [each for each in self.heard[agent] if each in self.open[agent]]:
            ended = self.dice.choice(heard)
            await rig.commands.take_result(agent, ended, Result(code=self.dice.choice((0, 1, 2))), NOW)
            self.open[agent].remove(ended)

    async def cancel(self, rig: Rig, agent: str) -> None:
        if self.open[agent] and self.dice.random() < 0.3:
            ended = self.dice.choice(self.open[agent])
            await rig.commands.cancel([ended], actor="test")
            self.open[agent].remove(ended)

    async def check(self, rig: Rig) -> None:
        for agent in AGENTS:
            found = await rig.commands.after(agent, 0, limit=10_000)
            assert [each.id for each in found] == self.open[agent]


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_and_nothing_comes_after_its_end(tmp_path: Path, seed: int) -> None:
    model = Model(random.Random(seed))
    clock = HandClock()

    async def run() -> None:
        for _ in range(4):  # each time the box is started anew
            clock.at += 1
            async with open_rig(tmp_path, clock) as rig:
                rig.hub._bounds = type(rig.hub._bounds)(page_commands=5)
                for _ in range(25):
                    await model.step(rig)
                await model.check(rig)

    trio.run(run)
    assert model.published > 50
    assert all(model.heard.values())
