"""Config files on disk: reading them, and noticing that they changed.

``.conf`` and ``.json`` files are read as osquery's filesystem plugin reads them (stripConfigComments in
osquery/config/config.cpp), ``.yaml`` and ``.yml`` as the same members in YAML or as Fleet documents. osqueryd's
tls plugin fetches no pack files, so packs given as paths are read here and become part of the source.
"""

from __future__ import annotations

import json
import re
import stat
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path as File
from typing import Any, NoReturn

import msgspec

from osqbox.errors import BadSetup
from osqbox.osquery.amalgamate import WRAPPER, FileStamp, Source, dotted, got, read_source
from osqbox.osquery.structure import DEPTH_MAX, deepest

KIB = 1024
MIB = 1024 * KIB
FILE_BYTES = 4 * MIB
YAML_FILE_BYTES = 1 * MIB
YAML_NODES = 100_000
SOURCE_FILES = 256
SOURCE_BYTES = 16 * MIB

_JSON_SUFFIXES = (".conf", ".json")
_YAML_SUFFIXES = (".yaml", ".yml")


# --- reading ----------------------------------------------------------------------------------------


def load_sources(paths: Iterable[str | File]) -> tuple[Source, ...]:
    """Config files as sources, one per path. Raises BadSetup; also when two files share a name."""
    sources: dict[str, Source] = {}
    for path in paths:
        source = load_source(path)
        if source.name in sources:
            raise BadSetup(f"{path}: expected config files with different names, got {source.name!r} twice")
        sources[source.name] = source
    return tuple(sources.values())


def load_source(path: str | File) -> Source:
    """One config file, with the packs it points to, as a source named after the file.

    A file whose top has ``queries`` is a pack and becomes a config with that pack. Raises BadSetup with file,
    line and column where they are known, what was expected and what was found.
    """
    reading = _Reading()
    path = File(path)
    document = reading.document(path)
    if isinstance(document, dict) and "queries" in document:
        wrapper = {key: document.pop(key) for key in (WRAPPER,) if key in document}
        document = {"packs": {path.stem: document}, **wrapper}
    if isinstance(document, dict) and isinstance(document.get("packs"), dict):
        document = {**document, "packs": reading.packs(path, document["packs"])}
    source = read_source(str(path), document, origin="file", files=tuple(reading.stamps))
    if too_deep := deepest(source.content, (), 1):
        raise BadSetup(f"{path}: {dotted(too_deep)}: expected at most {DEPTH_MAX} levels of nesting")
    try:
        msgspec.json.encode(source.content)
    except UnicodeEncodeError as error:
        raise BadSetup(f"{path}: expected Unicode text, got half of a surrogate pair: {error.reason}") from error
    return replace(source, name=path.name)


def changed(files: Iterable[FileStamp]) -> bool:
    """Whether a file of a source, or a directory its ``*`` packs came from, is no longer as it was read."""
    return any(_stamp(File(stamp.path)) != stamp for stamp in files)


def _stamp(path: File) -> FileStamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return FileStamp(str(path), status.st_mtime_ns, status.st_size)


class _Reading:
    """The files of one source, bounded in number and bytes."""

    def __init__(self) -> None:
        self.stamps: list[FileStamp] = []
        self._left_bytes = SOURCE_BYTES

    def document(self, path: File) -> Any:
        yaml = path.suffix in _YAML_SUFFIXES
        if not yaml and path.suffix not in _JSON_SUFFIXES:
            raise BadSetup(f"{path}: expected a name ending .conf, .json, .yaml or .yml, got {path.name!r}")
        text = self._text(path, YAML_FILE_BYTES if yaml else FILE_BYTES)
        return _parse_yaml(path, text) if yaml else _parse_json(path, text)

    def packs(self, config: File, packs: Mapping[str, Any]) -> dict[str, Any]:
        inlined: dict[str, Any] = {}
        for name, pack in packs.items():
            if name == "*" and isinstance(pack, str):
                for path in self._glob(config.parent, pack.replace("%", "*")):
                    inlined[path.stem] = self._pack(path)
            elif isinstance(pack, str):
                inlined[name] = self._pack(config.parent / pack)
            else:
                inlined[name] = pack
        return inlined

    def _pack(self, path: File) -> Any:
        pack = self.document(path)
        if not isinstance(pack, dict):
            raise BadSetup(f"{path}: expected a pack, an object with queries, got {got(pack)}")
        return pack

    def _glob(self, beside: File, pattern: str) -> list[File]:
        suffixes = (*_JSON_SUFFIXES, *_YAML_SUFFIXES)
        names = glob(pattern, root_dir=beside)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = sorted(beside / name for name in names if name.endswith(suffixes))
        folder = (beside / pattern).parent
        if not found and not folder.is_dir():
            raise BadSetup(f"{beside / pattern}: expected a directory of packs, got none")
        # A file that comes or goes changes its directory.
        stamps = (_stamp(directory) for directory in sorted({folder, *(path.parent for path in found)}))
        self.stamps += [stamp for stamp in stamps if stamp]
        return found

    def _text(self, path: File, limit_bytes: int) -> str:
        if len(self.stamps) >= SOURCE_FILES:
            raise BadSetup(f"{path}: expected at most {SOURCE_FILES} files for one config, got more")
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadSetup(f"{path}: expected a regular file")
            with path.open("rb") as file:
                raw = file.read(limit_bytes + 1)
        except OSError as error:
            raise BadSetup(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # a null character in the path
            raise BadSetup(f"{str(path)!r}: cannot be read: {error}") from error
        if len(raw) > limit_bytes:
            raise BadSetup(f"{path}: expected at most {limit_bytes} bytes, got more")
        self._left_bytes -= len(raw)
        if self._left_bytes < 0:
            raise BadSetup(f"{path}: expected at most {SOURCE_BYTES} bytes for one config with its packs, got more")
        self.stamps.append(FileStamp(str(path), status.st_mtime_ns, status.st_size))
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise BadSetup(f"{path}:{line}: expected UTF-8, got the byte {raw[error.start]:#04x}") from error


# --- JSON as osquery reads it -----------------------------------------------------------------------


def _parse_json(path: File, text: str) -> Any:
    clean, marks = _strip_comments(text)

    def refuse(pos: int, expected: str) -> NoReturn:
        clean_at, text_at = marks[bisect_right(marks, (pos, len(text))) - 1]
        raise BadSetup(f"{path}:{_place(text, text_at + pos - clean_at)}: {expected}")

    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(members)
        if len(found) < len(members):
            names = [name for name, _ in members]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadSetup(f"{path}: expected each key once in an object, got {twice!r} twice")
        return found

    def no_constant(name: str) -> NoReturn:
        refuse(max(clean.find(name), 0), f"expected a JSON number, got {name}")

    try:
        return json.loads(clean, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        wanted = error.msg[:1].lower() + error.msg[1:]
        found = clean[error.pos : error.pos + 20].split("\n")[0] or "the end"
        comment = "; a comment needs a line of its own" if found.startswith(("#", "//")) else ""
        refuse(error.pos, f"expected JSON ({wanted}), got {found!r}{comment}")
    except (RecursionError, ValueError) as error:
        reason = f"more than {DEPTH_MAX} levels" if isinstance(error, RecursionError) else str(error)
        raise BadSetup(f"{path}: expected a JSON config, got {reason}") from error


def _strip_comments(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without comment lines and escaped line ends, with (offset, original offset) of its pieces."""
    parts: list[str] = []
    marks: list[tuple[int, int]] = []
    clean_at = text_at = 0
    comment = continued = False
    # Not str.splitlines, which also breaks at U+2028 and others.
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if not continued:
            comment = line.lstrip().startswith(("#", "//"))
        body = line.rstrip("\r\n")
        continued = body.endswith("\\") and body != line
        kept = body[:-1] if continued else line
        kept = kept if not comment else "" if continued else "\n"
        marks.append((clean_at, text_at))
        parts.append(kept)
        clean_at += len(kept)
        text_at += len(line)
    return "".join(parts), marks or [(0, 0)]


def _place(text: str, offset: int) -> str:
    return f"{text.count(chr(10), 0, offset) + 1}:{offset - text.rfind(chr(10), 0, offset)}"


# --- YAML -------------------------------------------------------------------------------------------


def _parse_yaml(path: File, text: str) -> Any:
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = base(text)
    documents: list[Any] = []
    try:
        while loader.check_node():
            node = loader.get_node()
            _weigh(path, node)
            documents.append(_yaml_value(path, node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise BadSetup(f"{path}{place}: expected YAML, got: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise BadSetup(f"{path}: expected YAML, got: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()
    documents = [document for document in documents if document is not None]
    if any(isinstance(document, dict) and {"kind", "spec"} <= document.keys() for document in documents):
        return _from_fleet(path, documents)
    if len(documents) > 1:
        raise BadSetup(f"{path}: expected one YAML document, got {len(documents)}")
    return documents[0] if documents else {}


def _weigh(path: File, root: Any) -> None:
    """Refuse nesting and, since aliases multiply, size before anything is built."""
    weights: dict[int, int] = {}

    def weigh(node: Any, depth: int) -> int:
        if depth > DEPTH_MAX + 4:  # room for the wrapping of Fleet documents; the config itself is measured later
            raise _yaml_bad(path, node, f"expected at most {DEPTH_MAX} levels of nesting")
        if id(node) not in weights:
            items = node.value if isinstance(node.value, list) else ()
            children = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
            weights[id(node)] = 1 + sum(weigh(child, depth + 1) for child in children)
        if weights[id(node)] > YAML_NODES:
            raise _yaml_bad(path, node, f"expected at most {YAML_NODES} values, aliases counted each time")
        return weights[id(node)]

    weigh(root, 1)


def _yaml_value(path: File, node: Any) -> Any:
    """JSON's types only: ``yes``, ``on`` and dates stay the words they are, keys are always strings."""
    if isinstance(node.value, str):
        return _yaml_scalar(path, node)
    if node.tag.endswith(":seq"):
        return [_yaml_value(path, item) for item in node.value]
    if not node.tag.endswith(":map"):
        raise _yaml_bad(path, node, f"expected a JSON-like value, got {node.tag}")
    members: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key.value, str) or key.tag.endswith(":merge"):
            raise _yaml_bad(path, key, "expected a plain key")
        if key.value in members:
            raise _yaml_bad(path, key, f"expected each key once, got {key.value!r} twice")
        members[key.value] = _yaml_value(path, value)
    return members


def _yaml_scalar(path: File, node: Any) -> Any:
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in ("int", "float"):
        try:
            number = json.loads(text)
        except ValueError:
            return text
        return number if isinstance(number, int | float) else text
    if kind in ("str", "bool", "timestamp", "value"):
        return text
    raise _yaml_bad(path, node, f"expected a JSON-like value, got {node.tag}")


def _yaml_bad(path: File, node: Any, expected: str) -> BadSetup:
    mark = node.start_mark
    return BadSetup(f"{path}:{mark.line + 1}:{mark.column + 1}: {expected}")


# --- Fleet documents (fleetctl apply -f) ------------------------------------------------------------

_FLEET_ENTRY = ("interval", "removed", "snapshot", "platform", "version", "shard", "denylist")


def _from_fleet(path: File, documents: list[Any]) -> dict[str, Any]:
    """Documents of kind query, pack, options and config as one osquery config."""
    specs: dict[str, list[dict[str, Any]]] = {"query": [], "pack": [], "options": [], "config": []}
    for document in documents:
        kind, spec = (document.get("kind"), document.get("spec")) if isinstance(document, dict) else (None, None)
        if kind not in specs or not isinstance(spec, dict):
            raise BadSetup(f"{path}: expected Fleet documents of kind {', '.join(specs)}, got {kind!r}")
        specs[kind].append(spec)
    content: dict[str, Any] = {}
    for options in specs["options"] + [spec.get("agent_options") or {} for spec in specs["config"]]:
        content.update(_fleet_options(path, options))
    queries = {str(spec.get("name")): spec for spec in specs["query"]}
    if schedule := {name: _fleet_query(spec) for name, spec in queries.items() if spec.get("interval")}:
        content["schedule"] = {**content.get("schedule", {}), **schedule}
    if specs["pack"]:
        packs = {str(spec.get("name")): _fleet_pack(path, spec, queries) for spec in specs["pack"]}
        content["packs"] = {**content.get("packs", {}), **packs}
    return content


def _fleet_options(path: File, options: dict[str, Any]) -> dict[str, Any]:
    if (options.get("overrides") or {}).get("platforms"):
        raise BadSetup(
            f"{path}: Fleet's overrides are not imported",
            hint='put each platform in a file of its own with "osqbox": {"target": {"platforms": [...]}}',
        )
    config = options.get("config") or {}
    if not isinstance(config, dict):
        raise BadSetup(f"{path}: config: expected an object, got {got(config)}")
    return config


def _fleet_query(spec: dict[str, Any]) -> dict[str, Any]:
    """A query that Fleet schedules by itself: ``logging`` is its word for snapshot and removed."""
    entry = {"query": spec.get("query"), "interval": spec["interval"]}
    if platform := spec.get("platform"):
        entry["platform"] = platform
    if version := spec.get("min_osquery_version"):
        entry["version"] = version
    if spec.get("logging") == "snapshot":
        entry["snapshot"] = True
    elif spec.get("logging") == "differential_ignore_removals":
        entry["removed"] = False
    return entry


def _fleet_pack(path: File, spec: dict[str, Any], queries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for item in spec.get("queries") or []:
        name = item.get("query") if isinstance(item, dict) else None
        if name not in queries:
            raise BadSetup(f"{path}: pack {spec.get('name')!r}: expected a query of this file, got {name!r}")
        settings = {key: item[key] for key in _FLEET_ENTRY if item.get(key) is not None}
        entries[str(item.get("name") or name)] = {"query": queries[name].get("query"), **settings}
    pack = {key: spec[key] for key in ("platform", "version", "shard") if spec.get(key)}
    return {**pack, "queries": entries}
