"""YARA: rules read and matched without libyara, and the table that fetches them."""

from __future__ import annotations

import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osqbox.agent.carve import build_archive
from osqbox.agent.client import SETTINGS, Core, Identity
from osqbox.agent.flags import Flags
from osqbox.agent.host import host_tables
from osqbox.agent.messages import Endpoints
from osqbox.agent.schedule import Config
from osqbox.agent.sql import Context, Engine, QueryResult, Row, source
from osqbox.agent.store import MemoryStore
from osqbox.agent.tables.contents import Contents, MachineContents, PretendedContents, contents_of
from osqbox.agent.tables.yara import Fetch, url_is_allowed, yara_tables
from osqbox.agent.tables.yara_rules import RulesRefused, match, read_rules

CONTENT = b"MZ\x90\x00 hello World hello\x00 w\x00i\x00d\x00e\x00 abc123abc"


@pytest.mark.parametrize(
    ("strings", "condition", "expected"),
    [
        ('$a = "hello"', "$a", True),
        ('$a = "HELLO"', "$a", False),
        ('$a = "HELLO" nocase', "all of them", True),
        ('$a = "wide" wide', "$a", True),
        ('$a = "wide" wide ascii', "#a == 1", True),
        ('$a = "hell"', "$a", True),
        ('$a = "hell" fullword', "$a", False),
        ('$a = "hello" fullword', "#a == 2", True),
        ('$a = "\\x4d\\x5a"', "$a at 0", True),
        ('$a = "hello"', "$a at 0", False),
        ('$a = "hello"', "$a in (0..10)", True),
        ('$a = "hello"', "$a in (20..30)", False),
        ("$a = { 4D 5A 9? 00 }", "$a", True),
        ("$a = { 4D [1-3] 00 }", "$a at 0", True),
        ("$a = { 4D [4-6] 00 }", "$a at 0", False),
        ("$a = { 4D ( 11 | 5A ) ?? }", "$a", True),
        ("$a = /abc[0-9]+abc/", "$a", True),
        ("$a = /ABC\\d+/i", "$a", True),
        ('$a = "hello" $b = "no"', "any of them", True),
        ('$a = "hello" $b = "no"', "all of them", False),
        ('$a = "hello" $b = "no"', "1 of ($a, $b)", True),
        ('$x1 = "no" $x2 = "hello" $y = "abc"', "2 of ($x*)", False),
        ('$a = "no" $b = "never"', "none of them", True),
        ('$a = "hello" $b = "no"', "$a and not $b", True),
        ('$a = "no" $b = "World"', "($a or $b) and filesize < 1KB", True),
        ('$a = "hello"', "#a > 2", False),
        ('$ = "hello"', "any of them", True),
        ('$a = "hello" // $b\n', "filesize > 0x10 /* or not */ and true", True),
    ],
)
def test_rules(strings: str, condition: str, expected: bool) -> None:
    text = f'rule r : t1 t2 {{ meta: author = "me" score = 3 strings: {strings} condition: {condition} }}'
    found = match(read_rules(text), CONTENT)
    assert [(m.rule, m.tags) for m in found] == ([("r", ("t1", "t2"))] if expected else [])


def test_rules_know_each_other() -> None:
    text = """
    private rule base { strings: $a = "hello" condition: $a }
    rule top { condition: base and filesize > 3 }
    """
    assert [found.rule for found in match(read_rules(text), CONTENT)] == ["top"]
    assert match(read_rules("global rule g { condition: false } rule r { condition: true }"), CONTENT) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rule"),
        ('import "pe" rule r { condition: pe.is_dll() }', "import is not supported"),
        ("rule r { condition: uint16(0) == 0x5A4D }", "rule r, line 1: cannot use 'uint16'"),
        ('rule r { strings: $a = "x" xor condition: $a }', "modifier xor is not supported"),
        ("rule r { condition: $a }", r"no string \$a"),
        ("rule r { condition: any of them }", "no strings"),
        ("rule r {\n strings:\n $a = /(/ condition: $a }", "cannot read the regular expression"),
        ('rule r { strings: $a = "x', "cannot read"),
        ("rule r { condition: " + "(" * 500 + "true", "nested too deeply"),
        ("rule r { condition: " + "not " * 500 + "true }", "nested too deeply"),
        ("<html>", "cannot read|expected 'rule'"),
        ("rule r { condition: for any of them : ( $ ) }", "cannot use 'for'"),
        ("rule r { strings: $a = { 4D ~5A } condition: $a }", "cannot read the hex string"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(RulesRefused, match=words):
        read_rules(text)


def test_a_catastrophic_expression_is_given_up() -> None:
    rules = read_rules("rule r { strings: $a = /(x+x+)+y/ condition: $a }")
    with pytest.raises(TimeoutError):
        match(rules, b"x" * 5000, timeout_s=0.2)


# -- the table ---------------------------------------------------------------------------------------------------

RULE = 'rule greeting : seen { strings: $a = "hello" condition: $a }'


def make_core(config: Config | None = None, **flags: str) -> Core:
    core = Core(
        Identity("host", "U", "I", "E", 7, 0.0),
        Flags({"tls_hostname": "box:1", **flags}),
        Endpoints(),
        MemoryStore(),
        enroll_secret=lambda: "",
        rng=random.Random(1),
        now=0.0,
    )
    core.config = config or Config()
    core.store.put(SETTINGS, "nodeKey", "key")
    return core


def never(url: str, body: bytes | None) -> tuple[int, bytes]:
    raise AssertionError(url)


def ask(sql: str, core: Core, fetch: Fetch = never, contents: Contents | None = None) -> QueryResult:
    tables = yara_tables(core, fetch=fetch, contents=contents or MachineContents())
    result = Engine().query(sql, tables=tables)
    assert result.status == 0, result.message
    return result


@pytest.fixture(params=["own", "libyara"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of matching give the same rows; libyara's only where it is installed."""
    if request.param == "own":
        monkeypatch.setitem(sys.modules, "yara", None)
    else:
        pytest.importorskip("yara")
    return str(request.param)


def test_a_file_is_matched_by_a_rule_in_the_query(tmp_path: Path, engine: str) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "b").write_bytes(b"nothing")
    where = f"path like '{tmp_path}/%' and sigrule = '{RULE}'"
    sql = f"select path, matches, count, tags, strings, sigfile from yara where {where} order by path"
    assert ask(sql, make_core()).rows == [
        {"path": f"{tmp_path}/a", "matches": "greeting", "count": "1", "tags": "seen", "strings": "", "sigfile": ""},
        {"path": f"{tmp_path}/b", "matches": "", "count": "0", "tags": "", "strings": "", "sigfile": ""},
    ]
    shown = ask(sql, make_core(enable_yara_string="true")).rows
    assert shown[0]["strings"] == "$a:5,$a:11"


def test_rules_come_from_files_and_groups(tmp_path: Path, engine: str) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "r.yar").write_text(RULE)
    core = make_core(Config(signatures={"group": (f"{tmp_path}/r.yar",)}))
    for condition in (f"sigfile = '{tmp_path}/r.yar'", "sig_group = 'group'"):
        (row,) = ask(f"select matches, sig_group from yara where path = '{tmp_path}/a' and {condition}", core).rows
        assert row["matches"] == "greeting"
    missing = ask(f"select * from yara where path = '{tmp_path}/a' and sig_group = 'other'", core)
    assert missing.rows == []
    assert missing.warnings == ("YARA rules of sig_group other cannot be used: the config has no such group",)


ALLOWED = Config(signature_urls=("https://box:1/yara/.*",))


@pytest.mark.parametrize(("authenticate", "body"), [("false", None), ("true", {"node_key": "key"})])
def test_rules_are_fetched_from_urls_the_config_allows(tmp_path: Path, authenticate: str, body: Any) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    asked: list[Any] = []

    def fetch(url: str, sent: bytes | None) -> tuple[int, bytes]:
        asked.append((url, json.loads(sent) if sent else None))
        return 200, RULE.encode()

    core = make_core(ALLOWED, yara_sigurl_authenticate=authenticate)
    url = "https://box:1/yara/greeting"
    (row,) = ask(f"select matches, sigurl from yara where path = '{tmp_path}/a' and sigurl = '{url}'", core, fetch).rows
    assert row == {"matches": "greeting", "sigurl": url}
    assert asked == [(url, body)]


def refused(url: str, body: bytes | None) -> tuple[int, bytes]:
    return 404, b"{}"


def broken(url: str, body: bytes | None) -> tuple[int, bytes]:
    raise OSError("Request error: timeout")


def page(url: str, body: bytes | None) -> tuple[int, bytes]:
    return 200, b"<html>"


@pytest.mark.parametrize(
    ("url", "fetch", "words"),
    [
        ("https://evil/yara/x", never, "do not allow it"),
        ("https://box:1/yara/x", refused, "the server answered 404"),
        ("https://box:1/yara/x", broken, "Request error: timeout"),
        ("https://box:1/yara/x", page, "cannot read|syntax error|expected 'rule'"),
    ],
)
def test_what_goes_wrong_with_a_url_is_a_warning(url: str, fetch: Fetch, words: str) -> None:
    result = ask(f"select * from yara where path = '/etc/hostname' and sigurl = '{url}'", make_core(ALLOWED), fetch)
    assert result.rows == []
    (warning,) = result.warnings
    assert warning.startswith(f"YARA rules of sigurl {url} cannot be used: ")
    assert any(word in warning for word in words.split("|"))


def test_a_pretended_host_fetches_rules_but_shows_no_file_of_this_machine() -> None:
    asked: list[str] = []

    def fetch(url: str, body: bytes | None) -> tuple[int, bytes]:
        asked.append(url)
        return 200, RULE.encode()

    pretended = PretendedContents({"file": source(some_files, "path")})
    url = "https://box:1/yara/x"
    for path, matched in (("/etc/passwd", []), ("/opt/hello", ["greeting"])):
        sql = f"select matches from yara where path = '{path}' and sigurl = '{url}'"
        result = ask(sql, make_core(ALLOWED), fetch, pretended)
        assert [row["matches"] for row in result.rows] == matched
    assert asked == [url, url]


def some_files(_context: Context) -> Iterator[Row]:
    yield {"path": "/opt/hello", "type": "regular", "size": 100, "mode": "0600", "mtime": 5, "uid": 3, "gid": 4}


def test_a_pretended_hosts_carve_holds_nothing_of_this_machine(tmp_path: Path) -> None:
    contents = contents_of({"file": source(some_files, "path")})
    paths = ["/opt/hello", "/etc/passwd"]
    build_archive(tmp_path / "out", "g", paths, contents=contents)
    with tarfile.open(tmp_path / "out") as archive:
        (member,) = archive.getmembers()
        extracted = archive.extractfile(member)
        assert extracted is not None
        content = extracted.read()
    assert (member.name, member.size, member.mtime) == ("/tmp/osquery_carve_g/opt/hello", 100, 5)
    assert (member.mode, member.uid, member.gid) == (0o600, 3, 4)
    assert content.startswith(b"This is what osqbox made up for /opt/hello.")
    assert list(contents.find("/opt/%", Context())) == ["/opt/hello"]


def test_this_machines_tables_show_this_machines_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"real")
    contents = contents_of(host_tables(hostname="h", uuid="U"))
    assert list(contents.find(f"{tmp_path}/%", Context())) == [f"{tmp_path}/a"]
    opened = contents.open(f"{tmp_path}/a")
    assert opened is not None
    with opened.content as content:
        assert content.read() == b"real"


@pytest.mark.parametrize(
    ("url", "pattern", "allowed"),
    [
        ("https://h/a/b.yar", "https://h/a/.*", True),
        ("https://h/a/b.yar", "https://h/a/.*\\.yar", True),
        ("https://h/a/b.yar", "https://h/a/b", False),
        ("https://h/a/b.yar", "https://h/x.*", False),
        ("https://h.evil/a/b", "https://h/a/.*", False),
        ("https://h@evil/a/b", "https://h/a/.*", False),
        ("http://h/a/b", "http://h/a/.*", False),
        ("https://h:1/a", "https://h/a", False),
        ("https://h/a", "https://h/(", False),
        ("https://[/a", "https://h/a", False),
        ("https://h/" + "a" * 40 + "!", "https://h/(a|aa)+$", False),
    ],
)
def test_which_urls_are_allowed(url: str, pattern: str, allowed: bool) -> None:
    assert url_is_allowed(url, [pattern]) is allowed


def test_a_directory_or_a_file_over_the_limit_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"hello" * 100)
    (tmp_path / "dir").mkdir()
    core = make_core(read_max="100")
    result = ask(f"select path from yara where path like '{tmp_path}/%' and sigrule = '{RULE}'", core)
    assert result.rows == []
    assert result.warnings == (f"Cannot read {tmp_path}/big: size 500 is over --read_max 100",)
