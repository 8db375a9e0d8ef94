"""Users, groups, and who logs in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from osqbox.agent.functions import SqlValue
from osqbox.agent.profile.description import User
from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row

_USER_PROCESS, _DEAD_PROCESS = 7, 8
_DAY_S = 86_400


def _about(m: Moment, context: Context) -> Iterator[User]:
    uids, name = context.integers("uid"), context.equal_to("username")
    for user in m.users.values():
        if (uids is None or user.uid in uids) and (name is None or user.name == name):
            yield user


def _signed(number: int) -> int:
    """As a signed number of 32 bits: 4294967294 is -2."""
    return number - 2**32 if number >= 2**31 else number


def users(m: Moment, context: Context) -> Iterator[Row]:
    for user in _about(m, context):
        yield {
            "uid": user.uid,
            "gid": user.gid,
            "uid_signed": _signed(user.uid),
            "gid_signed": _signed(user.gid),
            "username": user.name,
            "description": user.description,
            "directory": user.home,
            "shell": user.shell,
            "uuid": m.user_uuid(user),
            "type": user.type,
            "is_hidden": int(user.name.startswith("_")),
            "pid_with_namespace": 0,
        }


def groups(m: Moment, context: Context) -> Iterator[Row]:
    wanted = context.integers("gid")
    for name, gid in m.groups.items():
        if wanted is None or gid in wanted:
            yield {
                "gid": gid,
                "gid_signed": _signed(gid),
                "groupname": name,
                "group_sid": f"S-1-5-32-{gid}" if m.description.platform == "windows" else "",
                "is_hidden": int(name.startswith("_")),
                "pid_with_namespace": 0,
            }


def user_groups(m: Moment, context: Context) -> Iterator[Row]:
    for user in _about(m, context):
        gids = [user.gid, *(m.groups[name] for name in user.groups if name in m.groups)]
        for gid in dict.fromkeys(gids):
            yield {"uid": user.uid, "gid": gid}


def logged_in_users(m: Moment, _context: Context) -> Iterator[Row]:
    kind = "active" if m.description.platform == "windows" else "user"
    for login in m.sessions():
        yield {
            "type": kind,
            "user": login.user.name,
            "tty": m.tty(login.stream),
            "host": m.visitor(login.stream, login.start),
            "time": login.start,
            "pid": login.pid,
            "sid": m.user_uuid(login.user) if kind == "active" else "",
            "registry_hive": f"HKEY_USERS\\{m.user_uuid(login.user)}" if kind == "active" else "",
        }


def last(m: Moment, _context: Context) -> Iterator[Row]:
    for login in m.past_sessions():
        row: dict[str, SqlValue] = {"username": login.user.name, "tty": m.tty(login.stream), "pid": login.pid}
        host = m.visitor(login.stream, login.start)
        yield {**row, "type": _USER_PROCESS, "type_name": "user-process", "time": login.start, "host": host}
        if login.end <= m.at:
            yield {**row, "type": _DEAD_PROCESS, "type_name": "dead-process", "time": login.end, "host": ""}


def shadow(m: Moment, _context: Context) -> Iterator[Row]:
    people = {user.name for user in m.people}
    for user in m.users.values():
        is_person = user.name in people
        changed = m.installed_at + (m.dice.below(60 * _DAY_S, "password", user.name) if is_person else 0)
        yield {
            "password_status": "active" if is_person else "locked",
            "hash_alg": "y" if is_person else "",
            "last_change": min(changed, m.at) // _DAY_S,
            "min": 0,
            "max": 99_999,
            "warning": 7,
            "inactive": -1,
            "expire": -1,
            "flag": -1,
            "username": user.name,
        }


def _home(m: Moment, user: User, *below: str) -> str:
    divider = "\\" if m.description.platform == "windows" else "/"
    return divider.join((user.home, *below))


def authorized_keys(m: Moment, context: Context) -> Iterator[Row]:
    """One key of each of the host's people: the same on every host they are on."""
    people = {user.name for user in m.people}
    for user in _about(m, context):
        if user.name in people:
            yield {
                "uid": user.uid,
                "algorithm": "ssh-ed25519",
                "key": "AAAAC3NzaC1lZDI1NTE5AAAAI" + m.fleet.hexadecimal(43, "key", user.name),
                "options": "",
                "comment": f"{user.name}@laptop",
                "key_file": _home(m, user, ".ssh", "authorized_keys"),
                "pid_with_namespace": 0,
            }


def user_ssh_keys(m: Moment, context: Context) -> Iterator[Row]:
    people = {user.name for user in m.people}
    for user in _about(m, context):
        if user.name in people and m.fleet.share("has key", user.name) < 0.6:
            yield {
                "uid": user.uid,
                "path": _home(m, user, ".ssh", "id_ed25519"),
                "encrypted": int(m.fleet.share("encrypted key", user.name) < 0.7),
                "key_type": "ed25519",
                "key_group_name": "",
                "key_length": 256,
                "key_security_bits": 128,
                "pid_with_namespace": 0,
            }


TABLES: Mapping[str, Any] = {
    "users": (users, "uid", "username"),
    "groups": (groups, "gid"),
    "user_groups": (user_groups, "uid"),
    "logged_in_users": (logged_in_users,),
    "last": (last,),
    "shadow": (shadow,),
    "authorized_keys": (authorized_keys, "uid"),
    "user_ssh_keys": (user_ssh_keys, "uid"),
}
