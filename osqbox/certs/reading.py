"""Certificates, keys, the CRL and ``issued.json`` as they lie there, and what is wrong with them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from osqbox.errors import BadSetup
from osqbox.identity import CLIENTS, CRL_FILE, ISSUED_FILE, exists, read_file, shell

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import (
        CertificateIssuerPrivateKeyTypes,
        CertificateIssuerPublicKeyTypes,
    )

T = TypeVar("T")
ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)

DAY_S = 86_400
RENEW_DAYS = 30
"""A certificate is renewed at the first start within this time of its end."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA, without its key if that is kept elsewhere."""

    file: Path
    cert: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes | None

    @property
    def signer(self) -> CertificateIssuerPrivateKeyTypes:
        if self.key is None:
            raise BadSetup(
                f"{self.file.with_suffix('.key')} is not here, and nothing can be signed without it",
                shell("ls", "-l", self.file.parent),
            )
        return self.key


class Issued(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of ``issued.json``: every client certificate ever signed, so that a name is revoked whole."""

    serial: str
    name: str | None = None
    uri: str | None = None
    not_after: float | None = None
    revoked_at: float | None = None

    @property
    def number(self) -> int:
        return int(self.serial, 16)


# ---- files -----------------------------------------------------------------------------------------------


def _load(file: Path, what: str, parse: Callable[[bytes], T], hint: str) -> T:
    content = read_file(file)
    try:
        return parse(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadSetup(f"{file}: expected {what}, got something else: {error}", hint) from error


def load_certificates(file: Path) -> list[x509.Certificate]:
    """At least one; BadSetup otherwise."""
    hint = shell("openssl", "x509", "-in", file, "-noout", "-text")
    return _load(file, "a certificate in PEM", x509.load_pem_x509_certificates, hint)


def load_certificate(file: Path) -> x509.Certificate:
    """The first one of a file."""
    return load_certificates(file)[0]


def _load_key(file: Path) -> CertificateIssuerPrivateKeyTypes:
    key = _load(
        file,
        "a private key in PEM without a password",
        lambda content: load_pem_private_key(content, None),
        shell("openssl", "pkey", "-in", file, "-noout"),
    )
    return cast("CertificateIssuerPrivateKeyTypes", key)


def load_authority(directory: Path, stem: str, *, must_sign: bool = False) -> Authority:
    file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    cert = load_certificate(file)
    if not is_authority(cert):
        raise not_an_authority(file)
    key = _load_key(key_file) if exists(key_file) else None
    if key is not None and key.public_key() != cert.public_key():
        raise BadSetup(f"{key_file}: the key does not belong to the CA in {file.name}", shell("ls", "-l", directory))
    authority = Authority(file, cert, key)
    if must_sign:
        _ = authority.signer
    return authority


def load_leaf(directory: Path, stem: str, authority: x509.Certificate) -> tuple[x509.Certificate | None, str | None]:
    """The certificate as far as it can be read, and what keeps it from being used; two Nones without any file.

    Raises BadSetup for a certificate of another CA: it was put there by somebody, so it is not replaced.
    """
    file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    if not exists(file):
        return None, f"{file.name} was missing" if exists(key_file) else None
    try:
        cert = load_certificate(file)
    except BadSetup as error:
        return None, _unless_denied(error)
    if not issued_by(cert, authority):
        raise BadSetup(
            f"{file} was not signed by the CA beside it: give a server certificate of your own with"
            " --tls-cert and --tls-key, or remove this one to have a new one made",
            shell("rm", file, key_file),
        )
    if not exists(key_file):
        return cert, f"{key_file.name} was missing"
    try:
        fits = _load_key(key_file).public_key() == cert.public_key()
    except BadSetup as error:
        return cert, _unless_denied(error)
    return cert, None if fits else f"{key_file.name} did not belong to it"


def _unless_denied(error: BadSetup) -> str:
    """What is wrong with a file; a file that may not be read is not wrong, and raises."""
    if isinstance(error.__cause__, OSError):
        raise error
    return str(error)


def read_crl(directory: Path) -> dict[int, float]:
    """Serial number and time of each revocation; empty without a CRL."""
    file = directory / CRL_FILE
    return load_crl(file, directory / "client-ca.pem") if exists(file) else {}


def load_crl(file: Path, authorities: Path | None) -> dict[int, float]:
    """As `read_crl`; BadSetup unless one of ``authorities`` signed it."""
    hint = f"{shell('rm', file)}  # made again from {ISSUED_FILE} at the next start"
    crl = _load(file, "a CRL in PEM", x509.load_pem_x509_crl, hint)
    if not any(_signed_crl(cert, crl) for cert in (load_certificates(authorities) if authorities else ())):
        raise BadSetup(f"{file}: the CRL was not signed by {authorities or 'any client CA'}", hint)
    return {entry.serial_number: entry.revocation_date_utc.timestamp() for entry in crl}


def _signed_crl(cert: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    key = cast("CertificateIssuerPublicKeyTypes", cert.public_key())
    try:
        return crl.issuer == cert.subject and crl.is_signature_valid(key)
    except TypeError:  # a key that cannot sign
        return False


def read_issued(directory: Path) -> list[Issued]:
    def parse(content: bytes) -> list[Issued]:
        issued = msgspec.json.decode(content, type=list[Issued])
        _ = [entry.number for entry in issued]
        return issued

    file = directory / ISSUED_FILE
    if not exists(file):
        return []
    return _load(file, "the list of issued client certificates", parse, shell("ls", "-l", directory))


def client_files(directory: Path) -> list[Path]:
    """The client certificates kept in the directory, the first one first."""
    return [directory / "client.pem", *sorted((directory / CLIENTS).glob("*.pem"))]


# ---- certificates ----------------------------------------------------------------------------------------


def extension(cert: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return cert.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def names_in(cert: x509.Certificate) -> list[str]:
    """Subject alternative names as written: host names, addresses, URIs."""
    return [str(name.value) for name in extension(cert, x509.SubjectAlternativeName) or ()]


def is_authority(cert: x509.Certificate) -> bool:
    constraints = extension(cert, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def not_an_authority(file: Path) -> BadSetup:
    return BadSetup(
        f"{file}: expected a CA certificate, got one that may not sign others",
        shell("openssl", "x509", "-in", file, "-noout", "-text"),
    )


def issued_by(cert: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# ---- dates -----------------------------------------------------------------------------------------------


def starts(cert: x509.Certificate) -> float:
    return cert.not_valid_before_utc.timestamp()


def ends(cert: x509.Certificate) -> float:
    return cert.not_valid_after_utc.timestamp()


def is_current(cert: x509.Certificate, now: float) -> bool:
    return starts(cert) <= now < ends(cert)


def days_left(cert: x509.Certificate, now: float) -> int:
    """Whole days; negative once expired."""
    return int((ends(cert) - now) // DAY_S)


def moment(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(at), dt.UTC)


def date(at: float) -> str:
    return moment(at).strftime("%Y-%m-%d %H:%M:%S UTC")


def due(cert: x509.Certificate, now: float) -> str | None:
    """Why a certificate should be made anew; None if it should not."""
    if starts(cert) > now:
        return f"it was valid only from {date(starts(cert))}"
    if ends(cert) <= now:
        return f"it expired on {date(ends(cert))}"
    days = days_left(cert, now)
    return f"it had {days} days left" if days < RENEW_DAYS else None


def check_dates(file: Path, cert: x509.Certificate, now: float, mend: str) -> list[str]:
    """A note on a certificate that is soon over; BadSetup for one that is over or has yet to begin."""
    if starts(cert) > now:
        raise BadSetup(
            f"{file} is valid only from {date(starts(cert))}, and this machine's clock says {date(now)}:"
            " set the clock, or replace the certificate",
            "date -u",
        )
    if ends(cert) <= now:
        raise BadSetup(f"{file} expired on {date(ends(cert))}: {mend}", "osqbox certs renew")
    return [f"{file} expires in {days_left(cert, now)} days: {mend}"] if due(cert, now) else []
