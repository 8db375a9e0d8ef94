"""osqueryd's client side without I/O: who says what to the server, when, and what the answers change.

`Core` is the state all of an agent's threads share. Each osqueryd thread is a generator of it: it yields a command
(`Send`, `Sleep`, `Query`, `HostDetails`) and is resumed with the outcome, so it reads like the thread it stands for,
yet one driver may run it in a Trio task, another thousands of them from one heap, and a test by hand. The driver
sets ``core.now`` before each resumption; clocks, randomness and identifiers come from outside.

Upstream: osquery/{remote/enroll/enroll,remote/utility,config/config,dispatcher/*,distributed/distributed}.cpp and
plugins/{remote/enroll,config,logger,distributed}/tls_*.cpp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from osqbox.agent import logs, messages, schedule
from osqbox.agent.flags import Flags
from osqbox.agent.functions import SqlValue
from osqbox.agent.messages import Answer, Endpoints, Reply
from osqbox.agent.sql import QueryResult
from osqbox.agent.store import Store
from osqbox.errors import BadSetup

MAX_UNSENT_ANSWER_BYTES = 64 * 1024 * 1024
ACCELERATED_INTERVAL_S = 5
_ENROLL_POLL_S = 1.0

# Domains of the store.
SETTINGS, QUERIES, WORK, RUNNING = "configurations", "queries", "distributed", "distributed_running"


# -- what a thread yields, and what it gets back -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """POST ``body`` to ``path``; the outcome is the reply's body, or a `Failure`."""

    call: str
    """``enroll``, ``config``, ``log``, ``read``, ``write``, ``carve_start`` or ``carve_block``."""
    path: str
    body: bytes
    node_key: str = ""
    """For the Authorization header; empty is no header."""
    compress: bool = False


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


Command = Send | Sleep | Query | HostDetails | Any
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


class Core:
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
        self.performance: Mapping[str, Performance] = {}
        self.pack_active: dict[str, bool] = {}
        self.buffer = logs.Buffer(store)
        self.wakes: list[str] = []
        """Names of things that happened; the driver wakes those who sleep on them, and clears the list."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        """For whoever watches; the driver passes them on, and clears the list."""
        self._enroll_secret = enroll_secret
        self._rng = rng
        self._source_hash = ""
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
            lines_dropped=self.buffer.dropped,
        )

    # -- saying things about itself ------------------------------------------------------------------------------

    def status(self, severity: int, filename: str, message: str) -> None:
        """Log a line about the agent itself. Source lines of upstream are not imitated: the number is 0."""
        self._event("status", severity=severity, message=message)
        if self.flags.true("tls_disable_status_log") or severity < self.flags.integer("logger_min_status"):
            return
        line = logs.status_line(
            logs.Status(severity, filename, 0, message),
            host_identifier=self.host_identifier,
            now=self.now,
            decorations=self._decorated(),
        )
        self._log(logs.STATUS, line)

    def _log(self, kind: str, line: str) -> None:
        limit = self.flags.integer("logger_tls_max_linesize")
        if len(line.encode("utf-8", "replace")) > limit:
            self._event("line_dropped", kind=kind)
            if kind == logs.RESULT:
                self.status(logs.WARNING, "tls_logger.cpp", f"Linesize exceeds TLS logger maximum: {limit}")
            return
        self.buffer.add(kind, line, self.now, self.flags.integer("buffered_log_max"))

    def _event(self, kind: str, /, **details: Any) -> None:
        self.events.append((kind, details))

    def _wake(self, name: str) -> None:
        self.wakes.append(name)

    # -- enrollment ----------------------------------------------------------------------------------------------

    def enroll(self) -> Thread[None]:
        """What the first thread does before all others. Raises EnrollmentFailed."""
        key = yield from self._node_key()
        if not key:
            raise EnrollmentFailed(self.uri(self.endpoints.enroll), self._refusal)

    def first_config(self) -> Thread[None]:
        """What it does then; without a config the agent runs on."""
        yield from self.fetch_config()

    def _node_key(self) -> Thread[str]:
        """The key; without one, this caller enrolls, one at a time, and may come back with nothing."""
        while not self.node_key and self._enrolling:
            yield Sleep(_ENROLL_POLL_S, wake="enrolled")
        if not self.node_key:
            self._enrolling = True
            try:
                yield from self._enroll()
            finally:
                self._enrolling = False
                self._wake("enrolled")
        return self.node_key

    def _enroll(self) -> Thread[None]:
        attempts, longest_s = (
            self.flags.integer("tls_enroll_max_attempts"),
            self.flags.integer("tls_enroll_max_interval"),
        )
        attempt = 0
        while True:
            attempt += 1
            details = yield HostDetails()
            body = messages.enroll_body(
                self._enroll_secret(),
                self.host_identifier,
                details,
                secret_name=self.flags.text("tls_enroll_override"),
            )
            outcome = yield Send("enroll", self.endpoints.enroll, body)
            key = "" if isinstance(outcome, Failure) else messages.enrolled_key(outcome)
            if key:
                self._keep_key(key)
                return
            reason = _reply(outcome).message or "No node key returned from TLS enroll plugin"
            self._refusal = reason
            uri = self.uri(self.endpoints.enroll)
            self._event("enroll_failed", uri=uri, reason=reason, attempt=attempt)
            message = f"Failed enrollment request to {uri} ({reason}) retrying..."
            self.status(logs.WARNING, "enroll.cpp", message)
            if attempts and attempt >= attempts:
                return
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

    def call(self, call: str, path: str, body: Callable[[str], bytes], attempts: int) -> Thread[Reply]:
        """One call with its retries, 1, 4, 9... seconds apart (utility.h, TLSRequestHelper::go)."""
        attempt = 0
        while True:
            attempt += 1
            key = yield from self._node_key()
            outcome = yield Send(call, path, body(key), key)
            reply = self._read(call, outcome, key)
            if reply.ok or attempt >= attempts:
                return reply
            yield Sleep(attempt**2)

    def _read(self, call: str, outcome: bytes | Failure, key: str) -> Reply:
        reply = _reply(outcome)
        if reply.node_invalid:
            self._forget_key(key)
        if not reply.ok:
            self._event("call_failed", call=call, reason=reply.message)
        return reply

    # -- config --------------------------------------------------------------------------------------------------

    def config_refresh(self) -> Thread[None]:
        """ConfigRefreshRunner: the first refresh after one interval; sooner after a failure."""
        interval_s = self.flags.integer("config_refresh")
        pause_s = interval_s
        while interval_s > 0:
            yield Sleep(pause_s, wake="config")
            fetched = yield from self.fetch_config()
            pause_s = interval_s if fetched else self.flags.integer("config_accelerated_refresh")

    def fetch_config(self) -> Thread[bool]:
        """Ask for the config and apply it; on failure the old one stays."""
        attempts = self.flags.integer("config_tls_max_attempts")
        reply = yield from self.call("config", self.endpoints.config, messages.node_body, attempts)
        if not reply.ok:
            self.status(logs.WARNING, "config.cpp", f"Error getting config: {reply.message}")
            return False
        yield from self._apply_config(reply.members)
        return True

    def _apply_config(self, members: Mapping[str, Any]) -> Thread[None]:
        source_hash = config_source_hash(members)
        self.config_valid = True
        if source_hash == self._source_hash:
            return
        self._source_hash = source_hash
        self.config_hash = combined_config_hash([source_hash])
        warnings: list[str] = []
        options = members.get("options")
        for name, value in options.items() if isinstance(options, dict) else ():
            warning = self.flags.set_option(name, value)
            if warning:
                warnings.append(warning)
        self.config = schedule.read_config(members, self._rules(), warnings.append)
        self._discovery.clear()
        self._decorations = _Decorations()
        for warning in warnings[:100]:
            self.status(logs.WARNING, "config.cpp", warning)
        queries = [query.name for _, query in self.config.queries()]
        self.performance = {name: self.performance.get(name, Performance()) for name in queries}
        self._event("config", hash=self.config_hash, queries=len(queries))
        self._decorations.load = yield from self._decorate(self.config.decorators.load)
        self._wake("schedule")

    def _rules(self) -> schedule.Rules:
        return schedule.Rules(
            hostname=self.host_identifier,
            delimiter=self.flags.text("pack_delimiter"),
            default_interval_s=self.flags.integer("schedule_default_interval"),
            splay=self._splayed,
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
            if (yield from self._pack_runs(pack)):
                yield from self._run_scheduled(query)

    def _run_due(self, previous: int, now: int) -> Thread[None]:
        for pack, query in list(self.config.queries()):
            if query.due_between(previous, now) and (yield from self._pack_runs(pack)):
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

    def _run_scheduled(self, query: schedule.ScheduledQuery) -> Thread[None]:
        """One execution (scheduler.cpp, launchQuery)."""
        self._decorations.always = yield from self._decorate(self.config.decorators.always)
        result: QueryResult = yield Query(query.query)
        self._queries_run += 1
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
        for line in self._lines(query, item, result):
            self._log(logs.RESULT, line)
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
            for kind in (logs.RESULT, logs.STATUS):
                if self.now < retry_at[kind]:
                    continue
                sent = yield from self._flush(kind)
                failures[kind] = 0 if sent else failures[kind] + 1
                retry_at[kind] = self.now + min(period_s * failures[kind] ** 2, longest_s)
            yield Sleep(max(period_s, min(retry_at.values()) - self.now), wake="flush")

    def _flush(self, kind: str) -> Thread[bool]:
        """Send the next lines of one kind; what is not acknowledged stays."""
        lines = self.buffer.batch(self.flags.integer("logger_tls_max_lines"))[kind]
        if not lines:
            return True
        compress = self.flags.true("logger_tls_compress")
        key = yield from self._node_key()
        build = messages.compressed_log_body if compress else messages.log_body
        body = build(lines.values(), kind, key)
        outcome = yield Send("log", self.endpoints.log, body, key, compress=compress)
        reply = self._read("log", outcome, key)
        if reply.ok:
            self.buffer.acknowledge(kind, list(lines))
            self._event("logged", kind=kind, lines=len(lines))
        return reply.ok

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
        attempts = self.flags.integer("distributed_tls_max_attempts")
        reply = yield from self.call("read", self.endpoints.read, messages.node_body, attempts)
        if reply.ok:
            yield from self._accept(messages.read_work(reply.members))

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

        def body(key: str) -> bytes:
            return messages.write_body(answers, key)

        reply = yield from self.call("write", self.endpoints.write, body, attempts)
        if reply.ok:
            self._answers = self._answers[len(answers) :]
            self._event("written", queries=[answer.name for answer in answers])


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
