"""``osqbox status``: what the running box is doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import json_option, print_facts, print_json, quiet_pipe, span
from osqbox.client import Client

LISTENERS = ("agents", "operator", "comms", "jobs")


@click.command("status")
@json_option
@box_options
def command(box: Where, as_json: bool) -> None:
    """What the running box is doing: listeners, nodes, numbers, and what was dropped."""
    client = box.client
    info = client.get("info")
    info.setdefault("nodes", _nodes(client))
    with quiet_pipe():
        if as_json:
            print_json(info)
        else:
            print_facts(_facts(info))


def _nodes(client: Client) -> dict[str, int]:
    """Number of nodes by status."""
    return dict(Counter(node["status"] for node in client.get("nodes")))


def _facts(info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "osqbox", f"{info.get('version', '')}, pid {info.get('pid', '')}, up {span(info.get('uptime_s') or 0)}"
    for name in LISTENERS:
        if info.get(name):
            yield name, info[name]
    for name in ("data", "ca", "flagfile"):
        if info.get(name):
            yield name, info[name]
    nodes = info["nodes"]
    yield "nodes", ", ".join(f"{number} {status}" for status, number in nodes.items()) or "none"
    statistics = dict(info.get("statistics") or {})
    yield from _forwarding(statistics.pop("forwarding", []))
    yield from _indexer((statistics.get("comms_api") or {}).get("indexer") or {})
    yield from _flat("", statistics)
    dropped = [(name, number) for name, number in _flat("", info.get("drops") or {}) if number]
    yield "dropped", ", ".join(f"{number} {name}" for name, number in dropped) or "nothing"


def _indexer(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The one that boxes share."""
    if "url" in facts:
        state = "up" if facts["up"] else f"down: {facts['problem']}"
        yield "indexer", f"{facts['url']}, {state}; {facts['down_s']:.0f} s down in all"


def _forwarding(sinks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for sink in sinks:
        state = "up" if sink["up"] else f"down: {sink['last_error']}"
        numbers = ", ".join(f"{sink[name]} {name.replace('_', ' ')}" for name in ("waiting", "forwarded", "dropped"))
        yield f"forward {sink['sink']}", f"{numbers}, {sink['set_aside']} set aside, {state}"


def _flat(prefix: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Members of nested objects under dotted names."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
