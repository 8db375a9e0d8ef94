"""The runner: owns 0..n instances, keeps each alive by itself, adds and removes them while the others run.

Zero instances is a running agent. Stopping is in parallel, once, and reaches an instance that is still launching.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from osqbox.agent.instances import history as histories
from osqbox.agent.instances.history import History
from osqbox.agent.instances.instance import (
    Instance,
    ProcessInstance,
    QueryFailed,
    Rows,
    Unhealthy,
    described,
    sweep,
)
from osqbox.agent.instances.options import MAX_INSTANCES, Files, InstanceSpec, RunnerOptions, run_id
from osqbox.agent.instances.state import Happening, Phase, Status, after, status_of
from osqbox.agent.instances.transport import HttpClient
from osqbox.agent.wire import client_context
from osqbox.clock import Clock, SystemClock
from osqbox.errors import AddressInUse, BadSetup, BadUsage

if TYPE_CHECKING:
    import ssl

    from osqbox.agent.instances.task import Machine

OnEvent = Callable[[str, str, dict[str, Any]], None]
"""Hears of everything: the instance's name, what happened, and facts about it."""

DEFAULT_INSTANCE = "default"
"""The one a query means that names none (Launcher's only one)."""


@dataclass(slots=True)
class _Seat:
    """An instance over all its runs."""

    spec: InstanceSpec
    phase: Phase = Phase.LAUNCHING
    instance: Instance | None = None
    restarts: int = 0
    last_error: str = ""
    stopping: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)

    def move(self, happening: Happening) -> None:
        self.phase = after(self.phase, happening)


class Runner:
    """Made by `open_runner`."""

    def __init__(
        self,
        options: RunnerOptions,
        nursery: trio.Nursery,
        sockets: Path,
        *,
        clock: Clock,
        machine: Machine | None,
        on_event: OnEvent,
    ) -> None:
        self.options = options
        self.history = _read_history(options.root)
        self._nursery = nursery
        self._sockets = sockets
        self._clock = clock
        self._machine = machine
        self._on_event = on_event
        self._seats: dict[str, _Seat] = {}
        self._stopping = False
        self._tls = self._context()
        self._shared = HttpClient(options.tls_hostname, self._tls) if options.shared_client else None

    def _context(self) -> ssl.SSLContext:
        return client_context(self.options.server_certs, self.options.client_cert, self.options.client_key)

    # -- instances -----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._seats)

    def add(self, spec: InstanceSpec) -> None:
        """Begin to run an instance; the others do not notice. Raises BadUsage when it is there already."""
        if self._stopping:
            raise BadUsage("the agent is stopping")
        if spec.name in self._seats:
            raise BadUsage(f"instance {spec.name} runs already", hint="osqbox agent status")
        if len(self._seats) >= MAX_INSTANCES:
            raise BadUsage(f"expected at most {MAX_INSTANCES} instances", hint="osqbox agent remove-instance NAME")
        seat = self._seats[spec.name] = _Seat(spec)
        self._tell(spec.name, "added")
        self._nursery.start_soon(self._work, seat)

    async def remove(self, name: str) -> None:
        """Stop an instance; its database, node key and unsent logs stay for when it is added again.

        Returns when all of it is gone. Raises BadUsage when there is none.
        """
        seat = self._seat(name)
        self._stop(seat)
        await seat.done.wait()

    async def restart(self, name: str, reason: str = "restarted") -> None:
        """End an instance's run; the next begins at once."""
        instance = self._seat(name).instance
        if instance is not None:
            instance.stop(reason)

    async def shutdown(self) -> None:
        """Stop all instances, in parallel, also those still launching. Calling it again waits for the same end."""
        self._stopping = True
        seats = list(self._seats.values())
        for seat in seats:
            self._stop(seat)
        for seat in seats:
            await seat.done.wait()

    def _seat(self, name: str) -> _Seat:
        if name not in self._seats:
            there = ", ".join(self._seats) or "none"
            raise BadUsage(f"expected the name of an instance ({there}), got {name!r}", hint="osqbox agent status")
        return self._seats[name]

    def _stop(self, seat: _Seat) -> None:
        seat.move(Happening.STOP)
        seat.stopping.set()
        if seat.instance is not None:
            seat.instance.stop()

    async def _work(self, seat: _Seat) -> None:
        """Run one instance for as long as it is wanted: run after run."""
        try:
            # Whoever cancels the agent gets an orderly `shutdown`, which is what ends this.
            with trio.CancelScope(shield=True):
                while not seat.stopping.is_set():
                    await self._run_once(seat)
                    if seat.phase is Phase.PAUSING:
                        await self._pause(seat)
                    seat.restarts += not seat.stopping.is_set()
        finally:
            seat.phase, seat.instance = Phase.STOPPED, None
            del self._seats[seat.spec.name]
            self._tell(seat.spec.name, "removed")
            seat.done.set()

    async def _pause(self, seat: _Seat) -> None:
        with trio.move_on_after(self.options.timing.launch_retry_s):
            await seat.stopping.wait()
        if seat.phase is Phase.PAUSING:
            seat.move(Happening.RETRY)

    async def _run_once(self, seat: _Seat) -> None:
        name = seat.spec.name

        def connected() -> None:
            seat.move(Happening.CONNECT)
            self._tell(name, "connected", **instance.facts())

        number = run_id(self._clock.now(), secrets.randbits(80))
        self._tell(name, "launched", run_id=number)
        try:
            # In its seat before it is launched, so that a stop reaches it at any time.
            instance = seat.instance = self._make(seat.spec, number)
            reason = await instance.run(connected)
        except Exception as error:  # noqa: BLE001 - one instance's trouble is never another's
            reason = described(error)
        seat.last_error = reason
        seat.move(Happening.END)
        self._tell(name, "ended", run_id=number, reason=reason)

    def _make(self, spec: InstanceSpec, number: str) -> Instance:
        files = Files.of(self.options.root, self._sockets, spec.name, number)
        on_event = partial(self._on_event, spec.name)
        if self.options.in_process:
            from osqbox.agent.instances.task import TaskInstance, this_machine

            return TaskInstance(
                spec=spec, options=self.options, files=files, run_id=number,
                history=self.history, clock=self._clock, on_event=on_event,
                tls=self._tls if self._shared else self._context(),
                machine=self._machine or this_machine(self._clock),
            )  # fmt: skip
        return ProcessInstance(
            spec=spec, options=self.options, files=files, run_id=number,
            history=self.history, clock=self._clock, on_event=on_event,
            client=self._shared or HttpClient(self.options.tls_hostname, self._context()),
        )  # fmt: skip

    def _tell(self, name: str, kind: str, **facts: Any) -> None:
        if kind in ("launched", "connected", "ended"):
            _write_history(self.options.root, self.history)
        self._on_event(name, kind, facts)

    # -- asking --------------------------------------------------------------------------------------------------

    async def query(self, sql: str, *, instance: str | None = None) -> Rows:
        """Rows of one instance; without a name of ``default``, or of the only one there is.

        Raises BadUsage when that is none, QueryFailed with SQLite's message.
        """
        name = instance or (DEFAULT_INSTANCE if DEFAULT_INSTANCE in self._seats else None)
        if name is None and len(self._seats) == 1:
            name = next(iter(self._seats))
        if name is None:
            there = ", ".join(self._seats) or "none runs"
            raise BadUsage(f"expected the instance to ask ({there})", hint="osqbox agent query SQL --instance NAME")
        running = self._seat(name).instance
        if running is None:
            raise QueryFailed(f"instance {name} is between two runs", hint="osqbox agent status")
        return await running.query(sql)

    async def status(self) -> dict[str, Any]:
        """Every instance with a health check made now, and the history."""
        seats = list(self._seats.values())
        problems: dict[str, str] = {}

        async def check(seat: _Seat) -> None:
            problems[seat.spec.name] = await _problem(seat)

        async with trio.open_nursery() as nursery:
            for seat in seats:
                nursery.start_soon(check, seat)
        return {
            "pid": os.getpid(),
            "root": str(self.options.root),
            "server": f"https://{self.options.tls_hostname}",
            "shared_client": self.options.shared_client,
            "instances": [_described(seat, problems[seat.spec.name]) for seat in seats],
            "history": self.history.rows(),
        }


async def _problem(seat: _Seat) -> str:
    if seat.phase is not Phase.CONNECTED or seat.instance is None:
        return f"{seat.phase}: {seat.last_error}" if seat.last_error else str(seat.phase)
    try:
        await seat.instance.check()
    except Unhealthy as error:
        return str(error)
    return ""


def _described(seat: _Seat, problem: str) -> dict[str, Any]:
    instance = seat.instance
    status = Status.NOT_STARTED if instance is None else status_of(seat.phase, healthy=not problem)
    return {
        "name": seat.spec.name,
        "status": str(status),
        "problem": problem or None,
        "phase": str(seat.phase),
        "restarts": seat.restarts,
        "last_error": seat.last_error or None,
        **(instance.facts() if instance is not None else {}),
    }


# -- what is on disk ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_runner(
    options: RunnerOptions,
    *,
    clock: Clock | None = None,
    machine: Machine | None = None,
    on_event: OnEvent | None = None,
) -> AsyncIterator[Runner]:
    """A runner without instances; at the end all are stopped.

    ``machine`` is the host that in-process instances answer for instead of this one.

    Raises AddressInUse when another agent runs on the same root, BadSetup for a root or certificates that cannot be
    used.
    """
    if not options.program:
        import sys

        options = replace(options, program=(sys.executable, "-m", "osqbox", "osqueryd"))
    with _locked(options.root), _socket_folder(options.root) as sockets:
        sweep(options.root)
        async with trio.open_nursery() as nursery:
            runner = Runner(
                options, nursery, sockets,
                clock=clock or SystemClock(), machine=machine, on_event=on_event or (lambda *_: None),
            )  # fmt: skip
            try:
                yield runner
            finally:
                with trio.CancelScope(shield=True):
                    await runner.shutdown()
                nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """The root, private and this runner's alone."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.fdopen(os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except OSError as error:
        raise BadSetup(f"cannot use {root}: {error.strerror}", hint="osqbox agent --root DIR") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AddressInUse(f"an agent already runs on {root}", hint=f"osqbox agent status --root {root}") from None
        yield


@contextlib.contextmanager
def _socket_folder(root: Path) -> Iterator[Path]:
    """The root itself, or a short directory for as long as needed when the paths of its sockets would be too long."""
    if Files.of(root, root, "x", "0" * 26).fits():
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="osqbox-") as folder:
        yield Path(folder)


def _history_file(root: Path) -> Path:
    return root / "history.json"


def _read_history(root: Path) -> History:
    try:
        return histories.load(_history_file(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return History()


def _write_history(root: Path, history: History) -> None:
    from osqbox.running import write_private

    write_private(_history_file(root), histories.dump(history))
