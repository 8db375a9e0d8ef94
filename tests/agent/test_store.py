"""What an agent remembers: the same in memory and in a file."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from osqbox.agent.store import FileStore, MemoryStore, Store
from osqbox.errors import BadSetup


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else FileStore(tmp_path / "agent")
    yield made
    made.close()


def test_put_get_delete_scan(store: Store) -> None:
    assert store.get("d", "k") is None
    store.put("d", "b", "1")
    store.put("d", "a", "2")
    store.put("d", "b", "3")
    store.put("other", "c", "4")
    assert store.get("d", "b") == "3"
    assert list(store.scan("d")) == [("a", "2"), ("b", "3")]
    store.delete("d", "a")
    store.delete("d", "never")
    assert list(store.scan("d")) == [("b", "3")]
    assert list(store.scan("nothing")) == []


def test_a_file_keeps_what_was_committed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("d", "k", "v")
    store.commit()
    store.put("d", "k2", "v2")
    store.close()
    again = FileStore(tmp_path)
    assert list(again.scan("d")) == [("k", "v"), ("k2", "v2")]
    again.close()
    assert stat.S_IMODE((tmp_path / "agent.db").stat().st_mode) == 0o600


def test_two_agents_cannot_share_a_directory(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(BadSetup, match=r"agent\.db"):
        FileStore(tmp_path)
    store.close()


def test_a_directory_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(BadSetup) as caught:
        FileStore(tmp_path / "x")
    assert caught.value.hint


def test_the_file_is_one_readable_table(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("configurations", "nodeKey", "k")
    store.close()
    database = sqlite3.connect(tmp_path / "agent.db")
    assert database.execute("select * from state").fetchall() == [("configurations", "nodeKey", "k")]
    database.close()
