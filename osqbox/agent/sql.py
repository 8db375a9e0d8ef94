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

from osqbox.agent.functions import (
    COLLATIONS,
    Scalar,
    SqlError,
    SqlValue,
    compare_versions,
    find_file_path_in_cmd,
    functions,
    is_path_deterministic,
    render,
)
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
MAX_FUNCTION_PATHS = 10_000

_EQ, _LIKE, _GLOB = 2, 65, 66  # SQLITE_INDEX_CONSTRAINT_*
_OPERATORS = {_EQ: "=", _LIKE: "LIKE", _GLOB: "GLOB"}
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
_ALL_OPERATORS = {code: operator for operator, code in OPERATOR_CODES.items()}
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1
_OVERFLOW_COLUMN = 63  # the last bit of colUsed stands for all columns from here on
_DEADLINE_EVERY_ROWS = 64
_DEADLINE_EVERY_STEPS = 5_000
_SLOW_FUNCTIONS = frozenset({"regex_match", "regex_split"})


# -- what a table source sees ------------------------------------------------------------------------------------


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

    def columns(self, sql: str, *, tables: Tables | None = None) -> tuple[list[tuple[str, str]], str]:
        """Name and type of each column of the first statement, or why it is refused. Runs nothing.

        The type of an expression is read from SQLite's program for it, as osqueryd does, and may be UNKNOWN.
        """
        import apsw

        run = _Run(self.tables if tables is None else tables, time.monotonic() + DEFAULT_TIMEOUT_S, None)
        try:
            with self._connection() as connection:
                return connection.columns(sql, run), ""
        except (apsw.Error, SqlError, UnicodeError) as error:
            return [], str(error)

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
        self.tables: Tables = dict(tables.items())
        """One set for the whole query, should extensions come or go meanwhile."""
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
        run.plans.append(_Plan(used, tuple(passed)))
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

    def scan(self, plan: _Plan, values: tuple[SqlValue, ...]) -> Sequence[tuple[SqlValue, ...]]:
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


# -- connections -------------------------------------------------------------------------------------------------


class _Connection:
    """An in-memory database in which every table of the schema can be selected from and nothing be written."""

    def __init__(self, schema: Schema) -> None:
        import apsw

        apsw.hard_heap_limit(SQLITE_HEAP_BYTES)
        self.run = _Run({}, 0.0, None)
        self.foreign: dict[str, Table] = {}
        """Tables that the schema does not have, as the last query found them."""
        self._views: dict[str, str] = {}
        """Name -> SQL, those that SQLite refused included."""
        self._known = schema.names
        self._db = apsw.Connection(":memory:", statementcachesize=0)
        self._db.limit(apsw.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        self._db.limit(apsw.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES)
        self._db.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
        for name, table in schema.names.items():
            self._offer(name, table)
        for (name, count), function in functions().items():
            call = self._in_time(function.call) if name in _SLOW_FUNCTIONS else function.call
            self._db.create_scalar_function(name, call, count, deterministic=True)
        self._db.create_aggregate_function("carve", self._carve, 1)
        for call in (find_file_path_in_cmd, is_path_deterministic):
            self._db.create_scalar_function(call.__name__, functools.partial(call, self._is_file), -1)
        for name, rules in COLLATIONS.items():
            self._db.create_collation(name, functools.partial(compare_versions, rules=rules))
        self._db.set_authorizer(_authorize)
        self._db.set_progress_handler(self._over, _DEADLINE_EVERY_STEPS)

    def _over(self) -> bool:
        return self.run.over()

    def _in_time(self, call: Scalar) -> Scalar:
        """Asks for the deadline before each call: SQLite itself asks only every few thousand steps."""

        def timed(*values: SqlValue) -> SqlValue:
            self.run.checkpoint()
            return call(*values)

        return timed

    def _is_file(self, path: str) -> bool:
        """Whether the host has this, and it is no directory, as its table of files says."""
        files = self.run.tables.get("file")
        if files is None or not path:
            return False
        context = Context((Constraint("path", "=", path),), checkpoint=self.run.checkpoint)
        return any(row.get("path") == path and row.get("type") != "directory" for row in files.generate(context))

    def _carve(self) -> tuple[list[str], Callable[..., None], Callable[[list[str]], str | None]]:
        """``carve(path)`` (sqlite_operations.cpp): an aggregate, so every path of a query is in one carve."""

        def step(paths: list[str], value: SqlValue) -> None:
            if value is not None and len(paths) < MAX_FUNCTION_PATHS:
                paths.append(render(value))

        def final(paths: list[str]) -> str | None:
            carves = self.run.tables.get("carves")
            if carves is None or carves.gather is None:
                return None
            return carves.gather(sorted(set(paths)), self.run.warn)

        return [], step, final

    def _offer(self, name: str, table: Table) -> None:
        module = cast("Any", _Module(table, self))  # ShadowName is for modules that keep tables
        self._db.create_module(
            name, module, use_bestindex_object=True, eponymous=True, eponymous_only=True, read_only=True
        )

    def _start(self, run: _Run) -> None:
        """Begin a query: its foreign tables and views appear, those of earlier queries go."""
        self.run = run
        wanted = {name: found.definition for name, found in run.tables.items() if found.definition is not None}
        self._define({name: found.view for name, found in run.tables.items() if found.view and name not in self._known})
        if wanted == self.foreign:
            return
        for name in self.foreign.keys() - wanted.keys():
            self._db.create_module(name, None)
        for name, table in wanted.items():
            self._offer(name, table)
        self.foreign = wanted

    def _define(self, views: Mapping[str, str]) -> None:
        if views == self._views:
            return
        self._db.set_authorizer(None)
        try:
            for name in [name for name, sql in self._views.items() if views.get(name) != sql]:
                self._db.execute(f'DROP VIEW IF EXISTS "{name}"')
                del self._views[name]
            for name in views.keys() - self._views.keys():
                self._create_view(name, views[name])
                self._views[name] = views[name]
        finally:
            self._db.set_authorizer(_authorize)

    def _create_view(self, name: str, sql: str) -> None:
        """One that SQLite refuses does not exist: the queries that want it say so."""
        import apsw

        with contextlib.suppress(apsw.SQLError, apsw.TooBigError, apsw.ExecTraceAbort, UnicodeError):
            self._only_first(f'CREATE VIEW "{name}" AS {sql}')

    def _only_first(self, sql: str) -> Any:
        """Execute the first statement; when a second one is about to start, raise ExecTraceAbort."""
        statements: list[str] = []

        def trace(_cursor: apsw.Cursor, statement: str, _bindings: object) -> bool:
            statements.append(statement)
            return len(statements) == 1

        cursor = self._db.cursor()
        cursor.exec_trace = trace
        return cursor.execute(sql)

    def columns(self, sql: str, run: _Run) -> list[tuple[str, str]]:
        import apsw

        found: list[tuple[str, str]] = []

        def describe(cursor: apsw.Cursor, _sql: str, _bindings: object) -> bool:
            found.extend((name, kind or "") for name, kind in cursor.get_description())
            return False

        self._start(run)
        cursor = self._db.cursor()
        cursor.exec_trace = describe
        with contextlib.suppress(apsw.ExecTraceAbort):
            cursor.execute(sql)
        if all(kind for _, kind in found):
            return found
        kinds = _expression_types(self._program(sql))
        return [(name, kind or kinds.get(at, "UNKNOWN")) for at, (name, kind) in enumerate(found)]

    def _program(self, sql: str) -> list[tuple[str, int, int, int]]:
        """Opcode, P1, P2 and P3 of each instruction of the first statement."""
        import apsw

        program: list[tuple[str, int, int, int]] = []
        with contextlib.suppress(apsw.Error):  # of a second statement, which nobody asked about
            for _, opcode, p1, p2, p3, *_rest in self._only_first(f"EXPLAIN {sql}"):
                program.append((opcode, p1, p2, p3))
        return program

    def execute(self, sql: str, run: _Run, max_rows: int, timeout_s: float) -> dict[str, Any]:
        """The fields of a `QueryResult` that SQLite decides."""
        import apsw

        columns: tuple[str, ...] = ()
        rows: list[dict[str, SqlValue]] = []
        try:
            self._start(run)
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


_REGISTER_TYPES: Mapping[str, tuple[int, str]] = {
    "Integer": (2, "INTEGER"),
    "Int64": (2, "BIGINT"),
    "Real": (2, "DOUBLE"),
    **dict.fromkeys(("String", "String8"), (2, "TEXT")),
    "Concat": (3, "TEXT"),
    **dict.fromkeys(("AggStep", "AggStep1"), (3, "BIGINT")),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Divide", "Remainder"), (3, "BIGINT")),
    **dict.fromkeys(("BitAnd", "BitOr", "ShiftLeft", "ShiftRight"), (3, "BIGINT")),
    **dict.fromkeys(("And", "Or"), (3, "INTEGER")),
}
"""Opcode -> which of its operands names the register it writes, and the type of what it writes there."""
_CASTS = {"A": "BLOB", "B": "TEXT", "C": "BIGINT", "D": "BIGINT", "E": "DOUBLE"}


def _expression_types(program: Iterable[tuple[str, int, int, int]]) -> dict[int, str]:
    """Types of the columns of a result by position, as far as the program tells (sqlite_util.cpp, applyTypes)."""
    registers: dict[int, str] = {}
    found: dict[int, str] = {}
    for opcode, *operands in program:
        p1, p2, p3 = operands
        if opcode == "ResultRow":
            found |= {at: registers[p1 + at] for at in range(p2) if p1 + at in registers}
        elif opcode in ("Copy", "SCopy"):
            count = p3 + 1 if opcode == "Copy" else 1
            registers |= {p2 + at: registers[p1 + at] for at in range(count) if p1 + at in registers}
        elif opcode == "Cast":
            registers[p1] = _CASTS.get(chr(p2), "BLOB")
        elif opcode in _REGISTER_TYPES:
            operand, kind = _REGISTER_TYPES[opcode]
            registers[operands[operand - 1]] = kind
    return found


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
