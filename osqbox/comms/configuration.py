"""What an agent's groups configure, put together. Pure.

Each group has one YAML mapping. Merged in the agent's order of groups: mappings are merged member by member, anything
else of a later group replaces what an earlier one said.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from .errors import CommsError, bad_request
from .messages import Group, Json
from .protocol import CONFIGURATION_BYTES

VALUES_MAX = 100_000
"""In one configuration, aliases spelt out."""
DEPTH_MAX = 32
NUMBER_MAX = 2**63 - 1
FILE_SUFFIX = ".yml"


class Configuration(NamedTuple):
    """What an agent is told."""

    body: bytes
    """JSON: groups, version, hash, configuration, files."""
    sha256: str
    """Of the groups and their texts: it changes when the agent has to read again."""


def read(text: str) -> dict[str, Json]:
    """A group's configuration as JSON knows it; nothing is an empty one. Raises CommsError 400 with line and column."""
    import yaml

    if len(text.encode("utf-8", "surrogateescape")) > CONFIGURATION_BYTES:
        raise CommsError(413, "body_too_large", f"configuration: expected at most {CONFIGURATION_BYTES} bytes of YAML")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        found = yaml.load(text, Loader=loader)  # noqa: S506 - it is a safe one
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _bad(f"expected YAML: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _bad(f"expected YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _bad(f"expected a mapping, got {type(found).__name__}")
    plain: dict[str, Json] = _Plain().value(found, 0)
    return plain


def configuration_of(groups: Sequence[Group]) -> Configuration:
    """For an agent in these groups, in their order."""
    digest = hashlib.sha256()
    merged: dict[str, Json] = {}
    files: list[dict[str, Json]] = []
    for group in groups:
        digest.update(msgspec.json.encode([group.name, group.configuration]))
        merged = _merged(merged, _kept(group))
        files.append(
            {
                "group": group.name,
                "version": group.version,
                "sha256": group.sha256,
                "configuration": group.configuration,
            }
        )
    sha256 = digest.hexdigest()
    body = msgspec.json.encode(
        {
            "groups": [group.name for group in groups],
            "version": sum(group.version for group in groups),
            "hash": sha256,
            "configuration": merged,
            "files": files,
        }
    )
    return Configuration(body, sha256)


def _kept(group: Group) -> dict[str, Json]:
    """A text is checked before it is kept; should one be bad all the same, it reaches the agent among the files."""
    try:
        return read(group.configuration)
    except CommsError:
        return {}


def _merged(first: dict[str, Json], second: dict[str, Json]) -> dict[str, Json]:
    result = dict(first)
    for name, value in second.items():
        before = result.get(name)
        result[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


class _Plain:
    """YAML's values as JSON's, counted: a few lines of aliases can stand for billions of values."""

    def __init__(self) -> None:
        self._left = VALUES_MAX

    def value(self, found: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _bad(f"expected at most {VALUES_MAX:,} values, aliases spelt out, got more")
        if depth > DEPTH_MAX:
            raise _bad(f"expected at most {DEPTH_MAX} levels, got more")
        match found:
            case dict():
                return {self._name(name): self.value(value, depth + 1) for name, value in found.items()}
            case list():
                return [self.value(value, depth + 1) for value in found]
            case float() if not math.isfinite(found):
                raise _bad(f"expected a finite number, got {found}")
            case int() if abs(found) > NUMBER_MAX:
                raise _bad(f"expected numbers up to {NUMBER_MAX}, got a larger one")
            case dt.date():
                return found.isoformat()
            case None | bool() | int() | float() | str():
                return found
        raise _bad(f"expected values that JSON knows, got a {type(found).__name__}")

    def _name(self, name: Any) -> str:
        plain = self.value(name, 0)
        if isinstance(plain, str):
            return plain
        if isinstance(plain, dict | list):
            raise _bad("expected a word as the name of a member, got a mapping or a list")
        return msgspec.json.encode(plain).decode()


def _bad(message: str) -> CommsError:
    return bad_request(f"configuration: {message}", reason="bad_configuration")
