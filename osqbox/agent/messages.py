"""The remote API's messages from the client's side: request bodies, and replies read as osqueryd reads them.

osquery/remote/{utility.h,serializers/json.cpp} and plugins/*/tls_*.cpp of osquery 5.23. Key order is upstream's. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = "5.23.1"
LINUX = 9  # POSIX 1 + LINUX 8; macOS is 21, Windows 2 (platform_type.h)
MAX_DEPTH = 32
REPLY_MAX_BYTES = 8 * 1024 * 1024
INT32_MAX = 2**31 - 1


ENDPOINT_FLAGS: Mapping[str, str] = {
    "enroll": "enroll_tls_endpoint",
    "config": "config_tls_endpoint",
    "log": "logger_tls_endpoint",
    "read": "distributed_tls_read_endpoint",
    "write": "distributed_tls_write_endpoint",
    "carve_start": "carver_start_endpoint",
    "carve_block": "carver_continue_endpoint",
}


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Paths of the seven calls, as the ``--*_endpoint`` flags give them."""

    enroll: str = "/api/v1/osquery/enroll"
    config: str = "/api/v1/osquery/config"
    log: str = "/api/v1/osquery/log"
    read: str = "/api/v1/osquery/distributed/read"
    write: str = "/api/v1/osquery/distributed/write"
    carve_start: str = "/api/v1/osquery/carve/begin"
    carve_block: str = "/api/v1/osquery/carve/block"


# -- replies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call came to. ``members`` is meaningful when ``ok``."""

    ok: bool
    message: str = ""
    """Why not, in osqueryd's words."""
    node_invalid: bool = False
    members: Mapping[str, Any] = field(default_factory=dict)


def compact(value: Any) -> str:
    """JSON as RapidJSON writes it: no spaces, UTF-8 and ``/`` unescaped, keys in the order held."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def encode(body: Any) -> bytes:
    """A request body. Text that is no UTF-8 is sent with replacement characters."""
    return compact(body).encode("utf-8", "replace")


def read_members(body: bytes) -> Mapping[str, Any] | None:
    """The JSON object in a reply; an empty body is an empty one; None when there is none.

    Numbers, text or a list at the top are undefined behaviour upstream and refused here.
    """
    if not body:
        return {}
    try:
        text = body.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_first_wins, parse_constant=_no_number)
        if "\\ud" in text.lower():  # lone surrogates can be neither stored nor sent on
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and not _deeper_than(MAX_DEPTH, found) else None


def _first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of members with one name RapidJSON's FindMember finds the first."""
    members = dict(pairs)
    return members if len(members) == len(pairs) else {**members, **dict(reversed(pairs))}


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_config_text(text: str) -> Mapping[str, Any] | None:
    """A config or pack as a plugin other than tls gives it: ``#`` and ``//`` lines are comments (config.cpp).

    None when it is no JSON object; unlike a reply, an empty text is none.
    """
    lines = text.replace("\\\n", "").splitlines()
    kept = "\n".join(line for line in lines if not line.lstrip().startswith(("#", "//")))
    return read_members(kept.encode("utf-8", "surrogatepass")) if kept.strip() else None


def _deeper_than(levels: int, value: Any) -> bool:
    level = [value]
    for _ in range(levels):
        level = [child for parent in level if isinstance(parent, (dict, list)) for child in _children(parent)]
    return bool(level)


def _children(parent: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return parent.values() if isinstance(parent, dict) else parent


def read_reply(body: bytes) -> Reply:
    """A reply to any call but enroll and carve start. The HTTP status is not looked at (utility.h)."""
    members = read_members(body)
    if members is None:
        return Reply(False, "Request error: cannot parse the reply as a JSON object")
    if members.get("node_invalid") is True:
        reason = f": {_reason(members)}" if "error" in members else ""
        return Reply(False, f"Request failed: Invalid node key{reason}", node_invalid=True, members=members)
    if "error" in members:
        return Reply(False, f"Request failed: {_reason(members)}", members=members)
    return Reply(True, members=members)


def _reason(members: Mapping[str, Any]) -> str:
    error = members["error"]
    return error if isinstance(error, str) else "<unknown>"


def enrolled_key(body: bytes) -> str:
    """The node key, or "" when the server refused by leaving it out. ``error`` and ``node_invalid`` are not read."""
    members = read_members(body) or {}
    key = members.get("node_key", members.get("id"))
    return key if isinstance(key, str) else ""


def carve_session(body: bytes) -> str:
    """The session id, or "" when the server refused by leaving it out."""
    session = (read_members(body) or {}).get("session_id")
    return session if isinstance(session, str) else ""


# -- requests ----------------------------------------------------------------------------------------------------


def enroll_body(
    secret: str,
    host_identifier: str,
    host_details: Mapping[str, Mapping[str, str]],
    *,
    secret_name: str,
    platform_type: int = LINUX,
) -> bytes:
    return encode(
        {
            secret_name: secret,
            "host_identifier": host_identifier,
            "platform_type": str(platform_type),
            "host_details": host_details,
        }
    )


def node_body(node_key: str) -> bytes:
    """Config and distributed read."""
    return encode({"node_key": node_key})


def log_body(lines: Iterable[str], log_type: str, node_key: str) -> bytes:
    """``lines`` are JSON objects already; ``log_type`` is ``result`` or ``status``."""
    rest = f'],"log_type":{compact(log_type)},"node_key":{compact(node_key)}}}'
    return ('{"data":[' + ",".join(lines) + rest).encode("utf-8", "replace")


def compressed_log_body(lines: Iterable[str], log_type: str, node_key: str) -> bytes:
    """The body gzip is applied to with --logger_tls_compress: the same members in another order."""
    head = f'{{"node_key":{compact(node_key)},"log_type":{compact(log_type)},"data":['
    return (head + ",".join(lines) + "]}").encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one distributed query, its rows already JSON."""

    name: str
    rows: str
    status: int
    message: str
    stats: str


def write_body(answers: Iterable[Answer], node_key: str | None) -> bytes:
    """Distributed write (distributed.cpp, serializeResults). Of two answers with one name the last is sent.

    Without a ``node_key`` for plugins other than tls, and --tls_node_api.
    """
    kept = {answer.name: answer for answer in answers}.values()

    def members(value: Any) -> str:
        return "{" + ",".join(f"{compact(answer.name)}:{value(answer)}" for answer in kept) + "}"

    queries, stats = members(lambda a: a.rows), members(lambda a: a.stats)
    statuses, messages = members(lambda a: a.status), members(lambda a: compact(a.message))
    text = f'{{"queries":{queries},"statuses":{statuses},"messages":{messages},"stats":{stats}'
    key = "" if node_key is None else f',"node_key":{compact(node_key)}'
    return f"{text}{key}}}".encode("utf-8", "replace")


def carve_start_body(
    *, block_count: int, block_size: int, carve_size: int, carve_id: str, request_id: str, node_key: str
) -> bytes:
    return encode(
        {
            "block_count": block_count,
            "block_size": block_size,
            "carve_size": carve_size,
            "carve_id": carve_id,
            "request_id": request_id,
            "node_key": node_key,
        }
    )


def carve_block_body(*, block_id: int, session_id: str, request_id: str, data_base64: str) -> bytes:
    return encode({"block_id": block_id, "session_id": session_id, "request_id": request_id, "data": data_base64})


# -- distributed read --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What a distributed read brought, before discovery has run."""

    discovery: Mapping[str, str]
    queries: Mapping[str, str]
    accelerate_s: int | None = None
    refused: str = ""
    """A discovery entry that drops the whole reply."""
    warning: str = ""
    """A query entry that ended the reading; those before it stay."""


def read_work(members: Mapping[str, Any]) -> Work:
    """distributed.cpp, acceptWork. Members of the wrong type count as absent."""
    discovery = members.get("discovery")
    discovery = discovery if isinstance(discovery, dict) else {}
    if not all(name and isinstance(sql, str) and sql for name, sql in discovery.items()):
        return Work({}, {}, refused="Distributed discovery query is not a string")
    entries = members.get("queries")
    queries: dict[str, str] = {}
    for name, sql in entries.items() if isinstance(entries, dict) else ():
        if not name or not isinstance(sql, str) or not sql:
            # Upstream returns here: accelerate is not read either.
            return Work(discovery, queries, warning="Distributed query is not a string")
        queries[name] = sql
    accelerate = members.get("accelerate")
    whole = isinstance(accelerate, int) and not isinstance(accelerate, bool) and abs(accelerate) <= INT32_MAX
    return Work(discovery, queries, accelerate_s=accelerate if whole else None)
