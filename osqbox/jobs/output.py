"""The log of a job as files, read at a place of one's own: bytes, index and the hole of what was dropped.

The keeper appends bytes first and their index record after them, and names a hole in the head of the index before it
punches it. So a whole record promises its bytes, and bytes read before the hole was looked at are good outside of it.
Plain functions; ``nowait`` reads only what the page cache has and raises BlockingIOError for the rest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from .errors import Code, JobError
from .keeper.wire import HOLE, RECORD, STREAMS
from .messages import CHUNK_BYTES, Chunk, Stream, Truncated

BATCH_RECORDS = 256
JOINED_WITHIN_NS = 10_000_000
"""Pieces of one stream written within this time come as one chunk, with the time of the first."""
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class Progress(Enum):
    SKIPPED = auto()
    """Only other streams than those asked for: go on."""


SKIPPED = Progress.SKIPPED


class Hole(NamedTuple):
    """What was dropped: a range of the log, and its range of the index."""

    start: int
    end: int
    index_start: int
    index_end: int


class Measure(NamedTuple):
    """What the files of a log amount to."""

    output_bytes: int
    stdout_bytes: int
    stderr_bytes: int
    truncated: bool


def damaged(job_id: str, what: str) -> JobError:
    return JobError(Code.DATA_LOSS, f"the log of job {job_id} is damaged: {what}", reason="LOG_DAMAGED")


class LogFiles:
    """The open files of one log, shared by all who read it; close it when the last has left.

    Raises FileNotFoundError where there is no log, other OSErrors when descriptors run out.
    """

    def __init__(self, directory: Path) -> None:
        self.job_id = directory.name
        self.readers = 0
        self._output = os.open(directory / "output", READ_FLAGS)
        try:
            self._index = os.open(directory / "index", READ_FLAGS)
        except BaseException:
            os.close(self._output)
            raise

    def close(self) -> None:
        os.close(self._output)
        os.close(self._index)

    def hole(self) -> Hole | None:
        """As it is now; it only ever grows. Looked at until two looks agree, as it may be written meanwhile."""
        before = None
        while (head := os.pread(self._index, HOLE.size, 0)) != before:
            before = head
        if len(head) < HOLE.size:
            raise damaged(self.job_id, "its index has no head")
        hole = Hole._make(HOLE.unpack(head))
        if not hole.start <= hole.end < 2**63:
            raise damaged(self.job_id, "its index says what cannot be")
        return hole if hole.end else None

    def read(self, offset: int, size: int, *, nowait: bool) -> bytes:
        return _pread(self._output, size, offset, nowait)

    def records(self, position: int, count: int, *, nowait: bool) -> list[tuple[int, int, int, int]]:
        """Whole records from number ``position`` on: offset, length, stream, wall ns. Length 0: punched out."""
        data = _pread(self._index, count * RECORD.size, HOLE.size + position * RECORD.size, nowait)
        return list(RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]))

    def count(self) -> int:
        """How many records the index has, the punched ones included."""
        return _position(os.fstat(self._index).st_size)

    def end(self) -> int:
        """Length of the log so far."""
        last = self.records(self.count() - 1, 1, nowait=False) if self.count() else []
        return last[0][0] + last[0][1] if last else 0

    def disk_bytes(self) -> int:
        return sum(os.fstat(fd).st_blocks * 512 for fd in (self._output, self._index))


def _position(index_offset: int) -> int:
    """Number of the record at a place in the index."""
    return max(0, index_offset - HOLE.size) // RECORD.size


def _pread(fd: int, size: int, offset: int, nowait: bool) -> bytes:
    if not nowait:
        return os.pread(fd, size, offset)
    buffer = bytearray(size)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot say
            raise BlockingIOError from error
        raise
    return bytes(memoryview(buffer)[:count])


class Reader:
    """One place in a log. `step` gives what comes next, and None when that is not written yet."""

    def __init__(self, files: LogFiles, offset: int, streams: frozenset[Stream] = frozenset()) -> None:
        self._files = files
        self._wanted = frozenset(STREAMS.index(stream.value) for stream in streams) or frozenset(range(len(STREAMS)))
        self.job_id = files.job_id
        self.offset = offset
        self._position = -1
        """Number of the next record to be read; -1 until it was looked for."""
        self._records: list[tuple[int, int, int, int]] = []
        """Read, and not yet passed."""

    def step(self, *, nowait: bool) -> Chunk | Truncated | Progress | None:
        """Raises BlockingIOError (only with ``nowait``; nothing has moved) or DATA_LOSS."""
        if self._position < 0:
            if nowait:
                raise BlockingIOError
            self._position = _search(self._files, self.offset)
        if not self._records:
            self._records = self._files.records(self._position, BATCH_RECORDS, nowait=nowait)
        passed = self._pass_over()
        if not self._records:
            return SKIPPED if passed else self._beyond()
        start, length, stream, at_ns = self._records[0]
        if not start <= self.offset < start + length:
            return self._gap()
        size = self._joined(start, length, stream, at_ns) - self.offset
        data = self._files.read(self.offset, size, nowait=nowait)
        return self._accept(data, STREAMS[stream], at_ns)

    def _pass_over(self) -> int:
        """Leave out records that lie before this place or are of no wanted stream; returns how many."""
        passed, place = 0, self.offset
        for start, length, stream, _ in self._records:
            end = start + length
            if not length or start > place or (end > place and stream in self._wanted):
                break
            place = max(place, end)
            passed += 1
        self.offset = place
        self._position += passed
        del self._records[:passed]
        return passed

    def _joined(self, start: int, length: int, stream: int, at_ns: int) -> int:
        """Where a chunk that begins here ends."""
        end, most = start + length, self.offset + CHUNK_BYTES
        for next_start, next_length, next_stream, next_ns in self._records[1:]:
            if end >= most or next_start != end or next_stream != stream or next_ns - at_ns > JOINED_WITHIN_NS:
                break
            end += next_length
        return min(end, most)

    def _accept(self, data: bytes, stream: str, at_ns: int) -> Chunk | Truncated:
        hole = self._files.hole()
        if hole is not None and hole.start <= self.offset < hole.end:
            return self._jump(hole)
        if hole is not None and self.offset < hole.start:
            data = data[: hole.start - self.offset]
        if not data:
            raise damaged(self._files.job_id, f"expected bytes at {self.offset}, which the index has, got none")
        chunk = Chunk(Stream(stream), self.offset, data, at_ns / 1e9)
        self.offset += len(data)
        return chunk

    def _gap(self) -> Truncated:
        """The index does not go on here: in the hole that is as it should be."""
        hole = self._files.hole()
        if hole is None or not hole.start <= self.offset < hole.end:
            raise damaged(self._files.job_id, f"its index does not go on at {self.offset}")
        return self._jump(hole)

    def _jump(self, hole: Hole) -> Truncated:
        event = Truncated(self.offset, hole.end)
        self.offset, self._position, self._records = hole.end, _position(hole.index_end), []
        return event

    def _beyond(self) -> Truncated | None:
        """Nothing more in the index: not yet, or this place was swallowed by the hole together with its records."""
        hole = self._files.hole()
        if hole is None or not hole.start <= self.offset < hole.end:
            return None
        is_inside = hole.index_end and _position(hole.index_end) < self._files.count()
        return self._jump(hole) if is_inside else None

    def rest(self, output_bytes: int) -> Truncated | None:
        """At the end of a log of ``output_bytes``: what was dropped there. Raises DATA_LOSS if some is missing."""
        hole = self._files.hole()
        event = None
        if hole is not None and hole.start <= self.offset < hole.end:
            event = self._jump(hole)
        if self.offset < output_bytes:
            raise damaged(self._files.job_id, f"expected {output_bytes} bytes, got {self.offset}")
        return event


def _search(files: LogFiles, offset: int) -> int:
    """Number of the record that holds ``offset``, or of the first one after everything before it."""
    hole = files.hole()
    low, high = 0, files.count()
    if hole is not None and hole.index_end and offset < hole.start:
        high = min(high, _position(hole.index_start) + 1)
    elif hole is not None and hole.index_end:
        low = min(high, _position(hole.index_end))
    while low < high:
        middle = (low + high) // 2
        record = files.records(middle, 1, nowait=False)
        end = record[0][0] + record[0][1] if record and record[0][1] else None
        if end is None or end <= offset:  # punched out meanwhile: what lies behind it is not
            low = middle + 1
        else:
            high = middle
    return low


def pieces(
    directory: Path, position: int, size_bytes: int
) -> tuple[list[tuple[int, int, str, float, bytes]], int, int, int]:
    """Records of a log from number ``position`` on, until they are ``size_bytes``; the last may pass it.

    Each as number, offset, stream, time and bytes; then the number to go on with, how many there are behind it, and how
    many were left out because the job's own bound dropped them. Raises FileNotFoundError where there is no log.
    """
    files = LogFiles(directory)
    try:
        found: list[tuple[int, int, str, float, bytes]] = []
        dropped = size = 0
        while size < size_bytes and (batch := files.records(position, BATCH_RECORDS, nowait=False)):
            for start, length, stream, at_ns in batch:
                data = files.read(start, length, nowait=False)
                hole = files.hole()  # looked at after the bytes were
                if not length or (hole is not None and start < hole.end and hole.start < start + length):
                    after_hole = _position(hole.index_end) if hole is not None and hole.index_end else 0
                    dropped, position = dropped + max(1, after_hole - position), max(position + 1, after_hole)
                    if after_hole == position:
                        break
                    continue
                found.append((position, start, STREAMS[min(stream, len(STREAMS) - 1)], at_ns / 1e9, data))
                position, size = position + 1, size + length
                if size >= size_bytes:
                    break
        return found, position, max(0, files.count() - position), dropped
    finally:
        files.close()


def measure(directory: Path) -> Measure:
    """Of a log whose keeper is gone, from its files; zeros where there is none."""
    try:
        files = LogFiles(directory)
    except FileNotFoundError:
        return Measure(0, 0, 0, False)
    try:
        totals = dict.fromkeys(STREAMS, 0)
        for _, length, stream, _ in _all_records(files):
            totals[STREAMS[min(stream, len(STREAMS) - 1)]] += length
        return Measure(files.end(), totals["stdout"] + totals["mixed"], totals["stderr"], files.hole() is not None)
    finally:
        files.close()


def _all_records(files: LogFiles) -> Iterator[tuple[int, int, int, int]]:
    position = 0
    while batch := files.records(position, BATCH_RECORDS, nowait=False):
        yield from batch
        position += len(batch)


def size_on_disk(directory: Path) -> int:
    """Bytes of a job's directory; 0 where there is none."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(directory))
    except OSError:
        return 0
