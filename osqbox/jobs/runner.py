"""Runs jobs, stops them, tells of them and lets any number follow their output: the one API everything else uses.

    run ─▶ row (pending) ─▶ zygote forks a keeper ─▶ keeper forks the job ─▶ row (running) ─▶ answer
                                 │ socket: states, "grew"
    followers ◀── pread of the log's files, woken by "grew"

What must outlive the box is with the keeper and in files; what is here can be made again from rows and sockets.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from osqbox.clock import Clock
from osqbox.store import Store, Tx

from . import access, links, protocol, service, users
from .access import OwnerKey, Unix
from .errors import Code, JobError, exhausted, invalid, not_found
from .following import Following
from .keeper.capabilities import capabilities
from .keeper.wire import MAX_INPUT_BYTES
from .keepers import CLEAN_ENV, Link, Zygote, open_directory
from .live import Live, closing
from .messages import (
    Caller,
    JobBounds,
    JobSpec,
    JobStatistics,
    OutputEvent,
    OutputMode,
    OutputRequest,
    Page,
    Reason,
    State,
    Status,
)
from .service import Record
from .upkeep import Upkeep
from .users import User

log = logging.getLogger(__name__)

STARTING = 32
"""Jobs being started at once; the others wait their turn."""
SHUTDOWN_GRACE_S = 2.0
SHUTDOWN_S = 15.0
LOOKING_S = 60.0
LOOKERS = 10_000
"""Pairs of a reader and somebody else's job that are remembered so long."""
REFUSALS_PER_S = 10
"""In the audit; more are counted only."""


def new_id() -> str:
    """Unguessable: the last resort for finding a job's processes is its id in their environment."""
    return protocol.new_id(secrets.token_bytes(16))


class JobRunner:
    """Made by `open_runner`. Every call names its caller, and refuses with JobError."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        clock: Clock,
        bounds: JobBounds,
        unix: Unix,
        new_id: Callable[[], str],
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._bounds = bounds
        self._unix = unix
        self._own_user = users.own_user()
        self._new_id = new_id
        self._nursery = nursery
        self._zygote = Zygote()
        self._starting = trio.CapacityLimiter(STARTING)
        self._live: dict[str, Live] = {}
        self._held: Counter[OwnerKey] = Counter()
        """Running jobs of each owner, those on the way in included."""
        self._keys: dict[tuple[str, str, str], trio.Lock] = {}
        """Idempotency keys of requests under way."""
        self._following = Following(directory, bounds)
        self._upkeep = Upkeep(store, directory, clock, bounds, self._own_user)
        self._is_closing = False
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._capabilities: dict[str, object] = {}
        self._audited: tuple[int, int] = (0, 0)
        """The second of the latest refusals in the audit, and how many they are."""
        self._looked: dict[tuple[str, str, str], float] = {}
        """Who has begun to read whose output when; the oldest first."""

    # starting

    async def run(self, spec: JobSpec, caller: Caller) -> Status:
        """Start a job; returns when it runs.

        A job that could not be started keeps its row: its id is the ``job_id`` of the JobError. A caller that gives
        up does not stop the job; with an idempotency key the same request finds it again.
        """
        with self._counting_refusals():
            await self._allow(caller, "run")
            spec = protocol.check_spec(spec, self._bounds.output_bytes)
            user = await self._user(caller, spec)
            async with self._one_at_a_time(spec, caller):
                record, live = await self._begin(spec, caller, user)
            if live is not None:
                await live.wait_until(lambda: live.record.status.state is not State.PENDING)
                record = live.record
            if record.status.state is State.FAILED_TO_START:
                raise protocol.start_failure(record.status, record.failure)
        return record.status

    async def _begin(self, spec: JobSpec, caller: Caller, user: User) -> tuple[Record, Live | None]:
        """The row, and a task that tends the job from here on; for a repeated request what it made before."""
        self._check_open()
        before = self._store.peek(lambda db: service.repeated(db, spec, caller))
        if before is not None:
            return before, self._live.get(before.status.id)
        key, job_id = (caller.owner, caller.authority), self._new_id()
        self._take_slot(key, Live.size_of(spec.args))
        with trio.CancelScope(shield=True):  # a row without a task would stay pending for ever
            try:
                record, is_new = await self._store.write(lambda tx: service.create(tx, job_id, spec, caller, user.name))
            except (sqlite3.Error, trio.ClosedResourceError) as error:
                self._free_slot(key)
                raise _not_written(error) from error
            except BaseException:
                self._free_slot(key)
                raise
        if not is_new:
            self._free_slot(key)
            return record, self._live.get(record.status.id)
        self._counts["started"] += 1
        return record, self._tend(record, lambda live: self._start(live, spec, user))

    @asynccontextmanager
    async def _one_at_a_time(self, spec: JobSpec, caller: Caller) -> AsyncIterator[None]:
        """Requests with the same idempotency key: the second finds the job of the first, and that it is tended."""
        if spec.idempotency_key is None:
            yield
            return
        name = (caller.owner, caller.authority, spec.idempotency_key)
        lock = self._keys.setdefault(name, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._keys.pop(name, None)

    def _take_slot(self, key: OwnerKey, args_bytes: int) -> None:
        """Raises RESOURCE_EXHAUSTED."""
        bounds = self._bounds
        if self._held.total() >= bounds.running:
            raise exhausted("TOO_MANY_JOBS", f"{bounds.running} jobs run here already, which is the limit")
        if self._held[key] >= bounds.running_per_owner:
            raise exhausted("TOO_MANY_JOBS", f"you run {bounds.running_per_owner} jobs already, which is the limit")
        if args_bytes + sum(live.args_bytes for live in self._live.values()) > bounds.args_bytes:
            raise exhausted("TOO_MANY_ARGUMENTS", "running jobs have too many bytes of arguments together")
        if self._log_bytes() >= bounds.disk_bytes:
            raise exhausted("DISK_QUOTA", f"the logs of jobs fill their {bounds.disk_bytes} bytes; delete some jobs")
        disk = os.statvfs(self._directory)
        if disk.f_bavail * disk.f_frsize < bounds.free_bytes:
            raise exhausted("DISK_FULL", f"the disk of the logs has less than {bounds.free_bytes} bytes left")
        self._held[key] += 1

    def _check_open(self) -> None:
        if self._is_closing:
            raise closing()

    def _free_slot(self, key: OwnerKey) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]

    def _log_bytes(self) -> int:
        return self._upkeep.kept_bytes + sum(live.log_bytes for live in self._live.values())

    async def _user(self, caller: Caller, spec: JobSpec) -> User:
        name = access.user_for(caller, spec.run_as, self._unix)
        if name == self._own_user.name:
            return self._own_user
        return await trio.to_thread.run_sync(users.lookup, name)

    def _tend(self, record: Record, begin: Callable[[Live], Awaitable[Link | None]]) -> Live:
        live = Live(record, self._directory / record.status.id, self._store, self._clock)
        self._live[live.id] = live
        self._nursery.start_soon(self._tend_to_the_end, live, partial(begin, live), name=f"job {live.id}")
        return live

    async def _tend_to_the_end(self, live: Live, begin: Callable[[], Awaitable[Link | None]]) -> None:
        try:
            await live.tend(begin)
        except Exception:
            log.exception("job %s: no longer followed by the box; the next one attaches again", live.id)
        finally:
            live.abandon()
            self._free_slot(live.record.owner_key)
            del self._live[live.id]
        if live.is_over:
            try:
                await self._finish(live.record)
            except Exception:
                log.exception("job %s: has ended, but not everything behind it was done", live.id)

    async def _start(self, live: Live, spec: JobSpec, user: User) -> Link | None:
        async with self._starting:
            try:
                live.directory.mkdir(0o700)
                if spec.link_output and user == self._own_user:
                    await self._link(links.link, live.directory, user)
                fd = open_directory(live.directory)
                try:
                    link = await self._zygote.spawn(self._keeper_spec(live.id, spec, user), fd)
                finally:
                    os.close(fd)
            except OSError as error:
                live.fail_start("keeper", error.errno or errno.EAGAIN)
                return None
            try:
                await link.wait_first()
            except trio.Cancelled:
                link.close()
                raise
        return link

    def _keeper_spec(self, job_id: str, spec: JobSpec, user: User) -> dict[str, object]:
        """In the words of `osqbox.jobs.keeper`."""
        home = user.home if Path(user.home).is_dir() else "/"
        env = {**CLEAN_ENV, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
        return {
            "id": job_id,
            "command": os.fsdecode(spec.command),
            "args": [os.fsdecode(argument) for argument in spec.args],
            "env": env | spec.env,
            "cwd": home if spec.cwd is None else os.fsdecode(spec.cwd),
            "user": None if user == self._own_user else {"uid": user.uid, "gid": user.gid, "groups": user.groups},
            "stdin": spec.open_stdin,
            "merged": spec.output_mode is OutputMode.MERGED,
            "timeout_s": spec.timeout_s,
            "stop_grace_s": spec.stop_grace_s,
            "stop_signal": spec.stop_signal,
            "keep_leftovers": spec.keep_leftovers,
            "max_output_bytes": spec.max_output_bytes,
            "reserve_bytes": self._bounds.free_bytes // 2 or None,
            "overflow": spec.overflow.value,
            "limits": {name: getattr(spec.limits, name) for name in spec.limits.__slots__},
            "containment": None,
        }

    async def _finish(self, record: Record) -> None:
        """What remains to be done for a job that has ended."""
        status, directory = record.status, self._directory / record.status.id
        self._counts["ended"] += 1
        self._upkeep.ended(record)
        if status.state is State.FAILED_TO_START:
            await trio.to_thread.run_sync(self._upkeep.remove_files, [record])
        elif record.link_output and status.run_as != self._own_user.name:
            with suppress(JobError):  # somebody has removed the user meanwhile
                user = await trio.to_thread.run_sync(users.lookup, status.run_as)
                await self._link(links.copy, directory, user)

    async def _link(self, make: Callable[[Path, User], None], directory: Path, user: User) -> None:
        try:
            await trio.to_thread.run_sync(make, directory, user)
        except OSError as error:
            log.warning("job %s: its output could not be put into the home of %s: %s", directory.name, user.name, error)

    # telling

    async def status(self, job: str, caller: Caller) -> Status:
        """``job`` is an id, the beginning of one, or the pid of a running job."""
        record, live = await self._find(job, caller, "status")
        return record.status if live is None else live.status

    async def list(
        self,
        caller: Caller,
        *,
        states: Iterable[State] = (),
        owner: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> Page:
        """The newest first; ``before`` is the ``next_page`` of the page before."""
        await self._allow(caller, "list")
        look = partial(service.listing, states=states, owner=owner, labels=labels, limit=limit, before=before)
        self._check_open()
        try:
            records, next_page = await self._store.read(lambda db: look(db, caller))
        except sqlite3.Error as error:
            raise exhausted("NO_RESOURCES", f"the jobs cannot be listed now: {error}") from error
        return Page(tuple(self._now(record) for record in records), next_page)

    def _now(self, record: Record) -> Status:
        live = self._live.get(record.status.id)
        if live is None or live.record.status.state is not record.status.state:
            return record.status
        return replace(live.status, args=record.status.args)

    async def wait(self, job: str, caller: Caller, timeout_s: float | None = None) -> Status:
        """The status once the job has ended, or after ``timeout_s`` seconds as it is then."""
        record, live = await self._find(job, caller, "wait")
        if live is None:
            return record.status
        with trio.move_on_after(float("inf") if timeout_s is None else max(0.0, timeout_s)):
            await live.wait_until(lambda: live.is_over)
        return live.status

    async def _find(self, job: str, caller: Caller, verb: str) -> tuple[Record, Live | None]:
        """Raises NOT_FOUND, INVALID_ARGUMENT, or PERMISSION_DENIED for what is seen and may not be touched."""
        protocol.check_id(job)
        await trio.lowlevel.checkpoint()
        self._check_open()
        live = self._by_pid(int(job), caller) if protocol.is_pid(job) else self._live.get(job)
        record = live.record if live else self._store.peek(lambda db: service.find(db, job, caller))
        with self._counting_refusals():
            try:
                access.admit(caller, verb, record.owner_key, job)
            except JobError as error:
                self._audit_refusal(error, caller, verb, record.status.id)
                raise
        return record, live or self._live.get(record.status.id)

    def _by_pid(self, pid: int, caller: Caller) -> Live:
        """Only while it runs: afterwards the number may be another process's."""
        found = [
            live
            for live in self._live.values()
            if live.record.status.pid == pid and access.sees(caller, live.record.owner_key)
        ]
        if len(found) > 1:
            raise invalid("process_id", f"expected one running job with pid {pid}, got several; use the id")
        if not found:
            raise not_found(str(pid))
        return found[0]

    # changing

    async def stop(
        self,
        job: str,
        caller: Caller,
        *,
        signal: int | None = None,
        grace_s: float | None = None,
        leader_only: bool = False,
        strict: bool = False,
    ) -> tuple[Status, bool]:
        """Ask the whole tree to end, kill it after the grace; returns when that has begun (`wait` tells the end).

        True beside the status: it had ended already, which is refused with ``strict``.
        """
        if signal is not None:
            protocol.check_signal("signal", signal)
        protocol.check_grace(grace_s)
        record, live = await self._find(job, caller, "stop")
        if live is not None:
            words = {"signal": signal, "grace_s": grace_s, "leader_only": leader_only}
            if await self._stop(live, caller, words):
                return live.status, False
            record = live.record
        if strict:
            raise _has_ended(record, "stop")
        return record.status, True

    async def _stop(self, live: Live, caller: Caller, words: Mapping[str, Any]) -> bool:
        """False: the job had ended."""
        is_first = live.record.status.state is not State.STOPPING and State.STOPPING not in live.causes
        if is_first:
            live.causes[State.STOPPING] = caller
        try:
            if not await live.call("stop", by=caller.owner, reason=Reason.STOPPED.value, **words):
                return False
            await live.follows(frozenset((State.STOPPING,)))
        finally:
            if is_first:
                live.causes.pop(State.STOPPING, None)
        if not is_first:
            await self._note(live.record, caller, "job.stop", result="again")
        return True

    async def signal(self, job: str, caller: Caller, number: int) -> Status:
        """Send one signal to the leader; what it does with it is its own affair."""
        protocol.check_signal("signal", number)
        live = await self._running(job, caller, "signal")
        if not await live.call("signal", signal=number):
            raise _has_ended(live.record, "signal")
        await self._note(live.record, caller, "job.signal", signal=number)
        return live.status

    async def suspend(self, job: str, caller: Caller) -> Status:
        """Freeze the whole tree; suspending twice is fine."""
        return await self._switch(job, caller, "suspend", State.SUSPENDED)

    async def resume(self, job: str, caller: Caller) -> Status:
        return await self._switch(job, caller, "resume", State.RUNNING)

    async def _switch(self, job: str, caller: Caller, verb: str, state: State) -> Status:
        live = await self._running(job, caller, verb)
        if live.record.status.state is state:
            return live.status
        live.causes[state] = caller
        try:
            if not await live.call(verb):
                raise _has_ended(live.record, verb)
            await live.follows(frozenset((state, State.STOPPING)))
        finally:
            live.causes.pop(state, None)
        return live.status

    async def send_input(self, job: str, caller: Caller, data: bytes, *, eof: bool = False) -> None:
        """Returns when the job's stdin has taken all of it: as slowly as the job reads."""
        live = await self._running(job, caller, "send_input")
        if not live.record.open_stdin:
            raise JobError(Code.FAILED_PRECONDITION, "send_input: this job was run without an open stdin",
                           reason="STDIN_NOT_OPEN")  # fmt: skip
        if not live.has_input:
            live.has_input = True
            await self._note(live.record, caller, "job.input")
        pieces = [data[start : start + MAX_INPUT_BYTES] for start in range(0, len(data), MAX_INPUT_BYTES)]
        async with live.input:
            for index, piece in enumerate(pieces or [b""] * eof, 1):
                if not await live.send_input(piece, eof=eof and index >= len(pieces)):
                    raise _has_ended(live.record, "send_input")

    async def _running(self, job: str, caller: Caller, verb: str) -> Live:
        record, live = await self._find(job, caller, verb)
        if live is None:
            raise _has_ended(record, verb)
        return live

    async def delete(self, job: str, caller: Caller) -> None:
        """Row and output of a job that has ended."""
        record, live = await self._find(job, caller, "delete")
        if live is not None:
            raise JobError(Code.FAILED_PRECONDITION, "delete: this job has not ended; stop it first",
                           reason="STILL_RUNNING")  # fmt: skip
        await self._write(lambda tx: service.delete(tx, record, caller))
        await self._upkeep.deleted(record)

    # output

    @asynccontextmanager
    async def output(
        self, job: str, caller: Caller, request: OutputRequest | None = None
    ) -> AsyncIterator[AsyncIterator[OutputEvent]]:
        """Chunks from a place on, as they are written; `End` comes last, and only when the job has ended.

        A follower costs no memory but one chunk: a slow one holds up nobody. Raises OUT_OF_RANGE for an offset
        beyond the end of a finished log, DATA_LOSS when its files are damaged.
        """
        request = request or OutputRequest()
        protocol.check_output(request)
        record, live = await self._find(job, caller, "output")
        protocol.check_streams(request, record.output_mode)
        if live is not None:
            await live.wait_until(lambda: live.record.status.state is not State.PENDING)
            record = live.record
        if (caller.owner, caller.authority) != record.owner_key:
            await self._note_looking(record, caller)
        following = self._following.follow(record, live, request, (caller.owner, caller.authority))
        async with AsyncExitStack() as stack:
            with self._counting_refusals():
                events = await stack.enter_async_context(following)
            yield events

    # keeping account

    async def _allow(self, caller: Caller, verb: str) -> None:
        await trio.lowlevel.checkpoint()
        try:
            access.allow(caller, verb)
        except JobError as error:
            self._audit_refusal(error, caller, verb, "")
            raise

    def _audit_refusal(self, error: JobError, caller: Caller, verb: str, subject: str) -> None:
        """Some each second: a caller that is refused all the time must not fill the disk."""
        if error.code is not Code.PERMISSION_DENIED or self._is_closing:
            return
        second, count = int(self._clock.now()), 0
        if self._audited[0] == second:
            count = self._audited[1]
        self._audited = (second, count + 1)
        if count < REFUSALS_PER_S:
            note = partial(
                service.note_refused, caller=caller, action=f"job.{verb}", subject=subject, reason=error.reason
            )
            self._nursery.start_soon(self._write_quietly, note)

    async def _write_quietly(self, work: Callable[[Tx], None]) -> None:
        try:
            await self._store.write(work)
        except (sqlite3.Error, trio.ClosedResourceError):
            log.warning("a refusal could not be written into the audit", exc_info=True)

    async def _note_looking(self, record: Record, caller: Caller) -> None:
        """Somebody else's output is read: one row a minute tells it, however often they ask."""
        name, now = (caller.owner, caller.authority, record.status.id), self._clock.now()
        while self._looked and (next(iter(self._looked.values())) <= now - LOOKING_S or len(self._looked) >= LOOKERS):
            self._looked.pop(next(iter(self._looked)))
        if name not in self._looked:
            await self._note(record, caller, "job.output")
            self._looked[name] = now

    async def _note(self, record: Record, caller: Caller, action: str, result: str = "ok", **facts: object) -> None:
        await self._write(lambda tx: service.note(tx, record, caller, action, result, **facts))

    async def _write(self, work: Callable[[Tx], None]) -> None:
        try:
            await self._store.write(work)
        except (sqlite3.Error, trio.ClosedResourceError) as error:
            raise _not_written(error) from error

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except JobError as error:
            self._refused[error.reason or error.code.name] += 1
            raise

    def statistics(self) -> JobStatistics:
        return JobStatistics(
            running=self._held.total(),
            followers=self._following.count,
            started=self._counts["started"],
            ended=self._counts["ended"],
            refused=dict(self._refused),
            removed=self._upkeep.removed,
            log_bytes=self._log_bytes(),
            capabilities=self._capabilities,
        )

    # from its opening to its close

    async def open(self) -> None:
        """Attach to every job that has not ended, and begin the upkeep."""
        await trio.to_thread.run_sync(partial(self._directory.mkdir, mode=0o700, parents=True, exist_ok=True))
        self._capabilities = await trio.to_thread.run_sync(capabilities)
        for record in await self._store.read(service.unfinished):
            self._held[record.owner_key] += 1
            self._tend(record, Live.attach)
        self._nursery.start_soon(self._upkeep.run)

    async def aclose(self, *, stop_jobs: bool) -> None:
        """Leave the jobs to their keepers, or end them first."""
        self._is_closing = True
        if stop_jobs:
            with trio.move_on_after(SHUTDOWN_S):
                async with trio.open_nursery() as nursery:
                    for live in list(self._live.values()):
                        nursery.start_soon(_shut_down, live)
        for live in list(self._live.values()):
            live.abandon()
        await self._zygote.aclose()


async def _shut_down(live: Live) -> None:
    with suppress(JobError):
        await live.call("stop", grace_s=SHUTDOWN_GRACE_S, by=service.KEEPER, reason=Reason.SHUTDOWN.value)
        await live.wait_until(lambda: live.is_over)


@asynccontextmanager
async def open_runner(
    store: Store,
    directory: Path,
    clock: Clock,
    bounds: JobBounds | None = None,
    *,
    new_id: Callable[[], str] = new_id,
    unix: Unix | None = None,
    stop_jobs: bool = False,
) -> AsyncIterator[JobRunner]:
    """A runner whose jobs have their directories in ``directory``; the store needs `tables.migrations` and audit's.

    Jobs live on after the block and are attached again by the next runner there, unless ``stop_jobs``. ``new_id``
    makes unguessable ids that begin with a letter. ``unix`` says whom jobs may run as (`users.unix_facts`).
    """
    async with trio.open_nursery() as nursery:
        unix = unix or users.unix_facts()
        runner = JobRunner(store, directory, clock, bounds or JobBounds(), unix, new_id, nursery)
        await runner.open()
        try:
            yield runner
        finally:
            with trio.CancelScope(shield=True):
                await runner.aclose(stop_jobs=stop_jobs)
            nursery.cancel_scope.cancel()


def _has_ended(record: Record, verb: str) -> JobError:
    return JobError(
        Code.FAILED_PRECONDITION,
        f"{verb}: this job has ended ({protocol.result_of(record.status)})",
        reason="NOT_RUNNING",
        job_id=record.status.id,
    )


def _not_written(error: Exception) -> JobError:
    if isinstance(error, trio.ClosedResourceError):
        return closing()
    return exhausted("DISK_FULL", f"the job could not be written down: {error}")
