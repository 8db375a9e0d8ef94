"""What the job runner does by itself: ended jobs beyond the retention go, with everything that was kept of them."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from osqbox.clock import Clock
from osqbox.store import Store

from . import links, service
from .keeper.cgroups import remove_empty
from .messages import JobBounds
from .service import Record
from .users import User

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""After something that failed."""
LOOK_S = 3600.0
"""Longest time between two looks."""
SPARED_LOOK_S = 60.0
"""The same while processes that a job left behind on request still have their control groups."""


class Upkeep:
    """Sleeps until a job has ended or the oldest has come of age; `run` it in a nursery."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        clock: Clock,
        bounds: JobBounds,
        own_user: User,
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._bounds = bounds
        self._own_user = own_user
        self._look = trio.Event()
        self._count = self._bytes = self._ended = 0
        self._oldest: float | None = None
        self._spared: list[str] = []
        """Control groups of jobs that have ended: they go with their last process."""
        self.removed = 0

    @property
    def kept_bytes(self) -> int:
        """On disk, of ended jobs."""
        return self._bytes

    def ended(self, record: Record) -> None:
        self._ended += 1
        self._count, self._bytes = self._count + 1, self._bytes + record.disk_bytes
        self._oldest = self._oldest or record.status.ended_at
        self._spared += record.cgroups
        self._look.set()

    async def deleted(self, record: Record) -> None:
        """Its row is gone; now its files."""
        self._count, self._bytes = self._count - 1, self._bytes - record.disk_bytes
        await trio.to_thread.run_sync(self.remove_files, [record])

    async def run(self) -> None:
        await self._try(self._sweep)
        is_counted, wait_s = False, 0.0
        while True:
            is_counted = is_counted or await self._try(self._recount)
            await self._try(self._remove_groups)
            while is_counted and (wait_s := self._due_s()) <= 0 and await self._try(self._remove_old):
                pass
            self._look = trio.Event()
            with trio.move_on_after(wait_s or AGAIN_S):
                await self._look.wait()

    async def _try(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """A full disk or a lack of descriptors must not end the runner."""
        try:
            return await work()
        except (sqlite3.Error, OSError):
            log.exception("the upkeep of jobs has failed and is tried again")
            return False

    def _due_s(self) -> float:
        """Until there is something to remove; 0 when there is."""
        if self._count > self._bounds.kept_jobs or self._bytes > self._bounds.kept_bytes:
            return 0.0
        longest_s = SPARED_LOOK_S if self._spared else LOOK_S
        if self._oldest is None:
            return longest_s
        return min(longest_s, max(0.0, self._oldest + self._bounds.kept_age_s - self._clock.now()))

    async def _remove_old(self) -> bool:
        """Some of what is beyond the bounds; False when there was nothing."""
        gone = await self._store.write(lambda tx: service.expire(tx, self._bounds))
        await trio.to_thread.run_sync(self.remove_files, gone)
        self.removed += len(gone)
        await self._recount()
        return bool(gone)

    async def _recount(self) -> bool:
        """Again, should a job end meanwhile: better one too many than one forgotten."""
        seen = -1
        while seen != self._ended:
            seen = self._ended
            self._count, self._bytes, self._oldest = await self._store.read(service.kept)
        return True

    async def _remove_groups(self) -> bool:
        spared, self._spared = self._spared, []
        if spared:
            self._spared += await trio.to_thread.run_sync(remove_empty, spared)
        return True

    def remove_files(self, records: Iterable[Record]) -> None:
        """Blocks: run it in a thread."""
        for record in records:
            if record.link_output and record.status.run_as == self._own_user.name:
                links.unlink(record.status.id, self._own_user)
            shutil.rmtree(self._directory / record.status.id, ignore_errors=True)

    async def _sweep(self) -> bool:
        """Directories without a row: a job was deleted and the box ended before its files were.

        Looked for before the rows: a directory is made after its row.
        """
        found = await trio.to_thread.run_sync(_directories, self._directory)
        known = await self._store.read(service.ids)
        await trio.to_thread.run_sync(_remove, [path for path in found if path.name not in known])
        self._spared += await self._store.read(service.spared_groups)
        return True


def _directories(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
