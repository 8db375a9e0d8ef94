"""Several config sources become the one config a node reads. Pure.

osqueryd's tls plugin knows a single config (osquery's remote API: "a server should amalgamate/merge several
configs itself"), so the box decides which sources a node gets and in which order they lie over each other,
and can say afterwards where every value came from. The rules, each with an example, are in docs/config.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from osqbox.errors import BadSetup

Path: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a config: names of members and indexes of items."""
Shape: TypeAlias = "Literal['whole', 'list'] | Mapping[str, Shape]"
"""How two values of one key meet: the later replaces, lists are joined, or members are merged one by one."""

WRAPPER = "osqbox"
_MAP: Shape = {}
# Every top-level key osquery reads (osquery/config/config.cpp, plugins/config/parsers/*.cpp).
# Members that a shape does not name are "whole"; "*" names all others.
SHAPES: Mapping[str, Shape] = {
    "auto_table_construction": _MAP,
    "decorators": {"load": "list", "always": "list", "interval": {"*": "list"}},
    "events": {"enable_subscribers": "list", "disable_subscribers": "list"},
    "exclude_paths": _MAP,
    "feature_vectors": _MAP,
    "file_accesses": "list",
    "file_paths": _MAP,
    "file_paths_query": _MAP,
    "kafka_topics": _MAP,
    "logger": _MAP,
    "options": _MAP,
    "packs": _MAP,
    "prometheus_targets": {"urls": "list"},
    "schedule": _MAP,
    "views": _MAP,
    "yara": {"signatures": _MAP, "file_paths": _MAP, "signature_urls": "list"},
}

_FAMILY_WORDS = {
    "linux": frozenset(("linux", "posix")),
    "darwin": frozenset(("darwin", "macos", "posix")),
    "freebsd": frozenset(("freebsd", "posix")),
    "windows": frozenset(("windows",)),
    "": frozenset[str](),
}
_EVERY_PLATFORM = frozenset(("any", "all", ""))


class FileStamp(NamedTuple):
    """A file or directory as it was when it was read."""

    path: str
    mtime_ns: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """Who gets a source. An empty kind asks nothing; kinds are joined by AND, names within a kind by OR."""

    tenants: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    """Node ids, host names or host identifiers; ``*`` and ``?`` are wildcards."""

    @property
    def specificity(self) -> int:
        """0 for everybody, then 1 tenant, 2 platform, 3 tag, 4 node: the narrowest kind that is asked for."""
        kinds = (self.tenants, self.platforms, self.tags, self.nodes)
        return max((rank for rank, names in enumerate(kinds, 1) if names), default=0)


@dataclass(frozen=True, slots=True)
class Source:
    """One config as somebody wrote it. Name, origin and version together identify it."""

    name: str
    content: Mapping[str, Any]
    """An osquery config: JSON values under string keys, never changed in place."""
    target: Target = Target()
    priority: int = 0
    origin: Literal["file", "api"] = "api"
    version: int = 1
    files: tuple[FileStamp, ...] = field(default=(), compare=False)
    """What was read to make it, so that a change can be noticed."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a target can ask about a node. ``platform`` as in os_version: ubuntu, darwin, windows, ..."""

    id: str
    tenant: str
    hostname: str = ""
    host_identifier: str = ""
    platform: str = ""
    platform_like: str = ""
    tags: frozenset[str] = frozenset()


class Overridden(NamedTuple):
    """A value that a later source replaced or removed."""

    path: Path
    source: str
    version: int
    value: Any
    by: str


@dataclass(frozen=True, slots=True)
class Merged:
    config: dict[str, Any]
    """Shares its values with the sources: read it, do not change it."""
    text: bytes
    """Canonical JSON: keys sorted, so equal content is equal bytes and osquery sees no change."""
    owners: Mapping[Path, Source]
    """The source of each entry, item and container as it was merged."""
    overridden: tuple[Overridden, ...]
    notes: tuple[str, ...]

    @property
    def origins(self) -> dict[Path, str]:
        """The name of the one source behind every leaf of ``config``."""
        return {path: _owner(self.owners, path).name for path, _ in _leaves(self.config, ())}


class Overrode(NamedTuple):
    source: str
    version: int
    value: Any


class Explained(NamedTuple):
    """One leaf of the result: its key, such as ``schedule.proc.query``, who gave it and over whom it won."""

    key: str
    source: str
    version: int
    value: Any
    overrode: tuple[Overrode, ...]


def amalgamate(sources: Iterable[Source], facts: NodeFacts) -> Merged:
    """The config of one node, whatever the order of ``sources``."""
    return merge(select(sources, facts))


def select(sources: Iterable[Source], facts: NodeFacts) -> tuple[Source, ...]:
    """The sources that apply to a node, the weakest first. Equal selections merge to equal configs."""
    return tuple(sorted((source for source in sources if applies(source, facts)), key=_strength))


def applies(source: Source, facts: NodeFacts) -> bool:
    target = source.target
    return (
        (not target.tenants or facts.tenant in target.tenants)
        and (not target.tags or not facts.tags.isdisjoint(target.tags))
        and (not target.platforms or any(matches_platform(wanted, facts) for wanted in target.platforms))
        and (not target.nodes or any(_is_node(wanted, facts) for wanted in target.nodes))
    )


def matches_platform(wanted: str, facts: NodeFacts) -> bool:
    """osquery's platform words (checkPlatform in osquery/core/system.cpp) and a distribution's own name.

    ``linux`` is every distribution, ``posix`` Linux, macOS and FreeBSD; ``any``, ``all`` and "" are all.
    Several words may stand in one string. Narrower than osquery in one point: ``ubuntu`` is only Ubuntu
    and what calls itself like it.
    """
    words = frozenset(re.findall(r"[\w.-]+", wanted.lower()) or ("",))
    own = {facts.platform.lower(), *facts.platform_like.lower().split()} - {""}
    return not words.isdisjoint(_EVERY_PLATFORM | own | _FAMILY_WORDS[_family(facts.platform)])


def merge(sources: Sequence[Source]) -> Merged:
    """Lay each source over the ones before it."""
    merging = _Merging()
    for source in sources:
        merging.add(source)
    text = msgspec.json.encode(merging.config, order="sorted")
    return Merged(merging.config, text, merging.owners, tuple(merging.overridden), tuple(merging.notes))


def explain(merged: Merged) -> list[Explained]:
    """Every leaf of a merged config with its history, sorted by key."""
    lost: dict[Path, list[Overridden]] = {}
    for old in merged.overridden:
        lost.setdefault(old.path, []).append(old)
    explained = []
    for path, value in _leaves(merged.config, ()):
        owner = _owner(merged.owners, path)
        overrode = tuple(_overrode(lost, path))
        explained.append(Explained(dotted(path), owner.name, owner.version, value, overrode))
    return sorted(explained, key=lambda leaf: leaf.key)


def dotted(path: Path) -> str:
    """``("schedule", "proc", "query")`` as ``schedule.proc.query``; odd names quoted, indexes in brackets."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w/*-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


def read_source(
    name: str,
    document: Any,
    *,
    origin: Literal["file", "api"] = "api",
    version: int = 1,
    files: tuple[FileStamp, ...] = (),
) -> Source:
    """A parsed config document as a source; its ``osqbox`` member says whom it is for and is left out.

    Raises BadSetup saying where, what was expected and what was found.
    """
    if not isinstance(document, dict):
        raise BadSetup(f"{name}: expected an object at the top of a config, got {got(document)}")
    content = {key: value for key, value in document.items() if key != WRAPPER}
    wrapper = _members(name, (WRAPPER,), document.get(WRAPPER, {}), ("target", "priority"))
    priority = wrapper.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise _bad(name, (WRAPPER, "priority"), "a whole number", priority)
    target = _read_target(name, wrapper.get("target", {}))
    return Source(name, content, target, priority, origin, version, files)


def got(value: Any) -> str:
    """A JSON value in the words of an error message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "the string " + json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"the number {value}"


class _Merging:
    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.owners: dict[Path, Source] = {}
        self.overridden: list[Overridden] = []
        self.notes: list[str] = []
        self._containers: set[Path] = set()

    def add(self, source: Source) -> None:
        for key, value in source.content.items():
            if key not in SHAPES:
                self.notes.append(
                    f"{source.name}: osquery does not read the key {dotted((key,))}; it is passed through"
                )
            self._put(self.config, (key,), value, SHAPES.get(key, "whole"), source)

    def _put(self, into: dict[str, Any], path: Path, value: Any, shape: Shape, source: Source) -> None:
        key = str(path[-1])
        merging = isinstance(value, dict) if isinstance(shape, Mapping) else shape == "list" and isinstance(value, list)
        if key in into and not (merging and type(into[key]) is type(value)):
            self._drop(path, into.pop(key), value, source)
        if value is None:
            return
        if not merging:
            into[key] = value
            self.owners[path] = source
            return
        self.owners.setdefault(path, source)
        self._containers.add(path)
        if isinstance(shape, Mapping):
            members = into.setdefault(key, {})
            for name, member in value.items():
                self._put(members, (*path, name), member, shape.get(name, shape.get("*", "whole")), source)
        else:
            self._join(into.setdefault(key, []), path, value, source)

    def _join(self, items: list[Any], path: Path, more: list[Any], source: Source) -> None:
        known = {_canonical(item) for item in items}
        for item in more:
            if (text := _canonical(item)) not in known:
                known.add(text)
                self.owners[*path, len(items)] = source
                items.append(item)

    def _drop(self, path: Path, old: Any, new: Any, by: Source) -> None:
        if path not in self._containers:
            if _canonical(old) != _canonical(new):
                self._lose(path, old, by)
            del self.owners[path]
            return
        for inner in [owned for owned in self.owners if owned[: len(path)] == path]:
            if inner in self._containers:
                self._containers.discard(inner)
            else:
                self._lose(inner, _at(old, inner[len(path) :]), by)
            del self.owners[inner]

    def _lose(self, path: Path, old: Any, by: Source) -> None:
        owner = self.owners[path]
        self.overridden.append(Overridden(path, owner.name, owner.version, old, by.name))


def _strength(source: Source) -> tuple[int, int, str, bool, int]:
    # Of equal names the operator's own word, given by the API, is the stronger one.
    return source.target.specificity, source.priority, source.name, source.origin == "api", source.version


def _is_node(wanted: str, facts: NodeFacts) -> bool:
    return any(name and fnmatchcase(name, wanted) for name in (facts.id, facts.hostname, facts.host_identifier))


def _family(platform: str) -> str:
    """os_version.platform names the distribution, so what is no other system is Linux."""
    platform = platform.lower()
    return platform if platform in _FAMILY_WORDS else "linux"


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, member in value.items():
            yield from _leaves(member, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif path:
        yield path, value


def _owner(owners: Mapping[Path, Source], path: Path) -> Source:
    return next(owners[path[:end]] for end in range(len(path), 0, -1) if path[:end] in owners)


def _overrode(lost: Mapping[Path, Sequence[Overridden]], path: Path) -> Iterator[Overrode]:
    for end in range(1, len(path) + 1):
        for old in lost.get(path[:end], ()):
            try:
                value = _at(old.value, path[end:])
            except (LookupError, TypeError):
                continue  # the loser had no such member
            yield Overrode(old.source, old.version, value)


def _at(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def _bad(name: str, path: Path, expected: str, value: Any) -> BadSetup:
    return BadSetup(f"{name}: {dotted(path)}: expected {expected}, got {got(value)}")


def _members(name: str, path: Path, value: Any, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(name, path, "an object", value)
    for key in value:
        if key not in known:
            raise BadSetup(f"{name}: {dotted((*path, key))}: expected one of {', '.join(known)}, got {key!r}")
    return value


def _read_target(name: str, value: Any) -> Target:
    path = (WRAPPER, "target")
    kinds = _members(name, path, value, ("tenants", "tags", "platforms", "nodes"))
    for kind, names in kinds.items():
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise _bad(name, (*path, kind), "a list of strings", names)
        if not names:
            # An empty list reads like "nobody" but would mean everybody.
            raise BadSetup(f"{name}: {dotted((*path, kind))}: expected at least one name, got an empty list")
    return Target(**{kind: tuple(names) for kind, names in kinds.items()})
