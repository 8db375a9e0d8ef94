"""The swarm's bench runs: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench_swarm.py")


def test_a_short_run_prints_its_figures() -> None:
    words = ["--agents", "10", "--spawn-rate", "100", "--hold", "2.5"]
    done = subprocess.run([sys.executable, str(BENCH), *words], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "'answered': 10" in done.stdout
    assert "memory per agent" in done.stdout
