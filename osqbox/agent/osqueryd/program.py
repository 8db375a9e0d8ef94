"""The program: its words, which of its modes runs, and its exit codes."""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from osqbox.agent.messages import VERSION
from osqbox.agent.osqueryd.commandline import PROGRAM, CommandLine, help_text, parse
from osqbox.agent.osqueryd.hosts import Choice, name_process
from osqbox.errors import UserError

EXIT_FAILURE, EXIT_CATASTROPHIC = 1, 78
MAX_FLAGFILE_BYTES = 1024 * 1024


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run osqueryd's words to their end; returns the exit code."""
    line = parse(words, read=_read, environ=environ)
    if line.errors:
        print("\n".join(line.errors), file=sys.stderr)
        return EXIT_FAILURE
    shell = line.true("S") and not line.true("D")
    if line.true("version"):
        print(f"{PROGRAM} version {VERSION}")
        return 0
    if any(line.true(name) for name in ("help", "h", "helpfull", "helpshort", "helppackage", "helpxml")):
        print(help_text(shell=shell), end="")
        return 0
    if line.text("osqbox_install"):
        return _install(Path(line.text("osqbox_install")))
    name_process()
    try:
        choice = Choice.read(line, environ)
        return _shell(line, choice) if shell else _daemon(line, choice)
    except UserError as error:
        print(f"{PROGRAM} initialize failed: {error}", file=sys.stderr)
        if error.hint:
            print(f"try: {error.hint}", file=sys.stderr)
        return EXIT_CATASTROPHIC if error.exit_code == EXIT_CATASTROPHIC else EXIT_FAILURE


def _read(path: str) -> str:
    with Path(path).open("rb") as source:
        return source.read(MAX_FLAGFILE_BYTES).decode("utf-8", "surrogateescape")


def _shell(line: CommandLine, choice: Choice) -> int:
    from osqbox.agent.osqueryd.database import open_database
    from osqbox.agent.osqueryd.shell import open_output, run_shell

    try:
        sink = open_output(line.text("output"))
        with closing(open_database(line, choice)) as database:
            return run_shell(line, database, sys.stdin, sink, sys.stderr)
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        return EXIT_FAILURE


def _daemon(line: CommandLine, choice: Choice) -> int:
    from osqbox.agent.osqueryd.daemon import run_daemon

    return run_daemon(line, choice)


def _install(path: Path) -> int:
    """Write an executable that is this program, for managers that take a path and no words."""
    text = f'#!/bin/sh\nexec "{sys.executable}" -P -m osqbox osqueryd "$@"\n'
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return 0
