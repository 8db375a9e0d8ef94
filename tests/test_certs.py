"""The identity of a box: made, accepted by every TLS stack at hand, reused, renewed, revoked, mended.

Every network test talks to a server thread on port 0 that answers one line naming its client.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from osqbox import certs, identity
from osqbox.certs import (
    Identity,
    describe,
    ensure_identity,
    issue_client,
    making,
    mending,
    reading,
    renew,
    revoke,
    revoked_serials,
    snapshot,
)
from osqbox.errors import BadSetup, BadUsage

NOW = time.time()
DAY_S = 86_400
YEAR_S = 365 * DAY_S
KEYS = ("ca.key", "server.key", "client-ca.key", "client.key", "enroll_secret")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """One identity for the tests that only look at it."""
    return ensure_identity(tmp_path_factory.mktemp("made"), now=NOW)


@pytest.fixture
def fresh(tmp_path: Path) -> Identity:
    """An identity to spoil."""
    return ensure_identity(tmp_path / "certs", now=NOW)


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def known(path: Path | None) -> Path:
    assert path is not None
    return path


def home(found: Identity) -> Path:
    return known(found.directory)


def run(*argv: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, timeout=50, **options)  # type: ignore[call-overload]
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done  # type: ignore[no-any-return]


# ---- peers ---------------------------------------------------------------------------------------------------


def server_context(found: Identity, *, client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(found.server_cert, found.server_key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(client_ca)
    return context


def client_context(ca: Path, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a completed handshake, in memory; raises what either end raised."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    waiting = list(ends)
    for _ in range(8):
        for end in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                waiting.remove(end)
    assert not waiting
    return ends


def uris_of(end: ssl.SSLObject | ssl.SSLSocket) -> list[str]:
    """What the other end's verified certificate says about it, in order."""
    peer: Any = end.getpeercert() or {}
    return [value for kind, value in peer.get("subjectAltName", ()) if kind == "URI"]


@contextlib.contextmanager
def serving(context: ssl.SSLContext) -> Iterator[int]:
    """The port of an HTTPS server on 127.0.0.1 that tells each client the URI in its certificate."""

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            uris = uris_of(tls)
            body = (uris[0] if uris else "nobody").encode()
            tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            with contextlib.suppress(OSError):
                tls.unwrap()

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(20)
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_python_accepts_the_server_strictly_under_each_local_name(made: Identity, host: str) -> None:
    shake_hands(server_context(made), client_context(known(made.ca)), host)


def test_python_refuses_the_server_under_another_name(made: Identity) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server_context(made), client_context(known(made.ca)), "example.org")


def test_the_first_client_certificate_is_accepted_where_one_is_required(made: Identity) -> None:
    server = server_context(made, client_ca=made.client_ca)
    client = client_context(known(made.ca), made.client_cert, made.client_key)
    _, end = shake_hands(server, client)
    assert uris_of(end) == ["osqbox://default/client"]


def test_no_client_certificate_is_refused_where_one_is_required(made: Identity) -> None:
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(server_context(made, client_ca=made.client_ca), client_context(known(made.ca)))


def test_the_server_certificate_does_not_pass_as_a_client(made: Identity) -> None:
    """Neither where the client CA is trusted, nor where somebody trusts the server CA for clients by mistake."""
    client = client_context(known(made.ca), made.server_cert, made.server_key)
    for trusted in (made.client_ca, made.ca):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(server_context(made, client_ca=trusted), client)


def test_a_client_certificate_does_not_pass_as_a_server(made: Identity) -> None:
    pretender = dataclasses.replace(made, server_cert=known(made.client_cert), server_key=known(made.client_key))
    for trusted in (made.ca, made.client_ca):
        context = client_context(known(trusted))
        context.check_hostname = False
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(server_context(pretender), context)


def test_the_server_ca_cannot_vouch_for_clients_nor_the_client_ca_for_servers(made: Identity) -> None:
    """Each CA carries its one usage, so that even a stolen CA key signs nothing of the other kind."""
    for stem, usage, trusts in (("ca", making.CLIENT_AUTH, "client"), ("client-ca", making.SERVER_AUTH, "server")):
        authority = reading.load_authority(home(made), stem)
        key, cert = making.make_leaf(authority, "x", [x509.DNSName("localhost")], usage, NOW, DAY_S)
        forged = home(made).parent / f"forged-{stem}.pem"
        forged.write_bytes(making.key_pem(key) + making.cert_pem(cert))
        trusted = home(made) / f"{stem}.pem"
        if trusts == "client":
            server, client = server_context(made, client_ca=trusted), client_context(known(made.ca), forged)
        else:
            server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.load_cert_chain(forged)
            client = client_context(trusted)
        with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
            shake_hands(server, client)


@pytest.mark.parametrize(
    ("ca", "leaf", "purpose"), [("ca", "server", "sslserver"), ("client-ca", "client", "sslclient")]
)
def test_openssl_verifies_strictly(made: Identity, ca: str, leaf: str, purpose: str) -> None:
    directory = home(made)
    verify = ("openssl", "verify", "-x509_strict", "-CAfile", directory / f"{ca}.pem", "-purpose", purpose)
    assert "OK" in run(*verify, directory / f"{leaf}.pem").stdout
    other = {"ca": "client-ca", "client-ca": "ca"}[ca]
    wrong = (*verify[:4], directory / f"{other}.pem", *verify[5:])
    assert run(*wrong, directory / f"{leaf}.pem", check=False).returncode != 0


def test_openssl_s_client_verifies_the_server_and_its_name(made: Identity) -> None:
    with serving(server_context(made)) as port:
        done = run(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", known(made.ca)),
            *("-verify_return_error", "-verify_hostname", "localhost", "-x509_strict", "-brief"),
            input="GET / HTTP/1.0\r\n\r\n",
        )
    assert "Verification: OK" in done.stderr
    assert "Verified peername: localhost" in done.stderr


def test_curl_with_a_client_certificate_is_known_to_the_server(made: Identity) -> None:
    with serving(server_context(made, client_ca=made.client_ca)) as port:
        trusting = ("curl", "-sS", "--noproxy", "*", "--cacert", known(made.ca), f"https://127.0.0.1:{port}/")
        done = run(*trusting, "--cert", known(made.client_cert), "--key", known(made.client_key))
        assert done.stdout == "osqbox://default/client"
        assert run(*trusting, check=False).returncode != 0


def test_curl_without_the_ca_refuses_the_server(made: Identity) -> None:
    with serving(server_context(made)) as port:
        done = run("curl", "-sS", "--noproxy", "*", f"https://localhost:{port}/", check=False)
    assert done.returncode == 60


GO_CLIENT = """
package main

import ("crypto/tls"; "crypto/x509"; "fmt"; "io"; "net/http"; "os")

func check(err error) { if err != nil { fmt.Println("error:", err); os.Exit(1) } }

func main() {
	pem, err := os.ReadFile(os.Args[2])
	check(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	config := &tls.Config{RootCAs: pool}
	if len(os.Args) > 3 {
		pair, err := tls.LoadX509KeyPair(os.Args[3], os.Args[4])
		check(err)
		config.Certificates = []tls.Certificate{pair}
		leaf, err := x509.ParseCertificate(pair.Certificate[0])
		check(err)
		clients, err := os.ReadFile(os.Args[5])
		check(err)
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(clients)
		usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: usage})
		check(err)
		for _, uri := range leaf.URIs { fmt.Println(uri) }
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
	answer, err := client.Get(os.Args[1])
	check(err)
	body, err := io.ReadAll(answer.Body)
	check(err)
	fmt.Println(string(body))
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="go is not on PATH")
def test_go_accepts_server_and_clients_of_both_key_types(tmp_path: Path) -> None:
    """Go parses URIs inside certificates, so awkward but allowed names are tried with it too."""
    (tmp_path / "main.go").write_text(GO_CLIENT)
    program = tmp_path / "client"
    offline = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GO111MODULE": "off", "CGO_ENABLED": "0"}
    run("go", "build", "-o", program, tmp_path / "main.go", env=os.environ | offline, cwd=tmp_path)
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    kinds: tuple[certs.KeyType, ...] = ("ec", "rsa")
    for key_type in kinds:
        found = ensure_identity(tmp_path / key_type, key_type=key_type, now=NOW)
        issued = issue_client(
            home(found), "a.b_c-D", tenant="t.1_x", roles=["stop.own"], principals=["svc@host"], now=NOW
        )
        with serving(server_context(found, client_ca=found.client_ca)) as port:
            url = f"https://localhost:{port}/"
            done = run(program, url, known(found.ca), *issued[:2], known(found.client_ca), env=bare)
            uris = ["osqbox://t.1_x/a.b_c-D", "osqbox-role:stop.own", "osqbox-principal:svc@host"]
            assert done.stdout.split() == [*uris, uris[0]]
            refused = run(program, url, known(found.client_ca), check=False, env=bare)
            assert "certificate" in refused.stdout
            assert refused.returncode == 1


# ---- what is written ------------------------------------------------------------------------------------------


def test_the_server_certificate_says_what_it_should(made: Identity) -> None:
    cert = load(made.server_cert)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", socket.gethostname().lower()} <= set(names.get_values_for_type(x509.DNSName))
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [making.SERVER_AUTH]
    assert cert.extensions.get_extension_for_class(x509.KeyUsage).critical
    assert cert.extensions.get_extension_for_class(x509.BasicConstraints).critical
    days = (cert.not_valid_after_utc - cert.not_valid_before_utc).total_seconds() / DAY_S
    assert 397 <= days < 398


def test_authorities_last_ten_years_and_sign_no_other_authorities(made: Identity) -> None:
    for path in (made.ca, made.client_ca):
        cert = load(known(path))
        assert cert.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
        assert (cert.not_valid_after_utc.timestamp() - NOW) / YEAR_S == pytest.approx(10, abs=0.1)


def test_serial_numbers_and_subjects_of_two_identities_differ(tmp_path: Path) -> None:
    one, two = (ensure_identity(tmp_path / name, now=NOW) for name in ("one", "two"))
    facts = [*describe(one, NOW), *describe(two, NOW)]
    assert len({each.serial for each in facts}) == len(facts)
    assert load(known(one.ca)).subject != load(known(two.ca)).subject
    assert one.enroll_secret() != two.enroll_secret()


def test_keys_are_private_and_certificates_public_whatever_the_umask(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; os.umask(int(sys.argv[2], 8))\n"
        "from osqbox.certs import ensure_identity\n"
        "ensure_identity(pathlib.Path(sys.argv[1]), now=float(sys.argv[3]))"
    )
    for umask in ("000", "277"):
        directory = tmp_path / umask
        directory.mkdir()
        run(sys.executable, "-c", program, directory, umask, str(NOW))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
        assert {name: modes[name] for name in KEYS} == dict.fromkeys(KEYS, 0o600)
        public = ("ca.pem", "client-ca.pem", "server.pem", "client.pem", "client-ca.crl")
        assert {name: modes[name] for name in public} == dict.fromkeys(public, 0o644)


def test_a_key_is_never_readable_by_others_not_even_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at between creation and the final rename, under the most permissive umask."""
    seen: dict[str, int] = {}
    flush = os.fsync

    def look(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            seen[Path(f"/proc/self/fd/{descriptor}").readlink().name] = stat.S_IMODE(found.st_mode)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    modes: list[int] = []
    create = os.open

    def record(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            modes.append(mode)
        return create(path, flags, mode)

    monkeypatch.setattr(os, "open", record)
    old = os.umask(0)
    try:
        ensure_identity(tmp_path, now=NOW)
    finally:
        os.umask(old)
    assert {mode for name, mode in seen.items() if ".key." in name} == {0o600}
    assert set(modes) == {0o600}


def test_further_names_are_in_the_server_certificate(tmp_path: Path) -> None:
    asked = ["box.example.org", "*.lab.example", "10.1.2.3", "[fe80::1%eth0]", "BÜCHER.example.", "0.0.0.0", "::"]
    found = ensure_identity(tmp_path, names=asked, now=NOW)
    names = describe(found, NOW)[1].names
    expected = {"box.example.org", "*.lab.example", "10.1.2.3", "fe80::1", "xn--bcher-kva.example"}
    assert expected <= set(names)
    assert not {"0.0.0.0", "::"} & set(names)
    shake_hands(server_context(found), client_context(known(found.ca)), "10.1.2.3")


def test_a_name_asked_for_later_is_added_to_those_already_there(fresh: Identity) -> None:
    ensure_identity(home(fresh), names=["one.example"], now=NOW)
    again = ensure_identity(home(fresh), names=["two.example"], now=NOW)
    assert {"localhost", "one.example", "two.example"} <= set(describe(again, NOW)[1].names)
    assert any("lacked two.example" in note for note in again.notes)
    assert ensure_identity(home(fresh), names=["one.example"], now=NOW).notes == ()


@pytest.mark.parametrize("name", ["", "a b", "-x.example", "a" * 64, "http://x", "x/y", "*.*.example", "é" * 80])
def test_a_name_no_certificate_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadUsage, match="expected a host name or an IP address"):
        ensure_identity(tmp_path, names=[name], now=NOW)


@pytest.mark.parametrize(("key_type", "words"), [("rsa", "RSA 2048"), ("rsa-3072", "RSA 3072")])
def test_rsa_keys_on_request_and_kept_by_renewals(tmp_path: Path, key_type: certs.KeyType, words: str) -> None:
    found = ensure_identity(tmp_path, key_type=key_type, now=NOW)
    shake_hands(
        server_context(found, client_ca=found.client_ca),
        client_context(known(found.ca), found.client_cert, found.client_key),
    )
    renew(tmp_path, ["server"], now=NOW)
    assert {each.key_type for each in describe(found, NOW)} == {words}
    assert "OK" in run("openssl", "verify", "-x509_strict", "-CAfile", known(found.ca), found.server_cert).stdout


# ---- the second run -------------------------------------------------------------------------------------------


def test_the_second_run_changes_nothing_and_loads_no_x509_library(fresh: Identity) -> None:
    """Also after the verbs were at work, and with something revoked."""
    issue_client(home(fresh), "alice", now=NOW)
    renew(home(fresh), ["client"], now=NOW)
    revoke(home(fresh), "alice", now=NOW)
    before = files_in(home(fresh))
    program = (
        "import pathlib, sys\n"
        "from osqbox.certs import ensure_identity, revoked_serials, snapshot\n"
        "found = ensure_identity(pathlib.Path(sys.argv[1]), names=['localhost', '0.0.0.0'], now=float(sys.argv[2]))\n"
        "assert found.notes == (), found.notes\n"
        "assert len(revoked_serials(found)) == 1; snapshot(found); found.enroll_secret()\n"
        "print('cryptography' in sys.modules)"
    )
    assert run(sys.executable, "-c", program, home(fresh), str(NOW)).stdout.strip() == "False"
    assert files_in(home(fresh)) == before


def test_an_identity_may_be_moved_or_copied(fresh: Identity, tmp_path: Path) -> None:
    copy = shutil.copytree(home(fresh), tmp_path / "copy")
    assert ensure_identity(copy, now=NOW).notes == ()
    assert files_in(copy) == files_in(home(fresh))


def test_processes_starting_at_once_agree(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from osqbox.certs import ensure_identity\n"
        "import cryptography.x509\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "found = ensure_identity(pathlib.Path(sys.argv[1]), now=float(sys.argv[2]))\n"
        "print(found.enroll_secret(), found.server_cert.read_bytes().hex(), found.ca.read_bytes().hex())"
    )
    directory = tmp_path / "deep" / "certs"
    argv = [sys.executable, "-c", program, str(directory), str(NOW)]
    starting = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in starting:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in starting:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=50)[0] for process in starting}
    assert [process.returncode for process in starting] == [0, 0, 0]
    assert len(answers) == 1
    assert not list(directory.glob(identity.TEMPORARY))


def test_a_healthy_identity_waits_for_nobody(fresh: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LOCK_WAIT_S", 0.1)
    with identity.locked(home(fresh)):
        assert ensure_identity(home(fresh), now=NOW) == fresh


def test_a_lock_that_is_never_released_is_reported(fresh: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LOCK_WAIT_S", 0.1)
    with (
        identity.locked(home(fresh)),
        pytest.raises(BadSetup, match="another process has held it") as caught,
    ):
        renew(home(fresh), now=NOW)
    assert caught.value.hint is not None
    assert "fuser" in caught.value.hint


# ---- time -----------------------------------------------------------------------------------------------------


def test_a_server_certificate_with_less_than_30_days_left_is_renewed(fresh: Identity) -> None:
    before = files_in(home(fresh))
    assert ensure_identity(home(fresh), now=NOW + 366 * DAY_S).notes == ()
    later = NOW + 370 * DAY_S
    renewed = ensure_identity(home(fresh), now=later)
    assert any("server.pem was made anew: it had 27 days left" in note for note in renewed.notes)
    assert any("client.pem was made anew" in note for note in renewed.notes)
    after = files_in(home(fresh))
    unchanged = {name for name in before if before[name] == after[name]}
    assert {"ca.pem", "ca.key", "client-ca.pem", "client-ca.key", "enroll_secret"} <= unchanged
    assert not {"server.pem", "server.key", "client.pem", "client.key"} & unchanged
    assert describe(renewed, later)[1].days_left == 397
    assert ensure_identity(home(fresh), now=later).notes == ()


def test_an_expired_server_certificate_is_renewed(fresh: Identity) -> None:
    renewed = ensure_identity(home(fresh), now=NOW + 500 * DAY_S)
    assert any("server.pem was made anew: it expired on" in note for note in renewed.notes)


def test_a_ca_near_its_end_is_extended_with_the_same_key(fresh: Identity) -> None:
    """Certificates it signed before verify under the new file, and new ones under the old file."""
    old_ca = known(fresh.ca).read_bytes()
    late = NOW + 3_640 * DAY_S
    extended = ensure_identity(home(fresh), now=late)
    assert any("ca.pem was renewed with the same key" in note for note in extended.notes)
    assert known(fresh.ca).read_bytes() != old_ca
    (home(fresh) / "old-ca").write_bytes(old_ca)
    at = ("-attime", str(int(late)), "-x509_strict")
    for ca in ("old-ca", "ca.pem"):
        run("openssl", "verify", *at, "-CAfile", home(fresh) / ca, extended.server_cert)


def test_a_ca_signed_by_another_one_is_used_but_never_extended(tmp_path: Path) -> None:
    """A company's intermediate, given to the box: self-signing it would make a CA that nobody trusts."""
    root, middle = making.new_key("ec"), making.new_key("rsa")
    extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.BasicConstraints(ca=True, path_length=None), True)]
    names = making.common_name("middle"), making.common_name("root")
    ends = NOW + 50 * DAY_S
    given = making.sign(names[0], middle.public_key(), extensions, names[1], root, NOW, ends)
    (tmp_path / "ca.pem").write_bytes(making.cert_pem(given))
    identity.write_files(tmp_path, {"ca.key": making.key_pem(middle)})
    assert load(ensure_identity(tmp_path, now=NOW).server_cert).issuer == given.subject
    near = ensure_identity(tmp_path, now=NOW + 40 * DAY_S)
    assert any("ca.pem expires in 10 days: only whoever signed it can renew it" in note for note in near.notes)
    assert load(known(near.ca)) == given
    before = near.server_cert.read_bytes()
    assert ensure_identity(tmp_path, now=NOW + 40 * DAY_S).server_cert.read_bytes() == before


def test_no_certificate_outlives_its_ca(fresh: Identity) -> None:
    late = NOW + 3_600 * DAY_S
    found = ensure_identity(home(fresh), now=late)
    ends = {each.file.name: each.not_after for each in describe(found, late)}
    assert ends["server.pem"] == ends["ca.pem"]
    issue_client(home(fresh), "alice", days=2000, now=late)
    assert load(home(fresh) / "clients/alice.pem").not_valid_after_utc.timestamp() == ends["client-ca.pem"]


def test_without_the_ca_key_the_end_is_announced_and_then_reported(fresh: Identity) -> None:
    """Somebody keeps the CA's key elsewhere, as one should."""
    (home(fresh) / "ca.key").unlink()
    assert ensure_identity(home(fresh), now=NOW).notes == ()
    near = ensure_identity(home(fresh), now=NOW + 380 * DAY_S)
    assert any("server.pem expires in 17 days: ca.key is not here" in note for note in near.notes)
    with pytest.raises(BadSetup, match=r"server\.pem expired on .*ca\.key is not here") as caught:
        ensure_identity(home(fresh), now=NOW + 400 * DAY_S)
    assert caught.value.hint == "osqbox certs renew"
    with pytest.raises(BadSetup, match=r"ca\.key is not here"):
        renew(home(fresh), ["server"], now=NOW)


def test_a_clock_before_the_certificates_is_reported(fresh: Identity) -> None:
    with pytest.raises(BadSetup, match=r"valid only from .* clock says 20"):
        ensure_identity(home(fresh), now=NOW - 10 * DAY_S)


def test_renew_names_what_changed_and_keeps_names(fresh: Identity) -> None:
    ensure_identity(home(fresh), names=["box.example"], now=NOW)
    directory = home(fresh)
    assert renew(directory, now=NOW) == (directory / "server.pem",)
    assert "box.example" in describe(fresh, NOW)[1].names
    issue_client(directory, "alice", tenant="red", roles=["run"], days=7, now=NOW)
    issue_client(directory, "bob", now=NOW)
    revoke(directory, "bob", now=NOW)
    changed = renew(directory, ["all"], now=NOW + DAY_S)
    assert {path.name for path in changed} == {"server.pem", "client.pem", "alice.pem"}
    alice = describe(fresh, NOW + DAY_S)[-2]
    assert alice.names == ("osqbox://red/alice", "osqbox-role:run")
    assert alice.days_left == 7
    with pytest.raises(BadUsage, match="expected server, client, all or a name"):
        renew(directory, ["nobody"], now=NOW)
    assert ensure_identity(directory, now=NOW + DAY_S).notes == ()


def test_a_lost_key_costs_neither_names_nor_roles(fresh: Identity) -> None:
    """A person moves the key to where it is used, or loses it; the certificate still says whose it was."""
    directory = home(fresh)
    ensure_identity(directory, names=["box.example"], now=NOW)
    issue_client(directory, "alice", tenant="red", roles=["run"], now=NOW)
    for key in (directory / "clients/alice.key", directory / "server.key"):
        key.unlink()
    renew(directory, ["alice"], now=NOW)
    found = ensure_identity(directory, now=NOW)
    names = {each.file.name: each.names for each in describe(found, NOW)}
    assert names["alice.pem"] == ("osqbox://red/alice", "osqbox-role:run")
    assert "box.example" in names["server.pem"]


def test_expired_clients_leave_the_record_but_revoked_ones_stay(fresh: Identity) -> None:
    for name in ("gone", "banned"):
        issue_client(home(fresh), name, days=1, now=NOW)
    revoke(home(fresh), "banned", now=NOW)
    issue_client(home(fresh), "new", now=NOW + 2 * DAY_S)
    issued = json.loads((home(fresh) / "issued.json").read_text())
    assert [each["name"] for each in issued] == ["client", "banned", "new"]


def test_a_certificate_from_the_future_is_made_anew_once_the_clock_is_set_right(fresh: Identity) -> None:
    renew(home(fresh), ["server"], now=NOW + 10 * DAY_S)
    found = ensure_identity(home(fresh), now=NOW)
    assert any("server.pem was made anew: it was valid only from" in note for note in found.notes)
    assert describe(found, NOW)[1].not_before < NOW


# ---- clients and revocation -----------------------------------------------------------------------------------


def test_an_issued_client_is_known_by_its_uris_in_order(fresh: Identity) -> None:
    cert, key, ca = issue_client(
        home(fresh), "alice", tenant="red", roles=["run", "read.any"], principals=["deploy", "www-data"], now=NOW
    )
    assert (cert, key, ca) == (
        home(fresh) / "clients/alice.pem",
        home(fresh) / "clients/alice.key",
        home(fresh) / "ca.pem",
    )
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    _, end = shake_hands(server_context(fresh, client_ca=fresh.client_ca), client_context(ca, cert, key))
    peer = end.getpeercert()
    assert peer is not None
    assert peer["subject"] == ((("commonName", "alice"),),)
    assert uris_of(end) == [
        "osqbox://red/alice",
        "osqbox-role:run",
        "osqbox-role:read.any",
        "osqbox-principal:deploy",
        "osqbox-principal:www-data",
    ]


def test_a_client_written_elsewhere_brings_the_ca_and_spares_what_is_not_ours(fresh: Identity, tmp_path: Path) -> None:
    out = tmp_path / "hand" / "over"
    cert, key, ca = issue_client(home(fresh), "alice", out=out, now=NOW)
    assert sorted(path.name for path in out.iterdir()) == ["alice.key", "alice.pem", "ca.pem"]
    shake_hands(server_context(fresh, client_ca=fresh.client_ca), client_context(ca, cert, key))
    issue_client(home(fresh), "alice", out=out, now=NOW)
    stranger = ensure_identity(tmp_path / "stranger", now=NOW)
    before = files_in(out)
    with pytest.raises(BadSetup, match="another CA's and would be overwritten"):
        issue_client(home(stranger), "bob", out=out, now=NOW)
    (out / "ca.pem").unlink()
    with pytest.raises(BadSetup, match="not from this client CA"):
        issue_client(home(stranger), "alice", out=out, now=NOW)
    assert {name: data for name, data in before.items() if name != "ca.pem"} == files_in(out)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("../x", {}),
        ("", {}),
        (".hidden", {}),
        ("a/b", {}),
        ("a..b", {}),
        ("end.", {}),
        ("x" * 64, {}),
        ("nul\0", {}),
        ("new\nline", {}),
        ("server", {}),
        ("client", {}),
        ("ok", {"tenant": "a b"}),
        ("ok", {"tenant": "Upper"}),
        ("ok", {"roles": ["a/b"]}),
        ("ok", {"principals": [""]}),
        ("ok", {"days": 0}),
    ],
)
def test_unfit_words_for_a_client_are_refused_before_anything_is_written(
    made: Identity, name: str, options: dict[str, object]
) -> None:
    before = files_in(home(made))
    with pytest.raises(BadUsage, match=r"expected|already names"):
        issue_client(home(made), name, now=NOW, **options)  # type: ignore[arg-type]
    assert files_in(home(made)) == before


def test_revoking_a_name_covers_every_certificate_it_had(fresh: Identity, tmp_path: Path) -> None:
    directory = home(fresh)
    serials = set()
    for out in (None, tmp_path / "a", None):
        cert, _, _ = issue_client(directory, "alice", out=out, now=NOW)
        serials.add(load(cert).serial_number)
    bob = load(issue_client(directory, "bob", now=NOW)[0]).serial_number
    assert set(revoke(directory, "alice", now=NOW)) == serials
    assert revoked_serials(directory) == serials == revoked_serials(fresh)
    assert bob not in revoked_serials(directory)
    assert [each.file.stem for each in describe(fresh, NOW) if each.revoked] == ["alice"]
    assert set(revoke(directory, "alice", now=NOW + 5)) == serials


@pytest.mark.parametrize(
    "spell",
    [
        lambda cert, path: f"{cert.serial_number:X}",
        lambda cert, path: f"0x{cert.serial_number:x}",
        lambda cert, path: str(cert.serial_number),
        lambda cert, path: ":".join(f"{cert.serial_number:040x}"[i : i + 2] for i in range(0, 40, 2)),
        lambda cert, path: str(path),
    ],
    ids=["hex", "0x", "decimal", "colons", "file"],
)
def test_a_certificate_is_revoked_by_serial_number_or_file(
    fresh: Identity, spell: Callable[[x509.Certificate, Path], str]
) -> None:
    path, _, _ = issue_client(home(fresh), "alice", now=NOW)
    cert = load(path)
    assert revoke(home(fresh), spell(cert, path), now=NOW) == (cert.serial_number,)
    assert revoked_serials(fresh) == {cert.serial_number}


def test_openssl_and_python_honour_the_crl(fresh: Identity) -> None:
    """Also an empty one: with CRL checking on, a missing list would refuse everybody."""
    alice = issue_client(home(fresh), "alice", now=NOW)
    trusting = ("-CAfile", known(fresh.client_ca), "-CRLfile", known(fresh.crl))
    verify = ("openssl", "verify", "-x509_strict", "-crl_check", *trusting)

    def connect() -> None:
        server = server_context(fresh, client_ca=fresh.client_ca)
        server.load_verify_locations(fresh.crl)
        server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        shake_hands(server, client_context(known(fresh.ca), *alice[:2]))

    run(*verify, alice[0])
    connect()
    revoke(home(fresh), "alice", now=NOW)
    assert "certificate revoked" in run(*verify, alice[0], check=False).stderr
    run(*verify, known(fresh.client_cert))
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        connect()


def test_what_this_ca_did_not_issue_cannot_be_revoked(fresh: Identity) -> None:
    with pytest.raises(BadUsage, match=r"expected a client's name \(client\)"):
        revoke(home(fresh), "nobody", now=NOW)
    with pytest.raises(BadUsage, match="was not issued by"):
        revoke(home(fresh), fresh.server_cert, now=NOW)


def test_a_revoked_first_client_is_told_and_replaced_only_on_request(fresh: Identity) -> None:
    (serial,) = revoke(home(fresh), "client", now=NOW)
    found = ensure_identity(home(fresh), now=NOW + 400 * DAY_S)
    assert any("client.pem is revoked" in note for note in found.notes)
    assert load(known(found.client_cert)).serial_number == serial
    renew(home(fresh), ["client"], now=NOW)
    assert load(known(found.client_cert)).serial_number not in revoked_serials(fresh)


def test_a_lost_crl_is_made_again_with_everything_in_it(fresh: Identity) -> None:
    issue_client(home(fresh), "alice", now=NOW)
    serials = set(revoke(home(fresh), "alice", now=NOW))
    known(fresh.crl).unlink()
    found = ensure_identity(home(fresh), now=NOW)
    assert any("client-ca.crl was made anew from issued.json" in note for note in found.notes)
    assert revoked_serials(fresh) == serials
    (home(fresh) / "issued.json").unlink()
    ensure_identity(home(fresh), now=NOW)
    assert set(revoke(home(fresh), "client", now=NOW)) | serials == revoked_serials(fresh)


def test_a_revocation_cut_short_by_a_crash_is_completed(fresh: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_crl", crash)
        with pytest.raises(KeyboardInterrupt):
            revoke(home(fresh), "client", now=NOW)
    ensure_identity(home(fresh), now=NOW)
    assert revoked_serials(fresh) == {load(known(fresh.client_cert)).serial_number}


def test_a_crl_that_vanished_revives_nobody(fresh: Identity) -> None:
    """A box that runs asks again when the file changes, and keeps what it knew when the answer is an error."""
    revoke(home(fresh), "client", now=NOW)
    known(fresh.crl).unlink()
    with pytest.raises(BadSetup, match=r"client-ca\.crl: cannot be read"):
        revoked_serials(fresh)


def test_a_crl_of_another_ca_is_refused(fresh: Identity, made: Identity) -> None:
    known(fresh.crl).write_bytes(known(made.crl).read_bytes())
    for look in (lambda: revoked_serials(fresh), lambda: ensure_identity(home(fresh), now=NOW)):
        with pytest.raises(BadSetup, match="the CRL was not signed by"):
            look()


def test_a_crl_with_a_forged_signature_is_refused(fresh: Identity) -> None:
    pem = known(fresh.crl).read_text()
    der = bytearray(ssl.PEM_cert_to_DER_cert(pem.replace("X509 CRL", "CERTIFICATE")))
    der[-1] ^= 1
    known(fresh.crl).write_text(ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "X509 CRL"))
    with pytest.raises(BadSetup, match="the CRL was not signed by"):
        revoked_serials(home(fresh))


def test_a_snapshot_tells_what_changed(fresh: Identity) -> None:
    before = snapshot(fresh)
    assert snapshot(fresh) == before
    revoke(home(fresh), "client", now=NOW)
    revoked = snapshot(fresh)
    assert (revoked.server, revoked.client_ca) == (before.server, before.client_ca)
    assert revoked.crl != before.crl
    renew(home(fresh), ["server"], now=NOW)
    renewed = snapshot(fresh)
    assert renewed.server != revoked.server
    assert renewed.crl == revoked.crl
    known(fresh.crl).unlink()
    assert snapshot(fresh).crl is None


def test_a_live_context_takes_up_the_renewed_certificate(fresh: Identity) -> None:
    context = server_context(fresh)
    client = client_context(known(fresh.ca))
    first, _ = shake_hands(context, client)
    renew(home(fresh), now=NOW)
    context.load_cert_chain(fresh.server_cert, fresh.server_key)
    second, _ = shake_hands(context, client)
    assert first.getpeercert()["serialNumber"] != second.getpeercert()["serialNumber"]  # type: ignore[index]


# ---- broken, missing, foreign ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(8))
def test_a_crash_at_any_step_of_the_first_run_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The process dies in the middle of the step's renames; the next start ends up with a whole identity."""
    directory = tmp_path / "certs"
    write, count = identity.write_files, 0

    def dying(target: Path, files: dict[str, bytes]) -> None:
        nonlocal count
        if count == step:
            write(target, dict(list(files.items())[:1]) if len(files) > 1 else {})
            (target / f".osqbox-{next(iter(files))}.dead.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        count += 1
        write(target, files)

    with monkeypatch.context() as patch:
        for module in (making, mending):
            patch.setattr(module, "write_files", dying)
        with pytest.raises(KeyboardInterrupt):
            ensure_identity(directory, now=NOW)
    found = ensure_identity(directory, now=NOW)
    shake_hands(
        server_context(found, client_ca=found.client_ca),
        client_context(known(found.ca), found.client_cert, found.client_key),
    )
    assert found.enroll_secret()
    assert not list(directory.glob(identity.TEMPORARY))
    assert ensure_identity(directory, now=NOW).notes == ()


def test_a_renewal_cut_between_key_and_certificate_is_mended(fresh: Identity, made: Identity) -> None:
    fresh.server_key.write_bytes(made.server_key.read_bytes())
    found = ensure_identity(home(fresh), now=NOW)
    assert any("server.key did not belong to it" in note for note in found.notes)
    shake_hands(server_context(found), client_context(known(found.ca)))


@pytest.mark.parametrize("name", ["server.pem", "server.key", "client.pem", "client.key"])
@pytest.mark.parametrize("harm", ["missing", "empty", "rubbish"])
def test_a_spoilt_leaf_is_made_anew_because_the_ca_is_here(fresh: Identity, name: str, harm: str) -> None:
    path = home(fresh) / name
    path.unlink() if harm == "missing" else path.write_text("" if harm == "empty" else "not PEM\n")
    found = ensure_identity(home(fresh), now=NOW)
    assert any("was made anew" in note and name in note for note in found.notes)
    shake_hands(
        server_context(found, client_ca=found.client_ca),
        client_context(known(found.ca), found.client_cert, found.client_key),
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ca.pem", None, r"ca\.pem is missing while server\.pem"),
        ("client-ca.pem", None, r"client-ca\.pem is missing while client\.pem"),
        ("ca.pem", "", r"ca\.pem: expected a certificate in PEM"),
        ("ca.key", "rubbish", r"ca\.key: expected a private key in PEM"),
        ("client-ca.crl", "rubbish", r"client-ca\.crl: expected a CRL in PEM"),
        ("issued.json", "{}", r"issued\.json: expected the list"),
        ("issued.json", '[{"serial": "xyz"}]', r"issued\.json: expected the list"),
        ("enroll_secret", " \n", r"enroll_secret: expected an enroll secret, got an empty file"),
    ],
)
def test_a_loss_that_agents_would_notice_is_reported_not_papered_over(
    fresh: Identity, name: str, content: str | None, words: str
) -> None:
    path = home(fresh) / name
    path.unlink() if content is None else path.write_text(content)
    (home(fresh) / "identity.json").unlink()
    before = files_in(home(fresh))
    with pytest.raises(BadSetup, match=words) as caught:
        ensure_identity(home(fresh), now=NOW)
    assert caught.value.hint
    assert files_in(home(fresh)) == before


def test_a_ca_with_the_wrong_key_or_no_ca_at_all_is_reported(fresh: Identity, made: Identity) -> None:
    (home(fresh) / "ca.key").write_bytes((home(made) / "ca.key").read_bytes())
    with pytest.raises(BadSetup, match="the key does not belong to the CA"):
        ensure_identity(home(fresh), now=NOW)
    known(fresh.ca).write_bytes(fresh.server_cert.read_bytes())
    with pytest.raises(BadSetup, match="expected a CA certificate"):
        ensure_identity(home(fresh), now=NOW)


def test_a_server_certificate_of_another_ca_is_not_replaced(fresh: Identity, made: Identity) -> None:
    fresh.server_cert.write_bytes(made.server_cert.read_bytes())
    fresh.server_key.write_bytes(made.server_key.read_bytes())
    with pytest.raises(BadSetup, match=r"not signed by the CA beside it.*--tls-cert"):
        ensure_identity(home(fresh), now=NOW)
    assert fresh.server_cert.read_bytes() == made.server_cert.read_bytes()


def test_a_record_that_is_spoilt_or_from_the_future_is_made_again(fresh: Identity) -> None:
    record = home(fresh) / "identity.json"
    for content in ("", "{}", "[]", record.read_text().replace('"version": 1', '"version": 2')):
        record.write_text(content)
        assert ensure_identity(home(fresh), now=NOW).notes == ()
        assert json.loads(record.read_text())["version"] == 1


def test_an_exposed_key_is_closed_and_told(fresh: Identity) -> None:
    fresh.server_key.chmod(0o644)
    found = ensure_identity(home(fresh), now=NOW)
    assert any("server.key could be read by others" in note for note in found.notes)
    assert stat.S_IMODE(fresh.server_key.stat().st_mode) == 0o600


def test_a_lost_enroll_secret_is_made_again(fresh: Identity) -> None:
    old = fresh.enroll_secret()
    (home(fresh) / "enroll_secret").unlink()
    assert ensure_identity(home(fresh), now=NOW).enroll_secret() not in ("", old)


def test_an_own_enroll_secret_is_kept_and_trimmed(tmp_path: Path) -> None:
    (tmp_path / "enroll_secret").write_text("  s3cret \n")
    assert ensure_identity(tmp_path, now=NOW).enroll_secret() == "s3cret"
    (tmp_path / "enroll_secret").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSetup, match="in UTF-8"):
        ensure_identity(tmp_path, now=NOW).enroll_secret()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_the_directory_should_be_is_reported(tmp_path: Path, below: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetup, match=rf"file.*cannot be written by uid {os.geteuid()}") as caught:
        ensure_identity(tmp_path / "file" / "certs" if below else tmp_path / "file", now=NOW)
    assert caught.value.hint == 'osqbox serve --certs "$HOME/osqbox-certs"'


def as_nobody(program: str, *argv: str | Path) -> str:
    """Output of a program run by somebody who owns nothing here."""
    drop = "import os, pathlib, sys\nif os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    head = "from osqbox.certs import *\nfrom osqbox.errors import UserError\nimport cryptography.x509, encodings.idna\n"
    return run(sys.executable, "-c", head + drop + program, *argv).stdout


ENSURE = (
    "try: print(ensure_identity(pathlib.Path(sys.argv[1]), now=float(sys.argv[2])).notes)\n"
    "except UserError as error: print(os.geteuid(), error, '|', error.hint)"
)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory that anybody can read and only its owner can write."""
    with tempfile.TemporaryDirectory(prefix="osqbox-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        directory.chmod(0o755)


def test_an_unwritable_directory_is_reported_with_uid_path_and_next_command(shared: Path) -> None:
    shared.chmod(0o555)
    uid, _, words = as_nobody(ENSURE, shared, str(NOW)).partition(" ")
    assert f"{shared}: cannot be written by uid {uid}: Permission denied" in words
    assert "| osqbox serve --certs" in words


def test_a_key_that_cannot_be_read_is_reported(shared: Path) -> None:
    ensure_identity(shared, now=NOW)
    if os.geteuid() != 0:
        (shared / "ca.key").chmod(0)
    assert "key: cannot be read by uid" in as_nobody(ENSURE, shared, str(NOW))


def test_a_read_only_identity_serves_without_its_record_and_past_its_renewal(shared: Path) -> None:
    """A mounted secret: no lock, no record, no renewal possible; fine until the certificate really ends."""
    ensure_identity(shared, now=NOW)
    for path in shared.iterdir():
        path.chmod(0o444)
    (shared / "identity.json").unlink()
    shared.chmod(0o555)
    note = "can be read by others and its mode cannot be changed"
    if os.geteuid() == 0:
        assert note in as_nobody(ENSURE, shared, str(NOW))
    near = as_nobody(ENSURE, shared, str(NOW + 380 * DAY_S))
    assert "still serve but could not be renewed" in near
    assert "cannot be written by uid" in as_nobody(ENSURE, shared, str(NOW + 400 * DAY_S))


# ---- the user's own certificates ------------------------------------------------------------------------------


@dataclasses.dataclass
class Own:
    directory: Path
    ca: Path
    cert: Path
    key: Path


@pytest.fixture
def own(tmp_path: Path) -> Own:
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    paths = Own(tmp_path, tmp_path / "own-ca.pem", tmp_path / "own.pem", tmp_path / "own.key")
    authority.cert_pem.write_to_path(paths.ca)
    leaf.cert_chain_pems[0].write_to_path(paths.cert)
    leaf.private_key_pem.write_to_path(paths.key)
    return paths


def test_own_certificates_serve(own: Own) -> None:
    found = Identity.from_own(own.cert, own.key, own.ca, now=NOW)
    assert (found.server_cert, found.server_key, found.client_ca) == (own.cert, own.key, own.ca)
    assert (found.directory, found.ca, found.client_cert, found.crl) == (None, None, None, None)
    shake_hands(server_context(found), client_context(own.ca))
    assert [each.file for each in describe(found, NOW)] == [own.cert, own.ca]
    assert revoked_serials(found) == frozenset()
    assert snapshot(found).crl is None
    with pytest.raises(BadSetup, match="no enroll secret file"):
        found.enroll_secret()


def test_what_is_not_ones_own_comes_from_the_base(own: Own, made: Identity) -> None:
    mixed = Identity.from_own(own.cert, own.key, now=NOW, base=made)
    assert mixed.enroll_secret() == made.enroll_secret()
    assert (mixed.client_ca, mixed.crl, mixed.client_cert) == (made.client_ca, made.crl, made.client_cert)
    assert revoked_serials(mixed) == frozenset()
    theirs = Identity.from_own(own.cert, own.key, own.ca, now=NOW, base=made)
    assert (theirs.client_ca, theirs.crl, theirs.client_cert) == (own.ca, None, None)
    half = Identity.from_own(made.server_cert, made.server_key, own.ca, now=NOW, base=made)
    assert (half.ca, half.client_ca) == (made.ca, own.ca)


def test_an_own_client_ca_may_bring_its_crl(own: Own, fresh: Identity) -> None:
    (serial,) = revoke(home(fresh), "client", now=NOW)
    found = Identity.from_own(own.cert, own.key, fresh.client_ca, crl=fresh.crl, now=NOW)
    assert revoked_serials(found) == {serial}
    with pytest.raises(BadSetup, match="the CRL was not signed by"):
        Identity.from_own(own.cert, own.key, own.ca, crl=fresh.crl, now=NOW)


def test_an_own_self_signed_certificate_is_its_own_ca(tmp_path: Path) -> None:
    run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "90"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", tmp_path / "k", "-out", tmp_path / "c"),
    )
    found = Identity.from_own(tmp_path / "c", tmp_path / "k", now=time.time())
    assert found.ca == tmp_path / "c"
    shake_hands(server_context(found), ssl.create_default_context(cafile=found.ca))


def test_an_own_key_of_another_certificate_is_refused(own: Own, made: Identity) -> None:
    with pytest.raises(BadSetup, match="the key does not belong to the certificate"):
        Identity.from_own(own.cert, made.server_key, now=NOW)


def test_an_own_encrypted_key_is_refused_without_asking_on_the_terminal(own: Own) -> None:
    locked = own.directory / "locked.key"
    run("openssl", "pkey", "-in", own.key, "-aes256", "-passout", "pass:x", "-out", locked)
    with pytest.raises(BadSetup, match="without a password") as caught:
        Identity.from_own(own.cert, locked, now=NOW)
    assert "openssl pkey" in str(caught.value.hint)


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("", "PEM"), ("rubbish", "PEM|pem")])
def test_own_files_that_cannot_be_used_are_named(own: Own, which: str, content: str | None, words: str) -> None:
    path = getattr(own, which)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BadSetup, match=words) as caught:
        Identity.from_own(own.cert, own.key, own.ca, now=NOW)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_own_certificates_out_of_their_time_are_refused(fresh: Identity) -> None:
    """Stand-ins for a user's certificates, whose dates we know."""
    with pytest.raises(BadSetup, match="expired on") as caught:
        Identity.from_own(fresh.server_cert, fresh.server_key, now=NOW + 400 * DAY_S)
    assert caught.value.hint == "osqbox certs renew"
    with pytest.raises(BadSetup, match="valid only from"):
        Identity.from_own(fresh.server_cert, fresh.server_key, now=NOW - DAY_S)
    near = Identity.from_own(fresh.server_cert, fresh.server_key, now=NOW + 390 * DAY_S)
    assert any("expires in 7 days" in note for note in near.notes)


def test_an_own_certificate_or_ca_for_another_purpose_is_refused(own: Own, fresh: Identity) -> None:
    with pytest.raises(BadSetup, match="expected a server certificate"):
        Identity.from_own(known(fresh.client_cert), known(fresh.client_key), now=NOW)
    with pytest.raises(BadSetup, match="expected a CA certificate"):
        Identity.from_own(own.cert, own.key, fresh.server_cert, now=NOW)
    with pytest.raises(BadSetup, match="no CA certificate in it is valid now"):
        Identity.from_own(own.cert, own.key, fresh.client_ca, now=NOW + 20 * YEAR_S)


# ---- facts ----------------------------------------------------------------------------------------------------


def test_the_facts_are_those_openssl_prints(made: Identity) -> None:
    facts = {each.file.name: each for each in describe(made, NOW)}
    assert list(facts) == ["ca.pem", "server.pem", "client-ca.pem", "client.pem"]
    server = facts["server.pem"]
    printed = run(
        *("openssl", "x509", "-in", server.file, "-noout", "-serial", "-fingerprint", "-sha256", "-enddate")
    ).stdout
    assert f"serial={server.serial}\n" in printed
    assert server.sha256.upper() in printed.replace(":", "")
    ends = next(line for line in printed.splitlines() if line.startswith("notAfter="))
    assert ssl.cert_time_to_seconds(ends.removeprefix("notAfter=")) == server.not_after
    assert server.issuer == facts["ca.pem"].subject
    assert server.key_type == "EC P-256"
    assert 396 <= server.days_left <= 397
    assert not server.revoked
    assert load_pem_private_key(made.server_key.read_bytes(), None).public_key() == load(server.file).public_key()


def test_verbs_on_a_directory_without_an_identity_say_how_to_make_one(tmp_path: Path) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: certs.existing_identity(tmp_path),
        lambda: renew(tmp_path, now=NOW),
        lambda: revoke(tmp_path, "x", now=NOW),
        lambda: issue_client(tmp_path, "x", now=NOW),
    ]
    for verb in verbs:
        with pytest.raises(BadSetup, match="expected the certificates of a box") as caught:
            verb()
        assert caught.value.hint == f"osqbox serve --certs {tmp_path}"
    assert list(tmp_path.iterdir()) == []
