"""What is under way in both directions of a session, by offset: kept until it is done with, counted once. Pure."""

from __future__ import annotations

from osqbox.shell_frames import INPUT_WINDOW_BYTES, Frame, FrameError, FrameType, unseen


class Outbox:
    """Output that the broker has not acknowledged yet."""

    def __init__(self) -> None:
        self.acked = 0
        self._bytes = bytearray()

    @property
    def head(self) -> int:
        return self.acked + len(self._bytes)

    def append(self, data: bytes) -> None:
        self._bytes += data

    def read(self, offset: int, limit_bytes: int) -> bytes:
        start = offset - self.acked
        return bytes(self._bytes[start : start + limit_bytes])

    def acknowledge(self, offset: int) -> None:
        """Raises FrameError for what was never said."""
        if offset > self.head:
            raise FrameError(f"ACK: expected at most {self.head}, got {offset}")
        if offset > self.acked:
            del self._bytes[: offset - self.acked]
            self.acked = offset


class Inbox:
    """Input that the terminal has not taken yet."""

    def __init__(self) -> None:
        self.taken = 0
        self._bytes = bytearray()
        self._end: int | None = None

    @property
    def received(self) -> int:
        return self.taken + len(self._bytes)

    @property
    def is_at_end(self) -> bool:
        return self._end is not None and self.taken >= self._end

    def accept(self, frame: Frame) -> None:
        """A DATA_IN or EOF_IN; what came before is skipped. Raises FrameError on a gap, or over the window."""
        if frame.type is FrameType.EOF_IN:
            self._end = max(frame.offset, self.received)
            return
        fresh = unseen(frame, self.received)
        if len(self._bytes) + len(fresh) > 2 * INPUT_WINDOW_BYTES:  # our last ACK may still be on its way
            raise FrameError(f"DATA_IN: expected at most {INPUT_WINDOW_BYTES} bytes beyond the last ACK")
        self._bytes += fresh

    def peek(self, limit_bytes: int) -> bytes:
        return bytes(self._bytes[:limit_bytes])

    def take(self, count_bytes: int) -> None:
        del self._bytes[:count_bytes]
        self.taken += count_bytes

    def take_end(self) -> None:
        self._end = None
