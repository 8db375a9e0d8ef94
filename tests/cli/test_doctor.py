"""``osqbox doctor``: each of the classic causes is told apart, by real handshakes."""

from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from osqbox import running
from osqbox.cli import doctor
from osqbox.cli.doctor import Check, shake_hands

from .conftest import ready_object

NOW = time.time()


@contextmanager
def agents_listener(context: ssl.SSLContext | None, answer: bytes = b"HTTP/1.1 404 X\r\n\r\n") -> Iterator[int]:
    """A listener for one connection; without a context it speaks plain text."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            with connection:
                if context is None:
                    connection.sendall(b"220 not tls at all\r\n")
                    connection.recv(4096)
                    return
                with context.wrap_socket(connection, server_side=True) as tls:
                    tls.recv(4096)
                    tls.sendall(answer)
        except OSError:
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join()
        listener.close()


def server(ca: trustme.CA, *names: str, not_after: dt.datetime | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names or ("localhost",), not_after=not_after).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


def check(port: int, ca_file: Path, host: str = "localhost") -> Check:
    return shake_hands("agents", {"agents": f"https://{host}:{port}", "ca": str(ca_file)}, NOW)


def test_a_good_listener(ca: trustme.CA, ca_file: Path) -> None:
    """Version and cipher are shown."""
    with agents_listener(server(ca)) as port:
        found = check(port, ca_file)
    assert (found.status, found.message.split(": ")[1][:3]) == ("ok", "TLS")


def test_an_expired_certificate(ca: trustme.CA, ca_file: Path) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    with agents_listener(server(ca, not_after=past)) as port:
        found = check(port, ca_file)
    assert (found.status, found.message, found.hint) == (
        "fail",
        "the server certificate has expired",
        "osqbox certs renew",
    )


def test_another_name(ca: trustme.CA, ca_file: Path) -> None:
    with agents_listener(server(ca, "other.example")) as port:
        found = check(port, ca_file)
    assert found.message == "the certificate is not for 'localhost'"


def test_another_address(ca: trustme.CA, ca_file: Path) -> None:
    with agents_listener(server(ca)) as port:
        found = check(port, ca_file, host="127.0.0.1")
    assert found.message == "the certificate is not for '127.0.0.1'"


def test_a_stranger_ca(ca_file: Path) -> None:
    with agents_listener(server(trustme.CA())) as port:
        found = check(port, ca_file)
    assert "does not vouch for the certificate" in found.message


def test_no_tls_at_all(ca_file: Path) -> None:
    with agents_listener(None) as port:
        found = check(port, ca_file)
    assert "no TLS that osqueryd speaks" in found.message


def test_only_ciphers_that_osqueryd_lacks(ca: trustme.CA, ca_file: Path) -> None:
    """A modern client would be content; the agent is not."""
    context = server(ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")
    with agents_listener(context) as port:
        found = check(port, ca_file)
    assert "no TLS that osqueryd speaks" in found.message


def test_a_client_certificate_is_wanted(ca: trustme.CA, ca_file: Path) -> None:
    """TLS 1.3 tells only after the handshake."""
    context = server(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    with agents_listener(context) as port:
        found = check(port, ca_file)
    assert (found.status, found.hint) == ("fail", "osqbox flags --client-cert")


def test_nobody_listens(ca_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "nothing listens" in check(port, ca_file).message


def test_no_ca_file(tmp_path: Path) -> None:
    found = check(1, tmp_path / "none.pem")
    assert (found.status, found.hint) == ("fail", "osqbox certs show")


def test_a_clock_that_differs(ca: trustme.CA, ca_file: Path) -> None:
    """Certificates and expiry times are then read differently."""
    answer = b"HTTP/1.1 404 X\r\nDate: Thu, 01 Jan 2015 00:00:00 GMT\r\n\r\n"
    with agents_listener(server(ca), answer) as port:
        found = check(port, ca_file)
    assert (found.status, "clock differs" in found.message) == ("warn", True)


def statuses(result: Any) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(result.stdout)}


def test_without_a_box(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning and the command that starts one; the exit code stays 0."""
    monkeypatch.setattr(doctor, "PORTS", {"agents": 0})
    result = run("doctor", "--json", "--certs", str(tmp_path / "certs"))
    assert result.exit_code == 0
    found = statuses(result)
    assert (found["box"], found["packages"], found["data directory"], found["port 0"]) == ("warn", "ok", "ok", "ok")
    text = run("doctor", "--certs", str(tmp_path / "certs")).stdout
    assert "warn  box: none is running\n      try: osqbox serve\n" in text
    assert all(set(check) == {"name", "status", "message", "hint"} for check in json.loads(result.stdout))


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(doctor, "PORTS", {"agents": taken.getsockname()[1]})
        found = doctor._port("agents")
    assert (found.status, found.hint) == ("warn", "osqbox serve --agents-port 0")


def test_a_broken_box_exits_with_1(api: Any, box: running.Registration, run: Any, tmp_path: Path) -> None:
    """Its operator listener answers wrongly, those of agents not at all."""
    api.on("GET", "/readyz", {"error": "not ready", "reason": "r"}, status=503)
    box.update("ready", ready_object(api.url, tmp_path / "data") | {"comms": "https://localhost:27000"})
    result = run("doctor", "--json", "--certs", str(tmp_path / "certs"))
    found = {
        name.partition(" ")[2].partition(" ")[2]: status
        for name, status in statuses(result).items()
        if name.startswith("box")
    }
    assert result.exit_code == 1
    assert found == {"": "ok", "operator": "fail", "agents": "fail", "comms": "fail"}


def test_certificates_are_looked_at(run: Any, tmp_path: Path) -> None:
    """Good ones, and one that is not what it says."""
    from osqbox.certs import ensure_identity

    ensure_identity(tmp_path / "certs", now=NOW)
    found = statuses(run("doctor", "--json", "--certs", str(tmp_path / "certs")))
    assert (found["certificate ca.pem"], found["certificate server.pem"]) == ("ok", "ok")
    (tmp_path / "certs" / "server.pem").write_text("nonsense")
    assert statuses(run("doctor", "--json", "--certs", str(tmp_path / "certs")))["certificates"] == "fail"


def test_the_environment_is_checked(api: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was given the host's box."""
    monkeypatch.setenv("OSQBOX_URL", api.url)
    monkeypatch.setenv("OSQBOX_TOKEN", "t")
    monkeypatch.setenv("OSQBOX_AGENTS", "https://localhost:1")
    api.on("GET", "/readyz", {"ready": True})
    api.on("GET", "info", {})
    found = statuses(run("doctor", "--json", "--certs", str(tmp_path / "certs")))
    assert (found["OSQBOX_URL"], found["OSQBOX_AGENTS"]) == ("ok", "fail")
    assert "box" not in found


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [
        ("0.18.0", "~=0.18.0", True),
        ("0.18.7", "~=0.18.0", True),
        ("0.19.0", "~=0.18.0", False),
        ("8.5.1", "~=8.1", True),
        ("9.0", "~=8.1", False),
        ("8.0", "~=8.1", False),
        ("50.0.2", ">=44", True),
        ("43.9", ">=44", False),
        ("3.54.1.0", ">=3.46", True),
        ("1.0rc1", ">=1.0", True),
        ("2.0", "", True),
    ],
)
def test_versions(installed: str, wanted: str, fits: bool) -> None:
    """As pip reads the two kinds of bounds that pyproject.toml uses."""
    assert doctor._fits(installed, wanted) is fits


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    """Told before the box fails on it."""
    (tmp_path / "file").write_text("")
    assert doctor._directory("data", tmp_path / "file" / "x", "hint").status == "fail"
    assert doctor._directory("data", tmp_path / "new" / "x", "hint").status == "ok"
