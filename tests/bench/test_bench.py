"""The benches run: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("bench_box.py")


@pytest.mark.parametrize(
    ("name", "says"),
    [("reads", "ratio"), ("logs", "lines/s"), ("live", "p50")],
)
def test_a_short_run_prints_its_figures(name: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--seconds", "0.2", "--only", name], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
