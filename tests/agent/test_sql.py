"""The SQL engine over made-up tables: what it answers, what it asks the sources, how it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from osqbox.agent.sql import Constraint, Context, Engine, Row, source
from osqbox.schema import load_schema


class Sources:
    """Two tables that remember how they were asked."""

    def __init__(self) -> None:
        self.asked: list[Context] = []
        self.tables = {
            "processes": source(self.processes, "pid"),
            "users": source(self.users),
            "file": source(self.files, "path", "directory"),
        }

    def processes(self, context: Context) -> Iterator[Row]:
        self.asked.append(context)
        pids = context.integers("pid")
        for pid in range(100) if pids is None else pids:
            yield {"pid": pid, "name": f"p{pid}", "uid": str(pid % 3), "path": None}

    def users(self, context: Context) -> Iterator[Row]:
        self.asked.append(context)
        for uid in range(3):
            yield {"uid": uid, "username": f"user{uid}"}

    def files(self, context: Context) -> Iterator[Row]:
        self.asked.append(context)
        yield {"path": context.equal_to("path") or "/a/b", "directory": context.equal_to("directory") or "/a"}


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def engine(sources: Sources) -> Engine:
    return Engine(sources.tables)


@pytest.mark.parametrize("name", sorted(load_schema().names))
def test_every_table_and_alias_can_be_selected_from(name: str) -> None:
    table = load_schema()[name]
    conditions = " and ".join(f"{column} = '/x'" for column in table.required) or "1"
    result = Engine().query(f"select *, {table.all_columns[-1].name} from {name} where {conditions}")
    assert (result.status, result.message, result.rows) == (0, "", [])


def test_columns_come_in_select_order_and_as_text(engine: Engine) -> None:
    result = engine.query(
        "select name, pid, path, 1.0 as one, null as empty, x'6869' as blob from processes where pid=7"
    )
    assert result.columns == ("name", "pid", "path", "one", "empty", "blob")
    assert list(result.rows[0].items()) == [
        ("name", "p7"), ("pid", "7"), ("path", ""), ("one", "1.0"), ("empty", ""), ("blob", "hi"),
    ]  # fmt: skip
    assert result.typed_rows[0]["pid"] == 7


def test_select_star_leaves_hidden_columns_out(engine: Engine) -> None:
    result = engine.query("select * from processes where pid = 1")
    assert list(result.columns) == [column.name for column in load_schema()["processes"].columns]


ERRORS = [
    ("select * from foo", "no such table: foo"),
    ("selct", 'near "selct": syntax error'),
    ("select nope from processes", "no such column: nope"),
    ("select nope(1)", "no such function: nope"),
    ("select * from file", "constraint failed"),
    ("select * from", "incomplete input"),
    ("", "not an error"),
    ("attach 'x' as y", "not authorized"),
    ("create table x(a)", "not authorized"),
    ("insert into processes values (1)", "table processes may not be modified"),
    ("pragma journal_mode = wal", "not authorized"),
    ("pragma writable_schema = 1", "not authorized"),
    ("select split('a', '', 0)", "Invalid input to split function"),
    ("select load_extension('x')", "not authorized"),
    ("select zeroblob(100000000)", "string or blob too big"),
]


@pytest.mark.parametrize(("sql", "message"), ERRORS)
def test_errors_are_a_status_and_the_words_of_sqlite(engine: Engine, sql: str, message: str) -> None:
    result = engine.query(sql)
    assert (result.status, result.message, result.rows) == (1, message, [])


def test_a_required_column_that_is_missing_is_a_warning_too(engine: Engine, sources: Sources) -> None:
    result = engine.query("select * from file")
    assert result.warnings == ("Table file was queried without a required column in the WHERE clause",)
    assert sources.asked == []


def test_a_required_column_from_a_join_is_enough(engine: Engine) -> None:
    result = engine.query("select f.path from users u join file f on f.path = '/home/' || u.username")
    assert [row["path"] for row in result.rows] == ["/home/user0", "/home/user1", "/home/user2"]


def test_equality_and_in_are_pushed_down(engine: Engine, sources: Sources) -> None:
    assert engine.query("select name from processes where pid in (4, 5)").rows == [{"name": "p4"}, {"name": "p5"}]
    assert [context.constraints for context in sources.asked] == [
        (Constraint("pid", "=", "4"),),
        (Constraint("pid", "=", "5"),),
    ]


def test_like_is_pushed_down_where_the_source_wants_it(engine: Engine, sources: Sources) -> None:
    assert engine.query("select path from file where path like '/a/%'").status == 0
    assert sources.asked[0].like("path") == "/a/%"


def test_sources_learn_which_columns_are_read(engine: Engine, sources: Sources) -> None:
    engine.query("select name from processes where uid = 1")
    engine.query("select count(*) from processes")
    assert [context.columns for context in sources.asked] == [{"name", "uid"}, set()]


def test_a_join_asks_each_source_once(engine: Engine, sources: Sources) -> None:
    result = engine.query("select p.pid, u.username from processes p join users u using (uid) order by pid")
    assert len(result.rows) == 100
    assert result.rows[4] == {"pid": "4", "username": "user1"}
    assert len(sources.asked) == 2


@pytest.mark.parametrize(
    "condition",
    ["uid = 1", "uid = '1'", "uid = 1.0", "+uid = 1", "uid = x'31'", "name = 'p4'", "name = 'P4' collate nocase",
     "uid is 1", "pid = '4'", "pid > 97", "name in ('p4', 'p5')", "pid = 'x'", "uid = null", "pid = 4 and pid = 5"],
)  # fmt: skip
def test_lookups_agree_with_a_plain_table(engine: Engine, condition: str) -> None:
    """Whatever the engine indexes or pushes down, the rows are those of SQLite's own comparison."""
    import sqlite3

    plain = sqlite3.connect(":memory:")
    plain.execute("create table processes (pid BIGINT, name TEXT, uid BIGINT)")
    plain.executemany("insert into processes values (?,?,?)", [(n, f"p{n}", n % 3) for n in range(100)])
    expected = [str(row[0]) for row in plain.execute(f"select pid from processes where {condition} order by pid")]
    plain.close()
    result = engine.query(f"select pid from processes where {condition} order by pid")
    assert result.status == 0
    assert [row["pid"] for row in result.rows] == expected


def test_a_number_finds_text_of_the_same_looks() -> None:
    engine = Engine({"processes": source(lambda _c: [{"pid": 1, "name": "7"}, {"pid": 2, "name": "x"}])})
    assert engine.query("select pid from processes where name = 7").rows == [{"pid": "1"}]


def test_a_table_used_twice_has_the_columns_of_both_uses() -> None:
    def frugal(context: Context) -> Iterator[Row]:
        for pid in range(3):
            row: Row = {"pid": pid, "name": f"p{pid}"}
            yield {name: value for name, value in row.items() if context.wants(name)}

    engine = Engine({"processes": source(frugal)})
    sql = "select a.pid, b.name from processes a join processes b on a.pid = b.pid where a.pid > 0"
    assert engine.query(sql).rows == [{"pid": "1", "name": "p1"}, {"pid": "2", "name": "p2"}]


def test_a_runaway_query_is_stopped(engine: Engine) -> None:
    started = time.monotonic()
    result = engine.query(
        "with recursive c(x) as (select 1 union all select x+1 from c) select x from c where x < 0", timeout_s=0.1
    )
    assert result.status == 1
    assert result.message == "interrupted: the query ran longer than 0.1 s"
    assert time.monotonic() - started < 2


def test_a_source_that_never_ends_is_stopped() -> None:
    def endless(_context: Context) -> Iterator[Row]:
        while True:
            yield {"pid": 1}

    result = Engine({"processes": source(endless)}).query("select * from processes", timeout_s=0.1)
    assert result.message.startswith("interrupted")


def test_a_query_can_be_cancelled_from_outside(engine: Engine) -> None:
    cancelled = threading.Event()
    threading.Timer(0.05, cancelled.set).start()
    sql = "with recursive c(x) as (select 1 union all select x+1 from c) select x from c where x < 0"
    started = time.monotonic()
    assert engine.query(sql, timeout_s=30, cancelled=cancelled).status == 1
    assert time.monotonic() - started < 10


def test_too_many_rows_fail_the_query_instead_of_being_cut(engine: Engine) -> None:
    result = engine.query("select * from processes", max_rows=99)
    assert result.status == 1
    assert result.message.startswith("too many rows")
    assert engine.query("select * from processes", max_rows=100).status == 0


def test_a_bug_in_a_source_fails_its_query_only() -> None:
    def broken(_context: Context) -> Iterator[Row]:
        yield {"pid": 1}
        raise LookupError("oops")

    engine = Engine({"processes": source(broken)})
    assert engine.query("select * from processes").message == "LookupError: oops"
    assert engine.raw_rows("processes") == []
    assert engine.query("select 1 as one").rows == [{"one": "1"}]


def test_several_statements_run_in_order(engine: Engine) -> None:
    result = engine.query("select 1 as a; select 2 as b;")
    assert result.rows == [{"a": "1"}, {"b": "2"}]


def test_of_two_columns_with_one_name_the_last_wins(engine: Engine) -> None:
    assert engine.query("select 1 as a, 2 as a").rows == [{"a": "2"}]


def test_event_tables_are_marked(engine: Engine) -> None:
    assert engine.query("select * from process_events").event_based
    assert not engine.query("select * from processes").event_based


def test_values_that_are_not_of_the_columns_type() -> None:
    """Numbers that cannot be read are NULL, as upstream; text is text; lone surrogates are replaced."""
    rows: list[Row] = [{"pid": "12", "name": 7, "uid": "x", "path": "a\udcffb", "nice": True}]
    engine = Engine({"processes": source(lambda _c: rows)})
    result = engine.query("select pid, name, uid, path, nice, typeof(uid) as t from processes")
    assert result.rows == [{"pid": "12", "name": "7", "uid": "", "path": "a?b", "nice": "1", "t": "null"}]


def test_added_functions_and_collations_work_in_sql(engine: Engine) -> None:
    result = engine.query(
        "select md5('hello') as h, regex_match('ab12', '[0-9]+', 0) as n, floor(1.5) as f,"
        " '1.10' > '1.9' collate version as v, community_id_v1('1.2.3.4','5.6.7.8',1122,3344,6) as c"
    )
    assert result.rows == [
        {"h": "5d41402abc4b2a76b9719d911017c592", "n": "12", "f": "1", "v": "1", "c": "1:wCb3OG7yAFWelaUydu0D+125CLM="}
    ]


def test_one_engine_serves_many_hosts_and_threads(engine: Engine) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        tables = {"uptime": source(lambda _c: [{"days": number}])}
        for _ in range(20):
            answers[number] = engine.query("select days from uptime", tables=tables).rows[0]["days"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(8)}


def test_statistics_are_measured(engine: Engine) -> None:
    result = engine.query(
        "with recursive c(x) as (select 1 union all select x+1 from c limit 200000) select count(*) from c"
    )
    assert result.stats.wall_time_ms > 0
    assert result.stats.wall_time_ms < 60_000


EVENT_TABLES = [table.name for table in load_schema() if table.event_based]


@pytest.mark.parametrize("name", EVENT_TABLES)
def test_event_tables_answer_as_with_events_disabled(name: str) -> None:
    result = Engine().query(f"select * from {name}")
    assert (result.status, result.rows) == (0, [])
    assert result.warnings == (f"Table {name} is event-based but events are disabled",)


def test_many_slow_patterns_together_keep_to_the_querys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is within its own bound."""
    slow = "(with recursive c(n) as (select 1 union all select n + 1 from c where n < 1000) select n from c)"
    sql = f"select count(regex_match(substr('{'x' * 27}', 1, 24 + n % 3) || n || '!', '(x|xx)+$', 0)) as c from {slow}"
    started = time.monotonic()
    result = Engine().query(sql, timeout_s=0.5)
    assert result.status == 1
    assert result.message.startswith(("interrupted", "Regex took longer"))
    assert time.monotonic() - started < 4


# -- functions that look at the host -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("find_file_path_in_cmd('/bin/app --x')", "/bin/app"),
        ("find_file_path_in_cmd('  /bin/app')", "/bin/app"),
        ("find_file_path_in_cmd('/bin/my app --x')", "/bin/my"),
        ("""find_file_path_in_cmd('"/bin/my app" --x', 1)""", "/bin/my app"),
        (r"find_file_path_in_cmd('/bin/my\ app --x')", "/bin/my app"),
        ("find_file_path_in_cmd('/bin/my^ app --x', 0, '^')", "/bin/my app"),
        ("find_file_path_in_cmd('/bin')", ""),
        ("find_file_path_in_cmd('/nowhere -x')", ""),
        ("is_path_deterministic('/bin/app')", "1"),
        ("is_path_deterministic('/bin/my app')", "0"),
        ("""is_path_deterministic('"/bin/my app"', 1)""", "1"),
        ("is_path_deterministic('/nowhere')", "1"),
        (r"parent_directory('C:\a\b')", r"C:\a"),
        ("parent_directory('/a/b')", ""),
    ],
)
def test_what_a_command_would_run_is_looked_up_in_the_hosts_own_files(expression: str, value: str) -> None:
    kinds = {"/bin": "directory", "/bin/app": "regular", "/bin/my": "regular", "/bin/my app": "regular"}

    def files(context: Context) -> Iterator[Row]:
        path = context.equal_to("path")
        if path in kinds:
            yield {"path": path, "type": kinds[path]}

    result = Engine({"file": source(files, "path")}).query(f"select {expression} as x")
    assert (result.rows, result.message) == ([{"x": value}], "")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("find_file_path_in_cmd()", "Invalid inputs to find_binary_path_from_cmd"),
        ("find_file_path_in_cmd(null)", "Invalid inputs to find_binary_path_from_cmd"),
        ("find_file_path_in_cmd('a', 1, '^^')", "Invalid inputs to find_binary_path_from_cmd"),
        ("is_path_deterministic(null)", "Invalid inputs to is_path_deterministic"),
        ("parent_directory(1)", "Invalid inputs to parent_directory, TEXT was expected"),
    ],
)
def test_what_they_refuse(expression: str, message: str) -> None:
    result = Engine().query(f"select {expression}")
    assert (result.status, result.message) == (1, message)
