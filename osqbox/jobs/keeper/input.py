"""What goes into a job's stdin: in order, as fast as the job takes it, each piece answered when it is in."""

from __future__ import annotations

import base64
import binascii
import os
import select
from collections import deque
from collections.abc import Callable

from .loop import Loop
from .wire import MAX_INPUT_BYTES, CallError

MAX_PIECES = 32
"""Unanswered ones."""

Answer = Callable[[CallError | None], None]


class Input:
    """The pipe to a job's stdin, non-blocking; None for a job without."""

    __slots__ = ("_fd", "_loop", "_pieces", "_was_open")

    def __init__(self, loop: Loop, fd: int | None) -> None:
        self._loop, self._fd = loop, fd
        self._was_open = fd is not None
        self._pieces: deque[tuple[memoryview, bool, Answer]] = deque()

    def add(self, data_base64: object, *, eof: bool, answer: Answer) -> None:
        """`answer` is called once, now or later: with None when the pipe has taken everything. Raises CallError."""
        if not self._was_open:
            raise CallError("STDIN_NOT_OPEN", "the job was started without stdin; run it with open_stdin")
        if self._fd is None:
            raise CallError("STDIN_CLOSED", "the job's stdin is closed")
        if len(self._pieces) >= MAX_PIECES:
            raise CallError("INPUT_QUEUE_FULL", f"expected at most {MAX_PIECES} unanswered inputs")
        self._pieces.append((memoryview(_decode(data_base64)), eof, answer))
        if len(self._pieces) == 1:
            self._loop.watch(self._fd, select.EPOLLOUT, lambda _: self._feed())
            self._feed()

    def end(self, word: str, message: str) -> None:
        """Close the pipe and refuse what is waiting."""
        if self._fd is not None:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = None
        while self._pieces:
            self._pieces.popleft()[2](CallError(word, message))

    def _feed(self) -> None:
        while self._pieces and self._fd is not None:
            data, eof, answer = self._pieces[0]
            try:
                written = os.write(self._fd, data) if data else 0
            except BlockingIOError:
                return
            except OSError:
                self.end("STDIN_CLOSED", "the job closed its stdin")
                return
            if written < len(data):
                self._pieces[0] = (data[written:], eof, answer)
                return
            self._pieces.popleft()
            answer(None)
            if eof:
                self.end("STDIN_CLOSED", "the job's stdin was closed by an earlier input")
        if self._fd is not None:
            self._loop.unwatch(self._fd)


def _decode(data_base64: object) -> bytes:
    try:
        data = base64.b64decode(str(data_base64), validate=True)
    except binascii.Error:
        raise CallError("INVALID", "data: expected base64") from None
    if len(data) > MAX_INPUT_BYTES:
        raise CallError("INVALID", f"data: expected at most {MAX_INPUT_BYTES} bytes, got {len(data)}")
    return data
