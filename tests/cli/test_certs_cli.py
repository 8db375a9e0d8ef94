"""`osqbox certs`: what a person and a script see. Always with --certs, never the default directory."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from osqbox.certs import ensure_identity
from osqbox.cli.certs import command
from osqbox.errors import BadSetup, BadUsage, UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = ensure_identity(tmp_path / "certs", now=time.time()).directory
    assert found is not None
    return found


def certs(*argv: str | Path, check: bool = True) -> Result:
    result = CliRunner().invoke(command, [str(arg) for arg in argv])
    assert not check or result.exit_code == 0, result.output
    return result


def certs_json(*argv: str | Path) -> Any:
    return json.loads(certs(*argv, "--json").stdout)


def refusal(*argv: str | Path) -> UserError:
    """The error that the program's wrapper turns into words and an exit code."""
    error = certs(*argv, check=False).exception
    assert isinstance(error, UserError)
    return error


def test_show_json_has_every_certificate_with_rfc3339_times(directory: Path) -> None:
    shown = certs_json("show", "--certs", directory)
    assert shown["directory"] == str(directory)
    assert [Path(each["file"]).name for each in shown["certificates"]] == [
        "ca.pem",
        "server.pem",
        "client-ca.pem",
        "client.pem",
    ]
    server = shown["certificates"][1]
    assert set(server) == {
        *("file", "subject", "issuer", "names", "serial", "not_before", "not_after", "days_left"),
        *("sha256", "key_type", "revoked"),
    }
    assert server["not_after"].endswith("Z")
    assert {"localhost", "127.0.0.1", "::1"} <= set(server["names"])
    assert (shown["revoked"], shown["notes"]) == ([], [])


def test_show_tells_a_person_names_dates_and_what_is_revoked(directory: Path) -> None:
    certs("revoke", "client", "--certs", directory)
    text = certs("show", "--certs", directory).stdout
    assert f"{directory / 'client.pem'}  REVOKED\n" in text
    assert "CN=localhost: localhost, 127.0.0.1, ::1" in text
    assert "397 days left" in text or "396 days left" in text


def test_show_examines_own_certificates(directory: Path) -> None:
    own = ("--tls-cert", directory / "server.pem", "--tls-key", directory / "server.key")
    shown = certs_json("show", *own, "--client-ca", directory / "client-ca.pem")
    assert shown["directory"] is None
    assert [Path(each["file"]).name for each in shown["certificates"]] == ["server.pem", "client-ca.pem"]
    assert isinstance(refusal("show", *own[:2]), BadUsage)
    wrong = refusal("show", *own[:2], "--tls-key", directory / "client.key")
    assert "does not belong to the certificate" in str(wrong)


def test_client_prints_three_paths_that_make_a_client(directory: Path) -> None:
    options = ("--tenant", "red", "--role", "run", "--role", "read.any", "--principal", "deploy", "--days", "7")
    paths = certs_json("client", "alice", *options, "--certs", directory)
    assert set(paths) == {"cert", "key", "ca"}
    context = ssl.create_default_context(cafile=paths["ca"])
    context.load_cert_chain(paths["cert"], paths["key"])
    alice = certs_json("show", "--certs", directory)["certificates"][-1]
    assert alice["names"] == [
        "osqbox://red/alice",
        "osqbox-role:run",
        "osqbox-role:read.any",
        "osqbox-principal:deploy",
    ]
    assert alice["days_left"] in (6, 7)


def test_client_out_is_printed_for_a_person(directory: Path, tmp_path: Path) -> None:
    text = certs("client", "bob", "--out", tmp_path / "bob", "--certs", directory).stdout
    assert text.splitlines() == [
        f"cert {tmp_path}/bob/bob.pem",
        f"key  {tmp_path}/bob/bob.key",
        f"ca   {tmp_path}/bob/ca.pem",
    ]


def test_renew_defaults_to_the_server(directory: Path) -> None:
    assert certs_json("renew", "--certs", directory) == {"renewed": [str(directory / "server.pem")]}
    text = certs("renew", "client", "server", "--certs", directory).stdout
    assert text.splitlines() == [str(directory / "server.pem"), str(directory / "client.pem")]
    assert isinstance(refusal("renew", "nobody", "--certs", directory), BadUsage)


def test_revoke_by_name_serial_and_file(directory: Path) -> None:
    for name in ("a", "b", "c"):
        certs("client", name, "--certs", directory)
    serials = {
        Path(each["file"]).stem: each["serial"] for each in certs_json("show", "--certs", directory)["certificates"]
    }
    for name, what in (("a", "a"), ("b", serials["b"]), ("c", directory / "clients" / "c.pem")):
        done = certs_json("revoke", what, "--certs", directory)
        assert done == {"revoked": [serials[name]], "crl": str(directory / "client-ca.crl")}
    shown = certs_json("show", "--certs", directory)
    assert shown["revoked"] == sorted(serials[name] for name in "abc")
    assert {Path(each["file"]).stem for each in shown["certificates"] if each["revoked"]} == set("abc")


@pytest.mark.parametrize("verb", [["show"], ["client", "x"], ["renew"], ["revoke", "x"]])
def test_every_verb_without_an_identity_says_what_to_type(tmp_path: Path, verb: list[str]) -> None:
    error = refusal(*verb, "--certs", tmp_path / "none")
    assert isinstance(error, BadSetup)
    assert error.hint == f"osqbox serve --certs {tmp_path / 'none'}"
    assert not (tmp_path / "none").exists()


def test_a_foreign_certificate_cannot_steer_the_terminal(tmp_path: Path) -> None:
    subject = "/CN=a\x1b]0;owned\x07b"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "90", "-subj", subject),
            *("-keyout", str(tmp_path / "k"), "-out", str(tmp_path / "c")),
        ],
        check=True,
        capture_output=True,
        timeout=50,
    )
    text = certs("show", "--tls-cert", tmp_path / "c", "--tls-key", tmp_path / "k").stdout
    assert "owned" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_the_verbs_load_no_x509_library_until_they_run() -> None:
    program = "import sys, osqbox.cli.certs; print('cryptography' in sys.modules, 'osqbox.certs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == ["False", "False"]
