"""The door to the indexer: what it makes of failures, how fast, and how it finds its way back."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.opensearch import client as client_module
from osqbox.comms.opensearch import mapping
from osqbox.comms.opensearch.client import Client, Conflict, Together, Unexpected, check_url, open_client
from osqbox.errors import BadSetup, BadUsage, Unsafe

from .standin import StandIn

LIMIT_S = 25


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Client]:
    options = {"ca": None, "auth": None, "prefix": f"t{secrets.token_hex(4)}-", **options}
    async with open_client(url, mapping.prepare, **options) as client:
        yield client


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(LIMIT_S):
            await test()

    trio.run(main)


def named(name: str = "web") -> dict[str, Any]:
    return {"tenant": "default", "name": name, "uuid": "a1", "at": 1.0}


async def until_up(client: Client, within_s: float = 5) -> None:
    with trio.fail_after(within_s):
        await client.wait_up()


def test_documents_are_created_read_changed_and_deleted(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            assert await client.get("agent-names", "1") is None
            created = await client.create("agent-names", "1", named())
            assert await client.get("agent-names", "1") == created
            with pytest.raises(Conflict):
                await client.create("agent-names", "1", named())
            changed = await client.put("agent-names", "1", named("db"), over=created)
            with pytest.raises(Conflict):
                await client.put("agent-names", "1", named("late"), over=created)
            with pytest.raises(Conflict):
                await client.delete("agent-names", "1", over=created)
            assert await client.mget("agent-names", ["2", "1"]) == [None, changed]
            assert await client.mget("agent-names", []) == []
            assert await client.delete("agent-names", "1", over=changed) is True
            assert await client.delete("agent-names", "1") is False

    run(test)


def test_a_bulk_is_sent_in_pieces_and_answered_in_order(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BULK_LINES", 10)

    async def test() -> None:
        async with opened(standin.url) as client:
            await client.create("agent-names", "7", named())
            items = await client.bulk("agent-names", [({"create": {"_id": str(n)}}, named()) for n in range(23)])
            assert [item["_id"] for item in items] == [str(n) for n in range(23)]
            assert [item["status"] for item in items] == [409 if n == 7 else 201 for n in range(23)]
            assert standin.count_seen("_bulk") == 5
            assert await client.bulk("agent-names", []) == []

    run(test)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 401, 403])
def test_a_refusal_that_may_pass_is_the_indexers_and_does_not_shut_the_door(standin: StandIn, status: int) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.fail(status, "_create/1")
            with pytest.raises(IndexerDown) as caught:
                await client.create("agent-names", "1", named())
            assert str(status) in caught.value.message
            assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
            assert client.up
            assert await client.create("agent-names", "1", named())
            assert client.statistics()["counts"][str(status)] == 1

    run(test)


def test_one_item_that_was_refused_for_now_makes_the_whole_bulk_fail(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.reject_items(1)
            with pytest.raises(IndexerDown, match="could not store"):
                await client.bulk("agent-names", [({"create": {"_id": str(n)}}, named()) for n in range(3)])

    run(test)


def test_a_request_the_indexer_does_not_understand_is_our_fault(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            with pytest.raises(Unexpected, match="strict"):
                await client.create("agent-names", "1", {"unheard": "of"})
            assert client.up

    run(test)


def test_a_part_that_did_not_answer_is_no_answer(standin: StandIn) -> None:
    """As of a search over a shard that is not there: what is missing must not look like nothing."""

    async def test() -> None:
        async with opened(standin.url) as client:
            for answer in ({"_shards": {"total": 2, "successful": 1, "failed": 1}}, {"timed_out": True}):
                with pytest.raises(IndexerDown, match="a part"):
                    client._check_shards({**answer, "hits": {"hits": []}})
            client._check_shards({"_shards": {"total": 2, "successful": 1, "failed": 0}})

    run(test)


def test_what_cannot_be_reached_fails_at_once_and_is_found_again(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.stop()
            with pytest.raises(IndexerDown, match="cannot be reached"):
                await client.get("agent-names", "1")
            began = trio.current_time()
            for _ in range(100):
                with pytest.raises(IndexerDown):
                    await client.get("agent-names", "1")
            assert trio.current_time() - began < 0.2
            await trio.sleep(1.5)
            assert not client.up
            probes = client.statistics()["counts"]["probes"]
            assert 2 <= probes <= 4, "once a second"
            standin.start()
            await until_up(client)
            assert await client.get("agent-names", "1") is None
            told = client.statistics()
            assert (told["up"], told["counts"]["went_down"], told["counts"]["refused"]) == (True, 1, 100)
            assert told["down_s"] > 1

    run(test)


def test_a_broken_connection_repeats_what_may_be_repeated_and_nothing_else(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.drop("_doc/1", times=1)
            assert await client.get("agent-names", "1") is None
            standin.drop("_create/1", times=1)
            with pytest.raises(IndexerDown):
                await client.create("agent-names", "1", named())
            await until_up(client)
            assert standin.count_seen("_create/1") == 1
            assert await client.get("agent-names", "1") is not None, "it was stored, and nobody said so"

    run(test)


def test_a_slow_answer_ends_by_its_limit_and_holds_up_nobody(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "REQUEST_S", 1.0)

    async def test() -> None:
        async with opened(standin.url) as client:
            standin.slow(3, "_create/slow", times=1)
            waits: list[float] = []

            async def others() -> None:
                for _ in range(20):
                    began = trio.current_time()
                    await client.get("agent-names", "1")
                    waits.append(trio.current_time() - began)
                    await trio.sleep(0.02)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(others)
                with pytest.raises(IndexerDown, match="no answer within"):
                    await client.create("agent-names", "slow", named())
            assert max(waits) < 0.5
            assert client.up, "only that request was slow"

    run(test)


def test_an_indexer_that_hangs_is_noticed_before_the_limit_of_a_request(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLOW_S", 0.2), ("PROBE_S", 0.2), ("PROBE_TIMEOUT_S", 0.4)):
        monkeypatch.setattr(client_module, name, value)

    async def test() -> None:
        async with opened(standin.url) as client:
            standin.slow(3)
            async with trio.open_nursery() as nursery:

                async def victim() -> None:
                    with suppress(IndexerDown):
                        await client.get("agent-names", "1")

                nursery.start_soon(victim)
                with trio.fail_after(2):
                    while client.up:
                        await trio.sleep(0.01)
                with pytest.raises(IndexerDown):
                    await client.get("agent-names", "2")
                standin.mend()
                await until_up(client)

    run(test)


def test_more_than_the_waiting_room_holds_are_refused_at_once(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "WAITING", 12)

    async def test() -> None:
        async with opened(standin.url) as client:
            standin.slow(0.3, "_doc", times=12)
            refused: list[str] = []

            async def ask() -> None:
                try:
                    await client.get("agent-names", "1")
                except IndexerDown as error:
                    refused.append(error.message)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask)
            assert refused == ["12 requests are waiting for the indexer already"] * 8
            assert client.statistics()["under_way"] == 0

    run(test)


def test_a_box_that_starts_before_its_indexer_is_there_when_that_comes(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "START_S", 0.3)
    standin.stop()

    async def test() -> None:
        async with opened(standin.url) as client:
            assert not client.up
            with pytest.raises(IndexerDown):
                await client.get("agent-names", "1")
            standin.start()
            await until_up(client)
            assert await client.get("agent-names", "1") is None

    run(test)


def test_indices_that_were_removed_are_made_again(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url, prefix="gone-") as client:
            standin.cluster.indices.clear()
            with pytest.raises(IndexerDown, match="no such index"):
                await client.get("agents", "a1")
            with trio.fail_after(5):
                while "gone-agents" not in standin.cluster.indices:
                    await trio.sleep(0.02)
            assert await client.get("agents", "a1") is None

    run(test)


def test_preparing_twice_or_on_two_boxes_changes_nothing(standin: StandIn) -> None:
    async def test() -> None:
        async with trio.open_nursery() as nursery:

            async def box() -> None:
                async with opened(standin.url, prefix="same-") as client:
                    assert client.up

            for _ in range(3):
                nursery.start_soon(box)
        before = {name: index.mapping for name, index in standin.cluster.indices.items()}
        made = standin.count_seen(r"^PUT ")
        async with opened(standin.url, prefix="same-") as client:
            assert client.up
        assert standin.count_seen(r"^PUT ") == made
        assert {name: index.mapping for name, index in standin.cluster.indices.items()} == before
        assert {name.removeprefix("same-") for name in before} == {*mapping.FIELDS, "group-versions"}

    run(test)


def test_a_field_that_is_new_is_added_to_an_index_that_is_there(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url, prefix="old-"):
            pass
        del standin.cluster.indices["old-agents"].mapping["properties"]["last_seen_at"]
        async with opened(standin.url, prefix="old-"):
            assert standin.cluster.indices["old-agents"].mapping["properties"]["last_seen_at"] == {"type": "double"}

    run(test)


def test_credentials_and_certificates_are_checked(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    for name, ca in (("ca.pem", authority), ("stranger.pem", stranger)):
        ca.cert_pem.write_to_path(str(tmp_path / name))

    async def test(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async with opened(url, ca=tmp_path / "ca.pem", auth=("box", "s3cret")) as client:
            assert client.up
        monkeypatch.setattr(client_module, "START_S", 0.5)
        for ca, auth, problem in (
            ("stranger.pem", ("box", "s3cret"), "SSL"),
            ("ca.pem", ("box", "wr0ng"), "401"),
            ("ca.pem", None, "401"),
        ):
            async with opened(url, ca=tmp_path / ca, auth=auth) as client:
                told = client.statistics()
                assert not told["up"]
                assert problem in told["problem"]
                assert "wr0ng" not in str(told)

    with StandIn(tls=context, user="box", password="s3cret") as server, pytest.MonkeyPatch.context() as monkeypatch:
        run(lambda: test(server.url, monkeypatch))


@pytest.mark.parametrize("url", ["localhost:9200", "ftp://localhost", "https://", "http://box:s3cret@localhost:9200"])
def test_an_url_that_cannot_be_used_is_refused_with_its_reason(url: str) -> None:
    async def test() -> None:
        with pytest.raises(BadUsage) as caught:
            async with opened(url):
                pass
        assert "s3cret" not in str(caught.value)

    run(test)


def test_a_password_does_not_travel_in_the_clear() -> None:
    with pytest.raises(Unsafe, match="in the clear"):
        check_url("http://opensearch:9200", has_password=True)
    check_url("https://opensearch:9200", has_password=True)
    check_url("http://127.0.0.1:9200", has_password=True)
    check_url("http://opensearch:9200", has_password=False)


def test_the_log_says_once_that_it_is_away_and_once_that_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "PROBE_S", 0.01)

    async def test(server: StandIn) -> None:
        async with opened(server.url) as client:
            server.fail(503, "", times=1000)
            with suppress(IndexerDown):
                await client.get("agents", "a")
            client._suspect.set()
            probes = client.statistics()["counts"]["probes"]
            while client.statistics()["counts"]["probes"] < probes + 5:
                await trio.sleep(0.01)
            server.mend()
            await client.wait_up()
        told = [record.getMessage() for record in caplog.records if "the indexer" in record.getMessage()]
        assert len(told) == 2
        assert "answered HTTP 503" in told[0]
        assert "is up again" in told[1]

    with StandIn() as server:
        run(lambda: test(server))


def test_a_ca_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")

    async def test() -> None:
        for name in ("ca.pem", "missing.pem"):
            with pytest.raises(BadSetup, match=name):
                async with opened("https://localhost:1", ca=tmp_path / name):
                    pass

    run(test)


@contextmanager
def foreign_server(answer: bytes) -> Iterator[str]:
    """Answers everything with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi", "expected an OpenSearch"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]", "expected an OpenSearch"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "expected an OpenSearch"),
        (b"SSH-2.0-OpenSSH_9\r\n", "Error"),
        (b"", "Error"),
    ],
    ids=["html", "list", "object", "ssh", "nothing"],
)
def test_a_server_that_is_no_opensearch_is_told_apart(
    answer: bytes, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "START_S", 0.3)

    async def test(url: str) -> None:
        async with opened(url) as client:
            told = client.statistics()
            assert not told["up"]
            assert problem in told["problem"], told

    with foreign_server(answer) as url:
        run(lambda: test(url))


def test_a_call_that_is_cancelled_leaves_the_door_as_it_was(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.slow(0.5, "_doc/1", times=8)
            with trio.move_on_after(0.1):
                async with trio.open_nursery() as nursery:
                    for _ in range(8):
                        nursery.start_soon(client.get, "agent-names", "1")
            assert client.statistics()["under_way"] == 0
            assert await client.get("agent-names", "2") is None
            assert client.up

    run(test)


def test_a_box_stops_while_the_indexer_hangs(standin: StandIn) -> None:
    async def test() -> None:
        async with opened(standin.url) as client:
            standin.slow(2, "_doc")
            with trio.move_on_after(0.1):
                await client.get("agent-names", "1")
            began = trio.current_time()
        assert trio.current_time() - began < 0.3

    run(test)


# those who share a write


def test_who_comes_during_a_write_shares_the_next(standin: StandIn) -> None:
    async def test() -> None:
        writes: list[list[int]] = []

        async def write(values: list[int]) -> None:
            await trio.sleep(0.05)
            writes.append(values)

        together = Together(write)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(together.add, number)
        assert sorted(number for values in writes for number in values) == list(range(10))
        assert len(writes) <= 2

    run(test)


def test_a_write_that_fails_fails_for_those_who_shared_it(standin: StandIn) -> None:
    async def test() -> None:
        async def write(values: list[int]) -> None:
            await trio.sleep(0.01)
            if 13 in values:
                raise IndexerDown("not now")

        together, failed = Together(write), list[int]()

        async def add(number: int) -> None:
            try:
                await together.add(number)
            except CommsError:
                failed.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(add, 13)
            nursery.start_soon(add, 14)
        await add(15)
        assert sorted(failed) == [13, 14] or failed == [13]
        assert 15 not in failed

    run(test)


def test_who_is_cancelled_while_writing_does_not_take_the_others_along(standin: StandIn) -> None:
    async def test() -> None:
        written: list[int] = []

        async def write(values: list[int]) -> None:
            await trio.sleep(0.1)
            written.extend(values)

        together = Together(write)
        async with trio.open_nursery() as nursery:

            async def leader() -> None:
                with trio.move_on_after(0.05):
                    await together.add(1)

            nursery.start_soon(leader)
            await trio.sleep(0.01)
            nursery.start_soon(together.add, 2)
            nursery.start_soon(together.add, 3)
        assert sorted(written) == [2, 3]

    run(test)
