"""Keeps one OpenSearch running while anybody holds a shared lock on a file, then ends it and removes its data.

Run as a program: ``_supervise.py LOCK HOME PORT JAVA...``. The kernel drops the locks of a test process that was
killed, and ends OpenSearch should this program be killed, so nothing is left behind in any case.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 5.0
"""Time for the first user to take the lock."""
LOOK_S = 0.25
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def is_used(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def main(lock: Path, home: Path, java: list[str]) -> None:
    with (home / "output.txt").open("wb") as output:
        server = subprocess.Popen(
            java,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this program has one thread
        )
    (home / "pid").write_text(str(server.pid))
    began = time.monotonic()
    try:
        while server.poll() is None and (is_used(lock) or time.monotonic() - began < GRACE_S):
            time.sleep(LOOK_S)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
