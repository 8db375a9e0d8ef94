"""Config sources: versions, rollback, targets, and one stable text for each node."""

from __future__ import annotations

import json
from typing import Any

import pytest

from osqbox import tenants
from osqbox.errors import BadUsage
from osqbox.osquery import configs, nodes
from osqbox.osquery.amalgamate import Source, Target
from osqbox.tenants import TenantOptions


def schedule(**queries: str) -> dict[str, Any]:
    return {"schedule": {name: {"query": sql, "interval": 60} for name, sql in queries.items()}}


def put(world: Any, name: str, content: dict[str, Any], **more: Any) -> int:
    version: int = world.do(configs.put, Source(name, content, **more), "test")
    return version


def served(world: Any, node: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(configs.config_for(world.db, node).text)
    return config


def test_a_node_gets_the_sources_put_together(world: Any) -> None:
    node = world.node()
    put(world, "base", schedule(a="select 1"))
    put(world, "more", schedule(b="select 2"))
    assert set(served(world, node)["schedule"]) == {"a", "b"}


def test_equal_content_is_equal_text_whatever_the_order(world: Any) -> None:
    """osqueryd hashes the text it got: another order would rebuild its schedule."""
    node = world.node()
    assert put(world, "c", {**schedule(b="select 2", a="select 1"), "options": {"z": 1, "a": 2}}) == 1
    before = configs.config_for(world.db, node).text
    revision = configs.revision(world.db)
    assert put(world, "c", {"options": {"a": 2, "z": 1}, **schedule(a="select 1", b="select 2")}) == 1
    assert configs.revision(world.db) == revision
    assert configs.config_for(world.db, node).text == before


def test_every_change_is_a_version_and_a_revision(world: Any) -> None:
    revisions = [configs.revision(world.db)]
    for number, more in enumerate(({}, {"priority": 3}, {"target": Target(tags=("web",))}), 1):
        assert put(world, "c", schedule(a="select 1"), **more) == number
        revisions.append(configs.revision(world.db))
    assert revisions == sorted(set(revisions))
    assert [version["version"] for version in configs.versions(world.db, "c")] == [3, 2, 1]
    assert [version["current"] for version in configs.versions(world.db, "c")] == [True, False, False]
    assert [event.data["version"] for event in world.events if event.kind == "config_changed"] == [1, 2, 3]


def test_a_rollback_serves_the_version_before_as_a_new_one(world: Any) -> None:
    node = world.node()
    for number in (1, 2, 3):
        put(world, "c", schedule(a=f"select {number}"))
    assert world.do(configs.rollback, "c") == 4
    assert served(world, node)["schedule"]["a"]["query"] == "select 2"
    assert world.do(configs.rollback, "c", 1) == 5
    assert served(world, node)["schedule"]["a"]["query"] == "select 1"
    (listed,) = configs.listing(world.db)
    assert (listed["version"], listed["note"]) == (5, "rolled back to version 1")


def test_a_rollback_brings_back_target_and_priority(world: Any) -> None:
    put(world, "c", schedule(a="select 1"), priority=7, target=Target(tags=("web",)))
    put(world, "c", schedule(a="select 1"))
    world.do(configs.rollback, "c")
    (source,) = configs.sources(world.db)
    assert (source.priority, source.target) == (7, Target(tags=("web",)))


@pytest.mark.parametrize(("name", "to"), [("c", None), ("c", 1), ("c", 9), ("other", None)])
def test_a_rollback_to_nothing_is_refused(world: Any, name: str, to: int | None) -> None:
    put(world, "c", schedule(a="select 1"))
    with pytest.raises(BadUsage):
        world.do(configs.rollback, name, to)


def test_a_removed_source_is_served_no_more_but_can_come_back(world: Any) -> None:
    node = world.node()
    put(world, "c", schedule(a="select 1"))
    world.do(configs.remove, "c")
    world.do(configs.remove, "c")
    assert served(world, node) == {}
    assert configs.listing(world.db)[0]["removed"] is True
    world.do(configs.rollback, "c")
    assert "a" in served(world, node)["schedule"]
    with pytest.raises(BadUsage, match="no config source"):
        world.do(configs.remove, "other")


def test_versions_are_bounded(world: Any) -> None:
    for number in range(configs.KEPT_VERSIONS + 5):
        put(world, "c", schedule(a=f"select {number}"))
    kept = configs.versions(world.db, "c")
    assert len(kept) == configs.KEPT_VERSIONS
    assert kept[0]["content"] == schedule(a=f"select {configs.KEPT_VERSIONS + 4}")


def test_a_name_belongs_to_a_file_or_to_the_api(world: Any) -> None:
    put(world, "c.conf", schedule(a="select 1"), origin="file")
    with pytest.raises(BadUsage, match="belongs to origin file"):
        put(world, "c.conf", schedule(a="select 2"))
    world.do(configs.remove, "c.conf")
    put(world, "c.conf", schedule(a="select 2"))


def test_targets_choose_nodes(world: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    web, mac, foreign = (
        world.node("web-1"),
        world.node("mac", host_details={}, platform_type="21"),
        world.node("x", enroll_secret="s"),
    )
    web = world.do(nodes.set_tags, web.id, ["frontend"])
    put(world, "all", schedule(all="select 1"))
    put(world, "tenant", schedule(acme="select 1"), target=Target(tenants=("acme",)))
    put(world, "tag", schedule(tag="select 1"), target=Target(tags=("frontend", "x")))
    put(world, "mac", schedule(mac="select 1"), target=Target(platforms=("darwin",)))
    put(world, "name", schedule(name="select 1"), target=Target(nodes=("web-*",)))
    put(world, "none", schedule(none="select 1"), target=Target(nodes=("web-*",), platforms=("darwin",)))
    assert set(served(world, web)["schedule"]) == {"all", "tag", "name"}
    assert set(served(world, mac)["schedule"]) == {"all", "mac"}
    assert set(served(world, foreign)["schedule"]) == {"all", "acme"}


def test_no_source_is_an_empty_config(world: Any) -> None:
    assert configs.config_for(world.db, world.node()).text == b"{}"
