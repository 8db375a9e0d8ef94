"""file and hash: the files a host's description speaks of, programs and homes among them. There are no others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from osqbox.agent.functions import SqlValue
from osqbox.agent.profile.compiled import Software
from osqbox.agent.profile.description import fill
from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    kind: str
    mode: str
    size: int
    user: str
    changed: int
    version: str
    """Of the package it is from: the same version has the same content on every host."""


def _entries(m: Moment) -> Iterator[Entry]:
    """Everything there is, parents of files included; a path may come more than once."""
    by_name = {(item.role, item.name): item for item in m.compiled.software}
    for stream in m.compiled.streams:
        program = stream.program
        if program.path and "{" not in program.path and stream.role in m.roles:
            version, changed = _version(m, stream.software)
            size = 20_000 + m.fleet.below(4_000_000, "program", program.path, version)
            yield Entry(program.path, "regular", "0755", size, "root", changed, version)
    for name, role in m.roles.items():
        for described in role.files:
            found = by_name.get((name, described.package)) or by_name.get(("base", described.package))
            version, changed = _version(m, found)
            path = fill(described.path, m.texts)
            size = described.size or 100 + m.fleet.below(4000, "file", path, version)
            yield Entry(path, described.type, described.mode, size, described.user, changed, version)
    for user in m.people:
        yield Entry(user.home, "directory", "0750", 4096, user.name, m.installed_at, "")


def _version(m: Moment, software: Software | None) -> tuple[str, int]:
    if software is None:
        return "", m.installed_at
    release, installed = m.release(software)
    return software.version(release), installed


def _all(m: Moment) -> dict[str, Entry]:
    divider = "\\" if m.description.platform == "windows" else "/"
    found: dict[str, Entry] = {}
    for entry in _entries(m):
        found.setdefault(entry.path, entry)
        above = entry.path.rpartition(divider)[0]
        while above and above not in found:
            found[above] = Entry(above, "directory", "0755", 4096, "root", m.installed_at, "")
            above = above.rpartition(divider)[0]
    return found


def _about(m: Moment, context: Context) -> Iterator[tuple[Entry, str]]:
    """Entries a query is about, with the directory each is in."""
    divider = "\\" if m.description.platform == "windows" else "/"
    path, directory = context.equal_to("path"), context.equal_to("directory")
    path_like, directory_like = context.like("path"), context.like("directory")
    if path is None and directory is None and path_like is None and directory_like is None:
        return
    matches = _matcher(path_like) if path_like is not None else None
    directory_matches = _matcher(directory_like) if directory_like is not None else None
    for entry in _all(m).values():
        parent = entry.path.rpartition(divider)[0] or "/"
        if path is not None and entry.path != path:
            continue
        if directory is not None and parent != (directory.rstrip(divider) or "/"):
            continue
        if matches and not matches.fullmatch(entry.path):
            continue
        if directory_matches and not directory_matches.fullmatch(parent):
            continue
        yield entry, parent


def _matcher(pattern: str) -> re.Pattern[str]:
    """``%`` is one level, ``%%`` everything below, as the real table resolves them (filesystem.cpp)."""
    parts = re.split(r"(%%|%|\*)", pattern)
    known = {"%%": ".*", "%": "[^/\\\\]*", "*": "[^/\\\\]*"}
    return re.compile("".join(known.get(part) or re.escape(part) for part in parts))


def file(m: Moment, context: Context) -> Iterator[Row]:
    system = m.description.base.users[0]
    for entry, parent in _about(m, context):
        owner = m.users.get(entry.user, system)
        divider = "\\" if m.description.platform == "windows" else "/"
        yield {
            "path": entry.path,
            "directory": parent,
            "filename": entry.path.rpartition(divider)[2],
            "inode": m.dice.below(2**22, "inode", entry.path) + 2,
            "uid": owner.uid,
            "gid": owner.gid,
            "mode": entry.mode,
            "device": 0,
            "size": entry.size,
            "block_size": 4096,
            "atime": max(entry.changed, m.at // 86_400 * 86_400),
            "mtime": entry.changed,
            "ctime": entry.changed,
            "btime": entry.changed,
            "hard_links": 1 if entry.kind == "regular" else 2,
            "symlink": 0,
            "type": entry.kind,
            "symlink_target_path": "",
            "pid_with_namespace": 0,
        }


def hash_(m: Moment, context: Context) -> Iterator[Row]:
    """Of a content that is never made: equal for equal files of equal versions, different otherwise."""
    for entry, parent in _about(m, context):
        if entry.kind == "regular":
            content = repr((entry.path, entry.version, entry.size)).encode()
            digests: dict[str, SqlValue] = {
                name: hashlib.new(name, content, usedforsecurity=False).hexdigest()
                for name in ("md5", "sha1", "sha256")
            }
            yield {"path": entry.path, "directory": parent, **digests, "pid_with_namespace": 0}


TABLES: Mapping[str, Any] = {
    "file": (file, "path", "directory"),
    "hash": (hash_, "path", "directory"),
}
