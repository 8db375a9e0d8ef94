"""One sink's life: read after the cursor, send, wait for the confirmation, move the cursor.

    read a page ─▶ send ─▶ confirmed ─▶ cursor moved ─▶ next page ... nothing left ─▶ wait for news
                    │
                    ├─ down ─▶ wait (longer each time, or as it says) ─▶ read again
                    └─ refused ─▶ halves, down to the one record at fault ─▶ set aside, counted

A record is set aside only when the sink has taken another one since: a sink that refuses everything is set up wrongly,
and loses nothing.
"""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from osqbox.clock import Clock
from osqbox.store import Store

from . import sources, tables
from .messages import BatchRefused, ReadOutput, Record, Refusal, SinkDown, SinkSpec, SinkStatistics, SourceName
from .sinks import OpenSink, Sink

log = logging.getLogger(__name__)

BATCH_BYTES = 2 * 1024 * 1024
BATCH_LEAST_BYTES = 16 * 1024
LINGER_S = 0.1
"""Between batches that were not full, so that many small writes become few."""
LOOK_S = 1.0
"""Between looks at the output of jobs that run: nothing else tells that it has grown."""
LOOK_AGAIN_S = 30.0
"""In case news was missed."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
SUSPECTS = 50
"""Refused in a row with none taken in between: then it is the sink, not the records."""


class _RefusesAll(Exception):
    """The sink takes nothing of one source."""


@dataclass(slots=True)
class _Pause:
    """A sink, or one source for it, that has failed."""

    failures: int = 0
    until: float = 0.0
    """In Trio's time."""
    reason: str = ""


@dataclass(slots=True)
class _Progress:
    """What statistics show without asking the database."""

    position: int = 0
    forwarded: int = 0
    dropped: int = 0
    set_aside: int = 0
    left: int = 0
    """Of job output, as last seen."""
    caught_up_at: float = 0.0
    has_taken: bool = False
    """Whether the sink has taken a record of this source since it last failed."""
    pause: _Pause = field(default_factory=_Pause)


@dataclass(slots=True, kw_only=True)
class _Batch:
    """A page on its way."""

    source: SourceName
    records: list[Record]
    is_full: bool
    missing: int = 0
    """Pieces of jobs' output that were taken out of their logs."""
    jobs: dict[str, int] = field(default_factory=dict)
    """Where their cursors stand afterwards."""
    ended: list[str] = field(default_factory=list)
    """Jobs of which there is no more."""


class Delivery:
    """`open`, then `run` in a nursery; `finish` lets it end once everything is forwarded or the sink is down."""

    def __init__(
        self, store: Store, spec: SinkSpec, open_sink: OpenSink, clock: Clock, read_output: ReadOutput | None
    ) -> None:
        self.spec = spec
        self._store = store
        self._open_sink = open_sink
        self._clock = clock
        self._read_output = read_output
        wanted = (name for name in spec.sources if name is not SourceName.JOBS or read_output is not None)
        self._progress = {name: _Progress() for name in wanted}
        self._news = trio.Event()
        self._fresh = set(self._progress)
        """Sources with perhaps something to forward."""
        self._finishing = trio.Event()
        self._jobs_run = False
        self._turn = 0
        self._batch_bytes = BATCH_BYTES
        self._pause = _Pause()
        self._last_error = ""
        self._last_error_at: float | None = None
        self._origin = ""

    def notice(self, source: SourceName) -> None:
        """There is something new."""
        if source in self._progress:
            self._fresh.add(source)
            self._news.set()

    def finish(self) -> None:
        self._finishing.set()
        self._fresh |= set(self._progress)
        self._news.set()

    def statistics(self) -> SinkStatistics:
        now = self._clock.now()
        waiting, lag_s = 0, 0.0
        for source, progress in self._progress.items():
            left, since = self._store.peek(partial(_left, source=source, progress=progress))
            waiting += left
            lag_s = max(lag_s, now - since if since is not None and left else 0.0)
        counted = self._progress.values()
        return SinkStatistics(
            sink=self.spec.name,
            up=not self._pause.failures and not any(each.pause.failures for each in counted),
            waiting=waiting,
            lag_s=round(lag_s, 3),
            forwarded=sum(each.forwarded for each in counted),
            dropped=sum(each.dropped for each in counted),
            set_aside=sum(each.set_aside for each in counted),
            last_error=self._last_error,
            last_error_at=self._last_error_at,
        )

    async def open(self) -> None:
        """Find out where the sink was."""
        self._origin = self._store.peek(tables.origin)
        for source, progress in self._progress.items():
            start = 0
            if source is not SourceName.JOBS:
                start = await self._store.read(partial(sources.before_oldest, source=source))
            cursor = await self._store.write(
                partial(tables.open_cursor, sink=self.spec.name, source=source, before_oldest=start)
            )
            progress.position, progress.forwarded, progress.dropped, progress.set_aside, moved_at = cursor
            progress.caught_up_at = moved_at

    async def run(self) -> None:
        sink = self._open_sink()
        try:
            while True:
                self._news = trio.Event()
                if ready := self._ready():
                    await self._round(sink, ready)
                elif self._finishing.is_set():
                    return
                else:
                    await self._wait()
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await sink.aclose()
                except Exception:
                    log.exception("closing %s failed", self.spec.name)  # it must not end the box

    def _ready(self) -> list[SourceName]:
        now = trio.current_time()
        if self._pause.until > now:
            return []
        return [
            name for name, progress in self._progress.items() if name in self._fresh and progress.pause.until <= now
        ]

    async def _round(self, sink: Sink, ready: list[SourceName]) -> None:
        """A batch of each source that has something."""
        has_sent = is_full = False
        for source in ready:
            self._fresh.discard(source)
            try:
                if (batch := await self._read(source)) is None:
                    continue
                await self._deliver(sink, batch)
            except _RefusesAll as error:
                self._fresh.add(source)
                await self._fail(self._progress[source].pause, f"{source}: refuses every record: {error}", None)
            except SinkDown as error:
                self._fresh.add(source)
                await self._fail(self._pause, str(error), error.retry_after_s)
                break
            except Exception as error:  # a sink must not end the box
                self._fresh.add(source)
                log.exception("forwarding to %s failed", self.spec.name)
                await self._fail(self._pause, f"{type(error).__name__}: {error}", None)
                break
            else:
                has_sent, is_full = True, is_full or batch.is_full
            self._fresh.add(source)  # there may be more
        if has_sent and not is_full:
            with trio.move_on_after(LINGER_S):
                await self._finishing.wait()

    async def _wait(self) -> None:
        """For news, for the end of a pause, or for the next look."""
        now = trio.current_time()
        pauses = [self._pause.until, *(self._progress[name].pause.until for name in self._fresh)]
        look_at = now + (LOOK_S if self._jobs_run else LOOK_AGAIN_S)
        with trio.move_on_at(min([look_at, *(at for at in pauses if at > now)])) as waited:
            await self._news.wait()
        if waited.cancelled_caught:
            self._fresh |= set(self._progress)

    async def _fail(self, pause: _Pause, reason: str, asked_s: float | None) -> None:
        """Nothing more is sent for a while: as long as the sink asks for, else longer each time."""
        pause.failures += 1
        wait_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(pause.failures - 1, 10))
        wait_s = max(wait_s, asked_s) if asked_s is not None else wait_s * random.uniform(0.7, 1)  # noqa: S311
        pause.until = trio.current_time() + wait_s
        self._batch_bytes = max(BATCH_LEAST_BYTES, self._batch_bytes // 2)
        for progress in self._progress.values():
            progress.has_taken = False
        is_new, pause.reason = reason != pause.reason, reason
        self._last_error, self._last_error_at = reason, self._clock.now()
        if is_new:
            log.warning("forwarding to %s: %s; tried again in %.1f s", self.spec.name, reason, wait_s)
        if pause.failures == 1:
            await self._tell("forward_failed", reason=reason)

    async def _note_up(self, source: SourceName) -> None:
        self._batch_bytes = min(BATCH_BYTES, self._batch_bytes * 2)
        self._progress[source].has_taken = True
        for pause in (self._pause, self._progress[source].pause):
            if pause.failures:
                pause.failures, pause.reason = 0, ""
                log.info("forwarding to %s goes on", self.spec.name)
                await self._tell("forward_recovered")

    async def _tell(self, kind: str, **facts: str) -> None:
        try:
            await self._store.write(lambda tx: tx.emit(kind, sink=self.spec.name, **facts))
        except sqlite3.Error:
            log.exception("forwarding to %s: %s could not be told", self.spec.name, kind)

    # reading

    async def _read(self, source: SourceName) -> _Batch | None:
        """What comes next, or None."""
        if source is SourceName.JOBS:
            return await self._read_jobs()
        progress = self._progress[source]
        page = await self._store.read(
            lambda db: sources.read_table(db, source, self._origin, progress.position, self._batch_bytes)
        )
        if page.missing:
            await self._count_missing(source, progress.position + page.missing, page.missing)
        if not page.records:
            progress.caught_up_at = self._clock.now()
            return None
        is_full = len(page.records) >= sources.PAGE_RECORDS or _size(page.records) >= self._batch_bytes
        return _Batch(source=source, records=page.records, is_full=is_full)

    async def _count_missing(self, source: SourceName, reached: int, missing: int) -> None:
        """At once, and not with what comes after it: that may wait for long."""
        await self._store.write(
            lambda tx: tables.confirm(tx, self.spec.name, source, (), reached=reached, missing=missing)
        )
        progress = self._progress[source]
        progress.position, progress.dropped = max(progress.position, reached), progress.dropped + missing

    async def _read_jobs(self) -> _Batch | None:
        read_output = self._read_output
        assert read_output is not None
        sink, progress = self.spec.name, self._progress[SourceName.JOBS]
        jobs, is_stale = await self._store.read(partial(tables.unfinished_jobs, sink=sink))
        if is_stale:
            progress.dropped += await self._store.write(partial(tables.note_jobs, sink=sink))
            jobs, _ = await self._store.read(partial(tables.unfinished_jobs, sink=sink))
        self._jobs_run = any(not job.has_ended for job in jobs)
        self._turn = (self._turn + 1) % max(1, len(jobs))
        in_turn = jobs[self._turn :] + jobs[: self._turn]
        found = await trio.to_thread.run_sync(sources.read_jobs, in_turn, self._origin, self._batch_bytes, read_output)
        progress.left = found.left + len(found.records)
        if not found.records and not found.ended and not found.reached:
            progress.caught_up_at = self._clock.now()
            return None
        return _Batch(
            source=SourceName.JOBS,
            records=found.records,
            missing=found.missing,
            jobs=found.reached,
            ended=found.ended,
            is_full=found.left > 0,
        )

    # sending

    async def _deliver(self, sink: Sink, batch: _Batch) -> None:
        """Confirm the batch in order, piece by piece where the sink wants smaller ones."""
        pieces = [batch.records] if batch.records else []
        suspects: list[Refusal] = []
        while pieces:
            records = pieces.pop()
            try:
                refused = await sink.send(records)
            except BatchRefused as error:
                if error.is_too_large:
                    self._batch_bytes = max(BATCH_LEAST_BYTES, _size(records) // 2)
                if len(records) > 1:
                    middle = len(records) // 2
                    pieces += [records[middle:], records[:middle]]
                    continue
                refused = [Refusal(records[0], str(error))]
            suspects += refused
            if len(refused) < len(records):
                await self._note_up(batch.source)
                earlier = [each.record for each in suspects[: len(suspects) - len(refused)]]
                await self._confirm(batch, [*earlier, *records], suspects)
                suspects = []
            elif len(suspects) >= SUSPECTS:
                raise _RefusesAll(suspects[-1].reason)
        if suspects:
            if not self._progress[batch.source].has_taken:
                raise _RefusesAll(suspects[-1].reason)
            await self._confirm(batch, [each.record for each in suspects], suspects)
            self._progress[batch.source].has_taken = False
        await self._close_jobs(batch)

    async def _confirm(self, batch: _Batch, records: Sequence[Record], refused: Sequence[Refusal]) -> None:
        """Move the cursor behind these."""
        if refused:
            log.warning(
                "forwarding to %s: %d of %d records set aside, such as %s: %s",
                self.spec.name, len(refused), len(records), refused[0].record.id, refused[0].reason,
            )  # fmt: skip
        await self._store.write(
            lambda tx: tables.confirm(tx, self.spec.name, batch.source, records, set_aside=len(refused))
        )
        progress = self._progress[batch.source]
        progress.position = max([progress.position, *(each.number for each in records if not each.part)])
        progress.forwarded += len(records) - len(refused)
        progress.set_aside += len(refused)
        progress.left = max(0, progress.left - len(records))

    async def _close_jobs(self, batch: _Batch) -> None:
        """What a page says beside its records: pieces that are gone, jobs that are through."""
        if batch.missing:
            await self._count_missing(SourceName.JOBS, 0, batch.missing)
        if batch.jobs or batch.ended:
            await self._store.write(lambda tx: tables.close_jobs(tx, self.spec.name, batch.jobs, batch.ended))


def _size(records: Sequence[Record]) -> int:
    return sum(len(record.text) for record in records)


def _left(db: sqlite3.Connection, source: SourceName, progress: _Progress) -> tuple[int, float | None]:
    """How many records wait, and since when."""
    if source is SourceName.JOBS:
        return progress.left, progress.caught_up_at
    since = sources.oldest_at(db, source, progress.position)
    return (sources.last_number(db, source) - progress.position if since is not None else 0), since
