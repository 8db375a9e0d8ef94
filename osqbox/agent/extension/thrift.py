"""Thrift's strict binary protocol, unframed: typed values to bytes, bytes to typed values as they arrive. Pure.

The part osquery's extensions use (osquery/extensions/thrift/osquery.thrift), after
https://github.com/apache/thrift/blob/master/doc/specs/thrift-binary-protocol.md. As in Thrift's generated code, a
field nobody asked for, or of another type than asked for, is skipped. Everything read is bounded: bytes and values
of a message, nesting, the length of a name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_VALUES = 4_000_000
"""Of one message: what a value costs here is a multiple of what it costs on the wire."""
MAX_DEPTH = 16
MAX_NAME_BYTES = 128

_VERSION_1 = 0x8001_0000
_VERSION_MASK = 0xFFFF_0000


class ProtocolError(Exception):
    """The bytes are no message of this protocol, or one over a bound. The connection is of no further use."""


class Kind(IntEnum):
    STOP = 0
    BOOL = 2
    BYTE = 3
    DOUBLE = 4
    I16 = 6
    I32 = 8
    I64 = 10
    STRING = 11
    STRUCT = 12
    MAP = 13
    SET = 14
    LIST = 15


class MessageKind(IntEnum):
    CALL = 1
    REPLY = 2
    EXCEPTION = 3
    ONEWAY = 4


@dataclass(frozen=True, slots=True)
class ListOf:
    item: Type


@dataclass(frozen=True, slots=True)
class MapOf:
    key: Type
    value: Type


@dataclass(frozen=True, slots=True)
class StructOf:
    """Fields by number. Absent ones are absent from the value, a ``dict`` by number, too."""

    fields: Mapping[int, Type]


Type = Kind | ListOf | MapOf | StructOf
"""What a value is. Text is ``str``; bytes that are no UTF-8 survive in it as surrogates."""

Schema = Callable[[str, MessageKind], StructOf]
"""The fields wanted of a message, by its name and kind."""

_FORMATS: Mapping[Kind, struct.Struct] = {
    Kind.BOOL: struct.Struct(">?"),
    Kind.BYTE: struct.Struct(">b"),
    Kind.I16: struct.Struct(">h"),
    Kind.I32: struct.Struct(">i"),
    Kind.I64: struct.Struct(">q"),
    Kind.DOUBLE: struct.Struct(">d"),
}
_KINDS = frozenset(int(kind) for kind in Kind if kind is not Kind.STOP)
_MIN_BYTES: Mapping[Kind, int] = {
    **{kind: format_.size for kind, format_ in _FORMATS.items()},
    Kind.STRING: 4,
    Kind.STRUCT: 1,
    Kind.MAP: 6,
    Kind.SET: 5,
    Kind.LIST: 5,
}


def kind_of(type_: Type) -> Kind:
    match type_:
        case ListOf():
            return Kind.LIST
        case MapOf():
            return Kind.MAP
        case StructOf():
            return Kind.STRUCT
    return type_


@dataclass(frozen=True, slots=True)
class Message:
    name: str
    kind: MessageKind
    seqid: int
    fields: Mapping[int, Any] = field(default_factory=dict)


# -- writing -----------------------------------------------------------------------------------------------------


def encode(message: Message, schema: StructOf) -> bytes:
    """Raises struct.error for a number that does not fit its type."""
    out = bytearray()
    out += struct.pack(">I", _VERSION_1 | message.kind)
    _write(out, Kind.STRING, message.name)
    out += struct.pack(">i", message.seqid)
    _write(out, schema, message.fields)
    return bytes(out)


def _write(out: bytearray, type_: Type, value: Any) -> None:
    match type_:
        case ListOf(item):
            out += struct.pack(">Bi", kind_of(item), len(value))
            for one in value:
                _write(out, item, one)
        case MapOf(key, item):
            out += struct.pack(">BBi", kind_of(key), kind_of(item), len(value))
            for name, one in value.items():
                _write(out, key, name)
                _write(out, item, one)
        case StructOf(fields):
            for number, kind in fields.items():
                if number in value:
                    out += struct.pack(">Bh", kind_of(kind), number)
                    _write(out, kind, value[number])
            out.append(Kind.STOP)
        case Kind.STRING:
            raw = to_bytes(value)
            out += struct.pack(">i", len(raw))
            out += raw
        case _:
            out += _FORMATS[type_].pack(value)


def to_bytes(text: str) -> bytes:
    """UTF-8; what came in as other bytes goes out as those; a surrogate from elsewhere is replaced."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


# -- reading -----------------------------------------------------------------------------------------------------

Reading = Generator[None, None, Any]
"""A step of the reader, written as if the bytes were there: it yields where it needs more."""


class Decoder:
    """Messages out of a stream that arrives in pieces. Each byte is looked at once."""

    def __init__(
        self, schema: Schema, *, max_message_bytes: int = MAX_MESSAGE_BYTES, max_values: int = MAX_VALUES
    ) -> None:
        self._schema = schema
        self._max_message_bytes = max_message_bytes
        self._max_values = max_values
        self._buffer = bytearray()
        self._at = 0
        self._begun = False
        self._bytes_left = max_message_bytes
        self._values_left = max_values
        self._reading = self._message()

    @property
    def is_pending(self) -> bool:
        """Whether a message has begun and is not complete."""
        return self._begun or len(self._buffer) > self._at

    def feed(self, data: bytes | bytearray) -> list[Message]:
        """The messages that ``data`` completes. Raises ProtocolError."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data
        complete: list[Message] = []
        while True:
            try:
                next(self._reading)
            except StopIteration as end:
                complete.append(end.value)
                self._begun = False
                self._bytes_left, self._values_left = self._max_message_bytes, self._max_values
                self._reading = self._message()
                continue
            return complete

    def _message(self) -> Generator[None, None, Message]:
        version = yield from self._number(_UNSIGNED)
        self._begun = True
        if version & _VERSION_MASK != _VERSION_1:
            raise ProtocolError(f"expected a strict binary message (80 01 ..), got {version:08x}")
        if version & 0xFF not in MessageKind.__members__.values():
            raise ProtocolError(f"message type {version & 0xFF} does not exist")
        size = yield from self._size()
        if size > MAX_NAME_BYTES:
            raise ProtocolError(f"the name of a message has {size} bytes, at most {MAX_NAME_BYTES} are read")
        name = _text((yield from self._take(size)))
        seqid = yield from self._number(_FORMATS[Kind.I32])
        kind = MessageKind(version & 0xFF)
        fields = yield from self._struct(self._schema(name, kind).fields, 0)
        return Message(name, kind, seqid, fields)

    def _struct(self, wanted: Mapping[int, Type], depth: int) -> Reading:
        found: dict[int, Any] = {}
        while True:
            code = (yield from self._take(1))[0]
            if code == Kind.STOP:
                return found
            number = yield from self._number(_FORMATS[Kind.I16])
            type_ = wanted.get(number)
            if type_ is not None and kind_of(type_) == code:
                found[number] = yield from self._value(type_, depth + 1)
            else:
                yield from self._skip(_kind(code), depth + 1)

    def _value(self, type_: Type, depth: int) -> Reading:
        self._count(depth)
        match type_:
            case Kind.STRING:
                size = yield from self._size()
                return _text((yield from self._take(size)))
            case MapOf(key, item):
                return (yield from self._map(key, item, depth))
            case ListOf(item):
                return (yield from self._list(item, depth))
            case StructOf(fields):
                return (yield from self._struct(fields, depth))
        return (yield from self._number(_FORMATS[type_]))

    def _map(self, key: Type, item: Type, depth: int) -> Reading:
        codes = yield from self._take(2)
        size = yield from self._size()
        if size and (codes[0], codes[1]) != (kind_of(key), kind_of(item)):
            raise ProtocolError(f"expected a map of types {kind_of(key)}, {kind_of(item)}, got {codes[0]}, {codes[1]}")
        self._check_room(size, _MIN_BYTES[kind_of(key)] + _MIN_BYTES[kind_of(item)])
        found: dict[Any, Any] = {}
        for _ in range(size):
            name = self._text_at_hand(key)
            if name is None:
                name = yield from self._value(key, depth + 1)
            value = self._text_at_hand(item)
            if value is None:
                value = yield from self._value(item, depth + 1)
            found[name] = value
        return found

    def _text_at_hand(self, type_: Type) -> str | None:
        """The text at this place if it is one and all of it has arrived: rows are little else, and many."""
        start = self._at + 4
        if type_ is not Kind.STRING or start > len(self._buffer):
            return None
        size: int = _FORMATS[Kind.I32].unpack_from(self._buffer, self._at)[0]
        if size < 0 or start + size > len(self._buffer) or 4 + size > self._bytes_left:
            return None
        self._at = start + size
        self._bytes_left -= 4 + size
        self._count(0)
        return _text(self._buffer[start : self._at])

    def _list(self, item: Type, depth: int) -> Reading:
        code = (yield from self._take(1))[0]
        size = yield from self._size()
        if size and code != kind_of(item):
            raise ProtocolError(f"expected a list of type {kind_of(item)}, got {code}")
        self._check_room(size, _MIN_BYTES[kind_of(item)])
        found: list[Any] = []
        for _ in range(size):
            found.append((yield from self._value(item, depth + 1)))  # noqa: PERF401 - yields
        return found

    def _skip(self, kind: Kind, depth: int) -> Reading:
        self._count(depth)
        if kind in _FORMATS:
            yield from self._take(_FORMATS[kind].size)
        elif kind is Kind.STRING:
            yield from self._take((yield from self._size()))
        elif kind is Kind.STRUCT:
            yield from self._struct({}, depth)
        else:
            codes = yield from self._take(2 if kind is Kind.MAP else 1)
            size = yield from self._size()
            kinds = [_kind(code) for code in codes] if size else []
            self._check_room(size, sum(_MIN_BYTES[one] for one in kinds))
            for _ in range(size):
                for one in kinds:
                    yield from self._skip(one, depth + 1)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _take(self, size: int) -> Generator[None, None, bytes]:
        if size > self._bytes_left:
            raise ProtocolError(f"a message has more than {self._max_message_bytes} bytes")
        self._bytes_left -= size
        while len(self._buffer) - self._at < size:
            yield
        start = self._at
        self._at = start + size
        return bytes(self._buffer[start : self._at])

    def _number(self, format_: struct.Struct) -> Reading:
        return format_.unpack((yield from self._take(format_.size)))[0]

    def _size(self) -> Generator[None, None, int]:
        size: int = yield from self._number(_FORMATS[Kind.I32])
        if size < 0:
            raise ProtocolError(f"a length of {size}")
        return size

    def _check_room(self, size: int, item_bytes: int) -> None:
        """Refuse a container that cannot fit before its first item is read."""
        if size * item_bytes > self._bytes_left or size > self._values_left:
            raise ProtocolError(f"a container of {size} items is over the bounds of a message")

    def _count(self, depth: int) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise ProtocolError(f"a message has more than {self._max_values} values")
        if depth > MAX_DEPTH:
            raise ProtocolError(f"values are nested deeper than {MAX_DEPTH} levels")


_UNSIGNED = struct.Struct(">I")


def _kind(code: int) -> Kind:
    if code not in _KINDS:
        raise ProtocolError(f"type {code} does not exist")
    return Kind(code)


def _text(raw: bytes | bytearray) -> str:
    return raw.decode("utf-8", "surrogateescape")
