"""Who is signed in at the pages: random keys in a cookie, forgotten when the box ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

LIFETIME_S = 12 * 3600.0
MOST = 64


class Sessions:
    """Only digests are kept, and no more than ``MOST``: the oldest goes first."""

    def __init__(self, new_key: Callable[[], str]) -> None:
        self._new_key = new_key
        self._until: dict[bytes, float] = {}

    def open(self, now: float) -> str:
        """The key of a new session."""
        self._until = {digest: until for digest, until in self._until.items() if until > now}
        while len(self._until) >= MOST:
            del self._until[next(iter(self._until))]
        key = self._new_key()
        self._until[_digest(key)] = now + LIFETIME_S
        return key

    def is_open(self, key: str, now: float) -> bool:
        return self._until.get(_digest(key), 0.0) > now

    def close(self, key: str) -> None:
        self._until.pop(_digest(key), None)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
