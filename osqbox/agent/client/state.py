"""What an agent's threads share: who it is, its flags and store, what its config says, and how it says things. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from osqbox.agent import logs, messages, schedule
from osqbox.agent.client.commands import Failure, Send, Thread
from osqbox.agent.client.decorations import Decorations
from osqbox.agent.client.performance import Performance
from osqbox.agent.constructed import Constructed
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.sql import QueryResult
from osqbox.agent.store import Store

MAX_RELAYED = 100_000
"""Log lines that wait for a logger plugin; over it the oldest are dropped and counted."""
TLS = "tls"

# Domains of the store.
SETTINGS, QUERIES, WORK, RUNNING = "configurations", "queries", "distributed", "distributed_running"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the agent is on this host."""

    hostname: str
    uuid: str
    instance_id: str
    ephemeral_id: str
    pid: int
    started: float
    platform_type: int = messages.LINUX
    """Bits of platform_type.h: 9 is Linux, 21 macOS, 2 Windows."""


class State:
    """``config_plugin``, ``logger_plugins`` and ``distributed_plugin`` are ``tls`` until somebody says otherwise."""

    def __init__(self, identity: Identity, flags: Flags, endpoints: Endpoints, store: Store, *, now: float) -> None:
        self.identity = identity
        self.flags = flags
        self.endpoints = endpoints
        self.store = store
        self.now = now
        self.config = schedule.Config()
        self.config_hash = ""
        self.config_valid = False
        self.config_error = ""
        """Why the last attempt to get a config failed; empty when it did not."""
        self.views: Mapping[str, str] = {}
        """Of the config, name -> SQL; replaced whole."""
        self.constructed: Mapping[str, Constructed] = {}
        """Of the config, by name; replaced whole."""
        self.decorations = Decorations()
        self.performance: Mapping[str, Performance] = {}
        self.pack_active: dict[str, bool] = {}
        self.discovered: dict[str, tuple[float, bool]] = {}
        """Of each pack with discovery queries, when they were asked and whether it runs."""
        self.queries_run = 0
        self.buffer = logs.Buffer(store)
        self.relayed: deque[tuple[str, Mapping[str, str]]] = deque()
        """What waits for each logger plugin that is not tls."""
        self.relayed_dropped = 0
        self.wakes: list[str] = []
        """Names of things that happened; the driver wakes those who sleep on them, and clears the list."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        """For whoever watches; the driver passes them on, and clears the list."""
        self.config_plugin = TLS
        self.logger_plugins: tuple[str, ...] = (TLS,)
        self.distributed_plugin = TLS

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def node_key(self) -> str:
        return self.store.get(SETTINGS, "nodeKey") or ""

    @property
    def host_identifier(self) -> str:
        """--host_identifier; what cannot be told is the hostname."""
        mode = self.flags.text("host_identifier")
        chosen = {
            "uuid": self.identity.uuid,
            "instance": self.identity.instance_id,
            "ephemeral": self.identity.ephemeral_id,
            "specified": self.flags.text("specified_identifier"),
        }
        return chosen.get(mode, "") or self.identity.hostname

    def uri(self, path: str) -> str:
        return f"https://{self.flags.text('tls_hostname')}{path}"

    def decorated(self) -> dict[str, str]:
        return {} if self.flags.true("disable_decorators") else self.decorations.all()

    # -- telling the driver --------------------------------------------------------------------------------------

    def event(self, kind: str, /, **details: Any) -> None:
        self.events.append((kind, details))

    def wake(self, name: str) -> None:
        self.wakes.append(name)

    def send(self, command: Send) -> Thread[bytes | Failure]:
        verb = "GET" if command.method == "GET" else "POST"
        self.verbose("tls.cpp", f"TLS/HTTPS {verb} request to URI: {self.uri(command.path)}")
        outcome: bytes | Failure = yield command
        return outcome

    # -- logging -------------------------------------------------------------------------------------------------

    def status(self, severity: int, filename: str, message: str, *, verbose: bool = False) -> None:
        """Log a line about the agent itself. Source lines of upstream are not imitated: the number is 0."""
        self.event("status", severity=severity, message=message, filename=filename, verbose=verbose, at=self.now)
        if severity < self.flags.integer("logger_min_status"):
            return
        said = logs.Status(severity, filename, 0, message)
        if TLS in self.logger_plugins and not self.flags.true("tls_disable_status_log"):
            line = logs.status_line(
                said, host_identifier=self.host_identifier, now=self.now, decorations=self.decorated()
            )
            self._buffer(logs.STATUS, line)
        if self._relays:
            entry = logs.status_entry(said, host_identifier=self.host_identifier, now=self.now)
            self._relay({"status": "true", "log": f"[{entry}]"})

    def verbose(self, filename: str, message: str) -> None:
        """What osqueryd only says with --verbose."""
        self.status_when_verbose(logs.INFO, filename, message)

    def status_when_verbose(self, severity: int, filename: str, message: str) -> None:
        if self.flags.true("verbose"):
            self.status(severity, filename, message, verbose=True)

    def warn_of(self, result: QueryResult) -> None:
        for warning in result.warnings:
            self.status(logs.WARNING, "virtual_table.cpp", warning)

    def log_result(self, line: str, *, snapshot: bool) -> None:
        if TLS in self.logger_plugins:
            self._buffer(logs.RESULT, line)
        self._relay({"snapshot": line} if snapshot else {"string": line, "category": "event"})

    def _buffer(self, kind: str, line: str) -> None:
        size_bytes = len(line.encode("utf-8", "replace"))
        if size_bytes > self.flags.integer("logger_tls_max_linesize"):
            self.event("line_dropped", kind=kind)
            if kind == logs.RESULT:
                self.status(logs.WARNING, "tls_logger.cpp", f"Linesize exceeds TLS logger maximum: {size_bytes}")
            return
        self.buffer.add(kind, line, self.now, self.flags.integer("buffered_log_max"))

    @property
    def _relays(self) -> list[str]:
        return [plugin for plugin in self.logger_plugins if plugin != TLS]

    def _relay(self, request: Mapping[str, str]) -> None:
        for plugin in self._relays:
            self.relayed.append((plugin, request))
            self.wake("relay")
        while len(self.relayed) > MAX_RELAYED:
            self.relayed.popleft()
            self.relayed_dropped += 1
