"""The commands of the latest entries of the journal, in memory: what a search may not see yet. Pure.

A search sees a command after the index's next refresh. Until this box has refreshed it since a command's document was
stored, the command is in the tail. So *search and tail* together know every command, and an agent for which a search
found nothing further needs no other one as long as the tail has followed every publication since.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict

import msgspec

from osqbox.comms.messages import Command

from .entries import NUMBERS, Entry, Row, Template, command_of, numbered

SEARCHED_AGENTS = 100_000


class _Place(msgspec.Struct, frozen=True):
    seq: int
    row: Row
    template: Template


class Tail:
    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        """By the id of the command."""
        self._agents: dict[str, list[tuple[int, str]]] = {}
        """seq and id, in order."""
        self._entries: OrderedDict[int, list[str]] = OrderedDict()
        """The ids of each entry that has commands."""
        self._expiries: dict[int, float] = {}
        """Of each entry: when the first of its commands expires."""
        self._searched: OrderedDict[str, int] = OrderedDict()
        """By agent: no command behind this seq is offered but those in the tail."""

    def __len__(self) -> int:
        return len(self._places)

    @property
    def first(self) -> int | None:
        """The oldest entry here."""
        return next(iter(self._entries), None)

    def take(self, n: int, entry: Entry) -> None:
        ids = self._entries.setdefault(n, [])
        expiries = (each.expires_at for one in entry.publications for each in one.templates)
        self._expiries[n] = min(expiries, default=float("inf"))
        for first, publication in numbered(n, entry):
            for seq, row in enumerate(publication.rows, first):
                if row[0] not in self._places:  # else an id that was published before: that one counts
                    self._places[row[0]] = _Place(seq, row, publication.templates[row[2]])
                    self._agents.setdefault(row[1], []).append((seq, row[0]))
                    ids.append(row[0])

    def clear(self) -> None:
        for kept in (self._places, self._agents, self._entries, self._expiries, self._searched):
            kept.clear()

    def forget(self, until: int) -> None:
        """Entries up to ``until``: a search sees their commands now."""
        while self._entries and next(iter(self._entries)) <= until:
            n, ids = self._entries.popitem(last=False)
            del self._expiries[n]
            for agent in {self._places.pop(each).row[1] for each in ids}:
                self._forget(agent, (n + 1) * NUMBERS)

    def _forget(self, agent: str, end: int) -> None:
        """The agent's commands below ``end``."""
        commands = self._agents[agent]
        cut = bisect_left(commands, (end, ""))
        if self._searched.get(agent, end) < commands[cut - 1][0]:
            del self._searched[agent]  # not all of them were read: a search has to find them
        if cut < len(commands):
            self._agents[agent] = commands[cut:]
        else:
            del self._agents[agent]

    # asking

    def find(self, id: str) -> Command | None:
        """As it was at its publication."""
        place = self._places.get(id)
        return None if place is None else command_of(place.seq, place.row, place.template)

    def of_agent(self, agent: str, after: int, limit: int | None = None) -> list[tuple[int, str]]:
        """seq and id of its next commands behind ``after``."""
        commands = self._agents.get(agent, [])
        start = bisect_left(commands, (after + 1, ""))
        return commands[start : None if limit is None else start + limit]

    def of_entry(self, n: int) -> list[str]:
        return self._entries.get(n, [])

    @property
    def expires_at(self) -> float:
        """When the first command here expires; infinity when there is none."""
        return min(self._expiries.values(), default=float("inf"))

    def needs_search(self, agent: str, after: int) -> bool:
        return self._searched.get(agent, after + 1) > after

    def note_searched(self, agent: str, behind: int) -> None:
        """A search found nothing behind ``behind`` that is not in the tail.

        What is true of one number is true of every greater one; the greatest asked for outlives the tail's entries.
        """
        self._searched[agent] = behind
        self._searched.move_to_end(agent)
        if len(self._searched) > SEARCHED_AGENTS:
            self._searched.popitem(last=False)
