"""The rules of the job runner: states and what follows them, ids, and what a request may ask for. Pure.

PENDING ─▶ RUNNING ◀─▶ SUSPENDED
   │          │  ╲        │
   │          │   ▼       ▼
   │          │  STOPPING ◀
   ▼          ▼     ▼
FAILED     EXITED  SIGNALED      LOST: the keeper is gone, and with it how the job ended
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import msgspec

from .errors import Code, JobError, invalid
from .messages import (
    ENDED,
    MIB,
    Containment,
    JobSpec,
    Limits,
    OutputMode,
    OutputRequest,
    Overflow,
    Reason,
    State,
    Status,
    Stream,
    Usage,
)

ALIVE = frozenset((State.RUNNING, State.SUSPENDED, State.STOPPING))
AFTER: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.PENDING: frozenset(State) - {State.PENDING},
        State.RUNNING: frozenset((State.SUSPENDED, State.STOPPING, State.EXITED, State.SIGNALED, State.LOST)),
        State.SUSPENDED: frozenset((State.RUNNING, State.STOPPING, State.EXITED, State.SIGNALED, State.LOST)),
        State.STOPPING: frozenset((State.EXITED, State.SIGNALED, State.LOST)),
        **{state: frozenset[State]() for state in ENDED},
    }
)
"""What a state may become; states are skipped when a job is quicker than the telling."""

ID_CHARS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter is taken for a digit when an id is typed."""
ID_LENGTH = 26
PREFIX_CHARS = 4
"""Shortest beginning of an id that is looked up."""
_ID = re.compile(rf"[a-z][0-9a-z]{{{PREFIX_CHARS - 1},63}}")
_PID = re.compile(r"[1-9][0-9]{0,9}")

PATH_BYTES = 4095
ARGUMENT_BYTES = 128 * 1024 - 1
"""Linux's MAX_ARG_STRLEN without the NUL: one argument or ``NAME=value``."""
ARGUMENTS_BYTES = 2 * MIB - 64 * 1024
"""Command, arguments and environment with their pointers: a quarter of the usual 8 MiB stack, less the clean base."""
POINTER_BYTES = 8
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
RESERVED_ENV = frozenset(("JOB_ID",))
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
LABELS = 64
LABEL_CHARS = 256
KEY_CHARS = 128
LAST_SIGNAL = 64
LONGEST_S = 10 * 365 * 86400.0
LONGEST_GRACE_S = 86400.0
LARGEST = 2**63 - 1


def new_id(random_bytes: bytes) -> str:
    """An id from 16 random bytes: 26 characters, the first a letter, so that it is never taken for a pid."""
    number, text = int.from_bytes(random_bytes, "big"), ""
    for _ in range(ID_LENGTH - 1):
        number, digit = divmod(number, 32)
        text = ID_CHARS[digit] + text
    return ID_CHARS[10 + number % 22] + text


def is_pid(job: str) -> bool:
    """Whether a caller names a job by its pid."""
    return _PID.fullmatch(job) is not None


def check_id(job: str) -> None:
    """Raises INVALID_ARGUMENT for what can be neither an id, its beginning, nor a pid."""
    if not isinstance(job, str) or not (_ID.fullmatch(job) or is_pid(job)):
        raise invalid(
            "process_id",
            f"expected a job's id, at least {PREFIX_CHARS} of its first characters, or a pid, got {_shown(job)}",
        )


def check_spec(spec: JobSpec, output_bytes: int) -> JobSpec:
    """The request, if it can be tried at all, with ``max_output_bytes`` filled in. Raises INVALID_ARGUMENT."""
    for field, value, kind in (
        ("output_mode", spec.output_mode, OutputMode), ("overflow", spec.overflow, Overflow),
        ("limits", spec.limits, Limits), ("open_stdin", spec.open_stdin, bool),
        ("keep_leftovers", spec.keep_leftovers, bool), ("link_output", spec.link_output, bool),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise invalid(field, f"expected {kind.__name__}, got {_shown(value)}")
    _check_program(spec)
    _check_environment(spec.env)
    _check_size(spec)
    _check_limits(spec.limits)
    _check_number("timeout", spec.timeout_s, least=0.001, most=LONGEST_S)
    _check_number("stop_grace", spec.stop_grace_s, least=0, most=LONGEST_GRACE_S, is_optional=False)
    check_signal("stop_signal", spec.stop_signal)
    _check_number("max_output_bytes", spec.max_output_bytes, least=1, most=output_bytes, is_whole=True)
    _check_words(spec)
    return replace(spec, max_output_bytes=output_bytes if spec.max_output_bytes is None else spec.max_output_bytes)


def _check_program(spec: JobSpec) -> None:
    _check_bytes("command", spec.command, PATH_BYTES)
    if not spec.command:
        raise invalid("command", "expected a program to run, got nothing")
    for index, argument in enumerate(spec.args):
        _check_bytes(f"args[{index}]", argument, ARGUMENT_BYTES)
    if spec.cwd is not None:
        _check_bytes("working_dir", spec.cwd, PATH_BYTES)
        if not spec.cwd.startswith(b"/"):
            raise invalid("working_dir", f"expected an absolute path, got {shown_command(spec.cwd, (), 80)[0]!r}")


def _check_bytes(field: str, value: Any, most_bytes: int) -> None:
    if not isinstance(value, bytes):
        raise invalid(field, f"expected bytes, got {type(value).__name__}")
    if b"\0" in value:
        raise invalid(field, f"expected no NUL byte, got one at byte {value.index(0)}")
    if len(value) > most_bytes:
        raise invalid(field, f"expected at most {most_bytes} bytes, got {len(value)}")


def _check_environment(env: Mapping[str, str]) -> None:
    for name, value in env.items():
        field = f"env[{_shown(name)}]"
        if not isinstance(name, str) or not isinstance(value, str):
            raise invalid(field, f"expected text, got {type(value).__name__}")
        if not ENV_NAME.fullmatch(name):
            raise invalid(field, "expected a name of letters, digits and _, not beginning with a digit")
        if name in RESERVED_ENV:
            raise invalid(field, "this variable is set by the job runner")
        _check_bytes(field, _encoded(field, value), ARGUMENT_BYTES - len(name) - 1)


def _encoded(field: str, text: str) -> bytes:
    """As Linux gets it: what is not UTF-8 comes in as surrogate escapes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise invalid(field, "expected UTF-8 text, got a lone surrogate") from None


def _check_size(spec: JobSpec) -> None:
    """Sooner than execve would say it, and before anything was made."""
    size_bytes = sum(len(word) + 1 + POINTER_BYTES for word in (spec.command, *spec.args))
    size_bytes += sum(len(_encoded("env", f"{name}={value}")) + 1 + POINTER_BYTES for name, value in spec.env.items())
    if size_bytes > ARGUMENTS_BYTES:
        raise invalid("args", f"expected at most {ARGUMENTS_BYTES} bytes with the environment, got {size_bytes}; "
                              "send larger data through stdin or a file")  # fmt: skip


def _check_limits(limits: Limits) -> None:
    for each in fields(limits):
        least = 0.01 if each.name == "cpu_cores" else 1
        is_whole = each.name not in ("cpu_cores", "cpu_time_s")
        _check_number(f"limits.{each.name}", getattr(limits, each.name), least=least, most=LARGEST, is_whole=is_whole)


def _check_number(
    field: str, value: Any, *, least: float, most: float, is_whole: bool = False, is_optional: bool = True
) -> None:
    if value is None and is_optional:
        return
    wanted = "a whole number" if is_whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
        raise invalid(field, f"expected {wanted}, got {_shown(value)}")
    if not math.isfinite(value) or not least <= value <= most:
        raise invalid(field, f"expected {wanted} from {least:g} to {_bound(most)}, got {value}")


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def check_signal(field: str, number: Any) -> None:
    _check_number(field, number, least=1, most=LAST_SIGNAL, is_whole=True, is_optional=False)


def check_grace(grace_s: float | None) -> None:
    _check_number("grace", grace_s, least=0, most=LONGEST_GRACE_S)


def _check_words(spec: JobSpec) -> None:
    if spec.run_as is not None and not _is_word(spec.run_as, KEY_CHARS):
        raise invalid("run_as", f"expected a user's name, got {_shown(spec.run_as)}")
    if spec.idempotency_key is not None and not _is_word(spec.idempotency_key, KEY_CHARS):
        raise invalid(
            "idempotency_key", f"expected 1 to {KEY_CHARS} printable characters, got {_shown(spec.idempotency_key)}"
        )
    check_labels(spec.labels)


def check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > LABELS:
        raise invalid("labels", f"expected at most {LABELS}, got {len(labels)}")
    for name, value in labels.items():
        field = f"labels[{_shown(name)}]"
        if not LABEL.fullmatch(name):
            raise invalid(field, "expected a name of 1 to 63 letters, digits and . _ / -, beginning with one of the "
                                 "first two")  # fmt: skip
        if not isinstance(value, str) or (value and not _is_word(value, LABEL_CHARS)):
            raise invalid(field, f"expected at most {LABEL_CHARS} printable characters, got {_shown(value)}")


def _is_word(text: str, most_chars: int) -> bool:
    return 0 < len(text) <= most_chars and text.isprintable()


def check_output(request: OutputRequest) -> None:
    """Raises INVALID_ARGUMENT."""
    _check_number("offset", request.offset, least=0, most=LARGEST, is_whole=True, is_optional=False)
    _check_number("tail_bytes", request.tail_bytes, least=0, most=LARGEST, is_whole=True)
    if request.offset and request.tail_bytes is not None:
        raise invalid("tail_bytes", "expected an offset or a tail, got both")


def check_streams(request: OutputRequest, mode: OutputMode) -> None:
    """Raises FAILED_PRECONDITION for a stream that this job does not have."""
    has = {Stream.MIXED} if mode is OutputMode.MERGED else {Stream.STDOUT, Stream.STDERR}
    if request.streams and not request.streams & has:
        raise JobError(
            Code.FAILED_PRECONDITION,
            f"streams: expected one of {', '.join(sorted(has))}, which this job's output mode gives, "
            f"got {', '.join(sorted(request.streams))}",
            reason="NO_SUCH_STREAM",
            field="streams",
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def digest(spec: JobSpec) -> bytes:
    """Tells whether an idempotency key comes back with the same request; nothing of the request can be read from it."""
    words: list[Any] = [
        spec.command, list(spec.args), sorted((name, _encoded("env", value)) for name, value in spec.env.items()),
        spec.cwd, spec.run_as, spec.limits, spec.timeout_s, spec.stop_grace_s, spec.stop_signal, spec.output_mode,
        spec.max_output_bytes, spec.overflow, spec.open_stdin, spec.keep_leftovers, spec.link_output,
        sorted(spec.labels.items()),
    ]  # fmt: skip
    return hashlib.sha256(msgspec.msgpack.encode(words)).digest()


# the keeper's words


def from_keeper(before: Status, told: Mapping[str, Any]) -> Status:
    """What a keeper says of its job (in its own JSON words), laid over what is known of it.

    Raises ValueError, TypeError or KeyError for what no keeper of ours would write.
    """
    state = State(told["state"])
    if state is not before.state and state not in AFTER[before.state]:
        raise ValueError(f"a job that is {before.state} was told to be {state}")
    usage = told.get("usage") or {}
    return replace(
        before,
        state=state,
        pid=told.get("pid"),
        started_at=told.get("started_at"),
        ended_at=told.get("ended_at"),
        exit_code=told.get("exit_code"),
        signal=told.get("signal"),
        core_dumped=bool(told.get("core_dumped")),
        errno=told.get("errno"),
        reason=Reason(told["reason"]) if told.get("reason") else None,
        stopped_by=told.get("stopped_by"),
        output_bytes=int(told.get("output_bytes") or 0),
        stdout_bytes=int(told.get("stdout_bytes") or 0),
        stderr_bytes=int(told.get("stderr_bytes") or 0),
        output_truncated=bool(told.get("output_truncated")),
        output_drained=told.get("output_drained") is not False,
        usage=Usage(
            float(usage.get("user_s") or 0), float(usage.get("system_s") or 0), int(usage.get("max_rss_bytes") or 0)
        ),
        containment=Containment(told["containment"]) if told.get("containment") else None,
        enforced=tuple(told.get("enforced") or ()),
        leftover_processes=int(told.get("leftover_processes") or 0),
    )


def result_of(status: Status) -> str:
    """How a job ended, for the audit and the feed: ``exited 3``, ``signaled 9``, ``failed_to_start 2``, ``lost``."""
    detail = next((n for n in (status.exit_code, status.signal, status.errno) if n is not None), None)
    return status.state.value if detail is None else f"{status.state.value} {detail}"


def shown_command(command: bytes, args: Sequence[bytes], most_chars: int = 4096) -> list[str]:
    """The command for the audit and the feed: text, cut where it is too long to keep."""
    words: list[str] = []
    left = most_chars
    for word in (command, *args):
        if left <= 0:
            return [*words, "..."]
        words.append(word[:left].decode("utf-8", "backslashreplace"))
        left -= len(word) + 1
    return words


_EXHAUSTED = frozenset(
    (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT,
     errno.ETOOMANYREFS)
)  # fmt: skip
_MISSING = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))


def start_failure(status: Status, failure: Mapping[str, Any] | None) -> JobError:
    """The refusal of a run whose command could not be started; its row is kept under ``job_id``."""
    step, number = str((failure or {}).get("step", "")), status.errno or 0
    text = str((failure or {}).get("message") or os.strerror(number))
    code, reason, field, message = _start_failure(status, step, number, text)
    retry_after_s = 1.0 if code is Code.RESOURCE_EXHAUSTED else None
    return JobError(code, message, reason=reason, field=field, retry_after_s=retry_after_s, job_id=status.id)


def _start_failure(status: Status, step: str, number: int, text: str) -> tuple[Code, str, str | None, str]:
    command = shown_command(status.command, (), 256)[0]
    refused = Code.FAILED_PRECONDITION
    if number in _EXHAUSTED:
        return (
            Code.RESOURCE_EXHAUSTED,
            "NO_RESOURCES",
            None,
            f"cannot start {command!r} now ({step}): {text}; try later",
        )
    if step == "exec" and number == errno.E2BIG:
        return Code.INVALID_ARGUMENT, "ARGUMENTS_TOO_LONG", "args", "args: more than this machine lets a program have"
    if step == "exec" and number in _MISSING:
        return refused, "COMMAND_NOT_FOUND", "command", f"command: no program {command!r} (or its interpreter): {text}"
    if step == "exec":
        return refused, "NOT_EXECUTABLE", "command", f"command: expected an executable file, got {command!r}: {text}"
    if step == "cwd":
        return refused, "BAD_WORKING_DIR", "working_dir", f"working_dir: expected a directory to enter, got {text}"
    if step == "limits":
        return refused, "LIMIT_NOT_ENFORCEABLE", "limits", f"limits: cannot be enforced here: {text}"
    if step == "user":
        return refused, "CANNOT_SWITCH_USER", "run_as", f"run_as: cannot become {status.run_as!r}: {text}"
    return refused, "NOT_STARTED", None, f"cannot start {command!r} ({step}): {text}"
