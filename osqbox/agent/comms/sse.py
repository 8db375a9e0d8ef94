"""Server-sent events, read from bytes cut anywhere (WHATWG HTML, 9.2.6). Pure."""

from __future__ import annotations

from collections.abc import Iterator

from osqbox.agent.comms.effects import ServerEvent

MAX_EVENT_BYTES = 4 * 1024 * 1024


class TooLarge(Exception):
    """An event without an end."""


class EventParser:
    __slots__ = ("_buffer", "_data", "_id", "_kind", "_size", "_skip_newline", "retry_ms")

    def __init__(self) -> None:
        self._buffer = b""
        self._skip_newline = False
        self._kind, self._data, self._size = "", list[str](), 0
        self._id = ""
        self.retry_ms: int | None = None
        """What the server last asked for."""

    def feed(self, piece: bytes) -> Iterator[ServerEvent]:
        """The events that are complete with this piece. Raises TooLarge."""
        if self._skip_newline and piece:
            piece = piece.removeprefix(b"\n")
            self._skip_newline = False
        lines = (self._buffer + piece).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        # A CR at the end may be half of a CRLF: its line is over either way.
        self._skip_newline = piece.endswith(b"\r")
        self._buffer = lines.pop()
        if len(self._buffer) + self._size > MAX_EVENT_BYTES:
            raise TooLarge(f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            event = self._line(line.decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._kind = value
            case "data":
                self._data.append(value)
                self._size += len(value)
                if self._size > MAX_EVENT_BYTES:
                    raise TooLarge(f"an event of more than {MAX_EVENT_BYTES} bytes")
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdecimal():
                self.retry_ms = int(value[:9])
        return None  # comments and unknown fields too

    def _dispatch(self) -> ServerEvent | None:
        kind, data = self._kind, self._data
        self._kind, self._data, self._size = "", [], 0
        return ServerEvent(kind or "message", self._id, "\n".join(data).encode()) if data else None
