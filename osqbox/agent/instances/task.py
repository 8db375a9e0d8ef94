"""An instance without a process: the agent's own core in a task, which talks to the server itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from osqbox.agent.instances.history import COLUMNS, TABLE
from osqbox.agent.instances.instance import BaseInstance, QueryFailed, Rows, Unhealthy, described
from osqbox.agent.messages import LINUX, VERSION
from osqbox.agent.runner import Agent, AgentOptions, run_agent
from osqbox.agent.sql import Context, Engine, Row, TableSource, source
from osqbox.clock import Clock
from osqbox.schema import Column, Schema, Table, load_schema

if TYPE_CHECKING:
    import ssl

    from osqbox.agent.sql import Tables


@dataclass(frozen=True, slots=True)
class Machine:
    """A host that in-process instances answer for instead of this one."""

    hostname: str
    uuid: str
    tables: Tables
    schema: Schema
    platform_type: int = LINUX


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class TaskInstance(BaseInstance):
    """The same life as a `ProcessInstance`; its enrollment and logs are in its own database all the same."""

    tls: ssl.SSLContext
    machine: Machine
    _engine: Engine = field(init=False)
    _agent: Agent | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._engine = Engine(schema=self.machine.schema)

    # -- its life ------------------------------------------------------------------------------------------------

    async def run(self, connected: Callable[[], None]) -> str:
        with self._in_history():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._live, connected)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        return self._reason

    async def _live(self, connected: Callable[[], None]) -> None:
        try:
            await run_agent(
                self._agent_options(),
                tables=self._tables(),
                engine=self._engine,
                tls=self.tls,
                clock=self.clock,
                on_event=self._heard,
                around=partial(self._in_use, connected),
            )
        except Exception as error:  # noqa: BLE001 - whatever goes wrong here is this instance's end only
            self.stop(described(error))
        else:
            self.stop("the agent's task ended")

    @contextlib.asynccontextmanager
    async def _in_use(self, connected: Callable[[], None], agent: Agent) -> AsyncIterator[None]:
        """As with a process: its SQL answers, whether it is enrolled yet or not."""
        self._agent, who = agent, agent.core.identity
        facts = {"hostname": who.hostname, "instance_id": who.instance_id, "version": VERSION}
        self.history.connected(self.run_id, self.clock.now(), **facts)
        connected()
        yield

    def _agent_options(self) -> AgentOptions:
        options, machine = self.options, self.machine
        flags = {"tls_enroll_max_attempts": "0", "tls_enroll_max_interval": "60"}
        return AgentOptions(
            tls_hostname=options.tls_hostname,
            server_certs=options.server_certs,
            enroll_secret=self.spec.enroll_secret,
            endpoints=options.endpoints,
            host_identifier=options.host_identifier,
            specified_identifier=options.specified_identifier,
            distributed_interval=options.distributed_interval,
            config_refresh=options.config_refresh,
            logger_period=options.logger_period,
            state_dir=self.files.database,
            hostname=machine.hostname or None,
            uuid=machine.uuid or None,
            platform_type=machine.platform_type,
            sql_timeout_s=options.timing.query_timeout_s,
            flags={**flags, **options.flags, **self.spec.flags},
        )

    def _tables(self) -> dict[str, TableSource]:
        history = Table(TABLE, tuple(Column(name, "TEXT") for name in COLUMNS))
        return {**self.machine.tables, TABLE: replace(source(self._history_rows), definition=history)}

    def _history_rows(self, _context: Context) -> Iterator[Row]:
        return iter(self.history.rows())

    # -- asking it -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        if self._agent is None or self._over.is_set():
            raise Unhealthy("not connected yet")

    async def query(self, sql: str) -> Rows:
        if self._agent is None or self._over.is_set():
            raise QueryFailed(f"instance {self.spec.name} is not connected", hint="osqbox agent status")
        result = await self._agent.query(sql)
        if result.status:
            raise QueryFailed(result.message)
        return result.rows

    def facts(self) -> dict[str, Any]:
        core = self._agent.core if self._agent else None
        return {
            "run_id": self.run_id,
            "pid": os.getpid(),
            "socket": None,
            "database": str(self.files.database),
            "host_identifier": core.host_identifier if core else None,
            "enrolled": bool(core and not self._over.is_set() and core.node_key),
            "enroll_error": self._enroll_error or None,
            "statistics": asdict(core.statistics()) if core else {},
        }


def this_machine(clock: Clock) -> Machine:
    from osqbox.agent.host import host_tables

    return Machine("", "", host_tables(now=clock.now), load_schema())
