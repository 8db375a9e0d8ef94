"""Choices that are the same every time they are asked for: everything a pretended host is follows from a key. Pure.

Unlike `random.Random` there is no state, so the hundredth process does not depend on how often somebody asked about
the first one, and a roll costs about a microsecond.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")
Label = str | int


class Dice:
    """Rolls that depend on the key and on what is rolled for, and on nothing else."""

    __slots__ = ("_key",)

    def __init__(self, *key: Label) -> None:
        self._key = blake2b(repr(key).encode(), digest_size=16).digest()

    def roll(self, *what: Label) -> int:
        """64 bits."""
        return int.from_bytes(blake2b(repr(what).encode(), digest_size=8, key=self._key).digest(), "big")

    def below(self, limit: int, *what: Label) -> int:
        """An integer from 0 to ``limit`` - 1; 0 for a limit of 0."""
        return self.roll(*what) % limit if limit > 0 else 0

    def share(self, *what: Label) -> float:
        """From 0 to 1, without 1."""
        return (self.roll(*what) >> 11) / 2**53

    def between(self, span: tuple[float, float], *what: Label) -> float:
        low, high = span
        return low + (high - low) * self.share(*what)

    def pick(self, choices: Sequence[T], *what: Label) -> T:
        return choices[self.below(len(choices), *what)]

    def sample(self, choices: Sequence[T], count: int, *what: Label) -> list[T]:
        """``count`` different members in a drawn order; all of them when there are fewer."""
        drawn = sorted(range(len(choices)), key=lambda number: self.roll(*what, number))
        return [choices[number] for number in drawn[:count]]

    def hexadecimal(self, digits: int, *what: Label) -> str:
        return "".join(f"{self.roll(*what, part):016x}" for part in range(-(-digits // 16)))[:digits]

    def uuid(self, *what: Label) -> str:
        """A random UUID, upper case as SMBIOS tools print it."""
        digits = self.hexadecimal(32, *what)
        parts = (digits[:8], digits[8:12], "4" + digits[13:16], "89ab"[int(digits[16], 16) % 4] + digits[17:20])
        return "-".join((*parts, digits[20:])).upper()

    def fill(self, pattern: str, *what: Label) -> str:
        """``#`` becomes a digit, ``?`` an upper case letter."""
        letters = {"#": string.digits, "?": string.ascii_uppercase}
        return "".join(self.pick(letters[c], *what, at) if c in letters else c for at, c in enumerate(pattern))
