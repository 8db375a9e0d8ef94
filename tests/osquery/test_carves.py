"""Carves: blocks in any order and number make the file that was carved, or nothing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import tarfile
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox import tenants
from osqbox.errors import BadUsage, Refused
from osqbox.osquery import carves, nodes
from osqbox.osquery.messages import CarveBegin, CarveBlock
from osqbox.tenants import TenantOptions

LIMIT_BYTES = 1_000_000


def tar(**files: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tmp/osquery_carve_x/etc/{name}")
            member.size, member.mtime, member.mode = len(content), 1_700_000_000, 0o640
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def begin(world: Any, node: Any, content: bytes, block_bytes: int, carve: str = "guid-1", **more: Any) -> str:
    message = CarveBegin(
        more.get("count", -(-len(content) // block_bytes)), block_bytes, len(content), carve, more.get("request", "r-1")
    )
    session: str = world.do(carves.begin, node, message, LIMIT_BYTES, world.new_id)
    return session


def block(session: str, number: int | str, data: bytes, request: str = "r-1") -> CarveBlock:
    return CarveBlock(number, session, base64.b64encode(data).decode(), request)


def send(world: Any, session: str, number: int | str, data: bytes, node: Any = None, **more: Any) -> None:
    message = block(session, number, data, more.pop("request", "r-1"))
    if world.do(carves.receive_block, message, carves.block_data(message), node, **more):
        digest = carves.Digest()
        while digest.feed(world.db, session):
            pass
        world.do(carves.complete, session, digest)


def drop(world: Any) -> None:
    """What the upkeep does with carves that nobody can read any more."""
    for session, block_bytes in carves.to_drop(world.db):
        while world.do(carves.drop_blocks, session, block_bytes):
            pass


def carve(world: Any, node: Any, content: bytes, block_bytes: int = 100, order: Any = None, **more: Any) -> str:
    """A whole carve; the session id."""
    session = begin(world, node, content, block_bytes, **more)
    blocks = [content[at : at + block_bytes] for at in range(0, len(content), block_bytes)]
    for number in order or range(len(blocks)):
        send(world, session, number, blocks[number])
    return session


def refused(call: Any, *args: Any, **named: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        call(*args, **named)
    return caught.value


def test_a_carve_arrives_whole(world: Any) -> None:
    node = world.node()
    content = tar(passwd=b"root", hosts=b"127.0.0.1")
    session = carve(world, node, content)
    facts = carves.get(world.db, session)
    assert (facts["status"], facts["sha256"]) == ("complete", hashlib.sha256(content).hexdigest())
    assert (facts["hostname"], facts["tenant"], facts["compressed"]) == ("web-1.example", "default", False)
    assert b"".join(carves.archive(world.db, session)) == content
    assert carves.get(world.db, "guid-1") == carves.get(world.db, "latest") == facts
    assert carves.latest(world.db, 10) == [facts]
    assert b"".join(carves.blocks(world.db, session, 1, 2)) == content[100:300]
    assert world.kinds()[-1] == "carve_completed"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_and_repetition_makes_the_same_file(kit: Any, data: st.DataObject) -> None:
    with kit.World() as world:
        content = data.draw(st.binary(max_size=60))
        block_bytes = data.draw(st.integers(1, 20))
        count = -(-len(content) // block_bytes)
        numbers = data.draw(st.permutations(list(range(count)) * data.draw(st.integers(1, 3))))
        session = carve(world, world.node(), content, block_bytes, order=numbers)
        facts = carves.get(world.db, session)
        assert facts["status"] == "complete"
        assert facts["received_blocks"] == count
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert world.kinds().count("carve_completed") == 1


def test_numbers_may_be_text(world: Any) -> None:
    node = world.node()
    session = world.do(carves.begin, node, CarveBegin("2", "3", "5", "g", "r-1"), LIMIT_BYTES, world.new_id)
    send(world, session, "1", b"de")
    send(world, session, "0", b"abc")
    assert carves.get(world.db, session)["status"] == "complete"


@pytest.mark.parametrize(
    ("count", "block_bytes", "size"),
    [(2, 10, 21), (4, 10, 21), (0, 10, 1), (1, 10, 0), (1, 0, 10), (-1, 10, 10), (1, 10**9, 10),
     (2_000_000, 1, 2_000_000), (1, 10, LIMIT_BYTES + 1), ("x", 10, 10), (1, "x", 10), (1, 10, "")],
)  # fmt: skip
def test_a_carve_whose_numbers_do_not_fit_is_refused(world: Any, count: Any, block_bytes: Any, size: Any) -> None:
    node = world.node()
    refused(world.do, carves.begin, node, CarveBegin(count, block_bytes, size, "g", "r"), LIMIT_BYTES, world.new_id)
    assert world.count("osquery_carves") == 0


def test_a_carve_begun_again_goes_on_in_its_session(world: Any) -> None:
    """The answer to the first got lost."""
    node, other = world.node("a"), world.node("b")
    session = begin(world, node, b"x" * 50, 10)
    send(world, session, 0, b"x" * 10)
    assert begin(world, node, b"x" * 50, 10) == session
    assert begin(world, other, b"x" * 50, 10) != session
    assert begin(world, node, b"x" * 50, 10, request="r-2") != session
    assert begin(world, node, b"x" * 51, 10) != session
    assert begin(world, node, b"x" * 50, 10, carve="") != begin(world, node, b"x" * 50, 10, carve="")


@pytest.mark.parametrize(
    ("number", "data", "request_id"),
    [(0, b"short", "r-1"), (0, b"x" * 11, "r-1"), (2, b"x" * 10, "r-1"), (3, b"x" * 5, "r-1"), (-1, b"x" * 10, "r-1"),
     ("x", b"x" * 10, "r-1"), (0, b"", "r-1"), (0, b"x" * 10, "other")],
)  # fmt: skip
def test_a_block_that_would_spoil_the_file_is_refused(world: Any, number: Any, data: bytes, request_id: str) -> None:
    session = begin(world, world.node(), b"x" * 25, 10)
    refused(send, world, session, number, data, request=request_id)
    assert world.count("osquery_carve_blocks") == 0


def test_a_block_that_came_with_other_bytes_is_refused(world: Any) -> None:
    session = begin(world, world.node(), b"x" * 25, 10)
    send(world, session, 0, b"x" * 10)
    assert "different bytes" in refused(send, world, session, 0, b"y" * 10).message
    send(world, session, 1, b"x" * 10)
    send(world, session, 2, b"x" * 5)
    send(world, session, 1, b"x" * 10)
    refused(send, world, session, 1, b"y" * 10)
    assert carves.get(world.db, session)["sha256"] == hashlib.sha256(b"x" * 25).hexdigest()


@pytest.mark.parametrize("text", ["not base64!", "YQ", "YQ==\n", "Y Q==", "-_8=", "é"])
def test_data_that_is_no_base64_is_refused(text: str) -> None:
    assert refused(carves.block_data, CarveBlock(0, "s", text)).reason == "bad_block"


def test_blocks_belong_to_an_active_node_of_an_open_tenant(world: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    owner, other = world.node("a", enroll_secret="s"), world.node("b")
    session = begin(world, owner, b"x" * 25, 10)
    assert refused(send, world, "guessed", 0, b"x" * 10).reason == "carve_unknown"
    assert refused(send, world, session, 0, b"x" * 10, other).reason == "carve_unknown"
    send(world, session, 0, b"x" * 10, owner)
    world.do(nodes.decide, owner.id, "rejected")
    assert refused(send, world, session, 1, b"x" * 10).reason == "carve_unknown"
    world.do(nodes.decide, owner.id, "active")
    world.do(tenants.close, "acme")
    assert refused(send, world, session, 1, b"x" * 10).reason == "carve_unknown"
    world.do(nodes.delete, owner.id)
    assert refused(send, world, session, 1, b"x" * 10).reason == "carve_unknown"


def test_blocks_of_a_node_with_a_certificate_come_with_it(world: Any, kit: Any) -> None:
    world.do(tenants.change, "default", TenantOptions(client_cert=True))
    node = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate="c")).node
    session = begin(world, node, b"x" * 5, 10)
    for other in (None, "d"):
        assert refused(send, world, session, 0, b"x" * 5, certificate=other).reason == "certificate_required"
    send(world, session, 0, b"x" * 5, certificate="c")


def test_an_empty_file_is_complete_at_once(world: Any) -> None:
    session = begin(world, world.node(), b"", 10)
    assert carves.get(world.db, session)["sha256"] == hashlib.sha256(b"").hexdigest()
    refused(send, world, session, 0, b"")


# the digest


def awaiting(world: Any, node: Any, content: bytes, block_bytes: int, **more: Any) -> str:
    """A carve with all its blocks, not hashed yet."""
    session = begin(world, node, content, block_bytes, **more)
    for number in range(-(-len(content) // block_bytes)):
        data = content[number * block_bytes : (number + 1) * block_bytes]
        world.do(carves.receive_block, block(session, number, data), data, node)
    return session


def test_a_carve_with_all_its_blocks_awaits_its_digest(world: Any) -> None:
    """It is neither given up nor begun anew meanwhile, and whoever sends a block again learns that it must wait."""
    node = world.node()
    session = awaiting(world, node, b"x" * 25, 10)
    begin(world, node, b"x" * 25, 10, carve="half")
    assert carves.awaiting_digest(world.db) == [session]
    assert (facts := carves.get(world.db, session))["status"] == "receiving"
    assert (facts["sha256"], facts["received_blocks"]) == (None, 3)
    assert world.do(carves.receive_block, block(session, 1, b"x" * 10), b"x" * 10, node) is True
    assert begin(world, node, b"x" * 25, 10) == session
    for number in range(carves.OPEN_PER_NODE + 2):
        begin(world, node, b"x" * 25, 10, carve=f"g{number}")
    world.now += carves.IDLE_S + 1
    world.do(carves.expire)
    assert carves.awaiting_digest(world.db) == [session]
    digest = carves.Digest()
    while digest.feed(world.db, session):
        pass
    for _ in range(2):
        world.do(carves.complete, session, digest)
    assert carves.get(world.db, session)["sha256"] == hashlib.sha256(b"x" * 25).hexdigest()
    assert world.kinds().count("carve_completed") == 1
    assert carves.awaiting_digest(world.db) == []
    assert world.do(carves.receive_block, block(session, 1, b"x" * 10), b"x" * 10, node) is False


@pytest.mark.parametrize("deed", ["half", "deleted", "expired"])
def test_only_a_carve_with_all_its_blocks_can_be_complete(world: Any, deed: str) -> None:
    node = world.node()
    if deed == "deleted":
        session = awaiting(world, node, b"x" * 25, 10)
        world.do(carves.delete, session)
    else:
        send(world, session := begin(world, node, b"x" * 25, 10), 0, b"x" * 10)
        if deed == "expired":
            world.now += carves.IDLE_S + 1
            world.do(carves.expire)
    before = world.db.execute("SELECT * FROM osquery_carves").fetchall()
    world.do(carves.complete, session, carves.Digest())
    assert world.db.execute("SELECT * FROM osquery_carves").fetchall() == before
    assert "carve_completed" not in world.kinds()


@pytest.mark.parametrize("page_bytes", [1, 64, 100, 1000, 10**9])
@pytest.mark.parametrize("packed", [False, True])
def test_the_digest_is_the_same_whatever_the_pages(
    world: Any, monkeypatch: pytest.MonkeyPatch, page_bytes: int, packed: bool
) -> None:
    monkeypatch.setattr(carves, "DIGEST_PAGE_BYTES", page_bytes)
    content = (carves.ZSTD_MAGIC if packed else b"") + bytes(range(256)) * 5 + carves.ZSTD_MAGIC
    session = carve(world, world.node(), content, 64)
    facts = carves.get(world.db, session)
    assert (facts["sha256"], facts["compressed"]) == (hashlib.sha256(content).hexdigest(), packed)


# giving up and dropping


def test_blocks_are_dropped_few_by_few(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the carve, no one write takes long; a block larger than a step is a step."""
    monkeypatch.setattr(carves, "DROP_BYTES", 30)
    node = world.node()
    kept = carve(world, node, b"k" * 100, 10, carve="kept")
    for session, steps in ((carve(world, node, b"x" * 95, 10), 4), (carve(world, node, b"x" * 95, 50), 2)):
        world.do(carves.delete, session)
        assert carves.blocks(world.db, session, 0, 10) == []
        ((_, block_bytes),) = carves.to_drop(world.db)
        for _ in range(steps):
            assert world.do(carves.drop_blocks, session, block_bytes) is True
        assert world.do(carves.drop_blocks, session, block_bytes) is False
    assert [facts["id"] for facts in carves.latest(world.db, 10)] == [kept]
    assert world.count("osquery_carves") == 1
    assert world.count("osquery_carve_blocks") == 10


def test_a_carve_that_stalls_is_given_up(world: Any) -> None:
    session = begin(world, world.node(), b"x" * 25, 10)
    send(world, session, 0, b"x" * 10)
    world.now += carves.IDLE_S + 1
    world.do(carves.expire)
    assert carves.get(world.db, session)["status"] == "expired"
    assert refused(send, world, session, 0, b"x" * 10).reason == "carve_unknown"
    drop(world)
    assert world.count("osquery_carve_blocks") == 0
    assert carves.to_drop(world.db) == []
    assert refused(send, world, session, 0, b"x" * 10).reason == "carve_unknown"
    with pytest.raises(BadUsage, match="is expired"):
        carves.members(world.db, session)


def test_open_carves_of_a_node_are_bounded(world: Any) -> None:
    """An agent that begins and never sends keeps the latest few; other nodes keep theirs."""
    node, other = world.node("a"), world.node("b")
    theirs = begin(world, other, b"x" * 25, 10)
    made = []
    for number in range(carves.OPEN_PER_NODE + 5):
        world.now += 1
        made.append(begin(world, node, b"x" * 25, 10, carve=f"g{number}"))
    states = [carves.get(world.db, session)["status"] for session in made]
    assert states == ["expired"] * 5 + ["receiving"] * carves.OPEN_PER_NODE
    assert carves.get(world.db, theirs)["status"] == "receiving"


def test_the_oldest_ended_carves_make_room(world: Any) -> None:
    node = world.node()
    made = []
    for number in range(4):
        world.now += 1
        made.append(carve(world, node, b"%d" % number * 100, 100, carve=f"g{number}"))
    receiving = begin(world, node, b"x" * 1000, 100, carve="open")
    send(world, receiving, 0, b"x" * 100)
    world.do(carves.prune, 300)
    assert {facts["id"] for facts in carves.latest(world.db, 10)} == {*made[2:], receiving}
    drop(world)
    assert world.count("osquery_carve_blocks") == 3
    assert world.db.execute("SELECT count FROM store_drops WHERE kind = 'carves'").fetchone() == (2,)


def test_what_is_only_promised_drops_nothing(world: Any) -> None:
    """An agent that begins huge carves must not push out those that are stored."""
    node = world.node()
    stored = carve(world, node, b"x" * 100, 100)
    for number in range(10):
        begin(world, node, b"x" * 100_000, 100, carve=f"huge{number}")
    world.now += carves.IDLE_S + 1
    world.do(carves.expire)
    world.do(carves.prune, 1000)
    assert carves.get(world.db, stored)["status"] == "complete"


def test_even_open_carves_stay_within_the_bound(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = world.node()
    for number in range(5):
        world.now += 1
        send(world, begin(world, node, b"x" * 200, 100, carve=f"g{number}"), 0, b"x" * 100)
    world.do(carves.prune, 250)
    assert [facts["carve_id"] for facts in carves.latest(world.db, 10)] == ["g4", "g3"]
    monkeypatch.setattr(carves, "KEPT_CARVES", 1)
    world.do(carves.prune, 250)
    assert [facts["carve_id"] for facts in carves.latest(world.db, 10)] == ["g4"]


def test_a_deleted_carve_is_gone_with_its_blocks(world: Any) -> None:
    session = carve(world, world.node(), b"x" * 250)
    world.do(carves.delete, session)
    assert carves.latest(world.db, 10) == []
    world.do(carves.prune, 0)
    assert world.count("store_drops") == 0
    drop(world)
    assert world.count("osquery_carves") == world.count("osquery_carve_blocks") == 0
    for call in (lambda: carves.get(world.db, session), lambda: world.do(carves.delete, session)):
        with pytest.raises(BadUsage, match="no carve"):
            call()


# looking inside


@pytest.mark.parametrize("packed", [False, True])
def test_members_are_listed_without_unpacking(world: Any, packed: bool) -> None:
    content = tar(passwd=b"root" * 3000, hosts=b"")
    if packed:
        content = zstandard.ZstdCompressor().compress(content)
    session = carve(world, world.node(), content, 64)
    assert carves.get(world.db, session)["compressed"] is packed
    assert carves.members(world.db, session) == [
        {"name": f"tmp/osquery_carve_x/etc/{name}", "type": "file", "size": size, "mode": 0o640,
         "mtime": "2023-11-14T22:13:20.000000Z"}
        for name, size in (("passwd", 12_000), ("hosts", 0))
    ]  # fmt: skip


def test_hostile_names_and_times_are_only_shown(world: Any) -> None:
    """Nothing is written anywhere; what JSON or the calendar cannot hold is replaced."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name in ("../../etc/passwd", "/etc/shadow", "caf\udce9"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        device = tarfile.TarInfo("device")
        device.type, device.mtime = tarfile.CHRTYPE, 10**17
        archive.addfile(device)
    session = carve(world, world.node(), made.getvalue(), 1000)
    found = carves.members(world.db, session)
    assert [(one["name"], one["type"]) for one in found] == [
        ("../../etc/passwd", "file"), ("/etc/shadow", "file"), ("caf�", "file"), ("link", "link"), ("device", "other"),
    ]  # fmt: skip
    assert found[-1]["mtime"] is None


def pax(**headers: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x")
        member.pax_headers = headers
        archive.addfile(member)
    return made.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar at all" * 100,
        tar(a=b"x" * 2000)[:1500],
        b"\x28\xb5\x2f\xfd" + b"broken" * 50,
        zstandard.ZstdCompressor().compress(tar(a=b"x" * 5000))[:-20],
        zstandard.ZstdCompressor().compress(b"no tar" * 1000),
        # one pax header after the other: tarfile calls itself for each
        pax(comment="x")[:1024] * 3000,
    ],
    ids=["empty", "text", "cut tar", "broken zstd", "cut zstd", "zstd of text", "endless headers"],
)
def test_what_is_no_archive_is_told(world: Any, content: bytes) -> None:
    session = world.do(
        carves.begin,
        world.node(),
        CarveBegin(-(-len(content) // 10**6), 10**6, len(content), "g", "r-1"),
        10**8,
        world.new_id,
    )
    for number, at in enumerate(range(0, len(content), 10**6)):
        send(world, session, number, content[at : at + 10**6])
    with pytest.raises(BadUsage, match=f"carve {session}: expected a tar archive, got"):
        carves.members(world.db, session)


@pytest.mark.parametrize("mtime", ["1e308", "-1e308", "99999999999999", "nan", "inf"])
def test_a_time_beyond_the_calendar_hides_nothing(world: Any, mtime: str) -> None:
    session = carve(world, world.node(), pax(mtime=mtime), 10_000)
    assert [one["name"] for one in carves.members(world.db, session)] == ["x"]


def test_a_bomb_is_not_unpacked(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carves, "LISTED_BYTES", 1_000_000)
    bomb = zstandard.ZstdCompressor().compress(tar(a=bytes(20_000_000)))
    assert len(bomb) < 10_000
    session = carve(world, world.node(), bomb, 1000)
    with pytest.raises(BadUsage, match="more than 1000000 bytes"):
        carves.members(world.db, session)


def test_many_members_are_cut(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carves, "LISTED_MEMBERS", 3)
    session = carve(world, world.node(), tar(**{f"f{number}": b"" for number in range(9)}), 10_000)
    assert len(carves.members(world.db, session)) == 3


def test_an_incomplete_carve_is_not_opened(world: Any) -> None:
    session = begin(world, world.node(), b"x" * 25, 10)
    with pytest.raises(BadUsage, match="is receiving: 0 of 3 blocks"):
        carves.members(world.db, session)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damaged_archive_raises_anything_but_bad_usage(kit: Any, data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from((tar(a=b"abc", b=b""), pax(comment="c", size="3")))))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, min(1600, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    with kit.World() as world:
        session = carve(world, world.node(), bytes(raw), 100_000)
        with contextlib.suppress(BadUsage):
            carves.members(world.db, session)
