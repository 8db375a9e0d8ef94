"""What a config changes: options, schedule, packs, decorators, views and tables of an agent. Pure.

Upstream: osquery/config/{config,packs}.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from osqbox.agent import logs, messages, schedule
from osqbox.agent.client.commands import Call, Failure, Query, Thread
from osqbox.agent.client.decorations import Decorations, decorate
from osqbox.agent.client.performance import Performance
from osqbox.agent.client.state import SETTINGS, TLS, State
from osqbox.agent.constructed import read_constructed
from osqbox.agent.sql import QueryResult
from osqbox.agent.views import check, error_text, read_views

MAX_WARNINGS = 100
Sources = Mapping[str, Mapping[str, Any]]
"""The members of each source's JSON object."""


class Random(Protocol):
    """`random.Random`, as far as it is used."""

    def randint(self, a: int, b: int) -> int: ...


def apply_config(state: State, sources: Sources, rng: Random) -> Thread[None]:
    warnings: list[str] = []
    _set_options(state, sources, warnings.append)
    expanded = yield from _expanded(state, sources, warnings.append)
    state.config = schedule.read_sources(expanded, _rules(state, rng), warnings.append)
    state.discovered.clear()
    state.decorations = Decorations()
    _warn(state, "config.cpp", warnings)
    queries = [query.name for _, query in state.config.queries()]
    state.performance = {name: state.performance.get(name, Performance()) for name in queries}
    _apply_constructed(state, sources)
    yield from _apply_views(state, sources)
    state.event("config", hash=state.config_hash, queries=len(queries))
    state.decorations.load = yield from decorate(state, state.config.decorators.load)
    state.wake("schedule")


def _warn(state: State, filename: str, warnings: list[str]) -> None:
    for warning in warnings[:MAX_WARNINGS]:
        state.status(logs.WARNING, filename, warning)


def _set_options(state: State, sources: Sources, warn: Callable[[str], None]) -> None:
    for members in sources.values():
        options = members.get("options")
        for name, value in options.items() if isinstance(options, dict) else ():
            warning = state.flags.set_option(name, value)
            if warning:
                warn(warning)


def _apply_constructed(state: State, sources: Sources) -> None:
    warnings: list[str] = []
    found = read_constructed(sources.values(), state.identity.platform_type, warnings.append)
    state.constructed = state.constructed if found is None else found
    _warn(state, "auto_constructed_tables.cpp", warnings)


def _apply_views(state: State, sources: Sources) -> Thread[None]:
    """All appear at once, since they may use each other; a new one that cannot be read is told of once."""
    warnings: list[str] = []
    before, found = state.views, read_views(sources.values(), warnings.append)
    state.views = before if found is None else found
    for name, sql in state.views.items():
        if before.get(name) == sql:
            continue
        result: QueryResult = yield Query(check(sql))
        if result.status:
            warnings.append(error_text(name, result.message))
    _warn(state, "views.cpp", warnings)


# -- packs -------------------------------------------------------------------------------------------------------


def _expanded(state: State, sources: Sources, warn: Callable[[str], None]) -> Thread[Sources]:
    """The sources, with packs that are only named (a path or pattern) asked of the config plugin."""
    found = dict(sources)
    for source, members in sources.items() if state.config_plugin != TLS else ():
        packs = members.get("packs")
        if not isinstance(packs, dict):
            continue
        kept = {name: pack for name, pack in packs.items() if not isinstance(pack, str)}
        for name, value in packs.items():
            if isinstance(value, str):
                kept.update((yield from _named_pack(state, name, value, warn)))
        found[source] = {**members, "packs": kept}
    return found


def _named_pack(state: State, name: str, value: str, warn: Callable[[str], None]) -> Thread[dict[str, Any]]:
    request = {"action": "genPack", "name": name, "value": value}
    rows: list[dict[str, str]] | Failure = yield Call("config", state.config_plugin, request)
    if isinstance(rows, Failure) or not rows:
        warn(f"Error getting pack {name}: {rows.message if isinstance(rows, Failure) else 'no such pack'}")
        return {}
    found = {each: messages.read_config_text(text) for each, text in rows[0].items()}
    for each in (each for each, members in found.items() if members is None):
        warn(f"Error parsing pack {each}: not a JSON object")
    return {each: members for each, members in found.items() if members is not None}


# -- how a schedule is read --------------------------------------------------------------------------------------


def _rules(state: State, rng: Random) -> schedule.Rules:
    return schedule.Rules(
        hostname=state.host_identifier,
        delimiter=state.flags.text("pack_delimiter"),
        default_interval_s=state.flags.integer("schedule_default_interval"),
        splay=lambda name, interval_s: _splayed(state, rng, name, interval_s),
        platform_type=state.identity.platform_type,
    )


def _splayed(state: State, rng: Random, name: str, interval_s: int) -> int:
    """The splayed interval, the same as long as the configured one is (restoreSplayedValue)."""
    percent, key = state.flags.integer("schedule_splay_percent"), f"interval.{name}"
    kept = (state.store.get(SETTINGS, key) or "").split(":")
    if len(kept) == 3 and kept[:2] == [str(interval_s), str(percent)]:
        return int(kept[2])
    chosen = schedule.splay(interval_s, percent, rng.randint)
    state.store.put(SETTINGS, key, f"{interval_s}:{percent}:{chosen}")
    return chosen
