"""``osqbox swarm`` as it is typed: what it refuses, what it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from osqbox import running
from osqbox.cli.swarm import _flag, _progress, _start_time
from osqbox.errors import BadUsage
from osqbox.testing import Osqbox

PROMISED = "agents enrolled requests errors requests_per_s latency_ms rss_bytes rss_bytes_per_agent cpu_s duration_s"


def at(box: Osqbox, *more: str) -> list[str]:
    """A small swarm against a box."""
    where = ["--server", box.url, "--ca", str(box.ca_file), "--enroll-secret", box.enroll_secret]
    return ["swarm", *where, "--count", "5", "--spawn-rate", "100", "--duration", "0.8", "--interval", "1", *more]


def test_a_swarm_writes_its_reports(osqbox: Osqbox, run: Any, tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "swarm.json", tmp_path / "swarm.html"
    result = run(*at(osqbox, "--json", str(json_file), "--html", str(html_file), "--fail-if", "errors>0"))
    assert result.exit_code == 0, result.output
    report = json.loads(json_file.read_text())
    assert list(report)[:10] == PROMISED.split()
    assert (report["agents"], report["enrolled"], report["errors"], report["failed"]) == (5, 5, 0, [])
    assert len(osqbox.nodes) == 5
    assert html_file.read_text().startswith("<!doctype html>")
    assert "5, 5 enrolled" in result.output


def test_json_on_standard_output_is_all_there_is(osqbox: Osqbox, run: Any) -> None:
    result = run(*at(osqbox, "--json", "-"))
    assert json.loads(result.stdout)["enrolled"] == 5
    assert result.stderr == ""


def test_a_threshold_that_fails_is_exit_code_6_after_the_report(osqbox: Osqbox, run: Any, tmp_path: Path) -> None:
    file = tmp_path / "swarm.json"
    result = run(*at(osqbox, "--json", str(file), "--fail-if", "enrolled<6", "--fail-if", "errors>0.01"))
    assert result.exit_code == 6
    assert str(result.exception) == "enrolled<6 (enrolled is 5)"
    assert json.loads(file.read_text())["failed"] == ["enrolled<6 (enrolled is 5)"]


def test_a_crowd_that_is_not_let_in_fails_by_itself(osqbox: Osqbox, run: Any) -> None:
    words = at(osqbox)
    words[words.index("--enroll-secret") + 1] = "wrong"
    result = run(*words)
    assert result.exit_code == 6
    assert "no agent enrolled: enroll:" in str(result.exception)


def test_the_box_that_runs_here_is_the_default(osqbox: Osqbox, run: Any, tmp_path: Path) -> None:
    registration = running.Registration(tmp_path / "data", 1.0)
    registration.update("ready", {**osqbox.server.ready, "enroll_secret": osqbox.enroll_secret})
    try:
        result = run("swarm", "--count", "2", "--duration", "1", "--json", "-")
    finally:
        registration.close()
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["enrolled"] == len(osqbox.nodes) == 2


def test_insecure_is_said_aloud(osqbox: Osqbox, run: Any, tmp_path: Path) -> None:
    """Without the CA nobody gets in; with --insecure all do, and the terminal says what that means."""
    words = at(osqbox)
    del words[words.index("--ca") : words.index("--ca") + 2]
    refused = run(*words)
    assert refused.exit_code == 6
    assert "certificate" in str(refused.exception)
    result = run(*words, "--insecure")
    assert result.exit_code == 0, result.output
    assert "the server's certificate is not checked" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--server", "https://fleet.example.com"], 7, "another machine"),
        (["--server", "http://localhost"], 2, "expected the server as https://HOST:PORT"),
        (["--dialect", "klingon"], 2, "expected --dialect to be one of osqbox, fleet"),
        (["--log-endpoint", "log"], 2, "the path for log to start with /"),
        (["--profiles", "ubuntu:x"], 2, "expected profiles such as"),
        (["--profiles", "beos"], 3, "beos"),
        (["--fail-if", "speed>1"], 2, "expected a threshold such as"),
        (["--stop-if", "p95"], 2, "expected a threshold such as"),
        (["--start-time", "soon"], 2, "expected --start-time as"),
        (["--flag", "verbose"], 2, "expected --flag NAME=VALUE"),
        (["--flag", "no_such_flag=1"], 2, "unknown osqueryd flag"),
        (["--ca", "/nonexistent/ca.pem"], 3, "cannot use the certificates"),
        (["--count", "0"], 2, ""),
        (["--fail-queries", "2"], 2, ""),
    ],
)
def test_what_it_refuses(run: Any, words: list[str], code: int, said: str) -> None:
    """Before anything is sent; the server named here does not exist."""
    given = {"--server": "https://localhost:1", "--enroll-secret": "s", "--count": "1", "--duration": "1"}
    rest = [word for name, value in given.items() if name not in words for word in (name, value)]
    result = run("swarm", *rest, *words)
    assert result.exit_code == code
    assert said in (str(result.exception) if result.exception else result.output)


def test_an_enroll_secret_is_needed(run: Any) -> None:
    result = run("swarm", "--server", "https://localhost:1")
    assert (result.exit_code, "enroll secret" in str(result.exception)) == (2, True)


def test_start_times() -> None:
    assert _start_time("1767225600") == _start_time("2026-01-01T00:00:00Z") == _start_time("2026-01-01") == 1767225600
    assert _start_time("2026-01-01T01:00:00+01:00") == 1767225600
    assert _start_time(None) is None


def test_flags_with_and_without_dashes() -> None:
    assert _flag("--buffered_log_max=5") == _flag("buffered_log_max=5") == ("buffered_log_max", "5")
    assert _flag("a=b=c") == ("a", "b=c")
    with pytest.raises(BadUsage):
        _flag("=1")


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert _progress(None) is None
    assert _progress(False) is None
    show = _progress(True)
    assert show is not None
    from osqbox.agent.swarm.run import Progress

    show(Progress(3.0, 10, 20, 9, 100, 1, 50.0, 0.5, 4))
    said = capsys.readouterr().err
    assert "9/10 of 20 agents enrolled" in said
    assert "\r" not in said
    assert said.endswith("\n")


def test_ctrl_c_ends_it_with_a_report(osqbox: Osqbox, tmp_path: Path) -> None:
    """As a program: the signal, the report, the exit code."""
    import signal

    words = at(osqbox, "--duration", "60", "--json", str(tmp_path / "swarm.json"), "--progress")
    program = subprocess.Popen([sys.executable, "-m", "osqbox", *words], stderr=subprocess.PIPE, text=True)
    assert program.stderr is not None
    for line in program.stderr:
        if "5/5 of 5 agents enrolled" in line:
            break
    program.send_signal(signal.SIGINT)
    program.stderr.read()
    assert program.wait(20) == 0
    program.stderr.close()
    assert json.loads((tmp_path / "swarm.json").read_text())["enrolled"] == 5


def test_the_locustfile_compiles_and_says_the_same(run: Any) -> None:
    words = ["--server", "https://localhost:1/env", "--enroll-secret", 'it\'s "s"', "--dialect", "osctrl"]
    result = run("swarm", *words, "--profiles", "ubuntu:3", "--seed", "7", "--locustfile", "--fail-queries", "0.5")
    assert result.exit_code == 0, result.output
    compile(result.stdout, "locustfile.py", "exec")
    for expected in ("'/env/read'", "seed=7", "failing_queries=0.5", "read_mix('ubuntu:3')", "OSQBOX_ENROLL_SECRET"):
        assert expected in result.stdout
