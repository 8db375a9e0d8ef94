# ruff: noqa: PTH115, PTH208
# Thousands of paths per query: plain text and os.* cost a third of pathlib.
"""Small readers of /proc, /sys and /etc: a file that is missing or forbidden reads as nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

READ_BYTES = 1024 * 1024
"""Most that is read of one small file; none of those meant here come near."""


def read_bytes(path: str, limit: int = READ_BYTES) -> bytes:
    """At most ``limit`` bytes; empty when the file cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        pieces: list[bytes] = []
        while limit > 0 and (piece := os.read(handle, min(limit, 65536))):
            pieces.append(piece)
            limit -= len(piece)
        return b"".join(pieces)
    except OSError:
        return b""
    finally:
        os.close(handle)


def read_text(path: str, limit: int = READ_BYTES) -> str:
    return read_bytes(path, limit).decode("utf-8", "replace")


def read_word(path: str) -> str:
    """The file's text without the white space around it."""
    return read_text(path, 65536).strip()


def read_lines(path: str, limit: int = 64 * READ_BYTES) -> list[str]:
    return read_text(path, limit).splitlines()


def plain_lines(path: str) -> Iterator[str]:
    """Lines that say something: not blank, not a ``#`` comment."""
    for line in read_lines(path):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield stripped


def read_link(path: str) -> str:
    try:
        return os.fsencode(os.readlink(path)).decode("utf-8", "replace")
    except OSError:
        return ""


def list_directory(path: str) -> list[str]:
    """Names in order; empty when the directory cannot be read."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def pairs(path: str, separator: str = ":") -> dict[str, str]:
    """``key: value`` lines; of a repeated key the first counts."""
    found: dict[str, str] = {}
    for line in read_lines(path):
        key, divider, value = line.partition(separator)
        if divider:
            found.setdefault(key.strip(), value.strip())
    return found
