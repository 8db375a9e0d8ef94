"""The box in numbers, in Prometheus' text format."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import trio
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from osqbox import __version__, feed, store
from osqbox.certs.expiry import DAY_S, Expiry, expiries
from osqbox.jobs.messages import State
from osqbox.osquery import campaigns, logs, nodes
from osqbox.osquery.nodes import Selector
from osqbox.shells.messages import BrokerStatistics

from .operations import operation
from .parts import Comms, Jobs, Parts, Timing

TEXT = "text/plain; version=0.0.4; charset=utf-8"
STATUSES = ("active", "pending", "rejected")

FORWARD_METRICS: tuple[tuple[str, Literal["counter", "gauge"], str], ...] = (
    ("up", "gauge", "1 while a sink takes records."),
    ("waiting", "gauge", "Records that a sink has not confirmed."),
    ("lag_s", "gauge", "Age of the oldest of them in seconds."),
    ("forwarded_total", "counter", "Records a sink has confirmed."),
    ("dropped_total", "counter", "Records removed by retention before they were confirmed."),
    ("set_aside_total", "counter", "Records a sink refused for what they are."),
)

Labels = Mapping[str, str]


class Metric(NamedTuple):
    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: Iterable[tuple[Labels, float]]


class _Stored(NamedTuple):
    """What the database knows."""

    nodes: Counter[str]
    drops: dict[str, int]
    last_seq: int
    open_campaigns: int
    log_lines: int


def add(app: QuartTrio, parts: Parts) -> None:
    @app.get("/metrics")
    @operation(str, media="text/plain")
    async def metrics() -> TrioResponse:
        """Everything counted, for Prometheus."""
        stored = await parts.store.read(_read)
        info = parts.info()
        metrics = [*_of_box(parts, stored), *_of_listeners(info), *_of_forwarding(info)]
        if parts.jobs is not None:
            metrics += _of_jobs(parts.jobs, await parts.store.read(_job_states))
        if parts.shells is not None:
            metrics += _of_shells(parts.shells.statistics())
        if parts.comms is not None:
            metrics += _of_comms(parts.comms)
        if parts.identity is not None:
            metrics += _of_certificates(await trio.to_thread.run_sync(expiries, parts.identity), parts.clock.now())
        return TrioResponse(render(metrics), content_type=TEXT)


def _read(db: sqlite3.Connection) -> _Stored:
    return _Stored(
        Counter(node.status for node in nodes.select(db, Selector())),
        store.drops(db),
        feed.bounds(db)[1],
        campaigns.count_open(db),
        logs.last_seq(db),
    )


def render(metrics: Iterable[Metric]) -> str:
    return "".join(
        f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"
        + "".join(f"{metric.name}{_braced(labels)} {value:.15g}\n" for labels, value in metric.samples)
        for metric in metrics
    )


def _braced(labels: Labels) -> str:
    quoted = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(quoted)}}}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _one(value: float) -> list[tuple[Labels, float]]:
    return [({}, value)]


def _by(label: str, counts: Mapping[str, float]) -> list[tuple[Labels, float]]:
    return [({label: word}, counts[word]) for word in sorted(counts)]


def _of_box(parts: Parts, stored: _Stored) -> Iterator[Metric]:
    import psutil

    saved, heard, present = parts.store.statistics(), parts.feed.statistics(), parts.presence.statistics()
    by_status = {status: stored.nodes[status] for status in STATUSES}
    yield Metric("osqbox_info", "gauge", "The program.", [({"version": __version__}, 1)])
    yield Metric("osqbox_ready", "gauge", "1 while agents and operators are served.", _one(parts.ready()))
    yield Metric(
        "process_resident_memory_bytes", "gauge", "Memory of the process.", _one(psutil.Process().memory_info().rss)
    )
    yield Metric("osqbox_nodes", "gauge", "Enrolled nodes.", _by("status", by_status))
    yield Metric("osqbox_nodes_seen", "gauge", "Nodes heard of.", _one(present.nodes_seen))
    yield Metric("osqbox_held_reads", "gauge", "Distributed reads held open.", _one(present.reads_held))
    yield Metric("osqbox_requests_total", "counter", "Requests of agents.", _by("operation", parts.osquery.requests))
    yield Metric("osqbox_refused_total", "counter", "Requests of agents refused.", _by("reason", parts.osquery.refused))
    yield Metric("osqbox_open_campaigns", "gauge", "Campaigns that wait for answers.", _one(stored.open_campaigns))
    yield Metric("osqbox_log_lines_total", "counter", "Log lines stored.", _one(stored.log_lines))
    yield Metric("osqbox_dropped_total", "counter", "Removed by retention.", _by("kind", stored.drops))
    yield Metric("osqbox_store_commits_total", "counter", "Transactions committed.", _one(saved.commits))
    yield Metric("osqbox_store_jobs_total", "counter", "Jobs in these transactions.", _one(saved.jobs))
    yield Metric("osqbox_store_queued_jobs", "gauge", "Jobs waiting for the writer.", _one(saved.queued_jobs))
    yield Metric("osqbox_store_queued_bytes", "gauge", "Bytes in these jobs.", _one(saved.queued_bytes))
    yield Metric("osqbox_store_file_bytes", "gauge", "Size of the database file.", _one(saved.file_bytes))
    yield Metric("osqbox_feed_events_total", "counter", "Events in the feed.", _one(stored.last_seq))
    yield Metric("osqbox_feed_followers", "gauge", "Streams that follow the feed.", _one(heard.followers))
    yield Metric(
        "osqbox_feed_skipped_total", "counter", "Events that slow followers had to read again.", _one(heard.skipped)
    )


def _of_forwarding(info: dict[str, Any]) -> Iterator[Metric]:
    sinks = info["statistics"].get("forwarding")
    for name, kind, text in FORWARD_METRICS if sinks else ():
        yield Metric(f"osqbox_forward_{name}", kind, text, [({"sink": s["sink"]}, s[name.removesuffix("_total")])
                                                            for s in sinks])  # fmt: skip


def _job_states(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())


def _of_shells(counted: BrokerStatistics) -> Iterator[Metric]:
    yield Metric("osqbox_shells", "gauge", "Shell sessions that have not ended.", _by("state", counted.sessions))
    yield Metric("osqbox_shell_viewers", "gauge", "Operators in shells.", _one(counted.viewers))
    yield Metric("osqbox_shell_output_bytes_total", "counter", "Output of shells.", _one(counted.output_bytes))
    yield Metric("osqbox_shell_input_bytes_total", "counter", "Input to shells.", _one(counted.input_bytes))
    yield Metric("osqbox_shells_refused_total", "counter", "Joins and calls refused.", _by("reason", counted.refused))


def _of_jobs(jobs: Jobs, states: Mapping[str, int]) -> Iterator[Metric]:
    counted = jobs.statistics()
    by_state = {state.value: states.get(state.value, 0) for state in State}
    yield Metric("osqbox_jobs_running", "gauge", "Jobs that have not ended.", _one(counted.running))
    yield Metric("osqbox_jobs", "gauge", "Jobs that are kept.", _by("state", by_state))
    yield Metric("osqbox_job_followers", "gauge", "Readers of jobs' output.", _one(counted.followers))
    yield Metric("osqbox_jobs_started_total", "counter", "Jobs started.", _one(counted.started))
    yield Metric("osqbox_jobs_ended_total", "counter", "Jobs ended.", _one(counted.ended))
    yield Metric("osqbox_jobs_refused_total", "counter", "Calls refused.", _by("reason", counted.refused))
    yield Metric("osqbox_jobs_removed_total", "counter", "Jobs removed by retention.", _one(counted.removed))
    yield Metric("osqbox_job_log_bytes", "gauge", "Output kept on disk.", _one(counted.log_bytes))


def _of_comms(comms: Comms) -> Iterator[Metric]:
    taken, seats, requests = comms.intake.statistics(), comms.hub.statistics(), comms.api.timings
    answers = [
        ({"operation": what, "status": str(status)}, count)
        for what, timing in sorted(requests.items())
        for status, count in sorted(timing.by_status.items())
    ]
    yield Metric("osqbox_comms_requests_total", "counter", "Requests of comms agents answered.", answers)
    for name, kind, text, of in _COMMS_TIMES:
        yield Metric(name, kind, text, _by("operation", {what: of(timing) for what, timing in requests.items()}))
    yield Metric("osqbox_comms_refused_total", "counter", "Requests refused.", _by("reason", comms.api.refused))
    for word in ("accepted", "delivered", "dropped"):
        name = f"osqbox_comms_events_{word}_total"
        yield Metric(name, "counter", f"Stateless events {word}.", _one(getattr(taken, word)))
    yield Metric("osqbox_comms_events_waiting", "gauge", "Stateless events queued.", _one(taken.waiting))
    yield Metric("osqbox_comms_events_refused_total", "counter", "Requests that found it full.", _one(taken.refused))
    by_kind = {"stream": seats.streams, "poll": seats.polls}
    yield Metric("osqbox_comms_listeners", "gauge", "Agents that wait for commands.", _by("kind", by_kind))
    yield Metric("osqbox_comms_wakes_total", "counter", "Waiting agents woken.", _one(seats.wakes))
    yield Metric("osqbox_comms_commands_sent_total", "counter", "Commands written.", _one(seats.delivered))
    yield Metric(
        "osqbox_comms_commands_resent_total", "counter", "Of them, not the first time.", _one(seats.redelivered)
    )
    yield Metric("osqbox_comms_streams_ended_total", "counter", "Streams and polls ended.", _by("reason", seats.ended))
    yield Metric(
        "osqbox_comms_indexer_up", "gauge", "1 while the indexer answers.", _one(comms.indexer.statistics()["up"])
    )
    yield Metric(
        "osqbox_comms_upgrade_bytes_total", "counter", "Bytes of upgrades sent.", _one(comms.upgrades.sent_bytes)
    )


_COMMS_TIMES: tuple[tuple[str, Literal["counter", "gauge"], str, Callable[[Timing], float]], ...] = (
    ("osqbox_comms_request_seconds_total", "counter", "Time until answers began.", lambda timing: timing.total_s),
    ("osqbox_comms_request_seconds_max", "gauge", "The longest of them.", lambda timing: timing.max_s),
)


def _of_certificates(certificates: Iterable[Expiry], now: float) -> Iterator[Metric]:
    days = [
        ({"kind": each.kind, "name": each.name, "serial": each.serial}, (each.not_after - now) / DAY_S)
        for each in certificates
    ]
    text = "Days until a certificate ends; negative once it has."
    yield Metric("osqbox_certificate_expiry_days", "gauge", text, days)


_COUNTS: tuple[tuple[str, Literal["counter", "gauge"], str], ...] = (
    ("open_connections", "gauge", "Connections open."),
    ("accepted", "counter", "Connections accepted."),
    ("requests", "counter", "Requests."),
    ("dropped", "counter", "Requests whose connection was dropped instead of an answer."),
    ("errors", "counter", "Connections or handlers that ended in an exception."),
)
_REASONS = (
    ("handshake_failures", "TLS handshakes that failed."),
    ("refused", "Connections and requests refused by the listener."),
)


def _of_listeners(info: Mapping[str, Any]) -> Iterator[Metric]:
    """The listeners among the statistics, by name."""
    statistics = msgspec.to_builtins(info.get("statistics", {}))
    listeners = {name: facts for name, facts in statistics.items() if "open_connections" in facts}
    for field, kind, text in _COUNTS:
        name = f"osqbox_listener_{field}" + ("_total" if kind == "counter" else "")
        yield Metric(name, kind, text, _by("listener", {each: facts[field] for each, facts in listeners.items()}))
    for field, text in _REASONS:
        counted = [
            ({"listener": each, "reason": reason}, count)
            for each, facts in sorted(listeners.items())
            for reason, count in sorted(facts[field].items())
        ]
        yield Metric(f"osqbox_listener_{field}_total", "counter", text, counted)
