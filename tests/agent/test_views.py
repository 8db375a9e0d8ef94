"""Views of a config: queries select from them, and they change and go with config updates."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import trio

from osqbox.agent.runner import run_agent
from osqbox.agent.sql import Context, Engine, QueryResult, Row, TableSource, source
from osqbox.agent.views import MAX_VIEWS, read_views, view_tables
from osqbox.schema import Column, Table
from osqbox.testing.handle import Osqbox

from .configured_host import ConfiguredHost, agent_options

TIMEOUT_S = 20


class Host(ConfiguredHost):
    """With a table of users, which tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Context] = []
        self.base: dict[str, TableSource] = {"users": source(self._users, "uid")}
        super().__init__(self.base)

    def _users(self, context: Context) -> Iterator[Row]:
        self.asked.append(context)
        yield {"uid": 0, "username": "root"}
        yield {"uid": 7, "username": "ada"}

    def apply(self, **config: Any) -> list[str]:
        return self.take_config(config)


@pytest.fixture
def host() -> Host:
    return Host()


def test_queries_select_from_a_view(host: Host) -> None:
    assert host.apply(views={"people": "select username, uid as number from users where uid > 0;\n"}) == []
    assert host.asked == []
    found = host.query("select * from people")
    assert (found.columns, found.rows) == (("username", "number"), [{"username": "ada", "number": "7"}])
    assert host.query("select count(*) as n from People join users on uid = number").rows == [{"n": "1"}]
    assert host.engine.columns("select * from people", tables=host.tables)[0] == [
        ("username", "TEXT"),
        ("number", "BIGINT"),
    ]


def test_constraints_reach_the_table_behind_a_view(host: Host) -> None:
    host.apply(views={"people": "select username, uid as number from users"})
    assert len(host.query("select * from people where number = 7").rows) == 1
    assert [context.equal_to("uid") for context in host.asked] == ["7"]


def test_a_view_may_use_another_in_any_order(host: Host) -> None:
    assert host.apply(views={"a": "select * from b", "b": "select uid from users"}) == []
    assert [row["uid"] for row in host.query("select * from a").rows] == ["0", "7"]


def test_an_update_changes_and_removes_views(host: Host) -> None:
    host.apply(views={"a": "select 1 as n", "b": "select 2 as n"})
    assert host.apply(views={"a": "select 3 as n"}) == []
    assert host.query("select * from a").rows == [{"n": "3"}]
    assert host.query("select * from b").message == "no such table: b"
    assert host.apply(options={}) == []  # without the key upstream leaves them alone
    assert host.query("select * from a").rows == [{"n": "3"}]
    host.apply(views={})
    assert host.query("select * from a").message == "no such table: a"


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("selec 1", 'near "selec": syntax error'),
        ("select * from nowhere", "no such table: nowhere"),
        ("select * from bad", "view bad is circularly defined"),
        ("select 1; drop view good", 'near ";": syntax error'),
        ("delete from users", 'near "delete": syntax error'),
        ("select 'open", "unrecognized token: \"'open"),
        ("users", 'near "users": syntax error'),
    ],
)
def test_bad_sql_is_a_warning_and_the_others_work(host: Host, sql: str, reason: str) -> None:
    config = {"views": {"bad": sql, "good": "select 1 as n"}}
    (warning,) = host.apply(**config)
    assert warning.startswith(f"Error creating view (bad): {reason}")
    assert host.query("select * from good").rows == [{"n": "1"}]
    assert host.query("select * from bad").status == 1
    assert host.apply(**config, options={"verbose": True}) == []  # told once
    assert host.apply(views={"bad": "select 2 as n"}) == []
    assert host.query("select * from bad").rows == [{"n": "2"}]


def test_a_view_can_neither_write_nor_run_a_second_statement(host: Host) -> None:
    sql = "select 1 as n); create table loot(x); select * from (select 2"
    host.apply(views={"sly": sql})
    assert host.query("select * from loot").message == "no such table: loot"
    assert host.query("create view mine as select 1").message == "not authorized"
    host.apply(views={"good": "select 1 as n"})
    assert host.query("drop view good").message == "not authorized"
    assert host.query("select * from good").rows == [{"n": "1"}]


def test_a_table_wins_over_a_view_of_its_name(host: Host) -> None:
    (warning,) = host.apply(views={"Users": "select 1 as n", "notes": "select 1 as n"})
    assert warning == "Error creating view (Users): there is a table of this name"
    assert len(host.query("select uid from users").rows) == 2
    assert host.query("select * from notes").rows == [{"n": "1"}]
    table = Table("notes", (Column("text", "TEXT"),))
    host.base["notes"] = TableSource(lambda _context: [{"text": "an extension's"}], definition=table)
    assert host.query("select * from notes").rows == [{"text": "an extension's"}]
    del host.base["notes"]
    assert host.query("select * from notes").rows == [{"n": "1"}]


def test_what_cannot_be_a_view_is_left_out() -> None:
    warnings: list[str] = []

    def read(*sources: Mapping[str, Any]) -> Mapping[str, str] | None:
        return read_views(sources, warnings.append)

    assert read({}, {"views": None}) is None
    assert read({"views": {"a": "select 1"}}, {"views": {"b": "select 2"}}, {}) == {"b": "select 2"}
    assert read({"views": {"a": "", "b": 1, "c": None, "D": "select 1"}}) == {"d": "select 1"}
    assert warnings == []
    assert read({"views": "select 1"}) is None
    assert read({"views": {'x" as select 1; --': "select 1", "sqlite_x": "select 1"}}) == {}
    assert len(warnings) == 3
    assert len(read({"views": {f"v{n}": "select 1" for n in range(MAX_VIEWS + 2)}}) or ()) == MAX_VIEWS


def test_a_view_sqlite_cannot_take_leaves_other_queries_alone() -> None:
    for sql in ("select '\ud800'", f"select '{'x' * 2_000_000}'", "select 1\0", "selec"):
        engine = Engine(view_tables({"bad": sql, "good": "select 1 as n"}))
        assert engine.query("select * from bad").message == "no such table: bad"
        assert engine.query("select * from good").rows == [{"n": "1"}]


def test_two_agents_on_one_engine_have_their_own_views(host: Host) -> None:
    other = Host()
    other.engine = host.engine
    host.apply(views={"v": "select 1 as n"})
    other.apply(views={"v": "select 2 as n"})
    wrong: list[QueryResult] = []

    def ask(agent: Host, expected: str) -> None:
        found = (agent.query("select n from v") for _ in range(50))
        wrong.extend(each for each in found if each.rows != [{"n": expected}])

    threads = [threading.Thread(target=ask, args=case) for case in ((host, "1"), (other, "2")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert wrong == []


def test_an_agent_of_a_real_box_has_the_views_of_its_config(osqbox: Osqbox) -> None:
    """Live and scheduled queries use them, the box gets the warning, and an update changes them."""
    names = {"v": "select version, 'first' as which from osquery_info", "bad": "select from"}
    schedule = {"seen": {"query": "select which from v", "interval": 1, "snapshot": True}}
    osqbox.config({"views": names, "schedule": schedule, "options": {"schedule_splay_percent": 0}})
    send, receive = trio.open_memory_channel[None](100)

    def on_event(kind: str, _facts: dict[str, Any]) -> None:
        if kind == "config":
            send.send_nowait(None)

    async def ask(sql: str) -> Any:
        return await trio.to_thread.run_sync(partial(osqbox.query, sql))

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(run_agent, agent_options(osqbox), on_event=on_event))
                await receive.receive()
                assert [row["which"] for row in await ask("select * from v")] == ["first"]
                for log_type in ("status", "result"):
                    await trio.to_thread.run_sync(partial(osqbox.wait_for, "log", log_type=log_type))
                config = {"views": {"v": "select 'second' as which"}}
                await trio.to_thread.run_sync(osqbox.config, config)
                await receive.receive()
                assert [row["which"] for row in await ask("select * from v")] == ["second"]
                nursery.cancel_scope.cancel()

    trio.run(main)
    said = [entry["line"]["message"] for entry in osqbox.logs(log_type="status")]
    assert 'Error creating view (bad): near "from": syntax error' in said
    assert osqbox.logs(log_type="result", name="seen")[0]["line"]["snapshot"] == [{"which": "first"}]
