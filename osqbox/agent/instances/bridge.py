"""The plugins an instance's extension serves, each joined to the forwarder that does the work for its tenant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from osqbox.agent.extension.plugins import ConfigPlugin, DistributedPlugin, LoggerPlugin, Plugin, TablePlugin
from osqbox.agent.instances.forwarder import NO_QUERIES, Forwarder
from osqbox.agent.instances.history import COLUMNS, TABLE, History
from osqbox.agent.instances.options import EXTENSION, Timing
from osqbox.agent.instances.transport import Driver, within
from osqbox.agent.sql import Context
from osqbox.errors import OsqboxError


class NotTaken(OsqboxError):
    """The server did not take it; the osquery process keeps it and tries again."""


def plugins_of(forwarder: Forwarder, driver: Driver, history: History, timing: Timing) -> list[Plugin]:
    """Config, logger and distributed plugins and the history table, for one osquery process."""

    async def config() -> Mapping[str, str]:
        text = await within(timing.config_wait_s, lambda: driver.run(forwarder.config()), forwarder.cached_config)
        return {EXTENSION: text}

    async def get_queries() -> str:
        return await within(timing.distributed_wait_s, lambda: driver.run(forwarder.queries()), lambda: NO_QUERIES)

    async def write_results(text: str) -> None:
        late = f"not taken within {timing.distributed_wait_s:g} s"
        refusal = await within(timing.distributed_wait_s, lambda: driver.run(forwarder.results(text)), lambda: late)
        if refusal:
            raise NotTaken(refusal)

    async def log_line(line: str) -> None:
        driver.do(lambda: forwarder.log_result(line))

    async def log_status(entries: Sequence[Mapping[str, Any]]) -> None:
        driver.do(lambda: forwarder.log_status(entries))

    async def history_rows(_context: Context) -> Iterable[Mapping[str, str]]:
        return history.rows()

    return [
        ConfigPlugin(EXTENSION, config),
        LoggerPlugin(EXTENSION, log_line, log_status),
        DistributedPlugin(EXTENSION, get_queries, write_results),
        TablePlugin(TABLE, [(column, "TEXT") for column in COLUMNS], history_rows),
    ]
