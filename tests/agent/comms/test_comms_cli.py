"""`--comms` of `osqbox agent` and `osqbox swarm`: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from osqbox.cli import agent, swarm
from osqbox.errors import BadSetup, BadUsage, Unsafe, UserError

URL = "https://localhost:1"


def refusal(command: object, *words: str) -> UserError:
    result = CliRunner().invoke(command, words)  # type: ignore[arg-type]
    assert isinstance(result.exception, UserError), result.output or result.exception
    return result.exception


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--comms-profile", "g1"), "--comms-profile goes with --comms"),
        (("--uuid", "u"), "--uuid goes with --comms"),
        (("--comms", URL, "--uuid", "u"), "expected --uuid and --key-file together"),
        (("--comms", URL, "--control"), "--control goes without --comms"),
        (("--comms", URL, "--instances", "a"), "--instances goes without --comms"),
        (("--comms", URL), "an enroll secret, or --uuid with --key-file, is needed"),
        (("--comms", "http://localhost:1", "--enroll-secret", "s"), "expected the comms API as https://HOST:PORT"),
        (("--comms", "https://a b:x", "--enroll-secret", "s"), "expected the comms API as https://HOST:PORT"),
        (("--comms", URL, "--comms-profile", "g1", "--comms-transport", "ws"), "a g1 agent polls for commands"),
    ],
)
def test_an_agent_refuses(words: tuple[str, ...], message: str) -> None:
    error = refusal(agent.command, *words, "--profile", "ubuntu")
    assert isinstance(error, BadUsage)
    assert message in str(error)


def test_an_agent_without_its_key_file_says_so(tmp_path: Path) -> None:
    words = ("--comms", URL, "--uuid", "u", "--key-file", str(tmp_path / "none"), "--profile", "ubuntu")
    error = refusal(agent.command, *words)
    assert isinstance(error, BadSetup)
    assert "cannot read the key" in str(error)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("--comms-kinds", "sse"), BadUsage, "--comms-kinds goes with --comms"),
        (("--with-osquery",), BadUsage, "--with-osquery goes with --comms"),
        (("--comms", URL), BadUsage, "an enroll secret is needed"),
        (("--comms", URL, "--enroll-secret", "s", "--comms-kinds", "grpc"), BadUsage, "expected kinds of comms agents"),
        (("--comms", URL, "--enroll-secret", "s", "--mode", "sweep"), BadUsage, "--mode sweep is for osquery agents"),
        (("--comms", URL, "--enroll-secret", "s", "--locustfile"), BadUsage, "--locustfile is for osquery agents"),
        (("--comms", "https://192.0.2.1:1", "--enroll-secret", "s"), Unsafe, "192.0.2.1 is another machine"),
        (("--comms", URL, "--enroll-secret", "s", "--hosts", "0"), BadUsage, "expected --hosts from 1 to 100000"),
    ],
)
def test_a_swarm_refuses(words: tuple[str, ...], kind: type[UserError], message: str) -> None:
    error = refusal(swarm.command, *words)
    assert isinstance(error, kind)
    assert message in str(error)
