"""File carving: the table that asks for it, the archive, and the upload in blocks.

osquery/carver/{carver,carver_utils}.cpp and osquery/tables/forensic/carves.cpp of osquery 5.23. Asking returns at
once; the upload starts at the next full minute, as the scheduler upstream does it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from osqbox.agent import logs, messages
from osqbox.agent.sql import Context, Row, TableSource
from osqbox.agent.tables.contents import Contents, MachineContents, tar_member

if TYPE_CHECKING:
    from osqbox.agent.client import Core, Failure, Thread
    from osqbox.agent.flags import Flags
    from osqbox.agent.store import Store

DOMAIN = "carves"
ATTEMPTS = 3
MAX_ARCHIVE_BYTES = 4 * 1024 * 1024 * 1024
MAX_CARVES = 1000
SCHEDULED, STARTING, PENDING, SUCCESS = "SCHEDULED", "STARTING", "PENDING", "SUCCESS"
ARCHIVE_FAILED, POST_FAILED = "ARCHIVE FAILED", "DATA POST FAILED"


@dataclass(frozen=True, slots=True)
class Carve:
    carve_guid: str
    request_id: str
    path: str
    """Paths asked for, joined by commas."""
    time: int
    status: str = SCHEDULED
    size: int = -1
    sha256: str = ""


# -- commands for the driver -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Archive:
    """Pack the files; the outcome is an `Archived`, or a `Failure`."""

    guid: str
    paths: tuple[str, ...]
    compress: bool


@dataclass(frozen=True, slots=True)
class Archived:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """One block of an archive; the outcome is its bytes, or a `Failure`."""

    guid: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Discard:
    """The archive is no longer needed."""

    guid: str


# -- the table ---------------------------------------------------------------------------------------------------


class Carves:
    """All carves an agent knows. Query threads add to it, the carver's thread works it off."""

    def __init__(
        self,
        store: Store,
        *,
        new_id: Callable[[], str],
        now: Callable[[], float],
        flags: Flags | None = None,
        contents: Contents | None = None,
    ) -> None:
        """Without ``flags`` the function ``carve`` is disabled, as by default; without ``contents``: this machine's."""
        self.contents = contents or MachineContents()
        self._flags = flags
        self._store = store
        self._new_id = new_id
        self._now = now
        self._lock = threading.Lock()
        self._carves: dict[str, Carve] = {}
        for guid, text in store.scan(DOMAIN):
            kept = Carve(**json.loads(text))
            # What a stop interrupted begins again.
            unfinished = kept.status in (STARTING, PENDING)
            self._carves[guid] = replace(kept, status=SCHEDULED) if unfinished else kept

    def tables(self) -> dict[str, TableSource]:
        return {"carves": TableSource(self._rows, frozenset({"path", "carve", "carve_guid"}), self._gather)}

    def _gather(self, paths: Sequence[str], warn: Callable[[str], None]) -> str:
        """The SQL function. Its text is cut to 13 characters, as upstream's."""
        if self._flags is None or self._flags.true("carver_disable_function"):
            return "Carve Failed: function disabled"[:13]
        guid = self._schedule(list(paths), warn)
        return f"Carve Started: {guid}"[:13] if guid else "Carve Failed: nothing to carve"[:13]

    def _rows(self, context: Context) -> Iterator[Row]:
        if context.equal_to("carve") == "1":
            self._ask(context)
        with self._lock:
            carves = list(self._carves.values())
        for carve in carves:
            yield {**asdict(carve), "carve": 1}

    def _ask(self, context: Context) -> None:
        path, like = context.equal_to("path"), context.like("path")
        paths = [path] if path else list(self.contents.find(like, context)) if like else []
        self._schedule(paths, context.warn)

    def _schedule(self, paths: Sequence[str], warn: Callable[[str], None]) -> str:
        """The new carve's guid; empty when there is nothing to carve, or no room."""
        if not paths:
            return ""
        with self._lock:
            if len(self._carves) >= MAX_CARVES:
                warn(f"Too many carves: {MAX_CARVES} are kept already")
                return ""
            guid = self._new_id()
            self._carves[guid] = Carve(guid, self._new_id(), ",".join(paths), int(self._now()))
        return guid

    def scheduled(self) -> list[Carve]:
        with self._lock:
            return [carve for carve in self._carves.values() if carve.status == SCHEDULED]

    def all(self) -> list[Carve]:
        with self._lock:
            return list(self._carves.values())

    def save(self, carve: Carve) -> Carve:
        """Only from the carver's thread: the store belongs to it."""
        with self._lock:
            self._carves[carve.carve_guid] = carve
        self._store.put(DOMAIN, carve.carve_guid, json.dumps(asdict(carve)))
        return carve

    def expire(self, before: float) -> None:
        """Forget carves that succeeded before this time."""
        with self._lock:
            old = [c.carve_guid for c in self._carves.values() if c.status == SUCCESS and c.time < before]
            for guid in old:
                del self._carves[guid]
        for guid in old:
            self._store.delete(DOMAIN, guid)


# -- the thread --------------------------------------------------------------------------------------------------


def carver(core: Core, carves: Carves, *, period_s: int = 60) -> Thread[None]:
    """At every full ``period_s`` of unix time, carry out what was asked for."""
    from osqbox.agent.client import Sleep

    while True:
        yield Sleep(period_s - core.now % period_s, wake="carve")
        carves.expire(core.now - core.flags.integer("carver_expiry"))
        for carve in carves.scheduled():
            if not core.flags.true("disable_carver"):
                yield from _carry_out(core, carves, carve)


def _carry_out(core: Core, carves: Carves, carve: Carve) -> Thread[None]:
    carve = carves.save(replace(carve, status=STARTING))
    packed: Archived | Failure = yield Archive(
        carve.carve_guid, tuple(carve.path.split(",")), core.flags.true("carver_compression")
    )
    if not isinstance(packed, Archived):
        carves.save(replace(carve, status=ARCHIVE_FAILED))
        core.status(logs.ERROR, "carver.cpp", f"Carve {carve.carve_guid} failed: {packed.message}")
        return
    too_large = packed.size_bytes > core.flags.integer("read_max")
    carve = carves.save(
        replace(carve, status=PENDING, size=packed.size_bytes, sha256="-1" if too_large else packed.sha256)
    )
    sent = yield from _upload(core, carve, packed)
    yield Discard(carve.carve_guid)
    carves.save(replace(carve, status=SUCCESS if sent else POST_FAILED))
    if not sent:
        core.status(logs.WARNING, "carver.cpp", f"Carve {carve.carve_guid} failed: the server did not take all of it")
    core.events.append(("carved", {"carve_guid": carve.carve_guid, "status": SUCCESS if sent else POST_FAILED}))


def _upload(core: Core, carve: Carve, packed: Archived) -> Thread[bool]:
    from osqbox.agent.client import Send

    block_size = max(1, core.flags.integer("carver_block_size"))
    count = -(-packed.size_bytes // block_size)
    start = messages.carve_start_body(
        block_count=count,
        block_size=block_size,
        carve_size=packed.size_bytes,
        carve_id=carve.carve_guid,
        request_id=carve.request_id,
        node_key=core.node_key,
    )
    path = yield from core.located("carve_start", core.endpoints.carve_start)
    command = Send("carve_start", path, start, core.node_key)
    session = yield from _try(core, command, messages.carve_session)
    if not session:
        return False
    path = yield from core.located("carve_block", core.endpoints.carve_block)
    for number in range(count):
        data = yield ReadBlock(carve.carve_guid, number * block_size, block_size)
        if not isinstance(data, bytes):
            return False
        body = messages.carve_block_body(
            block_id=number,
            session_id=session,
            request_id=carve.request_id,
            data_base64=base64.b64encode(data).decode(),
        )
        command = Send("carve_block", path, body, core.node_key)
        # Any JSON object is an acceptance, an ``error`` in it too.
        accepted = yield from _try(core, command, lambda b: "" if messages.read_members(b) is None else "yes")
        if not accepted:
            return False
    return True


def _try(core: Core, command: object, read: Callable[[bytes], str]) -> Thread[str]:
    """Up to three times, 1 and 4 seconds apart; "" when nothing came of it."""
    from osqbox.agent.client import Sleep

    for attempt in range(1, ATTEMPTS + 1):
        outcome = yield command
        found = read(outcome) if isinstance(outcome, bytes) else ""
        if found:
            return found
        core.events.append(("call_failed", {"call": "carve", "reason": str(outcome)[:200]}))
        if attempt < ATTEMPTS:
            yield Sleep(attempt**2)
    return ""


# -- the archive -------------------------------------------------------------------------------------------------


def build_archive(
    target: Path,
    guid: str,
    paths: Iterable[str],
    *,
    compress: bool = False,
    temporary: str = "/tmp",  # noqa: S108
    contents: Contents | None = None,
) -> Archived:
    """A pax tar, as a whole zstd when compressed; members keep their metadata under upstream's carve directory.

    Regular files only; one that cannot be read is left out. Raises OSError when the target cannot be written or
    grows over MAX_ARCHIVE_BYTES.
    """
    prefix = f"{temporary}/osquery_carve_{guid}"
    contents = contents or MachineContents()
    with target.open("wb") as plain:
        target.chmod(0o600)
        if compress:
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(plain, closefd=False) as packed:
                _pack(packed, prefix, paths, contents)
        else:
            _pack(plain, prefix, paths, contents)
    return Archived(target.stat().st_size, _file_sha256(target))


def _pack(out: IO[bytes], prefix: str, paths: Iterable[str], contents: Contents) -> None:
    total = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            opened = contents.open(path)
            if opened is None:
                continue
            with opened.content:
                member = tar_member(archive, path, opened)
                total += member.size
                if total > MAX_ARCHIVE_BYTES:
                    raise OSError(f"more than {MAX_ARCHIVE_BYTES} bytes to carve")
                member.name = f"{prefix}/{path.lstrip('/')}"
                archive.addfile(member, opened.content)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
