"""osqueryd's client side without I/O: who says what to the server, when, and what the answers change.

`Core` is the state all of an agent's threads share. Each osqueryd thread is a generator of it: it yields a command
(`Send`, `Sleep`, `Query`, `HostDetails`) and is resumed with the outcome, so it reads like the thread it stands for,
yet one driver may run it in a Trio task, another thousands of them from one heap, and a test by hand. The driver
sets ``core.now`` before each resumption; clocks, randomness and identifiers come from outside.

Where a flag names a plugin other than ``tls`` (config, logger, distributed), the core yields a `Call` instead of a
`Send`; such an agent runs the thread ``log_relay`` too.

Upstream: osquery/{remote/enroll/enroll,remote/utility,config/config,dispatcher/*,distributed/distributed}.cpp and
plugins/{remote/enroll,config,logger,distributed}/tls_*.cpp.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from osqbox.agent import constructed, logs, messages, schedule, views
from osqbox.agent.flags import Flags
from osqbox.agent.functions import SqlValue
from osqbox.agent.messages import Answer, Endpoints, Reply
from osqbox.agent.sql import QueryResult
from osqbox.agent.store import Store
from osqbox.errors import BadSetup

MAX_UNSENT_ANSWER_BYTES = 64 * 1024 * 1024
ACCELERATED_INTERVAL_S = 5
MAX_RELAYED = 100_000
"""Log lines that wait for a logger plugin; over it the oldest are dropped and counted."""
DENYLIST_S = 86_400
TLS = "tls"
TLS_SOURCE = "tls_plugin"
_ENROLL_POLL_S = 1.0
_BACKUP = "config_persistence."
_EXECUTING = "executing_query"
_DENYLIST = "schedule_denylist"

# Domains of the store.
SETTINGS, QUERIES, WORK, RUNNING = "configurations", "queries", "distributed", "distributed_running"


# -- what a thread yields, and what it gets back -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``body`` to ``path``; the outcome is the reply's body, or a `Failure`."""

    call: str
    """``enroll``, ``config``, ``log``, ``read``, ``write``, ``carve_start`` or ``carve_block``."""
    path: str
    body: bytes
    node_key: str = ""
    """For the Authorization header; empty is no header."""
    compress: bool = False
    method: str = "POST"
    """``GET`` only for the config with --tls_node_api; without a body then."""


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a plugin that is not the tls one, as the registry does (reference: registry, plugin, request).

    The outcome is the rows it answers, or a `Failure`. ``config``: ``{"action": "genConfig"}`` brings one row, source
    -> JSON, and ``{"action": "genPack", "name", "value"}`` name -> JSON. ``distributed``: ``{"action": "getQueries"}``
    brings ``{"results": JSON}``; ``{"action": "writeResults", "results": JSON}`` brings nothing. ``logger``:
    ``{"string": line, "category": "event"}``, ``{"snapshot": line}``, ``{"status": "true", "log": JSON}``.
    """

    registry: str
    plugin: str
    request: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait this long, or until the core raises ``wake``; the outcome says whether it did."""

    seconds: float
    wake: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """Run SQL; the outcome is a `QueryResult`."""

    sql: str


@dataclass(frozen=True, slots=True)
class HostDetails:
    """First rows of the tables enrollment describes the host by; the outcome is table -> row."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no reply."""

    message: str


Command = Send | Call | Sleep | Query | HostDetails | Any
"""Any: other parts of an agent (the carver) have commands of their own."""
T = TypeVar("T")
Thread = Generator[Command, Any, T]


class Random(Protocol):
    """`random.Random`, as far as it is used."""

    def randint(self, a: int, b: int) -> int: ...


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


@dataclass(slots=True)
class Performance:
    """What osquery_schedule shows of one query."""

    executions: int = 0
    last_executed: int = 0
    output_size: int = 0
    wall_time_ms: int = 0
    user_time: int = 0
    system_time: int = 0
    last_wall_time_ms: int = 0
    last_user_time: int = 0
    last_system_time: int = 0
    memory: int = 0
    last_memory: int = 0


@dataclass(slots=True)
class _Decorations:
    load: dict[str, str] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    interval: dict[str, str] = field(default_factory=dict)

    def all(self) -> dict[str, str]:
        return {**self.load, **self.always, **self.interval}


@dataclass(frozen=True, slots=True)
class Statistics:
    enrollments: int
    config_hash: str
    queries_run: int
    answers_unsent: int
    lines_waiting: int
    lines_dropped: int


class EnrollmentFailed(BadSetup):
    """No key after every attempt. With the tls logger osqueryd exits 78 here."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"cannot enroll at {uri}: {reason}", hint="osqbox doctor")


class ConfigUnavailable(BadSetup):
    """No config at the start, where the caller asked for the older rule that this ends the program."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"cannot retrieve a configuration from {uri}: {reason}", hint="osqbox doctor")


class Core:
    """``config_plugin``, ``logger_plugins`` and ``distributed_plugin`` are ``tls`` until somebody says otherwise."""

    def __init__(
        self,
        identity: Identity,
        flags: Flags,
        endpoints: Endpoints,
        store: Store,
        *,
        enroll_secret: Callable[[], str],
        rng: Random,
        now: float,
    ) -> None:
        self.identity = identity
        self.flags = flags
        self.endpoints = endpoints
        self.store = store
        self.now = now
        self.config = schedule.Config()
        self.config_hash = ""
        self.config_valid = False
        self.views: Mapping[str, str] = {}
        """Of the config, name -> SQL; replaced whole."""
        self.constructed: Mapping[str, constructed.Constructed] = {}
        """Of the config, by name; replaced whole."""
        self.performance: Mapping[str, Performance] = {}
        self.pack_active: dict[str, bool] = {}
        self.buffer = logs.Buffer(store)
        self.wakes: list[str] = []
        """Names of things that happened; the driver wakes those who sleep on them, and clears the list."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        """For whoever watches; the driver passes them on, and clears the list."""
        self.config_plugin = TLS
        self.logger_plugins: tuple[str, ...] = (TLS,)
        self.distributed_plugin = TLS
        self.config_error = ""
        """Why the last attempt to get a config failed; empty when it did not."""
        self.denylist: dict[str, int] = self._restored_denylist()
        """Scheduled queries that are skipped, with the time at which that ends."""
        self._enroll_secret = enroll_secret
        self._rng = rng
        self._sources: dict[str, Mapping[str, Any]] = {}
        self._source_hashes: dict[str, str] = {}
        self._pushed: list[tuple[str, str]] = []
        self._config_pause_s = flags.integer("config_refresh")
        self._paths: dict[str, str] = {}
        self._relayed: deque[tuple[str, Mapping[str, str]]] = deque()
        self._relayed_dropped = 0
        self._decorations = _Decorations()
        self._discovery: dict[str, tuple[float, bool]] = {}
        self._enrolling = False
        self._refusal = ""
        self._enrollments = 0
        self._queries_run = 0
        self._answers: list[Answer] = []

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

    def statistics(self) -> Statistics:
        return Statistics(
            enrollments=self._enrollments,
            config_hash=self.config_hash,
            queries_run=self._queries_run,
            answers_unsent=len(self._answers),
            lines_waiting=len(self.buffer),
            lines_dropped=self.buffer.dropped + self._relayed_dropped,
        )

    # -- saying things about itself ------------------------------------------------------------------------------

    def status(self, severity: int, filename: str, message: str, *, verbose: bool = False) -> None:
        """Log a line about the agent itself. Source lines of upstream are not imitated: the number is 0."""
        self._event("status", severity=severity, message=message, filename=filename, verbose=verbose, at=self.now)
        if severity < self.flags.integer("logger_min_status"):
            return
        said = logs.Status(severity, filename, 0, message)
        if TLS in self.logger_plugins and not self.flags.true("tls_disable_status_log"):
            line = logs.status_line(
                said, host_identifier=self.host_identifier, now=self.now, decorations=self._decorated()
            )
            self._buffer(logs.STATUS, line)
        if self._relays:
            entry = logs.status_entry(said, host_identifier=self.host_identifier, now=self.now)
            self._relay({"status": "true", "log": f"[{entry}]"})

    def verbose(self, filename: str, message: str) -> None:
        """What osqueryd only says with --verbose."""
        self._status_when_verbose(logs.INFO, filename, message)

    def _status_when_verbose(self, severity: int, filename: str, message: str) -> None:
        if self.flags.true("verbose"):
            self.status(severity, filename, message, verbose=True)

    def _log_result(self, line: str, *, snapshot: bool) -> None:
        if TLS in self.logger_plugins:
            self._buffer(logs.RESULT, line)
        self._relay({"snapshot": line} if snapshot else {"string": line, "category": "event"})

    def _buffer(self, kind: str, line: str) -> None:
        size_bytes = len(line.encode("utf-8", "replace"))
        if size_bytes > self.flags.integer("logger_tls_max_linesize"):
            self._event("line_dropped", kind=kind)
            if kind == logs.RESULT:
                self.status(logs.WARNING, "tls_logger.cpp", f"Linesize exceeds TLS logger maximum: {size_bytes}")
            return
        self.buffer.add(kind, line, self.now, self.flags.integer("buffered_log_max"))

    # -- loggers other than tls ----------------------------------------------------------------------------------

    @property
    def _relays(self) -> list[str]:
        return [plugin for plugin in self.logger_plugins if plugin != TLS]

    def _relay(self, request: Mapping[str, str]) -> None:
        for plugin in self._relays:
            self._relayed.append((plugin, request))
            self._wake("relay")
        while len(self._relayed) > MAX_RELAYED:
            self._relayed.popleft()
            self._relayed_dropped += 1

    def log_relay(self) -> Thread[None]:
        """Hand every line to the logger plugins that are not tls, in order. One that fails loses its line."""
        while True:
            while self._relayed:
                plugin, request = self._relayed.popleft()
                outcome = yield Call("logger", plugin, request)
                if isinstance(outcome, Failure):
                    self._event("call_failed", call="logger", reason=outcome.message)
            yield Sleep(60.0, wake="relay")

    def _event(self, kind: str, /, **details: Any) -> None:
        self.events.append((kind, details))

    def _wake(self, name: str) -> None:
        self.wakes.append(name)

    # -- enrollment ----------------------------------------------------------------------------------------------

    def enroll(self) -> Thread[None]:
        """What the first thread does before all others. Raises EnrollmentFailed.

        Without the tls logger, or with --disable_enrollment, the agent runs on with a blank key. Where no plugin is a
        tls one, nobody asks for a key.
        """
        always = self.config_plugin == TLS and self.flags.true("enroll_always")
        if always and not self.flags.true("disable_enrollment"):
            self.store.delete(SETTINGS, "nodeKey")
        if TLS not in (self.config_plugin, self.distributed_plugin, *self.logger_plugins):
            return
        key = yield from self._node_key()
        needed = always or TLS in self.logger_plugins
        if not key and needed and not self.flags.true("disable_enrollment"):
            raise EnrollmentFailed(self.uri(self.endpoints.enroll), self._refusal)

    def first_config(self) -> Thread[None]:
        """What it does then; without a config the agent runs on."""
        yield from self.fetch_config()

    def _node_key(self) -> Thread[str]:
        """The key; without one, this caller enrolls, one at a time, and may come back with nothing."""
        while not self.node_key and self._enrolling:
            yield Sleep(_ENROLL_POLL_S, wake="enrolled")
        if not self.node_key and not self.flags.true("disable_enrollment"):
            self._enrolling = True
            try:
                yield from self._enroll()
            finally:
                self._enrolling = False
                self._wake("enrolled")
        return self.node_key

    def _enroll(self) -> Thread[None]:
        """tls_enroll.cpp: n^2 seconds between attempts, up to the longest pause; the last one fails silently."""
        attempts = self.flags.integer("tls_enroll_max_attempts")
        longest_s = self.flags.integer("tls_enroll_max_interval")
        path = self.endpoints.enroll + self._secret_suffix(self.endpoints.enroll)
        uri = self.uri(path)
        self.verbose("tls_enroll.cpp", f"TLSEnrollPlugin requesting a node enroll key from: {uri}")
        attempt = 0
        while True:
            attempt += 1
            details = yield HostDetails()
            body = messages.enroll_body(
                self._enroll_secret(),
                self.host_identifier,
                details,
                secret_name=self.flags.text("tls_enroll_override"),
                platform_type=self.identity.platform_type,
            )
            outcome = yield from self._send(Send("enroll", path, body))
            key = "" if isinstance(outcome, Failure) else messages.enrolled_key(outcome)
            if key:
                self._keep_key(key)
                return
            # Upstream names neither ``error`` nor ``node_invalid`` here; people want to know.
            self._refusal = _reply(outcome).message or "No node key returned from TLS enroll plugin"
            self._event("enroll_failed", uri=uri, reason=self._refusal, attempt=attempt)
            if attempts and attempt >= attempts:
                return
            message = f"Failed enrollment request to {uri} ({self._refusal}) retrying..."
            self.status(logs.WARNING, "tls_enroll.cpp", message)
            yield Sleep(min(attempt**2, longest_s))

    def _keep_key(self, key: str) -> None:
        self.store.put(SETTINGS, "nodeKey", key)
        self.store.put(SETTINGS, "nodeKeyTime", str(int(self.now)))
        self._enrollments += 1
        self._event("enrolled", host_identifier=self.host_identifier, enrollments=self._enrollments)

    def _forget_key(self, used: str) -> None:
        """Drop the key a server called invalid, unless another thread has a newer one by now."""
        if self.node_key == used and not self.flags.true("disable_reenrollment"):
            self.store.delete(SETTINGS, "nodeKey")
            self._event("node_invalid")

    # -- calls ---------------------------------------------------------------------------------------------------

    def _secret_suffix(self, path: str) -> str:
        """--tls_secret_always: the secret as a URI variable, not encoded, as upstream."""
        if not self.flags.true("tls_secret_always"):
            return ""
        name = self.flags.text("tls_enroll_override")
        return f"{'&' if '?' in path else '?'}{name}={self._enroll_secret()}"

    def _located(self, call: str, path: str, key: str) -> str:
        """The path as it was when the plugin was set up (utility.h, makeURI): a carve's is made anew each time."""
        if call not in self._paths or call.startswith("carve"):
            edge = f"/{key}" if self.flags.true("tls_node_api") else ""
            self._paths[call] = edge + path + self._secret_suffix(edge + path)
        return self._paths[call]

    def located(self, call: str, path: str) -> Thread[str]:
        """The path to send a call to, for callers that make their own `Send`."""
        key = yield from self._node_key()
        return self._located(call, path, key)

    def _send(self, command: Send) -> Thread[bytes | Failure]:
        verb = "GET" if command.method == "GET" else "POST"
        self.verbose("tls.cpp", f"TLS/HTTPS {verb} request to URI: {self.uri(command.path)}")
        outcome: bytes | Failure = yield command
        return outcome

    def call(self, call: str, path: str, body: Callable[[str], bytes], attempts: int) -> Thread[Reply]:
        """One call with its retries, 1, 4, 9... seconds apart (utility.h, TLSRequestHelper::go).

        ``body`` is given the node key; with --tls_node_api the key goes into the URL and ``body`` gets none.
        """
        attempt = 0
        while True:
            attempt += 1
            reply = yield from self._exchange(call, path, body)
            if reply.ok:
                return reply
            failed = f"HTTP(S) request failed: {reply.message}"
            if attempt >= attempts:
                self.verbose("utility.h", f"{failed}, done retrying after {attempt} times")
                return reply
            self.verbose("utility.h", f"{failed}, retrying in {attempt**2} seconds...")
            yield Sleep(attempt**2)

    def ask(self, call: str, path: str, body: Callable[[str], bytes]) -> Thread[Reply]:
        """One call that is not of osqueryd's own API: tried once, and nobody is told when it fails."""
        key = yield from self._node_key()
        outcome = yield from self._send(Send(call, path, body(key), key))
        reply = _reply(outcome)
        if reply.node_invalid:
            self._forget_key(key)
        return reply

    def _exchange(self, call: str, path: str, body: Callable[[str], bytes], *, compress: bool = False) -> Thread[Reply]:
        key = yield from self._node_key()
        target = self._located(call, path, key)
        if self.flags.true("tls_node_api"):
            target += f"&node_key={key}"  # upstream's own: without a question mark
        method = "GET" if call == "config" and self.flags.true("tls_node_api") else "POST"
        content = b"" if method == "GET" else body(key)
        outcome = yield from self._send(Send(call, target, content, key, compress=compress, method=method))
        reply = _reply(outcome)
        if reply.node_invalid:
            self._forget_key(key)
        if not reply.ok:
            self._event("call_failed", call=call, reason=reply.message)
        return reply

    # -- config --------------------------------------------------------------------------------------------------

    def config_refresh(self) -> Thread[None]:
        """ConfigRefreshRunner: the first refresh after one interval; another pause after a failure.

        With --config_refresh 0 the only changes are those a plugin pushes.
        """
        while True:
            never = self.flags.integer("config_refresh") <= 0
            pause_s = 0 if self._pushed else 3600 if never else self._config_pause_s
            woken = yield Sleep(pause_s, wake="config")
            if self._pushed:
                source, text = self._pushed.pop(0)
                yield from self._take_sources({source: text})
            elif woken or not never:
                self.verbose("config.cpp", "Refreshing configuration state")
                yield from self.fetch_config()

    def push_config(self, source: str, text: str) -> None:
        """A config plugin's ``update``: the thread ``config_refresh`` takes it over."""
        self._pushed.append((source, text))
        self._wake("config")

    def fetch_config(self) -> Thread[bool]:
        """Ask for the config and apply it; on failure the old one stays."""
        sources = yield from (self._tls_sources() if self.config_plugin == TLS else self._plugin_sources())
        if isinstance(sources, Failure):
            yield from self._config_failed(sources.message)
            return False
        normal_s = self.flags.integer("config_refresh")
        if self._config_pause_s != normal_s:
            self.verbose("config.cpp", "Normal configuration delay restored")
            self._config_pause_s = normal_s
        taken = yield from self._take_sources(sources)
        return taken

    def _tls_sources(self) -> Thread[dict[str, Mapping[str, Any] | str] | Failure]:
        attempts = self.flags.integer("config_tls_max_attempts")
        reply = yield from self.call("config", self.endpoints.config, messages.node_body, attempts)
        if not reply.ok:
            return Failure(reply.message)
        if not self.flags.true("tls_node_api"):
            return {TLS_SOURCE: reply.members}
        text = reply.members.get("config")
        return {TLS_SOURCE: text if isinstance(text, str) else ""}

    def _plugin_sources(self) -> Thread[dict[str, Mapping[str, Any] | str] | Failure]:
        rows: list[dict[str, str]] | Failure = yield Call("config", self.config_plugin, {"action": "genConfig"})
        if isinstance(rows, Failure):
            return rows
        return dict(rows[0]) if rows else {}

    def _config_failed(self, reason: str) -> Thread[None]:
        self.config_error = reason
        self.status(logs.WARNING, "config.cpp", f"Error getting config: {reason}")
        if self._config_pause_s == self.flags.integer("config_refresh") > 0:
            self.verbose("config.cpp", "Using accelerated configuration delay")
            self._config_pause_s = self.flags.integer("config_accelerated_refresh")
        if not self._sources and self.flags.true("config_enable_backup"):
            kept = {
                key.removeprefix(_BACKUP): text for key, text in self.store.scan(SETTINGS) if key.startswith(_BACKUP)
            }
            if kept:
                self.status(logs.INFO, "config.cpp", "Restoring the backup of the configuration")
                yield from self._take_sources(kept)

    def _take_sources(self, sources: Mapping[str, Mapping[str, Any] | str]) -> Thread[bool]:
        """Apply what each source says, if it says something new. False when one of them is no JSON object."""
        parsed: dict[str, Mapping[str, Any]] = {}
        for name, content in sources.items():
            members = messages.read_config_text(content) if isinstance(content, str) else content
            if members is None:
                self.config_error = f"source {name} is not a JSON object"
                self.status(logs.ERROR, "config.cpp", f"Error parsing config: {self.config_error}")
                return False
            parsed[name] = members
        self.config_error = ""
        self.config_valid = True
        hashes = {name: config_source_hash(members) for name, members in parsed.items()}
        if all(self._source_hashes.get(name) == found for name, found in hashes.items()):
            return True
        self._sources = dict(sorted({**self._sources, **parsed}.items()))
        self._source_hashes = dict(sorted({**self._source_hashes, **hashes}.items()))
        if self.flags.true("config_enable_backup"):
            for name, members in parsed.items():
                self.store.put(SETTINGS, f"{_BACKUP}{name}", messages.compact(members))
        yield from self._apply_config()
        return True

    def _apply_config(self) -> Thread[None]:
        self.config_hash = combined_config_hash(list(self._source_hashes.values()))
        warnings: list[str] = []
        for members in self._sources.values():
            options = members.get("options")
            for name, value in options.items() if isinstance(options, dict) else ():
                warning = self.flags.set_option(name, value)
                if warning:
                    warnings.append(warning)
        sources = yield from self._expanded(warnings.append)
        self.config = schedule.read_sources(sources, self._rules(), warnings.append)
        self._discovery.clear()
        self._paths.pop("log", None)
        self._decorations = _Decorations()
        for warning in warnings[:100]:
            self.status(logs.WARNING, "config.cpp", warning)
        queries = [query.name for _, query in self.config.queries()]
        self.performance = {name: self.performance.get(name, Performance()) for name in queries}
        self._apply_constructed()
        yield from self._apply_views()
        self._event("config", hash=self.config_hash, queries=len(queries))
        self._decorations.load = yield from self._decorate(self.config.decorators.load)
        self._wake("schedule")

    def _apply_constructed(self) -> None:
        warnings: list[str] = []
        found = constructed.read_constructed(self._sources.values(), self.identity.platform_type, warnings.append)
        self.constructed = self.constructed if found is None else found
        for warning in warnings[:100]:
            self.status(logs.WARNING, "auto_constructed_tables.cpp", warning)

    def _apply_views(self) -> Thread[None]:
        """All appear at once, since they may use each other; a new one that cannot be read is told of once."""
        warnings: list[str] = []
        before, found = self.views, views.read_views(self._sources.values(), warnings.append)
        self.views = before if found is None else found
        for name, sql in self.views.items():
            if before.get(name) == sql:
                continue
            result: QueryResult = yield Query(views.check(sql))
            if result.status:
                warnings.append(views.error_text(name, result.message))
        for warning in warnings[:100]:
            self.status(logs.WARNING, "views.cpp", warning)

    def _expanded(self, warn: Callable[[str], None]) -> Thread[dict[str, Mapping[str, Any]]]:
        """The sources, with packs that are only named (a path or pattern) asked of the config plugin."""
        found = dict(self._sources)
        for source, members in self._sources.items() if self.config_plugin != TLS else ():
            packs = members.get("packs")
            if not isinstance(packs, dict):
                continue
            kept = {name: pack for name, pack in packs.items() if not isinstance(pack, str)}
            for name, value in packs.items():
                if isinstance(value, str):
                    kept.update((yield from self._named_pack(name, value, warn)))
            found[source] = {**members, "packs": kept}
        return found

    def _named_pack(self, name: str, value: str, warn: Callable[[str], None]) -> Thread[dict[str, Any]]:
        request = {"action": "genPack", "name": name, "value": value}
        rows: list[dict[str, str]] | Failure = yield Call("config", self.config_plugin, request)
        if isinstance(rows, Failure) or not rows:
            warn(f"Error getting pack {name}: {rows.message if isinstance(rows, Failure) else 'no such pack'}")
            return {}
        found = {each: messages.read_config_text(text) for each, text in rows[0].items()}
        for each in (each for each, members in found.items() if members is None):
            warn(f"Error parsing pack {each}: not a JSON object")
        return {each: members for each, members in found.items() if members is not None}

    def _rules(self) -> schedule.Rules:
        return schedule.Rules(
            hostname=self.host_identifier,
            delimiter=self.flags.text("pack_delimiter"),
            default_interval_s=self.flags.integer("schedule_default_interval"),
            splay=self._splayed,
            platform_type=self.identity.platform_type,
        )

    def _splayed(self, name: str, interval_s: int) -> int:
        """The splayed interval, the same as long as the configured one is (restoreSplayedValue)."""
        percent, key = self.flags.integer("schedule_splay_percent"), f"interval.{name}"
        kept = (self.store.get(SETTINGS, key) or "").split(":")
        if len(kept) == 3 and kept[:2] == [str(interval_s), str(percent)]:
            return int(kept[2])
        chosen = schedule.splay(interval_s, percent, self._rng.randint)
        self.store.put(SETTINGS, key, f"{interval_s}:{percent}:{chosen}")
        return chosen

    # -- decorations ---------------------------------------------------------------------------------------------

    def _decorate(self, queries: tuple[str, ...]) -> Thread[dict[str, str]]:
        """Every column of the first row of each query."""
        found: dict[str, str] = {}
        if self.flags.true("disable_decorators"):
            return found
        for sql in queries:
            result: QueryResult = yield Query(sql)
            if result.status:
                self.status(logs.WARNING, "decorators.cpp", f"Error running decorator: {result.message}")
            elif result.rows:
                found.update(result.rows[0])
        return found

    def _decorated(self) -> dict[str, str]:
        return {} if self.flags.true("disable_decorators") else self._decorations.all()

    # -- scheduler -----------------------------------------------------------------------------------------------

    def scheduler(self) -> Thread[None]:
        """SchedulerRunner: wakes at the seconds on which something is due instead of at each."""
        yield from self._run_at_startup()
        previous = int(self.now) - 1
        while True:
            second = int(self.now)
            if second > previous:
                yield from self._run_due(previous, second)
                previous = second
            pause_s = self._due_after(previous) - self.now
            woken = yield Sleep(max(0.0, pause_s), wake="schedule")
            if woken:  # what a new schedule would have run while it was not there yet is not due
                previous = max(previous, int(self.now) - 1)

    def _due_after(self, at: int) -> int:
        """The next second with work; an hour ahead when there is none (the schedule's change wakes us)."""
        due = [query.due_after(at) for _, query in self.config.queries()]
        if self.config.decorators.interval:
            due.append((at // 60 + 1) * 60)
        return min(due, default=at + 3600)

    def _run_at_startup(self) -> Thread[None]:
        urgent = [(p, q) for p, q in self.config.queries() if q.startup_priority is not None]
        for pack, query in sorted(urgent, key=lambda found: found[1].startup_priority or 0):
            if not self.is_denylisted(query) and (yield from self._pack_runs(pack)):
                yield from self._run_scheduled(query)

    def _run_due(self, previous: int, now: int) -> Thread[None]:
        for pack, query in list(self.config.queries()):
            if not query.due_between(previous, now) or self.is_denylisted(query):
                continue
            if (yield from self._pack_runs(pack)):
                yield from self._run_scheduled(query)
        due = {s: q for s, q in self.config.decorators.interval.items() if now // s > previous // s}
        for queries in due.values():
            self._decorations.interval.update((yield from self._decorate(queries)))

    def _pack_runs(self, pack: schedule.Pack) -> Thread[bool]:
        """Discovery: every query needs a row; the answer is kept for --pack_refresh_interval."""
        asked, active = self._discovery.get(pack.name, (float("-inf"), True))
        if pack.discovery and self.now - asked >= self.flags.integer("pack_refresh_interval"):
            active = True
            for sql in pack.discovery:
                result: QueryResult = yield Query(sql)
                active = active and not result.status and bool(result.typed_rows)
            self._discovery[pack.name] = (self.now, active)
        self.pack_active[pack.name] = active
        return active

    # -- denylist ------------------------------------------------------------------------------------------------

    def _restored_denylist(self) -> dict[str, int]:
        """What an earlier process left, and the query it died in, if the watchdog looks after this one (config.cpp)."""
        try:
            kept = json.loads(self.store.get(SETTINGS, _DENYLIST) or "{}")
        except ValueError:
            kept = {}
        found = {name: until for name, until in kept.items() if until > self.now}
        died_in = self.store.get(SETTINGS, _EXECUTING)
        if died_in and not self.flags.true("disable_watchdog"):
            self._event("denylisted", name=died_in)
            found[died_in] = int(self.now) + DENYLIST_S
        if found != kept:
            self.store.put(SETTINGS, _DENYLIST, messages.compact(found))
        if died_in:
            self.store.delete(SETTINGS, _EXECUTING)
        return found

    def is_denylisted(self, query: schedule.ScheduledQuery) -> bool:
        """Whether a process died in this query less than a day ago, and it is of the kind that is then skipped."""
        until = self.denylist.get(query.name, 0)
        if until <= self.now:
            return False
        reads_events = self.store.get(QUERIES, f"{query.name}events") == "1"
        return query.denylist and (not reads_events or self.flags.true("events_enforce_denylist"))

    def _run_scheduled(self, query: schedule.ScheduledQuery) -> Thread[None]:
        """One execution (scheduler.cpp, launchQuery)."""
        says = self.status if self.flags.true("schedule_lognames") else self._status_when_verbose
        says(logs.INFO, "scheduler.cpp", f"Executing scheduled query {query.name}: {query.query}")
        self._decorations.always = yield from self._decorate(self.config.decorators.always)
        self.store.put(SETTINGS, _EXECUTING, query.name)
        try:
            result: QueryResult = yield Query(query.query)
        finally:
            self.store.delete(SETTINGS, _EXECUTING)
        self._queries_run += 1
        if result.event_based:
            self.store.put(QUERIES, f"{query.name}events", "1")
        self._warn_of(result)
        if result.status:
            message = f"Error executing scheduled query {query.name}: {result.message}"
            self.status(logs.ERROR, "scheduler.cpp", message)
            return
        self._record(query.name, result)
        item = logs.Item(
            name=query.name,
            host_identifier=self.host_identifier,
            now=self.now,
            epoch=self.flags.integer("schedule_epoch"),
            decorations=self._decorated(),
            numerics=self.flags.true("logger_numerics"),
            decorations_top_level=self.flags.true("decorations_top_level"),
        )
        lines = self._lines(query, item, result)
        if lines and not query.snapshot:
            self.verbose("scheduler.cpp", f"Found results for query: {query.name}")
        for line in lines:
            self._log_result(line, snapshot=query.snapshot)
        self._event("scheduled", name=query.name, rows=len(result.typed_rows))

    def _lines(self, query: schedule.ScheduledQuery, item: logs.Item, result: QueryResult) -> list[str]:
        if query.snapshot:
            item = replace(item, snapshot=result.typed_rows)
            as_events = self.flags.true("logger_snapshot_event_type")
            return logs.event_lines(item) if as_events else [logs.snapshot_line(item)]
        rows = [{name: logs.escape(value) for name, value in row.items()} for row in result.typed_rows]
        change = self._differential(query, item.epoch, rows, result.event_based)
        if change is None:
            return []
        item = replace(
            item, counter=change.counter, added=change.added, removed=change.removed if query.removed else ()
        )
        batch = not self.flags.true("logger_event_type")
        if not item.added and not item.removed and not (batch and change.first):
            return []
        return [logs.batch_line(item)] if batch else logs.event_lines(item)

    def _differential(
        self, query: schedule.ScheduledQuery, epoch: int, rows: list[dict[str, SqlValue]], event_based: bool
    ) -> _Change | None:
        """The change since the last run, which is remembered; None when there is none (core/query.cpp).

        Counter 0 marks a full first result of an epoch; differences count up from there, events from 1.
        """
        name = query.name
        kept = self.store.get(QUERIES, name)
        first = kept is None or self.store.get(QUERIES, f"{name}epoch") != str(epoch)
        if kept is None:
            message = f"Storing initial results for new scheduled query: {name}"
            self.status(logs.INFO, "query.cpp", message)
        elif first:
            self.status(logs.INFO, "query.cpp", f"New Epoch {epoch} for scheduled query {name}")
        elif self.store.get(QUERIES, f"query.{name}") != query.query:
            self.status(logs.INFO, "query.cpp", f"Scheduled query has been updated: {name}")
        self.store.put(QUERIES, f"query.{name}", query.query)
        before = [] if first or event_based else json.loads(kept or "[]")
        removed, added = logs.diff(before, rows)
        if first or ((added or removed) and not event_based):
            self.store.put(QUERIES, name, "[]" if event_based else messages.compact(rows))
            self.store.put(QUERIES, f"{name}epoch", str(epoch))
        if not added and not removed and (event_based or not first):
            return None
        counter = (1 if event_based else 0) if first else int(self.store.get(QUERIES, f"{name}counter") or -1) + 1
        self.store.put(QUERIES, f"{name}counter", str(counter))
        return _Change(removed, added, counter, first)

    def _record(self, name: str, result: QueryResult) -> None:
        kept = self.performance.get(name)
        if kept is None:
            return
        stats = result.stats
        kept.executions += 1
        kept.last_executed = int(self.now)
        kept.output_size += sum(len(k) + len(v) for row in result.rows for k, v in row.items())
        kept.wall_time_ms += stats.wall_time_ms
        kept.user_time += stats.user_time
        kept.system_time += stats.system_time
        kept.memory += stats.memory
        kept.last_wall_time_ms, kept.last_memory = stats.wall_time_ms, stats.memory
        kept.last_user_time, kept.last_system_time = stats.user_time, stats.system_time

    def _warn_of(self, result: QueryResult) -> None:
        for warning in result.warnings:
            self.status(logs.WARNING, "virtual_table.cpp", warning)

    # -- log forwarder -------------------------------------------------------------------------------------------

    def log_forwarder(self) -> Thread[None]:
        """TLSLogForwarder: at start, then each period; each kind of log backs off by itself."""
        failures = {logs.RESULT: 0, logs.STATUS: 0}
        retry_at = {logs.RESULT: 0.0, logs.STATUS: 0.0}
        while True:
            period_s = max(1, self.flags.integer("logger_tls_period"))
            longest_s = self.flags.integer("logger_tls_backoff_max")
            # One scan for both kinds: results enough for a batch leave no room for statuses.
            batch = self.buffer.batch(self.flags.integer("logger_tls_max_lines"))
            for kind in (logs.RESULT, logs.STATUS):
                if self.now < retry_at[kind]:
                    continue
                sent = yield from self._flush(kind, batch[kind])
                failures[kind] = 0 if sent else failures[kind] + 1
                retry_at[kind] = self.now + min(period_s * failures[kind] ** 2, longest_s)
            yield Sleep(max(period_s, min(retry_at.values()) - self.now), wake="flush")

    def _flush(self, kind: str, lines: Mapping[str, str]) -> Thread[bool]:
        """Send lines of one kind; what is not acknowledged stays. A failure is said with --verbose only, as upstream:
        the line would itself be one to send.
        """
        if not lines:
            return True
        compress = self.flags.true("logger_tls_compress")
        build = messages.compressed_log_body if compress else messages.log_body

        def body(key: str) -> bytes:
            return build(lines.values(), kind, key)

        path = self.flags.text("logger_tls_endpoint") or self.endpoints.log
        reply = yield from self._exchange("log", path, body, compress=compress)
        if not reply.ok:
            self.verbose("buffered.cpp", f"Error sending {kind} to logger: {reply.message}")
            return False
        self.buffer.acknowledge(kind, list(lines))
        self._event("logged", kind=kind, lines=len(lines))
        return True

    # -- distributed ---------------------------------------------------------------------------------------------

    def distributed(self) -> Thread[None]:
        """DistributedRunner: read, run, write, pause."""
        while True:
            if not self.flags.true("disable_distributed"):
                yield from self._pull()
                yield from self._run_work()
                yield from self._write()
            yield Sleep(self._distributed_pause_s(), wake="distributed")

    def _distributed_pause_s(self) -> float:
        until = float(self.store.get(SETTINGS, "distributed_accelerate_checkins_expire") or 0)
        interval_s = max(1, self.flags.integer("distributed_interval"))
        return min(interval_s, ACCELERATED_INTERVAL_S) if self.now < until else interval_s

    def _pull(self) -> Thread[None]:
        if self.distributed_plugin != TLS:
            yield from self._pull_from_plugin()
            return
        attempts = self.flags.integer("distributed_tls_max_attempts")
        build = messages.node_body if not self.flags.true("tls_node_api") else lambda _key: b"{}"
        reply = yield from self.call("read", self.endpoints.read, build, attempts)
        if reply.ok:
            yield from self._accept(messages.read_work(reply.members))
        else:
            self.status(logs.WARNING, "distributed.cpp", f"Error getting distributed queries: {reply.message}")

    def _pull_from_plugin(self) -> Thread[None]:
        rows: list[dict[str, str]] | Failure = yield Call(
            "distributed", self.distributed_plugin, {"action": "getQueries"}
        )
        if isinstance(rows, Failure):
            self._event("call_failed", call="read", reason=rows.message)
            self.status(logs.WARNING, "distributed.cpp", f"Error getting distributed queries: {rows.message}")
            return
        members = messages.read_config_text(rows[0].get("results", "") or "{}") if rows else {}
        if members is None:
            self.status(logs.WARNING, "distributed.cpp", "Error parsing distributed queries: not a JSON object")
        else:
            yield from self._accept(messages.read_work(members))

    def _accept(self, work: messages.Work) -> Thread[None]:
        """Keep the queries whose discovery found a row; an SQL error in a discovery drops everything."""
        if work.refused:
            self.status(logs.WARNING, "distributed.cpp", work.refused)
            return
        hidden: set[str] = set()
        for name, sql in work.discovery.items():
            result: QueryResult = yield Query(sql)
            if result.status:
                message = "Distributed discovery query has an SQL error"
                self.status(logs.WARNING, "distributed.cpp", message)
                return
            if not result.typed_rows:
                hidden.add(name)
        for name, sql in work.queries.items():
            if name not in hidden:
                self.store.put(WORK, name, sql)
        if work.warning:
            self.status(logs.WARNING, "distributed.cpp", work.warning)
        if work.accelerate_s is not None:
            message = f"Accelerating distributed query checkins for {work.accelerate_s} seconds"
            self.status(logs.INFO, "distributed.cpp", message)
            until = str(int(self.now) + work.accelerate_s)
            self.store.put(SETTINGS, "distributed_accelerate_checkins_expire", until)

    def _run_work(self) -> Thread[None]:
        """Run what was kept, in the byte order of the names."""
        for name, sql in sorted(self.store.scan(WORK), key=lambda found: found[0].encode()):
            self.store.delete(WORK, name)
            if self._denylisted(sql):
                self._answers.append(Answer(name, "[]", 1, "distributed query is denylisted", "{}"))
                continue
            says = self.status if self.flags.true("distributed_loginfo") else self._status_when_verbose
            says(logs.INFO, "distributed.cpp", f"Executing distributed query: {name}: {sql}")
            running = _sha256(sql)
            self.store.put(RUNNING, running, str(int(self.now)))
            try:
                result: QueryResult = yield Query(sql)
            except GeneratorExit:
                # A stop, not a crash: the query is innocent and runs after the restart.
                self.store.put(WORK, name, sql)
                raise
            finally:
                self.store.delete(RUNNING, running)
            self._answer(name, result)

    def _denylisted(self, sql: str) -> bool:
        """Whether the process died the last time this query ran, not too long ago."""
        started = self.store.get(RUNNING, _sha256(sql))
        return started is not None and self.now - float(started) < self.flags.integer("distributed_denylist_duration")

    def _answer(self, name: str, result: QueryResult) -> None:
        self._queries_run += 1
        self._warn_of(result)
        if result.status:
            message = f"Error executing distributed query: {name}: {result.message}"
            self.status(logs.ERROR, "distributed.cpp", message)
        s = result.stats
        stats = {
            "wall_time_ms": s.wall_time_ms,
            "user_time": s.user_time,
            "system_time": s.system_time,
            "memory": s.memory,
        }
        rows, stats_json = messages.compact(result.rows), messages.compact(stats)
        self._answers.append(Answer(name, rows, result.status, result.message, stats_json))
        self._event("distributed", name=name, rows=len(result.rows), status=result.status)
        self._drop_old_answers()

    def _drop_old_answers(self) -> None:
        """Answers that cannot be delivered are bounded here, where upstream keeps them all."""
        while len(self._answers) > 1 and sum(len(a.rows) for a in self._answers) > MAX_UNSENT_ANSWER_BYTES:
            dropped = self._answers.pop(0)
            message = f"Dropped the undelivered result of distributed query {dropped.name}"
            self.status(logs.WARNING, "distributed.cpp", message)

    def _write(self) -> Thread[None]:
        """Send every answer; what fails is kept in memory and sent again next round."""
        if not self._answers:
            return
        answers = list(self._answers)
        attempts = self.flags.integer("distributed_tls_max_attempts")

        keyed = not self.flags.true("tls_node_api")

        def body(key: str) -> bytes:
            return messages.write_body(answers, key if keyed else None)

        if self.distributed_plugin == TLS:
            reply = yield from self.call("write", self.endpoints.write, body, attempts)
        else:
            reply = yield from self._write_to_plugin(messages.write_body(answers, None).decode())
        if reply.ok:
            self._answers = self._answers[len(answers) :]
            self._event("written", queries=[answer.name for answer in answers])
        else:
            self.status(logs.WARNING, "distributed.cpp", f"Error writing distributed results: {reply.message}")

    def _write_to_plugin(self, results: str) -> Thread[Reply]:
        request = {"action": "writeResults", "results": results}
        outcome = yield Call("distributed", self.distributed_plugin, request)
        return Reply(False, outcome.message) if isinstance(outcome, Failure) else Reply(True)


@dataclass(frozen=True, slots=True)
class _Change:
    removed: list[Mapping[str, SqlValue]]
    added: list[Mapping[str, SqlValue]]
    counter: int
    first: bool


def _reply(outcome: bytes | Failure) -> Reply:
    if isinstance(outcome, Failure):
        return Reply(False, outcome.message)
    return messages.read_reply(outcome)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def config_source_hash(members: Mapping[str, Any]) -> str:
    """SHA-1 of the compact text in the order received: config change detection."""
    return hashlib.sha1(messages.encode(members), usedforsecurity=False).hexdigest()


def combined_config_hash(source_hashes: list[str]) -> str:
    """``osquery_info.config_hash``: SHA-1 of the sources' hashes, joined."""
    return hashlib.sha1("".join(source_hashes).encode(), usedforsecurity=False).hexdigest()
