"""Upgrade files for agents of the comms API: uploaded as they are, of any size, without passing through memory."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import msgspec
import trio
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import Headers

from osqbox.clock import rfc3339
from osqbox.comms.errors import CommsError, bad_request
from osqbox.listen.asgi import ClientGone, Message, Receive

from .agents import OfTenant
from .answers import answered
from .guard import Unwelcome, check_own, check_token
from .operations import operation
from .parts import OPERATOR, Parts

UPLOAD = "osqbox.upload"
"""In an ASGI scope: the file that was received, or why it was not."""
SILENCE_S = 60.0
CHECKSUM = "x-checksum-sha256"

_PATH = re.compile(r"/api/v1/upgrades/([^/]+)/?")


class Upgrade(msgspec.Struct):
    """A file that a tenant's agents may download."""

    name: str
    tenant: str
    size_bytes: int
    sha256: str
    added_at: str
    added_by: str


class RemovedUpgrade(msgspec.Struct):
    """The name stands for nothing any more; downloads that have begun end well."""

    deleted: str


def add(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/upgrades")
    @operation(list[Upgrade], query=OfTenant)
    async def list_upgrades(query: OfTenant) -> TrioResponse:
        """A tenant's upgrade files by name."""
        return answered([_facts(each) for each in await parts.served_comms().upgrades.page(query.tenant)])

    @routes.get("/upgrades/<name>")
    @operation(Upgrade, query=OfTenant)
    async def show_upgrade(name: str, query: OfTenant) -> TrioResponse:
        """One upgrade file."""
        return answered(_facts(await parts.served_comms().upgrades.find(query.tenant, name)))

    @routes.put("/upgrades/<name>")
    @operation(Upgrade, query=OfTenant, takes_octets=True)
    async def put_upgrade(name: str, query: OfTenant) -> TrioResponse:
        """Keep the body as this file; with an X-Checksum-SHA256 header only if it is right."""
        comms = parts.served_comms()
        comms.check_tenant(query.tenant)
        scope: Any = request.scope
        outcome = scope[UPLOAD]
        if isinstance(outcome, CommsError):
            raise outcome
        return answered(_facts(await comms.upgrades.keep(query.tenant, name, outcome, actor=OPERATOR)))

    @routes.delete("/upgrades/<name>")
    @operation(RemovedUpgrade, query=OfTenant)
    async def remove_upgrade(name: str, query: OfTenant) -> TrioResponse:
        """Remove an upgrade file."""
        await parts.served_comms().upgrades.remove(query.tenant, name, actor=OPERATOR)
        return answered(RemovedUpgrade(deleted=name))


def _facts(found: Any) -> dict[str, Any]:
    return {**msgspec.structs.asdict(found), "added_at": rfc3339(found.added_at)}


# the body, before Quart, which would keep it in memory


def is_upload(scope: Any) -> bool:
    """Whether a request's body is taken as a stream, bounded here and not by the listener."""
    return scope["type"] == "http" and scope["method"] == "PUT" and bool(_PATH.fullmatch(_raw_path(scope)))


@asynccontextmanager
async def received(parts: Parts, scope: Any, receive: Any) -> AsyncIterator[tuple[Any, Any]]:
    """The request as the route is to see it: without its body, which is on disk. Strangers' bodies are not read."""
    spooled, headers = (
        None,
        Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]),
    )
    outcome: Any = None
    if parts.comms is not None and _is_welcome(parts, headers):
        try:
            upgrades = parts.comms.upgrades
            upgrades.check_upload(unquote(_name(scope)), headers.get("Content-Length", type=int))
            outcome = spooled = await upgrades.spool(_pieces(receive))
            if (expected := headers.get(CHECKSUM)) is not None and expected.lower() != spooled.sha256:
                raise bad_request(f"{CHECKSUM}: expected the body's {spooled.sha256}, got {expected[:80]!r}")
        except CommsError as error:
            outcome = error
    kept = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]
    try:
        yield {**scope, "headers": kept, UPLOAD: outcome}, _without_body(receive, is_read=spooled is not None)
    finally:
        if spooled is not None and parts.comms is not None:
            parts.comms.upgrades.discard(spooled)


def _is_welcome(parts: Parts, headers: Headers) -> bool:
    """Whether the guard, which words the refusal, will let it pass."""
    try:
        check_own(headers, parts.allowed_hosts(), changes=True)
        check_token(headers, parts.token)
    except Unwelcome:
        return False
    return True


async def _pieces(receive: Receive) -> AsyncGenerator[bytes, None]:
    more = True
    while more:
        with trio.move_on_after(SILENCE_S) as in_time:
            message = await receive()
        if in_time.cancelled_caught:
            raise CommsError(408, "body_timeout", f"the body stopped for {SILENCE_S:.0f} s before its end")
        if message["type"] != "http.request":
            raise ClientGone("the client left in the middle of its upload")
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _without_body(receive: Receive, *, is_read: bool) -> Receive:
    is_told = False

    async def next_message() -> Message:
        nonlocal is_told
        if not is_told:
            is_told = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if not is_read:
            return await trio.sleep_forever()  # cancelled when the answer is out
        return await receive()

    return next_message


def _raw_path(scope: Any) -> str:
    path: str = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
    return path.partition("?")[0]


def _name(scope: Any) -> str:
    found = _PATH.fullmatch(_raw_path(scope))
    assert found is not None
    return found[1]
