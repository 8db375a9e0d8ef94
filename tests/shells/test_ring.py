"""The latest bytes of a stream by their offset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.shells.ring import BLOCK_BYTES, Ring

sizes = st.integers(0, 3 * BLOCK_BYTES)


@given(st.lists(sizes, max_size=12), st.integers(0, 4 * BLOCK_BYTES), st.integers(0, 100), st.data())
def test_what_is_kept_reads_as_it_was(pieces: list[int], limit: int, start: int, data: st.DataObject) -> None:
    """At least the limit is kept, not more than a block beyond it, and every offset between floor and head reads."""
    whole = bytes(index * 7 % 251 for index in range(sum(pieces)))
    ring, at = Ring(limit, start), 0
    for size in pieces:
        ring.append(whole[at : at + size])
        at += size
    assert ring.head == start + len(whole)
    assert min(limit, len(whole)) <= ring.kept_bytes < limit + BLOCK_BYTES + 1
    offset = data.draw(st.integers(ring.floor, ring.head))
    got = b""
    while piece := ring.read(offset + len(got), 1000):
        got += piece
    assert got == whole[offset - start :]


def test_it_says_what_it_does_not_have() -> None:
    ring = Ring(10, start=5)
    ring.append(b"abc")
    for offset in (4, 9):
        with pytest.raises(IndexError, match=r"5\.\.8"):
            ring.read(offset, 1)
    ring.restart(100)
    assert (ring.floor, ring.head, ring.read(100, 9)) == (100, 100, b"")


def test_an_idle_stream_costs_next_to_nothing() -> None:
    ring = Ring(2**22)
    assert len(ring._blocks) == 0
    ring.append(b"x" * BLOCK_BYTES * 2)
    ring.trim(0)
    assert len(ring._blocks) == 0
    assert ring.floor == ring.head
