"""What a scheduled query has cost so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from osqbox.agent.sql import QueryResult


@dataclass(slots=True)
class Performance:
    """What osquery_schedule shows of one query."""

    executions: int = 0
    last_executed: int = 0
    output_size: int = 0
    wall_time_ms: int = 0
    user_time: int = 0
    system_time: int = 0
    last_wall_time_ms: int = 0
    last_user_time: int = 0
    last_system_time: int = 0
    memory: int = 0
    last_memory: int = 0

    def add(self, result: QueryResult, now: float) -> None:
        """One more execution."""
        stats = result.stats
        self.executions += 1
        self.last_executed = int(now)
        self.output_size += sum(len(k) + len(v) for row in result.rows for k, v in row.items())
        self.wall_time_ms += stats.wall_time_ms
        self.user_time += stats.user_time
        self.system_time += stats.system_time
        self.memory += stats.memory
        self.last_wall_time_ms, self.last_memory = stats.wall_time_ms, stats.memory
        self.last_user_time, self.last_system_time = stats.user_time, stats.system_time
