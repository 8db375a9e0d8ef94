"""What a config asks an agent to do, checked and named as osqueryd does it: schedule, packs, decorators.

osquery/config/{config,packs}.cpp and plugins/config/parsers/decorators.cpp of osquery 5.23. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from osqbox.agent.messages import LINUX, VERSION

MAX_INTERVAL_S = 604_800
MAIN_PACK = "main"
_PLATFORM_WORDS = {8: ("linux", "ubuntu", "centos"), 1: ("posix",), 16: ("darwin",), 2: ("windows",), 32: ("freebsd",)}
"""By bit of the platform type (platform_type.h)."""
_REFUSED_PREFIXES = ("query.", "cache.", "config_views.")
_REFUSED_SUFFIXES = ("epoch", "counter")

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ScheduledQuery:
    name: str
    """As logged: ``pack_<pack>_<query>`` in a pack."""
    query: str
    interval_s: int
    splayed_s: int
    snapshot: bool = False
    removed: bool = True
    denylist: bool = True
    startup_priority: int | None = None

    def due_after(self, now: float) -> int:
        """The first second after ``now`` that the splayed interval divides."""
        return (int(now) // self.splayed_s + 1) * self.splayed_s

    def due_between(self, previous: float, now: float) -> bool:
        """Whether such a second lies in (previous, now]."""
        return int(now) // self.splayed_s > int(previous) // self.splayed_s


@dataclass(frozen=True, slots=True)
class Pack:
    name: str
    queries: tuple[ScheduledQuery, ...]
    platform: str = ""
    version: str = ""
    shard: int = 0
    discovery: tuple[str, ...] = ()
    """SQL; every one needs a row for the pack to run."""
    applies: bool = True
    """Platform, version and shard include this host."""


@dataclass(frozen=True, slots=True)
class Decorators:
    load: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    interval: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """By seconds, multiples of 60."""


@dataclass(frozen=True, slots=True)
class Config:
    packs: tuple[Pack, ...] = ()
    """The schedule first, as pack ``main``."""
    decorators: Decorators = Decorators()
    options: Mapping[str, Any] = field(default_factory=dict)
    signature_urls: tuple[str, ...] = ()
    """From where the yara tables may fetch rules: scheme and host, and a regular expression for the path."""
    signatures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Groups of YARA rule files."""

    def queries(self) -> Iterator[tuple[Pack, ScheduledQuery]]:
        return ((pack, query) for pack in self.packs if pack.applies for query in pack.queries)


@dataclass(frozen=True, slots=True)
class Rules:
    """What reading a config depends on besides its text."""

    hostname: str
    delimiter: str = "_"
    default_interval_s: int = 3600
    splay: Callable[[str, int], int] = lambda _name, interval_s: interval_s
    """The interval to use for a query's name and configured interval."""
    platform_type: int = LINUX


# -- checks ------------------------------------------------------------------------------------------------------


def platform_matches(wanted: str, platform_type: int = LINUX) -> bool:
    """A substring test, as upstream's: ``linux,darwin`` and ``posix`` include a Linux host."""
    if wanted in ("", "null"):
        return True
    ours = [word for bit, words in _PLATFORM_WORDS.items() if platform_type & bit for word in words]
    return any(word in wanted for word in ("any", "all", *ours))


def version_at_least(wanted: str, version: str = VERSION) -> bool:
    """Whether ``version`` is ``wanted`` or newer, compared number by number."""
    if wanted in ("", "null"):
        return True
    return _numbers(version) >= _numbers(wanted)


def _numbers(version: str) -> list[int]:
    found = [int(part) if part.isdecimal() else 0 for part in version.split(".")]
    while found and found[-1] == 0:
        found.pop()
    return found


def shard_includes(shard: int, hostname: str) -> bool:
    """``shard`` is the per cent of hosts meant; 0 and values over 100 are all."""
    first_byte = hashlib.sha1(hostname.encode(), usedforsecurity=False).digest()[0]
    return not 0 < shard <= 100 or shard >= first_byte * 100 // 255


def splay(interval_s: int, percent: int, pick: Callable[[int, int], int]) -> int:
    """An interval moved at random by at most ``percent``; ``pick(a, b)`` chooses from a to b inclusive."""
    if interval_s <= 0 or not 0 < percent <= 100:
        return interval_s
    difference = interval_s * percent // 100
    low, high = max(1, interval_s - difference), interval_s + difference
    return high if low == high else pick(low, high)


# -- reading -----------------------------------------------------------------------------------------------------


def read_sources(sources: Mapping[str, Mapping[str, Any]], rules: Rules, warn: Warn) -> Config:
    """Several sources in name order: schedules, packs and decorators add up, of options the last wins (config.cpp)."""
    configs = [read_config(members, rules, warn) for members in sources.values()]
    return Config(
        packs=tuple(pack for config in configs for pack in config.packs),
        decorators=_merged([config.decorators for config in configs]),
        options={name: value for config in configs for name, value in config.options.items()},
        signature_urls=tuple(url for config in configs for url in config.signature_urls),
        signatures={name: files for config in configs for name, files in config.signatures.items()},
    )


def _merged(decorators: list[Decorators]) -> Decorators:
    interval: dict[int, tuple[str, ...]] = {}
    for each in decorators:
        for seconds, queries in each.interval.items():
            interval[seconds] = interval.get(seconds, ()) + queries
    return Decorators(
        tuple(sql for each in decorators for sql in each.load),
        tuple(sql for each in decorators for sql in each.always),
        interval,
    )


def read_config(members: Mapping[str, Any], rules: Rules, warn: Warn) -> Config:
    """Members of the wrong type are left out with a warning; nothing raises."""
    packs = [Pack(MAIN_PACK, tuple(_queries(_object(members, "schedule", warn), "", rules, warn)))]
    for name, entry in _object(members, "packs", warn).items():
        if isinstance(entry, dict):
            packs.append(_pack(name, entry, rules, warn))
        else:
            warn(f"Cannot expand pack {name}: expected an object, or a path that the config plugin can read")
    yara = _object(members, "yara", warn)
    return Config(
        packs=tuple(packs),
        decorators=_decorators(_object(members, "decorators", warn), warn),
        options=_object(members, "options", warn),
        signature_urls=tuple(_strings(yara.get("signature_urls"))),
        signatures={name: tuple(_strings(files)) for name, files in _object(yara, "signatures", warn).items()},
    )


def _pack(name: str, entry: Mapping[str, Any], rules: Rules, warn: Warn) -> Pack:
    prefix = f"pack{rules.delimiter}{name}{rules.delimiter}"
    discovery = entry.get("discovery", [])
    return Pack(
        name=name,
        queries=tuple(_queries(_object(entry, "queries", warn), prefix, rules, warn)),
        platform=_text(entry.get("platform")),
        version=_text(entry.get("version")),
        shard=_integer(entry.get("shard"), 0),
        discovery=tuple(_strings(discovery)),
        applies=_applies(entry, rules),
    )


def _applies(entry: Mapping[str, Any], rules: Rules) -> bool:
    return (
        platform_matches(_text(entry.get("platform")), rules.platform_type)
        and version_at_least(_text(entry.get("version")))
        and shard_includes(_integer(entry.get("shard"), 0), rules.hostname)
    )


def _queries(entries: Mapping[str, Any], prefix: str, rules: Rules, warn: Warn) -> Iterator[ScheduledQuery]:
    for short, entry in entries.items():
        name = prefix + short
        if name.startswith(_REFUSED_PREFIXES) or name.endswith(_REFUSED_SUFFIXES):
            warn(f"Query name {name} is reserved")
        elif not isinstance(entry, dict) or not _text(entry.get("query")):
            warn(f"No query found for {name}")
        elif _applies(entry, rules):
            interval_s = _integer(entry.get("interval"), rules.default_interval_s)
            if not 0 < interval_s <= MAX_INTERVAL_S:
                warn(f"Invalid interval for query {name}: {interval_s}")
                continue
            yield ScheduledQuery(
                name=name,
                query=_text(entry["query"]),
                interval_s=interval_s,
                splayed_s=max(1, rules.splay(name, interval_s)),
                snapshot=_true(entry.get("snapshot"), False),
                removed=_true(entry.get("removed"), True),
                denylist=_true(entry.get("denylist"), True),
                startup_priority=_optional_integer(entry.get("startup_priority")),
            )


def _decorators(entries: Mapping[str, Any], warn: Warn) -> Decorators:
    interval: dict[int, tuple[str, ...]] = {}
    for key, queries in _object(entries, "interval", warn).items():
        seconds = _integer(key, 0)
        if seconds <= 0 or seconds % 60:
            warn(f"Invalid decorator interval rate {key} in config source: tls_plugin")
        else:
            interval[seconds] = tuple(_strings(queries))
    return Decorators(tuple(_strings(entries.get("load"))), tuple(_strings(entries.get("always"))), interval)


def _object(members: Mapping[str, Any], key: str, warn: Warn) -> Mapping[str, Any]:
    found = members.get(key, {})
    if isinstance(found, dict):
        return found
    warn(f"Config member {key} is not an object")
    return {}


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        value = [value]
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _integer(value: Any, default: int) -> int:
    found = _optional_integer(value)
    return default if found is None else found


def _optional_integer(value: Any) -> int | None:
    """An int or a numeric string; bounded, so that arithmetic stays small."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(2**63), min(2**63 - 1, value))
    if isinstance(value, str) and len(value) < 20 and value.strip().lstrip("-").isdecimal():
        return int(value)
    return None


def _true(value: Any, default: bool) -> bool:
    if value is None:
        return default
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "t", "1"))
