"""The audit: append-only, chained, found out when tampered with."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest
from sqlite_utils import Database

from osqbox import audit
from osqbox.store import Tx


@pytest.fixture
def tx() -> Iterator[Tx]:
    db = sqlite3.connect(":memory:", isolation_level=None)
    audit.migrations.apply(Database(db))
    yield Tx(db, 1_700_000_000.25)
    db.close()


def fill(tx: Tx, count: int) -> None:
    for number in range(count):
        audit.record(tx, "default/alice", "job.run", f"id{number}", serial=0xABC, address="127.0.0.1", argv=["ls"])


def test_rows_tell_who_did_what_with_which_certificate(tx: Tx) -> None:
    audit.record(tx, "default/alice", "job.stop", "id1", "NOT_FOUND", serial=255, address="::1", signal=15)
    [row] = audit.rows(tx.db)
    assert row.pop("chain")
    assert row == {
        "seq": 1, "at": "2023-11-14T22:13:20.250000Z", "tenant": None, "actor": "default/alice", "serial": "ff",
        "address": "::1", "action": "job.stop", "subject": "id1", "result": "NOT_FOUND", "data": {"signal": 15},
    }  # fmt: skip


def test_rows_are_filtered_by_system_actor_and_subject(tx: Tx) -> None:
    fill(tx, 2)
    audit.record(tx, "operator", "shell.join", "s1")
    assert [row["subject"] for row in audit.rows(tx.db, action="job")] == ["id0", "id1"]
    assert [row["subject"] for row in audit.rows(tx.db, actor="operator")] == ["s1"]
    assert [row["seq"] for row in audit.rows(tx.db, subject="id1")] == [2]
    assert [row["seq"] for row in audit.rows(tx.db, after=1, limit=1)] == [2]


def test_the_chain_holds(tx: Tx) -> None:
    fill(tx, 5)
    assert audit.verify(tx.db) == audit.Verdict(5, None)


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'x' WHERE seq = 3", "DELETE FROM audit WHERE seq = 3"])
def test_a_change_is_refused(tx: Tx, change: str) -> None:
    fill(tx, 5)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tx.db.execute(change)


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'x' WHERE seq = 3", "DELETE FROM audit WHERE seq = 3"])
def test_a_change_on_purpose_is_found(tx: Tx, change: str) -> None:
    fill(tx, 5)
    for trigger in ("audit_no_update", "audit_no_delete"):
        tx.db.execute(f"DROP TRIGGER {trigger}")
    tx.db.execute(change)
    assert audit.verify(tx.db) == audit.Verdict(2, 3)


def test_retention_removes_the_oldest_and_the_chain_goes_on(tx: Tx) -> None:
    fill(tx, 5)
    assert audit.prune(tx, 2) == 3
    assert audit.prune(tx, 2) == 0
    fill(tx, 1)
    assert [row["seq"] for row in audit.rows(tx.db)] == [4, 5, 6]
    assert audit.verify(tx.db) == audit.Verdict(3, None)


def test_retention_of_everything_keeps_the_chain(tx: Tx) -> None:
    fill(tx, 3)
    assert audit.prune(tx, 0) == 3
    fill(tx, 1)
    assert audit.verify(tx.db) == audit.Verdict(1, None)
