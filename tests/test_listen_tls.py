"""TLS of the listeners: contexts, live rotation, failed handshakes, identities, old versions."""

from __future__ import annotations

import contextlib
import json
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from osqbox.errors import BadSetup
from osqbox.exchange import Peer, Request, Response
from osqbox.listen import (
    Limits,
    Listener,
    certificate_identity,
    probe_tls_minimum,
    rotate_certificate,
    server_context,
)

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Pki:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        self.cert_file, self.key_file = self.issue("server", "localhost", "127.0.0.1")

    def issue(self, file: str, *names: str) -> tuple[Path, Path]:
        issued = self.ca.issue_cert(*names)
        cert_file, key_file = self.folder / f"{file}.crt", self.folder / f"{file}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert_file))
        issued.private_key_pem.write_to_path(str(key_file))
        return cert_file, key_file

    def server(self, **options: Any) -> ssl.SSLContext:
        return server_context(self.cert_file, self.key_file, client_ca_file=self.ca_file, **options)

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


class TellPeer:
    """Answers with the peer, as the listener knows it."""

    def body_limit_bytes(self, method: str, target: str) -> int:
        return 0

    async def answer(self, request: Request) -> Response:
        peer = request.peer
        return Response(json.dumps([peer.certificate_name, peer.certificate_tenant, peer.tls_version]).encode())

    def refuse(self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None) -> Response:
        return Response(b"{}", status=status)


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext, events: list[str], **limits: Any) -> AsyncIterator[Listener]:
    listener = Listener(
        "agents", ssl_context=context, handler=TellPeer(), on_event=events.append, limits=Limits(**limits)
    )
    await listener.bind("127.0.0.1", 0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            yield listener
            await listener.drain()


async def ask(stream: trio.abc.Stream) -> Any:
    await stream.send_all(GET)
    answer = b""
    while not answer.endswith(b"]"):
        answer += await stream.receive_some()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def tls(listener: Listener, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", listener.port, ssl_context=context)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def until(condition: Callable[[], bool]) -> None:
    """For effects on the other side of a socket, which no event announces."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario)


# identities


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [
        pytest.param(None, (None, None, None), id="no certificate"),
        pytest.param({}, (None, None, None), id="not verified"),
        pytest.param({"subject": ((("commonName", "a"),),), "serialNumber": "0A"}, ("a", 10, None), id="common name"),
        pytest.param(
            {"subject": ((("commonName", "a"),),), "subjectAltName": (("DNS", "b"), ("URI", "spiffe://x/y"))},
            ("spiffe://x/y", None, None),
            id="foreign URI",
        ),
        pytest.param(
            {"subjectAltName": (("URI", "osqbox://acme/laptop-1"), ("URI", "osqbox://evil/x"))},
            ("osqbox://acme/laptop-1", None, "acme"),
            id="tenant of the first URI only",
        ),
        pytest.param(
            {"subjectAltName": (("URI", "osqbox:///laptop"),)}, ("osqbox:///laptop", None, None), id="no tenant"
        ),
        pytest.param(
            {"subjectAltName": (("URI", "osqbox://acme"),)}, ("osqbox://acme", None, None), id="no name in the tenant"
        ),
        pytest.param(
            {"subjectAltName": (("URI", "osqbox://a@b/c"),)}, ("osqbox://a@b/c", None, None), id="user information"
        ),
    ],
)
def test_identity_of_a_certificate(certificate: Any, expected: tuple[Any, Any, Any]) -> None:
    identity = certificate_identity(certificate)
    assert (identity.name, identity.serial, identity.tenant) == expected


def test_optional_client_certificates_tell_who_is_there(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki.server(client_auth="optional"), []) as listener:
            async with await tls(listener, pki.client()) as stream:
                assert await ask(stream) == [None, None, "TLSv1.3"]
            known = pki.client()
            known.load_cert_chain(*_uri_certificate(pki))
            async with await tls(listener, known) as stream:
                assert await ask(stream) == ["osqbox://acme/laptop-1", "acme", "TLSv1.3"]

    run(scenario)


def _uri_certificate(pki: Pki) -> tuple[Path, Path]:
    """trustme issues no URI names, so this one is made by hand."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    ca_key = serialization.load_pem_private_key(pki.ca.private_key_pem.bytes(), None)
    ca_cert = x509.load_pem_x509_certificate(pki.ca.cert_pem.bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca_cert.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("osqbox://acme/laptop-1")]), True)
        .sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    )
    cert_file, key_file = pki.folder / "uri.crt", pki.folder / "uri.key"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    cert_file.write_bytes(certificate.public_bytes(pem))
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return cert_file, key_file


# handshakes that fail: each is counted by its reason, and the listener answers the next client


async def _plain_http(listener: Listener, pki: Pki) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", listener.port) as stream:
        await stream.send_all(GET)
        with contextlib.suppress(trio.BrokenResourceError):  # reset or end: just closed
            assert await stream.receive_some() == b""


async def _noise(listener: Listener, pki: Pki) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", listener.port) as stream:
        await stream.send_all(bytes(range(256)))
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass


async def _leave(listener: Listener, pki: Pki) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", listener.port) as stream:
        await stream.send_all(b"\x16\x03\x01")


async def _say_nothing(listener: Listener, pki: Pki) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", listener.port) as stream:
        assert await stream.receive_some() == b""


async def _distrust(listener: Listener, pki: Pki) -> None:
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", listener.port, ssl_context=ssl.create_default_context())
    with pytest.raises(trio.BrokenResourceError):
        await stream.do_handshake()
    # what other clients do by themselves: tell why
    await stream.transport_stream.send_all(stream._outgoing.read())
    await trio.aclose_forcefully(stream)


async def _old_version(listener: Listener, pki: Pki) -> None:
    context = pki.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", listener.port, ssl_context=context)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await stream.do_handshake()
    assert "PROTOCOL_VERSION" in str(caught.value.__cause__)
    await trio.aclose_forcefully(stream)


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [
        (_plain_http, "plaintext"),
        (_noise, "plaintext"),
        (_leave, "gone"),
        (_say_nothing, "timeout"),
        (_distrust, "refused_by_client"),
        (_old_version, "version_or_cipher"),
    ],
)
def test_a_failed_handshake_is_counted_by_its_reason(
    pki: Pki, misbehave: Callable[[Listener, Pki], Awaitable[None]], reason: str
) -> None:
    events: list[str] = []

    async def scenario() -> None:
        async with serving(pki.server(), events, handshake_timeout_s=0.3) as listener:
            await misbehave(listener, pki)
            await until(lambda: bool(events))
            async with await tls(listener, pki.client()) as stream:
                assert await ask(stream) == [None, None, "TLSv1.3"]
            assert listener.statistics().handshake_failures == {reason: 1}
            assert listener.statistics().errors == 0

    run(scenario)
    assert events == [f"handshake_{reason}"]


def test_a_client_without_the_certificate_reads_why(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trio leaves OpenSSL's alert unsent; with it, the client says what it lacks instead of "connection reset"."""
    events: list[str] = []
    stranger = Pki(tmp_path_factory.mktemp("stranger"))

    async def scenario() -> None:
        async with serving(pki.server(client_auth="required"), events) as listener:
            foreign = pki.client()
            foreign.load_cert_chain(*stranger.issue("client", "client.example"))
            for context, why in ((pki.client(), "CERTIFICATE_REQUIRED"), (foreign, "UNKNOWN_CA")):
                stream = await tls(listener, context)
                with pytest.raises(trio.BrokenResourceError) as caught:
                    await stream.receive_some()
                assert why in str(caught.value.__cause__)
                await trio.aclose_forcefully(stream)
            known = pki.client()
            known.load_cert_chain(*pki.issue("client", "client.example"))
            async with await tls(listener, known) as stream:
                await ask(stream)

    run(scenario)
    assert events == ["handshake_no_certificate", "handshake_certificate_untrusted"]


# contexts


def test_rotation_is_live_and_spares_open_connections(pki: Pki) -> None:
    def serial(stream: trio.SSLStream[Any]) -> str:
        return str(stream.getpeercert()["serialNumber"])

    async def scenario() -> None:
        context = pki.server()
        async with serving(context, []) as listener, await tls(listener, pki.client()) as old:
            rotate_certificate(context, *pki.issue("next", "localhost", "127.0.0.1"))
            async with await tls(listener, pki.client()) as new:
                assert serial(new) != serial(old)
                await ask(new)
            await ask(old)

    run(scenario)


def test_a_bad_rotation_leaves_the_old_certificate_in_service(pki: Pki) -> None:
    async def scenario() -> None:
        context = pki.server()
        async with serving(context, []) as listener:
            cert_file, _ = pki.issue("next", "localhost")
            with pytest.raises(BadSetup, match="do not belong together"):
                rotate_certificate(context, cert_file, pki.key_file)
            async with await tls(listener, pki.client()) as stream:
                await ask(stream)

    run(scenario)


def test_set_up_errors_name_the_file(pki: Pki, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    other_key = pki.issue("other", "localhost")[1]
    good = (pki.cert_file, pki.key_file)
    cases: list[tuple[tuple[Path, Path], dict[str, Any], str]] = [
        ((tmp_path / "absent.pem", pki.key_file), {}, "cannot read .*absent.pem"),
        ((empty, pki.key_file), {}, "empty.pem .* are not usable PEM files"),
        ((pki.cert_file, other_key), {}, "do not belong together"),
        (good, {"client_auth": "required"}, "no client CA is given"),
        (good, {"client_auth": "optional", "client_ca_file": empty}, "empty.pem holds no PEM certificate"),
        (good, {"client_auth": "optional", "client_ca_file": tmp_path / "no"}, "cannot read .*no"),
    ]
    for files, options, message in cases:
        with pytest.raises(BadSetup, match=message):
            server_context(*files, **options)


def test_a_key_behind_a_password_is_an_error_not_a_prompt(pki: Pki) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pki.key_file.read_bytes(), None)
    locked = pki.folder / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(BadSetup, match="protected by a password"):
        server_context(pki.cert_file, locked)


def test_tls_1_3_only_prefers_aes_256(pki: Pki) -> None:
    async def scenario() -> None:
        async with serving(pki.server(minimum=ssl.TLSVersion.TLSv1_3), []) as listener:
            async with await tls(listener, pki.client()) as stream:
                assert stream.cipher()[0] == "TLS_AES_256_GCM_SHA384"
            older = pki.client()
            older.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(trio.BrokenResourceError):
                await tls(listener, older)

    run(scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_probed_by_a_real_handshake(pki: Pki, version: ssl.TLSVersion) -> None:
    refusal = probe_tls_minimum(version, ciphers="DEFAULT:@SECLEVEL=2")
    assert refusal is not None, "OpenSSL 3 signs nothing with SHA-1 at security level 2"
    if probe_tls_minimum(version) is not None:
        with pytest.raises(BadSetup, match="does not speak"):
            pki.server(minimum=version)
        return

    async def scenario() -> None:
        async with serving(pki.server(minimum=version), []) as listener:
            context = pki.client()
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = version
            async with await tls(listener, context) as stream:
                assert (await ask(stream))[2] == {"TLSv1": "TLSv1", "TLSv1_1": "TLSv1.1"}[version.name]
            async with await tls(listener, pki.client()) as stream:
                assert (await ask(stream))[2] == "TLSv1.3"

    run(scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_current_versions_always_work(version: ssl.TLSVersion) -> None:
    assert probe_tls_minimum(version) is None
