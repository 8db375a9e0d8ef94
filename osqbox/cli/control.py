"""The options of remote shells, which agents and swarms share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.output import F
from osqbox.errors import BadUsage, Unsafe

if TYPE_CHECKING:
    from osqbox.agent.shell.control import ControlOptions

_FILE = click.Path(path_type=Path, dir_okay=False)
_SECONDS = click.FloatRange(0, min_open=True)
_MODES = ("v1", "launcher-2018")
_REAL_ONLY = ("shell", "shell_user")
_NEED_CONTROL = (*_REAL_ONLY, "allow_real_shell", "shell_mode", "scripted_shell", "shell_idle", "shell_max",
                 "shell_interval")  # fmt: skip

_SCRIPTED = (
    click.option("--control", is_flag=True, help="Give remote shells; without it none are asked for."),
    click.option("--scripted-shell", type=_FILE, metavar="FILE", help="Their prompt and answers (YAML or JSON)."),
)
_REAL = (
    click.option("--allow-real-shell", is_flag=True, help="Shells run programs of this machine, not a script."),
    click.option("--shell", metavar="PATH", help="The program. Default: bash, or what the operator asks for."),
    click.option("--shell-user", metavar="NAME", help="Whom it runs as. Default: the agent's own user."),
    click.option("--shell-mode", type=click.Choice(_MODES), help="v1 (default), or as the Launcher of 2018 did."),
    click.option("--shell-idle", type=_SECONDS, metavar="SECONDS", help="Hang up after so long without a byte."),
    click.option("--shell-max", type=_SECONDS, metavar="SECONDS", help="Hang up after so long in any case."),
    click.option("--shell-interval", type=_SECONDS, metavar="SECONDS",
                 help="Between questions. Default: 5 where a server does not hold them, 60 as Launcher."),
)  # fmt: skip


def control_options(function: F) -> F:
    for option in reversed((*_SCRIPTED, *_REAL)):
        function = option(function)
    return function


def scripted_options(function: F) -> F:
    """For many hosts at once, which never run real programs."""
    for option in reversed(_SCRIPTED):
        function = option(function)
    return function


def control_of(options: Mapping[str, Any]) -> ControlOptions | None:
    """What was asked for; None without --control. Raises BadUsage, Unsafe, BadSetup."""
    if not options["control"]:
        for name in _NEED_CONTROL:
            if options.get(name):
                raise BadUsage(f"{_flag(name)} goes with --control", hint=f"osqbox agent --control {_flag(name)} ...")
        return None
    is_real = bool(options.get("allow_real_shell"))
    for name in _REAL_ONLY:
        if options.get(name) and not is_real:
            raise Unsafe(
                f"{_flag(name)} runs programs of this machine for whoever operates the server",
                hint=f"osqbox agent --control {_flag(name)} ... --allow-real-shell",
            )
    if is_real and options["scripted_shell"]:
        raise BadUsage("expected --scripted-shell or --allow-real-shell, got both")
    return _control(options, is_real)


def _control(options: Mapping[str, Any], is_real: bool) -> ControlOptions:
    from osqbox.agent.shell.control import ControlOptions, load_script
    from osqbox.agent.shell.script import Script

    return ControlOptions(
        mode=options.get("shell_mode") or "v1",
        real=is_real,
        shell=options.get("shell"),
        user=options.get("shell_user"),
        script=load_script(options["scripted_shell"]) if options["scripted_shell"] else Script(),
        idle_s=options.get("shell_idle"),
        max_s=options.get("shell_max"),
        interval_s=options.get("shell_interval"),
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
