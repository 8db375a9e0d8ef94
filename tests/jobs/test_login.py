"""One-time tokens: what they stand for, who gets a certificate for them, and who does not."""

from __future__ import annotations

import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from osqbox import audit, tenants
from osqbox.attempts import Attempts
from osqbox.certs import ensure_identity, revoke
from osqbox.clock import SystemClock
from osqbox.door import Door
from osqbox.errors import BadUsage, Refused
from osqbox.exchange import Peer, Request, Response
from osqbox.feed import Feed
from osqbox.jobs import login
from osqbox.jobs.access import caller_of
from osqbox.jobs.login import Order
from osqbox.jobs.routes import PATH, CertificateApi
from osqbox.listen import Listener, server_context
from osqbox.store import Store

PEM = serialization.Encoding.PEM
SECRET = "a-token-that-was-made-for-this-test"
ALICE = Order("alice", roles=("viewer",), principals=("www-data",), valid_s=3600)


class AnyClock(SystemClock):
    """Certificates are judged by OpenSSL, by the real time; this one can be ahead of it."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Rig:
    def __init__(self, store: Store, clock: AnyClock, certs: Path | None) -> None:
        self.store, self.clock, self.certs = store, clock, certs
        self.api = CertificateApi(store, clock, certs, lambda: b"the CA", lambda: "localhost:9090")

    async def token(self, order: Order = ALICE, secret: str = SECRET, ttl_s: float = 60) -> login.Token:
        return await self.store.write(lambda tx: login.create_token(tx, order, secret, f"id-{secret[:8]}", ttl_s))

    async def ask(self, body: Any, method: str = "POST", address: str = "192.0.2.7") -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(method, PATH, {}, raw, Peer(address, "1"), trio.sleep_forever)
        response = await self.api.answer(request)
        assert response is not None
        answer = json.loads(response.body)
        assert ("error" in answer) == (response.status != 200)
        assert SECRET not in response.body.decode()
        return response.status, answer

    def audited(self) -> list[tuple[str, str, str]]:
        return [(row["actor"], row["action"], row["result"]) for row in self.store.peek(audit.rows)]


Run = Callable[[Callable[[Rig], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    ensure_identity(directory, now=SystemClock().now())
    return directory


@pytest.fixture
def rig(tmp_path: Path, identity: Path) -> Run:
    async def main(test: Callable[[Rig], Awaitable[None]]) -> None:
        clock = AnyClock()
        migrations = [tenants.migrations, audit.migrations, login.migrations]
        store = Store.open(tmp_path / "osqbox.db", migrations, clock, Feed())
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                await store.write(lambda tx: tenants.create(tx, tenants.DEFAULT, tenants.TenantOptions()))
                try:
                    await test(Rig(store, clock, identity))
                finally:
                    await store.aclose()

    return lambda test: trio.run(main, test)


def csr_of(key: Any, name: str = "root") -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    uri = x509.UniformResourceIdentifier("osqbox-role:admin")
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(PEM).decode()


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


# what is given


def test_the_certificate_says_what_the_token_stands_for_and_not_what_the_request_asks(rig: Run) -> None:
    own = key()

    async def test(rig: Rig) -> None:
        await rig.token()
        status, answer = await rig.ask({"token": SECRET, "csr": csr_of(own)})
        assert (status, answer["ca"], answer["jobs"]) == (200, "the CA", "localhost:9090")
        cert = x509.load_pem_x509_certificate(answer["certificate"].encode())
        assert cert.public_key() == own.public_key()
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = ["osqbox://default/alice", "osqbox-role:viewer", "osqbox-principal:www-data"]
        assert san.get_values_for_type(x509.UniformResourceIdentifier) == uris
        usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert cert.not_valid_after_utc.timestamp() == pytest.approx(rig.clock.now() + 3600, abs=30)
        [_, issued] = rig.store.peek(audit.rows)
        assert (issued["actor"], issued["subject"], issued["result"]) == ("default/alice", "id-a-token-", "ok")
        assert (issued["serial"], issued["address"]) == (f"{cert.serial_number:x}", "192.0.2.7")
        # and it can be revoked by its name
        assert cert.serial_number in revoke(rig.certs or Path(), "alice", now=rig.clock.now())

    rig(test)


def test_a_token_is_good_once_even_for_many_at_a_time(rig: Run) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await rig.ask({"token": SECRET, "csr": csr_of(key())}))[0])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert sorted(statuses) == [200, 401, 401, 401, 401]
        assert rig.audited().count(("default/alice", "login.issue", "ok")) == 1

    rig(test)


def test_a_certificate_by_token_opens_the_jobs_listener(rig: Run) -> None:
    """Over real TLS, from the token to the identity the server sees."""
    own, seen = key(), []

    class Jobs:
        def body_limit_bytes(self, method: str, target: str) -> int:
            return 0

        async def answer(self, request: Request) -> Response:
            seen.append(caller_of(request.peer))
            return Response(b"{}")

        def refuse(self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None) -> Any:
            return Response(b'{"error":"no such path"}', status=status)

    async def test(rig: Rig) -> None:
        assert rig.certs is not None
        files = (rig.certs / "server.pem", rig.certs / "server.key")
        ca = rig.certs / "client-ca.pem"
        strict = server_context(
            *files, client_ca_file=ca, client_auth="required", minimum=ssl.TLSVersion.TLSv1_3, resumption=False
        )
        agents = Listener("agents", ssl_context=server_context(*files), handler=Door(Jobs(), rig.api))
        jobs = Listener("jobs", ssl_context=strict, handler=Jobs())
        await agents.bind("127.0.0.1", 0)
        await jobs.bind("127.0.0.1", 0)
        await rig.token()
        async with trio.open_nursery() as nursery:
            await nursery.start(agents.run)
            await nursery.start(jobs.run)
            context = ssl.create_default_context(cafile=str(rig.certs / "ca.pem"))
            async with httpx.AsyncClient(verify=context, trust_env=False) as client:
                url = f"https://localhost:{agents.port}{PATH}"
                answer = await client.post(url, json={"token": SECRET, "csr": csr_of(own)})
                assert answer.status_code == 200
                assert (await client.get(url)).status_code == 405
                assert (await client.post(url, content=b"x" * 40_000)).status_code == 413
            chain = rig.certs.parent / "alice-chain.pem"
            plain = serialization.NoEncryption()
            private = own.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)
            chain.write_bytes(answer.json()["certificate"].encode() + private)
            context = ssl.create_default_context(cafile=str(rig.certs / "ca.pem"))
            context.load_cert_chain(chain)
            async with httpx.AsyncClient(verify=context, trust_env=False) as client:
                assert (await client.get(f"https://localhost:{jobs.port}/")).status_code == 200
            await agents.drain()
            await jobs.drain()

    rig(test)
    [caller] = seen
    assert (caller.owner, caller.roles, caller.principals) == ("default/alice", {"viewer"}, ("www-data",))
    assert len(caller.authority) == 40


# what is refused


def test_unknown_used_and_expired_tokens_are_refused_alike(rig: Run) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        body = {"token": SECRET, "csr": csr_of(key())}
        rig.clock.ahead_s = 60.5
        expired = await rig.ask(body)
        rig.clock.ahead_s = 0
        assert (await rig.ask(body))[0] == 200
        used = await rig.ask(body)
        unknown = await rig.ask({**body, "token": "x"})
        assert expired == used == unknown
        assert used[0] == 401
        assert rig.audited().count(("", "login.issue", "token_refused")) == 3

    rig(test)


def dsa_csr() -> str:
    return csr_of(dsa.generate_private_key(2048))


def forged_csr() -> str:
    """Somebody else's public key in a request that its holder never signed."""
    der = x509.load_pem_x509_csr(csr_of(key()).encode()).public_bytes(serialization.Encoding.DER)
    broken = bytearray(der)
    broken[-1] ^= 1
    try:
        request = x509.load_der_x509_csr(bytes(broken))
    except ValueError:
        return "not a request"
    return request.public_bytes(PEM).decode()


@pytest.mark.parametrize(
    "csr",
    [
        lambda: "",
        lambda: "nonsense",
        lambda: "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n",
        lambda: "\ud800",
        lambda: csr_of(rsa.generate_private_key(65537, 1024)),
        lambda: csr_of(ec.generate_private_key(ec.SECP192R1())),
        lambda: csr_of(ec.generate_private_key(ec.BrainpoolP256R1())),
        dsa_csr,
        forged_csr,
    ],
)
def test_a_bad_request_is_told_and_costs_no_token(rig: Run, csr: Callable[[], str]) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        status, answer = await rig.ask({"token": SECRET, "csr": csr()})
        assert (status, answer["reason"]) == (400, "bad_csr" if csr() != "\ud800" else "bad_body")
        assert (await rig.ask({"token": SECRET, "csr": csr_of(key())}))[0] == 200

    rig(test)


@pytest.mark.parametrize("make", [ed25519.Ed25519PrivateKey.generate, lambda: rsa.generate_private_key(65537, 2048)])
def test_other_good_keys_are_taken(rig: Run, make: Callable[[], Any]) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        assert (await rig.ask({"token": SECRET, "csr": csr_of(make())}))[0] == 200

    rig(test)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token":1,"csr":"x"}',
        b'{"token":"x"}',
        b"\xff",
        b"[" * 10_000,
        b'{"token":null,"csr":null}',
    ],
)
def test_a_bad_body_is_told_without_quoting_it(rig: Run, body: bytes) -> None:
    async def test(rig: Rig) -> None:
        status, answer = await rig.ask(body)
        assert (status, answer["reason"]) == (400, "bad_body")

    rig(test)


def test_where_nothing_can_be_signed_the_token_stays_good(rig: Run, identity: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        body = {"token": SECRET, "csr": csr_of(key())}
        rig.api = CertificateApi(rig.store, rig.clock, None, lambda: b"", lambda: "localhost:1")
        status, answer = await rig.ask(body)
        assert (status, answer["reason"]) == (503, "cannot_sign")
        assert ("default/alice", "login.issue", "cannot_sign") in rig.audited()
        rig.api = CertificateApi(rig.store, rig.clock, identity, lambda: b"", lambda: None)
        assert (await rig.ask(body))[1]["reason"] == "no_jobs"
        rig.api = CertificateApi(rig.store, rig.clock, identity, lambda: b"", lambda: "localhost:1")
        assert (await rig.ask(body))[0] == 200

    rig(test)


def test_a_token_from_before_a_revocation_is_worth_nothing(rig: Run) -> None:
    """Whoever revokes a name means the tokens that are still under way as well."""

    async def test(rig: Rig) -> None:
        assert rig.certs is not None
        order = Order("carol", valid_s=3600)
        for secret in ("first token", "second token"):
            await rig.token(order, secret)
        assert (await rig.ask({"token": "first token", "csr": csr_of(key())}))[0] == 200
        revoke(rig.certs, "carol", now=rig.clock.now())
        status, answer = await rig.ask({"token": "second token", "csr": csr_of(key())})
        assert (status, answer["reason"]) == (403, "revoked")
        assert (await rig.ask({"token": "second token", "csr": csr_of(key())}))[0] == 401
        await rig.token(order, "third token")
        assert (await rig.ask({"token": "third token", "csr": csr_of(key())}))[0] == 200

    rig(test)


def test_whoever_fails_often_waits_and_others_do_not(rig: Run) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        body = {"token": SECRET, "csr": csr_of(key())}
        wrong = [(await rig.ask({**body, "token": f"guess {n}"}))[0] for n in range(12)]
        assert wrong == [401] * 10 + [429] * 2
        status, answer = await rig.ask(body)
        assert (status, answer["reason"]) == (429, "too_many_attempts")
        assert (await rig.ask(body, address="192.0.2.8"))[0] == 200
        rig.clock.ahead_s = 7
        assert (await rig.ask({**body, "token": "another guess"}))[0] == 401

    rig(test)


def test_a_crowd_is_counted_by_its_networks_and_cannot_flood_the_audit() -> None:
    attempts = Attempts(per_address=3, noted=5, period_s=60, addresses=50)
    noted = [attempts.failed(f"2001:db8::{n:x}", 1000.0) for n in range(100)]
    assert noted.count(True) == 5
    with pytest.raises(Refused):
        attempts.admit("2001:db8::ffff", 1000.0)
    attempts.admit("2001:db8:0:1::1", 1000.0)
    for n in range(200):
        attempts.failed(f"10.0.{n // 250}.{n % 250}", 1000.0)
    assert len(attempts._by_network) == 50
    assert attempts.failed("192.0.2.1", 1061.0)
    attempts.failed("no address", 1061.0)


# making them


def test_only_the_digest_of_a_token_is_kept(rig: Run) -> None:
    async def test(rig: Rig) -> None:
        await rig.token()
        rows = rig.store.peek(lambda db: db.execute("SELECT * FROM login_tokens").fetchall())
        everything = repr(rows) + repr(rig.store.peek(audit.rows))
        assert SECRET not in everything
        assert login.digest(SECRET) in everything

    rig(test)


@pytest.mark.parametrize(
    ("order", "ttl_s", "complaint"),
    [
        (Order("al ice"), 60, "client name"),
        (Order("server"), 60, "already names something"),
        (Order("alice", roles=("superuser",)), 60, "expected some of runner, viewer"),
        (Order("alice", principals=("ro ot",)), 60, "principal"),
        (Order("alice", tenant="nowhere"), 60, "no tenant"),
        (Order("alice"), 0, "ttl_s"),
        (Order("alice"), 1e9, "ttl_s"),
        (Order("alice"), float("nan"), "ttl_s"),
        (Order("alice", valid_s=1), 60, "validity"),
    ],
)
def test_a_token_nobody_could_use_is_not_made(rig: Run, order: Order, ttl_s: float, complaint: str) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(BadUsage, match=complaint):
            await rig.token(order, ttl_s=ttl_s)
        assert rig.audited() == []

    rig(test)


def test_the_number_of_unused_tokens_is_bounded_and_old_ones_go(rig: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "LIVE_TOKENS", 2)

    async def test(rig: Rig) -> None:
        for number in range(2):
            await rig.token(secret=f"{number}-secret")
        with pytest.raises(BadUsage, match="unused tokens"):
            await rig.token(secret="3-secret")
        rig.clock.ahead_s = 61
        await rig.token(secret="4-secret")
        rig.clock.ahead_s = 8 * 86_400
        await rig.token(secret="5-secret")
        count = rig.store.peek(lambda db: db.execute("SELECT count(*) FROM login_tokens").fetchone()[0])
        assert count == 1

    rig(test)
