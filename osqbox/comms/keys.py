"""The keys that sign agents' tokens: files in one directory, which several boxes may share.

    <directory>/1795223501698.key     a private key, PKCS#8, mode 0600; the name is when it was made, in milliseconds

The newest key of the wanted algorithm signs. Older ones go on verifying until their file is removed, here or by another
box: whoever looks for a key notices a changed directory within LOOK_AGAIN_S. A key of one's own may be laid there under
any name; it signs while there is none that was made here. Everything but `signer` and `find` takes milliseconds and is
called in a thread.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast, get_args

from osqbox import identity
from osqbox.clock import rfc3339
from osqbox.errors import BadSetup

from .errors import busy, conflict, not_found

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

log = logging.getLogger(__name__)

Algorithm = Literal["RS256", "ES256"]

DIRECTORY = "comms-keys"
"""Beside the certificates."""
RSA_BITS = 2048
LOOK_AGAIN_S = 1.0
KEYS_MAX = 64
KEY_MAX_BYTES = 64 * 1024

Version = tuple[int, int, int]
"""What changes with a file or directory: inode, size, time of its last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    kid: str
    """The beginning of the SHA-256 of its public half, in hexadecimal: the same on every box."""
    algorithm: Algorithm
    """Of the key itself; what a token says of its algorithm is never asked."""
    private: RSAPrivateKey | EllipticCurvePrivateKey = field(repr=False, compare=False)
    public: RSAPublicKey | EllipticCurvePublicKey = field(repr=False, compare=False)
    file: Path
    made_at: float
    """Seconds since the epoch; 0 for a file that was not made here."""

    def as_json(self) -> dict[str, str | None]:
        return {
            "kid": self.kid,
            "algorithm": self.algorithm,
            "file": self.file.name,
            "made_at": rfc3339(self.made_at or None),
        }


class SigningKeys:
    """Open with `SigningKeys.open`."""

    def __init__(self, directory: Path, algorithm: Algorithm) -> None:
        self.directory, self.algorithm = directory, algorithm
        self._keys: Mapping[str, SigningKey] = MappingProxyType({})
        """By kid, the oldest first; replaced as a whole, so that any thread may look."""
        self._files: dict[Path, tuple[Version, SigningKey | None]] = {}
        self._version: Version | None = None
        self._looked_at = 0.0

    @classmethod
    def open(cls, directory: Path, algorithm: str, now: float) -> SigningKeys:
        """What is in ``directory``; the first key is made when there is none of that algorithm. Raises BadSetup."""
        if algorithm not in get_args(Algorithm):
            raise BadSetup(f"token algorithm: expected {' or '.join(get_args(Algorithm))}, got {algorithm!r}")
        keys = cls(directory, cast("Algorithm", algorithm))
        identity.make_directory(directory)
        with identity.locked(directory):
            keys.reload(strict=True)
            if keys._newest() is None:
                keys._make(now)
        return keys

    def signer(self, now: float) -> SigningKey:
        """The key that signs."""
        self._look(now)
        if (newest := self._newest()) is None:
            raise busy(f"no {self.algorithm} key is left to sign tokens with; make one: osqbox comms keys rotate")
        return newest

    def find(self, kid: str, now: float) -> SigningKey | None:
        """The key of that id; None when it was removed or is not ours."""
        self._look(now)
        return self._keys.get(kid)

    def all(self) -> list[SigningKey]:
        """The oldest first."""
        return list(self._keys.values())

    def rotate(self, now: float) -> SigningKey:
        """A new key, which signs from now on. The others go on verifying until they are removed."""
        with identity.locked(self.directory):
            self.reload()
            if len(self._keys) >= KEYS_MAX:
                raise conflict(f"expected at most {KEYS_MAX} signing keys, got as many; remove old ones first")
            return self._make(now)

    def remove(self, kid: str) -> None:
        """Tokens signed with it are refused from now on, by other boxes within LOOK_AGAIN_S."""
        with identity.locked(self.directory):
            self.reload()
            if (key := self._keys.get(kid)) is None:
                raise not_found(f"Signing key {kid!r}")
            if key == self._newest():
                raise conflict(f"the signing key {kid!r} is the one that signs; rotate first")
            key.file.unlink(missing_ok=True)
            self.reload()

    def reload(self, *, strict: bool = False) -> bool:
        """Read what has changed in the directory; whether any key came or went.

        A file that cannot be used is passed over and logged; ``strict`` raises BadSetup instead.
        """
        self._version = _version(self.directory)
        files = {}
        for file in sorted(self.directory.glob("*.key"), key=_age)[-KEYS_MAX:]:
            version = _version(file)
            known = self._files.get(file)
            files[file] = known if known and known[0] == version else (version, _read(file, strict=strict))
        self._files = {file: (version, key) for file, (version, key) in files.items() if version is not None}
        before, keys = self._keys, [key for _, key in self._files.values() if key is not None]
        self._keys = MappingProxyType({key.kid: key for key in keys})
        return before.keys() != self._keys.keys()

    def _look(self, now: float) -> None:
        """At most once a second, and only at the directory's own date while nothing has changed."""
        if abs(now - self._looked_at) < LOOK_AGAIN_S:
            return
        self._looked_at = now
        if _version(self.directory) != self._version:
            self.reload()

    def _newest(self) -> SigningKey | None:
        fitting = [key for key in self._keys.values() if key.algorithm == self.algorithm]
        return fitting[-1] if fitting else None

    def _make(self, now: float) -> SigningKey:
        newest_ms = max((_age(key.file)[0] for key in self._keys.values()), default=0)
        name = f"{max(int(now * 1000), newest_ms + 1)}.key"
        identity.write_files(self.directory, {name: _new_key(self.algorithm)})
        self.reload(strict=True)
        newest = self._newest()
        assert newest is not None
        return newest


def _age(file: Path) -> tuple[int, str]:
    """Sorts the oldest first, and what was not made here before everything."""
    return int(file.stem) if file.stem.isascii() and file.stem.isdigit() else 0, file.name


def _version(path: Path) -> Version | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _new_key(algorithm: Algorithm) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = (
        rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
        if algorithm == "RS256"
        else ec.generate_private_key(ec.SECP256R1())
    )
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read(file: Path, *, strict: bool) -> SigningKey | None:
    """A key that cannot be used is told again when its file changes, not with every look."""
    try:
        return _parsed(file)
    except (OSError, ValueError, TypeError) as error:
        if strict:
            raise BadSetup(
                f"{file}: expected a private key without a password, RSA of at least {RSA_BITS} bits or EC P-256, "
                f"got: {error}",
                hint=f"move {file} away",
            ) from error
        log.warning("%s cannot be used to check tokens: %s", file, error)
        return None


def _parsed(file: Path) -> SigningKey:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    with file.open("rb") as opened:
        data = opened.read(KEY_MAX_BYTES)
    # The file is ours: checking an RSA key's arithmetic again would take tens of milliseconds.
    key = load_pem_private_key(data, None, unsafe_skip_rsa_key_validation=True)
    algorithm: Algorithm
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= RSA_BITS:
        algorithm = "RS256"
    elif isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        algorithm = "ES256"
    else:
        raise ValueError(f"{type(key).__name__} of {getattr(key, 'key_size', '?')} bits")
    public = key.public_key()
    kid = hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:16]
    return SigningKey(kid, algorithm, key, public, file, _age(file)[0] / 1000)
