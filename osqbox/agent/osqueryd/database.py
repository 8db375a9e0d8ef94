"""What a shell asks: the tables of one host in this process, or another osquery over its extension socket."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from osqbox.agent.client import Core, Identity
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.hosts import Choice, HostClock, enabled_tables, open_host
from osqbox.agent.own import own_tables
from osqbox.agent.sql import Engine, QueryResult, Tables
from osqbox.agent.store import FileStore, MemoryStore, Store

_NO_LIMIT_S = 365 * 86400.0
_MAX_ROWS = 10_000_000


class Database(Protocol):
    """Something that answers SQL. A query never raises: what goes wrong is the result's status and message."""

    def query(self, sql: str) -> QueryResult: ...
    def interrupt(self) -> None:
        """End the running query, from a signal handler."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class LocalDatabase:
    engine: Engine
    store: Store
    tables: Callable[[], Tables]
    _extensions: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def query(self, sql: str) -> QueryResult:
        self._cancelled.clear()
        return self.engine.query(
            sql, tables=self.tables(), timeout_s=_NO_LIMIT_S, max_rows=_MAX_ROWS, cancelled=self._cancelled
        )

    def interrupt(self) -> None:
        self._cancelled.set()

    def hold(self, extensions: contextlib.AbstractContextManager[None]) -> None:
        """Keep them until the end. Raises what entering raises."""
        self._extensions.enter_context(extensions)

    def close(self) -> None:
        self._extensions.close()
        self.store.commit()
        self.store.close()


@dataclass(frozen=True, slots=True)
class RemoteDatabase:
    """An osquery that listens on an extension socket: ``--connect``."""

    path: Path

    def query(self, sql: str) -> QueryResult:
        import trio

        from osqbox.agent.extension.client import ExtensionClient
        from osqbox.agent.extension.sockets import ExtensionGone

        async def ask() -> QueryResult:
            async with ExtensionClient(self.path) as client:
                found = await client.query(sql)
                if not found.ok:
                    return QueryResult(status=1, message=found.status.message)
                asked = await client.columns(sql)
            # Of each row only a map comes: the columns' order is asked for apart.
            columns = tuple(name for row in asked.rows for name in row) or tuple(found.rows[0] if found.rows else ())
            return QueryResult(columns, [dict(row) for row in found.rows])

        try:
            return trio.run(ask)
        except ExtensionGone as error:
            return QueryResult(status=1, message=str(error))

    def interrupt(self) -> None:
        """The other side has no call for it."""

    def close(self) -> None:
        """Nothing is held open between queries."""


def open_database(line: CommandLine, choice: Choice) -> Database:
    """Raises UserError for a database or a profile that cannot be used."""
    return RemoteDatabase(Path(line.text("connect"))) if line.text("connect") else _open_local(line, choice)


def _open_local(line: CommandLine, choice: Choice) -> LocalDatabase:
    """The tables of the chosen host. State is kept only with --database_path, as in a real shell."""
    flags = Flags(line.osquery_flags)
    kept = line.is_given("database_path") and not line.true("disable_database")
    store: Store = FileStore(Path(line.text("database_path"))) if kept else MemoryStore()
    clock = HostClock(choice.start_time, time.time())
    host = open_host(choice, store, read_max_bytes=flags.integer("read_max"), started=clock.now())
    instance_id = host.instance_id or store.get("configurations", "instance_id") or str(uuid.uuid4())
    store.put("configurations", "instance_id", instance_id)
    store.put("configurations", "uuid", host.uuid)
    identity = Identity(
        hostname=host.hostname,
        uuid=host.uuid,
        instance_id=instance_id,
        ephemeral_id=str(uuid.uuid4()),
        pid=host.pid or os.getpid(),
        started=clock.now(),
        platform_type=host.platform_type,
    )
    core = Core(
        identity, flags, Endpoints(), store, enroll_secret=lambda: "", rng=random.SystemRandom(), now=clock.now()
    )
    engine = Engine(schema=enabled_tables(host.schema, line))
    tables: Tables = {**own_tables(core), **host.tables(clock.now)}
    if not _wants_extensions(line):
        return LocalDatabase(engine, store, lambda: tables)
    return _with_extensions(line, core, engine, tables)


def _wants_extensions(line: CommandLine) -> bool:
    """A shell only opens a socket it is told of."""
    named = ("extensions_socket", "extensions_require", "extensions_autoload")
    return any(line.is_given(name) for name in named) and not line.true("disable_extensions")


def _with_extensions(line: CommandLine, core: Core, engine: Engine, tables: Tables) -> LocalDatabase:
    from osqbox.agent.osqueryd.beside import ShellAgent, extensions_beside

    agent = ShellAgent(core, engine, tables)
    database = LocalDatabase(engine, core.store, lambda: agent.tables)
    database.hold(extensions_beside(line, agent))
    return database
