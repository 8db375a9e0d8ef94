"""A bounded FIFO of events or commands that outlasts a restart where the agent's store does. Pure."""

from __future__ import annotations

from osqbox.agent.store import Store


class Queue:
    """Items leave only when they were accepted; what comes when it is full is not taken."""

    __slots__ = ("_first", "_length", "_max_items", "_store", "name", "size_bytes")

    def __init__(self, name: str, store: Store, max_items: int) -> None:
        self.name = name
        """Also the domain of the store."""
        self._store = store
        self._max_items = max_items
        kept = list(store.scan(name))
        self._first = int(kept[0][0]) if kept else 0
        """The number of the oldest item."""
        self._length = len(kept)
        self.size_bytes = sum(len(value.encode()) for _, value in kept)

    def __len__(self) -> int:
        return self._length

    def push(self, item: bytes) -> bool:
        """False: full."""
        if self._length >= self._max_items:
            return False
        self._store.put(self.name, self._key(self._length), item.decode())
        self._length += 1
        self.size_bytes += len(item)
        return True

    def head(self, max_bytes: int) -> list[bytes]:
        """The oldest items, at least one if there is any, up to ``max_bytes`` in all."""
        found: list[bytes] = []
        size = 0
        for at in range(self._length):
            item = (self._store.get(self.name, self._key(at)) or "").encode()
            size += len(item)
            if found and size > max_bytes:
                break
            found.append(item)
        return found

    def accepted(self, items: list[bytes]) -> None:
        """These, the oldest, are done with."""
        for at, item in enumerate(items):
            self._store.delete(self.name, self._key(at))
            self.size_bytes -= len(item)
        self._first += len(items)
        self._length -= len(items)

    def _key(self, at: int) -> str:
        return f"{self._first + at:016d}"
