"""What a thread of the core yields, and what it gets back. Pure."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from osqbox.agent import messages
from osqbox.agent.messages import Reply


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``body`` to ``path``; the outcome is the reply's body, or a `Failure`."""

    call: str
    """``enroll``, ``config``, ``log``, ``read``, ``write``, ``carve_start`` or ``carve_block``."""
    path: str
    body: bytes
    node_key: str = ""
    """For the Authorization header; empty is no header."""
    compress: bool = False
    method: str = "POST"
    """``GET`` only for the config with --tls_node_api; without a body then."""


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a plugin that is not the tls one, as the registry does (reference: registry, plugin, request).

    The outcome is the rows it answers, or a `Failure`. ``config``: ``{"action": "genConfig"}`` brings one row, source
    -> JSON, and ``{"action": "genPack", "name", "value"}`` name -> JSON. ``distributed``: ``{"action": "getQueries"}``
    brings ``{"results": JSON}``; ``{"action": "writeResults", "results": JSON}`` brings nothing. ``logger``:
    ``{"string": line, "category": "event"}``, ``{"snapshot": line}``, ``{"status": "true", "log": JSON}``.
    """

    registry: str
    plugin: str
    request: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait this long, or until the core raises ``wake``; the outcome says whether it did."""

    seconds: float
    wake: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """Run SQL; the outcome is a `QueryResult`."""

    sql: str


@dataclass(frozen=True, slots=True)
class HostDetails:
    """First rows of the tables enrollment describes the host by; the outcome is table -> row."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no reply."""

    message: str


Command = Send | Call | Sleep | Query | HostDetails | Any
"""Any: other parts of an agent (the carver) have commands of their own."""
T = TypeVar("T")
Thread = Generator[Command, Any, T]


def reply_of(outcome: bytes | Failure) -> Reply:
    """What a `Send` came to."""
    return Reply(False, outcome.message) if isinstance(outcome, Failure) else messages.read_reply(outcome)
