"""What decorators add to every log line: the columns of the first row of each of their queries. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from osqbox.agent import logs
from osqbox.agent.client.commands import Query, Thread
from osqbox.agent.sql import QueryResult

if TYPE_CHECKING:
    from osqbox.agent.client.state import State


@dataclass(slots=True)
class Decorations:
    load: dict[str, str] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    interval: dict[str, str] = field(default_factory=dict)

    def all(self) -> dict[str, str]:
        return {**self.load, **self.always, **self.interval}


def decorate(state: State, queries: Sequence[str]) -> Thread[dict[str, str]]:
    """Every column of the first row of each query."""
    found: dict[str, str] = {}
    if state.flags.true("disable_decorators"):
        return found
    for sql in queries:
        result: QueryResult = yield Query(sql)
        if result.status:
            state.status(logs.WARNING, "decorators.cpp", f"Error running decorator: {result.message}")
        elif result.rows:
            found.update(result.rows[0])
    return found
