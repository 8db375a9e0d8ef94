"""Tables a config constructs from SQLite files of this machine: auto_table_construction.

plugins/config/parsers/auto_constructed_tables.cpp of osquery 5.23. Files are read as they are, without locks. Where the
key is left out of a config the tables stay, as upstream; an empty object removes them.
"""

from __future__ import annotations

import functools
import itertools
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osqbox.agent.functions import SqlValue, render
from osqbox.agent.schedule import platform_matches
from osqbox.agent.sql import MAX_RESULT_BYTES, MAX_SQL_BYTES, MAX_VALUE_BYTES, Context, Row, TableSource
from osqbox.agent.tables.files import resolve
from osqbox.schema import Column, Table, load_schema

KEY = "auto_table_construction"
MAX_TABLES = 200
MAX_COLUMNS = 200
MAX_FILES = 1000
MAX_ROWS = 100_000
"""Of one table in one query, like the bytes."""
_NAME = re.compile(r"(?!sqlite_)[a-z_][a-z0-9_]{0,127}")
_COLUMN = re.compile(r"[^`\x00-\x1f]{1,128}")
_CHECK_EVERY_STEPS = 5_000
_ALLOWED = {sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Constructed:
    """What to ask of which files, and the table it becomes."""

    table: Table
    query: str
    path: str
    """A pattern with ``%`` or ``*``."""


# -- reading the config ------------------------------------------------------------------------------------------


def read_constructed(
    sources: Iterable[Mapping[str, Any]], platform_type: int, warn: Warn
) -> Mapping[str, Constructed] | None:
    """By name in lower case, of the last source that has the key; None when no source does."""
    given = [members[KEY] for members in sources if members.get(KEY) is not None]
    if not given:
        return None
    if not isinstance(given[-1], dict):
        warn(f"Error config {KEY} should be an array or object")
        return None
    found: dict[str, Constructed] = {}
    for name, entry in given[-1].items():
        if not isinstance(entry, dict) or not platform_matches(_text(entry, "platform"), platform_type):
            continue
        refusal = _refusal(name, entry) or (f"more than {MAX_TABLES} tables" if len(found) >= MAX_TABLES else "")
        if refusal:
            warn(f"ATC Table: Skipping {name[:200]} because {refusal}")
            continue
        table = Table(name.lower(), tuple(_columns(name, entry.get("columns"), warn)))
        found[table.name] = Constructed(table, _text(entry, "query"), _text(entry, "path"))
    return found


def _refusal(name: str, entry: Mapping[str, Any]) -> str:
    if not _NAME.fullmatch(name.lower()):
        return "its name must be letters, digits and _"
    if name.lower() in load_schema():
        return "it overrides a core table"
    if not _text(entry, "query") or not _text(entry, "path"):
        return "it is misconfigured (missing query or path)"
    return ""


def _columns(name: str, given: Any, warn: Warn) -> Iterator[Column]:
    """``path`` first, then those of the config; all are text."""
    yield Column("path", "TEXT")
    if not isinstance(given, list):
        warn(f"ATC Table: {name} is misconfigured (no columns)")
        return
    seen = {"path"}
    for column in given[:MAX_COLUMNS]:
        if not isinstance(column, str) or not _COLUMN.fullmatch(column):
            warn(f"ATC Table: {name} is misconfigured (a column must be a text without ` and control characters)")
        elif column.lower() in seen:
            warn(f"ATC Table: {name} is misconfigured (column {column} is reserved or there twice)")
        else:
            seen.add(column.lower())
            yield Column(column, "TEXT")


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


# -- reading the files -------------------------------------------------------------------------------------------


def constructed_tables(tables: Mapping[str, Constructed]) -> dict[str, TableSource]:
    """Only for an agent that shows this machine."""
    return {name: TableSource(functools.partial(_rows, each), definition=each.table) for name, each in tables.items()}


def _rows(table: Constructed, context: Context) -> Iterator[Row]:
    count = size_bytes = 0
    for path in itertools.islice(resolve(table.path, context), MAX_FILES):
        try:
            for row in _file_rows(path, table.query, context):
                count, size_bytes = count + 1, size_bytes + sum(map(len, row.values()))
                if count > MAX_ROWS or size_bytes > MAX_RESULT_BYTES:
                    context.warn(f"ATC Table: {table.table.name}: over {MAX_ROWS} rows or {MAX_RESULT_BYTES} bytes")
                    return
                yield row
        except (OSError, ValueError, sqlite3.Error, sqlite3.Warning) as error:
            context.checkpoint()  # when time is up, SQLite only says that it was interrupted
            context.warn(f"ATC Table: Could not generate data: {error} for path {path}")


def _file_rows(path: str, query: str, context: Context) -> Iterator[dict[str, str]]:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        return
    with closing(_open(path, context)) as db, closing(db.execute(query)) as found:
        names = [column[0] for column in found.description or ()]
        for values in found:
            yield {**dict(zip(names, map(_shown, values), strict=True)), "path": path}


def _open(path: str, context: Context) -> sqlite3.Connection:
    """For reading, and nothing but that file. A write-ahead log is only seen with locks, which leave files behind."""
    how = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
    db = sqlite3.connect(f"{Path(path).as_uri()}?{how}", uri=True, timeout=0.2, isolation_level=None)
    db.text_factory = lambda text: text.decode("utf-8", "replace")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    db.execute("PRAGMA trusted_schema=OFF")
    db.set_authorizer(_authorize)
    db.set_progress_handler(functools.partial(_is_over, context), _CHECK_EVERY_STEPS)
    return db


def _authorize(action: int, *_names: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _is_over(context: Context) -> int:
    try:
        context.checkpoint()
    except Exception:  # noqa: BLE001 - whatever says stop
        return 1
    return 0


def _shown(value: SqlValue) -> str:
    return "" if value is None else render(value)
