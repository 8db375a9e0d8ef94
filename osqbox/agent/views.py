"""Views a config defines, and how they and other things of a config come among the tables that queries see.

plugins/config/parsers/views.cpp of osquery 5.23. Where the key is left out of a config the views stay, as upstream; an
empty object removes them. A table wins over a view of its name. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from typing import Any

from osqbox.agent.sql import Context, Row, Tables, TableSource
from osqbox.schema import load_schema

KEY = "views"
MAX_VIEWS = 1000
_NAME = re.compile(r"(?!sqlite_)[a-z_][a-z0-9_]{0,127}")

Warn = Callable[[str], None]


def read_views(sources: Iterable[Mapping[str, Any]], warn: Warn) -> Mapping[str, str] | None:
    """Name in lower case -> SQL, of the last source that has the key; None when no source does.

    What cannot be a view is left out with a warning; entries without text are passed over in silence.
    """
    given = [members[KEY] for members in sources if members.get(KEY) is not None]
    if not given:
        return None
    if not isinstance(given[-1], dict):
        warn(f"Error config {KEY} should be an array or object")
        return None
    found: dict[str, str] = {}
    for written, sql in given[-1].items():
        name, refusal = written.lower(), _refusal(written)
        if not isinstance(sql, str) or not sql.strip():
            continue
        if refusal or len(found) >= MAX_VIEWS:
            warn(error_text(written, refusal or f"more than {MAX_VIEWS} views"))
        else:
            found[name] = sql.rstrip("; \t\r\n")
    return found


def _refusal(name: str) -> str:
    if not _NAME.fullmatch(name.lower()):
        return "the name must be letters, digits and _"
    return "there is a table of this name" if name.lower() in load_schema() else ""


def error_text(name: str, reason: str) -> str:
    return f"Error creating view ({name[:200]}): {reason}"


def check(sql: str) -> str:
    """A query that fails with SQLite's reason when this cannot be a view, and reads no table."""
    return f"EXPLAIN {_one_select(sql)}"


def _one_select(sql: str) -> str:
    """The same rows and columns; a syntax error for anything but one SELECT, VALUES or WITH."""
    return f'WITH "a view" AS (\n{sql}\n) SELECT * FROM "a view"'


def view_tables(views: Mapping[str, str]) -> dict[str, TableSource]:
    return {name: TableSource(_nothing, view=_one_select(sql)) for name, sql in views.items()}


def _nothing(_context: Context) -> Iterable[Row]:
    return ()


class ConfiguredTables(Mapping[str, TableSource]):
    """Tables that stay, and behind them those a config adds, which come and go with its updates."""

    def __init__(self, base: Tables, added: Callable[[], Tables]) -> None:
        self._base = base
        self._added = added

    def items(self) -> ItemsView[str, TableSource]:
        """Of this moment."""
        return {**self._added(), **dict(self._base.items())}.items()

    def __getitem__(self, name: str) -> TableSource:
        return self._base[name] if name in self._base else self._added()[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._added(), **self._base})

    def __len__(self) -> int:
        return len(self._added().keys() | self._base.keys())
