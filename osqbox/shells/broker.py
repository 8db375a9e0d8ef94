"""The live sessions: who is connected to what, what is due, and what of it is told to the store.

A connection is served in the task that brought it (`join`, `view`): one task reads, one writes, and the session's own
state machine says what. Everything that is due by time is looked after by one ticker, so that an idle session costs no
task of the broker's own. What happened is written to the store in order by one writer.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from osqbox import shell_frames as frames
from osqbox.clock import Clock
from osqbox.errors import Refused
from osqbox.shell_frames import AgentHello, CloseCode, Frame, FrameError, FrameType, ViewerHello
from osqbox.shells import recording, service
from osqbox.shells.journal import InputJournal
from osqbox.shells.links import Link
from osqbox.shells.messages import BrokerStatistics, EndReason, Grant, Redeemed, Session, ShellBounds, State, Ticket
from osqbox.shells.recording import Recorder, RecordingFailed, RecordingRules
from osqbox.shells.service import LAUNCHER, V1, Claim, End, Wish
from osqbox.shells.session import LiveSession
from osqbox.shells.sides import AgentSide, Side, ViewerSide
from osqbox.store import Store, Tx, count_dropped

log = logging.getLogger(__name__)

TICK_S = 0.5
UPKEEP_S = 60.0
NOTES_WAITING = 512
"""Things to write down; beyond that whoever causes more of them is no longer read."""
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


def new_secret() -> str:
    """256 bits."""
    return secrets.token_urlsafe(32)


class Wire:
    """Wakes the tasks of one connection."""

    __slots__ = ("bell", "closed", "room", "side")

    def __init__(self) -> None:
        self.side: Side | None = None
        self.bell = self.room = trio.Event()
        self.closed = trio.Event()

    def wake(self) -> None:
        self.bell.set()
        self.room.set()
        if self.side is not None and self.side.closing is not None:
            self.closed.set()


@dataclass(slots=True)
class _Granted:
    session: str
    by: str
    grant: Grant
    expires_at: float
    """Monotonic."""


@dataclass(eq=False)
class _HeldPoll:
    woken: trio.Event = field(default_factory=trio.Event)


class Broker:
    """Open with `open_broker`."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        clock: Clock,
        bounds: ShellBounds,
        *,
        new_id: Callable[[], str],
        new_key: Callable[[], str],
        rules: RecordingRules,
    ) -> None:
        self.bounds = bounds
        self._store = store
        self._directory = directory
        self._clock = clock
        self._new_id = new_id
        self._new_key = new_key
        self._rules = rules
        self._live: dict[str, LiveSession] = {}
        self._tickets: dict[bytes, _Granted] = {}
        self._held: defaultdict[str, list[_HeldPoll]] = defaultdict(list)
        self._notes: deque[Callable[[Tx], None]] = deque()
        self._noted = trio.Event()
        self._notes_written = trio.Event()
        self._connections = 0
        self._disconnected = trio.Event()
        self._stopping = False
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    # operators

    async def open(
        self,
        node: str,
        tenant: str,
        hostname: str,
        by: str,
        *,
        reason: str = "",
        cols: int = 80,
        rows: int = 24,
        shell: str | None = None,
        user: str | None = None,
        record: bool = True,
        record_input: bool = False,
    ) -> Session:
        """A new session, and its node told at once if it is waiting for one. Raises Refused (429) beyond a quota."""
        self._check_running()
        size = frames.Size(cols, rows).clamped()
        wish = Wish(node, tenant, hostname, by, reason, size.cols, size.rows, shell, user, record, record_input)
        facts = await self._store.write(lambda tx: service.request(tx, wish, self.bounds, self._new_id))
        self._adopt(facts)
        for held in self._held.get(node, ()):
            held.woken.set()
        return facts

    def session(self, session: str) -> Session:
        """The facts as they are now. Raises Refused (404)."""
        live = self._live.get(session)
        if live is not None and live.ended is None:
            return live.facts()
        row = self._store.peek(lambda db: service.find(db, session))
        if row is None:
            raise Refused("unknown_session", "no such shell session", status=404)
        return row if live is None or row.ended else live.facts()

    async def sessions(
        self,
        *,
        tenant: str | None = None,
        node: str | None = None,
        states: tuple[str, ...] = (),
        limit: int = 1000,
    ) -> Sequence[Session]:
        """Newest first."""
        rows = await self._store.read(
            lambda db: service.sessions(db, tenant=tenant, node=node, states=states, limit=limit)
        )
        return [self._live[row.id].facts() if row.id in self._live and not row.ended else row for row in rows]

    async def kill(self, session: str, by: str, reason: EndReason = EndReason.KILLED) -> None:
        """End it now; returns when that is on disk. One that has ended stays as it is. Raises Refused (404)."""
        self.session(session)
        live = self._live.get(session)
        if live is None:
            return
        live.end(End(reason, by), trio.current_time())
        await self.wait_written()

    async def ticket(self, session: str, by: str, grant: Grant) -> Ticket:
        """A right to join this session once, soon. Raises Refused (404, 410)."""
        self._require_live(session)
        now = trio.current_time()
        self._tickets = {key: kept for key, kept in self._tickets.items() if kept.expires_at > now}
        if len(self._tickets) >= self.bounds.tickets:
            raise Refused("ticket_quota", f"expected at most {self.bounds.tickets} unused tickets", status=429)
        ticket = self._new_key()
        self._tickets[service.digest(ticket)] = _Granted(session, by, Grant(grant), now + self.bounds.ticket_s)
        return Ticket(ticket, self._clock.now() + self.bounds.ticket_s)

    async def redeem(self, session: str, ticket: str) -> Redeemed:
        """Whom the ticket was given to; it is used up. Raises Refused (403), which is audited."""
        found = self._tickets.pop(service.digest(ticket), None)
        if found is not None and found.session == session and found.expires_at > trio.current_time():
            return Redeemed(found.by, found.grant)
        self._refused["ticket"] += 1
        await self._store.write(lambda tx: service.note(tx, session[:128], None, "operator", "shell.view", "ticket"))
        raise Refused("ticket", "the ticket is wrong, used, expired or another session's", status=403)

    def recording_directory(self, session: str) -> Path:
        """Where this session's recording is, if it has one; the id must be a known one. Raises Refused (404)."""
        return self._directory / self.session(session).id

    async def view(self, session: str, by: str, grant: Grant, link: Link) -> None:
        """Serve one viewer until it leaves. Raises Refused or FrameError when it may not join."""
        live = self._require_live(session)
        with self._connected():
            hello = await self._hello(link)
            if hello is None:
                return
            message = frames.parse(hello, ViewerHello)
            await self._wait_settled(live)
            wire, now = Wire(), trio.current_time()
            viewer = live.attach_viewer(by, Grant(grant), message, now, wire.wake)
            wire.side = viewer
            self._note(live, "view", by, role=live.role_of(viewer), client=message.client)
            try:
                await self._converse(
                    wire,
                    viewer,
                    link,
                    partial(live.next_for_viewer, viewer),
                    partial(self._read_viewer, live, viewer, wire),
                )
            finally:
                on_purpose = viewer.closing is None and link.close_code == CloseCode.NORMAL
                live.viewer_gone(viewer, trio.current_time(), on_purpose=on_purpose)
                left = "ok" if on_purpose else _word(viewer) or "dropped"
                self._note(live, "leave", by, left)

    async def _hello(self, link: Link) -> Frame | None:
        """The first frame, which must be HELLO; None when the other end left. Raises FrameError."""
        with trio.move_on_after(self.bounds.hello_s) as scope:
            frame = await link.receive()
        if scope.cancelled_caught:
            raise FrameError(f"expected HELLO within {self.bounds.hello_s:g} s", CloseCode.TOO_SLOW)
        if frame is not None and frame.type is not FrameType.HELLO:
            raise FrameError(f"expected HELLO first, got {frame.type.name}")
        return frame

    async def _wait_settled(self, live: LiveSession) -> None:
        """After a restart only the agent knows how much input it got, so viewers wait for it."""
        if live.is_restored and live.ended is None:
            settled = trio.Event()
            live.call_when_settled(settled.set)
            await settled.wait()

    # agents

    def has_work(self, node: str) -> bool:
        return self._store.peek(lambda db: service.has_work(db, node))

    async def poll(
        self,
        node: str,
        tenant: str,
        wait_gone: Callable[[], Awaitable[None]],
        *,
        certificate_name: str | None = None,
    ) -> list[tuple[str, str]]:
        """Sessions for this node, each with its secret, once; waits for one, for a while."""
        if not self.has_work(node) and not await self._hold(node, wait_gone):
            return []
        if not self.has_work(node):
            return []
        offers = await self._store.write(
            lambda tx: service.offer(tx, node, tenant, certificate_name, self.bounds.join_s, self._new_key)
        )
        for offer in offers:
            live = self._live.get(offer.session.id)
            if live is not None and live.ended is None:
                live.update(offer.session)
                live.offer(trio.current_time())
        return [(offer.session.id, offer.secret) for offer in offers]

    async def _hold(self, node: str, wait_gone: Callable[[], Awaitable[None]]) -> bool:
        """Wait for work, the deadline, or the broker's stop; False when the client has left."""
        if self._stopping:
            await trio.lowlevel.checkpoint()
            return True
        gone = False

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal gone
            await wait_gone()
            gone = True
            scope.cancel()

        held, waiting = _HeldPoll(), self._held[node]
        waiting.append(held)
        if len(waiting) > self.bounds.held_polls_per_node:
            waiting[0].woken.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + self.bounds.hold_s
                nursery.start_soon(watch, nursery.cancel_scope)
                await held.woken.wait()
                nursery.cancel_scope.cancel()
        finally:
            waiting.remove(held)
            if not waiting:
                self._held.pop(node, None)
        return not gone

    async def check(self, claim: Claim) -> None:
        """Raise Refused unless this claim would open its door; nothing is used up. A refusal is audited."""
        refused = self._store.peek(lambda db: service.check(db, claim, self._clock.now()))
        if refused is not None:
            await self._store.write(lambda tx: service.refuse(tx, claim, refused))
            await self._punish(claim, refused)
            raise refused

    def claim(self, session: str, token: str, **facts: Any) -> Claim:
        """What a bearer token claims: the secret, or, if it is that, the resume token."""
        is_resume = self._store.peek(lambda db: service.is_resume_token(db, session, token))
        return Claim(session, None if is_resume else token, token if is_resume else None, **facts)

    async def join(self, claim: Claim, link: Link, hello: AgentHello | None) -> None:
        """Serve an agent's connection until it ends; without a HELLO it is a Launcher.

        Raises Refused, which is audited, or FrameError, before it is let in.
        """
        self._check_running()
        protocol = LAUNCHER if hello is None else V1
        resume = self._new_key()
        joined = await self._store.write(lambda tx: service.join(tx, claim, protocol, resume))
        if isinstance(joined, Refused):
            await self._punish(claim, joined)
            raise joined
        live = self._require_live(claim.session)
        live.update(joined)
        await self._begin_recording(live, hello)
        if hello is not None:
            await self._open_journal(live)
        with self._connected():
            wire = Wire()
            agent = live.attach_agent(
                hello or AgentHello(session=live.id), resume, trio.current_time(), wire.wake, is_legacy=hello is None
            )
            wire.side = agent
            try:
                await self._converse(
                    wire,
                    agent,
                    link,
                    partial(live.next_for_agent, agent),
                    partial(self._read_agent, live, agent, wire),
                    sent=partial(live.input_delivered, agent),
                )
            finally:
                live.agent_gone(agent, trio.current_time())

    async def _punish(self, claim: Claim, refused: Refused) -> None:
        """A secret that is used twice was stolen, before or now: its session ends."""
        self._refused[refused.reason] += 1
        live = self._live.get(claim.session)
        if refused.reason == "used_secret" and live is not None:
            live.end(End(EndReason.SECRET_REUSED, "box"), trio.current_time())
            await self.wait_written()

    async def _begin_recording(self, live: LiveSession, hello: AgentHello | None) -> None:
        facts = live.facts()
        if not facts.recording or live.recorder is not None:
            return
        title = frames.clean_title(f"{facts.by}@{facts.hostname}")
        try:
            live.recorder = await self._open_recorder(facts, hello.shell if hello else "/bin/bash", title)
        except (OSError, RecordingFailed) as error:
            log.error("shell %s: no recording: %s", live.id, type(error).__name__)
            if self._rules.strict:
                live.end(End(EndReason.RECORDING_FAILED, "box"), trio.current_time())
                raise Refused("recording_failed", "the session cannot be recorded, so it cannot begin") from None
            live.update(replace(live.facts(), recording=False))

    async def _open_journal(self, live: LiveSession) -> None:
        """So that input goes on exactly after a restart; a Launcher cannot come back from one anyway."""
        if live.journal is None:
            try:
                live.journal = await trio.to_thread.run_sync(InputJournal, self._directory / live.id)
            except OSError as error:
                log.warning("shell %s: no journal: %s", live.id, error.strerror)

    async def _open_recorder(self, facts: Session, shell: str = "", title: str = "") -> Recorder:
        return await trio.to_thread.run_sync(
            partial(
                Recorder.open,
                self._directory / facts.id,
                cols=facts.cols,
                rows=facts.rows,
                now=self._clock.now(),
                shell=shell,
                title=title,
                rules=self._rules,
                keep_input=facts.record_input,
            )
        )

    # one connection

    async def _converse(
        self,
        wire: Wire,
        side: Side,
        link: Link,
        ask: Callable[[float], Frame | float | None],
        read: Callable[[Link], Awaitable[None]],
        sent: Callable[[], None] | None = None,
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, wire, side, link, ask, sent)
            nursery.start_soon(self._read, wire, side, link, read)
            await wire.closed.wait()
            if side.closing is not None:
                await link.aclose(*side.closing)
            nursery.cancel_scope.cancel()

    async def _write(
        self,
        wire: Wire,
        side: Side,
        link: Link,
        ask: Callable[[float], Frame | float | None],
        sent: Callable[[], None] | None,
    ) -> None:
        while True:
            step = ask(trio.current_time())
            if step is None:
                wire.closed.set()
                return
            if isinstance(step, Frame):
                side.sending_since = side.sent_at = trio.current_time()
                try:
                    await link.send(step)
                except GONE:
                    wire.closed.set()
                    return
                side.sending_since = None
                if sent is not None:
                    sent()
            else:
                wire.bell = trio.Event()
                with trio.move_on_after(step):
                    await wire.bell.wait()

    async def _read(self, wire: Wire, side: Side, link: Link, read: Callable[[Link], Awaitable[None]]) -> None:
        try:
            await read(link)
        except FrameError as wrong:
            self._refused["bad_frame"] += 1
            side.close(wrong.code, str(wrong))
        except GONE:
            pass
        wire.closed.set()

    async def _read_agent(self, live: LiveSession, agent: AgentSide, wire: Wire, link: Link) -> None:
        while True:
            while agent.is_legacy and live.is_choked():
                wire.room = trio.Event()
                await wire.room.wait()
            frame = await link.receive()
            if frame is None:
                return
            if frame.type is FrameType.DATA_OUT:
                self._counts["output_bytes"] += len(frame.payload)
            live.agent_frame(agent, frame, trio.current_time())
            await self._notes_room()

    async def _read_viewer(self, live: LiveSession, viewer: ViewerSide, wire: Wire, link: Link) -> None:
        while True:
            while live.must_pause(viewer):
                wire.room = trio.Event()
                await wire.room.wait()
            frame = await link.receive()
            if frame is None:
                return
            if frame.type is FrameType.DATA_IN:
                self._counts["input_bytes"] += len(frame.payload)
            live.viewer_frame(viewer, frame, trio.current_time())
            await self._notes_room()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1
            if not self._connections:
                self._disconnected.set()

    def _check_running(self) -> None:
        if self._stopping:
            raise Refused("stopping", "the box is stopping", status=503)

    def _require_live(self, session: str) -> LiveSession:
        """Raises Refused (503, 404, 410)."""
        self._check_running()
        live = self._live.get(session)
        if live is not None and live.ended is None:
            return live
        facts = self.session(session)
        raise Refused("ended", f"the session has ended: {facts.end_reason}", status=410)

    # what is written down

    def _note(self, live: LiveSession, action: str, actor: str, result: str = "ok", **facts: Any) -> None:
        """Told by sessions; written soon, in order."""
        if action == "end":
            how, head, size = facts["end"], live.log.head, live.size
            self._notes_add(lambda tx: service.end(tx, live.id, how, head, size.cols, size.rows))
        elif action == "detach":
            self._notes_add(lambda tx: service.detach(tx, live.id, facts["output_bytes"]))
        elif action == "describe":
            self._notes_add(lambda tx: service.describe(tx, live.id, facts["shell"], facts["user"]))
        elif action == "withdraw":
            self._notes_add(lambda tx: service.withdraw(tx, live.id))
        else:
            self._notes_add(
                lambda tx: service.note(tx, live.id, live.tenant, actor, f"shell.{action}", result, **facts)
            )

    def _notes_add(self, write: Callable[[Tx], Any]) -> None:
        self._notes.append(write)
        self._noted.set()

    async def _notes_room(self) -> None:
        while len(self._notes) >= NOTES_WAITING:
            await self._notes_written.wait()

    async def wait_written(self) -> None:
        """Returns when everything noted so far is on disk."""
        while self._notes:
            await self._notes_written.wait()

    async def _write_notes(self) -> None:
        while True:
            if not self._notes:
                self._noted = trio.Event()
                await self._noted.wait()
            await self._write_batch()

    async def _write_batch(self) -> None:
        batch = list(self._notes)

        def write(tx: Tx) -> None:
            for each in batch:
                each(tx)

        try:
            await self._store.write(write)
        except trio.ClosedResourceError:
            raise
        except Exception:
            log.warning("what happened to shell sessions is written one by one", exc_info=True)
            for each in batch:
                await self._write_one(each)
        for _ in batch:
            self._notes.popleft()
        written, self._notes_written = self._notes_written, trio.Event()
        written.set()

    async def _write_one(self, write: Callable[[Tx], Any]) -> None:
        try:
            await self._store.write(write)
        except trio.ClosedResourceError:
            raise
        except Exception:
            log.exception("what happened to a shell session could not be written")

    # time

    async def _tick(self, nursery: trio.Nursery) -> None:
        upkeep_at = trio.current_time() + UPKEEP_S
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            for live in list(self._live.values()):
                try:
                    live.tick(now)
                    if live.is_left():
                        await self.wait_written()
                        self._put_away(live, nursery)
                except Exception:
                    log.exception("shell %s: what was due went wrong", live.id)  # and the other sessions go on
            if now >= upkeep_at:
                upkeep_at = now + UPKEEP_S
                try:
                    await self.prune_recordings()
                except Exception:
                    log.exception("old recordings could not be deleted")

    def _put_away(self, live: LiveSession, nursery: trio.Nursery) -> None:
        """Nobody is connected to it any more."""
        del self._live[live.id]
        self._counts["dropped_input_bytes"] += live.dropped_input_bytes
        self._counts["skipped_bytes"] += live.skipped_bytes
        was_recorded = live.recorder is not None
        live.dispose()
        if was_recorded:
            nursery.start_soon(self._measure_recording, live.id)  # a long one takes seconds, and others are due

    async def _measure_recording(self, session: str) -> None:
        directory = self._directory / session
        try:
            size_bytes = await trio.to_thread.run_sync(recording.size_bytes, directory)
            sha256 = await trio.to_thread.run_sync(recording.digest, directory, abandon_on_cancel=True)
        except OSError as error:
            log.warning("shell %s: the recording cannot be read: %s", session, error.strerror)
            size_bytes, sha256 = 0, ""
        await self._write_one(lambda tx: service.keep_recording(tx, session, size_bytes, sha256))

    async def prune_recordings(self) -> None:
        """Delete what retention no longer keeps; also called every minute."""
        rows = await self._store.read(service.recordings)
        kept = [recording.Kept(*row) for row in rows]
        gone = recording.to_delete(
            kept,
            self._clock.now(),
            max_age_s=self.bounds.recordings_age_s,
            max_total_bytes=self.bounds.recordings_bytes,
        )
        for session in gone:
            await trio.to_thread.run_sync(recording.delete, self._directory / session)
            await self._store.write(partial(_forget_recording, session))

    # start and stop

    def _adopt(self, facts: Session) -> LiveSession:
        live = LiveSession(facts, self.bounds, trio.current_time(), self._clock.now(), self._note)
        self._live[facts.id] = live
        return live

    async def load(self) -> None:
        """Take over the sessions of an earlier process: agents and viewers may come back to them."""
        rows = await self._store.read(
            lambda db: service.sessions(db, states=tuple(each for each in State if each is not State.ENDED))
        )
        now = trio.current_time()
        for facts in rows:
            live = self._adopt(facts)
            if facts.state is State.OFFERED:
                live.offer(now)
            elif facts.state is not State.REQUESTED:
                await self._restore(live, facts)
        for session in await self._store.read(service.unfinished):
            await self._measure_recording(session)

    async def _restore(self, live: LiveSession, facts: Session) -> None:
        now = trio.current_time()
        if facts.recording:
            try:
                live.recorder = await self._open_recorder(facts)
            except (OSError, RecordingFailed):
                log.exception("shell %s: the recording cannot go on", live.id)
                live.update(replace(facts, recording=False))
        await self._open_journal(live)
        if facts.protocol == LAUNCHER:
            live.end(End(EndReason.BOX_STOPPED, "box"), now)
        elif live.recorder is not None:
            live.restore(now, head=live.recorder.head)
        else:
            live.restore(now, head=facts.output_bytes if facts.state is State.DETACHED else None)

    async def stop(self) -> None:
        """Say goodbye to everybody within ``close_s``. Sessions of ``shell.v1`` are kept for the next start."""
        self._stopping = True
        now = trio.current_time()
        for waiting in self._held.values():
            for held in waiting:
                held.woken.set()
        for live in self._live.values():
            if live.agent is not None and live.agent.is_legacy:
                live.end(End(EndReason.BOX_STOPPED, "box"), now)
            else:
                live.say_goodbye()
        with trio.move_on_after(self.bounds.close_s):
            while self._connections:
                self._disconnected = trio.Event()
                await self._disconnected.wait()
        for live in self._live.values():
            if live.state in (State.OPEN, State.DETACHED):
                self._notes_add(partial(_detach, live.id, live.log.head))
            live.dispose()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_notes)
            nursery.start_soon(self._tick, nursery)
            task_status.started()

    async def flush(self) -> None:
        """Write down what is left; after `run` was cancelled."""
        while self._notes:
            await self._write_batch()

    def statistics(self) -> BrokerStatistics:
        live = list(self._live.values())
        states = Counter(str(each.state) for each in live)
        return BrokerStatistics(
            sessions=dict(states),
            viewers=sum(len(each.viewers) for each in live),
            held_polls=sum(map(len, self._held.values())),
            output_bytes=self._counts["output_bytes"],
            input_bytes=self._counts["input_bytes"],
            dropped_input_bytes=self._counts["dropped_input_bytes"] + sum(each.dropped_input_bytes for each in live),
            skipped_bytes=self._counts["skipped_bytes"] + sum(each.skipped_bytes for each in live),
            refused=dict(self._refused),
        )


def _word(side: Side) -> str:
    """Why we closed it; empty when we did not."""
    return "" if side.closing is None else side.closing[0].name.lower()


def _detach(session: str, output_bytes: int, tx: Tx) -> None:
    service.detach(tx, session, output_bytes)


def _forget_recording(session: str, tx: Tx) -> None:
    service.keep_recording(tx, session, None, None)
    count_dropped(tx, "recordings", 1)


@asynccontextmanager
async def open_broker(
    store: Store,
    directory: Path,
    clock: Clock,
    bounds: ShellBounds | None = None,
    *,
    new_id: Callable[[], str],
    new_key: Callable[[], str] = new_secret,
    rules: RecordingRules | None = None,
) -> AsyncIterator[Broker]:
    """A broker that works inside the block, with the sessions of the one before; recordings are under ``directory``.

    At the end of the block connections are closed within ``close_s``; the listeners must still be running then.
    """
    broker = Broker(
        store,
        directory,
        clock,
        bounds or ShellBounds(),
        new_id=new_id,
        new_key=new_key,
        rules=rules or RecordingRules(),
    )
    await broker.load()
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        try:
            yield broker
        finally:
            with trio.CancelScope(shield=True):
                await broker.stop()
                nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await broker.flush()
