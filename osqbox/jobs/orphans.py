"""Ending the jobs of a box that was killed and whose data directory goes: nobody will ask for them again."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from contextlib import suppress
from pathlib import Path

from .keeper.tree import end_orphans
from .keeper.wire import connect, encode

LIMIT_S = 5.0
STOP = encode({"call": 1, "do": "stop", "signal": 9, "grace_s": 0, "reason": "shutdown", "by": "osqbox"})


def end_jobs(directory: Path, limit_s: float = LIMIT_S) -> int:
    """Kill every job in ``directory``, the one with a directory per job; returns how many still ran.

    Their keepers are asked first, as they know all of the tree; what has lost its keeper is found by cgroup and
    JOB_ID. Blocks for ``limit_s`` at most for the former.
    """
    with suppress(OSError):
        jobs = [path for path in directory.iterdir() if path.is_dir() and not _has_ended(path)]
        keepers = [keeper for path in jobs if (keeper := _ask(path)) is not None]
        _wait_gone(keepers, time.monotonic() + limit_s)
        for path in jobs:
            end_orphans(path.name, _facts(path).get("cgroups") or [], 1.0)
        return len(jobs)
    return 0


def _has_ended(path: Path) -> bool:
    return not (path / "socket").exists() and _facts(path).get("ended_at") is not None


def _facts(path: Path) -> dict[str, list[str] | None]:
    try:
        facts = json.loads((path / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _ask(path: Path) -> socket.socket | None:
    """To stop; the connection ends with the keeper."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            keeper = connect(fd)
        finally:
            os.close(fd)
        try:
            keeper.send(STOP)
        except OSError:
            keeper.close()
            return None
        return keeper
    return None


def _wait_gone(keepers: list[socket.socket], deadline: float) -> None:
    waiting = {keeper.fileno(): keeper for keeper in keepers}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left_s * 1000):
            if not _is_there(waiting[fd]):
                poll.unregister(fd)
                waiting.pop(fd).close()
    for keeper in waiting.values():
        keeper.close()


def _is_there(keeper: socket.socket) -> bool:
    try:
        return bool(keeper.recv(65536))
    except BlockingIOError:
        return True
    except OSError:
        return False
