"""The extension manager of a shell: in a thread beside it, since the shell itself waits for a person or a pipe."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import trio

from osqbox.agent.client import Core
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.extensions import open_manager
from osqbox.agent.osqueryd.groups import ungrouped
from osqbox.agent.osqueryd.loggers import StderrLog
from osqbox.agent.osqueryd.plugins import Plugins
from osqbox.agent.sql import Engine, QueryResult, Tables

_STOP_S = 10.0


@dataclass(slots=True)
class ShellAgent:
    """A shell as its extension manager sees it."""

    core: Core
    engine: Engine
    tables: Tables
    """Those a query sees; the manager adds what extensions have."""

    async def query(self, sql: str) -> QueryResult:
        return await trio.to_thread.run_sync(lambda: self.engine.query(sql, tables=self.tables), abandon_on_cancel=True)

    def settle(self) -> None:
        self.core.store.commit()


@contextlib.contextmanager
def extensions_beside(line: CommandLine, agent: ShellAgent) -> Iterator[None]:
    """Serve --extensions_socket; what --extensions_require names has registered when the block begins.

    Raises PluginMissing.
    """
    started: Future[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = Future()
    thread = threading.Thread(target=trio.run, args=(_serve, line, agent, started), daemon=True)
    thread.start()
    token, scope = started.result()
    try:
        yield
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)
        thread.join(_STOP_S)


async def _serve(
    line: CommandLine, agent: ShellAgent, started: Future[tuple[trio.lowlevel.TrioToken, trio.CancelScope]]
) -> None:
    log = StderrLog(verbose=line.true("verbose"), enabled=True, min_severity=0, now=time.time, pid=os.getpid())
    plugins = Plugins(line.text("config_path"), {})
    try:
        with ungrouped(), trio.CancelScope() as scope:
            async with open_manager(line, agent, plugins, [], log):
                started.set_result((trio.lowlevel.current_trio_token(), scope))
                await trio.sleep_forever()
    except Exception as error:
        if started.done():
            raise
        started.set_exception(error)
