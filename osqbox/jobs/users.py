"""Unix users as this machine knows them, and what this process may become."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from osqbox.errors import BadSetup

from .access import Unix
from .errors import Code, JobError

SELF_STATUS = Path("/proc/self/status")
# Numbers of linux/capability.h.
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_SYS_NICE = 5, 6, 7, 21, 23


@dataclass(frozen=True, slots=True)
class User:
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    """All groups, the primary one among them."""
    home: str
    shell: str


@dataclass(frozen=True, slots=True)
class Powers:
    """What the kernel lets this process do for jobs."""

    setuid: bool
    """Become another user: CAP_SETUID and CAP_SETGID."""
    kill: bool
    """Signal other users' processes."""
    namespaces: bool
    nice: bool


def lookup(name: str) -> User:
    """A user by name; FAILED_PRECONDITION without one. A number is no name."""
    try:
        return _user(pwd.getpwnam(name))
    except (KeyError, ValueError):  # ValueError: a NUL in it
        raise JobError(
            Code.FAILED_PRECONDITION,
            f"run_as: expected a user of this machine, got {name!r}",
            reason="UNKNOWN_USER",
            field="run_as",
        ) from None


def own_user() -> User:
    """Whom this process runs as; a user without an entry, as in many containers, is called by its number."""
    uid = os.geteuid()
    try:
        return _user(pwd.getpwuid(uid))
    except KeyError:
        return User(str(uid), uid, os.getegid(), tuple(os.getgroups()), os.environ.get("HOME") or "/", "/bin/sh")


def _user(entry: pwd.struct_passwd) -> User:
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(
        entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups), entry.pw_dir or "/", entry.pw_shell or "/bin/sh"
    )


def powers() -> Powers:
    """From the effective capabilities; without /proc, whether we are root."""
    held = _effective_capabilities()

    def has(*numbers: int) -> bool:
        return all(held >> number & 1 for number in numbers)

    return Powers(has(CAP_SETUID, CAP_SETGID), has(CAP_KILL), has(CAP_SYS_ADMIN), has(CAP_SYS_NICE))


def _effective_capabilities() -> int:
    try:
        lines = SELF_STATUS.read_text().splitlines()
    except OSError:
        return -1 if os.geteuid() == 0 else 0
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def unix_facts(jobs_user: str | None = None) -> Unix:
    """What `access.user_for` needs to know. Raises BadSetup for a ``--jobs-user`` that no job could run as."""
    own, can_switch = own_user(), powers().setuid
    if jobs_user is not None and jobs_user != own.name:
        try:
            lookup(jobs_user)
        except JobError:
            raise BadSetup(
                f"--jobs-user: expected a user of this machine, got {jobs_user!r}",
                hint=f"useradd --system --no-create-home {jobs_user}",
            ) from None
        if not can_switch:
            raise BadSetup(
                f"--jobs-user {jobs_user}: this process lacks CAP_SETUID and CAP_SETGID; only {own.name!r} is possible",
                hint="start osqbox as root, or leave --jobs-user out",
            )
    return Unix(own.name, can_switch, jobs_user)


def start_line(unix: Unix, *, cgroup: bool) -> str:
    """Whom jobs run as and what this process can do for them, in one line for the start of a box."""
    held = powers()
    words = {"setuid": held.setuid, "cgroup": cgroup, "namespaces": held.namespaces, "nice": held.nice}
    able = ", ".join(word if is_there else f"no {word}" for word, is_there in words.items())
    return f"as {unix.jobs_user or unix.user} or a principal of the certificate; {able}"
