"""The binary protocol: osquery's byte vectors, round trips, and bytes nobody should send."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox.agent.extension import messages, thrift
from osqbox.agent.extension.messages import ExtensionInfo, Response, Status
from osqbox.agent.extension.thrift import Decoder, Kind, ListOf, MapOf, Message, MessageKind, ProtocolError, StructOf

PING = bytes.fromhex("80010001 00000004 70696e67 00000000 00")
PONG = bytes.fromhex(
    "80010002 00000004 70696e67 00000000 0c0000 080001 00000000 0b0002 00000004 706f6e67 0a0003 0000000000000000 00 00"
)
SHUTDOWN_REPLY = bytes.fromhex("80010002 00000008 73687574646f776e 00000000 00")


def test_ping_is_written_as_osquery_writes_it() -> None:
    assert messages.encode_call("ping") == PING
    [call] = messages.requests().feed(PING)
    assert call == Message("ping", MessageKind.CALL, 0, {})
    assert messages.encode_reply(call, Status(0, "pong").wire()) == PONG


def test_pong_is_read_as_osquery_writes_it() -> None:
    [reply] = messages.replies().feed(PONG)
    assert messages.read_status(messages.result("ping", reply)) == Status(0, "pong", 0)


def test_a_shutdown_is_answered_with_nothing() -> None:
    [call] = messages.requests().feed(messages.encode_call("shutdown"))
    assert messages.encode_reply(call, None) == SHUTDOWN_REPLY
    [reply] = messages.replies().feed(SHUTDOWN_REPLY)
    assert messages.result("shutdown", reply) is None


ROWS = [{"pid": "1", "name": "ü"}, {}]
REPLIES: list[tuple[str, Any]] = [
    ("ping", Status(0, "pong").wire()),
    ("call", Response(Status(1, "no"), ROWS).wire()),
    ("extensions", {7: ExtensionInfo("a", "1", "5.0.0", "1.8.0").wire(), 2**40: ExtensionInfo("b").wire()}),
    ("options", {"verbose": {1: "true", 2: "false", 3: "bool"}}),
    ("registerExtension", Status(0, "OK", 40000).wire()),
    ("query", Response(Status(), ROWS).wire()),
]


@pytest.mark.parametrize(("name", "value"), REPLIES)
@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_a_reply_survives_in_pieces_and_with_a_tail(name: str, value: Any, piece_bytes: int) -> None:
    raw = messages.encode_reply(Message(name, MessageKind.CALL, 3), value)
    decoder, found = messages.replies(), []
    stream = raw + raw
    for start in range(0, len(stream), piece_bytes):
        found += decoder.feed(stream[start : start + piece_bytes])
    assert [messages.result(name, reply) for reply in found] == [value, value]
    assert [reply.seqid for reply in found] == [3, 3]
    assert not decoder.is_pending


@pytest.mark.parametrize("size", range(1, len(PONG)))
def test_every_beginning_of_a_message_is_pending(size: int) -> None:
    decoder = messages.replies()
    assert decoder.feed(PONG[:size]) == []
    assert decoder.is_pending


# -- round trips -------------------------------------------------------------------------------------------------

_TEXT = st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))
_PLAIN: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.BOOL: st.booleans(),
    Kind.BYTE: st.integers(-(2**7), 2**7 - 1),
    Kind.I16: st.integers(-(2**15), 2**15 - 1),
    Kind.I32: st.integers(-(2**31), 2**31 - 1),
    Kind.I64: st.integers(-(2**63), 2**63 - 1),
    Kind.DOUBLE: st.floats(allow_nan=False),
    Kind.STRING: _TEXT.map(lambda text: thrift.to_bytes(text).decode("utf-8", "surrogateescape")),
}
_KEYS = st.sampled_from([Kind.STRING, Kind.I32, Kind.I64, Kind.BOOL])
_TYPES: st.SearchStrategy[thrift.Type] = st.recursive(
    st.sampled_from(sorted(_PLAIN)),
    lambda inner: (
        inner.map(ListOf)
        | st.builds(MapOf, _KEYS, inner)
        | st.dictionaries(st.integers(-5, 300), inner, max_size=4).map(StructOf)
    ),
    max_leaves=6,
)


def values(type_: thrift.Type) -> st.SearchStrategy[Any]:
    match type_:
        case ListOf(item):
            return st.lists(values(item), max_size=4)
        case MapOf(key, item):
            return st.dictionaries(values(key), values(item), max_size=4)
        case StructOf(fields):
            return st.fixed_dictionaries({}, optional={number: values(kind) for number, kind in fields.items()})
    return _PLAIN[type_]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_of_any_type_survives(data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.integers(0, 9), _TYPES, max_size=4))
    schema = StructOf(fields)
    sent = Message("name", MessageKind.REPLY, data.draw(_PLAIN[Kind.I32]), data.draw(values(schema)))
    raw = thrift.encode(sent, schema)
    cut = data.draw(st.integers(0, len(raw)))
    wanted, nothing = Decoder(lambda _name, _kind: schema), Decoder(lambda _name, _kind: StructOf({}))
    assert wanted.feed(raw[:cut]) + wanted.feed(raw[cut:]) == [sent]
    [skipped] = nothing.feed(raw)
    assert (skipped.fields, nothing.is_pending) == ({}, False)


def test_a_field_of_another_type_than_expected_is_skipped() -> None:
    """As Thrift's generated code does; the peer may be of another version."""
    other = StructOf({1: Kind.STRING, 2: ListOf(MapOf(Kind.STRING, Kind.I64)), 9: Kind.DOUBLE})
    raw = thrift.encode(Message("ping", MessageKind.REPLY, 0, {1: "x", 2: [{"a": 1}], 9: 1.0}), other)
    decoder = Decoder(lambda _name, _kind: StructOf({1: Kind.I32, 2: Kind.STRING, 9: Kind.DOUBLE}))
    assert [message.fields for message in decoder.feed(raw)] == [{9: 1.0}]


def test_text_that_is_no_utf8_passes_through() -> None:
    raw = messages.encode_call("query", b"\xff\xfe".decode("utf-8", "surrogateescape"))
    assert b"\xff\xfe" in raw
    [call] = messages.requests().feed(raw)
    assert messages.encode_call("query", *messages.arguments(call)) == raw


def test_a_lone_surrogate_is_replaced() -> None:
    assert b"?" in messages.encode_call("query", "\ud800")


def test_absent_arguments_have_thrifts_defaults() -> None:
    [call] = messages.requests().feed(thrift.encode(Message("call", MessageKind.CALL, 0, {}), StructOf({})))
    assert messages.arguments(call) == ["", "", {}]


# -- what nobody should send -------------------------------------------------------------------------------------

_HEAD = bytes.fromhex("80010001 00000004") + b"call" + bytes(4)
HOSTILE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "not strict": bytes.fromhex("00000004") + b"ping" + b"\x01" + bytes(5),
    "message type 9": bytes.fromhex("80010009 00000004") + b"ping" + bytes(5),
    "negative name": bytes.fromhex("80010001 ffffffff"),
    "endless name": bytes.fromhex("80010001 7fffffff"),
    "negative text": _HEAD + bytes.fromhex("0b0001 80000000"),
    "endless text": _HEAD + bytes.fromhex("0b0001 7fffffff"),
    "endless map": _HEAD + bytes.fromhex("0d0003 0b0b 7fffffff"),
    "endless skipped list": _HEAD + bytes.fromhex("0f0009 02 7fffffff"),
    "map of other types": _HEAD + bytes.fromhex("0d0003 0808 00000001") + bytes(8),
    "unknown type": _HEAD + bytes.fromhex("070009"),
    "list of stops": _HEAD + bytes.fromhex("0f0009 00 00000002"),
    "deep structs": _HEAD + bytes.fromhex("0c0009") * 1000,
    "deep lists": _HEAD + bytes.fromhex("0f0009") + bytes.fromhex("0f 00000001") * 1000,
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_at_once(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.requests().feed(raw)


def test_a_message_over_its_bounds_is_refused() -> None:
    raw = messages.encode_call("query", "x" * 100)
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        Decoder(lambda _name, _kind: StructOf({1: Kind.STRING}), max_message_bytes=100).feed(raw)
    many = messages.encode_call("call", "", "", {str(number): "" for number in range(100)})
    with pytest.raises(ProtocolError, match="over the bounds"):
        Decoder(lambda name, _kind: messages.METHODS[name].call, max_values=50).feed(many)


def test_the_bounds_are_those_of_one_message() -> None:
    raw = messages.encode_call("query", "x" * 50)
    decoder = Decoder(lambda _name, _kind: StructOf({1: Kind.STRING}), max_message_bytes=100, max_values=5)
    assert len(decoder.feed(raw * 20)) == 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", _HEAD, bytes.fromhex("80010002 00000004") + b"ping"]))
def test_any_bytes_are_read_or_refused(raw: bytes, head: bytes) -> None:
    for decoder in (messages.requests(), messages.replies()):
        try:
            for message in decoder.feed(head + raw):
                assert isinstance(message, Message)
        except ProtocolError:
            pass


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(REPLIES), st.data())
def test_a_flipped_byte_never_does_worse_than_a_refusal(reply: tuple[str, Any], data: st.DataObject) -> None:
    name, value = reply
    raw = bytearray(messages.encode_reply(Message(name, MessageKind.CALL, 0), value))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        for message in messages.replies().feed(raw):
            messages.result(name, message)
    except (ProtocolError, messages.UnknownMethod):
        pass


def test_a_number_out_of_range_cannot_be_written() -> None:
    with pytest.raises(struct.error):
        messages.encode_call("deregisterExtension", 2**63)
