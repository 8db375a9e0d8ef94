"""Kolide Launcher's JSON-RPC service on the agents listener: the same core as osquery's own API behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from osqbox.errors import Refused
from osqbox.exchange import Peer, Request, Response
from osqbox.osquery import jsonrpc, nodes, protocol
from osqbox.osquery.jsonrpc import Call
from osqbox.osquery.routes import OsqueryApi
from osqbox.settings import Bounds

T = TypeVar("T")

log = logging.getLogger(__name__)

ROOT = "/"


class LauncherApi:
    """Implements `exchange.Handler` for the root path, where Launcher posts every call."""

    def __init__(self, core: OsqueryApi, bounds: Bounds) -> None:
        self._core = core
        self._bounds = bounds

    def serves(self, target: str) -> bool:
        return target.partition("?")[0] == ROOT

    def body_limit_bytes(self, method: str, target: str) -> int:  # noqa: ARG002 - the Handler's shape
        return self._bounds.body_bytes

    def refuse(
        self,
        status: int,
        reason: str,
        message: str,
        peer: Peer | None,  # noqa: ARG002 - the Handler's shape
        target: str | None = None,  # noqa: ARG002
    ) -> Response | None:
        answer = jsonrpc.failure(Refused(reason, message, status=status), None)
        answer.close = True
        return answer

    async def answer(self, request: Request) -> Response | None:
        try:
            call = await self._call(request)
        except Refused as refused:
            self._core.count_refused(refused.reason)
            return protocol.failure(refused)
        try:
            jsonrpc.check(call)
            self._core.requests[f"launcher_{call.method}"] += 1
            return await self._dispatch(request, call)
        except Refused as refused:
            failed = refused
        except Exception:
            log.exception("internal error in %s", call.method)
            failed = Refused("internal", "internal error; the server's log has it", status=500)
        self._core.count_refused(failed.reason)
        return jsonrpc.failure(failed, call.id)

    async def _call(self, request: Request) -> Call:
        if request.method != "POST":
            raise _unknown_path(f"a POST, got {request.method[:20]}")
        try:
            return await self._parse(request, jsonrpc.parse_call)
        except Refused as no_call:  # perhaps an osqueryd whose flags miss the path
            raise _unknown_path(f"a call, got {no_call.message}") from None

    async def _parse(self, request: Request, parse: Callable[[bytes], T]) -> T:
        return await self._core.parse(request, parse, self._bounds.decoded_bytes)

    async def _dispatch(self, request: Request, call: Call) -> Response:
        match call.method:
            case "CheckHealth":
                return jsonrpc.success(call.id, status=jsonrpc.SERVING)
            case "RequestEnrollment":
                return jsonrpc.success(call.id, node_key=await self._enroll(request, call))
        node = self._core.authenticate(jsonrpc.node_key(call), request.peer)
        match call.method:
            case "RequestConfig":
                return jsonrpc.success(call.id, config=jsonrpc.config_text(await self._core.config_text(node)))
            case "RequestQueries":
                return jsonrpc.success(call.id, Queries=await self._core.offer(node))
            case "PublishLogs":
                log_type, lines = await self._parse(request, lambda _body: jsonrpc.log_lines(call))
                digest = protocol.body_digest("PublishLogs", request.body)
                await self._core.receive_logs(node, log_type, lines, digest, request)
            case _:
                answers = await self._parse(request, lambda _body: jsonrpc.answers(call))
                await self._core.write_answers(node, answers, len(request.body))
        return jsonrpc.success(call.id, message="")

    async def _enroll(self, request: Request, call: Call) -> str:
        body = jsonrpc.enrollment_body(call)
        digest = protocol.body_digest("RequestEnrollment", request.body)
        return await self._core.enroll(nodes.parse_enrollment(body, protocol.body_secrets(body), digest), request.peer)


def _unknown_path(instead: str) -> Refused:
    return Refused("unknown_path", f"no such path, but for Launcher's JSON-RPC: expected {instead}", status=404)
