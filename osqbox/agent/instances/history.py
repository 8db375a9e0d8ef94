"""The runs of an agent's instances, in the shape of Launcher's table of them. Pure.

Differences to Launcher: the last runs of each instance are kept, not the last over all, so one that keeps failing does
not push out its neighbours; and a launch that failed leaves a row too, without a connect_time.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

TABLE = "kolide_launcher_osquery_instance_history"
RUNS_KEPT = 10
MAX_ERROR_LENGTH = 2_000


@dataclass(frozen=True, slots=True)
class Run:
    """One row. Times are RFC 3339 in UTC; "" is not yet, or never."""

    enrollment_id: str
    """The instance's name, which is its tenant's."""
    instance_run_id: str
    start_time: str
    connect_time: str = ""
    exit_time: str = ""
    hostname: str = ""
    instance_id: str = ""
    """Of osquery's database: the same over all runs that keep it."""
    version: str = ""
    errors: str = ""
    """Why the run ended."""


COLUMNS = tuple(field.name for field in fields(Run))


class History:
    """The last runs of each instance, oldest first."""

    def __init__(self, runs: Iterable[Run] = (), *, runs_kept: int = RUNS_KEPT) -> None:
        self._runs_kept = runs_kept
        self._runs: dict[str, Run] = {}
        for run in runs:
            self._put(run)

    def started(self, enrollment_id: str, run_id: str, now: float) -> None:
        self._put(Run(enrollment_id, run_id, time_text(now)))

    def connected(self, run_id: str, now: float, *, hostname: str, instance_id: str, version: str) -> None:
        who = {"hostname": hostname, "instance_id": instance_id, "version": version}
        self._change(run_id, connect_time=time_text(now), **who)

    def ended(self, run_id: str, now: float, reason: str) -> None:
        self._change(run_id, exit_time=time_text(now), errors=reason[:MAX_ERROR_LENGTH])

    def runs(self, enrollment_id: str | None = None) -> list[Run]:
        return [run for run in self._runs.values() if enrollment_id in (None, run.enrollment_id)]

    def rows(self) -> list[dict[str, str]]:
        return [asdict(run) for run in self._runs.values()]

    def _change(self, run_id: str, **values: str) -> None:
        run = self._runs.get(run_id)
        if run is not None:  # else pushed out meanwhile
            self._runs[run_id] = replace(run, **values)

    def _put(self, run: Run) -> None:
        self._runs[run.instance_run_id] = run
        by_instance: dict[str, list[str]] = defaultdict(list)
        for one in self._runs.values():
            by_instance[one.enrollment_id].append(one.instance_run_id)
        for surplus in by_instance[run.enrollment_id][: -self._runs_kept]:
            del self._runs[surplus]


def time_text(now: float) -> str:
    return dt.datetime.fromtimestamp(now, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dump(history: History) -> str:
    return json.dumps(history.rows(), indent=1)


def load(text_untrusted: str) -> History:
    """What `dump` wrote. Rows that are none are left out, as are all of a file that is no JSON."""
    try:
        rows = json.loads(text_untrusted)
    except ValueError:
        return History()
    return History(run for row in (rows if isinstance(rows, list) else ()) if (run := _read(row)) is not None)


def _read(row: object) -> Run | None:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in COLUMNS):
        return None
    return Run(**{name: row[name] for name in COLUMNS})
