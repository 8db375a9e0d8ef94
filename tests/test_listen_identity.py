"""Client certificates at a listener that demands them: who gets in, who they are, and when that ends."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from osqbox.exchange import Peer, Request, Response
from osqbox.listen import Limits, Listener, refusal_of_certificate, server_context

UNTRUSTED = "certificate_untrusted"
NOW = dt.datetime.now(dt.UTC)
HOUR = dt.timedelta(hours=1)
SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
KEEP: Any = object()


class Authority:
    """A CA that signs whatever a test wants."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / f"{name}.pem"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ski = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        cert = (
            self._builder(self.name, self.key.public_key(), NOW - HOUR, NOW + HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(SIGNS, True)
            .add_extension(self.ski, False)
            .sign(self.key, hashes.SHA256())
        )
        self.file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: Any, start: dt.datetime, end: dt.datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )

    def issue(
        self,
        file: str,
        *,
        names: tuple[str, ...] = (),
        uris: tuple[str, ...] = (),
        usage: Any = ExtendedKeyUsageOID.CLIENT_AUTH,
        start: dt.datetime = NOW - HOUR,
        end: dt.datetime = NOW + HOUR,
        key: Any = None,
        authority: Any = KEEP,
    ) -> Path:
        """One PEM file with certificate and key."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        builder = self._builder(subject, key.public_key(), start, end)
        san: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        san += [x509.DNSName("localhost")] if usage is ExtendedKeyUsageOID.SERVER_AUTH else []
        if san:
            builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=not names)
        ski = self.ski if authority is KEEP else authority
        if ski is not None:
            aki = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)
            builder = builder.add_extension(aki, False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        path = self.folder / f"{file}.pem"
        path.write_bytes(
            builder.sign(self.key, hashes.SHA256()).public_bytes(pem)
            + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        )
        return path


class World:
    """A server CA, a client CA, and a listener of the strict kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers, self.clients = Authority(folder, "servers"), Authority(folder, "clients")
        self.server = self.servers.issue("server", names=("localhost",), usage=ExtendedKeyUsageOID.SERVER_AUTH)
        self.revoked: set[int] = set()
        self.told: list[tuple[str | None, str]] = []
        self.now = NOW.timestamp()

    def context(self, **options: Any) -> ssl.SSLContext:
        wanted = {"minimum": ssl.TLSVersion.TLSv1_3, "alpn": ("h2", "http/1.1"), **options}
        return server_context(
            self.server, self.server, client_ca_file=self.clients.file, client_auth="required", **wanted
        )

    def client(self, chain: Path | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.servers.file))
        if chain is not None:
            context.load_cert_chain(chain)
        return context

    def check(self, peer: Peer) -> str | None:
        return refusal_of_certificate(peer, self.revoked, self.now)

    @contextlib.asynccontextmanager
    async def serving(self, handler: Handler | None = None, app: Any = None, **options: Any) -> AsyncIterator[Listener]:
        listener = Listener(
            "jobs",
            ssl_context=self.context(**options),
            handler=handler,
            app=app,
            check_peer=self.check,
            on_refused_peer=lambda peer, reason: self.told.append((peer.certificate_name, reason)),
            limits=Limits(write_timeout_s=60),
        )
        await listener.bind("127.0.0.1", 0)
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                await nursery.start(listener.run)
                yield listener
                await listener.drain()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Handler:
    """Notes who came; ``/held`` is not answered, ``/flood`` with more than any socket buffers."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.let_go = 0

    def body_limit_bytes(self, method: str, target: str) -> int:
        return 0

    async def answer(self, request: Request) -> Response:
        self.peers.append(request.peer)
        if request.target == "/held":
            try:
                await trio.sleep_forever()
            finally:
                self.let_go += 1
        return Response(bytes(64 * 1024 * 1024) if request.target == "/flood" else b"{}")

    def refuse(self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None) -> Response:
        return Response(json.dumps({"error": message, "reason": reason}).encode(), status=status)


Stream = trio.SSLStream[trio.SocketStream]


async def shaken(listener: Listener, context: ssl.SSLContext) -> Stream:
    plain = await trio.open_tcp_stream("127.0.0.1", listener.port)
    stream = trio.SSLStream(plain, context, server_hostname="localhost")
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def ask(stream: Stream, target: str = "/") -> bytes:
    await stream.send_all(GET.replace(b"/ ", target.encode() + b" ", 1))
    return bytes(await stream.receive_some())


async def ended(stream: Stream) -> None:
    """Until the other end has closed, in whatever way."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass
    await trio.aclose_forcefully(stream)


async def until(condition: Callable[[], bool]) -> None:
    """For effects on the other side of a socket, which no event announces."""
    with trio.fail_after(15):
        while not condition():
            await trio.sleep(0.001)


# who


def test_a_peer_carries_what_its_certificate_says(world: World) -> None:
    uris = ("osqbox://acme/alice", "osqbox-role:viewer", "osqbox-principal:www-data")
    chain = world.clients.issue("alice", names=("alice", "second"), uris=uris, end=NOW + 2 * HOUR)
    handler = Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            stream = await shaken(listener, world.client(chain))
            await ask(stream)
            await trio.aclose_forcefully(stream)

    trio.run(scenario)
    (peer,) = handler.peers
    assert (peer.certificate_uris, peer.certificate_common_names) == (uris, ("alice", "second"))
    assert peer.certificate_authority == world.clients.ski.digest.hex()
    assert peer.certificate_expires_at == int((NOW + 2 * HOUR).timestamp())
    assert (peer.certificate_name, peer.certificate_tenant, peer.tls_version) == (uris[0], "acme", "TLSv1.3")


def test_certificates_without_a_key_identifier_are_told_apart_by_their_issuer(world: World) -> None:
    chain = world.clients.issue("bare", names=("bare",), authority=None)
    handler = Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            stream = await shaken(listener, world.client(chain))
            await ask(stream)
            await trio.aclose_forcefully(stream)

    trio.run(scenario)
    assert (handler.peers[0].certificate_authority or "").startswith("issuer-")


# who not


UNWANTED: dict[str, tuple[str, Callable[[World], Path | None]]] = {
    "none": ("no_certificate", lambda world: None),
    "stranger": (UNTRUSTED, lambda world: Authority(world.folder, "strangers").issue("stranger", names=("alice",))),
    "same name of CA": (UNTRUSTED, lambda world: _impostor(world).issue("impostor", names=("alice",))),
    "signed by the server CA": (UNTRUSTED, lambda world: world.servers.issue("wrong", names=("a",))),
    "another CA's key identifier": (
        UNTRUSTED,
        lambda world: world.clients.issue("aki", names=("a",), authority=world.servers.ski),
    ),
    "server's": (
        "certificate_purpose",
        lambda world: world.clients.issue("srv", names=("a",), usage=ExtendedKeyUsageOID.SERVER_AUTH),
    ),
    "any usage": (
        "certificate_purpose",
        lambda world: world.clients.issue("any", names=("a",), usage=ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE),
    ),
    "expired": (
        "certificate_expired",
        lambda world: world.clients.issue("old", names=("a",), start=NOW - 2 * HOUR, end=NOW - HOUR),
    ),
    "not yet": (
        "certificate_not_yet_valid",
        lambda world: world.clients.issue("new", names=("a",), start=NOW + HOUR, end=NOW + 2 * HOUR),
    ),
    "weak key": (
        "certificate_weak",
        lambda world: world.clients.issue("weak", names=("weak",), key=rsa.generate_private_key(65537, 1024)),
    ),
}


def _impostor(world: World) -> Authority:
    (world.folder / "impostor").mkdir()
    return Authority(world.folder / "impostor", "clients")


@pytest.mark.parametrize("kind", UNWANTED)
def test_an_unwanted_client_never_reaches_a_handler(world: World, kind: str) -> None:
    reason, make = UNWANTED[kind]
    chain = make(world)
    context = ssl.create_default_context(cafile=str(world.servers.file))
    context.set_ciphers("ALL:@SECLEVEL=0")  # or our own side would refuse the weak key first
    if chain is not None:
        context.load_cert_chain(chain)
    handler = Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            with contextlib.suppress(trio.BrokenResourceError):
                stream = await shaken(listener, context)
                await stream.send_all(GET)
                await ended(stream)
            await until(lambda: listener.statistics().open_connections == 0)
            assert listener.statistics().handshake_failures == {reason: 1}

    trio.run(scenario)
    assert handler.peers == []


def test_tls_1_2_never_reaches_a_handler(world: World) -> None:
    context = world.client(world.clients.issue("alice", names=("alice",)))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    handler = Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            with pytest.raises(trio.BrokenResourceError):
                await shaken(listener, context)
            await until(lambda: listener.statistics().handshake_failures == {"version_or_cipher": 1})

    trio.run(scenario)
    assert handler.peers == []


@pytest.mark.parametrize("first", ["TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"])
def test_aes_256_is_chosen_also_when_the_client_would_rather_not(world: World, first: str) -> None:
    chain = world.clients.issue("alice", names=("alice",))

    async def scenario() -> None:
        async with world.serving(Handler()) as listener:
            words = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.port}", "-cert", chain, "-key", chain]
            words += ["-ciphersuites", f"{first}:TLS_AES_256_GCM_SHA384", "-CAfile", world.servers.file, "-brief"]
            done = await trio.run_process(words, stdin=b"", capture_stdout=True, stderr=subprocess.STDOUT, check=False)
            assert "Ciphersuite: TLS_AES_256_GCM_SHA384" in done.stdout.decode()

    trio.run(scenario)


# until when


@pytest.mark.parametrize("target", ["/held", "/flood", None])
@pytest.mark.parametrize("why", ["certificate_revoked", "certificate_expired"])
def test_a_live_connection_ends_at_the_recheck(world: World, target: str | None, why: str) -> None:
    """One that waits for its answer, one whose client does not read it, and an idle one; the other client stays."""
    bad, good = (world.clients.issue(name, names=(name,), end=NOW + n * HOUR) for n, name in ((1, "bad"), (2, "good")))
    handler = Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            live, other = [await shaken(listener, world.client(chain)) for chain in (bad, good)]
            await ask(other)
            if target is None:
                await ask(live)
            else:
                await live.send_all(GET.replace(b"/ ", target.encode() + b" ", 1))
            await until(lambda: len(handler.peers) == 2)
            assert listener.recheck() == 0
            if why == "certificate_expired":
                world.now = (NOW + HOUR).timestamp()
            else:
                world.revoked.add(handler.peers[1].certificate_serial or 0)
            assert listener.recheck() == 1
            with trio.fail_after(10):
                await until(lambda: listener.statistics().open_connections == 1)
                await ended(live)
            assert handler.let_go == (target == "/held")
            assert (await ask(other)).startswith(b"HTTP/1.1 200")
            late = await shaken(listener, world.client(bad))
            await late.send_all(GET)
            await ended(late)
            assert listener.statistics().refused == {why: 2}
            assert world.told == [("bad", why)] * 2
            assert listener.statistics().errors == 0
            await trio.aclose_forcefully(other)

    trio.run(scenario)
    assert len(handler.peers) == 3


def test_a_live_http2_stream_ends_at_the_recheck(world: World) -> None:
    """The application of the stream is cancelled, the client is told by the end of its connection."""
    let_go: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        try:
            await trio.sleep_forever()
        finally:
            let_go.append(scope["path"])

    chain = world.clients.issue("alice", names=("alice",))

    async def scenario() -> None:
        async with (
            world.serving(app=app) as listener,
            httpx.AsyncClient(verify=world.client(chain), http2=True, trust_env=False) as client,
            client.stream("GET", f"https://localhost:{listener.port}/followed") as response,
        ):
            assert response.http_version == "HTTP/2"
            pieces = response.aiter_raw()
            assert await anext(pieces) == b"one"
            world.now = (NOW + HOUR).timestamp()
            with trio.fail_after(10):
                assert listener.recheck() == 1
                with pytest.raises(httpx.TransportError):
                    await anext(pieces)
            await until(lambda: listener.statistics().open_connections == 0)
            assert listener.statistics().errors == 0

    trio.run(scenario)
    assert let_go == ["/followed"]


def test_a_resumed_session_is_known_and_refused_like_any_other(world: World) -> None:
    """A resumed handshake verifies nothing anew; what it resumes still says whose it was, and until when."""
    context, handler = world.client(world.clients.issue("alice", names=("alice",))), Handler()

    async def scenario() -> None:
        async with world.serving(handler) as listener:
            port = listener.port

            def visit(session: ssl.SSLSession | None) -> tuple[bool | None, bytes, ssl.SSLSession | None]:
                import socket

                with (
                    socket.create_connection(("127.0.0.1", port), 10) as plain,
                    context.wrap_socket(plain, server_hostname="localhost", session=session) as stream,
                ):
                    stream.sendall(GET)
                    with contextlib.suppress(ConnectionError, ssl.SSLError):
                        return stream.session_reused, stream.recv(100), stream.session
                    return stream.session_reused, b"", None

            reused, _, session = await trio.to_thread.run_sync(visit, None)
            assert not reused
            reused, answer, _ = await trio.to_thread.run_sync(visit, session)
            assert reused
            assert answer.startswith(b"HTTP/1.1 200")
            first, second = (replace(peer, connection="") for peer in handler.peers)
            assert first == second
            world.revoked.add(first.certificate_serial or 0)
            reused, answer, _ = await trio.to_thread.run_sync(visit, session)
            assert reused
            assert answer == b""

    trio.run(scenario)
    assert len(handler.peers) == 2


def test_without_resumption_there_is_nothing_to_resume(world: World) -> None:
    chain = world.clients.issue("alice", names=("alice",))

    async def scenario() -> None:
        async with world.serving(Handler(), resumption=False) as listener:
            words = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.port}", "-cert", chain, "-key", chain]
            words += ["-CAfile", world.servers.file, "-ign_eof"]
            request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            done = await trio.run_process(words, stdin=request, capture_stdout=True, capture_stderr=True, check=False)
            assert b"HTTP/1.1 200" in done.stdout
            assert b"New Session Ticket arrived" not in done.stdout

    trio.run(scenario)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (Peer("", "1"), None),
        (Peer("", "1", certificate_serial=7, certificate_expires_at=100.5), None),
        (Peer("", "1", certificate_serial=7, certificate_expires_at=100.0), "certificate_expired"),
        (Peer("", "1", certificate_serial=9, certificate_expires_at=100.0), "certificate_revoked"),
        (Peer("", "1", certificate_serial=7), None),
    ],
)
def test_why_a_certificate_is_refused(peer: Peer, expected: str | None) -> None:
    assert refusal_of_certificate(peer, {9}, now=100.0) == expected
