"""SQL over osquery's tables: APSW virtual tables filled by functions.

Every table of the schema exists; one without a source is empty. A source is asked once per query for each set of
constraints it understands, whatever the join: the rows stay in a snapshot that is indexed on demand, so equality
joins cost a lookup per row. A query never raises: what goes wrong is the result's status and message, in
SQLite's words, as osqueryd reports it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from osqbox.agent.functions import COLLATIONS, SqlError, SqlValue, compare_versions, functions, render
from osqbox.schema import Schema, Table, load_schema

if TYPE_CHECKING:
    import apsw

Row = Mapping[str, SqlValue]

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_ROWS = 250_000
MAX_RESULT_BYTES = 64 * 1024 * 1024
MAX_VALUE_BYTES = 16 * 1024 * 1024
SQLITE_HEAP_BYTES = 512 * 1024 * 1024
MAX_SQL_BYTES = 1024 * 1024
IDLE_CONNECTIONS = 4

_EQ, _LIKE, _GLOB = 2, 65, 66  # SQLITE_INDEX_CONSTRAINT_*
_OPERATORS = {_EQ: "=", _LIKE: "LIKE", _GLOB: "GLOB"}
_OVERFLOW_COLUMN = 63  # the last bit of colUsed stands for all columns from here on
_DEADLINE_EVERY_ROWS = 64
_DEADLINE_EVERY_STEPS = 5_000


# -- what a table source sees ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Constraint:
    column: str
    operator: str
    """``=``, ``LIKE`` or ``GLOB``."""
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


Tables = Mapping[str, TableSource]


def source(generate: Generate, *pushdown: str) -> TableSource:
    return TableSource(generate, frozenset(pushdown))


# -- what a query gives ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stats:
    """What a query cost, in the units of distributed write."""

    wall_time_ms: int = 0
    user_time: int = 0
    system_time: int = 0
    memory: int = 0
    """Bytes the process grew by."""


@dataclass(frozen=True)
class QueryResult:
    columns: tuple[str, ...] = ()
    """Names in select order."""
    typed_rows: list[dict[str, SqlValue]] = field(default_factory=list)
    """NULL is already the empty text; of columns with one name the last wins, as in osqueryd."""
    status: int = 0
    message: str = ""
    stats: Stats = Stats()
    warnings: tuple[str, ...] = ()
    event_based: bool = False
    """A table of events was read."""

    @functools.cached_property
    def rows(self) -> list[dict[str, str]]:
        """Every value as text, as osqueryd sends them."""
        return [{name: render(value) for name, value in row.items()} for row in self.typed_rows]


class Cancelled(Protocol):
    """A `threading.Event`, or anything that can say whether to stop."""

    def is_set(self) -> bool: ...


# -- the engine --------------------------------------------------------------------------------------------------


class Engine:
    """Answers SQL over ``tables``. Safe to call from several threads: each query has a connection to itself."""

    def __init__(self, tables: Tables | None = None, *, schema: Schema | None = None) -> None:
        self.tables: Tables = tables or {}
        self._schema = schema or load_schema()
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    def query(
        self,
        sql: str,
        *,
        tables: Tables | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_rows: int = DEFAULT_MAX_ROWS,
        cancelled: Cancelled | None = None,
    ) -> QueryResult:
        """Run every statement in ``sql``. ``tables`` replaces the engine's own for this query only."""
        run = _Run(self.tables if tables is None else tables, time.monotonic() + timeout_s, cancelled)
        with self._connection() as connection, _Meter() as meter:
            outcome = connection.execute(sql, run, max_rows, timeout_s)
        return QueryResult(**outcome, stats=meter.stats, warnings=tuple(run.warnings), event_based=run.event_based)

    def raw_rows(self, name: str, *, tables: Tables | None = None) -> list[dict[str, str]]:
        """A table's rows straight from its source, unknown keys included: what enrollment sends of a host.

        A source that fails has no rows.
        """
        found = (self.tables if tables is None else tables).get(name)
        if found is None:
            return []
        try:
            return [{k: render(v) for k, v in sorted(row.items())} for row in found.generate(Context())]
        except Exception:  # noqa: BLE001 - a source's bug must not stop an enrollment
            return []

    @contextlib.contextmanager
    def _connection(self) -> Iterator[_Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or _Connection(self._schema)
        try:
            yield connection
        finally:
            with self._lock:
                if len(self._idle) < IDLE_CONNECTIONS:
                    self._idle.append(connection)


class _Stopped(Exception):
    """A query reached its deadline or was cancelled while a source was at work."""


class _Run:
    """The state of one query: its tables, deadline and snapshots."""

    def __init__(self, tables: Tables, deadline: float, cancelled: Cancelled | None) -> None:
        self.tables = tables
        self.plans: list[_Plan] = []
        self.warnings: list[str] = []
        self.event_based = False
        self._deadline = deadline
        self._cancelled = cancelled
        self._snapshots: dict[tuple[str, tuple[Constraint, ...]], _Snapshot] = {}

    def over(self) -> bool:
        return time.monotonic() > self._deadline or (self._cancelled is not None and self._cancelled.is_set())

    def checkpoint(self) -> None:
        if self.over():
            raise _Stopped

    def warn(self, message: str) -> None:
        if message not in self.warnings and len(self.warnings) < 100:
            self.warnings.append(message)

    def snapshot(self, table: Table, constraints: tuple[Constraint, ...], used: frozenset[str]) -> _Snapshot:
        kept = self._snapshots.get((table.name, constraints))
        if kept is None or not used <= kept.columns:
            columns = used | kept.columns if kept else used
            context = Context(constraints, columns, self.warn, self.checkpoint)
            kept = _Snapshot(columns, self._generate(table, context))
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


class _Snapshot:
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
class _Plan:
    """What SQLite was promised for one use of a table: which constraint values it will pass, in which order."""

    used: frozenset[str]
    passed: tuple[tuple[int, str], ...]
    """Column number and operator of each value."""


def _to_integer(value: SqlValue) -> SqlValue:
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, (int, float)):
        return value
    try:
        return int(value)
    except ValueError:
        return None  # as upstream, which cannot cast it either


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
    "UNSIGNED BIGINT": _to_integer,
    "DOUBLE": _to_double,
}


# -- virtual tables ----------------------------------------------------------------------------------------------


class _Module:
    """A table's definition, as APSW asks for it."""

    def __init__(self, table: Table, connection: _Connection) -> None:
        self._table = table
        self._connection = connection

    def Connect(self, *_arguments: Any) -> tuple[str, _VirtualTable]:  # noqa: N802
        return self._table.ddl, _VirtualTable(self._table, self._connection)

    Create = Connect


class _VirtualTable:
    def __init__(self, table: Table, connection: _Connection) -> None:
        self.table = table
        self.connection = connection

    def BestIndexObject(self, info: apsw.IndexInfo) -> bool:  # noqa: N802
        """Take every equality, and LIKE or GLOB where the source can use it (virtual_table.cpp, xBestIndex)."""
        run, columns = self.connection.run, self.table.all_columns
        found = run.tables.get(self.table.name)
        pushdown = found.pushdown if found else frozenset[str]()
        passed: list[tuple[int, str]] = []
        cost = 1e6
        for number in range(info.nConstraint):
            column = info.get_aConstraint_iColumn(number)
            operator = _OPERATORS.get(info.get_aConstraint_op(number))
            if operator is None or column < 0 or not info.get_aConstraint_usable(number):
                continue
            cheap = columns[column].name in pushdown or columns[column].name in self.table.required
            if not cheap and operator != "=":
                continue
            if operator == "=" and info.get_aConstraint_collation(number) != "BINARY":
                continue
            passed.append((column, operator))
            info.set_aConstraintUsage_argvIndex(number, len(passed))
            cost = min(cost, 1.0 if cheap else 1000.0)
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
        run.plans.append(_Plan(used, tuple(passed)))
        return True

    def _lacks_required(self, passed: Iterable[tuple[int, str]]) -> bool:
        columns, required = self.table.all_columns, self.table.required
        return bool(required) and not any(columns[column].name in required for column, _ in passed)

    def Open(self) -> _Cursor:  # noqa: N802
        return _Cursor(self)

    def Disconnect(self) -> None:  # noqa: N802
        pass

    Destroy = Disconnect

    def scan(self, plan: _Plan, values: tuple[SqlValue, ...]) -> Sequence[tuple[SqlValue, ...]]:
        """The rows for one xFilter call."""
        import apsw

        run, table = self.connection.run, self.table
        if table.event_based:
            run.event_based = True
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


# -- connections -------------------------------------------------------------------------------------------------


class _Connection:
    """An in-memory database in which every table of the schema can be selected from and nothing be written."""

    def __init__(self, schema: Schema) -> None:
        import apsw

        apsw.hard_heap_limit(SQLITE_HEAP_BYTES)
        self.run = _Run({}, 0.0, None)
        self._db = apsw.Connection(":memory:", statementcachesize=0)
        self._db.limit(apsw.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        self._db.limit(apsw.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES)
        self._db.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
        for name, table in schema.names.items():
            module = cast("Any", _Module(table, self))  # ShadowName is for modules that keep tables
            self._db.create_module(
                name, module, use_bestindex_object=True, eponymous=True, eponymous_only=True, read_only=True
            )
        for (name, count), function in functions().items():
            self._db.create_scalar_function(name, function.call, count, deterministic=True)
        for name, rules in COLLATIONS.items():
            self._db.create_collation(name, functools.partial(compare_versions, rules=rules))
        self._db.set_authorizer(_authorize)
        self._db.set_progress_handler(self._over, _DEADLINE_EVERY_STEPS)

    def _over(self) -> bool:
        return self.run.over()

    def execute(self, sql: str, run: _Run, max_rows: int, timeout_s: float) -> dict[str, Any]:
        """The fields of a `QueryResult` that SQLite decides."""
        import apsw

        self.run = run
        columns: tuple[str, ...] = ()
        rows: list[dict[str, SqlValue]] = []
        try:
            if not sql.strip():
                raise SqlError("not an error")  # what sqlite3_errmsg says of a query without a statement
            size_bytes = 0
            cursor = self._db.cursor()
            for values in cursor.execute(sql):
                names = tuple(d[0] for d in cursor.get_description())
                columns = columns or names
                row = {name: "" if value is None else value for name, value in zip(names, values, strict=True)}
                size_bytes += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in values)
                if len(rows) >= max_rows or size_bytes > MAX_RESULT_BYTES:
                    raise SqlError(f"too many rows: more than {max_rows} or {MAX_RESULT_BYTES} bytes")
                rows.append(row)
        except (_Stopped, apsw.InterruptError):
            return _failed(f"interrupted: the query ran longer than {timeout_s:g} s")
        except (apsw.Error, SqlError) as error:
            return _failed(str(error))
        except Exception as error:  # noqa: BLE001 - a source's bug fails its query, never the agent
            return _failed(f"{type(error).__name__}: {error}")
        return {"columns": columns, "typed_rows": rows}


def _failed(message: str) -> dict[str, Any]:
    return {"status": 1, "message": message}


_READ_ONLY_PRAGMAS = frozenset({"table_info", "table_xinfo", "function_list", "collation_list"})


def _authorize(action: int, first: str | None, _b: str | None, _c: str | None, _d: str | None) -> int:
    """Reading only. Upstream also lets queries make tables in its memory (sqlite_util.h); nothing needs them.

    INSERT, UPDATE and DELETE pass as they do upstream: every table refuses them by name.
    """
    import apsw

    allowed = {
        *(apsw.SQLITE_READ, apsw.SQLITE_SELECT, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE),
        *(apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE),
    }
    pragma = action == apsw.SQLITE_PRAGMA and (first or "").lower() in _READ_ONLY_PRAGMAS
    return apsw.SQLITE_OK if action in allowed or pragma else apsw.SQLITE_DENY


class _Meter:
    """Wall and processor time of this thread, and growth of the process, over a ``with`` block."""

    stats = Stats()

    def __enter__(self) -> Self:
        self._wall, self._cpu, self._memory = time.monotonic(), _thread_times(), _resident_bytes()
        return self

    def __exit__(self, *_error: object) -> None:
        user, system = _thread_times()
        self.stats = Stats(
            wall_time_ms=int((time.monotonic() - self._wall) * 1000),
            user_time=int((user - self._cpu[0]) * 1000),
            system_time=int((system - self._cpu[1]) * 1000),
            memory=max(0, _resident_bytes() - self._memory),
        )


def _thread_times() -> tuple[float, float]:
    import resource

    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_utime, usage.ru_stime


def _resident_bytes() -> int:
    """0 where /proc does not say."""
    import os

    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - a hot path
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
