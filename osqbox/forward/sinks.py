"""Where records go: each sink takes a batch and returns when it is confirmed.

``send`` returns the records that were refused for what they are. It raises SinkDown when the batch, or a part of it, is
not confirmed, and BatchRefused when smaller batches may tell which record is at fault.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import errno
import gzip
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from osqbox.clock import Clock

from .http import Answer, Connection
from .messages import BatchRefused, Record, Refusal, SinkDown, SinkSpec, SourceName

NDJSON = "application/x-ndjson"
GZIP_LEVEL = 1
RETRY_AFTER_MAX_S = 3600.0
REFUSING_STATUSES = frozenset((400, 422))
"""Of a collector that does not like what it read; every other failure may pass with time, or with a setting."""
TERM_BYTES = 30_000
AGENTS_WORDS = ("line", "data")
"""Members of a record that are as an agent sent them."""
TAIL_BYTES = 1024 * 1024
STDOUT_FD = 1
SAID_CHARS = 200


class Sink(Protocol):
    async def send(self, records: Sequence[Record]) -> list[Refusal]: ...

    async def aclose(self) -> None: ...


def _lines(records: Sequence[Record]) -> bytes:
    return b"".join(record.text + b"\n" for record in records)


class FileSink:
    """NDJSON appended to a file, on disk before it is confirmed.

    PATH is moved to PATH.1, that to PATH.2 and so on before it would grow beyond the bound. A file that somebody moved
    away is made anew. A line that a crash or a full disk left unfinished is cut off, since its record comes again.
    """

    def __init__(self, spec: SinkSpec) -> None:
        self._path = Path(spec.target)
        self._rotate_bytes = spec.rotate_bytes
        self._keep = spec.keep_files
        self._fd: int | None = None

    async def send(self, records: Sequence[Record]) -> list[Refusal]:
        try:
            await trio.to_thread.run_sync(self._write, records)
        except OSError as error:
            raise SinkDown(f"cannot write {self._path}: {error.strerror or error}") from error
        return []

    def _write(self, records: Sequence[Record]) -> None:
        self._leave_if_moved()
        fd = self._open()
        before = os.fstat(fd).st_size
        data = _lines(records)
        if before and before + len(data) > self._rotate_bytes:
            self._rotate()
            fd, before = self._open(), 0
        try:
            write_all(fd, data)
            os.fsync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, before)
            raise

    def _open(self) -> int:
        if self._fd is None:
            is_new = not self._path.exists()
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
                _cut_unfinished_line(fd)
                if is_new:
                    _sync_directory(self._path.parent)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _leave_if_moved(self) -> None:
        if self._fd is None:
            return
        try:
            there, ours = self._path.stat(), os.fstat(self._fd)
        except FileNotFoundError:
            self.close()
            return
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            self.close()

    def _rotate(self) -> None:
        self.close()
        names = [self._path, *(Path(f"{self._path}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            with suppress(FileNotFoundError):
                newer.rename(older)
        if not self._keep:
            self._path.unlink(missing_ok=True)
        _sync_directory(self._path.parent)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    async def aclose(self) -> None:
        self.close()


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _cut_unfinished_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - TAIL_BYTES)
        piece = os.pread(fd, end - start, start)
        if (found := piece.rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StdoutSink:
    """NDJSON on a descriptor; confirmed once it is written. A reader that stops holds up this sink alone."""

    def __init__(self, announced: trio.Event, fd: int = STDOUT_FD) -> None:
        self._announced = announced
        self._fd = fd
        self._limiter = trio.CapacityLimiter(1)

    async def send(self, records: Sequence[Record]) -> list[Refusal]:
        await self._announced.wait()
        try:
            # Left alone at the end of the box: nobody can wait for a reader that has stopped for good.
            await trio.to_thread.run_sync(
                write_all, self._fd, _lines(records), abandon_on_cancel=True, limiter=self._limiter
            )
        except OSError as error:
            raise SinkDown(f"cannot write to stdout: {error.strerror or error}") from error
        return []

    async def aclose(self) -> None:
        pass


class CollectorSink:
    """POST of NDJSON, packed with gzip unless the collector answers 415; any 2xx confirms the batch."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._packs = True

    async def send(self, records: Sequence[Record]) -> list[Refusal]:
        answer = await self._post(records)
        if answer.status == 415 and self._packs:
            self._packs = False
            answer = await self._post(records)
        check(answer, self._clock.now())
        return []

    async def _post(self, records: Sequence[Record]) -> Answer:
        body, headers = _lines(records), {"Content-Type": NDJSON}
        if self._packs:
            body = await trio.to_thread.run_sync(_packed, body)
            headers["Content-Encoding"] = "gzip"
        return await self._connection.call("POST", self._connection.path, body, headers)

    async def aclose(self) -> None:
        await self._connection.close()


def _packed(body: bytes) -> bytes:
    return gzip.compress(body, GZIP_LEVEL, mtime=0)


def check(answer: Answer, now: float) -> None:
    """Nothing for 2xx. Raises BatchRefused or SinkDown with what the server said."""
    if 200 <= answer.status < 300:
        return
    said = _said(answer.body[: 4 * SAID_CHARS].decode(errors="replace"))
    reason = f"HTTP {answer.status}" + (f": {said}" if said else "")
    if 300 <= answer.status < 400:
        reason += f", elsewhere: {answer.headers.get('location', '').partition('?')[0]!r}"
    if answer.status == 413:
        raise BatchRefused(reason, is_too_large=True)
    if answer.status in REFUSING_STATUSES:
        raise BatchRefused(reason)
    raise SinkDown(reason, retry_after_s(answer.headers.get("retry-after", ""), now))


def _said(text: str) -> str:
    """What a server says, for a log and a terminal."""
    line = " ".join(text.split())[:SAID_CHARS]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def retry_after_s(value: str, now: float) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; None where it says nothing one can use."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), RETRY_AFTER_MAX_S)
    try:
        at = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    moment = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    return min(max(0.0, moment.timestamp() - now), RETRY_AFTER_MAX_S)


class _BulkError(msgspec.Struct):
    type: str = ""
    reason: str | None = ""


class _BulkResult(msgspec.Struct):
    status: int
    error: _BulkError | None = None


class _BulkItem(msgspec.Struct):
    create: _BulkResult


class _BulkAnswer(msgspec.Struct):
    errors: bool
    items: list[_BulkItem]


def _document(text: bytes) -> bytes:
    """With values that OpenSearch cannot index (32,766 bytes with their path) where it only keeps them."""
    if len(text) <= TERM_BYTES:
        return text
    document = msgspec.json.decode(text)
    if not any(_has_long_text(document[name]) for name in AGENTS_WORDS if name in document):
        return text
    kept = {name: document.pop(name) for name in AGENTS_WORDS if name in document}
    return msgspec.json.encode({**document, "unindexed": kept})


def _has_long_text(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) * 4 > TERM_BYTES and len(value.encode()) > TERM_BYTES
    if isinstance(value, dict):
        return any(len(name) > TERM_BYTES // 4 or _has_long_text(each) for name, each in value.items())
    return isinstance(value, list) and any(map(_has_long_text, value))


class BulkSink:
    """OpenSearch's ``_bulk``: each record is created under its own id, so that a repetition (409) is stored already."""

    def __init__(self, connection: Connection, prefix: str, clock: Clock) -> None:
        self._connection = connection
        self._prefix = prefix
        self._clock = clock
        self._has_template = False

    async def send(self, records: Sequence[Record]) -> list[Refusal]:
        if not self._has_template:
            await self._put_template()
        body = b"".join(
            b'{"create":{"_index":"%s","_id":"%s"}}\n%s\n'
            % (self._index(record.source), record.id.encode(), _document(record.text))
            for record in records
        )
        # Only what is read below: a bulk answer is otherwise as large as the question.
        path = self._connection.at("/_bulk?filter_path=errors,items.create.status,items.create.error")
        answer = await self._connection.call("POST", path, body, {"Content-Type": NDJSON})
        check(answer, self._clock.now())
        return self._read(answer, records)

    def _index(self, source: SourceName) -> bytes:
        return f"{self._prefix}-{source}".encode()

    def _read(self, answer: Answer, records: Sequence[Record]) -> list[Refusal]:
        try:
            bulk = msgspec.json.decode(answer.body, type=_BulkAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SinkDown(f"expected the answer of OpenSearch's _bulk, got: {error}") from None
        if len(bulk.items) != len(records):
            raise SinkDown(f"expected {len(records)} items in the answer of _bulk, got {len(bulk.items)}")
        refused: list[Refusal] = []
        passing: _BulkResult | None = None
        for record, item in zip(records, bulk.items, strict=True):
            result = item.create
            if 200 <= result.status < 300 or result.status == 409:
                continue
            if result.status in REFUSING_STATUSES:
                refused.append(Refusal(record, _why(result)))
            else:
                passing = passing or result
        if passing is not None:  # those that are stored are found stored when they come again
            raise SinkDown(_why(passing))
        return refused

    async def _put_template(self) -> None:
        """How new indices are mapped: what agents say is one searchable field, whatever its shape.

        An existing template of this name is left as it is. Without the right to make one the indices are mapped by
        what comes first.
        """
        name = f"{self._prefix}-forward"
        body = msgspec.json.encode(_template(self._prefix))
        path = self._connection.at(f"/_index_template/{name}?create=true")
        answer = await self._connection.call("PUT", path, body, {"Content-Type": "application/json"})
        if answer.status not in (200, 400, 401, 403, 404, 405):
            check(answer, self._clock.now())
        self._has_template = True

    async def aclose(self) -> None:
        await self._connection.close()


def _why(result: _BulkResult) -> str:
    error = result.error or _BulkError()
    return _said(f"HTTP {result.status}: {error.type}: {error.reason or ''}")


def _template(prefix: str) -> dict[str, Any]:
    words = "id source tenant node log_type agent module collector event_id owner job stream"
    properties: dict[str, Any] = {name: {"type": "keyword"} for name in words.split()}
    properties |= {name: {"type": "long"} for name in ("seq", "offset")}
    properties |= {name: {"type": "flat_object"} for name in AGENTS_WORDS}
    properties |= {
        "at": {"type": "date"},
        "text": {"type": "text"},
        "base64": {"type": "binary"},
        "unindexed": {"type": "object", "enabled": False},
    }
    return {
        "index_patterns": [f"{prefix}-{source}" for source in SourceName],
        "template": {"mappings": {"dynamic": False, "properties": properties}},
    }


OpenSink = Callable[[], Sink]
