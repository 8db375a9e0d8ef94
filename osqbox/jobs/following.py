"""Followers of output: each with a place of its own in the log's files, woken when the log has grown.

A follower holds one chunk and shares the open files with all others of its job, so a slow one holds up nobody and a
silent one costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from .access import OwnerKey
from .errors import Code, JobError, exhausted
from .keepers import EXHAUSTED
from .live import Live
from .messages import Chunk, End, JobBounds, OutputEvent, OutputRequest, Status, Truncated
from .output import LogFiles, Progress, Reader, damaged
from .service import Record

T = TypeVar("T")

DISK_THREADS = 8
"""For what the page cache does not have."""


class Following:
    """Of all jobs in ``directory``."""

    def __init__(self, directory: Path, bounds: JobBounds) -> None:
        self._directory = directory
        self._bounds = bounds
        self._disk = trio.CapacityLimiter(DISK_THREADS)
        self._logs: dict[str, LogFiles] = {}
        self._followers: Counter[OwnerKey] = Counter()

    @property
    def count(self) -> int:
        return self._followers.total()

    @asynccontextmanager
    async def follow(
        self, record: Record, live: Live | None, request: OutputRequest, key: OwnerKey
    ) -> AsyncIterator[AsyncIterator[OutputEvent]]:
        """The events of one request by the owner ``key``. Raises RESOURCE_EXHAUSTED, OUT_OF_RANGE or DATA_LOSS."""
        with self._counted(key), self._log(record) as files:
            if record.status.has_ended:
                _check_offset(request.offset, record.status, files)
            events = self._events(record, live, files, request)
            async with aclosing(events):
                yield events

    async def _events(
        self, record: Record, live: Live | None, files: LogFiles | None, request: OutputRequest
    ) -> AsyncGenerator[OutputEvent, None]:
        reader = Reader(files, await self._first(files, request), request.streams) if files else None
        stop_at = await self._in_thread(files.end) if files and live and not request.follow else None
        while reader is not None:
            is_over = live is None or live.is_over  # seen before looking: what is looked for is then all there
            changed = live.changed if live else None
            event = await self._step(reader)
            await trio.lowlevel.checkpoint()
            if isinstance(event, Chunk | Truncated):
                yield event
            elif event is None and is_over:
                break
            if stop_at is not None and not is_over and (event is None or reader.offset >= stop_at):
                return
            if event is None and live is not None and changed is not None:
                live.check_tended()
                await changed.wait()
        if live is not None:
            await live.wait_until(lambda: live.is_over)
            record = live.record
        _check_offset(request.offset, record.status, files)
        if reader is not None and (rest := reader.rest(record.status.output_bytes)):
            yield rest
        yield End(record.status)

    async def _first(self, files: LogFiles, request: OutputRequest) -> int:
        if request.tail_bytes is None:
            return request.offset
        return max(0, await self._in_thread(files.end) - request.tail_bytes)

    async def _step(self, reader: Reader) -> Chunk | Truncated | Progress | None:
        try:
            with suppress(BlockingIOError):
                return reader.step(nowait=True)
            return await self._in_thread(partial(reader.step, nowait=False))
        except OSError as error:
            raise damaged(reader.job_id, f"it cannot be read: {error.strerror}") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._disk)

    @contextmanager
    def _counted(self, key: OwnerKey) -> Iterator[None]:
        bounds = self._bounds
        if self.count >= bounds.followers or self._followers[key] >= bounds.followers_per_owner:
            raise exhausted("TOO_MANY_FOLLOWERS", "as many follow the output of jobs as may; end some of them")
        self._followers[key] += 1
        try:
            yield
        finally:
            self._followers[key] -= 1
            if not self._followers[key]:
                del self._followers[key]

    @contextmanager
    def _log(self, record: Record) -> Iterator[LogFiles | None]:
        """The open files, one set for all followers of a job; None for a job that never had any."""
        files = self._logs.get(record.status.id) or self._open(record)
        if files is None:
            yield None
            return
        self._logs[record.status.id] = files
        files.readers += 1
        try:
            yield files
        finally:
            files.readers -= 1
            if not files.readers:
                del self._logs[record.status.id]
                files.close()

    def _open(self, record: Record) -> LogFiles | None:
        job_id = record.status.id
        try:
            return LogFiles(self._directory / job_id)
        except FileNotFoundError:
            if record.status.has_ended and not record.status.output_bytes:
                return None
            raise damaged(job_id, "its files are missing") from None
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise exhausted("NO_RESOURCES", f"the log cannot be opened now: {error.strerror}") from None
            raise damaged(job_id, f"its files cannot be opened: {error.strerror}") from None


def _check_offset(offset: int, status: Status, files: LogFiles | None) -> None:
    """What was dropped behind the end counts: a follower that was told of it may come back."""
    if offset > status.output_bytes and not (files and (hole := files.hole()) and offset <= hole.end):
        raise JobError(
            Code.OUT_OF_RANGE,
            f"offset: expected at most {status.output_bytes}, where the finished log ends, got {offset}",
            reason="BEYOND_END",
            field="offset",
        )
