"""Whose input has come how far, so that nothing is typed twice after a crash: counts only, never what was typed.

Every record is in the kernel before its input goes to the agent. Which of it arrived only the agent knows; it says so
when it comes back, and then everybody who typed is told from where to send again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeAlias

Key: TypeAlias = tuple[str, str]
"""Who typed, and the client's own name."""

_HEAD = struct.Struct("!QQHH")
_COMPACT_BYTES = 1024 * 1024
FILE = "input"


class InputJournal:
    """One session's file. Raises OSError when it cannot be written."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / FILE
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, session_end: int, key: Key, client_end: int) -> None:
        """Input up to ``session_end`` came from ``key``, whose own count is now ``client_end``."""
        os.write(self._fd, _record(session_end, key, client_end))

    @property
    def is_long(self) -> bool:
        return os.fstat(self._fd).st_size > _COMPACT_BYTES

    def restart(self, session_end: int, received: Mapping[Key, int]) -> None:
        """Forget the way here: all of ``received`` has arrived, or never will."""
        fresh = self._path.with_name(f"{FILE}.new")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(fresh, flags, 0o600)
        try:
            os.write(fd, b"".join(_record(session_end, key, count) for key, count in received.items()))
            fresh.rename(self._path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd

    def received(self, arrived: int) -> dict[Key, int]:
        """How much came from everybody, when ``arrived`` bytes of the session's input have reached the agent."""
        counts: dict[Key, int] = {}
        lost: set[Key] = set()
        start = 0
        for end, key, client_end in self._records():
            if key not in lost:  # what follows something that is missing must be sent again too
                missing = max(0, end - max(start, arrived))
                counts[key] = client_end - missing
                if missing:
                    lost.add(key)
            start = end
        return counts

    def _records(self) -> Iterator[tuple[int, Key, int]]:
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        at = 0
        while at + _HEAD.size <= len(data):
            session_end, client_end, by_bytes, name_bytes = _HEAD.unpack_from(data, at)
            names = data[at + _HEAD.size : at + _HEAD.size + by_bytes + name_bytes]
            at += _HEAD.size + by_bytes + name_bytes
            if at <= len(data):  # the last one may be cut off
                yield session_end, (names[:by_bytes].decode(), names[by_bytes:].decode()), client_end

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def remove(self) -> None:
        """The session has ended."""
        self.close()
        with suppress(OSError):
            self._path.unlink()
        with suppress(OSError):
            self._path.parent.rmdir()  # if there is no recording


def _record(session_end: int, key: Key, client_end: int) -> bytes:
    by, name = (part.encode("utf-8", "replace") for part in key)
    return _HEAD.pack(session_end, client_end, len(by), len(name)) + by + name
