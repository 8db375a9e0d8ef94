"""grpc.reflection.v1 and v1alpha: lists the services and hands out their descriptors, so that clients such as grpcurl
need no .proto file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from protobuf import Oneof

from .errors import Code

if TYPE_CHECKING:
    from protobuf import DescEnum, DescFile, DescMessage


class Descriptors:
    """Files with everything they import, found by their name or by what they declare."""

    def __init__(self, files: Iterable[DescFile]) -> None:
        self._files: dict[str, DescFile] = {}
        self._symbols: dict[str, DescFile] = {}
        self._messages: set[str] = set()
        self.services: list[str] = []
        for file in files:
            self._add(file)
            self.services += [service.type_name for service in file.services]

    def _add(self, file: DescFile) -> None:
        if file.name in self._files:
            return
        self._files[file.name] = file
        self._symbols.update((symbol, file) for symbol in _symbols(file))
        self._messages.update(message.type_name for message in _messages(file.messages))
        for imported in file.dependencies:
            self._add(imported)

    def by_name(self, name: str) -> list[bytes]:
        """The file and all it imports, serialized, itself first. Raises KeyError."""
        return _serialized(self._files[name])

    def by_symbol(self, symbol: str) -> list[bytes]:
        """The file that declares a service, method, message, field, enum or enum value. Raises KeyError."""
        return _serialized(self._symbols[symbol])

    def knows_message(self, name: str) -> bool:
        return name in self._messages


def _serialized(file: DescFile) -> list[bytes]:
    found: dict[str, bytes] = {}
    waiting = [file]
    while waiting:
        each = waiting.pop()
        if each.name not in found:
            found[each.name] = each.proto.to_binary()
            waiting += each.dependencies
    return list(found.values())


def _symbols(file: DescFile) -> Iterator[str]:
    for service in file.services:
        yield service.type_name
        yield from (f"{service.type_name}.{method.name}" for method in service.methods)
    for enum in file.enums:
        yield from _enum_symbols(enum)
    for message in _messages(file.messages):
        yield message.type_name
        yield from (f"{message.type_name}.{field.name}" for field in message.fields)
        yield from (f"{message.type_name}.{oneof.name}" for oneof in message.oneofs)
        for enum in message.nested_enums:
            yield from _enum_symbols(enum)


def _enum_symbols(enum: DescEnum) -> Iterator[str]:
    """Values are named beside their enum, not inside it (language guide, enumerations)."""
    yield enum.type_name
    scope = enum.type_name.rpartition(".")[0]
    yield from (f"{scope}.{value.name}" for value in enum.values)


def _messages(messages: Iterable[DescMessage]) -> Iterator[DescMessage]:
    for message in messages:
        yield message
        yield from _messages(message.nested_messages)


class Reflection:
    """``wire`` is the generated module of the version spoken: the two differ in their package only."""

    def __init__(self, wire: ModuleType, descriptors: Descriptors) -> None:
        self._wire = wire
        self._descriptors = descriptors

    async def server_reflection_info(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield self._wire.ServerReflectionResponse(
                valid_host=request.host, original_request=request, message_response=self._answer(request)
            )

    def _answer(self, request: Any) -> Oneof[str, Any]:
        try:
            match request.message_request:
                case Oneof("list_services", _):
                    names = [self._wire.ServiceResponse(name=name) for name in sorted(self._descriptors.services)]
                    return Oneof("list_services_response", self._wire.ListServiceResponse(service=names))
                case Oneof("file_by_filename", name):
                    return self._files(self._descriptors.by_name(name))
                case Oneof("file_containing_symbol", symbol):
                    return self._files(self._descriptors.by_symbol(symbol.removeprefix(".")))
                case Oneof("all_extension_numbers_of_type", name) if self._descriptors.knows_message(name):
                    none = self._wire.ExtensionNumberResponse(base_type_name=name)
                    return Oneof("all_extension_numbers_response", none)
                case Oneof("all_extension_numbers_of_type" | "file_containing_extension", _):
                    return self._error(Code.NOT_FOUND, "no extensions here")
        except KeyError as error:
            return self._error(Code.NOT_FOUND, f"nothing is called {error.args[0]!r} here")
        return self._error(Code.INVALID_ARGUMENT, "expected a question, got none that is known")

    def _files(self, serialized: list[bytes]) -> Oneof[str, Any]:
        answer = self._wire.FileDescriptorResponse(file_descriptor_proto=serialized)
        return Oneof("file_descriptor_response", answer)

    def _error(self, code: Code, message: str) -> Oneof[str, Any]:
        return Oneof("error_response", self._wire.ErrorResponse(error_code=code.value, error_message=message))
