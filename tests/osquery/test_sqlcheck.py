"""SQL is judged by the schema without being run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox.osquery.sources import load_sources
from osqbox.osquery.sqlcheck import SqlChecker, check_sql, validate
from osqbox.schema import Column, Schema, Table, load_schema

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def checker() -> SqlChecker:
    return SqlChecker()


def found(checker: SqlChecker, sql: str, *, linux: bool = True) -> list[str]:
    return [f"{problem.severity}: {problem.message}" for problem in checker.check(sql, linux=linux)]


def test_every_table_and_column_of_the_schema_is_known(checker: SqlChecker) -> None:
    for table in load_schema():
        columns = ", ".join(f"`{column.name}`" for column in table.all_columns)
        where = f" WHERE `{table.required[0]}` = 1" if table.required else ""
        for name in (table.name, *table.aliases):
            assert found(checker, f"SELECT {columns} FROM {name}{where}") == []


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        " -- first\n/* then */ select name from processes ; -- done",
        "SELECT 1;;",
        "VALUES (1)",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        'SELECT * FROM processes WHERE name = "bash"',
        "SELECT cgroup_path FROM processes",
        "SELECT p.name, f.path FROM processes p JOIN process_open_files f USING (pid)",
        "SELECT path, h.sha256 FROM file JOIN hash h USING (path) WHERE file.directory LIKE '/etc/%'",
        "SELECT h.sha256 FROM processes p LEFT JOIN hash h ON h.path = p.path",
        "SELECT * FROM file WHERE path IN (SELECT path FROM processes)",
        "SELECT * FROM file WHERE path = '/a' OR path = '/b'",
        "SELECT split(a, ',', 0), regex_match(a, 'x', 0), inet_aton(a), sha256(a), cot(1), pi() FROM (SELECT '1' a)",
        "SELECT version_compare('1', '2'), version_compare('1', '2', 'RHEL'), concat_ws(',', 1, 2, 3)",
        "SELECT '1.2' < '1.10' COLLATE version_dpkg",
        "SELECT json_extract('{}', '$.a'), unixepoch()",
    ],
)
def test_good_queries_have_no_problems(checker: SqlChecker, sql: str) -> None:
    assert found(checker, sql) == []


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("SELEC 1", 'error: near "SELEC": syntax error'),
        ("SELECT (1", "error: incomplete input"),
        ("SELECT * FROM proceses", "error: no such table: proceses; did you mean 'processes'?"),
        (
            "SELECT * FROM launchd",
            "error: no such table: launchd on Linux; a query for another system needs its platform beside it",
        ),
        ("SELECT pidd FROM processes", "error: no such column: pidd; did you mean 'pid'?"),
        ("SELECT p.nam FROM processes p", "error: no such column: p.nam; did you mean 'name'?"),
        ("SELECT nosuch(1)", "error: no such function: nosuch"),
        ("SELECT split('a')", "error: wrong number of arguments to function split()"),
        ("", "error: expected a SELECT, got nothing"),
        ("-- later", "error: expected a SELECT, got nothing"),
        ("SELECT 1; SELECT 2", "error: expected one statement, got another after it: SELECT 2"),
        ("SELECT 1; oops", "error: expected one statement, got another after it: oops"),
        ("SELECT ?", "error: expected a complete query, got one with parameters"),
        ("INSERT INTO time VALUES (1)", "error: expected a SELECT, got: INSERT INTO time VALUES (1)"),
        ("DELETE FROM processes", "error: expected a SELECT, got: DELETE FROM processes"),
        ("CREATE TABLE x (a)", "error: expected a SELECT, got: CREATE TABLE x (a)"),
        ("PRAGMA table_info(time)", "error: expected a SELECT, got: PRAGMA table_info(time)"),
        ("EXPLAIN SELECT 1", "error: expected a SELECT, got: EXPLAIN SELECT 1"),
        ("VACUUM", "error: expected a SELECT, got: VACUUM"),
        ("SAVEPOINT x", "error: expected a SELECT, got: SAVEPOINT x"),
        (
            "SELECT * FROM file",
            "warning: file returns no rows without a constraint on path or directory in the WHERE clause",
        ),
        (
            "SELECT * FROM processes, file",
            "warning: file returns no rows without a constraint on path or directory in the WHERE clause",
        ),
        (
            "SELECT * FROM file WHERE path > '/etc'",
            "warning: file returns no rows without a constraint on path or directory in the WHERE clause",
        ),
        (
            "SELECT * FROM file WHERE path = '/a' OR size = 1",
            "warning: file returns no rows without a constraint on path or directory in the WHERE clause",
        ),
        (
            "SELECT result FROM curl",
            "warning: curl returns no rows without a constraint on url in the WHERE clause",
        ),
    ],
)
def test_bad_queries_say_why(checker: SqlChecker, sql: str, problem: str) -> None:
    assert found(checker, sql) == [problem]


def test_a_query_is_never_run_and_leaves_nothing(checker: SqlChecker, tmp_path: Path) -> None:
    written = tmp_path / "written.db"
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    for sql in (f"ATTACH '{written}' AS w", f"SELECT 1; ATTACH '{written}' AS w", endless, f"SELECT 1; {endless}"):
        checker.check(sql)
    assert not written.exists()
    view = {"views": {"v": f"SELECT 1 AS a; ATTACH '{written}' AS w", "w": f"SELECT 1 AS a; {endless}"}}
    assert [problem.severity for problem in checker.check_config(view)] == ["error", "error"]
    assert not written.exists()
    assert found(checker, "SELECT * FROM v")[0].startswith("error: no such table: v")


def test_other_systems_tables_are_only_warned_about(checker: SqlChecker) -> None:
    message = "warning: not checked: the schema known here is Linux's (no such table: launchd)"
    assert found(checker, "SELECT * FROM launchd", linux=False) == [message]
    assert found(checker, "SELECT nope FROM processes", linux=False)[0].startswith("warning: not checked")
    assert found(checker, "SELECT FROM launchd", linux=False) == ['error: near "FROM": syntax error']


def test_a_schema_of_ones_own_can_be_used() -> None:
    schema = Schema({"my_table": Table("my_table", (Column("a", "TEXT"), Column("b", "INTEGER")), required=("b",))})
    assert check_sql("SELECT a FROM my_table WHERE b > 3", schema) == []
    assert [problem.severity for problem in check_sql("SELECT a FROM my_table WHERE a = 3", schema)] == ["warning"]
    assert [problem.severity for problem in check_sql("SELECT * FROM processes", schema)] == ["error"]


# --- whole configs


def problems(checker: SqlChecker, document: Any) -> list[str]:
    return [str(problem) for problem in validate(document, checker)]


BAD = "SELECT nope FROM time"


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"schedule": {"q": {"query": BAD}}}, "schedule.q.query"),
        ({"packs": {"p": {"queries": {"q": {"query": BAD}}}}}, "packs.p.queries.q.query"),
        ({"packs": {"p": {"queries": {}, "discovery": ["SELECT 1", BAD]}}}, "packs.p.discovery[1]"),
        ({"packs": {"p": {"queries": {}, "decorators": {"load": [BAD]}}}}, "packs.p.decorators.load[0]"),
        ({"decorators": {"load": [BAD]}}, "decorators.load[0]"),
        ({"decorators": {"always": [BAD]}}, "decorators.always[0]"),
        ({"decorators": {"interval": {"60": [BAD]}}}, "decorators.interval.60[0]"),
        ({"file_paths_query": {"c": [BAD]}}, "file_paths_query.c[0]"),
        ({"views": {"v": BAD}}, "views.v"),
    ],
)
def test_every_query_of_a_config_is_checked(checker: SqlChecker, document: Any, where: str) -> None:
    assert problems(checker, document) == [f"error: {where}: no such column: nope"]


def test_a_config_knows_its_own_views_and_tables_and_forgets_them(checker: SqlChecker) -> None:
    document = {
        "views": {"busy": "SELECT * FROM slow WHERE user_time > 1;", "slow": "SELECT * FROM processes"},
        "auto_table_construction": {
            "notes": {"query": "SELECT foreign_column FROM foreign_table", "path": "/x.db", "columns": ["title"]}
        },
        "schedule": {"q": {"query": "SELECT b.pid, n.title, n.path FROM busy b, notes n", "interval": 60}},
    }
    assert problems(checker, document) == []
    assert len(problems(checker, {"schedule": document["schedule"]})) == 1


def test_a_bad_view_is_told_once(checker: SqlChecker) -> None:
    for sql in ("SELEC 1", "SELECT 1; SELECT 2", "SELECT 1 AS a; ATTACH 'x' AS y", "", "'"):
        assert len(problems(checker, {"views": {"v": sql}})) == 1, sql


def test_what_a_config_makes_must_be_possible(checker: SqlChecker) -> None:
    table = {"query": "SELECT 1", "path": "/x.db"}
    document = {
        "views": {"processes": "SELECT 1", "a-b": "SELECT 1"},
        "auto_table_construction": {"time": {**table, "columns": []}, "t": {**table, "columns": ["a", "a"]}},
    }
    assert problems(checker, document) == [
        "error: auto_table_construction.time: osquery has a table of this name and keeps its own",
        "error: auto_table_construction.t: cannot be made: duplicate column name: a",
        "error: views.processes: osquery has a table of this name and keeps its own",
        'error: views.a-b: cannot be made: near "-": syntax error',
    ]


@pytest.mark.parametrize(
    ("pack", "entry", "severity"),
    [
        (None, None, "error"),
        (None, "linux", "error"),
        (None, "darwin", "warning"),
        (None, "windows", "warning"),
        (None, "darwin,linux", "error"),
        (None, "posix", "error"),
        ("darwin", None, "warning"),
        ("darwin", "any", "warning"),
        ("any", "windows", "warning"),
    ],
)
def test_the_platform_of_entry_and_pack_decides(
    checker: SqlChecker, pack: str | None, entry: str | None, severity: str
) -> None:
    query = {"query": "SELECT * FROM launchd", **({"platform": entry} if entry else {})}
    document = {"packs": {"p": {"queries": {"q": query}, **({"platform": pack} if pack else {})}}}
    assert [problem.severity for problem in validate(document, checker)] == [severity]


def test_the_shipped_fixtures_have_no_bad_sql(checker: SqlChecker) -> None:
    paths = sorted([*(FIXTURES / "configs").iterdir(), *(FIXTURES / "packs").iterdir()])
    said = [str(problem) for source in load_sources(paths) for problem in validate(source.content, checker)]
    assert [text for text in said if "not checked: the schema known here is Linux's" not in text] == []


any_json = st.recursive(
    st.none()
    | st.integers()
    | st.sampled_from(["SELECT 1", "SELECT * FROM file", "SELECT 1; x", "\x00", "'", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["schedule", "packs", "queries", "query", "discovery", "views", "columns", 'a"b']),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["schedule", "packs", "views", "auto_table_construction", "decorators"]), any_json)
)
def test_anything_can_be_validated(document: Any) -> None:
    checker = SqlChecker(Schema({name: load_schema()[name] for name in ("file", "time")}))
    for problem in validate(document, checker):
        assert problem.message
    assert checker.check("SELECT * FROM time") == []


@settings(deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="SELECT*FROM'\"/-;() \x00file", max_size=40))
def test_any_text_can_be_checked(sql: str) -> None:
    checker = SqlChecker(Schema({"file": load_schema()["file"]}))
    assert isinstance(checker.check(sql), list)


def test_a_query_takes_less_than_a_millisecond(checker: SqlChecker) -> None:
    sql = "SELECT p.name, f.path FROM processes p JOIN process_open_files f USING (pid) WHERE p.name = '{}'"
    checker.check(sql)
    took_s = []
    for batch in range(5):
        start = time.process_time()
        for n in range(40):
            checker.check(sql.format(batch * 40 + n))
        took_s.append((time.process_time() - start) / 40)
    assert min(took_s) < 0.001
