"""The log on disk: every byte at its offset, every loss named before it happens."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import log as log_module
from osqbox.jobs.keeper.log import BLOCK_BYTES, Log
from osqbox.jobs.keeper.wire import HOLE, RECORD

KIB, MIB = 1024, 1024 * 1024


class Opened:
    """A log in a directory, read back as the box does it."""

    def __init__(self, path: Path, max_bytes: int | None = None, overflow: str = "keep_head_and_tail") -> None:
        self.path = path
        fd = os.open(path, os.O_RDONLY)
        try:
            self.log = Log(fd, max_bytes, overflow)
        finally:
            os.close(fd)
        self.written = bytearray()

    def append(self, data: bytes, stream: int = 0) -> None:
        self.log.append(stream, memoryview(data), 1)
        self.written += data

    @property
    def head(self) -> tuple[int, int, int, int]:
        return HOLE.unpack((self.path / "index").read_bytes()[: HOLE.size])

    def records(self) -> list[tuple[int, int]]:
        """Those a reader may believe."""
        data, (_, _, first, last) = (self.path / "index").read_bytes(), self.head
        ranges = [(HOLE.size, first), (last, self.log.index_bytes)] if last else [(HOLE.size, self.log.index_bytes)]
        return [RECORD.unpack_from(data, at)[:2] for start, end in ranges for at in range(start, end, RECORD.size)]

    def check(self) -> None:
        """Outside the dropped range every byte is what was written, and has a record."""
        output, (start, end, _, _) = (self.path / "output").read_bytes(), self.head
        assert (start, end) == (self.log.dropped or (0, 0))
        kept = {
            *range(min(start, self.log.output_bytes)),
            *range(min(end, self.log.output_bytes), self.log.output_bytes),
        }
        assert len(output) == self.log.output_bytes
        assert all(output[at] == self.written[at] for at in kept)
        covered = {at for offset, length in self.records() for at in range(offset, offset + length)}
        assert kept <= covered
        assert all(length for _, length in self.records())


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(*args: Any) -> Opened:
            path = tmp_path / str(len(list(tmp_path.iterdir())))
            path.mkdir()
            made = Opened(path, *args)
            stack.callback(made.log.close)
            return made

        yield make


def test_bytes_and_records(opened: Any) -> None:
    log = opened()
    log.append(b"out", 0)
    log.append(b"error", 1)
    assert (log.path / "output").read_bytes() == b"outerror"
    assert log.records() == [(0, 3), (3, 5)]
    assert log.log.stream_bytes == [3, 5, 0]
    assert log.head == (0, 0, 0, 0)


@pytest.mark.parametrize("overflow", ["kill", "discard_new"])
def test_the_first_bytes_are_kept_to_the_byte(opened: Any, overflow: str) -> None:
    log = opened(10, overflow)
    log.append(b"123456")
    assert not log.log.has_reached_its_bound
    log.append(b"7890")
    assert not log.log.has_reached_its_bound  # full, and nothing lost
    log.append(b"abc", 1)
    log.append(b"d")
    assert (log.path / "output").read_bytes() == b"1234567890"
    assert (log.log.dropped, log.log.has_reached_its_bound) == ((10, 14), True)
    assert log.log.stream_bytes == [11, 3, 0]
    log.check()


@pytest.mark.parametrize("max_bytes", [1, 2, 7, 100, 4096, 4097, 64 * KIB])
def test_head_and_tail_of_any_size(opened: Any, max_bytes: int) -> None:
    source = random.Random(max_bytes)
    log = opened(max_bytes)
    while len(log.written) < max_bytes * 3 + 50:
        log.append(source.randbytes(source.randint(1, max(2, max_bytes // 5))), source.randint(0, 1))
        kept = log.log.output_bytes - (log.head[1] - log.head[0])
        assert kept <= max_bytes
    log.check()
    start, end = log.log.dropped
    assert start == max_bytes // 2
    assert log.log.output_bytes - end >= (max_bytes - start) * 7 // 8


def test_dropped_blocks_go_back_to_the_disk(opened: Any) -> None:
    log = opened(MIB)
    piece = bytes(range(256)) * 256
    for _ in range(320):
        log.append(piece)
    size, used = log.log.output_bytes, (log.path / "output").stat().st_blocks * 512
    assert size == 320 * len(piece)
    assert used <= MIB + 512 * KIB + BLOCK_BYTES
    for _ in range(20_000):
        log.append(b"tiny")  # records take more than bytes
    log.log._punch(1)
    assert log.log.index_bytes > 480_000
    log.check()


def test_a_full_disk_ends_a_log_that_keeps_the_first_bytes(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(1000, "discard_new")
    log.append(b"kept")
    refuse(monkeypatch, room_bytes=2)
    log.append(b"lost")
    monkeypatch.undo()
    log.append(b"too late")
    assert (log.path / "output").read_bytes() == b"kept"
    assert (log.log.dropped, log.log.has_reached_its_bound) == ((4, 16), False)
    log.check()


@pytest.mark.parametrize("overflow", ["discard_new", "keep_head_and_tail"])
def test_a_log_leaves_the_disk_its_reserve(tmp_path: Path, overflow: str) -> None:
    """The box has to write rows there, also those that forget this log."""
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    log = Log(directory, None, overflow, reserve_bytes=2**62)
    try:
        log.append(0, memoryview(b"x" * 5000), 0)
        log.append(0, memoryview(b"y" * 5000), 0)
        assert log.dropped == (0, 10_000)
        assert (tmp_path / "output").stat().st_blocks == 0
    finally:
        log.close()
        os.close(directory)


def test_a_disk_that_was_full_is_used_again(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the policy that wants the end of the output."""
    log = opened(1000)
    log.append(b"kept")
    refuse(monkeypatch, room_bytes=2)
    log.append(b"lost")
    log.append(b"this too")
    monkeypatch.undo()
    log.append(b"back")
    assert (log.path / "output").read_bytes() == b"kept" + bytes(12) + b"back"
    assert log.log.dropped == (4, 16)
    log.check()


def test_without_holes_the_bound_ends_the_log(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_holes(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(log_module, "punch_hole", refuse_holes)
    log = opened(MIB)
    for _ in range(100):
        log.append(bytes(64 * KIB))
    assert log.log.is_full
    assert log.log.output_bytes < 3 * MIB
    assert log.log.dropped == (MIB // 2, 100 * 64 * KIB)


def refuse(monkeypatch: pytest.MonkeyPatch, room_bytes: int) -> None:
    """Writes to the output stop short; the head of the index is on a block that exists."""
    pwrite, room = os.pwrite, room_bytes

    def full(fd: int, data: bytes, at: int) -> int:
        nonlocal room
        if at == 0 and len(data) == HOLE.size:
            return pwrite(fd, data, at)
        if room == 0:
            raise OSError(errno.ENOSPC, "full")
        count, room = min(room, len(data)), 0
        return pwrite(fd, data[:count], at)

    monkeypatch.setattr(os, "pwrite", full)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("overflow", ["discard_new", "keep_head_and_tail", "kill"])
def test_a_job_outlives_a_full_disk(keepers: Any, small_disk: Path, overflow: str) -> None:
    """It runs to its end at full speed; the log says what it lost, and the last status finds room."""
    directory = small_disk / "job"
    kept = keepers.run("head -c 5000000 /dev/zero; echo the end; exit 7", directory=directory, overflow=overflow)
    ended = kept.end()
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("exited", 7, "exit")
    assert ended["stdout_bytes"] == 5_000_008
    start, end = ended["dropped"]
    assert ended["output_truncated"]
    assert 0 < start < end <= 5_000_008
    if overflow == "keep_head_and_tail":
        assert ended["output_bytes"] == 5_000_008
        assert kept.output[:start] == bytes(start)
    else:
        assert (start, end) == (ended["output_bytes"], 5_000_008)


def test_no_room_for_a_job_is_an_error_of_its_start(keepers: Any, small_disk: Path) -> None:
    directory = small_disk / "job"
    directory.mkdir()
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2 * MIB))
    with (small_disk / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(512))
    kept = keepers.run("echo never", directory=directory)
    message = kept.next()
    assert (message["ended"]["failure"]["step"], message["ended"]["errno"]) == ("log", errno.ENOSPC)
    assert kept.next() is None
    assert list(directory.iterdir()) == []
