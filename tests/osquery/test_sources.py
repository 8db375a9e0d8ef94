"""Config files: osquery's JSON dialect, YAML, Fleet documents, packs beside them, changes, and the check."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox.errors import BadSetup
from osqbox.osquery.amalgamate import Target
from osqbox.osquery.sources import FILE_BYTES, changed, load_source, load_sources
from osqbox.osquery.structure import CONFIG_BYTES, CONFIG_BYTES_BEFORE_5_24, Problem, check, load_flags

FIXTURES = Path(__file__).parents[2] / "fixtures"


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def content(folder: Path, name: str, text: str) -> Any:
    return load_source(written(folder, name, text)).content


def refusal(folder: Path, name: str, text: str | bytes) -> str:
    """The message without the folder in front."""
    path = written(folder, name, text)
    with pytest.raises(BadSetup) as refused:
        load_source(path)
    assert str(refused.value).startswith(str(folder))
    return str(refused.value).removeprefix(f"{folder}{os.sep}")


# --- JSON in osquery's dialect


def test_comment_lines_and_escaped_line_ends_are_taken_out(tmp_path: Path) -> None:
    text = """
# first
{ "schedule": {
  // second
    # third, continued \\
      still the comment
  "a": {"query": "SELECT 1 \\
    FROM time", "interval": 10}
}}
"""
    assert content(tmp_path, "a.conf", text) == {"schedule": {"a": {"query": "SELECT 1     FROM time", "interval": 10}}}


def test_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    text = '\ufeff# x\r\n{"views": {"v": "SELECT \\\r\n1"}}\r\n'
    assert content(tmp_path, "a.json", text) == {"views": {"v": "SELECT 1"}}


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    assert content(tmp_path, "a.json", '{"views": {"v": "a\u2028# b"}}') == {"views": {"v": "a\u2028# b"}}


def test_a_pure_json_file_reads_as_json_does(tmp_path: Path) -> None:
    document = {"options": {"verbose": True, "x": None}, "views": {"ü": 'a "quoted" # // \\ text\n'}}
    assert content(tmp_path, "a.json", json.dumps(document, indent=2)) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', "a.conf:2:7: expected JSON (expecting value), got '}'"),
        ('# one\n# two\n{"a" 1}', "a.conf:3:6: expected JSON (expecting ':' delimiter), got '1}'"),
        ('{"a": "x \\\n y", \n\n "b": ?}', "a.conf:4:7: expected JSON (expecting value), got '?}'"),
        (
            '{"a": 1 // why\n}',
            "a.conf:1:9: expected JSON (expecting ',' delimiter), got '// why'; a comment needs a line of its own",
        ),
        ('{"a": 1', "a.conf:1:8: expected JSON (expecting ',' delimiter), got 'the end'"),
        ("", "a.conf:1:1: expected JSON (expecting value), got 'the end'"),
        ('{"a": NaN}', "a.conf:1:7: expected a JSON number, got NaN"),
        ('{"a": {"b": 1, "b": 2}}', "a.conf: expected each key once in an object, got 'b' twice"),
        ("[1]", "a.conf: expected an object at the top of a config, got a list"),
        ('"x"', 'a.conf: expected an object at the top of a config, got the string "x"'),
        (b'{"a":\n "\xff"}', "a.conf:2: expected UTF-8, got the byte 0xff"),
        (
            '{"options": {"a": "\\ud800"}}',
            "a.conf: expected Unicode text, got half of a surrogate pair: surrogates not allowed",
        ),
        (
            '{"osqbox": {"target": {"tag": []}}}',
            "a.conf: osqbox.target.tag: expected one of tenants, tags, platforms, nodes, got 'tag'",
        ),
    ],
)
def test_bad_json_is_located(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refusal(tmp_path, "a.conf", text) == message


def nested(levels: int) -> str:
    """An object of as many levels, the innermost scalar included."""
    return '{"a":' * (levels - 1) + "1" + "}" * (levels - 1)


def test_as_many_levels_as_osquery_reads(tmp_path: Path) -> None:
    assert content(tmp_path, "a.json", nested(32))
    assert refusal(tmp_path, "b.json", nested(33)).endswith(": expected at most 32 levels of nesting")
    assert "levels" in refusal(tmp_path, "c.json", "[" * 100_000)


@settings(deadline=None)
@given(st.text(alphabet='{}[]":,\\/#\n\r ab1', max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.conf"
    path.write_text(text, encoding="utf-8", newline="")
    with suppress(BadSetup):
        assert isinstance(load_source(path).content, dict)


# --- files


def test_what_cannot_be_read_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"none\.conf: cannot be read: No such file"):
        load_source(tmp_path / "none.conf")
    (tmp_path / "dir.conf").mkdir()
    with pytest.raises(BadSetup, match=r"dir\.conf: expected a regular file"):
        load_source(tmp_path / "dir.conf")
    assert refusal(tmp_path, "a.txt", "{}") == "a.txt: expected a name ending .conf, .json, .yaml or .yml, got 'a.txt'"
    assert (
        refusal(tmp_path, "big.json", b" " * (FILE_BYTES + 1))
        == f"big.json: expected at most {FILE_BYTES} bytes, got more"
    )


def test_the_source_is_named_after_the_file_and_targeted_by_its_wrapper(tmp_path: Path) -> None:
    path = written(tmp_path, "web.conf", '{"osqbox": {"target": {"tags": ["web"]}, "priority": 4}, "options": {}}')
    source = load_source(path)
    assert (source.name, source.origin, source.priority) == ("web.conf", "file", 4)
    assert (source.target, source.content) == (Target(tags=("web",)), {"options": {}})


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path, "x/a.conf", "{}"), written(tmp_path, "y/a.conf", "{}")
    assert [source.name for source in load_sources([one])] == ["a.conf"]
    with pytest.raises(BadSetup, match=r"got 'a\.conf' twice"):
        load_sources([one, other])


# --- packs


PACK = '{"queries": {"q": {"query": "SELECT 1", "interval": 60}}}'


def test_pack_paths_are_read_from_beside_the_config(tmp_path: Path) -> None:
    written(tmp_path, "packs/one.conf", "# a pack\n" + PACK)
    written(tmp_path, "packs/two.yaml", "queries: {q: {query: SELECT 2, interval: 60}}")
    path = written(
        tmp_path, "a.conf", '{"packs": {"own": {"queries": {}}, "1": "packs/one.conf", "2": "packs/two.yaml"}}'
    )
    source = load_source(path)
    assert source.content["packs"] == {
        "own": {"queries": {}},
        "1": json.loads(PACK),
        "2": {"queries": {"q": {"query": "SELECT 2", "interval": 60}}},
    }
    assert [Path(stamp.path).name for stamp in source.files] == ["a.conf", "one.conf", "two.yaml"]


@pytest.mark.parametrize("pattern", ["packs/*", "packs/%", "packs/*.conf", "{folder}/packs/*"])
def test_a_star_reads_each_pack_of_a_directory(tmp_path: Path, pattern: str) -> None:
    written(tmp_path, "packs/b.conf", PACK)
    written(tmp_path, "packs/a.conf", PACK)
    written(tmp_path, "packs/README", "not a pack")
    document = {"packs": {"*": pattern.replace("{folder}", str(tmp_path))}}
    assert list(content(tmp_path, "a.json", json.dumps(document))["packs"]) == ["a", "b"]


def test_a_pack_file_can_be_a_config_by_itself(tmp_path: Path) -> None:
    source = load_source(written(tmp_path, "incident.conf", PACK[:-1] + ', "osqbox": {"priority": 2}}'))
    assert source.content == {"packs": {"incident": json.loads(PACK)}}
    assert source.priority == 2


def test_bad_packs_are_located_in_their_own_file(tmp_path: Path) -> None:
    written(tmp_path, "packs/bad.conf", "{\n  oops")
    written(tmp_path, "packs/list.conf", "[]")
    assert refusal(tmp_path, "a.conf", '{"packs": {"b": "packs/bad.conf"}}').startswith(
        "packs/bad.conf:2:3: expected JSON"
    )
    assert refusal(tmp_path, "b.conf", '{"packs": {"b": "packs/list.conf"}}') == (
        "packs/list.conf: expected a pack, an object with queries, got a list"
    )
    assert "cannot be read" in refusal(tmp_path, "c.conf", '{"packs": {"b": "none.conf"}}')
    with pytest.raises(BadSetup, match="null"):
        load_source(written(tmp_path, "e.conf", '{"packs": {"b": "no\\u0000ne.conf"}}'))
    assert (
        refusal(tmp_path, "d.conf", '{"packs": {"*": "none/*"}}') == "none/*: expected a directory of packs, got none"
    )


def test_a_change_of_any_file_that_was_read_is_noticed(tmp_path: Path) -> None:
    pack = written(tmp_path, "packs/one.conf", PACK)
    source = load_source(written(tmp_path, "a.conf", '{"packs": {"*": "packs/*"}}'))
    assert not changed(source.files)
    before = pack.stat()
    pack.write_text(PACK + " ", encoding="utf-8")
    assert changed(source.files)
    pack.write_text(PACK, encoding="utf-8")
    os.utime(pack, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not changed(source.files)
    pack.unlink()
    assert changed(source.files)


def test_a_new_pack_in_a_star_directory_is_noticed(tmp_path: Path) -> None:
    written(tmp_path, "packs/one.conf", PACK)
    os.utime(tmp_path / "packs", ns=(1, 1))
    source = load_source(written(tmp_path, "a.conf", '{"packs": {"*": "packs/*"}}'))
    assert not changed(source.files)
    written(tmp_path, "packs/two.conf", PACK)
    assert changed(source.files)


# --- YAML


def test_yaml_has_only_the_types_of_json(tmp_path: Path) -> None:
    text = """
schedule:
  on: {query: SELECT 1, interval: 10, removed: no, snapshot: true, version: "5.10", shard: 50}
decorators:
  interval: {3600: [SELECT 1]}
x: {date: 2024-01-02, octal: 010, time: 1:30, null: ~, float: 1.5, empty: }
"""
    assert content(tmp_path, "a.yaml", text) == {
        "schedule": {
            "on": {
                "query": "SELECT 1",
                "interval": 10,
                "removed": "no",
                "snapshot": True,
                "version": "5.10",
                "shard": 50,
            }
        },
        "decorators": {"interval": {"3600": ["SELECT 1"]}},
        "x": {"date": "2024-01-02", "octal": "010", "time": "1:30", "null": None, "float": 1.5, "empty": None},
    }


def test_aliases_are_followed(tmp_path: Path) -> None:
    text = "views: {a: &a SELECT 1, b: *a}\nfile_paths: {x: &x [/etc], y: *x}"
    assert content(tmp_path, "a.yml", text) == {
        "views": {"a": "SELECT 1", "b": "SELECT 1"},
        "file_paths": {"x": ["/etc"], "y": ["/etc"]},
    }


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    assert content(tmp_path, "a.yaml", "# nothing yet\n") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "a.yaml:3:1: expected each key once, got 'a' twice"),
        ("- a", "a.yaml: expected an object at the top of a config, got a list"),
        (
            "a: !!python/object:os.system x",
            "a.yaml:1:4: expected a JSON-like value, got tag:yaml.org,2002:python/object:os.system",
        ),
        ("a: !!set {x}", "a.yaml:1:4: expected a JSON-like value, got tag:yaml.org,2002:set"),
        ("a: !!binary eA==", "a.yaml:1:4: expected a JSON-like value, got tag:yaml.org,2002:binary"),
        ("? [a]\n: 1", "a.yaml:1:3: expected a plain key"),
        ("a: &a {x: 1}\nb: {<<: *a}", "a.yaml:2:5: expected a plain key"),
        ("a: 1\n---\nb: 2", "a.yaml: expected one YAML document, got 2"),
        ("a: &a [*a]", "a.yaml:1:4: expected at most 32 levels of nesting"),
        ("a: " + "[" * 40 + "]" * 40, "a.yaml:1:39: expected at most 32 levels of nesting"),
    ],
)
def test_bad_yaml_is_located(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, "a.yaml", text) == message


@pytest.mark.parametrize("text", ["a: [1,\nb: 2", "a: *b", "a: 'x", "a:\n\tb: 1", "%", "a: \x01"])
def test_what_is_no_yaml_is_located_in_the_words_of_the_parser(tmp_path: Path, text: str) -> None:
    assert re.match(r"a\.yaml(:\d+:\d+)?: expected YAML, got: .+", refusal(tmp_path, "a.yaml", text))


def test_an_alias_bomb_is_refused_before_it_is_built(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "expected at most 100000 values, aliases counted each time" in refusal(tmp_path, "a.yaml", "\n".join(lines))


# --- Fleet documents


def test_fleet_queries_and_packs_become_a_config(tmp_path: Path) -> None:
    text = """
apiVersion: v1
kind: pack
spec:
  name: incident
  platform: linux
  targets: {labels: [All Hosts]}
  queries:
    - {query: users, interval: 60, snapshot: true}
    - {query: ports, name: open ports, interval: 30, removed: false, platform: darwin, description: x}
---
apiVersion: v1
kind: query
spec: {name: users, description: who, query: SELECT * FROM users}
---
apiVersion: v1
kind: query
spec: {name: ports, query: SELECT * FROM listening_ports}
---
apiVersion: v1
kind: query
spec: {name: uptime, query: SELECT * FROM uptime, interval: 300, logging: snapshot, min_osquery_version: 5.1.0}
---
apiVersion: v1
kind: options
spec:
  config:
    options: {distributed_interval: 3}
    decorators: {load: [SELECT 1]}
  overrides: {}
"""
    assert content(tmp_path, "fleet.yaml", text) == {
        "options": {"distributed_interval": 3},
        "decorators": {"load": ["SELECT 1"]},
        "schedule": {
            "uptime": {"query": "SELECT * FROM uptime", "interval": 300, "version": "5.1.0", "snapshot": True}
        },
        "packs": {
            "incident": {
                "platform": "linux",
                "queries": {
                    "users": {"query": "SELECT * FROM users", "interval": 60, "snapshot": True},
                    "open ports": {
                        "query": "SELECT * FROM listening_ports",
                        "interval": 30,
                        "removed": False,
                        "platform": "darwin",
                    },
                },
            }
        },
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kind: label\nspec: {}",
            "a.yaml: expected Fleet documents of kind query, pack, options, config, got 'label'",
        ),
        (
            "kind: pack\nspec: {name: p, queries: [{query: none}]}",
            "a.yaml: pack 'p': expected a query of this file, got 'none'",
        ),
        (
            "kind: options\nspec: {overrides: {platforms: {darwin: {}}}}",
            "a.yaml: Fleet's overrides are not imported",
        ),
    ],
)
def test_what_fleet_says_and_we_cannot_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, "a.yaml", text) == message


# --- the check

REFUSED_NAMES = "osquery refuses the names query.*, cache.*, config_views.*, *epoch and *counter"


def found(document: Any) -> list[str]:
    return [str(problem) for problem in check(document)]


def test_a_config_with_every_key_osquery_reads_is_clean() -> None:
    document = {
        "schedule": {
            "a": {
                "query": "SELECT 1",
                "interval": "60",
                "removed": "true",
                "snapshot": 0,
                "denylist": "f",
                "platform": "linux,darwin",
                "version": "5.0.0",
                "shard": 10,
                "startup_priority": 1,
                "description": "told to nobody",
            },
            "b": {"query": "SELECT 1"},
        },
        "packs": {"p": {"queries": {}, "discovery": ["SELECT 1"], "platform": "posix", "shard": "5", "oncall": "me"}},
        "options": {
            "logger_tls_period": 4,
            "verbose": "yes",
            "custom_x": [1],
            "minloglevel": 1,
            "host_identifier": "uuid",
        },
        "decorators": {"load": ["SELECT 1"], "always": [], "interval": {"60": ["SELECT 1"]}},
        "file_paths": {"etc": ["/etc/%%"]},
        "file_paths_query": {"home": ["SELECT path FROM users"]},
        "file_accesses": ["etc"],
        "exclude_paths": {"home": ["/home/x"]},
        "yara": {"signatures": {"g": ["/a.yar"]}, "file_paths": {"etc": ["g"]}, "signature_urls": ["https://a/.*"]},
        "auto_table_construction": {"t": {"query": "SELECT a FROM b", "path": "/x.db", "columns": ["a"]}},
        "views": {"v": "SELECT 1"},
        "feature_vectors": {"character_frequencies": [0.1]},
        "events": {"enable_subscribers": ["yara_events"], "disable_subscribers": []},
        "prometheus_targets": {"timeout": 5, "urls": ["http://localhost/metrics"]},
        "kafka_topics": {"topic": ["a"]},
        "logger": {},
    }
    assert found(document) == []


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "error: config: expected an object, got a list"),
        ({"schedule": []}, "error: schedule: expected an object, got a list"),
        ({"schedule": {"a": "SELECT 1"}}, 'error: schedule.a: expected an object, got the string "SELECT 1"'),
        ({"schedule": {"a": {"interval": 5}}}, "error: schedule.a: expected 'query', which is missing"),
        ({"schedule": {"a": {"query": ""}}}, 'error: schedule.a.query: expected SQL, got the string ""'),
        (
            {"schedule": {"a": {"query": "q", "interval": "5s"}}},
            'error: schedule.a.interval: expected seconds as a whole number, got the string "5s"',
        ),
        (
            {"schedule": {"a": {"query": "q", "interval": 2.5}}},
            "error: schedule.a.interval: expected seconds as a whole number, got the number 2.5",
        ),
        (
            {"schedule": {"a": {"query": "q", "interval": True}}},
            "error: schedule.a.interval: expected seconds as a whole number, got true",
        ),
        (
            {"schedule": {"a": {"query": "q", "interval": 604801}}},
            "warning: schedule.a.interval: osquery drops the query: 604801 s is not between 1 and 604800",
        ),
        (
            {"schedule": {"a": {"query": "q", "interval": "0"}}},
            "warning: schedule.a.interval: osquery drops the query: 0 s is not between 1 and 604800",
        ),
        (
            {"schedule": {"a": {"query": "q", "snapshot": "yes"}}},
            'error: schedule.a.snapshot: expected true or false, got the string "yes"',
        ),
        (
            {"schedule": {"a": {"query": "q", "version": 5.1}}},
            "error: schedule.a.version: expected a string, got the number 5.1",
        ),
        (
            {"schedule": {"a": {"query": "q", "shard": 101}}},
            "error: schedule.a.shard: expected percent of hosts, 1 to 100, got the number 101",
        ),
        (
            {"schedule": {"a": {"query": "q", "intervall": 5}}},
            "warning: schedule.a.intervall: osquery does not read this key; did you mean 'interval'?",
        ),
        (
            {"schedule": {"query.a": {"query": "q"}}},
            f'warning: schedule["query.a"]: {REFUSED_NAMES}',
        ),
        (
            {"schedule": {"my_counter": {"query": "q"}}},
            f"warning: schedule.my_counter: {REFUSED_NAMES}",
        ),
        (
            {"packs": {"main": {"queries": {}}}},
            'error: packs.main: expected another name: osquery keeps the schedule as "main", which this replaces',
        ),
        (
            {"packs": {"p": "/etc/p.conf"}},
            "warning: packs.p: osquery's tls plugin reads no pack files: give the pack itself, or load it from a file",
        ),
        ({"packs": {"p": {"platform": "linux"}}}, "warning: packs.p: a pack without queries does nothing"),
        (
            {"packs": {"p": {"queries": {}, "discovery": "SELECT 1"}}},
            'error: packs.p.discovery: expected a list, got the string "SELECT 1"',
        ),
        (
            {"packs": {"p": {"queries": {}, "discovery": [{"query": "q"}]}}},
            "error: packs.p.discovery[0]: expected SQL, got an object",
        ),
        (
            {"packs": {"p": {"queries": {"q": {"query": "q", "interval": []}}}}},
            "error: packs.p.queries.q.interval: expected seconds as a whole number, got a list",
        ),
        (
            {"packs": {"p": {"queries": {}, "file_paths": {"a": "/etc"}}}},
            'error: packs.p.file_paths.a: expected a list, got the string "/etc"',
        ),
        (
            {"options": {"logger_tls_perid": 4}},
            "warning: options.logger_tls_perid: osquery ignores it: no such option; did you mean 'logger_tls_period'?",
        ),
        (
            {"options": {"tls_hostname": "x"}},
            "warning: options.tls_hostname: osquery ignores it in a config: it belongs in the flag file",
        ),
        (
            {"options": {"json": True}},
            "warning: options.json: osqueryd ignores it: it is an option of the osqueryi shell",
        ),
        (
            {"options": {"distributed_interval": "soon"}},
            'warning: options.distributed_interval: osquery ignores it: expected uint64, got the string "soon"',
        ),
        (
            {"decorators": {"interval": {"0": ["SELECT 1"]}}},
            "error: decorators.interval.0: expected 60 seconds or more, got 0, by which osquery divides",
        ),
        (
            {"decorators": {"interval": {"90": ["SELECT 1"]}}},
            "warning: decorators.interval.90: osquery drops it: expected seconds that are a multiple of 60",
        ),
        (
            {"decorators": {"allways": []}},
            "warning: decorators.allways: osquery does not read this key; did you mean 'always'?",
        ),
        ({"file_paths": {"a": [1]}}, "error: file_paths.a[0]: expected a string, got the number 1"),
        (
            {"file_accesses": ["a"]},
            "warning: file_accesses: 'a' is no category of file_paths, so it does nothing by itself",
        ),
        (
            {"auto_table_construction": {"t": {"query": "q", "path": "/x"}}},
            "error: auto_table_construction.t: expected 'columns', which is missing",
        ),
        (
            {"auto_table_construction": {"t": {"query": "q", "path": "/x", "columns": ["path"]}}},
            'warning: auto_table_construction.t.columns: osquery drops the column "path": it adds one of its own',
        ),
        ({"views": {"v": ["SELECT 1"]}}, "error: views.v: expected SQL, got a list"),
        ({"scheduel": {}}, "warning: scheduel: osquery does not read this key; did you mean 'schedule'?"),
    ],
)
def test_each_problem_is_named_where_it_stands(document: Any, problem: str) -> None:
    assert found(document) == [problem]


def test_null_is_no_problem_where_it_takes_away() -> None:
    assert found({"schedule": {"a": None}, "packs": {"p": None}, "views": None, "options": {"verbose": None}}) == []


def test_size_is_measured_as_osquery_does() -> None:
    def of(size: int) -> list[Problem]:
        return check({"views": {"v": "x" * size}})

    assert of(CONFIG_BYTES_BEFORE_5_24 - 30) == []
    assert [problem.severity for problem in of(CONFIG_BYTES_BEFORE_5_24)] == ["warning"]
    assert [problem.severity for problem in of(CONFIG_BYTES)] == ["error"]
    assert [problem.severity for problem in check({"views": {"v": "\ud800"}})] == ["error"]


def test_too_many_levels_are_an_error() -> None:
    assert found(json.loads(nested(32))) == ["warning: a: osquery does not read this key"]
    deep = check(json.loads(nested(33)))
    assert [problem.message for problem in deep] == ["expected at most 32 levels of nesting, got more"]
    assert deep[0].path == ("a",) * 32


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["schedule", "packs", "queries", "query", "interval", "load", "60", "decorators", "options", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(any_json)
def test_the_check_takes_anything(document: Any) -> None:
    assert all(problem.message and problem.severity in ("error", "warning") for problem in check(document))


def test_flags_are_known_with_their_kind() -> None:
    assert load_flags()["tls_hostname"]["kind"] == "cli_only"
    assert load_flags()["distributed_interval"]["type"] == "uint64"
    assert len(load_flags()) == 281


def test_the_shipped_fixtures_load_without_errors() -> None:
    paths = sorted([*(FIXTURES / "configs").iterdir(), *(FIXTURES / "packs").iterdir()])
    loaded = load_sources(paths)
    assert len(loaded) >= 4
    assert [str(problem) for source in loaded for problem in check(source.content)] == []
