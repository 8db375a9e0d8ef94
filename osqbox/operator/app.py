"""The operator's REST, SSE, WebSockets and metrics as one ASGI application.

One file per noun adds its routes; `guard` stands before all of them, `answers` shapes whatever comes out.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from quart import Blueprint
from quart_trio import QuartTrio

from osqbox.web import pages

from . import (
    agents,
    audit,
    campaigns,
    carves,
    certificates,
    commands,
    configs,
    configuration,
    events,
    groups,
    guard,
    info,
    jobs,
    logs,
    metrics,
    nodes,
    openapi,
    shells,
    signing_keys,
    states,
    stream,
    tenants,
    terminal,
    upgrades,
    yara,
)
from .answers import explain
from .operations import SLASH
from .parts import Parts

__all__ = ["Parts", "make_app"]

BODY_MAX_BYTES = 16 * 1024 * 1024
API = "/api/v1"


class _OperatorApp(QuartTrio):
    parts: Parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await terminal.serve(self.parts, scope, receive, send)
            return
        if scope["type"] == "http" and b"%2f" in scope.get("raw_path", b"").lower():
            scope = {**scope, "path": one_piece(scope["raw_path"])}
        if upgrades.is_upload(scope):
            async with upgrades.received(self.parts, scope, receive) as (bodiless, rest):
                await super().__call__(bodiless, rest, send)
        else:
            await super().__call__(scope, receive, send)


def one_piece(raw_path: bytes) -> str:
    """A path in which an escaped slash stays inside its word: a node may be called ``web/01``."""
    words = raw_path.decode("latin-1").split("?")[0].split("/")
    return "/".join(unquote(word).replace("/", SLASH) for word in words)


def make_app(parts: Parts) -> QuartTrio:
    """The application; serve it behind `osqbox.listen.Listener`, which bounds what Quart does not."""
    app = _OperatorApp("osqbox.operator", static_folder=None)
    app.parts = parts
    app.config.update(MAX_CONTENT_LENGTH=BODY_MAX_BYTES, PROVIDE_AUTOMATIC_OPTIONS=False, PROPAGATE_EXCEPTIONS=False)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    openapi.install(app)
    guard.install(app, parts)
    app.register_error_handler(Exception, explain)
    info.add_probes(app, parts)
    metrics.add(app, parts)
    agents.add_enrollment(app, parts)
    app.register_blueprint(_api(app, parts), url_prefix=API)
    app.register_blueprint(pages(parts))
    return app


def _api(app: QuartTrio, parts: Parts) -> Blueprint:
    routes = Blueprint("api", "osqbox.operator")
    info.add(routes, parts, app)
    for noun in (tenants, nodes, configs, campaigns, logs, carves, yara, shells, jobs, audit, certificates, stream):
        noun.add(routes, parts)
    for of_comms in (agents, commands, configuration, events, groups, signing_keys, states, upgrades):
        of_comms.add(routes, parts)
    return routes
