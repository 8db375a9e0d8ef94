"""What a thread of a comms agent yields, and what it gets back. Pure."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Headers = tuple[tuple[str, str], ...]

SSE, WEBSOCKET, POLL = "sse", "ws", "poll"
TRANSPORTS = (SSE, WEBSOCKET, POLL)
"""How an agent hears its commands."""


class Sink(Protocol):
    """Where the body of a 200 or 206 goes. What says False ends the exchange."""

    def begin(self, reply: Reply) -> bool: ...

    def write(self, piece: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Send:
    """One request; the outcome is a `Reply`, also when nobody answered."""

    call: str
    """What it is counted under: login, enroll, stateless, stateful, commands, config, upgrade."""
    method: str
    path: str
    headers: Headers
    """All but Host and Content-Length, in the order they are written."""
    body: bytes = b""
    timeout_s: float = 60.0
    sink: Sink | None = None
    """Takes the body of a 200 or 206 instead of `Reply.body`."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    """0: nobody answered, or not to the end."""
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By their names in lower case."""
    reason: str = ""
    """Why there is no answer."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def told(self) -> str:
        """For counting errors: the status, or why there is none."""
        return f"HTTP status {self.status}" if self.status else self.reason


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait this long (None: for ever), or until the core raises ``wake``; the outcome says whether it did."""

    seconds: float | None
    wake: str = ""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a command stream, over either transport."""

    kind: str
    """command, reset or bye."""
    id: str
    data: bytes
    """JSON."""


@dataclass(frozen=True, slots=True)
class Follow:
    """Hold a command stream open; the outcome is a `Reply` that tells how it ended.

    ``heard`` gets every event and says whether to go on; the status is 200 when the stream was open.
    """

    transport: str
    path: str
    headers: Headers
    heard: Callable[[ServerEvent], bool]
    opened: Callable[[], None]
    """Called when the server has agreed."""
    timeout_s: float
    """Until it agrees."""
    silence_s: float
    """Without a byte for so long the server is gone."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Look at the host: ``inventory`` brings `facts.Fact` values, ``logs`` events since the last look."""

    what: str


@dataclass(frozen=True, slots=True)
class Restart:
    """End every thread and begin again with what is stored. There is no outcome."""


Effect = Send | Sleep | Follow | Collect | Restart
T = TypeVar("T")
Thread = Generator[Effect, Any, T]
