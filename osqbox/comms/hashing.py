"""Agents' keys at rest: PBKDF2 in a thread of its own, one after the other, so that a storm of logins holds up nobody.

Whoever was added or logged in with the same key a while ago is recognised by an HMAC under a key that only this process
knows, so a fleet that renews its tokens costs microseconds each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any

import trio

from .errors import busy

ROUNDS = 100_000
SALT_BYTES = 16
HASH_BYTES = 32
WAITING_MAX = 512
REMEMBERED_MAX = 65_536
NOBODY = base64.b64encode(bytes(SALT_BYTES + HASH_BYTES)).decode()
"""What the key of an agent that does not exist is checked against: nothing hashes to zeros, and it takes as long."""


class Hasher:
    """Hashes and checks keys; at most ``waiting_max`` callers wait, the others are told to come again."""

    def __init__(self, *, waiting_max: int = WAITING_MAX, remembered_max: int = REMEMBERED_MAX) -> None:
        self._waiting_max, self._remembered_max = waiting_max, remembered_max
        self._waiting = 0
        self._hashed = 0
        self._turn = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._secret = secrets.token_bytes(32)
        self._remembered: dict[bytes, None] = {}
        """Digests of proven keys, who was last seen the longest ago first."""

    async def hash(self, key: str) -> str:
        """base64(salt + PBKDF2-HMAC-SHA256): what is kept of a key. Raises CommsError 503.

        The key counts as proven: who enrolls logs in right after, which would be the same work once more.
        """
        salt = secrets.token_bytes(SALT_BYTES)
        key_hash = base64.b64encode(salt + await self._in_turn(_derive, key, salt)).decode()
        self._remember(self._digest(key, key_hash))
        return key_hash

    async def verify(self, key: str, key_hash: str, *, admit: Callable[[], None] = lambda: None) -> bool:
        """Whether ``key`` hashes to ``key_hash``. Raises CommsError 503, and whatever ``admit`` raises in its turn."""
        if self.remembers(key, key_hash):
            return True
        salt, expected = _parts(key_hash)
        is_right = hmac.compare_digest(await self._in_turn(_derive, key, salt, admit=admit), expected)
        is_right = is_right and "\0" not in key  # HMAC takes a key for the same with NULs behind it
        if is_right:
            self._remember(self._digest(key, key_hash))
        return is_right

    def remembers(self, key: str, key_hash: str) -> bool:
        """Whether this very key has been proven before. False says nothing."""
        digest = self._digest(key, key_hash)
        if digest not in self._remembered:
            return False
        self._remember(digest)
        return True

    def statistics(self) -> dict[str, int]:
        return {"waiting": self._waiting, "hashed": self._hashed, "remembered": len(self._remembered)}

    async def _in_turn(
        self, work: Callable[..., bytes], *arguments: Any, admit: Callable[[], None] = lambda: None
    ) -> bytes:
        if self._waiting >= self._waiting_max:
            raise busy(f"{self._waiting} logins are waiting already; try again in a few seconds")
        self._waiting += 1
        try:
            async with self._turn:
                admit()
                result = await trio.to_thread.run_sync(work, *arguments, limiter=self._thread)
        finally:
            self._waiting -= 1
        self._hashed += 1
        return result

    def _digest(self, key: str, key_hash: str) -> bytes:
        return hmac.digest(self._secret, key_hash.encode() + b"\0" + _bytes(key), "sha256")

    def _remember(self, digest: bytes) -> None:
        self._remembered.pop(digest, None)
        self._remembered[digest] = None
        if len(self._remembered) > self._remembered_max:
            del self._remembered[next(iter(self._remembered))]


def _derive(key: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", _bytes(key), salt, ROUNDS, HASH_BYTES)


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _parts(key_hash: str) -> tuple[bytes, bytes]:
    """Salt and hash; those of nobody where what is kept is damaged, so that it lets nobody in."""
    try:
        data = base64.b64decode(key_hash, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != SALT_BYTES + HASH_BYTES:
        data = bytes(SALT_BYTES + HASH_BYTES)
    return data[:SALT_BYTES], data[SALT_BYTES:]
