"""Bodies of POST /events/*: both dialects in, events and changes out; every error says its line. Pure.

g1 is NDJSON: line 1 ``{"agent": {...}}``, then headers and data. The spike's is one JSON event, an array of them,
``{"events": [...]}``, or an event per line. A large body may be read in a thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from .errors import CommsError, bad_request
from .messages import Agent, Event, Json, Operation, Profile, Result, StateChange

T = TypeVar("T")

LINES_MAX = 100_000
EVENTS_MAX = 25_000
DEPTH_MAX = 64
"""Of nested objects and arrays in one event."""
ID_MAX_BYTES = 512
"""As OpenSearch allows for a document's."""
WORD_MAX_CHARS = 128
"""Of a module or a collector."""

CODE_COLLECTOR = 1763
CODE_MODULE = 1765
CODE_STATEFUL = 2709
CODE_STATELESS = 2710

INVENTORY = ("hardware", "hotfixes", "networks", "packages", "ports", "processes", "system")
"""Collectors of the module inventory; each has an index of its own."""
MODULES = MappingProxyType(
    {
        "command": "wazuh-commands",
        "fim": "wazuh-states-fim",
        "inventory": "wazuh-states-inventory",
        "sca": "wazuh-states-sca",
        "vulnerability": "wazuh-states-vulnerabilities",
    }
)
"""Index by module; that of inventory has the collector behind it."""
OWN_INDEX = "wazuh-states-custom"
"""For the spike's events that name no module."""

HEADER_WORDS = frozenset({"module", "collector", "id", "operation", "type"})
ENVELOPE_WORDS = HEADER_WORDS | {"agent", "uuid", "UUID", "data"}


class RawEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A stateless event as it was sent."""

    module: str = ""
    collector: str = ""
    id: str = ""
    """As the sender named it; empty when it did not."""
    data: Json


class Stateless(msgspec.Struct, frozen=True, kw_only=True):
    profile: Profile
    claimed: tuple[str, ...]
    """The agents that the body says it is from, each once."""
    facts: dict[str, Json]
    """What line 1 tells of the agent; empty in the spike's."""
    events: list[RawEvent]


class ResultReport(msgspec.Struct, frozen=True, kw_only=True):
    """An agent tells what became of a command."""

    id: str
    result: Result


class Bad(msgspec.Struct, frozen=True, kw_only=True):
    """One item that is refused; the others of its request are not touched."""

    id: str
    """Empty when there is none that could be read."""
    message: str
    """With the line, or the event's number."""
    code: int


class Stateful(msgspec.Struct, frozen=True, kw_only=True):
    profile: Profile
    claimed: tuple[str, ...]
    facts: dict[str, Json]
    items: list[StateChange | ResultReport | Bad]


class _Place(msgspec.Struct, frozen=True):
    """One JSON object of a body and where it stood: ``line 7``, ``event 2``."""

    where: str
    value: dict[str, Json]


class _BadItem(Exception):
    def __init__(self, message: str, code: int = CODE_STATEFUL) -> None:
        super().__init__(message)
        self.code = code


def read_stateless(body: bytes, *, profile: Profile | None = None) -> Stateless:
    """The events of a body; ``profile`` overrides what it looks like. Raises CommsError 400 (code 2710) or 413."""
    places, is_g1 = _read(body, profile, CODE_STATELESS)
    if is_g1:
        facts, events = _agent_line(places[0], CODE_STATELESS), list(_g1_events(places[1:]))
        claimed: tuple[str, ...] = (facts["id"],)
    else:
        facts, events, claimed = {}, [_spike_event(place) for place in places], _claims(places)
    if not events:
        raise bad_request("body: expected at least one event, got none", code=CODE_STATELESS)
    if len(events) > EVENTS_MAX:
        raise _too_many(f"{EVENTS_MAX} events", str(len(events)))
    return Stateless(profile=Profile.G1 if is_g1 else Profile.SPIKE, claimed=claimed, facts=facts, events=events)


def read_stateful(body: bytes, *, profile: Profile | None = None) -> Stateful:
    """The operations of a body, in order. Raises CommsError 400 (code 2709) or 413 when its lines make no sense."""
    places, is_g1 = _read(body, profile, CODE_STATEFUL)
    if is_g1:
        facts, items = _agent_line(places[0], CODE_STATEFUL), list(_g1_items(places[1:]))
        claimed: tuple[str, ...] = (facts["id"],)
    else:
        facts, items, claimed = {}, [_spike_item(place) for place in places], _claims(places)
    if not items:
        raise bad_request("body: expected at least one event, got none", code=CODE_STATEFUL)
    if len(items) > EVENTS_MAX:
        raise _too_many(f"{EVENTS_MAX} events", str(len(items)))
    return Stateful(profile=Profile.G1 if is_g1 else Profile.SPIKE, claimed=claimed, facts=facts, items=items)


def check_claims(claimed: Sequence[str], uuid: str) -> None:
    """Raises CommsError 400 when a body says it is from another agent than its token's.

    400, because the C++ agent takes 403 as a reason to log in again at once.
    """
    for claim in claimed:
        if claim.lower() != uuid.lower():
            raise bad_request(
                f"agent: expected the token's {uuid}, got {claim[:64]!r}; an agent sends only its own events",
                reason="wrong_identity",
            )


def stored_events(parsed: Stateless, agent: Agent, *, now: float, new_id: Callable[[], str], key: str) -> list[Event]:
    """The events with the ids that consumers recognise repetitions by.

    An event that its sender named, or that came under an Idempotency-Key (``key``), gets the same id when it is sent
    again; its content is part of the id, so that a name used twice for different things loses nothing.
    Their data is encoded JSON (`msgspec.Raw`), because thousands may have to wait.
    """
    base = "" if key else new_id()
    return [
        Event(
            agent=agent.uuid,
            tenant=agent.tenant,
            module=raw.module,
            collector=raw.collector,
            data=msgspec.Raw(msgspec.json.encode(raw.data)),
            received_at=now,
            id=_event_id(raw, agent.uuid, base, key, number),
        )
        for number, raw in enumerate(parsed.events)
    ]


def _event_id(raw: RawEvent, agent: str, base: str, key: str, number: int) -> str:
    if not raw.id and not key:
        return f"{base}-{number}"
    name = ["id", raw.id] if raw.id else ["key", key, number]
    told = [agent, *name, raw.module, raw.collector, raw.data]
    return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()[:32]


def agent_facts(agent: Agent) -> dict[str, Json]:
    """What a stored document and the engine are told of the agent: identity and groups as the box knows them."""
    return {
        "id": agent.uuid,
        "name": agent.name,
        "type": agent.type,
        "version": agent.version,
        "groups": list(agent.groups),
        "host": agent.host,
    }


# JSON


def _read(body: bytes, profile: Profile | None, code: int) -> tuple[list[_Place], bool]:
    """The objects of a body, and whether they are g1's lines."""
    if not body.strip():
        raise bad_request("body: expected events as JSON, got nothing", code=code)
    if body.count(b"\n") >= LINES_MAX:
        raise _too_many(f"{LINES_MAX} lines", str(body.count(b"\n") + 1))
    lines = [(number, line) for number, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    if profile is not Profile.SPIKE and _is_g1(lines, profile):
        return [_line(number, line, code) for number, line in lines], True
    return _spike_objects(body, lines, code), False


def _is_g1(lines: list[tuple[int, bytes]], profile: Profile | None) -> bool:
    """Line 1 holds nothing but an ``agent`` object, and more follow."""
    if profile is Profile.G1:
        return True
    if len(lines) < 2 or b'"agent"' not in lines[0][1]:
        return False
    try:
        first = msgspec.json.decode(lines[0][1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(first, dict) and list(first) == ["agent"] and isinstance(first["agent"], dict)


def _spike_objects(body: bytes, lines: list[tuple[int, bytes]], code: int) -> list[_Place]:
    try:
        whole = _decode(body)
    except ValueError as error:
        if len(lines) == 1 or not _is_json(lines[0][1]):
            raise bad_request(f"{_line_of(body, str(error))}: {error}", code=code) from None
        return [_line(number, line, code) for number, line in lines]
    if isinstance(whole, dict) and isinstance(events := whole.get("events"), list):
        outer = {word: whole[word] for word in ("agent", "uuid", "UUID") if word in whole}
        places = _numbered(events, code)
        return [_Place(place.where, {**outer, **place.value}) for place in places] if outer else places
    if isinstance(whole, list):
        return _numbered(whole, code)
    return [_Place("event 1", _object(whole, "body", code))]


def _numbered(events: list[Json], code: int) -> list[_Place]:
    if len(events) > EVENTS_MAX:
        raise _too_many(f"{EVENTS_MAX} events", str(len(events)))
    return [
        _Place(f"event {number}", _object(event, f"event {number}", code)) for number, event in enumerate(events, 1)
    ]


def _line(number: int, line: bytes, code: int) -> _Place:
    where = f"line {number}"
    try:
        return _Place(where, _object(_decode(line), where, code))
    except ValueError as error:
        raise bad_request(f"{where}: {error}", code=code) from None


def _object(value: Json, where: str, code: int) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise bad_request(f"{where}: expected a JSON object, got {_kind(value)}", code=code)
    return value


def _decode(text: bytes) -> Json:
    """Raises ValueError with the reason."""
    try:
        value = msgspec.json.decode(text)
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8, got bytes that are not") from None
    except RecursionError:
        raise ValueError(f"expected at most {DEPTH_MAX} levels of JSON, got more") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"expected JSON, got something else: {error}") from None
    if text.count(b"{") + text.count(b"[") > DEPTH_MAX and _is_too_deep(value):
        raise ValueError(f"expected at most {DEPTH_MAX} levels of JSON, got more")
    return value


def _is_json(text: bytes) -> bool:
    try:
        _decode(text)
    except ValueError:
        return False
    return True


def _is_too_deep(value: Json) -> bool:
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX + 2):  # an array around the events, and the object that holds it
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _line_of(body: bytes, error: str) -> str:
    found = re.search(r"\(byte (\d+)\)", error)
    line = body.count(b"\n", 0, int(found[1])) + 1 if found else 0
    return f"line {line}" if line else "body"


def _kind(value: Json) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    for kind, name in ((str, "a text"), (list, "an array"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return "a number"


def _too_many(expected: str, got: str) -> CommsError:
    return CommsError(
        413, "too_large", f"body: expected at most {expected} in one request, got {got}; send less at once"
    )


# g1


def _agent_line(place: _Place, code: int) -> dict[str, Json]:
    facts = place.value.get("agent")
    if not isinstance(facts, dict) or not isinstance(facts.get("id"), str) or not facts["id"]:
        raise bad_request(f'{place.where}: expected {{"agent": {{"id": ...}}}}, got no id of an agent', code=code)
    return facts


def _g1_events(places: Sequence[_Place]) -> Iterator[RawEvent]:
    header: dict[str, Json] | None = None
    for place in places:
        if _is_subheader(place.value):
            header = place.value
        elif header is None:
            raise bad_request(
                f'{place.where}: expected a header such as {{"module": "logcollector", "collector": "file"}}, '
                f"got {_members(place.value)}",
                code=CODE_STATELESS,
            )
        else:
            yield RawEvent(
                module=_word(header, "module"),
                collector=_word(header, "collector"),
                id=_word(header, "id", ID_MAX_BYTES),
                data=place.value,
            )


def _is_subheader(value: dict[str, Json]) -> bool:
    return isinstance(value.get("module"), str) and value.keys() <= HEADER_WORDS


def _is_header(value: dict[str, Json]) -> bool:
    return "operation" in value and _is_subheader(value)


def _g1_items(places: Sequence[_Place]) -> Iterator[StateChange | ResultReport | Bad]:
    left = list(reversed(places))
    while left:
        head = left.pop()
        if "module" not in head.value:
            raise bad_request(
                f'{head.where}: expected an operation\'s header with "module", "id" and "operation", '
                f"got {_members(head.value)}",
                code=CODE_STATEFUL,
            )
        data: dict[str, Json] | None = None
        if head.value.get("operation") != Operation.DELETE and left and not _is_header(left[-1].value):
            data = left.pop().value
        yield _guarded(head, lambda head=head, data=data: _item(head.value, data))  # type: ignore[misc]


def _members(value: dict[str, Json]) -> str:
    return f"the members {', '.join(list(value)[:5])}"[:120] if value else "an empty object"


# the spike


def _spike_event(place: _Place) -> RawEvent:
    event = place.value
    data = event["data"] if "data" in event and event.keys() <= ENVELOPE_WORDS else event
    return RawEvent(
        module=_word(event, "module"),
        collector=_word(event, "collector"),
        id=_word(event, "id", ID_MAX_BYTES),
        data=data,
    )


def _spike_item(place: _Place) -> StateChange | ResultReport | Bad:
    return _guarded(place, lambda: _from_event(place.value))


def _from_event(event: dict[str, Json]) -> StateChange | ResultReport:
    header: dict[str, Json] = {"operation": Operation.UPDATE, **event}
    data = event.get("data")
    if "data" not in event:
        data = {word: value for word, value in event.items() if word not in ENVELOPE_WORDS} or None
    if "id" not in event and data is not None:
        # An event without a name is known by its content, so that a repetition finds it.
        header["id"] = hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:32]
    return _item(header, data)


def _claims(places: Sequence[_Place]) -> tuple[str, ...]:
    claims: dict[str, None] = {}
    for place in places:
        agent = place.value.get("agent")
        told = [agent.get("id"), agent.get("uuid")] if isinstance(agent, dict) else [agent]
        for claim in (*told, *(place.value.get(word) for word in ("agent.id", "uuid", "UUID"))):
            if isinstance(claim, str):
                claims[claim] = None
            elif claim is not None:
                raise bad_request(f"{place.where}: expected the agent's uuid as a text, got {_kind(claim)}")
    return tuple(claims)


# one stateful item, in both dialects


def _guarded(place: _Place, read: Callable[[], StateChange | ResultReport]) -> StateChange | ResultReport | Bad:
    try:
        return read()
    except _BadItem as error:
        return Bad(id=_word(place.value, "id", ID_MAX_BYTES), message=f"{place.where}: {error}", code=error.code)


def _item(header: dict[str, Json], data: Json) -> StateChange | ResultReport:
    module = header.get("module", "")
    index = _index(module, header.get("collector"))
    name = _id(header.get("id"))
    operation = _operation(header.get("operation"))
    if module == "command":
        return ResultReport(id=name, result=_result(operation, data))
    if operation is Operation.DELETE:
        return StateChange(index=index, id=name, operation=operation)
    if data is None:
        raise _BadItem(f"expected the data to {operation} {name[:64]!r} with, got none")
    if not isinstance(data, dict):
        raise _BadItem(f"data: expected a JSON object, got {_kind(data)}")
    return StateChange(index=index, id=name, operation=operation, data=data)


def _id(told: Json) -> str:
    if isinstance(told, str) and 0 < (size_bytes := len(told.encode())) <= ID_MAX_BYTES:
        return told
    got = f"{size_bytes} bytes" if isinstance(told, str) else "none" if told is None else _kind(told)
    raise _BadItem(f"id: expected a text of 1 to {ID_MAX_BYTES} bytes, got {got}")


def _index(module: Json, collector: Json) -> str:
    if module == "":
        return OWN_INDEX
    if not isinstance(module, str) or module not in MODULES:
        raise _BadItem(f"module: expected one of {', '.join(MODULES)}, got {_shown(module)}", CODE_MODULE)
    if module != "inventory":
        return MODULES[module]
    if not isinstance(collector, str) or collector not in INVENTORY:
        raise _BadItem(f"collector: expected one of {', '.join(INVENTORY)}, got {_shown(collector)}", CODE_COLLECTOR)
    return f"{MODULES[module]}-{collector}"


def _operation(word: Json) -> Operation:
    if isinstance(word, str) and word in tuple(Operation):
        return Operation(word)
    raise _BadItem(f"operation: expected one of {', '.join(Operation)}, got {_shown(word)}")


def _result(operation: Operation, data: Json) -> Result:
    """g1 says ``{"command": {"result": {...}}}``, the spike's ``{"result": {...}}``."""
    if operation is Operation.DELETE:
        raise _BadItem("operation: expected update for a command's result, got delete")
    outer = data.get("command", data) if isinstance(data, dict) else None
    told = outer.get("result") if isinstance(outer, dict) else None
    try:
        return msgspec.convert(told, Result)
    except msgspec.ValidationError as error:
        raise _BadItem(
            f'expected {{"command": {{"result": {{"code", "message"}}}}}} as the result of a command: {error}'
        ) from None


def _word(value: dict[str, Json], name: str, limit: int = WORD_MAX_CHARS) -> str:
    """A text of a header, no longer than is kept; empty when there is none."""
    word = value.get(name)
    return word[:limit] if isinstance(word, str) else ""


def _shown(value: Json) -> str:
    return repr(value[:40]) if isinstance(value, str) else "none" if value is None else _kind(value)
