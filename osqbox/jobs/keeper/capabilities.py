"""What this machine lets the job runner do, found by trying."""

from __future__ import annotations

import os
import secrets

from .cgroups import CONTROLLERS, PREFIX, find_hierarchies

CAP_SETGID, CAP_SETUID = 6, 7


def capabilities() -> dict[str, object]:
    """For the start-up line: ``setuid`` (jobs may run as other users), ``containment``, ``kill`` (``cgroup.kill``,
    ``cgroup`` for member by member, ``sweep``), ``freezer`` and each limit's controller with ``cgroup2``, ``cgroup1``
    or None. Makes and removes a group of its own."""
    hierarchies = find_hierarchies()
    v2 = _probe(hierarchies.v2[0]) if hierarchies.v2 else set()
    v1 = hierarchies.v1
    enabled = {word for home in hierarchies.v2 for word in _words(f"{home}/cgroup.subtree_control")}
    found: dict[str, object] = {
        "setuid": _has_setuid(),
        "containment": "cgroup" if v2 or "freezer" in v1 else "process_group",
        "kill": "cgroup.kill" if "cgroup.kill" in v2 else "cgroup" if v2 or "freezer" in v1 else "sweep",
        "freezer": "cgroup2" if "cgroup.freeze" in v2 else "cgroup1" if "freezer" in v1 else None,
    }
    for name in CONTROLLERS:
        found[name] = "cgroup2" if v2 and name in enabled else "cgroup1" if name in v1 else None
    return found


def _probe(home: str) -> set[str]:
    directory = f"{home}/{PREFIX}probe-{secrets.token_hex(8)}"
    try:
        os.mkdir(directory, 0o755)
    except OSError:
        return set()
    try:
        return set(os.listdir(directory))
    finally:
        os.rmdir(directory)


def _has_setuid() -> bool:
    for line in _words("/proc/self/status", lines=True):
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return bool(held >> CAP_SETUID & 1 and held >> CAP_SETGID & 1)
    return os.geteuid() == 0


def _words(file: str, *, lines: bool = False) -> list[str]:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            text = opened.read()
    except OSError:
        return []
    return text.splitlines() if lines else text.split()
