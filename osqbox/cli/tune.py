"""Settings of a process with thousands of connections."""

from __future__ import annotations

import gc
import resource
import sys
from contextlib import suppress

OPEN_FILES = 65536
SWITCH_INTERVAL_S = 0.0005
"""A busy thread keeps the interpreter for this long; the default of 5 ms is what a loop would wait."""


def tune_process() -> None:
    """Settings of the whole process, made only by the program: a host's pytest process keeps its own."""
    gc.set_threshold(100_000, 50, 100)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
