"""Calls to the server, as every thread makes them: with a key, a path and retries. Pure.

Upstream: osquery/remote/utility.h.
"""

from __future__ import annotations

from collections.abc import Callable

from osqbox.agent.client.commands import Send, Sleep, Thread, reply_of
from osqbox.agent.client.enrollment import Enrollment
from osqbox.agent.client.state import State
from osqbox.agent.messages import Reply


class Server:
    __slots__ = ("_enrollment", "_paths", "_state")

    def __init__(self, state: State, enrollment: Enrollment) -> None:
        self._state = state
        self._enrollment = enrollment
        self._paths: dict[str, str] = {}

    def call(self, call: str, path: str, body: Callable[[str], bytes], attempts: int) -> Thread[Reply]:
        """One call with its retries, 1, 4, 9... seconds apart (TLSRequestHelper::go).

        ``body`` is given the node key; with --tls_node_api the key goes into the URL and ``body`` gets none.
        """
        attempt = 0
        while True:
            attempt += 1
            reply = yield from self.call_once(call, path, body)
            if reply.ok:
                return reply
            failed = f"HTTP(S) request failed: {reply.message}"
            if attempt >= attempts:
                self._state.verbose("utility.h", f"{failed}, done retrying after {attempt} times")
                return reply
            self._state.verbose("utility.h", f"{failed}, retrying in {attempt**2} seconds...")
            yield Sleep(attempt**2)

    def call_once(self, call: str, path: str, body: Callable[[str], bytes], *, compress: bool = False) -> Thread[Reply]:
        state = self._state
        key = yield from self._enrollment.node_key()
        target = self._located(call, path, key)
        if state.flags.true("tls_node_api"):
            target += f"&node_key={key}"  # upstream's own: without a question mark
        method = "GET" if call == "config" and state.flags.true("tls_node_api") else "POST"
        content = b"" if method == "GET" else body(key)
        reply = yield from self._send(Send(call, target, content, key, compress=compress, method=method))
        if not reply.ok:
            state.event("call_failed", call=call, reason=reply.message)
        return reply

    def ask(self, call: str, path: str, body: Callable[[str], bytes]) -> Thread[Reply]:
        """One call that is not of osqueryd's own API: tried once, and nobody is told when it fails."""
        key = yield from self._enrollment.node_key()
        reply = yield from self._send(Send(call, path, body(key), key))
        return reply

    def located(self, call: str, path: str) -> Thread[str]:
        """The path to send a call to, for callers that make their own `Send`."""
        key = yield from self._enrollment.node_key()
        return self._located(call, path, key)

    def forget_path(self, call: str) -> None:
        """Its plugin is set up anew."""
        self._paths.pop(call, None)

    def _send(self, command: Send) -> Thread[Reply]:
        outcome = yield from self._state.send(command)
        reply = reply_of(outcome)
        if reply.node_invalid:
            self._enrollment.forget(command.node_key)
        return reply

    def _located(self, call: str, path: str, key: str) -> str:
        """The path as it was when the plugin was set up (makeURI): a carve's is made anew each time."""
        if call not in self._paths or call.startswith("carve"):
            edge = f"/{key}" if self._state.flags.true("tls_node_api") else ""
            self._paths[call] = edge + path + self._enrollment.secret_suffix(edge + path)
        return self._paths[call]
