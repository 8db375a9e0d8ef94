"""How often an address may try to log in."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from osqbox.errors import Refused


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class Attempts:
    """How often one address may fail before it has to wait, and how many failures of a crowd are written down."""

    def __init__(
        self, *, per_address: int = 10, noted: int = 30, period_s: float = 60.0, addresses: int = 4096
    ) -> None:
        self._per_address, self._noted, self._period_s, self._addresses = per_address, noted, period_s, addresses
        self._notes = _Bucket(noted, 0.0)
        self._by_network: dict[str, _Bucket] = {}

    def admit(self, address: str, now: float) -> None:
        """Raises Refused (429) for an address that has failed too often."""
        if not self.admits(address, now):
            raise Refused("too_many_attempts", "too many failed logins; try again in a minute", status=429)

    def admits(self, address: str, now: float) -> bool:
        bucket = self._by_network.get(_network(address))
        return bucket is None or self._has_one(bucket, self._per_address, now)

    def failed(self, address: str, now: float) -> bool:
        """Count a failure; whether to write it down, so that a crowd of strangers cannot flood the audit."""
        network = _network(address)
        bucket = self._by_network.pop(network, None) or _Bucket(self._per_address, now)
        self._by_network[network] = bucket  # at the end: the front is who has been quiet longest
        if len(self._by_network) > self._addresses:
            self._by_network.pop(next(iter(self._by_network)))
        bucket.tokens -= 1
        return self.may_note(now)

    def may_note(self, now: float) -> bool:
        """Whether one more refusal is to be written down."""
        if not self._has_one(self._notes, self._noted, now):
            return False
        self._notes.tokens -= 1
        return True

    def _has_one(self, bucket: _Bucket, size: int, now: float) -> bool:
        grown = max(0.0, now - bucket.filled_at) * size / self._period_s
        bucket.tokens, bucket.filled_at = min(size, bucket.tokens + grown), now
        return bucket.tokens >= 1


def _network(address: str) -> str:
    """Whoever has one IPv6 address has 2**64 of them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if found.version == 4 else str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
