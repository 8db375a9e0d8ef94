"""Files, stdout and `_bulk`, each against the real thing or a strict stand-in."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.clock import SystemClock
from osqbox.forward import delivery
from osqbox.forward.http import Connection
from osqbox.forward.messages import BatchRefused, Record, SinkDown, SinkSpec, SourceName, parse_sink
from osqbox.forward.sinks import BulkSink, FileSink, StdoutSink, retry_after_s

from ._bulk import bulk_server
from ._rig import all_sent, forwarding, log_lines, open_store, until


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(25):
            await test()

    trio.run(limited)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("osqbox.forward.forwarding.FINISH_S", 20)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 0.1)


def records(count: int, start: int = 0, *, size: int = 0) -> list[Record]:
    return [
        Record(f"o:logs:{n}", SourceName.LOGS, "", n, json.dumps({"n": n, "x": "x" * size}).encode())
        for n in range(start, start + count)
    ]


def spec(path: Path, options: str = "") -> SinkSpec:
    return parse_sink(f"file:{path}{options}", directory=Path("/"))


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_bytes().splitlines()]


def send(sink: Any, batch: list[Record]) -> Any:
    return trio.run(sink.send, batch)


# file


def test_a_file_grows_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "out"
    sink = FileSink(spec(file))
    send(sink, records(3))
    send(sink, records(2, 3))
    trio.run(sink.aclose)
    assert numbers(file) == [0, 1, 2, 3, 4]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(("keep", "kept"), [(2, ["out", "out.1", "out.2"]), (0, ["out"])])
def test_rotation_by_size(tmp_path: Path, keep: int, kept: list[str]) -> None:
    """The newest is PATH; none is larger than the bound; what is kept is without a gap."""
    file = tmp_path / "out"
    sink = FileSink(spec(file, f"?rotate_mib=1&keep={keep}"))
    for batch in range(12):
        send(sink, records(100, batch * 100, size=4000))
    trio.run(sink.aclose)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert all(path.stat().st_size <= 1024 * 1024 for path in tmp_path.iterdir())
    all_numbers = [n for name in reversed(kept) for n in numbers(tmp_path / name)]
    assert all_numbers == list(range(all_numbers[0], 1200))


def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    """A crash within a write: its record comes again, whole."""
    file = tmp_path / "out"
    file.write_bytes(b'{"n":0}\n{"n":1,"x":"' + b"y" * 3_000_000)
    sink = FileSink(spec(file))
    send(sink, records(2, 1))
    trio.run(sink.aclose)
    assert numbers(file) == [0, 1, 2]


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    """As logrotate does."""
    file = tmp_path / "out"
    sink = FileSink(spec(file))
    send(sink, records(1))
    file.rename(tmp_path / "moved")
    send(sink, records(1, 1))
    file.unlink()
    send(sink, records(1, 2))
    trio.run(sink.aclose)
    assert (numbers(tmp_path / "moved"), numbers(file)) == ([0], [2])


def test_a_full_disk_is_a_failure_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out"
    sink = FileSink(spec(file))
    send(sink, records(1))

    def full(fd: int, data: bytes) -> None:
        os.write(fd, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("osqbox.forward.sinks.write_all", full)
        with pytest.raises(SinkDown, match="No space left"):
            send(sink, records(1, 1))
    assert numbers(file) == [0]
    send(sink, records(1, 1))
    trio.run(sink.aclose)
    assert numbers(file) == [0, 1]


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SinkDown, match="Is a directory"):
        send(FileSink(spec(tmp_path / "out")), records(1))


def test_a_fifo_would_hold_up_the_box(tmp_path: Path) -> None:
    """Only regular files: a write to anything else may wait for ever."""
    os.mkfifo(tmp_path / "out")
    with pytest.raises(SinkDown, match="no regular file"):
        send(FileSink(spec(tmp_path / "out")), records(1))


# stdout


def test_stdout_waits_until_the_box_has_spoken_and_for_its_reader() -> None:
    """Nothing before the ready line; more than a pipe holds arrives whole."""

    async def test() -> None:
        announced = trio.Event()
        read_fd, write_fd = os.pipe()
        batch = records(1000, size=500)
        got = bytearray()

        def read_all() -> None:
            while data := os.read(read_fd, 65536):
                got.extend(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_all)
            try:
                sink = StdoutSink(announced, write_fd)
                with trio.move_on_after(0.05) as waited:
                    await sink.send(batch)
                assert (waited.cancelled_caught, bytes(got)) == (True, b"")
                announced.set()
                assert await sink.send(batch) == []
            finally:
                os.close(write_fd)
        os.close(read_fd)
        assert [json.loads(line)["n"] for line in bytes(got).splitlines()] == list(range(1000))

    run(test)


def test_a_stdout_nobody_reads_is_a_failure() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    announced = trio.Event()
    announced.set()
    with pytest.raises(SinkDown, match="Broken pipe"):
        send(StdoutSink(announced, write_fd), records(1))
    os.close(write_fd)


# OpenSearch


def test_bulk_stores_once(tmp_path: Path) -> None:
    """By the records' ids: a batch that comes again is stored already."""

    async def test() -> None:
        with bulk_server() as server:
            sink = BulkSink(Connection(server.url, None, None), "box", SystemClock())
            for _ in range(2):
                assert await sink.send(records(3)) == []
            await sink.aclose()
            assert sorted(server.documents) == [("box-logs", f"o:logs:{n}") for n in range(3)]
            assert server.templates == ["box-forward"]

    run(test)


def test_bulk_refusals_are_of_single_records(tmp_path: Path) -> None:
    """A document that cannot be mapped is set aside; the others are stored, in the same call."""

    async def test() -> None:
        with bulk_server(refuses=lambda document: document.get("line", {}).get("n") == 1) as server:
            async with open_store(tmp_path) as store, forwarding(store, f"opensearch+{server.url}/box") as opened:
                await log_lines(store, [{"n": n} for n in range(4)])
                only = await all_sent(opened, 4)
                assert (only.forwarded, only.set_aside, only.up) == (3, 1, True)
                assert server.bulks == 1

    run(test)


def test_bulk_items_that_are_too_many_come_again(tmp_path: Path) -> None:
    """429 of single items: the batch comes again, and what is stored is not stored twice."""

    async def test() -> None:
        with bulk_server(busy_items=3) as server:
            async with open_store(tmp_path) as store, forwarding(store, f"opensearch+{server.url}/box") as opened:
                await log_lines(store, [{"n": n} for n in range(4)])
                only = await all_sent(opened, 4)
                assert (only.set_aside, only.up) == (0, True)
                assert "HTTP 429" in only.last_error
            assert len(server.documents) == 4

    run(test)


def test_bulk_that_refuses_every_record_is_set_up_wrongly(tmp_path: Path) -> None:
    """An index with another mapping: nothing is set aside until something was taken."""

    async def test() -> None:
        wrong = [True]
        with bulk_server(refuses=lambda _: wrong[0]) as server:
            async with open_store(tmp_path) as store, forwarding(store, f"opensearch+{server.url}/box") as opened:
                await log_lines(store, [{"n": n} for n in range(200)])
                await until(lambda: "logs: refuses every record" in opened.statistics()[0].last_error)
                wrong[0] = False
                only = await all_sent(opened, 200)
                assert (only.forwarded, only.set_aside) == (200, 0)

    run(test)


@pytest.mark.parametrize("body", [b"<html>", b'{"errors":false,"items":[]}', b"[]"])
def test_an_answer_that_is_not_of_bulk(body: bytes) -> None:
    """Nothing is taken for stored that was not said to be."""

    async def test() -> None:
        with bulk_server(answer=body) as server:
            sink = BulkSink(Connection(server.url, None, None), "box", SystemClock())
            with pytest.raises(SinkDown, match="expected"):
                await sink.send(records(1))
            await sink.aclose()

    run(test)


def test_a_bulk_that_is_too_large() -> None:
    async def test() -> None:
        with bulk_server(max_bytes=100) as server:
            sink = BulkSink(Connection(server.url, None, None), "box", SystemClock())
            with pytest.raises(BatchRefused) as refused:
                await sink.send(records(10))
            assert refused.value.is_too_large
            await sink.aclose()

    run(test)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("0", 0), ("Thu, 01 Jan 1970 00:00:20 GMT", 10), ("Thu, 01 Jan 1970 00:00:01 GMT", 0), ("soon", None),
     ("-1", None), ("", None), ("99999999999", 3600), ("1.5", None)],
)  # fmt: skip
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, 10.0) == seconds
