"""Several sources become one config: the rules of docs/config.md, their laws, and the explanation."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox.errors import BadSetup
from osqbox.osquery.amalgamate import (
    SHAPES,
    NodeFacts,
    Overridden,
    Source,
    Target,
    amalgamate,
    applies,
    dotted,
    explain,
    matches_platform,
    merge,
    read_source,
    select,
)

DOCS = Path(__file__).parents[2] / "docs" / "config.md"
ANYBODY = NodeFacts(id="n1", tenant="default")


def merged(*contents: dict[str, Any]) -> Any:
    """Sources for everybody, each stronger than the one before."""
    return amalgamate([Source(f"s{n}", content) for n, content in enumerate(contents)], ANYBODY)


# --- the documented rules


def documented_rules() -> list[tuple[str, str]]:
    sections = re.split(r"^### ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(section.partition("\n")[0], section) for section in sections if section.startswith("Rule ")]


@pytest.mark.parametrize("section", [pytest.param(text, id=title) for title, text in documented_rules()])
def test_every_documented_rule_does_what_its_example_shows(section: str) -> None:
    blocks = re.findall(r"^```(?:yaml|json) (\S+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    node = {"tenant": "default", **yaml.safe_load(dict(blocks).get("node", "{}"))}
    facts = NodeFacts(id="n1", **{**node, "tags": frozenset(node.get("tags", ()))})
    sources = [read_source(name, yaml.safe_load(text)) for name, text in blocks if name not in ("node", "result")]
    result = amalgamate(sources, facts)
    assert len(sources) >= 2
    assert result.config == json.loads(dict(blocks)["result"])


def test_the_documentation_names_every_rule_once() -> None:
    numbers = [int(re.match(r"Rule (\d+):", title)[1]) for title, _ in documented_rules()]  # type: ignore[index]
    assert numbers == list(range(1, 9))


# --- targets


@pytest.mark.parametrize(
    ("wanted", "platform", "like", "expected"),
    [
        ("linux", "ubuntu", "debian", True),
        ("linux", "rhel", "fedora", True),
        ("linux", "some-new-distribution", "", True),
        ("linux", "darwin", "", False),
        ("linux", "windows", "", False),
        ("posix", "ubuntu", "debian", True),
        ("posix", "darwin", "", True),
        ("posix", "freebsd", "", True),
        ("posix", "windows", "", False),
        ("darwin", "windows", "", False),
        ("windows", "darwin", "", False),
        ("ubuntu", "ubuntu", "debian", True),
        ("debian", "ubuntu", "debian", True),
        ("ubuntu", "rhel", "fedora", False),
        ("opensuse-leap", "opensuse-leap", "suse opensuse", True),
        ("linux,darwin", "darwin", "", True),
        ("linux,", "darwin", "", False),
        ("Linux", "Ubuntu", "", True),
        ("any", "windows", "", True),
        ("all", "windows", "", True),
        ("", "windows", "", True),
        ("any", "", "", True),
        ("linux", "", "", False),
    ],
)
def test_platform_words(wanted: str, platform: str, like: str, *, expected: bool) -> None:
    facts = replace(ANYBODY, platform=platform, platform_like=like)
    assert matches_platform(wanted, facts) is expected


def test_a_target_is_an_and_of_kinds_and_an_or_of_names() -> None:
    source = Source("s", {}, Target(tenants=("a", "b"), tags=("x", "y")))
    assert applies(source, NodeFacts("n", "b", tags=frozenset("y")))
    assert not applies(source, NodeFacts("n", "c", tags=frozenset("y")))
    assert not applies(source, NodeFacts("n", "b", tags=frozenset("z")))


@pytest.mark.parametrize("wanted", ["node-7", "web-01", "B1A2", "web-*", "web-0?"])
def test_a_node_is_named_by_id_host_name_or_identifier(wanted: str) -> None:
    facts = NodeFacts("node-7", "a", hostname="web-01", host_identifier="B1A2")
    assert applies(Source("s", {}, Target(nodes=(wanted,))), facts)
    assert not applies(Source("s", {}, Target(nodes=(wanted + "x",))), facts)


def test_a_node_without_a_host_name_is_not_matched_by_a_star_alone_through_it() -> None:
    assert not applies(Source("s", {}, Target(nodes=("web*",))), NodeFacts("n", "a"))


# --- reading the wrapper


def test_the_wrapper_is_read_and_left_out() -> None:
    document = {"osqbox": {"target": {"tags": ["x"]}, "priority": -3}, "options": {"verbose": True}}
    source = read_source("s", document, origin="file", version=7)
    assert source == Source("s", {"options": {"verbose": True}}, Target(tags=("x",)), -3, "file", 7)
    assert "osqbox" in document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "s: expected an object at the top of a config, got a list"),
        ({"osqbox": 3}, "s: osqbox: expected an object, got the number 3"),
        ({"osqbox": {"tags": []}}, "s: osqbox.tags: expected one of target, priority, got 'tags'"),
        ({"osqbox": {"priority": "1"}}, 's: osqbox.priority: expected a whole number, got the string "1"'),
        ({"osqbox": {"priority": True}}, "s: osqbox.priority: expected a whole number, got true"),
        (
            {"osqbox": {"target": {"tag": ["x"]}}},
            "s: osqbox.target.tag: expected one of tenants, tags, platforms, nodes, got 'tag'",
        ),
        (
            {"osqbox": {"target": {"tags": "x"}}},
            's: osqbox.target.tags: expected a list of strings, got the string "x"',
        ),
        (
            {"osqbox": {"target": {"tags": []}}},
            "s: osqbox.target.tags: expected at least one name, got an empty list",
        ),
    ],
)
def test_a_bad_wrapper_says_where_what_was_expected_and_what_was_found(document: Any, message: str) -> None:
    with pytest.raises(BadSetup) as refused:
        read_source("s", document)
    assert str(refused.value) == message


# --- merging


def test_the_text_is_canonical_json() -> None:
    result = merged({"schedule": {"b": {"query": "q", "interval": 1}}, "options": {"z": "ä", "a": 1}})
    assert result.text.decode() == ('{"options":{"a":1,"z":"ä"},"schedule":{"b":{"interval":1,"query":"q"}}}')


def test_sources_are_never_changed() -> None:
    weak = {"decorators": {"load": ["a"]}, "schedule": [1], "options": {"x": {"deep": 1}}}
    strong = {"decorators": {"load": ["b"]}, "schedule": {"p": {"query": "q"}}, "options": {"x": {"deep": 2}}}
    before = json.dumps([weak, strong])
    result = merged(weak, strong, {"schedule": {"r": {"query": "r"}}, "decorators": {"load": ["c"]}})
    assert json.dumps([weak, strong]) == before
    assert result.config["schedule"] == {"p": {"query": "q"}, "r": {"query": "r"}}


def test_a_value_of_another_kind_replaces_all_that_was_there() -> None:
    result = merged(
        {"schedule": {"p": {"query": "q"}}, "decorators": {"load": ["a"]}}, {"schedule": [], "decorators": 1}
    )
    assert result.config == {"schedule": [], "decorators": 1}
    assert result.origins == {("schedule",): "s1", ("decorators",): "s1"}
    assert sorted(old.path for old in result.overridden) == [("decorators", "load", 0), ("schedule", "p")]


def test_a_value_of_another_kind_can_itself_be_replaced() -> None:
    result = merged({"schedule": {"p": {"query": "q"}}}, {"schedule": [7]}, {"schedule": {"r": {"query": "r"}}})
    assert result.config == {"schedule": {"r": {"query": "r"}}}
    assert [(old.path, old.source, old.by) for old in result.overridden] == [
        (("schedule", "p"), "s0", "s1"),
        (("schedule",), "s1", "s2"),
    ]


def test_empty_sections_stay() -> None:
    result = merged({"schedule": {}, "decorators": {"load": []}}, {"schedule": {}})
    assert result.text == b'{"decorators":{"load":[]},"schedule":{}}'
    assert result.origins == {("schedule",): "s0", ("decorators", "load"): "s0"}


def test_true_and_one_are_different_items() -> None:
    assert merged({"file_accesses": [True]}, {"file_accesses": [1, True]}).config == {"file_accesses": [True, 1]}


def test_what_was_overridden_is_told_but_not_what_was_repeated() -> None:
    result = merged({"options": {"a": 1, "b": 2}}, {"options": {"a": 1, "b": 3}})
    assert result.overridden == (Overridden(("options", "b"), "s0", 1, 2, "s1"),)


def test_null_removes_and_says_so() -> None:
    result = merged({"options": {"a": 1, "b": 2}, "packs": {"p": {}}}, {"options": {"a": None}, "packs": None})
    assert result.config == {"options": {"b": 2}}
    assert {old.path for old in result.overridden} == {("options", "a"), ("packs", "p")}
    assert merged({"options": {"a": None}}, {"options": {"a": 1}}).config == {"options": {"a": 1}}


def test_unknown_keys_are_noted() -> None:
    assert merged({"scheduel": {}}).notes == ("s0: osquery does not read the key scheduel; it is passed through",)
    assert merged({key: {} for key in SHAPES}).notes == ()


def test_an_api_source_is_stronger_than_a_file_of_the_same_name() -> None:
    by_file = Source("same", {"options": {"a": "file"}}, origin="file", version=9)
    by_api = Source("same", {"options": {"a": "api"}}, origin="api")
    assert amalgamate([by_api, by_file], ANYBODY).config == {"options": {"a": "api"}}


# --- explaining


def test_explain_names_source_version_and_what_was_overridden() -> None:
    weak = Source("base", {"schedule": {"proc": {"query": "old", "interval": 5}, "a b": {"query": "x"}}}, version=3)
    strong = Source("web", {"schedule": {"proc": {"query": "new", "snapshot": True}}}, Target(tags=("t",)), version=8)
    facts = replace(ANYBODY, tags=frozenset("t"))
    rows = [tuple(row) for row in explain(amalgamate([strong, weak], facts))]
    assert rows == [
        ("schedule.proc.query", "web", 8, "new", (("base", 3, "old"),)),
        ("schedule.proc.snapshot", "web", 8, True, ()),
        ('schedule["a b"].query', "base", 3, "x", ()),
    ]


def test_each_item_of_a_joined_list_keeps_its_own_origin() -> None:
    result = merged({"decorators": {"load": ["a", "b"]}}, {"decorators": {"load": ["b", "c"]}})
    assert [(row.key, row.source) for row in explain(result)] == [
        ("decorators.load[0]", "s0"),
        ("decorators.load[1]", "s0"),
        ("decorators.load[2]", "s1"),
    ]


def test_an_empty_selection_is_an_empty_config() -> None:
    result = amalgamate([Source("s", {"options": {"a": 1}}, Target(tags=("x",)))], ANYBODY)
    assert (result.text, result.origins, explain(result)) == (b"{}", {}, [])


def test_dotted_quotes_what_could_be_misread() -> None:
    assert dotted(("file_paths", "a.b", 0)) == 'file_paths["a.b"][0]'
    assert dotted(("packs", "my-pack")) == "packs.my-pack"


# --- laws

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=5,
)
maps = st.dictionaries(st.sampled_from("abc"), values, max_size=3)
lists = st.lists(st.sampled_from(["q1", "q2", "q3"]) | values, max_size=3)
contents = st.fixed_dictionaries(
    {},
    optional={
        "schedule": maps | values,
        "options": maps,
        "decorators": st.fixed_dictionaries(
            {}, optional={"load": lists, "interval": st.dictionaries(st.sampled_from(["60", "120"]), lists)}
        )
        | values,
        "file_accesses": lists | values,
        "yara": st.fixed_dictionaries({}, optional={"signatures": maps, "signature_urls": lists}),
        "x-unknown": values,
    },
)
targets = st.builds(
    Target,
    tenants=st.sampled_from([(), ("default",), ("other",)]),
    tags=st.sampled_from([(), ("t",), ("u",)]),
    platforms=st.sampled_from([(), ("linux",)]),
    nodes=st.sampled_from([(), ("n1",)]),
)
sources = st.lists(
    st.builds(Source, name=st.sampled_from("abcdefgh"), content=contents, target=targets, priority=st.integers(0, 2)),
    max_size=5,
    unique_by=lambda source: source.name,
)
FACTS = NodeFacts("n1", "default", platform="ubuntu", tags=frozenset("t"))


@settings(deadline=None)
@given(sources, st.randoms())
def test_the_order_of_the_sources_does_not_matter(given_sources: list[Source], shuffle: random.Random) -> None:
    shuffled = given_sources[:]
    shuffle.shuffle(shuffled)
    one, other = amalgamate(given_sources, FACTS), amalgamate(shuffled, FACTS)
    assert (one.text, one.origins, one.overridden) == (other.text, other.origins, other.overridden)


@settings(deadline=None)
@given(sources)
def test_merging_a_merged_config_changes_nothing(given_sources: list[Source]) -> None:
    once = amalgamate(given_sources, FACTS)
    assert amalgamate([Source("again", once.config)], FACTS).text == once.text
    assert merge([*select(given_sources, FACTS), Source("again", {})]).text == once.text


@settings(deadline=None)
@given(sources)
def test_equal_content_is_equal_text_whatever_the_order_of_its_keys(given_sources: list[Source]) -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(list(value))}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    turned = [replace(source, content=backwards(source.content)) for source in given_sources]
    assert amalgamate(turned, FACTS).text == amalgamate(given_sources, FACTS).text


@settings(deadline=None)
@given(sources)
def test_every_leaf_has_one_origin_that_says_what_is_served(given_sources: list[Source]) -> None:
    result = amalgamate(given_sources, FACTS)
    rows = explain(result)
    assert json.loads(result.text) == result.config
    assert [row.key for row in rows] == sorted(dotted(path) for path in result.origins)
    assert len({row.key for row in rows}) == len(rows)
    applying = {source.name for source in select(given_sources, FACTS)}
    assert {row.source for row in rows} | {old.source for old in result.overridden} <= applying
    by_name = {source.name: source for source in given_sources}
    for path, name in result.origins.items():
        value = result.config
        for part in path:
            value = value[part]
        if value not in ({}, []):  # what was taken away leaves the section of the weaker source
            assert msgspec.json.encode(value) in msgspec.json.encode(by_name[name].content)
