"""The bench of commands runs: short, and judged by nobody's clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench_comms.py")


def test_a_short_run_prints_its_figures() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--quick"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    for figure in ("in process, 50 idle", "queued commands over one stream", "until it has it", "each idle stream"):
        assert figure in done.stdout
    assert "TLS, wakes for each publication: 1.00" in done.stdout
