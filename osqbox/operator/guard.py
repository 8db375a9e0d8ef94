"""Who may ask: the one guard before every route, and the headers after it.

Untrusted web pages in the operator's browser are the threat: a page that rebinds its name to this machine sends a
foreign Host, one that posts here sends its Origin, and neither knows the token.
"""

from __future__ import annotations

import hmac
from typing import TypeAlias

from quart import Request, Websocket, request, websocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from .answers import Failure, failed
from .operations import operation_of
from .parts import Parts

Asked: TypeAlias = Request | Websocket

SAFE_METHODS = frozenset(("GET", "HEAD"))
TOKEN_HINT = "osqbox env"  # noqa: S105 - a command
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def install(app: QuartTrio, parts: Parts) -> None:
    """Nothing is answered around it: not unknown paths, not wrong methods, not a route added later."""

    def why_not(asked: Asked, *, changes: bool) -> TrioResponse | None:
        foreign = _why_foreign(asked, parts.allowed_hosts(), changes=changes)
        return foreign or (None if _is_open(app, asked) else _why_unknown(asked, parts.token))

    async def check() -> TrioResponse | None:
        return why_not(request, changes=request.method not in SAFE_METHODS)

    async def check_websocket() -> TrioResponse | None:
        return why_not(websocket, changes=True)

    async def harden(response: TrioResponse) -> TrioResponse:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    app.before_request(check)
    app.before_websocket(check_websocket)
    app.after_request(harden)


def _is_open(app: QuartTrio, asked: Asked) -> bool:
    if asked.url_rule is None:
        return False
    found = operation_of(app.view_functions[asked.url_rule.endpoint])
    return found is not None and found.is_open


def _why_foreign(asked: Asked, allowed: frozenset[str], *, changes: bool) -> TrioResponse | None:
    host = asked.headers.get("Host", "").lower()
    if host not in allowed:
        return failed(
            Failure(
                error=f"Host: expected one of {', '.join(sorted(allowed))}, got {host[:80]!r}", reason="wrong_host"
            ),
            421,
        )
    if not changes:
        return None
    site = asked.headers.get("Sec-Fetch-Site", "none").lower()
    if site not in ("same-origin", "none"):
        return failed(Failure(error=f"Sec-Fetch-Site: expected same-origin, got {site[:40]!r}", reason="foreign"), 403)
    origin = asked.headers.get("Origin")
    if origin is not None and origin.lower().partition("://")[::2] not in _origins(allowed):
        return failed(Failure(error=f"Origin: expected this box's own, got {origin[:80]!r}", reason="foreign"), 403)
    return None


def _origins(allowed: frozenset[str]) -> set[tuple[str, str]]:
    return {(scheme, host) for scheme in ("http", "https") for host in allowed}


def _why_unknown(asked: Asked, token: str) -> TrioResponse | None:
    scheme, _, given = asked.headers.get("Authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer"
    if hmac.compare_digest(given.strip().encode(errors="replace"), token.encode()) and is_bearer:
        return None
    got = "another one" if is_bearer else "another kind" if scheme else "none"
    response = failed(
        Failure(
            error=f"Authorization: expected Bearer and the box's token, got {got}",
            reason="unauthorized",
            hint=TOKEN_HINT,
        ),
        401,
    )
    response.headers["WWW-Authenticate"] = 'Bearer realm="osqbox"'
    return response
