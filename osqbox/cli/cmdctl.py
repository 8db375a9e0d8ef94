"""``cmdctl``: Linux processes on a host, over gRPC with mutual TLS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox import __version__
from osqbox.cli import main as run_program
from osqbox.cli.jobs_text import Duration
from osqbox.cli.jobs_verbs import Front, connection_option

if TYPE_CHECKING:
    from osqbox.cli.jobs_connection import Target

_FILE = click.Path(path_type=Path)


def _find(options: Mapping[str, Any]) -> Target:
    from osqbox.cli.jobs_connection import named_target

    return named_target(options, options.get("config"))


def _options() -> tuple[click.Option, ...]:
    return (
        connection_option("--server", metavar="HOST:PORT", help="Default: CMDCTL_SERVER, cmdctl.toml, the box here."),
        connection_option("--cert", type=_FILE, metavar="FILE", help="Our certificate. Default: CMDCTL_CERT, ..."),
        connection_option("--key", type=_FILE, metavar="FILE", help="Its key. Default: CMDCTL_KEY, ..."),
        connection_option("--ca", type=_FILE, metavar="FILE", help="The server's CA. Default: CMDCTL_CA, ..."),
        connection_option("--config", type=_FILE, metavar="FILE", help="Default: ~/.config/cmdctl/cmdctl.toml."),
        connection_option("--reconnect", type=Duration(), help="Wait so long for a lost server. Default: 60s."),
    )


FRONT = Front("cmdctl", {"status": "get-status", "output": "get-output"}, _options(), _find)


@click.group(
    "cmdctl",
    params=list(_options()),
    commands=FRONT.commands(),
    context_settings={"obj": FRONT, "help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="cmdctl")
def program() -> None:
    """Run, watch and follow Linux processes on a host.

    \b
    Examples:
      cmdctl run ls -la
      cmdctl get-output ID
      cmdctl run --attach -- sh -c 'echo working; sleep 5; exit 3'
    """  # fmt: skip


@program.command()
@click.argument("token")
@click.option("--directory", type=_FILE, metavar="DIR", help="Default: ~/.config/cmdctl.")
def login(token: str, directory: Path | None) -> None:
    """Get a certificate with a one-time token; - reads it from stdin.

    Whoever runs the box makes the token: osqbox certs token NAME
    """
    from osqbox.cli.jobs_login import log_in

    log_in(token, directory)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    return run_program(argv, program, "cmdctl")


def entry() -> None:
    """The ``cmdctl`` script."""
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
