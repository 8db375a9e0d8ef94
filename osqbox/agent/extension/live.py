"""The tables a query sees: the agent's own, and those of the extensions that are registered right now."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from pathlib import Path

from osqbox.agent.extension import messages, routes
from osqbox.agent.extension.registry import Extension
from osqbox.agent.functions import SqlError
from osqbox.agent.sql import Context, Generate, Row, Tables, TableSource, source
from osqbox.errors import OsqboxError
from osqbox.schema import Table

CallTable = Callable[[Extension, str, messages.Row, Callable[[], None]], messages.Response]
"""Extension, table, request, checkpoint. Called in the query's thread."""


class LiveTables(Mapping[str, TableSource]):
    """A mapping for the engine that changes while queries run: each sees one consistent set of foreign tables.

    It also tells the truth about extensions in osquery_extensions, osquery_registry and osquery_info.
    """

    def __init__(self, base: Tables, *, default_index: Callable[[], bool] = lambda: True) -> None:
        """``default_index`` is --extensions_default_index: whether columns without options get constraints too."""
        self.base = base
        self._default_index = default_index
        self._over: Tables = {}

    def publish(self, manager: Path, extensions: Mapping[int, Extension], call: CallTable) -> None:
        over: dict[str, TableSource] = {}
        for extension in extensions.values():
            for table in extension.tables.values():
                found = TableSource(
                    _generate(extension, table, call),
                    self._pushdown(table),
                    definition=table,
                )
                aliases = [alias for alias in table.aliases if alias not in self.base and alias not in over]
                over |= dict.fromkeys((table.name, *aliases), found)
        self._over = {**over, **self._facts(manager, extensions)}

    def _pushdown(self, table: Table) -> frozenset[str]:
        if self._default_index():
            return frozenset(column.name for column in table.all_columns)
        return frozenset((*table.index, *table.required, *table.additional, *table.optimized))

    def _facts(self, manager: Path, extensions: Mapping[int, Extension]) -> Tables:
        listed: list[Row] = [
            {
                "uuid": uuid,
                "name": extension.name,
                "version": extension.info.version,
                "sdk_version": extension.info.sdk_version,
                "path": f"{manager}.{uuid}",
                "type": "extension",
            }
            for uuid, extension in extensions.items()
        ]
        plugins: list[Row] = [
            {"registry": registry, "name": name, "owner_uuid": uuid, "internal": 0, "active": 1}
            for uuid, extension in extensions.items()
            for registry, items in extension.plugins.items()
            for name in items
        ]
        return {
            "osquery_extensions": self._also("osquery_extensions", listed),
            "osquery_registry": self._also("osquery_registry", plugins),
            "osquery_info": self._active(),
        }

    def _also(self, name: str, rows: list[Row]) -> TableSource:
        base = self.base.get(name)

        def generate(context: Context) -> Iterator[Row]:
            yield from base.generate(context) if base else ()
            yield from rows

        return source(generate)

    def _active(self) -> TableSource:
        base = self.base.get("osquery_info")

        def generate(context: Context) -> Iterator[Row]:
            for row in base.generate(context) if base else ():
                yield {**row, "extensions": "active"}

        return source(generate)

    def items(self) -> ItemsView[str, TableSource]:
        """Of this moment."""
        return {**dict(self.base.items()), **self._over}.items()

    def __getitem__(self, name: str) -> TableSource:
        over = self._over
        return over[name] if name in over else self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.base, **self._over})

    def __len__(self) -> int:
        return len(self.base.keys() | self._over.keys())


def _generate(extension: Extension, table: Table, call: CallTable) -> Generate:
    aliases = routes.column_aliases(extension.plugins["table"][table.name])

    def generate(context: Context) -> Iterable[Row]:
        request = {"action": "generate", "context": routes.write_context(table, context, aliases)}
        try:
            response = call(extension, table.name, request, context.checkpoint)
        except OsqboxError as error:
            raise SqlError(f"Error calling table {table.name} of extension {extension.name}: {error}") from error
        if not response.ok:
            raise SqlError(response.status.message or f"table {table.name} failed")
        rows = response.rows
        return rows if not aliases else [{**row, **{a: row.get(of, "") for a, of in aliases.items()}} for row in rows]

    return generate
