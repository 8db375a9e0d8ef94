"""A table as extensions describe it: its routes, and the context of a query. Both directions. Pure.

osquery/core/tables.cpp (columnRoutes, QueryContext serialization) of osquery 5.23.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from osqbox.agent.extension.messages import Row, Rows
from osqbox.agent.messages import compact
from osqbox.agent.sql import OPERATOR_CODES, Constraint, Context
from osqbox.errors import OsqboxError
from osqbox.schema import Column, Table

INDEX, REQUIRED, ADDITIONAL, OPTIMIZED, HIDDEN = 1, 2, 4, 8, 16
"""Bits of a column's ``op``."""
EVENT_BASED = 4
"""Bit of a table's ``attributes``: EVENT_BASED of TableAttributes."""
TYPES = frozenset({"TEXT", "INTEGER", "BIGINT", "UNSIGNED BIGINT", "DOUBLE", "BLOB"})
MAX_COLUMNS = 1000
MAX_CONSTRAINTS = 10_000

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,127}")
_COLUMN = re.compile(r"[^\x00-\x1f`]{1,128}")
_OPERATORS = {code: operator for operator, code in OPERATOR_CODES.items()}


class BadRoutes(OsqboxError):
    """A table cannot be made of what the extension sent."""


def read_table(name: str, rows: Rows) -> Table:
    """Raises BadRoutes: no columns, or a name SQLite could not take."""
    if not _NAME.fullmatch(name):
        raise BadRoutes(f"Table name is no SQL identifier: {name[:128]!r}")
    columns = [row for row in rows if row.get("id") == "column"]
    if not columns or len(columns) > MAX_COLUMNS:
        raise BadRoutes(f"Table {name} has {len(columns)} columns: expected 1 to {MAX_COLUMNS}")
    options: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for row in columns:
        column, kind = row.get("name", ""), row.get("type", "").upper()
        if not _COLUMN.fullmatch(column) or column.lower() in map(str.lower, options):
            raise BadRoutes(f"Table {name} has a bad or repeated column name: {column[:128]!r}")
        options[column] = _integer(row.get("op", "0"))
        kinds[column] = kind if kind in TYPES else "TEXT"

    def having(bit: int) -> tuple[str, ...]:
        return tuple(column for column, bits in options.items() if bits & bit)

    for alias, target in column_aliases(rows).items():
        if not _COLUMN.fullmatch(alias) or target not in kinds or alias.lower() in map(str.lower, options):
            raise BadRoutes(f"Table {name} has a bad alias of a column: {alias[:128]!r}")
        options[alias], kinds[alias] = HIDDEN, kinds[target]
    attributes = sum(_integer(row.get("attributes", "0")) for row in rows if row.get("id") == "attributes")
    aliases = [row.get("alias", row.get("name", "")) for row in rows if row.get("id") == "alias"]
    return Table(
        name=name,
        columns=tuple(Column(column, kinds[column]) for column in options if not options[column] & HIDDEN),
        hidden_columns=tuple(Column(column, kinds[column]) for column in having(HIDDEN)),
        required=having(REQUIRED),
        index=having(INDEX),
        additional=having(ADDITIONAL),
        optimized=having(OPTIMIZED),
        aliases=tuple(alias for alias in aliases if _NAME.fullmatch(alias)),
        event_based=bool(attributes & EVENT_BASED),
    )


def column_aliases(rows: Rows) -> dict[str, str]:
    """Hidden columns that show what another one holds: alias -> target."""
    return {row.get("name", ""): row.get("target", "") for row in rows if row.get("id") == "columnAlias"}


def table_routes(table: Table) -> list[dict[str, str]]:
    """What an extension broadcasts of a table, or answers to the action ``columns``."""
    sets = (
        (table.index, INDEX),
        (table.required, REQUIRED),
        (table.additional, ADDITIONAL),
        (table.optimized, OPTIMIZED),
        (tuple(column.name for column in table.hidden_columns), HIDDEN),
    )
    rows = [
        {
            "id": "column",
            "name": column.name,
            "type": column.type,
            "op": str(sum(bit for names, bit in sets if column.name in names)),
        }
        for column in table.all_columns
    ]
    rows += [{"id": "alias", "alias": alias} for alias in table.aliases]
    return [*rows, {"id": "attributes", "attributes": str(EVENT_BASED if table.event_based else 0)}]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0


# -- the context of a query --------------------------------------------------------------------------------------


def write_context(table: Table, context: Context, aliases: Mapping[str, str]) -> str:
    """JSON: constraints of every column, and the columns the query reads. Aliases are given as what they stand for."""
    asked: dict[str, list[dict[str, Any]]] = {column.name: [] for column in table.all_columns}
    for constraint in context.constraints:
        asked[aliases.get(constraint.column, constraint.column)].append(
            {"op": OPERATOR_CODES[constraint.operator], "expr": constraint.value}
        )
    own = [column for column in table.all_columns if column.name not in aliases]
    wanted = None if context.columns is None else {aliases.get(name, name) for name in context.columns}
    used = [(number, column.name) for number, column in enumerate(own) if wanted is None or column.name in wanted]
    return compact(
        {
            "constraints": [
                {"name": column.name, "list": asked[column.name], "affinity": column.type} for column in own
            ],
            "colsUsed": [name for _, name in used],
            "colsUsedBitset": sum(1 << number for number, _ in used if number < 64),
        }
    )


def read_context(text: str) -> Context:
    """What a query wants, out of a manager's JSON; what cannot be read does not constrain."""
    try:
        members = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return Context()
    if not isinstance(members, dict):
        return Context()
    used = members.get("colsUsed")
    columns = frozenset(filter(_is_text, used)) if isinstance(used, list) and used else None
    return Context(tuple(_constraints(members.get("constraints")))[:MAX_CONSTRAINTS], columns)


def _constraints(entries: object) -> Iterable[Constraint]:
    for entry in entries if isinstance(entries, list) else ():
        found = entry.get("list") if isinstance(entry, dict) else None
        for one in found if isinstance(found, list) else ():
            if not isinstance(one, dict) or not _is_text(entry.get("name")):
                continue
            operator = _OPERATORS.get(_integer(str(one.get("op"))))
            if operator is not None:
                yield Constraint(entry["name"], operator, str(one.get("expr", "")))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def texts(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows as the wire takes them: every value text, NULL empty."""
    from osqbox.agent.functions import render

    return [{str(name): render(value) for name, value in row.items()} for row in rows]
