"""The Linux table schema of osquery, and where the data files shipped with osqbox are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osqbox.errors import BadSetup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.resources.abc import Traversable


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: str
    """TEXT, INTEGER, BIGINT, UNSIGNED BIGINT or DOUBLE."""


@dataclass(frozen=True)
class Table:
    """One table as its ``specs/*.table`` file describes it."""

    name: str
    columns: tuple[Column, ...]
    """In the order of ``SELECT *``."""
    hidden_columns: tuple[Column, ...] = ()
    """Selected only by name."""
    required: tuple[str, ...] = ()
    """At least one of these needs a constraint, or the query fails."""
    index: tuple[str, ...] = ()
    additional: tuple[str, ...] = ()
    optimized: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    event_based: bool = False
    spec: str = ""
    """The upstream file, such as ``specs/utility/time.table``."""

    @cached_property
    def all_columns(self) -> tuple[Column, ...]:
        return self.columns + self.hidden_columns

    @property
    def ddl(self) -> str:
        """``CREATE TABLE`` text: what osqueryi's ``.schema`` shows, hidden columns marked."""
        shown = [f"`{c.name}` {c.type}" for c in self.columns]
        hidden = [f"`{c.name}` {c.type} HIDDEN" for c in self.hidden_columns]
        return f"CREATE TABLE {self.name}({', '.join(shown + hidden)})"


@dataclass(frozen=True)
class Schema:
    tables: Mapping[str, Table]

    @cached_property
    def names(self) -> Mapping[str, Table]:
        """Every name that works after FROM, aliases included."""
        found = dict(self.tables)
        for table in self.tables.values():
            found.update(dict.fromkeys(table.aliases, table))
        return found

    def __iter__(self) -> Iterator[Table]:
        return iter(self.tables.values())

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, name: str) -> Table:
        return self.names[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names


def fixture_path(name: str) -> Traversable:
    """A file under ``fixtures/``: inside the package when installed, beside it in a checkout.

    Raises BadSetup when it is in neither place.
    """
    package = resources.files("osqbox")
    installed = package.joinpath("fixtures").joinpath(name)
    if installed.is_file():
        return installed
    checkout = Path(str(package)).parent / "fixtures" / name
    if checkout.is_file():
        return checkout
    raise BadSetup(
        f"data file {name!r} is missing from this installation of osqbox",
        hint="pip install --force-reinstall osqbox",
    )


@lru_cache(maxsize=1)
def load_schema() -> Schema:
    """The schema, parsed once per process (about 2 ms) and immutable."""
    raw = json.loads(fixture_path("osquery_schema.json").read_text(encoding="utf-8"))
    return Schema({name: _table(name, entry) for name, entry in sorted(raw.items())})


def _table(name: str, entry: dict[str, Any]) -> Table:
    def columns(key: str) -> tuple[Column, ...]:
        return tuple(Column(column, kind) for column, kind in entry.get(key, ()))

    def words(key: str) -> tuple[str, ...]:
        return tuple(entry.get(key, ()))

    return Table(
        name=name,
        columns=columns("columns"),
        hidden_columns=columns("hidden_columns"),
        required=words("required"),
        index=words("index"),
        additional=words("additional"),
        optimized=words("optimized"),
        aliases=words("aliases"),
        platforms=tuple(entry.get("platforms", "").split(",")),
        event_based=bool(entry.get("event_based", False)),
        spec=entry.get("spec", ""),
    )
