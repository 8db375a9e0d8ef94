"""A host whose tables change with its config, without a server; and an agent that is quick to learn of a box's."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from osqbox.agent.client import Core, Identity, Query, Send
from osqbox.agent.constructed import constructed_tables
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.runner import AgentOptions
from osqbox.agent.sql import Engine, QueryResult, Tables
from osqbox.agent.store import MemoryStore
from osqbox.agent.views import ConfiguredTables, view_tables
from osqbox.testing.handle import Osqbox


class ConfiguredHost:
    """A core with a real engine: every config is applied as the agent applies it."""

    def __init__(self, base: Tables | None = None) -> None:
        flags = Flags({"tls_hostname": "box:1"})
        who = Identity("host", "UUID", "INSTANCE", "EPHEMERAL", 7, 1.0)
        self.core = Core(
            who, flags, Endpoints(), MemoryStore(), enroll_secret=lambda: "s", rng=random.Random(1), now=1.0
        )
        self.engine = Engine()
        self.tables = ConfiguredTables({} if base is None else base, self._added)

    def _added(self) -> Tables:
        return {**view_tables(self.core.views), **constructed_tables(self.core.constructed)}

    def query(self, sql: str, timeout_s: float = 10.0) -> QueryResult:
        return self.engine.query(sql, tables=self.tables, timeout_s=timeout_s)

    def take_config(self, config: Mapping[str, Any]) -> list[str]:
        """The warnings it makes."""
        self.core.events.clear()
        thread = self.core.fetch_config()
        outcome: bytes | QueryResult | None = None
        try:
            while True:
                match thread.send(outcome):
                    case Send(call="enroll"):
                        outcome = json.dumps({"node_key": "key"}).encode()
                    case Send():
                        outcome = json.dumps(config).encode()
                    case Query(sql):
                        outcome = self.query(sql)
        except StopIteration:
            said = [facts for kind, facts in self.core.events if kind == "status" and facts["severity"] == 1]
            return [facts["message"] for facts in said]


def agent_options(osqbox: Osqbox) -> AgentOptions:
    """Of an agent that asks this box for everything once a second."""
    return AgentOptions(
        tls_hostname=osqbox.url.removeprefix("https://"),
        server_certs=osqbox.ca_file,
        enroll_secret=osqbox.enroll_secret,
        distributed_interval=1,
        config_refresh=1,
        logger_period=1,
    )
