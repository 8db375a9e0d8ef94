"""osqueryd's command line as gflags reads it: every spelling, flag files, and the errors in its words. Pure.

Files and environment come in as functions, so that the rules can be tested without either.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from osqbox.agent.flags import Flag, default_of
from osqbox.schema import fixture_path

DEFAULT_FLAGFILE = "/etc/osquery/osquery.flags.default"
PROGRAM = "osqueryd"
MAX_FLAGFILE_DEPTH = 8

_GFLAGS = (
    *((name, "string", "") for name in ("flagfile", "fromenv", "tryfromenv", "undefok", "tab_completion_word")),
    *((name, "bool", "false") for name in ("help", "h", "helpfull", "helpshort", "helppackage", "helpxml", "version")),
    *((name, "string", "") for name in ("helpon", "helpmatch")),
)
_GLOG = (
    *((name, "bool", "false") for name in ("logtostderr", "alsologtostderr", "colorlogtostderr", "log_utc_time")),
    *((name, "bool", "true") for name in ("log_prefix", "drop_log_memory")),
    *((name, "int32", "0") for name in ("minloglevel", "v", "logbuflevel", "logbufsecs", "max_log_size")),
    *((name, "int32", "2") for name in ("stderrthreshold", "logemaillevel", "logfile_mode")),
    *((name, "string", "") for name in ("log_dir", "log_link", "vmodule", "alsologtoemail", "log_backtrace_at")),
    ("stop_logging_if_full_disk", "bool", "false"),
)
_OWN = (
    ("osqbox_profile", "string", ""),
    ("osqbox_seed", "int64", "0"),
    ("osqbox_index", "int64", "0"),
    ("osqbox_start_time", "string", ""),
    ("osqbox_carve_period", "uint32", "60"),
    ("osqbox_install", "string", ""),
    ("osqbox_strict_start", "bool", "false"),
)
"""Ours; osqueryd has no flag that starts so, nor will have."""
_DEBUG_BUILDS_ONLY = frozenset({"tls_allow_unsafe"})
_LIBRARY_KINDS = frozenset({"gflags", "glog", "osqbox"})


@lru_cache(maxsize=1)
def accepted_flags() -> Mapping[str, Flag]:
    """Every flag a release build takes, those of the shell, of gflags and glog, and ours included."""
    entries = json.loads(fixture_path("osquery_flags.json").read_text(encoding="utf-8"))
    flags = {
        name: Flag(name, e["kind"], e.get("type", ""), default_of(e.get("default", "")), e.get("alias_of", ""))
        for name, e in entries.items()
        if name not in _DEBUG_BUILDS_ONLY and not name.startswith("ext:")
    }
    for kind, group in (("gflags", _GFLAGS), ("glog", _GLOG), ("osqbox", _OWN)):
        for name, value_type, default in group:
            flags.setdefault(name, Flag(name, kind, value_type, default))
    return flags


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the words of a call came to. Names are canonical, values text."""

    given: Mapping[str, str] = field(default_factory=dict)
    """Only what was set, by flag, flag file or environment."""
    words: tuple[str, ...] = ()
    """What is no flag: the shell's SQL."""
    errors: tuple[str, ...] = ()
    """``ERROR: ...``; with any of them the program ends with 1."""
    ignored: tuple[str, ...] = ()
    """Lines of flag files that gflags passes over in silence."""

    def text(self, name: str) -> str:
        return self.given[name] if name in self.given else accepted_flags()[name].default

    def true(self, name: str) -> bool:
        return self.text(name).lower() in ("true", "t", "1", "yes", "y")

    def integer(self, name: str) -> int:
        return int(self.text(name))

    def is_given(self, name: str) -> bool:
        return name in self.given

    @property
    def osquery_flags(self) -> dict[str, str]:
        """Those an agent runs with: without the shell's, gflags' and ours."""
        flags = accepted_flags()
        dropped = _LIBRARY_KINDS | {"shell"}
        return {n: v for n, v in self.given.items() if flags[n].kind not in dropped and not n.startswith("etw_")}


ReadFile = Callable[[str], str]
"""The text of a file. Raises OSError."""


def parse(words: Sequence[str], *, read: ReadFile, environ: Mapping[str, str]) -> CommandLine:
    """Read the words after the program's name; a readable default flag file counts when none is named."""
    parser = _Parser(read, environ)
    if not any(word.startswith(("--flagfile", "-flagfile")) for word in words):
        parser.default_flagfile()
    parser.words(words)
    return parser.result()


class _Parser:
    def __init__(self, read: ReadFile, environ: Mapping[str, str]) -> None:
        self._read = read
        self._environ = environ
        self._given: dict[str, str] = {}
        self._rest: list[str] = []
        self._errors: dict[str, str] = {}
        self._unknown: set[str] = set()
        self._ignored: list[str] = []
        self._depth = 0

    def result(self) -> CommandLine:
        allowed = {name.strip().lstrip("-") for name in self._given.get("undefok", "").split(",")}
        errors = {
            name: text
            for name, text in self._errors.items()
            if name not in self._unknown or not _undefok(name, allowed)
        }
        return CommandLine(
            given=self._given,
            words=tuple(self._rest),
            errors=tuple(errors[name] for name in sorted(errors)),
            ignored=tuple(self._ignored),
        )

    def default_flagfile(self) -> None:
        try:
            self._lines(self._read(DEFAULT_FLAGFILE))
        except OSError:
            return
        self._given["flagfile"] = DEFAULT_FLAGFILE

    def words(self, words: Sequence[str]) -> None:
        waiting = list(reversed(words))
        while waiting:
            word = waiting.pop()
            if word == "--":
                self._rest += reversed(waiting)
                return
            if not word.startswith("-") or word == "-":
                self._rest.append(word)
            else:
                self._flag_word(word, waiting)

    def _flag_word(self, word: str, waiting: list[str]) -> None:
        name, value = _split(word)
        flag = _find(name)
        if flag is None:
            self._unknown_or_negated(name, value)
        elif value is not None:
            self._set(flag, value)
        elif flag.type == "bool":
            self._set(flag, "true")
        elif waiting:
            self._set(flag, waiting.pop())
        else:
            self._errors[flag.name] = f"ERROR: flag '{word}' is missing its argument"

    def _unknown_or_negated(self, name: str, value: str | None) -> None:
        negated = _find(name[2:]) if name.startswith("no") and value is None else None
        if negated is None:
            self._unknown.add(name)
            self._errors[name] = f"ERROR: unknown command line flag '{name}'"
        elif negated.type != "bool":
            self._errors[name] = f"ERROR: boolean value ({name}) specified for {negated.type} command line flag"
        else:
            self._set(negated, "false")

    def _set(self, flag: Flag, value: str) -> None:
        if not flag.accepts(value):
            self._errors[flag.name] = f"ERROR: illegal value '{value}' specified for {flag.type} flag '{flag.name}'"
            return
        name = flag.alias_of or flag.name
        # gflags shows a bool as true or false however it was written.
        self._given[name] = ("true" if value.lower() in _TRUE else "false") if flag.type == "bool" else value
        if name == "flagfile":
            self._flagfiles(value)
        elif name in ("fromenv", "tryfromenv"):
            self._from_environment(value, must=name == "fromenv")

    def _flagfiles(self, names: str) -> None:
        """gflags reads a flag file where it is named: what follows on the command line wins."""
        for path in filter(None, names.split(",")):
            if self._depth >= MAX_FLAGFILE_DEPTH:
                self._errors["flagfile"] = f"ERROR: flag files name each other: {path}"
                return
            self._depth += 1
            try:
                self._lines(self._read(path))
            except OSError as error:
                self._errors["flagfile"] = f"{path}: {error.strerror or error}"
            self._depth -= 1

    def _lines(self, text: str) -> None:
        """One ``--name=value`` each; a line that is neither that nor a comment names the programs meant below."""
        relevant, naming = True, False
        for line in text.split("\n"):
            stripped = line.lstrip()
            if not stripped.strip() or stripped.startswith("#"):
                continue
            if stripped.startswith("-"):
                naming = False
                if relevant:
                    self._line(stripped.rstrip("\r"))
                continue
            matches = any(fnmatch.fnmatchcase(PROGRAM, pattern) for pattern in stripped.split())
            relevant = matches or (naming and relevant)
            naming = True

    def _line(self, line: str) -> None:
        """Errors in flag files are passed over, but for values a flag does not take (gflags.cc)."""
        name, value = _split(line)
        flag = _find(name)
        if flag is not None and value is None and flag.type == "bool":
            value = "true"
        if flag is None and value is None and name.startswith("no"):
            flag, value = _find(name[2:]), "false"
            flag = flag if flag is not None and flag.type == "bool" else None
        if flag is None or value is None:
            self._ignored.append(line)
        else:
            self._set(flag, value)

    def _from_environment(self, names: str, *, must: bool) -> None:
        for name in filter(None, names.split(",")):
            flag, value = _find(name), self._environ.get(f"FLAGS_{name}")
            if flag is None:
                self._unknown.add(name)
                self._errors[name] = f"ERROR: unknown command line flag '{name}' (via --fromenv or --tryfromenv)"
            elif value is not None:
                self._set(flag, value)
            elif must:
                self._errors[name] = f"ERROR: FLAGS_{name} not found in environment"


_TRUE = frozenset({"true", "t", "1", "yes", "y"})


def _split(word: str) -> tuple[str, str | None]:
    """``--x=v`` as (x, v), ``-x`` as (x, None)."""
    name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
    return name, value if equals else None


def _find(name: str) -> Flag | None:
    return accepted_flags().get(name)


def _undefok(name: str, allowed: set[str]) -> bool:
    return name in allowed or name.removeprefix("no") in allowed


def help_text(*, shell: bool) -> str:
    """``--help``: osquery's layout; descriptions are not among the facts kept here."""
    groups = (
        ("osquery command line flags", ("cli_only",)),
        ("osquery configuration options (set by config or CLI flags)", ("option", "alias")),
        ("osqbox: the host that is pretended", ("osqbox",)),
        *((("osquery shell-only CLI flags", ("shell",)),) if shell else ()),
    )
    lines = [
        "osquery 5.23.1, your OS as a high-performance relational database",
        f"Usage: {PROGRAM} [OPTION]... {'[SQL STATEMENT]' if shell else ''}",
    ]
    for title, kinds in groups:
        lines += ["", f"{title}:", ""]
        flags = sorted(flag.name for flag in accepted_flags().values() if flag.kind in kinds)
        lines += [f"    --{name}{_value_hint(accepted_flags()[name])}" for name in flags]
    return "\n".join([*lines, "", "This is osqbox's stand-in for osqueryd: docs/osqueryd.md.", ""])


def _value_hint(flag: Flag) -> str:
    return "" if flag.type == "bool" else " VALUE"
