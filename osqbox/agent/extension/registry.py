"""Which extensions a manager has, and what they may register: the rules of registerExtension. Pure.

osquery/extensions/interface.cpp (registerExtension, deregisterExtension) and osquery/registry/registry_factory.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from osqbox.agent.extension import routes
from osqbox.agent.extension.messages import FAILED, ExtensionInfo, Registry, Status
from osqbox.agent.schedule import version_at_least
from osqbox.schema import Table

OLDEST_SDK = "1.7.7"
MAX_EXTENSIONS = 256
MAX_PLUGINS = 4096
"""Of one extension."""
MAX_INFO_LETTERS = 4096
MAX_UUID = 2**16 - 1

REGISTRIES = frozenset(
    {"config", "config_parser", "database", "distributed", "enroll", "event_publisher", "event_subscriber"}
    | {"killswitch", "logger", "numeric_monitoring", "sql", "table"}
)

Items = Mapping[str, frozenset[str]]
"""Registry -> names of plugins."""


@dataclass(frozen=True, slots=True)
class Extension:
    uuid: int
    info: ExtensionInfo
    plugins: Registry
    tables: Mapping[str, Table]
    """Those of ``plugins``, read."""

    @property
    def name(self) -> str:
        return self.info.name


class Extensions:
    """The extensions of one manager by uuid. Replaced whole on each change, so that other threads may read."""

    def __init__(self, core: Items) -> None:
        self._core = core
        self.by_uuid: Mapping[int, Extension] = {}

    def register(self, info: ExtensionInfo, plugins: Registry, new_uuid: Callable[[], int]) -> Status:
        """OK with the uuid under which the extension is now known, or why it is not."""
        if any(known.name == info.name for known in self.by_uuid.values()):
            return Status(FAILED, "Duplicate extension registered")
        if info.sdk_version not in ("", "0.0.0") and not version_at_least(OLDEST_SDK, info.sdk_version):
            return Status(FAILED, "Incompatible extension SDK version")
        if sum(map(len, (info.name, info.version, info.sdk_version, info.min_sdk_version))) > MAX_INFO_LETTERS:
            return Status(FAILED, f"Failed adding registry: name and versions exceed {MAX_INFO_LETTERS} letters")
        if len(self.by_uuid) >= MAX_EXTENSIONS:
            return Status(FAILED, f"Failed adding registry: {MAX_EXTENSIONS} extensions are registered already")
        try:
            tables = self._check(plugins)
        except routes.BadRoutes as error:
            return Status(FAILED, f"Failed adding registry: {error}")
        uuid = next(found for found in iter(new_uuid, None) if found and found not in self.by_uuid)
        self.by_uuid = {**self.by_uuid, uuid: Extension(uuid, info, plugins, tables)}
        return Status(uuid=uuid)

    def deregister(self, uuid: int) -> Status:
        if uuid not in self.by_uuid:
            return Status(FAILED, "No extension UUID found")
        self.by_uuid = {known: extension for known, extension in self.by_uuid.items() if known != uuid}
        return Status()

    def find(self, registry: str, item: str) -> Extension | None:
        """The extension that has the plugin."""
        owners = self.by_uuid.values()
        return next((owner for owner in owners if item in owner.plugins.get(registry, {})), None)

    def _check(self, plugins: Registry) -> dict[str, Table]:
        if sum(map(len, plugins.values())) > MAX_PLUGINS:
            raise routes.BadRoutes(f"more than {MAX_PLUGINS} plugins")
        for registry, items in plugins.items():
            if registry not in REGISTRIES:
                raise routes.BadRoutes(f"Unknown registry name: {registry}")
            for item in items:
                if self._is_taken(registry, item):
                    raise routes.BadRoutes(f"Duplicate registry item exists: {registry}/{item}")
        return {name: routes.read_table(name, rows) for name, rows in plugins.get("table", {}).items()}

    def _is_taken(self, registry: str, item: str) -> bool:
        """SQLite's table names know no case; other plugins do."""
        names = {name for owner in self.by_uuid.values() for name in owner.plugins.get(registry, {})}
        names |= self._core.get(registry, frozenset())
        return item.lower() in {name.lower() for name in names} if registry == "table" else item in names


def read_names(flag: str) -> list[str]:
    """The names in a flag such as ``--extensions_require a,b`` or ``--logger_plugin a,b``."""
    return [name for name in re.split(r"[,\s]+", flag) if name]
