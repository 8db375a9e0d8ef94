"""The comms listener as agents reach it, and the unix socket of publishers: one handler for every transport.

Every answer but 2xx, 304 and WebSocket frames is ``{"message", "code"}``. Nothing is done for an agent before its token
has been checked, and nothing is done for anybody but the token's agent.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from osqbox import __version__, tenants
from osqbox.exchange import Peer, Request, Response, Write
from osqbox.listen.asgi import Receive, Send
from osqbox.listen.connection import current_peer
from osqbox.listen.websocket import WebSocket

from . import bodies, configuration, protocol, publication, registration, stateful, streams
from .errors import RETRY_AFTER_S, CommsError, bad_request, busy
from .messages import Agent, Command, Group, Json, Profile
from .protocol import Operation, Route

if TYPE_CHECKING:
    from .front import Comms
    from .tokens import Claims

T = TypeVar("T")

log = logging.getLogger(__name__)

INLINE_BYTES = 128 * 1024
"""Larger bodies are unpacked and parsed in a thread, so that one big batch delays nobody."""
PARSER_THREADS = 2
STATEFUL_S = 25.0
"""For an indexer's confirmation; the agents of 2024 give up after 30 s."""
CACHE_BYTES = 16 * 1024 * 1024
"""Of configurations that were put together; one alone may have more."""
CACHED_BYTES = 1024
"""Counted for each besides its body."""
TOKEN_CODES = (2706, 2707)
NOTHING_IN_TIME = CommsError(408, "nothing", "Request exceeded the processing time limit")
"""What an empty poll of g1 is answered: it asks again after a second, and takes 204 for a list."""

_AGENT_VERSION = re.compile(re.escape(protocol.G1_AGENT) + r"([^ ]{1,64}) \(([A-Za-z0-9 _-]{1,64});")


class Credentials(msgspec.Struct, frozen=True):
    """The body of a login, in either dialect's words."""

    uuid: str | None = None
    UUID: str | None = None
    password: str | None = None
    key: str | None = None


@dataclass(slots=True)
class Timing:
    """Answers of one operation."""

    by_status: Counter[int] = field(default_factory=Counter)
    total_s: float = 0.0
    max_s: float = 0.0


@dataclass(slots=True)
class _Ask:
    """A request that is being answered."""

    request: Request
    route: Route
    what: Operation | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    profile: Profile = Profile.SPIKE


class _Api:
    """What both listeners have in common: routing, failures, counting."""

    def __init__(self, comms: Comms, paths: Mapping[str, Mapping[str, Operation]]) -> None:
        self._comms = comms
        self._paths = paths
        self._parsers = trio.CapacityLimiter(PARSER_THREADS)
        self.timings: dict[str, Timing] = {}
        self.refused: Counter[str] = Counter()

    def body_limit_bytes(self, method: str, target: str) -> int:
        return protocol.body_limit_bytes(protocol.route(target, self._paths), method)

    def refuse(
        self,
        status: int,
        reason: str,
        message: str,
        peer: Peer | None,  # noqa: ARG002 - the Handler's shape
        target: str | None = None,
    ) -> Response | None:
        error = CommsError(status, reason, message, retry_after_s=RETRY_AFTER_S if status == 503 else None)
        found = None if target is None else protocol.route(target, self._paths)
        return self._failed(error, found, Profile.SPIKE, close=True)

    async def answer(self, request: Request) -> Response | None:
        ask = _Ask(request, protocol.route(request.target, self._paths))
        begun = trio.current_time()
        try:
            response = await self._answer(ask)
        except CommsError as error:
            response = self._failed(error, ask.route, ask.profile)
        self._count(ask.what, response.status, trio.current_time() - begun)
        return response

    async def _answer(self, ask: _Ask) -> Response:
        request = ask.request
        if len(request.target) > protocol.TARGET_BYTES:
            message = f"expected a path and query of at most {protocol.TARGET_BYTES} bytes, got {len(request.target)}"
            raise CommsError(414, "target_too_long", message)
        try:
            ask.what = protocol.operation(ask.route, request.method)
            ask.query = protocol.parameters(ask.route)
            ask.profile = protocol.profile(ask.what, request.headers, ask.query, request.body)
            return await self._do(ask, ask.what)
        except trio.ClosedResourceError:
            raise busy("the box is stopping") from None
        except sqlite3.OperationalError as error:
            log.error("the database failed: %s", error)
            raise CommsError(503, "storage", "the database cannot be used now", retry_after_s=30) from None
        except CommsError:
            raise
        except Exception:
            log.exception("internal error in %s", ask.what)
            raise CommsError(500, "internal", "internal error; the server's log has it") from None

    async def _do(self, ask: _Ask, what: Operation) -> Response:
        raise NotImplementedError

    def _failed(self, error: CommsError, found: Route | None, profile: Profile, *, close: bool = False) -> Response:
        self.refused[error.reason] += 1
        if error.status == 405:
            allowed = ", ".join(found.operations) if found is not None and found.operations else "GET, POST"
            return protocol.failure(error, ("Allow", allowed), close=close)
        if error.status == 403 and error.code in TOKEN_CODES and profile is Profile.SPIKE:
            told = CommsError(401, error.reason, error.message, code=error.code)
            return protocol.failure(told, protocol.CHALLENGE, close=close)
        if error.status == 401 and found is not None and Operation.ENROLL_LOGIN in found.operations.values():
            return protocol.failure(error, protocol.BASIC_CHALLENGE, close=close)
        if error.status == 415:
            return protocol.failure(error, ("Accept-Encoding", "gzip"), close=close)
        return protocol.failure(error, close=close)

    def _count(self, what: Operation | None, status: int, took_s: float) -> None:
        timing = self.timings.setdefault(what or "unknown", Timing())
        timing.by_status[status] += 1
        timing.total_s += took_s
        timing.max_s = max(timing.max_s, took_s)

    async def _parsed(self, ask: _Ask, parse: Callable[[bytes], T]) -> T:
        """Unpack and parse the body, in a thread when it is large."""
        request = ask.request

        def work() -> T:
            return parse(protocol.decoded_body(request.headers, request.body))

        if len(request.body) <= INLINE_BYTES and "content-encoding" not in request.headers:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._parsers)

    async def _put_together(self, groups: list[Group]) -> configuration.Configuration:
        return await trio.to_thread.run_sync(configuration.configuration_of, groups, limiter=self._parsers)

    def statistics(self) -> dict[str, Any]:
        return {
            "requests": {
                what: {
                    "by_status": {str(status): count for status, count in sorted(timing.by_status.items())},
                    "mean_s": round(timing.total_s / timing.by_status.total(), 6),
                    "max_s": round(timing.max_s, 6),
                }
                for what, timing in self.timings.items()
            },
            "refused": dict(self.refused),
        }


class CommsApi(_Api):
    """Implements `exchange.Handler` for the comms listener; `websocket` is its WebSocket application."""

    def __init__(self, comms: Comms) -> None:
        super().__init__(comms, protocol.AGENTS_PATHS)
        self._seen: dict[str, float] = {}
        self._configurations: dict[tuple[tuple[str, int, str], ...], configuration.Configuration] = {}
        self._cached_bytes = 0

    def take_seen(self) -> dict[str, float]:
        """When agents were last heard of, since the last call."""
        seen, self._seen = self._seen, {}
        return seen

    async def _do(self, ask: _Ask, what: Operation) -> Response:
        doers: dict[Operation, Callable[[_Ask], Awaitable[Response]]] = {
            Operation.LOGIN: self._login,
            Operation.AUTHENTICATION: self._login,
            Operation.STATELESS: self._stateless,
            Operation.STATEFUL: self._stateful,
            Operation.COMMANDS: self._commands,
            Operation.CONFIGURATION: self._configuration,
            Operation.UPGRADE: self._upgrade,
            Operation.FILES: self._files,
            Operation.SCAN: self._scan,
            Operation.ENROLL_LOGIN: self._enroll_login,
            Operation.ENROLL: self._enroll,
        }
        if what is Operation.ROOT:
            return protocol.success({"name": "osqbox", "version": __version__, "api": protocol.PREFIX})
        return await doers[what](ask)

    async def _authenticated(self, ask: _Ask) -> tuple[Agent, Claims]:
        """The token's agent. Raises CommsError 403, and 400 where the request names another agent."""
        agent, claims = await self._comms.login.authenticate(ask.request.headers.get("authorization"))
        self._seen[agent.uuid] = self._comms.clock.now()
        for name in ("uuid", "UUID"):
            if name in ask.query:
                bodies.check_claims((ask.query[name],), agent.uuid)
        return agent, claims

    # tokens

    async def _login(self, ask: _Ask) -> Response:
        given = await self._parsed(ask, _credentials)
        uuid, secret = given.uuid or given.UUID, given.key or given.password
        if not uuid or not secret:
            expected = '{"uuid", "key"}' if ask.profile is Profile.G1 else '{"uuid", "password"}'
            raise bad_request(f"body: expected {expected}, each a text that is not empty")
        token, _ = await self._comms.login.login(
            uuid, secret, peer=ask.request.peer.address, facts=_facts(ask.request.headers)
        )
        if ask.what is Operation.AUTHENTICATION:
            return protocol.success({"token": token})
        lifetime_s = self._comms.tokens.lifetime_s
        return protocol.success({"token": token, "token_type": "Bearer", "expires_in": lifetime_s})

    async def _enroll_login(self, ask: _Ask) -> Response:
        """A tenant's enroll secret, as the password of HTTP Basic, for a token that may add one agent."""
        token = await self._comms.enrollment.authenticate(
            ask.request.headers.get("authorization"), peer=ask.request.peer.address
        )
        return protocol.success({"data": {"token": token}, "error": 0})

    async def _enroll(self, ask: _Ask) -> Response:
        body = await self._parsed(ask, bytes)
        await self._comms.enrollment.enroll(
            ask.request.headers.get("authorization"), body, peer=ask.request.peer.address
        )
        return Response(b"", status=201)

    # events

    async def _stateless(self, ask: _Ask) -> Response:
        agent, _ = await self._authenticated(ask)
        parsed = await self._parsed(ask, partial(bodies.read_stateless, profile=_body_profile(ask.request)))
        bodies.check_claims(parsed.claimed, agent.uuid)
        comms = self._comms
        events = bodies.stored_events(
            parsed, agent, now=comms.clock.now(), new_id=comms.new_id, key=_idempotency_key(ask.request)
        )
        comms.intake.take(events)
        if parsed.profile is Profile.G1:
            return Response(b"", status=204)
        return protocol.success({"message": "Event received", "events": len(events)}, 202)

    async def _stateful(self, ask: _Ask) -> Response:
        agent, _ = await self._authenticated(ask)
        parsed = await self._parsed(ask, partial(bodies.read_stateful, profile=_body_profile(ask.request)))
        bodies.check_claims(parsed.claimed, agent.uuid)
        comms, key = self._comms, _idempotency_key(ask.request)
        batch = stateful.batch_name(ask.request.body, key)
        with trio.move_on_after(STATEFUL_S) as in_time:
            results = await stateful.apply(comms.indexer, agent, parsed, batch=batch, now=comms.clock.now())
        if in_time.cancelled_caught:
            raise busy(f"the indexer has not confirmed within {STATEFUL_S:.0f} s: nothing is acknowledged")
        if any(map(stateful.is_refused, results)):
            await comms.store.write(lambda tx: stateful.note_refused(tx, agent, results))
        return Response(stateful.answer(parsed.profile, results))

    # commands

    async def _commands(self, ask: _Ask) -> Response:
        agent, claims = await self._authenticated(ask)
        after = streams.last_event_id(ask.request.headers.get("last-event-id", ask.query.get("last_event_id")))
        if ask.profile is Profile.G1:
            return await self._poll(ask, agent, claims, after)
        self._comms.hub.check_room()
        connection = self._comms.new_id()

        async def body(write: Write) -> None:
            async with self._comms.hub.attach(
                agent, connection=connection, after=after, expires_at=claims.expires_at
            ) as stream:
                await streams.sse(stream, write)

        return Response(b"", content_type=streams.SSE_TYPE, headers=streams.SSE_HEADERS, stream=body)

    async def _poll(self, ask: _Ask, agent: Agent, claims: Claims, after: int | None) -> Response:
        commands = await self._comms.hub.poll(
            agent,
            connection=self._comms.new_id(),
            wait_s=_wait_s(ask.query),
            expires_at=claims.expires_at,
            wait_gone=ask.request.wait_gone,
            after=after,
        )
        if not commands:
            raise NOTHING_IN_TIME
        answer: dict[str, Any] = {"commands": [streams.wire(each) for each in commands]}
        if after is not None:
            answer["last_event_id"] = commands[-1].seq
        body = msgspec.json.encode(answer)
        return Response(b"", stream=partial(self._hand_over, agent, commands, body), length_bytes=len(body))

    async def _hand_over(self, agent: Agent, commands: list[Command], body: bytes, write: Write) -> None:
        """Write the answer to a poll, and note whether it went out: an agent takes a second copy for a failure."""
        try:
            await write(body)
        except BaseException:
            await self._comms.hub.answered(agent.uuid, commands, written=False)
            raise
        await self._comms.hub.answered(agent.uuid, commands, written=True)

    async def websocket(self, scope: Any, receive: Receive, send: Send) -> None:
        """ASGI application: an agent's commands over a WebSocket."""
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        await receive()  # websocket.connect
        try:
            agent, claims, after, offered = await self._admitted(scope)
        except CommsError as error:
            await _refuse_handshake(scope, send, self._failed(error, None, Profile.SPIKE))
            return
        await send({"type": "websocket.accept", "subprotocol": protocol.SUBPROTOCOL if offered else None})
        socket = WebSocket(receive, send)
        try:
            async with self._comms.hub.attach(
                agent, connection=self._comms.new_id(), after=after, expires_at=claims.expires_at
            ) as stream:
                await streams.websocket(stream, socket)
        except CommsError as error:
            await socket.aclose(streams.TRY_LATER, error.message)

    async def _admitted(self, scope: Any) -> tuple[Agent, Claims, int | None, bool]:
        """Raises CommsError."""
        path: str = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        query = scope.get("query_string", b"").decode("latin-1")
        found = protocol.route(f"{path}?{query}")
        if found.operations.get("GET") is not Operation.COMMANDS:
            raise CommsError(404, "unknown_path", f"no WebSocket is served here; it is at {protocol.PREFIX}/commands")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        peer = current_peer()
        assert peer is not None
        request = Request("GET", f"{path}?{query}", headers, b"", peer, trio.sleep_forever)
        ask = _Ask(request, found, Operation.COMMANDS, protocol.parameters(found))
        agent, claims = await self._authenticated(ask)
        offered = list(scope.get("subprotocols") or ())
        if offered and protocol.SUBPROTOCOL not in offered:
            raise bad_request(f"Sec-WebSocket-Protocol: expected {protocol.SUBPROTOCOL} or none")
        self._comms.hub.check_room()
        after = streams.last_event_id(headers.get("last-event-id", ask.query.get("last_event_id")))
        return agent, claims, after, bool(offered)

    # configuration and files

    async def _configuration(self, ask: _Ask) -> Response:
        agent, _ = await self._authenticated(ask)
        if "group" in ask.query:
            raise CommsError(
                403, "publishers_only", "an agent reads the configuration of its own groups: leave group out"
            )
        groups = [await self._group(agent.tenant, name) for name in agent.groups]
        return _tagged(ask.request, await self._put_together_once(groups))

    async def _put_together_once(self, groups: list[Group]) -> configuration.Configuration:
        """Kept for the other agents of the same groups, within CACHE_BYTES."""
        key = tuple((group.name, group.version, group.sha256) for group in groups)
        if (found := self._configurations.get(key)) is not None:
            return found
        found = await self._put_together(groups)
        if key not in self._configurations:
            if self._cached_bytes + len(found.body) + CACHED_BYTES > CACHE_BYTES:
                self._configurations.clear()
                self._cached_bytes = 0
            self._configurations[key] = found
            self._cached_bytes += len(found.body) + CACHED_BYTES
        return found

    async def _group(self, tenant: str, name: str) -> Group:
        return await self._comms.indexer.groups.find(tenant, name) or Group(tenant=tenant, name=name)

    async def _upgrade(self, ask: _Ask) -> Response:
        agent, _ = await self._authenticated(ask)
        return await self._file(ask, agent, _file_name(ask.query))

    async def _files(self, ask: _Ask) -> Response:
        """What g1 fetches: a group's configuration as it was given, or an upgrade file."""
        agent, _ = await self._authenticated(ask)
        name = _file_name(ask.query)
        group = name.removesuffix(configuration.FILE_SUFFIX)
        if group == name or group not in agent.groups:
            return await self._file(ask, agent, name)
        found = await self._group(agent.tenant, group)
        disposition = ("Content-Disposition", f'attachment; filename="{name}"')
        text = found.configuration or "{}\n"  # before the first: still a document
        return Response(text.encode(), content_type=protocol.OCTETS, headers=(disposition,))

    async def _file(self, ask: _Ask, agent: Agent, name: str) -> Response:
        upgrades = self._comms.upgrades
        return await upgrades.answer(await upgrades.find(agent.tenant, name), ask.request.headers)

    async def _scan(self, ask: _Ask) -> Response:
        await self._authenticated(ask)
        body = await self._parsed(ask, bytes)
        status, answer = await self._comms.engine.scan(body)
        return Response(answer, status=status)


class PublishersApi(_Api):
    """Implements `exchange.Handler` for the unix socket: whoever may open it may publish."""

    def __init__(self, comms: Comms) -> None:
        super().__init__(comms, protocol.PUBLISHERS_PATHS)

    async def _do(self, ask: _Ask, what: Operation) -> Response:
        if "authorization" in ask.request.headers:
            raise CommsError(403, "no_agents", "the comms socket is for components of this machine; it takes no tokens")
        match what:
            case Operation.PUBLISH:
                return await self._publish(ask)
            case Operation.CONFIGURE:
                return await self._configure(ask)
            case Operation.CONFIGURATION:
                return await self._configuration(ask)
        return protocol.success({"name": "osqbox", "version": __version__, "api": protocol.PREFIX})

    def _tenant(self, ask: _Ask) -> str:
        name = ask.query.get("tenant", tenants.DEFAULT)
        self._comms.check_tenant(name)
        return name

    @staticmethod
    def _actor(peer: Peer) -> str:
        return "unix" if peer.unix_user is None else f"unix:{peer.unix_user}"

    async def _publish(self, ask: _Ask) -> Response:
        tenant = self._tenant(ask)
        wanted = await self._parsed(ask, publication.read_publication)
        key, actor = _idempotency_key(ask.request), self._actor(ask.request.peer)
        commands = await self._comms.publisher.publish(wanted, tenant=tenant, actor=actor, key=key)
        if wanted.is_g1:
            return protocol.success({"commands": [streams.wire(each) for each in commands]})
        told = [{"document_id": each.id, "agent": each.agent} for each in commands]
        request_id = commands[0].request_id if commands else None
        return protocol.success({"message": "Command received", "request_id": request_id, "commands": told}, 202)

    async def _configure(self, ask: _Ask) -> Response:
        tenant, name = self._tenant(ask), _group_name(ask.query)
        text = (await self._parsed(ask, _text)).removeprefix("\ufeff")
        wanted = protocol.version_wanted(ask.request.headers.get("if-match"))
        actor = self._actor(ask.request.peer)
        group = await self._comms.configure(tenant, name, text, actor=actor, expected_version=wanted)
        return await self._told(ask, group)

    async def _configuration(self, ask: _Ask) -> Response:
        tenant, name = self._tenant(ask), _group_name(ask.query)
        return await self._told(ask, await self._comms.group(tenant, name))

    async def _told(self, ask: _Ask, group: Group) -> Response:
        return _tagged(ask.request, await self._put_together([group]))


def _body_profile(request: Request) -> Profile | None:
    """None: by what the body looks like."""
    return Profile.G1 if protocol.is_g1_agent(request.headers) else None


def _credentials(body: bytes) -> Credentials:
    try:
        return msgspec.json.decode(body, type=Credentials)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Not the parser's own words: they may quote the secret.
        raise bad_request('body: expected a JSON object such as {"uuid": "...", "password": "..."}') from None


def _facts(headers: Mapping[str, str]) -> dict[str, Json]:
    """What a g1 agent tells of itself in its User-Agent."""
    found = _AGENT_VERSION.match(headers.get("user-agent", ""))
    return {"version": found[1], "type": found[2]} if found else {}


def _idempotency_key(request: Request) -> str:
    return protocol.idempotency_key(request.headers.get("idempotency-key"))


def _wait_s(query: Mapping[str, str]) -> float | None:
    if (text := query.get("wait")) is None:
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII):
        raise bad_request(f"wait: expected seconds, got {text[:40]!r}")
    return float(text)


def _file_name(query: Mapping[str, str]) -> str:
    name = next((query[each] for each in ("file_name", "file", "name") if each in query), None)
    if not name:
        raise bad_request("query: expected file_name, got none")
    return name


def _group_name(query: Mapping[str, str]) -> str:
    name = query.get("group", registration.DEFAULT_GROUP)
    registration.check_group_name(name)
    return name


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise bad_request("body: expected UTF-8, got bytes that are not") from None


def _tagged(request: Request, found: configuration.Configuration) -> Response:
    etag = f'"{found.sha256}"'
    headers = (("ETag", etag), ("Cache-Control", "no-cache"))
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if request.method != "PUT" and (etag in known or "*" in known):
        return Response(b"", status=304, headers=headers)
    return Response(found.body, headers=headers)


async def _refuse_handshake(scope: Any, send: Send, response: Response) -> None:
    await trio.lowlevel.checkpoint()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": streams.POLICY})
        return
    fields = [("content-type", response.content_type), ("content-length", str(len(response.body))), *response.headers]
    headers = [(name.lower().encode(), value.encode()) for name, value in fields]
    await send({"type": "websocket.http.response.start", "status": response.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": response.body})
