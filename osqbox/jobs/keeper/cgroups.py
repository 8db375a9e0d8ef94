"""Control groups of every kind found in the wild: v2, hybrid (v2 without controllers beside v1), v1, none.

A job gets one directory that tracks its tree (v2, else the v1 freezer) and, for its limits, one per v1 controller.
Jobs join before ``execve``; everything is removed with the job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time

from .spec import Limits, StartError

PREFIX = "osqbox-job-"
CONTROLLERS = ("memory", "cpu", "pids")
PERIOD_US = 100_000
LIMIT_OF = {"memory": "memory_bytes", "cpu": "cpu_cores", "pids": "processes"}
WORD_OF = {"memory": "memory", "cpu": "cpu", "pids": "processes"}
"""How ``enforced`` calls it."""


class Hierarchies:
    """Where this process may make groups: found once by the zygote, inherited by every keeper."""

    __slots__ = ("v1", "v2")

    def __init__(self, v2: list[str], v1: dict[str, str]) -> None:
        self.v2 = v2
        """Directories to try, nearest first."""
        self.v1 = v1
        """Our own directory by controller."""


def find_hierarchies(mountinfo: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup") -> Hierarchies:
    """What is mounted and writable; nothing where nothing is."""
    paths: dict[str, str] = {}
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    v2: list[str] = []
    v1: dict[str, str] = {}
    for line in _lines(mountinfo):
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2" and "" in paths:
            v2 = _writable_up_to(mount, _below(mount, root, paths[""]))
        elif kind == "cgroup":
            for controller in {"memory", "cpu", "pids", "freezer"} & set(options.split(",")) & paths.keys():
                if directory := _writable_up_to(mount, _below(mount, root, paths[controller]))[:1]:
                    v1[controller] = directory[0]
    return Hierarchies(v2, v1)


class Group:
    """The groups of one job. ``directory`` tracks the tree; None where only limits are kept in groups."""

    __slots__ = ("directories", "directory", "enforced", "is_v2", "memory")

    def __init__(self) -> None:
        self.directories: list[str] = []
        self.directory: str | None = None
        self.memory: str | None = None
        self.is_v2 = False
        self.enforced: list[str] = []

    def join_fds(self) -> list[int]:
        """Whoever writes ``0`` to these joins; the caller closes them. Raises OSError."""
        fds: list[int] = []
        try:
            for directory in self.directories:
                fds.append(os.open(f"{directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))  # noqa: PERF401
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def pids(self) -> list[int]:
        """Of the whole tree, groups below included."""
        return [] if self.directory is None else _pids(self.directory)

    def kill(self) -> None:
        if self.directory is not None:
            _kill(self.directory)

    def freeze(self, frozen: bool) -> bool:
        """False: there is no freezer here."""
        if self.directory is None:
            return False
        if self.is_v2:
            return _write(f"{self.directory}/cgroup.freeze", str(int(frozen)))
        return _write(f"{self.directory}/freezer.state", "FROZEN" if frozen else "THAWED")

    def oom_kills(self) -> int:
        if self.memory is None:
            return 0
        return _number(f"{self.memory}/memory.events", "oom_kill") or _number(
            f"{self.memory}/memory.oom_control", "oom_kill"
        )

    def cpu_s(self) -> float | None:
        """CPU seconds of all members so far; None where nobody counts."""
        return _number(f"{self.directory}/cpu.stat", "usage_usec") / 1e6 if self.is_v2 else None

    def enforces(self, word: str) -> bool:
        return any(enforced.startswith(f"{word}:") for enforced in self.enforced)

    def remove(self) -> None:
        """What still has members stays in ``directories``."""
        self.directories = remove_empty(self.directories)


def make_group(hierarchies: Hierarchies, job_id: str, limits: Limits) -> Group:
    """Groups for a job and its limits; limits that no group here enforces are left to `child.rlimits`.

    Raises StartError for values the kernel refuses.
    """
    group = Group()
    try:
        wanted = [name for name in CONTROLLERS if getattr(limits, LIMIT_OF[name]) is not None]
        if (home := _v2_home(hierarchies, wanted)) and _make(group, directory := f"{home}/{PREFIX}{job_id}"):
            group.directory, group.is_v2 = directory, True
        for name in wanted:
            _limit(group, hierarchies, job_id, name, limits)
        if group.directory is None and "freezer" in hierarchies.v1:
            group.directory = _make(group, f"{hierarchies.v1['freezer']}/{PREFIX}{job_id}")
    except BaseException:
        group.remove()
        raise
    return group


def kill_and_remove(directories: list[str], limit_s: float) -> int:
    """End recorded groups of a keeper that has died; returns how many members there were."""
    deadline = time.monotonic() + limit_s
    members = {pid for directory in directories for pid in _pids(directory)}
    for directory in directories:
        while not _remove(directory) and time.monotonic() < deadline:
            _kill(directory)
            select.select((), (), (), 0.005)  # v1 has no event for an empty group
    return len(members)


def remove_empty(directories: list[str]) -> list[str]:
    """For the box, behind a job whose leftovers were spared; returns those that still have members."""
    return [directory for directory in directories if not _remove(directory)]


def _v2_home(hierarchies: Hierarchies, wanted: list[str]) -> str | None:
    """The nearest directory that offers most of the wanted controllers to groups below it."""
    return max(hierarchies.v2, key=lambda directory: len(_enabled(directory) & set(wanted)), default=None)


def _enabled(directory: str) -> set[str]:
    return set(_read(f"{directory}/cgroup.subtree_control").split())


def _make(group: Group, directory: str) -> str | None:
    if directory not in group.directories:
        try:
            os.mkdir(directory, 0o755)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EAGAIN, errno.ENOSPC):
                raise StartError("cgroup", error.errno, f"{directory}: {error.strerror}") from None
            return None
        group.directories.append(directory)
    return directory


def _limit(group: Group, hierarchies: Hierarchies, job_id: str, name: str, limits: Limits) -> None:
    v2 = next((directory for directory in group.directories if os.path.exists(f"{directory}/{name}.max")), None)
    if v2 is not None:
        _set(name, _v2_values(v2, name, limits))
        group.enforced.append(f"{WORD_OF[name]}:cgroup2")
    elif name in hierarchies.v1 and (v1 := _make(group, f"{hierarchies.v1[name]}/{PREFIX}{job_id}")):
        _set(name, _v1_values(v1, name, limits))
        group.enforced.append(f"{WORD_OF[name]}:cgroup1")
    else:
        return  # the caller looks for other means
    if name == "memory":
        group.memory = v2 or v1


def _v2_values(directory: str, name: str, limits: Limits) -> list[tuple[str, str]]:
    match name:
        case "memory":
            values = {"max": limits.memory_bytes, "swap.max": 0, "oom.group": 1}
            return [(f"{directory}/memory.{file}", str(value)) for file, value in values.items()]
        case "cpu":
            return [(f"{directory}/cpu.max", f"{_quota_us(limits)} {PERIOD_US}")]
        case _:
            return [(f"{directory}/pids.max", str(limits.processes))]


def _v1_values(directory: str, name: str, limits: Limits) -> list[tuple[str, str]]:
    match name:
        case "memory":
            values = ("limit_in_bytes", "memsw.limit_in_bytes")
            return [(f"{directory}/memory.{file}", str(limits.memory_bytes)) for file in values]
        case "cpu":
            quota = (f"{directory}/cpu.cfs_quota_us", str(_quota_us(limits)))
            return [(f"{directory}/cpu.cfs_period_us", str(PERIOD_US)), quota]
        case _:
            return [(f"{directory}/pids.max", str(limits.processes))]


def _quota_us(limits: Limits) -> int:
    return round((limits.cpu_cores or 0) * PERIOD_US)


def _set(name: str, values: list[tuple[str, str]]) -> None:
    """The first file of a limit must take its value; the others, about swap, exist only on some kernels."""
    for number, (file, value) in enumerate(values):
        if number and not os.path.exists(file):
            continue
        try:
            with open(file, "w", encoding="ascii") as opened:
                opened.write(value)
        except OSError as error:
            message = f"{WORD_OF[name]}: expected a value this kernel takes, got {value!r}: {error.strerror}"
            raise StartError("limits", error.errno or errno.EINVAL, message) from None


def _kill(directory: str) -> None:
    """All members at once where the kernel can, else frozen first so that none forks away."""
    if _write(f"{directory}/cgroup.kill", "1"):
        return
    frozen = _write(f"{directory}/freezer.state", "FROZEN") or _write(f"{directory}/cgroup.freeze", "1")
    for pid in _pids(directory):
        with contextlib.suppress(OSError):  # ended
            os.kill(pid, signal.SIGKILL)
    if frozen:
        _ = _write(f"{directory}/freezer.state", "THAWED") or _write(f"{directory}/cgroup.freeze", "0")


def _pids(directory: str) -> list[int]:
    return [int(pid) for path, _, _ in os.walk(directory) for pid in _lines(f"{path}/cgroup.procs") if pid != "0"]


def _remove(directory: str) -> bool:
    """The job may have made groups below its own."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        below = [path for path, _, _ in os.walk(directory, topdown=False) if path != directory]
        return bool(below) and all(_remove(path) for path in below) and _remove(directory)
    return True


def _writable_up_to(mount: str, directory: str) -> list[str]:
    """The directory and those above it up to the mount, as far as groups can be made there."""
    found = []
    while directory.startswith(mount):
        if os.access(directory, os.W_OK) and os.access(f"{directory}/cgroup.procs", os.W_OK):
            found.append(directory)
        if directory == mount:
            break
        directory = os.path.dirname(directory)
    return found


def _below(mount: str, root: str, path: str) -> str:
    """Where a path of /proc/self/cgroup stands under a mount that may show only part of the hierarchy."""
    inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else path
    return (mount + inside).rstrip("/") if os.path.isdir(mount + inside) else mount


def _number(file: str, name: str) -> int:
    """Of the line ``name number``; 0 without one."""
    for line in _lines(file):
        word, _, number = line.partition(" ")
        if word == name:
            return int(number)
    return 0


def _lines(file: str) -> list[str]:
    return _read(file).splitlines()


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as opened:
            return opened.read()
    except OSError:
        return ""


def _write(file: str, value: str) -> bool:
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, value.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
