"""The machines comms agents speak for: a pretended one, or this one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import trio

from osqbox.agent.comms.facts import Fact, ReadTable, host_of, inventory, log_lines
from osqbox.agent.comms.messages import About, Stateless
from osqbox.agent.sql import Tables


class RawRows(Protocol):
    """As much of `osqbox.agent.sql.Engine` as is needed; one may be shared by all hosts of a profile."""

    def raw_rows(self, name: str, *, tables: Tables | None = None) -> list[dict[str, str]]: ...


class TablesHost:
    """Answers on the spot: for pretended hosts, whose rows are made in about a millisecond."""

    def __init__(self, tables: Tables, engine: RawRows, *, name: str = "", light: bool = False) -> None:
        self._tables, self._engine = tables, engine
        self._light = light
        """Logs without a look at every process: for many hosts at once."""
        self._name = name

    @property
    def about(self) -> About:
        host = host_of(self._read)
        return About(self._name or host["hostname"] or "agent", host=host)

    async def inventory(self, limit: int | None) -> Sequence[Fact]:
        await trio.lowlevel.checkpoint()
        return list(inventory(self._read, limit=limit))

    async def logs(self, since: float, until: float, limit: int) -> Sequence[Stateless]:
        await trio.lowlevel.checkpoint()
        return log_lines(self._read_light if self._light else self._read, since, until, limit=limit)

    def _read(self, name: str) -> Sequence[dict[str, str]]:
        return self._engine.raw_rows(name, tables=self._tables)

    def _read_light(self, name: str) -> Sequence[dict[str, str]]:
        return [] if name == "processes" else self._read(name)


class ThisMachine(TablesHost):
    """Reads /proc and package databases in a thread, as that may take a while."""

    async def inventory(self, limit: int | None) -> Sequence[Fact]:
        return await trio.to_thread.run_sync(self._collect, self._read, limit)

    async def logs(self, since: float, until: float, limit: int) -> Sequence[Stateless]:
        return await trio.to_thread.run_sync(partial(log_lines, self._read, since, until, limit=limit))

    @staticmethod
    def _collect(read: ReadTable, limit: int | None) -> list[Fact]:
        return list(inventory(read, limit=limit))
