"""What the box says of itself: alive, ready, its facts, its description; and how to stop it."""

from __future__ import annotations

from typing import Any

import msgspec
from quart import Blueprint
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from . import openapi
from .answers import answered
from .operations import Body, operation
from .parts import Parts

SECRETS = frozenset(("token", "enroll_secret"))


class Live(msgspec.Struct):
    """The process answers."""

    live: bool


class Ready(msgspec.Struct):
    """Whether agents and operators are served now."""

    ready: bool
    stopping: bool


class Stop(Body):
    """Nothing to say."""


class Stopping(msgspec.Struct):
    """The box drains and ends."""

    stopping: bool


def add_probes(app: QuartTrio, parts: Parts) -> None:
    @app.get("/livez")
    @operation(Live, is_open=True)
    async def live() -> TrioResponse:
        """Whether the process answers."""
        return answered(Live(live=True))

    @app.get("/readyz")
    @operation(Ready, is_open=True, also={503: Ready})
    async def ready() -> TrioResponse:
        """Whether the box serves: 200 if so, else 503."""
        is_ready = parts.ready() and not parts.stopping.is_set()
        return answered(Ready(ready=is_ready, stopping=parts.stopping.is_set()), 200 if is_ready else 503)


def add(routes: Blueprint, parts: Parts, app: QuartTrio) -> None:
    @routes.get("/info")
    @operation(dict[str, Any])
    async def info() -> TrioResponse:
        """Addresses, files, version, uptime, statistics of every part, drops and limits; no secrets."""
        return answered({name: value for name, value in parts.info().items() if name not in SECRETS})

    @routes.get("/openapi.json")
    @operation(dict[str, Any])
    async def describe() -> TrioResponse:
        """This document."""
        return answered(openapi.document(app))

    @routes.post("/stop")
    @operation(Stopping, status=202, body=Stop)
    async def stop(body: Stop) -> TrioResponse:  # noqa: ARG001 - it must be a JSON object, but has nothing to say
        """Drain and end the box."""
        parts.stop()
        return answered(Stopping(stopping=True), 202)
