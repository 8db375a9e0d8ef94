"""The identity of a box as files: where they lie, whether they are still good, and when they change.

A healthy identity is recognised by the hashes and dates noted in ``identity.json`` when it was last examined,
so an ordinary start loads no X.509 library. `osqbox.certs` makes, examines and mends what lies here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shlex
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from osqbox.errors import BadSetup

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

READ_LIMIT_BYTES = 16 * 1024 * 1024
LOCK_POLL_S = 0.02
LOCK_WAIT_S = 30.0
"""Far longer than making eight RSA keys takes on a slow machine."""

CLIENTS = "clients"
"""Directory of the client certificates issued by name."""
CRL_FILE = "client-ca.crl"
ISSUED_FILE = "issued.json"
EXAMINED = (
    *(f"{stem}.{suffix}" for stem in ("ca", "client-ca", "server", "client") for suffix in ("pem", "key")),
    CRL_FILE,
    ISSUED_FILE,
)
"""Files whose hashes ``identity.json`` vouches for."""
SECRET_FILE = "enroll_secret"  # noqa: S105 - a file name
RECORD_FILE = "identity.json"
LOCK_FILE = ".lock"
TEMPORARY = ".osqbox-*.tmp"


@dataclass(frozen=True, slots=True)
class Identity:
    """Where the certificates and keys of a box are. None: this identity has no such thing."""

    directory: Path | None
    ca: Path | None
    """What agents trust; None when the user's own server certificate comes from a CA outside the file."""
    server_cert: Path
    server_key: Path
    client_ca: Path | None = None
    client_ca_key: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    crl: Path | None = None
    enroll_secret_file: Path | None = None
    notes: tuple[str, ...] = ()
    """What was renewed, repaired or is about to need a hand: one sentence each."""

    @classmethod
    def in_directory(cls, directory: Path, notes: Iterable[str] = ()) -> Identity:
        """The identity lying in ``directory``; nothing is examined."""

        def present(name: str) -> Path | None:
            path = directory / name
            return path if exists(path) else None

        return cls(
            directory=directory,
            ca=directory / "ca.pem",
            server_cert=directory / "server.pem",
            server_key=directory / "server.key",
            client_ca=directory / "client-ca.pem",
            client_ca_key=present("client-ca.key"),
            client_cert=present("client.pem"),
            client_key=present("client.key"),
            crl=present(CRL_FILE),
            enroll_secret_file=directory / SECRET_FILE,
            notes=tuple(notes),
        )

    @classmethod
    def from_own(
        cls,
        tls_cert: Path,
        tls_key: Path,
        client_ca: Path | None = None,
        *,
        now: float,
        crl: Path | None = None,
        base: Identity | None = None,
    ) -> Identity:
        """The user's own server certificate and, if given, client CA and its CRL; the rest is ``base``'s.

        Raises BadSetup for what would fail at the first handshake: unreadable or encrypted files, a key that
        does not belong to the certificate, dates, a certificate not meant for servers, a CA that is none.
        """
        from osqbox.certs.facts import anchor_in, examine_own

        notes = examine_own(tls_cert, tls_key, client_ca, crl, now=now)
        found = base or cls(None, None, tls_cert, tls_key)
        if client_ca is not None:
            # Our CRL and client certificate belong to our client CA, and go with it.
            found = replace(found, client_ca=client_ca, client_ca_key=None, client_cert=None, client_key=None, crl=None)
        return replace(
            found,
            ca=found.ca if base and found.server_cert == tls_cert else anchor_in(tls_cert),
            server_cert=tls_cert,
            server_key=tls_key,
            crl=crl or found.crl,
            notes=(*found.notes, *notes),
        )

    def enroll_secret(self) -> str:
        """The default tenant's enroll secret, without the white space around it, as osqueryd reads it."""
        if self.enroll_secret_file is None:
            raise BadSetup("this identity has no enroll secret file: give one with --enroll-secret-file")
        return read_secret(self.enroll_secret_file)


def existing_identity(directory: Path) -> Identity:
    """The identity in a directory as it is, healthy or not; BadSetup if there is none."""
    if not exists(directory / "client-ca.pem") or not exists(directory / "ca.pem"):
        hint = shell("osqbox", "serve", "--certs", directory)
        raise BadSetup(f"{directory}: expected the certificates of a box, found none", hint)
    return Identity.in_directory(directory)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``identity.json``: what the last examination found. Anyone may delete it; it is then made again."""

    files: dict[str, str]
    """SHA-256 of each examined file that exists."""
    valid_from: float
    renew_at: float
    """The first moment at which some certificate is due for renewal."""
    server_names: list[str]
    revoked: list[str]
    """Serial numbers in the CRL, hexadecimal."""
    version: int = 1


class Snapshot(NamedTuple):
    """Which version of each file is on disk, for comparing with a later one; None where there is no file."""

    server: tuple[tuple[int, int, int] | None, ...]
    client_ca: tuple[int, int, int] | None
    crl: tuple[int, int, int] | None


def snapshot(identity: Identity) -> Snapshot:
    """A few stat calls. Take it before loading the files, so that a change in between shows as a change.

    Between the two renames of a renewal the key is newer than its certificate and does not load; the snapshot
    changes again with the second, so whoever polls keeps the old certificate and tries at the next change.
    """
    return Snapshot(
        server=(_version(identity.server_cert), _version(identity.server_key)),
        client_ca=_version(identity.client_ca),
        crl=_version(identity.crl),
    )


def _version(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        found = path.stat()  # follows links: a Kubernetes secret is swapped by its link
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def read_record(directory: Path) -> Record | None:
    """What ``identity.json`` says, if it can be read and every file it vouches for is unchanged."""
    try:
        record = msgspec.json.decode(read_file(directory / RECORD_FILE), type=Record)
        return record if record.version == 1 and record.files == hashes(directory) else None
    except (BadSetup, msgspec.DecodeError):
        return None


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every examined file that exists."""
    paths = ((name, directory / name) for name in EXAMINED)
    return {name: hashlib.sha256(read_file(path)).hexdigest() for name, path in paths if exists(path)}


def is_healthy(directory: Path, *, names: Sequence[str], now: float) -> bool:
    """Whether nothing needs making, renewing or mending, as far as the record can tell."""
    record = read_record(directory)
    return (
        record is not None
        and record.valid_from <= now < record.renew_at
        and set(names) <= set(record.server_names)
        and not exposed_keys(directory)
        and exists(directory / SECRET_FILE)
    )


def exposed_keys(directory: Path) -> list[Path]:
    """Keys and secrets that somebody besides their owner may read."""
    guarded = (directory / name for name in (*EXAMINED, SECRET_FILE) if mode_of(name) == 0o600)
    return [path for path in guarded if exists(path) and path.stat().st_mode & 0o077]


def exists(path: Path) -> bool:
    """False also where this user may not look; writing there then says so."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def mode_of(name: str) -> int:
    """Certificates and CRLs are for everyone, all else for the owner."""
    return 0o644 if name.endswith((".pem", ".crl")) else 0o600


def read_secret(path: Path) -> str:
    try:
        secret = read_file(path).decode().strip()
    except UnicodeDecodeError as error:
        raise BadSetup(f"{path}: expected an enroll secret in UTF-8, got other bytes") from error
    if not secret:
        raise BadSetup(f"{path}: expected an enroll secret, got an empty file", shell("rm", path))
    return secret


def read_file(path: Path) -> bytes:
    """Its bytes; BadSetup says who could not read what."""
    try:
        with path.open("rb") as file:
            content = file.read(READ_LIMIT_BYTES + 1)
    except OSError as error:
        raise BadSetup(
            f"{path}: cannot be read by uid {os.geteuid()}: {error.strerror}",
            shell("ls", "-l", path),
        ) from error
    if len(content) > READ_LIMIT_BYTES:
        raise BadSetup(f"{path}: expected at most {READ_LIMIT_BYTES} bytes, got more")
    return content


def shell(*words: str | Path) -> str:
    """A command line to paste."""
    return shlex.join(map(str, words))


class Unwritable(BadSetup):
    """A directory that cannot be written to."""

    def __init__(self, directory: Path, error: OSError) -> None:
        super().__init__(
            f"{directory}: cannot be written by uid {os.geteuid()}: {error.strerror};"
            " keys and certificates need a directory of their own",
            'osqbox serve --certs "$HOME/osqbox-certs"',
        )


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(directory, error) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time makes or mends an identity. A read-only directory needs no lock."""
    make_directory(directory)
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise Unwritable(directory, error) from error
        yield
        return
    try:
        _wait_for_lock(descriptor, directory)
        _sweep(directory)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, directory: Path) -> None:
    pause = threading.Event()
    for _ in range(int(LOCK_WAIT_S / LOCK_POLL_S)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pause.wait(LOCK_POLL_S)
        except OSError as error:
            raise Unwritable(directory, error) from error
        else:
            return
    lock = directory / LOCK_FILE
    raise BadSetup(f"{lock}: another process has held it for {LOCK_WAIT_S:.0f} s", shell("fuser", "-v", lock))


def _sweep(directory: Path) -> None:
    """Remove what a crash left half-written."""
    for folder in (directory, directory / CLIENTS):
        for stale in folder.glob(TEMPORARY):
            with suppress(OSError):
                stale.unlink()


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Each file whole or not at all, on disk on return; they appear in the order given.

    A key is never readable by others, not even for a moment, whatever the umask.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            temporary = directory / f".osqbox-{name}.{secrets.token_hex(4)}.tmp"
            staged.append((temporary, directory / name))
            _write_new(temporary, content, mode_of(name))
        for temporary, final in staged:
            temporary.replace(final)
        _flush(directory)
    except OSError as error:
        for temporary, _ in staged:
            with suppress(OSError):
                temporary.unlink()
        raise Unwritable(directory, error) from error


def _write_new(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
