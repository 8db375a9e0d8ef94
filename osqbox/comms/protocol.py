"""Paths, dialects and the shape of answers. Pure.

Every path is served below ``/api/v1`` and bare. Two dialects share them: the design spike's and that of the C++ agent
of 2024-25; `profile` reads from the request which is meant.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl

import msgspec

from osqbox.exchange import Response

from .errors import CommsError, bad_request
from .messages import Json, Profile

IDEMPOTENCY_KEY_CHARS = 256
PREFIX = "/api/v1"
TARGET_BYTES = 8 * 1024
"""Of a path with its query; beyond that is 414."""
EVENTS_BYTES = 16 * 1024 * 1024
"""A body of events on the wire; the C++ agent sends batches of 1 MB unless configured otherwise."""
DECODED_BYTES = 64 * 1024 * 1024
"""The same after gunzip."""
PUBLICATION_BYTES = 16 * 1024 * 1024
"""100,000 UUIDs take 4 MB."""
CONFIGURATION_BYTES = 1024 * 1024
"""Of a group's text."""
SMALL_BYTES = 64 * 1024
"""Any other body."""
GZIP_MEMBERS = 16
QUERY_FIELDS = 16
G1_AGENT = "WazuhXDR/"
"""How the User-Agent of the C++ agent begins."""
CHALLENGE = ("WWW-Authenticate", 'Bearer realm="osqbox comms"')
BASIC_CHALLENGE = ("WWW-Authenticate", 'Basic realm="osqbox comms"')
SUBPROTOCOL = "commands.v1"

EVENT_STREAM = "text/event-stream"
OCTETS = "application/octet-stream"
YAML = "application/yaml"


class Operation(StrEnum):
    ROOT = "root"
    LOGIN = "login"
    AUTHENTICATION = "authentication"
    STATELESS = "stateless"
    STATEFUL = "stateful"
    COMMANDS = "commands"
    PUBLISH = "publish"
    CONFIGURATION = "configuration"
    CONFIGURE = "configure"
    UPGRADE = "upgrade"
    FILES = "files"
    SCAN = "scan"
    ENROLL_LOGIN = "enroll_login"
    ENROLL = "enroll"


AGENTS_PATHS: Mapping[str, Mapping[str, Operation]] = MappingProxyType(
    {
        "/": {"GET": Operation.ROOT, "HEAD": Operation.ROOT},
        "/login": {"POST": Operation.LOGIN},
        "/authentication": {"POST": Operation.AUTHENTICATION},
        "/events/stateless": {"POST": Operation.STATELESS},
        "/events/stateful": {"POST": Operation.STATEFUL},
        "/commands": {"GET": Operation.COMMANDS},
        "/configuration": {"GET": Operation.CONFIGURATION, "HEAD": Operation.CONFIGURATION},
        "/upgrade": {"GET": Operation.UPGRADE, "HEAD": Operation.UPGRADE},
        "/files": {"GET": Operation.FILES, "HEAD": Operation.FILES},
        "/vulnerability/scan": {"POST": Operation.SCAN},
        "/security/user/authenticate": {"POST": Operation.ENROLL_LOGIN},
        "/agents": {"POST": Operation.ENROLL},
    }
)
"""What agents may ask."""

PUBLISHERS_PATHS: Mapping[str, Mapping[str, Operation]] = MappingProxyType(
    {
        "/": {"GET": Operation.ROOT, "HEAD": Operation.ROOT},
        "/commands": {"POST": Operation.PUBLISH},
        "/configuration": {
            "GET": Operation.CONFIGURATION, "HEAD": Operation.CONFIGURATION, "PUT": Operation.CONFIGURE
        },
    }
)  # fmt: skip
"""What components of this machine may ask on the unix socket."""

PUBLISHERS_ONLY = frozenset((("/commands", "POST"), ("/configuration", "PUT")))

_EVENTS = (Operation.STATELESS, Operation.STATEFUL)
_G1_ONLY = (Operation.AUTHENTICATION, Operation.FILES, Operation.SCAN, Operation.ENROLL, Operation.ENROLL_LOGIN)


class Route(NamedTuple):
    path: str
    """Without the prefix."""
    operations: Mapping[str, Operation]
    """By method; empty for an unknown path."""
    query: str


def route(target: str, paths: Mapping[str, Mapping[str, Operation]] = AGENTS_PATHS) -> Route:
    path, _, query = target.partition("?")
    path = path.removeprefix(PREFIX) if path == PREFIX or path.startswith(PREFIX + "/") else path
    path = path.rstrip("/") or "/"
    return Route(path, paths.get(path, {}), query)


def operation(found: Route, method: str) -> Operation:
    """Raises CommsError 404, 405, and 403 for what only publishers may do."""
    if not found.operations:
        raise CommsError(404, "unknown_path", f"no such path: {_shown(found.path)}; the API is under {PREFIX}/")
    if (what := found.operations.get(method)) is not None:
        return what
    if (found.path, method) in PUBLISHERS_ONLY:
        raise CommsError(
            403,
            "publishers_only",
            f"{method} {found.path} is for components on the comms socket and for operators, never for agents",
        )
    raise CommsError(
        405, "wrong_method", f"{found.path}: expected {', '.join(found.operations)}, got {_shown(method, 20)}"
    )


def parameters(found: Route) -> dict[str, str]:
    """The query, each name once. Raises CommsError 400."""
    try:
        pairs = parse_qsl(found.query, keep_blank_values=True, max_num_fields=QUERY_FIELDS, errors="strict")
    except (ValueError, UnicodeDecodeError) as error:
        raise bad_request(f"query: expected at most {QUERY_FIELDS} fields in UTF-8: {error}") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise bad_request("query: expected each parameter once, got one repeated")
    return given


def body_limit_bytes(found: Route, method: str) -> int:
    what = found.operations.get(method)
    if what in _EVENTS:
        return EVENTS_BYTES
    if what is Operation.PUBLISH:
        return PUBLICATION_BYTES
    return CONFIGURATION_BYTES if what in (Operation.CONFIGURE, Operation.SCAN) else SMALL_BYTES


def is_g1_agent(headers: Mapping[str, str]) -> bool:
    """Whether it says that it is one, whatever it sends."""
    return headers.get("user-agent", "").startswith(G1_AGENT)


def profile(what: Operation | None, headers: Mapping[str, str], query: Mapping[str, str], body: bytes = b"") -> Profile:
    """Which dialect a request is in, as far as can be told before it is understood."""
    if what in _G1_ONLY or is_g1_agent(headers):
        return Profile.G1
    if what is Operation.COMMANDS:
        accept = headers.get("accept", "").lower()
        wants_json = "application/json" in accept and EVENT_STREAM not in accept
        return Profile.G1 if wants_json or "wait" in query else Profile.SPIKE
    if what in _EVENTS:
        first, more, _ = body[:SMALL_BYTES].partition(b"\n")
        return Profile.G1 if more and b'"agent"' in first else Profile.SPIKE
    return Profile.SPIKE


def decoded_body(headers: Mapping[str, str], body: bytes, limit_bytes: int = DECODED_BYTES) -> bytes:
    """The body without its gzip. Raises CommsError 400, 413, 415."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        message = f"Content-Encoding: expected gzip or none, got {_shown(encoding)}"
        raise CommsError(415, "bad_encoding", message)
    pieces: list[bytes] = []
    left_bytes = limit_bytes
    for _ in range(GZIP_MEMBERS):
        stream = zlib.decompressobj(wbits=31)
        try:
            piece = stream.decompress(body, left_bytes + 1)
        except zlib.error as error:
            raise bad_request(f"body: expected gzip, got a broken stream ({error})", reason="bad_gzip") from None
        left_bytes -= len(piece)
        if left_bytes < 0:
            raise CommsError(413, "body_too_large", f"body: expected at most {limit_bytes} bytes after gunzip")
        if not stream.eof:
            raise bad_request("body: the gzip stream breaks off before its end", reason="bad_gzip")
        pieces.append(piece)
        body = stream.unused_data
        if not body:
            return b"".join(pieces)
    raise bad_request(f"body: expected at most {GZIP_MEMBERS} gzip streams, got more", reason="bad_gzip")


def idempotency_key(text: str | None) -> str:
    """By which a request that is sent again is known; empty without."""
    if text is not None and len(text) > IDEMPOTENCY_KEY_CHARS:
        raise bad_request(f"Idempotency-Key: expected at most {IDEMPOTENCY_KEY_CHARS} characters, got {len(text)}")
    return text or ""


def version_wanted(if_match: str | None) -> int | None:
    """``If-Match: "7"``: change version 7 or nothing. Raises CommsError 400."""
    if if_match is None or if_match.strip() == "*":
        return None
    if not re.fullmatch(r'"?\d{1,18}"?', if_match, re.ASCII):
        raise bad_request(f'If-Match: expected the number of a version, such as "7", got {_shown(if_match, 40)}')
    return int(if_match.strip('"'))


# answers


def success(value: Json, status: int = 200, *headers: tuple[str, str]) -> Response:
    return Response(msgspec.json.encode(value), status=status, headers=headers)


def failure(error: CommsError, *headers: tuple[str, str], close: bool = False) -> Response:
    """``{"message", "code"}``: the shape of every answer that is no success."""
    more = list(headers)
    if error.retry_after_s is not None:
        more.append(("Retry-After", str(error.retry_after_s)))
    body = msgspec.json.encode({"message": error.message, "code": error.code})
    return Response(body, status=error.status, headers=tuple(more), close=close)


def _shown(word: str, most: int = 80) -> str:
    return repr(word if len(word) <= most else f"{word[:most]}...")
