"""``osqbox comms`` against a real box and an agent that speaks to it."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 20


@dataclass
class CommsBox:
    ready: dict[str, Any]

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        """As an agent, over TLS. None for an answer without a body."""
        headers = {"Accept": "application/json", "User-Agent": "WazuhXDR/6.0.0 (Endpoint; x86_64; Linux)"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.ready['comms']}/api/v1{path}", data, headers, method=method)
        context = ssl.create_default_context(cafile=self.ready["ca"])
        with urllib.request.urlopen(request, timeout=LIMIT_S, context=context) as response:
            raw = response.read()
        return json.loads(raw) if raw else None

    def login(self, uuid: str, key: str) -> str:
        return str(self.call("POST", "/authentication", {"uuid": uuid, "key": key})["token"])


@pytest.fixture(scope="module")
def comms_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommsBox]:
    home = tmp_path_factory.mktemp("comms-box")
    ready_file = home / "ready.json"
    ports = [word for name in ("agents", "operator", "comms") for word in (f"--{name}-port", "0")]
    words = ["serve", "--quiet", "--ephemeral", "--no-jobs", "--certs", str(home / "certs"), "--ready-file"]
    process = subprocess.Popen(
        [sys.executable, "-m", "osqbox", *words, str(ready_file), *ports],
        env={**os.environ, "OSQBOX_HOME": str(home)}, cwd=home,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        while not ready_file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield CommsBox(json.loads(ready_file.read_text()))
    finally:
        process.terminate()
        assert process.wait(LIMIT_S) == 0


@pytest.fixture
def at_box(comms_box: CommsBox, monkeypatch: pytest.MonkeyPatch) -> CommsBox:
    monkeypatch.setenv("OSQBOX_URL", comms_box.ready["operator"])
    monkeypatch.setenv("OSQBOX_TOKEN", comms_box.ready["token"])
    return comms_box


def added(run: Any, name: str, *words: str) -> dict[str, Any]:
    result = run("comms", "agents", "add", name, "--json", *words)
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_an_agent_from_its_key_to_its_end(at_box: CommsBox, run: Any) -> None:
    """Added, let in, given another key, revoked, allowed, forgotten: each bites at its next login."""
    agent = added(run, "life")
    uuid, key = agent["uuid"], agent["key"]
    assert at_box.login(uuid, key)
    new_key = run("comms", "agents", "key", "life").stdout.strip()
    assert refused(lambda: at_box.login(uuid, key)) in (401, 403)
    assert at_box.login(uuid, new_key)
    assert run("comms", "agents", "revoke", uuid).exit_code == 0
    assert "revoked" in run("comms", "agents", "--text", "life").stdout
    assert refused(lambda: at_box.login(uuid, new_key)) in (401, 403)
    assert run("comms", "agents", "allow", "life").exit_code == 0
    assert at_box.login(uuid, new_key)
    assert run("comms", "agents", "rm", "life").exit_code == 0
    assert run("comms", "agents", "show", "life").exit_code == 2


def refused(call: Callable[[], Any]) -> int:
    """The status of a call that is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        call()
    error.value.close()
    return error.value.code


def answer_commands(box: CommsBox, token: str, uuid: str, count: int) -> None:
    """As the agent of 2024-25 does: poll, carry out, report."""
    while count:
        for command in box.call("GET", "/commands?wait=10", token=token)["commands"]:
            count -= 1
            code = 1 if command["action"]["name"] == "restart" else 0
            lines = [
                {"agent": {"id": uuid}},
                {"module": "command", "id": command["document_id"], "operation": "update"},
                {"command": {"result": {"code": code, "message": "said \x1b[2J"}}},
            ]
            body = "".join(json.dumps(line) + "\n" for line in lines).encode()
            box.call("POST", "/events/stateful", body, token)


def test_send_and_wait_for_what_the_agent_says(at_box: CommsBox, run: Any) -> None:
    """Success is 0, a failure 1; what the agent says is shown and cannot steer the terminal."""
    agent = added(run, "worker", "--group", "default")
    token = at_box.login(agent["uuid"], agent["key"])
    answering = threading.Thread(target=answer_commands, args=(at_box, token, agent["uuid"], 2))
    answering.start()
    try:
        done = run("comms", "send", "worker", "upgrade", "file_name=a.wpk", "--wait")
        assert (done.exit_code, done.exception) == (0, None)
        assert "said \\x1b[2J" in done.stdout
        failed = run("comms", "send", "--group", "default", "restart", "--wait")
        assert failed.exit_code == 1
        assert "1 failed" in failed.stderr
    finally:
        answering.join(LIMIT_S)
    found = json.loads(run("comms", "commands", "--agent", "worker", "--json").stdout)
    assert [(each["action"]["name"], each["status"]) for each in found] == [
        ("restart", "failed"), ("upgrade", "success"),
    ]  # fmt: skip
    shown = json.loads(run("comms", "commands", "show", found[0]["id"], "--json").stdout)
    assert shown["result"]["code"] == 1
    assert run("comms", "agents", "rm", "worker").exit_code == 0


def test_commands_that_are_refused_or_cancelled(at_box: CommsBox, run: Any) -> None:
    agent = added(run, "absent")
    unknown = run("comms", "send", "absent", "dance")
    assert (unknown.exit_code, "restart" in str(unknown.exception)) == (2, True)
    assert run("comms", "send", "absent", "upgrade").exit_code == 2
    assert run("comms", "send", "--group", "none", "restart").exit_code == 2
    late = run("comms", "send", "absent", "restart", "--wait", "--timeout", "0.2")
    assert late.exit_code == 5
    (command,) = json.loads(run("comms", "commands", "--agent", agent["uuid"], "--json").stdout)
    assert run("comms", "commands", "cancel", command["id"]).exit_code == 0
    again = run("comms", "commands", "cancel", command["id"])
    assert (again.exit_code, "has ended: cancelled" in str(again.exception)) == (1, True)
    assert run("comms", "commands", "known-add", "dance", "--requires", "tempo").exit_code == 0
    assert run("comms", "send", "absent", "dance", "tempo=fast").exit_code == 0
    assert run("comms", "commands", "known-rm", "dance").exit_code == 0
    assert run("comms", "send", "absent", "dance", "tempo=fast").exit_code == 2
    assert run("comms", "agents", "rm", "absent").exit_code == 0


def test_events_and_states(at_box: CommsBox, run: Any) -> None:
    agent = added(run, "talker")
    uuid = agent["uuid"]
    token = at_box.login(uuid, agent["key"])
    lines = [{"agent": {"id": uuid}}, {"module": "logcollector", "collector": "file"}, {"log": "sshd accepted"}]
    at_box.call("POST", "/events/stateless", b"".join(json.dumps(each).encode() + b"\n" for each in lines), token)
    stateful = [
        {"agent": {"id": uuid}},
        {"module": "inventory", "collector": "packages", "id": "p1", "operation": "create"},
        {"package": {"name": "vim"}},
    ]
    at_box.call("POST", "/events/stateful", b"".join(json.dumps(each).encode() + b"\n" for each in stateful), token)
    deadline = time.monotonic() + LIMIT_S
    while "sshd accepted" not in (text := run("comms", "events", "--agent", "talker", "--search", "accepted").stdout):
        assert time.monotonic() < deadline
    assert "logcollector/file" in text
    assert run("comms", "events", "--agent", "talker", "--search", "nothing").stdout == ""
    states = run("comms", "states", "--agent", "talker")
    assert "wazuh-states-inventory-packages" in states.stdout
    assert json.loads(run("comms", "states", "--search", "vim", "--json").stdout)["states"][0]["id"] == "p1"
    assert run("comms", "agents", "rm", "talker").exit_code == 0


def test_configuration_and_upgrades(at_box: CommsBox, run: Any, tmp_path: Path) -> None:
    """What is set is what the group's agents fetch; a file arrives byte for byte."""
    first, second, broken = tmp_path / "1.yml", tmp_path / "2.yml", tmp_path / "3.yml"
    first.write_text("a: 1\n")
    second.write_text("a: 2  # two\n")
    broken.write_text("a: [\n")
    assert run("comms", "config", "set", "web", str(first)).exit_code == 0
    assert run("comms", "config", "set", "web", str(second), "--expect", "1").exit_code == 0
    conflict = run("comms", "config", "set", "web", str(first), "--expect", "1")
    assert conflict.exit_code == 1
    assert run("comms", "config", "set", "web", str(broken)).exit_code == 2
    assert run("comms", "config", "show", "web").stdout == "a: 2  # two\n"
    assert run("comms", "config", "show", "web", "--version", "1").stdout == "a: 1\n"
    agent = added(run, "reader", "--group", "web")
    token = at_box.login(agent["uuid"], agent["key"])
    assert at_box.call("GET", "/configuration", token=token)["configuration"] == {"a": 2}
    assert run("comms", "config", "rm", "web").exit_code == 1
    assert run("comms", "agents", "groups", "reader", "default").exit_code == 0
    assert run("comms", "config", "rm", "web").exit_code == 0

    file = tmp_path / "agent-2.wpk"
    data = os.urandom(20 * 1024 * 1024 + 7)
    file.write_bytes(data)
    added_file = run("comms", "upgrades", "add", str(file), "--json")
    assert added_file.exit_code == 0, added_file.exception
    assert json.loads(added_file.stdout)["sha256"] == hashlib.sha256(data).hexdigest()
    assert "agent-2.wpk" in run("comms", "upgrades").stdout
    assert run("comms", "upgrades", "add", str(file), "--name", ".hidden").exit_code == 2
    assert run("comms", "upgrades", "rm", "agent-2.wpk").exit_code == 0
    assert run("comms", "upgrades", "rm", "agent-2.wpk").exit_code == 2
    assert run("comms", "agents", "rm", "reader").exit_code == 0


def test_tenants_do_not_see_each_other(at_box: CommsBox, run: Any) -> None:
    assert run("tenants", "create", "acme").exit_code == 0
    added(run, "theirs", "--tenant", "acme")
    assert run("comms", "agents", "show", "theirs").exit_code == 2
    assert "theirs" not in run("comms", "agents").stdout
    assert run("comms", "agents", "show", "theirs", "--tenant", "acme").exit_code == 0
    assert run("comms", "send", "theirs", "restart").exit_code == 2


def test_signing_keys(at_box: CommsBox, run: Any) -> None:
    """After a rotation older tokens are good until their key is removed."""
    agent = added(run, "signed")
    token = at_box.login(agent["uuid"], agent["key"])
    keys = json.loads(run("comms", "keys", "rotate", "--json").stdout)
    assert [each["signs"] for each in keys][-1]
    assert at_box.call("GET", "/configuration", token=token)
    for each in keys[:-1]:
        assert run("comms", "keys", "rm", each["kid"]).exit_code == 0
    assert refused(lambda: at_box.call("GET", "/configuration", token=token)) in (401, 403)
    assert run("comms", "agents", "rm", "signed").exit_code == 0
