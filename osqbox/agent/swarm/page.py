"""The report as one HTML file: inline SVG, no scripts, nothing loaded from anywhere, light and dark. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _LEFT, _RIGHT = 860, 64, 12
_PLOT_HEIGHT = 120
_BAR_HEIGHT, _BAR_GAP = 12, 4
_NAME_WIDTH = 90
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--dim:#60646c;--line:#d9dce1;--paper:#fff;
--a:#3a6ea5;--b:#c98a1b;--c:#b3443c}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#a0a5ad;--line:#33383f;--paper:#15181c;
--a:#7fb0e0;--b:#e0b050;--c:#e57f77}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:54rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .4rem}p.dim{color:var(--dim);margin-top:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .9rem .2rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}td.word{text-align:left;word-break:break-word}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:11px}
.grid{stroke:var(--line)}.a{stroke:var(--a)}.b{stroke:var(--b)}.c{stroke:var(--c)}path{fill:none;stroke-width:1.6}
rect.a{fill:var(--a)}rect.b{fill:var(--b)}rect.c{fill:var(--c)}rect{stroke:none}
.fail{color:var(--c);font-weight:600}.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
.key.a{background:var(--a)}.key.b{background:var(--b)}.key.c{background:var(--c)}
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole document for a report of `tally.report`. Every text in it is escaped: errors quote the server."""
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>osqbox swarm: {_whole(report['agents'])} agents</title><style>{_STYLE}</style></head><body>",
            *_head(report),
            *_facts(report),
            *_over_time(report["series"]),
            *_latency(report["latency_ms"], report["calls"]),
            *_errors(report["errors_by_kind"]),
            "</body></html>\n",
        )
    )


def _head(report: Mapping[str, Any]) -> Iterable[str]:
    share = report["errors"] / max(1, report["requests"])
    yield f"<h1>{_whole(report['agents'])} agents, {report['requests_per_s']:,.1f} requests/s</h1>"
    yield (
        f'<p class="dim">{escape(str(report.get("server", "")))}, {escape(str(report.get("mode", "")))}, '
        f"{report['duration_s']:,.1f} s, {_whole(report['errors'])} errors ({share:.2%})</p>"
    )
    for failure in report.get("failed", ()):
        yield f'<p class="fail">failed: {escape(str(failure))}</p>'
    limit = report.get("limit")
    if limit:
        reasons = "; ".join(map(str, limit.get("stopped_by", ()))) or "the last step was reached"
        yield f"<p>Held {_whole(limit['agents'])} agents; ended because: {escape(reasons)}</p>"


def _facts(report: Mapping[str, Any]) -> Iterable[str]:
    facts = (
        ("enrolled", _whole(report["enrolled"])),
        ("requests", _whole(report["requests"])),
        ("live queries answered", _whole(report["answers"])),
        ("log lines acknowledged", _whole(report["log_lines"])),
        ("TLS connections", _whole(report["connections"])),
        ("memory per agent", f"{report['rss_bytes_per_agent'] / 1000:,.1f} kB"),
        ("memory of the process", f"{report['rss_bytes'] / 1e6:,.1f} MB"),
        ("processor time", f"{report['cpu_s']:,.1f} s"),
    )
    yield "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in facts) + "</table>"


# -- charts ------------------------------------------------------------------------------------------------------


def _over_time(series: Mapping[str, Any]) -> Iterable[str]:
    bin_s = series["bin_s"]
    charts = (
        ("Requests per second", "a", [count / bin_s for count in series["requests"]]),
        ("Errors per second", "c", [count / bin_s for count in series["errors"]]),
        ("Agents", "b", series["agents"]),
    )
    for title, color, values in charts:
        if values:
            yield f"<h2>{title}</h2>{_line(title, color, values, bin_s)}"


def _line(title: str, color: str, values: Sequence[float], bin_s: float) -> str:
    top = _nice(max(values))
    room = _WIDTH - _LEFT - _RIGHT

    def x(number: float) -> float:
        return _LEFT + room * number / max(1, len(values) - 1)

    def y(value: float) -> float:
        return 8 + _PLOT_HEIGHT * (1 - value / top)

    points = " ".join(f"{'L' if n else 'M'}{x(n):.1f},{y(value):.1f}" for n, value in enumerate(values))
    if len(values) == 1:
        points += f" L{_WIDTH - _RIGHT},{y(values[0]):.1f}"
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,g}</text>'
        for v in (0, top / 2, top)
    )
    last_s = len(values) * bin_s
    bottom = 8 + _PLOT_HEIGHT + 16
    axis = (
        f'<text x="{_LEFT}" y="{bottom}">0 s</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom}" text-anchor="end">{last_s:,g} s</text>'
    )
    label = f"{title} over {last_s:,g} seconds, at most {max(values):,.1f}"
    return _svg(bottom + 6, label, f'{grid}{axis}<path class="{color}" d="{points}"/>')


def _latency(latency_ms: Mapping[str, Mapping[str, float]], calls: Mapping[str, int]) -> Iterable[str]:
    if not latency_ms:
        return
    yield "<h2>Latency by call, in milliseconds</h2>"
    yield '<p class="dim">' + "".join(f'<span class="key {c}"></span>{p}' for c, p in zip("abc", _P, strict=True))
    yield "; the scale is logarithmic. <em>held</em> are distributed reads kept open for a second or more.</p>"
    yield _bars(latency_ms)
    rows = "".join(
        f"<tr><td>{escape(call)}</td><td>{_whole(calls.get(call, 0))}</td>"
        + "".join(f"<td>{values[p]:,.1f}</td>" for p in _P)
        + "</tr>"
        for call, values in latency_ms.items()
    )
    head = "".join(f"<th>{p}</th>" for p in _P)
    yield f"<table><tr><th>call</th><th>count</th>{head}</tr>{rows}</table>"


_P = ("p50", "p95", "p99")


def _bars(latency_ms: Mapping[str, Mapping[str, float]]) -> str:
    longest = max(1.0, *(values[p] for values in latency_ms.values() for p in _P))
    room = _WIDTH - _NAME_WIDTH - 70
    parts, y = [], 4
    for call, values in latency_ms.items():
        parts.append(f'<text x="{_NAME_WIDTH - 8}" y="{y + 22}" text-anchor="end">{escape(call)}</text>')
        for color, p in zip("abc", _P, strict=True):
            width = room * math.log10(1 + 9 * values[p] / longest) if values[p] else 0
            parts.append(
                f'<rect class="{color}" x="{_NAME_WIDTH}" y="{y}" width="{max(1, width):.1f}" height="{_BAR_HEIGHT}"/>'
                f'<text x="{_NAME_WIDTH + max(1, width) + 5:.1f}" y="{y + 10}">{values[p]:,.1f}</text>'
            )
            y += _BAR_HEIGHT + 1
        y += _BAR_GAP + 4
    return _svg(y, "Latency of each call: median, 95th and 99th percentile", "".join(parts))


def _errors(kinds: Mapping[str, int]) -> Iterable[str]:
    yield "<h2>Errors by kind</h2>"
    if not kinds:
        yield "<p>None.</p>"
        return
    most = max(kinds.values())
    rows = "".join(
        f'<tr><td class="word">{escape(kind)}</td><td>{_whole(count)}</td><td>'
        f'<svg viewBox="0 0 200 12" style="width:200px" role="img" aria-label="{_whole(count)}">'
        f'<rect class="c" width="{max(1, 200 * count / most):.1f}" height="12"/></svg></td></tr>'
        for kind, count in kinds.items()
    )
    yield f"<table>{rows}</table>"


def _svg(height: float, label: str, content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten; 1 at least."""
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _whole(number: int) -> str:
    return f"{number:,}"
