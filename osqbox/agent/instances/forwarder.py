"""What an instance's extension does for its osquery process: fetch config and queries, pass on results and logs. Pure.

It owns one enrollment: secret, node key, cached config and the log lines not yet delivered, all in its own store, so
that tenants never mix. Talking to the server is the agent core's part (`osqbox.agent.client.Core`): the methods here
are threads of it, which a driver performs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osqbox.agent import logs, messages
from osqbox.agent.client import SETTINGS, Core, Thread

NO_QUERIES = '{"queries":{}}'
_FORWARDED = ("queries", "discovery", "accelerate")
_PLUGIN_OPTIONS = ("config_plugin", "logger_plugin", "distributed_plugin", "enroll_plugin")
_CACHED_CONFIG = "extension_config"


@dataclass(slots=True)
class Counts:
    """What has gone through one extension since its instance was launched."""

    configs: int = 0
    reads: int = 0
    queries: int = 0
    """Distributed queries handed to the osquery process."""
    results: int = 0
    """Answers to them that the server has taken."""
    lines: int = 0
    """Log lines the osquery process has handed over."""
    lines_refused: int = 0


class Forwarder:
    def __init__(self, core: Core) -> None:
        self.core = core
        self.counts = Counts()

    def config(self) -> Thread[str]:
        """The server's config as JSON text; while it cannot be had the last one, or ``{}``."""
        attempts = self.core.flags.integer("config_tls_max_attempts")
        reply = yield from self.core.call("config", self.core.endpoints.config, messages.node_body, attempts)
        if reply.ok:
            self.counts.configs += 1
            self.core.store.put(SETTINGS, _CACHED_CONFIG, messages.compact(for_extension(reply.members)))
        else:
            self.core.status(logs.WARNING, "extension", f"Error getting config: {reply.message}")
        return self.cached_config()

    def cached_config(self) -> str:
        return self.core.store.get(SETTINGS, _CACHED_CONFIG) or "{}"

    def queries(self) -> Thread[str]:
        """A distributed read's reply as JSON text. One attempt: the osquery process asks again by itself."""
        reply = yield from self.core.call("read", self.core.endpoints.read, messages.node_body, 1)
        if not reply.ok:
            return NO_QUERIES
        work = {name: reply.members[name] for name in _FORWARDED if name in reply.members}
        found = work.get("queries")
        self.counts.reads += 1
        self.counts.queries += len(found) if isinstance(found, dict) else 0
        return messages.compact(work or {"queries": {}})

    def results(self, text_untrusted: str) -> Thread[str]:
        """Pass on what the osquery process found; returns "" or why it could not be, so that it keeps them."""
        answers = _object(text_untrusted)
        if answers is None:
            return "expected the results as a JSON object"
        answers.pop("node_key", None)

        def body(key: str) -> bytes:
            return messages.encode({**answers, "node_key": key})

        attempts = self.core.flags.integer("distributed_tls_max_attempts")
        reply = yield from self.core.call("write", self.core.endpoints.write, body, attempts)
        if not reply.ok:
            return reply.message
        found = answers.get("queries")
        self.counts.results += len(found) if isinstance(found, dict) else 0
        return ""

    # -- logs ----------------------------------------------------------------------------------------------------

    def log_result(self, line_untrusted: str) -> bool:
        """Keep one result or snapshot line until the server has it. What is no JSON object is counted, not kept."""
        fits = len(line_untrusted) <= self.core.flags.integer("logger_tls_max_linesize")
        if not fits or _object(line_untrusted) is None:
            self.counts.lines_refused += 1
            return False
        self._keep(logs.RESULT, line_untrusted)
        return True

    def log_status(self, entries_untrusted: Sequence[Mapping[str, Any]]) -> None:
        """Keep the status lines of one call: ``{s, f, i, m, h, c, u}`` each."""
        for entry in entries_untrusted:
            self._keep(logs.STATUS, self._status_line(entry))

    def _status_line(self, entry: Mapping[str, Any]) -> str:
        status = logs.Status(
            _int(entry.get("s")), str(entry.get("f", "")), _int(entry.get("i")), str(entry.get("m", ""))
        )
        return logs.status_line(
            status,
            host_identifier=str(entry.get("h") or self.core.host_identifier),
            now=float(_int(entry.get("u"))) or self.core.now,
        )

    def _keep(self, kind: str, line: str) -> None:
        self.counts.lines += 1
        self.core.buffer.add(kind, line, self.core.now, self.core.flags.integer("buffered_log_max"))


def for_extension(members: Mapping[str, Any]) -> dict[str, Any]:
    """A config as the osquery process may have it: it gets its plugins on its command line and must keep them."""
    config = {name: value for name, value in members.items() if name != "node_invalid"}
    options = config.get("options")
    if isinstance(options, dict):
        config["options"] = {name: value for name, value in options.items() if name not in _PLUGIN_OPTIONS}
    return config


def _object(text_untrusted: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text_untrusted)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _int(value_untrusted: Any) -> int:
    try:
        return int(value_untrusted)
    except (TypeError, ValueError, OverflowError):
        return 0
