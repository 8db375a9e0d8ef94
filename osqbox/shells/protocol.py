"""The agents' paths and answers of the shell API, as the control server's design has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from osqbox.errors import Refused
from osqbox.exchange import Response

BODY_BYTES = 64 * 1024
_PATH = re.compile(r"/api(?:/v1)?/shells(?:/(?P<id>[^/?#]*))?/?(?:\?.*)?", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def serves(target: str) -> bool:
    return _PATH.fullmatch(target) is not None


def session_id(target: str) -> str | None:
    """The session's id in ``/api/v1/shells/{id}`` or ``/api/shells/{id}``; empty for the collection itself.

    None is not a path of ours. An id that none can have reads as ``-``.
    """
    found = _PATH.fullmatch(target)
    if found is None:
        return None
    name = found["id"] or ""
    return name if not name or _ID.fullmatch(name) else "-"


def bearer(headers: Mapping[str, str]) -> str | None:
    """The token of an ``Authorization: Bearer`` header; None without one."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def sessions(offers: Sequence[tuple[str, str]]) -> Response:
    """The answer to get-shells. The keys of the design's sample are always there."""
    listed = [{"session_id": session, "secret": secret} for session, secret in offers]
    return _json({"sessions": listed, "error": "", "node_invalid": False})


def where(url: str) -> Response:
    """The answer to a POST with the right bearer: the WebSocket to open, and with which subprotocol."""
    return _json({"url": url, "error": "", "node_invalid": False})


def failure(refused: Refused) -> Response:
    body = {"error": refused.message or refused.reason, "node_invalid": refused.node_invalid}
    return _json(body, refused.status)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status=status)
