"""YARA rules: who gets which by a plain GET, and who by a key."""

from __future__ import annotations

from typing import Any

import pytest

from osqbox import tenants
from osqbox.errors import BadUsage, Refused
from osqbox.osquery import yara
from osqbox.tenants import TenantOptions

RULE = 'rule é { strings: $a = "x" condition: $a }'


@pytest.fixture
def two(world: Any) -> Any:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    world.ours, world.theirs = world.node("a"), world.node("b", enroll_secret="s")
    return world


def put(world: Any, tenant: str, name: str = "r.yar", content: str = RULE, *, public: bool = False) -> None:
    world.do(yara.put, tenant, name, content, public=public)


def absent(world: Any, node: Any, name: str = "r.yar") -> bool:
    with pytest.raises(Refused) as caught:
        yara.rule_for(world.db, name, node)
    return caught.value.reason == "rule_unknown"


def test_a_rule_is_for_the_nodes_of_its_tenant(two: Any) -> None:
    put(two, "default")
    assert yara.rule_for(two.db, "r.yar", two.ours) == RULE
    assert absent(two, two.theirs)
    assert absent(two, None)


def test_a_public_rule_is_for_everybody(two: Any) -> None:
    put(two, "acme", public=True)
    assert yara.rule_for(two.db, "r.yar", None) == yara.rule_for(two.db, "r.yar", two.ours) == RULE
    two.do(tenants.close, "acme")
    assert absent(two, None)


def test_a_tenants_own_rule_comes_first(two: Any) -> None:
    put(two, "acme", content="public", public=True)
    put(two, "default", content="mine")
    assert yara.rule_for(two.db, "r.yar", two.ours) == "mine"
    assert yara.rule_for(two.db, "r.yar", None) == "public"
    with pytest.raises(BadUsage, match="another tenant"):
        put(two, "default", public=True)


def test_rules_are_replaced_listed_and_deleted(two: Any) -> None:
    put(two, "default", content="old", public=True)
    put(two, "default", content="newer")
    assert yara.listing(two.db) == [
        {"name": "r.yar", "tenant": "default", "public": False, "bytes": 5, "updated_at": "2023-11-14T22:13:20.000000Z"}
    ]
    assert yara.listing(two.db, "acme") == []
    with pytest.raises(BadUsage, match="has no YARA rule"):
        two.do(yara.delete, "acme", "r.yar")
    two.do(yara.delete, "default", "r.yar")
    assert absent(two, two.ours)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 129, "é"])
def test_a_bad_name_is_refused(two: Any, name: str) -> None:
    with pytest.raises(BadUsage, match="rule name"):
        put(two, "default", name)


def test_a_rule_is_bounded_and_needs_its_tenant(two: Any) -> None:
    with pytest.raises(BadUsage, match="at most"):
        put(two, "default", content="x" * (yara.RULE_MAX_BYTES + 1))
    with pytest.raises(BadUsage, match="no tenant"):
        put(two, "nobody")
