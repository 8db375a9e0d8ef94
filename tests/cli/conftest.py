"""A scripted operator API on a real socket, and a registered box that points to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from click.testing import CliRunner, Result

from osqbox import running

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
TOKEN = "a-token-for-tests"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    body: Any
    authorization: str | None


@dataclass
class Answer:
    status: int
    body: Any
    """JSON; bytes are sent as they are; a list in ``lines`` as one NDJSON chunk each."""
    lines: list[Any] | None = None


@dataclass
class Api:
    """Answers what it was told to, and can be asked what it saw."""

    url: str
    routes: dict[tuple[str, str], Answer | Callable[[Asked], Answer]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def on(self, method: str, path: str, body: Any = None, status: int = 200) -> None:
        self.routes[method, self._full(path)] = Answer(status, body)

    def streams(self, path: str, lines: list[Any]) -> None:
        self.routes["GET", self._full(path)] = Answer(200, None, lines)

    def calls(self, method: str, path: str, answer: Callable[[Asked], Answer]) -> None:
        self.routes[method, self._full(path)] = answer

    def seen(self, method: str, path: str) -> Asked:
        """The one request of that kind."""
        (only,) = [each for each in self.asked if (each.method, each.path) == (method, self._full(path))]
        return only

    @staticmethod
    def _full(path: str) -> str:
        return path if path.startswith("/") else f"/api/v1/{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: Api

    def handle_any(self) -> None:
        target = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_json = self.headers.get("Content-Type") == "application/json"
        asked = Asked(
            self.command,
            target.path,
            dict(parse_qsl(target.query, keep_blank_values=True)),
            json.loads(raw) if is_json and raw else raw.decode() or None,
            self.headers.get("Authorization"),
        )
        self.api.asked.append(asked)
        missing = Answer(404, {"error": f"no script for {self.command} {target.path}", "reason": "x", "hint": None})
        answer = self.api.routes.get((self.command, target.path), missing)
        self.send(answer(asked) if callable(answer) else answer)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        if answer.lines is None:
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in answer.lines:
            data = json.dumps(line).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    handler: Any = type("Handler", (_Handler,), {f"do_{method}": _Handler.handle_any for method in METHODS})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.api = Api(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler.api
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No verb sees the boxes, data or environment of whoever runs the tests."""
    for name in ("OSQBOX_URL", "OSQBOX_TOKEN", "OSQBOX_AGENTS", "OSQBOX_CA_FILE", "OSQBOX_WAITED", "GITHUB_ENV"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("OSQBOX_HOME", str(home))
    return home


def ready_object(url: str, data: Path) -> dict[str, Any]:
    return {
        "pid": 1,
        "version": "0.0.0",
        "data": str(data),
        "agents": "https://localhost:8443",
        "operator": url,
        "comms": None,
        "jobs": None,
        "comms_socket": None,
        "token": TOKEN,
        "ca": str(data / "ca.pem"),
        "client_cert": str(data / "client.pem"),
        "client_key": str(data / "client.key"),
        "enroll_secret": 'it\'s a "secret" $HOME `id` \\ ü',
        "enroll_secret_file": str(data / "enroll_secret"),
        "flagfile": str(data / "osquery.flags"),
    }


@pytest.fixture
def box(api: Api, tmp_path: Path) -> Iterator[running.Registration]:
    """A box of this user that is ready, whose operator listener is the scripted API."""
    registration = running.Registration(tmp_path / "data", 1.0)
    registration.update("ready", ready_object(api.url, tmp_path / "data"))
    yield registration
    registration.close()


Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run a verb as the program does, exit codes of errors included."""
    from osqbox.cli import VERBS, program
    from osqbox.errors import UserError

    assert VERBS

    def run(*words: str, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(program, list(words), input=input)
        if isinstance(result.exception, UserError):
            result.exit_code = result.exception.exit_code
        elif result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@dataclass(frozen=True)
class JobsBox:
    """A real box of its own that runs jobs."""

    home: Path
    """OSQBOX_HOME of whoever is to find it."""
    certs: Path
    ready: dict[str, Any]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OSQBOX_", "CMDCTL_"))}
        return {**kept, "OSQBOX_HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home / "config")}


def start_jobs_box(home: Path, *options: str) -> tuple[subprocess.Popen[bytes], JobsBox]:
    """As `osqbox serve` with every port free to choose; waits until it is ready."""
    ready_file, certs = home / "ready.json", home / "certs"
    ready_file.unlink(missing_ok=True)
    ports = [word for name in ("agents", "operator", "jobs") for word in (f"--{name}-port", "0")]
    words = ["serve", "--quiet", "--certs", str(certs), "--ready-file", str(ready_file), *ports, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "osqbox", *words], env={**os.environ, "OSQBOX_HOME": str(home)}, cwd=home
    )
    deadline = time.monotonic() + 20
    while not ready_file.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, JobsBox(home, certs, json.loads(ready_file.read_text()))


@pytest.fixture(scope="session")
def jobs_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsBox]:
    process, box = start_jobs_box(tmp_path_factory.mktemp("jobs-box"), "--ephemeral")
    yield box
    process.terminate()
    assert process.wait(20) == 0
