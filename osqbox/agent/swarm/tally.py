"""What a swarm counts: calls, their durations, errors by kind, and how all that went over time. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from osqbox.agent.swarm.histogram import Histogram

HELD = "held"
"""Distributed reads that a server kept open for a second or more: their duration is its choice."""
MAX_KINDS = 50
MAX_KIND_LETTERS = 160
MAX_BINS = 600
_OTHER = "other"


class Window:
    """Requests, errors and durations since somebody began to look."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.latency: defaultdict[str, Histogram] = defaultdict(Histogram)

    def metrics(self) -> dict[str, float]:
        """By the names thresholds use: ``errors`` is the share of requests, ``p95`` the worst call's, held aside."""
        found: dict[str, float] = {"errors": self.errors / max(1, self.requests)}
        for call, histogram in self.latency.items():
            for name, value_ms in histogram.percentiles_ms().items():
                found[f"{call}.{name}"] = value_ms
                if call != HELD:
                    found[name] = max(value_ms, found.get(name, 0.0))
        return found


@dataclass(slots=True)
class Bin:
    """A stretch of time: ``requests`` and ``errors`` in it, ``agents`` at its end."""

    requests: int = 0
    errors: int = 0
    agents: int = 0


class Series:
    """Bins of one second, of two when there are too many, and so on: any duration in bounded room."""

    def __init__(self) -> None:
        self.bin_s = 1
        self.bins: list[Bin] = []

    def at(self, elapsed_s: float) -> Bin:
        while elapsed_s >= self.bin_s * MAX_BINS:
            self._halve()
        number = max(0, int(elapsed_s / self.bin_s))
        while len(self.bins) <= number:
            self.bins.append(Bin(agents=self.bins[-1].agents if self.bins else 0))
        return self.bins[number]

    def _halve(self) -> None:
        pairs = zip(self.bins[::2], [*self.bins[1::2], Bin()], strict=False)
        self.bins = [
            Bin(first.requests + second.requests, first.errors + second.errors, max(first.agents, second.agents))
            for first, second in pairs
        ]
        self.bin_s *= 2


@dataclass(slots=True)
class Tally:
    """Everything a run has counted so far."""

    agents: int = 0
    enrolled: int = 0
    """Agents with a node key."""
    enrollments: int = 0
    node_invalid: int = 0
    answers: int = 0
    """Distributed queries answered."""
    log_lines: int = 0
    """Log lines acknowledged."""
    shells: int = 0
    """Remote shells opened."""
    connections: int = 0
    """TLS connections opened."""
    total: Window = field(default_factory=Window)
    window: Window = field(default_factory=Window)
    """The same since `begin_window`."""
    kinds: Counter[str] = field(default_factory=Counter)
    series: Series = field(default_factory=Series)

    def begin_window(self) -> Window:
        """Start a new window; returns the one that ends."""
        ended, self.window = self.window, Window()
        return ended

    def request(self, call: str, took_s: float, elapsed_s: float) -> None:
        """One exchange that is over, whatever came of it."""
        for window in (self.total, self.window):
            window.requests += 1
            window.latency[call].record(took_s)
        self.series.at(elapsed_s).requests += 1

    def error(self, call: str, reason: str, elapsed_s: float) -> None:
        """``reason`` comes from a server or the network: bounded here, escaped wherever it is shown."""
        for window in (self.total, self.window):
            window.errors += 1
        self.series.at(elapsed_s).errors += 1
        kind = f"{call}: {reason}"[:MAX_KIND_LETTERS]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < MAX_KINDS else _OTHER] += 1

    def metrics(self, elapsed_s: float) -> dict[str, float]:
        """Everything a threshold may ask about but the cost."""
        return {
            **self.total.metrics(),
            "agents": self.agents,
            "enrolled": self.enrolled,
            "requests": self.total.requests,
            "requests_per_s": self.total.requests / max(elapsed_s, 1e-9),
        }


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """What thresholds are judged by, from a finished report."""
    found: dict[str, float] = {
        name: value for name, value in report.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    found["errors"] = report["errors"] / max(1, report["requests"])
    for call, values in report["latency_ms"].items():
        for name, value_ms in values.items():
            found[f"{call}.{name}"] = value_ms
            if call != HELD:
                found[name] = max(value_ms, found.get(name, 0.0))
    return found


@dataclass(frozen=True, slots=True)
class Cost:
    """What the swarm's own process took."""

    rss_bytes: int
    rss_before_bytes: int
    """Before the first agent."""
    cpu_s: float
    duration_s: float

    def per_agent_bytes(self, agents: int) -> int:
        return max(0, self.rss_bytes - self.rss_before_bytes) // max(1, agents)


def report(tally: Tally, cost: Cost, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON report; ``facts`` are added at its end."""
    latency = {call: histogram.percentiles_ms() for call, histogram in sorted(tally.total.latency.items())}
    return {
        "agents": tally.agents,
        "enrolled": tally.enrolled,
        "requests": tally.total.requests,
        "errors": tally.total.errors,
        "requests_per_s": round(tally.total.requests / max(cost.duration_s, 1e-9), 3),
        "latency_ms": latency,
        "rss_bytes": cost.rss_bytes,
        "rss_bytes_per_agent": cost.per_agent_bytes(tally.agents),
        "cpu_s": round(cost.cpu_s, 3),
        "duration_s": round(cost.duration_s, 3),
        "calls": {call: histogram.count for call, histogram in sorted(tally.total.latency.items())},
        "errors_by_kind": dict(tally.kinds.most_common()),
        "enrollments": tally.enrollments,
        "node_invalid": tally.node_invalid,
        "answers": tally.answers,
        "log_lines": tally.log_lines,
        **({"shells": tally.shells} if tally.shells else {}),
        "connections": tally.connections,
        "series": {
            "bin_s": tally.series.bin_s,
            "requests": [each.requests for each in tally.series.bins],
            "errors": [each.errors for each in tally.series.bins],
            "agents": [each.agents for each in tally.series.bins],
        },
        **facts,
    }
