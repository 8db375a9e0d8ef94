"""``osqbox config``: sources in and out, and checking files without a box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CONTENT = {"schedule": {"q": {"query": "SELECT 1", "interval": 60}}}


def version(number: int, *, current: bool, content: Any = CONTENT) -> dict[str, Any]:
    return {
        "name": "a",
        "origin": "api",
        "version": number,
        "target": {"tags": ["web"], "tenants": [], "platforms": [], "nodes": []},
        "priority": 0,
        "note": "why",
        "changed_at": "2026-01-01T00:00:00Z",
        "removed": False,
        "current": current,
        "content": content,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.conf"
    path.write_text("// a comment\n" + json.dumps({**CONTENT, "osqbox": {"priority": 3, "target": {"tags": ["db"]}}}))
    return path


def test_put_sends_what_the_file_says(api: Any, box: Any, run: Any, file: Path) -> None:
    """Comments are read as osquery reads them; the audience in the file counts."""
    api.on("PUT", "configs/a", {"name": "a", "version": 2, "problems": []})
    assert run("config", "put", "a", str(file)).exit_code == 0
    assert api.seen("PUT", "configs/a").body == {"content": CONTENT, "target": {"tags": ["db"]}, "priority": 3}


def test_options_beat_the_file(api: Any, box: Any, run: Any, file: Path) -> None:
    """Whoever types it means it."""
    api.on("PUT", "configs/a", {"name": "a", "version": 2, "problems": []})
    words = ["--tenant", "t", "--platform", "linux", "--node", "web-*", "--priority", "0", "--note", "n", "--force"]
    run("config", "put", "a", str(file), *words)
    asked = api.seen("PUT", "configs/a")
    target = {"tenants": ["t"], "platforms": ["linux"], "nodes": ["web-*"]}
    assert asked.body == {"content": CONTENT, "target": target, "priority": 0, "note": "n"}
    assert asked.query == {"force": "1"}


def test_put_from_stdin(api: Any, box: Any, run: Any) -> None:
    """JSON only: there is no name to tell YAML by."""
    api.on("PUT", "configs/a", {"name": "a", "version": 1, "problems": []})
    assert run("config", "put", "a", "-", input=json.dumps(CONTENT)).exit_code == 0
    assert api.seen("PUT", "configs/a").body == {"content": CONTENT}
    assert run("config", "put", "a", "-", input="{").exit_code == 3


def test_problems_of_a_put_are_told(api: Any, box: Any, run: Any, file: Path) -> None:
    """Warnings with the success, errors instead of it."""
    problem = {"path": "schedule.q", "severity": "warning", "message": "m\x1b"}
    api.on("PUT", "configs/a", {"name": "a", "version": 2, "problems": [problem]})
    assert run("config", "put", "a", str(file)).stderr == "a: version 2\nwarning: schedule.q: m\\x1b\n"
    api.on("PUT", "configs/a", {"error": "refused", "reason": "r", "hint": None, "problems": [problem]}, status=400)
    result = run("config", "put", "a", str(file))
    assert (result.exit_code, str(result.exception).split("\n")[0]) == (2, "refused")


def test_reading_verbs(api: Any, box: Any, run: Any) -> None:
    """The current content, an old one, the list, the versions."""
    old = {"schedule": {}}
    versions = [version(2, current=True), version(1, current=False, content=old)]
    api.on("GET", "configs", [version(2, current=True)])
    api.on("GET", "configs/a", versions)
    assert "tags web" in run("config").stdout
    assert json.loads(run("config", "show", "a").stdout) == CONTENT
    assert json.loads(run("config", "show", "a", "--version", "1").stdout) == old
    assert json.loads(run("config", "show", "a", "--json").stdout) == versions[0]
    assert run("config", "show", "a", "--version", "9").exit_code == 2
    assert [line.split()[0] for line in run("config", "versions", "a").stdout.splitlines()] == ["VERSION", "2", "1"]


def test_changing_verbs(api: Any, box: Any, run: Any) -> None:
    """Delete and roll back."""
    api.on("DELETE", "configs/a", {"deleted": "a"})
    api.on("POST", "configs/a/rollback", {"name": "a", "version": 3})
    assert run("config", "delete", "a").exit_code == 0
    run("config", "rollback", "a")
    assert api.seen("POST", "configs/a/rollback").body == {}
    api.asked.clear()
    assert json.loads(run("config", "rollback", "a", "--to", "1", "--json").stdout) == {"name": "a", "version": 3}
    assert api.seen("POST", "configs/a/rollback").body == {"to": 1}


def test_what_a_node_gets(api: Any, box: Any, run: Any) -> None:
    """The config itself, and why it is so."""
    lost = {"source": "base", "version": 1, "value": 60}
    part = {"key": "schedule.q.interval", "source": "a", "version": 2, "value": 10, "overrode": [lost]}
    api.on("GET", "nodes/web/config", {"config": CONTENT, "explain": [part], "notes": []})
    assert json.loads(run("config", "get", "web").stdout) == CONTENT
    assert json.loads(run("config", "explain", "web", "--json").stdout) == [part]
    assert run("config", "explain", "web").stdout.splitlines()[1].split() == [
        "schedule.q.interval",
        "10",
        "a",
        "2",
        "base",
    ]


def test_validate_needs_no_box(run: Any, file: Path, tmp_path: Path) -> None:
    """Exit 3 for an error anywhere, with the place."""
    bad = tmp_path / "bad.conf"
    bad.write_text('{"schedule": {"q": {"query": "SELECT * FROM nope", "interval": 60}}}')
    broken = tmp_path / "broken.conf"
    broken.write_text("{")
    assert (run("config", "validate", str(file)).stdout, run("config", "validate", str(file)).exit_code) == (
        f"{file}: ok\n",
        0,
    )
    result = run("config", "validate", "--json", str(file), str(bad), str(broken))
    problems = json.loads(result.stdout)
    assert result.exit_code == 3
    assert [set(problem) for problem in problems] == [{"file", "path", "severity", "message"}] * 2
    assert [(problem["file"], problem["path"]) for problem in problems] == [
        (str(bad), "schedule.q.query"),
        (str(broken), ""),
    ]
    assert "nope" in problems[0]["message"]


def test_a_warning_is_not_an_error(run: Any, tmp_path: Path) -> None:
    """Exit 0."""
    file = tmp_path / "a.conf"
    file.write_text('{"schedul": {}}')
    result = run("config", "validate", str(file))
    assert result.exit_code == 0
    assert "warning" in result.stdout
