"""``status``, ``stop``, ``wait``, ``env`` and ``flags``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from osqbox import running
from osqbox.cli import find, serve
from osqbox.cli.env import environment
from osqbox.settings import Retention

INFO = {
    "pid": 7,
    "version": "1.2.3",
    "operator": "http://127.0.0.1:1",
    "agents": "https://localhost:2",
    "uptime_s": 61.0,
    "statistics": {"store": {"commits": 5}},
    "drops": {"logs": 3, "events": 0},
}


def test_status(api: Any, box: Any, run: Any) -> None:
    """Listeners, nodes by status, every number, and what was dropped."""
    api.on("GET", "info", INFO)
    api.on("GET", "nodes", [{"status": "active"}, {"status": "active"}, {"status": "pending"}])
    lines = dict(line.split(maxsplit=1) for line in run("status").stdout.splitlines())
    assert lines == {
        "osqbox": "1.2.3, pid 7, up 1 min",
        "agents": "https://localhost:2",
        "operator": "http://127.0.0.1:1",
        "nodes": "2 active, 1 pending",
        "store.commits": "5",
        "dropped": "3 logs",
    }
    assert json.loads(run("status", "--json").stdout) == {**INFO, "nodes": {"active": 2, "pending": 1}}


def test_stop_returns_when_the_box_is_gone(api: Any, box: running.Registration, run: Any, tmp_path: Path) -> None:
    """Not when it has promised to go."""
    gone = threading.Event()

    def stop(_: Any) -> Any:
        threading.Timer(0.1, lambda: (gone.set(), box.close())).start()
        return type(api.routes["GET", "/x"])(202, {"stopping": True})

    api.on("GET", "/x")
    api.calls("POST", "stop", stop)
    result = run("stop")
    assert gone.is_set()
    assert (result.exit_code, result.stderr) == (0, f"stopped the box with pid {os.getpid()}\n")


def test_a_box_that_does_not_stop(api: Any, box: Any, run: Any) -> None:
    """The hint is what stops it for certain."""
    api.on("POST", "stop", {"stopping": True}, status=202)
    result = run("stop", "--timeout", "0.1")
    assert (result.exit_code, result.exception.hint) == (5, f"kill {os.getpid()}")


def test_a_box_that_is_stopping_already_is_waited_for(box: running.Registration, run: Any) -> None:
    """It is asked nothing: its listeners may be closed."""
    box.update("stopping")
    timer = threading.Timer(0.05, box.close)
    timer.start()
    assert run("stop").exit_code == 0
    timer.join()


def test_nothing_to_stop_is_said_at_once(run: Any) -> None:
    assert run("stop").exit_code == 1


def test_stop_of_a_named_box(api: Any, run: Any) -> None:
    """Gone is when nobody answers."""
    answers = iter([200, 200, 503])
    api.on("GET", "/x")
    answer = type(api.routes["GET", "/x"])
    api.on("POST", "stop", {"stopping": True}, status=202)
    api.calls("GET", "/livez", lambda _: answer(next(answers), {}))
    assert run("stop", "--url", api.url, "--token", "t").exit_code == 0
    assert next(answers, None) is None


def test_wait(api: Any, box: Any, run: Any) -> None:
    """Ready is when the box itself says so; no token is sent."""
    answers = iter([503, 200])
    api.on("GET", "/x")
    answer = type(api.routes["GET", "/x"])
    api.calls("GET", "/readyz", lambda _: answer(next(answers), {}))
    assert run("wait").exit_code == 0
    assert {asked.authorization for asked in api.asked} == {None}


def test_wait_in_vain(api: Any, run: Any) -> None:
    """Exit 5, whether there is no box or it does not get ready."""
    assert run("wait", "--timeout", "0.05").exit_code == 5
    assert run("wait", "--timeout", "0.05", "--url", api.url).exit_code == 5


def test_wait_for_a_box_that_comes_later(api: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole time is its grace."""
    monkeypatch.setattr(find, "GRACE_S", 0.0)
    api.on("GET", "/readyz", {"ready": True})
    made: list[running.Registration] = []

    def start() -> None:
        made.append(running.Registration(tmp_path / "d", 1.0))
        made[0].update("ready", {"operator": api.url, "token": "t"})

    timer = threading.Timer(0.1, start)
    timer.start()
    assert run("wait", "--timeout", "20").exit_code == 0
    timer.join()
    made[0].close()


EXPECTED = (
    *("OSQBOX_URL", "OSQBOX_TOKEN", "OSQBOX_AGENTS", "OSQBOX_CA_FILE", "OSQBOX_CLIENT_CERT", "OSQBOX_CLIENT_KEY"),
    *("OSQBOX_ENROLL_SECRET", "OSQBOX_ENROLL_SECRET_FILE", "OSQBOX_FLAGFILE", "OSQBOX_DATA"),
)
SECRET = 'it\'s a "secret" $HOME `id` \\ ü'


def test_environment_names_only_what_there_is() -> None:
    """A listener that does not run has no variable."""
    ready = {"operator": "http://h:1", "comms": None, "jobs": "localhost:9"}
    assert environment(ready) == {"OSQBOX_URL": "http://h:1", "OSQBOX_JOBS": "localhost:9"}


def test_env_json(api: Any, box: Any, run: Any) -> None:
    variables = json.loads(run("env", "--format", "json").stdout)
    assert tuple(variables) == EXPECTED
    assert (variables["OSQBOX_URL"], variables["OSQBOX_ENROLL_SECRET"]) == (api.url, SECRET)


@pytest.mark.parametrize(
    ("shape", "shell"),
    [("sh", ["sh", "-c"]), ("dotenv", ["sh", "-c"]), ("fish", ["fish", "-c"]), ("powershell", ["pwsh", "-c"])],
)
def test_env_is_read_back_by_its_shell(api: Any, box: Any, run: Any, shape: str, shell: list[str]) -> None:
    """Whatever the secret holds."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    text = run("env", "--format", shape).stdout
    show = "Write-Output $env:OSQBOX_ENROLL_SECRET" if shape == "powershell" else 'printf %s "$OSQBOX_ENROLL_SECRET"'
    done = subprocess.run([*shell, f"{text}\n{show}"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.rstrip("\r\n") == SECRET


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ("fish", "set -gx OSQBOX_ENROLL_SECRET 'it\\'s a \"secret\" $HOME `id` \\\\ ü'"),
        ("powershell", "$env:OSQBOX_ENROLL_SECRET = 'it''s a \"secret\" $HOME `id` \\ ü'"),
        ("dotenv", 'OSQBOX_ENROLL_SECRET="it\'s a \\"secret\\" \\$HOME \\`id\\` \\\\ ü"'),
    ],
)
def test_env_quoting(api: Any, box: Any, run: Any, shape: str, line: str) -> None:
    """Also where that shell is not installed."""
    assert line in run("env", "--format", shape).stdout.splitlines()


def test_env_github(api: Any, box: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to the file, secrets masked in the log of the step and printed nowhere else."""
    file = tmp_path / "github"
    file.write_text("BEFORE=1\n")
    monkeypatch.setenv("GITHUB_ENV", str(file))
    result = run("env", "--format", "github")
    lines = file.read_text().splitlines()
    assert lines[0] == "BEFORE=1"
    assert f"OSQBOX_ENROLL_SECRET={SECRET}" in lines
    assert result.stdout.splitlines() == ["::add-mask::a-token-for-tests", f"::add-mask::{SECRET}"]
    monkeypatch.setenv("GITHUB_ENV", str(tmp_path / "no" / "file"))
    assert run("env", "--format", "github").exit_code == 3


def test_env_of_a_named_box(api: Any, run: Any) -> None:
    """The API tells no enroll secret; the token is the one given."""
    api.on("GET", "info", INFO)
    variables = json.loads(run("env", "--format", "json", "--url", api.url, "--token", "t").stdout)
    assert variables == {"OSQBOX_URL": INFO["operator"], "OSQBOX_TOKEN": "t", "OSQBOX_AGENTS": INFO["agents"]}


def test_flags(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """On stdout, or in a file."""
    text = run("flags").stdout
    assert f"--tls_server_certs={tmp_path}/data/ca.pem\n" in text
    assert "\n--tls_client_cert" not in text
    assert run("flags", "--out", str(tmp_path / "f")).exit_code == 0
    assert (tmp_path / "f").read_text() == text
    assert f"\n--tls_client_cert={tmp_path}/data/client.pem\n" in run("flags", "--client-cert").stdout
    assert run("flags", "--out", str(tmp_path / "no" / "f")).exit_code == 3


def test_what_is_kept_of_the_logs_follows_the_options_of_serve(tmp_path: Path) -> None:
    def kept(*words: str) -> Retention:
        options = serve.command.make_context("serve", list(words)).params
        return serve.settings_from(options, tmp_path, ephemeral=True).retention

    assert kept() == Retention()
    assert kept("--keep-log-lines", "7", "--keep-log-mib", "3") == Retention(log_lines=7, log_bytes=3 * 1024 * 1024)
