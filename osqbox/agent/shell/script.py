"""A shell that runs nothing: a prompt, a line editor, a few commands of its own and the answers a file gives. Pure.

The file is YAML (JSON is YAML)::

    prompt: "$user@$hostname:$cwd# "      # $user $hostname $cwd $home
    banner: "Authorised use only.\\n"
    user: root
    files: [notes.txt]                     # what ls shows
    unknown: "$word: command not found\\n"
    answers:                               # the first whose pattern matches the whole line
      - match: "uname( -a)?"
        output: "Linux $hostname 6.8.0 x86_64\\n"
      - match: "cat (?P<file>\\\\S+)"
        output: "cat: $file: No such file or directory\\n"
        exit_code: 1
        delay_s: 0.2
"""

from __future__ import annotations

import codecs
import posixpath
import shlex
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

import regex
import yaml

from osqbox.errors import BadSetup
from osqbox.shell_frames import Size

MAX_LINE_LETTERS = 4096
MAX_DELAY_S = 3600.0
MATCH_TIMEOUT_S = 0.1
_MAX_AHEAD_LETTERS = 4096
"""Typed while an answer takes its time; the rest is lost, as on a terminal nobody reads."""
INTERRUPTED = 130
_HINT = "osqbox agent --control --scripted-shell FILE"
_TEXTS = {"prompt": "$user@$hostname:$cwd# ", "banner": "", "user": "root", "unknown": "$word: command not found\n"}
_ANSWER_KEYS = frozenset({"match", "output", "exit_code", "delay_s"})
_BELL, _CLEAR = "\a", "\x1b[H\x1b[2J"


@dataclass(frozen=True, slots=True)
class Answer:
    pattern: regex.Pattern[str]
    output: str = ""
    exit_code: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Script:
    prompt: str = _TEXTS["prompt"]
    banner: str = ""
    user: str = _TEXTS["user"]
    unknown: str = _TEXTS["unknown"]
    files: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()


def read_script(text: str) -> Script:
    """Raises BadSetup, which names what is wrong."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadSetup(f"the shell's script is no YAML: {error}", hint=_HINT) from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not found.keys() <= {*_TEXTS, "files", "answers"}:
        names = ", ".join((*_TEXTS, "files", "answers"))
        raise BadSetup(f"expected a shell's script with some of {names}, got {_shown(found)}", hint=_HINT)
    texts = {name: _typed(found, name, str, default) for name, default in _TEXTS.items()}
    files, answers = _typed(found, "files", list, []), _typed(found, "answers", list, [])
    return Script(**texts, files=tuple(map(str, files)), answers=tuple(_answer(each) for each in answers))


def _answer(found: Any) -> Answer:
    if not isinstance(found, dict) or "match" not in found or not found.keys() <= _ANSWER_KEYS:
        raise BadSetup(f"expected an answer with match, output, exit_code, delay_s, got {_shown(found)}", hint=_HINT)
    delay_s = float(_typed(found, "delay_s", (int, float), 0))
    exit_code = int(_typed(found, "exit_code", int, 0))
    if not 0 <= delay_s <= MAX_DELAY_S or not 0 <= exit_code <= 255:
        raise BadSetup(
            f"expected delay_s up to {MAX_DELAY_S:g} and exit_code up to 255, got {_shown(found)}", hint=_HINT
        )
    try:
        pattern = regex.compile(_typed(found, "match", str, ""))
    except regex.error as error:
        raise BadSetup(f"expected a regular expression, got {_shown(found['match'])}: {error}", hint=_HINT) from error
    return Answer(pattern, _typed(found, "output", str, ""), exit_code, delay_s)


def _typed(found: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = found.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadSetup(f"the shell's script: {name} is of the wrong type: {_shown(value)}", hint=_HINT)
    return value


def _shown(value: Any) -> str:
    return repr(value)[:200]


# -- the commands ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    output: str = ""
    code: int = 0
    delay_s: float = 0.0
    exits: bool = False


@dataclass(slots=True)
class Commands:
    """Answers whole lines."""

    script: Script
    hostname: str
    size: Size
    cwd: str = ""
    code: int = 0
    """Of the last command."""

    def __post_init__(self) -> None:
        self.cwd = self.home

    @property
    def home(self) -> str:
        return "/root" if self.script.user == "root" else f"/home/{self.script.user}"

    def fill(self, text: str, **more: str | None) -> str:
        at = "~" if self.cwd == self.home else self.cwd
        facts = {"user": self.script.user, "hostname": self.hostname, "cwd": at, "home": self.home, **more}
        return Template(text).safe_substitute({name: value or "" for name, value in facts.items()})

    def run(self, line: str) -> Outcome:
        outcome = self._scripted(line) or self._built_in(line)
        self.code = outcome.code
        return outcome

    def _scripted(self, line: str) -> Outcome | None:
        for answer in self.script.answers:
            try:
                found = answer.pattern.fullmatch(line.strip(), timeout=MATCH_TIMEOUT_S)
            except TimeoutError:
                continue
            if found:
                return Outcome(self.fill(answer.output, **found.groupdict()), answer.exit_code, answer.delay_s)
        return None

    def _built_in(self, line: str) -> Outcome:
        try:
            words = shlex.split(line.replace("$?", str(self.code)), comments=True)
        except ValueError:
            return Outcome("sh: syntax error: unterminated quoted string\n", 2)
        if not words:
            return Outcome(code=self.code)
        commands: dict[str, Callable[[list[str]], Outcome]] = {
            "whoami": lambda _: Outcome(f"{self.script.user}\n"),
            "hostname": lambda _: Outcome(f"{self.hostname}\n"),
            "pwd": lambda _: Outcome(f"{self.cwd}\n"),
            "echo": lambda words: Outcome(" ".join(words) + "\n"),
            "ls": lambda _: Outcome("".join(f"{name}\n" for name in sorted(self.script.files))),
            "cd": self._cd,
            "stty": self._stty,
            "true": lambda _: Outcome(),
            "false": lambda _: Outcome(code=1),
            "exit": self._exit,
            "logout": self._exit,
        }
        command = commands.get(words[0])
        return command(words[1:]) if command else Outcome(self.fill(self.script.unknown, word=words[0]), 127)

    def _cd(self, words: list[str]) -> Outcome:
        target = words[0] if words else self.home
        self.cwd = posixpath.normpath(posixpath.join(self.cwd, target.replace("~", self.home, 1)))
        return Outcome()

    def _stty(self, words: list[str]) -> Outcome:
        return Outcome(f"{self.size.rows} {self.size.cols}\n" if words == ["size"] else "")

    def _exit(self, words: list[str]) -> Outcome:
        code = words[0] if words else str(self.code)
        if not code.isdecimal():
            return Outcome(f"exit: {code}: numeric argument required\n", 2, exits=True)
        return Outcome(code=int(code) % 256, exits=True)


# -- the line editor ---------------------------------------------------------------------------------------------


class Console:
    """A terminal's input as bytes, its output to be taken as bytes. An answer that takes its time holds it until
    `answer`; what is typed meanwhile waits, but Ctrl-C does not."""

    def __init__(self, script: Script, hostname: str, size: Size) -> None:
        self.commands = Commands(script, hostname, size)
        self.exit_code: int | None = None
        """Set when the shell has exited."""
        self._typed = ""
        self._line = ""
        self._out: list[str] = []
        self._late: Outcome | None = None
        self._escape = ""
        self._after_return = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._print(self.commands.fill(script.banner))
        self._prompt()

    @property
    def late(self) -> Outcome | None:
        """The answer that takes its time just now."""
        return self._late

    def take(self) -> bytes:
        """The output since the last time."""
        text, self._out = "".join(self._out), []
        return text.encode("utf-8", "replace")

    def type(self, data: bytes) -> None:
        self._typed += self._decoder.decode(data)
        self._go_on()

    def answer(self) -> None:
        """The time of the answer that was due has come."""
        if self._late:
            outcome, self._late = self._late, None
            self._finish(outcome)
            self._go_on()

    def _go_on(self) -> None:
        typed, self._typed = self._typed, ""
        at = 0
        while at < len(typed) and self.exit_code is None:
            if self._late is None:
                self._key(typed[at])
                at += 1
            elif "\x03" in typed[at:]:
                at = typed.index("\x03", at) + 1
                self._late = None
                self._interrupt()
            else:
                self._typed = typed[at : at + _MAX_AHEAD_LETTERS]
                break

    def _interrupt(self) -> None:
        self._out.append("^C\r\n")
        self._line, self.commands.code = "", INTERRUPTED
        self._prompt()

    def _key(self, key: str) -> None:
        after_return, self._after_return = self._after_return, key == "\r"
        if self._escape or key == "\x1b":
            self._in_escape(key)
        elif key == "\r" or (key == "\n" and not after_return):
            self._enter()
        elif key in "\x7f\b":
            self._erase(self._line[-1:])
        elif key == "\x15":
            self._erase(self._line)
        elif key == "\x17":
            kept = self._line.rstrip().rpartition(" ")
            self._erase(self._line[len(kept[0] + kept[1]) :])
        elif key == "\x03":
            self._interrupt()
        elif key == "\x04":
            self._end_of_input()
        elif key == "\x0c":
            self._out.append(_CLEAR)
            self._prompt()
            self._out.append(self._line)
        elif key.isprintable():
            self._insert(key)

    def _in_escape(self, key: str) -> None:
        """Arrow keys and their like do nothing: swallow ``ESC [ ... letter``, ``ESC O letter``, ``ESC letter``."""
        self._escape += key
        goes_on = len(self._escape) < 2 or self._escape[1] in "[O"
        if len(self._escape) > 2 and ("@" <= key <= "~"):
            goes_on = False
        if not goes_on or len(self._escape) > 32:
            self._escape = ""

    def _insert(self, key: str) -> None:
        if len(self._line) < MAX_LINE_LETTERS:
            self._line += key
            self._out.append(key)
        else:
            self._out.append(_BELL)

    def _erase(self, tail: str) -> None:
        self._line = self._line[: len(self._line) - len(tail)]
        self._out.append("\b \b" * sum(2 if unicodedata.east_asian_width(key) in "WF" else 1 for key in tail))

    def _end_of_input(self) -> None:
        if not self._line:
            self._out.append("exit\r\n")
            self.exit_code = self.commands.code

    def _enter(self) -> None:
        line, self._line = self._line, ""
        self._out.append("\r\n")
        outcome = self.commands.run(line)
        if outcome.delay_s > 0:
            self._late = outcome
        else:
            self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        self._print(outcome.output)
        if outcome.exits:
            self.exit_code = outcome.code
        else:
            self._prompt()

    def _prompt(self) -> None:
        self._out.append(self.commands.fill(self.commands.script.prompt))

    def _print(self, text: str) -> None:
        self._out.append(text.replace("\n", "\r\n"))
