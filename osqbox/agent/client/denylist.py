"""Scheduled queries that are skipped for a day, because the process died in them. Pure.

Upstream: osquery/config/config.cpp.
"""

from __future__ import annotations

import json

from osqbox.agent import messages
from osqbox.agent.client.state import QUERIES, SETTINGS, State
from osqbox.agent.schedule import ScheduledQuery

DENYLIST_S = 86_400
_EXECUTING = "executing_query"
_DENYLIST = "schedule_denylist"


class Denylist:
    __slots__ = ("_state", "until")

    def __init__(self, state: State) -> None:
        self._state = state
        self.until: dict[str, int] = self._restored()
        """Query -> the time at which it may run again."""

    def _restored(self) -> dict[str, int]:
        """What an earlier process left, and the query it died in, if the watchdog looks after this one."""
        state = self._state
        try:
            kept = json.loads(state.store.get(SETTINGS, _DENYLIST) or "{}")
        except ValueError:
            kept = {}
        found = {name: until for name, until in kept.items() if until > state.now}
        died_in = state.store.get(SETTINGS, _EXECUTING)
        if died_in and not state.flags.true("disable_watchdog"):
            state.event("denylisted", name=died_in)
            found[died_in] = int(state.now) + DENYLIST_S
        if found != kept:
            state.store.put(SETTINGS, _DENYLIST, messages.compact(found))
        if died_in:
            state.store.delete(SETTINGS, _EXECUTING)
        return found

    def begin(self, name: str) -> None:
        """Should the process die before `end`, it died in this query."""
        self._state.store.put(SETTINGS, _EXECUTING, name)

    def end(self) -> None:
        self._state.store.delete(SETTINGS, _EXECUTING)

    def holds(self, query: ScheduledQuery) -> bool:
        """Whether a process died in this query less than a day ago, and it is of the kind that is then skipped."""
        state = self._state
        until = self.until.get(query.name, 0)
        if until <= state.now:
            return False
        reads_events = state.store.get(QUERIES, f"{query.name}events") == "1"
        return query.denylist and (not reads_events or state.flags.true("events_enforce_denylist"))
