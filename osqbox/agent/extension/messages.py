"""The calls of osquery's extension API, their arguments and results, as values and as bytes.

osquery/extensions/thrift/osquery.thrift of osquery 5.23. The manager offers all of them, an extension the first
three. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osqbox.agent.extension.thrift import (
    Decoder,
    Kind,
    ListOf,
    MapOf,
    Message,
    MessageKind,
    ProtocolError,
    StructOf,
    Type,
    encode,
)
from osqbox.errors import OsqboxError

OK, FAILED, FATAL = range(3)

Row = Mapping[str, str]
Rows = Sequence[Row]
Registry = Mapping[str, Mapping[str, Rows]]
"""Registry -> plugin -> routes, as an extension broadcasts what it has."""


@dataclass(frozen=True, slots=True)
class Status:
    code: int = OK
    message: str = "OK"
    uuid: int = 0

    def wire(self) -> dict[int, Any]:
        return {1: self.code, 2: self.message, 3: self.uuid}


@dataclass(frozen=True, slots=True)
class Response:
    status: Status = Status()
    rows: Rows = ()

    def wire(self) -> dict[int, Any]:
        return {1: self.status.wire(), 2: self.rows}

    @property
    def ok(self) -> bool:
        return self.status.code == OK


@dataclass(frozen=True, slots=True)
class ExtensionInfo:
    name: str
    version: str = ""
    sdk_version: str = ""
    """Empty passes the manager's check, as launcher's does."""
    min_sdk_version: str = ""

    def wire(self) -> dict[int, Any]:
        return {1: self.name, 2: self.version, 3: self.sdk_version, 4: self.min_sdk_version}


@dataclass(frozen=True, slots=True)
class OptionInfo:
    value: str
    default_value: str
    type: str

    def wire(self) -> dict[int, Any]:
        return {1: self.value, 2: self.default_value, 3: self.type}


def refused(message: str) -> Response:
    return Response(Status(FAILED, message))


# -- the calls ---------------------------------------------------------------------------------------------------

_TEXTS = MapOf(Kind.STRING, Kind.STRING)
_ROWS = ListOf(_TEXTS)
_STATUS = StructOf({1: Kind.I32, 2: Kind.STRING, 3: Kind.I64})
_RESPONSE = StructOf({1: _STATUS, 2: _ROWS})
_INFO = StructOf(dict.fromkeys((1, 2, 3, 4), Kind.STRING))
_OPTION = StructOf(dict.fromkeys((1, 2, 3), Kind.STRING))
_REGISTRY = MapOf(Kind.STRING, MapOf(Kind.STRING, _ROWS))
_TROUBLE = StructOf({1: Kind.STRING, 2: Kind.I32})


@dataclass(frozen=True, slots=True)
class Method:
    arguments: tuple[Type, ...]
    """Fields 1, 2, ..."""
    result: Type | None
    """None: the reply is empty."""

    @property
    def call(self) -> StructOf:
        return StructOf(dict(enumerate(self.arguments, 1)))

    @property
    def reply(self) -> StructOf:
        return StructOf({} if self.result is None else {0: self.result})


METHODS: Mapping[str, Method] = {
    "ping": Method((), _STATUS),
    "call": Method((Kind.STRING, Kind.STRING, _TEXTS), _RESPONSE),
    "shutdown": Method((), None),
    "extensions": Method((), MapOf(Kind.I64, _INFO)),
    "options": Method((), MapOf(Kind.STRING, _OPTION)),
    "registerExtension": Method((_INFO, _REGISTRY), _STATUS),
    "deregisterExtension": Method((Kind.I64,), _STATUS),
    "query": Method((Kind.STRING,), _RESPONSE),
    "getQueryColumns": Method((Kind.STRING,), _RESPONSE),
}
CALL = MessageKind.CALL
_EMPTY: Mapping[Type, Any] = {
    Kind.STRING: "",
    Kind.I64: 0,
}


def _absent(type_: Type) -> Any:
    """What a field is that the peer left out: Thrift's default for its type."""
    return [] if isinstance(type_, ListOf) else _EMPTY[type_] if isinstance(type_, Kind) else {}


# -- bytes -------------------------------------------------------------------------------------------------------


class UnknownMethod(OsqboxError):
    """The peer has no such call, or it failed inside: a Thrift application exception."""

    def __init__(self, message: str, type_: int) -> None:
        super().__init__(message)
        self.type = type_


UNKNOWN_METHOD, INTERNAL_ERROR = 1, 6


def requests() -> Decoder:
    """For the side that serves."""
    return Decoder(lambda name, _kind: METHODS[name].call if name in METHODS else StructOf({}))


def replies() -> Decoder:
    """For the side that calls."""

    def wanted(name: str, kind: MessageKind) -> StructOf:
        if kind is MessageKind.EXCEPTION:
            return _TROUBLE
        return METHODS[name].reply if name in METHODS else StructOf({})

    return Decoder(wanted)


def arguments(message: Message) -> list[Any]:
    """Those of a call that `METHODS` has, absent ones as Thrift's defaults."""
    wanted = METHODS[message.name].call.fields
    return [message.fields.get(number, _absent(type_)) for number, type_ in wanted.items()]


def encode_call(name: str, *given: Any, seqid: int = 0) -> bytes:
    return encode(Message(name, MessageKind.CALL, seqid, dict(enumerate(given, 1))), METHODS[name].call)


def encode_reply(call: Message, result: Any) -> bytes:
    method = METHODS[call.name]
    fields = {} if method.result is None else {0: result}
    return encode(Message(call.name, MessageKind.REPLY, call.seqid, fields), method.reply)


def encode_trouble(call: Message, type_: int, message: str) -> bytes:
    fields = {1: message, 2: type_}
    return encode(Message(call.name, MessageKind.EXCEPTION, call.seqid, fields), _TROUBLE)


def result(name: str, reply: Message) -> Any:
    """What the call brought, still as fields. Raises UnknownMethod, ProtocolError."""
    if reply.kind is MessageKind.EXCEPTION:
        raise UnknownMethod(reply.fields.get(1, ""), reply.fields.get(2, 0))
    if reply.kind is not MessageKind.REPLY or reply.name != name:
        raise ProtocolError(f"expected the reply to {name}, got {reply.kind.name} {reply.name!r}")
    method = METHODS[name]
    if method.result is not None and 0 not in reply.fields:
        raise ProtocolError(f"the reply to {name} holds no result")
    return reply.fields.get(0)


def read_status(fields: Mapping[int, Any]) -> Status:
    return Status(fields.get(1, OK), fields.get(2, ""), fields.get(3, 0))


def read_response(fields: Mapping[int, Any]) -> Response:
    return Response(read_status(fields.get(1, {})), fields.get(2, []))


def read_info(fields: Mapping[int, Any]) -> ExtensionInfo:
    return ExtensionInfo(*(fields.get(number, "") for number in (1, 2, 3, 4)))


def read_option(fields: Mapping[int, Any]) -> OptionInfo:
    return OptionInfo(*(fields.get(number, "") for number in (1, 2, 3)))
