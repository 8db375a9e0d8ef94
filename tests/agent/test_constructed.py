"""auto_table_construction: tables of a config, read from SQLite files of this machine."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.agent import constructed
from osqbox.agent.constructed import read_constructed
from osqbox.agent.messages import LINUX
from osqbox.agent.runner import Agent, run_agent
from osqbox.agent.sql import QueryResult, Tables
from osqbox.testing.handle import Osqbox

from .configured_host import ConfiguredHost, agent_options

TIMEOUT_S = 20


def make(path: Path, *rows: tuple[Any, ...], journal: str = "delete") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"PRAGMA journal_mode={journal}")
        db.execute("CREATE TABLE visits (url, count)")
        db.executemany("INSERT INTO visits VALUES (?, ?)", rows)


def entry(path: Path | str, **given: Any) -> dict[str, Any]:
    return {"query": "SELECT url, count FROM visits", "path": str(path), "columns": ["url", "count"], **given}


class Host(ConfiguredHost):
    def apply(self, tables: Mapping[str, Any] | None, **config: Any) -> list[str]:
        return self.take_config(config if tables is None else {**config, "auto_table_construction": tables})


@pytest.fixture
def host() -> Host:
    return Host()


def test_rows_come_from_every_file_that_matches(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "ada" / "History", ("a.example", 3), ("b.example", None))
    make(tmp_path / "bob" / "History", ("c.example", 1.5))
    (tmp_path / "eve").mkdir()
    for wildcard in "%*":
        assert host.apply({"visited": entry(tmp_path / wildcard / "History")}) == []
        found = host.query("select * from visited order by url")
        assert found.columns == ("path", "url", "count")
        assert [tuple(row.values()) for row in found.rows] == [
            (str(tmp_path / "ada" / "History"), "a.example", "3"),
            (str(tmp_path / "ada" / "History"), "b.example", ""),
            (str(tmp_path / "bob" / "History"), "c.example", "1.5"),
        ]
    assert host.query("select url from Visited where path like '%/bob/%'").rows == [{"url": "c.example"}]


def test_tables_change_and_go_with_the_config(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "one.db", ("a", 1))
    host.apply({"t": entry(tmp_path / "one.db"), "u": entry(tmp_path / "one.db")})
    host.apply({"t": entry(tmp_path / "one.db", query="select 7 as seven, url from visits", columns=["seven"])})
    assert host.query("select seven from t").rows == [{"seven": "7"}]
    assert host.query("select * from u").message == "no such table: u"
    host.apply(None)  # without the key upstream leaves them alone
    assert len(host.query("select * from t").rows) == 1
    host.apply({})
    assert host.query("select * from t").message == "no such table: t"


def test_a_view_may_use_such_a_table(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "one.db", ("a", 1))
    assert host.apply({"t": entry(tmp_path / "one.db")}, views={"v": "select url as site from t"}) == []
    assert host.query("select * from v").rows == [{"site": "a"}]


@pytest.mark.parametrize(
    "query",
    [
        "insert into visits values ('x', 1)",
        "attach '/etc/passwd' as other",
        "pragma journal_mode=wal",
        "drop table visits",
        "select 1; select 2",
        "selec",
        "",
    ],
)
def test_files_are_only_read(host: Host, tmp_path: Path, query: str) -> None:
    make(tmp_path / "one.db", ("a", 1))
    before = (tmp_path / "one.db").read_bytes()
    warnings = host.apply({"t": entry(tmp_path / "one.db", query=query)})
    found = host.query("select * from t")
    assert found.rows == []
    assert [*warnings, *found.warnings, found.message] != [""]
    assert [path.name for path in tmp_path.iterdir()] == ["one.db"]
    assert (tmp_path / "one.db").read_bytes() == before


def test_a_write_ahead_log_is_read_and_none_is_made(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "idle.db", ("idle", 1), journal="wal")
    with closing(sqlite3.connect(tmp_path / "live.db", isolation_level=None)) as db:
        make(tmp_path / "live.db", ("first", 1), journal="wal")
        db.execute("INSERT INTO visits VALUES ('logged', 2)")
        before = sorted(tmp_path.iterdir())
        host.apply({"t": entry(tmp_path / "%.db")})
        assert [row["url"] for row in host.query("select url from t").rows] == ["idle", "first", "logged"]
        assert sorted(tmp_path.iterdir()) == before


def test_files_that_cannot_be_read_are_warned_of(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "b.db", ("fine", 1))
    (tmp_path / "a.db").write_text("no database " * 1000)
    os.mkfifo(tmp_path / "c.db")
    (tmp_path / "d.db").mkdir()
    host.apply({"t": entry(tmp_path / "%")})
    found = host.query("select url from t")
    assert (found.status, found.rows) == (0, [{"url": "fine"}])
    (warning,) = found.warnings
    assert warning == f"ATC Table: Could not generate data: file is not a database for path {tmp_path / 'a.db'}"


def test_rows_and_time_are_bounded(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one.db")
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n) select {} from n"
    host.apply({"t": entry(tmp_path / "one.db", query=endless.format("count(*)"))})
    found = host.query("select * from t", timeout_s=0.2)
    assert (found.status, found.message) == (1, "interrupted: the query ran longer than 0.2 s")
    monkeypatch.setattr(constructed, "MAX_ROWS", 10)
    host.apply({"t": entry(tmp_path / "one.db", query=endless.format("x as url"))})
    found = host.query("select url from t")
    assert (len(found.rows), found.warnings) == (10, (f"ATC Table: t: over 10 rows or {64 * 1024**2} bytes",))


def test_what_cannot_be_a_table_is_told_of() -> None:
    warnings: list[str] = []

    def read(**tables: Any) -> Mapping[str, constructed.Constructed]:
        warnings.clear()
        return read_constructed([{"auto_table_construction": tables}], LINUX, warnings.append) or {}

    assert read(users=entry("/x"), t={"path": "/x"}, u={"query": "q"}, v=1) == {}
    assert [warning.split(" because ")[1] for warning in warnings] == [
        "it overrides a core table",
        *["it is misconfigured (missing query or path)"] * 2,
    ]
    assert read(t=entry("/x", platform="darwin")) == {}
    assert warnings == []
    assert list(read(t=entry("/x", platform="posix"))) == ["t"]
    found = read(t=entry("/x", columns=["a", "path", "A", 1, "b`", "c d"]))["t"]
    assert [column.name for column in found.table.columns] == ["path", "a", "c d"]
    assert len(warnings) == 4
    assert [column.name for column in read(t=entry("/x", columns=None))["t"].table.columns] == ["path"]
    assert read(**{"a(b)": entry("/x")}) == {}
    assert len(read(**{f"t{n}": entry("/x") for n in range(constructed.MAX_TABLES + 1)})) == constructed.MAX_TABLES
    assert read_constructed([{"auto_table_construction": "no"}], LINUX, warnings.append) is None


@pytest.mark.parametrize("tables", [None, {}])
def test_an_agent_shows_this_machines_files_only_as_this_machine(
    osqbox: Osqbox, tmp_path: Path, tables: Tables | None
) -> None:
    """``{}`` are the tables of a host that has none of this machine's."""
    make(tmp_path / "one.db", ("a.example", 3))
    osqbox.config({"auto_table_construction": {"visited": entry(tmp_path / "%.db")}})
    agents: list[Agent] = []

    @asynccontextmanager
    async def around(agent: Agent) -> AsyncIterator[None]:
        agents.append(agent)
        yield

    async def main() -> QueryResult:
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(run_agent, agent_options(osqbox), tables=tables, around=around))
                found = await agents[0].query("select url, count from visited")
                nursery.cancel_scope.cancel()
        return found

    found = trio.run(main)
    if tables is None:
        assert found.rows == [{"url": "a.example", "count": "3"}]
    else:
        assert (found.rows, found.message) == ([], "no such table: visited")
