"""Whether SQL means something to osquery, found without running it.

Every table of the schema is an empty virtual table in an in-memory SQLite, osquery's own functions and collations are
stubs, and a query is only prepared: SQLite itself reports syntax, unknown tables and columns, and its plan shows
whether a table that needs a column in the WHERE clause got one (xBestIndex in osquery/sql/virtual_table.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from osqbox.osquery.amalgamate import Path
from osqbox.osquery.structure import DEPTH_MAX, Problem, check
from osqbox.schema import Schema, Table, load_schema

if TYPE_CHECKING:
    import apsw

SQL_CHARS = 1024 * 1024
# osquery/sql/sqlite_{string,math,hashing,encoding,network,operations,filesystem}.cpp: the numbers of arguments a
# function takes, -1 for any.
_FUNCTIONS: Mapping[str, tuple[int, ...]] = {
    "acos": (1,),
    "asin": (1,),
    "atan": (1,),
    "carve": (1,),
    "ceil": (1,),
    "community_id_v1": (5, 6),
    "community_id_v1_strict": (5, 6),
    "concat": (-1,),
    "concat_ws": (-1,),
    "conditional_to_base64": (1,),
    "cos": (1,),
    "cot": (1,),
    "degrees": (1,),
    "exp": (1,),
    "find_file_path_in_cmd": (-1,),
    "floor": (1,),
    "from_base64": (1,),
    "in_cidr_block": (2,),
    "inet_aton": (1,),
    "is_path_deterministic": (-1,),
    "log": (1,),
    "log10": (1,),
    "md5": (1,),
    "parent_directory": (1,),
    "pi": (0,),
    "power": (2,),
    "radians": (1,),
    "regex_match": (3,),
    "regex_split": (3,),
    "sha1": (1,),
    "sha256": (1,),
    "sin": (1,),
    "split": (3,),
    "sqrt": (1,),
    "tan": (1,),
    "to_base64": (1,),
    "version_compare": (2, 3),
}
_COLLATIONS = ("version", "version_arch", "version_dpkg", "version_rhel")
_LINUX_WORDS = ("any", "all", "linux", "ubuntu", "centos", "posix")
_ORDERINGS = (4, 8, 16, 32)  # SQLITE_INDEX_CONSTRAINT_GT, LE, LT, GE: not asked of TEXT (sensibleComparison)
_UNMET = "unmet:"
_UNKNOWN = re.compile(r"no such (?P<what>table|column): (?P<name>.+)")
_SELECT = re.compile(r"(select|with|values)\b", re.IGNORECASE)
_BLANK = re.compile(r"(?:\s|;|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$))*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SqlProblem:
    severity: Literal["error", "warning"]
    message: str


def check_sql(sql: str, schema: Schema | None = None) -> list[SqlProblem]:
    """Problems of one query. For many queries make one `SqlChecker`, whose set-up this pays every time."""
    return SqlChecker(schema).check(sql)


def validate(content: Any, checker: SqlChecker | None = None) -> list[Problem]:
    """All that is wrong with a config: its structure and every query in it."""
    problems = check(content)
    if isinstance(content, dict):
        problems += (checker or SqlChecker()).check_config(content)
    return problems


class SqlChecker:
    """A reusable checker; well under a millisecond per query. Not for several threads at once."""

    def __init__(self, schema: Schema | None = None) -> None:
        import apsw

        self._schema = schema or load_schema()
        self._db = apsw.Connection(":memory:")
        for name, table in self._schema.names.items():
            module: Any = _Module(table)
            self._db.create_module(name, module, use_bestindex_object=True, eponymous=True, eponymous_only=True)
        for name, counts in _FUNCTIONS.items():
            for count in counts:
                self._db.create_scalar_function(name, _never_called, count)
        for name in _COLLATIONS:
            self._db.create_collation(name, _never_called)
        self._creating = False
        select = {apsw.SQLITE_SELECT, apsw.SQLITE_READ, apsw.SQLITE_FUNCTION, apsw.SQLITE_RECURSIVE}
        create = {apsw.SQLITE_CREATE_TEMP_TABLE, apsw.SQLITE_CREATE_TEMP_VIEW, apsw.SQLITE_SAVEPOINT}
        create |= select | {apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE}

        def authorize(action: int, *_details: Any) -> int:
            return apsw.SQLITE_OK if action in (create if self._creating else select) else apsw.SQLITE_DENY

        self._db.authorizer = authorize

    def check(self, sql: str, *, linux: bool = True) -> list[SqlProblem]:
        """Problems of one query; not for ``linux``, names the schema lacks are only warnings."""
        import apsw

        if len(sql) > SQL_CHARS:
            return [SqlProblem("error", f"expected at most {SQL_CHARS} characters, got {len(sql)}")]
        try:
            statement, rest = self._split(sql)
            if not statement:
                return [SqlProblem("error", "expected a SELECT, got nothing")]
            if rest:
                return [SqlProblem("error", f"expected one statement, got another after it: {_short(rest)}")]
            if not _SELECT.match(statement):
                return [_not_select(sql)]
            program = self._db.execute(f"EXPLAIN {statement}").fetchall()
        except apsw.AuthError:
            return [_not_select(sql)]
        except apsw.BindingsError:
            return [SqlProblem("error", "expected a complete query, got one with parameters")]
        except (apsw.Error, ValueError) as error:
            return [self._explain(str(error), sql, linux)]
        return [SqlProblem("warning", needs) for needs in _unmet(program)]

    def check_config(self, content: Mapping[str, Any]) -> list[Problem]:
        """Problems of every query of a config, in which the config's own views and tables are known."""
        problems: list[Problem] = []
        unmade: list[Problem] = []
        with self._own_tables(content, unmade):
            for path, sql, linux in _queries(content, (), linux=True):
                problems += [Problem(path, p.severity, p.message) for p in self.check(sql, linux=linux)]
        told = {problem.path for problem in problems}
        return [problem for problem in unmade if problem.path not in told] + problems

    def _split(self, sql: str) -> tuple[str, str]:
        """The first statement and what follows it, comments and lone semicolons aside; nothing is run."""
        import apsw

        prepared: list[str] = []

        def stop(_cursor: Any, statement: str, _bindings: Any) -> bool:
            prepared.append(statement)
            return False

        text = _strip(sql)
        cursor = self._db.cursor()
        cursor.exec_trace = stop
        with suppress(apsw.ExecTraceAbort):
            cursor.execute(text)
        statement = prepared[0] if prepared else text
        return statement, _strip(text[len(statement) :])

    def _explain(self, message: str, sql: str, linux: bool) -> SqlProblem:
        unknown = _UNKNOWN.fullmatch(message)
        if not unknown:
            return SqlProblem("error", message)
        if not linux:
            return SqlProblem("warning", f"not checked: the schema known here is Linux's ({message})")
        names = set(self._schema.names)
        if unknown["what"] == "column":
            used = names.intersection(re.findall(r"\w+", sql))
            names = {column.name for name in used for column in self._schema[name].all_columns}
        close = get_close_matches(unknown["name"].rpartition(".")[2], sorted(names), n=1, cutoff=0.7)
        if close:
            message += f"; did you mean {close[0]!r}?"
        elif unknown["what"] == "table":
            message += " on Linux; a query for another system needs its platform beside it"
        return SqlProblem("error", message)

    @contextmanager
    def _own_tables(self, content: Mapping[str, Any], problems: list[Problem]) -> Iterator[None]:
        """The tables and views that a config makes, for as long as it is checked."""
        self._run("SAVEPOINT own")
        try:
            for name, table in _object(content.get("auto_table_construction")).items():
                columns = _object(table).get("columns")
                names = ["path", *(c for c in columns if c != "path")] if isinstance(columns, list) else ["path"]
                self._make(("auto_table_construction", name), f"({', '.join(map(_quoted, names))})", problems)
            for name, sql in _object(content.get("views")).items():
                if isinstance(sql, str) and sql.strip():
                    self._make(("views", name), f" AS {_strip(sql)}", problems)
            yield
        finally:
            self._run("ROLLBACK TO own")
            self._run("RELEASE own")

    def _make(self, path: Path, definition: str, problems: list[Problem]) -> None:
        import apsw

        name = str(path[1])
        if name in self._schema:
            problems.append(Problem(path, "error", "osquery has a table of this name and keeps its own"))
            return
        try:
            # osquery pastes a view's name into its statement unquoted (plugins/config/parsers/views.cpp).
            what = f"VIEW {name}" if path[0] == "views" else f"TABLE {_quoted(name)}"
            self._run(f"CREATE TEMP {what}{definition}")
        except (apsw.Error, ValueError) as error:
            problems.append(Problem(path, "error", f"cannot be made: {error}"))

    def _run(self, statement: str) -> None:
        """Run one statement that makes or drops our own tables, and nothing that may be hidden behind it."""
        import apsw

        cursor = self._db.cursor()
        ran: list[str] = []

        def only_first(_cursor: Any, text: str, _bindings: Any) -> bool:
            ran.append(text)
            return len(ran) == 1

        cursor.exec_trace = only_first
        self._creating = True
        try:
            with suppress(apsw.ExecTraceAbort, apsw.AuthError):  # both concern a second statement
                cursor.execute(statement)
        finally:
            self._creating = False


class _Module:
    """A table of the schema as SQLite sees it: columns and no rows."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._required = {
            index: column.type for index, column in enumerate(table.all_columns) if column.name in table.required
        }

    def Connect(self, *_names: Any) -> tuple[str, _Module]:  # noqa: N802 - SQLite's name
        return self._table.ddl, self

    def BestIndexObject(self, plan: apsw.IndexInfo) -> bool:  # noqa: N802 - SQLite's name
        """Use every constraint on a required column, and write into the plan when there is none."""
        used = 0
        for index in range(plan.nConstraint):
            if plan.get_aConstraint_usable(index) and self._is_met_by(plan, index):
                used += 1
                plan.set_aConstraintUsage_argvIndex(index, used)
        unmet = bool(self._required) and not used
        plan.estimatedCost = 1e12 if unmet else 1.0 if used else 1e3
        plan.idxStr = _UNMET + self._table.name + ":" + " or ".join(self._table.required) if unmet else ""
        return True

    def _is_met_by(self, plan: apsw.IndexInfo, index: int) -> bool:
        kind = self._required.get(plan.get_aConstraint_iColumn(index))
        return kind is not None and not (kind == "TEXT" and plan.get_aConstraint_op(index) in _ORDERINGS)

    def Disconnect(self) -> None:  # noqa: N802 - SQLite's name
        return

    Destroy = Disconnect


def _unmet(program: list[Any]) -> Iterator[str]:
    """Tables that the chosen plan reads without a column they need, once each."""
    plans = {str(row[5]): None for row in program if row[1] == "VFilter"}
    for plan in plans:
        if plan.startswith(_UNMET):
            table, _, columns = plan.removeprefix(_UNMET).partition(":")
            yield f"{table} returns no rows without a constraint on {columns} in the WHERE clause"


def _queries(content: Mapping[str, Any], path: Path, *, linux: bool) -> Iterator[tuple[Path, str, bool]]:
    """Every query of a config or a pack, where it stands, and whether it can run on Linux."""
    for key in ("schedule", "queries"):
        for name, entry in _object(content.get(key)).items():
            runs = linux and _runs_on_linux(_object(entry).get("platform"))
            yield from _strings(_object(entry).get("query"), (*path, key, name, "query"), runs)
    for name, pack in _object(content.get("packs")).items():
        runs = _runs_on_linux(_object(pack).get("platform"))
        yield from _queries(_object(pack), (*path, "packs", name), linux=runs)
    for key in ("discovery", "decorators", "file_paths_query", "views"):
        yield from _strings(content.get(key), (*path, key), linux)


def _strings(value: Any, path: Path, linux: bool) -> Iterator[tuple[Path, str, bool]]:
    if isinstance(value, str):
        if value.strip():  # the structural check speaks of the others
            yield path, value, linux
        return
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members if len(path) < DEPTH_MAX else ():
        yield from _strings(member, (*path, key), linux)


def _runs_on_linux(platform: Any) -> bool:
    """checkPlatform of osquery/core/system.cpp, which looks for words anywhere in the text."""
    if not isinstance(platform, str) or platform in ("", "null"):
        return True
    return any(word in platform for word in _LINUX_WORDS)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _strip(sql: str) -> str:
    blank = _BLANK.match(sql)
    return sql[blank.end() if blank else 0 :]


def _not_select(sql: str) -> SqlProblem:
    return SqlProblem("error", f"expected a SELECT, got: {_short(sql)}")


def _short(sql: str) -> str:
    text = " ".join(_strip(sql).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _quoted(name: Any) -> str:
    return '"' + str(name).replace('"', '""') + '"'


def _never_called(*_arguments: Any) -> int:
    return 0
