"""A file that is fetched in pieces, taken up where it broke off, and checked as a whole. Pure.

Only its size and SHA-256 are kept: a pretended agent has nothing to install.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping

from osqbox.agent.comms.effects import Headers, Reply

_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_FAILED_CHECKS = 2
"""A wrong checksum may be a file that changed meanwhile: once more from the start."""


class Download:
    __slots__ = ("_digest", "_etag", "_failed_checks", "_hash", "_max_bytes", "is_hopeless", "name", "resumed", "size")

    def __init__(self, name: str, max_bytes: int) -> None:
        self.name = name
        self._max_bytes = max_bytes
        self._failed_checks = 0
        self.is_hopeless = False
        """Trying again brings nothing."""
        self.resumed = 0
        """How often it was taken up."""
        self._digest: str | None = None
        self._restart()

    def _restart(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._etag, self._digest = "", None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def headers(self) -> Headers:
        """What asks for the rest, and for all of it if it has changed."""
        if not self.size:
            return ()
        return (("Range", f"bytes={self.size}-"), *((("If-Range", self._etag),) if self._etag else ()))

    # -- as a sink -----------------------------------------------------------------------------------------------

    def begin(self, reply: Reply) -> bool:
        """The head of a 200 or 206 came. False: its body is not what was asked for."""
        if reply.status == 206:
            found = _CONTENT_RANGE.fullmatch(reply.headers.get("content-range", ""))
            if found is None or int(found[1]) != self.size:
                self._restart()
                return False
            self.resumed += 1
        else:
            self._restart()
        etag = reply.headers.get("etag", "")
        self._etag = etag if etag.startswith('"') and etag.isascii() and etag.isprintable() else ""
        self._digest = digest_of(reply.headers)
        return True

    def write(self, piece: bytes) -> bool:
        """False: larger than it may be."""
        self.size += len(piece)
        self._hash.update(piece)
        self.is_hopeless = self.is_hopeless or self.size > self._max_bytes
        return not self.is_hopeless

    # -- how it went ---------------------------------------------------------------------------------------------

    def problem(self, reply: Reply) -> str | None:
        """Why it is not done; None when it is."""
        if self.is_hopeless:
            return f"larger than {self._max_bytes} bytes"
        if reply.status == 416:  # it is not as long any more
            self._restart()
        if not reply.ok:
            return reply.told
        if self._digest == self.sha256:
            return None
        told, got = self._digest, self.sha256
        self._failed_checks += 1
        self.is_hopeless = told is None or self._failed_checks >= _FAILED_CHECKS
        self._restart()
        return "the server tells no SHA-256 of it" if told is None else f"expected SHA-256 {told}, got {got}"


def digest_of(headers: Mapping[str, str]) -> str | None:
    """The whole file's SHA-256 in hexadecimal, as ``X-Checksum-SHA256`` or ``Repr-Digest`` (RFC 9530) tell it."""
    plain = headers.get("x-checksum-sha256", "").strip().lower()
    if plain:
        return plain[:64]
    for entry in headers.get("repr-digest", "").split(","):
        algorithm, _, value = entry.strip().partition("=")
        if algorithm.lower() == "sha-256":
            try:
                return base64.b64decode(value.strip(":"), validate=True).hex()
            except (binascii.Error, ValueError):
                return None
    return None
