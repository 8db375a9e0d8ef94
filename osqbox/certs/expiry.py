"""When the certificates of an identity end, for whoever watches over that."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from osqbox.errors import BadSetup
from osqbox.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY_S = 86_400.0
CLIENTS_MAX = 1000
"""Issued client certificates that are told of: the last ones to end."""


class Expiry(NamedTuple):
    kind: str
    """``ca``, ``server``, ``client-ca`` or ``client``."""
    name: str
    serial: str
    not_after: float
    """Seconds since the epoch."""


def expiries(identity: Identity) -> list[Expiry]:
    """Server, CAs, and every client certificate on record that is not revoked; what cannot be read is left out."""
    files = {"ca": identity.ca, "server": identity.server_cert, "client-ca": identity.client_ca}
    found = [each for kind, file in files.items() if file is not None for each in _in_file(kind, file)]
    return found + (_issued(identity.directory) if identity.client_ca_key and identity.directory else [])


def _in_file(kind: str, file: Path) -> Iterator[Expiry]:
    from . import reading
    from .names import serial_text

    try:
        certificates = reading.load_certificates(file)
    except BadSetup:  # half-way through a renewal, or broken: `osqbox doctor` says so
        return
    for cert in certificates:
        yield Expiry(kind, cert.subject.rfc4514_string(), serial_text(cert.serial_number), reading.ends(cert))


def _issued(directory: Path) -> list[Expiry]:
    from . import reading

    try:
        issued = reading.read_issued(directory)
    except BadSetup:
        return []
    living = [
        Expiry("client", entry.uri or entry.name or "", entry.serial, entry.not_after)
        for entry in issued
        if entry.revoked_at is None and entry.not_after is not None
    ]
    return sorted(living, key=lambda each: each.not_after)[-CLIENTS_MAX:]
