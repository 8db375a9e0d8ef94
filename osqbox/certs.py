"""The certificates of a box: made on the first run, renewed in time, handed to clients, revoked.

Two CAs that cannot stand in for each other: ``ca`` signs only servers, ``client-ca`` only clients, and each
carries the one extended key usage it may pass on. ``openssl verify -x509_strict`` accepts all of it.

`ensure_identity`, `revoked_serials` and `snapshot` are cheap for a healthy identity; whatever makes or
examines a certificate imports ``cryptography`` where it needs it.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import msgspec

from osqbox.errors import BadSetup, BadUsage
from osqbox.identity import (
    RECORD_FILE,
    SECRET_FILE,
    Identity,
    Record,
    Snapshot,
    Unwritable,
    exists,
    exposed_keys,
    hashes,
    is_healthy,
    locked,
    make_directory,
    read_file,
    read_record,
    read_secret,
    snapshot,
    write_files,
)

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Iterable, Sequence

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes as digests
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.asymmetric.types import (
        CertificateIssuerPrivateKeyTypes,
        CertificateIssuerPublicKeyTypes,
        CertificatePublicKeyTypes,
    )

    PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

__all__ = [
    "CertificateFacts",
    "Identity",
    "KeyType",
    "Snapshot",
    "describe",
    "ensure_identity",
    "existing_identity",
    "issue_client",
    "renew",
    "revoke",
    "revoked_serials",
    "serial_text",
    "snapshot",
]

KeyType = Literal["ec", "rsa", "rsa-3072"]
"""P-256, RSA of 2048 or RSA of 3072 bits."""

DAY_S = 86_400
LEAF_DAYS = 397
"""The longest validity that browsers and Apple's TLS accept without complaint is 398 days."""
AUTHORITY_DAYS = 3_652
RENEW_DAYS = 30
"""A certificate is renewed at the first start within this time of its end."""
BACKDATE_S = 3_600
"""For agents whose clock is a little behind."""
MAX_SERVER_NAMES = 100
FQDN_WAIT_S = 0.2
"""A resolver that answers later does not get a say in the server certificate."""

SERVER_AUTH = "1.3.6.1.5.5.7.3.1"
CLIENT_AUTH = "1.3.6.1.5.5.7.3.2"
ANY_USAGE = "2.5.29.37.0"

CLIENTS = "clients"
ISSUED_FILE = "issued.json"
CRL_FILE = "client-ca.crl"
FIRST_CLIENT = "client"
WORDS = frozenset({"server", "client", "all", "ca", "client-ca"})
"""Names that already mean something to the verbs, so no client may have them."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,62}(?<!\.)")
_URI_WORD = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]{1,64}")
_HOST = re.compile(r"(?:\*\.)?(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*")


class Issued(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of ``issued.json``: every client certificate ever signed, so that a name is revoked whole."""

    serial: str
    name: str | None = None
    uri: str | None = None
    not_after: float | None = None
    revoked_at: float | None = None


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


@dataclass(frozen=True, slots=True)
class _Pair:
    cert: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes | None


# ---- the first run, and every run after it ---------------------------------------------------------------


def ensure_identity(directory: Path, *, names: Sequence[str] = (), key_type: KeyType = "ec", now: float) -> Identity:
    """The identity in ``directory``: made if there is none, renewed and mended where needed, else as it is.

    ``names`` are further host names or addresses of the server certificate. ``key_type`` is for new keys;
    what exists keeps its own. ``notes`` of the result tell what was changed. ``now`` is the real time, by which
    agents judge the dates.
    Raises BadSetup when the directory cannot be used or something that agents rely on is lost or broken.
    """
    wanted = server_names(names)
    if is_healthy(directory, names=wanted, now=now):
        return Identity.in_directory(directory)
    with locked(directory):
        if is_healthy(directory, names=wanted, now=now):
            return Identity.in_directory(directory)  # another process was first
        try:
            notes = _settle(directory, wanted, key_type, now)
        except Unwritable as error:
            if not _still_serves(directory, wanted, now):
                raise
            notes = [f"the certificates still serve but could not be renewed: {error}"]
    return Identity.in_directory(directory, notes)


def server_names(names: Iterable[str]) -> list[str]:
    """Host names and addresses as a certificate holds them; "all interfaces" is no name and is left out."""
    return [name for name in map(_server_name, names) if name]


def _server_name(given: str) -> str:
    address = _address(given.strip("[]").partition("%")[0])
    if address is not None:
        return "" if address.is_unspecified else str(address)
    try:
        name = given.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise BadUsage(f"expected a host name or an IP address for the server certificate, got {given!r}")
    return name


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    import ipaddress

    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _settle(directory: Path, names: Sequence[str], key_type: KeyType, now: float) -> list[str]:
    """Make what is missing, renew what is due, refuse what is broken; what happened to older files."""
    notes: list[str] = []
    _guard_keys(directory, notes)
    authority = _settle_authority(directory, "ca", key_type, now, notes)
    client_authority = _settle_authority(directory, "client-ca", key_type, now, notes)
    _settle_server(directory, authority, names, key_type, now, notes)
    _settle_crl(directory, client_authority, now, notes)
    _settle_client(directory, client_authority, key_type, now, notes)
    _settle_secret(directory)
    _remember(directory)
    return notes


def _still_serves(directory: Path, names: Sequence[str], now: float) -> bool:
    """Whether the server can go on with what is there, although something could not be written."""
    try:
        authority = _load_authority(directory, "ca").cert
        client_authority = _load_authority(directory, "client-ca").cert
        server, fault = _load_leaf(directory, "server", authority)
        read_secret(directory / SECRET_FILE)
    except BadSetup:
        return False
    if server is None or fault or _lacking(server, names):
        return False
    return all(_starts(cert) <= now < _ends(cert) for cert in (authority, client_authority, server))


def _guard_keys(directory: Path, notes: list[str]) -> None:
    for path in exposed_keys(directory):
        try:
            path.chmod(0o600)
            notes.append(f"{path} could be read by others; its mode is now 0600")
        except OSError:
            notes.append(f"{path} can be read by others and its mode cannot be changed")


def _settle_authority(directory: Path, stem: str, key_type: KeyType, now: float, notes: list[str]) -> _Pair:
    file = directory / f"{stem}.pem"
    if not exists(file):
        _refuse_lost_authority(directory, file)
        return _make_authority(directory, stem, key_type, now)
    pair = _load_authority(directory, stem)
    _check_started(file, pair.cert, now)
    due = _due(pair.cert, now)
    if due and pair.key is not None and _issued_by(pair.cert, pair.cert):
        notes.append(f"{file} was renewed with the same key ({due}): give the new file to whoever has a copy")
        return _extend_authority(directory, stem, pair, now)
    if due:
        _tell_end(file, pair.cert, now, notes, "only whoever signed it can renew it")
    return pair


def _refuse_lost_authority(directory: Path, file: Path) -> None:
    """A CA made anew would silently cut off everyone who trusts the lost one."""
    leaves = [directory / "server.pem"] if file.stem == "ca" else _client_files(directory)
    for leaf in leaves:
        if exists(leaf):
            quoted = shlex.quote(str(directory))
            raise BadSetup(
                f"{file} is missing while {leaf.name}, which it signed, is there:"
                " put it back, or move the directory away to start with a new identity",
                f"mv {quoted} {quoted}.old",
            )


def _settle_server(
    directory: Path, authority: _Pair, names: Sequence[str], key_type: KeyType, now: float, notes: list[str]
) -> None:
    file = directory / "server.pem"
    cert, fault = _load_leaf(directory, "server", authority.cert)
    if cert is not None and fault is None:
        fault = _lacking(cert, names)
    reason = fault or (cert and _leaf_due(cert, authority.cert, now))
    if cert is not None and reason is None:
        return
    if authority.key is not None:
        _make_server(directory, authority, cert, names, _key_type(cert, key_type), now)
        notes.extend([f"{file} was made anew: {reason}"] if reason else [])
        return
    lost = "ca.key is not here to sign a new one"
    if cert is None or fault:
        raise BadSetup(f"{file} cannot be used ({reason or 'it is missing'}) and {lost}", _list(directory))
    _check_started(file, cert, now)
    _tell_end(file, cert, now, notes, lost)


def _lacking(cert: x509.Certificate, names: Sequence[str]) -> str | None:
    lacking = sorted(set(names) - set(_names(cert)))
    return f"it lacked {', '.join(lacking)}" if lacking else None


def _settle_client(directory: Path, authority: _Pair, key_type: KeyType, now: float, notes: list[str]) -> None:
    file = directory / "client.pem"
    cert, fault = _load_leaf(directory, "client", authority.cert)
    if cert is not None and cert.serial_number in _read_crl(directory):
        notes.append(f"{file} is revoked; `osqbox certs renew client` makes a new one")
        return
    reason = fault or (cert and _leaf_due(cert, authority.cert, now))
    if authority.key is None or (cert is not None and reason is None):
        return
    _make_client(directory, directory, FIRST_CLIENT, authority, cert, _key_type(cert, key_type), now)
    notes.extend([f"{file} was made anew: {reason}"] if reason else [])


def _settle_crl(directory: Path, authority: _Pair, now: float, notes: list[str]) -> None:
    """The CRL follows ``issued.json``; what only one of the two knows as revoked stays revoked."""
    recorded = {int(entry.serial, 16) for entry in _read_issued(directory) if entry.revoked_at is not None}
    known = _read_crl(directory)
    complete = exists(directory / CRL_FILE) and recorded <= known.keys()
    if complete or authority.key is None:
        return
    _write_crl(directory, authority, now)
    if recorded:
        notes.append(f"{directory / CRL_FILE} was made anew from {ISSUED_FILE}")


def _settle_secret(directory: Path) -> None:
    if exists(directory / SECRET_FILE):
        read_secret(directory / SECRET_FILE)
        return
    import secrets

    write_files(directory, {SECRET_FILE: secrets.token_urlsafe(24).encode() + b"\n"})


def _remember(directory: Path) -> None:
    """Write ``identity.json``, last: it vouches for everything before it."""
    revoked = _read_crl(directory)
    files = [directory / name for name in ("server.pem", "ca.pem", "client-ca.pem", "client.pem")]
    loaded = [_load_certificates(file)[0] for file in files if exists(file)]
    watched = [cert for cert in loaded if cert.serial_number not in revoked]
    record = Record(
        files=hashes(directory),
        valid_from=max(_starts(cert) for cert in watched),
        renew_at=min(_ends(cert) for cert in watched) - RENEW_DAYS * DAY_S,
        server_names=_names(loaded[0]),
        revoked=sorted(serial_text(serial) for serial in revoked),
    )
    with suppress(Unwritable):  # a read-only identity is examined at every start instead
        write_files(directory, {RECORD_FILE: _json(record)})


# ---- what the verbs do -----------------------------------------------------------------------------------


def issue_client(
    directory: Path,
    name: str,
    *,
    tenant: str = "default",
    roles: Sequence[str] = (),
    principals: Sequence[str] = (),
    days: int = LEAF_DAYS,
    out: Path | None = None,
    key_type: KeyType | None = None,
    now: float,
) -> tuple[Path, Path, Path]:
    """Sign a client certificate; its file, its key's file, and the CA that the client is to trust.

    It lands in ``directory/clients``, or with a copy of ``ca.pem`` in ``out``. The URI SANs are the identity
    ``osqbox://TENANT/NAME`` first, then ``osqbox-role:ROLE`` and ``osqbox-principal:PRINCIPAL``. A name that
    was issued before gets another certificate; the older one stays valid until it expires or the name is
    revoked. The validity ends with the client CA's at the latest. Raises BadUsage for unfit words.
    """
    uris = client_uris(name, tenant, roles, principals)
    if days < 1:
        raise BadUsage(f"expected a validity of at least 1 day, got {days}")
    with locked(_existing(directory)):
        authority = _signing_authority(directory, "client-ca")
        target = directory / CLIENTS if out is None else out
        make_directory(target)
        _refuse_overwriting(directory, target, name, authority)
        if out is not None:
            write_files(target, {"ca.pem": read_file(directory / "ca.pem")})
        kind = key_type or _key_type(authority.cert, "ec")
        _make_client(directory, target, name, authority, None, kind, now, days=days, uris=uris)
        _remember(directory)
    return target / f"{name}.pem", target / f"{name}.key", (directory if out is None else target) / "ca.pem"


def client_uris(name: str, tenant: str, roles: Sequence[str], principals: Sequence[str]) -> list[str]:
    """The URI SANs of a client certificate, in order; BadUsage for words that cannot stand in them."""
    for what, word in (("client name", name), ("tenant", tenant)):
        if not _NAME.fullmatch(word) or (word is tenant and word != word.lower()):
            raise BadUsage(
                f"expected a {what} of up to 63 letters (a tenant's are lower case), digits, '-', '_' and '.',"
                f" starting with a letter or digit, got {word!r}"
            )
    if name in WORDS:
        raise BadUsage(f"{name!r} already names something of the box itself; choose another client name")
    for word in (*roles, *principals):
        if not _URI_WORD.fullmatch(word):
            raise BadUsage(f"expected a role or principal of 1 to 64 URI characters, got {word!r}")
    return [
        _identity_uri(tenant, name),
        *(f"osqbox-role:{role}" for role in roles),
        *(f"osqbox-principal:{principal}" for principal in principals),
    ]


def _identity_uri(tenant: str, name: str) -> str:
    return f"osqbox://{tenant}/{name}"


def _refuse_overwriting(directory: Path, target: Path, name: str, authority: _Pair) -> None:
    """Replace only what this client CA issued, and never another CA's ca.pem."""
    ca, cert, key = target / "ca.pem", target / f"{name}.pem", target / f"{name}.key"
    if target != directory / CLIENTS and exists(ca) and read_file(ca) != read_file(directory / "ca.pem"):
        raise BadSetup(f"{ca} is another CA's and would be overwritten; choose another directory")
    if not exists(cert) and not exists(key):
        return
    if not exists(cert) or not _issued_by(_load_certificates(cert)[0], authority.cert):
        raise BadSetup(f"{cert} and {key} are not from this client CA and would be overwritten")


def renew(
    directory: Path, which: Sequence[str] = ("server",), *, key_type: KeyType | None = None, now: float
) -> tuple[Path, ...]:
    """New keys and certificates for ``server``, ``client``, ``all`` or clients by name; what changed.

    A CA that is due is renewed first, with its old key, so that everything it signed stays valid. ``all``
    leaves revoked clients alone. Older client certificates stay valid until they expire or are revoked.
    """
    with locked(_existing(directory)):
        before = _contents(directory)
        authorities = {stem: _settle_authority(directory, stem, "ec", now, []) for stem in ("ca", "client-ca")}
        _settle_crl(directory, authorities["client-ca"], now, [])
        for stem in _renewable(directory, which):
            _renew_one(directory, stem, authorities, key_type, now)
        _remember(directory)
        return tuple(file for file, content in _contents(directory).items() if before.get(file) != content)


def _renewable(directory: Path, which: Sequence[str]) -> list[str]:
    """The names to renew, ``all`` spelled out."""
    revoked = _read_crl(directory)
    stems: list[str] = []
    for word in which:
        if word != "all":
            stems.append(word)
            continue
        live = [file for file in _client_files(directory) if _serial_in(file) not in revoked]
        stems += ["server", *(file.stem for file in live)]
    for stem in stems:
        if stem not in ("server", FIRST_CLIENT) and not exists(directory / CLIENTS / f"{stem}.pem"):
            raise BadUsage(
                f"expected server, client, all or a name found in {directory / CLIENTS}, got {stem!r}",
                _verb("show", directory),
            )
    return list(dict.fromkeys(stems))


def _renew_one(directory: Path, stem: str, authorities: dict[str, _Pair], key_type: KeyType | None, now: float) -> None:
    authority_stem = "ca" if stem == "server" else "client-ca"
    authority = authorities[authority_stem]
    if authority.key is None:
        raise _no_key(directory, authority_stem)
    folder = directory if stem in ("server", FIRST_CLIENT) else directory / CLIENTS
    cert, _ = _load_leaf(folder, stem, authority.cert)
    kind = key_type or _key_type(cert or authority.cert, "ec")
    if stem == "server":
        _make_server(directory, authority, cert, (), kind, now)
    else:
        _make_client(directory, folder, stem, authority, cert, kind, now)


def revoke(directory: Path, what: str | Path, *, now: float) -> tuple[int, ...]:
    """Put client certificates on the CRL: all that a name ever had, one serial, or the one in a file.

    On disk on return. Returns the serial numbers; revoking twice is no error. A running box follows within a second.
    Raises BadUsage for something this client CA did not issue.
    """
    with locked(_existing(directory)):
        authority = _signing_authority(directory, "client-ca")
        issued = {int(entry.serial, 16): entry for entry in _read_issued(directory)}
        serials = _serials_of(directory, str(what), authority, issued)
        for serial in serials:
            entry = issued.get(serial) or Issued(serial=serial_text(serial))
            if entry.revoked_at is None:
                issued[serial] = msgspec.structs.replace(entry, revoked_at=now)
        write_files(directory, {ISSUED_FILE: _json(list(issued.values()))})
        _write_crl(directory, authority, now)
        _remember(directory)
        return serials


def _serials_of(directory: Path, what: str, authority: _Pair, issued: dict[int, Issued]) -> tuple[int, ...]:
    named = {serial for serial, entry in issued.items() if entry.name == what}
    named |= {_serial_in(file) for file in _client_files(directory) if file.stem == what}
    if named:
        return tuple(sorted(named))
    if Path(what).is_file():
        cert = _load_certificates(Path(what))[0]
        if not _issued_by(cert, authority.cert):
            raise BadUsage(f"{what} was not issued by {directory / 'client-ca.pem'}", _verb("show", directory))
        return (cert.serial_number,)
    digits = what.lower().removeprefix("0x").replace(":", "")
    if re.fullmatch(r"[0-9]+", what) and int(what) in issued:
        return (int(what),)
    if re.fullmatch(r"[0-9a-f]{1,40}", digits) and (len(digits) > 16 or int(digits, 16) in issued):
        return (int(digits, 16),)
    known = sorted({entry.name for entry in issued.values() if entry.name})
    raise BadUsage(
        f"expected a client's name ({', '.join(known)}), a serial number in hexadecimal"
        f" or a certificate file, got {what!r}",
        _verb("show", directory),
    )


def revoked_serials(source: Path | Identity) -> frozenset[int]:
    """Serial numbers on the CRL of an identity directory or an identity; BadSetup if it is not its CA's."""
    if isinstance(source, Identity):
        ours = source.directory is not None and source.crl == source.directory / CRL_FILE
        if not ours:
            return frozenset(_load_crl(source.crl, source.client_ca)) if source.crl else frozenset()
        assert source.directory is not None
        source = source.directory
    record = read_record(source)  # vouches for a CRL whose signature was checked when the record was made
    if record is not None:
        return frozenset(int(serial, 16) for serial in record.revoked)
    return frozenset(_read_crl(source))


def describe(identity: Identity, now: float) -> list[CertificateFacts]:
    """Every certificate of the identity, each CA before what it issued; BadSetup for one that is broken."""
    files = [identity.ca, identity.server_cert, identity.client_ca, identity.client_cert]
    if identity.directory is not None and identity.client_ca == identity.directory / "client-ca.pem":
        files += [file for file in _client_files(identity.directory) if file.parent.name == CLIENTS]
    authorities = _load_certificates(identity.client_ca) if identity.client_ca else []
    serials = revoked_serials(identity)
    facts = []
    for file in dict.fromkeys(file for file in files if file is not None):
        for cert in _load_certificates(file):
            # A serial number means something only together with its issuer.
            revoked = cert.serial_number in serials and any(_issued_by(cert, each) for each in authorities)
            facts.append(_facts(file, cert, revoked, now))
    return facts


def _facts(file: Path, cert: x509.Certificate, revoked: bool, now: float) -> CertificateFacts:
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding

    return CertificateFacts(
        file=file,
        subject=cert.subject.rfc4514_string(),
        issuer=cert.issuer.rfc4514_string(),
        names=tuple(_names(cert)),
        serial=serial_text(cert.serial_number),
        not_before=_starts(cert),
        not_after=_ends(cert),
        days_left=_days_left(cert, now),
        sha256=hashlib.sha256(cert.public_bytes(Encoding.DER)).hexdigest(),
        key_type=_key_words(cert.public_key()),
        revoked=revoked,
    )


def _key_words(key: object) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return {"secp256r1": "EC P-256", "secp384r1": "EC P-384"}.get(key.curve.name, f"EC {key.curve.name}")
    return type(key).__name__.removesuffix("PublicKey")


# ---- the user's own certificates -------------------------------------------------------------------------


def examine_own(tls_cert: Path, tls_key: Path, client_ca: Path | None, crl: Path | None, *, now: float) -> list[str]:
    """Notes on certificates that will work; BadSetup for those that would fail at the first handshake."""
    from cryptography import x509

    notes: list[str] = []
    cert = _load_certificates(tls_cert)[0]
    _check_key_fits(tls_cert, tls_key)
    _check_started(tls_cert, cert, now)
    mend = "replace it, or renew osqbox's own and leave out --tls-cert and --tls-key"
    if _due(cert, now):
        _tell_end(tls_cert, cert, now, notes, mend)
    with suppress(x509.ExtensionNotFound):
        usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if not {SERVER_AUTH, ANY_USAGE} & {oid.dotted_string for oid in usage}:
            raise BadSetup(f"{tls_cert}: expected a server certificate; its extended key usage forbids that")
    if not _names(cert):
        notes.append(f"{tls_cert} has no subject alternative names; agents look for the host name there")
    if client_ca is not None:
        _check_client_ca(client_ca, now)
    if crl is not None:
        _load_crl(crl, client_ca)
    return notes


def _check_key_fits(tls_cert: Path, tls_key: Path) -> None:
    import ssl

    def refuse_password() -> str:
        raise BadSetup(
            f"{tls_key}: expected a key without a password, got an encrypted one",
            f"openssl pkey -in {shlex.quote(str(tls_key))} -out {shlex.quote(str(tls_key))}.plain",
        )

    read_file(tls_key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls_cert, tls_key, password=refuse_password)
    except ssl.SSLError as error:
        fault = {
            "KEY_VALUES_MISMATCH": f"the key does not belong to the certificate {tls_cert}",
            "KEY_TYPE_MISMATCH": f"the key does not belong to the certificate {tls_cert}",
        }.get(
            error.reason or "",
            f"cannot be used with {tls_cert}: {error.reason or 'no PEM private key in it'}",
        )
        raise BadSetup(f"{tls_key}: {fault}", f"openssl pkey -in {shlex.quote(str(tls_key))} -noout -text") from error


def _check_client_ca(client_ca: Path, now: float) -> None:
    authorities = [cert for cert in _load_certificates(client_ca) if _is_authority(cert)]
    if not authorities:
        raise BadSetup(f"{client_ca}: expected a CA certificate, got one that may not sign others")
    if not any(_starts(cert) <= now < _ends(cert) for cert in authorities):
        last = max(_ends(cert) for cert in authorities)
        raise BadSetup(f"{client_ca}: no CA certificate in it is valid now; the last ended on {_date(last)}")


def anchor_in(tls_cert: Path) -> Path | None:
    """The file itself if agents can trust it as a CA file: it holds a self-signed certificate."""
    return tls_cert if any(_issued_by(cert, cert) for cert in _load_certificates(tls_cert)) else None


# ---- making ----------------------------------------------------------------------------------------------


def _make_authority(directory: Path, stem: str, key_type: KeyType, now: float) -> _Pair:
    from cryptography import x509

    key = _new_key(key_type)
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    whom, usage = ("server", SERVER_AUTH) if stem == "ca" else ("client", CLIENT_AUTH)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_key_usage("key_cert_sign", "crl_sign"), True),
        (x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)]), False),
        (ski, False),
    ]
    # The digits keep apart the CAs of several boxes in one trust store.
    subject = _common_name(f"osqbox {whom} CA {ski.digest.hex()[:8]}")
    ends = now + AUTHORITY_DAYS * DAY_S
    cert = _sign(subject, key.public_key(), extensions, subject, key, now, ends)
    write_files(directory, {f"{stem}.key": _key_pem(key), f"{stem}.pem": _cert_pem(cert)})
    return _Pair(cert, key)


def _extend_authority(directory: Path, stem: str, pair: _Pair, now: float) -> _Pair:
    """The same CA with later dates: all it signed stays valid, under the old file and the new."""
    assert pair.key is not None
    old = pair.cert
    extensions = [(extension.value, extension.critical) for extension in old.extensions]
    ends = now + AUTHORITY_DAYS * DAY_S
    cert = _sign(old.subject, old.public_key(), extensions, old.subject, pair.key, now, ends)
    write_files(directory, {f"{stem}.pem": _cert_pem(cert)})
    return _Pair(cert, pair.key)


def _make_server(
    directory: Path,
    authority: _Pair,
    old: x509.Certificate | None,
    names: Sequence[str],
    key_type: KeyType,
    now: float,
) -> None:
    """A server certificate for this host, ``names``, and every name the old one had."""
    from cryptography import x509

    wanted = ["localhost", "127.0.0.1", "::1", *names, *_host_names(), *(_names(old) if old else ())]
    addresses = {name: _address(name) for name in dict.fromkeys(wanted)}
    san = [x509.DNSName(name) if ip is None else x509.IPAddress(ip) for name, ip in addresses.items()]
    key, cert = _leaf(authority, "localhost", san[:MAX_SERVER_NAMES], SERVER_AUTH, key_type, now, LEAF_DAYS * DAY_S)
    write_files(directory, {"server.key": _key_pem(key), "server.pem": _cert_pem(cert)})


def _host_names() -> list[str]:
    """This host's name, and the full one if the resolver knows it quickly."""
    import socket
    import threading

    found = [socket.gethostname()]

    def ask() -> None:
        with suppress(OSError, ValueError):
            found.append(socket.getfqdn())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(FQDN_WAIT_S)
    names: list[str] = []
    for name in tuple(found):
        with suppress(BadUsage):
            names += server_names([name])
    return names


def _make_client(
    directory: Path,
    target: Path,
    name: str,
    authority: _Pair,
    old: x509.Certificate | None,
    key_type: KeyType,
    now: float,
    *,
    days: int | None = None,
    uris: Sequence[str] = (),
) -> None:
    """A client certificate with ``uris`` and ``days``, else the old one's, else the plain identity."""
    from cryptography import x509

    valid_s: float = LEAF_DAYS * DAY_S
    if days is not None:
        valid_s = days * DAY_S
    elif old is not None:
        valid_s = _ends(old) - _starts(old) - BACKDATE_S
    wanted = uris or (_names(old) if old else [_identity_uri("default", name)])
    san = [x509.UniformResourceIdentifier(uri) for uri in wanted]
    key, cert = _leaf(authority, name, san, CLIENT_AUTH, key_type, now, valid_s)
    entry = Issued(serial=serial_text(cert.serial_number), name=name, uri=wanted[0], not_after=_ends(cert))
    # Recorded before it exists: a certificate nobody can name is one nobody can revoke.
    lasting = [each for each in _read_issued(directory) if each.revoked_at or (each.not_after or math.inf) > now]
    write_files(directory, {ISSUED_FILE: _json([*lasting, entry])})
    write_files(target, {f"{name}.key": _key_pem(key), f"{name}.pem": _cert_pem(cert)})


def _leaf(
    authority: _Pair,
    common_name: str,
    san: Sequence[x509.GeneralName],
    usage: str,
    key_type: KeyType,
    now: float,
    valid_s: float,
) -> tuple[PrivateKey, x509.Certificate]:
    """A new key and its certificate, valid no longer than its CA."""
    from cryptography import x509

    assert authority.key is not None
    key = _new_key(key_type)
    purposes = ["digital_signature"] + (["key_encipherment"] if key_type != "ec" and usage == SERVER_AUTH else [])
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(*purposes), True),
        (x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)]), False),
        (x509.SubjectAlternativeName(san), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (_authority_key_identifier(authority.cert), False),
    ]
    ends = min(now + valid_s, _ends(authority.cert))
    subject = _common_name(common_name)
    cert = _sign(subject, key.public_key(), extensions, authority.cert.subject, authority.key, now, ends)
    return key, cert


def _sign(
    subject: x509.Name,
    public_key: CertificatePublicKeyTypes,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    issuer: x509.Name,
    signer: CertificateIssuerPrivateKeyTypes,
    now: float,
    ends: float,
) -> x509.Certificate:
    from cryptography import x509

    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - BACKDATE_S))
        .not_valid_after(_moment(math.ceil(ends)))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, _digest(signer))


def _write_crl(directory: Path, authority: _Pair, now: float) -> None:
    """The CRL of everything revoked so far, good until the client CA ends: a box is not there to renew it."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    assert authority.key is not None
    recorded = {int(entry.serial, 16): entry.revoked_at for entry in _read_issued(directory)}
    revoked = {serial: at for serial, at in recorded.items() if at is not None} | _read_crl(directory)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.cert.subject)
        .last_update(_moment(now))
        .next_update(_moment(max(_ends(authority.cert), now + DAY_S)))
        .add_extension(_authority_key_identifier(authority.cert), False)
        .add_extension(x509.CRLNumber(int(now * 1000)), False)
    )
    for serial, at in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_moment(at)).build()
        builder = builder.add_revoked_certificate(entry)
    crl = builder.sign(authority.key, _digest(authority.key))
    write_files(directory, {CRL_FILE: crl.public_bytes(Encoding.PEM)})


def _new_key(key_type: KeyType) -> PrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if key_type == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=3072 if key_type == "rsa-3072" else 2048)


def _key_type(cert: x509.Certificate | None, otherwise: KeyType) -> KeyType:
    """The type of a certificate's key, so that a renewal keeps it."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    if cert is None:
        return otherwise
    key = cert.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return "ec"
    return "rsa-3072" if key.key_size >= 3072 else "rsa"


def _digest(key: CertificateIssuerPrivateKeyTypes) -> digests.SHA256 | None:
    """SHA-256, but for the Edwards keys a user's own CA may have, which bring their own."""
    from cryptography.hazmat.primitives import hashes as digests
    from cryptography.hazmat.primitives.asymmetric import ed448, ed25519

    own = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return None if own else digests.SHA256()


def _key_usage(*purposes: str) -> x509.KeyUsage:
    from cryptography import x509

    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{purpose: purpose in purposes for purpose in every.split()})


def _authority_key_identifier(cert: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    from cryptography import x509

    try:
        ski = cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        ski = x509.SubjectKeyIdentifier.from_public_key(cert.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)


def _common_name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _key_pem(key: PrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _cert_pem(cert: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return cert.public_bytes(Encoding.PEM)


# ---- reading ---------------------------------------------------------------------------------------------


def _load_certificates(file: Path) -> list[x509.Certificate]:
    from cryptography import x509

    content = read_file(file)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise BadSetup(
            f"{file}: expected a certificate in PEM, got something else: {error}",
            f"openssl x509 -in {shlex.quote(str(file))} -noout -text",
        ) from error


def _load_key(file: Path) -> CertificateIssuerPrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = read_file(file)
    try:
        return cast("CertificateIssuerPrivateKeyTypes", load_pem_private_key(content, None))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadSetup(
            f"{file}: expected a private key in PEM without a password, got something else",
            f"openssl pkey -in {shlex.quote(str(file))} -noout",
        ) from error


def _load_authority(directory: Path, stem: str) -> _Pair:
    """A CA, without its key if that is kept elsewhere."""
    file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    cert = _load_certificates(file)[0]
    if not _is_authority(cert):
        raise BadSetup(f"{file}: expected a CA certificate, got one that may not sign others", _list(directory))
    key = _load_key(key_file) if exists(key_file) else None
    if key is not None and key.public_key() != cert.public_key():
        raise BadSetup(f"{key_file}: the key does not belong to the CA in {file.name}", _list(directory))
    return _Pair(cert, key)


def _load_leaf(directory: Path, stem: str, authority: x509.Certificate) -> tuple[x509.Certificate | None, str | None]:
    """The certificate as far as it can be read, and what keeps it from being used; two Nones without any file.

    Raises BadSetup for a certificate of another CA: it was put there by somebody, so it is not replaced.
    """
    file, key_file = directory / f"{stem}.pem", directory / f"{stem}.key"
    if not exists(file):
        return None, f"{file.name} was missing" if exists(key_file) else None
    try:
        cert = _load_certificates(file)[0]
    except BadSetup as error:
        return None, _unless_denied(error)
    if not _issued_by(cert, authority):
        raise BadSetup(
            f"{file} was not signed by the CA beside it: give a server certificate of your own with"
            " --tls-cert and --tls-key, or remove this one to have a new one made",
            f"rm {shlex.quote(str(file))} {shlex.quote(str(key_file))}",
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


def _is_authority(cert: x509.Certificate) -> bool:
    from cryptography import x509

    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _issued_by(cert: x509.Certificate, authority: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        cert.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _read_crl(directory: Path) -> dict[int, float]:
    """Serial number and time of each revocation; empty without a CRL."""
    file = directory / CRL_FILE
    return _load_crl(file, directory / "client-ca.pem") if exists(file) else {}


def _load_crl(file: Path, authorities: Path | None) -> dict[int, float]:
    from cryptography import x509

    content = read_file(file)
    try:
        crl = x509.load_pem_x509_crl(content)
    except ValueError as error:
        raise BadSetup(f"{file}: expected a CRL in PEM, got something else: {error}", _remake(file)) from error
    if not any(_crl_signed_by(crl, cert) for cert in (_load_certificates(authorities) if authorities else ())):
        raise BadSetup(f"{file}: the CRL was not signed by {authorities or 'any client CA'}", _remake(file))
    return {entry.serial_number: entry.revocation_date_utc.timestamp() for entry in crl}


def _crl_signed_by(crl: x509.CertificateRevocationList, cert: x509.Certificate) -> bool:
    try:
        return crl.issuer == cert.subject and crl.is_signature_valid(
            cast("CertificateIssuerPublicKeyTypes", cert.public_key())
        )
    except TypeError:
        return False


def _read_issued(directory: Path) -> list[Issued]:
    file = directory / ISSUED_FILE
    if not exists(file):
        return []
    try:
        issued = msgspec.json.decode(read_file(file), type=list[Issued])
        for entry in issued:
            int(entry.serial, 16)
    except ValueError as error:
        raise BadSetup(
            f"{file}: expected the list of issued client certificates, got {error}", _list(directory)
        ) from error
    return issued


def _client_files(directory: Path) -> list[Path]:
    """The client certificates kept in the directory, the first one first."""
    return [directory / "client.pem", *sorted((directory / CLIENTS).glob("*.pem"))]


def _contents(directory: Path) -> dict[Path, bytes]:
    files = [directory / name for name in ("ca.pem", "server.pem", "client-ca.pem")]
    return {file: read_file(file) for file in [*files, *_client_files(directory)] if exists(file)}


def existing_identity(directory: Path) -> Identity:
    """The identity in a directory as it is, healthy or not; BadSetup if there is none."""
    return Identity.in_directory(_existing(directory))


def _existing(directory: Path) -> Path:
    if not exists(directory / "client-ca.pem") or not exists(directory / "ca.pem"):
        raise BadSetup(
            f"{directory}: expected the certificates of a box, found none",
            f"osqbox serve --certs {shlex.quote(str(directory))}",
        )
    return directory


def _signing_authority(directory: Path, stem: str) -> _Pair:
    pair = _load_authority(directory, stem)
    if pair.key is None:
        raise _no_key(directory, stem)
    return pair


def _no_key(directory: Path, stem: str) -> BadSetup:
    return BadSetup(f"{directory / stem}.key is not here, and nothing can be signed without it", _list(directory))


# ---- small words -----------------------------------------------------------------------------------------


def _due(cert: x509.Certificate, now: float) -> str | None:
    """Why a certificate should be made anew; None if it should not."""
    if _starts(cert) > now:
        return f"it was valid only from {_date(_starts(cert))}"
    if _ends(cert) <= now:
        return f"it expired on {_date(_ends(cert))}"
    days = _days_left(cert, now)
    return f"it had {days} days left" if days < RENEW_DAYS else None


def _leaf_due(cert: x509.Certificate, authority: x509.Certificate, now: float) -> str | None:
    """As `_due`, but a certificate that already ends with its CA cannot be given longer."""
    return _due(cert, now) if _ends(cert) < _ends(authority) or _starts(cert) > now else None


def _tell_end(file: Path, cert: x509.Certificate, now: float, notes: list[str], mend: str) -> None:
    """A note while it lasts, BadSetup when it is over."""
    if _ends(cert) <= now:
        raise BadSetup(f"{file} expired on {_date(_ends(cert))}: {mend}", "osqbox certs renew")
    notes.append(f"{file} expires in {_days_left(cert, now)} days: {mend}")


def _check_started(file: Path, cert: x509.Certificate, now: float) -> None:
    if _starts(cert) > now:
        raise BadSetup(
            f"{file} is valid only from {_date(_starts(cert))}, and this machine's clock says {_date(now)}:"
            " set the clock, or replace the certificate",
            "date -u",
        )


def _names(cert: x509.Certificate) -> list[str]:
    from cryptography import x509

    try:
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in san]


def _serial_in(file: Path) -> int:
    """Serial number of the certificate in a file; 0, which none has, if there is no such file."""
    return _load_certificates(file)[0].serial_number if exists(file) else 0


def _starts(cert: x509.Certificate) -> float:
    return cert.not_valid_before_utc.timestamp()


def _ends(cert: x509.Certificate) -> float:
    return cert.not_valid_after_utc.timestamp()


def _days_left(cert: x509.Certificate, now: float) -> int:
    return int((_ends(cert) - now) // DAY_S)


def serial_text(serial: int) -> str:
    """Upper-case hexadecimal in whole bytes, as OpenSSL and Python's ssl print it."""
    digits = f"{serial:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def _moment(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(at), dt.UTC)


def _date(at: float) -> str:
    return _moment(at).strftime("%Y-%m-%d %H:%M:%S UTC")


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _verb(words: str, directory: Path) -> str:
    return f"osqbox certs {words} --certs {shlex.quote(str(directory))}"


def _list(directory: Path) -> str:
    return f"ls -l {shlex.quote(str(directory))}"


def _remake(crl: Path) -> str:
    return f"rm {shlex.quote(str(crl))}  # made again from {ISSUED_FILE} at the next start"
