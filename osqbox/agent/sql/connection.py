"""An SQLite database in memory whose tables are osquery's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

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
from osqbox.agent.sql.program import expression_types
from osqbox.agent.sql.run import Run, Stopped
from osqbox.agent.sql.sources import Constraint, Context
from osqbox.agent.sql.virtual import Module
from osqbox.schema import Schema, Table

if TYPE_CHECKING:
    import apsw

MAX_RESULT_BYTES = 64 * 1024 * 1024
MAX_VALUE_BYTES = 16 * 1024 * 1024
SQLITE_HEAP_BYTES = 512 * 1024 * 1024
MAX_SQL_BYTES = 1024 * 1024
MAX_FUNCTION_PATHS = 10_000
_DEADLINE_EVERY_STEPS = 5_000
_SLOW_FUNCTIONS = frozenset({"regex_match", "regex_split"})


class Connection:
    """An in-memory database in which every table of the schema can be selected from and nothing be written."""

    def __init__(self, schema: Schema) -> None:
        import apsw

        apsw.hard_heap_limit(SQLITE_HEAP_BYTES)
        self.run = Run({}, 0.0, None)
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
        module = cast("Any", Module(table, self))  # ShadowName is for modules that keep tables
        self._db.create_module(
            name, module, use_bestindex_object=True, eponymous=True, eponymous_only=True, read_only=True
        )

    def _start(self, run: Run) -> None:
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

    def columns(self, sql: str, run: Run) -> list[tuple[str, str]]:
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
        kinds = expression_types(self._program(sql))
        return [(name, kind or kinds.get(at, "UNKNOWN")) for at, (name, kind) in enumerate(found)]

    def _program(self, sql: str) -> list[tuple[str, int, int, int]]:
        """Opcode, P1, P2 and P3 of each instruction of the first statement."""
        import apsw

        program: list[tuple[str, int, int, int]] = []
        with contextlib.suppress(apsw.Error):  # of a second statement, which nobody asked about
            for _, opcode, p1, p2, p3, *_rest in self._only_first(f"EXPLAIN {sql}"):
                program.append((opcode, p1, p2, p3))
        return program

    def execute(self, sql: str, run: Run, max_rows: int, timeout_s: float) -> dict[str, Any]:
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
        except (Stopped, apsw.InterruptError):
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
