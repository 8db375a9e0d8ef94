"""Configs read as osqueryd reads them: names, defaults, checks, splay, and nonsense without an exception."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent import schedule
from osqbox.agent.schedule import Rules, ScheduledQuery, read_config

RULES = Rules(hostname="host")


def read(members: dict[str, Any], rules: Rules = RULES) -> tuple[schedule.Config, list[str]]:
    warnings: list[str] = []
    return read_config(members, rules, warnings.append), warnings


def query(entry: dict[str, Any]) -> ScheduledQuery:
    config, warnings = read({"schedule": {"q": {"query": "select 1", **entry}}})
    assert warnings == []
    ((_, found),) = config.queries()
    return found


def test_defaults_of_a_query() -> None:
    assert query({}) == ScheduledQuery("q", "select 1", 3600, 3600)


@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        ({"interval": "60"}, "interval_s", 60),
        ({"interval": 60.5}, "interval_s", 3600),
        ({"snapshot": "t"}, "snapshot", True),
        ({"snapshot": 1}, "snapshot", True),
        ({"snapshot": "yes"}, "snapshot", False),
        ({"removed": False}, "removed", False),
        ({"removed": "false"}, "removed", False),
        ({"denylist": "false"}, "denylist", False),
        ({"startup_priority": 3}, "startup_priority", 3),
    ],
)
def test_members_of_a_query(entry: dict[str, Any], field: str, value: object) -> None:
    assert getattr(query(entry), field) == value


@pytest.mark.parametrize("interval", [0, 604_801, -5, "0"])
def test_an_interval_out_of_range_drops_the_query(interval: object) -> None:
    config, warnings = read({"schedule": {"q": {"query": "select 1", "interval": interval}}})
    assert list(config.queries()) == []
    assert len(warnings) == 1


@pytest.mark.parametrize("name", ["query.x", "cache.x", "config_views.x", "myepoch", "mycounter"])
def test_reserved_names_are_refused(name: str) -> None:
    config, warnings = read({"schedule": {name: {"query": "select 1"}}})
    assert (list(config.queries()), len(warnings)) == ([], 1)


def test_packs_prefix_their_queries() -> None:
    entry = {"queries": {"q": {"query": "select 1", "interval": 10}}, "discovery": ["select 2"], "oncall": "me"}
    config, warnings = read({"packs": {"web": entry, "file": "/etc/packs/x.conf"}}, Rules("h", delimiter="/"))
    ((pack, found),) = config.queries()
    assert found.name == "pack/web/q"
    assert pack.discovery == ("select 2",)
    assert warnings == ["Cannot expand pack file: expected an object, or a path that the config plugin can read"]


@pytest.mark.parametrize(
    ("platform", "included"),
    [("", True), ("null", True), ("linux", True), ("darwin,linux", True), ("any", True), ("posix", True),
     ("ubuntu", True), ("windows", False), ("darwin", False), ("freebsd", False)],
)  # fmt: skip
def test_platforms(platform: str, included: bool) -> None:
    assert schedule.platform_matches(platform) is included
    config, _ = read({"packs": {"p": {"platform": platform, "queries": {"q": {"query": "select 1"}}}}})
    assert bool(list(config.queries())) is included


@pytest.mark.parametrize(
    ("wanted", "included"),
    [("", True), ("5.23.1", True), ("5.9", True), ("5.24", False), ("5.23.2", False), ("6", False)],
)
def test_versions_are_compared_number_by_number(wanted: str, included: bool) -> None:
    assert schedule.version_at_least(wanted, "5.23.1") is included


def test_shard_is_the_first_byte_of_the_hostnames_sha1() -> None:
    for hostname in ("a", "b", "web-1"):
        value = hashlib.sha1(hostname.encode()).digest()[0] * 100 // 255
        assert schedule.shard_includes(value, hostname) is True
        assert value < 2 or schedule.shard_includes(value - 1, hostname) is False
        assert schedule.shard_includes(100, hostname)
        assert schedule.shard_includes(0, hostname)


@given(st.integers(1, 604_800), st.integers(0, 100), st.integers())
def test_splay_stays_within_its_per_cent(interval_s: int, percent: int, seed: int) -> None:
    splayed = schedule.splay(interval_s, percent, random.Random(seed).randint)
    assert abs(splayed - interval_s) <= interval_s * percent // 100
    assert splayed >= 1


@given(st.integers(1, 5000), st.integers(0, 2**33))
def test_the_next_due_second_is_the_first_that_the_interval_divides(splayed_s: int, now: int) -> None:
    found = ScheduledQuery("q", "", splayed_s, splayed_s)
    due = found.due_after(now)
    assert due % splayed_s == 0
    assert now < due <= now + splayed_s
    assert found.due_between(now, due)
    assert not found.due_between(now, due - 1)


def test_decorators_and_their_intervals() -> None:
    config, warnings = read(
        {"decorators": {"load": ["a", 1], "always": "b", "interval": {"60": ["c"], "61": ["d"], "x": []}}}
    )
    assert config.decorators.load == ("a",)
    assert config.decorators.always == ("b",)
    assert config.decorators.interval == {60: ("c",)}
    assert len(warnings) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["schedule", "packs", "queries", "query", "interval", "discovery", "shard"]), inner, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["schedule", "packs", "decorators", "options"]), json_values))
def test_no_config_raises(members: dict[str, Any]) -> None:
    config, _ = read(members)
    for _, found in config.queries():
        assert 0 < found.interval_s <= schedule.MAX_INTERVAL_S
