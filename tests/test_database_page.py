"""docs/database.md is the schema: made from the database itself, and compared with it."""

from __future__ import annotations

import os
import re
import sqlite3
import textwrap
from contextlib import closing
from pathlib import Path

import trio

from osqbox.box import MIGRATIONS
from osqbox.clock import SystemClock
from osqbox.feed import Feed
from osqbox.store import Store

PAGE = Path(__file__).resolve().parent.parent / "docs" / "database.md"
HEAD = """# The database

Everything the box keeps is in one SQLite file, `osqbox.db` in the data directory. It may be read while the box runs,
with any SQLite tool: `sqlite3 -readonly osqbox.db "select hostname, last_seen_at from osquery_nodes"`. Only the box
writes it. Times are seconds since the epoch. Tables are prefixed by the system they belong to.

Retention drops what is beyond its bounds, oldest first, and counts it in `store_drops`: log lines
(`serve --keep-log-lines` and `--keep-log-mib`, 30 days), events (100,000), audit rows (1,000,000), ended campaigns
(10,000), carves (4 GiB in all), events of comms agents (1,000,000, and 4 GiB in all), their ended commands (200,000)
and the answers to their requests (24 hours).
"""


async def make_database(path: Path) -> None:
    store = Store.open(path, MIGRATIONS, SystemClock(), Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        await store.aclose()


def page_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite_%' "
            "AND name NOT IN (SELECT name FROM pragma_table_list WHERE type = 'shadow') ORDER BY name"
        ).fetchall()
    parts = [f"## {name}\n\n```sql\n{textwrap.dedent(' ' * 8 + sql).strip()}\n```\n" for name, sql in rows]
    return HEAD + "\n" + "\n".join(parts)


def test_the_page_shows_every_table_as_it_is(tmp_path: Path) -> None:
    """A changed table needs a changed page; OSQBOX_GOLDEN=write makes it."""
    trio.run(make_database, tmp_path / "osqbox.db")
    page = page_of(tmp_path / "osqbox.db")
    if os.environ.get("OSQBOX_GOLDEN") == "write":
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def test_every_column_says_what_it_is() -> None:
    """Columns whose name is not enough carry a comment: no table is without any."""
    tables = re.findall(r"^## (\w+)\n\n```sql\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(tables) > 10
    assert [name for name, sql in tables if "--" not in sql] == [
        "comms_event_words",
        "osquery_config_revision",
    ]
