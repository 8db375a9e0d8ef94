"""The Linux calls that Python's standard library does not have."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of linux/prctl.h and linux/falloc.h.
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 15, 36, 38
KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02

if not sys.platform.startswith("linux"):
    raise ImportError(f"the job runner needs Linux (prctl, subreaper, /proc), got {sys.platform}")

LIBC = ctypes.CDLL(None, use_errno=True)
PRCTL = LIBC.prctl
PRCTL.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
FALLOCATE = getattr(LIBC, "fallocate64", LIBC.fallocate)
FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    _check(PRCTL(option, value, 0, 0, 0))


def name_process(name: bytes) -> None:
    """What ``ps -o comm`` shows; at most 15 bytes."""
    text = ctypes.create_string_buffer(name[:15])
    prctl(PR_SET_NAME, ctypes.addressof(text))


def punch_hole(fd: int, start: int, end: int) -> None:
    """Give the blocks from ``start`` to ``end`` back to the disk; they read as zeros. Raises OSError."""
    _check(FALLOCATE(fd, KEEP_SIZE_AND_PUNCH_HOLE, start, end - start))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
