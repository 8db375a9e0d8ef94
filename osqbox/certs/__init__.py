"""The certificates of a box: made on the first run, renewed in time, handed to clients, revoked.

Two CAs that cannot stand in for each other: ``ca`` signs only servers, ``client-ca`` only clients, and each
carries the one extended key usage it may pass on. ``openssl verify -x509_strict`` accepts all of it.

    names      what a certificate may be called, and what stands in it
    reading    certificates, keys, the CRL and the list of issued clients, as they lie there
    making     new ones, signed
    mending    the first run, and whatever is missing, due or broken later
    verbs      issue, renew, revoke
    facts      certificates described for people; those that the user brings examined

Only what is defined here, and `names`, is loaded for a healthy identity; the rest needs ``cryptography``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from osqbox.identity import CRL_FILE, Identity, Snapshot, existing_identity, is_healthy, locked, read_record, snapshot

from .names import serial_text, server_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .facts import CertificateFacts, describe
    from .making import KeyType
    from .verbs import check_request, issue_client, renew, revoke, sign_request, validity_s

__all__ = [
    "CertificateFacts",
    "Identity",
    "KeyType",
    "Snapshot",
    "check_request",
    "describe",
    "ensure_identity",
    "existing_identity",
    "issue_client",
    "renew",
    "revoke",
    "revoked_serials",
    "serial_text",
    "sign_request",
    "snapshot",
    "validity_s",
]


def __getattr__(name: str) -> object:
    for module, public in (
        ("facts", ("CertificateFacts", "describe")),
        ("making", ("KeyType",)),
        ("verbs", ("check_request", "issue_client", "renew", "revoke", "sign_request", "validity_s")),
    ):
        if name in public:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def ensure_identity(directory: Path, *, names: Sequence[str] = (), key_type: KeyType = "ec", now: float) -> Identity:
    """The identity in ``directory``: made if there is none, renewed and mended where needed, else as it is.

    ``names`` are further host names or addresses of the server certificate. ``key_type`` is for a new CA; what
    exists keeps its own, and a new certificate follows its CA. ``notes`` of the result tell what was changed.
    ``now`` is the real time, by which agents judge the dates.
    Raises BadSetup when the directory cannot be used or something that agents rely on is lost or broken.
    """
    wanted = server_names(names)
    if is_healthy(directory, names=wanted, now=now):
        return Identity.in_directory(directory)
    from .mending import mend

    with locked(directory):
        # Another process may have been first.
        notes = () if is_healthy(directory, names=wanted, now=now) else mend(directory, wanted, key_type, now)
    return Identity.in_directory(directory, notes)


def revoked_serials(source: Path | Identity) -> frozenset[int]:
    """Serial numbers on the CRL of an identity directory or an identity; BadSetup if it is not its CA's."""
    identity = source if isinstance(source, Identity) else Identity.in_directory(source)
    if identity.crl is None:
        return frozenset()
    is_ours = identity.directory is not None and identity.crl == identity.directory / CRL_FILE
    record = read_record(identity.crl.parent) if is_ours else None
    if record is not None:  # it vouches for a CRL whose signature was checked when the record was made
        return frozenset(int(serial, 16) for serial in record.revoked)
    from .reading import load_crl

    return frozenset(load_crl(identity.crl, identity.client_ca))
