"""Agents of both dialects over every transport against a real box: the whole way of a command, an event, a file."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.agent.comms.core import RefusedByServer
from osqbox.agent.comms.driver import CommsAgent
from osqbox.agent.comms.effects import POLL, SSE, WEBSOCKET
from osqbox.agent.comms.options import G1, SPIKE, Load, Options, Pace
from osqbox.agent.comms.wire import Target
from osqbox.agent.store import MemoryStore
from osqbox.agent.wire import client_context
from osqbox.cli.agent_comms import new_identity
from osqbox.client import Client

from .strict_server import FakeHost

WAIT_S = 25.0


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("box")
    ports = [word for name in ("agents", "operator", "comms", "jobs") for word in (f"--{name}-port", "0")]
    where = ("--data", str(folder / "data"), "--certs", str(folder / "certs"))
    command = [sys.executable, "-m", "osqbox", "serve", *where]
    with (folder / "errors").open("wb") as errors:
        box = subprocess.Popen([*command, *ports, "--json"], stdout=subprocess.PIPE, stderr=errors)
    try:
        assert box.stdout is not None
        yield json.loads(box.stdout.readline())
    finally:
        box.terminate()
        box.communicate(timeout=10)


def agent_of(ready: dict[str, Any], profile: str, transport: str, host: FakeHost) -> CommsAgent:
    load = Load(inventory_every_s=0, logs_every_s=0.3, logs_items=1)
    return CommsAgent(
        Target(ready["comms"]),
        client_context(Path(ready["ca"])),
        host,
        Options(profile, transport, Pace().times_faster(50), load=load),
        MemoryStore(),
        now=time.time,
        throw=random.random,
    )


async def until(client: Client, path: str, true: Any) -> Any:
    """Ask the operator API until its answer is as it should be."""
    found: Any = None
    with trio.move_on_after(WAIT_S):
        while True:
            found = await trio.to_thread.run_sync(client.get, path)
            if true(found):
                return found
            await trio.sleep(0.1)
    raise AssertionError(f"{path}: {found}")


@pytest.mark.parametrize(("profile", "transport"), [(SPIKE, SSE), (SPIKE, WEBSOCKET), (SPIKE, POLL), (G1, POLL)])
def test_a_command_goes_there_and_its_result_comes_back(ready: dict[str, Any], profile: str, transport: str) -> None:
    client = Client(ready["operator"], ready["token"])
    host = FakeHost(lines=["the first", "the second"])
    agent = agent_of(ready, profile, transport, host)
    names = ["fetch-config", "restart"] + (["upgrade"] if profile == SPIKE else [])

    async def main() -> None:
        with trio.fail_after(WAIT_S):
            await agent.enroll(*new_identity(), ready["enroll_secret"])
        uuid = agent.core.uuid
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.run)
            for count, name in enumerate(names, 1):
                action = {"name": name, "version": "", "args": {"file_name": "new.wpk"} if name == "upgrade" else {}}
                await trio.to_thread.run_sync(client.post, "commands", {"agents": [uuid], "action": action})
                if transport == POLL:  # a poll that a restart cuts off may take along its answer
                    await until(client, f"commands?agent={uuid}", partial(all_ended, count=count))
            commands = await until(client, f"commands?agent={uuid}", lambda found: all_ended(found, len(names)))
            events = await until(client, f"events?agent={uuid}", lambda found: len(found["events"]) == 2)
            nursery.cancel_scope.cancel()
        results = {each["action"]["name"]: (each["status"], each["result"]["message"]) for each in rows(commands)}
        assert results["restart"] == ("success", "Agent restarted")
        assert results["fetch-config"][0] == "success"
        if profile == SPIKE:
            digest = hashlib.sha256(UPGRADE).hexdigest()
            assert results["upgrade"] == ("success", f"Fetched new.wpk: {len(UPGRADE)} bytes, sha256 {digest}")
        assert {event["data"]["event"]["original"] for event in events["events"]} == {"the first", "the second"}

    put_upgrade(ready)
    trio.run(main)
    statistics = agent.statistics
    assert (statistics.restarts, statistics.commands_received) == (1, len(names))
    assert (statistics.commands_duplicate, statistics.commands_out_of_order, statistics.events_refused) == (0, 0, 0)


UPGRADE = b"not really a package" * 5000


def put_upgrade(ready: dict[str, Any]) -> None:
    import httpx

    headers = {"Authorization": f"Bearer {ready['token']}", "Content-Type": "application/octet-stream"}
    url = f"{ready['operator']}/api/v1/upgrades/new.wpk"
    answer = httpx.put(url, content=UPGRADE, headers=headers, trust_env=False)
    assert answer.status_code in (200, 201, 409), answer.text


def rows(found: Any) -> list[dict[str, Any]]:
    return list(found["commands"] if isinstance(found, dict) else found)


def all_ended(found: Any, count: int) -> bool:
    return len(rows(found)) == count and all(each["result"] for each in rows(found))


@pytest.mark.parametrize("profile", [SPIKE, G1])
def test_a_deleted_agent_ends(ready: dict[str, Any], profile: str) -> None:
    client = Client(ready["operator"], ready["token"])
    agent = agent_of(ready, profile, SSE if profile == SPIKE else POLL, FakeHost())

    async def main() -> None:
        with trio.fail_after(WAIT_S):
            await agent.enroll(*new_identity(), ready["enroll_secret"])

        async def delete() -> None:
            await until(client, f"agents/{agent.core.uuid}", lambda found: found["status"] == "active")
            await trio.to_thread.run_sync(client.delete, f"agents/{agent.core.uuid}")

        with trio.fail_after(WAIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(delete)
                with pytest.raises(RefusedByServer, match="Agent does not exist"):
                    await agent.run()

    trio.run(main)
    assert agent.statistics.refused_agents == 1


def test_a_wrong_secret_registers_nobody(ready: dict[str, Any]) -> None:
    agent = agent_of(ready, SPIKE, SSE, FakeHost())

    async def main() -> None:
        with trio.fail_after(WAIT_S), pytest.raises(RefusedByServer, match="not enrolled"):
            await agent.enroll(*new_identity(), "wrong")

    trio.run(main)
    assert agent.core.uuid == ""


def test_the_program_is_the_same_agent_after_a_restart(ready: dict[str, Any], tmp_path: Path) -> None:
    """Its uuid and key are in its state: the second time it needs no secret."""
    first = logged_in(ready, tmp_path, "--enroll-secret", ready["enroll_secret"], "--profile", "ubuntu")
    assert logged_in(ready, tmp_path, "--profile", "ubuntu") == first
    key_file = tmp_path / "key"
    key_file.write_text("x" * 32)
    told = run_program(ready, tmp_path / "other", "--uuid", first, "--key-file", str(key_file), "--profile", "ubuntu")
    _, errors = told.communicate(timeout=WAIT_S)
    assert told.returncode == 1
    assert "login refused: Invalid key" in errors


def run_program(ready: dict[str, Any], state: Path, *words: str) -> subprocess.Popen[str]:
    where = ("--comms", ready["comms"], "--ca", ready["ca"], "--state", str(state))
    command = [sys.executable, "-m", "osqbox", "agent", *where, *words, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logged_in(ready: dict[str, Any], state: Path, *words: str) -> str:
    """The uuid it tells when it is in; then it is stopped."""
    agent = run_program(ready, state, *words)
    try:
        assert agent.stdout is not None
        for line in agent.stdout:
            told = json.loads(line)
            if told["event"] == "logged_in":
                return str(told["uuid"])
    finally:
        agent.terminate()
        _, errors = agent.communicate(timeout=WAIT_S)
    raise AssertionError(errors)
