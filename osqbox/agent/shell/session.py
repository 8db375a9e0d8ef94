"""One shell over ``shell.v1``: a terminal that outlives its connections.

Output waits here until the broker has acknowledged it, at most a window of it: beyond that the terminal is not read,
its buffer fills, and the kernel holds the program. A connection that breaks is made anew, with the token of the last
welcome; both ends then say how far they are, so that nothing is lost and nothing is typed twice.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from osqbox import shell_frames as frames
from osqbox.agent.shell.buffers import Inbox, Outbox
from osqbox.agent.shell.offers import Offer
from osqbox.agent.shell.socket import Dialer, JoinFailed
from osqbox.agent.shell.terminal import Ending, ShellRefused, Terminal
from osqbox.shell_frames import CloseCode, Frame, FrameError, FrameType, Size

GRACE_S = 60.0
"""How long a terminal is kept after its connection broke."""
WELCOME_S = 15.0
GOODBYE_S = 5.0
"""How long the broker may take to close once it has EXIT."""
STOP_S = 0.5
"""For a last word when the agent is stopped."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
ACK_PAUSE_S = 0.05
ACK_BYTES = 32 * 1024
"""Input is acknowledged so late, or when there is so much of it: an echo must not wait for it."""
WRITE_BYTES = 4096
_FINAL_STATUS = range(400, 429)
_PASSING = frozenset({CloseCode.GOING_AWAY, CloseCode.INTERNAL_ERROR, CloseCode.TOO_SLOW, CloseCode.BUSY})
_FINAL_CODES = frozenset(CloseCode) - _PASSING
_REFUSALS = frozenset({CloseCode.FORBIDDEN, CloseCode.UNAUTHORIZED, CloseCode.NOT_FOUND})

OpenTerminal = Callable[[str | None, str | None, Size], Awaitable[Terminal]]
"""Given the shell and user the broker asks for. Raises ShellRefused."""
OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Limits:
    idle_s: float | None = None
    """Without a byte in either direction."""
    max_s: float | None = None
    hang_up_s: float = 2.0
    """Between SIGHUP and SIGKILL."""
    grace_s: float = GRACE_S

    def with_broker(self, welcome: frames.AgentWelcome) -> Limits:
        """The stricter of both ends' wishes."""
        idle_s, max_s = _least(self.idle_s, welcome.idle_s), _least(self.max_s, welcome.max_s)
        return Limits(idle_s, max_s, self.hang_up_s, self.grace_s)


def _least(*given: float | None) -> float | None:
    return min((each for each in given if each and each > 0), default=None)


class Session:
    """``run`` is its whole life."""

    def __init__(
        self,
        offer: Offer,
        dialer: Dialer,
        open_terminal: OpenTerminal,
        *,
        hostname: str,
        node_key: Callable[[], str] = str,
        limits: Limits = Limits(),
        on_event: OnEvent = lambda _kind, _facts: None,
    ) -> None:
        self.out = Outbox()
        self.inbox = Inbox()
        self.ending: Ending | None = None
        """How the terminal's program ended; set when all its output is in ``out``."""
        self.why = ""
        """Why we hung up, where we did."""
        self.window_bytes = frames.AGENT_WINDOW_BYTES
        self.changed = trio.Event()
        self.terminal: Terminal | None = None
        self._offer = offer
        self._dialer = dialer
        self._open_terminal = open_terminal
        self._hostname = hostname
        self._node_key = node_key
        self._limits = limits
        self._on_event = on_event
        self._nursery: trio.Nursery | None = None
        self._resume: str | None = None
        self._size = Size(80, 24)
        self._outcome = ""
        self._active_at = 0.0

    # -- its life ------------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Why it ended: ``exit``, ``idle``, ``max_time``, ``broker_lost``, ``refused: ...``, ``closed: ...``."""
        async with trio.open_nursery() as self._nursery:
            try:
                await self._stay_connected()
            finally:
                self._nursery.cancel_scope.cancel()
                if self.terminal is not None:
                    await self.terminal.close(self._limits.hang_up_s)
        return self._outcome

    def tell(self) -> None:
        """Wake everyone who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    def hang_up(self, why: str) -> None:
        """End the terminal; what it still says, and how it ended, is sent before the connection closes."""
        if self.terminal is not None and self._nursery is not None and not self.why:
            self.why = why
            self._nursery.start_soon(self.terminal.close, self._limits.hang_up_s)

    def _end(self, outcome: str) -> None:
        self._outcome = self._outcome or outcome

    async def _stay_connected(self) -> None:
        """Connect again and again until it is over, or nobody could be reached for the grace."""
        lost_at, pause_s = trio.current_time(), FIRST_PAUSE_S
        while not self._outcome:
            if await self._try():
                lost_at, pause_s = trio.current_time(), FIRST_PAUSE_S
            if trio.current_time() - lost_at > self._limits.grace_s:
                self._end("broker_lost")
            if not self._outcome:
                # A crowd that lost one broker must not come back all at once.
                await trio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _try(self) -> bool:
        """One connection, whatever becomes of it; whether the broker welcomed us."""
        before = self._resume
        try:
            await self._connect()
        except JoinFailed as error:
            if error.status in _FINAL_STATUS:
                self._end_refused(str(error))
        except Exception as error:  # noqa: BLE001 - whatever a broker sends, the agent goes on
            self._on_event("shell_trouble", {"session": self._offer.session, "reason": repr(error)})
        return self._resume is not before

    async def _connect(self) -> None:
        """Raises JoinFailed."""
        bearer = self._resume or self._offer.secret
        async with self._dialer.dial(
            self._offer.path, headers=[("Authorization", f"Bearer {bearer}")], subprotocol=frames.SUBPROTOCOL
        ) as connection:
            if connection.subprotocol != frames.SUBPROTOCOL:
                self._end("refused: the server does not speak shell.v1; try --shell-mode launcher-2018")
                return
            try:
                welcome = await self._greet(connection)
                if await self._begin(welcome, connection):
                    await Conversation(self, connection, welcome.wanted).run()
                    self._end(self.why or "exit")
            except FrameError as error:
                self._end(f"closed: {error}")
                await connection.aclose(error.code, str(error)[:100])
            except ConnectionClosed:
                self._note_closed(connection)

    def _note_closed(self, connection: WebSocketConnection) -> None:
        closed = connection.closed
        if closed is None or closed.code not in _FINAL_CODES:
            return
        says = f"{closed.code} {closed.reason or ''}".strip()
        if closed.code in _REFUSALS:
            self._end_refused(says)
        else:
            self._end((self.why or "exit") if self.ending else f"closed: {says}")

    def _end_refused(self, says: str) -> None:
        """A broker that knows no such session any more has had our EXIT, if there was one."""
        self._end((self.why or "exit") if self.ending else f"refused: {says}")

    # -- greeting ------------------------------------------------------------------------------------------------

    async def _greet(self, connection: WebSocketConnection) -> frames.AgentWelcome:
        """Raises FrameError, ConnectionClosed."""
        await connection.send_message(frames.encode(self._hello()))
        frame: Frame | None = None
        with trio.move_on_after(WELCOME_S):
            frame = frames.decode(await connection.get_message())
        if frame is None:
            raise ConnectionClosed(None)
        if frame.type is FrameType.ERROR:
            said = frames.parse(frame, frames.Error)
            raise FrameError(f"{said.code}: {said.message}", CloseCode.NORMAL)
        if frame.type is not FrameType.HELLO:
            raise FrameError(f"expected HELLO first, got {frame.type.name}")
        return self._accept(frames.parse(frame, frames.AgentWelcome))

    def _hello(self) -> Frame:
        terminal = self.terminal
        return frames.hello(
            frames.AgentHello(
                session=self._offer.session,
                secret=None if self._resume else self._offer.secret,
                resume=self._resume,
                node_key=self._node_key() or None,
                head=self.out.head,
                input=self.inbox.received,
                host=self._hostname[:256],
                shell=terminal.shell if terminal else "",
                user=terminal.user if terminal else "",
                pid=terminal.pid if terminal else 0,
                cols=self._size.cols,
                rows=self._size.rows,
            )
        )

    def _accept(self, welcome: frames.AgentWelcome) -> frames.AgentWelcome:
        """Raises FrameError for offsets that fit nothing we said or took."""
        if not self.out.acked <= welcome.wanted <= self.out.head:
            raise FrameError(f"HELLO: expected wanted {self.out.acked}..{self.out.head}, got {welcome.wanted}")
        if welcome.input > self.inbox.received:
            raise FrameError(f"HELLO: expected input up to {self.inbox.received}, got {welcome.input}")
        self.out.acknowledge(welcome.wanted)
        self._resume, self.window_bytes = welcome.resume, welcome.window_bytes
        self.resize(Size(welcome.cols or 80, welcome.rows or 24))
        self.tell()
        return welcome

    async def _begin(self, welcome: frames.AgentWelcome, connection: WebSocketConnection) -> bool:
        """The first welcome opens the terminal: before it nobody has proved anything."""
        if self.terminal is not None:
            return True
        try:
            self.terminal = await self._open_terminal(welcome.shell, welcome.user, self._size)
        except ShellRefused as error:
            self._end(f"refused: {error}")
            await connection.send_message(frames.encode(frames.error("refused", str(error)[:1000])))
            await connection.send_message(frames.encode(frames.exit_frame(frames.Exit(reason="refused"))))
            return False
        self._limits = self._limits.with_broker(welcome)
        self._active_at = trio.current_time()
        facts = {"shell": self.terminal.shell, "user": self.terminal.user, "pid": self.terminal.pid}
        self._on_event("shell_started", {"session": self._offer.session, **facts})
        await connection.send_message(frames.encode(self._hello()))
        assert self._nursery is not None
        for task in (self._read_terminal, self._write_terminal, self._await_limits):
            self._nursery.start_soon(task, self.terminal)
        return True

    # -- the terminal --------------------------------------------------------------------------------------------

    async def _read_terminal(self, terminal: Terminal) -> None:
        endings: list[Ending] = []

        async def wait() -> None:
            endings.append(await terminal.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            while True:
                while self.out.head - self.out.acked >= self.window_bytes:
                    await self.changed.wait()
                data = await terminal.receive_some()
                if not data:
                    break
                self._active_at = trio.current_time()
                self.out.append(data)
                self.tell()
        self.ending = endings[0]
        self.tell()

    async def _write_terminal(self, terminal: Terminal) -> None:
        while True:
            piece = self.inbox.peek(WRITE_BYTES)
            if piece:
                self._active_at = trio.current_time()
                await terminal.send_all(piece)
                self.inbox.take(len(piece))
                self.tell()
            elif self.inbox.is_at_end:
                self.inbox.take_end()
                await terminal.send_eof()
            else:
                await self.changed.wait()

    def resize(self, size: Size) -> None:
        size = size.clamped()
        if self.terminal is not None and size != self._size:
            self.terminal.resize(size)
        self._size = size

    async def _await_limits(self, _terminal: Terminal) -> None:
        never = float("inf")
        latest = trio.current_time() + (self._limits.max_s or never)
        while True:
            due = min(latest, self._active_at + (self._limits.idle_s or never))
            if trio.current_time() >= due:
                break
            await trio.sleep_until(due)
        self.hang_up("max_time" if trio.current_time() >= latest else "idle")


class Conversation:
    """A session over one connection."""

    def __init__(self, session: Session, connection: WebSocketConnection, sent: int) -> None:
        self._session = session
        self._connection = connection
        self._sent = sent
        self._acked_input = session.inbox.taken
        self._alive = trio.CancelScope(deadline=trio.current_time() + frames.PEER_LOST_S)
        """A connection that brings nothing is dead, whatever TCP believes; sending on it may block for ever."""
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Returns when EXIT is delivered. Raises ConnectionClosed, FrameError."""
        is_over = False
        try:
            with self._alive:
                async with trio.open_nursery() as nursery:
                    for task in (self._receive, self._ping, self._say):
                        nursery.start_soon(self._until_failure, task, nursery.cancel_scope)
            is_over = True
        finally:
            if not is_over:
                await self._say_stopped()
        if self._alive.cancelled_caught:
            raise ConnectionClosed(None)
        if self._failure is not None:
            raise self._failure

    async def _until_failure(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await task()
        except (ConnectionClosed, FrameError) as error:
            self._failure = self._failure or error
        scope.cancel()

    async def _send(self, frame: Frame) -> None:
        await self._connection.send_message(frames.encode(frame))

    async def _say_stopped(self) -> None:
        with trio.move_on_after(STOP_S, shield=True):
            try:
                await self._send(frames.exit_frame(frames.Exit(reason="agent_stopped"), self._sent))
            except ConnectionClosed:
                return

    # -- saying --------------------------------------------------------------------------------------------------

    async def _say(self) -> None:
        session = self._session
        assert session.terminal is not None
        await self._send(frames.title(session.terminal.title))
        ack_at = float("inf")
        while True:
            changed = session.changed
            if await self._say_output():
                continue
            unacked = session.inbox.taken - self._acked_input
            if unacked >= ACK_BYTES or (unacked > 0 and trio.current_time() >= ack_at):
                ack_at = float("inf")
                await self._acknowledge()
            elif session.ending is not None and self._sent == session.out.head:
                await self._say_exit(session.ending)
                return
            else:
                if unacked > 0 and ack_at == float("inf"):
                    ack_at = trio.current_time() + ACK_PAUSE_S
                with trio.CancelScope(deadline=ack_at):
                    await changed.wait()

    async def _say_output(self) -> bool:
        """One frame, if there is output and the window has room for it."""
        out, room = self._session.out, self._session.out.acked + self._session.window_bytes - self._sent
        data = out.read(self._sent, min(room, frames.DATA_BYTES)) if room > 0 else b""
        if not data:
            return False
        await self._send(frames.data_out(self._sent, data))
        self._sent += len(data)
        return True

    async def _acknowledge(self) -> None:
        taken = self._session.inbox.taken
        await self._send(frames.ack(taken))
        self._acked_input = taken

    async def _say_exit(self, ending: Ending) -> None:
        """Then the broker closes; one that does not is left."""
        await self._acknowledge()
        code = None if ending.code is None else ending.code & 0xFF
        told = frames.Exit(code=code, signal=ending.signal, reason=self._session.why or "exit")
        await self._send(frames.exit_frame(told, self._sent))
        await trio.sleep(GOODBYE_S)

    # -- hearing -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            frame = frames.decode(await self._connection.get_message())
            self._alive.deadline = trio.current_time() + frames.PEER_LOST_S
            await self._heard(frame)

    async def _heard(self, frame: Frame) -> None:
        session = self._session
        match frame.type:
            case FrameType.DATA_IN | FrameType.EOF_IN:
                session.inbox.accept(frame)
                session.tell()
            case FrameType.ACK:
                session.out.acknowledge(frame.offset)
                session.tell()
            case FrameType.RESIZE:
                session.resize(frames.parse_resize(frame))
            case FrameType.PING:
                await self._send(frames.pong(frame))
            case FrameType.EXIT:
                session.hang_up(frames.parse(frame, frames.Exit).reason or "killed")
            case _:
                pass  # PONG: being heard is all there is to it; others are not for agents

    async def _ping(self) -> None:
        number = 0
        while True:
            await trio.sleep(frames.PING_INTERVAL_S)
            number += 1
            await self._send(frames.ping(number))


__all__ = ["Limits", "Session"]
