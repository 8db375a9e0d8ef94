"""``osqbox yara`` and ``osqbox tenants``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RULE = {"name": "r", "tenant": "default", "public": True, "bytes": 5, "updated_at": "2026-01-01T00:00:00Z"}
TENANT = {
    "name": "acme",
    "open": False,
    "approve": True,
    "client_cert": False,
    "blank_keys": False,
    "reenroll": "replace",
}
SECRET = {"id": 3, "tenant": "acme", "label": "l", "tags": ["a"], "expires_at": None, "uses_left": None, "used": 0}


def test_yara(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """The rule travels as text."""
    api.on("GET", "yara", [RULE])
    api.on("PUT", "yara/r", RULE)
    api.on("DELETE", "yara/r", {"deleted": "r"})
    file = tmp_path / "r.yar"
    file.write_text("rule ü { condition: true }")
    assert json.loads(run("yara", "--json").stdout) == [RULE]
    assert "yes" in run("yara").stdout
    assert run("yara", "put", "r", str(file), "--tenant", "t", "--public").exit_code == 0
    asked = api.seen("PUT", "yara/r")
    assert (asked.body, asked.query) == ("rule ü { condition: true }", {"tenant": "t", "public": "1"})
    api.asked.clear()
    run("yara", "put", "r", "-", input="rule b {}")
    assert (api.seen("PUT", "yara/r").body, api.seen("PUT", "yara/r").query["public"]) == ("rule b {}", "0")
    file.write_bytes(b"\xff")
    assert run("yara", "put", "r", str(file)).exit_code == 3
    assert run("yara", "delete", "r").exit_code == 0
    assert api.seen("DELETE", "yara/r").query == {"tenant": "default"}


def test_a_new_tenant_prints_its_secret_only(api: Any, box: Any, run: Any) -> None:
    """``SECRET=$(osqbox tenants create acme)`` works."""
    api.on("POST", "tenants", {**TENANT, "enroll_secret": "s3"}, status=201)
    assert run("tenants", "create", "acme", "--approve", "--no-open").stdout == "s3\n"
    assert api.seen("POST", "tenants").body == {"name": "acme", "approve": True, "open": False}
    assert json.loads(run("tenants", "create", "acme", "--json").stdout)["enroll_secret"] == "s3"


def test_tenants(api: Any, box: Any, run: Any) -> None:
    api.on("GET", "tenants", [TENANT, {**TENANT, "name": "old", "closed_at": "2026-01-01T00:00:00Z"}])
    api.on("GET", "tenants/acme", TENANT)
    api.on("PATCH", "tenants/acme", TENANT)
    api.on("DELETE", "tenants/acme", {"closed": "acme"})
    rows = [line.split() for line in run("tenants").stdout.splitlines()]
    assert rows[1:] == [["acme", "active", "approve", "replace"], ["old", "closed", "approve", "replace"]]
    assert "reenroll" in run("tenants", "show", "acme").stdout
    assert run("tenants", "set", "acme", "--reenroll", "refuse", "--no-approve").exit_code == 0
    assert api.seen("PATCH", "tenants/acme").body == {"reenroll": "refuse", "approve": False}
    assert run("tenants", "set", "acme").exit_code == 2
    assert run("tenants", "close", "acme").exit_code == 0


def test_secrets(api: Any, box: Any, run: Any) -> None:
    api.on("GET", "tenants/acme/secrets", [SECRET])
    api.on("POST", "tenants/acme/secrets", {**SECRET, "enroll_secret": "s4"}, status=201)
    api.on("DELETE", "tenants/acme/secrets/3", {"deleted": 3})
    assert run("tenants", "secrets", "acme").stdout.splitlines()[1].split() == ["3", "l", "a", "never", "any", "0"]
    words = ["--label", "l", "--tag", "a", "--tag", "b", "--expires-in", "60", "--uses", "2", "--secret", "x"]
    assert run("tenants", "secret-add", "acme", *words).stdout == "s4\n"
    body = {"label": "l", "tags": ["a", "b"], "expires_in_s": 60.0, "uses": 2, "secret": "x"}
    assert api.seen("POST", "tenants/acme/secrets").body == body
    assert run("tenants", "secret-remove", "acme", "3").exit_code == 0
