"""What the job verbs read and print: durations, sizes and signals, a job as JSON or in words, output for a terminal."""

from __future__ import annotations

import codecs
import re
import signal
import unicodedata
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.output import printable
from osqbox.clock import rfc3339

if TYPE_CHECKING:
    from osqbox.jobs.messages import Status

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType

TIMED_OUT, FAILED, NOT_EXECUTABLE, NOT_FOUND = 124, 125, 126, 127
"""Exit codes that are not the command's own, as `timeout` and `env` have them; 128 + n is signal n."""
ENOENT = 2

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Turn the order of what is shown around."""


class Duration(ParamType):
    """``5``, ``500ms``, ``5s``, ``2m``, ``1h``, ``1d``; seconds as a number."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([a-z]*)", str(value))
        if not found or found[2] not in _SECONDS:
            self.fail(f"expected a duration such as 500ms, 30s, 5m or 2h, got {printable(value)!r}", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


class Size(ParamType):
    """``1000``, ``64k``, ``512M``, ``2GiB``: bytes, in powers of 1024."""

    name = "size"

    def __init__(self, at_least: int = 0) -> None:
        self._at_least = at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)([kmgt]?)(?:i?b)?", str(value).lower())
        if not found:
            self.fail(f"expected a size such as 1000, 64k, 512M or 2GiB, got {printable(value)!r}", param, ctx)
        size = int(float(found[1]) * 1024 ** _UNITS[found[2]])
        if size < self._at_least:
            self.fail(f"expected at least {self._at_least}, got {size}", param, ctx)
        return size


class Signal(ParamType):
    """``TERM``, ``SIGTERM`` or ``15``."""

    name = "signal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).upper()
        if text.isdecimal() and 0 < int(text[:4]) < signal.NSIG:
            return int(text)
        try:
            return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
        except KeyError:
            self.fail(f"expected a signal such as TERM, SIGINT or 9, got {printable(value)!r}", param, ctx)


class Pair(ParamType):
    """``NAME=value``."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, rest = str(value).partition("=")
        if not name or not equals:
            self.fail(f"expected NAME=VALUE, got {printable(value)!r}", param, ctx)
        if not _is_text(value):
            self.fail(f"expected UTF-8 text, got {printable(value)!r}", param, ctx)
        return name, rest


def _is_text(value: str) -> bool:
    """Whether an argument was UTF-8: what is not comes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def facts(status: Status) -> dict[str, Any]:
    """A job for programs: these members, always all of them."""
    return {
        "id": status.id,
        "state": status.state.value,
        "owner": status.owner,
        "run_as": status.run_as,
        "pid": status.pid,
        "exit_code": status.exit_code,
        "signal": status.signal,
        "reason": status.reason.value if status.reason else None,
        "started_at": rfc3339(status.started_at),
        "ended_at": rfc3339(status.ended_at),
        "stdout_bytes": status.stdout_bytes,
        "stderr_bytes": status.stderr_bytes,
        "containment": status.containment.value if status.containment else None,
        "enforced": list(status.enforced),
    }


def told(status: Status) -> list[tuple[str, Any]]:
    """The same and more for people."""
    shown: dict[str, Any] = {**facts(status), "signal": signal_name(status.signal) if status.signal else None}
    shown["command"] = command_line(status)
    shown["state"] = in_words(status)
    if status.output_truncated:
        shown["output"] = "some of it is not kept"
    if status.leftover_processes:
        shown["leftover_processes"] = status.leftover_processes
    if status.labels:
        shown["labels"] = ", ".join(f"{name}={value}" for name, value in sorted(status.labels.items()))
    return [(name, value) for name, value in shown.items() if value not in (None, [])]


def command_line(status: Status) -> str:
    """As one would type it; bytes that are not text as ``\\xff``."""
    import shlex

    return shlex.join(word.decode("utf-8", "backslashreplace") for word in (status.command, *status.args))


def in_words(status: Status) -> str:
    """``running``, ``exited 3``, ``killed by SIGKILL (timeout)``."""
    words = status.state.value.replace("_", " ")
    if status.signal is not None:
        words = f"killed by {signal_name(status.signal)}" + (", core dumped" if status.core_dumped else "")
    elif status.exit_code is not None:
        words = f"exited {status.exit_code}"
    because = status.reason.value if status.reason and status.reason.value not in ("exit", "lost") else None
    by = f" by {status.stopped_by}" if status.stopped_by else ""
    return f"{words} ({because.replace('_', ' ')}{by})" if because else words


def exit_code_of(status: Status) -> int:
    """What a program that stood for this job would exit with."""
    if status.reason and status.reason.value == "timeout":
        return TIMED_OUT
    if status.exit_code is not None:
        return status.exit_code
    if status.signal is not None:
        return 128 + status.signal
    if status.errno is not None:
        return NOT_FOUND if status.errno == ENOENT else NOT_EXECUTABLE
    return FAILED


class TerminalText:
    """Makes bytes harmless for a terminal as they come: whatever steers it shows as ``\\x1b`` and the like.

    Text, tabs and ends of lines stay. A character split between two pieces is held back until it is whole. Where the
    terminal does not speak UTF-8 only ASCII stays: bytes of other characters would be control characters to it.
    """

    def __init__(self, *, is_utf8: bool = True) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8" if is_utf8 else "ascii")("surrogateescape")

    def feed(self, data: bytes, *, is_last: bool = False) -> bytes:
        text = self._decoder.decode(data, is_last)
        if text.isprintable():
            return text.encode()
        return "".join(letter if _is_harmless(letter) else _escaped(letter) for letter in text).encode()


def _is_harmless(letter: str) -> bool:
    if letter in "\n\t\r":
        return True
    return unicodedata.category(letter) not in ("Cc", "Cs") and letter not in _BIDI


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code & 0xFF:02x}" if code < 0x100 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


class Stamped:
    """Puts the time before every line; bytes of one line that come in pieces get one time."""

    def __init__(self) -> None:
        self._at_start = True

    def feed(self, data: bytes, at: float) -> bytes:
        stamp = f"{rfc3339(at)} ".encode()
        *lines, rest = data.split(b"\n")
        out = bytearray()
        for line in lines:
            out += (stamp if self._at_start else b"") + line + b"\n"
            self._at_start = True
        if rest:
            out += (stamp if self._at_start else b"") + rest
            self._at_start = False
        return bytes(out)
