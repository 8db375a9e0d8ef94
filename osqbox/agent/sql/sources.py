"""What a table source sees of a query, and what a table is to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from osqbox.agent.functions import SqlValue
from osqbox.schema import Table

Row = Mapping[str, SqlValue]

OPERATOR_CODES: Mapping[str, int] = {
    "=": 2,
    ">": 4,
    "<=": 8,
    "<": 16,
    ">=": 32,
    "MATCH": 64,
    "LIKE": 65,
    "GLOB": 66,
    "REGEXP": 67,
}
"""SQLite's numbers, which are also those of osquery's extension API."""


@dataclass(frozen=True, slots=True)
class Constraint:
    column: str
    operator: str
    """``=``, ``LIKE`` or ``GLOB``; for a table of an extension any of `OPERATOR_CODES`."""
    value: str
    """As text, whatever the query wrote."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a query wants of a table. A source may ignore all of it: SQLite filters again."""

    constraints: tuple[Constraint, ...] = ()
    columns: frozenset[str] | None = None
    """Those the query reads; None is all. A source may leave the others out."""
    warn: Callable[[str], None] = lambda _message: None
    """Writes a warning into the agent's status log."""
    checkpoint: Callable[[], None] = lambda: None
    """To be called in long searches: raises when the query is over its time."""

    def equal_to(self, column: str) -> str | None:
        """The value the column must equal, or None when the query does not say."""
        return next((c.value for c in self.constraints if c.column == column and c.operator == "="), None)

    def like(self, column: str) -> str | None:
        return next((c.value for c in self.constraints if c.column == column and c.operator == "LIKE"), None)

    def integers(self, column: str) -> tuple[int, ...] | None:
        """The one integer the column must equal, () when it equals something else, None when unconstrained."""
        value = self.equal_to(column)
        if value is None:
            return None
        try:
            return (int(value),)
        except ValueError:
            return ()

    def wants(self, *columns: str) -> bool:
        """Whether the query reads any of these."""
        return self.columns is None or not self.columns.isdisjoint(columns)


Generate = Callable[[Context], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class TableSource:
    """Where a table's rows come from."""

    generate: Generate
    pushdown: frozenset[str] = frozenset()
    """Columns whose constraints ``generate`` makes use of."""
    gather: Callable[[Sequence[str], Callable[[str], None]], str] | None = None
    """What the table's SQL function does with a query's values, and where it warns; only ``carves`` has one."""
    definition: Table | None = None
    """Of a table that the schema does not have: one that an extension registered."""
    view: str = ""
    """The SELECT of a view: then there is no table, and nothing generates."""


Tables = Mapping[str, TableSource]


def source(generate: Generate, *pushdown: str) -> TableSource:
    return TableSource(generate, frozenset(pushdown))
