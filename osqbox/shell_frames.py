"""``shell.v1``: the binary frames of a shell, between agent and broker and between broker and viewer. Pure.

A frame is one binary WebSocket message: type, flags (0, ignored), a 64-bit offset, big endian, then the payload.

    agent ──HELLO──▶ broker ──HELLO──▶ agent            viewer ──HELLO──▶ broker ──HELLO──▶ viewer
    agent ──DATA_OUT TITLE EXIT ACK PING──▶ broker      viewer ──DATA_IN RESIZE ROLE EOF_IN ACK PING──▶ broker
    broker ──DATA_IN RESIZE EOF_IN EXIT ACK PING──▶ agent
    broker ──DATA_OUT TITLE ROLE RESIZE RESET SNAPSHOT EXIT ERROR ACK PING──▶ viewer

* DATA_OUT counts the bytes the shell has written, DATA_IN those it is sent (towards the agent per session, from a
  viewer per client). The offset is that of the payload's first byte; bytes the receiver has already are skipped, so a
  frame sent twice counts once.
* ACK counts the bytes of the other direction that are done with: towards the agent the output the broker has kept and
  passed on, from the agent the input its terminal took, from a viewer the output it has shown, towards a viewer its
  input that the agent's terminal took. Whoever sends keeps what is not acknowledged, and sends it again after a
  reconnect from the offset the other end's HELLO names. Nobody sends more than the window beyond the last ACK.
* EXIT comes after the last byte of output. From the broker to the agent it says: hang up.
* PING is answered at once by PONG, which repeats its offset and payload. An end that has been silent for PEER_LOST_S
  is gone.
* RESET says that output from..to will not come; what follows begins at ``to``. An agent that no longer has the output
  the broker wants sends it first.
* SNAPSHOT is written to the terminal as it is, and counts no bytes; it comes after a RESET.
* HELLO comes again from the agent once its terminal is open, and then says what runs there, and as whom.
* ERROR is for people: a notice before the session is closed, or what was refused. The connection goes on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from osqbox.errors import OsqboxError

KIB = 1024
MIB = 1024 * KIB

SUBPROTOCOL = "shell.v1"
HEADER = struct.Struct("!BBQ")
_RESIZE = struct.Struct("!HHHH")
_RESET = struct.Struct("!QQ")

AGENT_WINDOW_BYTES = 192 * KIB
"""Output an agent may be ahead of the last ACK. All of it is shown before the answer to a Ctrl-C: 2 s at 100 kB/s."""
VIEWER_WINDOW_BYTES = 256 * KIB
"""Output a viewer may be sent beyond its last ACK."""
INPUT_WINDOW_BYTES = 256 * KIB
"""Input that may be under way beyond the last ACK, on either leg."""
AGENT_FRAME_BYTES = 1 * MIB
"""Largest message accepted from an agent."""
VIEWER_FRAME_BYTES = 64 * KIB
"""Largest message accepted from a viewer."""
DATA_BYTES = 32 * KIB
"""Largest payload we send in one DATA frame."""
TITLE_BYTES = 1024
CELLS_MAX = 1000
"""Columns and rows are clamped to 1..1000."""
OFFSET_MAX = 2**63 - 1

PING_INTERVAL_S = 20.0
"""Whoever has heard or said nothing for so long pings."""
PEER_LOST_S = 29.0
"""Without any message from the other end: it is gone, whatever TCP believes."""


class FrameType(IntEnum):
    DATA_OUT = 1
    DATA_IN = 2
    RESIZE = 3
    ACK = 4
    EOF_IN = 5
    EXIT = 6
    ROLE = 7
    TITLE = 8
    PING = 9
    PONG = 10
    ERROR = 11
    SNAPSHOT = 12
    RESET = 13
    HELLO = 14


class CloseCode(IntEnum):
    """Why a WebSocket of a shell was closed."""

    NORMAL = 1000
    GOING_AWAY = 1001
    """The box stops or restarts: come back with what you have."""
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    """Text where a binary frame belongs, or the reverse."""
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    UNAUTHORIZED = 4401
    FORBIDDEN = 4403
    """The secret or ticket is wrong, used, expired, or another session's."""
    NOT_FOUND = 4404
    TOO_SLOW = 4408
    """A HELLO that did not come, a peer that fell silent, or a viewer that does not read."""
    REPLACED = 4409
    """The same end has connected again."""
    ENDED = 4410
    """The session has ended; EXIT says how."""
    BUSY = 4429
    """More than is allowed at once."""


class FrameError(OsqboxError):
    """A message that is no frame of ours. ``code`` is what the connection is closed with."""

    def __init__(self, message: str, code: CloseCode = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Frame:
    type: FrameType
    offset: int = 0
    payload: bytes = b""
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Of a terminal, in cells and, where known, pixels."""

    cols: int
    rows: int
    x_pixels: int = 0
    y_pixels: int = 0

    def clamped(self) -> Size:
        return Size(_clamp(self.cols), _clamp(self.rows), self.x_pixels & 0xFFFF, self.y_pixels & 0xFFFF)


def _clamp(cells: int) -> int:
    return max(1, min(cells, CELLS_MAX))


def encode(frame: Frame) -> bytes:
    """Raises FrameError for an offset that does not fit."""
    if not 0 <= frame.offset <= OFFSET_MAX:
        raise FrameError(f"offset: expected 0..2^63-1, got {frame.offset}")
    return HEADER.pack(frame.type, frame.flags, frame.offset) + frame.payload


def decode(message: bytes | str, limit_bytes: int = AGENT_FRAME_BYTES) -> Frame:
    """The frame of one WebSocket message. Raises FrameError with the close code it deserves."""
    if isinstance(message, str):
        raise FrameError("expected a binary shell.v1 frame, got a text message", CloseCode.UNSUPPORTED_DATA)
    if len(message) > limit_bytes:
        raise FrameError(f"expected a frame of at most {limit_bytes} bytes, got {len(message)}", CloseCode.TOO_BIG)
    if len(message) < HEADER.size:
        raise FrameError(f"expected a frame of at least {HEADER.size} bytes, got {len(message)}")
    number, flags, offset = HEADER.unpack_from(message)
    try:
        kind = FrameType(number)
    except ValueError:
        raise FrameError(f"expected a frame type 1..{max(FrameType).value}, got {number}") from None
    payload = bytes(memoryview(message)[HEADER.size :])
    if offset + len(payload) > OFFSET_MAX:
        raise FrameError("offset: expected less than 2^63")
    return Frame(kind, offset, payload, flags)


# the frames


def data_out(offset: int, data: bytes) -> Frame:
    return Frame(FrameType.DATA_OUT, offset, data)


def data_in(offset: int, data: bytes) -> Frame:
    return Frame(FrameType.DATA_IN, offset, data)


def ack(offset: int) -> Frame:
    return Frame(FrameType.ACK, offset)


def eof_in(offset: int = 0) -> Frame:
    """No more input after ``offset`` bytes."""
    return Frame(FrameType.EOF_IN, offset)


def ping(number: int) -> Frame:
    return Frame(FrameType.PING, number)


def pong(of: Frame) -> Frame:
    return Frame(FrameType.PONG, of.offset, of.payload)


def resize(size: Size) -> Frame:
    size = size.clamped()
    return Frame(FrameType.RESIZE, 0, _RESIZE.pack(size.cols, size.rows, size.x_pixels, size.y_pixels))


def parse_resize(frame: Frame) -> Size:
    """Clamped. Raises FrameError."""
    try:
        return Size(*_RESIZE.unpack(frame.payload)).clamped()
    except struct.error:
        raise FrameError(f"RESIZE: expected a payload of {_RESIZE.size} bytes, got {len(frame.payload)}") from None


def reset(start: int, end: int) -> Frame:
    return Frame(FrameType.RESET, end, _RESET.pack(start, end))


def parse_reset(frame: Frame) -> tuple[int, int]:
    """``from, to``. Raises FrameError."""
    try:
        start, end = _RESET.unpack(frame.payload)
    except struct.error:
        raise FrameError(f"RESET: expected a payload of {_RESET.size} bytes, got {len(frame.payload)}") from None
    if not start <= end <= OFFSET_MAX:
        raise FrameError(f"RESET: expected from <= to, got {start}..{end}")
    return start, end


def title(text: str) -> Frame:
    return Frame(FrameType.TITLE, 0, clean_title(text).encode())


def parse_title(frame: Frame) -> str:
    return clean_title(frame.payload.decode("utf-8", "replace"))


def clean_title(text: str) -> str:
    """Without control and formatting characters, at most TITLE_BYTES as UTF-8: nothing a terminal would obey."""
    kept = "".join(character for character in text[:TITLE_BYTES] if _is_harmless(character))
    return kept.encode("utf-8", "replace")[:TITLE_BYTES].decode("utf-8", "ignore")


def _is_harmless(character: str) -> bool:
    return character.isprintable()  # neither Cc, Cf (bidi overrides), Cs, Zl, Zp, nor spaces but the ordinary one


# messages in JSON

Offset = Annotated[int, Meta(ge=0, le=OFFSET_MAX)]
Cells = Annotated[int, Meta(ge=0, le=0xFFFF)]
Short = Annotated[str, Meta(max_length=256)]
Long = Annotated[str, Meta(max_length=4096)]


class AgentHello(Struct, frozen=True, kw_only=True):
    """First frame of an agent: with the one-time secret, or, coming back, with the resume token."""

    session: Short
    secret: Short | None = None
    resume: Short | None = None
    node_key: Long | None = None
    """Where it is sent, it must be that of the session's node."""
    head: Offset = 0
    """Bytes of output so far."""
    input: Offset = 0
    """Bytes of input that arrived so far, whether the terminal took them yet or not."""
    shell: Long = ""
    user: Short = ""
    host: Short = ""
    pid: Annotated[int, Meta(ge=0, le=2**31)] = 0
    cols: Cells = 0
    rows: Cells = 0


class AgentWelcome(Struct, frozen=True, kw_only=True):
    """The broker's first frame to an agent."""

    session: Short
    resume: Short
    """Comes back with the next HELLO instead of the secret, which is used up."""
    wanted: Offset
    """Offset of the next byte of output the broker has not kept."""
    input: Offset
    """Offset of the next DATA_IN."""
    window_bytes: Annotated[int, Meta(ge=1, le=2**31)]
    cols: Cells
    rows: Cells
    shell: Long | None = None
    """Program to run; None is the agent's choice."""
    user: Short | None = None
    idle_s: float | None = None
    max_s: float | None = None


class ViewerHello(Struct, frozen=True, kw_only=True):
    """First frame of a viewer."""

    client: Short
    """Chosen by the viewer and kept over its reconnects: its input is counted under this name."""
    resume: Offset | None = None
    """Output it has shown up to here; None begins at what the broker has in memory."""
    role: Short | None = None
    """Wanted: ``controller`` or ``viewer``; None takes what the ticket grants."""
    cols: Cells = 0
    rows: Cells = 0


class ViewerWelcome(Struct, frozen=True, kw_only=True):
    """The broker's first frame to a viewer."""

    session: Short
    node: Short
    hostname: Short
    role: Short
    """``controller`` or ``viewer``, as it is now."""
    offset: Offset
    """Of the first DATA_OUT that follows."""
    floor: Offset
    head: Offset
    window_bytes: Annotated[int, Meta(ge=1, le=2**31)]
    cols: Cells
    rows: Cells
    input: Offset
    """Bytes of input taken from this client so far: where its next DATA_IN begins."""
    recording: bool
    state: Short


class Exit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the shell ended: by itself with a code or a signal's number; else ``reason`` alone."""

    code: Annotated[int, Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, Meta(ge=1, le=128)] | None = None
    reason: Short = ""


class Role(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who types. From a viewer ``want``; to viewers their ``role`` and the controller's name."""

    role: Short | None = None
    controller: Short | None = None
    want: Short | None = None


class Error(Struct, frozen=True, kw_only=True):
    code: Short
    message: Long


M = TypeVar("M", bound=Struct)


def hello(message: AgentHello | AgentWelcome | ViewerHello | ViewerWelcome) -> Frame:
    return Frame(FrameType.HELLO, 0, msgspec.json.encode(message))


def exit_frame(message: Exit, offset: int = 0) -> Frame:
    """``offset`` is the end of the output."""
    return Frame(FrameType.EXIT, offset, msgspec.json.encode(message))


def role(message: Role) -> Frame:
    return Frame(FrameType.ROLE, 0, msgspec.json.encode(message))


def error(code: str, message: str) -> Frame:
    return Frame(FrameType.ERROR, 0, msgspec.json.encode(Error(code=code, message=message)))


def parse(frame: Frame, kind: type[M]) -> M:
    """The JSON message of a frame. Unknown members are ignored. Raises FrameError, which quotes no value."""
    try:
        return msgspec.json.decode(frame.payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as wrong:
        raise FrameError(f"{frame.type.name}: expected the JSON object {kind.__name__}, got: {wrong}") from None


def unseen(frame: Frame, have: int) -> bytes:
    """The bytes of a DATA frame from offset ``have`` on; empty when all of it was seen. Raises FrameError on a gap."""
    if frame.offset > have:
        raise FrameError(f"{frame.type.name}: expected offset {have} or less, got {frame.offset}")
    return frame.payload[have - frame.offset :]
