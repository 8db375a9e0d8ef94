"""The pure parts of the swarm: histogram, plan, tally, page."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent.messages import Endpoints
from osqbox.agent.profile.dice import Dice
from osqbox.agent.swarm import plan
from osqbox.agent.swarm.histogram import RELATIVE_ERROR, Histogram
from osqbox.agent.swarm.page import page
from osqbox.agent.swarm.tally import HELD, MAX_BINS, MAX_KINDS, Cost, Series, Tally, metrics_of, report
from osqbox.errors import BadUsage, Unsafe

# -- histogram ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 60_000), min_size=1, max_size=300), st.floats(0, 1))
def test_quantiles_are_those_of_the_values(values: list[float], share: float) -> None:
    """By nearest rank, within the promised error."""
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    exact_ms = sorted(values)[max(1, math.ceil(share * len(values))) - 1] * 1000
    assert histogram.quantile_ms(share) == pytest.approx(exact_ms, rel=RELATIVE_ERROR, abs=0.001)


@given(st.lists(st.floats(0, 1000), max_size=50), st.lists(st.floats(0, 1000), max_size=50))
def test_histograms_add_up(first: list[float], second: list[float]) -> None:
    both, one, other = Histogram(), Histogram(), Histogram()
    for histogram, values in ((both, first + second), (one, first), (other, second)):
        for value in values:
            histogram.record(value)
    one.add(other)
    assert one.count == both.count
    assert one.percentiles_ms() == both.percentiles_ms()


def test_a_histogram_stays_small() -> None:
    """From a microsecond to a week, and what is out of range."""
    histogram = Histogram()
    for power in range(60_000):
        histogram.record(1e-6 * 1.0005**power)
    histogram.record(-1)
    assert histogram.count == 60_001
    assert len(histogram._buckets) < 2_000
    assert histogram.quantile_ms(1) == (1 << 36) / 1000
    assert histogram.quantile_ms(0) == 0
    assert Histogram().percentiles_ms() == {"p50": 0, "p95": 0, "p99": 0}


# -- plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "prefix", "enroll", "read", "log"),
    [
        ("osqbox", "", "/api/v1/osquery/enroll", "/api/v1/osquery/distributed/read", "/api/v1/osquery/log"),
        ("fleet", "", "/api/osquery/enroll", "/api/osquery/distributed/read", "/api/osquery/log"),
        ("osctrl", "/env", "/env/enroll", "/env/read", "/env/log"),
        ("zentral", "", "/public/osquery/enroll", "/public/osquery/distributed/read", "/public/osquery/log"),
        ("testserver", "", "/enroll", "/distributed_read", "/log"),
        ("queryops", "", "/osquery/enroll", "/osquery/distributed_read", "/osquery/logger"),
    ],
)
def test_dialects(dialect: str, prefix: str, enroll: str, read: str, log: str) -> None:
    found = plan.endpoints(dialect, prefix, {})
    assert (found.enroll, found.read, found.log) == (enroll, read, log)


def test_every_dialect_has_a_path_for_every_call() -> None:
    for name in plan.dialects():
        paths = [getattr(plan.endpoints(name, "", {}), call) for call in Endpoints.__slots__]
        assert len(set(paths)) == (1 if name == "launcher" else len(paths)), name


def test_a_path_may_be_given_by_itself() -> None:
    found = plan.endpoints("fleet", "/x", {"log": "/elsewhere/log", "read": None})
    assert (found.log, found.read) == ("/elsewhere/log", "/x/api/osquery/distributed/read")
    for path in ("log", "/a b", "/a\r\nX: y"):
        with pytest.raises(BadUsage, match="to start with /"):
            plan.endpoints("fleet", "", {"log": path})
    with pytest.raises(BadUsage, match="zentral"):
        plan.endpoints("klingon", "", {})


def test_only_this_machine_without_leave() -> None:
    for url in ("https://localhost:8443", "https://127.0.0.1:8443", "localhost:8443", "https://[::1]:8443"):
        assert plan.server(url).hostname.endswith(":8443")
    for url in ("https://fleet.example.com", "https://10.0.0.1:8443", "https://localhost.example.com"):
        with pytest.raises(Unsafe, match="another machine") as refused:
            plan.server(url)
        assert refused.value.exit_code == 7
        assert plan.server(url, allow_remote=True)
    assert plan.server("https://localhost:1/env/") == plan.Server("localhost:1", "/env")
    assert plan.server("https://localhost").hostname == "localhost:443"


@pytest.mark.parametrize(
    "url", ["http://localhost", "https://", "https://u@localhost", "https://localhost:x", "ftp://a"]
)
def test_what_is_no_server(url: str) -> None:
    with pytest.raises(BadUsage, match="expected the server as"):
        plan.server(url)


def test_profiles_are_dealt_by_weight() -> None:
    mix = plan.read_mix("ubuntu:3, windows:1")
    assert [mix.profile(index) for index in range(5)] == ["ubuntu", "ubuntu", "ubuntu", "windows", "ubuntu"]
    for text in ("", "ubuntu:0", "ubuntu:x", ":2", "ubuntu,,"):
        with pytest.raises(BadUsage, match="ubuntu:3,windows:1"):
            plan.read_mix(text)


def test_when_agents_start() -> None:
    steady = plan.Growth(10, 5.0, 60.0)
    ramp = plan.Growth(10, 5.0, 60.0, "ramp")
    assert [steady.starts_at_s(index) for index in (0, 1, 9)] == [0, 0.2, 1.8]
    assert [ramp.starts_at_s(index) for index in (0, 1, 9)] == [0, 6, 54]


@pytest.mark.parametrize(
    ("rule", "metrics", "is_met"),
    [
        ("errors>0.01", {"errors": 0.02}, True),
        ("errors>0.01", {"errors": 0.01}, False),
        ("errors>=0.01", {"errors": 0.01}, True),
        ("enrolled < 100", {"enrolled": 99}, True),
        ("p95<=500", {"p95": 500.5}, False),
        ("log.p99>5", {"p99": 100.0}, False),  # no log call was made
    ],
)
def test_thresholds(rule: str, metrics: dict[str, float], is_met: bool) -> None:
    threshold = plan.read_threshold(rule)
    assert threshold.met(metrics) is is_met
    assert bool(plan.met([threshold], metrics)) is is_met


@pytest.mark.parametrize("rule", ["errors", "errors=1", "speed>1", "p95>x", "p95>500ms", "log.p90>1", ""])
def test_what_is_no_threshold(rule: str) -> None:
    with pytest.raises(BadUsage, match="expected a threshold such as"):
        plan.read_threshold(rule)


@given(st.integers(0, 5), st.integers(1, 50), st.integers(0, 50))
def test_throws_are_fair_and_the_same_again(seed: int, low: int, room: int) -> None:
    once, again = (plan.Throws(Dice(seed), 3) for _ in range(2))
    found = [once.randint(low, low + room) for _ in range(20)]
    assert found == [again.randint(low, low + room) for _ in range(20)]
    assert all(low <= each <= low + room for each in found)
    assert room < 20 or len(set(found)) > 1


# -- tally -------------------------------------------------------------------------------------------------------


def tally_of_a_run() -> Tally:
    tally = Tally(agents=2, enrolled=2)
    for number in range(10):
        tally.request("log", 0.01 * (number + 1), number)
    tally.request(HELD, 12.0, 9)
    tally.error("log", "Request error: <script>alert('&')</script>", 3)
    return tally


def test_the_report_has_the_promised_keys_in_order() -> None:
    found = report(tally_of_a_run(), Cost(3_000_000, 1_000_000, 1.5, 10.0), {"seed": 7})
    promised = (
        "agents enrolled requests errors requests_per_s latency_ms rss_bytes rss_bytes_per_agent cpu_s duration_s"
    )
    assert list(found)[:10] == promised.split()
    assert (found["requests"], found["errors"], found["requests_per_s"]) == (11, 1, 1.1)
    assert (found["rss_bytes_per_agent"], found["seed"]) == (1_000_000, 7)
    assert set(found["latency_ms"]["log"]) == {"p50", "p95", "p99"}
    assert found["latency_ms"]["log"]["p50"] == pytest.approx(50, rel=RELATIVE_ERROR)


def test_what_thresholds_are_judged_by() -> None:
    """The worst call's percentile, reads that were held not being calls that were slow; errors as a share."""
    metrics = metrics_of(report(tally_of_a_run(), Cost(1, 0, 1, 10), {}))
    assert metrics["errors"] == pytest.approx(1 / 11)
    assert metrics["p99"] == pytest.approx(100, rel=RELATIVE_ERROR)
    assert metrics["held.p50"] == pytest.approx(12_000, rel=RELATIVE_ERROR)
    assert tally_of_a_run().metrics(10)["p99"] == metrics["p99"]


def test_a_window_counts_from_its_beginning() -> None:
    tally = tally_of_a_run()
    before = tally.begin_window()
    tally.request("log", 1.0, 10)
    assert before.metrics()["errors"] == pytest.approx(1 / 11)
    assert tally.window.metrics() == {"errors": 0} | tally.window.metrics()
    assert (tally.window.requests, tally.total.requests) == (1, 12)


def test_kinds_of_errors_are_bounded() -> None:
    tally = Tally()
    for number in range(1000):
        tally.error("log", f"{number} {'x' * 1000}", 0)
    assert len(tally.kinds) <= MAX_KINDS + 1
    assert max(map(len, tally.kinds)) <= 160
    assert tally.kinds.total() == 1000


@given(st.lists(st.floats(0, 5000), max_size=200))
def test_a_series_loses_nothing_when_its_bins_grow(moments: list[float]) -> None:
    series = Series()
    for moment in sorted(moments):
        series.at(moment).requests += 1
    assert sum(each.requests for each in series.bins) == len(moments)
    assert len(series.bins) <= MAX_BINS
    assert not moments or series.bin_s * MAX_BINS > max(moments)


# -- page --------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags that are open, links, and what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "rect", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "p" or self.open[-1] == "p":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def read(report: dict[str, Any]) -> Reader:
    reader = Reader()
    reader.feed(page(report))
    reader.close()
    return reader


def test_the_page_needs_nothing_else_and_escapes_what_servers_say() -> None:
    cost = Cost(3_000_000, 1_000_000, 1.5, 10.0)
    found = report(tally_of_a_run(), cost, {"server": "<b>&x", "mode": "steady", "failed": ["p95>5 <i>"]})
    text, seen = page(found), read(found)
    assert seen.open == []
    assert seen.links == []
    assert not {"script", "b", "i", "link", "img"} & seen.tags
    assert "http" not in text.replace("http-equiv", "")
    assert "<script>alert('&')</script>" in seen.said
    assert "prefers-color-scheme" in text
    for expected in ("Requests per second", "Errors per second", "log", "held", "2 agents", "failed: p95>5 <i>"):
        assert expected in seen.said


def test_the_page_of_a_run_in_which_nothing_happened() -> None:
    seen = read(
        report(Tally(), Cost(0, 0, 0, 0), {"limit": {"agents": 0, "stopped_at": 25, "stopped_by": ["errors>0"]}})
    )
    assert "None." in seen.said
    assert "Held 0 agents; ended because: errors>0" in seen.said
