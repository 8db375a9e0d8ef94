"""The config: asked for, refreshed, pushed by a plugin, backed up; `apply` is what it changes. Pure.

Upstream: osquery/config/config.cpp, plugins/config/tls_config.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from osqbox.agent import logs, messages
from osqbox.agent.client.apply import Random, apply_config
from osqbox.agent.client.commands import Call, Failure, Sleep, Thread
from osqbox.agent.client.server import Server
from osqbox.agent.client.state import SETTINGS, TLS, State
from osqbox.errors import BadSetup

TLS_SOURCE = "tls_plugin"
_BACKUP = "config_persistence."


class ConfigUnavailable(BadSetup):
    """No config at the start, where the caller asked for the older rule that this ends the program."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"cannot retrieve a configuration from {uri}: {reason}", hint="osqbox doctor")


class Configuration:
    __slots__ = ("_pause_s", "_pushed", "_rng", "_server", "_source_hashes", "_sources", "_state")

    def __init__(self, state: State, server: Server, rng: Random) -> None:
        self._state = state
        self._server = server
        self._rng = rng
        self._sources: dict[str, Mapping[str, Any]] = {}
        self._source_hashes: dict[str, str] = {}
        self._pushed: list[tuple[str, str]] = []
        self._pause_s = state.flags.integer("config_refresh")

    def refresh(self) -> Thread[None]:
        """ConfigRefreshRunner: the first refresh after one interval; another pause after a failure.

        With --config_refresh 0 the only changes are those a plugin pushes.
        """
        while True:
            never = self._state.flags.integer("config_refresh") <= 0
            pause_s = 0 if self._pushed else 3600 if never else self._pause_s
            woken = yield Sleep(pause_s, wake="config")
            if self._pushed:
                source, text = self._pushed.pop(0)
                yield from self._take_sources({source: text})
            elif woken or not never:
                self._state.verbose("config.cpp", "Refreshing configuration state")
                yield from self.fetch()

    def push(self, source: str, text: str) -> None:
        """A config plugin's ``update``: the thread ``config_refresh`` takes it over."""
        self._pushed.append((source, text))
        self._state.wake("config")

    def fetch(self) -> Thread[bool]:
        """Ask for the config and apply it; on failure the old one stays."""
        state = self._state
        sources = yield from (self._tls_sources() if state.config_plugin == TLS else self._plugin_sources())
        if isinstance(sources, Failure):
            yield from self._failed(sources.message)
            return False
        normal_s = state.flags.integer("config_refresh")
        if self._pause_s != normal_s:
            state.verbose("config.cpp", "Normal configuration delay restored")
            self._pause_s = normal_s
        taken = yield from self._take_sources(sources)
        return taken

    def _tls_sources(self) -> Thread[dict[str, Mapping[str, Any] | str] | Failure]:
        state = self._state
        attempts = state.flags.integer("config_tls_max_attempts")
        reply = yield from self._server.call("config", state.endpoints.config, messages.node_body, attempts)
        if not reply.ok:
            return Failure(reply.message)
        if not state.flags.true("tls_node_api"):
            return {TLS_SOURCE: reply.members}
        text = reply.members.get("config")
        return {TLS_SOURCE: text if isinstance(text, str) else ""}

    def _plugin_sources(self) -> Thread[dict[str, Mapping[str, Any] | str] | Failure]:
        rows: list[dict[str, str]] | Failure = yield Call("config", self._state.config_plugin, {"action": "genConfig"})
        if isinstance(rows, Failure):
            return rows
        return dict(rows[0]) if rows else {}

    def _failed(self, reason: str) -> Thread[None]:
        state = self._state
        state.config_error = reason
        state.status(logs.WARNING, "config.cpp", f"Error getting config: {reason}")
        if self._pause_s == state.flags.integer("config_refresh") > 0:
            state.verbose("config.cpp", "Using accelerated configuration delay")
            self._pause_s = state.flags.integer("config_accelerated_refresh")
        if not self._sources and state.flags.true("config_enable_backup"):
            kept = {
                key.removeprefix(_BACKUP): text for key, text in state.store.scan(SETTINGS) if key.startswith(_BACKUP)
            }
            if kept:
                state.status(logs.INFO, "config.cpp", "Restoring the backup of the configuration")
                yield from self._take_sources(kept)

    def _take_sources(self, sources: Mapping[str, Mapping[str, Any] | str]) -> Thread[bool]:
        """Apply what each source says, if it says something new. False when one of them is no JSON object."""
        state = self._state
        parsed: dict[str, Mapping[str, Any]] = {}
        for name, content in sources.items():
            members = messages.read_config_text(content) if isinstance(content, str) else content
            if members is None:
                state.config_error = f"source {name} is not a JSON object"
                state.status(logs.ERROR, "config.cpp", f"Error parsing config: {state.config_error}")
                return False
            parsed[name] = members
        state.config_error = ""
        state.config_valid = True
        hashes = {name: config_source_hash(members) for name, members in parsed.items()}
        if all(self._source_hashes.get(name) == found for name, found in hashes.items()):
            return True
        self._sources = dict(sorted({**self._sources, **parsed}.items()))
        self._source_hashes = dict(sorted({**self._source_hashes, **hashes}.items()))
        if state.flags.true("config_enable_backup"):
            for name, members in parsed.items():
                state.store.put(SETTINGS, f"{_BACKUP}{name}", messages.compact(members))
        state.config_hash = combined_config_hash(list(self._source_hashes.values()))
        self._server.forget_path("log")
        yield from apply_config(state, self._sources, self._rng)
        return True


def config_source_hash(members: Mapping[str, Any]) -> str:
    """SHA-1 of the compact text in the order received: config change detection."""
    return hashlib.sha1(messages.encode(members), usedforsecurity=False).hexdigest()


def combined_config_hash(source_hashes: list[str]) -> str:
    """``osquery_info.config_hash``: SHA-1 of the sources' hashes, joined."""
    return hashlib.sha1("".join(source_hashes).encode(), usedforsecurity=False).hexdigest()
