"""Acknowledged means on disk: a box killed in the middle of a storm has every acknowledged line and block, once."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NODES = 4
LINES = 25
ACKNOWLEDGED_BEFORE_KILL = 60
KILLS = 2

BOX = """
import json, sys, time
from pathlib import Path
import trio
from osqbox.box import open_box
from osqbox.osquery import carves
from osqbox.settings import Settings

if "never-hash" in sys.argv:
    carves.Digest.feed = lambda *_: time.sleep(60)

async def main():
    data, certs = map(Path, sys.argv[1:3])
    async with open_box(Settings(data, certs, agents_port=0, operator_port=0)) as box:
        print(json.dumps(box.ready()), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


class Box:
    """A box in a process of its own, on a directory that outlives it."""

    def __init__(self, folder: Path, certs: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self._certs = certs
        self.start()

    def start(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOX, str(self.data), str(self._certs), *words], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=10)

    def rows(self, sql: str) -> list[Any]:
        db = sqlite3.connect(self.data / "osqbox.db")
        try:
            return db.execute(sql).fetchall()
        finally:
            db.close()


@pytest.fixture
def box(tmp_path: Path, identity: Any) -> Iterator[Box]:
    made = Box(tmp_path, identity.directory)
    yield made
    made.kill()


class Agent(threading.Thread):
    """A node that sends until the connection breaks; `pending` is what was not acknowledged then."""

    def __init__(self, box: Box, name: str, told: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self._box = box
        self._told = told
        self.pending: tuple[str, bytes] | None = None
        self.acknowledged = 0
        self.error: BaseException | None = None
        self._connect()
        self.key = self.send("/enroll", {"enroll_secret": box.ready["enroll_secret"], "host_identifier": name})[
            "node_key"
        ]

    def _connect(self) -> None:
        port = int(self._box.ready["agents"].rsplit(":", 1)[1])
        context = ssl.create_default_context(cafile=self._box.ready["ca"])
        self._connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)

    def send(self, path: str, body: dict[str, Any] | bytes) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.pending = (path, raw)
        self._connection.request("POST", path, raw)
        answer = json.loads(self._connection.getresponse().read())
        assert "error" not in answer, answer
        self.pending = None
        return answer

    def run(self) -> None:
        try:
            for path, body in self.work():
                self.send(path, body)
                self.acknowledged += 1
                self._told.release()
        except (OSError, http.client.HTTPException, ValueError):
            pass
        except Exception as error:  # noqa: BLE001 - told by the test's own thread
            self.error = error
        finally:
            self._connection.close()

    def work(self) -> Iterator[tuple[str, dict[str, Any]]]:
        raise NotImplementedError

    def resume(self) -> None:
        """What osqueryd does when an answer does not come: the same again, on a new connection."""
        self._connect()
        if self.pending is not None:
            self.send(*self.pending)
            self.acknowledged += 1


class Logger(Agent):
    def __init__(self, box: Box, name: str, told: threading.Semaphore) -> None:
        super().__init__(box, name, told)
        self.name_ = name
        self.sent = itertools.count()

    def work(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for batch in self.sent:
            data = [{"name": "q", "columns": {"line": f"{self.name_}-{batch}-{number}"}} for number in range(LINES)]
            yield "/log", {"data": data, "log_type": "result", "node_key": self.key}


class Carver(Agent):
    """One long carve, a block at a time."""

    BLOCK = 500
    COUNT = 4000

    def __init__(self, box: Box, name: str, told: threading.Semaphore) -> None:
        super().__init__(box, name, told)
        self.content = os.urandom(self.BLOCK * self.COUNT)
        begin = {
            "block_count": self.COUNT,
            "block_size": self.BLOCK,
            "carve_size": len(self.content),
            "node_key": self.key,
        }
        self.session = self.send("/carve/begin", {**begin, "carve_id": "g", "request_id": "r"})["session_id"]
        self.numbers = iter(range(self.COUNT))

    def work(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in self.numbers:
            yield "/carve/block", self.block(number)

    def block(self, number: int) -> dict[str, Any]:
        data = base64.b64encode(self.content[number * self.BLOCK : (number + 1) * self.BLOCK]).decode()
        return {"block_id": number, "session_id": self.session, "request_id": "r", "data": data}


def storm(agents: list[Agent], told: threading.Semaphore, box: Box) -> None:
    """Everybody sends; the box is killed in the middle of it."""
    for agent in agents:
        agent.start()
    for _ in range(ACKNOWLEDGED_BEFORE_KILL):
        assert told.acquire(timeout=20)
    box.kill()
    for agent in agents:
        agent.join(timeout=20)
        assert not agent.is_alive()
        assert agent.error is None


def again(agent: Agent) -> None:
    """A thread runs once; go on with a fresh one of the same state."""
    threading.Thread.__init__(agent, daemon=True)


def test_every_acknowledged_line_and_block_is_there_exactly_once_after_a_kill(box: Box) -> None:
    told = threading.Semaphore(0)
    loggers = [Logger(box, f"n{number}", told) for number in range(NODES)]
    carver = Carver(box, "carver", told)
    agents: list[Agent] = [*loggers, carver]
    for _ in range(KILLS):
        storm(agents, told, box)
        stored = Counter(json.loads(line)["columns"]["line"] for (line,) in box.rows("SELECT line FROM osquery_logs"))
        assert set(stored.values()) == {1}
        for logger in loggers:
            for batch in range(logger.acknowledged):
                assert all(f"{logger.name_}-{batch}-{number}" in stored for number in range(LINES))
        ((blocks,),) = box.rows("SELECT count(*) FROM osquery_carve_blocks")
        assert carver.acknowledged <= blocks <= carver.acknowledged + 1
        box.start()
        for agent in agents:
            agent.resume()
            again(agent)
    stored = Counter(json.loads(line)["columns"]["line"] for (line,) in box.rows("SELECT line FROM osquery_logs"))
    assert stored == Counter(
        f"{logger.name_}-{batch}-{number}"
        for logger in loggers
        for batch in range(logger.acknowledged)
        for number in range(LINES)
    )
    for number in carver.numbers:
        carver.send("/carve/block", carver.block(number))
        if number > 200:
            break
    ((received, counted),) = box.rows(
        "SELECT received_blocks, (SELECT count(*) FROM osquery_carve_blocks) FROM osquery_carves"
    )
    assert received == counted
    data = b"".join(row[0] for row in box.rows("SELECT data FROM osquery_carve_blocks ORDER BY block_id"))
    assert hashlib.sha256(data).digest() == hashlib.sha256(carver.content[: len(data)]).digest()
    for agent in agents:
        agent._connection.close()


class ShortCarver(Carver):
    COUNT = 3


@pytest.mark.parametrize("sends_again", [True, False])
def test_a_carve_whose_hashing_was_killed_is_completed_by_the_next_box(box: Box, sends_again: bool) -> None:
    """Its last block was stored, but not acknowledged; the agent may send it again, or be gone for good."""
    box.kill()
    box.start("never-hash")
    carver = ShortCarver(box, "carver", threading.Semaphore(0))
    carver.start()
    received = "SELECT 1 FROM osquery_carves WHERE received_blocks = block_count AND state = 'receiving'"
    until(lambda: box.rows(received))
    box.kill()
    carver.join(timeout=20)
    assert carver.error is None
    assert carver.acknowledged == carver.COUNT - 1
    assert box.rows(received)
    box.start()
    if sends_again:
        carver.resume()
        carver._connection.close()
    else:
        until(lambda: not box.rows(received))
    digest = hashlib.sha256(carver.content).hexdigest()
    assert box.rows("SELECT state, sha256 FROM osquery_carves") == [("complete", digest)]


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_keys_config_and_campaigns_outlive_a_kill(box: Box) -> None:
    """A node goes on with its key, and a query that was sent but not answered is offered again."""
    agent = Logger(box, "survivor", threading.Semaphore(0))
    operator = http.client.HTTPConnection(box.ready["operator"].removeprefix("http://"), timeout=20)
    headers = {"Authorization": f"Bearer {box.ready['token']}", "Content-Type": "application/json"}
    body = json.dumps({"sql": "select 1", "nodes": ["survivor"]})
    operator.request("POST", "/api/v1/campaigns", body, headers)
    campaign = json.loads(operator.getresponse().read())
    operator.close()
    first = agent.send("/distributed/read", {"node_key": agent.key})
    assert first["queries"] == {campaign["id"]: "select 1"}
    agent._connection.close()
    box.kill()
    box.start()
    agent.resume()
    assert agent.send("/config", {"node_key": agent.key}) == {}
    assert agent.send("/distributed/read", {"node_key": agent.key}) == first
    agent.send("/distributed/write", {"node_key": agent.key, "queries": {campaign["id"]: [{"a": "1"}]}})
    agent._connection.close()
    box.kill()
    assert box.rows("SELECT state, rows FROM osquery_targets") == [("answered", '[{"a":"1"}]')]
    box.start()
