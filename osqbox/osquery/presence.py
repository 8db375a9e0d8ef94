"""What is live about nodes: when they were heard of, and the distributed reads held open for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import trio

from osqbox.osquery.nodes import Node

REACHABLE_INTERVALS = 3
READ_INTERVAL_UNKNOWN_S = 60.0
"""osqueryd's default ``--distributed_interval``, until two reads have told the node's own."""
READ_INTERVAL_LEAST_S = 5.0


@dataclass(frozen=True, slots=True)
class PresenceStatistics:
    nodes_seen: int
    reads_held: int


@dataclass(slots=True)
class _Seen:
    at: float
    read_at: float | None = None
    read_interval_s: float | None = None


class Presence:
    """Fed by every request; nothing here is lost that matters, for it is written to the nodes every second."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._dirty: set[str] = set()
        self._held: dict[str, set[trio.Event]] = defaultdict(set)
        self._stopping = trio.Event()

    def load(self, rows: Sequence[tuple[str, float, float | None]]) -> None:
        """Sightings (node, at, read interval) from before a restart."""
        for node_id, at, read_interval_s in rows:
            self._seen.setdefault(node_id, _Seen(at, read_interval_s=read_interval_s))

    def heard(self, node_id: str, now: float) -> None:
        seen = self._seen.get(node_id)
        if seen is None:
            self._seen[node_id] = _Seen(now)
        else:
            seen.at = now
        self._dirty.add(node_id)

    def read(self, node_id: str, now: float) -> None:
        """A distributed read came: the gap to the one before is the node's own interval."""
        self.heard(node_id, now)
        seen = self._seen[node_id]
        if seen.read_at is not None:
            seen.read_interval_s = now - seen.read_at
        seen.read_at = now

    def forget(self, node_id: str) -> None:
        self._seen.pop(node_id, None)
        self._dirty.discard(node_id)

    def reachable(self, nodes: Sequence[Node], now: float) -> Collection[str]:
        """Nodes that hold a read now or were heard of within three of their own intervals."""
        return {node.id for node in nodes if self._is_reachable(node.id, now)}

    def _is_reachable(self, node_id: str, now: float) -> bool:
        if self._held.get(node_id):
            return True
        seen = self._seen.get(node_id)
        if seen is None:
            return False
        interval_s = max(seen.read_interval_s or READ_INTERVAL_UNKNOWN_S, READ_INTERVAL_LEAST_S)
        return now - seen.at <= REACHABLE_INTERVALS * interval_s

    def seen(self) -> dict[str, float]:
        """Latest sighting of each node, seconds since the epoch."""
        return {node: seen.at for node, seen in self._seen.items()}

    def take_dirty(self) -> dict[str, tuple[float, float | None]]:
        """Sightings that are not in the database yet; the caller writes them."""
        taken = {node: (self._seen[node].at, self._seen[node].read_interval_s) for node in self._dirty}
        self._dirty.clear()
        return taken

    def hold(self, node_id: str) -> trio.Event:
        """Register a held read; the event is set when there is work or the box stops. Pair with `release`."""
        woken = trio.Event()
        if self._stopping.is_set():
            woken.set()
        self._held[node_id].add(woken)
        return woken

    def release(self, node_id: str, woken: trio.Event) -> None:
        held = self._held[node_id]
        held.discard(woken)
        if not held:
            del self._held[node_id]

    def wake(self, node_ids: Sequence[str]) -> None:
        """There is work for these nodes."""
        for node_id in node_ids:
            for woken in self._held.get(node_id, ()):
                woken.set()

    def stop(self) -> None:
        """Answer every held read now, and hold no more."""
        self._stopping.set()
        for held in self._held.values():
            for woken in held:
                woken.set()

    def statistics(self) -> PresenceStatistics:
        return PresenceStatistics(len(self._seen), sum(len(held) for held in self._held.values()))
