"""A control group for one session, where the kernel and our rights allow it: what joined it cannot leave it."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_OWN = Path("/proc/self/cgroup")


class Cgroup:
    """A cgroup v2 directory below our own. The whole group ends with one write to ``cgroup.kill`` (Linux 5.14)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, pid: int) -> bool:
        return _write(self.path / "cgroup.procs", str(pid))

    def pids(self) -> set[int]:
        try:
            return {int(line) for line in (self.path / "cgroup.procs").read_text().split()}
        except OSError:
            return set()

    def kill(self) -> bool:
        return _write(self.path / "cgroup.kill", "1")

    def remove(self) -> bool:
        """Whether it is gone; it cannot go while a process is in it."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def make_cgroup(name: str) -> Cgroup | None:
    """None where there is no cgroup v2 we may write to, or it cannot kill a group."""
    home = _home()
    if home is None:
        return None
    group = Cgroup(home / name)
    try:
        group.path.mkdir()
    except OSError:
        return None
    if not (group.path / "cgroup.kill").exists():
        group.remove()
        return None
    return group


def _home() -> Path | None:
    """Our own cgroup v2 directory."""
    with contextlib.suppress(OSError, StopIteration, IndexError):
        mounts = [line.partition(" - ") for line in _MOUNTS.read_text().splitlines()]
        mount = next(left.split()[4] for left, _, right in mounts if right.startswith("cgroup2 "))
        own = next(line.removeprefix("0::") for line in _OWN.read_text().splitlines() if line.startswith("0::"))
        home = Path(mount + own.rstrip("/"))
        if home.is_dir() and ".." not in home.parts:
            return home
    return None


def _write(file: Path, text: str) -> bool:
    try:
        file.write_text(text)
    except OSError:
        return False
    return True
