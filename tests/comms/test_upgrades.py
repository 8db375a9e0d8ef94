"""Upgrade files: taken in whole or not at all, sent whole or in part, and nothing else of the disk."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import audit
from osqbox.comms import upgrades as room
from osqbox.comms.errors import CommsError
from osqbox.comms.ranges import Part, part_of
from osqbox.comms.upgrades import Upgrades

from ._door import Door, run_door

DATA = os.urandom(1_500_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 100_000):
        yield data[start : start + 100_000]


async def put(upgrades: Upgrades, name: str, data: bytes = DATA, tenant: str = "default") -> None:
    await upgrades.keep(tenant, name, await upgrades.spool(pieces(data)), actor="test")


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "path", ["/upgrade?file_name=", "/api/v1/upgrade?file=", "/upgrade?name=", "/files?file_name="]
)
def test_a_file_comes_whole_with_its_checksum(tmp_path: Path, path: str) -> None:
    async def test(door: Door) -> None:
        await put(door.comms.upgrades, "agent_5.0.0.wpk")
        known = await door.agent()
        found = await known.ask("GET", f"{path}agent_5.0.0.wpk", 200)
        assert found.content == DATA
        assert found.headers["content-length"] == str(len(DATA))
        assert found.headers["etag"] == f'"{SHA256}"'
        assert found.headers["x-checksum-sha256"] == SHA256
        digest = base64.b64encode(bytes.fromhex(SHA256)).decode()
        assert found.headers["repr-digest"] == f"sha-256=:{digest}:"
        assert found.headers["content-disposition"] == 'attachment; filename="agent_5.0.0.wpk"'
        head = await known.ask("HEAD", f"{path}agent_5.0.0.wpk", 200)
        assert head.headers["content-length"] == str(len(DATA))
        assert head.headers["accept-ranges"] == "bytes"
        assert (await known.ask("HEAD", "/configuration", 200)).content == b""

    run_door(tmp_path, test)


@pytest.mark.parametrize(
    ("headers", "status", "start", "end"),
    [
        ({"Range": "bytes=0-0"}, 206, 0, 1),
        ({"Range": "bytes=1000000-"}, 206, 1_000_000, len(DATA)),
        ({"Range": "bytes=10-19"}, 206, 10, 20),
        ({"Range": "bytes=1499999-9999999"}, 206, 1_499_999, len(DATA)),
        ({"Range": "bytes=-5"}, 206, len(DATA) - 5, len(DATA)),
        ({"Range": "bytes=-99999999"}, 206, 0, len(DATA)),
        ({"Range": "bytes=5-", "If-Range": f'"{SHA256}"'}, 206, 5, len(DATA)),
        ({"Range": "bytes=5-", "If-Range": '"another"'}, 200, 0, len(DATA)),
        ({"Range": "bytes=5-", "If-Range": f'W/"{SHA256}"'}, 200, 0, len(DATA)),
        ({"Range": "bytes=5-", "If-Range": "Sat, 21 Nov 2026 01:26:20 GMT"}, 200, 0, len(DATA)),
        ({"Range": "bytes=0-1,5-6"}, 200, 0, len(DATA)),
        ({"Range": "bytes=9-5"}, 200, 0, len(DATA)),
        ({"Range": "lines=1-2"}, 200, 0, len(DATA)),
        ({"Range": "bytes=-"}, 200, 0, len(DATA)),
        ({"Range": "bytes=1500000-"}, 416, 0, 0),
        ({"Range": "bytes=-0"}, 416, 0, 0),
        ({"If-None-Match": f'"{SHA256}"'}, 304, 0, 0),
        ({"If-None-Match": f'"x", W/"{SHA256}"', "Range": "bytes=0-1"}, 304, 0, 0),
        ({"If-None-Match": "*"}, 304, 0, 0),
        ({"If-None-Match": '"x"'}, 200, 0, len(DATA)),
    ],
)
def test_the_part_that_is_asked_for(headers: dict[str, str], status: int, start: int, end: int) -> None:
    found = part_of({name.lower(): value for name, value in headers.items()}, len(DATA), f'"{SHA256}"')
    assert found == (Part(status, start, end - start) if status in (200, 206) else Part(status))


def test_parts_over_the_wire(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await put(door.comms.upgrades, "a.wpk")
        known = await door.agent()

        async def get(status: int, **headers: str) -> Any:
            return await known.ask("GET", "/upgrade?file_name=a.wpk", status, headers=headers)

        part = await get(206, Range="bytes=100-299")
        assert part.content == DATA[100:300]
        assert part.headers["content-range"] == f"bytes 100-299/{len(DATA)}"
        assert (await get(416, Range="bytes=9999999-")).headers["content-range"] == f"bytes */{len(DATA)}"
        assert (await get(304, **{"If-None-Match": part.headers["etag"]})).content == b""

    run_door(tmp_path, test)


def test_a_download_that_breaks_off_is_resumed_with_curl(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await put(door.comms.upgrades, "a.wpk")
        known = await door.agent()
        target = tmp_path / "a.wpk"
        target.write_bytes(DATA[:700_001])
        command = [
            "curl", "-sSf", "--insecure", "-C", "-", "-o", str(target), "-w", "%{http_code}",
            "-H", f"Authorization: Bearer {known.token}", f"{door.url}/upgrade?file_name=a.wpk",
        ]  # fmt: skip
        done = await trio.run_process(command, capture_stdout=True)
        assert done.stdout == b"206"
        assert target.read_bytes() == DATA

    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    run_door(tmp_path, test)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("x/", 2704),
        ("../../etc/passwd", 2705),
        ("/etc/passwd", 2705),
        ("%2e%2e%2fcomms.sock", 2705),
        ("..", 400),
        (".hidden", 400),
        ("a%00b", 400),
        ("..\\x", 400),
        ("a%0d%0ax", 400),
        ("x" * 200, 400),
        ("caf%C3%A9", 400),
    ],
)
def test_tricks_in_a_file_name_are_400(tmp_path: Path, name: str, code: int) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        for path in ("/upgrade", "/files"):
            assert (await known.ask("GET", f"{path}?file_name={name}", 400)).json()["code"] == code

    run_door(tmp_path, test)


def test_a_tenant_has_its_own_files(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await put(door.comms.upgrades, "mine.wpk", b"mine")
        await put(door.comms.upgrades, "theirs.wpk", b"theirs", tenant="other")
        known, other = await door.agent(), await door.agent(tenant="other")
        assert (await known.ask("GET", "/upgrade?file_name=mine.wpk", 200)).content == b"mine"
        await known.ask("GET", "/upgrade?file_name=theirs.wpk", 404)
        await other.ask("GET", "/upgrade?file_name=mine.wpk", 404)
        await door.ask("GET", "/upgrade?file_name=mine.wpk", 401)

    run_door(tmp_path, test)


def test_a_name_gets_other_bytes_while_they_are_downloaded(tmp_path: Path) -> None:
    """Who has begun gets the old ones to the end; the next gets the new ones; the old ones are gone from the disk."""

    async def test(door: Door) -> None:
        old, upgrades = os.urandom(20_000_000), door.comms.upgrades
        await put(upgrades, "a.wpk", old)
        known = await door.agent()
        stream = await door.raw()
        head = f"GET /upgrade?file_name=a.wpk HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {known.token}\r\n"
        await stream.send_all(f"{head}Connection: close\r\n\r\n".encode())
        got = bytes(await stream.receive_some(65536))
        await put(upgrades, "a.wpk")
        while piece := await stream.receive_some(1 << 20):
            got += piece
        await trio.aclose_forcefully(stream)
        assert got.partition(b"\r\n\r\n")[2] == old
        assert (await known.ask("GET", "/upgrade?file_name=a.wpk", 200)).content == DATA
        assert files_below(tmp_path / "upgrades") == [f"default/blobs/{SHA256}", "default/names/a.wpk"]

    run_door(tmp_path, test)


def test_equal_bytes_under_two_names_stay_until_both_are_gone(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        upgrades = door.comms.upgrades
        await put(upgrades, "a.wpk")
        await put(upgrades, "b.wpk")
        await upgrades.remove("default", "a.wpk", actor="test")
        known = await door.agent()
        assert (await known.ask("GET", "/upgrade?file_name=b.wpk", 200)).content == DATA
        assert [each.name for each in await upgrades.page("default")] == ["b.wpk"]
        await upgrades.remove("default", "b.wpk", actor="test")
        with pytest.raises(CommsError, match="does not exist"):
            await upgrades.remove("default", "b.wpk", actor="test")
        assert files_below(tmp_path / "upgrades") == []
        rows = await door.comms.store.read(lambda db: audit.rows(db, action="upgrade"))
        assert [(row["action"], row["subject"]) for row in rows] == [
            ("upgrade.add", "a.wpk"), ("upgrade.add", "b.wpk"),
            ("upgrade.remove", "a.wpk"), ("upgrade.remove", "b.wpk"),
        ]  # fmt: skip

    run_door(tmp_path, test)


def test_an_upload_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender leaves, the disk is full, it is too large, a crash."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 2_000_000
        raise ConnectionError("gone")

    async def test(door: Door) -> None:
        upgrades = door.comms.upgrades
        with pytest.raises(ConnectionError):
            await upgrades.spool(broken())
        monkeypatch.setattr(room, "FREE_MIN_BYTES", 2**60)
        with pytest.raises(CommsError) as full:
            await upgrades.spool(pieces(DATA))
        assert full.value.status == 507
        monkeypatch.setattr(room, "FREE_MIN_BYTES", 0)
        monkeypatch.setattr(room, "FILE_MAX_BYTES", 1_000_000)
        with pytest.raises(CommsError) as large:
            await upgrades.spool(pieces(DATA))
        assert large.value.status == 413
        assert files_below(tmp_path / "upgrades") == []
        await upgrades.spool(pieces(b"a crash comes now"))
        assert len(files_below(tmp_path / "upgrades")) == 1
        upgrades.sweep()
        assert files_below(tmp_path / "upgrades") == []

    run_door(tmp_path, test)
