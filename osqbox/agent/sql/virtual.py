"""APSW virtual tables over table sources (osquery/sql/virtual_table.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from osqbox.agent.functions import SqlValue, render
from osqbox.agent.sql.run import Plan
from osqbox.agent.sql.sources import OPERATOR_CODES, Constraint
from osqbox.schema import Table

if TYPE_CHECKING:
    import apsw

    from osqbox.agent.sql.connection import Connection

_ALL_OPERATORS = {code: operator for operator, code in OPERATOR_CODES.items()}
_OPERATORS = {code: operator for code, operator in _ALL_OPERATORS.items() if operator in ("=", "LIKE", "GLOB")}
_OVERFLOW_COLUMN = 63  # the last bit of colUsed stands for all columns from here on


class Module:
    """A table's definition, as APSW asks for it."""

    def __init__(self, table: Table, connection: Connection) -> None:
        self._table = table
        self._connection = connection

    def Connect(self, *_arguments: Any) -> tuple[str, _VirtualTable]:  # noqa: N802
        return self._table.ddl, _VirtualTable(self._table, self._connection)

    Create = Connect


class _VirtualTable:
    def __init__(self, table: Table, connection: Connection) -> None:
        self.table = table
        self.connection = connection

    def BestIndexObject(self, info: apsw.IndexInfo) -> bool:  # noqa: N802
        """Take every equality, and LIKE or GLOB where the source can use it (virtual_table.cpp, xBestIndex)."""
        run, columns = self.connection.run, self.table.all_columns
        found = run.tables.get(self.table.name)
        pushdown = found.pushdown if found else frozenset[str]()
        operators = _ALL_OPERATORS if found and found.definition else _OPERATORS
        passed: list[tuple[int, str]] = []
        cost = 1e6
        for number in range(info.nConstraint):
            column = info.get_aConstraint_iColumn(number)
            operator = operators.get(info.get_aConstraint_op(number))
            if operator is None or column < 0 or not info.get_aConstraint_usable(number):
                continue
            cheap = columns[column].name in pushdown or columns[column].name in self.table.required
            if not cheap and operator != "=":
                continue
            if operator == "=" and info.get_aConstraint_collation(number) != "BINARY":
                continue
            passed.append((column, operator))
            info.set_aConstraintUsage_argvIndex(number, len(passed))
            cost = min(cost, self._lookup_cost(columns[column].name, cheap=cheap))
        used = frozenset(
            c.name
            for number, c in enumerate(columns)
            if number in info.colUsed or (number >= _OVERFLOW_COLUMN and _OVERFLOW_COLUMN in info.colUsed)
        )
        if self._lacks_required(passed):
            cost = 1e12
        info.estimatedCost = cost
        info.estimatedRows = max(1, int(cost // 100))
        info.idxNum = len(run.plans)
        run.plans.append(Plan(used, tuple(passed)))
        return True

    def _lookup_cost(self, column: str, *, cheap: bool) -> float:
        """An extension's table without an index costs a whole call: rather one than one per row of another table."""
        if self.table.name in self.connection.foreign and column not in self.table.index:
            return 5e5
        return 1.0 if cheap else 1000.0

    def _lacks_required(self, passed: Iterable[tuple[int, str]]) -> bool:
        columns, required = self.table.all_columns, self.table.required
        return bool(required) and not any(columns[column].name in required for column, _ in passed)

    def Open(self) -> _Cursor:  # noqa: N802
        return _Cursor(self)

    def Disconnect(self) -> None:  # noqa: N802
        pass

    Destroy = Disconnect

    def scan(self, plan: Plan, values: tuple[SqlValue, ...]) -> Sequence[tuple[SqlValue, ...]]:
        """The rows for one xFilter call."""
        import apsw

        run, table = self.connection.run, self.table
        run.event_based = run.event_based or table.event_based
        if table.event_based and self.table.name not in self.connection.foreign:
            run.warn(f"Table {table.name} is event-based but events are disabled")
        if self._lacks_required(plan.passed):
            run.warn(f"Table {table.name} was queried without a required column in the WHERE clause")
            raise apsw.ConstraintError("constraint failed")
        found = run.tables.get(table.name)
        if found is None:
            return ()
        constraints: list[Constraint] = []
        lookup: tuple[int, SqlValue] | None = None
        for (column, operator), value in zip(plan.passed, values, strict=True):
            definition = table.all_columns[column]
            if value is None and operator == "=":
                return ()
            if definition.name in found.pushdown or definition.name in table.required:
                constraints.append(Constraint(definition.name, operator, render(value)))
            elif operator == "=" and lookup is None:
                lookup = _lookup(column, definition.type, value)
        snapshot = run.snapshot(table, tuple(constraints), plan.used)
        return snapshot.rows if lookup is None else snapshot.equal(*lookup)


def _lookup(column: int, kind: str, value: SqlValue) -> tuple[int, SqlValue] | None:
    """The index key for ``column = value`` after the column's affinity; None when only SQLite can tell."""
    if kind == "TEXT" and isinstance(value, str):
        return column, value
    if kind != "TEXT" and isinstance(value, int):
        return column, value
    if kind in ("INTEGER", "BIGINT") and isinstance(value, str) and value.isascii() and value.isdigit():
        return column, int(value)
    return None


class _Cursor:
    def __init__(self, table: _VirtualTable) -> None:
        self._table = table
        self._rows: Sequence[tuple[SqlValue, ...]] = ()
        self._at = 0

    def Filter(self, number: int, _name: str | None, values: tuple[SqlValue, ...]) -> None:  # noqa: N802
        self._rows = self._table.scan(self._table.connection.run.plans[number], values)
        self._at = 0

    def Eof(self) -> bool:  # noqa: N802
        return self._at >= len(self._rows)

    def Rowid(self) -> int:  # noqa: N802
        return self._at

    def Column(self, number: int) -> SqlValue:  # noqa: N802
        return self._rows[self._at][number] if number >= 0 else self._at

    def Next(self) -> None:  # noqa: N802
        self._at += 1

    def Close(self) -> None:  # noqa: N802
        self._rows = ()
