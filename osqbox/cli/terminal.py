"""A terminal in the terminal: keys and size of this one go to a shell session, its output comes back unaltered.

Offsets make every reconnect exact: what was shown is not shown again, what was typed is not typed twice.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import math
import os
import random
import secrets
import signal
import socket
import ssl
import struct
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)
from wsproto.utilities import LocalProtocolError

from osqbox import shell_frames as frames
from osqbox.agent.shell.socket import Line
from osqbox.cli.output import printable
from osqbox.errors import NotInTime, UserError
from osqbox.shell_frames import CloseCode, Exit, Frame, FrameError, FrameType, Role, Size, ViewerHello, ViewerWelcome

READ_BYTES = 16 * 1024
CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
COME_BACK_S = 90.0
"""How long a lost connection is tried again: longer than the box keeps a session for somebody who dropped."""
END_QUIET_S = 0.3
"""After the keys have ended, this long without output means that a program waits for more of them."""
RETRY_S = (0.1, 3.0)
"""The first and the longest pause between tries."""

LEAVE_MODES = b"\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b>\x1b[?25h\x1b[0m"
"""What a program that was left in its middle may have switched on: other screen, mouse, paste brackets, keypad."""

FINAL = {
    CloseCode.UNAUTHORIZED: "the box no longer accepts this operator",
    CloseCode.FORBIDDEN: "the box refuses this terminal",
    CloseCode.NOT_FOUND: "there is no such session any more",
    CloseCode.REPLACED: "this terminal was opened again elsewhere",
    CloseCode.ENDED: "the session has ended",
    CloseCode.BUSY: "more terminals than the box allows",
    CloseCode.PROTOCOL_ERROR: "the box did not understand this terminal",
    CloseCode.UNSUPPORTED_DATA: "the box did not understand this terminal",
    CloseCode.TOO_BIG: "the box did not understand this terminal",
}
"""Close codes after which coming back is of no use."""


BROKEN = (
    OSError,
    HandshakeError,
    ConnectionClosed,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    LocalProtocolError,  # trio-websocket answers a ping when it is closing already
)

ENDS = {
    "operator_left": (0, "the session was left"),
    "killed": (1, "the session was killed"),
    "agent_lost": (1, "the agent was lost and did not come back"),
    "expired": (NotInTime.exit_code, "the agent did not come; does it run with --control?"),
    "refused": (1, "the agent refused to run the shell"),
    "idle": (1, "the session was ended: nothing happened for too long"),
    "max_time": (1, "the session was ended: it reached its longest time"),
    "recording_failed": (1, "the session was ended: it could not be recorded"),
    "box_stopped": (1, "the box has stopped"),
}
"""Exit code and words of ends without the shell's own."""
CONTROLLER = "controller"
CTRL_C = b"\x03"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a session's terminal is, and what opens it. Asked for again before each reconnect: boxes restart."""

    url: str
    token: str = field(repr=False)
    ssl_context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    session: str
    role: str
    """``controller`` or ``viewer``."""
    prefix: bytes | None
    """The key before a command to this program; None when keys are not read or all of them are the shell's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: the exit code of the verb, and a word for the person unless that says it all."""

    status: int
    told: str = ""
    by_exit: bool = False
    is_unknown: bool = False
    """It ended while this terminal was away: the box knows how."""


class Command(enum.Enum):
    """What a person tells this program in the middle of a session."""

    DETACH = "d"
    LEAVE = "q"
    TAKE = "c"
    HELP = "?"


class Keys:
    """Finds commands behind the prefix key among what is typed."""

    def __init__(self, prefix: bytes | None) -> None:
        self._prefix = prefix
        self._begun = False

    def typed(self, data: bytes) -> Iterator[bytes | Command]:
        """Bytes for the shell, and commands, in order. The prefix twice is the key itself."""
        if self._prefix is None:
            yield data
            return
        rest = data
        while rest:
            if self._begun:
                self._begun = False
                key, rest = rest[:1], rest[1:]
                command = next((each for each in Command if each.value.encode() == key.lower()), None)
                yield command or (key if key == self._prefix else self._prefix + key)
                continue
            plain, found, rest = rest.partition(self._prefix)
            self._begun = bool(found)
            if plain:
                yield plain


class Here:
    """The terminal this runs in, or the pipes."""

    def __init__(self, stdin: int = 0, stdout: int = 1) -> None:
        self._stdin, self._stdout = stdin, stdout
        self.has_keys = os.isatty(stdin)
        self.has_screen = os.isatty(stdout)
        self._is_raw = False

    def size(self) -> Size:
        for fd in (self._stdout, self._stdin, 2):
            with suppress(OSError):
                rows, cols, x_pixels, y_pixels = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
                if rows and cols:
                    return Size(cols, rows, x_pixels, y_pixels).clamped()
        return Size(80, 24)

    @contextmanager
    def raw(self, wanted: bool) -> Iterator[None]:
        """Every key is the session's until the block ends; nothing changes when keys come from a pipe."""
        if not (wanted and self.has_keys):
            yield
            return
        before = termios.tcgetattr(self._stdin)
        try:
            tty.setraw(self._stdin)
            self._is_raw = True
            yield
        finally:
            self._is_raw = False
            termios.tcsetattr(self._stdin, termios.TCSADRAIN, before)

    async def read(self) -> bytes:
        """What was typed; empty at the end."""
        try:
            await trio.lowlevel.wait_readable(self._stdin)
        except OSError as error:
            if error.errno != errno.EPERM:  # a file or /dev/null: always ready
                raise
            await trio.lowlevel.checkpoint()
        try:
            return os.read(self._stdin, READ_BYTES)
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal is gone
                return b""
            raise

    async def write(self, data: bytes) -> None:
        """Raises OSError. In a thread: a terminal that has stopped must not stop the keys."""
        await trio.to_thread.run_sync(_write_all, self._stdout, data, abandon_on_cancel=True)

    def leave_modes(self) -> None:
        if self.has_screen:
            with suppress(OSError):
                _write_all(self._stdout, LEAVE_MODES)

    def note(self, text: str) -> None:
        """A word of this program's own, on stderr."""
        end = "\r\n" if self._is_raw else "\n"
        print(f"{end if self._is_raw else ''}osqbox: {printable(text)}", end=end, file=sys.stderr, flush=True)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def run_terminal(wish: Wish, find: Callable[[], Address], here: Here | None = None) -> Outcome:
    """Be this session's terminal until it ends or is left.

    ``find`` is called before each connection, in a thread.
    """
    return trio.run(Terminal(wish, find, here or Here()).run)


class Terminal:
    """One viewer of one session, over as many connections as it takes."""

    def __init__(self, wish: Wish, find: Callable[[], Address], here: Here) -> None:
        self._wish, self._find, self._here = wish, find, here
        self._client = secrets.token_hex(8)
        self._is_controller = wish.role == CONTROLLER
        self._shown: int | None = None
        """Offset of the output's end on this screen."""
        self._acked = 0
        self._typed = bytearray()
        """From `_taken` on: what the box has not acknowledged."""
        self._taken = self._sent = 0
        self._has_ended = False
        """Whether the keys have ended, as a pipe does."""
        self._quiet_since = 0.0
        """When something was last printed or sent; infinite when the end was told since then."""
        self._size_told: Size | None = None
        self._answers: list[Frame] = []
        self._stirred, self._room = trio.Event(), trio.Event()
        self._was_open = False
        self._welcomes = 0
        self._trouble = self._complaint = ""
        self._outcome: Outcome | None = None
        self._close_code = CloseCode.NORMAL
        self._scope = trio.CancelScope()

    async def run(self) -> Outcome:
        with self._here.raw(self._wish.prefix is not None):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                if self._wish.prefix is not None if self._here.has_keys else self._is_controller:
                    nursery.start_soon(self._watch_keys)
                with self._scope:
                    await self._stay()
                nursery.cancel_scope.cancel()
            assert self._outcome is not None
            if not self._outcome.by_exit:
                self._here.leave_modes()
        return self._outcome

    def _end(self, outcome: Outcome, code: CloseCode = CloseCode.NORMAL) -> None:
        """The first reason counts. Any code but NORMAL keeps the session for who comes back."""
        if self._outcome is None:
            self._outcome, self._close_code = outcome, code
            self._scope.cancel()

    # here

    async def _watch_signals(self) -> None:
        wanted = (signal.SIGWINCH, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with trio.open_signal_receiver(*wanted) as signals:
            async for number in signals:
                if number == signal.SIGWINCH:
                    self._stirred.set()
                elif number == signal.SIGINT:
                    self._end(Outcome(130, "left"))
                else:
                    self._end(Outcome(128 + number, self._detached()), CloseCode.GOING_AWAY)

    async def _watch_keys(self) -> None:
        keys = Keys(self._wish.prefix if self._here.has_keys else None)
        while data := await self._here.read():
            if self._here.has_keys and not (self._was_open and self._is_controller) and CTRL_C in data:
                self._end(Outcome(130, "left"))
            for each in keys.typed(data):
                if isinstance(each, Command):
                    self._obey(each)
                elif self._wish.role == CONTROLLER or self._is_controller:
                    await self._type(each)
        if self._here.has_keys:  # the terminal is gone, and its signal is on the way
            self._end(Outcome(128 + signal.SIGHUP, self._detached()), CloseCode.GOING_AWAY)
        self._has_ended = True
        self._stirred.set()

    async def _type(self, data: bytes) -> None:
        while len(self._typed) >= frames.INPUT_WINDOW_BYTES:
            self._room = trio.Event()
            await self._room.wait()
        self._typed += data
        self._stirred.set()

    def _obey(self, command: Command) -> None:
        match command:
            case Command.DETACH:
                self._end(Outcome(0, self._detached()), CloseCode.GOING_AWAY)
            case Command.LEAVE:
                self._end(Outcome(0, "left"))
            case Command.TAKE:
                self._answers.append(frames.role(Role(want=CONTROLLER)))
                self._stirred.set()
            case Command.HELP:
                self._here.note(help_line(self._wish.prefix))

    def _detached(self) -> str:
        return f"detached; for a short time it can be taken up again: osqbox shell attach {self._wish.session}"

    # there

    async def _stay(self) -> None:
        """Connect, and again when the connection is lost."""
        lost_at, pause_s = None, RETRY_S[0]
        while self._outcome is None:
            if await self._visit():
                lost_at, pause_s = None, RETRY_S[0]
            if lost_at is None:
                lost_at = trio.current_time()
                self._here.note(f"the connection was lost ({self._trouble}); trying again ...")
            if trio.current_time() - lost_at > COME_BACK_S:
                self._end(Outcome(1, f"it did not come back within {COME_BACK_S:g} s: {self._trouble}"))
            await trio.sleep(pause_s * (0.5 + random.random() / 2))  # noqa: S311 - so that not all come at once
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def _visit(self) -> bool:
        """One connection, from its handshake to its loss. False when it did not come to a welcome."""
        try:
            address = await trio.to_thread.run_sync(self._find)
        except UserError as error:
            self._trouble = str(error)
            await trio.lowlevel.checkpoint()
            return False
        before = self._welcomes
        try:
            async with trio.open_nursery() as nursery:
                await self._converse(nursery, address)
                nursery.cancel_scope.cancel()
        except* ConnectionRejected as group:
            self._note_rejection(group)
        except* BROKEN as group:
            self._trouble = _first_of(group)
        return self._welcomes > before

    async def _converse(self, nursery: trio.Nursery, address: Address) -> None:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await _open_stream(address)
        async with stream:
            line = Line(stream)
            with trio.move_on_after(CONNECT_TIMEOUT_S) as line.waiting:
                connection = await wrap_client_stream(
                    nursery,
                    line,  # type: ignore[arg-type] # any stream will do
                    urlsplit(address.url).netloc,
                    urlsplit(address.url).path,
                    subprotocols=[frames.SUBPROTOCOL],
                    extra_headers=[(b"Authorization", f"Bearer {address.token}".encode())],
                )
            if line.waiting.cancelled_caught:
                raise trio.BrokenResourceError("closed during the handshake" if line.has_ended else "no answer")
            try:
                await self._greet(connection)
                self._welcomes += 1
                nursery.start_soon(self._send_all, connection)
                await self._receive_all(connection)
            except ConnectionClosed as closed:
                self._note_close(closed)
            except FrameError as wrong:
                self._end(Outcome(1, f"the box said what this terminal does not understand: {wrong}"))
            finally:
                with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                    await connection.aclose(int(self._close_code))

    def _note_rejection(self, group: BaseExceptionGroup[ConnectionRejected]) -> None:
        rejected = _leaf(group)
        assert isinstance(rejected, ConnectionRejected)
        self._trouble = _why_rejected(rejected)
        status = rejected.status_code
        if status in (400, 403, 404, 421) or (status == 401 and not self._welcomes):
            self._end(Outcome(2 if status == 404 else 1, self._trouble))

    async def _greet(self, connection: WebSocketConnection) -> None:
        size = self._here.size()
        wish = ViewerHello(
            client=self._client, resume=self._shown, role=self._wish.role, cols=size.cols, rows=size.rows
        )
        await connection.send_message(frames.encode(frames.hello(wish)))
        frame = await self._receive(connection)
        while frame.type is FrameType.ERROR:  # the close code that follows says what to do
            self._complaint = frames.parse(frame, frames.Error).message
            frame = await self._receive(connection)
        welcome = frames.parse(frame, ViewerWelcome)
        self._shown = self._acked = welcome.offset
        self._take_input(welcome.input)
        self._sent = self._taken
        self._quiet_since = trio.current_time()
        self._size_told = size if self._is_controller else None
        self._is_controller = welcome.role == CONTROLLER
        if not self._was_open and welcome.state in ("requested", "offered"):
            self._here.note(f"waiting for {welcome.hostname or welcome.node} to open its shell; Ctrl-C gives up")
        self._was_open = self._was_open or welcome.state in ("open", "detached")

    async def _receive(self, connection: WebSocketConnection) -> Frame:
        """Raises ConnectionClosed, also when nothing was heard for too long; FrameError."""
        with trio.move_on_after(frames.PEER_LOST_S):
            return frames.decode(await connection.get_message(), frames.AGENT_FRAME_BYTES)
        raise ConnectionClosed(None)

    async def _receive_all(self, connection: WebSocketConnection) -> None:
        while True:
            frame = await self._receive(connection)
            match frame.type:
                case FrameType.DATA_OUT:
                    await self._show(frame)
                case FrameType.RESET:
                    self._shown = frames.parse_reset(frame)[1]
                case FrameType.SNAPSHOT:
                    await self._write(frame.payload)
                case FrameType.ACK:
                    self._take_input(frame.offset)
                case FrameType.ROLE:
                    self._hear_role(frames.parse(frame, Role))
                case FrameType.PING:
                    self._answers.append(frames.pong(frame))
                case FrameType.ERROR:
                    self._here.note(frames.parse(frame, frames.Error).message)
                case FrameType.EXIT:
                    ended = frames.parse(frame, Exit)
                    self._end(outcome_of(ended.code, ended.signal, ended.reason))
            self._was_open = self._was_open or frame.type in (FrameType.DATA_OUT, FrameType.TITLE)
            self._stirred.set()

    async def _show(self, frame: Frame) -> None:
        assert self._shown is not None
        data = frames.unseen(frame, self._shown)
        await self._write(data)
        self._shown += len(data)
        self._quiet_since = trio.current_time()

    async def _write(self, data: bytes) -> None:
        try:
            await self._here.write(data)
        except OSError as error:
            self._end(Outcome(141 if error.errno == errno.EPIPE else 1, f"stdout: {error.strerror}"))
            await trio.lowlevel.checkpoint()

    def _take_input(self, offset: int) -> None:
        count = min(max(0, offset - self._taken), len(self._typed))
        del self._typed[:count]
        self._taken += count
        self._room.set()

    def _hear_role(self, role: Role) -> None:
        was, self._is_controller = self._is_controller, role.role == CONTROLLER
        if was != self._is_controller:
            self._size_told = None
            self._here.note("you type now" if self._is_controller else f"{role.controller or 'nobody'} types now")

    def _note_close(self, closed: ConnectionClosed) -> None:
        code = closed.reason.code if closed.reason else CloseCode.GOING_AWAY
        text = self._complaint or (closed.reason.reason if closed.reason else None) or "no answer"
        self._trouble = f"{text} ({code})" if closed.reason else text
        for final, told in FINAL.items():
            if code == final:
                self._end(Outcome(1, f"{told}: {text}", is_unknown=final is CloseCode.ENDED))

    # to the box

    async def _send_all(self, connection: WebSocketConnection) -> None:
        try:
            while True:
                self._stirred = trio.Event()
                for frame in self._due():
                    await connection.send_message(frames.encode(frame))
                with trio.move_on_at(self._quiet_since + END_QUIET_S if self._has_ended else math.inf):
                    await self._stirred.wait()
        except ConnectionClosed:
            return  # who receives sees it too

    def _due(self) -> Iterator[Frame]:
        """What there is to say now; asked for piece by piece, so that each is as late as can be."""
        while self._answers:
            yield self._answers.pop(0)
        if self._shown is not None and self._shown > self._acked:
            self._acked = self._shown
            yield frames.ack(self._acked)
        size = self._here.size()
        if self._is_controller and size != self._size_told and self._here.has_screen:
            self._size_told = size
            yield frames.resize(size)
        while piece := self._next_input():
            self._sent += len(piece.payload)
            self._quiet_since = trio.current_time()
            yield piece
        if self._has_ended and trio.current_time() >= self._quiet_since + END_QUIET_S:
            # Told again after each output: a terminal forgets an end that comes while no program waits for a line.
            self._quiet_since = math.inf
            yield frames.eof_in(self._sent)

    def _next_input(self) -> Frame | None:
        start = self._sent - self._taken
        end = min(start + frames.DATA_BYTES, len(self._typed), frames.INPUT_WINDOW_BYTES)
        return frames.data_in(self._sent, bytes(self._typed[start:end])) if start < end else None


def outcome_of(code: int | None, number: int | None, reason: str) -> Outcome:
    """As a shell tells it: the code, or 128 and the signal's number; else why there is neither."""
    if code is not None:
        return Outcome(code, by_exit=True)
    if number is not None:
        return Outcome(128 + number, f"the shell was ended by {_signal_name(number)}", by_exit=True)
    status, told = ENDS.get(reason, (1, reason or "the session has ended"))
    return Outcome(status, told)


async def _open_stream(address: Address) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
    parts = urlsplit(address.url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "wss" else 80)
    stream = await trio.open_tcp_stream(host, port)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if address.ssl_context is None:
        return stream
    return trio.SSLStream(stream, address.ssl_context, server_hostname=host, https_compatible=True)


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _first_of(group: BaseExceptionGroup[BaseException]) -> str:
    error = _leaf(group)
    return str(error) or type(error).__name__


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _why_rejected(rejected: ConnectionRejected) -> str:
    try:
        return str(msgspec.json.decode(rejected.body or b"")["error"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"expected an osqbox there, got HTTP {rejected.status_code}"


def key_name(prefix: bytes) -> str:
    """``b"\\x1d"`` as ``Ctrl-]``."""
    return f"Ctrl-{chr(prefix[0] + 64)}" if prefix[0] < 32 else prefix.decode("latin-1")


def help_line(prefix: bytes | None) -> str:
    """The commands, for a person."""
    if prefix is None:
        return "no commands"
    return f"{key_name(prefix)} then d: detach, q: leave, c: take the keyboard, ?: this; twice: the key itself"
