"""The shells' bench runs: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench_shells.py")


def test_a_short_run_prints_its_figures() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--quick"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    for figure in ("echo p99", "text: relay", "random bytes: relay", "KiB each", "stop with a stalled viewer"):
        assert figure in done.stdout
