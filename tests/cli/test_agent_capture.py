"""``osqbox agent capture``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from osqbox.agent.profile import load_profile
from osqbox.agent.sql import Engine
from osqbox.cli.agent_capture import command
from osqbox.errors import BadSetup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tables are read from /proc")


def test_a_captured_profile_makes_hosts(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    result = CliRunner().invoke(command, ["--out", str(out), "--name", "mine"], standalone_mode=False)
    assert result.exception is None
    assert "process tree" in result.stderr
    assert out.stat().st_mode & 0o077 == 0
    profile = load_profile(out)
    assert profile.name == "mine"
    tables = profile.host(seed=1, index=7).tables(lambda: 2_000_000_000.0)
    found = Engine(schema=profile.schema).query(
        "select s.hostname, p.name from processes p, system_info s where p.pid = 1", tables=tables
    )
    assert found.rows[0]["hostname"] == "mine-0007"


def test_the_capturing_process_is_not_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSQBOX_CAPTURE_TEST", "x")
    result = CliRunner().invoke(command, ["--no-redact"], standalone_mode=False)
    assert result.exception is None
    assert result.stdout.startswith("# A host profile captured from a machine, not redacted")
    assert f" {os.getpid()} " not in result.stdout


@pytest.mark.parametrize(
    ("out", "message"), [("x.txt", "expected a name ending .yaml"), ("no/such/x.yaml", "cannot write")]
)
def test_a_file_that_cannot_be_written(out: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--out", str(tmp_path / out)], standalone_mode=False)
    assert isinstance(result.exception, BadSetup)
    assert message in str(result.exception)
