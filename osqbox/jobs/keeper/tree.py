"""All processes of a job without a cgroup: found by descent, ended without letting any slip away.

The keeper is a subreaper: whoever loses its parent becomes its child. So as long as the keeper lives, everything the
job ever started descends from it, whatever sessions and double forks it tried.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from .cgroups import kill_and_remove

ROUNDS = 64
"""A fork storm is stopped generation by generation; each round catches all that were born before it."""


def processes() -> dict[int, int]:
    """Every pid of the machine that lives, with its parent."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            state, parent = _state_and_parent(int(name))
            if state not in (b"Z", b"X"):
                parents[int(name)] = parent
    return parents


def descendants(ancestor: int) -> set[int]:
    """Living ones."""
    children: dict[int, list[int]] = {}
    for pid, parent in processes().items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    ahead = [ancestor]
    while ahead:
        born = [pid for pid in children.get(ahead.pop(), ()) if pid not in found]
        found.update(born)
        ahead += born
    return found


def stop_all(ancestor: int) -> set[int]:
    """SIGSTOP until a look around finds nobody new: who is stopped does not fork."""
    stopped: set[int] = set()
    for _ in range(ROUNDS):
        found = descendants(ancestor)
        if found <= stopped:
            break
        _send_down(ancestor, found, found - stopped, signal.SIGSTOP)
        stopped |= found
    return stopped


def continue_all(ancestor: int) -> None:
    found = descendants(ancestor)
    _send_down(ancestor, found, found, signal.SIGCONT)


def kill_all(ancestor: int) -> None:
    """SIGKILL to every descendant; call again until there are no children left to wait for."""
    found = stop_all(ancestor)
    _send_down(ancestor, found, found, signal.SIGKILL)


def end_orphans(job_id: str, cgroups: list[str], limit_s: float = 2.0) -> int:
    """For the box, when a keeper has died: kill what is left of its job, by cgroup and by JOB_ID in the environment.

    The ids are unguessable, so no stranger is hit. Returns how many processes were signalled; blocks for at most
    ``limit_s``. What is still there then is in uninterruptible sleep, or its environment cannot be read.
    """
    deadline = time.monotonic() + limit_s
    killed = kill_and_remove(cgroups, limit_s)
    seen: set[int] = set()
    while (found := with_job_id(job_id)) and time.monotonic() < deadline:
        seen |= found
        for number in (signal.SIGSTOP, signal.SIGKILL):
            _send(found, number, lambda pid: _has_job_id(pid, job_id))
        _wait_gone(found, deadline)
    return killed + len(seen)


def with_job_id(job_id: str) -> set[int]:
    """Living processes that were started with this JOB_ID; unreadable environments count as others'."""
    return {pid for pid in processes() if pid != os.getpid() and _has_job_id(pid, job_id)}


def _has_job_id(pid: int, job_id: str) -> bool:
    return f"JOB_ID={job_id}".encode() in _read(f"/proc/{pid}/environ").split(b"\0")


def _send_down(ancestor: int, family: set[int], pids: set[int], number: int) -> None:
    """To those of them that still descend: parents are members of the family, or the ancestor itself by now."""
    _send(pids, number, lambda pid: _state_and_parent(pid)[1] in {*family, ancestor})


def _send(pids: set[int], number: int, is_ours: Callable[[int], bool]) -> None:
    """Checked once more behind a pidfd: a number that was reused in the meantime never hits a stranger."""
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue  # has ended
        try:
            if is_ours(pid):
                with contextlib.suppress(OSError):  # has ended
                    signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _wait_gone(pids: set[int], deadline: float) -> None:
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(pidfd)


def _state_and_parent(pid: int) -> tuple[bytes, int]:
    """``Z`` and 0 for one that is gone."""
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return b"Z", 0
    # after the name, which may hold blanks and parentheses: state, parent
    state, parent = stat.rpartition(b")")[2].split(None, 2)[:2]
    return state, int(parent)


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        data = bytearray()
        while piece := os.read(fd, 65536):
            data += piece
        return bytes(data)
    except OSError:
        return b""
    finally:
        os.close(fd)
