"""Text frames of the Launcher of 2018 to 2020, and of the GoTTY they came from. Pure.

One character says the type, the rest is the payload. Launcher's agent is the client of a broker; in GoTTY the server
owns the terminal, so an operator's GoTTY client is served by the tables at the end.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from osqbox.errors import OsqboxError
from osqbox.shell_frames import Size

OUTPUT_BYTES = 2048
"""Raw bytes of output the agent puts into one frame."""
INPUT_BYTES = 2047
"""Input per frame: the agent reads a message once into 2,048 bytes, type included, and loses the rest."""
DEADLINE_S = 30.0
"""Without a text message from the server the agent closes; WebSocket pings do not count."""
PING_INTERVAL_S = 8.0
FRAME_CHARS = 1024 * 1024


class LegacyError(OsqboxError):
    """A message that is no frame of this protocol."""


class AgentFrame(StrEnum):
    """Agent to broker."""

    AUTHENTICATE = "0"
    OUTPUT = "1"
    PONG = "2"
    TITLE = "3"
    PREFERENCES = "4"
    RECONNECT = "5"


class BrokerFrame(StrEnum):
    """Broker to agent."""

    UNKNOWN = "0"
    INPUT = "1"
    PING = "2"
    RESIZE = "3"


# agent to broker


def authenticate(secret: str) -> str:
    return AgentFrame.AUTHENTICATE + secret


def output(data: bytes) -> str:
    return AgentFrame.OUTPUT + base64.b64encode(data).decode()


def pong() -> str:
    return AgentFrame.PONG.value


def title(text: str) -> str:
    return AgentFrame.TITLE + text


def decode_agent(message: str) -> tuple[AgentFrame, str]:
    """Type and payload. Raises LegacyError."""
    if len(message) > FRAME_CHARS:
        raise LegacyError(f"expected a frame of at most {FRAME_CHARS} characters, got {len(message)}")
    try:
        return AgentFrame(message[:1]), message[1:]
    except ValueError:
        raise LegacyError(f"expected a frame type 0..5, got {message[:1]!r}") from None


def decode_output(payload: str) -> bytes:
    """Raises LegacyError."""
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raise LegacyError("output: expected base64") from None


# broker to agent


def ping() -> str:
    return BrokerFrame.PING.value


def resize(size: Size) -> str:
    """Always an object with both numbers: anything else ends the agent's session."""
    size = size.clamped()
    return BrokerFrame.RESIZE + json.dumps({"columns": size.cols, "rows": size.rows})


def decode_broker(message: str) -> tuple[BrokerFrame | None, str]:
    """Type and payload as the agent reads them; None for what it ignores. Raises LegacyError on an empty message."""
    if not message:
        raise LegacyError("an empty message ends the session")
    try:
        return BrokerFrame(message[:1]), message[1:]
    except ValueError:
        return None, message[1:]


def decode_resize(payload: str) -> Size:
    """Names in any case, fractions cut off, as Go reads them. Raises LegacyError, which ends the session."""
    try:
        members = json.loads(payload)
        named = {name.lower(): value for name, value in members.items()}
        return Size(_cells(named.get("columns", 0)), _cells(named.get("rows", 0))).clamped()
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise LegacyError('resize: expected {"columns": N, "rows": N}') from None


def _cells(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("expected a number")
    return int(value)


@dataclass(slots=True)
class InputSplitter:
    """Cuts input into frames of at most INPUT_BYTES at the borders of characters.

    A character that is not complete yet waits for its rest. What is no UTF-8 cannot be sent in a text frame and
    becomes U+FFFD.
    """

    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def frames(self, data: bytes) -> list[str]:
        text = self._decoder.decode(data)
        return [BrokerFrame.INPUT + piece for piece in split_text(text, INPUT_BYTES)]


def split_text(text: str, limit_bytes: int) -> list[str]:
    """Pieces of at most ``limit_bytes`` (4 or more) as UTF-8, none of them empty."""
    pieces: list[str] = []
    data = text.encode()
    start = 0
    while start < len(data):
        end = min(start + limit_bytes, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces


# GoTTY


class Gotty(StrEnum):
    """What a GoTTY frame is for, whichever character says so."""

    UNKNOWN = "unknown"
    INPUT = "input"
    PING = "ping"
    RESIZE = "resize"
    SET_ENCODING = "set_encoding"
    OUTPUT = "output"
    PONG = "pong"
    TITLE = "title"
    PREFERENCES = "preferences"
    RECONNECT = "reconnect"
    BUFFER_SIZE = "buffer_size"


@dataclass(frozen=True, slots=True)
class GottyTable:
    """Frame types of one GoTTY generation."""

    client: Mapping[str, Gotty]
    """From the client, by character."""
    server: Mapping[Gotty, str]
    """To the client."""

    def decode(self, message: str) -> tuple[Gotty, str]:
        """Type and payload from a client. Raises LegacyError for an unknown type, which is fatal in GoTTY too."""
        kind = self.client.get(message[:1])
        if kind is None:
            raise LegacyError(f"expected a frame type of {''.join(self.client)}, got {message[:1]!r}")
        return kind, message[1:]

    def encode(self, kind: Gotty, payload: str = "") -> str:
        return self.server[kind] + payload

    def output(self, data: bytes) -> str:
        return self.encode(Gotty.OUTPUT, base64.b64encode(data).decode())


GOTTY_V2 = GottyTable(
    MappingProxyType(
        {"0": Gotty.UNKNOWN, "1": Gotty.INPUT, "2": Gotty.PING, "3": Gotty.RESIZE, "4": Gotty.SET_ENCODING}
    ),
    MappingProxyType(
        {
            Gotty.UNKNOWN: "0",
            Gotty.OUTPUT: "1",
            Gotty.PONG: "2",
            Gotty.TITLE: "3",
            Gotty.PREFERENCES: "4",
            Gotty.RECONNECT: "5",
            Gotty.BUFFER_SIZE: "6",
        }
    ),
)
"""yudai 2.0, and sorenisanerd's additions: set-encoding and set-buffer-size."""

GOTTY_V1 = GottyTable(
    MappingProxyType({"0": Gotty.INPUT, "1": Gotty.PING, "2": Gotty.RESIZE}),
    MappingProxyType(
        {
            Gotty.OUTPUT: "0",
            Gotty.PONG: "1",
            Gotty.TITLE: "2",
            Gotty.PREFERENCES: "3",
            Gotty.RECONNECT: "4",
        }
    ),
)
"""Up to 1.0."""
