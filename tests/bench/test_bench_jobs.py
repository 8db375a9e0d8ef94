"""The bench runs: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("bench_jobs.py")


@pytest.mark.parametrize(
    ("name", "says"),
    [("latency", "ratio"), ("throughput", "1 different digest"), ("start", "p50"), ("short", " 0 wrong")],
)
def test_a_short_run_prints_its_figures(name: str, says: str) -> None:
    few = ["--lines", "20", "--followers", "3", "--mib", "2", "--starts", "5", "--jobs", "20"]
    done = subprocess.run(
        [sys.executable, str(BENCH), "--only", name, *few], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
