"""`osqbox osqueryd` and the Python package: the program it spawns, and a daemon that lives off its plugins."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from osquery import SpawnInstance  # type: ignore[import-untyped,unused-ignore]

from osqbox.agent.extension.plugins import DistributedPlugin, LoggerPlugin, Plugin, TablePlugin
from osqbox.agent.extension.server import ExtensionServer
from osqbox.agent.sql import Context

LIMIT_S = 30

PLUGINS = """
import json, os
import osquery

@osquery.register_plugin
class Notes(osquery.TablePlugin):
    def name(self): return "notes"
    def columns(self):
        return [osquery.TableColumn(name="pid", type=osquery.INTEGER),
                osquery.TableColumn(name="note", type=osquery.STRING)]
    def generate(self, context):
        return [{"pid": os.environ["DAEMON"], "note": "this is the daemon"}]

@osquery.register_plugin
class Conf(osquery.ConfigPlugin):
    def name(self): return "conf"
    def content(self):
        sql = "select n.note, p.pid = n.pid as same from processes p join notes n using (pid)"
        return [{"theirs": json.dumps({"schedule": {"joined": {"query": sql, "interval": 1}},
                                       "options": {"custom_by": "theirs"}})}]

@osquery.register_plugin
class Log(osquery.LoggerPlugin):
    def name(self): return "log"
    def log_string(self, value):
        with open(os.environ["LOG"], "a") as out:
            out.write(value + chr(10))
        return osquery.extensions.ttypes.ExtensionStatus(code=0, message="OK")

osquery.start_extension(name="theirs", version="1.0.0")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="osqbox-") as path:
        yield Path(path)


@pytest.fixture
def osqueryd(folder: Path) -> Path:
    """A program like /usr/bin/osqueryd."""
    program = folder / "osqueryd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m osqbox osqueryd "$@"\n')
    program.chmod(0o755)
    return program


def test_the_package_spawns_our_daemon(osqueryd: Path) -> None:
    instance = SpawnInstance(str(osqueryd))
    try:
        instance.open(timeout=LIMIT_S)
        # It gives up after a second without saying so, which a busy machine may need.
        connection = instance.connection
        assert any(connection._transport.isOpen() or connection.open() for _ in range(LIMIT_S))
        client = instance.client
        assert client.ping().message == "pong"
        answer = client.query("select pid from osquery_info")
        assert answer.response == [{"pid": str(instance.instance.pid)}]
        assert client.options()["ephemeral"].value == "true"
    finally:
        process = instance.instance
        instance.__del__()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@contextlib.contextmanager
def daemon(osqueryd: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A daemon whose socket is in the same folder; ended, and gone, afterwards."""
    socket = osqueryd.with_name("osquery.em")
    command = [
        *(str(osqueryd), "--ephemeral", "--disable_database", f"--extensions_socket={socket}"),
        *("--extensions_timeout=20", "--extensions_interval=1", "--config_path=/dev/null", *flags),
    ]
    with subprocess.Popen(command, cwd=osqueryd.parent, stdout=subprocess.DEVNULL) as process:
        try:
            yield process, socket
        finally:
            process.terminate()
            assert process.wait(LIMIT_S) == 0
    assert not socket.exists()


def test_a_daemon_lives_off_plugins_of_the_package(folder: Path, osqueryd: Path) -> None:
    """Config and logs by the extension, and a table of it joined with processes in a scheduled query."""
    program, log = folder / "theirs.py", folder / "log"
    program.write_text(PLUGINS)
    os.mkfifo(log)  # reading waits for the extension to write
    flags = ["--config_plugin=conf", "--logger_plugin=log", "--extensions_require=theirs"]
    with daemon(osqueryd, *flags) as (process, socket):
        command = [sys.executable, "-W", "ignore", str(program), "--socket", str(socket), "--timeout", "20"]
        environment = {**os.environ, "LOG": str(log), "DAEMON": str(process.pid)}
        with subprocess.Popen(command, env=environment) as extension:
            found: list[str] = []

            def read_line() -> None:
                with log.open() as lines:
                    found.append(lines.readline())

            reader = threading.Thread(target=read_line, daemon=True)
            reader.start()
            reader.join(LIMIT_S)
            extension.kill()
    line = json.loads(found[0])
    assert (line["name"], line["action"]) == ("joined", "added")
    assert line["columns"] == {"note": "this is the daemon", "same": "1"}


class Server:
    """Hands out one set of queries and takes what comes."""

    def __init__(self, queries: dict[str, str]) -> None:
        self._queries = json.dumps({"queries": queries})
        self.results: dict[str, Any] = {}
        self.lines: list[str] = []
        self.done = trio.Event()

    async def get_queries(self) -> str:
        given, self._queries = self._queries, "{}"
        return given

    async def write_results(self, text: str) -> None:
        self.results = json.loads(text)
        self.done.set()

    async def log(self, line: str) -> None:
        self.lines.append(line)


def test_a_daemon_gets_its_queries_from_our_extension(folder: Path, osqueryd: Path) -> None:
    async def rows(_context: Context) -> list[dict[str, Any]]:
        return [{"n": 1}, {"n": 2}]

    async def main(socket: Path) -> Server:
        server = Server({"sum": "select sum(n) s from numbers", "bad": "select * from nowhere"})
        plugins: list[Plugin] = [
            DistributedPlugin("ours", server.get_queries, server.write_results),
            LoggerPlugin("ours", server.log),
            TablePlugin("numbers", [("n", "INTEGER")], rows),
        ]
        with trio.fail_after(LIMIT_S):
            async with ExtensionServer("ours", plugins, socket, timeout_s=LIMIT_S) as extension:
                await server.done.wait()
                seen = await extension.manager.query("select name from osquery_extensions where type = 'extension'")
                assert seen.rows == [{"name": "ours"}]
        return server

    flags = ["--distributed_plugin=ours", "--logger_plugin=ours", "--disable_distributed=false"]
    with daemon(osqueryd, *flags, "--config_plugin=filesystem", "--distributed_interval=1") as (_process, socket):
        results = trio.run(main, socket).results
    assert results["queries"] == {"sum": [{"s": "3"}], "bad": []}
    assert results["statuses"] == {"sum": 0, "bad": 1}
    assert results["messages"]["bad"] == "no such table: nowhere"
    assert "node_key" not in results
