"""The output of one job on disk: bytes at their offset for ever, an index beside them, a bound kept.

Readers need no lock: bytes are written before their record, and the head of the index names a range as dropped before
its blocks are given back.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Callable

from .native import punch_hole
from .wire import HOLE, RECORD

BLOCK_BYTES = 4096
PUNCH_STEP_BYTES = 256 * 1024
"""Blocks are given back in pieces of at least this size."""
LOOK_STEP_BYTES = 1024 * 1024
"""So much is written between two looks at how much the disk has left."""


class Log:
    """``output`` and ``index`` of one job directory, appended to by one process.

    ``overflow`` says what happens at ``max_bytes``: ``kill`` and ``discard_new`` keep the first ones (``is_full`` is
    then true), ``keep_head_and_tail`` the first half and the last. A disk that takes nothing more ends the log for the
    former; the latter drops what it could not write and goes on. A disk with less than ``reserve_bytes`` left counts
    as full: the box needs some for its rows, the one that forgets this log included. Making one raises OSError.
    """

    __slots__ = (
        "_index",
        "_index_hole",
        "_max_bytes",
        "_output",
        "_punched",
        "_reserve_bytes",
        "_rolls",
        "_unlooked_bytes",
        "dropped",
        "index_bytes",
        "is_full",
        "output_bytes",
        "stream_bytes",
    )  # fmt: skip

    def __init__(self, directory: int, max_bytes: int | None, overflow: str, reserve_bytes: int = 0) -> None:
        self.output_bytes = self.index_bytes = 0
        self.stream_bytes = [0, 0, 0]
        self.dropped: tuple[int, int] | None = None
        self.is_full = False
        self._max_bytes, self._rolls = max_bytes, overflow == "keep_head_and_tail"
        self._index_hole = self._punched = (0, 0)
        self._reserve_bytes, self._unlooked_bytes = reserve_bytes, LOOK_STEP_BYTES
        self._output = _create("output", directory)
        try:
            self._index = _create("index", directory)
            try:
                _write_all(self._index, HOLE.pack(0, 0, 0, 0), 0)
            except BaseException:
                os.close(self._index)
                raise
        except BaseException:
            os.close(self._output)
            raise
        self.index_bytes = HOLE.size

    def append(self, stream: int, data: memoryview, wall_ns: int) -> None:
        """Never raises for a disk that is full or broken: what was not kept is in ``dropped``."""
        self.stream_bytes[stream] += len(data)
        kept = data[: self._room()]
        if not self._store(stream, kept, wall_ns):
            if self._rolls:
                self._skip(len(data))
                return
            kept = data[:0]
        if lost := len(data) - len(kept):
            self._end(lost)
        elif self._rolls and self._max_bytes is not None:
            self._trim(self._max_bytes)

    @property
    def has_reached_its_bound(self) -> bool:
        """And has lost bytes to it; a full disk does not count."""
        return self.dropped is not None and self.output_bytes == self._max_bytes

    def close(self) -> None:
        """Gives the last dropped blocks back."""
        self._punch(1)
        os.close(self._output)
        os.close(self._index)

    def _room(self) -> int | None:
        if self.is_full:
            return 0
        return None if self._rolls or self._max_bytes is None else self._max_bytes - self.output_bytes

    def _store(self, stream: int, data: memoryview, wall_ns: int) -> bool:
        if not data:
            return True
        if self._reserve_bytes and not self._leaves_reserve(len(data)):
            return False
        try:
            _write_all(self._output, data, self.output_bytes)
            _write_all(self._index, RECORD.pack(self.output_bytes, len(data), stream, wall_ns), self.index_bytes)
        except OSError:  # ENOSPC, EDQUOT, EFBIG, EIO: nothing of this piece counts
            self._cut()
            return False
        self.output_bytes += len(data)
        self.index_bytes += RECORD.size
        return True

    def _leaves_reserve(self, size_bytes: int) -> bool:
        self._unlooked_bytes += size_bytes
        if self._unlooked_bytes < LOOK_STEP_BYTES:
            return True
        disk = os.fstatvfs(self._output)
        if disk.f_bavail * disk.f_frsize < self._reserve_bytes:
            return False  # looked at again for the next piece
        self._unlooked_bytes = 0
        return True

    def _cut(self) -> None:
        for fd, size in ((self._output, self.output_bytes), (self._index, self.index_bytes)):
            with contextlib.suppress(OSError):  # beyond the counted bytes nobody reads
                os.ftruncate(fd, size)

    def _skip(self, lost: int) -> None:
        """A disk that took nothing: these bytes belong to the hole, and so does the tail, whose blocks may help."""
        start = self.dropped[0] if self.dropped else self.output_bytes
        try:
            os.ftruncate(self._output, self.output_bytes + lost)
        except OSError:  # not even longer without a block
            self._end(lost)
            return
        self.output_bytes += lost
        self._drop(start, self.output_bytes)
        self._punch(1)

    def _end(self, lost: int) -> None:
        """Nothing is appended any more; offsets stand still, the dropped range grows."""
        self.is_full = True
        start, end = self.dropped or (self.output_bytes, self.output_bytes)
        self._drop(start, max(end, self.output_bytes) + lost)

    def _trim(self, max_bytes: int) -> None:
        start, end = self.dropped or (max_bytes // 2, max_bytes // 2)
        tail_room = max_bytes - start
        if self.output_bytes - end > tail_room:
            # an eighth more than needed, so that readers near the end are not passed at every append
            self._drop(start, self.output_bytes - tail_room * 7 // 8)
            self._punch(PUNCH_STEP_BYTES)

    def _drop(self, start: int, end: int) -> None:
        """Name the range, so that nobody believes what stands there."""
        self.dropped = (start, end)
        first, last = self._index_hole
        if self._rolls:
            first = first or self._first_record(lambda offset, _: offset >= start)
            last = self._first_record(lambda offset, length: offset + length > end)
            self._index_hole = (first, last)
        first, last = self._index_hole  # the other way round while one record holds the bytes before and behind
        with contextlib.suppress(OSError):  # a block that exists; a broken disk shows in the status as well
            os.pwrite(self._index, HOLE.pack(start, end, min(first, last), last), 0)

    def _first_record(self, wanted: Callable[[int, int], bool]) -> int:
        """Where in the index; records ascend."""

        def is_wanted(at: int) -> bool:
            offset, length, _, _ = RECORD.unpack(os.pread(self._index, RECORD.size, at))
            return wanted(offset, length)

        positions = range(max(HOLE.size, self._index_hole[1]), self.index_bytes, RECORD.size)
        found = bisect_left(positions, True, key=is_wanted)
        return positions[found] if found < len(positions) else self.index_bytes

    def _punch(self, step_bytes: int) -> None:
        """Give the blocks of the hole back, once it is worth a call."""
        if self.dropped is None or not self._rolls:
            return
        output, index = _whole_blocks(*self.dropped), _whole_blocks(*self._index_hole)
        done_output, done_index = self._punched
        if output[1] - max(output[0], done_output) < step_bytes:
            return
        try:
            _give_back(self._output, max(output[0], done_output), output[1])
            _give_back(self._index, max(index[0], done_index), index[1])
        except OSError:
            self.is_full = True  # a file system without holes: the bound ends the log instead
        self._punched = (output[1], index[1])


def _create(name: str, directory: int) -> int:
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    written = os.pwrite(fd, data, at)
    while written < len(data):
        written += os.pwrite(fd, data[written:], at + written)


def _whole_blocks(start: int, end: int) -> tuple[int, int]:
    """Inside the range; never beyond it."""
    first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
    return first, max(first, end // BLOCK_BYTES * BLOCK_BYTES)


def _give_back(fd: int, start: int, end: int) -> None:
    if end > start:
        punch_hole(fd, start, end)
