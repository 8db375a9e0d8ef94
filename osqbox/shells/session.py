"""One live shell session as a state machine: frames and time go in, frames come out. Knows no loop and no socket.

    agent ──▶ ring + recording ──▶ every viewer, each from where it is, as fast as it acknowledges
    controller ──▶ input queue ──▶ agent, as fast as the rate allows and the agent acknowledges

Nothing is pushed: whoever writes to a connection asks for the next frame (`next_for_agent`, `next_for_viewer`) and gets
one, or how long to wait unless woken, or that its connection is to be closed. ``now`` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf

from osqbox import shell_frames as frames
from osqbox.errors import Refused
from osqbox.shell_frames import (
    AGENT_WINDOW_BYTES,
    DATA_BYTES,
    PEER_LOST_S,
    VIEWER_WINDOW_BYTES,
    AgentHello,
    AgentWelcome,
    CloseCode,
    Exit,
    Frame,
    FrameError,
    FrameType,
    Role,
    Size,
    ViewerHello,
    ViewerWelcome,
)
from osqbox.shells.journal import InputJournal
from osqbox.shells.keyboard import Client, Keyboard
from osqbox.shells.messages import KIB, MIB, EndReason, Grant, Session, ShellBounds, State
from osqbox.shells.recording import Recorder, RecordingFailed
from osqbox.shells.ring import Ring
from osqbox.shells.service import End
from osqbox.shells.sides import AgentSide, ViewerSide

JOIN_BYTES = 256 * KIB
"""What a viewer without an offset is shown of the past."""
RESUME_BYTES = 16 * MIB
"""A viewer that comes back from further behind is moved forward: nobody reads that, and it holds up the shell."""
ACK_BYTES = AGENT_WINDOW_BYTES // 4
"""Output is acknowledged to the agent in steps of this, and what is less after a while."""
ACK_AFTER_S = 5.0
DRAINED_BYTES = 64 * KIB
"""A viewer with no more than this unacknowledged has read what it was sent."""
QUIET_S = 10.0
"""After so long without output, what the spool has is no longer kept in memory."""
LINGER_S = 1.0
"""After EXIT a viewer that acknowledges nothing more for so long has read all it will."""
CONTROL_FRAMES = 256
"""Frames waiting for a viewer beside output. One that lets them pile up does not read."""
SIGNAL_STATUS = 128
TERMINAL_RESET = b"\x1bc"
PASTE_HOLD_S = 5.0
"""How long a hand-over waits for the end of a bracketed paste."""

Note = Callable[..., None]
"""Told what happened, for the audit: ``(session, action, actor, result, **facts)``; an ``end`` is told with its End."""

AGENTS_REASONS = {each.value: each for each in (EndReason.IDLE, EndReason.MAX_TIME, EndReason.REFUSED)}


class LiveSession:
    """From the request to the last viewer's goodbye."""

    def __init__(
        self,
        facts: Session,
        bounds: ShellBounds,
        now: float,
        wall: float,
        note: Note,
    ) -> None:
        """``wall`` is what ``now`` is in seconds since the epoch."""
        self._facts = facts
        self._bounds = bounds
        self._note = note
        self._wall_offset = wall - now
        self.state = facts.state
        self.agent: AgentSide | None = None
        self.viewers: list[ViewerSide] = []
        self.recorder: Recorder | None = None
        self.journal: InputJournal | None = None
        self.log = Ring(bounds.ring_bytes, facts.output_bytes)
        self.size = Size(facts.cols, facts.rows).clamped()
        self.title = ""
        self.ended: End | None = None
        self.flush_until = inf
        self.is_restored = False
        """Of an earlier process: what was under way towards the agent then is known by the agent alone."""
        self.dropped_input_bytes = 0
        self.skipped_bytes = 0
        self._is_head_known = True
        self._awaiting: list[Callable[[], None]] = []
        self._opened_at: float | None = None
        self._active_at = now
        self._noticed: EndReason | None = None
        self._state_until = now + bounds.pending_s - (wall - facts.created_at)
        """When waiting for the agent ends, in any state that does."""
        self._offer_until = inf
        self._unwatched_until = inf
        self._dropped_until = -inf
        """A viewer that dropped may come back until then."""
        self._clients: dict[tuple[str, str], Client] = {}
        self._controller: tuple[str, str] | None = None
        self._heir: ViewerSide | None = None
        """Gets the control when the paste that is under way has ended."""
        self._heir_until = inf
        self.keyboard = Keyboard(bounds, now)

    # facts

    @property
    def id(self) -> str:
        return self._facts.id

    @property
    def node(self) -> str:
        return self._facts.node

    @property
    def tenant(self) -> str:
        return self._facts.tenant

    def facts(self) -> Session:
        ended = self.ended
        return replace(
            self._facts,
            state=self.state,
            end_reason=ended.reason if ended else None,
            exit_code=ended.exit_code if ended else None,
            signal=ended.signal if ended else None,
            cols=self.size.cols,
            rows=self.size.rows,
            title=self.title,
            viewers=tuple((viewer.by, self.role_of(viewer)) for viewer in self.viewers),
            controller=self._controller[0] if self._controller else None,
            output_bytes=self.log.head,
            dropped_input_bytes=self.dropped_input_bytes,
        )

    def role_of(self, viewer: ViewerSide) -> Grant:
        return Grant.CONTROLLER if self._is_controller(viewer) else Grant.VIEWER

    def update(self, facts: Session) -> None:
        """Take over the row's new facts after a change of it."""
        self._facts = facts

    @property
    def floor(self) -> int:
        """The oldest output that can be shown."""
        return 0 if self._spool_is_whole() else self.log.floor

    def _spool_is_whole(self) -> bool:
        return self.recorder is not None and self.recorder.facts().lost_bytes == 0

    def _wall(self, now: float) -> float:
        return now + self._wall_offset

    # the agent comes and goes

    def offer(self, now: float) -> None:
        """The agent has fetched the secret."""
        self.state = State.OFFERED
        self._offer_until = now + self._bounds.join_s

    def withdraw(self) -> None:
        """It did not use it in time."""
        self.state = State.REQUESTED
        self._offer_until = inf

    def restore(self, now: float, *, head: int | None) -> None:
        """After a restart of the box: the agent has its grace to come back. ``head`` None is known by it alone."""
        self.state = State.DETACHED
        self.is_restored = True
        opened_at = self._facts.opened_at
        self._opened_at = now if opened_at is None else opened_at - self._wall_offset
        self._state_until = now + self._bounds.agent_grace_s
        self._unwatched_until = now + self._bounds.unwatched_s
        self._is_head_known = head is not None
        if head is not None:
            self.log.restart(head)

    def call_when_settled(self, wake: Callable[[], None]) -> None:
        """Wake once when a restored session's agent is back, or will not come."""
        self._awaiting.append(wake)

    def _settle(self) -> None:
        self.is_restored = False
        awaiting, self._awaiting = self._awaiting, []
        for wake in awaiting:
            wake()

    def attach_agent(
        self, hello: AgentHello, resume: str, now: float, wake: Callable[[], None], *, is_legacy: bool = False
    ) -> AgentSide:
        """The agent's new connection; an older one is closed. Raises FrameError when its counts cannot be."""
        if self.ended is not None:
            raise FrameError("the session has ended", CloseCode.ENDED)
        if not is_legacy:
            self._agree_on_offsets(hello)
        if self.agent is not None:
            self.agent.close(CloseCode.REPLACED, "the agent has connected again")
        self._settle()
        was_detached = self.state is State.DETACHED
        self.state, self._state_until, self._offer_until = State.OPEN, inf, inf
        if self._opened_at is None:
            self._opened_at = self._active_at = now
            self._unwatched_until = now + self._bounds.unwatched_s if not self.viewers else inf
        self.agent = agent = AgentSide(now, wake, is_legacy=is_legacy, acked=self.log.head)
        if not is_legacy:
            agent.size_sent = self.size
            agent.say(frames.hello(self._agent_welcome(resume)))
        if was_detached:
            self._tell_viewers(frames.error("attached", "the agent is back"))
        return agent

    def _agree_on_offsets(self, hello: AgentHello) -> None:
        if self.is_restored:
            if not self._is_head_known:
                self.log.restart(hello.head)
            self.keyboard.restart(hello.input)
            self._recall_clients(hello.input)
        if hello.head < self.log.head:
            raise FrameError(f"HELLO: expected head {self.log.head} or more, got {hello.head}")
        self.keyboard.resume(hello.input)
        self._wake_typists()

    def _recall_clients(self, arrived: int) -> None:
        if self.journal is not None:
            received = self.journal.received(arrived)
            self._clients = {key: Client(count, count) for key, count in received.items()}
            self.journal.restart(arrived, received)

    def _agent_welcome(self, resume: str) -> AgentWelcome:
        bounds = self._bounds
        return AgentWelcome(
            session=self.id,
            resume=resume,
            wanted=self.log.head,
            input=self.keyboard.sent,
            window_bytes=AGENT_WINDOW_BYTES,
            cols=self.size.cols,
            rows=self.size.rows,
            shell=self._facts.shell,
            user=self._facts.user,
            idle_s=bounds.idle_s,
            max_s=bounds.max_s,
        )

    def agent_gone(self, side: AgentSide, now: float) -> None:
        """Its connection has ended; of one that was replaced nothing is left to do."""
        if self.agent is not side:
            return
        self.agent = None
        if self.ended is not None:
            return
        if side.is_legacy:
            # A Launcher cannot come back, nor say how its shell ended: it just closes.
            self.end(End(EndReason.AGENT_LOST if side.closing else EndReason.EXIT, self.node), now)
            return
        self.state = State.DETACHED
        self._state_until = now + self._bounds.agent_grace_s
        self._note(self, "detach", self.node, "ok", output_bytes=self.log.head)
        self._tell_viewers(frames.error("detached", "the agent's connection is gone; waiting for it to come back"))

    # from the agent

    def agent_frame(self, side: AgentSide, frame: Frame, now: float) -> None:
        """Raises FrameError for what no agent may say."""
        side.heard_at = now
        if self.agent is not side or self.ended is not None:
            return
        match frame.type:
            case FrameType.DATA_OUT:
                if not side.is_legacy and frame.offset + len(frame.payload) > side.ack_sent + AGENT_WINDOW_BYTES:
                    raise FrameError(f"DATA_OUT: expected at most {AGENT_WINDOW_BYTES} bytes beyond the last ACK")
                self._take_output(frames.unseen(frame, self.log.head), now)
            case FrameType.ACK:
                self.keyboard.arrived(frame.offset)
                self._wake_typists()
                side.wake()
            case FrameType.HELLO if not side.is_legacy:
                self._describe(frames.parse(frame, AgentHello))
            case FrameType.TITLE:
                self.title = frames.parse_title(frame)
                self._tell_viewers(frames.title(self.title))
            case FrameType.EXIT:
                self._exited(frames.parse(frame, Exit), now)
            case FrameType.RESET:
                self._skip_lost_output(*frames.parse_reset(frame), now)
            case FrameType.ERROR:
                said = frames.parse(frame, frames.Error)
                self._tell_viewers(frames.error(frames.clean_title(said.code), frames.clean_title(said.message)))
            case FrameType.PING:
                side.say(frames.pong(frame))
            case FrameType.PONG:
                pass
            case _:
                raise FrameError(f"an agent does not send {frame.type.name} here")

    def _describe(self, hello: AgentHello) -> None:
        """What the agent runs, and as whom, which it knows once its terminal is open."""
        facts = self._facts
        shell = frames.clean_title(hello.shell) or facts.shell
        user = frames.clean_title(hello.user) or facts.user
        if (shell, user) != (facts.shell, facts.user):
            self._facts = replace(facts, shell=shell, user=user)
            self._note(self, "describe", self.node, shell=shell, user=user)

    def _take_output(self, data: bytes, now: float) -> None:
        if not data:
            return
        self._active_at = now
        self._noticed = None
        self._record(partial(Recorder.output, data=data), now)
        self.log.append(data)
        for viewer in self.viewers:
            viewer.wake()
        if self.agent is not None and self._credit() - self.agent.ack_sent >= ACK_BYTES:
            self.agent.wake()

    def _mark(self, label: str, now: float) -> None:
        """A remark in the recording, for whoever replays it."""
        self._record(partial(Recorder.marker, label=label), now)

    def _record(self, what: Callable[..., None], now: float) -> None:
        """A strict recording that fails ends the session."""
        if self.recorder is None or self.ended is not None:
            return
        try:
            what(self.recorder, now=self._wall(now))
        except RecordingFailed as failed:
            self._tell_viewers(frames.error("recording_failed", str(failed)))
            self.end(End(EndReason.RECORDING_FAILED, "box"), now)

    def _skip_lost_output(self, _start: int, end: int, now: float) -> None:
        """The agent no longer has what is wanted: offsets go on, the recording has a hole of zeros."""
        lost_bytes = end - self.log.head
        if lost_bytes <= 0:
            return
        if self.recorder is not None:
            if lost_bytes > AGENT_WINDOW_BYTES:
                raise FrameError(f"RESET: expected at most {AGENT_WINDOW_BYTES} bytes to be missing, got {lost_bytes}")
            self._take_output(bytes(lost_bytes), now)
        else:
            self.log.restart(end)
            for viewer in self.viewers:
                viewer.wake()
        if self.agent is not None:
            self.agent.ack_sent = max(self.agent.ack_sent, end)

    def _exited(self, how: Exit, now: float) -> None:
        reason = AGENTS_REASONS.get(how.reason, EndReason.EXIT)
        if how.code is None and how.signal is None and reason is EndReason.EXIT:
            reason = EndReason.AGENT_LOST  # it cannot say how, so nobody saw the program end
        self.end(End(reason, self.node, how.code, how.signal), now)

    def _wake_typists(self) -> None:
        """Their input has arrived: they are told, and may go on."""
        for viewer in self.viewers:
            if viewer.client.acked > viewer.ack_sent or self._is_controller(viewer):
                viewer.wake()

    # to the agent

    def next_for_agent(self, side: AgentSide, now: float) -> Frame | float | None:
        """The next frame, or seconds to wait unless woken, or None: close the connection."""
        if side.closing is not None:
            return None
        if side.queue:
            return side.queue.popleft()
        if self.ended is not None:
            if side.told_exit:
                side.close(CloseCode.NORMAL, self.ended.reason)
                return None
            side.told_exit = True
            return frames.exit_frame(Exit(reason=self.ended.reason), self.log.head)
        if not side.is_legacy and (ack := self._next_ack(side, now)):
            return ack
        return (
            side.ping_due(now) or self._next_size(side, now) or self.keyboard.next(now) or self._agent_wait_s(side, now)
        )

    def _next_ack(self, side: AgentSide, now: float) -> Frame | None:
        credit = self._credit()
        due_bytes = 1 if now - side.acked_at >= ACK_AFTER_S else ACK_BYTES
        if credit - side.ack_sent < due_bytes:
            return None
        side.ack_sent, side.acked_at = credit, now
        return frames.ack(credit)

    def _credit(self) -> int:
        """Output that is kept, and, while somebody is in control, shown to them: what the agent may forget."""
        controller = self._connected_controller()
        return self.log.head if controller is None else min(self.log.head, max(controller.acked, 0))

    def is_choked(self) -> bool:
        """A Launcher knows no acknowledgements: it is not read while the controller is a window behind."""
        controller = self._connected_controller()
        return controller is not None and self.log.head - controller.acked >= AGENT_WINDOW_BYTES

    def _next_size(self, side: AgentSide, now: float) -> Frame | None:
        if side.size_sent == self.size or now < side.size_sent_at + self._bounds.resize_every_s:
            return None
        side.size_sent, side.size_sent_at = self.size, now
        self._record(partial(Recorder.resize, cols=self.size.cols, rows=self.size.rows), now)
        self._tell_viewers(frames.resize(self.size))
        return frames.resize(self.size)

    def _agent_wait_s(self, side: AgentSide, now: float) -> float:
        wait_s = side.ping_at - now
        if side.size_sent != self.size:
            wait_s = min(wait_s, side.size_sent_at + self._bounds.resize_every_s - now)
        if self.keyboard.is_rationed:
            wait_s = min(wait_s, self.keyboard.ration_s)
        return max(wait_s, 0.001)

    def input_delivered(self, side: AgentSide) -> None:
        """What was handed to the connection has been written: all that is known of a Launcher's input."""
        if side.is_legacy and self.agent is side:
            self.keyboard.arrived(self.keyboard.sent)
            self._wake_typists()

    # viewers come and go

    def attach_viewer(
        self, by: str, grant: Grant, hello: ViewerHello, now: float, wake: Callable[[], None]
    ) -> ViewerSide:
        """A viewer's connection; an older one of the same client is closed. Raises Refused."""
        if self.ended is not None:
            raise Refused("ended", f"the session has ended: {self.ended.reason}", status=410)
        if hello.resume is not None and hello.resume > self.log.head:
            raise FrameError(f"HELLO: expected resume up to {self.log.head}, got {hello.resume}")
        key = (by, hello.client)
        for older in [viewer for viewer in self.viewers if viewer.id == key]:
            older.close(CloseCode.REPLACED, "the same client has connected again")
            self.viewers.remove(older)
        if len(self.viewers) >= self._bounds.viewers_per_session:
            limit = self._bounds.viewers_per_session
            raise Refused("viewer_quota", f"expected at most {limit} viewers of one session", status=429)
        viewer = ViewerSide(now, wake, by, grant, hello, self._client(key))
        self.viewers.append(viewer)
        self._unwatched_until = inf
        self._active_at = now
        if viewer.wants_control and (self._controller in (None, key) or self._connected_controller() is None):
            self._controller = key
            if hello.cols and hello.rows:
                self.resize(viewer, Size(hello.cols, hello.rows))
        self._begin_at(viewer, hello.resume)
        self._mark(f"{by} joined as {self.role_of(viewer)}", now)
        return viewer

    def _client(self, key: tuple[str, str]) -> Client:
        client = self._clients.pop(key, None)
        if client is None:
            client = Client()
            connected = {viewer.id for viewer in self.viewers}
            while len(self._clients) >= self._bounds.clients_per_session:
                oldest = next(name for name in self._clients if name not in connected)
                del self._clients[oldest]
        self._clients[key] = client  # at the end: the oldest goes first
        return client

    def _begin_at(self, viewer: ViewerSide, resume: int | None) -> None:
        head, floor = self.log.head, self.floor
        latest = max(floor, head - JOIN_BYTES)
        is_near = resume is not None and resume >= max(floor, head - RESUME_BYTES)
        start = resume if resume is not None and is_near else latest
        viewer.sent = viewer.acked = start
        viewer.say(frames.hello(self._viewer_welcome(viewer)))
        if resume is not None and start > resume:
            self._say_skipped(viewer, resume, start)
        controller = self._controller[0] if self._controller else None
        viewer.say(frames.role(Role(role=self.role_of(viewer), controller=controller)))
        if self.title:
            viewer.say(frames.title(self.title))
        self._tell_roles(but=viewer)

    def _viewer_welcome(self, viewer: ViewerSide) -> ViewerWelcome:
        facts = self._facts
        return ViewerWelcome(
            session=facts.id,
            node=facts.node,
            hostname=frames.clean_title(facts.hostname)[:256],
            role=self.role_of(viewer),
            offset=viewer.sent,
            floor=self.floor,
            head=self.log.head,
            window_bytes=VIEWER_WINDOW_BYTES,
            cols=self.size.cols,
            rows=self.size.rows,
            input=viewer.client.received,
            recording=facts.recording,
            state=self.state,
        )

    def viewer_gone(self, viewer: ViewerSide, now: float, *, on_purpose: bool) -> None:
        """Its connection has ended; one that was replaced is no longer here."""
        if viewer not in self.viewers:
            return
        self.viewers.remove(viewer)
        self._mark(f"{viewer.by} left", now)
        if self._heir is viewer:
            self._heir = None
        if on_purpose:
            if self._controller == viewer.id:
                self._controller = None
                self._promote()
                self._tell_roles()
        else:
            self._dropped_until = now + self._bounds.viewer_grace_s
        if self.viewers or self.ended is not None:
            return
        if self.agent is not None:
            self.agent.wake()  # nobody holds the output up any more
        if on_purpose and now >= self._dropped_until:
            self.end(End(EndReason.OPERATOR_LEFT, viewer.by), now)
        else:
            self._unwatched_until = max(now, self._dropped_until)

    # from viewers

    def viewer_frame(self, viewer: ViewerSide, frame: Frame, now: float) -> None:
        """Raises FrameError for what no viewer may say."""
        viewer.heard_at = now
        if viewer not in self.viewers:
            return
        match frame.type:
            case FrameType.DATA_IN:
                self._typed(viewer, frame, now)
            case FrameType.ACK:
                self._shown(viewer, frame.offset, now)
            case FrameType.RESIZE:
                self.resize(viewer, frames.parse_resize(frame))
            case FrameType.ROLE:
                self._wants(viewer, frames.parse(frame, Role), now)
            case FrameType.EOF_IN:
                if self._is_controller(viewer):
                    self.keyboard.end_of_input()
                    self._wake_agent()
            case FrameType.PING:
                viewer.say(frames.pong(frame))
            case FrameType.PONG:
                pass
            case _:
                raise FrameError(f"a viewer does not send {frame.type.name} here")

    def _typed(self, viewer: ViewerSide, frame: Frame, now: float) -> None:
        data = frames.unseen(frame, viewer.client.received)
        if not data:
            return
        if not self._is_controller(viewer) or self.ended is not None:
            self.dropped_input_bytes += len(data)
            self.keyboard.ignore(len(data), viewer.client)
            self._journalise(viewer)
            viewer.wake()
            return
        self._active_at = now
        self._noticed = None
        self.keyboard.type(data, viewer.client)
        self._journalise(viewer)
        if self._facts.record_input:
            self._record(partial(Recorder.input, data=data), now)
        if self._heir is not None and not self.keyboard.is_pasting:
            self._hand_over(self._heir)
        self._wake_agent()

    def _journalise(self, viewer: ViewerSide) -> None:
        if self.journal is None:
            return
        try:
            self.journal.note(self.keyboard.head, viewer.id, viewer.client.received)
            if self.keyboard.acked == self.keyboard.head and self.journal.is_long:
                self.journal.restart(self.keyboard.head, {key: kept.received for key, kept in self._clients.items()})
        except OSError:  # a full disk costs this session its memory of a crash, not its keyboard
            self.journal.close()
            self.journal = None

    def must_pause(self, viewer: ViewerSide) -> bool:
        """Whether this viewer is not to be read for now: it has typed more than the agent takes."""
        return self.keyboard.is_full and self._is_controller(viewer)

    def _shown(self, viewer: ViewerSide, offset: int, now: float) -> None:
        if offset > viewer.sent:
            raise FrameError(f"ACK: expected at most {viewer.sent}, got {offset}")
        if offset <= viewer.acked:
            return
        viewer.acked = offset
        viewer.progress_at = now
        viewer.blocked_since = None
        viewer.wake()
        if self.agent is not None and self._is_controller(viewer):
            self.agent.wake()

    def resize(self, viewer: ViewerSide, size: Size) -> None:
        """The controller's size is the terminal's."""
        if self._is_controller(viewer):
            self.size = size.clamped()
            self._wake_agent()

    def _wake_agent(self) -> None:
        if self.agent is not None:
            self.agent.wake()

    # who types

    def _is_controller(self, viewer: ViewerSide) -> bool:
        return viewer.id == self._controller

    def _connected_controller(self) -> ViewerSide | None:
        return next((viewer for viewer in self.viewers if viewer.id == self._controller), None)

    def _wants(self, viewer: ViewerSide, wish: Role, now: float) -> None:
        if wish.want == Grant.VIEWER:
            viewer.wants_control = False
            if self._is_controller(viewer):
                self._controller = None
                self._promote()
                self._tell_roles()
        elif wish.want == Grant.CONTROLLER:
            if viewer.grant is not Grant.CONTROLLER:
                viewer.say(frames.error("read_only", "you may watch this session, not type"))
                self._note(self, "control", viewer.by, "read_only")
                return
            viewer.wants_control = True
            if not self.keyboard.is_pasting or self._connected_controller() is None:
                self._hand_over(viewer)
            elif not self._is_controller(viewer):
                self._heir, self._heir_until = viewer, now + PASTE_HOLD_S
        else:
            raise FrameError('ROLE: expected want "controller" or "viewer"')

    def _hand_over(self, viewer: ViewerSide) -> None:
        """From now on this one types; what the one before typed stays before it."""
        self._heir = None
        if self._is_controller(viewer):
            return
        before = self._controller[0] if self._controller else None
        self._controller = viewer.id
        self.keyboard.hand_over()
        self._note(self, "control", viewer.by, "ok", before=before)
        self._tell_roles()
        self._wake_agent()

    def _promote(self) -> None:
        """Nobody types: the one who has wanted to for longest does."""
        heir = next((viewer for viewer in self.viewers if viewer.wants_control), None)
        if heir is not None:
            self._hand_over(heir)

    def _tell_roles(self, but: ViewerSide | None = None) -> None:
        controller = self._controller[0] if self._controller else None
        for viewer in self.viewers:
            if viewer is not but:
                viewer.say(frames.role(Role(role=self.role_of(viewer), controller=controller)))

    # to viewers

    def next_for_viewer(self, viewer: ViewerSide, now: float) -> Frame | float | None:
        """The next frame, or seconds to wait unless woken, or None: close the connection."""
        if viewer.closing is not None:
            return None
        if viewer.queue:
            return viewer.queue.popleft()
        if viewer.client.acked > viewer.ack_sent:
            viewer.ack_sent = viewer.client.acked
            return frames.ack(viewer.ack_sent)
        if viewer.sent < self.log.head:
            frame = self._next_output(viewer)
            if frame is not None:
                return frame
            viewer.blocked_since = now if viewer.blocked_since is None else viewer.blocked_since
        elif self.ended is not None:
            return self._farewell(viewer, now)
        return viewer.ping_due(now) or max(viewer.ping_at - now, 0.001)

    def _next_output(self, viewer: ViewerSide) -> Frame | None:
        in_flight = viewer.sent - viewer.acked
        if self.log.head - viewer.acked > self._bounds.lag_bytes and not self._is_controller(viewer):
            return self._skip(viewer) if in_flight <= DRAINED_BYTES else None
        if viewer.sent < self.floor:
            return self._skip(viewer)
        room = min(VIEWER_WINDOW_BYTES - in_flight, DATA_BYTES)
        if room <= 0:
            return None
        data = self._read(viewer.sent, room)
        start, viewer.sent = viewer.sent, viewer.sent + len(data)
        return frames.data_out(start, data)

    def _read(self, offset: int, limit_bytes: int) -> bytes:
        if offset >= self.log.floor or self.recorder is None:
            return self.log.read(offset, limit_bytes)
        return self.recorder.read(offset, min(limit_bytes, self.log.head - offset))

    def _skip(self, viewer: ViewerSide) -> Frame:
        """Move a viewer that is too far behind forward, to a line's begin near the end."""
        in_flight = viewer.sent - viewer.acked
        start = max(viewer.sent, self.log.floor, self.log.head - DRAINED_BYTES)
        line = self.log.read(start, DATA_BYTES).find(b"\n")
        to = start + line + 1
        self.skipped_bytes += to - viewer.sent
        self._say_skipped(viewer, viewer.sent, to)
        viewer.sent, viewer.acked = to, to - in_flight
        return viewer.queue.popleft()

    def _say_skipped(self, viewer: ViewerSide, start: int, to: int) -> None:
        viewer.say(frames.reset(start, to))
        viewer.say(Frame(FrameType.SNAPSHOT, to, TERMINAL_RESET))

    def _farewell(self, viewer: ViewerSide, now: float) -> Frame | float | None:
        """EXIT, and then, when everything before it was read, the end of the connection.

        To close on a viewer that still acknowledges would reset the connection, and what it has not read were lost.
        """
        ended = self.ended
        assert ended is not None
        if not viewer.told_exit:
            viewer.told_exit = True
            viewer.progress_at = now
            how = Exit(code=ended.exit_code, signal=ended.signal, reason=ended.reason)
            return frames.exit_frame(how, self.log.head)
        left_s = viewer.progress_at + LINGER_S - now
        if viewer.acked < viewer.sent and left_s > 0:
            return left_s
        viewer.close(CloseCode.NORMAL if ended.reason is EndReason.EXIT else CloseCode.ENDED, ended.reason)
        return None

    def _tell_viewers(self, frame: Frame) -> None:
        for viewer in self.viewers:
            viewer.say(frame)
            if len(viewer.queue) > CONTROL_FRAMES:
                viewer.close(CloseCode.TOO_SLOW, "too much unread")

    # time passes

    def tick(self, now: float) -> None:
        """Whatever is due; to be called about every second."""
        if self.ended is not None:
            self._tick_ended(now)
            return
        if self.state is State.OFFERED and now >= self._offer_until:
            self.withdraw()
            self._note(self, "withdraw", self.node)
        if now >= self._state_until:
            lost = self.state is State.DETACHED
            self.end(End(EndReason.AGENT_LOST if lost else EndReason.EXPIRED, "box"), now)
        elif now >= self._unwatched_until and not self.viewers:
            self.end(End(EndReason.OPERATOR_LEFT, "box"), now)
        else:
            self._tick_sides(now)
            self._tick_limits(now)

    def _tick_sides(self, now: float) -> None:
        agent, bounds = self.agent, self._bounds
        if agent is not None:
            is_silent = now - agent.heard_at > PEER_LOST_S and not (agent.is_legacy and self.is_choked())
            if is_silent or agent.is_stuck(now, bounds.send_stall_s):
                agent.close(CloseCode.TOO_SLOW, "nothing was heard for too long")
        for viewer in self.viewers:
            stall_s = bounds.controller_stall_s if self._is_controller(viewer) else bounds.viewer_stall_s
            blocked = viewer.blocked_since is not None and now - viewer.blocked_since > stall_s
            if blocked or viewer.is_stuck(now, stall_s) or now - viewer.heard_at > PEER_LOST_S:
                viewer.close(CloseCode.TOO_SLOW, "this viewer does not read, or is gone")
        if self._heir is not None and now >= self._heir_until:
            self._hand_over(self._heir)

    def _tick_limits(self, now: float) -> None:
        bounds = self._bounds
        if self._opened_at is None:
            return
        if self.log.kept_bytes > DRAINED_BYTES and now - self._active_at > QUIET_S and self._spool_is_whole():
            self.log.trim(0)  # the spool has it all
        limits = ((EndReason.IDLE, self._active_at, bounds.idle_s), (EndReason.MAX_TIME, self._opened_at, bounds.max_s))
        for reason, since, limit_s in limits:
            left_s = inf if limit_s is None else since + limit_s - now
            if left_s <= 0:
                self.end(End(reason, "box"), now)
                return
            if left_s <= min(bounds.notice_s, (limit_s or inf) / 2) and self._noticed is not reason:
                self._noticed = reason
                self._tell_viewers(frames.error(reason, _NOTICES[reason].format(round(left_s))))

    def _tick_ended(self, now: float) -> None:
        for viewer in self.viewers:
            if now > max(self.flush_until, viewer.progress_at + self._bounds.flush_s):
                viewer.close(CloseCode.TOO_SLOW, "the session has ended and the rest was not read")
        if self.agent is not None and now > self.flush_until:
            self.agent.close(CloseCode.NORMAL)

    # the end

    def end(self, how: End, now: float) -> None:
        """Ended, for the first reason given: the agent hangs up, viewers read the rest and EXIT."""
        if self.ended is not None:
            return
        self.ended = how
        self.state = State.ENDED
        self.flush_until = now + self._bounds.flush_s
        if self.recorder is not None:
            status = how.exit_code if how.exit_code is not None else SIGNAL_STATUS + (how.signal or 1)
            self._close_recording(status, now)
        self.keyboard.restart(self.keyboard.head)
        self._settle()
        self._note(self, "end", how.by, "ok", end=how)
        self._wake_agent()
        for viewer in self.viewers:
            viewer.wake()

    def _close_recording(self, status: int, now: float) -> None:
        assert self.recorder is not None
        with suppress(RecordingFailed):  # ended all the same
            self.recorder.exit(status, self._wall(now))

    def say_goodbye(self) -> None:
        """The broker stops: everybody may come back with what they have."""
        for side in (self.agent, *self.viewers):
            if side is not None:
                side.close(CloseCode.GOING_AWAY, "the box stops or restarts")

    def is_left(self) -> bool:
        """Ended, and nobody is connected any more."""
        return self.ended is not None and self.agent is None and not self.viewers

    def dispose(self) -> None:
        """Nobody reads it any more."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
        if self.journal is not None:
            (self.journal.close if self.ended is None else self.journal.remove)()
            self.journal = None


_NOTICES = {
    EndReason.IDLE: "nothing has happened here for long: the session ends in {} s unless something is typed",
    EndReason.MAX_TIME: "the session reaches its longest time in {} s, and ends",
}
