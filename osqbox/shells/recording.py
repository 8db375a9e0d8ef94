"""What a shell printed, kept as it happens: exact bytes in ``bytes``, and ``cast`` for players (asciicast v3).

Offsets in ``bytes`` are offsets of the session's output, always: what could not be written is a hole. The cast is
UTF-8 with U+FFFD for what is not; where its text does not tell which bytes it stands for, a comment before the event
does (``# bytes FROM TO``), so that a replay with both files is exact. Every call writes through to the kernel before
it returns, so that a killed box loses nothing and a crashed machine what it had not flushed.
asciicast: https://docs.asciinema.org/manual/asciicast/v3/
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from osqbox.errors import OsqboxError, UserError

KIB = 1024
MIB = 1024 * KIB

SPOOL = "bytes"
CAST = "cast"
LINE_BYTES = 32 * MIB
"""The longest line read: six letters for each byte of the largest frame, with room."""
REPAIR_BYTES = 4 * MIB
"""The most output that is carried over into a cast which a crash cut short."""
CHECK_EVERY_BYTES = 8 * MIB
"""The disk's free space is looked at after so many bytes."""
MASK = "[masked]"
TITLE_CHARS = 256


class RecordingFailed(OsqboxError):
    """A strict recording cannot go on, so neither may its session. ``reason`` is one stable word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RecordingRules:
    strict: bool = False
    """Raise RecordingFailed where a best effort would leave a marked gap."""
    max_bytes: int = 512 * MIB
    """Output kept of one session; later output is a gap."""
    reserve_bytes: int = 256 * MIB
    """Left free on the disk, for the database."""


@dataclass(frozen=True, slots=True)
class RecordingFacts:
    output_bytes: int
    """Length of the spool, holes included."""
    cast_bytes: int
    lost_bytes: int
    """Output that is missing."""
    lost_reason: str | None
    """``disk_full``, ``too_long`` or ``io_error``: why the latest of it is missing."""


class Recorder:
    """One session's recording. Times are seconds since the epoch. Not for two threads at once."""

    def __init__(self, directory: Path, rules: RecordingRules, *, keep_input: bool) -> None:
        self._rules = rules
        self._keep_input = keep_input
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spool = _open_private(directory / SPOOL)
        try:
            self._cast = _open_private(directory / CAST)
        except BaseException:
            os.close(self._spool)
            raise
        self._closed = False
        self._head = os.fstat(self._spool).st_size
        self._cast_end = 0
        self._began = 0.0
        self._at_us = 0
        """When the cast's latest event was, since it began: whole microseconds, so that rounding never adds up."""
        self._told = 0
        """The spool's offset up to which the cast has told."""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._lost_bytes = 0
        self._lost_reason: str | None = None
        self._untold_bytes = 0
        """Lost, and not yet marked in the cast."""
        self._unchecked_bytes = CHECK_EVERY_BYTES
        self._masking = False

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        cols: int,
        rows: int,
        now: float,
        shell: str = "",
        title: str = "",
        term: str = "xterm-256color",
        rules: RecordingRules | None = None,
        keep_input: bool = False,
    ) -> Recorder:
        """Begin a recording, or go on with the one that is there. Raises OSError when it cannot be created.

        ``keep_input`` also keeps what operators type. Whoever opens it calls `close`.
        """
        recorder = cls(directory, rules or RecordingRules(), keep_input=keep_input)
        try:
            if os.fstat(recorder._cast).st_size:
                recorder._resume(now)
            if recorder._cast_end == 0:
                recorder._begin(cols, rows, now, shell, title, term)
        except BaseException:
            recorder.close()
            raise
        return recorder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> int:
        """Offset of the output's end: the next byte expected."""
        return self._head

    def facts(self) -> RecordingFacts:
        return RecordingFacts(self._head, self._cast_end, self._lost_bytes, self._lost_reason)

    # what happens

    def output(self, data: bytes, now: float) -> None:
        """The shell printed something. Raises RecordingFailed in a strict recording only."""
        if not data:
            return
        start, self._head = self._head, self._head + len(data)
        try:
            self._check_room(len(data))
            _write_all(self._spool, data, start)
            self._tell_gap(now)
            self._tell_output(data, start, now)
        except OSError as error:
            self._lose(len(data), error)

    def input(self, data: bytes, now: float, *, echo: bool = True) -> None:
        """An operator typed something; kept only if that was asked for, and hidden while the shell does not echo."""
        if not (self._keep_input and data):
            return
        if echo:
            self._masking = False
            self._tell("i", data.decode("utf-8", "replace"), now)
        elif not self._masking:
            self._masking = True  # once for the whole span: not even its length is told
            self._tell("i", MASK, now)

    def resize(self, cols: int, rows: int, now: float) -> None:
        self._tell("r", f"{cols}x{rows}", now)

    def marker(self, label: str, now: float) -> None:
        """A remark for the player, such as who joined."""
        self._tell("m", _plain(label), now)

    def exit(self, status: int, now: float) -> None:
        """The shell ended; ``status`` as a shell tells it, 128 and the number for a signal."""
        if rest := self._decode.decode(b"", final=True):
            self._tell("o", rest, now, told=(self._told, self._head))
        self._tell("x", str(status), now)

    def read(self, offset: int, count_bytes: int) -> bytes:
        """Recorded output from ``offset``: at most ``count_bytes``, empty at the end; zeros where it was lost."""
        return os.pread(self._spool, count_bytes, offset)

    def close(self) -> None:
        """May be called again."""
        if not self._closed:
            self._closed = True
            os.close(self._spool)
            os.close(self._cast)

    # the cast

    def _begin(self, cols: int, rows: int, now: float, shell: str, title: str, term: str) -> None:
        header: dict[str, Any] = {
            "version": 3,
            "term": {"cols": cols, "rows": rows, "type": term},
            "timestamp": int(now),
        }
        if shell:
            header |= {"command": _plain(shell), "env": {"SHELL": _plain(shell)}}
        if title:
            header["title"] = _plain(title)
        self._began = now
        os.ftruncate(self._cast, 0)
        self._append(msgspec.json.encode(header) + b"\n")
        self._carry_over(now)

    def _resume(self, now: float) -> None:
        """Find the end of a cast that an earlier process wrote, and add what it had not come to tell."""
        try:
            self._began, self._at_us, end, told = _find_end(self._cast)
        except BadRecording:
            return  # not even a header: begin again
        self._cast_end, self._told = end, told
        os.ftruncate(self._cast, end)
        self._carry_over(now)

    def _carry_over(self, now: float) -> None:
        start = max(self._told, self._head - REPAIR_BYTES)
        if start < self._head:
            self._tell_output(self.read(start, self._head - start), start, now)

    def _tell_output(self, data: bytes, start: int, now: float) -> None:
        held = len(self._decode.getstate()[0])
        text = self._decode.decode(data)
        first, end = start - held, start + len(data) - len(self._decode.getstate()[0])
        if text:
            self._event("o", text, now, told=(first, end))

    def _tell_gap(self, now: float) -> None:
        if self._untold_bytes:
            self._decode.reset()  # what began before the gap does not go on after it
            self._event("m", f"{self._untold_bytes} bytes were not recorded: {self._lost_reason}", now)
            self._untold_bytes = 0

    def _tell(self, code: str, data: str, now: float, told: tuple[int, int] | None = None) -> None:
        try:
            self._tell_gap(now)
            self._event(code, data, now, told)
        except OSError as error:
            self._lose(0, error)

    def _event(self, code: str, data: str, now: float, told: tuple[int, int] | None = None) -> None:
        at_us = max(self._at_us, round((now - self._began) * 1e6))
        interval = divmod(at_us - self._at_us, 1_000_000)
        line = b'[%d.%06d, "%s", %s]\n' % (*interval, code.encode(), msgspec.json.encode(data))
        if told is not None and (told[0] != self._told or told[1] - told[0] != _utf8_bytes(data)):
            line = b"# bytes %d %d\n%s" % (*told, line)
        self._append(line)
        self._at_us = at_us
        self._told = self._told if told is None else told[1]

    def _append(self, line: bytes) -> None:
        # At a known place: half a line that a full disk left behind is written over.
        _write_all(self._cast, line, self._cast_end)
        self._cast_end += len(line)

    # trouble

    def _check_room(self, count_bytes: int) -> None:
        if self._head > self._rules.max_bytes:
            raise OSError(errno.EFBIG, "longer than one recording may be")
        self._unchecked_bytes += count_bytes
        if self._unchecked_bytes >= CHECK_EVERY_BYTES or self._lost_reason == "disk_full":
            disk = os.fstatvfs(self._spool)
            if disk.f_bavail * disk.f_frsize < self._rules.reserve_bytes:
                raise OSError(errno.ENOSPC, "less free than is reserved for the database")
            self._unchecked_bytes = 0

    def _lose(self, count_bytes: int, error: OSError) -> None:
        reasons = {errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.EFBIG: "too_long"}
        self._lost_reason = reasons.get(error.errno or 0, "io_error")
        self._lost_bytes += count_bytes
        self._untold_bytes += count_bytes
        if self._rules.strict:
            raise RecordingFailed(
                self._lost_reason, f"the recording cannot go on: {error.strerror}; a strict one ends its session"
            ) from None


def _open_private(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    while written < len(data):  # a disk that fills up takes a part first
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _plain(text: str) -> str:
    """A title without anything that steers a terminal."""
    return "".join(letter for letter in text if letter.isprintable())[:TITLE_CHARS]


# reading

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class BadRecording(UserError):
    """A file that is no asciicast, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Event:
    interval_s: float
    """Since the event before."""
    code: str
    """``o`` output, ``i`` input, ``m`` marker, ``r`` resize, ``x`` exit; players skip others."""
    data: str
    spool: tuple[int, int] | None = None
    """Of output in our own recordings, where its bytes are in the spool."""


@dataclass(frozen=True, slots=True)
class Cast:
    """A recording that is read: the size it began with, and its events, which come as they are asked for."""

    version: int
    cols: int
    rows: int
    header: dict[str, Any]
    events: Iterator[Event] = field(repr=False)


def read_cast(lines: Iterable[bytes]) -> Cast:
    """Read asciicast v2 or v3 from its lines. Raises BadRecording, at once or while events are taken.

    A last line that is cut off, as a crash leaves it, is the end.
    """
    numbered = enumerate(lines, 1)
    header = _header(next(numbered, (1, b""))[1])
    term = (
        header.get("term", {})
        if header["version"] == 3
        else {"cols": header.get("width"), "rows": header.get("height")}
    )
    cols, rows = (term.get(name) if isinstance(term, dict) else None for name in ("cols", "rows"))
    if not (isinstance(cols, int) and isinstance(rows, int)):
        raise BadRecording("recording, line 1: expected the terminal's size in the header, got none")
    return Cast(header["version"], cols, rows, header, _events(numbered, header["version"]))


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = msgspec.json.decode(line)
    except UNREADABLE:
        header = None
    if not isinstance(header, dict) or header.get("version") not in (2, 3):
        raise BadRecording(f"recording, line 1: expected the header of asciicast v2 or v3, got {line[:60]!r}")
    return header


def _events(numbered: Iterable[tuple[int, bytes]], version: int) -> Iterator[Event]:
    at, told, spool = 0.0, 0, None
    for number, line in numbered:
        if line.startswith(b"#"):
            spool = _told_range(line) or spool
            continue
        if not line.strip():
            continue
        try:
            moment, code, data = msgspec.json.decode(line, type=tuple[float, str, str])
        except UNREADABLE:
            if not line.endswith(b"\n"):
                return
            raise BadRecording(f"recording, line {number}: expected [time, code, text], got {line[:60]!r}") from None
        interval_s = max(0.0, moment - at) if version == 2 else max(0.0, moment)
        at = max(at, moment)
        if code != "o":
            yield Event(interval_s, code, data)
            continue
        place = spool or (told, told + _utf8_bytes(data))
        told, spool = place[1], None
        yield Event(interval_s, code, data, place)


def _told_range(line: bytes) -> tuple[int, int] | None:
    words = line.split()
    if len(words) == 4 and words[1] == b"bytes" and words[2].isdigit() and words[3].isdigit():
        return int(words[2]), int(words[3])
    return None


def _find_end(fd: int) -> tuple[float, int, int, int]:
    """When a cast began, its last whole event (microseconds), where that line ends, the spool's offset it tells."""
    read_bytes = 0

    def whole_lines() -> Iterator[bytes]:
        nonlocal read_bytes
        for line in _lines(fd):
            if line.endswith(b"\n"):
                read_bytes += len(line)
                yield line

    cast = read_cast(whole_lines())
    at_us, end, told = 0, read_bytes, 0
    with suppress(BadRecording):
        for event in cast.events:
            at_us += round(event.interval_s * 1e6)
            end = read_bytes
            told = event.spool[1] if event.spool else told
    return float(cast.header.get("timestamp", 0)), at_us, end, told


def _lines(fd: int) -> Iterator[bytes]:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        while line := file.readline(LINE_BYTES):
            yield line


# keeping


@dataclass(frozen=True, slots=True)
class Kept:
    """An ended session's recording, as the index knows it."""

    id: str
    ended_at: float
    size_bytes: int


def to_delete(kept: Iterable[Kept], now: float, *, max_age_s: float, max_total_bytes: int) -> list[str]:
    """Ids of recordings that are too old, then of the oldest until the rest fits."""
    newest_first = sorted(kept, key=lambda each: each.ended_at, reverse=True)
    gone, total_bytes = [], 0
    for each in newest_first:
        total_bytes += each.size_bytes
        if now - each.ended_at > max_age_s or total_bytes > max_total_bytes:
            gone.append(each.id)
    return gone[::-1]


def size_bytes(directory: Path) -> int:
    """What a recording takes on the disk; 0 when there is none."""
    total_bytes = 0
    for name in (SPOOL, CAST):
        with suppress(FileNotFoundError):
            total_bytes += (directory / name).stat().st_blocks * 512
    return total_bytes


def digest(directory: Path) -> str:
    """SHA-256 of the exact output, for the audit. Reads it all: call it in a thread."""
    with (directory / SPOOL).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete(directory: Path) -> None:
    """Remove a recording; none is fine. Nothing else in the directory is touched."""
    for name in (SPOOL, CAST):
        (directory / name).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        directory.rmdir()
