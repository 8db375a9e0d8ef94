"""Where log lines go besides a TLS server: the files of the filesystem logger, standard output, standard error.

plugins/logger/{filesystem_logger,stdout}.cpp and glog of osquery 5.23.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from osqbox.agent.logs import Status, glog_line
from osqbox.errors import BadSetup

RESULTS, SNAPSHOTS = "osqueryd.results.log", "osqueryd.snapshots.log"
SEVERITIES = ("INFO", "WARNING", "ERROR", "FATAL")

Now = Callable[[], float]


def logger_mode(text: str) -> int:
    """``--logger_mode``, octal. Raises BadSetup."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise BadSetup(f"--logger_mode: expected an octal mode such as 0640, got {text!r}")
    return mode


@dataclass(slots=True)
class FilesystemLogger:
    """``osqueryd.results.log``, ``osqueryd.snapshots.log`` and glog's files in one directory."""

    directory: Path
    mode: int
    now: Now
    hostname: str
    pid: int
    _status_files: dict[str, Path] = field(default_factory=dict)

    def check(self) -> str:
        """Why nothing can be written there; empty when it can."""
        try:
            self._append(self.directory / RESULTS, "")
        except OSError as error:
            return f"Could not create file: {self.directory / RESULTS}: {error.strerror}"
        return ""

    def write(self, request: Mapping[str, str]) -> None:
        """Take one of the registry's logger requests. Raises OSError."""
        if "snapshot" in request:
            self._append(self.directory / SNAPSHOTS, request["snapshot"] + "\n")
        elif "string" in request:
            self._append(self.directory / RESULTS, request["string"] + "\n")
        elif "log" in request:
            for entry in json.loads(request["log"]):
                self._write_status(entry)

    def _write_status(self, entry: Mapping[str, str | int]) -> None:
        """glog: each file holds its severity and those above."""
        severity = int(entry["s"])
        status = Status(severity, str(entry["f"]), int(entry["i"]), str(entry["m"]))
        text = glog_line(status, now=self.now(), thread=self.pid)
        for name in SEVERITIES[: min(severity, 2) + 1]:
            self._append(self._status_file(name), text + "\n")

    def _status_file(self, severity: str) -> Path:
        if severity not in self._status_files:
            started = dt.datetime.fromtimestamp(self.now(), dt.UTC)
            path = self.directory / f"osqueryd.{severity}.{started:%Y%m%d-%H%M%S}.{self.pid}"
            head = (
                f"Log file created at: {started:%Y/%m/%d %H:%M:%S}\nRunning on machine: {self.hostname}\n"
                "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg\n"
            )
            self._append(path, head)
            link = self.directory / f"osqueryd.{severity}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            self._status_files[severity] = path
        return self._status_files[severity]

    def _append(self, path: Path, text: str) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, self.mode)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as log:
            log.write(text)


@dataclass(frozen=True, slots=True)
class StdoutLogger:
    """Raw lines; statuses as ``severity=N location=file:line message=...``."""

    def check(self) -> str:
        return ""

    def write(self, request: Mapping[str, str]) -> None:
        for key in ("snapshot", "string"):
            if key in request:
                print(request[key], flush=True)
        if "log" in request:
            for entry in json.loads(request["log"]):
                print(f"severity={entry['s']} location={entry['f']}:{entry['i']} message={entry['m']}", flush=True)


Logger = FilesystemLogger | StdoutLogger


@dataclass(slots=True)
class StderrLog:
    """glog's lines for the person or manager at standard error: warnings and worse, everything with --verbose."""

    verbose: bool
    enabled: bool
    min_severity: int
    now: Now
    pid: int

    def say(self, severity: int, filename: str, message: str) -> None:
        self.write(glog_line(Status(severity, filename, 0, message), now=self.now(), thread=self.pid))

    def write(self, line: str) -> None:
        """A line of glog's, which begins with its severity; other lines only come with --verbose."""
        severity = "IWEF".find(line[:1])
        least = self.min_severity if self.verbose else max(1, self.min_severity)
        if self.enabled and (severity >= least or severity < 0):
            print(line, file=sys.stderr, flush=True)
