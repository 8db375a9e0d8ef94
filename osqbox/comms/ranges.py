"""Which part of a file a request asks for (RFC 9110, sections 13 and 14). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_SINGLE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


class Part(NamedTuple):
    status: int
    """200 the whole, 206 a part, 304 nothing new, 416 nothing there."""
    start: int = 0
    size_bytes: int = 0


def part_of(headers: Mapping[str, str], size_bytes: int, etag: str) -> Part:
    """``etag`` with its quotes. Several ranges at once, and what is no range, get the whole, as the RFC allows."""
    if _matches(headers.get("if-none-match"), etag):
        return Part(304)
    whole = Part(200, 0, size_bytes)
    found = _SINGLE.fullmatch(headers.get("range", ""))
    if found is None or headers.get("if-range", etag) != etag:  # a weak tag or a date never proves equal bytes
        return whole
    first, last = found.groups()
    if not first and not last:
        return whole
    if not first:  # the last so many bytes
        length = min(int(last), size_bytes)
        return Part(206, size_bytes - length, length) if length else Part(416)
    start = int(first)
    if last and int(last) < start:
        return whole
    if start >= size_bytes:
        return Part(416)
    end = min(int(last), size_bytes - 1) if last else size_bytes - 1
    return Part(206, start, end - start + 1)


def _matches(given: str | None, etag: str) -> bool:
    if given is None:
        return False
    return given.strip() == "*" or etag in {each.strip().removeprefix("W/") for each in given.split(",")}
