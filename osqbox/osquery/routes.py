"""The osquery remote API as agents reach it: one handler for every transport and every path dialect."""

from __future__ import annotations

import gzip
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
import trio

from osqbox import __version__
from osqbox.clock import Clock
from osqbox.errors import Refused
from osqbox.exchange import Peer, Request, Response
from osqbox.osquery import campaigns, carves, configs, logs, messages, nodes, protocol, yara
from osqbox.osquery.amalgamate import NodeFacts
from osqbox.osquery.messages import Answer, CarveBegin, CarveBlock, Keyed, LogBatch, LogLine, WriteBody
from osqbox.osquery.nodes import Node
from osqbox.osquery.presence import Presence
from osqbox.osquery.protocol import Route
from osqbox.settings import Bounds
from osqbox.store import Store

T = TypeVar("T")

log = logging.getLogger(__name__)

INLINE_PARSE_BYTES = 256 * 1024
"""Bodies beyond this are unpacked and parsed in a thread, so that one big batch delays nobody."""
GZIP_ANSWER_BYTES = 1400
PARSER_THREADS = 2
"""A large body may take many times its size in memory while it is parsed."""
CONFIGS_CACHED = 4096
CONFIGS_CACHED_BYTES = 64 * 1024 * 1024
SERVED_REMEMBERED = 100_000
HOLD_MAX_S = 12.0
"""osqueryd gives up after 16 s, connect and hand-shake included."""


class OsqueryApi:
    """Implements `exchange.Handler` for the agents listener."""

    def __init__(
        self,
        store: Store,
        presence: Presence,
        clock: Clock,
        bounds: Bounds,
        *,
        read_hold_s: float,
        new_key: Callable[[], str],
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._presence = presence
        self._clock = clock
        self._bounds = bounds
        self._read_hold_s = min(read_hold_s, HOLD_MAX_S)
        self._new_key = new_key
        self._new_id = new_id
        self._configs = _ConfigCache()
        self._parsers = trio.CapacityLimiter(PARSER_THREADS)
        self._completing: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._not_utf8: set[str] = set()
        self._served: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._refused_unsaved: Counter[str] = Counter()

    def body_limit_bytes(self, method: str, target: str) -> int:  # noqa: ARG002 - the Handler's shape
        small = protocol.route(target).operation in protocol.SMALL_BODIES
        return self._bounds.small_body_bytes if small else self._bounds.body_bytes

    def refuse(
        self,
        status: int,
        reason: str,
        message: str,
        peer: Peer | None,  # noqa: ARG002 - the Handler's shape
        target: str | None = None,
    ) -> Response | None:
        operation = None if target is None else protocol.route(target).operation
        answer = _failure(operation, Refused(reason, message, status=status))
        if answer is not None:
            answer.close = True
        return answer

    async def answer(self, request: Request) -> Response | None:
        found = protocol.route(request.target)
        self.requests[found.operation or "unknown"] += 1
        try:
            return await _packed(request, await self._dispatch(request, found))
        except Refused as refused:
            failed = refused
        except Exception:
            log.exception("internal error in %s", found.operation)
            failed = Refused("internal", "internal error; the server's log has it", status=500)
        self.count_refused(failed.reason)
        return _failure(found.operation, failed)

    def count_refused(self, reason: str) -> None:
        """Also told by the listener: failed handshakes, refused connections."""
        self.refused[reason] += 1
        self._refused_unsaved[reason] += 1

    def take_refused(self) -> Counter[str]:
        """Refusals since the last call; the caller puts them into the feed."""
        taken, self._refused_unsaved = self._refused_unsaved, Counter()
        return taken

    async def _dispatch(self, request: Request, found: Route) -> Response | None:
        match found.operation, request.method:
            case (("version" | "health"), ("GET" | "POST" | "HEAD")):
                return Response(msgspec.json.encode({"name": "osqbox", "version": __version__}))
            case "enroll", ("POST" | "PUT"):
                return await self._enroll(request, found)
            case "config", ("POST" | "PUT" | "GET"):
                return await self._config(request, found)
            case "log", ("POST" | "PUT"):
                return await self._log(request, found)
            case "read", ("POST" | "PUT"):
                return await self._read(request, found)
            case "write", ("POST" | "PUT"):
                return await self._write(request, found)
            case "carve_begin", ("POST" | "PUT"):
                return await self._carve_begin(request, found)
            case "carve_block", ("POST" | "PUT"):
                return await self._carve_block(request, found)
            case "yara", ("GET" | "POST"):
                return await self._yara(request, found)
            case None, _:
                raise Refused("unknown_path", "no such path; osquery's are under /api/v1/osquery/", status=404)
        raise Refused("wrong_method", f"method: expected POST, got {request.method[:20]}", status=405)

    async def _parse(self, request: Request, found: Route, parse: Callable[[bytes], T]) -> T:
        small = found.operation in protocol.SMALL_BODIES
        return await self.parse(request, parse, self._bounds.small_body_bytes if small else self._bounds.decoded_bytes)

    async def parse(self, request: Request, parse: Callable[[bytes], T], limit_bytes: int) -> T:
        """Unpack and parse a body, in a thread when it is large."""

        def work() -> T:
            return parse(messages.decoded_body(request.headers, request.body, limit_bytes))

        if len(request.body) <= INLINE_PARSE_BYTES and not request.body.startswith(messages.GZIP_MAGIC):
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._parsers)

    async def _key(self, request: Request, found: Route) -> str | None:
        """The ``node_key`` of a body that holds little else."""
        return (await self._parse(request, found, lambda body: messages.decode(body, Keyed))).node_key

    def _node(self, request: Request, found: Route, body_key: str | None) -> Node:
        key = protocol.node_key_of(body_key, request.headers, found)
        secrets = protocol.uri_secrets(request.target, found.variables) if found.variables else ()
        return self.authenticate(key, request.peer, secrets)

    def authenticate(self, node_key: str, peer: Peer, uri_secrets: Sequence[str] = ()) -> Node:
        """The active node behind a key, now heard of. Raises Refused."""
        node = self._store.peek(lambda db: nodes.authenticate(db, node_key, peer, uri_secrets))
        self._presence.heard(node.id, self._clock.now())
        return node

    async def _enroll(self, request: Request, found: Route) -> Response:
        def parse(body: bytes) -> nodes.Enrollment:
            members = messages.decode_object(body)
            secrets = [
                *protocol.body_secrets(members),
                *protocol.uri_secrets(request.target, found.variables),
            ]
            return nodes.parse_enrollment(members, secrets, protocol.body_digest("enroll", body))

        enrollment = await self._parse(request, found, parse)
        return protocol.success(node_key=await self.enroll(enrollment, request.peer))

    async def enroll(self, enrollment: nodes.Enrollment, peer: Peer) -> str:
        """The node key of a host that is let in. Raises Refused."""
        enrolled = await self._store.write(lambda tx: nodes.enroll(tx, enrollment, peer, self._new_key, self._new_id))
        self._presence.heard(enrolled.node.id, self._clock.now())
        return enrolled.node_key

    async def _config(self, request: Request, found: Route) -> Response:
        node_api = protocol.is_node_api(request.method, found)
        key: str | None
        if node_api:
            key = next((value for name, value in found.variables if name == "node_key"), found.first)
        else:
            key = await self._key(request, found)
        text = await self.config_text(self._node(request, found, key))
        return protocol.config_response(text, node_api=node_api)

    async def config_text(self, node: Node) -> bytes:
        """The config of a node as JSON; followers of the feed hear of one that is new to it."""
        revision, facts = self._store.peek(configs.revision), configs.facts(node)
        text = self._configs.get(revision, facts)
        if text is None:
            text = (await self._store.read(lambda db: configs.config_for(db, node))).text
            text = self._configs.keep(revision, facts, text)
        await self._tell_config(node, text)
        return text

    async def _tell_config(self, node: Node, text: bytes) -> None:
        """An event when a node gets a config for the first time, or another one than before; not on every refresh."""
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        if self._served.get(node.id) == digest:
            return
        if len(self._served) >= SERVED_REMEMBERED:
            self._served.clear()
        self._served[node.id] = digest
        await self._store.write(lambda tx: tx.emit("config_served", tenant=node.tenant, node=node.id, sha1=digest))

    async def _log(self, request: Request, found: Route) -> Response:
        def parse(body: bytes) -> tuple[LogBatch, list[LogLine], bytes, bool]:
            text = messages.as_utf8(body)
            batch = messages.decode(text, LogBatch)
            return batch, messages.log_lines(batch), protocol.body_digest("log", body), text == body

        batch, lines, digest, is_utf8 = await self._parse(request, found, parse)
        node = self._node(request, found, batch.node_key)
        if not is_utf8:
            self._refuse_once(node)
        await self.receive_logs(node, batch.log_type, lines, digest, request)
        return protocol.success()

    async def receive_logs(
        self, node: Node, log_type: str, lines: Sequence[LogLine], digest: bytes, request: Request
    ) -> None:
        """Store a batch; the re-send of one that is stored already changes nothing."""
        await self._store.write(
            lambda tx: logs.receive(tx, node, log_type, lines, digest, request.peer.connection),
            bulk=True,
            weight_bytes=len(request.body),
        )

    def _refuse_once(self, node: Node) -> None:
        """A node's first batch that is not UTF-8 stays with the agent; refused for ever it would block its logs."""
        if node.id in self._not_utf8:
            return
        if len(self._not_utf8) >= SERVED_REMEMBERED:
            self._not_utf8.clear()
        self._not_utf8.add(node.id)
        raise Refused("invalid_utf8", "data: expected UTF-8; sent again, other bytes are stored as U+FFFD")

    async def _read(self, request: Request, found: Route) -> Response | None:
        key = await self._key(request, found)
        node = self._node(request, found, key)
        self._presence.read(node.id, self._clock.now())
        if not self._has_work(node) and self._read_hold_s > 0:
            if not await self._hold(request, node):
                return None
            node = self._node(request, found, key)  # its key may have been revoked meanwhile
        return protocol.success(**await self.offer(node))

    async def offer(self, node: Node) -> dict[str, Any]:
        """What a node is to run now: ``queries``, and ``discovery`` and ``accelerate`` if wanted."""
        if not self._has_work(node):
            return {"queries": {}}
        return await self._store.write(lambda tx: campaigns.offer(tx, node))

    def _has_work(self, node: Node) -> bool:
        return self._store.peek(lambda db: campaigns.has_work(db, node.id))

    async def _hold(self, request: Request, node: Node) -> bool:
        """Wait for work, the deadline or the stop of the box; False when the client has left."""
        gone = False

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal gone
            await request.wait_gone()
            gone = True
            scope.cancel()

        woken = self._presence.hold(node.id)
        try:
            if self._has_work(node):
                return True
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + self._read_hold_s
                nursery.start_soon(watch, nursery.cancel_scope)
                await woken.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._presence.release(node.id, woken)
        return not gone

    async def _write(self, request: Request, found: Route) -> Response:
        def parse(body: bytes) -> tuple[WriteBody, list[Answer], int]:
            written = messages.decode(messages.as_utf8(body), WriteBody)
            return written, messages.answers(written), len(body)

        written, answers, size_bytes = await self._parse(request, found, parse)
        node = self._node(request, found, written.node_key)
        await self.write_answers(node, answers, size_bytes)
        return protocol.success()

    async def write_answers(self, node: Node, answers: Sequence[Answer], size_bytes: int) -> None:
        """Account for what a node answered."""
        await self._store.write(lambda tx: campaigns.write(tx, node, answers), weight_bytes=size_bytes)

    async def _carve_begin(self, request: Request, found: Route) -> Response:
        message = await self._parse(request, found, lambda body: messages.decode(body, CarveBegin))
        node = self._node(request, found, message.node_key)
        session = await self._store.write(
            lambda tx: carves.begin(tx, node, message, self._bounds.carve_bytes, self._new_key)
        )
        return protocol.success(session_id=session)

    async def _carve_block(self, request: Request, found: Route) -> Response:
        def parse(body: bytes) -> tuple[CarveBlock, bytes]:
            message = messages.decode(body, CarveBlock)
            return message, carves.block_data(message)

        message, data = await self._parse(request, found, parse)
        key = protocol.node_key_of(message.node_key, request.headers, found)
        node = self._node(request, found, key) if key else None
        certificate = request.peer.certificate_name
        is_last = await self._store.write(
            lambda tx: carves.receive_block(tx, message, data, node, certificate), bulk=True, weight_bytes=len(data)
        )
        if is_last:
            await self.complete_carve(message.session_id)
        return protocol.success()

    async def complete_carve(self, session: str) -> None:
        """Hash a carve whose blocks are all stored, page by page beside the writer, and say that it is complete.

        Called by several at once (its last block was sent again) it is done once, and all wait for it.
        """
        lock = self._completing.get(session) or trio.Lock()
        self._completing[session] = lock
        async with lock:
            if not self._store.peek(lambda db: carves.awaits_digest(db, session)):
                return
            digest = carves.Digest()
            while await self._store.read(lambda db: digest.feed(db, session)):
                pass
            await self._store.write(lambda tx: carves.complete(tx, session, digest))

    async def _yara(self, request: Request, found: Route) -> Response:
        body_key = await self._key(request, found) if request.body else None
        key = protocol.node_key_of(body_key, request.headers, found)
        by_certificate = bool(request.peer.certificate_name and request.body)
        node = self._node(request, found, key) if key or by_certificate else None
        text = self._store.peek(lambda db: yara.rule_for(db, found.name, node))
        return Response(text.encode(), content_type="text/plain; charset=utf-8")

    def statistics(self) -> dict[str, Any]:
        return {"requests": dict(self.requests), "refused": dict(self.refused)}


class _ConfigCache:
    """Amalgamated configs of one revision. Many nodes get the same text; it is kept once."""

    def __init__(self) -> None:
        self._revision = -1
        self._of: dict[NodeFacts, bytes] = {}
        self._texts: dict[bytes, bytes] = {}
        self._size_bytes = 0

    def get(self, revision: int, facts: NodeFacts) -> bytes | None:
        return self._of.get(facts) if revision == self._revision else None

    def keep(self, revision: int, facts: NodeFacts, text: bytes) -> bytes:
        """The text, or an equal one that is kept already."""
        if revision != self._revision or len(self._of) >= CONFIGS_CACHED or self._size_bytes >= CONFIGS_CACHED_BYTES:
            self._revision, self._size_bytes = revision, 0
            self._of.clear()
            self._texts.clear()
        kept = self._texts.setdefault(text, text)
        self._size_bytes += len(text) if kept is text else 0
        self._of[facts] = kept
        return kept


def _failure(operation: str | None, refused: Refused) -> Response | None:
    """The answer to what is refused; None drops the connection."""
    if operation == "carve_block":
        return None  # osqueryd takes any JSON answer to a block as accepted, so only a broken connection refuses one
    refused.node_invalid |= operation == "enroll"  # as osquery documents it
    return protocol.failure(refused)


async def _packed(request: Request, answer: Response | None) -> Response | None:
    """Gzip for agents that ask for it (``--tls_accept_gzip``) when it is worth it."""
    if (
        answer is not None
        and len(answer.body) > GZIP_ANSWER_BYTES
        and "gzip" in request.headers.get("accept-encoding", "")
    ):
        pack = partial(gzip.compress, answer.body, compresslevel=6, mtime=0)
        small = len(answer.body) <= INLINE_PARSE_BYTES
        answer.body = pack() if small else await trio.to_thread.run_sync(pack)
        answer.headers = (*answer.headers, ("Content-Encoding", "gzip"))
    return answer
