"""osqueryd's flags: their kinds and defaults, the values an agent runs with, and what a config may change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

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


@lru_cache(maxsize=1)
def known_flags() -> Mapping[str, Flag]:
    """Every flag osqueryd 5.23 has on Linux, by name."""
    text = resources.files("osqbox.agent").joinpath("osquery_flags.json").read_text(encoding="utf-8")
    return {
        name: Flag(name, kind, type_, "", last) if kind == "alias" else Flag(name, kind, type_, last)
        for name, kind, type_, last in json.loads(text)
    }


class Flags:
    """The values one agent runs with. Names are canonical; a value is text until asked for as something else."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = {canonical(name): value for name, value in given.items()}

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


def canonical(name: str) -> str:
    """The flag an alias stands for."""
    flag = known_flags().get(name)
    return flag.alias_of if flag is not None and flag.alias_of else name


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (str, int)) else None
