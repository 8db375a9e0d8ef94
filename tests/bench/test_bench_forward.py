"""The bench of forwarding runs: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench_forward.py")


def test_a_short_run_prints_its_figures() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--records", "3000"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    for figure in ("plain copy to a file", "file:/out", "stdout:", "http://127.0.0.1:PORT/in", "opensearch+http"):
        assert figure in done.stdout
