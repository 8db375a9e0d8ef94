"""What is in a host's files, for carves and YARA: this machine's own, or made-up ones of a host that only pretends.

A pretended host must never give away what this machine's files say.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Protocol

from osqbox.agent.functions import SqlValue, render
from osqbox.agent.sql import Constraint, Context, Row, Tables
from osqbox.agent.tables import files

MAX_PRETENDED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Opened:
    content: IO[bytes]
    size_bytes: int
    described: Row | None = None
    """The row of the table ``file``, where there is no real file to ask."""


class Contents(Protocol):
    def find(self, pattern: str, context: Context) -> Iterable[str]:
        """The paths that match an osquery pattern."""
        ...

    def open(self, path: str) -> Opened | None:
        """A regular file; None for anything else, and what cannot be read. The caller closes it."""
        ...


def contents_of(tables: Tables) -> Contents:
    """Of the host that ``tables`` describe: this machine's if their files are."""
    found = tables.get("file")
    is_this_machine = found is not None and found.generate is files.file
    return MachineContents() if is_this_machine else PretendedContents(tables)


class MachineContents:
    def find(self, pattern: str, context: Context) -> Iterable[str]:
        return files.resolve(pattern, context)

    def open(self, path: str) -> Opened | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            return None
        return Opened(os.fdopen(handle, "rb"), found.st_size)


class PretendedContents:
    """The files that the host's own table shows: as long as that says, up to MAX_PRETENDED_BYTES, of one sentence."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def find(self, pattern: str, context: Context) -> Iterable[str]:
        rows = self._rows(Constraint("path", "LIKE", pattern), context)
        return [render(row.get("path")) for row in rows]

    def open(self, path: str) -> Opened | None:
        for row in self._rows(Constraint("path", "=", path), Context()):
            if row.get("path") == path and row.get("type") == "regular":
                size_bytes = min(_whole(row.get("size")), MAX_PRETENDED_BYTES)
                sentence = f"This is what osqbox made up for {path}.\n".encode("utf-8", "replace")
                content = (sentence * (size_bytes // len(sentence) + 1))[:size_bytes]
                return Opened(io.BytesIO(content), size_bytes, row)
        return None

    def _rows(self, constraint: Constraint, context: Context) -> Iterable[Row]:
        found = self._tables.get("file")
        asked = Context((constraint,), warn=context.warn, checkpoint=context.checkpoint)
        return [] if found is None else found.generate(asked)


def tar_member(archive: tarfile.TarFile, path: str, opened: Opened) -> tarfile.TarInfo:
    """With the file's metadata."""
    if opened.described is None:
        return archive.gettarinfo(arcname=path, fileobj=opened.content)
    row, member = opened.described, tarfile.TarInfo(path)
    member.size = opened.size_bytes
    member.mtime = _whole(row.get("mtime"))
    member.uid, member.gid = _whole(row.get("uid")), _whole(row.get("gid"))
    member.mode = int(render(row.get("mode")) or "0644", 8)
    return member


def _whole(value: SqlValue) -> int:
    text = render(value)
    return int(text) if text.isdecimal() else 0
