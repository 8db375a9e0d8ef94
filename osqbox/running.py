"""Which boxes run on this machine: one small locked file each, so that a verb finds its box and a dead one is swept.

A box holds an exclusive lock on its file for as long as it lives. The kernel drops the lock however the process
ends, so a file that can be locked belongs to a dead box, and whatever it left behind can go.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from osqbox.errors import AddressInUse, BadSetup
from osqbox.settings import user_dir

OWNER = "owner"
"""Locked in an ephemeral data directory by the process it belongs to."""

State = Literal["starting", "ready", "stopping"]


@dataclass(frozen=True, slots=True)
class RunningBox:
    pid: int
    state: State
    data: Path
    started_at: float
    """Seconds since the epoch."""
    ready: dict[str, Any] | None
    """The ready object, once the box is ready."""


def runtime_dir() -> Path:
    """Where the files are: private to this user."""
    try:
        directory = user_dir() / "run"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    return _private_temp_dir() / "run"


def _private_temp_dir() -> Path:
    """``osqbox-UID`` under the temporary directory, made by and for this user only."""
    directory = Path(tempfile.gettempdir()) / f"osqbox-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():
        raise BadSetup(
            f"{directory} belongs to somebody else", hint=f"TMPDIR=$HOME/tmp osqbox ..., or remove {directory}"
        )
    (directory / "run").mkdir(mode=0o700, exist_ok=True)
    return directory


def _lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make_locked(path: Path) -> IO[str]:
    """A new file that is locked from the moment it has its name: nobody can take it for a dead one's."""
    unnamed = path.with_name(f".{path.name}")
    file = os.fdopen(os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+")
    _lock(file)
    unnamed.replace(path)
    return file


class Registration:
    """This process's own entry; `close` removes it."""

    def __init__(self, data: Path, started_at: float) -> None:
        self._data = data
        self._started_at = started_at
        self._path = runtime_dir() / f"box-{os.getpid()}-{os.urandom(4).hex()}.json"
        self._lock_path = self._path.with_suffix(".lock")
        self._lock_file = _make_locked(self._lock_path)
        self.update("starting")

    def update(self, state: State, ready: dict[str, Any] | None = None) -> None:
        """Tell what the box is doing; replaces the file as a whole."""
        facts = {
            "pid": os.getpid(),
            "state": state,
            "data": str(self._data),
            "started_at": self._started_at,
            "ready": ready,
        }
        write_private(self._path, json.dumps(facts))

    def close(self) -> None:
        for path in (self._path, self._lock_path):
            path.unlink(missing_ok=True)
        self._lock_file.close()


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, all at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def boxes(data: Path | None = None) -> list[RunningBox]:
    """Living boxes of this user, the newest first; with ``data``, those on that directory. Sweeps dead entries."""
    found = [box for lock in runtime_dir().glob("box-*.lock") if (box := _living(lock))]
    wanted = data.resolve() if data else None
    return sorted(
        (box for box in found if wanted is None or box.data.resolve() == wanted),
        key=lambda box: box.started_at,
        reverse=True,
    )


def _living(lock: Path) -> RunningBox | None:
    entry = lock.with_suffix(".json")
    try:
        with lock.open("r+") as file:
            if _lock(file, fcntl.LOCK_SH):  # shared: two who look must not take each other for the box
                entry.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
                return None
        facts = json.loads(entry.read_text())
        return RunningBox(facts["pid"], facts["state"], Path(facts["data"]), facts["started_at"], facts["ready"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def locked_data_dir(directory: Path) -> Iterator[None]:
    """Own a data directory: one box at a time. Raises AddressInUse or BadSetup."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.fdopen(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except OSError as error:
        raise BadSetup(
            f"cannot write to the data directory {directory} as user {os.getuid()}: {error.strerror}",
            hint=f"chown {os.getuid()} {directory}, or osqbox serve --data DIR",
        ) from error
    with file:
        if not _lock(file):
            _refuse_second(directory)
        yield


def _refuse_second(directory: Path) -> None:
    other = next(iter(boxes(directory)), None)
    who = f"pid {other.pid}" if other else "another process"
    where = f" at {other.ready['operator']}" if other and other.ready else ""
    raise AddressInUse(
        f"a box already runs on {directory} ({who}{where})",
        hint=f"osqbox stop --data {directory}, or osqbox serve --ephemeral --agents-port 0 --operator-port 0",
    )


@contextmanager
def ephemeral_data_dir() -> Iterator[Path]:
    """A data directory that goes with the process; also removes what killed boxes left behind."""
    parent = _private_temp_dir()
    for left in parent.glob("data-*"):
        _sweep(left)
    unnamed = Path(tempfile.mkdtemp(prefix=".data-", dir=parent))
    directory = parent / unnamed.name.removeprefix(".")
    with _make_locked(unnamed / OWNER):
        unnamed.rename(directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _sweep(directory: Path) -> None:
    from osqbox.jobs.orphans import end_jobs

    with suppress(OSError), (directory / OWNER).open("r+") as file:
        if _lock(file):
            end_jobs(directory / "jobs")
            shutil.rmtree(directory, ignore_errors=True)
