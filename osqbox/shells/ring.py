"""The latest bytes of a stream, addressed by their offset in the whole of it. Pure."""

from __future__ import annotations

from collections import deque

BLOCK_BYTES = 64 * 1024


class Ring:
    """Keeps at least the latest ``limit_bytes``, in blocks, so that an idle stream costs next to nothing."""

    __slots__ = ("_blocks", "_limit_bytes", "floor", "head")

    def __init__(self, limit_bytes: int, start: int = 0) -> None:
        self._blocks: deque[bytearray] = deque()
        """All but the last are full."""
        self._limit_bytes = limit_bytes
        self.floor = start
        """Offset of the first byte that is kept."""
        self.head = start
        """Offset of the next byte."""

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        self.head += len(data)
        while rest:
            if not self._blocks or len(self._blocks[-1]) == BLOCK_BYTES:
                self._blocks.append(bytearray())
            room = BLOCK_BYTES - len(self._blocks[-1])
            self._blocks[-1] += rest[:room]
            rest = rest[room:]
        self.trim(self._limit_bytes)

    def read(self, offset: int, limit_bytes: int) -> bytes:
        """Some bytes from ``offset``, at most ``limit_bytes``; empty at the head. Raises IndexError outside."""
        if not self.floor <= offset <= self.head:
            raise IndexError(f"expected an offset {self.floor}..{self.head}, got {offset}")
        index, start = divmod(offset - self.floor, BLOCK_BYTES)
        if index == len(self._blocks):
            return b""
        return bytes(self._blocks[index][start : start + limit_bytes])

    def trim(self, keep_bytes: int) -> None:
        """Forget whole blocks that are older than the latest ``keep_bytes``."""
        while self._blocks and self.head - self.floor - len(self._blocks[0]) >= keep_bytes:
            self.floor += len(self._blocks.popleft())

    def restart(self, offset: int) -> None:
        """Go on at a later offset: what is between never comes."""
        self._blocks.clear()
        self.floor = self.head = offset

    @property
    def kept_bytes(self) -> int:
        return self.head - self.floor
