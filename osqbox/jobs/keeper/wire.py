"""What box and keeper say to each other: packets that start a job, JSON lines afterwards, records of the log.

Used by both ends; standard library only.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping

KIB = 1024
MAX_LINE_BYTES = 128 * KIB
MAX_INPUT_BYTES = 48 * KIB
"""Of one ``input`` call, before base64."""
MAX_SPEC_BYTES = 16 * 1024 * KIB
"""Well above what execve takes (a quarter of the stack limit, 6 MiB at most)."""

RECORD = struct.Struct("<QIB3xQ")
"""One record of ``index``: offset, length, stream, wall clock in ns."""
HOLE = struct.Struct("<QQQQ")
"""Head of ``index``: dropped range of the output, punched range of the index."""
STREAMS = ("stdout", "stderr", "mixed")
"""By their number in a record."""

SPEC_FDS = 3
"""A packet to the zygote carries the spec, the job directory and the keeper's first client."""


class LineTooLongError(ValueError):
    """The peer sends lines beyond ``MAX_LINE_BYTES``; nothing sensible follows."""


class CallError(Exception):
    """A call that is refused; ``word`` is one of the errors in this package's docstring."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


def encode(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Bytes in, JSON objects out. ``feed`` raises LineTooLongError, or ValueError for what is no JSON object."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, object]]:
        self._held += data
        *lines, rest = self._held.split(b"\n")
        self._held = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError(f"expected a JSON object, got {type(message).__name__}")
            yield message
        if len(self._held) > MAX_LINE_BYTES:
            raise LineTooLongError(f"expected lines of at most {MAX_LINE_BYTES} bytes")


# the box's side


def zygote_command(control_fd: int) -> list[str]:
    """Start this with ``control_fd`` (one end of a SOCK_SEQPACKET pair) passed on, in a session of its own; once it
    runs, its 0-2 are /dev/null. It ends when the other end is closed; its keepers live on."""
    from pathlib import Path

    root = str(Path(__file__).resolve().parents[3])
    start = f"import sys; sys.path.append({root!r}); from osqbox.jobs.keeper.zygote import main; main({control_fd})"
    return [sys.executable, "-I", "-S", "-c", start]


def zygote_sockets() -> tuple[socket.socket, socket.socket]:
    """The box's end (non-blocking) and the zygote's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def spawn(zygote: socket.socket, spec: Mapping[str, object], job_dir_fd: int) -> socket.socket:
    """Ask for a job; what is returned (non-blocking) speaks the lines of this package's docstring.

    Raises BlockingIOError when the zygote is behind (wait until its socket is writable, call again),
    BrokenPipeError or ConnectionResetError when it is gone (start another), other OSErrors when descriptors or memory
    run out here; nothing stays open then.
    """
    spec_fd = os.memfd_create("osqbox-job")
    try:
        with os.fdopen(os.dup(spec_fd), "wb") as file:
            file.write(encode(spec))
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(zygote, [b"job"], [spec_fd, job_dir_fd, theirs.fileno()], socket.MSG_NOSIGNAL)
            except BaseException:
                ours.close()
                raise
    finally:
        os.close(spec_fd)
    ours.setblocking(False)
    return ours


def connect(job_dir_fd: int) -> socket.socket:
    """To the keeper of the job in this directory, at any time (non-blocking).

    Raises FileNotFoundError or ConnectionRefusedError when there is none any more: read ``status.json`` then.
    BlockingIOError: more clients at once than it takes, come again.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{job_dir_fd}/socket")
    except BaseException:
        sock.close()
        raise
    return sock


# the zygote's side


def receive(control: socket.socket) -> list[int] | None:
    """The descriptors of the next job, close-on-exec; None at the end. Fewer than ``SPEC_FDS``: some did not fit."""
    fds = array.array("i")
    data, ancillary, _, _ = control.recvmsg(16, socket.CMSG_LEN(SPEC_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds) if data or fds else None
