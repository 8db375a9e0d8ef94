"""The frame of every page: signing in, the cookie, the headers, the templates.

A page is a handler that returns `Site.render` or `elsewhere`; `Site.page` puts the question for the cookie before it.
Nothing runs in the browser: pages are HTML alone, so what an agent says can never be more than text.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import trio
from jinja2 import Environment, PackageLoader, StrictUndefined
from quart import Blueprint, request
from quart_schema import hide
from quart_trio.wrappers import TrioResponse

from osqbox import __version__
from osqbox.clock import rfc3339
from osqbox.errors import OsqboxError
from osqbox.operator.operations import open_page
from osqbox.operator.parts import Parts

from .sessions import LIFETIME_S, Sessions

HTML = "text/html; charset=utf-8"
STATIC = MappingProxyType({"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send `Origin: null` with a form
}

Handler = Callable[..., Awaitable[TrioResponse]]


class Site:
    """Registers pages on a blueprint; the operator API's guard checks Host and Origin of each as of everything."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.routes = Blueprint("pages", "osqbox.web")
        self._sessions = Sessions(parts.new_key)
        self._templates = Environment(
            loader=PackageLoader("osqbox.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._templates.globals["version"] = __version__
        self._templates.filters["time"] = lambda at: (rfc3339(at) or "")[:19].replace("T", " ")
        self._add_signing_in()

    # what pages are made of

    def page(self, rule: str, *, methods: tuple[str, ...] = ("GET",)) -> Callable[[Handler], Handler]:
        """A page for who is signed in; anybody else is asked to sign in."""

        def decorate(handler: Handler) -> Handler:
            @wraps(handler)
            async def run(**words: str) -> TrioResponse:
                if not self.is_signed_in():
                    return elsewhere("/sign-in")
                try:
                    return await handler(**words)
                except OsqboxError as error:
                    return self.render("failure.html", status=_status_of(error), message=str(error))

            self.routes.add_url_rule(rule, f"{handler.__name__}", open_page(hide(run)), methods=list(methods))
            return handler

        return decorate

    def render(self, template: str, status: int = 200, **values: Any) -> TrioResponse:
        text = self._templates.get_template(template).render(signed_in=self.is_signed_in(), path=request.path, **values)
        return TrioResponse(text, status=status, content_type=HTML, headers=HEADERS)

    # signing in

    @property
    def _cookie(self) -> str:
        """Named by the port: cookies do not know ports, and two boxes may run side by side."""
        return f"osqbox-{request.host.rpartition(':')[2]}"

    def is_signed_in(self) -> bool:
        return self._sessions.is_open(request.cookies.get(self._cookie, ""), self.parts.clock.now())

    def _add_signing_in(self) -> None:
        async def sign_in() -> TrioResponse:
            if request.method != "POST":
                return self.render("sign_in.html", wrong=False)
            given = (await form()).get("token", "").strip()
            if not hmac.compare_digest(given.encode(errors="replace"), self.parts.token.encode()):
                return self.render("sign_in.html", status=403, wrong=True)
            answer = elsewhere("/")
            answer.set_cookie(
                self._cookie,
                self._sessions.open(self.parts.clock.now()),
                max_age=int(LIFETIME_S),
                httponly=True,
                samesite="Strict",
            )
            return answer

        async def sign_out() -> TrioResponse:
            self._sessions.close(request.cookies.get(self._cookie, ""))
            answer = elsewhere("/sign-in")
            answer.delete_cookie(self._cookie, httponly=True, samesite="Strict")
            return answer

        async def static() -> TrioResponse:
            name = request.path.rpartition("/")[2]
            text = await trio.to_thread.run_sync(files("osqbox.web").joinpath("static", name).read_text)
            return TrioResponse(text, content_type=STATIC[name], headers=HEADERS)

        add = self.routes.add_url_rule
        add("/sign-in", "sign_in", open_page(hide(sign_in)), methods=["GET", "POST"])
        add("/sign-out", "sign_out", open_page(hide(sign_out)), methods=["POST"])
        for name in STATIC:
            add(f"/static/{name}", name.replace(".", "_"), open_page(hide(static)), methods=["GET"])


async def form() -> Mapping[str, str]:
    """The fields of a submitted form; of repeated ones the first."""
    found: Mapping[str, str] = await request.form
    return found


def elsewhere(path: str) -> TrioResponse:
    """After a form, and for who must sign in first: GET this instead."""
    return TrioResponse(b"", status=303, content_type=HTML, headers={**HEADERS, "Location": path})


def _status_of(error: OsqboxError) -> int:
    status = getattr(error, "status", 400)
    return status if isinstance(status, int) else 400
