"""Shells: sessions opened on nodes, listed, killed and replayed; the terminals themselves are in `terminal`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio
from msgspec import Meta
from quart import Blueprint
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import NotFound

from osqbox.clock import rfc3339
from osqbox.errors import Refused
from osqbox.osquery import nodes
from osqbox.shell_frames import CELLS_MAX
from osqbox.shells import recording
from osqbox.shells.messages import Grant, Session, State

from .answers import answered, streamed
from .operations import Body, Query, operation
from .parts import OPERATOR, Parts, Shells

ASCIICAST = "application/x-asciicast"
OCTETS = "application/octet-stream"
JAVASCRIPT = "text/javascript"
GOTTY_BASES = ("gotty", "gotty1")
READ_BYTES = 256 * 1024
LIVE = tuple(state for state in State if state is not State.ENDED)

Cells = Annotated[int, Meta(ge=1, le=CELLS_MAX)]
StateName = Literal["requested", "offered", "open", "detached", "ended"]
GrantName = Literal["controller", "viewer"]


class NewShell(Body):
    """A terminal wanted on a node, and why."""

    node: Annotated[str, Meta(description="Id, a beginning of one, hostname or host identifier.")]
    reason: Annotated[str, Meta(max_length=1000)] = ""
    cols: Cells = 80
    rows: Cells = 24
    shell: Annotated[str, Meta(min_length=1, max_length=4096, description="Program; else the agent's.")] | None = None
    user: Annotated[str, Meta(min_length=1, max_length=256, description="Who runs it; else the agent's.")] | None = None
    record: Annotated[bool, Meta(description="Keep what is printed; else as the box is set.")] | None = None
    record_input: Annotated[bool, Meta(description="Keep what is typed too, passwords included.")] = False


class NewTicket(Body):
    role: GrantName = "controller"


class Which(Query):
    node: Annotated[str, Meta(description="Id of a node.")] | None = None
    tenant: str | None = None
    state: StateName | None = None
    live: Annotated[bool, Meta(description="1: not those that have ended.")] = False
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 100


class ViewerFacts(msgspec.Struct):
    """Somebody connected to a session."""

    by: str
    role: GrantName


class ShellFacts(msgspec.Struct):
    """One session: an agent's terminal and those who watch it."""

    id: str
    node: str
    tenant: str
    hostname: str
    state: StateName
    by: str
    reason: str
    created_at: str
    opened_at: str | None
    ended_at: str | None
    end_reason: str | None
    exit_code: int | None
    signal: int | None
    cols: int
    rows: int
    shell: str | None
    user: str | None
    title: str
    protocol: str | None
    viewers: list[ViewerFacts]
    controller: str | None
    output_bytes: int
    recording: bool
    record_input: bool
    dropped_input_bytes: int


class TicketFacts(msgspec.Struct):
    """Opens one WebSocket of one session, once."""

    ticket: str
    expires_at: str


def facts_of(session: Session) -> ShellFacts:
    """A session as the API shows it."""
    facts = {name: getattr(session, name) for name in ShellFacts.__struct_fields__}
    for name in ("created_at", "opened_at", "ended_at"):
        facts[name] = rfc3339(facts[name])
    facts["viewers"] = [ViewerFacts(by, grant.value) for by, grant in session.viewers]
    return ShellFacts(**facts)


def add(routes: Blueprint, parts: Parts) -> None:
    _add_sessions(routes, parts)
    _add_recordings(routes, parts)
    _add_gotty(routes, parts)


def _shells(parts: Parts) -> Shells:
    if parts.shells is None:
        raise Refused("control_off", "shells are off: expected a box started with --control", status=404)
    return parts.shells


def _add_sessions(routes: Blueprint, parts: Parts) -> None:
    @routes.post("/shells")
    @operation(ShellFacts, status=201, body=NewShell)
    async def open_shell(body: NewShell) -> TrioResponse:
        """Ask a node for a terminal; it is open when the agent has come."""
        shells = _shells(parts)
        node = await parts.store.read(lambda db: nodes.resolve(db, body.node))
        wish = {name: getattr(body, name) for name in NewShell.__struct_fields__ if name != "node"}
        wish["record"] = parts.record_shells if body.record is None else body.record
        return answered(facts_of(await shells.open(node.id, node.tenant, node.hostname, OPERATOR, **wish)), 201)

    @routes.get("/shells")
    @operation(list[ShellFacts], query=Which)
    async def list_shells(query: Which) -> TrioResponse:
        """Sessions, the newest first."""
        states = (query.state,) if query.state else LIVE if query.live else ()
        found = await _shells(parts).sessions(tenant=query.tenant, node=query.node, states=states, limit=query.limit)
        return answered([facts_of(session) for session in found])

    @routes.get("/shells/<session>")
    @operation(ShellFacts)
    async def show_shell(session: str) -> TrioResponse:
        """One session as it is now."""
        return answered(facts_of(_shells(parts).session(session)))

    @routes.delete("/shells/<session>")
    @operation(ShellFacts)
    async def kill_shell(session: str) -> TrioResponse:
        """End a session: everything that runs in its terminal is hung up on, then killed."""
        shells = _shells(parts)
        await shells.kill(session, OPERATOR)
        return answered(facts_of(shells.session(session)))

    @routes.post("/shells/<session>/tickets")
    @operation(TicketFacts, status=201, body=NewTicket)
    async def issue_ticket(session: str, body: NewTicket) -> TrioResponse:
        """A one-time ticket for a browser's WebSocket, which can carry no token: the subprotocol `ticket.TICKET`."""
        ticket = await _shells(parts).ticket(session, OPERATOR, Grant(body.role))
        return answered(TicketFacts(ticket.ticket, rfc3339(ticket.expires_at) or ""), 201)


def _add_recordings(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/shells/<session>/recording")
    @operation(bytes, media=ASCIICAST)
    async def download_cast(session: str) -> TrioResponse:
        """The recording for players: asciicast v3, up to now if the session goes on."""
        return await _file(parts, session, recording.CAST, ASCIICAST)

    @routes.get("/shells/<session>/bytes")
    @operation(bytes, media=OCTETS)
    async def download_bytes(session: str) -> TrioResponse:
        """Exactly what the shell printed; zeros where it could not be recorded."""
        return await _file(parts, session, recording.SPOOL, OCTETS)


async def _file(parts: Parts, session: str, name: str, media: str) -> TrioResponse:
    shells = _shells(parts)
    found = shells.session(session)
    path = shells.recording_directory(found.id) / name
    try:
        size_bytes = (await trio.Path(path).stat()).st_size
    except FileNotFoundError:
        raise Refused("no_recording", f"session {found.id} has no recording: {_why_none(found)}", status=404) from None
    response = streamed(_pieces(path, size_bytes), media)
    response.content_length = size_bytes
    suffix = "cast" if name == recording.CAST else "bin"
    response.headers["Content-Disposition"] = f'attachment; filename="shell-{found.id}.{suffix}"'
    return response


def _why_none(session: Session) -> str:
    if not session.recording:
        return "it was asked for without"
    return "the agent has not joined" if session.opened_at is None else "retention has removed it"


async def _pieces(path: Path, size_bytes: int) -> AsyncGenerator[bytes, None]:
    """The file up to a size; a download of a session that goes on ends where it began."""
    async with await trio.open_file(path, "rb") as file:
        while size_bytes and (piece := await file.read(min(READ_BYTES, size_bytes))):
            size_bytes -= len(piece)
            yield piece


def _add_gotty(routes: Blueprint, parts: Parts) -> None:
    """What GoTTY's clients fetch before their WebSocket, under `gotty/`, or `gotty1/` for those older than 2.0."""

    @routes.get("/shells/<session>/<base>/auth_token.js")
    @operation(bytes, media=JAVASCRIPT, takes_basic=True)
    async def gotty_auth_token(session: str, base: str) -> TrioResponse:
        """A one-time ticket in GoTTY's wrapping: its client sends it back in its first message."""
        _check_base(base)
        ticket = await _shells(parts).ticket(session, OPERATOR, Grant.CONTROLLER)
        return TrioResponse(f"var gotty_auth_token = '{ticket.ticket}';".encode(), content_type=JAVASCRIPT)

    @routes.get("/shells/<session>/<base>/config.js")
    @operation(bytes, media=JAVASCRIPT, takes_basic=True)
    async def gotty_config(session: str, base: str) -> TrioResponse:
        """Settings of GoTTY's page."""
        _check_base(base)
        _shells(parts).session(session)
        return TrioResponse(b"var gotty_term = 'xterm';", content_type=JAVASCRIPT)


def _check_base(base: str) -> None:
    if base not in GOTTY_BASES:
        raise NotFound
