"""``osqbox comms`` against a scripted box."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

AGENT = {
    "uuid": "11111111-2222-4333-8444-555555555555",
    "tenant": "default",
    "name": "web\x1b[2J",
    "type": "Endpoint",
    "version": "1.0",
    "groups": ["web", "default"],
    "host": {"hostname": "web.example"},
    "status": "active",
    "key_version": 1,
    "created_at": "2026-01-01T00:00:00.000000Z",
    "last_login_at": None,
    "last_seen_at": "2026-01-01T00:00:00.000000Z",
}
COMMAND = {
    "id": "c1",
    "seq": 7,
    "agent": AGENT["uuid"],
    "tenant": "default",
    "request_id": "r1",
    "action": {"name": "restart", "version": "", "args": {"module": "x"}},
    "status": "success",
    "created_at": "2026-01-01T00:00:00.000000Z",
    "result": {"code": 0, "message": "done\x07", "data": None},
}


# agents


def test_agents(api: Any, box: Any, run: Any) -> None:
    """A table without what steers a terminal, or the API's own array."""
    api.on("GET", "agents", [AGENT])
    result = run("comms", "agents", "--group", "web", "--text", "w", "--tenant", "acme")
    asked = api.seen("GET", "agents")
    assert asked.query == {"limit": "1000", "tenant": "acme", "group": "web", "text": "w"}
    assert "web\\x1b[2J" in result.stdout
    assert "\x1b" not in result.stdout
    assert "web, default" in result.stdout
    assert "web.example" in result.stdout
    assert json.loads(run("comms", "agents", "--json").stdout) == [AGENT]


def test_agents_are_read_page_by_page(api: Any, box: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, or as many as were asked for."""
    monkeypatch.setattr("osqbox.cli.comms_agents.PAGE_AGENTS", 2)
    uuids = [f"u{number}" for number in range(5)]

    def page(asked: Any) -> Any:
        start = uuids.index(asked.query["after"]) + 1 if "after" in asked.query else 0
        found = [{**AGENT, "uuid": uuid} for uuid in uuids[start : start + int(asked.query["limit"])]]
        return type(api.routes["GET", "/x"])(200, found)

    api.on("GET", "/x")
    api.calls("GET", "agents", page)
    assert [each["uuid"] for each in json.loads(run("comms", "agents", "--json").stdout)] == uuids
    assert [each["uuid"] for each in json.loads(run("comms", "agents", "--limit", "3", "--json").stdout)] == uuids[:3]


def test_no_agents_says_how_to_add_one(api: Any, box: Any, run: Any) -> None:
    api.on("GET", "agents", [])
    result = run("comms", "agents")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "osqbox comms agents add NAME" in result.stderr
    assert "no agents fit" in run("comms", "agents", "--group", "x").stderr


def test_an_added_agent_shows_its_key_once(api: Any, box: Any, run: Any) -> None:
    api.on("POST", "agents", {**AGENT, "key": "K" * 32}, 201)
    result = run("comms", "agents", "add", "web", "--group", "a", "--group", "b")
    assert api.seen("POST", "agents").body == {"name": "web", "groups": ["a", "b"]}
    assert result.stdout == f"uuid  {AGENT['uuid']}\nkey   {'K' * 32}\n"
    assert json.loads(run("comms", "agents", "add", "web", "--json").stdout)["key"] == "K" * 32


def test_changes_of_agents(api: Any, box: Any, run: Any) -> None:
    """Groups, keys, revocation, deletion; names are quoted."""
    api.on("PATCH", "agents/a%2Fb", AGENT)
    api.on("POST", "agents/a%2Fb/key", {"uuid": "u", "key": "N" * 32})
    api.on("DELETE", "agents/a%2Fb", {"deleted": "u"})
    assert run("comms", "agents", "groups", "a/b", "web", "default").stderr == "a/b: web, default\n"
    assert run("comms", "agents", "key", "a/b").stdout == "N" * 32 + "\n"
    assert run("comms", "agents", "revoke", "a/b").stderr == "a/b: revoked\n"
    assert run("comms", "agents", "allow", "a/b").stderr == "a/b: allowed\n"
    assert run("comms", "agents", "rm", "a/b").exit_code == 0
    bodies = [each.body for each in api.asked if each.method == "PATCH"]
    assert bodies == [{"groups": ["web", "default"]}, {"status": "revoked"}, {"status": "active"}]


def test_an_unknown_agent_is_told(api: Any, box: Any, run: Any) -> None:
    """In the box's words, with its exit code."""
    api.on("GET", "agents/nobody", {"error": "Agent 'nobody' does not exist", "reason": "not_found"}, 404)
    result = run("comms", "agents", "show", "nobody")
    assert (result.exit_code, str(result.exception)) == (2, "Agent 'nobody' does not exist")


def test_keys(api: Any, box: Any, run: Any) -> None:
    key = {"kid": "k1", "algorithm": "RS256", "file": "1.key", "made_at": "2026-01-01T00:00:00Z", "signs": True}
    api.on("GET", "comms/keys", [key])
    api.on("POST", "comms/keys", [key], 201)
    api.on("DELETE", "comms/keys/k1", {"deleted": "k1"})
    assert "k1" in run("comms", "keys").stdout
    assert json.loads(run("comms", "keys", "rotate", "--json").stdout) == [key]
    assert run("comms", "keys", "rm", "k1").stderr == "k1: removed\n"


# commands


def test_send(api: Any, box: Any, run: Any) -> None:
    """Agents by any name, arguments as text or JSON; the ids alone on stdout."""
    api.on("GET", "agents/web-1", AGENT)
    api.on("POST", "commands", {"request_id": "r1", "count": 1, "commands": [COMMAND]}, 201)
    result = run("comms", "send", "web-1", "upgrade", "file_name=a=b.wpk", "n:=3", "--expires-in", "60")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "c1\n", "1 command published\n")
    assert api.seen("POST", "commands").body == {
        "action": {"name": "upgrade", "version": "", "args": {"file_name": "a=b.wpk", "n": 3}},
        "tenant": "default",
        "agents": [AGENT["uuid"]],
        "groups": [],
        "expires_in": 60.0,
    }


def test_send_to_groups_and_everyone(api: Any, box: Any, run: Any) -> None:
    api.on("POST", "commands", {"request_id": "r1", "count": 9, "commands": [COMMAND]}, 201)
    run("comms", "send", "--group", "a", "--group", "b", "restart")
    result = run("comms", "send", "--all", "restart", "--tenant", "acme")
    assert "osqbox comms commands --request r1" in result.stderr
    first, second = (each.body for each in api.asked)
    assert (first["agents"], first["groups"]) == ([], ["a", "b"])
    assert (second["all"], second["tenant"], "agents" in second) == (True, "acme", False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("restart",), "expected agents, --group or --all"),
        (("a=b",), "expected [AGENT...] COMMAND"),
        (("web", "restart", "a=b", "c"), "expected [AGENT...] COMMAND"),
        (("web", "restart", "=b"), "expected KEY=VALUE"),
        (("web", "restart", "a:={"), "expected JSON behind a:="),
        (("--all", "web", "restart"), "got both"),
    ],
)
def test_words_that_make_no_command(api: Any, box: Any, run: Any, words: tuple[str, ...], said: str) -> None:
    """Told before anything is asked of the box."""
    result = run("comms", "send", *words)
    assert (result.exit_code, said in str(result.exception), api.asked) == (2, True, [])


@pytest.mark.parametrize(("status", "code"), [("success", 0), ("failed", 1), ("expired", 1), ("cancelled", 1)])
def test_send_and_wait(api: Any, box: Any, run: Any, status: str, code: int) -> None:
    """Until the last has ended; the exit code says whether all succeeded."""
    api.on("POST", "commands", {"request_id": "r1", "count": 1, "commands": [COMMAND]}, 201)
    statuses = ["pending", "sent", status]

    def look(asked: Any) -> Any:
        assert asked.query["request_id"] == "r1"
        return type(api.routes["POST", "/api/v1/commands"])(200, [{**COMMAND, "status": statuses.pop(0)}])

    api.calls("GET", "commands", look)
    result = run("comms", "send", "--all", "restart", "--wait")
    assert (result.exit_code, statuses) == (code, [])
    assert "0 done\\x07" in result.stdout
    assert f"1 {status}" in result.stderr


def test_waiting_ends(api: Any, box: Any, run: Any) -> None:
    api.on("POST", "commands", {"request_id": "r1", "count": 1, "commands": [COMMAND]}, 201)
    api.on("GET", "commands", [{**COMMAND, "status": "pending", "result": None}])
    result = run("comms", "send", "--all", "restart", "--wait", "--timeout", "0.1")
    assert (result.exit_code, str(result.exception)) == (5, "1 command not ended within 0.1 s")


def test_commands(api: Any, box: Any, run: Any) -> None:
    api.on("GET", "agents/web-1", AGENT)
    api.on("GET", "commands", [COMMAND])
    api.on("GET", "commands/c1", COMMAND)
    api.on("DELETE", "commands/c1", COMMAND)
    assert "restart" in run("comms", "commands", "--agent", "web-1", "--status", "success").stdout
    assert api.seen("GET", "commands").query == {
        "limit": "100", "agent": AGENT["uuid"], "tenant": "default", "status": "success",
    }  # fmt: skip
    assert json.loads(run("comms", "commands", "show", "c1", "--json").stdout) == COMMAND
    assert run("comms", "commands", "cancel", "c1").stderr == "c1: cancelled\n"


def test_known_commands(api: Any, box: Any, run: Any) -> None:
    known = {"name": "upgrade", "version": "", "description": "d", "required_args": ["file_name"]}
    api.on("GET", "known-commands", [known])
    api.on("PUT", "known-commands/x", {**known, "name": "x"})
    api.on("DELETE", "known-commands/x", {"removed": "x"})
    assert "file_name" in run("comms", "commands", "known").stdout
    assert run("comms", "commands", "known-add", "x", "--requires", "a", "--description", "d").exit_code == 0
    assert api.seen("PUT", "known-commands/x").body == {"version": "", "description": "d", "required_args": ["a"]}
    assert run("comms", "commands", "known-rm", "x").exit_code == 0


# configuration


def test_config(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """Text to the letter in both directions; a version that must be the current one."""
    text = "a: 1  # ünï\n\n"
    group = {"name": "web", "version": 2, "sha256": "ab" * 32, "changed_at": None, "changed_by": "operator"}
    shown = {**group, "configuration": text}
    api.on("GET", "groups", [group])
    api.on("GET", "groups/web", shown)
    api.on("GET", "groups/web/versions", [shown, {**shown, "version": 1, "configuration": "old\n"}])
    api.on("PUT", "groups/web", shown)
    api.on("DELETE", "groups/web", {"deleted": "web"})
    file = tmp_path / "web.yml"
    file.write_text(text)
    assert "abababababab" in run("comms", "config").stdout
    assert run("comms", "config", "show", "web").stdout == text
    assert run("comms", "config", "show", "web", "--version", "1").stdout == "old\n"
    assert run("comms", "config", "show", "web", "--version", "9").exit_code == 2
    assert run("comms", "config", "set", "web", str(file), "--expect", "1").stderr == "web: version 2\n"
    assert run("comms", "config", "set", "web", "-", input=text).exit_code == 0
    bodies = [each.body for each in api.asked if each.method == "PUT"]
    assert bodies == [{"configuration": text, "expected_version": 1}, {"configuration": text}]
    assert len(json.loads(run("comms", "config", "versions", "web", "--json").stdout)) == 2
    assert run("comms", "config", "rm", "web").stderr == "web: deleted\n"


def test_config_that_is_no_text(api: Any, box: Any, run: Any) -> None:
    result = run("comms", "config", "set", "web", "-", input=b"a: \xff")
    assert (result.exit_code, api.asked) == (3, [])
    assert "expected UTF-8, got the byte 0xff" in str(result.exception)


# upgrades


def test_an_upgrade_file_is_sent_as_it_is_and_checked(
    api: Any, box: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "agent 2.wpk"
    data = b"text, as the scripted box wants it" * 100_000
    file.write_bytes(data)
    facts = {"name": "agent.wpk", "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    api.on("PUT", "upgrades/agent%202.wpk", facts)
    result = run("comms", "upgrades", "add", str(file))
    assert (result.exit_code, api.seen("PUT", "upgrades/agent%202.wpk").body) == (0, data.decode())
    api.on("PUT", "upgrades/x", {**facts, "sha256": "00"})
    assert "changed on its way" in str(run("comms", "upgrades", "add", str(file), "--name", "x").exception)
    assert run("comms", "upgrades", "add", str(tmp_path / "none")).exit_code == 3
    os.mkfifo(tmp_path / "pipe")  # to open one waits for its other end
    for what in (tmp_path, tmp_path / "pipe"):
        result = run("comms", "upgrades", "add", str(what))
        assert (result.exit_code, str(result.exception)) == (3, f"{what}: expected a regular file")


def test_upgrades(api: Any, box: Any, run: Any) -> None:
    facts = {"name": "a.wpk", "size_bytes": 3, "sha256": "ab", "added_at": "2026-01-01T00:00:00Z", "added_by": "x"}
    api.on("GET", "upgrades", [facts])
    api.on("DELETE", "upgrades/a.wpk", {"deleted": "a.wpk"})
    assert "a.wpk" in run("comms", "upgrades").stdout
    assert run("comms", "upgrades", "rm", "a.wpk").stderr == "a.wpk: deleted\n"


# events


EVENT = {
    "number": 3,
    "id": "e1",
    "tenant": "default",
    "agent": AGENT["uuid"],
    "module": "inventory",
    "collector": "ports",
    "received_at": "2026-01-01T00:00:00.000000Z",
    "data": {"port": 22, "name": "\x1b]0;x\x07"},
}


def test_events(api: Any, box: Any, run: Any) -> None:
    """The newest, the oldest of them first; what an agent said cannot steer a terminal."""
    api.on("GET", "agents/web-1", AGENT)
    api.streams("events.ndjson", [EVENT, {**EVENT, "collector": "", "data": "x" * 500}])
    result = run("comms", "events", "--agent", "web-1", "--search", "ssh port", "--module", "inventory")
    assert api.seen("GET", "events.ndjson").query == {
        "agent": AGENT["uuid"], "tenant": "default", "text": "ssh port", "module": "inventory", "limit": "20",
    }  # fmt: skip
    first, second = result.stdout.splitlines()
    assert first.startswith(f"2026-01-01 00:00:00  {AGENT['uuid']}  inventory/ports  ")
    assert "\x1b" not in result.stdout
    assert second.endswith("x...")
    lines = run("comms", "events", "--json").stdout.splitlines()
    assert json.loads(lines[0]) == EVENT


def test_no_events_are_told(api: Any, box: Any, run: Any) -> None:
    api.streams("events.ndjson", [])
    result = run("comms", "events")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no events yet\n")
    assert run("comms", "events", "--search", "x").stderr == "no events fit\n"
    assert run("comms", "events", "--json").stderr == ""


def test_following_events_ends_with_the_box(api: Any, box: Any, run: Any) -> None:
    api.streams("events.ndjson", [EVENT])
    result = run("comms", "events", "-f", "--after", "2")
    assert api.seen("GET", "events.ndjson").query == {"tenant": "default", "after": "2", "follow": "1"}
    assert "the box has stopped" in result.stderr


def test_states(api: Any, box: Any, run: Any) -> None:
    state = {"index": "wazuh-states-x", "id": "s1", "agent": "a", "tenant": "default", "version": 2}
    found = {"states": [{**state, "changed_at": "2026-01-01T00:00:00Z", "data": {"a": 1}}], "next": "c2"}
    api.on("GET", "states", found)
    result = run("comms", "states", "--index", "wazuh-states-x", "--search", "a", "--limit", "1")
    assert api.seen("GET", "states").query == {
        "tenant": "default", "index": "wazuh-states-x", "text": "a", "limit": "1",
    }  # fmt: skip
    assert "s1" in result.stdout
    assert "there are more: --after c2" in result.stderr
    assert json.loads(run("comms", "states", "--json").stdout) == found
    api.on("GET", "states", {"states": [], "next": None})
    assert "no states yet" in run("comms", "states").stderr
