"""A job's output in the home of the user it ran as: a link to the log, or a copy where they may not read the log.

The home belongs to somebody who may set traps there, and this process may be root: every folder is entered by
descriptor without following links, and must be theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .users import User

FOLDERS = (".osqbox", "jobs")
COPY_BYTES = 1024 * 1024


def link(directory: Path, user: User) -> None:
    """``~/.osqbox/jobs/ID`` points to the output of a job that runs as this process's own user. Raises OSError."""
    with _folder(user) as folder:
        os.symlink(directory.absolute() / "output", directory.name, dir_fd=folder)


def copy(directory: Path, user: User) -> None:
    """The same for another user, who cannot enter our directory; once the log is whole. Raises OSError."""
    source = os.open(directory / "output", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _folder(user) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(directory.name, flags, 0o600, dir_fd=folder)
            try:
                while os.sendfile(target, source, None, COPY_BYTES):
                    pass
                os.fchown(target, user.uid, user.gid)
            except BaseException:
                os.unlink(directory.name, dir_fd=folder)
                raise
            finally:
                os.close(target)
    finally:
        os.close(source)


def unlink(job_id: str, user: User) -> None:
    """Take the link away with its job; a copy stays, it is the user's own."""
    with suppress(OSError), _folder(user) as folder:
        os.readlink(job_id, dir_fd=folder)  # raises for anything but a link
        os.unlink(job_id, dir_fd=folder)


@contextmanager
def _folder(user: User) -> Iterator[int]:
    folder = os.open(user.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in FOLDERS:
            inner = _enter(folder, name, user)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _enter(parent: int, name: str, user: User) -> int:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        os.chown(name, user.uid, user.gid, dir_fd=parent, follow_symlinks=False)
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    if os.fstat(folder).st_uid != user.uid:
        os.close(folder)
        raise PermissionError(f"{name} in the home of {user.name} belongs to somebody else")
    return folder
