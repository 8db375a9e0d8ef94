"""The output of jobs as records: each once, in its order, while they run and after their end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from osqbox.forward import delivery
from osqbox.forward.messages import SourceName
from osqbox.jobs.keeper.wire import HOLE, RECORD, STREAMS
from osqbox.jobs.output import pieces
from osqbox.store import Store, Tx

from ._rig import all_sent, collector, forwarding, open_store, until

JOBS = (SourceName.JOBS,)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(25):
            await test()

    trio.run(limited)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("osqbox.forward.forwarding.FINISH_S", 20)
    monkeypatch.setattr(delivery, "LOOK_S", 0.05)


class Log:
    """A job's log as its keeper writes it."""

    def __init__(self, jobs: Path, job: str) -> None:
        self.directory = jobs / job
        self.directory.mkdir(parents=True)
        self.size = 0
        (self.directory / "output").touch()
        (self.directory / "index").write_bytes(HOLE.pack(0, 0, 0, 0))

    def write(self, data: bytes, stream: str = "stdout", at_ns: int = 10**18) -> None:
        with (self.directory / "output").open("ab") as output:
            output.write(data)
        with (self.directory / "index").open("ab") as index:
            index.write(RECORD.pack(self.size, len(data), STREAMS.index(stream), at_ns))
        self.size += len(data)

    def drop(self, start: int, end: int, first: int, last: int) -> None:
        """A hole over these bytes, which are these records."""
        with (self.directory / "index").open("r+b") as index:
            index.write(HOLE.pack(start, end, HOLE.size + first * RECORD.size, HOLE.size + last * RECORD.size))


async def start(store: Store, job: str) -> None:
    def write(tx: Tx) -> None:
        tx.db.execute(
            "INSERT INTO jobs(id, owner, authority, tenant, run_as, command, args, labels, output_mode, open_stdin, "
            "link_output, digest, state, created_at) VALUES (?, 'acme/ann', 'a', 'acme', 'u', 'c', '', '{}', 'split', "
            "0, 0, x'00', 'running', ?)",
            (job, tx.now),
        )
        tx.emit("job_started", tenant="acme", job=job)

    await store.write(write)


async def end(store: Store, job: str) -> None:
    def write(tx: Tx) -> None:
        tx.db.execute("UPDATE jobs SET state = 'exited', ended_at = ? WHERE id = ?", (tx.now, job))
        tx.emit("job_ended", tenant="acme", job=job)

    await store.write(write)


def reader(jobs: Path) -> Callable[[str, int, int], tuple[list[tuple[int, int, str, float, bytes]], int, int, int]]:
    return lambda job, position, size_bytes: pieces(jobs / job, position, size_bytes)


def test_output_while_a_job_runs_and_after_its_end(tmp_path: Path) -> None:
    """As it is written; binary output as base64; nothing twice over a restart."""

    async def test() -> None:
        log = Log(tmp_path / "jobs", "j1")
        with collector() as server:
            opening = partial(forwarding, sources=JOBS, read_output=reader(tmp_path / "jobs"))
            async with open_store(tmp_path) as store:
                await start(store, "j1")
                async with opening(store, server.url) as opened:
                    log.write(b"one\n")
                    await all_sent(opened, 1)
                    log.write(b"\xff\x00", "stderr")
                    await all_sent(opened, 2)
                log.write(b"three\n")
                async with opening(store, server.url) as opened:
                    await all_sent(opened, 3)
                    await end(store, "j1")
                    only = await all_sent(opened, 3)
                    assert (only.up, only.dropped) == (True, 0)
                    rows = "SELECT position, ended FROM forward_jobs"
                    await until(lambda: store.peek(lambda db: db.execute(rows).fetchall()) == [(3, 1)])
        first, second, third = server.taken
        assert (first["text"], first["stream"], first["offset"], first["job"], first["owner"]) == (
            "one\n", "stdout", 0, "j1", "acme/ann",
        )  # fmt: skip
        assert (second["base64"], second["stream"], second["offset"]) == ("/wA=", "stderr", 4)
        assert third["text"] == "three\n"
        assert [each["id"].split(":", 1)[1] for each in server.taken] == ["jobs:j1:0", "jobs:j1:1", "jobs:j1:2"]

    run(test)


def test_many_jobs_share_a_sink(tmp_path: Path) -> None:
    """A loud one does not keep the others back, and everything of everyone arrives in its order."""

    async def test() -> None:
        logs = [Log(tmp_path / "jobs", f"j{number}") for number in range(20)]
        for number, log in enumerate(logs):
            for piece in range(2000 if number == 0 else 5):
                log.write(b"x" * 1000 + b"%d\n" % piece)
        async with open_store(tmp_path) as store:
            for number in range(20):
                await start(store, f"j{number}")
                await end(store, f"j{number}")
            with collector() as server:
                read = reader(tmp_path / "jobs")
                async with forwarding(store, server.url, sources=JOBS, read_output=read) as opened:
                    await all_sent(opened, 2095)
                for number in range(20):
                    mine = [each["text"] for each in server.taken if each["job"] == f"j{number}"]
                    assert [int(text.lstrip("x")) for text in mine] == list(range(2000 if number == 0 else 5))
                others = [n for n, each in enumerate(server.taken) if each["job"] != "j0"]
                assert max(others) < 2000

    run(test)


def test_a_hole_is_counted(tmp_path: Path) -> None:
    """What a job's own bound took out of its log cannot be forwarded."""

    async def test() -> None:
        log = Log(tmp_path / "jobs", "j1")
        for piece in range(600):
            log.write(b"%03d\n" % piece)
        log.drop(40, 2202, 10, 550)  # 550 is half inside
        async with open_store(tmp_path) as store:
            await start(store, "j1")
            await end(store, "j1")
            with collector() as server:
                read = reader(tmp_path / "jobs")
                async with forwarding(store, server.url, sources=JOBS, read_output=read) as opened:
                    await all_sent(opened, 59)
                    only = await until(lambda: next((s for s in opened.statistics() if s.dropped), None))
                assert only.dropped == 541
                assert [int(each["text"]) for each in server.taken] == [*range(10), *range(551, 600)]

    run(test)


def test_jobs_without_a_log_and_removed_ones(tmp_path: Path) -> None:
    """A job that never wrote is through; one that retention removed with output to come is counted."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            read = reader(tmp_path / "jobs")
            await start(store, "silent")
            await end(store, "silent")
            Log(tmp_path / "jobs", "late").write(b"x")
            await start(store, "late")
            async with forwarding(store, "http://127.0.0.1:9/", sources=JOBS, read_output=read) as opened:
                await until(lambda: not opened.statistics()[0].up)
                await store.write(lambda tx: tx.db.execute("DELETE FROM jobs WHERE id = 'late'"))
                await end(store, "late")
                await until(lambda: opened.statistics()[0].dropped == 1)
                rows = "SELECT job, ended FROM forward_jobs"
                await until(lambda: store.peek(lambda db: db.execute(rows).fetchall()) == [("silent", 1)])

    run(test)
