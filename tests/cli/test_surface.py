"""The surface others script against: every verb and option, kept in a golden file.

``OSQBOX_GOLDEN=write pytest tests/cli/test_surface.py`` writes it anew; a change is a changelog entry.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from osqbox.cli import cmdctl, program

GOLDEN = Path(__file__).with_name("golden") / "surface.txt"
VERBS = (
    *(
        "agent",
        "audit",
        "carves",
        "certs",
        "comms",
        "config",
        "demo",
        "doctor",
        "env",
        "exec",
        "flags",
        "job",
        "logs",
        "nodes",
        "query",
    ),
    *("serve", "shell", "status", "stop", "swarm", "tenants", "wait", "yara"),
)


def command_of(verb: str) -> click.Command:
    found = program.get_command(click.Context(program), verb)
    assert found is not None
    return found


def surface(name: str, command: click.Command) -> Iterator[str]:
    words = [
        " ".join(parameter.opts + parameter.secondary_opts)
        if isinstance(parameter, click.Option)
        else str(parameter.human_readable_name).upper()
        for parameter in command.params
    ]
    yield f"{name}: {', '.join(words)}".rstrip(": ")
    if isinstance(command, click.Group):
        for verb in sorted(command.commands):
            yield from surface(f"{name} {verb}", command.commands[verb])


def test_the_surface_is_the_golden_one() -> None:
    """Nothing is renamed or dropped by accident."""
    verbs = [line for verb in VERBS for line in surface(verb, command_of(verb))]
    text = "".join(f"{line}\n" for line in (*verbs, *surface("cmdctl", cmdctl.program)))
    if os.environ.get("OSQBOX_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_help(run: Any, verb: str) -> None:
    """Every verb is known to the program and explains itself."""
    result = run(verb, "--help")
    assert (result.exit_code, result.output.startswith("Usage: ")) == (0, True)
    assert verb in run("--help").output


def test_listing_verbs_show_the_options_of_their_list(run: Any) -> None:
    """They take them without the word."""
    assert "--follow" in run("logs", "-h").output
    assert "--platform" in run("nodes", "-h").output


def test_a_verb_starts_without_what_it_does_not_need() -> None:
    """Start-up time is a budget: no server, no database, no certificates, no YAML for a listing."""
    heavy = ("trio", "quart", "hypercorn", "cryptography", "apsw", "sqlite_utils", "msgspec", "yaml", "tabulate")
    program = f"import sys, osqbox.cli.nodes, osqbox.cli.query; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"
