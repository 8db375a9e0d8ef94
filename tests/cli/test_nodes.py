"""``osqbox nodes`` against a scripted box."""

from __future__ import annotations

import json
from typing import Any

NODE = {
    "id": "8617d485e6b6",
    "tenant": "default",
    "hostname": "web\x1b[2J",
    "host_identifier": "web",
    "platform": "debian",
    "status": "active",
    "tags": ["web", "db"],
    "osquery_version": "5.23.1",
    "last_seen_at": "2026-01-01T00:00:00.000000Z",
    "host_details": {"system_info": {"uuid": "U"}},
}


def test_json_is_the_array_of_the_api(api: Any, box: Any, run: Any) -> None:
    """Programs get exactly what the API says."""
    api.on("GET", "nodes", [NODE])
    result = run("nodes", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [NODE])


def test_the_bare_name_lists_with_options(api: Any, box: Any, run: Any) -> None:
    """``osqbox nodes --tag web`` is ``osqbox nodes list --tag web``."""
    api.on("GET", "nodes", [NODE])
    result = run("nodes", "--tag", "web", "--status", "active")
    asked = api.seen("GET", "nodes")
    assert asked.query == {"tag": "web", "status": "active"}
    assert asked.authorization == "Bearer a-token-for-tests"
    assert "web\\x1b[2J" in result.stdout
    assert "\x1b" not in result.stdout
    assert "web, db" in result.stdout


def test_no_nodes_says_how_to_enroll_one(api: Any, box: Any, run: Any) -> None:
    """On stderr, so that a pipe gets nothing."""
    api.on("GET", "nodes", [])
    result = run("nodes")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "osqbox flags" in result.stderr
    assert "no nodes fit" in run("nodes", "--tag", "x").stderr


def test_show(api: Any, box: Any, run: Any) -> None:
    """Facts first, then what the host said at its enrollment."""
    api.on("GET", "nodes/web%2F1", NODE)
    assert "system_info.uuid  U" in run("nodes", "show", "web/1").stdout
    assert json.loads(run("nodes", "show", "web/1", "--json").stdout) == NODE


def test_decisions(api: Any, box: Any, run: Any) -> None:
    """One request per node and verb."""
    for verb in ("approve", "reject", "reenroll"):
        for node in ("a", "b"):
            api.on("POST", f"nodes/{node}/{verb}", NODE)
        assert run("nodes", verb, "a", "b").exit_code == 0
        assert api.seen("POST", f"nodes/b/{verb}").body == {}
    api.on("DELETE", "nodes/a", {"deleted": "a"})
    assert "a: deleted" in run("nodes", "delete", "a").stderr


def test_tags_are_added_and_removed(api: Any, box: Any, run: Any) -> None:
    """The API takes the whole list, the verb only the change."""
    api.on("GET", "nodes/web", NODE)
    api.on("PATCH", f"nodes/{NODE['id']}", NODE)
    run("nodes", "tag", "web", "new", "db")
    assert api.seen("PATCH", f"nodes/{NODE['id']}").body == {"tags": ["web", "new", "db"]}
    api.asked.clear()
    run("nodes", "tag", "web", "db", "--remove")
    assert api.seen("PATCH", f"nodes/{NODE['id']}").body == {"tags": ["web"]}


def test_an_unknown_node(api: Any, box: Any, run: Any) -> None:
    """The API's words, exit code 2."""
    api.on("GET", "nodes/x", {"error": "no node called 'x'", "reason": "r", "hint": "osqbox nodes"}, status=404)
    result = run("nodes", "show", "x")
    assert (result.exit_code, str(result.exception)) == (2, "no node called 'x'")
