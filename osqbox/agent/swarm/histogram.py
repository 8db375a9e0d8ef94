"""Durations counted in logarithmic buckets, so that a million of them take no more room than a thousand. Pure."""

from __future__ import annotations

import math
from collections import Counter

_SUB_BUCKET_BITS = 6
_SUB_BUCKETS = 1 << _SUB_BUCKET_BITS
_MAX_US = 1 << 36  # 19 hours: with 64 buckets for each doubling, fewer than 2,000 in all
RELATIVE_ERROR = 1 / _SUB_BUCKETS


class Histogram:
    """Quantiles within `RELATIVE_ERROR` (plus one microsecond) of the exact ones."""

    __slots__ = ("_buckets", "_highest_us", "_lowest_us", "count")

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()
        self._lowest_us = _MAX_US
        self._highest_us = 0

    def record(self, seconds: float) -> None:
        """Negative durations count as 0, those over 19 hours as that."""
        value_us = min(_MAX_US, max(0, round(seconds * 1e6)))
        self.count += 1
        self._buckets[_bucket(value_us)] += 1
        self._lowest_us = min(self._lowest_us, value_us)
        self._highest_us = max(self._highest_us, value_us)

    def add(self, other: Histogram) -> None:
        """Count everything ``other`` has."""
        self.count += other.count
        self._buckets.update(other._buckets)
        self._lowest_us = min(self._lowest_us, other._lowest_us)
        self._highest_us = max(self._highest_us, other._highest_us)

    def quantile_ms(self, share: float) -> float:
        """The duration that ``share`` (0 to 1) of all do not exceed, by nearest rank; 0 when there are none."""
        rank, seen = max(1, math.ceil(share * self.count)), 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(self._highest_us, max(self._lowest_us, _middle_us(bucket))) / 1000
        return 0.0

    def percentiles_ms(self) -> dict[str, float]:
        """``p50``, ``p95`` and ``p99``, to the microsecond."""
        return {f"p{percent}": round(self.quantile_ms(percent / 100), 3) for percent in (50, 95, 99)}


def _bucket(value_us: int) -> int:
    """Exact below 64; from there the 64 buckets of the value's power of two."""
    shift = max(0, value_us.bit_length() - 1 - _SUB_BUCKET_BITS)
    return (shift << _SUB_BUCKET_BITS) + (value_us >> shift)


def _middle_us(bucket: int) -> float:
    shift = max(0, (bucket >> _SUB_BUCKET_BITS) - 1)
    low = (bucket - (shift << _SUB_BUCKET_BITS)) << shift
    return low + ((1 << shift) - 1) / 2
