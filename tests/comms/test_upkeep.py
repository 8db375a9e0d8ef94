"""What the comms API does by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from osqbox.comms.messages import Agent, CommandStatus
from osqbox.comms.upkeep import Upkeep
from osqbox.settings import Retention
from osqbox.store import drops

from ._door import Door, run_door


def test_what_is_beyond_its_bound_is_dropped_and_counted(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        comms, known = door.comms, await door.agent()
        for number in range(3):
            await known.ask("POST", "/events/stateless", 202, json={"module": "logs", "n": number})
            await comms.indexer.commands.cancel([await door.publish(known.uuid)], actor="test")
        waiting = await door.publish(known.uuid)
        while comms.intake.statistics().waiting:
            await trio.sleep(0.01)
        await Upkeep(comms, Retention(comms_events=1, comms_commands=1)).prune()
        assert [event.data["n"] for _, event in await comms.events.search()] == [2]
        kept = await comms.indexer.commands.page()
        assert [each.status for each in kept] == [CommandStatus.PENDING, CommandStatus.CANCELLED]
        assert kept[0].id == waiting
        counted = comms.store.peek(drops)
        assert (counted["comms_events"], counted["comms_commands"]) == (2, 2)

    run_door(tmp_path, test)


def test_sightings_are_written_and_a_slow_indexer_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(door: Door) -> None:
        comms, known = door.comms, await door.agent()
        upkeep = Upkeep(comms, Retention())
        await known.ask("GET", "/configuration", 200)
        await upkeep.finish(5)
        found = await comms.indexer.agents.find(known.uuid)
        assert isinstance(found, Agent)
        assert found.last_seen_at is not None

        async def never(_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(comms.indexer.agents, "note_seen", never)
        await known.ask("GET", "/configuration", 200)
        began = trio.current_time()
        await upkeep.finish(0.05)
        assert trio.current_time() - began < 5

    run_door(tmp_path, test)
