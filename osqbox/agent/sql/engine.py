"""Queries from any thread, each on a connection to itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from osqbox.agent.functions import SqlError, render
from osqbox.agent.sql.connection import Connection
from osqbox.agent.sql.results import Meter, QueryResult
from osqbox.agent.sql.run import Cancelled, Run
from osqbox.agent.sql.sources import Context, Tables
from osqbox.schema import Schema, load_schema

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_ROWS = 250_000
IDLE_CONNECTIONS = 4


class Engine:
    """Answers SQL over ``tables``. Safe to call from several threads: each query has a connection to itself."""

    def __init__(self, tables: Tables | None = None, *, schema: Schema | None = None) -> None:
        self.tables: Tables = tables or {}
        self._schema = schema or load_schema()
        self._idle: list[Connection] = []
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
        run = Run(self.tables if tables is None else tables, time.monotonic() + timeout_s, cancelled)
        with self._connection() as connection, Meter() as meter:
            outcome = connection.execute(sql, run, max_rows, timeout_s)
        return QueryResult(**outcome, stats=meter.stats, warnings=tuple(run.warnings), event_based=run.event_based)

    def columns(self, sql: str, *, tables: Tables | None = None) -> tuple[list[tuple[str, str]], str]:
        """Name and type of each column of the first statement, or why it is refused. Runs nothing.

        The type of an expression is read from SQLite's program for it, as osqueryd does, and may be UNKNOWN.
        """
        import apsw

        run = Run(self.tables if tables is None else tables, time.monotonic() + DEFAULT_TIMEOUT_S, None)
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
    def _connection(self) -> Iterator[Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or Connection(self._schema)
        try:
            yield connection
        finally:
            with self._lock:
                if len(self._idle) < IDLE_CONNECTIONS:
                    self._idle.append(connection)
