"""Bytes to messages: what osqueryd and its imitators send, and that nothing but a refusal ever comes of the rest."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.errors import Refused
from osqbox.osquery import messages
from osqbox.osquery.carves import block_data
from osqbox.osquery.messages import (
    DEPTH_MAX,
    Answer,
    CarveBegin,
    CarveBlock,
    Keyed,
    LogBatch,
    WriteBody,
    _is_deeper_than,
    answers,
    as_utf8,
    decode,
    decode_object,
    decoded_body,
    log_lines,
    whole,
)
from osqbox.osquery.nodes import parse_enrollment
from osqbox.osquery.protocol import body_secrets

LIMIT_BYTES = 100_000
SHAPES = (Keyed, LogBatch, WriteBody, CarveBegin, CarveBlock)

words = st.text(max_size=8)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
MEMBERS = (
    "node_key", "log_type", "data", "queries", "statuses", "messages", "stats", "block_count", "block_size",
    "carve_size", "carve_id", "request_id", "session_id", "block_id", "host_identifier", "platform_type",
    "host_details", "enroll_secret",
)  # fmt: skip
bodies = st.dictionaries(st.sampled_from(MEMBERS) | words, values, max_size=8)


def read_everything(body: bytes) -> None:
    """What the routes do with a body, whatever it was sent to."""
    for shape in SHAPES:
        try:
            message: Any = decode(body, shape)
            if isinstance(message, LogBatch):
                log_lines(message)
            elif isinstance(message, WriteBody):
                msgspec.json.encode(answers(message))
            elif isinstance(message, CarveBlock):
                block_data(message)
        except Refused:
            pass
    try:
        members = decode_object(body)
        msgspec.json.encode(parse_enrollment(members, body_secrets(members), b"").details)
    except Refused:
        pass


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_refused(body: bytes) -> None:
    read_everything(body)


@given(bodies)
def test_no_json_raises_anything_but_refused(body: dict[str, Any]) -> None:
    """Members of the right names with values of any type."""
    read_everything(json.dumps(body).encode())


@given(bodies, st.data())
def test_no_damaged_json_raises_anything_but_refused(body: dict[str, Any], data: st.DataObject) -> None:
    raw = bytearray(json.dumps(body, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read_everything(bytes(raw))
    read_everything(as_utf8(bytes(raw)))


@pytest.mark.parametrize("opening", [b"[", b'{"data":', b'{"queries":{"q":[{"a":', b'{"host_details":{"t":{"c":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    read_everything(opening * 200_000)
    with pytest.raises(Refused) as caught:
        decode(b'{"a":' * 200_000, dict[str, Any])
    assert caught.value.reason == "too_deep"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty_body"),
        (b" \r\n", "empty_body"),
        (b"[]", "wrong_type"),
        (b'"text"', "wrong_type"),
        (b"3", "wrong_type"),
        (b"null", "wrong_type"),
        (b"{", "bad_json"),
        (b"{} {}", "bad_json"),
        (b'{"node_key":', "bad_json"),
        (b'{"node_key": 3}', "wrong_type"),
        (b'{"node_key": "\xff"}', "invalid_utf8"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(body: bytes, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(body, Keyed)
    assert caught.value.reason == reason
    assert not caught.value.node_invalid


def test_a_refusal_says_where_but_repeats_no_value() -> None:
    with pytest.raises(Refused) as caught:
        decode(b'{"node_key": ["the-secret"]}', Keyed)
    assert "$.node_key" in caught.value.message
    assert "the-secret" not in caught.value.message


def test_unknown_members_and_a_blank_key_are_taken() -> None:
    assert decode(b'{"node_key":"","new":1}', Keyed) == Keyed("")
    assert decode(b'{"node_key":null}', Keyed) == decode(b"{}", Keyed) == Keyed(None)


def test_a_body_of_too_many_values_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "VALUES_MAX", 1000)
    monkeypatch.setattr(messages, "VALUES_COUNTED_BYTES", 100)
    for filling in (b"0,", b"[],", b"{},"):
        body = b'{"log_type":"result","data":[' + filling * 1001 + b"0]}"
        with pytest.raises(Refused) as caught:
            decode(body, LogBatch)
        assert (caught.value.reason, caught.value.status) == ("too_large", 413)
    assert decode(b'{"log_type":"result","data":["' + b"x" * 5000 + b'"]}', LogBatch).log_type == "result"


# gzip


def unpacked(body: bytes, limit_bytes: int = LIMIT_BYTES, encoding: str = "gzip") -> bytes:
    return decoded_body({"content-encoding": encoding} if encoding else {}, body, limit_bytes)


@given(st.binary(max_size=2000), st.integers(0, 9))
def test_gzip_is_taken_off(body: bytes, level: int) -> None:
    assert unpacked(gzip.compress(body, level)) == body


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_gzip_members_are_joined(parts: list[bytes]) -> None:
    assert unpacked(b"".join(map(gzip.compress, parts))) == b"".join(parts)


def test_gzip_is_recognised_without_its_header() -> None:
    """Old agents pack the body and do not say so."""
    packed = gzip.compress(b"{}")
    assert unpacked(packed, encoding="") == unpacked(packed, encoding="identity") == b"{}"
    assert unpacked(packed, encoding=" GZIP ") == unpacked(packed, encoding="x-gzip") == b"{}"
    assert unpacked(b"{}", encoding="") == b"{}"


@given(st.binary(max_size=500), st.data())
def test_no_damaged_gzip_raises_anything_but_refused(body: bytes, data: st.DataObject) -> None:
    raw = bytearray(gzip.compress(body))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut]), bytes(raw[cut:])):
        with contextlib.suppress(Refused):
            assert len(unpacked(damaged)) <= LIMIT_BYTES


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_what_comes_out_of_gzip_is_bounded(size_bytes: int, limit_bytes: int) -> None:
    packed = gzip.compress(bytes(size_bytes // 2)) + gzip.compress(bytes(size_bytes - size_bytes // 2))
    if size_bytes <= limit_bytes:
        assert unpacked(packed, limit_bytes) == bytes(size_bytes)
    else:
        with pytest.raises(Refused) as caught:
            unpacked(packed, limit_bytes)
        assert (caught.value.reason, caught.value.status) == ("too_large", 413)


def test_a_gzip_bomb_is_unpacked_no_further_than_the_limit() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 300_000
    with pytest.raises(Refused, match="more than 100000 bytes after gunzip"):
        unpacked(bomb)


def test_many_empty_gzip_members_are_refused_at_once() -> None:
    """Each would copy what is left of the body: a minute's work in a body of one MiB."""
    with pytest.raises(Refused, match="at most 16 gzip streams"):
        unpacked(gzip.compress(b"") * 50_000)


def test_a_truncated_gzip_and_an_unknown_encoding_are_refused() -> None:
    whole_stream = gzip.compress(b"x" * 1000)
    for cut in (1, 2, 10, len(whole_stream) - 1):
        with pytest.raises(Refused) as caught:
            unpacked(whole_stream[:cut])
        assert caught.value.reason == "truncated_gzip"
    for encoding in ("br", "zstd", "deflate", "gzip, gzip"):
        with pytest.raises(Refused) as caught:
            unpacked(b"{}", encoding=encoding)
        assert (caught.value.reason, caught.value.status) == ("bad_encoding", 415)


# logs


def lines_of(data: bytes, log_type: str = "result") -> list[messages.LogLine]:
    return log_lines(decode(b'{"node_key":"k","log_type":"%s","data":%s}' % (log_type.encode(), data), LogBatch))


EVENT = (
    b'{"name":"pack_p_q","hostIdentifier":"h","calendarTime":"Thu Aug  6 21:46:12 2026 UTC","unixTime":1786052772,'
    b'"epoch":0,"counter":1,"numerics":false,"decorations":{"d":"1"},"columns":{"b":"2","a":"1"},"action":"added"}'
)


def test_lines_are_kept_as_osquery_wrote_them() -> None:
    """Key order, spaces, escapes and all; only a line break between tokens cannot stay in a line."""
    strange = b'{ "b" : "\\u0041\\/ \xc3\xa9" , "a":1.50 }'
    event, odd = lines_of(b"[ " + EVENT + b" , " + strange + b"]")
    assert event.text.encode() == EVENT
    assert (event.name, event.action, event.unix_time) == ("pack_p_q", "added", 1786052772)
    assert odd.text.encode() == strange
    (broken,) = lines_of(b'[{\n"a":\r\n"x y"\n}]')
    assert json.loads(broken.text) == {"a": "x y"}
    assert broken.text.splitlines() == [broken.text]


def test_every_kind_of_result_is_known_by_its_action() -> None:
    event, batch, snapshot, old_snapshot, status = lines_of(
        b"[" + EVENT + b',{"diffResults":{"removed":[],"added":[{}]},"name":"q","unixTime":"17"},'
        b'{"snapshot":[],"action":"snapshot","name":"q","unixTime":1},{"snapshot":[{"a":"1"}],"name":"q"},'
        b'{"hostIdentifier":"h","unixTime":1,"severity":0,"message":"m"}]'
    )
    assert [line.action for line in (event, batch, snapshot, old_snapshot, status)] == [
        "added", None, "snapshot", "snapshot", None,
    ]  # fmt: skip
    assert (batch.unix_time, status.name) == (17, None)


@pytest.mark.parametrize("value", [b"[]", b'{"x":1}', b"true", b"1.5", b'"soon"', b"null", b"99999999999999999999"])
def test_odd_members_of_a_line_do_not_matter(value: bytes) -> None:
    (line,) = lines_of(b'[{"name":%s,"action":%s,"unixTime":%s}]' % (value, value, value))
    assert line.unix_time in (None, 1)


def test_no_data_is_no_lines() -> None:
    assert lines_of(b"[]") == lines_of(b"null") == []


@pytest.mark.parametrize("bad", [b"3", b'"x"', b"[]", b"null", b"true"])
def test_a_line_that_is_no_object_is_named(bad: bytes) -> None:
    with pytest.raises(Refused, match=r"data\[1\]: expected an object"):
        lines_of(b"[{}," + bad + b"]")


@pytest.mark.parametrize("log_type", ["", "results", "Result", "snapshot"])
def test_an_unknown_log_type_is_refused(log_type: str) -> None:
    with pytest.raises(Refused, match="log_type: expected result or status"):
        lines_of(b"[]", log_type)


@given(
    st.recursive(st.text('ab[]{}"\\\\', max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=12),
    st.integers(0, 6),
)
def test_depth_is_counted_outside_of_strings(value: Any, levels: int) -> None:
    def depth(of: Any) -> int:
        return 1 + max(map(depth, of), default=0) if isinstance(of, list) else 0

    for encoded in (json.dumps(value).encode(), json.dumps(value, indent=1).encode()):
        assert _is_deeper_than(encoded, levels) is (depth(value) > levels)


@pytest.mark.parametrize("levels", [DEPTH_MAX, DEPTH_MAX + 1])
def test_a_body_nests_no_deeper_than_is_read(levels: int) -> None:
    body = b'{"a":' * levels + b"1" + b"}" * levels
    if levels <= DEPTH_MAX:
        assert "a" in decode(body, dict[str, Any])
    else:
        with pytest.raises(Refused, match="levels of JSON"):
            decode(body, dict[str, Any])


def test_bytes_of_a_host_that_are_no_utf8_are_replaced() -> None:
    """osqueryd writes the bytes of a snapshot as they are; it would send a refused batch for ever."""
    body = as_utf8(b'{"log_type":"result","data":[{"snapshot":[{"path":"caf\xe9 \xc3\xa9"}]}]}')
    (line,) = log_lines(decode(body, LogBatch))
    assert json.loads(line.text) == {"snapshot": [{"path": "caf� é"}]}


# answers


@pytest.mark.parametrize(
    ("status", "ok", "number"),
    [
        (0, True, 0), ("0", True, 0), (None, True, 0), ("", True, 0),
        (1, False, 1), ("1", False, 1), (78, False, 78), ("bad", False, 1), (-1, False, -1), (2**70, False, 1),
    ],
)  # fmt: skip
def test_a_status_is_zero_or_not_as_number_or_text(status: Any, ok: bool, number: int) -> None:
    body = decode(json.dumps({"queries": {"q": []}, "statuses": {"q": status}}).encode(), WriteBody)
    assert answers(body) == [Answer("q", ok, number, [], "", {})]


def test_answers_are_read_with_messages_and_stats() -> None:
    body = decode(
        b'{"queries":{"q1":[{"col":"val"}],"bad":[]},"statuses":{"q1":0,"bad":1},"messages":{"q1":"","bad":"no such"},'
        b'"stats":{"q1":{"wall_time_ms":1,"user_time":"2"},"bad":{}},"node_key":"k"}',
        WriteBody,
    )
    assert answers(body) == [
        Answer("q1", True, 0, [{"col": "val"}], "", {"wall_time_ms": 1, "user_time": "2"}),
        Answer("bad", False, 1, [], "no such", {}),
    ]


def test_answers_of_old_agents_have_rows_only() -> None:
    (answer,) = answers(decode(b'{"queries":{"q":[{"a":"1"}]},"node_key":"k"}', WriteBody))
    assert (answer.ok, answer.rows, answer.message, answer.stats) == (True, [{"a": "1"}], "", {})


def test_a_failed_query_may_be_named_by_its_status_only() -> None:
    assert answers(decode(b'{"queries":{},"statuses":{"q":1}}', WriteBody)) == [Answer("q", False, 1, [], "", {})]
    assert answers(decode(b"{}", WriteBody)) == []


@pytest.mark.parametrize("rows", ["null", '"x"', "{}", "[1, null]", "3"])
def test_rows_that_are_no_rows_are_none(rows: str) -> None:
    (answer,) = answers(decode(b'{"queries":{"q":%s}}' % rows.encode(), WriteBody))
    assert answer.rows == []


# numbers


@pytest.mark.parametrize(("value", "number"), [(0, 0), (7, 7), ("7", 7), (" 7 ", 7), ("0", 0)])
def test_a_whole_number_may_be_text(value: Any, number: int) -> None:
    assert whole(value, "block_id", 0, 7) == number


@pytest.mark.parametrize("value", [-1, 8, "8", "", "x", "1.0", "9" * 5000, 2**70])
def test_a_number_out_of_bounds_is_refused_by_name(value: Any) -> None:
    with pytest.raises(Refused, match="block_id: expected an integer from 0 to 7") as caught:
        whole(value, "block_id", 0, 7)
    assert len(caught.value.message) < 200
