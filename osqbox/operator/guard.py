"""Who may ask: the one guard before every route, and the headers after it.

Untrusted web pages in the operator's browser are the threat: a page that rebinds its name to this machine sends a
foreign Host, one that posts here sends its Origin, and neither knows the token.
"""

from __future__ import annotations

import base64
import binascii
import hmac

from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import Headers

from .answers import Failure, failed
from .operations import operation_of
from .parts import Parts

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
CHALLENGE = ("WWW-Authenticate", 'Bearer realm="osqbox"')
BASIC_CHALLENGE = ("WWW-Authenticate", 'Bearer realm="osqbox", Basic realm="osqbox"')
SINGLE = ("Host", "Origin", "Authorization", "Sec-Fetch-Site")
"""Headers that decide: given twice, nobody can say which was meant."""


class Unwelcome(Exception):
    """Whoever asks gets this answer and nothing else."""

    def __init__(self, failure: Failure, status: int, *headers: tuple[str, str]) -> None:
        super().__init__(failure.error)
        self.failure = failure
        self.status = status
        self.headers = headers


def install(app: QuartTrio, parts: Parts) -> None:
    """Nothing is answered around it: not unknown paths, not wrong methods, not a route added later.

    WebSockets do not pass here; `terminal` puts the same questions to them.
    """

    async def check() -> TrioResponse | None:
        found = operation_of(app.view_functions[request.url_rule.endpoint]) if request.url_rule else None
        takes_basic = found is not None and found.takes_basic
        try:
            check_own(request.headers, parts.allowed_hosts(), changes=takes_basic or request.method not in SAFE_METHODS)
            if found is None or not found.is_open:
                check_token(request.headers, parts.token, basic=takes_basic)
        except Unwelcome as unwelcome:
            response = failed(unwelcome.failure, unwelcome.status)
            response.headers.extend(unwelcome.headers)
            return response
        return None

    async def harden(response: TrioResponse) -> TrioResponse:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    app.before_request(check)
    app.after_request(harden)


def check_own(headers: Headers, allowed: frozenset[str], *, changes: bool) -> None:
    """Raises Unwelcome unless it came to a name of ours and, when it changes something, not from a foreign page."""
    for name in SINGLE:
        if len(headers.getlist(name)) > 1:
            raise Unwelcome(Failure(error=f"{name}: expected one, got several", reason="foreign"), 403)
    host = headers.get("Host", "").lower()
    if host not in allowed:
        expected = ", ".join(sorted(allowed))
        raise Unwelcome(Failure(error=f"Host: expected one of {expected}, got {host[:80]!r}", reason="wrong_host"), 421)
    if not changes:
        return
    site = headers.get("Sec-Fetch-Site", "none").lower()
    if site not in ("same-origin", "none"):
        raise Unwelcome(
            Failure(error=f"Sec-Fetch-Site: expected same-origin, got {site[:40]!r}", reason="foreign"), 403
        )
    origin = headers.get("Origin")
    # To the letter: browsers write an origin in one way only, and every other way belongs to somebody else.
    if origin is not None and origin not in {f"{scheme}://{name}" for scheme in ("http", "https") for name in allowed}:
        raise Unwelcome(Failure(error=f"Origin: expected this box's own, got {origin[:80]!r}", reason="foreign"), 403)


def check_token(headers: Headers, token: str, *, basic: bool = False) -> None:
    """Raises Unwelcome unless the token is there; as the password of any user where ``basic`` is allowed."""
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    kind = scheme.lower()
    given = given.strip()
    if basic and kind == "basic":
        given = _password(given)
    is_right_kind = kind == "bearer" or (basic and kind == "basic")
    if hmac.compare_digest(given.encode(errors="replace"), token.encode()) and is_right_kind:
        return
    got = "another one" if is_right_kind else "another kind" if scheme else "none"
    failure = Failure(
        error=f"Authorization: expected Bearer and the box's token, got {got}", reason="unauthorized", hint=TOKEN_HINT
    )
    raise Unwelcome(failure, 401, BASIC_CHALLENGE if basic else CHALLENGE)


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
