"""``osqbox carves``: asking for files and saving what came."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

ARCHIVE = b"an archive" * 1000
CARVE = {
    "id": "s1/../x",
    "tenant": "default",
    "node": "n1",
    "hostname": "../../etc/ü",
    "carve_id": "g",
    "request_id": "r",
    "block_count": 2,
    "block_size": 8192,
    "carve_size": len(ARCHIVE),
    "received_blocks": 2,
    "status": "complete",
    "sha256": hashlib.sha256(ARCHIVE).hexdigest(),
    "compressed": True,
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def serve(api: Any, archive: bytes = ARCHIVE) -> None:
    api.on("GET", "carves/latest", CARVE)
    api.on("GET", "carves/s1%2F..%2Fx/archive", archive)


def test_list_show_members_delete(api: Any, box: Any, run: Any) -> None:
    api.on("GET", "carves", [CARVE])
    api.on("GET", "carves/latest", CARVE)
    member = {"name": "a\x1b", "type": "file", "size": 5, "mode": 0o644, "mtime": "2026-01-01T00:00:00Z"}
    api.on("GET", "carves/latest/members", [member])
    api.on("DELETE", "carves/latest", {"deleted": "x"})
    assert "2/2" in run("carves").stdout
    assert json.loads(run("carves", "--json").stdout) == [CARVE]
    assert json.loads(run("carves", "show", "latest", "--json").stdout) == CARVE
    assert run("carves", "members", "latest").stdout.splitlines()[1].split() == [
        "file",
        "644",
        "5",
        "2026-01-01T00:00:00",
        "a\\x1b",
    ]
    assert run("carves", "delete", "latest").exit_code == 0


def test_download_makes_a_safe_name(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """What a host calls itself is no path."""
    serve(api)
    result = run("carves", "download", "latest")
    name = "carve-______etc__-s1____x.tar.zst"
    assert result.stdout == f"{name}\n"
    assert (tmp_path / name).read_bytes() == ARCHIVE
    again = run("carves", "download", "latest")
    assert (again.exit_code, again.exception.hint) == (3, "osqbox carves download latest --out FILE")


def test_download_elsewhere(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    serve(api)
    assert run("carves", "download", "latest", "--out", "-").stdout_bytes == ARCHIVE
    assert run("carves", "download", "latest", "--out", "x.tar").exit_code == 0
    assert (tmp_path / "x.tar").read_bytes() == ARCHIVE
    assert run("carves", "download", "latest", "--out", "no/x.tar").exit_code == 3


def test_a_changed_archive_does_not_stay(api: Any, box: Any, run: Any, tmp_path: Path) -> None:
    """Its SHA-256 is the box's."""
    serve(api, ARCHIVE[:-1] + b"x")
    result = run("carves", "download", "latest", "--out", "x.tar")
    assert result.exit_code == 1
    assert "SHA-256" in str(result.exception)
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize(
    ("path", "sql"),
    [
        ("/etc/it's", "SELECT * FROM carves WHERE path = '/etc/it''s' AND carve = 1"),
        ("/home/%/.ssh", "SELECT * FROM carves WHERE path LIKE '/home/%/.ssh' AND carve = 1"),
    ],
)
def test_start_asks_one_node(api: Any, box: Any, run: Any, path: str, sql: str) -> None:
    """A path is data, not SQL."""
    api.on("POST", "campaigns", {"id": "c1", "summary": {"targets": 1}}, status=201)
    assert run("carves", "start", "web", path).stdout == "c1\n"
    assert api.seen("POST", "campaigns").body == {"sql": sql, "nodes": ["web"], "timeout_s": 600.0}


def test_start_at_a_node_that_is_not_active(api: Any, box: Any, run: Any) -> None:
    api.on("POST", "campaigns", {"id": "c1", "summary": {"targets": 0}}, status=201)
    assert run("carves", "start", "web", "/x").exception.hint == "osqbox nodes show web"
