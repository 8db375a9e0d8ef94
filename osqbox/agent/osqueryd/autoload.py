"""Extensions the daemon starts itself: ``--extensions_autoload`` (osquery/extensions/extensions.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import trio

from osqbox.agent.logs import INFO, WARNING
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.loggers import StderrLog

RESPAWN_S = 5.0
_TERMINATE_S = 4.0
_SUFFIX = ".ext"
_MAX_FILE_BYTES = 64 * 1024


async def autoloaded(
    line: CommandLine, log: StderrLog, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run every extension the autoload file names until cancelled; one that ends is started again."""
    paths = find_extensions(line, log)
    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(_keep_running, path, line, log)
        task_status.started()


def find_extensions(line: CommandLine, log: StderrLog) -> list[Path]:
    """The executables: paths, or ``*.ext`` in directories; those others could write are left out."""
    try:
        with Path(line.text("extensions_autoload")).open(encoding="utf-8", errors="replace") as source:
            words = [text.strip() for text in source.read(_MAX_FILE_BYTES).splitlines()]
    except OSError:
        return []
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if not word or word.startswith("#"):
            continue
        candidates = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]
        found += [each for each in candidates if _may_run(each, line, log)]
    return found


def _may_run(path: Path, line: CommandLine, log: StderrLog) -> bool:
    if path.suffix != _SUFFIX or not os.access(path, os.X_OK):
        log.say(WARNING, "extensions.cpp", f"Extension is not an executable ending in {_SUFFIX}: {path}")
        return False
    facts, folder = path.stat(), path.parent.stat()
    safe = facts.st_uid in (0, os.geteuid()) and not (facts.st_mode & 0o022) and folder.st_uid in (0, os.geteuid())
    if not safe and not line.true("allow_unsafe"):
        log.say(WARNING, "extensions.cpp", f"Will not autoload extension with unsafe directory permissions: {path}")
        return False
    return True


async def _keep_running(path: Path, line: CommandLine, log: StderrLog) -> None:
    words = [
        str(path),
        *(["--verbose"] if line.true("verbose") else []),
        *("--socket", line.text("extensions_socket")),
        *("--timeout", line.text("extensions_timeout")),
        *("--interval", line.text("extensions_interval")),
    ]
    environ = {**os.environ, "OSQUERY_EXTENSION": "true"}
    while True:
        try:
            done = await trio.run_process(
                words, env=environ, stdin=subprocess.DEVNULL, check=False, deliver_cancel=_terminate
            )
            log.say(INFO, "watcher.cpp", f"Extension {path} ended with {done.returncode}, starting it again")
        except OSError as error:
            log.say(WARNING, "watcher.cpp", f"Cannot start extension {path}: {error}")
        await trio.sleep(RESPAWN_S)


async def _terminate(process: trio.Process) -> None:
    process.terminate()
    with trio.move_on_after(_TERMINATE_S):
        await process.wait()
        return
    process.kill()
