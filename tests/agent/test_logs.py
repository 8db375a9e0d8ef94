"""Log lines byte by byte, the differential's algebra, and the buffer."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent import logs
from osqbox.agent.logs import Item
from osqbox.agent.store import MemoryStore

NOW = 1786052772.9  # Thu Aug  6 21:46:12 2026 UTC
COMMON = (
    '"name":"q","hostIdentifier":"h","calendarTime":"Thu Aug  6 21:46:12 2026 UTC","unixTime":1786052772,'
    '"epoch":0,"counter":1,"numerics":false'
)


def item(**changes: object) -> Item:
    return Item(**{"name": "q", "host_identifier": "h", "now": NOW, "counter": 1, **changes})  # type: ignore[arg-type]


def test_calendar_time_pads_the_day_with_a_blank() -> None:
    assert logs.calendar_time(NOW) == "Thu Aug  6 21:46:12 2026 UTC"
    assert logs.calendar_time(0) == "Thu Jan  1 00:00:00 1970 UTC"


def test_event_lines_removed_first_columns_alphabetical() -> None:
    lines = logs.event_lines(item(added=[{"b": 2, "a": "x"}], removed=[{"b": 1, "a": ""}]))
    assert lines == [
        "{" + COMMON + ',"columns":{"a":"","b":"1"},"action":"removed"}',
        "{" + COMMON + ',"columns":{"a":"x","b":"2"},"action":"added"}',
    ]


def test_decorations_are_sorted_text_before_the_columns() -> None:
    (line,) = logs.event_lines(item(added=[{"a": 1}], decorations={"z": "1", "host": "h"}))
    assert line == "{" + COMMON + ',"decorations":{"host":"h","z":"1"},"columns":{"a":"1"},"action":"added"}'


def test_decorations_at_the_top_level() -> None:
    (line,) = logs.event_lines(item(added=[{"a": 1}], decorations={"host": "h"}, decorations_top_level=True))
    assert line == "{" + COMMON + ',"host":"h","columns":{"a":"1"},"action":"added"}'


def test_numerics_keep_numbers() -> None:
    (line,) = logs.event_lines(item(added=[{"i": 1, "d": 1.0, "t": "1", "n": ""}], numerics=True))
    assert line.endswith('"numerics":true,"columns":{"d":1.0,"i":1,"n":"","t":"1"},"action":"added"}')


def test_batch_line_always_has_both_lists() -> None:
    assert logs.batch_line(item()) == '{"diffResults":{"removed":[],"added":[]},' + COMMON + "}"
    line = logs.batch_line(item(added=[{"a": 1}]))
    assert line == '{"diffResults":{"removed":[],"added":[{"a":"1"}]},' + COMMON + "}"


def test_snapshot_line_also_when_empty() -> None:
    assert logs.snapshot_line(item(snapshot=[])) == '{"snapshot":[],"action":"snapshot",' + COMMON + "}"
    line = logs.snapshot_line(item(snapshot=[{"b": "é/", "a": None}]))
    assert line == '{"snapshot":[{"a":"","b":"é/"}],"action":"snapshot",' + COMMON + "}"


def test_snapshot_as_events() -> None:
    (line,) = logs.event_lines(item(snapshot=[{"a": 1}]))
    assert line == "{" + COMMON + ',"columns":{"a":"1"},"action":"snapshot"}'
    assert logs.event_lines(item(snapshot=[])) == []


def test_status_line() -> None:
    status = logs.Status(logs.WARNING, "config.cpp", 0, "hm")
    base = (
        '{"hostIdentifier":"h","calendarTime":"Thu Aug  6 21:46:12 2026 UTC","unixTime":1786052772,"severity":1,'
        '"filename":"config.cpp","line":0,"message":"hm","version":"5.23.1"'
    )
    assert logs.status_line(status, host_identifier="h", now=NOW) == base + "}"
    decorated = logs.status_line(status, host_identifier="h", now=NOW, decorations={"a": "1"})
    assert decorated == base + ',"decorations":{"a":"1"}}'


@pytest.mark.parametrize(
    ("value", "escaped"),
    [("a\nb", "a\\x0Ab"), ("\x1f", "\\x1F"), (b"\xffok", "\\xFFok"), ("é€", "é€"), ("plain", "plain"), (7, 7)],
)
def test_control_bytes_and_invalid_utf8_are_written_out(value: str | bytes | int, escaped: str | int) -> None:
    assert logs.escape(value) == escaped


rows = st.lists(st.fixed_dictionaries({"a": st.sampled_from(["", "1", "2"]), "b": st.integers(0, 2)}), max_size=12)


def bag(found: list[dict[str, object]]) -> Counter[str]:
    return Counter(str(sorted(row.items())) for row in found)


@given(rows, rows)
def test_a_difference_leads_from_one_set_of_rows_to_the_other(before: list, after: list) -> None:  # type: ignore[type-arg]
    removed, added = logs.diff(before, after)
    assert bag(before) - bag(removed) + bag(added) == bag(after)
    assert not bag(removed) & bag(added)


@given(rows)
def test_nothing_changed_is_no_difference(same: list) -> None:  # type: ignore[type-arg]
    assert logs.diff(same, list(reversed(same))) == ([], [])
    assert logs.diff([], same) == ([], same)
    assert bag(logs.diff(same, [])[0]) == bag(same)


@given(rows, rows)
def test_the_way_back_swaps_removed_and_added(one: list, other: list) -> None:  # type: ignore[type-arg]
    removed, added = logs.diff(one, other)
    back_removed, back_added = logs.diff(other, one)
    assert (bag(removed), bag(added)) == (bag(back_added), bag(back_removed))


def test_results_go_first_and_starve_statuses() -> None:
    buffer = logs.Buffer(MemoryStore())
    for number in range(3):
        buffer.add(logs.STATUS, f"s{number}", NOW, 100)
        buffer.add(logs.RESULT, f"r{number}", NOW, 100)
    assert list(buffer.batch(4)[logs.RESULT].values()) == ["r0", "r1", "r2"]
    assert list(buffer.batch(4)[logs.STATUS].values()) == ["s0"]
    assert buffer.batch(3)[logs.STATUS] == {}


def test_only_acknowledged_lines_leave() -> None:
    store = MemoryStore()
    buffer = logs.Buffer(store)
    buffer.add(logs.RESULT, "a", NOW, 100)
    buffer.add(logs.RESULT, "b", NOW, 100)
    buffer.acknowledge(logs.RESULT, list(buffer.batch(1)[logs.RESULT]))
    assert list(buffer.batch(9)[logs.RESULT].values()) == ["b"]
    again = logs.Buffer(store)
    again.add(logs.RESULT, "c", NOW, 100)
    assert list(again.batch(9)[logs.RESULT].values()) == ["b", "c"]


def test_the_oldest_go_when_the_buffer_is_full_and_are_counted() -> None:
    buffer = logs.Buffer(MemoryStore(), max_bytes=10)
    for line in ("1234", "5678", "90ab"):
        buffer.add(logs.RESULT, line, NOW, 100)
    assert list(buffer.batch(9)[logs.RESULT].values()) == ["5678", "90ab"]
    buffer.add(logs.RESULT, "c", NOW, max_lines=1)
    assert list(buffer.batch(9)[logs.RESULT].values()) == ["c"]
    assert buffer.dropped == 3
