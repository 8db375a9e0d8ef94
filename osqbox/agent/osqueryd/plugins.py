"""The config, logger and distributed plugins a daemon runs with, apart from tls: who they are, and calling them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from osqbox.agent.client import TLS, Call, Failure
from osqbox.agent.osqueryd import configs
from osqbox.agent.osqueryd.loggers import Logger
from osqbox.errors import UserError

FILESYSTEM, STDOUT = "filesystem", "stdout"

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "config": (TLS, FILESYSTEM),
    "distributed": (TLS,),
    "enroll": (TLS,),
    "logger": (TLS, FILESYSTEM, STDOUT),
}
"""Registry -> the plugins this program has itself."""

Rows = list[dict[str, str]]
CallExtension = Callable[[str, str, Mapping[str, str]], Awaitable["Rows | Failure"]]
"""Registry, plugin and request, to the extension that has the plugin."""


class PluginMissing(UserError):
    """A plugin cannot be activated."""

    exit_code = 78


@dataclass(slots=True)
class Plugins:
    """Answers the core's calls: the built-in plugins here, every other by an extension."""

    config_path: str
    loggers: Mapping[str, Logger]
    extension: CallExtension | None = None

    async def call(self, call: Call) -> Rows | Failure:
        if call.registry == "config" and call.plugin == FILESYSTEM:
            return self._config(call.request)
        if call.registry == "logger" and call.plugin in self.loggers:
            return self._log(call.plugin, call.request)
        if self.extension is None:
            return Failure(f"Unknown registry plugin: {call.plugin}")
        return await self.extension(call.registry, call.plugin, call.request)

    def _config(self, request: Mapping[str, str]) -> Rows | Failure:
        try:
            if request.get("action") == "genPack":
                return [configs.read_pack(request["name"], request["value"])]
            return [configs.read_sources(self.config_path)]
        except configs.ConfigMissing as error:
            return Failure(str(error))

    def _log(self, plugin: str, request: Mapping[str, str]) -> Rows | Failure:
        try:
            self.loggers[plugin].write(request)
        except OSError as error:
            return Failure(f"{plugin}: {error}")
        return []


def names(flag: str) -> tuple[str, ...]:
    """The plugins a flag such as ``--logger_plugin=tls,filesystem`` names."""
    return tuple(filter(None, (name.strip() for name in flag.split(","))))


def is_built_in(registry: str, name: str) -> bool:
    return name in BUILT_IN[registry]
