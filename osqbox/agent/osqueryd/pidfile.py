"""The daemon's pidfile: a lock as long as the process lives, the pid as its content (osquery/utils/pidfile)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from osqbox.errors import UserError

FORCE_S = 10.0
"""Five times two seconds."""
_POLL_S = 0.05


class PidfileBusy(UserError):
    """Another osqueryd has it, or it cannot be written; the program ends with 1."""


@contextlib.contextmanager
def held_pidfile(path: Path, *, force: bool) -> Iterator[None]:
    """Hold the pidfile; it is removed at the end. ``force`` kills an osqueryd that has it. Raises PidfileBusy."""
    try:
        handle = _open(path, force=force)
    except OSError as error:
        raise PidfileBusy(f"cannot write {path}: {error.strerror}", hint="--pidfile FILE, or --ephemeral") from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _open(path: Path, *, force: bool) -> int:
    deadline = time.monotonic() + FORCE_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(handle)
            os.close(handle)
            if not force or time.monotonic() > deadline:
                raise PidfileBusy(
                    f"osqueryd ({holder or 'unknown'}) is already running", hint="--force, or another --pidfile"
                ) from None
            if holder and _is_osqueryd(holder):
                with contextlib.suppress(OSError):
                    os.kill(holder, signal.SIGKILL)
            threading.Event().wait(_POLL_S)
            continue
        if os.fstat(handle).st_ino == _inode(path):
            return handle
        os.close(handle)  # its owner removed it in between


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _holder(handle: int) -> int:
    text = os.pread(handle, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _is_osqueryd(pid: int) -> bool:
    """A pid may be somebody else's by now: only a process of that name is killed."""
    folder = Path(f"/proc/{pid}")
    try:
        name, words = (folder / "comm").read_text(), (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return name.startswith("osqueryd") or any(Path(os.fsdecode(word)).name.startswith("osqueryd") for word in words)
