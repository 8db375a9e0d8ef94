"""``osqbox query``: what is asked, what is printed, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SUMMARY = {
    "targets": 2,
    "answered": 2,
    "failed": 0,
    "expired": 0,
    "cancelled": 0,
    "open": 0,
    "first_ms": 1.5,
    "last_ms": 9.0,
}
CAMPAIGN = {"id": "c1", "sql": "select 1", "created_at": "2026-01-01T00:00:00Z", "summary": SUMMARY}


def account(node: str, rows: list[dict[str, str]], status: str = "answered", message: str = "") -> dict[str, Any]:
    extra = {"osquery_status": 0, "stats": {}, "ended_at": "2026-01-01T00:00:00Z"}
    return {"node": node, "hostname": f"host-{node}", "status": status, "rows": rows, "message": message, **extra}


def script(api: Any, accounts: list[dict[str, Any]], **summary: Any) -> None:
    api.on("POST", "campaigns", {**CAMPAIGN, "summary": {**SUMMARY, "answered": 0}}, status=201)
    api.streams("campaigns/c1/stream", [*accounts, {"summary": {**SUMMARY, **summary}}])


def test_json_lines_have_exactly_these_members(api: Any, box: Any, run: Any) -> None:
    """Other programs read this; a change is a changelog entry."""
    script(api, [account("a", [{"x": "1"}]), account("b", [])])
    result = run("query", "--json", "select 1")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"node": "a", "hostname": "host-a", "status": "answered", "rows": [{"x": "1"}], "message": ""},
        {"node": "b", "hostname": "host-b", "status": "answered", "rows": [], "message": ""},
        {
            "summary": {
                "targets": 2,
                "answered": 2,
                "failed": 0,
                "expired": 0,
                "cancelled": 0,
                "first_ms": 1.5,
                "last_ms": 9.0,
            }
        },
    ]
    assert (result.exit_code, result.stderr) == (0, "")


def test_rows_of_all_hosts_in_one_table(api: Any, box: Any, run: Any) -> None:
    """The summary is for the person, on stderr."""
    script(api, [account("a", [{"x": "1", "y": "\x1b"}]), account("b", [{"x": "22", "y": "3"}])])
    result = run("query", "select 1")
    assert result.stdout.splitlines() == ["hostname  x  y", "host-a    1  \\x1b", "host-b    22  3"]
    assert result.stderr == "2 rows; 2 of 2 nodes answered, first after 2 ms, last after 9 ms\n"


def test_failures_are_grouped_and_exit_with_1(api: Any, box: Any, run: Any) -> None:
    """A thousand hosts with one cause are one line."""
    failed = [account(f"n{i}", [], "failed", "no such table: x\x1b") for i in range(7)]
    script(api, [*failed, account("z", [], "expired", "late")], targets=8, answered=0, failed=7, expired=1)
    result = run("query", "select 1")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "failed: host-n0, host-n1, host-n2, host-n3, host-n4 and 2 more: no such table: x\\x1b"
    assert lines[1:] == [
        "expired: host-z: late",
        "0 rows; 0 of 8 nodes answered, 7 failed, 1 expired, first after 2 ms, last after 9 ms",
    ]


def test_what_is_asked(api: Any, box: Any, run: Any) -> None:
    """Only what was given is sent; unknown members are refused by the API."""
    script(api, [])
    words = ["--node", "a", "--node", "b", "--tag", "t", "--platform", "linux", "--tenant", "acme", "--all"]
    run("query", *words, "--timeout", "5", "--accelerate", "30", "--discovery", "select 2", "-", input="select 1\n")
    assert api.seen("POST", "campaigns").body == {
        "sql": "select 1\n",
        "nodes": ["a", "b"],
        "tags": ["t"],
        "platforms": ["linux"],
        "tenant": "acme",
        "all": True,
        "timeout_s": 5.0,
        "accelerate": 30,
        "discovery": "select 2",
    }
    api.asked.clear()
    run("query", "select 1")
    assert api.seen("POST", "campaigns").body == {"sql": "select 1", "timeout_s": 60.0}


def test_nobody_to_ask(api: Any, box: Any, run: Any) -> None:
    """Exit 1 and clear words, a summary line for programs."""
    nobody = {**SUMMARY, "targets": 0, "answered": 0, "first_ms": None, "last_ms": None}
    api.on("POST", "campaigns", {**CAMPAIGN, "summary": nobody}, status=201)
    result = run("query", "--json", "select 1")
    assert json.loads(result.stdout)["summary"]["targets"] == 0
    assert (result.exit_code, result.exception.hint) == (1, "osqbox query --all SQL, or osqbox nodes")
    assert run("query", "--tag", "x", "select 1").exception.hint == "osqbox nodes"


def test_no_wait(api: Any, box: Any, run: Any) -> None:
    """The id on stdout, to be used by the next command."""
    script(api, [])
    assert run("query", "--no-wait", "select 1").stdout == "c1\n"
    assert json.loads(run("query", "--no-wait", "--json", "select 1").stdout)["id"] == "c1"


def test_an_answer_cut_short_is_an_error(api: Any, box: Any, run: Any) -> None:
    """A box that stops in between must not look like a complete answer."""
    script(api, [])
    api.streams("campaigns/c1/stream", [account("a", [{"x": "1"}])])
    result = run("query", "select 1")
    assert (result.exit_code, result.exception.hint) == (1, "osqbox query --show c1")


def test_list_and_show(api: Any, box: Any, run: Any) -> None:
    """What was asked before, and what came, also from targets still open."""
    api.on("GET", "campaigns", [{**CAMPAIGN, "sql": "select\n  1"}])
    assert "select 1" in run("query", "--list").stdout
    waiting = {"node": "b", "hostname": "host-b", "status": "sent", "offers": 1}
    api.on("GET", "campaigns/latest", {**CAMPAIGN, "open": [waiting], "summary": {**SUMMARY, "answered": 1, "open": 1}})
    api.on("GET", "campaigns/c1/results", [account("a", [{"x": "1"}])])
    result = run("query", "--show", "latest")
    assert result.stdout.splitlines() == ["hostname  x", "host-a    1"]
    assert "sent: host-b: not answered yet" in result.stderr
    lines = [json.loads(line) for line in run("query", "--show", "latest", "--json").stdout.splitlines()]
    assert [line.get("status") for line in lines] == ["answered", "sent", None]
    assert run("query", "--list", "--json").exit_code == 0


def test_one_thing_at_a_time(box: Any, run: Any) -> None:
    """SQL, --list and --show exclude each other."""
    for words in ([], ["--list", "--show", "x"], ["select 1", "--list"]):
        assert run("query", *words).exit_code == 2
    assert run("query", "--timeout", "0", "select 1").exit_code == 2


def test_ctrl_c_cancels_the_campaign(api: Any, box: Any, home: Path) -> None:
    """Hosts are not left with a query that nobody waits for; every target is still accounted for, exactly once."""
    cancelled = threading.Event()
    script(api, [])
    stream = api.routes["GET", "/api/v1/campaigns/c1/stream"]

    class UntilCancelled(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield account("a", [{"x": "1"}])
            assert cancelled.wait(20)
            yield account("b", [], "cancelled", "cancelled by the operator")
            yield {"summary": {**SUMMARY, "answered": 1, "cancelled": 1}}

    def cancel(_: Any) -> Any:
        cancelled.set()
        return type(stream)(200, CAMPAIGN)

    stream.lines = UntilCancelled()
    api.calls("POST", "campaigns/c1/cancel", cancel)
    with subprocess.Popen(
        [sys.executable, "-m", "osqbox", "query", "--json", "select 1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OSQBOX_HOME": str(home)},
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            cancelled.set()
    lines = [json.loads(line) for line in (first, *out.splitlines())]
    assert [line.get("node") for line in lines] == ["a", "b", None]
    assert lines[2]["summary"]["cancelled"] == 1
    assert (process.returncode, err.strip()) == (130, "cancelling ...")
