"""The first run of a box, and what later runs find missing, due or broken."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from osqbox.errors import BadSetup
from osqbox.identity import (
    CRL_FILE,
    ISSUED_FILE,
    RECORD_FILE,
    SECRET_FILE,
    Record,
    Unwritable,
    exists,
    exposed_keys,
    hashes,
    read_secret,
    shell,
    write_files,
)

from . import making, reading
from .names import FIRST_CLIENT, serial_text
from .reading import DAY_S, RENEW_DAYS, Authority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509

    from .making import KeyType


def mend(directory: Path, names: Sequence[str], key_type: KeyType, now: float) -> list[str]:
    """Make what is missing, renew what is due, refuse what is broken; what happened to older files.

    To be called under the lock. Raises BadSetup.
    """
    mender = Mender(directory, now)
    try:
        mender.guard_keys()
        authority = mender.authority("ca", key_type)
        client_authority = mender.authority("client-ca", key_type)
        mender.server(authority, names)
        mender.crl(client_authority)
        mender.client(client_authority)
        mender.secret()
    except Unwritable as error:
        if not _still_serves(directory, names, now):
            raise
        return [f"the certificates still serve but could not be renewed: {error}"]
    remember(directory)
    return mender.notes


def _still_serves(directory: Path, names: Sequence[str], now: float) -> bool:
    """Whether the server can go on with what is there, although something could not be written."""
    try:
        authorities = [reading.load_authority(directory, stem).cert for stem in ("ca", "client-ca")]
        server, fault = reading.load_leaf(directory, "server", authorities[0])
        read_secret(directory / SECRET_FILE)
    except BadSetup:
        return False
    if server is None or fault or _lacking(server, names):
        return False
    return all(reading.is_current(cert, now) for cert in (*authorities, server))


def remember(directory: Path) -> None:
    """Write ``identity.json``, last: it vouches for everything before it."""
    revoked = reading.read_crl(directory)
    files = [directory / name for name in ("server.pem", "ca.pem", "client-ca.pem", "client.pem")]
    loaded = [reading.load_certificate(file) for file in files if exists(file)]
    watched = [cert for cert in loaded if cert.serial_number not in revoked]
    record = Record(
        files=hashes(directory),
        valid_from=max(map(reading.starts, watched)),
        renew_at=min(map(reading.ends, watched)) - RENEW_DAYS * DAY_S,
        server_names=reading.names_in(loaded[0]),
        revoked=sorted(map(serial_text, revoked)),
    )
    with suppress(Unwritable):  # a read-only identity is examined at every start instead
        write_files(directory, {RECORD_FILE: making.to_json(record)})


@dataclass
class Mender:
    """One part of an identity after the other: used as it is, or made and told in ``notes``."""

    directory: Path
    now: float
    notes: list[str] = field(default_factory=list)

    def guard_keys(self) -> None:
        for path in exposed_keys(self.directory):
            try:
                path.chmod(0o600)
                self.notes.append(f"{path} could be read by others; its mode is now 0600")
            except OSError:
                self.notes.append(f"{path} can be read by others and its mode cannot be changed")

    def authority(self, stem: str, key_type: KeyType = "ec") -> Authority:
        file = self.directory / f"{stem}.pem"
        if not exists(file):
            self._refuse_lost(file)
            return making.make_authority(self.directory, stem, key_type, self.now)
        authority = reading.load_authority(self.directory, stem)
        reason = reading.due(authority.cert, self.now)
        is_extensible = authority.key is not None and reading.issued_by(authority.cert, authority.cert)
        if not reason or not is_extensible or reading.starts(authority.cert) > self.now:
            self.notes += reading.check_dates(file, authority.cert, self.now, "only whoever signed it can renew it")
            return authority
        self.notes.append(f"{file} was renewed with the same key ({reason}): give the new file to whoever has a copy")
        return making.extend_authority(authority, self.now)

    def _refuse_lost(self, file: Path) -> None:
        """A CA made anew would silently cut off everyone who trusts the lost one."""
        leaves = [self.directory / "server.pem"] if file.stem == "ca" else reading.client_files(self.directory)
        for leaf in filter(exists, leaves):
            raise BadSetup(
                f"{file} is missing while {leaf.name}, which it signed, is there:"
                " put it back, or move the directory away to start with a new identity",
                shell("mv", self.directory, f"{self.directory}.old"),
            )

    def server(self, authority: Authority, names: Sequence[str]) -> None:
        file = self.directory / "server.pem"
        cert, fault = reading.load_leaf(self.directory, "server", authority.cert)
        if cert is not None and fault is None:
            fault = _lacking(cert, names)
        reason = fault or self._leaf_due(cert, authority)
        if cert is not None and reason is None:
            return
        if authority.key is not None:
            making.make_server(self.directory, authority, cert, names, self.now)
            self._tell_new(file, reason)
            return
        lost = "ca.key is not here to sign a new one"
        if cert is None or fault:
            raise BadSetup(
                f"{file} cannot be used ({reason or 'it is missing'}) and {lost}", shell("ls", "-l", self.directory)
            )
        self.notes += reading.check_dates(file, cert, self.now, lost)

    def client(self, authority: Authority) -> None:
        file = self.directory / "client.pem"
        cert, fault = reading.load_leaf(self.directory, "client", authority.cert)
        if cert is not None and cert.serial_number in reading.read_crl(self.directory):
            self.notes.append(f"{file} is revoked; `osqbox certs renew client` makes a new one")
            return
        reason = fault or self._leaf_due(cert, authority)
        if authority.key is not None and (cert is None or reason):
            making.remake_client(self.directory, self.directory, FIRST_CLIENT, authority, cert, self.now)
            self._tell_new(file, reason)

    def _leaf_due(self, cert: x509.Certificate | None, authority: Authority) -> str | None:
        """As `due`, but a certificate that already ends with its CA cannot be given longer."""
        if cert is None or (reading.ends(cert) >= reading.ends(authority.cert) and reading.starts(cert) <= self.now):
            return None
        return reading.due(cert, self.now)

    def _tell_new(self, file: Path, reason: str | None) -> None:
        if reason:
            self.notes.append(f"{file} was made anew: {reason}")

    def crl(self, authority: Authority) -> None:
        """The CRL follows ``issued.json``; what only one of the two knows as revoked stays revoked."""
        recorded = {entry.number for entry in reading.read_issued(self.directory) if entry.revoked_at is not None}
        file = self.directory / CRL_FILE
        if authority.key is None or (exists(file) and recorded <= reading.read_crl(self.directory).keys()):
            return
        making.write_crl(self.directory, authority, self.now)
        if recorded:
            self.notes.append(f"{file} was made anew from {ISSUED_FILE}")

    def secret(self) -> None:
        file = self.directory / SECRET_FILE
        if exists(file):
            read_secret(file)
        else:
            write_files(self.directory, {SECRET_FILE: secrets.token_urlsafe(24).encode() + b"\n"})


def _lacking(cert: x509.Certificate, names: Sequence[str]) -> str | None:
    lacking = sorted(set(names) - set(reading.names_in(cert)))
    return f"it lacked {', '.join(lacking)}" if lacking else None
