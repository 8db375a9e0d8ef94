"""An agent's remote shells: ask for sessions, over the wire of its other requests, and give each a task."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from osqbox.agent import messages
from osqbox.agent.client import Core, Sleep, Thread
from osqbox.agent.messages import Reply
from osqbox.agent.shell.offers import SHELLS_PATH, Offer, read_offers
from osqbox.agent.shell.script import Script, read_script
from osqbox.agent.shell.terminal import ShellRefused, Terminal
from osqbox.errors import BadSetup
from osqbox.shell_frames import Size

if TYPE_CHECKING:
    from osqbox.agent.shell.socket import Dialer

Mode = Literal["v1", "launcher-2018"]
INTERVAL_S = 5.0
"""Between two questions, where the server does not hold them."""
INTERVAL_2018_S = 60.0
LONGEST_PAUSE_S = 60.0
HELD_S = 1.0
"""An answer that took so long was held: ask again at once."""
MAX_SESSIONS = 16
MAX_TASKS_2018 = 64

OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """What remote shells an agent gives. By default scripted ones, which run nothing."""

    mode: Mode = "v1"
    real: bool = False
    """Whether sessions run a program of this machine."""
    shell: str | None = None
    """Its path; a broker may then ask for no other. None: bash or sh, or what the broker asks for."""
    user: str | None = None
    """Whom it runs as; likewise. None: the agent's own user, or whom the broker asks for."""
    script: Script = field(default_factory=Script)
    idle_s: float | None = None
    max_s: float | None = None
    interval_s: float | None = None
    """Between two questions; None is 5 s, 60 s as the Launcher of 2018."""
    max_sessions: int = MAX_SESSIONS


def load_script(file: Path) -> Script:
    """Raises BadSetup."""
    try:
        return read_script(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"cannot read the shell's script {file}: {error}") from error


class Poller:
    """Asks for sessions as a thread of the agent's core, so that enrollment and node key are shared with the others."""

    def __init__(self, core: Core, interval_s: float, start: Callable[[Offer], bool]) -> None:
        self._core = core
        self._interval_s = interval_s
        self._start = start
        self._failures = 0
        self._said = ""

    def run(self) -> Thread[None]:
        was_invalid = False
        while True:
            began = self._core.now
            reply = yield from self._core.ask("shells", SHELLS_PATH, messages.node_body)
            if reply.node_invalid and not was_invalid:
                was_invalid = True
                continue  # the key is dropped: the next call enrolls first
            was_invalid = reply.node_invalid
            # A success may carry an empty ``error``, which is a failure in osqueryd's own API.
            if reply.ok or (reply.members.get("error") == "" and not reply.node_invalid):
                self._failures, self._said = 0, ""
                started = [self._start(offer) for offer in read_offers(reply.members)]
                if not any(started) and self._core.now - began < HELD_S:
                    yield Sleep(self._interval_s)
            else:
                yield Sleep(self._failed(reply))

    def _failed(self, reply: Reply) -> float:
        """How long to wait. Said once: a server without shells refuses for ever."""
        if reply.message != self._said:
            self._said = reply.message
            self._core.events.append(("shells_refused", {"reason": reply.message}))
        self._failures += 1
        return min(LONGEST_PAUSE_S, self._interval_s * float(2 ** min(self._failures - 1, 10)))


class Sessions:
    """The sessions of one agent, each in a task of its own; an agent's trouble in one is not the others'."""

    def __init__(
        self,
        options: ControlOptions,
        dialer: Dialer,
        on_event: OnEvent,
        *,
        hostname: str,
        node_key: Callable[[], str] = str,
    ) -> None:
        self._options = options
        self._hostname = hostname
        self._node_key = node_key
        self._dialer = dialer
        self._on_event = on_event
        self._running: set[str] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then every shell is gone."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def within(self, nursery: trio.Nursery) -> Sessions:
        """Instead of `run`: in a nursery that somebody else keeps."""
        self._nursery = nursery
        return self

    def start(self, offer: Offer) -> bool:
        """Whether it is a new session."""
        assert self._nursery is not None
        if offer.session in self._running:
            return False
        if len(self._running) >= self._options.max_sessions:
            reason = f"{len(self._running)} sessions are open, which is the most"
            self._on_event("shell_ended", {"session": offer.session, "reason": reason})
            return False
        self._running.add(offer.session)
        self._nursery.start_soon(self._run_one, offer)
        return True

    def start_2018(self, offer: Offer) -> None:
        """A session listed twice is opened twice; shells that lost their broker run on, and count."""
        assert self._nursery is not None
        if len(self._nursery.child_tasks) >= MAX_TASKS_2018:
            self._on_event("shell_ended", {"session": offer.session, "reason": "too many are open"})
            return
        self._nursery.start_soon(self._run_2018, offer, self._nursery)

    async def _run_one(self, offer: Offer) -> None:
        from osqbox.agent.shell.session import Limits, Session

        options, reason = self._options, "agent_stopped"
        session = Session(
            offer,
            self._dialer,
            self._open_terminal,
            hostname=self._hostname,
            node_key=self._node_key,
            limits=Limits(options.idle_s, options.max_s),
            on_event=self._on_event,
        )
        try:
            reason = await session.run()
        except Exception as error:  # noqa: BLE001 - one session's trouble
            reason = f"failed: {error!r}"
        finally:
            self._running.discard(offer.session)
            self._on_event("shell_ended", {"session": offer.session, "reason": reason})

    async def _run_2018(self, offer: Offer, nursery: trio.Nursery) -> None:
        from osqbox.agent.shell.legacy import run_2018

        reason = "agent_stopped"
        try:
            reason = await run_2018(
                offer, self._dialer, self._open_2018, nursery, hostname=self._hostname, on_event=self._on_event
            )
        except Exception as error:  # noqa: BLE001 - one session's trouble
            reason = f"failed: {error!r}"
        finally:
            self._on_event("shell_ended", {"session": offer.session, "reason": reason})

    async def _open_terminal(self, shell: str | None, user: str | None, size: Size) -> Terminal:
        """Raises ShellRefused."""
        options = self._options
        if not options.real:
            return self._scripted(size)
        from osqbox.agent.shell.program import find_program
        from osqbox.agent.shell.pty import open_pty

        shell, user = _only("shell", options.shell, shell), _only("user", options.user, user)
        return await open_pty(find_program(shell, user), size)

    async def _open_2018(self, size: Size) -> Terminal:
        """``/bin/bash --login`` in the agent's own environment and directory. Raises ShellRefused."""
        if not self._options.real:
            return self._scripted(size)
        from osqbox.agent.shell.program import find_program
        from osqbox.agent.shell.pty import open_pty

        found = find_program(self._options.shell, self._options.user)
        if not found.changes_user:
            found = replace(found, environment=dict(os.environ), directory=str(Path.cwd()))
        return await open_pty(found, size, job_control=False)

    def _scripted(self, size: Size) -> Terminal:
        from osqbox.agent.shell.scripted import ScriptedShell

        return ScriptedShell(self._options.script, self._hostname, size)


def _only(what: str, ours: str | None, wanted: str | None) -> str | None:
    if ours and wanted and ours != wanted:
        raise ShellRefused(f"this agent gives shells with {what} {ours} only, got {wanted[:200]!r}")
    return ours or wanted


async def run_control(
    options: ControlOptions,
    core: Core,
    dialer: Dialer,
    drive: Callable[[Callable[[], Thread[None]]], Any],
    on_event: OnEvent,
) -> None:
    """Everything ``--control`` switches on for one agent, until cancelled. ``drive`` runs a thread of the core."""
    sessions = Sessions(options, dialer, on_event, hostname=core.identity.hostname, node_key=lambda: core.node_key)
    async with trio.open_nursery() as nursery:
        await nursery.start(sessions.run)
        if options.mode == "v1":
            await drive(Poller(core, options.interval_s or INTERVAL_S, sessions.start).run)
        else:
            from osqbox.agent.shell.legacy import poll_2018

            await poll_2018(core, dialer, options.interval_s or INTERVAL_2018_S, sessions.start_2018)


__all__ = ["ControlOptions", "Sessions", "load_script", "run_control"]
