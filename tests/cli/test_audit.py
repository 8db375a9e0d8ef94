"""``osqbox audit``, and the one-time tokens of ``osqbox certs``."""

from __future__ import annotations

import json
from typing import Any

import pytest

AT = "2026-01-01T10:20:30.123456Z"


def row(seq: int, **facts: Any) -> dict[str, Any]:
    usual = {"tenant": "default", "actor": "default/alice", "serial": "ff", "address": "::1", "action": "job.run",
             "subject": "j1", "result": "ok", "data": {}, "chain": "0" * 64}  # fmt: skip
    return {"seq": seq, "at": AT, **usual, **facts}


ROWS = [
    row(1, data={"argv": ["sh", "-c", "a\x1b[2J"], "cwd": None, "run_as": "www-data"}),
    row(2, actor="", serial=None, action="login.issue", subject="", result="token_refused"),
    row(3, actor="operator", serial=None, address="", action="shell.open", subject="s1"),
]


def test_rows_for_people(api: Any, box: Any, run: Any) -> None:
    """One line each; nothing an argument says can steer the terminal."""
    api.streams("audit", ROWS)
    argv = '["sh", "-c", "a\\u001b[2J"]'
    assert run("audit").stdout.splitlines() == [
        f"2026-01-01 10:20:30  default/alice  job.run  j1  ok  serial ff  from ::1  argv={argv} run_as=www-data",
        "2026-01-01 10:20:30  nobody  login.issue  token_refused  from ::1",
        "2026-01-01 10:20:30  operator  shell.open  s1  ok",
    ]
    assert api.seen("GET", "audit").query == {"limit": "50"}


def test_json_lines_are_those_of_the_api(api: Any, box: Any, run: Any) -> None:
    """Member for member, and with the filters that were asked for."""
    api.streams("audit", ROWS)
    result = run("audit", "--json", "-f", "--action", "job", "--actor", "default/alice", "--subject", "j1")
    assert [json.loads(line) for line in result.stdout.splitlines()] == ROWS
    expected = {"limit": "50", "follow": "1", "action": "job", "actor": "default/alice", "subject": "j1"}
    assert api.seen("GET", "audit").query == expected
    assert result.stderr == "the box has stopped\n"


def test_after_a_row_all_are_wanted(api: Any, box: Any, run: Any) -> None:
    """Unless a limit says otherwise."""
    api.streams("audit", [])
    run("audit", "--after", "7")
    assert api.seen("GET", "audit").query == {"after": "7"}


def test_an_unbroken_chain_is_told_with_its_end(api: Any, box: Any, run: Any) -> None:
    """So that it can be noted elsewhere."""
    api.on("GET", "audit/verify", {"rows": 3, "broken_at": None, "last_seq": 5, "chain": "ab"})
    assert run("audit", "--verify").stdout == "3 rows unbroken up to 5, chain ab\n"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_broken_chain_is_a_failed_verdict(api: Any, box: Any, run: Any, words: list[str]) -> None:
    """Exit code 6, and where to look."""
    verdict = {"rows": 3, "broken_at": 4, "last_seq": 5, "chain": "ab"}
    api.on("GET", "audit/verify", verdict)
    result = run("audit", "--verify", *words)
    assert result.exit_code == 6
    assert "broken at row 4" in str(result.exception)
    assert not words or json.loads(result.stdout) == verdict


def test_verify_takes_no_filters(api: Any, box: Any, run: Any) -> None:
    """It walks the whole chain."""
    assert run("audit", "--verify", "--actor", "operator").exit_code == 2


def test_a_token_is_printed_alone(api: Any, box: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a script to take; packed with where to bring it, which the test of `cmdctl login` unpacks."""
    monkeypatch.setattr("osqbox.cli.jobs_login.login_token", lambda ready, secret: f"packed {secret}")
    api.on("POST", "certificates/tokens", {"token": "t0ken", "id": "1"}, 201)
    words = ("--role", "viewer", "--principal", "www-data", "--hours", "2", "--ttl", "5")
    assert run("certs", "token", "alice", *words).stdout == "packed t0ken\n"
    assert api.seen("POST", "certificates/tokens").body == {
        "name": "alice", "tenant": "default", "roles": ["viewer"], "principals": ["www-data"],
        "valid_s": 7200, "ttl_s": 300,
    }  # fmt: skip


def test_days_and_hours_are_one_choice(api: Any, box: Any, run: Any) -> None:
    """Both at once is a mistake."""
    assert run("certs", "token", "alice", "--days", "1", "--hours", "1").exit_code == 2


def test_a_client_certificate_of_hours(run: Any, tmp_path: Any) -> None:
    """``certs client --hours`` prints the paths, and the certificate ends when it says."""
    import time

    from cryptography import x509

    from osqbox.certs import ensure_identity

    ensure_identity(tmp_path / "certs", now=time.time())
    where = ("--certs", str(tmp_path / "certs"), "--out", str(tmp_path / "out"))
    result = run("certs", "client", "alice", "--hours", "8", "--role", "viewer", *where, "--json")
    paths = json.loads(result.stdout)
    assert sorted(paths) == ["ca", "cert", "key"]
    cert = x509.load_pem_x509_certificate((tmp_path / "out" / "alice.pem").read_bytes())
    assert cert.not_valid_after_utc.timestamp() == pytest.approx(time.time() + 8 * 3600, abs=60)
    assert run("certs", "client", "alice", "--days", "0", *where).exit_code == 2
