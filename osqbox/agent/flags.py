"""osqueryd's flags: their kinds and defaults, the values an agent runs with, and what a config may change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from osqbox.errors import BadUsage
from osqbox.schema import fixture_path

_TRUE, _FALSE = frozenset({"true", "t", "1", "yes", "y"}), frozenset({"false", "f", "0", "no", "n"})
_INTEGER_TYPES = {
    "int32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
}
CUSTOM_PREFIX = "custom_"


@dataclass(frozen=True, slots=True)
class Flag:
    name: str
    kind: str
    """``cli_only``, ``option`` (a config may set it), ``hidden`` or ``alias``."""
    type: str
    default: str
    alias_of: str = ""

    def accepts(self, value: str) -> bool:
        """Whether gflags would take this text."""
        if self.type == "bool":
            return value.lower() in _TRUE | _FALSE
        if self.type in _INTEGER_TYPES:
            low, high = _INTEGER_TYPES[self.type]
            return value.lstrip("-").isdecimal() and low <= int(value) <= high
        return True


_PATHS = {
    "OSQUERY_LOG_HOME": "/var/log/osquery/",
    "OSQUERY_DB_HOME": "/var/osquery/",
    "OSQUERY_HOME": "/etc/osquery/",
    "OSQUERY_SOCKET": "/var/osquery/",
    "OSQUERY_PIDFILE": "/var/run/",
    "OSQUERY_CERTS_HOME": "/opt/osquery/share/osquery/certs/",
}
"""What the constants in upstream's defaults are on Linux."""
_EXPRESSIONS = {
    '(fs::path(OSQUERY_HOME) / "osquery.conf").make_preferred().string()': "/etc/osquery/osquery.conf",
    "LOG_LOCAL3 >> 3": "19",
}


@lru_cache(maxsize=1)
def known_flags() -> Mapping[str, Flag]:
    """Every flag osqueryd 5.23 has, by name, as its sources declare them.

    Left out are the shell's own, and those of Windows' event tracing, whose defaults only Windows knows.
    """
    entries = json.loads(fixture_path("osquery_flags.json").read_text(encoding="utf-8"))
    return {
        name: Flag(name, e["kind"], e["type"], default_of(e.get("default", "")), e.get("alias_of", ""))
        for name, e in sorted(entries.items())
        if e["kind"] not in ("shell", "extension_alias") and not name.startswith("etw_")
    }


def default_of(expression: str) -> str:
    """The value of a C++ default: ``"tls"``, ``50 * 1024 * 1024``, ``OSQUERY_HOME "extensions.load"``.

    An expression of another kind is returned as it is.
    """
    if expression in _EXPRESSIONS:
        return _EXPRESSIONS[expression]
    if re.fullmatch(r"\d+( \* \d+)+", expression):
        return str(math.prod(int(factor) for factor in expression.split(" * ")))
    pieces = re.findall(r'"([^"]*)"|(\w+)', expression)
    if re.fullmatch(r'(OSQUERY_\w+ ?)?("[^"]*")?', expression):
        return "".join(_PATHS[name] if name else text for text, name in pieces)
    return expression


class Flags:
    """The values one agent runs with. Names are canonical; a value is text until asked for as something else.

    Raises BadUsage for a flag osqueryd does not have, or a value it would not take.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = {canonical(name): value for name, value in given.items()}
        for name, value in self._given.items():
            flag = known_flags().get(name)
            if flag is None and not name.startswith(CUSTOM_PREFIX):
                raise BadUsage(f"unknown osqueryd flag {name!r}")
            if flag is not None and not flag.accepts(value):
                raise BadUsage(f"--{name}: expected {flag.type}, got {value!r}")

    def text(self, name: str) -> str:
        return self._given[name] if name in self._given else known_flags()[name].default

    def integer(self, name: str) -> int:
        return int(self.text(name))

    def true(self, name: str) -> bool:
        return self.text(name).lower() in _TRUE

    def set_option(self, name: str, value: object) -> str | None:
        """Take one entry of a config's ``options``; the warning to log when it is not taken (config.cpp)."""
        flag, text = known_flags().get(canonical(name)), _text(value)
        if name.startswith(CUSTOM_PREFIX) and text is not None:
            self._given[name] = text
            return None
        if flag is None:
            return f"Cannot set unknown or invalid flag: {name}"
        if flag.kind == "cli_only":
            return (
                f"The CLI only flag --{name} set via config file will be ignored, "
                "please use a flagfile or pass it to the process at startup"
            )
        if text is None or not flag.accepts(text):
            return f"Cannot set unknown or invalid flag: {name}"
        self._given[flag.name] = text
        return None

    def rows(self) -> Iterator[dict[str, str | int]]:
        """The table osquery_flags."""
        for flag in known_flags().values():
            target = known_flags().get(flag.alias_of, flag)
            yield {
                "name": flag.name,
                "type": flag.type,
                "description": "",
                "default_value": target.default,
                "value": self.text(target.name),
                "shell_only": 0,
            }

    def custom(self) -> dict[str, str]:
        """The ``custom_*`` options a config gave."""
        return {name: value for name, value in self._given.items() if name.startswith(CUSTOM_PREFIX)}


def canonical(name: str) -> str:
    """The flag an alias stands for."""
    flag = known_flags().get(name)
    return flag.alias_of if flag is not None and flag.alias_of else name


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (str, int)) else None
