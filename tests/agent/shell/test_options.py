"""What the words of a call come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from osqbox.agent.shell.control import ControlOptions
from osqbox.agent.shell.script import Script
from osqbox.cli import agent as agent_verb
from osqbox.cli.control import control_of, control_options, scripted_options
from osqbox.errors import BadSetup, BadUsage, Unsafe, UserError


def asked(*words: str, options: Any = control_options) -> ControlOptions | None:
    @click.command()
    @options
    def verb(**given: Any) -> ControlOptions | None:
        return control_of(given)

    found: ControlOptions | None = verb(list(words), standalone_mode=False)
    return found


def test_without_control_there_is_none() -> None:
    assert asked() is None


def test_control_alone_gives_a_script_and_nothing_real() -> None:
    assert asked("--control") == ControlOptions(mode="v1", real=False, script=Script())


def test_everything_can_be_said() -> None:
    words = "--control --allow-real-shell --shell /bin/sh --shell-user nobody --shell-mode launcher-2018"
    times = "--shell-idle 60 --shell-max 600 --shell-interval 0.5"
    assert asked(*words.split(), *times.split()) == ControlOptions(
        mode="launcher-2018",
        real=True,
        shell="/bin/sh",
        user="nobody",
        idle_s=60.0,
        max_s=600.0,
        interval_s=0.5,
    )


def test_a_script_comes_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_text("prompt: '% '\n")
    for options in (control_options, scripted_options):
        found = asked("--control", "--scripted-shell", str(file), options=options)
        assert found is not None
        assert found.script.prompt == "% "


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ("--shell /bin/sh", BadUsage, "--shell goes with --control"),
        ("--allow-real-shell", BadUsage, "--allow-real-shell goes with --control"),
        ("--shell-idle 5", BadUsage, "--shell-idle goes with --control"),
        ("--scripted-shell x", BadUsage, "--scripted-shell goes with --control"),
        ("--control --shell /bin/sh", Unsafe, "--shell runs programs of this machine"),
        ("--control --shell-user root", Unsafe, "--shell-user runs programs of this machine"),
        ("--control --allow-real-shell --scripted-shell x", BadUsage, "got both"),
        ("--control --scripted-shell /no/such/file", BadSetup, "cannot read the shell's script"),
        ("--control --shell-idle 0", click.BadParameter, "0"),
    ],
)
def test_what_does_not_go_together_is_said(words: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        asked(*words.split())
    if isinstance(raised.value, UserError) and error is not BadSetup:
        assert raised.value.hint or "both" in says


def test_instances_give_no_shells() -> None:
    with pytest.raises(BadUsage, match="--control goes without --instances"):
        agent_verb.command(["--control", "--instances", "kolide"], standalone_mode=False)
