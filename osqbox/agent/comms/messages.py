"""The words of both dialects, as an agent reads and writes them. Pure."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

VERSION = "5.0.0"
BASE = "/api/v1"
FATAL_MESSAGES = frozenset({"Invalid key", "Agent does not exist"})
"""A refused login with one of these ends a g1 agent: it has nothing else to try."""
SUCCESS, FAILURE, IN_PROGRESS, TIMED_OUT = range(4)
"""Result codes of commands."""


@dataclass(frozen=True, slots=True)
class About:
    """What an agent says of itself."""

    name: str
    type: str = "Endpoint"
    version: str = VERSION
    host: Mapping[str, Any] = field(default_factory=dict)
    """hostname, architecture, ip, os{name,type,version}."""

    def user_agent(self, product: str) -> str:
        os = self.host.get("os") or {}
        return f"{product}/{self.version} ({self.type}; {self.host.get('architecture', '')}; {os.get('type', '')})"

    def line(self, uuid: str, groups: Sequence[str]) -> bytes:
        """The first line of a g1 body."""
        agent = {"id": uuid, "name": self.name, "type": self.type, "version": self.version, "groups": list(groups)}
        return packed({"agent": {**agent, "host": dict(self.host)}})

    def registration(self, uuid: str, key: str) -> bytes:
        """The body of ``POST /agents``."""
        agent = {"id": uuid, "name": self.name, "key": key, "type": self.type, "version": self.version}
        return packed({**agent, "host": dict(self.host)})


@dataclass(frozen=True, slots=True)
class Order:
    """A command as it arrived. ``args`` may be anything, as nobody has checked it yet."""

    id: str
    name: str
    args: Any = None
    seq: int = 0
    """The number of its stream event; 0 where commands come without one."""


def packed(value: Any) -> bytes:
    """JSON without blanks, on one line."""
    return msgspec.json.encode(value)


def read_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def message_of(body: bytes) -> str:
    """What an error body says, bounded; empty when it is no JSON."""
    found = read_object(body) or {}
    return str(found.get("message", ""))[:200]


def code_of(body: bytes) -> int:
    found = (read_object(body) or {}).get("code")
    return found if isinstance(found, int) else 0


def read_token(body: bytes) -> tuple[str, float] | None:
    """A login's token and when it expires: its own ``exp``, read without checking the signature. None for no token."""
    token = (read_object(body) or {}).get("token")
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        return None
    parts = token.split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return token, float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None


def read_order(found: Any, seq: int = 0) -> Order | None:
    """A command object of either dialect; None for one without an id or a name."""
    if not isinstance(found, dict):
        return None
    known, action = found.get("document_id") or found.get("id"), found.get("action")
    if not isinstance(known, str) or not known or not isinstance(action, dict):
        return None
    name = action.get("name")
    return Order(known, name, action.get("args"), seq) if isinstance(name, str) else None


def read_orders(body: bytes) -> list[Order] | None:
    """``{"commands": [...]}``; None when it is something else. Objects that are no commands are left out."""
    found = (read_object(body) or {}).get("commands")
    if not isinstance(found, list):
        return None
    return [order for order in map(read_order, found) if order is not None]


def refused_items(body: bytes) -> int:
    """How many of a stateful answer's results are not 200 to 206."""
    results = (read_object(body) or {}).get("results")
    if not isinstance(results, list):
        return 0
    statuses = (result.get("status", 200) for result in results if isinstance(result, dict))
    return sum(not (isinstance(status, int) and 200 <= status <= 206) for status in statuses)


@dataclass(frozen=True, slots=True)
class Stateful:
    """One change of a document: inventory, or the result of a command."""

    module: str
    collector: str
    id: str
    operation: str
    """create, update or delete."""
    data: Mapping[str, Any] | None

    def g1(self) -> bytes:
        """Header line and, but for a delete, data line."""
        header = {"module": self.module, "collector": self.collector, "id": self.id, "operation": self.operation}
        if not self.collector:
            del header["collector"]
        lines = [packed(header)]
        if self.data is not None:
            lines.append(packed(self.data))
        return b"\n".join(lines)

    def spike(self) -> bytes:
        event: dict[str, Any] = {"id": self.id, "module": self.module, "operation": self.operation}
        if self.collector:
            event["collector"] = self.collector
        if self.data is not None:
            event["data"] = self.data
        return packed(event)


@dataclass(frozen=True, slots=True)
class Stateless:
    """One log event."""

    module: str
    collector: str
    data: Mapping[str, Any]

    def g1(self) -> bytes:
        """A header before every event, as the C++ agent writes it."""
        return packed({"module": self.module, "collector": self.collector}) + b"\n" + packed(self.data)

    def spike(self, id: str) -> bytes:
        return packed({"id": id, "module": self.module, "collector": self.collector, "data": self.data})


def result_of(id: str, code: int, message: str) -> Stateful:
    """The result of a command, which travels as a stateful event."""
    return Stateful("command", "", id, "update", {"command": {"result": {"code": code, "message": message}}})


def spike_result_of(id: str, code: int, message: str) -> Stateful:
    return Stateful("command", "", id, "update", {"result": {"code": code, "message": message}})


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
