"""The log lines of one execution of a scheduled query: a snapshot, or what changed since the last one. Pure.

Upstream: osquery/core/query.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from osqbox.agent import logs, messages
from osqbox.agent.client.state import QUERIES, State
from osqbox.agent.functions import SqlValue
from osqbox.agent.schedule import ScheduledQuery
from osqbox.agent.sql import QueryResult


@dataclass(frozen=True, slots=True)
class _Change:
    removed: list[Mapping[str, SqlValue]]
    added: list[Mapping[str, SqlValue]]
    counter: int
    first: bool


def result_lines(state: State, query: ScheduledQuery, result: QueryResult) -> list[str]:
    item = logs.Item(
        name=query.name,
        host_identifier=state.host_identifier,
        now=state.now,
        epoch=state.flags.integer("schedule_epoch"),
        decorations=state.decorated(),
        numerics=state.flags.true("logger_numerics"),
        decorations_top_level=state.flags.true("decorations_top_level"),
    )
    if query.snapshot:
        item = replace(item, snapshot=result.typed_rows)
        as_events = state.flags.true("logger_snapshot_event_type")
        return logs.event_lines(item) if as_events else [logs.snapshot_line(item)]
    rows = [{name: logs.escape(value) for name, value in row.items()} for row in result.typed_rows]
    change = _change(state, query, item.epoch, rows, result.event_based)
    if change is None:
        return []
    item = replace(item, counter=change.counter, added=change.added, removed=change.removed if query.removed else ())
    batch = not state.flags.true("logger_event_type")
    if not item.added and not item.removed and not (batch and change.first):
        return []
    return [logs.batch_line(item)] if batch else logs.event_lines(item)


def _change(
    state: State, query: ScheduledQuery, epoch: int, rows: list[dict[str, SqlValue]], event_based: bool
) -> _Change | None:
    """The change since the last run, which is remembered; None when there is none.

    Counter 0 marks a full first result of an epoch; differences count up from there, events from 1.
    """
    store, name = state.store, query.name
    kept = store.get(QUERIES, name)
    first = kept is None or store.get(QUERIES, f"{name}epoch") != str(epoch)
    if kept is None:
        state.status(logs.INFO, "query.cpp", f"Storing initial results for new scheduled query: {name}")
    elif first:
        state.status(logs.INFO, "query.cpp", f"New Epoch {epoch} for scheduled query {name}")
    elif store.get(QUERIES, f"query.{name}") != query.query:
        state.status(logs.INFO, "query.cpp", f"Scheduled query has been updated: {name}")
    store.put(QUERIES, f"query.{name}", query.query)
    before = [] if first or event_based else json.loads(kept or "[]")
    removed, added = logs.diff(before, rows)
    if first or ((added or removed) and not event_based):
        store.put(QUERIES, name, "[]" if event_based else messages.compact(rows))
        store.put(QUERIES, f"{name}epoch", str(epoch))
    if not added and not removed and (event_based or not first):
        return None
    counter = (1 if event_based else 0) if first else int(store.get(QUERIES, f"{name}counter") or -1) + 1
    store.put(QUERIES, f"{name}counter", str(counter))
    return _Change(removed, added, counter, first)
