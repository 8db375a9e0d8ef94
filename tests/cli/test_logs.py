"""``osqbox logs``: lines for people and programs, and osquery's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AT = "2026-01-01T10:20:30.123456Z"


def entry(seq: int, line: dict[str, Any], log_type: str = "result") -> dict[str, Any]:
    return {"seq": seq, "tenant": "default", "node": "n1", "log_type": log_type, "received_at": AT, "line": line}


LINES = [
    entry(1, {"name": "procs", "hostIdentifier": "web", "columns": {"pid": "1", "cmd": "a\x1bb"}, "action": "added"}),
    entry(2, {"name": "up", "hostIdentifier": "web", "snapshot": [{"days": "0"}, {"days": "1"}], "action": "snapshot"}),
    entry(3, {"hostIdentifier": "web", "severity": 2, "filename": "x.cpp", "line": 7, "message": "no\nway"}, "status"),
    entry(4, {"name": "d", "hostIdentifier": "web", "diffResults": {"added": [{}, {}], "removed": []}}),
    entry(5, {"odd": True}),
]


def test_json_lines_are_those_of_the_api(api: Any, box: Any, run: Any) -> None:
    """Member for member."""
    api.streams("logs", LINES)
    result = run("logs", "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == LINES
    assert api.seen("GET", "logs").query == {"limit": "20"}


def test_lines_for_people(api: Any, box: Any, run: Any) -> None:
    """One line each, whatever the host wrote."""
    api.streams("logs", LINES)
    assert run("logs").stdout.splitlines() == [
        "2026-01-01 10:20:30  web  procs  added  pid=1 cmd=a\\x1bb",
        "2026-01-01 10:20:30  web  up  snapshot of 2 rows  days=0 ...",
        "2026-01-01 10:20:30  web  error  x.cpp:7  no\\nway",
        "2026-01-01 10:20:30  web  d  added 2, removed 0",
        '2026-01-01 10:20:30  n1      {"odd": true}',
    ]


def test_what_is_asked(api: Any, box: Any, run: Any) -> None:
    """After a seq all lines are wanted unless a limit says otherwise."""
    api.streams("logs", [])
    run("logs", "--type", "status", "--node", "n", "--tenant", "t", "--name", "q", "--search", "x y", "--after", "5")
    expected = {"type": "status", "node": "n", "tenant": "t", "name": "q", "search": "x y", "after": "5"}
    assert api.seen("GET", "logs").query == expected


def test_follow_goes_on_until_the_box_ends(api: Any, box: Any, run: Any) -> None:
    """Then it says why it ended."""
    api.streams("logs", LINES[:1])
    result = run("logs", "-f", "--json")
    assert api.seen("GET", "logs").query == {"limit": "20", "follow": "1"}
    assert (result.exit_code, result.stderr) == (0, "the box has stopped\n")


def test_export(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """Byte for byte, to stdout or a file."""
    lines = b'{"name":"a"}\n{"name":"b"}\n'
    api.on("GET", "logs/export", lines)
    assert run("logs", "export", "--type", "snapshot").stdout_bytes == lines
    assert api.seen("GET", "logs/export").query == {"type": "snapshot"}
    target = tmp_path / "results.log"
    assert run("logs", "export", "--out", str(target)).exit_code == 0
    assert target.read_bytes() == lines
    assert run("logs", "export", "--out", str(tmp_path / "no" / "x")).exit_code == 3
