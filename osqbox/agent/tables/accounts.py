"""Users, groups, who is logged in, and what runs on whose behalf."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterator

from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.reading import list_directory, plain_lines

_CRON_FILES = ("/etc/crontab",)
_CRON_SYSTEM_DIRECTORY = "/etc/cron.d"
_CRON_USER_DIRECTORIES = ("/var/at/tabs", "/var/spool/cron", "/var/spool/cron/crontabs")
_ULIMITS = {
    "cpu": "RLIMIT_CPU",
    "fsize": "RLIMIT_FSIZE",
    "data": "RLIMIT_DATA",
    "stack": "RLIMIT_STACK",
    "core": "RLIMIT_CORE",
    "nofile": "RLIMIT_NOFILE",
    "as": "RLIMIT_AS",
    "memlock": "RLIMIT_MEMLOCK",
    "rss": "RLIMIT_RSS",
    "nproc": "RLIMIT_NPROC",
}


def tables() -> dict[str, TableSource]:
    return {
        "users": source(users, "uid", "username"),
        "groups": source(groups, "gid"),
        "user_groups": source(user_groups, "uid"),
        "logged_in_users": source(logged_in_users),
        "authorized_keys": source(authorized_keys, "uid"),
        "crontab": source(crontab),
        "ulimit_info": source(ulimit_info),
    }


def _signed(number: int) -> int:
    """As the 32-bit signed number some databases of accounts mean: 4294967294 is -2."""
    return number - 2**32 if number >= 2**31 else number


def accounts(context: Context) -> list[pwd.struct_passwd]:
    """The accounts a query is about."""
    uids, name = context.integers("uid"), context.equal_to("username")
    if uids is None and name is None:
        return pwd.getpwall()
    found: list[pwd.struct_passwd] = []
    with contextlib.suppress(KeyError, OverflowError, ValueError):
        if uids is None:
            found.append(pwd.getpwnam(name or ""))
        else:
            found.extend(pwd.getpwuid(uid) for uid in uids)
    return found


def users(context: Context) -> Iterator[Row]:
    for account in accounts(context):
        yield {
            "uid": account.pw_uid,
            "gid": account.pw_gid,
            "uid_signed": _signed(account.pw_uid),
            "gid_signed": _signed(account.pw_gid),
            "username": account.pw_name,
            "description": account.pw_gecos,
            "directory": account.pw_dir,
            "shell": account.pw_shell,
            "uuid": "",
            "pid_with_namespace": 0,
        }


def groups(context: Context) -> Iterator[Row]:
    wanted = context.integers("gid")
    for group in grp.getgrall():
        if wanted is None or group.gr_gid in wanted:
            yield {
                "gid": group.gr_gid,
                "gid_signed": _signed(group.gr_gid),
                "groupname": group.gr_name,
                "pid_with_namespace": 0,
            }


def user_groups(context: Context) -> Iterator[Row]:
    for account in accounts(context):
        with contextlib.suppress(OSError):
            for gid in os.getgrouplist(account.pw_name, account.pw_gid):
                yield {"uid": account.pw_uid, "gid": gid}


def logged_in_users(_context: Context) -> Iterator[Row]:
    import psutil

    for session in psutil.users():
        yield {
            "type": "user",
            "user": session.name,
            "tty": session.terminal or "",
            "host": session.host or "",
            "time": int(session.started),
            "pid": session.pid,
        }


def authorized_keys(context: Context) -> Iterator[Row]:
    """Public keys that may log in. Options before the algorithm are kept as written."""
    kinds = ("ssh-", "ecdsa-", "sk-")
    for account in accounts(context):
        for name in ("authorized_keys", "authorized_keys2"):
            path = f"{account.pw_dir.rstrip('/')}/.ssh/{name}"
            for line in plain_lines(path):
                fields = line.split()
                start = next((at for at, field in enumerate(fields) if field.startswith(kinds)), None)
                if start is not None and len(fields) > start + 1:
                    yield {
                        "uid": account.pw_uid,
                        "algorithm": fields[start],
                        "key": fields[start + 1],
                        "options": " ".join(fields[:start]),
                        "comment": " ".join(fields[start + 2 :]),
                        "key_file": path,
                        "pid_with_namespace": 0,
                    }


def crontab(_context: Context) -> Iterator[Row]:
    """Lines of the system's and the users' crontabs; in a system file the command begins with the user."""
    system = [f"{_CRON_SYSTEM_DIRECTORY}/{name}" for name in list_directory(_CRON_SYSTEM_DIRECTORY)]
    own = [f"{base}/{name}" for base in _CRON_USER_DIRECTORIES for name in list_directory(base)]
    for path in (*_CRON_FILES, *system, *own):
        for line in plain_lines(path):
            row = _cron_line(line)
            if row is not None:
                yield {**row, "path": path, "pid_with_namespace": 0}


def _cron_line(line: str) -> Row | None:
    times = ("minute", "hour", "day_of_month", "month", "day_of_week")
    if line.startswith("@"):
        event, _, command = line.partition(" ")
        return {"event": event, **dict.fromkeys(times, ""), "command": command.strip()}
    fields = line.split(None, 5)
    if len(fields) < 6 or "=" in fields[0]:
        return None
    return {"event": "", **dict(zip(times, fields, strict=False)), "command": fields[5]}


def ulimit_info(_context: Context) -> Iterator[Row]:
    import resource

    for kind, name in _ULIMITS.items():
        limits = resource.getrlimit(getattr(resource, name))
        soft, hard = ("unlimited" if x == resource.RLIM_INFINITY else str(x) for x in limits)
        yield {"type": kind, "soft_limit": soft, "hard_limit": hard}
