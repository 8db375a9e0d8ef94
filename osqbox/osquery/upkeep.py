"""What the osquery system does by itself: expiry, retention, sightings, config files that change."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from osqbox import audit
from osqbox.clock import Clock
from osqbox.errors import BadSetup, UserError
from osqbox.osquery import campaigns, carves, configs, logs, nodes
from osqbox.osquery.amalgamate import Source
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.osquery.sources import changed, load_source, load_sources
from osqbox.osquery.sqlcheck import validate
from osqbox.settings import Retention
from osqbox.store import Store, Tx, count_dropped

log = logging.getLogger(__name__)

TICK_S = 0.25
SAVE_S = 1.0
PRUNE_S = 5.0
DROP_PAUSE_S = 0.01
"""Between two writes that drop blocks: others often find the writer idle."""


async def load_config_files(store: Store, paths: tuple[Path, ...]) -> dict[Path, Source]:
    """Put every given file into the store as a source; file sources no longer given are removed. Raises BadSetup."""
    loaded = dict(zip(paths, await trio.to_thread.run_sync(_load_all, paths), strict=True))

    def save(tx: Tx) -> None:
        given = {source.name for source in loaded.values()}
        for source in configs.sources(tx.db):
            if source.origin == "file" and source.name not in given:
                configs.remove(tx, source.name, "its file was not given at the start")
        for path, source in loaded.items():
            configs.put(tx, source, f"loaded from {path}")

    await store.write(save)
    return loaded


def _load_all(paths: tuple[Path, ...]) -> list[Source]:
    sources = load_sources(paths)
    for path, source in zip(paths, sources, strict=True):
        _refuse_errors(path, source)
    return list(sources)


def _load_checked(path: Path) -> Source:
    source = load_source(path)
    _refuse_errors(path, source)
    return source


def _refuse_errors(path: Path, source: Source) -> None:
    errors = [problem for problem in validate(source.content) if problem.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BadSetup(f"{path}: {errors[0]}{more}", hint=f"osqbox config validate {path}")


@dataclass(slots=True)
class Upkeep:
    """Run `run` in the box's nursery."""

    store: Store
    presence: Presence
    api: OsqueryApi
    clock: Clock
    retention: Retention
    files: dict[Path, Source]
    _told: dict[Path, str] = field(default_factory=dict)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._every, TICK_S, self._expire)
            nursery.start_soon(self._every, SAVE_S, self.flush)
            nursery.start_soon(self._every, SAVE_S, self._watch_files)
            nursery.start_soon(self._every, PRUNE_S, self._prune)
            nursery.start_soon(self._every, PRUNE_S, self._complete_carves)
            nursery.start_soon(self._every, PRUNE_S, self._drop_carves)
            nursery.start_soon(self._complete_carves)

    @staticmethod
    async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await trio.sleep(seconds)
            try:
                await work()
            except Exception:
                log.exception("upkeep failed; it is tried again")

    async def _expire(self) -> None:
        due = self.store.peek(campaigns.next_expiry)
        if due is not None and due <= self.clock.now():
            await self.store.write(campaigns.expire)

    async def flush(self) -> None:
        """Write sightings and counted refusals now."""
        seen, refused = self.presence.take_dirty(), self.api.take_refused()
        if not seen and not refused:
            return

        def save(tx: Tx) -> None:
            nodes.save_seen(tx, seen)
            for reason, count in refused.items():
                tx.emit("requests_refused", reason=reason, count=count)

        await self.store.write(save)

    async def _watch_files(self) -> None:
        for path, before in list(self.files.items()):
            if await trio.to_thread.run_sync(changed, before.files):
                await self._reload(path)

    async def _reload(self, path: Path) -> None:
        """Serve a changed file; a broken one changes nothing that is served and is told once."""
        try:
            source = await trio.to_thread.run_sync(_load_checked, path)
            await self.store.write(lambda tx: configs.put(tx, source, f"loaded from {path}"))
        except UserError as error:
            if self._told.get(path) != str(error):
                self._told[path] = str(error)
                log.warning("config %s kept as it was: %s", path, error)
                await self.store.write(lambda tx: tx.emit("config_rejected", path=str(path), why=self._told[path]))
            return
        self._told.pop(path, None)
        self.files[path] = source

    async def _complete_carves(self) -> None:
        """Finish what the end of the box, or of the request with the last block, left unfinished."""
        for session in await self.store.read(carves.awaiting_digest):
            await self.api.complete_carve(session)

    async def _drop_carves(self) -> None:
        """Free what expired and deleted carves hold, in small writes that let the others pass."""
        for session, block_bytes in await self.store.read(carves.to_drop):
            drop = partial(carves.drop_blocks, session=session, block_bytes=block_bytes)
            while await self.store.write(drop, bulk=True):  # noqa: ASYNC110 - a pause for the others, not a poll
                await trio.sleep(DROP_PAUSE_S)

    async def _prune(self) -> None:
        while await self.store.write(lambda tx: logs.prune(tx, self.retention), bulk=True):
            await trio.lowlevel.checkpoint()
        await self.store.write(self._prune_others, bulk=True)

    def _prune_others(self, tx: Tx) -> None:
        campaigns.prune(tx, self.retention.campaigns)
        carves.expire(tx)
        carves.prune(tx, self.retention.carve_bytes)
        cursor = tx.db.execute(
            "DELETE FROM feed_events WHERE seq <= (SELECT max(seq) FROM feed_events) - ?", (self.retention.events,)
        )
        count_dropped(tx, "events", cursor.rowcount)
        count_dropped(tx, "audit", audit.prune(tx, self.retention.audit_rows))
