"""Carves: listed, looked into, downloaded, deleted."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile

import h11
import pytest
import zstandard

from osqbox.operator import carves as operator_carves
from osqbox.operator.carves import file_name
from osqbox.osquery import carves
from osqbox.osquery.messages import CarveBegin, CarveBlock


def archive(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


async def send(box, node, data, *, block_size=4096, blocks=None, carve_id="carve-1"):
    count = -(-len(data) // block_size)
    begin = CarveBegin(count, block_size, len(data), carve_id, "request")
    session = await box.store.write(lambda tx: carves.begin(tx, node, begin, 1 << 30, lambda: f"session-{carve_id}"))
    for index in range(count if blocks is None else blocks):
        piece = data[index * block_size : (index + 1) * block_size]
        block = CarveBlock(index, session, base64.b64encode(piece).decode())
        await box.store.write(
            lambda tx, block=block, piece=piece: carves.receive_block(tx, block, piece, None), bulk=True
        )
    if blocks is None:
        await box.parts.osquery.complete_carve(session)
    return session


def test_a_complete_carve_is_listed_and_looked_into(rig):
    async def test(box):
        node = await box.enroll("web")
        data = archive(etc_passwd=b"root:x:0", empty=b"")
        session = await send(box, node, data)
        (listed,) = (await box.get("/api/v1/carves")).json
        assert (listed["id"], listed["status"], listed["hostname"]) == (session, "complete", "web")
        assert listed["sha256"] == hashlib.sha256(data).hexdigest()
        for word in (session, "carve-1", "latest"):
            assert (await box.get(f"/api/v1/carves/{word}")).json == listed
        members = (await box.get("/api/v1/carves/latest/members")).json
        assert [(each["name"], each["size"], each["type"]) for each in members] == [
            ("etc_passwd", 8, "file"),
            ("empty", 0, "file"),
        ]
        await box.get("/api/v1/carves/none", 404)
        assert (await box.get("/api/v1/carves?tenant=blue")).json == []

    rig(test)


@pytest.mark.parametrize("read_bytes", [1, 10_000, 1 << 22])
def test_a_download_is_byte_for_byte_whatever_the_pages(rig, monkeypatch, read_bytes):
    monkeypatch.setattr(operator_carves, "READ_BYTES", read_bytes)

    async def test(box):
        node = await box.enroll("web/../01\r\nX: y")
        data = bytes(range(256)) * 100 + b"tail"
        await send(box, node, data)
        async with box.served() as client:
            response = await client.get("/api/v1/carves/latest/archive")
            assert response.content == data
            assert response.headers["Content-Length"] == str(len(data))
            assert response.headers["Content-Type"] == "application/octet-stream"
            assert response.headers["Content-Disposition"] == 'attachment; filename="carve-web_01_X_y-carve-1.tar"'
            assert (await client.head("/api/v1/carves/latest/archive")).headers["Content-Length"] == str(len(data))

    rig(test)


def test_file_names_are_safe():
    facts = {"hostname": "../../etc", "node": "n", "carve_id": "", "id": 'a/b\x00"c', "compressed": True}
    assert file_name(facts) == "carve-etc-a_b_c.tar.zst"
    assert file_name({**facts, "hostname": None, "carve_id": "é", "compressed": False}) == "carve-n.tar"
    assert len(file_name({**facts, "hostname": "x" * 500})) < 150


def test_an_incomplete_carve_is_not_downloaded(rig):
    async def test(box):
        await send(box, await box.enroll("web"), b"x" * 10_000, blocks=2)
        refused = (await box.get("/api/v1/carves/latest/archive", 409)).json
        assert (refused["reason"], "2 of 3 blocks" in refused["error"]) == ("incomplete", True)
        await box.get("/api/v1/carves/latest/members", 400)

    rig(test)


def test_an_empty_carve_is_downloaded(rig):
    async def test(box):
        await send(box, await box.enroll("web"), b"")
        assert (await box.get("/api/v1/carves/latest/archive")).body == b""

    rig(test)


@pytest.mark.parametrize("data", [b"no archive at all" * 100, b"\x28\xb5\x2f\xfdbroken"])
def test_what_is_no_archive_has_no_members(rig, data):
    async def test(box):
        await send(box, await box.enroll("web"), data)
        assert "expected a tar archive" in (await box.get("/api/v1/carves/latest/members", 400)).json["error"]

    rig(test)


def test_a_compressed_carve_is_looked_into(rig):
    async def test(box):
        data = zstandard.ZstdCompressor().compress(archive(a=b"1"))
        await send(box, await box.enroll("web"), data)
        assert (await box.get("/api/v1/carves/latest")).json["compressed"] is True
        assert [each["name"] for each in (await box.get("/api/v1/carves/latest/members")).json] == ["a"]

    rig(test)


def test_a_deleted_carve_is_gone(rig):
    async def test(box):
        session = await send(box, await box.enroll("web"), b"x")
        assert (await box.delete("/api/v1/carves/latest")).json == {"deleted": session}
        await box.get(f"/api/v1/carves/{session}/archive", 404)
        await box.delete(f"/api/v1/carves/{session}", 404)
        assert (await box.get("/api/v1/carves")).json == []
        assert [dropped for dropped, _ in box.store.peek(carves.to_drop)] == [session]

    rig(test)


async def drain(answer):
    while await answer.read():
        pass


def test_a_download_of_a_carve_that_goes_breaks_off(rig, stream, monkeypatch):
    monkeypatch.setattr(operator_carves, "READ_BYTES", 1)

    async def test(box):
        await send(box, await box.enroll("web"), b"x" * 4_000_000, block_size=1_000_000)
        async with box.served() as client:
            async with stream(client, "/api/v1/carves/latest/archive") as answer:
                assert await answer.read()
                await box.delete("/api/v1/carves/latest")
                with pytest.raises(h11.RemoteProtocolError):
                    await drain(answer)
            assert (await client.get("/livez")).status_code == 200

    rig(test)
