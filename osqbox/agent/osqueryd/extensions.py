"""The daemon's side of the extension socket: what extensions may ask of it, and what it asks of them."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from osqbox.agent.extension.agent_host import AgentHost
from osqbox.agent.extension.calls import PluginCaller
from osqbox.agent.extension.live import LiveTables
from osqbox.agent.extension.manager import ExtensionManagerServer, RequiredExtensionMissing
from osqbox.agent.extension.registry import read_names
from osqbox.agent.logs import INFO, WARNING
from osqbox.agent.osqueryd.autoload import autoloaded
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.loggers import StderrLog
from osqbox.agent.osqueryd.plugins import PluginMissing, Plugins
from osqbox.errors import BadSetup

if TYPE_CHECKING:
    from osqbox.agent.osqueryd.beside import ShellAgent
    from osqbox.agent.runner import Agent


@contextlib.asynccontextmanager
async def open_manager(
    line: CommandLine, agent: Agent | ShellAgent, plugins: Plugins, foreign: list[tuple[str, str]], log: StderrLog
) -> AsyncIterator[None]:
    """Listen, start what is autoloaded, and wait for the extensions and plugins that are needed.

    Raises PluginMissing. A socket that cannot be opened only matters when an extension is needed.
    """
    agent.tables = tables = LiveTables(
        agent.tables, default_index=lambda: agent.core.flags.true("extensions_default_index")
    )
    timeout_s, interval_s = _seconds(line, "extensions_timeout"), _seconds(line, "extensions_interval")
    manager = ExtensionManagerServer(
        Path(line.text("extensions_socket")),
        AgentHost(agent),
        rng=random.SystemRandom(),
        tables=tables,
        interval_s=interval_s,
        timeout_s=timeout_s,
        on_event=functools.partial(_tell, log),
    )
    required = read_names(line.text("extensions_require"))
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(_run, manager)
        except BadSetup as error:
            if required or foreign:
                raise PluginMissing(f"Cannot start extension manager: {error}", hint=error.hint) from error
            log.say(INFO, "init.cpp", f"Cannot start extension manager: {error}")
        else:
            plugins.extension = PluginCaller(manager).call
            await nursery.start(autoloaded, line, log)
            await _wait(manager, required, foreign, timeout_s)
        yield
        nursery.cancel_scope.cancel()


async def _run(manager: ExtensionManagerServer, *, task_status: trio.TaskStatus[None]) -> None:
    await manager.run(task_status=task_status)


async def _wait(
    manager: ExtensionManagerServer, required: list[str], foreign: list[tuple[str, str]], timeout_s: float
) -> None:
    try:
        await manager.wait_extensions(required, timeout_s)
        await manager.wait_plugins(foreign, timeout_s)
    except RequiredExtensionMissing as error:
        what = ", ".join(f"{name} {registry} plugin" for registry, name in foreign) or "the required extensions"
        raise PluginMissing(
            f"Cannot activate {what}: {error}", hint="a longer --extensions_timeout, or start the extension sooner"
        ) from error


def _tell(log: StderrLog, kind: str, facts: dict[str, Any]) -> None:
    said = {
        "extension_registered": (INFO, "interface.cpp", "Extension registered: {name} ({uuid})"),
        "extension_deregistered": (INFO, "interface.cpp", "Extension deregistered: {name} ({uuid}): {reason}"),
        "extension_gone": (INFO, "extensions.cpp", "Extension UUID {uuid} ({name}) has gone away: {reason}"),
    }
    severity, filename, text = said.get(kind, (WARNING, "extensions.cpp", kind))
    log.say(severity, filename, text.format(**facts))


def _seconds(line: CommandLine, name: str) -> float:
    """These two are text among the flags. Raises PluginMissing."""
    try:
        return float(line.text(name))
    except ValueError:
        raise PluginMissing(f"--{name}: expected seconds, got {line.text(name)!r}") from None
