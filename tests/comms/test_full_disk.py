"""A disk that is full for a while: agents are told 503, streams wait, nothing that was taken is lost, the box lives."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import trio

from osqbox.box import Box, open_box
from osqbox.comms.registration import new_agent
from osqbox.settings import CommsSettings, Settings
from osqbox.store import Store

from ._door import KEY, Door, run_door

STATEFUL = {"module": "inventory", "collector": "packages", "id": "bash", "data": {"name": "bash"}}


class Disk:
    """Of a store: full after so many more COMMITs, until `empty`."""

    def __init__(self, store: Store) -> None:
        self.left: float = float("inf")
        self.failed = 0
        commit = store._run_batch

        def run(batch: Any) -> None:
            self.left -= 1
            if self.left < 0:
                self.failed += 1
                raise sqlite3.OperationalError("database or disk is full")
            commit(batch)

        store._run_batch = run  # type: ignore[method-assign]

    def empty(self) -> None:
        self.left = float("inf")


def test_what_is_to_be_stored_is_503_and_what_only_waits_is_taken(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known, disk = await door.agent(), Disk(door.comms.store)
        disk.left = 0
        await known.ask("POST", "/events/stateful", 503, json=STATEFUL)
        await door.ask("POST", "/login", 503, json={"uuid": known.uuid, "password": KEY})
        await door.local_ask("POST", "/commands", 503, json={"command": "restart", "uuids": [known.uuid]})
        await known.ask("POST", "/events/stateless", 202, json={"module": "logs", "message": "waits"})
        while not door.comms.intake.statistics().trouble:
            await trio.sleep(0.01)
        disk.empty()
        while door.comms.intake.statistics().waiting:
            await trio.sleep(0.01)
        assert await door.comms.events.last() == 1
        answered = await known.ask("POST", "/events/stateful", 200, json=STATEFUL)
        assert answered.json()["results"][0]["status"] == 201

    run_door(tmp_path, test)


def test_a_stream_outlives_it_and_brings_what_was_published_before(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known, disk = await door.agent(), Disk(door.comms.store)
        async with known.listening() as stream:
            while not door.comms.hub.statistics().streams:
                await trio.sleep(0.01)
            disk.left = 1  # the publication is the last that is stored
            command_id = await door.publish(known.uuid)
            while not disk.failed:
                await trio.sleep(0.01)
            disk.empty()
            kind, _, command = await stream.next()
            assert (kind, command["document_id"]) == ("command", command_id)

    run_door(tmp_path, test)


def test_a_poll_is_503_and_the_next_one_gets_the_command(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        command_id = await door.publish(known.uuid)
        disk = Disk(door.comms.store)
        disk.left = 0
        await known.ask("GET", "/commands?wait=0", 503)
        disk.empty()
        answered = await known.ask("GET", "/commands?wait=5", 200)
        assert [command["document_id"] for command in answered.json()["commands"]] == [command_id]

    run_door(tmp_path, test)


def test_the_box_ends_well_on_a_full_disk(tmp_path: Path) -> None:
    """What could not be written is given up, within the time that the end of a box has."""

    async def end(box: Box) -> None:
        assert box.comms is not None
        agent = new_agent(uuid="a", name="a", now=box.clock.now())
        await box.comms.add_agent(agent, KEY, actor="test")
        box.comms.api._seen["a"] = box.clock.now()
        box.osquery.count_refused("test")
        Disk(box.store).left = 0

    async def main() -> None:
        comms = CommsSettings(port=0, token_algorithm="ES256")
        settings = Settings(tmp_path / "data", tmp_path / "certs", agents_port=0, operator_port=0, comms=comms)
        settings.data_dir.mkdir()
        with trio.fail_after(20):
            async with open_box(settings) as box:
                await end(box)

    trio.run(main)
