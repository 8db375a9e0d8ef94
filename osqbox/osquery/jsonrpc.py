"""Kolide Launcher's JSON-RPC service as it is on the wire: bytes to calls in osquery's own words, and back. Pure.

Launcher 0.9 to 2.x (``pkg/service``) posts ``{"jsonrpc": "", "method", "params", "id"}`` to the root path, ignores
the HTTP status and takes an ``error`` member as a broken transport, which never makes it enroll again; only
``node_invalid`` inside a ``result`` does. Its ``err`` and ``error_code`` members decode into a Go interface in some
versions, where even an empty string fails, so neither is ever sent. ``disable_device`` makes it uninstall itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from osqbox.errors import Refused
from osqbox.exchange import Response
from osqbox.osquery import messages
from osqbox.osquery.messages import Answer, LogLine

Method = Literal["RequestEnrollment", "RequestConfig", "RequestQueries", "PublishLogs", "PublishResults", "CheckHealth"]
METHODS: frozenset[str] = frozenset(Method.__args__)  # type: ignore[attr-defined]
STATUS_LOGS = frozenset((2, 3, 4))
"""LogType: 0 result, 1 snapshot, 2 health, 3 init, 4 status (osquery-go, plugin/logger)."""
LOG_TYPES = range(5)
SERVING = 1
OWNED_OPTIONS = frozenset(("distributed_plugin", "logger_plugin", "config_plugin"))
"""Launcher is these plugins itself; options that name others would cut osqueryd off from it."""

_CODES = {"unknown_method": -32601, "wrong_type": -32602, "internal": -32603}
"""JSON-RPC 2.0, section 5.1."""
_SERVER_ERROR = -32000

_DETAILS = {
    "os_version": ("os_version", "version"),
    "os_build_id": ("os_version", "build"),
    "os_platform": ("os_version", "platform"),
    "os_platform_like": ("os_version", "platform_like"),
    "os_name": ("os_version", "name"),
    "hostname": ("system_info", "hostname"),
    "hardware_vendor": ("system_info", "hardware_vendor"),
    "hardware_model": ("system_info", "hardware_model"),
    "hardware_serial": ("system_info", "hardware_serial"),
    "hardware_uuid": ("system_info", "uuid"),
    "osquery_version": ("osquery_info", "version"),
    "launcher_version": ("launcher_info", "version"),
    "goos": ("launcher_info", "goos"),
    "goarch": ("launcher_info", "goarch"),
}
"""EnrollmentDetails to the table and column where osqueryd's own enrollment has it."""


class Call(msgspec.Struct, frozen=True):
    method: str
    params: Any = None
    """An object, once checked."""
    id: int | str | None = None


class _Envelope(msgspec.Struct, frozen=True):
    method: str
    params: Any = None
    id: Any = None


class Result(msgspec.Struct, frozen=True):
    """One element of PublishResults."""

    query_name: str
    status: int = 0
    rows: list[dict[str, Any]] | None = None
    message: str | None = None
    stats: dict[str, Any] | None = None


class _Results(msgspec.Struct, frozen=True):
    Results: list[Result] | None = None


class _Logs(msgspec.Struct, frozen=True):
    LogType: int
    Logs: list[str] | None = None


def parse_call(body: bytes) -> Call:
    """The call in a body; a batch is none, as Launcher never sends one. Raises Refused for what is no call at all."""
    envelope = messages.decode(body, _Envelope)
    whole = isinstance(envelope.id, int | str) and not isinstance(envelope.id, bool)
    return Call(envelope.method, envelope.params, envelope.id if whole else None)


def check(call: Call) -> None:
    """Raises Refused for a method that is not Launcher's, and for params that are no object."""
    if call.method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise Refused("unknown_method", f"method: expected one of {known}, got {call.method[:40]!r}", status=404)
    if not isinstance(call.params, dict):
        raise Refused("wrong_type", f"params: expected an object, got {type(call.params).__name__}")


def node_key(call: Call) -> str:
    key = call.params.get("node_key", "")
    if not isinstance(key, str):
        raise Refused("wrong_type", f"node_key: expected a string, got {type(key).__name__}")
    return key


def enrollment_body(call: Call) -> dict[str, Any]:
    """RequestEnrollment's params as the body osqueryd would have sent."""
    details = call.params.get("EnrollmentDetails", call.params.get("enrollment_details"))
    if details is not None and not isinstance(details, Mapping):
        raise Refused("wrong_type", f"EnrollmentDetails: expected an object, got {type(details).__name__}")
    tables: dict[str, dict[str, str]] = {}
    for name, (table, column) in _DETAILS.items():
        value = (details or {}).get(name)
        if isinstance(value, str) and value:
            tables.setdefault(table, {})[column] = value
    secret = call.params.get("enroll_secret", "")
    return {
        "enroll_secret": secret if isinstance(secret, str) else "",
        "host_identifier": call.params.get("host_identifier", ""),
        "host_details": tables,
    }


def log_lines(call: Call) -> tuple[str, list[LogLine]]:
    """PublishLogs as osquery's log type and lines; a line that is no JSON object is kept as its ``message``."""
    logs = _convert(call.params, _Logs)
    if logs.LogType not in LOG_TYPES:
        raise Refused("wrong_type", f"LogType: expected 0 to 4, got {logs.LogType}")
    raw = [msgspec.Raw(_as_object(text)) for text in logs.Logs or ()]
    batch = messages.LogBatch("status" if logs.LogType in STATUS_LOGS else "result", raw)
    return batch.log_type, messages.log_lines(batch)


def _as_object(text: str) -> bytes:
    encoded = text.strip().encode()
    if encoded.startswith(b"{"):
        try:
            if isinstance(msgspec.json.decode(encoded), dict):
                return encoded
        except (msgspec.DecodeError, RecursionError):
            pass
    return msgspec.json.encode({"message": text})


def answers(call: Call) -> list[Answer]:
    """PublishResults as the answers of a distributed write."""
    results = _convert(call.params, _Results).Results or ()
    return [
        Answer(each.query_name, each.status == 0, each.status, each.rows or [], each.message or "", each.stats or {})
        for each in results
    ]


def _convert(params: dict[str, Any], shape: Any) -> Any:
    try:
        return msgspec.convert(params, shape)
    except msgspec.ValidationError as error:
        raise Refused("wrong_type", f"params: {error}") from None


def config_text(text: bytes) -> str:
    """A config that Launcher may hand to its osqueryd: without the options that belong to Launcher."""
    config = msgspec.json.decode(text)
    options = config.get("options")
    if not isinstance(options, dict) or not OWNED_OPTIONS & options.keys():
        return text.decode()
    kept = {name: value for name, value in options.items() if name not in OWNED_OPTIONS}
    return msgspec.json.encode({**config, "options": kept}).decode()


def success(call_id: int | str | None, **members: Any) -> Response:
    result = {**members, "node_invalid": False}
    return Response(msgspec.json.encode({"jsonrpc": "2.0", "result": result, "id": call_id}))


def failure(refused: Refused, call_id: int | str | None) -> Response:
    """A refusal: a result that makes it enroll again if its key is at fault, else an error that it retries."""
    if refused.node_invalid:
        # Launcher reads no error beside a result; ours is for people who look at the wire.
        answer: dict[str, Any] = {"jsonrpc": "2.0", "result": {"node_invalid": True}, "id": call_id}
        return Response(msgspec.json.encode(answer))
    error = {
        "code": _CODES.get(refused.reason, _SERVER_ERROR),
        "message": refused.message,
        "data": {"reason": refused.reason},
    }
    return Response(msgspec.json.encode({"jsonrpc": "2.0", "error": error, "id": call_id}), status=refused.status)
