"""What is known about a job, and its file: replaced as a whole, so that a reader never sees half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .wire import encode

ENDED = ("exited", "signaled", "failed_to_start", "lost")
RESERVE_BYTES = 4096
"""Kept for the last status, which must find room on a full disk."""


class Status:
    """The fields of the status object in this package's docstring, under the same names."""

    __slots__ = (
        "cgroups", "containment", "core_dumped", "dropped", "ended_at", "enforced", "errno", "exit_code", "failure",
        "id", "index_bytes", "leftover_processes", "output_bytes", "output_drained", "output_truncated", "pid",
        "reason", "signal", "started_at", "state", "stderr_bytes", "stdout_bytes", "stopped_by", "usage",
    )  # fmt: skip

    def __init__(self, job_id: str) -> None:
        self.id = job_id
        self.state = "pending"
        self.pid: int | None = None
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.core_dumped = False
        self.errno: int | None = None
        self.failure: dict[str, object] | None = None
        self.reason: str | None = None
        self.stopped_by: str | None = None
        self.output_bytes = self.index_bytes = self.stdout_bytes = self.stderr_bytes = 0
        self.output_truncated = False
        self.dropped: tuple[int, int] | None = None
        self.output_drained = True
        self.usage: dict[str, float] = {"user_s": 0.0, "system_s": 0.0, "max_rss_bytes": 0}
        self.containment: str | None = None
        self.enforced: list[str] = []
        self.leftover_processes = 0
        self.cgroups: list[str] = []

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def facts(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


class StatusFile:
    """``status.json`` in a job directory. Making one raises OSError."""

    __slots__ = ("_directory",)

    def __init__(self, directory: int) -> None:
        self._directory = directory
        with self._opened("status.reserve") as fd:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)

    def write(self, status: Status) -> None:
        """Raises OSError; the file of before is still there then."""
        self._replace(status, "status.new", sync=False)

    def write_last(self, status: Status) -> None:
        """On disk when this returns, if need be in the room kept for it. Raises OSError."""
        try:
            self._replace(status, "status.new", sync=True)
        except OSError:
            self._replace(status, "status.reserve", sync=True)
        self._remove("status.reserve")

    def _replace(self, status: Status, name: str, *, sync: bool) -> None:
        try:
            with self._opened(name) as fd:
                data = encode(status.facts())
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))
                if sync:
                    os.fsync(fd)
        except OSError:
            if name == "status.new":
                self._remove(name)
            raise
        os.replace(name, "status.json", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        if sync:
            os.fsync(self._directory)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self._directory)
        try:
            yield fd
        finally:
            os.close(fd)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._directory)
