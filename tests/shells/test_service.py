"""Rows: secrets as digests only, each change audited and told in its own transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from sqlite_utils import Database

from osqbox import audit, feed
from osqbox.errors import Refused
from osqbox.shells import service, tables
from osqbox.shells.messages import EndReason, ShellBounds, State
from osqbox.shells.service import V1, Claim, End, Wish
from osqbox.store import Tx

START = 1_700_000_000.0


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    feed.create_tables(connection)
    for migrations in (audit.migrations, tables.migrations):
        migrations.apply(Database(connection))
    yield connection
    connection.close()


def asked(db: sqlite3.Connection, session: str = "s1", node: str = "n1", by: str = "alice") -> Any:
    wish = Wish(node, "default", "web-1", by, "why", 80, 24, None, None, True, False)
    return service.request(Tx(db, START), wish, ShellBounds(), lambda: session)


def offered(db: sqlite3.Connection, node: str = "n1", certificate: str | None = None) -> str:
    [offer] = service.offer(Tx(db, START), node, "default", certificate, 60, lambda: f"secret-of-{node}")
    return offer.secret


def test_no_secret_is_kept(db: sqlite3.Connection) -> None:
    asked(db)
    secret = offered(db)
    joined = service.join(Tx(db, START), Claim("s1", secret), V1, "resume-token")
    assert not isinstance(joined, Refused)
    dump = "\n".join(db.iterdump())
    assert secret not in dump
    assert "resume-token" not in dump


@pytest.mark.parametrize(
    ("claim", "later_s", "reason"),
    [
        (Claim("s1", "secret-of-n1"), 0, None),
        (Claim("s1", "secret-of-n1"), 60, None),
        (Claim("s1", "secret-of-n1"), 60.1, "expired_secret"),
        (Claim("s1", "wrong"), 0, "wrong_secret"),
        (Claim("s1", ""), 0, "wrong_secret"),
        (Claim("s1", None), 0, "no_secret"),
        (Claim("s1", None, "resume"), 0, "wrong_token"),
        (Claim("s1", "secret-of-n2"), 0, "foreign_session"),
        (Claim("s1", "secret-of-n1", node="n2"), 0, "foreign_node"),
        (Claim("s1", "secret-of-n1", node="n1"), 0, None),
        (Claim("s9", "secret-of-n1"), 0, "unknown_session"),
        (Claim("s1", "\ud800"), 0, "wrong_secret"),
    ],
)
def test_claims(db: sqlite3.Connection, claim: Claim, later_s: float, reason: str | None) -> None:
    asked(db, "s1")
    asked(db, "s2", "n2")
    offered(db, "n1")
    offered(db, "n2")
    refused = service.check(db, claim, START + later_s)
    assert (refused and refused.reason) == reason


def test_the_certificate_that_fetched_the_secret_must_use_it(db: sqlite3.Connection) -> None:
    asked(db)
    secret = offered(db, certificate="web-1.example")
    for certificate, reason in (("other", "foreign_node"), (None, "foreign_node"), ("web-1.example", None)):
        refused = service.check(db, Claim("s1", secret, certificate_name=certificate), START)
        assert (refused and refused.reason) == reason


def test_a_secret_is_good_once_and_a_token_until_the_next(db: sqlite3.Connection) -> None:
    asked(db)
    secret = offered(db)
    service.join(Tx(db, START), Claim("s1", secret), V1, "first")
    again = service.join(Tx(db, START), Claim("s1", secret), V1, "x")
    assert isinstance(again, Refused)
    assert again.reason == "used_secret"
    service.detach(Tx(db, START), "s1", 5)
    back = service.join(Tx(db, START), Claim("s1", None, "first"), V1, "second")
    assert not isinstance(back, Refused)
    assert (back.state, back.opened_at) == (State.OPEN, START)
    stale = service.join(Tx(db, START), Claim("s1", None, "first"), V1, "x")
    assert isinstance(stale, Refused)
    assert [row["result"] for row in audit.rows(db, action="shell.join")] == ["ok", "used_secret", "ok", "wrong_token"]


def test_an_end_is_told_once(db: sqlite3.Connection) -> None:
    asked(db)
    secret = offered(db)
    service.join(Tx(db, START), Claim("s1", secret), V1, "r")
    for reason in (EndReason.KILLED, EndReason.EXIT):
        service.end(Tx(db, START + 9), "s1", End(reason, "alice", None, 9), 100, 120, 40)
    found = service.find(db, "s1")
    assert found is not None
    assert (found.state, found.end_reason, found.signal, found.output_bytes) == (State.ENDED, "killed", 9, 100)
    kinds = [event.kind for event in feed.events_after(db, 0)]
    assert kinds == ["shell_requested", "shell_opened", "shell_ended"]
    refused = service.check(db, Claim("s1", None, "r"), START + 10)
    assert refused is not None
    assert refused.reason == "ended"
    assert audit.verify(db).broken_at is None


def test_listing(db: sqlite3.Connection) -> None:
    for number, node in enumerate(("n1", "n2", "n1")):
        asked(db, f"s{number}", node)
    assert {each.id for each in service.sessions(db, node="n1")} == {"s0", "s2"}
    assert service.sessions(db, states=("ended",)) == []
    assert len(service.sessions(db, tenant="default", limit=2)) == 2
    assert service.sessions(db, tenant="other") == []
