"""What a keeper is asked to run, checked, and how it says that it could not."""

from __future__ import annotations

import errno
import json
import os
import re

from .wire import MAX_SPEC_BYTES

ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
"""Part of cgroup names and of JOB_ID."""
OVERFLOWS = ("kill", "discard_new", "keep_head_and_tail")
NUMBER = (int, float)


class StartError(Exception):
    """The job never ran. ``step`` is what failed, ``errno`` the kernel's word for it (0: none)."""

    def __init__(self, step: str, number: int, message: str = "") -> None:
        super().__init__(f"{step}: {message or os.strerror(number)}")
        self.step, self.errno, self.message = step, number, message or os.strerror(number)

    def facts(self) -> dict[str, object]:
        return {"step": self.step, "errno": self.errno, "message": self.message}


class Limits:
    """None is unlimited; see ``messages.Limits``."""

    __slots__ = ("cpu_cores", "cpu_time_s", "file_bytes", "memory_bytes", "open_files", "processes")

    def __init__(self, fields: dict[str, object]) -> None:
        if unknown := fields.keys() - set(self.__slots__):
            raise _bad(f"limits: expected {', '.join(self.__slots__)}, got {min(unknown)}")
        self.cpu_cores = _positive(fields, "cpu_cores")
        self.cpu_time_s = _positive(fields, "cpu_time_s")
        self.file_bytes = _count(fields, "file_bytes")
        self.memory_bytes = _count(fields, "memory_bytes")
        self.open_files = _count(fields, "open_files")
        self.processes = _count(fields, "processes")


class User:
    __slots__ = ("gid", "groups", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int]) -> None:
        self.uid, self.gid, self.groups = uid, gid, groups


class Spec:
    """One job; the fields are described in this package's docstring."""

    __slots__ = (
        "args", "command", "containment", "cwd", "env", "id", "keep_leftovers", "limits", "max_output_bytes", "merged",
        "overflow", "reserve_bytes", "stdin", "stop_grace_s", "stop_signal", "timeout_s", "user",
    )  # fmt: skip

    def __init__(self, fields: dict[str, object]) -> None:
        """Raises StartError for what is missing or of the wrong type."""
        self.id = _text(fields, "id")
        if not ID.fullmatch(self.id):
            raise _bad(f"id: expected {ID.pattern}, got {self.id!r}")
        self.command = os_bytes(_text(fields, "command"))
        self.args = [os_bytes(arg) for arg in _texts(fields, "args")]
        self.env = _environment(fields, self.id)
        self.cwd = os_bytes(_text(fields, "cwd"))
        self.user = _user(fields)
        self.stdin = bool(fields.get("stdin"))
        self.merged = bool(fields.get("merged"))
        self.timeout_s = _positive(fields, "timeout_s")
        self.stop_grace_s = _seconds(fields, "stop_grace_s", 10.0)
        self.stop_signal = _count(fields, "stop_signal") or 15
        self.keep_leftovers = bool(fields.get("keep_leftovers"))
        self.max_output_bytes = _count(fields, "max_output_bytes")
        self.reserve_bytes = _count(fields, "reserve_bytes") or 0
        self.overflow = fields.get("overflow", "keep_head_and_tail")
        if self.overflow not in OVERFLOWS:
            raise _bad(f"overflow: expected one of {', '.join(OVERFLOWS)}, got {self.overflow!r}")
        self.limits = Limits(_mapping(fields, "limits"))
        self.containment = fields.get("containment")

    @property
    def argv(self) -> list[bytes]:
        return [self.command, *self.args]

    def forget_command(self) -> None:
        """Megabytes of arguments are of no use once the job runs."""
        self.args, self.env = [], {}


def read_spec(fd: int) -> Spec:
    """From a memfd. Raises StartError."""
    size = os.fstat(fd).st_size
    if size > MAX_SPEC_BYTES:
        raise StartError("spec", errno.E2BIG)
    data = bytearray()
    while piece := os.pread(fd, size - len(data), len(data)):
        data += piece
    try:
        fields = json.loads(bytes(data))
    except ValueError as error:
        raise _bad(f"expected JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _bad("expected a JSON object")
    return Spec(fields)


def os_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _bad(message: str) -> StartError:
    return StartError("spec", errno.EINVAL, message)


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _bad(f"{name}: expected a text without NUL, got {value!r:.80}")
    return value


def _texts(fields: dict[str, object], name: str) -> list[str]:
    values = fields.get(name) or []
    if not isinstance(values, list) or any(not isinstance(value, str) or "\0" in value for value in values):
        raise _bad(f"{name}: expected a list of texts without NUL")
    return values


def _mapping(fields: dict[str, object], name: str) -> dict[str, object]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise _bad(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _environment(fields: dict[str, object], job_id: str) -> dict[bytes, bytes]:
    env = _mapping(fields, "env") | {"JOB_ID": job_id}
    for name, value in env.items():
        if not name or "=" in name or "\0" in name or not isinstance(value, str) or "\0" in value:
            raise _bad(f"env: expected NAME: text without NUL, got {name!r:.80}")
    return {os_bytes(name): os_bytes(str(value)) for name, value in env.items()}


def _user(fields: dict[str, object]) -> User | None:
    if fields.get("user") is None:
        return None
    user = _mapping(fields, "user")
    numbers = [user.get("uid"), user.get("gid"), *_list(user.get("groups"))]
    if not all(isinstance(number, int) and 0 <= number < 2**32 - 1 for number in numbers):
        raise _bad(f"user: expected numbers for uid, gid and groups, got {user!r:.200}")
    uid, gid, *groups = (number for number in numbers if isinstance(number, int))
    return User(uid, gid, groups)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _seconds(fields: dict[str, object], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 <= value < 1e9:
        raise _bad(f"{name}: expected seconds, got {value!r:.80}")
    return float(value)


def _positive(fields: dict[str, object], name: str) -> float | None:
    if fields.get(name) is None:
        return None
    value = _seconds(fields, name, 0.0)
    if value == 0:
        raise _bad(f"{name}: expected more than 0")
    return value


def _count(fields: dict[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise _bad(f"{name}: expected a whole number above 0, got {value!r:.80}")
    return value
