"""Carving: asking by SQL, the archive, and the upload with its retries."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from osqbox.agent import carve
from osqbox.agent.carve import Archive, Archived, Carve, Carves, Discard, ReadBlock
from osqbox.agent.client import Core, Failure, Identity, Send, Sleep
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.sql import Engine
from osqbox.agent.store import MemoryStore, Store

START = 1_700_000_010.0  # 30 s before a full minute
CONTENT = bytes(range(250))


def new_carves(store: Store | None = None) -> Carves:
    numbers = itertools.count(1)
    return Carves(store or MemoryStore(), new_id=lambda: f"id-{next(numbers)}", now=lambda: START)


def test_asking_answers_at_once_and_schedules(tmp_path: Path) -> None:
    carves = new_carves()
    result = Engine(carves.tables()).query(f"select * from carves where path = '{tmp_path}/a' and carve = 1")
    assert result.rows == [
        {"time": "1700000010", "sha256": "", "size": "-1", "path": f"{tmp_path}/a", "status": "SCHEDULED",
         "carve_guid": "id-1", "request_id": "id-2", "carve": "1"}
    ]  # fmt: skip
    assert [found.carve_guid for found in carves.scheduled()] == ["id-1"]


def test_like_carves_all_matches_together(tmp_path: Path) -> None:
    for name in ("one.log", "two.log", "three.txt"):
        (tmp_path / name).write_text(name)
    carves = new_carves()
    Engine(carves.tables()).query(f"select * from carves where path like '{tmp_path}/%.log' and carve = 1")
    (found,) = carves.scheduled()
    assert found.path == f"{tmp_path}/one.log,{tmp_path}/two.log"


@pytest.mark.parametrize(
    ("disabled", "sql", "shown", "carved"),
    [
        ("false", "select carve('/etc/hostname') as c", ["Carve Started"], ["/etc/hostname"]),
        ("false", "select carve(p) as c from (select '/b' as p union select '/a')", ["Carve Started"], ["/a,/b"]),
        ("false", "select carve(null) as c", ["Carve Failed:"], []),
        ("true", "select carve('/etc/hostname') as c", ["Carve Failed:"], []),
    ],
)
def test_the_function_carves_all_paths_of_a_query_together(
    disabled: str, sql: str, shown: list[str], carved: list[str]
) -> None:
    numbers = itertools.count(1)
    flags = Flags({"carver_disable_function": disabled})
    carves = Carves(MemoryStore(), new_id=lambda: f"id-{next(numbers)}", now=lambda: START, flags=flags)
    result = Engine(carves.tables()).query(sql)
    assert ([row["c"] for row in result.rows], result.message) == (shown, "")
    assert [found.path for found in carves.scheduled()] == carved


@pytest.mark.parametrize(
    "where", ["", "where carve = 1", "where path = '/etc/hostname'", "where path = '/x' and carve = 0"]
)
def test_only_looking_carves_nothing(where: str) -> None:
    carves = new_carves()
    assert Engine(carves.tables()).query(f"select * from carves {where}").status == 0
    assert carves.scheduled() == []


def test_what_a_stop_interrupted_begins_again() -> None:
    store = MemoryStore()
    carves = new_carves(store)
    for guid, status in (("a", carve.PENDING), ("b", carve.SUCCESS), ("c", carve.SCHEDULED)):
        carves.save(Carve(guid, "r", "/x", int(START), status))
    assert [found.carve_guid for found in new_carves(store).scheduled()] == ["a", "c"]


# -- the archive -------------------------------------------------------------------------------------------------


def test_the_archive_keeps_paths_contents_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_bytes(CONTENT)
    file.chmod(0o640)
    os.utime(file, (1_600_000_000, 1_600_000_000))
    packed = carve.build_archive(tmp_path / "out.tar", "guid", [str(file), str(tmp_path), "/no/such/file"])
    raw = (tmp_path / "out.tar").read_bytes()
    assert (packed.size_bytes, packed.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        (member,) = archive.getmembers()
        assert member.name == f"/tmp/osquery_carve_guid{file}"
        assert (member.mode & 0o777, member.mtime, member.size) == (0o640, 1_600_000_000, len(CONTENT))
        extracted = archive.extractfile(member)
        assert extracted is not None
        assert extracted.read() == CONTENT


def test_a_compressed_archive_is_a_zstd_of_the_same_tar(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT * 100)
    paths = [str(tmp_path / "f")]
    carve.build_archive(tmp_path / "plain", "g", paths)
    carve.build_archive(tmp_path / "packed", "g", paths, compress=True)
    packed = (tmp_path / "packed").read_bytes()
    assert packed[:4] == b"\x28\xb5\x2f\xfd"
    with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
        assert reader.read() == (tmp_path / "plain").read_bytes()


# -- the upload --------------------------------------------------------------------------------------------------


class Upload:
    """Drives the carver's thread with an archive of CONTENT and a server that is a function."""

    def __init__(self, server: Callable[[Send, int], Any], flags: dict[str, str] | None = None) -> None:
        store = MemoryStore()
        store.put("configurations", "nodeKey", "key")
        given = {"tls_hostname": "h", "disable_carver": "false", "carver_block_size": "100", **(flags or {})}
        who = Identity("h", "u", "i", "e", 1, START)
        self.core = Core(
            who,
            Flags(given),
            Endpoints(),
            store,
            enroll_secret=str,
            rng=None,
            now=START,  # type: ignore[arg-type]
        )
        self.carves = new_carves(store)
        Engine(self.carves.tables()).query("select * from carves where path='/a,/b' and carve=1")
        self.server = server
        self.sent: list[tuple[float, Send]] = []
        self.archived: list[Archive] = []
        self.discarded: list[str] = []

    def run(self, for_s: float) -> Carve:
        thread = carve.carver(self.core, self.carves)
        outcome: Any = None
        while True:
            command = thread.send(outcome)
            outcome = None
            match command:
                case Sleep():
                    if self.core.now + command.seconds > START + for_s:
                        thread.close()
                        return self.carves.all()[0]
                    self.core.now += command.seconds
                case Archive():
                    self.archived.append(command)
                    outcome = Archived(len(CONTENT), "digest")
                case ReadBlock():
                    outcome = CONTENT[command.offset : command.offset + command.size_bytes]
                case Discard():
                    self.discarded.append(command.guid)
                case Send():
                    self.sent.append((self.core.now - START, command))
                    reply = self.server(command, len(self.sent))
                    outcome = json.dumps(reply).encode() if isinstance(reply, dict) else reply


def accept(send: Send, _number: int) -> Any:
    return {"session_id": "session"} if send.call == "carve_start" else {}


def test_a_carve_is_sent_at_the_full_minute_in_blocks() -> None:
    upload = Upload(accept)
    done = upload.run(120)
    assert {at for at, _ in upload.sent} == {30.0}
    start, *blocks = [json.loads(send.body) for _, send in upload.sent]
    assert start == {
        "block_count": 3, "block_size": 100, "carve_size": 250,
        "carve_id": "id-1", "request_id": "id-2", "node_key": "key",
    }  # fmt: skip
    assert [block["block_id"] for block in blocks] == [0, 1, 2]
    assert b"".join(base64.b64decode(block["data"]) for block in blocks) == CONTENT
    assert all("node_key" not in block and block["session_id"] == "session" for block in blocks)
    assert {send.node_key for _, send in upload.sent} == {"key"}
    assert upload.archived == [Archive("id-1", ("/a", "/b"), compress=False)]
    assert (done.status, done.size, done.sha256) == ("SUCCESS", 250, "digest")
    assert upload.discarded == ["id-1"]


def test_a_start_without_a_session_is_tried_three_times() -> None:
    upload = Upload(lambda _send, _number: {"error": "no"})
    assert upload.run(120).status == "DATA POST FAILED"
    assert [at for at, _ in upload.sent] == [30, 31, 35]


def test_a_block_is_tried_three_times_and_any_json_accepts_it() -> None:
    def server(send: Send, number: int) -> Any:
        if send.call == "carve_start":
            return {"session_id": "s"}
        return {2: Failure("dropped"), 3: b"not json", 4: {"error": "x", "node_invalid": True}}.get(number, b"")

    upload = Upload(server)
    assert upload.run(120).status == "SUCCESS"
    assert [json.loads(send.body)["block_id"] for _, send in upload.sent[1:]] == [0, 0, 0, 1, 2]
    assert [at for at, _ in upload.sent] == [30, 30, 31, 35, 35, 35]


def test_a_block_that_is_never_taken_fails_the_carve() -> None:
    upload = Upload(lambda send, number: accept(send, number) if send.call == "carve_start" else Failure("gone"))
    assert upload.run(600).status == "DATA POST FAILED"
    assert len(upload.sent) == 4


def test_a_large_carve_has_no_hash() -> None:
    assert Upload(accept, {"read_max": "100"}).run(120).sha256 == "-1"


def test_a_success_is_forgotten_after_its_expiry() -> None:
    upload = Upload(accept, {"carver_expiry": "100"})
    with pytest.raises(IndexError):
        upload.run(240)


def test_disable_carver_sends_nothing() -> None:
    upload = Upload(accept, {"disable_carver": "true"})
    assert upload.run(120).status == "SCHEDULED"
    assert upload.sent == []
