"""What ``osqbox certs`` does to an identity: issue a client certificate, renew, revoke."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from osqbox.errors import BadSetup, BadUsage
from osqbox.identity import (
    CLIENTS,
    ISSUED_FILE,
    existing_identity,
    exists,
    locked,
    make_directory,
    read_file,
    shell,
    write_files,
)

from . import making, reading
from .mending import Mender, remember
from .names import FIRST_CLIENT, client_uris, serial_text
from .reading import DAY_S, Authority, Issued

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_VALID_S = 60
MAX_VALID_S = making.AUTHORITY_DAYS * DAY_S
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
"""Weaker is refused by TLS anyway; verifying larger ones costs the server more than them."""


def issue_client(
    directory: Path,
    name: str,
    *,
    tenant: str = "default",
    roles: Sequence[str] = (),
    principals: Sequence[str] = (),
    days: float = making.LEAF_DAYS,
    out: Path | None = None,
    now: float,
) -> tuple[Path, Path, Path]:
    """Sign a client certificate; its file, its key's file, and the CA that the client is to trust.

    It lands in ``directory/clients``, or with a copy of ``ca.pem`` in ``out``. The URI SANs are the identity
    ``osqbox://TENANT/NAME`` first, then ``osqbox-role:ROLE`` and ``osqbox-principal:PRINCIPAL``. A name that
    was issued before gets another certificate; the older one stays valid until it expires or the name is
    revoked. The validity ends with the client CA's at the latest. Raises BadUsage for unfit words.
    """
    uris = client_uris(name, tenant, roles, principals)
    valid_s = validity_s(days)
    existing_identity(directory)
    with locked(directory):
        authority = reading.load_authority(directory, "client-ca", must_sign=True)
        target = directory / CLIENTS if out is None else out
        make_directory(target)
        ca, cert, key = target / "ca.pem", target / f"{name}.pem", target / f"{name}.key"
        _refuse_overwriting(cert, key, authority)
        if out is None:
            ca = directory / "ca.pem"
        else:
            _copy_authority(directory / "ca.pem", ca)
        making.make_client(directory, target, name, authority, uris, now, valid_s)
        remember(directory)
    return cert, key, ca


def validity_s(days: float) -> float:
    """Of a client certificate, in seconds; a part of a day is fine, less than a minute is of no use to anybody."""
    if not MIN_VALID_S <= days * DAY_S <= MAX_VALID_S:
        raise BadUsage(f"expected a validity of 1 minute to {making.AUTHORITY_DAYS} days, got {days:g} days")
    return days * DAY_S


def check_request(csr_pem: bytes) -> x509.CertificateSigningRequest:
    """A certificate signing request whose key is its sender's and strong enough; BadUsage for any other.

    Of its content only the public key counts: who it is for is not the sender's to say.
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadUsage(f"csr: expected a certificate signing request in PEM: {error}") from None
    if not is_signed:
        raise BadUsage("csr: its signature is not by the key in it")
    match request.public_key():
        case (
            ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1() | ec.SECP521R1())
            | ed25519.Ed25519PublicKey()
        ):
            return request
        case rsa.RSAPublicKey(key_size=bits) if MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
            return request
    raise BadUsage(
        f"csr: expected a key on P-256, P-384, P-521 or Ed25519, or RSA of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits"
    )


def sign_request(
    directory: Path,
    csr_pem: bytes,
    name: str,
    *,
    tenant: str = "default",
    roles: Sequence[str] = (),
    principals: Sequence[str] = (),
    valid_s: float,
    promised_at: float,
    now: float,
) -> tuple[bytes, int, float]:
    """As `issue_client` for a key that stays where it is: the certificate in PEM, its serial number and its end.

    Raises BadUsage for a request that is no good, and when the name was revoked after the certificate was promised;
    BadSetup where there is no client CA to sign with.
    """
    uris = client_uris(name, tenant, roles, principals)
    request = check_request(csr_pem)
    with locked(directory):
        authority = reading.load_authority(directory, "client-ca", must_sign=True)
        for entry in reading.read_issued(directory):
            if entry.uri == uris[0] and (entry.revoked_at or 0) >= promised_at:
                raise BadUsage(
                    f"{name!r} was revoked on {reading.date(entry.revoked_at or 0)}, after this was promised"
                )
        cert = making.make_client_for(directory, request.public_key(), name, authority, uris, now, valid_s)
        remember(directory)
    return making.cert_pem(cert), cert.serial_number, reading.ends(cert)


def _refuse_overwriting(cert: Path, key: Path, authority: Authority) -> None:
    """Replace only what this client CA issued."""
    is_ours = exists(cert) and reading.issued_by(reading.load_certificate(cert), authority.cert)
    if not is_ours and (exists(cert) or exists(key)):
        raise BadSetup(f"{cert} and {key} are not from this client CA and would be overwritten")


def _copy_authority(ours: Path, copy: Path) -> None:
    content = read_file(ours)
    if exists(copy) and read_file(copy) != content:
        raise BadSetup(f"{copy} is another CA's and would be overwritten; choose another directory")
    write_files(copy.parent, {copy.name: content})


def renew(directory: Path, which: Sequence[str] = ("server",), *, now: float) -> tuple[Path, ...]:
    """New keys and certificates for ``server``, ``client``, ``all`` or clients by name; what changed.

    A CA that is due is renewed first, with its old key, so that everything it signed stays valid. ``all``
    leaves revoked clients alone. Older client certificates stay valid until they expire or are revoked.
    """
    existing_identity(directory)
    with locked(directory):
        before = _contents(directory)
        mender = Mender(directory, now)
        authority, client_authority = mender.authority("ca"), mender.authority("client-ca")
        mender.crl(client_authority)
        for stem in _renewable(directory, which):
            if stem == "server":
                making.make_server(directory, authority, reading.load_leaf(directory, stem, authority.cert)[0], (), now)
                continue
            folder = directory if stem == FIRST_CLIENT else directory / CLIENTS
            old, _ = reading.load_leaf(folder, stem, client_authority.cert)
            making.remake_client(directory, folder, stem, client_authority, old, now)
        remember(directory)
        return tuple(file for file, content in _contents(directory).items() if before.get(file) != content)


def _contents(directory: Path) -> dict[Path, bytes]:
    files = [directory / name for name in ("ca.pem", "server.pem", "client-ca.pem")]
    return {file: read_file(file) for file in [*files, *reading.client_files(directory)] if exists(file)}


def _renewable(directory: Path, which: Sequence[str]) -> list[str]:
    """The names to renew, ``all`` spelled out."""
    stems: list[str] = []
    for word in which:
        if word == "all":
            revoked = reading.read_crl(directory)
            live = [file for file in reading.client_files(directory) if _serial_in(file) not in revoked]
            stems += ["server", *(file.stem for file in live)]
        elif word in ("server", FIRST_CLIENT) or exists(directory / CLIENTS / f"{word}.pem"):
            stems.append(word)
        else:
            raise BadUsage(
                f"expected server, client, all or a name found in {directory / CLIENTS}, got {word!r}",
                _show(directory),
            )
    return list(dict.fromkeys(stems))


def revoke(directory: Path, what: str | Path, *, now: float) -> tuple[int, ...]:
    """Put client certificates on the CRL: all that a name ever had, one serial, or the one in a file.

    On disk on return. Returns the serial numbers; revoking twice is no error. A running box follows within a second.
    Raises BadUsage for something this client CA did not issue.
    """
    existing_identity(directory)
    with locked(directory):
        authority = reading.load_authority(directory, "client-ca", must_sign=True)
        issued = {entry.number: entry for entry in reading.read_issued(directory)}
        serials = _serials_of(directory, str(what), authority, issued)
        for serial in serials:
            entry = issued.get(serial) or Issued(serial=serial_text(serial))
            if entry.revoked_at is None:
                issued[serial] = msgspec.structs.replace(entry, revoked_at=now)
        write_files(directory, {ISSUED_FILE: making.to_json(list(issued.values()))})
        making.write_crl(directory, authority, now)
        remember(directory)
        return serials


def _serials_of(directory: Path, what: str, authority: Authority, issued: dict[int, Issued]) -> tuple[int, ...]:
    named = {serial for serial, entry in issued.items() if entry.name == what}
    named |= {_serial_in(file) for file in reading.client_files(directory) if file.stem == what}
    if named:
        return tuple(sorted(named))
    if Path(what).is_file():
        cert = reading.load_certificate(Path(what))
        if not reading.issued_by(cert, authority.cert):
            raise BadUsage(f"{what} was not issued by {authority.file}", _show(directory))
        return (cert.serial_number,)
    if re.fullmatch(r"[0-9]+", what) and int(what) in issued:
        return (int(what),)
    digits = what.lower().removeprefix("0x").replace(":", "")
    if re.fullmatch(r"[0-9a-f]{1,40}", digits) and (len(digits) > 16 or int(digits, 16) in issued):
        return (int(digits, 16),)
    known = sorted({entry.name for entry in issued.values() if entry.name})
    raise BadUsage(
        f"expected a client's name ({', '.join(known)}), a serial number in hexadecimal"
        f" or a certificate file, got {what!r}",
        _show(directory),
    )


def _serial_in(file: Path) -> int:
    """Serial number of the certificate in a file; 0, which none has, if there is no such file."""
    return reading.load_certificate(file).serial_number if exists(file) else 0


def _show(directory: Path) -> str:
    return shell("osqbox", "certs", "show", "--certs", directory)
