"""Log lines in osqueryd's exact shape, the differential behind them, and the buffer they wait in.

osquery/core/{query.cpp,sql/diff_results.cpp}, osquery/sql/sql.cpp, plugins/logger/{tls_logger,buffered}.cpp. Pure.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from osqbox.agent.functions import SqlValue, render
from osqbox.agent.messages import VERSION, compact
from osqbox.agent.store import Store

INFO, WARNING, ERROR, FATAL = range(4)

TypedRow = Mapping[str, SqlValue]
BUFFER_MAX_BYTES = 256 * 1024 * 1024


def calendar_time(now: float) -> str:
    """``Thu Aug  6 21:46:12 2026 UTC``: asctime with the zone, the day padded with a blank."""
    return dt.datetime.fromtimestamp(int(now), dt.UTC).ctime() + " UTC"


# -- the differential --------------------------------------------------------------------------------------------


def diff(before: Sequence[TypedRow], after: Sequence[TypedRow]) -> tuple[list[TypedRow], list[TypedRow]]:
    """(removed, added) between two multisets of rows: removed in sorted order, added in the order given."""
    left = Counter(_key(row) for row in before)
    rows = {_key(row): row for row in before}
    added: list[TypedRow] = []
    for row in after:
        key = _key(row)
        if left[key] > 0:
            left[key] -= 1
        else:
            added.append(row)
    return [rows[key] for key in sorted(left.elements())], added


def _key(row: TypedRow) -> str:
    return compact(dict(sorted(row.items())))


def escape(value: SqlValue) -> SqlValue:
    """Text with bytes below 0x20 and invalid UTF-8 written as literal ``\\xHH`` (escapeNonPrintableBytes)."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "surrogateescape")
    elif isinstance(value, str):
        text = value
    else:
        return value
    if text.isprintable():
        return text
    text = re.sub("[\x00-\x1f]", lambda found: f"\\x{ord(found[0]):02X}", text)
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02X}", text)


# -- lines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One execution of a scheduled query, ready to be logged."""

    name: str
    host_identifier: str
    now: float
    epoch: int = 0
    counter: int = 0
    decorations: Mapping[str, str] = field(default_factory=dict)
    removed: Sequence[TypedRow] = ()
    added: Sequence[TypedRow] = ()
    snapshot: Sequence[TypedRow] | None = None
    """Set for a snapshot query, an empty one too."""
    numerics: bool = False
    """Numbers stay numbers (--logger_numerics)."""
    decorations_top_level: bool = False


def event_lines(item: Item) -> list[str]:
    """One line per row: removed rows, then added ones; or each row of a snapshot."""
    groups = (
        [("removed", item.removed), ("added", item.added)] if item.snapshot is None else [("snapshot", item.snapshot)]
    )
    return [
        compact({**_common(item), "columns": _columns(row, item.numerics), "action": action})
        for action, rows in groups
        for row in rows
    ]


def batch_line(item: Item) -> str:
    """All of one execution (--logger_event_type=false)."""
    rows = {"removed": item.removed, "added": item.added}
    results = {action: [_columns(row, item.numerics) for row in found] for action, found in rows.items()}
    return compact({"diffResults": results, **_common(item)})


def snapshot_line(item: Item) -> str:
    rows = [_columns(row, item.numerics) for row in item.snapshot or ()]
    return compact({"snapshot": rows, "action": "snapshot", **_common(item)})


@dataclass(frozen=True, slots=True)
class Status:
    """A message of the agent about itself."""

    severity: int
    filename: str
    line: int
    message: str


def status_line(
    status: Status, *, host_identifier: str, now: float, decorations: Mapping[str, str] | None = None
) -> str:
    body: dict[str, Any] = {
        "hostIdentifier": host_identifier,
        "calendarTime": calendar_time(now),
        "unixTime": int(now),
        "severity": status.severity,
        "filename": status.filename,
        "line": status.line,
        "message": status.message,
        "version": VERSION,
    }
    if decorations:
        body["decorations"] = dict(sorted(decorations.items()))
    return compact(body)


def status_entry(status: Status, *, host_identifier: str, now: float) -> str:
    """One element of the list a logger plugin is given (logger.cpp, serializeLogRequest)."""
    return compact(
        {
            "s": status.severity,
            "f": status.filename,
            "i": status.line,
            "m": status.message,
            "h": host_identifier,
            "c": calendar_time(now),
            "u": int(now),
        }
    )


def glog_line(status: Status, *, now: float, thread: int) -> str:
    """``I1015 10:36:06.935755 31 tls.cpp:196] message``, as stderr shows it with --verbose; the time is UTC."""
    at = dt.datetime.fromtimestamp(now, dt.UTC)
    letter = "IWEF"[min(max(status.severity, INFO), FATAL)]
    return f"{letter}{at:%m%d %H:%M:%S.%f} {thread} {status.filename}:{status.line}] {status.message}"


def _common(item: Item) -> dict[str, Any]:
    members: dict[str, Any] = {
        "name": item.name,
        "hostIdentifier": item.host_identifier,
        "calendarTime": calendar_time(item.now),
        "unixTime": int(item.now),
        "epoch": item.epoch,
        "counter": item.counter,
        "numerics": item.numerics,
    }
    decorations = dict(sorted(item.decorations.items()))
    if decorations and item.decorations_top_level:
        return {**members, **decorations}
    return {**members, "decorations": decorations} if decorations else members


def _columns(row: TypedRow, numerics: bool) -> dict[str, Any]:
    def shown(value: SqlValue) -> Any:
        return value if numerics and isinstance(value, (int, float)) else render(value)

    return {name: shown(value) for name, value in sorted(row.items())}


# -- the buffer --------------------------------------------------------------------------------------------------

RESULT, STATUS = "result", "status"
_PREFIX = {RESULT: "tls_r_", STATUS: "tls_s_"}
_DOMAIN = "logs"


class Buffer:
    """Lines not yet acknowledged, oldest first, kept in the store. Over its bounds the oldest are dropped."""

    def __init__(self, store: Store, max_bytes: int = BUFFER_MAX_BYTES) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._number = 0
        self._bytes = 0
        self.dropped = 0
        self._lines: dict[str, dict[str, str]] = {RESULT: {}, STATUS: {}}
        for key, line in store.scan(_DOMAIN):
            self._number = max(self._number, int(key.rpartition("_")[2]))
            kind = RESULT if key.startswith(_PREFIX[RESULT]) else STATUS
            self._lines[kind][key] = line
            self._bytes += len(line)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, kind: str, line: str, now: float, max_lines: int) -> None:
        """``max_lines`` 0 is no limit but that of bytes."""
        self._number += 1
        key = f"{_PREFIX[kind]}{int(now)}_{self._number:010d}"
        self._lines[kind][key] = line
        self._store.put(_DOMAIN, key, line)
        self._bytes += len(line)
        while (0 < max_lines < len(self)) or self._bytes > self._max_bytes:
            self._drop_oldest()

    def batch(self, max_lines: int) -> dict[str, dict[str, str]]:
        """The next lines by kind. Results come first: as many as ``max_lines`` of them starve the statuses."""
        results = dict(_first(self._lines[RESULT], max_lines))
        return {RESULT: results, STATUS: dict(_first(self._lines[STATUS], max_lines - len(results)))}

    def acknowledge(self, kind: str, keys: Sequence[str]) -> None:
        for key in keys:
            line = self._lines[kind].pop(key, None)
            if line is not None:
                self._bytes -= len(line)
                self._store.delete(_DOMAIN, key)

    def _drop_oldest(self) -> None:
        """The oldest of both kinds: their numbers are in one order (buffered.cpp, purge)."""
        oldest = {kind: next(iter(lines)) for kind, lines in self._lines.items() if lines}
        kind = min(oldest, key=lambda k: int(oldest[k].rpartition("_")[2]))
        self.acknowledge(kind, [oldest[kind]])
        self.dropped += 1


def _first(lines: Mapping[str, str], count: int) -> list[tuple[str, str]]:
    return [pair for pair, _ in zip(lines.items(), range(max(0, count)), strict=False)]
