"""Two `osqbox serve` processes, one indexer, an agent whose every request goes to the other box."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from .standin import StandIn

START_S = 40
REVOKED_WITHIN_S = 3.0
"""A tenth of a second by the journal; the rest is the machine's."""


class Box:
    def __init__(self, ready: Path, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        told = json.loads(ready.read_text())
        self.comms = httpx.Client(base_url=told["comms"], verify=False, timeout=20)
        self.operator = httpx.Client(
            base_url=f"{told['operator']}/api/v1", headers={"authorization": f"Bearer {told['token']}"}, timeout=20
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def publish(self, uuid: str, number: int) -> str:
        body = {"agents": [uuid], "action": {"name": "restart", "args": {"number": number}}}
        answer = self.operator.post("/commands", json=body)
        assert answer.status_code in (200, 201, 202), answer.text
        return str(answer.text)

    def poll(self, token: str, wait_s: float) -> list[dict[str, Any]]:
        answer = self.comms.get(f"/api/v1/commands?wait={wait_s}", headers=bearer(token))
        assert answer.status_code in (200, 408), answer.text
        return list(answer.json()["commands"]) if answer.status_code == 200 else []


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", "accept": "application/json"}


@contextmanager
def serving(folder: Path, indexer: str, keys: Path) -> Iterator[Box]:
    ready = folder / "ready.json"
    command = [
        sys.executable,
        "-m",
        "osqbox",
        "serve",
        "--data",
        str(folder / "data"),
        "--certs",
        str(folder / "certs"),
    ]
    command += ["--agents-port", "0", "--operator-port", "0", "--comms-port", "0", "--jobs-port", "0"]
    command += ["--indexer-url", indexer, "--comms-keys", str(keys), "--ready-file", str(ready)]
    folder.mkdir()
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONWARNINGS": "default"}
        )
    try:
        until = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None, (folder / "output.txt").read_text()
            assert time.monotonic() < until, (folder / "output.txt").read_text()
            time.sleep(0.05)
        box = Box(ready, process)
        with box.comms, box.operator:
            yield box
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@pytest.fixture(params=["standin", pytest.param("real", marks=pytest.mark.timeout(300))])
def indexer_url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "real":
        url = request.getfixturevalue("opensearch_url")
        httpx.delete(f"{url}/osqbox-*").raise_for_status()  # boxes have this one prefix
        yield url
        return
    with StandIn() as server:
        yield server.url


def test_one_agent_at_two_boxes(indexer_url: str, tmp_path: Path) -> None:
    """One login; each command once, in order of publication; a box killed on the way; revoked here, refused there."""
    with ExitStack() as stack:
        keys = tmp_path / "keys"
        a = stack.enter_context(serving(tmp_path / "a", indexer_url, keys))
        b = stack.enter_context(serving(tmp_path / "b", indexer_url, keys))
        added = a.operator.post("/agents", json={"name": "web1"})
        assert added.status_code in (200, 201), added.text
        uuid, key = added.json()["uuid"], added.json()["key"]
        login = b.comms.post("/api/v1/authentication", json={"uuid": uuid, "key": key})
        assert login.status_code == 200, login.text
        token = login.json()["token"]

        received: list[int] = []
        for number in range(12):
            (a, b)[number % 2].publish(uuid, number)
            for command in (b, a)[number % 2].poll(token, 5):
                received.append(command["action"]["args"]["number"])
                report(a if number % 3 else b, token, uuid, command["document_id"])
        assert received == list(range(12))

        event = {"module": "log", "message": "kept here, searched there"}
        assert a.comms.post("/events/stateless", json=event, headers=bearer(token)).status_code == 202
        forwarded(indexer_url, uuid)

        a.publish(uuid, 12)
        a.kill()
        b.publish(uuid, 13)
        while len(received) < 14:
            taken = b.poll(token, 5)
            assert taken
            received += [command["action"]["args"]["number"] for command in taken]
        assert received == list(range(14))
        assert b.poll(token, 0) == []

        c = stack.enter_context(serving(tmp_path / "c", indexer_url, keys))
        assert c.poll(token, 0) == []
        changed = c.operator.patch(f"/agents/{uuid}", json={"status": "revoked"})
        assert changed.status_code == 200, changed.text
        until = time.monotonic() + REVOKED_WITHIN_S
        while b.comms.get("/api/v1/commands?wait=0", headers=bearer(token)).status_code != 403:
            assert time.monotonic() < until
            time.sleep(0.05)


def forwarded(indexer_url: str, uuid: str) -> None:
    """The box's stateless events are in the indexer as well."""
    until = time.monotonic() + 10
    body = {"query": {"term": {"agent": uuid}}}
    while True:
        httpx.post(f"{indexer_url}/osqbox-events/_refresh")
        answer = httpx.post(f"{indexer_url}/osqbox-events/_search", json=body)
        if answer.status_code == 200 and answer.json()["hits"]["hits"]:
            break
        assert time.monotonic() < until, answer.text
        time.sleep(0.05)
    [hit] = answer.json()["hits"]["hits"]
    assert hit["_source"]["data"]["message"] == "kept here, searched there"


def report(box: Box, token: str, uuid: str, id: str) -> None:
    lines = [
        {"agent": {"id": uuid}},
        {"module": "command", "id": id, "operation": "update"},
        {"command": {"result": {"code": 0, "message": "done"}}},
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    answer = box.comms.post("/api/v1/events/stateful", content=body, headers=bearer(token))
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][0]["status"] in (200, 201), answer.text
