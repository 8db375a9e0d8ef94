"""One query at work: its tables, its deadline, and what its tables held when it read them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from osqbox.agent.functions import SqlValue, render
from osqbox.agent.sql.sources import Constraint, Context, Tables
from osqbox.schema import Table

_DEADLINE_EVERY_ROWS = 64
_MAX_WARNINGS = 100
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1


class Cancelled(Protocol):
    """A `threading.Event`, or anything that can say whether to stop."""

    def is_set(self) -> bool: ...


class Stopped(Exception):
    """A query reached its deadline or was cancelled while a source was at work."""


class Run:
    """The state of one query: its tables, deadline and snapshots."""

    def __init__(self, tables: Tables, deadline: float, cancelled: Cancelled | None) -> None:
        self.tables: Tables = dict(tables.items())
        """One set for the whole query, should extensions come or go meanwhile."""
        self.plans: list[Plan] = []
        self.warnings: list[str] = []
        self.event_based = False
        self._deadline = deadline
        self._cancelled = cancelled
        self._snapshots: dict[tuple[str, tuple[Constraint, ...]], Snapshot] = {}

    def over(self) -> bool:
        return time.monotonic() > self._deadline or (self._cancelled is not None and self._cancelled.is_set())

    def checkpoint(self) -> None:
        if self.over():
            raise Stopped

    def warn(self, message: str) -> None:
        if message not in self.warnings and len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(message)

    def snapshot(self, table: Table, constraints: tuple[Constraint, ...], used: frozenset[str]) -> Snapshot:
        kept = self._snapshots.get((table.name, constraints))
        if kept is None or not used <= kept.columns:
            columns = used | kept.columns if kept else used
            context = Context(constraints, columns, self.warn, self.checkpoint)
            kept = Snapshot(columns, self._generate(table, context))
            self._snapshots[table.name, constraints] = kept
        return kept

    def _generate(self, table: Table, context: Context) -> list[tuple[SqlValue, ...]]:
        found = self.tables.get(table.name)
        if found is None:
            return []
        columns = [(c.name, _COERCE[c.type]) for c in table.all_columns]
        rows: list[tuple[SqlValue, ...]] = []
        for number, row in enumerate(found.generate(context)):
            if number % _DEADLINE_EVERY_ROWS == 0:
                self.checkpoint()
            rows.append(tuple(coerce(row.get(name)) for name, coerce in columns))
        return rows


class Snapshot:
    """A table's rows for one set of constraints, indexed by a column when a query looks values up."""

    def __init__(self, columns: frozenset[str], rows: list[tuple[SqlValue, ...]]) -> None:
        self.columns = columns
        self.rows = rows
        self._indexes: dict[int, dict[SqlValue, list[tuple[SqlValue, ...]]]] = {}

    def equal(self, column: int, value: SqlValue) -> Sequence[tuple[SqlValue, ...]]:
        """At least the rows whose column equals ``value``; SQLite compares again."""
        if column not in self._indexes:
            index: dict[SqlValue, list[tuple[SqlValue, ...]]] = defaultdict(list)
            for row in self.rows:
                index[row[column]].append(row)
            self._indexes[column] = dict(index)
        return self._indexes[column].get(value, ())


@dataclass(frozen=True, slots=True)
class Plan:
    """What SQLite was promised for one use of a table: which constraint values it will pass, in which order."""

    used: frozenset[str]
    passed: tuple[tuple[int, str], ...]
    """Column number and operator of each value."""


def _to_integer(value: SqlValue) -> SqlValue:
    if value is None or isinstance(value, float):
        return value
    try:
        number = int(value)
    except ValueError:
        return None  # as upstream, which cannot cast it either
    return number if _MIN_INT64 <= number <= _MAX_INT64 else None


def _to_unsigned(value: SqlValue) -> SqlValue:
    """The upper half of the range is negative to SQLite, as it is upstream."""
    try:
        number = int(value) if isinstance(value, (int, str, bytes)) else 0
    except ValueError:
        return None
    return number - 2**64 if _MAX_INT64 < number < 2**64 else _to_integer(value)


def _to_text(value: SqlValue) -> SqlValue:
    if value is None:
        return None
    text = value if isinstance(value, str) else render(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _to_double(value: SqlValue) -> SqlValue:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


_COERCE: Mapping[str, Callable[[SqlValue], SqlValue]] = {
    "TEXT": _to_text,
    "INTEGER": _to_integer,
    "BIGINT": _to_integer,
    "UNSIGNED BIGINT": _to_unsigned,
    "DOUBLE": _to_double,
    "BLOB": _to_text,
}
