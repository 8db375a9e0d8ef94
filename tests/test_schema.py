"""The schema: every Linux table of osquery, as shipped, and the way to the data files."""

from __future__ import annotations

import json
import sqlite3

import pytest

from osqbox.errors import BadSetup
from osqbox.schema import Column, fixture_path, load_schema


def test_every_table_of_the_fixture_is_there_with_its_columns_in_order() -> None:
    raw = json.loads(fixture_path("osquery_schema.json").read_text(encoding="utf-8"))
    schema = load_schema()
    assert sorted(table.name for table in schema) == sorted(raw)
    assert len(schema) == 156
    for name, entry in raw.items():
        assert [[c.name, c.type] for c in schema[name].columns] == entry["columns"]
        assert [[c.name, c.type] for c in schema[name].hidden_columns] == entry.get("hidden_columns", [])


def test_facts_of_a_table() -> None:
    file = load_schema()["file"]
    assert file.columns[0] == Column("path", "TEXT")
    assert file.required == ("path", "directory")
    assert "linux" in file.platforms
    assert not file.event_based
    assert load_schema()["process_events"].event_based


def test_an_alias_names_its_table() -> None:
    schema = load_schema()
    assert schema["hosts"].name == "etc_hosts"
    assert "hosts" in schema
    assert "host" not in schema


def test_ddl_is_accepted_by_sqlite() -> None:
    """SQLite reads the type up to HIDDEN as a name, so every table's definition parses."""
    database = sqlite3.connect(":memory:")
    for table in load_schema():
        database.execute(table.ddl)
        columns = [row[1] for row in database.execute(f"pragma table_info('{table.name}')")]
        assert columns == [column.name for column in table.all_columns]
    database.close()


def test_the_schema_is_loaded_once() -> None:
    assert load_schema() is load_schema()


def test_a_missing_data_file_says_what_to_do() -> None:
    with pytest.raises(BadSetup, match=r"'nothing\.json' is missing") as caught:
        fixture_path("nothing.json")
    assert caught.value.hint
