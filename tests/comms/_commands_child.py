"""A process that publishes and is killed: says after every publication up to where it is acknowledged.

python _commands_child.py FOLDER AGENT BATCHES COMMANDS LAST
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from osqbox import audit
from osqbox.clock import SystemClock
from osqbox.comms.messages import Action, NewCommand
from osqbox.comms.sqlite import commands as table
from osqbox.comms.sqlite.commands import SqliteCommands
from osqbox.feed import Feed
from osqbox.store import Store


async def main(folder: Path, agent: str, batches: int, size: int, last: int) -> None:
    clock = SystemClock()
    store = Store.open(folder / "box.db", [audit.migrations, table.migrations], clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        commands = SqliteCommands(store, lambda change: None, clock)
        done = 0
        for count in (*[size] * batches, last):
            now = clock.now()
            new = [
                NewCommand(
                    id=f"c{n}", agent=agent, tenant="default", action=Action(name="restart", args={"n": n}),
                    request_id=f"r{done}", created_at=now, expires_at=now + 86400,
                )
                for n in range(done, done + count)
            ]  # fmt: skip
            await commands.publish(new, actor="operator")
            done += count
            print(done, flush=True)


trio.run(main, Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
