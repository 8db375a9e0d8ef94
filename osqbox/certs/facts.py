"""Certificates described for people, and those that a user brings examined before they are served."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from osqbox.errors import BadSetup
from osqbox.identity import CLIENTS, read_file, shell

from . import reading, revoked_serials
from .names import serial_text

if TYPE_CHECKING:
    from pathlib import Path

    from osqbox.identity import Identity


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a person wants to know about one certificate. Times in seconds since the epoch."""

    file: Path
    subject: str
    issuer: str
    names: tuple[str, ...]
    """Subject alternative names as written: host names, addresses, URIs."""
    serial: str
    """Upper-case hexadecimal, as ``openssl x509 -serial`` prints it."""
    not_before: float
    not_after: float
    days_left: int
    """Whole days; negative once expired."""
    sha256: str
    """Fingerprint, lower-case hexadecimal."""
    key_type: str
    revoked: bool


def describe(identity: Identity, now: float) -> list[CertificateFacts]:
    """Every certificate of the identity, each CA before what it issued; BadSetup for one that is broken."""
    files = [identity.ca, identity.server_cert, identity.client_ca, identity.client_cert]
    if identity.directory is not None and identity.client_ca == identity.directory / "client-ca.pem":
        files += [file for file in reading.client_files(identity.directory) if file.parent.name == CLIENTS]
    authorities = reading.load_certificates(identity.client_ca) if identity.client_ca else []
    serials = revoked_serials(identity)
    facts = []
    for file in dict.fromkeys(file for file in files if file is not None):
        for cert in reading.load_certificates(file):
            # A serial number means something only together with its issuer.
            revoked = cert.serial_number in serials and any(reading.issued_by(cert, each) for each in authorities)
            facts.append(_facts(file, cert, revoked, now))
    return facts


def _facts(file: Path, cert: x509.Certificate, revoked: bool, now: float) -> CertificateFacts:
    return CertificateFacts(
        file=file,
        subject=cert.subject.rfc4514_string(),
        issuer=cert.issuer.rfc4514_string(),
        names=tuple(reading.names_in(cert)),
        serial=serial_text(cert.serial_number),
        not_before=reading.starts(cert),
        not_after=reading.ends(cert),
        days_left=reading.days_left(cert, now),
        sha256=hashlib.sha256(cert.public_bytes(Encoding.DER)).hexdigest(),
        key_type=_key_words(cert.public_key()),
        revoked=revoked,
    )


def _key_words(key: object) -> str:
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return {"secp256r1": "EC P-256", "secp384r1": "EC P-384"}.get(key.curve.name, f"EC {key.curve.name}")
    return type(key).__name__.removesuffix("PublicKey")


def examine_own(tls_cert: Path, tls_key: Path, client_ca: Path | None, crl: Path | None, *, now: float) -> list[str]:
    """Notes on certificates that will work; BadSetup for those that would fail at the first handshake."""
    cert = reading.load_certificate(tls_cert)
    _check_key_fits(tls_cert, tls_key)
    mend = "replace it, or renew osqbox's own and leave out --tls-cert and --tls-key"
    notes = reading.check_dates(tls_cert, cert, now, mend)
    usage = reading.extension(cert, x509.ExtendedKeyUsage)
    if usage and not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & {*usage}:
        raise BadSetup(f"{tls_cert}: expected a server certificate; its extended key usage forbids that")
    if not reading.names_in(cert):
        notes.append(f"{tls_cert} has no subject alternative names; agents look for the host name there")
    if client_ca is not None:
        _check_client_ca(client_ca, now)
    if crl is not None:
        reading.load_crl(crl, client_ca)
    return notes


def _check_key_fits(tls_cert: Path, tls_key: Path) -> None:
    def refuse_password() -> str:
        raise BadSetup(
            f"{tls_key}: expected a key without a password, got an encrypted one",
            shell("openssl", "pkey", "-in", tls_key, "-out", f"{tls_key}.plain"),
        )

    read_file(tls_key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls_cert, tls_key, password=refuse_password)
    except ssl.SSLError as error:
        reason = error.reason or "no PEM private key in it"
        fault = "does not belong to" if "MISMATCH" in reason else f"cannot be used ({reason}) with"
        raise BadSetup(
            f"{tls_key}: the key {fault} the certificate {tls_cert}",
            shell("openssl", "pkey", "-in", tls_key, "-noout", "-text"),
        ) from error


def _check_client_ca(client_ca: Path, now: float) -> None:
    authorities = list(filter(reading.is_authority, reading.load_certificates(client_ca)))
    if not authorities:
        raise reading.not_an_authority(client_ca)
    if not any(reading.is_current(cert, now) for cert in authorities):
        last = reading.date(max(map(reading.ends, authorities)))
        raise BadSetup(f"{client_ca}: no CA certificate in it is valid now; the last ended on {last}")


def anchor_in(tls_cert: Path) -> Path | None:
    """The file itself if agents can trust it as a CA file: it holds a self-signed certificate."""
    return tls_cert if any(reading.issued_by(cert, cert) for cert in reading.load_certificates(tls_cert)) else None
