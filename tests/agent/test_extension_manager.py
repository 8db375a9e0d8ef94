"""The extension manager over a real engine, with the unmodified Python package `osquery` as the other side."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from osquery import ExtensionClient as TheirClient  # type: ignore[import-untyped,unused-ignore]

from osqbox.agent.client import Call, Core, Failure, Identity
from osqbox.agent.extension.agent_host import AgentHost
from osqbox.agent.extension.calls import PluginCaller
from osqbox.agent.extension.client import ExtensionClient
from osqbox.agent.extension.live import LiveTables
from osqbox.agent.extension.manager import ExtensionManagerServer
from osqbox.agent.extension.messages import Status
from osqbox.agent.extension.sockets import NotListening
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.own import own_tables
from osqbox.agent.sql import Context, Engine, QueryResult, Row, source
from osqbox.agent.store import MemoryStore

CORE_FLAGS = {"tls_hostname": "localhost:8443", "custom_mood": "fine"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path is short enough for a socket, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="osqbox-") as path:
        yield Path(path)


def processes(_context: Context) -> Iterator[Row]:
    for pid in range(1, 101):
        yield {"pid": pid, "name": f"p{pid}"}


def make_core() -> Core:
    return Core(
        Identity("host", "UUID", "instance", "ephemeral", 7, 0.0),
        Flags(CORE_FLAGS),
        Endpoints(),
        MemoryStore(),
        enroll_secret=lambda: "s",
        rng=random.Random(1),
        now=1000.0,
    )


@dataclass
class Agent:
    """An agent as far as a manager needs one."""

    core: Core
    engine: Engine
    tables: LiveTables
    path: Path
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    heard: trio.Event = field(default_factory=trio.Event)
    settled: int = 0

    def hear(self, name: str, details: dict[str, Any]) -> None:
        self.events.append((name, details))
        heard, self.heard = self.heard, trio.Event()
        heard.set()

    async def wait(self, name: str) -> dict[str, Any]:
        while True:
            for event, details in self.events:
                if event == name:
                    return details
            await self.heard.wait()

    async def query(self, sql: str) -> QueryResult:
        return await trio.to_thread.run_sync(lambda: self.engine.query(sql, tables=self.tables))

    async def rows(self, sql: str) -> list[dict[str, str]]:
        result = await self.query(sql)
        assert result.status == 0, result.message
        return result.rows

    def settle(self) -> None:
        self.settled += 1


@contextlib.asynccontextmanager
async def running_agent(folder: Path, **options: Any) -> AsyncIterator[tuple[Agent, ExtensionManagerServer]]:
    core = make_core()
    engine = Engine()
    tables = LiveTables({**own_tables(core), "processes": source(processes, "pid")})
    path = folder / "osquery.em"
    agent = Agent(core, engine, tables, path)
    manager = ExtensionManagerServer(
        path,
        AgentHost(agent),
        rng=random.Random(2),
        tables=tables,
        **{"interval_s": 0.2, "timeout_s": 20.0, **options},
        on_event=agent.hear,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run)
        yield agent, manager
        nursery.cancel_scope.cancel()


# -- the package's client ----------------------------------------------------------------------------------------


def their_view(path: Path) -> dict[str, Any]:
    """Everything the package's ExtensionClient can ask, over one connection."""
    theirs = TheirClient(path=str(path))
    assert theirs.open()
    client = theirs.extension_manager_client()
    try:
        answer = client.query("select pid, name from processes where pid < 3")
        wrong = client.query("select * from foo")
        return {
            "ping": (client.ping().code, client.ping().message),
            "extensions": client.extensions(),
            "options": client.options(),
            "rows": answer.response,
            "status": (answer.status.code, answer.status.message),
            "wrong": (wrong.status.code, wrong.status.message),
            "columns": client.getQueryColumns("select pid, name, cpu_type from processes").response,
            "bad columns": client.getQueryColumns("select nope from processes").status.message,
            "no plugin": client.call("config", "nobody", {"action": "genConfig"}).status,
            "option": client.call("config", "tls", {"action": "option", "name": "custom_mood"}).response,
            "table": client.call("table", "processes", {"action": "generate", "context": "{}"}).response,
            "deregister": client.deregisterExtension(4711).message,
            "shutdown": client.shutdown(),
            "after": client.ping().message,
        }
    finally:
        theirs.close()


def test_the_packages_client_sees_the_agent(folder: Path) -> None:
    async def main() -> dict[str, Any]:
        async with running_agent(folder) as (agent, _manager):
            return await trio.to_thread.run_sync(their_view, agent.path)

    seen = trio.run(main)
    assert (seen["ping"], seen["after"]) == ((0, "pong"), "pong")
    assert seen["rows"] == [{"pid": "1", "name": "p1"}, {"pid": "2", "name": "p2"}]
    assert seen["status"] == (0, "OK")
    assert seen["wrong"] == (1, "no such table: foo")
    assert seen["columns"] == [{"pid": "BIGINT"}, {"name": "TEXT"}, {"cpu_type": "INTEGER"}]
    assert seen["bad columns"] == "no such column: nope"
    assert seen["extensions"] == {}
    option = seen["options"]["tls_hostname"]
    assert (option.value, option.default_value, option.type) == ("localhost:8443", "", "string")
    assert (seen["options"]["custom_mood"].value, seen["options"]["verbose"].type) == ("fine", "bool")
    assert (seen["no plugin"].code, seen["no plugin"].message) == (1, "Cannot call registry item: nobody")
    assert seen["option"] == [{"name": "custom_mood", "value": "fine"}]
    assert len(seen["table"]) == 100
    assert seen["deregister"] == "No extension UUID found"


# -- the package's extension -------------------------------------------------------------------------------------

PLUGINS = """
import json, os, sys, threading, time
import osquery

@osquery.register_plugin
class Lines(osquery.TablePlugin):
    def name(self): return "lines"
    def columns(self):
        return [osquery.TableColumn(name="pid", type=osquery.INTEGER),
                osquery.TableColumn(name="note", type=osquery.STRING),
                osquery.TableColumn(name="asked", type=osquery.STRING)]
    def generate(self, context):
        asked = json.dumps({c["name"]: c["list"] for c in context["constraints"] if c["list"]}, sort_keys=True)
        return [{"pid": str(pid), "note": "n%d" % pid, "asked": asked} for pid in (3, 5, 500)]

@osquery.register_plugin
class Conf(osquery.ConfigPlugin):
    def name(self): return "conf"
    def content(self):
        return [{"one": json.dumps({"schedule": {"t": {"query": "select * from time", "interval": 60}}})}]

@osquery.register_plugin
class Log(osquery.LoggerPlugin):
    def name(self): return "log"
    def log_string(self, value):
        with open(os.environ["LOG"], "a") as out:
            out.write(value + chr(10))
        return osquery.extensions.ttypes.ExtensionStatus(code=0, message="OK")

if __name__ == "__main__":
    osquery.start_extension(name="theirs", version="1.0.0")
"""


@contextlib.contextmanager
def their_extension(folder: Path, manager: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = folder / "theirs.py"
    program.write_text(PLUGINS)
    command = [sys.executable, "-W", "ignore", str(program), "--socket", str(manager), "--timeout", "20"]
    environment = {**os.environ, "LOG": str(folder / "log")}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_table_of_the_package_is_joined_with_our_processes(folder: Path) -> None:
    async def main() -> None:
        async with running_agent(folder) as (agent, _manager):
            with their_extension(folder, agent.path) as process:
                registered = await agent.wait("extension_registered")
                assert registered["name"] == "theirs"
                rows = await agent.rows("select p.name, t.note from processes p join lines t using (pid)")
                assert rows == [{"name": "p3", "note": "n3"}, {"name": "p5", "note": "n5"}]
                [row] = await agent.rows("select asked from lines where pid >= 5 and note glob '*500'")
                assert json.loads(row["asked"]) == {
                    "pid": [{"op": 32, "expr": "5"}], "note": [{"op": 66, "expr": "*500"}],
                }  # fmt: skip
                sql = "select name, version, sdk_version, type from osquery_extensions where uuid > 0"
                assert await agent.rows(sql) == [
                    {"name": "theirs", "version": "1.0.0", "sdk_version": "3.0.7", "type": "extension"}
                ]
                sql = "select r.name from osquery_registry r join osquery_extensions e on r.owner_uuid = e.uuid"
                names = [row["name"] for row in await agent.rows(f"{sql} where e.name = 'theirs' order by 1")]
                assert names == ["conf", "lines", "log"]
                process.kill()
                await agent.wait("extension_gone")
                result = agent.engine.query("select * from lines", tables=agent.tables)
                assert (result.status, result.message) == (1, "no such table: lines")

    trio.run(main)


def test_a_query_that_meets_an_extension_first_does_not_make_the_watcher_give_it_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ping = ExtensionClient.ping
    pings = 0

    async def main() -> None:
        async with running_agent(folder) as (agent, manager):

            async def failing_late(client: ExtensionClient) -> Status:
                nonlocal pings
                pings += 1
                if pings == 1:  # nobody listened when this ping began; by its end a query has been answered
                    [extension] = manager.extensions.values()
                    async with manager.client(extension) as met:
                        await met.call("table", "lines", {"action": "columns"})
                    agent.hear("ping_failed", {})
                    raise NotListening("nobody listens yet")
                status = await ping(client)
                if "ping_failed" in dict(agent.events):
                    agent.hear("pinged", {})
                return status

            monkeypatch.setattr(ExtensionClient, "ping", failing_late)
            with their_extension(folder, agent.path), trio.fail_after(20):
                while not {"pinged", "extension_gone"} & dict(agent.events).keys():
                    await agent.heard.wait()
                assert [extension.name for extension in manager.extensions.values()] == ["theirs"]

    trio.run(main)


def test_an_agent_uses_plugins_of_the_package(folder: Path) -> None:
    async def main() -> None:
        async with running_agent(folder) as (agent, manager):
            with their_extension(folder, agent.path):
                await manager.wait_extensions(["theirs"], 20)
                await manager.wait_plugins([("config", "conf"), ("logger", "log")], 20)
                perform = PluginCaller(manager)
                rows = await perform(Call("config", "conf", {"action": "genConfig"}))
                assert isinstance(rows, list)
                assert json.loads(rows[0]["one"])["schedule"]["t"]["interval"] == 60
                for number in range(20):
                    line = {"string": f"line {number}", "category": "event"}
                    assert await perform(Call("logger", "log", line)) == []
                assert await perform(Call("logger", "log", {"status": "true", "log": "[]"})) == []
                lines = (folder / "log").read_text().splitlines()
                assert lines == [f"line {number}" for number in range(20)]
                failed = await perform(Call("distributed", "nobody", {"action": "getQueries"}))
                assert failed == Failure("Cannot call registry item: nobody")

    trio.run(main)


COLUMNS = [
    ("select 1 a, 5000000000 b, 1.5 c, 'x' d", ["INTEGER", "BIGINT", "DOUBLE", "TEXT"]),
    ("select count(*) a, name || 'x' b, pid + 1 c from processes", ["BIGINT", "TEXT", "BIGINT"]),
    ("select cast(pid as text) a, pid b, null c from processes", ["TEXT", "BIGINT", "UNKNOWN"]),
    ("select pid = 1 or pid = 2 a from processes; delete from processes", ["INTEGER"]),
]


@pytest.mark.parametrize(("sql", "types"), COLUMNS)
def test_expressions_have_the_type_of_what_computes_them(sql: str, types: list[str]) -> None:
    """Without running anything, and of the first statement only."""
    found, error = Engine({"processes": source(lambda _context: pytest.fail("it was run"))}).columns(sql)
    assert ([kind for _, kind in found], error) == (types, "")
