"""The command line: one file per verb, imported when its verb is called."""

from __future__ import annotations

import importlib
import os
import re
import sys

import click

from osqbox import __version__
from osqbox.errors import UserError

VERBS = {
    "serve": "run the box",
    "demo": "run a throw-away box with this machine in it, and show what it can do",
    "exec": "run a command against a fresh box and return its exit code",
    "wait": "wait until a box is ready",
    "status": "what the running box is doing",
    "stop": "stop the running box",
    "env": "print the environment that tells other programs where the box is",
    "flags": "print the osqueryd flag file for the box",
    "doctor": "what is wrong with this set-up and what to type next",
    "nodes": "the enrolled hosts",
    "query": "ask live hosts with SQL",
    "logs": "log lines: list, search, follow, export",
    "config": "config sources: put, explain, validate, roll back",
    "carves": "files carved from hosts",
    "yara": "YARA rules that hosts fetch",
    "tenants": "tenants and their enroll secrets",
    "comms": "agents of the comms API: send commands, see events, configure, upgrade",
    "job": "run Linux processes: start, follow, stop, list",
    "shell": "a terminal on an agent: open, list, watch, replay, kill",
    "certs": "the CA and its certificates: show, issue, renew, revoke",
    "audit": "who did what to shells, jobs and certificates",
    "agent": "run an osquery agent for this machine or a pretended one, in 0..n instances",
    "swarm": "thousands of agents in one process, against any osquery server",
    "osqueryd": "a stand-in for the osqueryd program",
}


class _Verbs(click.Group):
    """Knows every verb's name and one line without importing it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's shape
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"osqbox.cli.{_module(cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def _module(verb: str) -> str:
    return f"{verb}_" if verb == "exec" else verb


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="osqbox")
def program() -> None:
    """Everything around an endpoint agent, in one process you can start in a second."""


def main(argv: list[str] | None = None, command: click.Command = program, name: str = "osqbox") -> int:
    """Run one verb; returns the exit code. Errors say what was expected, what came, and what to type next."""
    try:
        code = command.main(argv, prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return 130
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except UserError as error:
        _tell(error, name)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _tell(error: UserError, name: str) -> None:
    """An error may quote what an agent or a server said, so nothing of it may steer the terminal."""
    from osqbox.cli.output import printable

    lines = [f"{name}: {error}", *([f"try: {error.hint}"] if error.hint else [])]
    print("\n".join(printable(line) for text in lines for line in as_called(text).split("\n")), file=sys.stderr)


def as_called(text: str) -> str:
    """Commands in ``text`` as this user types them: a checkout is run by its front door, not by ``osqbox``."""
    called_as = os.environ.get("OSQBOX_CALLED_AS")
    return re.sub(r"(?<![\w./-])osqbox (?=[a-z])", f"{called_as} ", text) if called_as else text


def entry() -> None:
    """The ``osqbox`` script."""
    raise SystemExit(main())
