"""A job that has not ended: the line to its keeper, what it tells, and everybody who waits for it."""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from osqbox.clock import Clock
from osqbox.store import Store

from . import protocol, service
from .errors import Code, JobError
from .keepers import KeeperGoneError, Link, RefusedByKeeperError, connect, open_directory
from .messages import ENDED, Caller, State, Status
from .output import Measure, measure, size_on_disk
from .service import Record

log = logging.getLogger(__name__)

SAVE_AGAIN_S = 1.0
SAVE_LATEST_S = 30.0
RECONNECT_S = 0.05
RECONNECTS = 3
ATTACH_AGAIN_S = 1.0
UNBORN_S = 0.25
"""A keeper that was ordered before the box was killed has come to its start by then."""
STATUS_BYTES = 1024 * 1024
FOLLOWS_S = 10.0
"""How long after a keeper's yes the new state may take to come."""

_REFUSALS = {
    "NOT_RUNNING": Code.FAILED_PRECONDITION,
    "STDIN_NOT_OPEN": Code.FAILED_PRECONDITION,
    "STDIN_CLOSED": Code.FAILED_PRECONDITION,
    "INPUT_QUEUE_FULL": Code.RESOURCE_EXHAUSTED,
    "INVALID": Code.INVALID_ARGUMENT,
    "NOT_PERMITTED": Code.FAILED_PRECONDITION,
}


def closing() -> JobError:
    return JobError(Code.UNAVAILABLE, "the job runner is closing; jobs go on, ask again when it is back",
                    reason="CLOSING", retry_after_s=1.0)  # fmt: skip


class Live:
    """`tend` runs it to its end; everything else asks. ``status`` is what is on disk, with counters of this moment."""

    def __init__(self, record: Record, directory: Path, store: Store, clock: Clock) -> None:
        self.record = record
        self.directory = directory
        self.args_bytes = self.size_of(record.status.args)
        self.input = trio.Lock()
        """One writer to the job's stdin at a time."""
        self.has_input = False
        self.causes: dict[State, Caller] = {}
        """Who asked for the state that comes next."""
        self._store = store
        self._clock = clock
        self._told = record
        self._grew: tuple[int, int, int] | None = None
        self._changed = trio.Event()
        self._link: Link | None = None
        self._tries = 0
        """To connect again, since the keeper last said something."""
        self._had_line = False
        self._is_abandoned = False

    @staticmethod
    def size_of(args: Sequence[bytes]) -> int:
        """What the arguments take in memory, for as long as the job runs."""
        return sum(map(len, args))

    @property
    def id(self) -> str:
        return self.record.status.id

    @property
    def is_over(self) -> bool:
        return self.record.status.has_ended

    @property
    def status(self) -> Status:
        if self._grew is None or self.is_over:
            return self.record.status
        output, stdout, stderr = self._grew
        return replace(self.record.status, output_bytes=output, stdout_bytes=stdout, stderr_bytes=stderr)

    @property
    def log_bytes(self) -> int:
        return self._grew[0] if self._grew else self.record.status.output_bytes

    @property
    def changed(self) -> trio.Event:
        """Set when the log has grown or the state has changed; take it, look, then wait for it."""
        return self._changed

    def wake(self) -> None:
        """Whoever waits looks again."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Raises UNAVAILABLE when the runner closes meanwhile."""
        while not is_so():
            self.check_tended()
            await self._changed.wait()

    def abandon(self) -> None:
        """The runner closes; the job goes on without it."""
        self._is_abandoned = True
        self.wake()

    def check_tended(self) -> None:
        if self._is_abandoned and not self.is_over:
            raise closing()

    # being told

    async def tend(self, begin: Callable[[], Awaitable[Link | None]]) -> None:
        """Follow the keeper until the job has ended, and longer than one line to it."""
        try:
            self._link = await begin()
            while self._link is not None:
                await self._listen(self._link)
                if self.is_over:
                    return
                self._link = await self._again()
            await self._bury()
        finally:
            if self._link is not None:
                self._link.close()
            self.wake()

    async def _listen(self, link: Link) -> None:
        self._had_line = True
        while not self.is_over and (messages := await link.receive()):
            self._tries = 0
            for message in messages:
                self._hear(message)
            if self._told is not self.record:
                await self._save()
            self.wake()

    def _hear(self, message: Mapping[str, Any]) -> None:
        try:
            if grew := message.get("grew"):
                self._grew = (int(grew[0]), int(grew[2]), int(grew[3]))
            elif told := message.get("ended") or message.get("status"):
                self._take(told)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            log.warning("job %s: its keeper said what cannot be: %s", self.id, error)

    def _take(self, told: Mapping[str, Any]) -> None:
        status = protocol.from_keeper(self._told.status, told)
        if status.has_ended and status.ended_at is None:
            status = replace(status, ended_at=self._clock.now())
        self._grew = (status.output_bytes, status.stdout_bytes, status.stderr_bytes)
        self._told = replace(
            self._told, status=status, failure=told.get("failure"), cgroups=tuple(told.get("cgroups") or ())
        )

    async def _save(self) -> None:
        """Write what was told, and its cause. The end is written in the end, however long the disk is full."""
        before, after = self.record, self._told
        if after.status.has_ended:
            after = self._told = replace(after, disk_bytes=size_on_disk(self.directory))
        cause = self.causes.pop(State.STOPPING if after.status.has_ended else after.status.state, None)
        pause_s = SAVE_AGAIN_S
        while True:
            try:
                await self._store.write(lambda tx: service.change(tx, before, after, cause))
                break
            except trio.ClosedResourceError:  # the box goes; the next one asks the keeper again
                return
            except Exception:
                log.exception("job %s: its state %s could not be written", self.id, after.status.state)
                if not after.status.has_ended:
                    break
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, SAVE_LATEST_S)
        self.record = after

    # when the line has ended

    async def attach(self) -> Link | None:
        """To the keeper another box has left; None where there is none. Where it cannot be told, again later."""
        while True:
            try:
                return await self._connect()
            except OSError as error:
                log.warning("job %s: its keeper cannot be reached now: %s", self.id, error)
                await trio.sleep(ATTACH_AGAIN_S)

    async def _connect(self) -> Link | None:
        try:
            fd = open_directory(self.directory)
        except FileNotFoundError:
            return None
        try:
            return await connect(fd)
        finally:
            os.close(fd)

    async def _again(self) -> Link | None:
        """The keeper may have dropped this client only; one that always does is as good as gone."""
        self._tries += 1
        if self._tries > RECONNECTS:
            return None
        await trio.sleep(RECONNECT_S)
        return await self.attach()

    async def _bury(self) -> None:
        """No keeper: what it wrote last counts; else its job is lost, and what is left of it is killed."""
        told = await trio.to_thread.run_sync(_read_status, self.directory)
        if told is not None:
            self._hear({"ended": told})
        if not self._told.status.has_ended:
            if self.record.status.state is State.PENDING and told is None and self._had_line:
                self.fail_start("keeper", errno.EAGAIN)
            else:
                await self._lose()
        await self._save()

    async def _lose(self) -> None:
        if self.record.status.state is State.PENDING:  # its keeper may yet come: it finds no directory, or is killed
            await trio.to_thread.run_sync(partial(shutil.rmtree, self.directory, ignore_errors=True))
            await trio.sleep(UNBORN_S)
        found = await self._end_rest()
        lost = service.lost(self._told, self._clock.now())
        if found is not None:
            status = replace(
                lost.status,
                output_bytes=found.output_bytes,
                stdout_bytes=max(found.stdout_bytes, lost.status.stdout_bytes),
                stderr_bytes=max(found.stderr_bytes, lost.status.stderr_bytes),
                output_truncated=found.truncated,
            )
            lost = replace(lost, status=status)
        self._told = lost

    async def _end_rest(self) -> Measure | None:
        """However long it takes: a job is not lost before its processes are gone."""
        while True:
            try:
                return await trio.to_thread.run_sync(_end_rest, self.id, self._told.cgroups, self.directory)
            except OSError as error:
                log.warning("job %s: what its keeper left cannot be ended now: %s", self.id, error)
                await trio.sleep(ATTACH_AGAIN_S)

    def fail_start(self, step: str, number: int) -> None:
        """There is no keeper to say it."""
        status = replace(self._told.status, state=State.FAILED_TO_START, errno=number, ended_at=self._clock.now())
        failure = {"step": step, "errno": number, "message": os.strerror(number)}
        self._told = replace(self._told, status=status, failure=failure)

    # asking

    async def call(self, do: str, *, answer_s: float | None = 30.0, **words: object) -> bool:
        """False: the job has ended. Raises JobError for what the keeper refuses."""
        await self.wait_until(lambda: self._link is not None or self.is_over)
        if self._link is None or self.is_over:
            return False
        try:
            await self._link.call(do, answer_s=answer_s, **words)
        except KeeperGoneError:
            return await self._ended_or_stuck(do)
        except RefusedByKeeperError as error:
            if error.word == "NOT_RUNNING" and self._told.status.state is not State.STOPPING:
                return await self._ended_or_stuck(do)
            raise JobError(
                _REFUSALS.get(error.word, Code.INTERNAL), f"{do}: {error}", reason=error.word, job_id=self.id
            ) from None
        return True

    async def send_input(self, data: bytes, *, eof: bool) -> bool:
        """Returns when the job's stdin took it; False: the job has ended."""
        return await self.call("input", answer_s=None, data=base64.b64encode(data).decode(), eof=eof)

    async def _ended_or_stuck(self, do: str) -> bool:
        with trio.move_on_after(FOLLOWS_S):
            await self.wait_until(lambda: self.is_over)
        if not self.is_over:
            raise JobError(Code.UNAVAILABLE, f"{do}: the keeper of this job is being looked for; try again",
                           reason="KEEPER_GONE", retry_after_s=1.0)  # fmt: skip
        return False

    async def follows(self, states: frozenset[State]) -> None:
        """Wait for the state the keeper has just agreed to; if it does not come, the status tells how it is."""
        with trio.move_on_after(FOLLOWS_S):
            await self.wait_until(lambda: self.record.status.state in states | ENDED)


def _read_status(directory: Path) -> dict[str, Any] | None:
    """What the keeper wrote last; None where it wrote nothing that can be read."""
    try:
        with (directory / "status.json").open("rb") as file:
            told = json.loads(file.read(STATUS_BYTES))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _end_rest(job_id: str, cgroups: tuple[str, ...], directory: Path) -> Measure | None:
    """Kill what is left; what the log amounts to, None where it is damaged."""
    from .keeper.tree import end_orphans

    end_orphans(job_id, list(cgroups))
    with suppress(JobError):
        return measure(directory)
    return None
