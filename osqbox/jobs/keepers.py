"""The way to the keepers: the zygote that forks them, and a line of JSON messages with each."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from .errors import Code, JobError
from .keeper import wire

RECEIVE_BYTES = 64 * 1024
SEND_S = 10.0
"""A keeper reads its clients at all times; one that does not for so long is stuck."""
ANSWER_S = 30.0
FIRST_S = 5.0
"""A start that takes longer no longer holds up others."""
ZYGOTE_END_S = 5.0
ZYGOTE_TRIES = 3
BUSY_S = 0.02
CLEAN_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
"""Of the zygote and the keepers: nothing of the box's own, which may hold its token."""
EXHAUSTED = frozenset(
    (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT,
     errno.ETOOMANYREFS)
)  # fmt: skip


class KeeperGoneError(Exception):
    """The line to the keeper has ended."""


class RefusedByKeeperError(Exception):
    """A call the keeper answered with an error; ``word`` is its stable name."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


class Zygote:
    """Starts the one small process that forks keepers, when the first job needs it; and again should it die."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: trio.Process | None = None
        self._starting = trio.Lock()

    async def spawn(self, spec: Mapping[str, object], job_dir_fd: int) -> Link:
        """A keeper for one job. Raises OSError when descriptors, memory or the program are missing."""
        for _ in range(ZYGOTE_TRIES):
            control = await self._ensure()
            try:
                return Link(wire.spawn(control, spec, job_dir_fd))
            except BlockingIOError:
                await self._wait_room(control)
            except (BrokenPipeError, ConnectionError):
                await self._end(control)
        raise OSError(errno.EAGAIN, "the process that starts jobs does not keep running")

    async def _wait_room(self, control: socket.socket) -> None:
        with trio.move_on_after(ANSWER_S):
            try:
                await trio.lowlevel.wait_writable(control)
            except (trio.ClosedResourceError, OSError):
                await trio.lowlevel.checkpoint()

    async def _ensure(self) -> socket.socket:
        async with self._starting:
            if self._control is None:
                self._control, self._process = await _start_zygote()
            return self._control

    async def _end(self, control: socket.socket) -> None:
        """Unless somebody else has already replaced it."""
        async with self._starting:
            if self._control is control:
                await self._close()

    async def aclose(self) -> None:
        """End the zygote; its keepers live on."""
        with trio.CancelScope(shield=True):
            async with self._starting:
                await self._close()

    async def _close(self) -> None:
        control, process = self._control, self._process
        self._control = self._process = None
        if control is not None:
            trio.lowlevel.notify_closing(control)
            control.close()
        if process is not None:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(ZYGOTE_END_S):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def _start_zygote() -> tuple[socket.socket, trio.Process]:
    ours, theirs = wire.zygote_sockets()
    with theirs:
        try:
            process = await trio.lowlevel.open_process(
                wire.zygote_command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=CLEAN_ENV,
                cwd="/",
            )
        except BaseException:
            ours.close()
            raise
    return ours, process


@dataclass(eq=False, slots=True)
class _Call:
    answered: trio.Event = field(default_factory=trio.Event)
    answer: Mapping[str, Any] | None = None


class Link:
    """JSON lines with one keeper: `receive` in one task, `call` from any number."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = trio.socket.from_stdlib_socket(connection)
        self._lines = wire.Lines()
        self._calls: dict[int, _Call] = {}
        self._numbers = 0
        self._sending = trio.Lock()
        self._closed = False

    async def wait_first(self) -> None:
        """Until it has said something, or is gone."""
        with trio.move_on_after(FIRST_S):
            await trio.lowlevel.wait_readable(self._socket)

    async def receive(self) -> list[dict[str, Any]]:
        """The next unasked messages, all that are there; empty at the end. Answers go to their callers."""
        while True:
            try:
                data = await self._socket.recv(RECEIVE_BYTES)
                messages = list(self._lines.feed(data)) if data else []
            except (OSError, trio.ClosedResourceError, ValueError):
                data, messages = b"", []
            if not data:
                self.close()
                return []
            unasked = [message for message in messages if not self._answer(message)]
            if unasked:
                return unasked

    def _answer(self, message: Mapping[str, Any]) -> bool:
        number = message.get("call")
        if number is None:
            return False
        call = self._calls.pop(number, None)
        if call is not None:
            call.answer = message
            call.answered.set()
        return True

    async def call(self, do: str, *, answer_s: float | None = ANSWER_S, **words: object) -> None:
        """Returns when the keeper has done it. Raises RefusedByKeeperError, KeeperGoneError, or UNAVAILABLE."""
        if self._closed:
            raise KeeperGoneError
        self._numbers += 1
        number, call = self._numbers, _Call()
        self._calls[number] = call
        try:
            with trio.fail_after(float("inf") if answer_s is None else answer_s):
                await self._send(wire.encode({"call": number, "do": do, **words}))
                await call.answered.wait()
        except trio.TooSlowError:
            raise JobError(Code.UNAVAILABLE, f"{do}: the keeper of this job did not answer within {answer_s:g} s",
                           reason="KEEPER_STUCK", retry_after_s=1.0) from None  # fmt: skip
        finally:
            self._calls.pop(number, None)
        if call.answer is None:
            raise KeeperGoneError
        if word := call.answer.get("error"):
            raise RefusedByKeeperError(str(word), str(call.answer.get("message", word)))

    async def _send(self, data: bytes) -> None:
        """A line goes out whole or the link ends: half a line would spoil the next one."""
        async with self._sending:
            with trio.CancelScope(shield=True):
                try:
                    with trio.fail_after(SEND_S):
                        while data:
                            data = data[await self._socket.send(data) :]
                except (OSError, trio.TooSlowError, trio.ClosedResourceError):
                    self.close()
                    raise KeeperGoneError from None

    def close(self) -> None:
        """The keeper goes on; whoever waits for an answer is told."""
        if not self._closed:
            self._closed = True
            self._socket.close()
            calls: Iterable[_Call] = list(self._calls.values())
            for call in calls:
                call.answered.set()


async def connect(job_dir_fd: int) -> Link | None:
    """To a keeper that was started before; None where there is none any more. Raises OSError when it cannot be told."""
    for _ in range(round(ANSWER_S / BUSY_S)):
        try:
            return Link(wire.connect(job_dir_fd))
        except BlockingIOError:  # its backlog is full
            await trio.sleep(BUSY_S)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            return None
    raise OSError(errno.EAGAIN, "the keeper takes no connection")


def open_directory(path: str | os.PathLike[str]) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
