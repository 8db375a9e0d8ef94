"""Tenants and their secrets: names, options, expiry, uses, and what is kept of a secret."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlite_utils import Database

from osqbox import feed, tenants
from osqbox.errors import BadUsage
from osqbox.store import Tx
from osqbox.tenants import TenantOptions

T0 = 1_700_000_000.0

Do = Callable[..., Any]


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    made = sqlite3.connect(":memory:", isolation_level=None)
    feed.create_tables(made)
    tenants.migrations.apply(Database(made))
    yield made
    made.close()


@pytest.fixture
def do(db: sqlite3.Connection) -> Do:
    return lambda work, *args, **named: work(Tx(db, T0), *args, **named)


@pytest.fixture
def acme(do: Do) -> str:
    do(tenants.create, "acme", TenantOptions())
    return "acme"


def test_a_tenant_is_found_with_its_options(db: sqlite3.Connection, do: Do) -> None:
    made = do(tenants.create, "acme", TenantOptions(open=True, approve=True, reenroll="refuse"))
    assert tenants.get(db, "acme") == tenants.find(db, "acme") == made
    assert made.as_json() == {
        "name": "acme",
        "open": True,
        "approve": True,
        "client_cert": False,
        "blank_keys": False,
        "reenroll": "refuse",
        "created_at": "2023-11-14T22:13:20.000000Z",
        "closed_at": None,
    }
    assert tenants.find(db, "other") is None


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a" * 64, "a/b", "a b", "é", "a\n"])
def test_a_bad_name_is_refused(db: sqlite3.Connection, do: Do, name: str) -> None:
    with pytest.raises(BadUsage, match="tenant name"):
        do(tenants.create, name, TenantOptions())
    assert tenants.all_tenants(db) == []


@pytest.mark.parametrize("name", ["a", "0", "a" * 63, "a.b_c-d"])
def test_a_good_name_is_taken(do: Do, name: str) -> None:
    assert do(tenants.create, name, TenantOptions()).name == name


def test_a_name_is_taken_once(do: Do, acme: str) -> None:
    with pytest.raises(BadUsage, match="exists already"):
        do(tenants.create, acme, TenantOptions())


def test_options_are_replaced(db: sqlite3.Connection, do: Do, acme: str) -> None:
    do(tenants.change, acme, TenantOptions(client_cert=True))
    assert tenants.get(db, acme).options == TenantOptions(client_cert=True)
    with pytest.raises(BadUsage, match="reenroll"):
        do(tenants.change, acme, TenantOptions(reenroll="whatever"))
    with pytest.raises(BadUsage, match="no tenant"):
        do(tenants.change, "nobody", TenantOptions())


def test_closing_keeps_the_name(db: sqlite3.Connection, do: Do, acme: str) -> None:
    do(tenants.close, acme)
    assert tenants.get(db, acme).closed_at == T0
    with pytest.raises(BadUsage, match="exists already"):
        do(tenants.create, acme, TenantOptions())
    do(tenants.create, tenants.DEFAULT, TenantOptions())
    with pytest.raises(BadUsage, match="always exists"):
        do(tenants.close, tenants.DEFAULT)


def test_a_secret_is_found_by_itself_only_and_kept_as_a_digest(db: sqlite3.Connection, do: Do, acme: str) -> None:
    made = do(tenants.add_secret, acme, "open sesame", label="door", tags=("web", "eu"), uses=2)
    assert tenants.find_secret(db, ["nonsense", "open sesame"]) == made
    assert tenants.find_secret(db, ["open sesame "]) is None
    assert tenants.find_secret(db, []) is None
    assert tenants.secrets_of(db, acme) == [made]
    assert made.as_json() == {
        "id": made.id, "tenant": "acme", "label": "door", "tags": ["web", "eu"],
        "expires_at": None, "uses_left": 2, "used": 0,
    }  # fmt: skip
    assert "sesame" not in "\n".join(db.iterdump())


def test_a_secret_chooses_one_tenant(do: Do, acme: str) -> None:
    do(tenants.create, "other", TenantOptions())
    do(tenants.add_secret, acme, "s")
    for tenant in (acme, "other"):
        with pytest.raises(BadUsage, match="in use already"):
            do(tenants.add_secret, tenant, "s")


@pytest.mark.parametrize(("secret", "more"), [("", {}), (" \n", {}), ("s", {"uses": 0}), ("s", {"uses": -1})])
def test_a_useless_secret_is_refused(do: Do, acme: str, secret: str, more: dict[str, Any]) -> None:
    with pytest.raises(BadUsage):
        do(tenants.add_secret, acme, secret, **more)


def test_a_secret_expires(do: Do, acme: str) -> None:
    secret = do(tenants.add_secret, acme, "s", expires_at=T0 + 10)
    assert tenants.why_unusable(secret, T0 + 9.9) is None
    assert "expired" in str(tenants.why_unusable(secret, T0 + 10))


def test_a_secret_is_used_up(db: sqlite3.Connection, do: Do, acme: str) -> None:
    do(tenants.add_secret, acme, "twice", uses=2)
    for left in (2, 1):
        secret = tenants.find_secret(db, ["twice"])
        assert secret is not None
        assert secret.uses_left == left
        assert tenants.why_unusable(secret, T0) is None
        do(tenants.use_secret, secret)
    spent = tenants.find_secret(db, ["twice"])
    assert spent is not None
    assert spent.used == 2
    assert "as often as it may" in str(tenants.why_unusable(spent, T0))


def test_an_unlimited_secret_counts_its_uses(db: sqlite3.Connection, do: Do, acme: str) -> None:
    secret = do(tenants.add_secret, acme, "s")
    for _ in range(3):
        do(tenants.use_secret, secret)
    found = tenants.secrets_of(db, acme)[0]
    assert (found.used, found.uses_left) == (3, None)


def test_a_secret_is_removed_from_its_own_tenant_only(db: sqlite3.Connection, do: Do, acme: str) -> None:
    do(tenants.create, "other", TenantOptions())
    secret = do(tenants.add_secret, acme, "s")
    with pytest.raises(BadUsage, match="has no secret"):
        do(tenants.remove_secret, "other", secret.id)
    do(tenants.remove_secret, acme, secret.id)
    assert tenants.secrets_of(db, acme) == []


def test_no_event_holds_a_secret(db: sqlite3.Connection, do: Do, acme: str) -> None:
    secret = do(tenants.add_secret, acme, "open sesame", label="door")
    do(tenants.remove_secret, acme, secret.id)
    events = feed.events_after(db, 0)
    assert [event.kind for event in events] == ["tenant_created", "secret_added", "secret_removed"]
    assert "sesame" not in str(events)


def test_the_digest_takes_what_a_command_line_may_hold() -> None:
    """Bytes that are no UTF-8 arrive from argv as surrogates."""
    assert tenants.digest("caf\udce9") != tenants.digest("café")
