"""An agent's own calls to plugins of extensions: --config_plugin, --logger_plugin and --distributed_plugin NAME."""

from __future__ import annotations

from osqbox.agent.client import Call, Failure
from osqbox.agent.extension.manager import ExtensionManagerServer
from osqbox.agent.extension.messages import Row, UnknownMethod
from osqbox.agent.extension.plugins import WANTS_STATUS
from osqbox.agent.extension.registry import Extension
from osqbox.agent.extension.sockets import ExtensionGone

PROGRAM = "osqueryd"


class PluginCaller:
    """Performs a core's `Call` commands on the extensions of a manager: ``rows = await caller(command)``.

    A logger is told the program's name before its first line, and asked whether it wants the agent's own messages;
    these are kept from one that does not. What a logger answers to a line is not looked at, as upstream.
    """

    def __init__(self, manager: ExtensionManagerServer) -> None:
        self._manager = manager
        self._features: dict[tuple[int, str], int] = {}
        """Of the loggers met so far, by their extension's uuid and their name."""

    async def __call__(self, command: Call) -> list[dict[str, str]] | Failure:
        return await self.call(command.registry, command.plugin, command.request)

    async def call(self, registry: str, plugin: str, request: Row) -> list[dict[str, str]] | Failure:
        """The rows of the plugin's answer, or why there are none. Raises nothing."""
        try:
            if registry == "logger":
                return await self._log(plugin, request)
            response = await self._manager.call(registry, plugin, request)
        except (ExtensionGone, UnknownMethod) as error:
            return Failure(str(error))
        if not response.ok:
            return Failure(response.status.message or f"the plugin answered {response.status.code}")
        return [dict(row) for row in response.rows]

    async def _log(self, plugin: str, request: Row) -> list[dict[str, str]] | Failure:
        extension = self._manager.find("logger", plugin)
        if extension is None:
            return Failure(f"Cannot call registry item: {plugin}")
        features = await self._introduce(extension, plugin)
        if "status" not in request or features & WANTS_STATUS:
            await self._manager.call("logger", plugin, request)
        return []

    async def _introduce(self, extension: Extension, plugin: str) -> int:
        """The logger's features, asked once in the life of its extension."""
        key = (extension.uuid, plugin)
        if key not in self._features:
            async with self._manager.client(extension) as client:
                await client.call("logger", plugin, {"init": PROGRAM, "log": "[]"})
                answer = await client.call("logger", plugin, {"action": "features"})
            alive = self._manager.extensions
            self._features = {known: bits for known, bits in self._features.items() if known[0] in alive}
            self._features[key] = answer.status.code
        return self._features[key]
