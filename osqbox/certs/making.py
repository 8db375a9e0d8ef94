"""New keys, certificates and CRLs, signed and written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from osqbox.identity import CRL_FILE, ISSUED_FILE, write_files

from .names import address, host_names, identity_uri, serial_text
from .reading import DAY_S, Authority, Issued, ends, extension, moment, names_in, read_crl, read_issued, starts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import (
        CertificateIssuerPrivateKeyTypes,
        CertificatePublicKeyTypes,
    )

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Extensions: TypeAlias = list[tuple[x509.ExtensionType, bool]]
KeyType = Literal["ec", "rsa", "rsa-3072"]
"""P-256, RSA of 2048 or RSA of 3072 bits."""

LEAF_DAYS = 397
"""The longest validity that browsers and Apple's TLS accept without complaint is 398 days."""
AUTHORITY_DAYS = 3_652
BACKDATE_S = 3_600
"""For agents whose clock is a little behind."""
MAX_SERVER_NAMES = 100

SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH


def make_authority(directory: Path, stem: str, key_type: KeyType, now: float) -> Authority:
    key = new_key(key_type)
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    whom, usage = ("server", SERVER_AUTH) if stem == "ca" else ("client", CLIENT_AUTH)
    extensions: Extensions = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_key_usage("key_cert_sign", "crl_sign"), True),
        (x509.ExtendedKeyUsage([usage]), False),
        (ski, False),
    ]
    # The digits keep apart the CAs of several boxes in one trust store.
    subject = common_name(f"osqbox {whom} CA {ski.digest.hex()[:8]}")
    cert = sign(subject, key.public_key(), extensions, subject, key, now, now + AUTHORITY_DAYS * DAY_S)
    write_files(directory, {f"{stem}.key": key_pem(key), f"{stem}.pem": cert_pem(cert)})
    return Authority(directory / f"{stem}.pem", cert, key)


def extend_authority(authority: Authority, now: float) -> Authority:
    """The same CA with later dates: all it signed stays valid, under the old file and the new."""
    old = authority.cert
    extensions = [(each.value, each.critical) for each in old.extensions]
    until = now + AUTHORITY_DAYS * DAY_S
    cert = sign(old.subject, old.public_key(), extensions, old.subject, authority.signer, now, until)
    write_files(authority.file.parent, {authority.file.name: cert_pem(cert)})
    return Authority(authority.file, cert, authority.key)


def make_server(
    directory: Path, authority: Authority, old: x509.Certificate | None, names: Sequence[str], now: float
) -> None:
    """A server certificate for this host, ``names``, and every name the old one had."""
    wanted = ["localhost", "127.0.0.1", "::1", *names, *host_names(), *(names_in(old) if old else ())]
    addresses = {name: address(name) for name in dict.fromkeys(wanted)}
    san = [x509.DNSName(name) if ip is None else x509.IPAddress(ip) for name, ip in addresses.items()]
    key, cert = make_leaf(authority, "localhost", san[:MAX_SERVER_NAMES], SERVER_AUTH, now)
    write_files(directory, {"server.key": key_pem(key), "server.pem": cert_pem(cert)})


def make_client(
    directory: Path, target: Path, name: str, authority: Authority, uris: Sequence[str], now: float, valid_s: float
) -> None:
    """A client certificate in ``target``, recorded in ``directory``."""
    key, cert = make_leaf(authority, name, _identities(uris), CLIENT_AUTH, now, valid_s)
    record_issued(directory, name, uris, cert, now)
    write_files(target, {f"{name}.key": key_pem(key), f"{name}.pem": cert_pem(cert)})


def make_client_for(
    directory: Path,
    public_key: CertificatePublicKeyTypes,
    name: str,
    authority: Authority,
    uris: Sequence[str],
    now: float,
    valid_s: float,
) -> x509.Certificate:
    """A client certificate for somebody else's key, recorded in ``directory``."""
    cert = certify(authority, public_key, name, _identities(uris), CLIENT_AUTH, now, valid_s)
    record_issued(directory, name, uris, cert, now)
    return cert


def record_issued(directory: Path, name: str, uris: Sequence[str], cert: x509.Certificate, now: float) -> None:
    """Before the certificate is handed out: one that nobody can name is one that nobody can revoke."""
    entry = Issued(serial=serial_text(cert.serial_number), name=name, uri=uris[0], not_after=ends(cert))
    lasting = [each for each in read_issued(directory) if each.revoked_at or (each.not_after or math.inf) > now]
    write_files(directory, {ISSUED_FILE: to_json([*lasting, entry])})


def _identities(uris: Sequence[str]) -> list[x509.UniformResourceIdentifier]:
    return [x509.UniformResourceIdentifier(uri) for uri in uris]


def remake_client(
    directory: Path, target: Path, name: str, authority: Authority, old: x509.Certificate | None, now: float
) -> None:
    """A client certificate with the URIs and the time of the old one; without one, the plain identity."""
    uris = names_in(old) if old else [identity_uri("default", name)]
    valid_s = ends(old) - starts(old) - BACKDATE_S if old else LEAF_DAYS * DAY_S
    make_client(directory, target, name, authority, uris, now, valid_s)


def make_leaf(
    authority: Authority,
    name: str,
    san: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    now: float,
    valid_s: float = LEAF_DAYS * DAY_S,
) -> tuple[PrivateKey, x509.Certificate]:
    """A new key of the CA's type and its certificate, valid no longer than its CA."""
    key = new_key(_key_type(authority.cert))
    return key, certify(authority, key.public_key(), name, san, usage, now, valid_s)


def certify(
    authority: Authority,
    public_key: CertificatePublicKeyTypes,
    name: str,
    san: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    now: float,
    valid_s: float,
) -> x509.Certificate:
    """A certificate for a key, valid no longer than its CA."""
    is_rsa_server = isinstance(public_key, rsa.RSAPublicKey) and usage == SERVER_AUTH
    purposes = ["digital_signature"] + (["key_encipherment"] if is_rsa_server else [])
    extensions: Extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(*purposes), True),
        (x509.ExtendedKeyUsage([usage]), False),
        (x509.SubjectAlternativeName(san), False),
        (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
        (_authority_key_identifier(authority.cert), False),
    ]
    until = min(now + valid_s, ends(authority.cert))
    return sign(common_name(name), public_key, extensions, authority.cert.subject, authority.signer, now, until)


def sign(
    subject: x509.Name,
    public_key: CertificatePublicKeyTypes,
    extensions: Extensions,
    issuer: x509.Name,
    signer: CertificateIssuerPrivateKeyTypes,
    now: float,
    until: float,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(now - BACKDATE_S))
        .not_valid_after(moment(math.ceil(until)))
    )
    for each, critical in extensions:
        builder = builder.add_extension(each, critical)
    return builder.sign(signer, _digest(signer))


def write_crl(directory: Path, authority: Authority, now: float) -> None:
    """The CRL of everything revoked so far, good until the client CA ends: a box is not there to renew it."""
    recorded = {entry.number: entry.revoked_at for entry in read_issued(directory)}
    revoked = {serial: at for serial, at in recorded.items() if at is not None} | read_crl(directory)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.cert.subject)
        .last_update(moment(now))
        .next_update(moment(max(ends(authority.cert), now + DAY_S)))
        .add_extension(_authority_key_identifier(authority.cert), False)
        .add_extension(x509.CRLNumber(int(now * 1000)), False)
    )
    for serial, at in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment(at)).build()
        builder = builder.add_revoked_certificate(entry)
    crl = builder.sign(authority.signer, _digest(authority.signer))
    write_files(directory, {CRL_FILE: crl.public_bytes(Encoding.PEM)})


def new_key(key_type: KeyType) -> PrivateKey:
    if key_type == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=3072 if key_type == "rsa-3072" else 2048)


def _key_type(cert: x509.Certificate) -> KeyType:
    key = cert.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return "ec"
    return "rsa-3072" if key.key_size >= 3072 else "rsa"


def _digest(key: CertificateIssuerPrivateKeyTypes) -> hashes.SHA256 | None:
    """SHA-256, but for the Edwards keys a user's own CA may have, which bring their own."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()


def _key_usage(*purposes: str) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{purpose: purpose in purposes for purpose in every.split()})


def _authority_key_identifier(cert: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = extension(cert, x509.SubjectKeyIdentifier)
    ski = found or x509.SubjectKeyIdentifier.from_public_key(cert.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def cert_pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.PEM)


def to_json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
