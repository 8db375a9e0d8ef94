"""What osquery would refuse, drop or not read in a config, without looking into its SQL.

The rules are those of osquery/config/{config,packs}.cpp and plugins/config/parsers/*.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

import msgspec

from osqbox.osquery.amalgamate import SHAPES, Path, dotted, got
from osqbox.schema import fixture_path

MIB = 1024 * 1024
DEPTH_MAX = 32  # kMaxConfigDepth
CONFIG_BYTES = 4 * MIB  # kMaxConfigSize
CONFIG_BYTES_BEFORE_5_24 = 1 * MIB
INTERVAL_MAX_S = 604800  # kMaxQueryInterval

_QUERY_BOOLS = ("true", "t", "1", "false", "f", "0")  # JSON::valueToBool
_OPTION_BOOLS = (*_QUERY_BOOLS, "y", "yes", "n", "no")  # gflags
# glog's own flags, which osquery lets a config set (plugins/config/parsers/options.cpp).
_GLOG_OPTIONS = frozenset(("minloglevel", "stderrthreshold", "logtostderr", "alsologtostderr"))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong. Error: the config cannot do what it says. Warning: osquery drops or ignores a part."""

    path: Path
    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {dotted(self.path) or 'config'}: {self.message}"


class _Report:
    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def error(self, path: Path, message: str) -> None:
        self.problems.append(Problem(path, "error", message))

    def warning(self, path: Path, message: str) -> None:
        self.problems.append(Problem(path, "warning", message))


_Check = Callable[[Any, Path, _Report], None]


def check(content: Any) -> list[Problem]:
    """What osquery would refuse, drop or not read in a config, without looking into its SQL."""
    out = _Report()
    if not isinstance(content, dict):
        out.error((), f"expected an object, got {got(content)}")
    elif too_deep := deepest(content, (), 1):
        out.error(too_deep, f"expected at most {DEPTH_MAX} levels of nesting, got more")
    else:
        _check_size(content, out)
        _check_sections(content, (), out)
        _check_categories(content, out)
    return out.problems


def deepest(value: Any, path: Path, level: int) -> Path | None:
    """Where osquery's limit of levels is passed; a scalar is a level of its own (Config::validateConfig)."""
    if level > DEPTH_MAX:
        return path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (deepest(inner, (*path, key), level + 1) for key, inner in members)), None)


def _check_size(content: dict[str, Any], out: _Report) -> None:
    try:
        size = len(msgspec.json.encode(content))
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        out.error((), f"expected JSON values with numbers of 64 bits, got: {error}")
        return
    if size > CONFIG_BYTES:
        out.error((), f"expected at most {CONFIG_BYTES} bytes, got {size}: osquery refuses it")
    elif size > CONFIG_BYTES_BEFORE_5_24:
        out.warning((), f"{size} bytes: osquery up to 5.23.1 refuses more than {CONFIG_BYTES_BEFORE_5_24}")


def _check_sections(content: dict[str, Any], path: Path, out: _Report) -> None:
    for key, value in content.items():
        section = _SECTIONS.get(key)
        if value is None:
            continue  # removes what weaker sources say
        if section:
            section(value, (*path, key), out)
        elif not path:
            out.warning((key,), f"osquery does not read this key{_meant(key, SHAPES)}")


def _check_categories(content: dict[str, Any], out: _Report) -> None:
    """Names of other sections that must exist (plugins/config/parsers/file_paths.cpp)."""
    known = {name for key in ("file_paths", "file_paths_query") for name in _object(content.get(key))}
    for key in ("file_accesses", "exclude_paths"):
        names = content.get(key)
        for name in names if isinstance(names, list | dict) else ():
            if isinstance(name, str) and name not in known:
                out.warning((key,), f"{name!r} is no category of file_paths, so it does nothing by itself")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def _wrong(expected: str, value: Any) -> str:
    return f"expected {expected}, got {got(value)}"


def _text(value: Any, path: Path, out: _Report) -> None:
    if not isinstance(value, str):
        out.error(path, _wrong("a string", value))


def _sql(value: Any, path: Path, out: _Report) -> None:
    if not isinstance(value, str) or not value.strip():
        out.error(path, _wrong("SQL", value))


def _flag(value: Any, path: Path, out: _Report) -> None:
    if str(value).lower() not in _QUERY_BOOLS:
        out.error(path, _wrong("true or false", value))


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value) if len(value) < 20 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _count(value: Any, path: Path, out: _Report) -> None:
    if _whole(value) is None:
        out.error(path, _wrong("a whole number of 0 or more", value))


def _anything(value: Any, path: Path, out: _Report) -> None:  # noqa: ARG001 - the signature of a check
    return


def _interval(value: Any, path: Path, out: _Report) -> None:
    if (seconds := _whole(value)) is None:
        out.error(path, _wrong("seconds as a whole number", value))
    elif not 0 < seconds <= INTERVAL_MAX_S:
        out.warning(path, f"osquery drops the query: {seconds} s is not between 1 and {INTERVAL_MAX_S}")


def _shard(value: Any, path: Path, out: _Report) -> None:
    if (percent := _whole(value)) is None or percent > 100:
        out.error(path, _wrong("percent of hosts, 1 to 100", value))


def _items(check_item: _Check) -> _Check:
    def check_items(value: Any, path: Path, out: _Report) -> None:
        if not isinstance(value, list):
            out.error(path, _wrong("a list", value))
            return
        for index, item in enumerate(value):
            check_item(item, (*path, index), out)

    return check_items


def _entries(check_entry: _Check) -> _Check:
    def check_entries(value: Any, path: Path, out: _Report) -> None:
        if not isinstance(value, dict):
            out.error(path, _wrong("an object", value))
            return
        for name, entry in value.items():
            if entry is not None:
                check_entry(entry, (*path, name), out)

    return check_entries


def _members(known: Mapping[str, _Check], required: tuple[str, ...] = ()) -> _Check:
    def check_members(value: Any, path: Path, out: _Report) -> None:
        if not isinstance(value, dict):
            out.error(path, _wrong("an object", value))
            return
        for name in required:
            if name not in value:
                out.error(path, f"expected {name!r}, which is missing")
        for name, member in value.items():
            if name in known:
                known[name](member, (*path, name), out)
            elif meant := _meant(name, known):
                out.warning((*path, name), f"osquery does not read this key{meant}")

    return check_members


_QUERY_MEMBERS: Mapping[str, _Check] = {
    "query": _sql,
    "interval": _interval,
    "removed": _flag,
    "snapshot": _flag,
    "denylist": _flag,
    "blacklist": _flag,
    "platform": _text,
    "version": _text,
    "shard": _shard,
    "startup_priority": _count,
    "description": _anything,
    "value": _anything,
}
_check_query = _members(_QUERY_MEMBERS, required=("query",))


def _query(value: Any, path: Path, out: _Report) -> None:
    name = str(path[-1])
    if name.startswith(("query.", "cache.", "config_views.")) or name.endswith(("epoch", "counter")):
        out.warning(path, "osquery refuses the names query.*, cache.*, config_views.*, *epoch and *counter")
    _check_query(value, path, out)


def _pack(value: Any, path: Path, out: _Report) -> None:
    if path[-1] == "main":
        out.error(path, 'expected another name: osquery keeps the schedule as "main", which this replaces')
    if isinstance(value, str):
        out.warning(path, "osquery's tls plugin reads no pack files: give the pack itself, or load it from a file")
        return
    _check_pack(value, path, out)
    if isinstance(value, dict):
        if value.keys().isdisjoint(("queries", *_SECTIONS)):
            out.warning(path, "a pack without queries does nothing")
        _check_sections({key: part for key, part in value.items() if key not in _PACK_MEMBERS}, path, out)


_PACK_MEMBERS: Mapping[str, _Check] = {
    "queries": _entries(_query),
    "discovery": _items(_sql),
    "platform": _text,
    "version": _text,
    "shard": _shard,
    "oncall": _text,
}
_check_pack = _members(_PACK_MEMBERS)


@lru_cache(maxsize=1)
def load_flags() -> Mapping[str, Mapping[str, str]]:
    """osquery's flags by name: ``kind`` (cli_only, option, hidden, shell, alias), ``type``, ``default``."""
    flags: dict[str, dict[str, str]] = json.loads(fixture_path("osquery_flags.json").read_text(encoding="utf-8"))
    return flags


def _option(value: Any, path: Path, out: _Report) -> None:
    """As OptionsConfigParserPlugin sets them; what it cannot set it drops with a warning."""
    name = str(path[-1])
    if name.startswith("custom_") or name in _GLOG_OPTIONS:
        return
    flags = load_flags()
    flag = flags.get(name)
    if flag is None:
        out.warning(path, f"osquery ignores it: no such option{_meant(name, flags)}")
    elif flag["kind"] == "cli_only":
        out.warning(path, "osquery ignores it in a config: it belongs in the flag file")
    elif flag["kind"] == "shell":
        out.warning(path, "osqueryd ignores it: it is an option of the osqueryi shell")
    elif not _fits(value, flag.get("type", "string")):
        out.warning(path, f"osquery ignores it: {_wrong(flag['type'], value)}")


def _fits(value: Any, kind: str) -> bool:
    if kind == "bool":
        return str(value).lower() in _OPTION_BOOLS
    if kind == "string":
        return value is not None and not isinstance(value, float)
    return _whole(value) is not None or (kind == "int32" and isinstance(value, int) and not isinstance(value, bool))


def _decorator_interval(value: Any, path: Path, out: _Report) -> None:
    seconds = _whole(path[-1])
    if seconds == 0:
        out.error(path, "expected 60 seconds or more, got 0, by which osquery divides")
    elif seconds is None or seconds % 60:
        out.warning(path, "osquery drops it: expected seconds that are a multiple of 60")
    _items(_sql)(value, path, out)


def _columns(value: Any, path: Path, out: _Report) -> None:
    _items(_text)(value, path, out)
    if isinstance(value, list) and "path" in value:
        out.warning(path, 'osquery drops the column "path": it adds one of its own')


_TABLE_MEMBERS: Mapping[str, _Check] = {"query": _sql, "path": _text, "columns": _columns, "platform": _text}
_SECTIONS: Mapping[str, _Check] = {
    "auto_table_construction": _entries(_members(_TABLE_MEMBERS, required=("query", "path", "columns"))),
    "decorators": _members({"load": _items(_sql), "always": _items(_sql), "interval": _entries(_decorator_interval)}),
    "events": _members({"enable_subscribers": _items(_text), "disable_subscribers": _items(_text)}),
    "exclude_paths": _entries(_items(_text)),
    "feature_vectors": _entries(_anything),
    "file_accesses": _items(_text),
    "file_paths": _entries(_items(_text)),
    "file_paths_query": _entries(_items(_sql)),
    "kafka_topics": _entries(_items(_text)),
    "logger": _entries(_anything),
    "options": _entries(_option),
    "packs": _entries(_pack),
    "prometheus_targets": _members({"urls": _items(_text), "timeout": _count}),
    "schedule": _entries(_query),
    "views": _entries(_sql),
    "yara": _members(
        {
            "signatures": _entries(_items(_text)),
            "file_paths": _entries(_items(_text)),
            "signature_urls": _items(_text),
        }
    ),
}
