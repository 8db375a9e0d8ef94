"""The two threads that hand log lines on: to the server, and to logger plugins that are not tls. Pure.

Upstream: plugins/logger/{buffered,tls_logger}.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping

from osqbox.agent import logs, messages
from osqbox.agent.client.commands import Call, Failure, Sleep, Thread
from osqbox.agent.client.server import Server
from osqbox.agent.client.state import State


def forward_logs(state: State, server: Server) -> Thread[None]:
    """TLSLogForwarder: at start, then each period; each kind of log backs off by itself."""
    failures = {logs.RESULT: 0, logs.STATUS: 0}
    retry_at = {logs.RESULT: 0.0, logs.STATUS: 0.0}
    while True:
        period_s = max(1, state.flags.integer("logger_tls_period"))
        longest_s = state.flags.integer("logger_tls_backoff_max")
        # One scan for both kinds: results enough for a batch leave no room for statuses.
        batch = state.buffer.batch(state.flags.integer("logger_tls_max_lines"))
        for kind in (logs.RESULT, logs.STATUS):
            if state.now < retry_at[kind]:
                continue
            sent = yield from _flush(state, server, kind, batch[kind])
            failures[kind] = 0 if sent else failures[kind] + 1
            retry_at[kind] = state.now + min(period_s * failures[kind] ** 2, longest_s)
        yield Sleep(max(period_s, min(retry_at.values()) - state.now), wake="flush")


def _flush(state: State, server: Server, kind: str, lines: Mapping[str, str]) -> Thread[bool]:
    """Send lines of one kind; what is not acknowledged stays. A failure is said with --verbose only, as upstream:
    the line would itself be one to send.
    """
    if not lines:
        return True
    compress = state.flags.true("logger_tls_compress")
    build = messages.compressed_log_body if compress else messages.log_body

    def body(key: str) -> bytes:
        return build(lines.values(), kind, key)

    path = state.flags.text("logger_tls_endpoint") or state.endpoints.log
    reply = yield from server.call_once("log", path, body, compress=compress)
    if not reply.ok:
        state.verbose("buffered.cpp", f"Error sending {kind} to logger: {reply.message}")
        return False
    state.buffer.acknowledge(kind, list(lines))
    state.event("logged", kind=kind, lines=len(lines))
    return True


def relay_logs(state: State) -> Thread[None]:
    """Hand every line to the logger plugins that are not tls, in order. One that fails loses its line."""
    while True:
        while state.relayed:
            plugin, request = state.relayed.popleft()
            outcome = yield Call("logger", plugin, request)
            if isinstance(outcome, Failure):
                state.event("call_failed", call="logger", reason=outcome.message)
        yield Sleep(60.0, wake="relay")
