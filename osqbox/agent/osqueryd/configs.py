"""The filesystem config plugin: ``--config_path``, the files of ``.d`` beside it, and packs named by a path.

plugins/config/filesystem.cpp and osquery/config/config.cpp of osquery 5.23.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from osqbox.agent.messages import read_config_text
from osqbox.errors import BadSetup

CONFIG_MAX_BYTES = 4 * 1024 * 1024


class ConfigMissing(BadSetup):
    """No config where one was named."""


def read_sources(config_path: str) -> dict[str, str]:
    """Path -> text of every config file, in the order of their names. Raises ConfigMissing."""
    first = Path(config_path)
    sources = {config_path: _read(first)} if first.is_file() else {}
    for path in sorted(Path(f"{config_path}.d").glob("*.conf")):
        sources[str(path)] = _read(path)
    if not sources:
        raise ConfigMissing(f"config file does not exist: {config_path}", hint="--config_path FILE")
    return sources


def read_pack(name: str, value: str) -> dict[str, str]:
    """Pack name -> text for a pack given by its path; the name ``*`` takes a pattern, and names by file."""
    if name != "*":
        return {name: _read(Path(value))}
    return {Path(path).stem: _read(Path(path)) for path in sorted(glob.glob(value))}  # noqa: PTH207 - an own pattern


def _read(path: Path) -> str:
    try:
        with path.open("rb") as source:
            content = source.read(CONFIG_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigMissing(f"cannot read {path}: {error.strerror}") from error
    if len(content) > CONFIG_MAX_BYTES:
        raise ConfigMissing(f"{path}: expected at most {CONFIG_MAX_BYTES} bytes of config")
    return content.decode("utf-8", "replace")


def check(config_path: str) -> str:
    """Why the config cannot be used; empty when it can."""
    try:
        sources = read_sources(config_path)
    except ConfigMissing as error:
        return str(error)
    for path, text in sources.items():
        if read_config_text(text) is None:
            return f"Error parsing the config JSON: {path}"
    return ""


def dump(config_path: str) -> str:
    """``--config_dump``: a line for each source, with its text as it is. Raises ConfigMissing."""
    return "".join(f'{{"{path}": {text}}}\n' for path, text in read_sources(config_path).items())


def pack_queries(config_path: str, name: str) -> list[tuple[str, str]]:
    """Name and SQL of each query of a pack. Raises ConfigMissing for an unknown pack."""
    for text in read_sources(config_path).values():
        for pack_name, entry in _packs(text).items():
            if pack_name == name:
                queries = entry.get("queries", {})
                return [(n, q["query"]) for n, q in queries.items() if isinstance(q, dict) and q.get("query")]
    raise ConfigMissing(f"no pack {name!r} in {config_path}")


def _packs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    members = read_config_text(text) or {}
    for name, value in dict(members.get("packs") or {}).items():
        texts = {name: json.dumps(value)} if isinstance(value, dict) else read_pack(name, str(value))
        found |= {each: dict(read_config_text(content) or {}) for each, content in texts.items()}
    return found
