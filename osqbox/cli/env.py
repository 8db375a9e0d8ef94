"""``osqbox env``: the environment that tells other programs where the box is."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import tell
from osqbox.errors import BadSetup

_FROM_READY = {
    "OSQBOX_URL": "operator",
    "OSQBOX_TOKEN": "token",
    "OSQBOX_AGENTS": "agents",
    "OSQBOX_COMMS": "comms",
    "OSQBOX_COMMS_SOCKET": "comms_socket",
    "OSQBOX_JOBS": "jobs",
    "OSQBOX_CA_FILE": "ca",
    "OSQBOX_CLIENT_CERT": "client_cert",
    "OSQBOX_CLIENT_KEY": "client_key",
    "OSQBOX_ENROLL_SECRET": "enroll_secret",
    "OSQBOX_ENROLL_SECRET_FILE": "enroll_secret_file",
    "OSQBOX_FLAGFILE": "flagfile",
    "OSQBOX_DATA": "data",
}
_SECRETS = ("OSQBOX_TOKEN", "OSQBOX_ENROLL_SECRET")


def environment(ready: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a ready object; what does not run or is not known is left out."""
    return {variable: str(ready[key]) for variable, key in _FROM_READY.items() if ready.get(key) is not None}


@click.command("env")
@click.option(
    "--format",
    "shape",
    type=click.Choice(["sh", "json", "dotenv", "github", "fish", "powershell"]),
    default="sh",
    show_default=True,
    help="github adds to the file GITHUB_ENV names, and masks the secrets in the log.",
)
@box_options
def command(shape: str, box: Where) -> None:
    """Print the environment of the running box.

    \b
    Examples:
      eval "$(osqbox env)"
      osqbox env --format fish | source
      osqbox env --format powershell | Out-String | Invoke-Expression
    """
    variables = environment(box.find().ready)
    if shape == "github":
        _to_github(variables)
    else:
        click.echo(_SHAPES[shape](variables))


def _each(line: Callable[[str, str], str]) -> Callable[[Mapping[str, str]], str]:
    return lambda variables: "\n".join(line(name, value) for name, value in variables.items())


def _dotenv(value: str) -> str:
    """In double quotes, with what those expand escaped; line ends as ``\\n``."""
    for letter, escaped in (("\\", "\\\\"), ('"', '\\"'), ("$", "\\$"), ("`", "\\`"), ("\n", "\\n")):
        value = value.replace(letter, escaped)
    return f'"{value}"'


def _fish(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell(value: str) -> str:
    # PowerShell also ends a string at typographic single quotes.
    return "'" + "".join(letter * 2 if letter in "'\u2018\u2019\u201a\u201b" else letter for letter in value) + "'"


_SHAPES: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "sh": _each(lambda name, value: f"export {name}={shlex.quote(value)}"),
    "json": lambda variables: json.dumps(dict(variables), indent=2),
    "dotenv": _each(lambda name, value: f"{name}={_dotenv(value)}"),
    "fish": _each(lambda name, value: f"set -gx {name} {_fish(value)}"),
    "powershell": _each(lambda name, value: f"$env:{name} = {_powershell(value)}"),
}


def _to_github(variables: Mapping[str, str]) -> None:
    """``NAME=value`` lines for the steps that follow, and a mask for each secret in the log of this one."""
    lines = [f"{name}={value}" for name, value in variables.items()]
    if odd := [name for name, value in variables.items() if "\n" in value or "\r" in value]:
        raise BadSetup(f"expected values of one line, got a line end in {', '.join(odd)}")
    for name in _SECRETS:
        if name in variables:
            click.echo(f"::add-mask::{variables[name]}")
    target = os.environ.get("GITHUB_ENV")
    if not target:
        click.echo("\n".join(lines))
        return
    try:
        with open(target, "a", encoding="utf-8") as file:  # noqa: PTH123 - appending
            file.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise BadSetup(f"cannot write to GITHUB_ENV {target}: {error.strerror}") from None
    tell(f"{len(lines)} variables added to {target}")
