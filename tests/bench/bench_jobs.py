"""Figures of the job runner beside yardsticks measured in the same run. Prints; never judges.

    python tests/bench/bench_jobs.py [--only latency,throughput,start,idle,short] [--lines 1000] [--followers 100]
        [--mib 50] [--starts 300] [--jobs 2000]

Everything is in one process but the keepers and the jobs. The yardsticks do the same without a keeper, a log or a
runner: a program's pipe read by trio, a file read by one plain loop, `trio.lowlevel.open_process`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from osqbox.jobs import open_jobs
from osqbox.jobs.library import LocalJobs
from osqbox.jobs.messages import CHUNK_BYTES, MIB, Chunk, JobBounds

CLOCK = """
import os, sys, time
for _ in range(int(sys.argv[1])):
    time.sleep(0.003)
    os.write(1, b"%020d\\n" % time.monotonic_ns())
"""


def quantiles_ms(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return 1000 * statistics.median(ordered), 1000 * ordered[len(ordered) * 99 // 100]


def shown(name: str, ours: list[float], yardstick: list[float], what: str) -> None:
    p50, p99 = quantiles_ms(ours)
    base50, base99 = quantiles_ms(yardstick)
    print(f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"    {what}: p50 {base50:.2f} ms, p99 {base99:.2f} ms: ratio {p50 / base50:.2f}, {p99 / base99:.2f}")


def rss_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def bench_latency(jobs: LocalJobs, options: argparse.Namespace) -> None:
    """The job writes the monotonic clock; the follower looks at it again."""
    command = [sys.executable, "-c", CLOCK, str(options.lines)]
    ours: list[float] = []
    job = await jobs.run(command)
    async with jobs.output(job.id) as events:
        async for event in events:
            if isinstance(event, Chunk):
                now = time.monotonic_ns()
                ours += [(now - int(line)) / 1e9 for line in event.data.split()]
    bare: list[float] = []
    async with trio.open_nursery() as nursery:
        process = await nursery.start(_piped, command)
        async with process.stdout:
            async for data in process.stdout:
                now = time.monotonic_ns()
                bare += [(now - int(line)) / 1e9 for line in data.split()]
    shown("write to follower", ours, bare, "the program's own pipe")


async def _piped(command: list[str], task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED) -> None:
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    task_status.started(process)
    await process.wait()


async def bench_throughput(jobs: LocalJobs, options: argparse.Namespace) -> None:
    size = options.mib * MIB
    job = await jobs.run(["head", "-c", str(size), "/dev/urandom"])
    before, peak, digests = rss_mib(), 0.0, set()

    async def follow() -> None:
        nonlocal peak
        digest = hashlib.sha256()
        async with jobs.output(job.id) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    digest.update(event.data)
        digests.add(digest.digest())
        peak = max(peak, rss_mib())

    begun = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(options.followers):
            nursery.start_soon(follow)
    live_s = time.perf_counter() - begun
    same, digests = len(digests), set()

    async def count() -> None:
        async with jobs.output(job.id) as events:
            async for _ in events:
                pass

    begun = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(options.followers):
            nursery.start_soon(count)
    late_s = time.perf_counter() - begun
    path = options.directory / "jobs" / job.id / "output"
    begun = time.perf_counter()
    for _ in range(options.followers):
        fd = os.open(path, os.O_RDONLY)
        offset = 0
        while data := os.pread(fd, CHUNK_BYTES, offset):
            offset += len(data)
        os.close(fd)
    bare_s = time.perf_counter() - begun
    total = options.followers * options.mib
    print(f"{options.followers} followers x {options.mib} MiB while it is written, with SHA-256 of each: "
          f"{total / live_s:,.0f} MiB/s, {same} different digest(s), RSS +{peak - before:.1f} MiB")  # fmt: skip
    print(f"    attached afterwards, no SHA-256: {total / late_s:,.0f} MiB/s; "
          f"one plain loop of pread: {total / bare_s:,.0f} MiB/s: ratio {bare_s / late_s:.2f}")  # fmt: skip


async def bench_start(jobs: LocalJobs, options: argparse.Namespace) -> None:
    await jobs.wait((await jobs.run(["true"])).id)  # the zygote is there
    ours, bare = [], []
    for _ in range(options.starts):
        begun = time.perf_counter()
        job = await jobs.run(["true"])
        ours.append(time.perf_counter() - begun)
        await jobs.wait(job.id)
        begun = time.perf_counter()
        process = await trio.lowlevel.open_process(["true"])
        bare.append(time.perf_counter() - begun)
        await process.wait()
    shown("run to running, two commits to disk included", ours, bare, "open_process alone")
    begun, ids = time.perf_counter(), []

    async def start() -> None:
        ids.append((await jobs.run(["sleep", "120"])).id)

    async with trio.open_nursery() as nursery:
        for _ in range(options.starts):
            nursery.start_soon(start)
    elapsed = time.perf_counter() - begun
    print(f"    {options.starts} starts at once: all run after {elapsed:.2f} s, {options.starts / elapsed:,.0f}/s")
    begun = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for job_id in ids:
            nursery.start_soon(_stop, jobs, job_id)
    print(f"    {options.starts} stops at once: all ended after {time.perf_counter() - begun:.2f} s")


async def _stop(jobs: LocalJobs, job_id: str) -> None:
    await jobs.stop(job_id)
    await jobs.wait(job_id)


async def bench_idle(jobs: LocalJobs, _options: argparse.Namespace) -> None:
    job = await jobs.run(["sleep", "120"])

    async def follow() -> None:
        async with jobs.output(job.id) as events:
            async for _ in events:
                pass

    alone = await _cpu_share(3.0)
    before = rss_mib()
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(follow)
        await trio.sleep(0.5)
        grown = rss_mib() - before
        share = await _cpu_share(3.0)
        nursery.cancel_scope.cancel()
    print(f"1,000 followers of a silent job: {100 * share:.2f} % of a core (without them {100 * alone:.2f} %), "
          f"{grown * 1024 / 1000:.1f} KiB each")  # fmt: skip
    await _stop(jobs, job.id)


async def _cpu_share(seconds: float) -> float:
    before = time.process_time()
    await trio.sleep(seconds)
    return (time.process_time() - before) / seconds


async def bench_short(jobs: LocalJobs, options: argparse.Namespace) -> None:
    wrong, begun = 0, time.perf_counter()

    async def several(count: int) -> None:
        nonlocal wrong
        for _ in range(count):
            job = await jobs.run(["sh", "-c", "printf x; exit 3"])
            async with jobs.output(job.id) as events:
                data = b"".join([event.data async for event in events if isinstance(event, Chunk)])
            wrong += (data, (await jobs.wait(job.id)).exit_code) != (b"x", 3)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(several, options.jobs // 20)
    elapsed = time.perf_counter() - begun
    print(f"{options.jobs:,} x 'printf x; exit 3': {wrong} wrong, {options.jobs / elapsed:,.0f} jobs/s")


BENCHES: dict[str, Callable[[LocalJobs, argparse.Namespace], Awaitable[None]]] = {
    "latency": bench_latency,
    "throughput": bench_throughput,
    "start": bench_start,
    "idle": bench_idle,
    "short": bench_short,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES), help="which, separated by commas")
    for name, default in (("lines", 1000), ("followers", 100), ("mib", 50), ("starts", 300), ("jobs", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    async def run(directory: str) -> None:
        for name in options.only.split(","):
            options.directory = Path(directory) / name
            async with open_jobs(options.directory, JobBounds(kept_jobs=20_000), stop_jobs=True) as jobs:
                await BENCHES[name](jobs, options)

    with tempfile.TemporaryDirectory() as directory:
        trio.run(run, directory)


if __name__ == "__main__":
    main()
