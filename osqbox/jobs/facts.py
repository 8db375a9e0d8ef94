"""A job as JSON, the same over plain GET and the operator API. Pure."""

from __future__ import annotations

from osqbox.clock import rfc3339

from .messages import Status


def status_facts(status: Status) -> dict[str, object]:
    """A job as JSON for people and scripts: stable snake_case keys, RFC 3339 times.

    Bytes that are not UTF-8 are shown as \\xNN.
    """
    return {
        "id": status.id,
        "state": status.state.value,
        "owner": status.owner,
        "run_as": status.run_as,
        "command": _shown(status.command),
        "args": [_shown(word) for word in status.args],
        "pid": status.pid,
        "exit_code": status.exit_code,
        "signal": status.signal,
        "core_dumped": status.core_dumped,
        "errno": status.errno,
        "reason": None if status.reason is None else status.reason.value,
        "stopped_by": status.stopped_by,
        "created_at": rfc3339(status.created_at),
        "started_at": rfc3339(status.started_at),
        "ended_at": rfc3339(status.ended_at),
        "output_bytes": status.output_bytes,
        "stdout_bytes": status.stdout_bytes,
        "stderr_bytes": status.stderr_bytes,
        "output_truncated": status.output_truncated,
        "output_drained": status.output_drained,
        "usage": {
            "user_s": status.usage.user_s,
            "system_s": status.usage.system_s,
            "max_rss_bytes": status.usage.max_rss_bytes,
        },
        "containment": None if status.containment is None else status.containment.value,
        "enforced": list(status.enforced),
        "leftover_processes": status.leftover_processes,
        "labels": dict(status.labels),
    }


def _shown(word: bytes) -> str:
    return word.decode(errors="backslashreplace")
