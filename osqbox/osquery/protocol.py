"""Which request is meant, who asks, and how every answer looks. Pure.

osqueryd ignores the HTTP status: an empty or foreign JSON body wipes its schedule or deletes its logs. So every
answer is a JSON object, and every failure has a top-level ``error`` (osquery/remote/serializers/json.cpp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import msgspec

from osqbox.errors import Refused
from osqbox.exchange import Response

Operation = Literal[
    "enroll", "config", "log", "read", "write", "carve_begin", "carve_block", "yara", "version", "health"
]

# The last one or two segments of a path decide, under any prefix; canonical paths are /api/v1/osquery/*.
_LAST: dict[str, Operation] = {
    "enroll": "enroll",
    "config": "config",
    "configure": "config",
    "log": "log",
    "logger": "log",
    "read": "read",
    "distributed_read": "read",
    "distributedRead": "read",
    "write": "write",
    "distributed_write": "write",
    "distributedWrite": "write",
    "init": "carve_begin",
    "carve_init": "carve_begin",
    "start_uploads": "carve_begin",
    "block": "carve_block",
    "carve_block": "carve_block",
    "upload_blocks": "carve_block",
    "version": "version",
    "health": "health",
    "healthz": "health",
}
_LAST_TWO: dict[tuple[str, str], Operation] = {
    ("carve", "begin"): "carve_begin",
    ("carve", "start"): "carve_begin",
    ("carver", "start"): "carve_begin",
    ("carve", "continue"): "carve_block",
    ("carver", "continue"): "carve_block",
}
SMALL_BODIES: frozenset[Operation | None] = frozenset(
    ("enroll", "config", "read", "carve_begin", "yara", "version", "health", None)
)
SECRET_CANDIDATES = 16
SECRET_MAX_CHARS = 1024
NOT_SECRETS = frozenset(("host_identifier", "platform_type", "node_key"))


class Route(NamedTuple):
    operation: Operation | None
    name: str
    """The last path segment: a YARA rule's name."""
    first: str
    """The first path segment: the node key in node-API mode (``--tls_node_api``)."""
    variables: tuple[tuple[str, str], ...]
    """URI variables, raw: osqueryd appends the secret without URL-encoding it."""


def route(target: str) -> Route:
    """What a request target means. Unknown paths have no operation."""
    path, variables = _split(target)
    segments = [part for part in path.split("/") if part]
    last = segments[-1] if segments else ""
    first = segments[0] if segments else ""
    if len(segments) >= 2:
        pair = (segments[-2], last)
        if segments[-2] == "yara":
            return Route("yara", unquote(last), first, variables)
        if pair in _LAST_TWO:
            return Route(_LAST_TWO[pair], last, first, variables)
    return Route(_LAST.get(last), last, first, variables)


def _split(target: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    # Node-API mode writes "&node_key=" even where there is no "?".
    cut = min((at for at in (target.find("?"), target.find("&")) if at >= 0), default=len(target))
    query = target[cut + 1 :]
    pairs = [piece.partition("=") for piece in query.replace("?", "&").split("&")[:SECRET_CANDIDATES] if piece]
    return target[:cut], tuple((name, value) for name, _, value in pairs)


def uri_secrets(target: str, variables: tuple[tuple[str, str], ...]) -> list[str]:
    """Strings of the URI that may be the enroll secret, whatever ``--tls_enroll_override`` calls it."""
    found = [value for name, value in variables if name not in NOT_SECRETS]
    if variables:
        # An unencoded secret may itself hold "&" or "?": the tails after each "=" are candidates too.
        tails = target.split("=")[1:SECRET_CANDIDATES]
        found += ["=".join((tail, *tails[at + 1 :])) for at, tail in enumerate(tails)]
    found += [unquote(value) for value in found if "%" in value]
    return _candidates(found)


def body_secrets(body: Mapping[str, Any]) -> list[str]:
    """Strings of an enrollment body that may be the secret: the documented name first."""
    named = [body.get("enroll_secret")]
    others = [value for name, value in body.items() if name != "enroll_secret" and name not in NOT_SECRETS]
    return _candidates([value for value in (*named, *others) if isinstance(value, str)])


def _candidates(values: list[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if 0 < len(value) <= SECRET_MAX_CHARS][:SECRET_CANDIDATES]


def node_key_of(body_key: str | None, headers: Mapping[str, str], found: Route) -> str:
    """The node key a request carries: body, else ``Authorization: NodeKey`` (osquery >= 5.23), else URI variable.

    Raises Refused when two places disagree.
    """
    scheme, _, header_key = headers.get("authorization", "").partition(" ")
    header_key = header_key.strip() if scheme.lower() == "nodekey" else ""
    uri_key = next((value for name, value in found.variables if name == "node_key"), "")
    keys = {key for key in (body_key, header_key, uri_key) if key}
    if len(keys) > 1:
        raise Refused("key_conflict", "node_key: the body, the Authorization header and the URI disagree", status=400)
    return next(iter(keys), "")


def is_node_api(method: str, found: Route) -> bool:
    """Config by GET: the hidden ``--tls_node_api`` mode, whose reply wraps the config in a string."""
    return method == "GET" and found.operation == "config"


def success(**members: Any) -> Response:
    """A good answer; ``node_invalid: false`` is the documented way to say so."""
    return Response(msgspec.json.encode({**members, "node_invalid": False}))


def failure(refused: Refused) -> Response:
    """A refusal that makes a stock osqueryd keep its schedule and its logs."""
    members: dict[str, Any] = {"error": refused.message, "reason": refused.reason}
    if refused.node_invalid:
        members["node_invalid"] = True
    return Response(msgspec.json.encode(members), status=refused.status)


def config_response(text: bytes, *, node_api: bool) -> Response:
    """A config exactly as the filesystem plugin would read it, or wrapped for node-API mode."""
    return Response(msgspec.json.encode({"config": text.decode()}) if node_api else text)


def body_digest(operation: str, body: bytes) -> bytes:
    """Names a body, to recognise the re-send of one whose answer was lost."""
    return hashlib.sha256(operation.encode() + b"\0" + body).digest()
