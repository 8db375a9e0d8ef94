"""A hundred thousand queued commands outlive a SIGKILL, and arrive in order with none missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from osqbox.clock import SystemClock
from osqbox.comms.streams import sse

from ._commands import Rig, open_rig

CHILD = Path(__file__).with_name("_commands_child.py")
COMMANDS, LAST = 1000, 20_000


async def drain(rig: Rig, count: int) -> list[int]:
    """The numbers that arrive at the agent over one stream."""
    heard: list[int] = []

    async def send(piece: bytes) -> None:
        await trio.lowlevel.checkpoint()
        heard.extend(
            json.loads(line[6:])["action"]["args"]["n"]
            for line in piece.split(b"\n")
            if line.startswith(b"data: ") and b"restart" in line
        )
        if len(heard) >= count:
            rig.hub.stop()

    async with rig.attach("a") as stream:
        await sse(stream, send)
    return heard


@pytest.mark.parametrize(("batches", "pause_s"), [(100, 0.12), (10, 0.0)])
def test_what_was_acknowledged_survives_a_kill_and_a_publication_is_there_whole_or_not_at_all(
    tmp_path: Path, batches: int, pause_s: float
) -> None:
    acknowledged = batches * COMMANDS

    async def run() -> None:
        command = [sys.executable, str(CHILD), str(tmp_path), "a", str(batches), str(COMMANDS), str(LAST)]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        said = b""
        assert process.stdout is not None
        async with process.stdout:
            while f"{acknowledged}\n".encode() not in said:
                piece = await process.stdout.receive_some()
                assert piece, "the child ended before it was killed"
                said += piece
            await trio.sleep(pause_s)  # somewhere inside of the last publication
            process.kill()
            await process.wait()
        async with open_rig(tmp_path, SystemClock(), limit_s=45) as rig:
            kept = await rig.store.read(lambda db: db.execute("SELECT count(*) FROM comms_commands").fetchone()[0])
            assert kept in (acknowledged, acknowledged + LAST)
            assert await drain(rig, kept) == list(range(kept))

    trio.run(run)
