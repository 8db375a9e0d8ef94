# ruff: noqa: PTH112, PTH114, PTH116, PTH123, PTH208
# Thousands of paths per query: plain text and os.* cost a third of pathlib.
"""file and hash: what is in the file system, asked by path, directory or pattern."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator

from osqbox.agent.sql import Context, Row, TableSource, source

READ_MAX_BYTES = 50 * 1024 * 1024  # --read_max
MAX_PATHS = 200_000
MAX_DEPTH = 64
_TYPES = {
    stat.S_IFREG: "regular",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "character",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def tables(read_max_bytes: int = READ_MAX_BYTES) -> dict[str, TableSource]:
    return {
        "file": source(file, "path", "directory"),
        "hash": source(functools.partial(hash_, read_max_bytes=read_max_bytes), "path", "directory"),
    }


# -- patterns ----------------------------------------------------------------------------------------------------


def resolve(pattern: str, context: Context | None = None) -> Iterator[str]:
    """Paths matching an osquery pattern (filesystem.cpp): ``%`` is one level, ``%%`` at the end is all below.

    Symbolic links to directories are not followed by ``%%``. At most MAX_PATHS paths.
    """
    context = context or Context()
    if not pattern.startswith("/"):
        return
    parts = [part for part in pattern.replace("*", "%").split("/") if part]
    for count, path in enumerate(_matches("", parts, context)):
        if count >= MAX_PATHS:
            context.warn(f"Too many paths match {pattern}: stopped after {MAX_PATHS}")
            return
        yield path


def _matches(base: str, parts: list[str], context: Context) -> Iterator[str]:
    context.checkpoint()
    if not parts:
        yield base or "/"
        return
    part, *rest = parts
    if "%%" in part:
        matches = _glob(part.replace("%%", "%"))
        for name in _names(base):
            if matches(name):
                yield from _below(f"{base}/{name}", context, MAX_DEPTH)
    elif "%" in part:
        matches = _glob(part)
        for name in _names(base):
            path = f"{base}/{name}"
            if matches(name) and (not rest or os.path.isdir(path)):
                yield from _matches(path, rest, context)
    elif os.path.lexists(f"{base}/{part}"):
        yield from _matches(f"{base}/{part}", rest, context)


def _below(path: str, context: Context, depth: int) -> Iterator[str]:
    context.checkpoint()
    yield path
    if depth and os.path.isdir(path) and not os.path.islink(path):
        for name in _names(path):
            yield from _below(f"{path}/{name}", context, depth - 1)


def _glob(part: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(part.replace("[", "[[]").replace("%", "*"))).match


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory or "/"))
    except OSError:
        return []


def wanted_paths(context: Context) -> Iterator[tuple[str, str | None]]:
    """Paths a query is about, with the directory they were asked by, if they were."""
    path, like = context.equal_to("path"), context.like("path")
    directory, directory_like = context.equal_to("directory"), context.like("directory")
    if path is not None:
        yield path, None
    elif like is not None:
        for found in resolve(like, context):
            yield found, None
    elif directory is not None or directory_like is not None:
        bases = [directory] if directory is not None else list(resolve(directory_like or "", context))
        for base in bases:
            for name in _names(base):
                context.checkpoint()
                yield f"{base.rstrip('/')}/{name}", base


# -- tables ------------------------------------------------------------------------------------------------------


def file(context: Context) -> Iterator[Row]:
    for path, directory in wanted_paths(context):
        row = _file_row(path, directory)
        if row is not None:
            yield row


def _file_row(path: str, directory: str | None) -> Row | None:
    try:
        link = os.lstat(path)
    except (OSError, ValueError):
        return None
    is_link = stat.S_ISLNK(link.st_mode)
    try:
        found = os.stat(path) if is_link else link
    except OSError:
        found = link
    parent, _, name = path.rpartition("/")
    return {
        "path": path,
        "directory": directory if directory is not None else parent or "/",
        "filename": name or path.rstrip("/").rpartition("/")[2],
        "inode": found.st_ino,
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mode": f"{stat.S_IMODE(found.st_mode):04o}",
        "device": found.st_rdev,
        "size": found.st_size,
        "block_size": found.st_blksize,
        "atime": int(found.st_atime),
        "mtime": int(found.st_mtime),
        "ctime": int(found.st_ctime),
        "hard_links": found.st_nlink,
        "symlink": int(is_link),
        "type": _TYPES.get(stat.S_IFMT(found.st_mode), "unknown"),
        "symlink_target_path": _target(path) if is_link else "",
        "pid_with_namespace": 0,
    }


def _target(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:  # a link in /proc that may not be read
        return ""


def hash_(context: Context, *, read_max_bytes: int = READ_MAX_BYTES) -> Iterator[Row]:
    """Regular files only; one larger than ``read_max_bytes`` gets a warning instead of hashes."""
    names = [name for name in ("md5", "sha1", "sha256") if context.wants(name)]
    for path, directory in wanted_paths(context):
        digests = _digests(path, names, context, read_max_bytes)
        if digests is not None:
            base = directory if directory is not None else path.rpartition("/")[0]
            yield {"path": path, "directory": base, **digests, "pid_with_namespace": 0}


def _digests(path: str, names: list[str], context: Context, read_max_bytes: int) -> dict[str, str] | None:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return None
        if found.st_size > read_max_bytes:
            context.warn(f"Cannot read {path}: size {found.st_size} is over --read_max {read_max_bytes}")
            return {}
        digests = [hashlib.new(name, usedforsecurity=False) for name in names]
        left_bytes = read_max_bytes
        with open(path, "rb") as content:
            while digests and left_bytes > 0 and (piece := content.read(min(left_bytes, 1024 * 1024))):
                context.checkpoint()
                left_bytes -= len(piece)
                for digest in digests:
                    digest.update(piece)
    except (OSError, ValueError):
        return None
    return {digest.name: digest.hexdigest() for digest in digests}
