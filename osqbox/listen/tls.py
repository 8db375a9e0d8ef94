"""Server TLS: contexts, their live rotation, and identities out of verified client certificates."""

from __future__ import annotations

import re
import ssl
import tempfile
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from osqbox.errors import BadSetup
from osqbox.exchange import Peer

MODERN_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""For TLS 1.2, as HTTP/2 demands (RFC 9113, 9.2.2); TLS 1.3 has its own list, AES-256-GCM first.

Security level 2 refuses RSA keys under 2048 bits, curves under 224 and signatures with SHA-1, in chains too.
"""
OLD_CIPHERS = f"{MODERN_CIPHERS}:ECDHE+AES:RSA+AES:@SECLEVEL=0"
"""TLS 1.0 and 1.1 sign with SHA-1, which OpenSSL 3 refuses above security level 0."""

_TENANT_URI = re.compile(r"osqbox://([^/?#@:\s]+)/\S+")


@dataclass(frozen=True, slots=True)
class CertificateIdentity:
    name: str | None
    """First URI SAN, else common name."""
    serial: int | None
    tenant: str | None
    """From a first URI SAN like ``osqbox://<tenant>/<name>``."""
    uris: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()
    expires_at: float | None = None
    """Seconds since the epoch."""


def certificate_identity(certificate: Mapping[str, Any] | None) -> CertificateIdentity:
    """Who a certificate speaks for; takes what `ssl.SSLObject.getpeercert` returns after verification."""
    if not certificate:
        return CertificateIdentity(None, None, None)
    uris = tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI")
    names = tuple(value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName")
    tenant = _TENANT_URI.fullmatch(uris[0]) if uris else None
    return CertificateIdentity(
        name=next(iter(uris or names), None),
        serial=int(certificate["serialNumber"], 16) if "serialNumber" in certificate else None,
        tenant=tenant.group(1) if tenant else None,
        uris=uris,
        common_names=names,
        expires_at=float(ssl.cert_time_to_seconds(certificate["notAfter"])) if "notAfter" in certificate else None,
    )


def certificate_authority(certificate_der: bytes) -> str:
    """Which CA signed a certificate: its authority key identifier in hexadecimal.

    OpenSSL refuses a certificate whose identifier is not that of the CA it was verified with (RFC 5280, 4.2.1.1).
    A certificate without one is told apart by the name of its issuer.
    """
    import hashlib

    from cryptography import x509

    certificate = x509.load_der_x509_certificate(certificate_der)
    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        found = None
    return found.hex() if found else f"issuer-{hashlib.sha256(certificate.issuer.public_bytes()).hexdigest()}"


def refusal_of_certificate(peer: Peer, revoked: Container[int], now: float) -> str | None:
    """Why a peer whose handshake succeeded may not be served now, in one word; what `Listener.check_peer` answers.

    Asked again and again: a connection outlives the moment its certificate was verified, and a resumed session is
    not verified anew.
    """
    if peer.certificate_serial is None:
        return None
    if peer.certificate_serial in revoked:
        return "certificate_revoked"
    if peer.certificate_expires_at is not None and now >= peer.certificate_expires_at:
        return "certificate_expired"
    return None


def server_context(
    cert_file: str | Path,
    key_file: str | Path,
    *,
    client_ca_file: str | Path | None = None,
    client_auth: Literal["off", "optional", "required"] = "off",
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    alpn: Sequence[str] = ("h2", "http/1.1"),
    resumption: bool = True,
) -> ssl.SSLContext:
    """A context for `Listener`. Keep it to rotate the certificate later with `rotate_certificate`.

    The suite is chosen in our order, so that AES-256-GCM wins also with a client that puts AES-128 first. Without
    ``resumption`` every connection verifies its client certificate anew.

    Raises BadSetup, naming the file, when a file cannot be used, and when ``minimum`` asks for a version that this
    machine's OpenSSL does not really speak.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    if not resumption:
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    if minimum < ssl.TLSVersion.TLSv1_2:
        _check_old_version(minimum)
    _set_minimum(context, minimum, OLD_CIPHERS if minimum < ssl.TLSVersion.TLSv1_2 else MODERN_CIPHERS)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    _load_chain(context, cert_file, key_file)
    if client_auth != "off":
        if client_ca_file is None:
            raise BadSetup(
                f"client authentication is {client_auth!r} but no client CA is given",
                hint="osqbox serve --client-ca FILE",
            )
        _load_client_ca(context, client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if client_auth == "required" else ssl.CERT_OPTIONAL
    return context


def rotate_certificate(context: ssl.SSLContext, cert_file: str | Path, key_file: str | Path) -> None:
    """Serve another certificate of the same key type from the next handshake on; open connections live on.

    Tried on a context of its own first: loading a certificate whose key is missing would leave the live one broken.
    """
    _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert_file, key_file)
    _load_chain(context, cert_file, key_file)


def probe_tls_minimum(version: ssl.TLSVersion, *, ciphers: str = OLD_CIPHERS) -> str | None:
    """None when this machine's OpenSSL completes a handshake at exactly ``version``, else why it does not."""
    with tempfile.TemporaryDirectory(prefix="osqbox-tls-") as folder:
        chain = Path(folder) / "probe.pem"
        chain.write_bytes(_throwaway_pem())
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(chain)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    try:
        for context in (server, client):
            _set_minimum(context, version, ciphers)
            _set_maximum(context, version)
        _shake_hands(server, client)
    except (ssl.SSLError, ValueError) as error:
        return str(error)
    return None


def _check_old_version(minimum: ssl.TLSVersion) -> None:
    reason = probe_tls_minimum(minimum)
    if reason is not None:
        raise BadSetup(
            f"{ssl.OPENSSL_VERSION} does not speak {minimum.name}: {reason}", hint="osqbox serve --tls-min 1.2"
        )


def _set_minimum(context: ssl.SSLContext, version: ssl.TLSVersion, ciphers: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # asked for by name
        context.minimum_version = version
    context.set_ciphers(ciphers)


def _set_maximum(context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = version


def _load_chain(context: ssl.SSLContext, cert_file: str | Path, key_file: str | Path) -> None:
    try:
        # A function as password: OpenSSL would otherwise ask on the terminal and hang.
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except ssl.SSLError as error:
        why = "do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "are not usable PEM files"
        raise BadSetup(
            f"certificate {cert_file} and key {key_file} {why} ({error.reason or error})", hint="osqbox doctor"
        ) from error
    except OSError as error:
        raise _unreadable(error, f"{cert_file} or {key_file}") from error


def _no_password() -> str:
    raise BadSetup("the TLS key is protected by a password", hint="openssl pkey -in KEY -out PLAIN_KEY")


def _load_client_ca(context: ssl.SSLContext, client_ca_file: str | Path) -> None:
    try:
        context.load_verify_locations(client_ca_file)
    except ssl.SSLError as error:
        raise BadSetup(f"client CA {client_ca_file} holds no PEM certificate ({error.reason or error})") from error
    except OSError as error:
        raise _unreadable(error, str(client_ca_file)) from error


def _unreadable(error: OSError, files: str) -> BadSetup:
    return BadSetup(f"cannot read {error.filename or files}: {error.strerror}", hint="osqbox certs show")


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Both halves of a handshake over memory; raises ssl.SSLError as OpenSSL words it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    halves = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(8):  # TLS 1.0 needs two rounds
        for half in list(halves):
            try:
                half.do_handshake()
            except ssl.SSLWantReadError:
                continue
            halves.remove(half)
        if not halves:
            return
    raise ssl.SSLError("the handshake does not end")


def _throwaway_pem() -> bytes:
    """Key and self-signed P-256 certificate, valid for an hour."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "probe")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem)
