"""SQL over osquery's tables: APSW virtual tables filled by functions.

Every table of the schema exists; one without a source is empty. A source is asked once per query for each set of
constraints it understands, whatever the join: the rows stay in a snapshot that is indexed on demand, so equality
joins cost a lookup per row. A query never raises: what goes wrong is the result's status and message, in
SQLite's words, as osqueryd reports it.
"""

from osqbox.agent.sql.connection import MAX_RESULT_BYTES, MAX_SQL_BYTES, MAX_VALUE_BYTES
from osqbox.agent.sql.engine import DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT_S, Engine
from osqbox.agent.sql.results import QueryResult, Stats
from osqbox.agent.sql.run import Cancelled
from osqbox.agent.sql.sources import OPERATOR_CODES, Constraint, Context, Generate, Row, Tables, TableSource, source

__all__ = [
    "DEFAULT_MAX_ROWS",
    "DEFAULT_TIMEOUT_S",
    "MAX_RESULT_BYTES",
    "MAX_SQL_BYTES",
    "MAX_VALUE_BYTES",
    "OPERATOR_CODES",
    "Cancelled",
    "Constraint",
    "Context",
    "Engine",
    "Generate",
    "QueryResult",
    "Row",
    "Stats",
    "TableSource",
    "Tables",
    "source",
]
