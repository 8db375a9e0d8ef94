"""``cmdctl login``: a key made here, signed there for a one-time token, and the settings to use it."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from osqbox.cli.jobs_connection import CONFIG_FILE, config_dir, parse_config
from osqbox.cli.output import printable, tell
from osqbox.errors import BadUsage, UserError
from osqbox.identity import make_directory, read_file, write_files
from osqbox.jobs.login_token import LoginToken

PATH = "/api/v1/certificates"
ANSWER_BYTES = 256 * 1024
TIMEOUT_S = 30.0
CERT, KEY, CA = "client.pem", "client.key", "ca.pem"


def login_token(ready: Mapping[str, Any], secret: str) -> str:
    """What a person carries to the machine that logs in: where to go, whom to find there, what to bring."""
    where = urlsplit(ready["agents"])
    context = ssl.create_default_context(cafile=ready.get("ca"))
    try:
        with (
            socket.create_connection((where.hostname, where.port), TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=where.hostname) as tls,
        ):
            certificate = tls.getpeercert(binary_form=True) or b""
    except OSError as error:
        raise UserError(f"the certificate of {ready['agents']} cannot be read: {error}", hint="osqbox doctor") from None
    return LoginToken(ready["agents"], hashlib.sha256(certificate).hexdigest(), secret).pack()


def log_in(text: str, directory: Path | None) -> None:
    """Write certificate, key, CA and ``cmdctl.toml``, all readable by this user only. Raises UserError."""
    directory = directory or config_dir()
    token = LoginToken.unpack(sys.stdin.readline().strip() if text == "-" else text)
    make_directory(directory)
    _refuse_overwriting(directory)
    key, csr = _key_and_request()
    answer = _exchange(token, csr)
    config = _config(answer["jobs"])
    parse_config(directory / CONFIG_FILE, config)
    write_files(
        directory,
        {KEY: key, CERT: answer["certificate"].encode(), CA: answer["ca"].encode(), CONFIG_FILE: config},
    )
    click.echo(directory / CONFIG_FILE)
    tell(f"logged in at {answer['jobs']}; try: cmdctl run ls -la")


def _key_and_request() -> tuple[bytes, bytes]:
    """A new key and a request for it, in PEM; whom the certificate is for is the server's to say."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, request.public_bytes(pem)


def _exchange(token: LoginToken, csr: bytes) -> dict[str, str]:
    where = urlsplit(token.url)
    # No CA is known yet: whom we talk to is checked by the fingerprint, before anything is sent.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=TIMEOUT_S, context=context)
    except ValueError:
        raise BadUsage("the token names no server that can be called") from None
    try:
        connection.connect()
        _check_server(connection.sock, token)
        body = json.dumps({"token": token.secret, "csr": csr.decode()})
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return _answer(response.status, response.read(ANSWER_BYTES))
    except ConnectionRefusedError:
        raise UserError(f"nothing answers at {token.url}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no answer from {token.url}: {error or type(error).__name__}") from None
    finally:
        connection.close()


def _check_server(tls: Any, token: LoginToken) -> None:
    certificate = tls.getpeercert(binary_form=True)
    if hashlib.sha256(certificate).hexdigest() != token.server.lower():
        raise UserError(
            f"{token.url} is not the server that the token is for: it shows another certificate; nothing was sent",
            hint="ask for a new token, made with: osqbox certs token NAME",
        )


def _answer(status: int, body: bytes) -> dict[str, str]:
    """``certificate``, ``ca`` and ``jobs``, whole."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"expected JSON from the server, got HTTP {status}")
    if status != 200:
        raise UserError(printable(found.get("error") or f"HTTP {status}"), hint="osqbox certs token NAME")
    if found.get("jobs") is None:
        raise UserError("this box signs certificates but does not run jobs", hint="osqbox serve --jobs-port 9090")
    if not all(isinstance(found.get(name), str) for name in ("certificate", "ca", "jobs")):
        raise UserError("expected a certificate, a CA and an address from the server, got something else")
    return found


def _config(server: str) -> bytes:
    values = {"server": server, "cert": CERT, "key": KEY, "ca": CA}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()).encode()


def _refuse_overwriting(directory: Path) -> None:
    """Settings that somebody wrote by hand are theirs; ours name our own files."""
    file = directory / CONFIG_FILE
    if file.exists() and f'key = "{KEY}"'.encode() not in read_file(file):
        raise UserError(
            f"{file} was not written by cmdctl login and would be overwritten", hint=f"mv {file} {file}.old"
        )
