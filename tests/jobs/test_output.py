"""Reading a log: whatever the keeper's own writer wrote comes out byte for byte, or is reported as dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.keeper.log import Log
from osqbox.jobs.keeper.wire import HOLE, RECORD
from osqbox.jobs.messages import CHUNK_BYTES, KIB, MIB, Chunk, Stream, Truncated
from osqbox.jobs.output import SKIPPED, LogFiles, Reader, measure

T0_NS = 1_700_000_000_000_000_000
OUT, ERR, MIXED = range(3)
Events = list[Chunk | Truncated]


@contextmanager
def written(path: Path, max_bytes: int | None = None, overflow: str = "keep_head_and_tail") -> Iterator[Log]:
    path.mkdir(exist_ok=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    log = Log(directory, max_bytes, overflow)
    try:
        yield log
    finally:
        log.close()
        os.close(directory)


@contextmanager
def opened(path: Path) -> Iterator[LogFiles]:
    files = LogFiles(path)
    try:
        yield files
    finally:
        files.close()


def append(log: Log, data: bytes, stream: int = OUT, at_s: float = 0.0) -> None:
    log.append(stream, memoryview(data), T0_NS + round(at_s * 1e9))


def read_on(reader: Reader) -> Events:
    """Everything there is now."""
    events: Events = []
    while (event := reader.step(nowait=False)) is not None:
        if event is not SKIPPED:
            assert isinstance(event, Chunk | Truncated)
            events.append(event)
    return events


def read_all(path: Path, log: Log, offset: int = 0, streams: frozenset[Stream] = frozenset()) -> Events:
    with opened(path) as files:
        reader = Reader(files, offset, streams)
        events = read_on(reader)
        rest = reader.rest(log.output_bytes)
        return [*events, rest] if rest else events


def data_of(events: Events) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Chunk))


def assert_contiguous(events: Events, start: int, end: int) -> None:
    """No gap, no overlap, from ``start`` to ``end``."""
    place = start
    for event in events:
        first, last = (
            (event.offset, event.offset + len(event.data)) if isinstance(event, Chunk) else (event.start, event.end)
        )
        assert first == place
        assert last > first
        place = last
    assert place == end


def test_an_empty_log_has_nothing(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        assert read_all(tmp_path / "j", log) == []


def test_pieces_written_at_once_are_one_chunk_and_later_ones_another(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"a", at_s=0)
        append(log, b"b", at_s=0.009)
        append(log, b"c", at_s=0.02)
        append(log, b"d", ERR, at_s=0.02)
        events = read_all(tmp_path / "j", log)
    at = T0_NS / 1e9
    assert events == [
        Chunk(Stream.STDOUT, 0, b"ab", at),
        Chunk(Stream.STDOUT, 2, b"c", at + 0.02),
        Chunk(Stream.STDERR, 3, b"d", at + 0.02),
    ]


def test_a_chunk_is_never_larger_than_promised(tmp_path: Path) -> None:
    data = os.urandom(300 * KIB)
    with written(tmp_path / "j") as log:
        append(log, data[: 256 * KIB])
        append(log, data[256 * KIB :])
        events = read_all(tmp_path / "j", log)
    assert data_of(events) == data
    assert max(len(event.data) for event in events if isinstance(event, Chunk)) == CHUNK_BYTES


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.integers(0, 1), st.integers(0, 30)), max_size=40),
    offset=st.integers(0, 2100),
)
def test_from_any_offset_the_rest_is_exact(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bytes, int, int]], offset: int
) -> None:
    path = tmp_path_factory.mktemp("job")
    whole = b"".join(data for data, _, _ in pieces)
    with written(path) as log:
        for index, (data, stream, ms) in enumerate(pieces):
            append(log, data, stream, at_s=index * ms / 1000)
        events = read_all(path, log, min(offset, len(whole)))
        assert data_of(events) == whole[min(offset, len(whole)) :]
        assert_contiguous(events, min(offset, len(whole)), len(whole))
        for stream in (OUT, ERR):
            only = read_all(path, log, 0, frozenset((Stream(("stdout", "stderr")[stream]),)))
            assert data_of(only) == b"".join(data for data, of, _ in pieces if of == stream)


def test_a_reader_at_the_end_goes_on_when_more_is_written(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log, opened(tmp_path / "j") as files:
        reader = Reader(files, 0)
        assert read_on(reader) == []
        for n in range(600):  # more than a batch of records
            append(log, b"%04d" % n, at_s=n)
            assert data_of(read_on(reader)) == b"%04d" % n
        assert reader.rest(2400) is None


def test_an_offset_that_is_not_written_yet_waits(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log, opened(tmp_path / "j") as files:
        append(log, b"abc")
        reader = Reader(files, 5)
        assert read_on(reader) == []
        append(log, b"defgh", at_s=1)
        assert read_on(reader) == [Chunk(Stream.STDOUT, 5, b"fgh", T0_NS / 1e9 + 1)]


def test_another_stream_alone_makes_no_chunk_and_keeps_the_place(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log, opened(tmp_path / "j") as files:
        for _ in range(1000):
            append(log, b"noise", ERR)
        append(log, b"out", OUT)
        reader = Reader(files, 0, frozenset((Stream.STDOUT,)))
        assert [(event.offset, event.data) for event in read_on(reader) if isinstance(event, Chunk)] == [(5000, b"out")]
        assert reader.rest(5003) is None


# what was dropped


def fill(log: Log, size_bytes: int, piece_bytes: int = 1000) -> bytes:
    data = os.urandom(size_bytes)
    for start in range(0, size_bytes, piece_bytes):
        append(log, data[start : start + piece_bytes], at_s=start / 1e5)
    return data


@pytest.mark.parametrize("offset", [0, 1, 49_999, 50_000, 50_001, 400_000, 899_999, 999_999, 1_000_000])
def test_head_and_tail_are_exact_and_the_hole_is_told(tmp_path: Path, offset: int) -> None:
    with written(tmp_path / "j", 100_000) as log:
        data = fill(log, 1_000_000)
        events = read_all(tmp_path / "j", log, offset)
        assert log.dropped is not None
    assert_contiguous(events, offset, 1_000_000)
    start, end = log.dropped
    assert data_of(events) == data[offset : max(start, offset)] + data[max(end, offset) :]
    assert [event for event in events if isinstance(event, Truncated)] == (
        [Truncated(max(offset, start), end)] if offset < end else []
    )
    assert start == 50_000
    assert 1_000_000 - end <= 50_000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 60), max_size=30), max_bytes=st.integers(1, 100), offset=st.integers(0, 1000))
def test_head_and_tail_are_exact_however_small_the_bound(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_bytes: int, offset: int
) -> None:
    """Also where one piece begins in the head and ends in the tail."""
    path, whole = tmp_path_factory.mktemp("job"), b""
    with written(path, max_bytes) as log, opened(path) as files:
        begun_early = Reader(files, 0)
        for size in sizes:
            whole += fill(log, size)
            event = begun_early.step(nowait=False)
            if isinstance(event, Chunk):
                assert event.data == whole[event.offset : event.offset + len(event.data)]
        at = min(offset, len(whole))
        events, later = read_all(path, log, at), read_on(begun_early)
        start, end = log.dropped or (at, at)
        begun_early.rest(len(whole))
        assert begun_early.offset == len(whole)
    assert all(whole[each.offset :].startswith(each.data) for each in later if isinstance(each, Chunk))
    assert_contiguous(events, at, len(whole))
    assert data_of(events) == whole[at : max(start, at)] + whole[max(end, at) :]


def test_a_reader_that_is_passed_by_the_hole_is_told_and_goes_on(tmp_path: Path) -> None:
    """Nothing that was dropped is ever handed out as data."""
    with written(tmp_path / "j", 100_000) as log, opened(tmp_path / "j") as files:
        reader, events, whole = Reader(files, 0), [], b""
        for step in range(40):
            whole += fill(log, 37_000)
            steps = [reader.step(nowait=False) for _ in range(step % 4)]  # too slow to keep up
            events += [event for event in steps if isinstance(event, Chunk | Truncated)]
        events += read_on(reader)
    assert_contiguous(events, 0, len(whole))
    for event in events:
        if isinstance(event, Chunk):
            assert event.data == whole[event.offset : event.offset + len(event.data)]
    assert any(isinstance(event, Truncated) for event in events)


def test_blocks_of_the_hole_are_given_back(tmp_path: Path) -> None:
    with written(tmp_path / "j", 1 * MIB) as log:
        fill(log, 8 * MIB, 64 * KIB)
        assert (tmp_path / "j" / "output").stat().st_blocks * 512 < 2 * MIB


def test_discarding_new_bytes_keeps_the_first_and_tells_how_many_went(tmp_path: Path) -> None:
    with written(tmp_path / "j", 10_000, "discard_new") as log:
        data = fill(log, 25_000)
        events = read_all(tmp_path / "j", log)
    assert data_of(events) == data[:10_000]
    assert events[-1] == Truncated(10_000, 25_000)


def test_a_disk_that_is_full_ends_the_log_visibly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail is given up with the middle: what can be read is right, what cannot is told."""
    with written(tmp_path / "j", 100_000) as log:
        data = fill(log, 400_000)

        def full(*_args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("osqbox.jobs.keeper.log._write_all", full)
            append(log, b"lost" * 100)
        events = read_all(tmp_path / "j", log)
    assert data_of(events) == data[:50_000]
    assert_contiguous(events, 0, 400_400)


# what must not be


def refused(path: Path, output_bytes: int) -> JobError:
    def read(files: LogFiles) -> None:
        reader = Reader(files, 0)
        read_on(reader)
        reader.rest(output_bytes)

    with opened(path) as files, pytest.raises(JobError) as caught:
        read(files)
    assert caught.value.code is Code.DATA_LOSS
    return caught.value


def test_bytes_that_are_missing_are_data_loss(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"x" * 1000)
    os.truncate(tmp_path / "j" / "output", 0)
    refused(tmp_path / "j", 1000)


def test_an_index_that_lost_its_end_is_data_loss(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"x" * 1000)
        append(log, b"y" * 1000, at_s=1)
    os.truncate(tmp_path / "j" / "index", HOLE.size + RECORD.size + 5)
    assert "expected 2000 bytes, got 1000" in str(refused(tmp_path / "j", 2000))


def test_an_index_that_jumps_is_data_loss(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"x" * 10)
    with (tmp_path / "j" / "index").open("r+b") as file:
        file.seek(HOLE.size)
        file.write(RECORD.pack(5, 10, OUT, T0_NS))
    refused(tmp_path / "j", 15)


def test_an_index_without_its_head_is_data_loss(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"x")
    os.truncate(tmp_path / "j" / "index", 3)
    refused(tmp_path / "j", 1)


def test_random_bytes_for_an_index_raise_nothing_else(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"x" * 1000)
    for n in range(50):
        (tmp_path / "j" / "index").write_bytes(os.urandom(200 + n))
        with opened(tmp_path / "j") as files:
            reader = Reader(files, n)
            with suppress(JobError):
                for _ in range(100):
                    if reader.step(nowait=False) is None:
                        break


def test_a_cold_file_is_not_waited_for(tmp_path: Path) -> None:
    """``nowait`` never blocks on the disk: the first look goes to a thread, and nothing has moved by then."""
    with written(tmp_path / "j") as log, opened(tmp_path / "j") as files:
        append(log, b"abc")
        reader = Reader(files, 0)
        with pytest.raises(BlockingIOError):
            reader.step(nowait=True)
        assert isinstance(reader.step(nowait=False), Chunk)


def test_the_measure_of_a_log_is_what_it_holds(tmp_path: Path) -> None:
    with written(tmp_path / "j") as log:
        append(log, b"abc", OUT)
        append(log, b"de", ERR)
    assert measure(tmp_path / "j") == (5, 3, 2, False)
    assert measure(tmp_path / "none") == (0, 0, 0, False)
