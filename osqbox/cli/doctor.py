"""``osqbox doctor``: what is wrong with this set-up, and what to type next."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click

from osqbox import running
from osqbox.cli.find import client_at
from osqbox.cli.output import json_option, print_json, printable
from osqbox.errors import UserError
from osqbox.settings import MIB, default_certs_dir, default_data_dir

PORTS = {"agents": 8443, "operator": 8080, "comms": 27000}
FREE_WARN_BYTES = 1024 * MIB
FREE_FAIL_BYTES = 64 * MIB
FILES_WANTED = 4096
EXPIRES_SOON_DAYS = 14
CLOCK_SKEW_S = 60.0
CONNECT_S = 5.0
AGENT_CIPHERS = ":".join(
    f"ECDHE-{key}-{cipher}" for cipher in ("AES256-GCM-SHA384", "AES128-GCM-SHA256") for key in ("ECDSA", "RSA")
)
"""What osqueryd offers for TLS 1.2 (osquery/remote/http_client.cpp)."""

# X509_V_ERR_*: what the agent's own OpenSSL would say.
_EXPIRED, _NOT_YET_VALID, _WRONG_HOST, _WRONG_ADDRESS = 10, 9, 62, 64
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    hint: str | None = None
    """What to type next."""


@click.command("doctor")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The box's data directory.")
@click.option("--certs", type=click.Path(path_type=Path), metavar="DIR", help="Its certificates.")
@json_option
def command(data: Path | None, certs: Path | None, as_json: bool) -> None:
    """Look for what is wrong with this set-up, and say what to type next.

    The exit code is 1 when something is broken; warnings leave it 0.
    """
    checks = list(examine(data, certs, time.time()))
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            _print(check)
    if any(check.status == "fail" for check in checks):
        raise click.exceptions.Exit(1)


def _print(check: Check) -> None:
    click.echo(f"{_MARKS[check.status]}  {check.name}: {printable(check.message)}")
    if check.hint and check.status != "ok":
        click.echo(f"      try: {check.hint}")


def examine(data: Path | None, certs: Path | None, now: float) -> Iterator[Check]:
    """Every check, the foundations first."""
    boxes = running.boxes(data)
    data_dir = (boxes[0].data if boxes else None) or data or default_data_dir()
    ca = boxes[0].ready["ca"] if boxes and boxes[0].ready else None
    certs_dir = certs or (Path(ca).parent if ca else default_certs_dir())
    yield _python()
    yield _packages()
    yield _directory("data directory", data_dir, "osqbox serve --data DIR")
    yield _disk(data_dir)
    yield _directory("certificate directory", certs_dir, "osqbox serve --certs DIR")
    yield from _certificates(certs_dir, now)
    yield _files()
    if url := os.environ.get("OSQBOX_URL"):
        yield from _named(url, now)
    elif not boxes:
        yield Check("box", "warn", "none is running", f"osqbox serve{f' --data {data}' if data else ''}")
        yield from map(_port, PORTS)
    for box in boxes:
        yield from _box(box, now)


def _python() -> Check:
    return Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {ssl.OPENSSL_VERSION}")


def _packages() -> Check:
    """The installed versions against what this version of osqbox was tested with."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        wanted = [need for need in requires("osqbox") or () if "extra ==" not in need]
    except PackageNotFoundError:
        return Check("packages", "warn", "osqbox is not installed, so what it needs is not known", "pip install -e .")
    wrong = []
    for need in wanted:
        name = re.split(r"[^A-Za-z0-9_.-]", need, maxsplit=1)[0]
        try:
            if not _fits(version(name), need[len(name) :]):
                wrong.append(f"expected {need}, got {version(name)}")
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
    try:
        from osqbox.listen.hypercorn_repairs import check_seams

        check_seams()
    except (UserError, ImportError) as error:
        wrong.append(str(error))
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "pip install --upgrade osqbox")
    return Check("packages", "ok", f"{len(wanted)} as required, Hypercorn {version('hypercorn')}")


def _fits(installed: str, wanted: str) -> bool:
    """The two kinds of bounds that pyproject.toml uses: ``>=X`` and ``~=X.Y``."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", text, maxsplit=1)[0])]

    have = numbers(installed)
    for kind, bound in re.findall(r"(~=|>=)\s*([0-9.]+)", wanted):
        least = numbers(bound)
        if have < least or (kind == "~=" and have[: len(least) - 1] != least[:-1]):
            return False
    return True


def _directory(name: str, directory: Path, hint: str) -> Check:
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not there.is_dir():
        return Check(name, "fail", f"{there}: expected a directory, got a file", hint)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{there} cannot be written by user {os.getuid()}", hint)
    return Check(name, "ok", f"{directory}{'' if there == directory else ' (made on the first run)'}")


def _disk(directory: Path) -> Check:
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(there).free
    message = f"{free_bytes // MIB} MiB free at {there}"
    if free_bytes >= FREE_WARN_BYTES:
        return Check("disk", "ok", message)
    status: Literal["warn", "fail"] = "warn" if free_bytes >= FREE_FAIL_BYTES else "fail"
    return Check("disk", status, message, "osqbox serve --data DIR --keep-log-lines 100000")


def _certificates(directory: Path, now: float) -> Iterator[Check]:
    from osqbox.identity import Identity

    if not (directory / "ca.pem").exists():
        yield Check("certificates", "ok", "none yet; the first run makes them")
        return
    try:
        from osqbox.certs import describe

        facts = describe(Identity.in_directory(directory), now)
    except UserError as error:
        yield Check("certificates", "fail", str(error), error.hint or f"osqbox certs show --certs {directory}")
        return
    for each in facts:
        name = f"certificate {each.file.name}"
        if now < each.not_before:
            yield Check(name, "fail", "begins in the future: this machine's clock is behind", "timedatectl status")
        elif each.days_left < 0:
            yield Check(name, "fail", f"expired {-each.days_left} days ago", f"osqbox certs renew --certs {directory}")
        elif each.days_left < EXPIRES_SOON_DAYS:
            yield Check(name, "warn", f"{each.days_left} days left", f"osqbox certs renew --certs {directory}")
        else:
            yield Check(name, "ok", f"{each.days_left} days left, {', '.join(each.names) or each.subject}")


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    able = hard if hard != resource.RLIM_INFINITY else 1 << 20
    message = f"{soft} open files allowed, {able} after the box raises it"
    if able < FILES_WANTED:
        return Check(
            "open files", "warn", f"{message}: enough for about {able // 2} agents", f"ulimit -n {FILES_WANTED}"
        )
    return Check("open files", "ok", message)


def _port(name: str) -> Check:
    port = PORTS[name]
    # Bound as the box binds it: a port that a former connection still lingers on is free.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(
                f"port {port}", "warn", f"not free for {name}: {error.strerror}", f"osqbox serve --{name}-port 0"
            )
    return Check(f"port {port}", "ok", f"free for {name}")


def _box(box: running.RunningBox, now: float) -> Iterator[Check]:
    name = f"box {box.pid}"
    if box.ready is None or box.state != "ready":
        yield Check(name, "warn", f"{box.state} for {now - box.started_at:.0f} s", f"osqbox wait --data {box.data}")
        return
    yield Check(name, "ok", f"ready, data in {box.data}")
    yield _operator(f"{name} operator", box.ready, f"kill {box.pid}, then osqbox serve --data {box.data}")
    yield shake_hands(f"{name} agents", box.ready, now)
    if box.ready.get("comms"):
        yield shake_hands(f"{name} comms", box.ready, now, "comms")


def _named(url: str, now: float) -> Iterator[Check]:
    """The box that the environment names, perhaps seen from inside a container."""
    here = {"operator": url, "token": os.environ.get("OSQBOX_TOKEN")}
    yield _operator("OSQBOX_URL", here, "unset OSQBOX_URL OSQBOX_TOKEN")
    if agents := os.environ.get("OSQBOX_AGENTS"):
        yield shake_hands("OSQBOX_AGENTS", {"agents": agents, "ca": os.environ.get("OSQBOX_CA_FILE")}, now)


def _operator(name: str, ready: dict[str, Any], hint: str) -> Check:
    try:
        client = client_at(ready["operator"], ready["token"])
        client.timeout_s = CONNECT_S
        client.get("/readyz")
        client.get("info")
    except UserError as error:
        return Check(name, "fail", str(error), hint)
    return Check(name, "ok", f"{ready['operator']} answers and takes the token")


def shake_hands(name: str, ready: dict[str, Any], now: float, listener: str = "agents") -> Check:
    """Connect as osqueryd would: by name, trusting only the box's CA, with osqueryd's ciphers."""
    url = urlsplit(ready[listener])
    host, port = url.hostname or "localhost", url.port or 443
    try:
        context = _agent_context(ready)
        with (
            socket.create_connection((host, port), CONNECT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            spoken = f"{tls.version()}, {(tls.cipher() or ('?',))[0]}"
            skew_s = _clock_skew(tls, host, now)
    except (OSError, ValueError) as error:
        return _diagnose(name, error, ready, host, port)
    if skew_s is not None and abs(skew_s) > CLOCK_SKEW_S:
        return Check(name, "warn", f"the box's clock differs by {skew_s:.0f} s", "timedatectl status")
    return Check(name, "ok", f"{ready[listener]} is trusted: {spoken}")


def _agent_context(ready: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ready.get("ca"))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(AGENT_CIPHERS)
    if ready.get("client_cert") and ready.get("client_key"):
        with suppress(OSError):  # not ours to read, and needed only if the box insists
            context.load_cert_chain(ready["client_cert"], ready["client_key"])
    return context


def _clock_skew(tls: ssl.SSLSocket, host: str, now: float) -> float | None:
    """Seconds by which the other side's ``Date`` differs; None when it sends none."""
    from email.utils import parsedate_to_datetime

    tls.sendall(f"GET /livez HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = tls.recv(4096)
    if not answer:
        raise ConnectionResetError("the connection was closed after the handshake")
    found = re.search(rb"\r\nDate: ([^\r\n]+)", answer, re.IGNORECASE)
    with suppress(ValueError):
        return parsedate_to_datetime(found[1].decode("latin-1")).timestamp() - now if found else None
    return None


def _diagnose(name: str, error: Exception, ready: dict[str, Any], host: str, port: int) -> Check:
    """Which of the classic causes it is."""

    def failed(message: str, hint: str) -> Check:
        return Check(name, "fail", message, hint)

    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code == _EXPIRED:
            return failed("the server certificate has expired", "osqbox certs renew")
        case ssl.SSLCertVerificationError(verify_code=code) if code == _NOT_YET_VALID:
            return failed("the certificate is not valid yet: this machine's clock is behind", "timedatectl status")
        case ssl.SSLCertVerificationError(verify_code=code) if code in (_WRONG_HOST, _WRONG_ADDRESS):
            return failed(f"the certificate is not for {host!r}", f"osqbox serve --host {host}, or osqbox certs show")
        case ssl.SSLCertVerificationError(verify_message=message):
            return failed(f"{ready.get('ca')} does not vouch for the certificate: {message}", "osqbox flags")
        case ConnectionResetError() | BrokenPipeError() | ssl.SSLEOFError():
            # The alert that says so may be lost with the reset.
            return failed(
                "the connection is closed at once: perhaps a client certificate is wanted", "osqbox flags --client-cert"
            )
        case ssl.SSLError() if "certificate required" in str(error).lower().replace("_", " "):
            return failed("the box wants a client certificate", "osqbox flags --client-cert")
        case ssl.SSLError():
            return failed(f"no TLS that osqueryd speaks on port {port}: {error.reason or error}", "osqbox status")
        case ConnectionRefusedError():
            return failed(f"nothing listens on {host}:{port}", "osqbox status")
        case TimeoutError():
            return failed(f"{host}:{port} does not answer within {CONNECT_S:g} s", "osqbox status")
        case socket.gaierror():
            return failed(f"the name {host!r} cannot be resolved", f"getent hosts {host}")
        case FileNotFoundError() | PermissionError():
            return failed(f"the CA file {ready.get('ca')} cannot be read: {error.strerror}", "osqbox certs show")
    return failed(f"{host}:{port}: {error}", "osqbox status")
