"""The thread that runs the config's schedule: which queries are due, in which packs, and what one execution is. Pure.

Upstream: osquery/dispatcher/scheduler.cpp.
"""

from __future__ import annotations

from osqbox.agent import logs
from osqbox.agent.client.commands import Query, Sleep, Thread
from osqbox.agent.client.decorations import decorate
from osqbox.agent.client.denylist import Denylist
from osqbox.agent.client.results import result_lines
from osqbox.agent.client.state import QUERIES, State
from osqbox.agent.schedule import Pack, ScheduledQuery
from osqbox.agent.sql import QueryResult


class Scheduler:
    __slots__ = ("_denylist", "_state")

    def __init__(self, state: State, denylist: Denylist) -> None:
        self._state = state
        self._denylist = denylist

    def run(self) -> Thread[None]:
        """SchedulerRunner: wakes at the seconds on which something is due instead of at each."""
        state = self._state
        yield from self._run_at_startup()
        previous = int(state.now) - 1
        while True:
            second = int(state.now)
            if second > previous:
                yield from self._run_due(previous, second)
                previous = second
            pause_s = self._due_after(previous) - state.now
            woken = yield Sleep(max(0.0, pause_s), wake="schedule")
            if woken:  # what a new schedule would have run while it was not there yet is not due
                previous = max(previous, int(state.now) - 1)

    def _due_after(self, at: int) -> int:
        """The next second with work; an hour ahead when there is none (the schedule's change wakes us)."""
        config = self._state.config
        due = [query.due_after(at) for _, query in config.queries()]
        if config.decorators.interval:
            due.append((at // 60 + 1) * 60)
        return min(due, default=at + 3600)

    def _run_at_startup(self) -> Thread[None]:
        urgent = [(p, q) for p, q in self._state.config.queries() if q.startup_priority is not None]
        for pack, query in sorted(urgent, key=lambda found: found[1].startup_priority or 0):
            if not self._denylist.holds(query) and (yield from self._pack_runs(pack)):
                yield from self._run_query(query)

    def _run_due(self, previous: int, now: int) -> Thread[None]:
        state = self._state
        for pack, query in list(state.config.queries()):
            if not query.due_between(previous, now) or self._denylist.holds(query):
                continue
            if (yield from self._pack_runs(pack)):
                yield from self._run_query(query)
        due = {s: q for s, q in state.config.decorators.interval.items() if now // s > previous // s}
        for queries in due.values():
            state.decorations.interval.update((yield from decorate(state, queries)))

    def _pack_runs(self, pack: Pack) -> Thread[bool]:
        """Discovery: every query needs a row; the answer is kept for --pack_refresh_interval."""
        state = self._state
        asked, active = state.discovered.get(pack.name, (float("-inf"), True))
        if pack.discovery and state.now - asked >= state.flags.integer("pack_refresh_interval"):
            active = True
            for sql in pack.discovery:
                result: QueryResult = yield Query(sql)
                active = active and not result.status and bool(result.typed_rows)
            state.discovered[pack.name] = (state.now, active)
        state.pack_active[pack.name] = active
        return active

    def _run_query(self, query: ScheduledQuery) -> Thread[None]:
        """One execution (launchQuery)."""
        state = self._state
        says = state.status if state.flags.true("schedule_lognames") else state.status_when_verbose
        says(logs.INFO, "scheduler.cpp", f"Executing scheduled query {query.name}: {query.query}")
        state.decorations.always = yield from decorate(state, state.config.decorators.always)
        self._denylist.begin(query.name)
        try:
            result: QueryResult = yield Query(query.query)
        finally:
            self._denylist.end()
        state.queries_run += 1
        if result.event_based:
            state.store.put(QUERIES, f"{query.name}events", "1")
        state.warn_of(result)
        if result.status:
            message = f"Error executing scheduled query {query.name}: {result.message}"
            state.status(logs.ERROR, "scheduler.cpp", message)
            return
        if query.name in state.performance:
            state.performance[query.name].add(result, state.now)
        lines = result_lines(state, query, result)
        if lines and not query.snapshot:
            state.verbose("scheduler.cpp", f"Found results for query: {query.name}")
        for line in lines:
            state.log_result(line, snapshot=query.snapshot)
        state.event("scheduled", name=query.name, rows=len(result.typed_rows))
