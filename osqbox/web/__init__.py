"""The pages: what the operator API knows, for a person with a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quart import Blueprint
    from quart_trio.wrappers import TrioResponse

    from osqbox.operator.parts import Parts


def pages(parts: Parts) -> Blueprint:
    """Every page, behind a sign-in with the box's token."""
    from . import comms
    from .site import Site, elsewhere

    site = Site(parts)

    @site.page("/")
    async def home() -> TrioResponse:
        return elsewhere("/comms/agents")

    comms.add(site)
    return site.routes
