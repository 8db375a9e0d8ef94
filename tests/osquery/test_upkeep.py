"""What happens by itself: files that change, campaigns that expire, what is kept and what is dropped."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import audit, feed
from osqbox.errors import BadSetup, BadUsage
from osqbox.osquery import campaigns, carves, configs, logs, nodes, upkeep
from osqbox.osquery.amalgamate import Source
from osqbox.osquery.campaigns import Order
from osqbox.osquery.logs import LogFilter
from osqbox.osquery.messages import CarveBlock
from osqbox.osquery.nodes import Selector
from osqbox.osquery.upkeep import load_config_files
from osqbox.settings import Retention
from osqbox.store import drops

Run = Callable[..., None]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TICK_S", "SAVE_S", "PRUNE_S"):
        monkeypatch.setattr(upkeep, name, 0.005)


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.002)


_seconds = itertools.count(1_700_000_000)


def write(path: Path, content: Any) -> None:
    """Change a file so that its stamp differs, however coarse the file system's clock."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, (at := next(_seconds), at))


def query(sql: str) -> dict[str, Any]:
    return {"schedule": {"q": {"query": sql, "interval": 60}}}


async def served(api: Any) -> Any:
    key = await api.enroll()
    return await api.tell("/config", {"node_key": key})


# files


def test_config_files_are_served_with_their_names(api: Run, tmp_path: Path) -> None:
    one, other = tmp_path / "one.conf", tmp_path / "other.json"
    write(one, '// a comment, as osquery allows\n{"schedule": {"a": {"query": "select 1", "interval": 10}}}')
    write(other, {"options": {"host_identifier": "uuid"}})

    async def test(api: Any) -> None:
        await load_config_files(api.store, (one, other))
        config = await served(api)
        assert set(config) == {"schedule", "options"}
        assert [source["name"] for source in api.store.peek(configs.listing)] == ["one.conf", "other.json"]

    api(test)


def test_a_file_that_is_given_no_more_is_served_no_more(api: Run, tmp_path: Path) -> None:
    """What was made over the API stays."""
    one, other = tmp_path / "one.conf", tmp_path / "other.conf"
    write(one, query("select 1"))
    write(other, {"options": {"a": 1}})

    async def test(api: Any) -> None:
        await api.do(configs.put, Source("mine", {"options": {"mine": 1}}), "")
        await load_config_files(api.store, (one, other))
        await load_config_files(api.store, (other,))
        assert await served(api) == {"options": {"a": 1, "mine": 1}}
        revision = api.store.peek(configs.revision)
        await load_config_files(api.store, (other,))
        assert api.store.peek(configs.revision) == revision

    api(test)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_broken_file_at_the_start_is_an_error_and_changes_nothing(api: Run, tmp_path: Path, content: str) -> None:
    good, broken = tmp_path / "good.conf", tmp_path / "broken.conf"
    write(good, query("select 1"))
    write(broken, content)

    async def test(api: Any) -> None:
        for path in (broken, tmp_path / "missing.conf"):
            with pytest.raises(BadSetup, match=path.name):
                await load_config_files(api.store, (good, path))
        assert api.store.peek(configs.listing) == []

    api(test)


def test_a_changed_file_is_picked_up(api: Run, tmp_path: Path) -> None:
    path = tmp_path / "c.conf"
    write(path, query("select 1"))

    async def test(api: Any) -> None:
        api.upkeep.files = await load_config_files(api.store, (path,))
        key = await api.enroll()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            write(path, query("select 2"))
            await until(lambda: len(api.events("config_changed")) == 2)
            config = await api.tell("/config", {"node_key": key})
            assert config["schedule"]["q"]["query"] == "select 2"
            nursery.cancel_scope.cancel()

    api(test)


def test_a_changed_file_that_is_broken_keeps_the_old_config_and_is_told_once(
    api: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """... per kind of breakage; mended, it is served."""
    path = tmp_path / "c.conf"
    write(path, query("select 1"))

    async def test(api: Any) -> None:
        api.upkeep.files = await load_config_files(api.store, (path,))
        key = await api.enroll()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            write(path, "{broken")
            await until(lambda: api.events("config_rejected"))
            await trio.sleep(0.05)
            assert len(api.events("config_rejected")) == 1
            config = await api.tell("/config", {"node_key": key})
            assert config["schedule"]["q"]["query"] == "select 1"
            await trio.to_thread.run_sync(path.unlink)
            await until(lambda: len(api.events("config_rejected")) == 2)
            write(path, query("select 3"))
            await until(lambda: len(api.events("config_changed")) == 2)
            nursery.cancel_scope.cancel()
        rejected = api.events("config_rejected")[0].data
        assert rejected["path"] == str(path)
        assert "c.conf:1:2" in rejected["why"]

    api(test)
    assert len([record for record in caplog.records if "kept as it was" in record.message]) == 2


def test_a_file_that_cannot_be_taken_is_told_too(api: Run, tmp_path: Path) -> None:
    """Its name was given to an API source meanwhile."""
    path = tmp_path / "c.conf"
    write(path, query("select 1"))

    async def test(api: Any) -> None:
        api.upkeep.files = await load_config_files(api.store, (path,))
        await api.do(configs.remove, "c.conf")
        await api.do(configs.put, Source("c.conf", query("select 2")), "")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            write(path, query("select 3"))
            await until(lambda: api.events("config_rejected"))
            nursery.cancel_scope.cancel()
        assert "choose another name" in api.events("config_rejected")[0].data["why"]
        with pytest.raises(BadUsage):
            await load_config_files(api.store, (path,))

    api(test)


# what is counted and kept


def test_refusals_are_counted_and_told_in_the_feed(api: Run) -> None:
    async def test(api: Any) -> None:
        for _ in range(3):
            await api.ask("/nowhere")
        await api.ask("/config", {"node_key": "wrong"})
        api.handler.count_refused("handshake_plaintext")
        await api.upkeep.flush()
        told = {event.data["reason"]: event.data["count"] for event in api.events("requests_refused")}
        assert told == {"unknown_path": 3, "node_key_unknown": 1, "handshake_plaintext": 1}
        await api.upkeep.flush()
        assert len(api.events("requests_refused")) == 3
        assert api.handler.statistics()["refused"] == told
        assert api.handler.take_refused() == {}

    api(test)


def test_sightings_are_written(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        for _ in range(2):
            api.clock.at += 7
            await api.ask("/distributed/read", {"node_key": key})
        await api.upkeep.flush()
        assert api.store.peek(nodes.sightings) == [(api.node().id, api.clock.at, 7.0)]

    api(test)


def test_campaigns_expire_by_themselves(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.enroll()
        order = Order("select 1", Selector(), 30.0, everyone=True)
        campaign, _ = await api.do(campaigns.start, order, lambda _: (), api.new_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            await trio.sleep(0.03)
            assert api.store.peek(campaigns.count_open) == 1
            api.clock.at += 30
            await until(lambda: api.store.peek(campaigns.count_open) == 0)
            nursery.cancel_scope.cancel()
        assert api.store.peek(lambda db: campaigns.get(db, campaign.id)).counts == {"expired": 1}

    api(test)


def test_retention_drops_and_counts(api: Run) -> None:
    """Logs and events beyond their bounds go, oldest first, and are counted by kind."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        for number in range(30):
            body = {"node_key": key, "log_type": "result", "data": [{"n": number}]}
            assert await api.tell("/log", body) == {"node_invalid": False}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            await until(lambda: api.store.peek(drops).get("events"))
            nursery.cancel_scope.cancel()
        lines = api.store.peek(lambda db: list(logs.export(db, LogFilter())))
        assert lines == [json.dumps({"n": number}) for number in range(20, 30)]
        assert api.store.peek(drops)["logs"] == 20
        oldest, newest = api.store.peek(feed.bounds)
        assert newest - oldest + 1 == 15

    api(test, retention=Retention(log_lines=10, events=15))


def test_logs_are_bounded_in_bytes(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            for number in range(20):
                await api.ask("/log", {"node_key": key, "log_type": "result", "data": [{"n": f"{number:02}" * 45}]})
            await until(lambda: api.store.peek(logs.size_bytes) <= 1000)
            nursery.cancel_scope.cancel()
        lines = api.store.peek(lambda db: list(logs.export(db, LogFilter())))
        assert [line[7:9] for line in lines] == [f"{number:02}" for number in range(20 - len(lines), 20)]
        assert sum(map(len, lines)) == api.store.peek(logs.size_bytes) > 900
        assert api.store.peek(drops)["logs"] == 20 - len(lines)

    api(test, retention=Retention(log_bytes=1000))


CARVE = {"block_count": 2, "block_size": 5, "carve_size": 10, "carve_id": "g", "request_id": "r"}


async def carved_but_for_its_digest(api: Any) -> str:
    """What a box that ended in the middle of the last block's request leaves behind."""
    session: str = (await api.tell("/carve/begin", {**CARVE, "node_key": await api.enroll()}))["session_id"]
    for number in range(2):
        message = CarveBlock(number, session, "MDEyMzQ=", "r")
        await api.do(carves.receive_block, message, b"01234", None)
    assert api.store.peek(lambda db: carves.get(db, session))["status"] == "receiving"
    return session


def test_a_carve_that_was_left_without_its_digest_is_completed(api: Run) -> None:
    async def test(api: Any) -> None:
        session = await carved_but_for_its_digest(api)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            await until(lambda: api.events("carve_completed"))
            nursery.cancel_scope.cancel()
        facts = api.store.peek(lambda db: carves.get(db, session))
        assert (facts["status"], facts["sha256"]) == ("complete", hashlib.sha256(b"0123401234").hexdigest())

    api(test)


def test_deleted_expired_and_dropped_carves_free_their_room(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carves, "DROP_BYTES", 1)

    async def test(api: Any) -> None:
        session = await carved_but_for_its_digest(api)
        await api.handler.complete_carve(session)
        body = {"session_id": session, "block_id": 0, "request_id": "r", "data": "MDEyMzQ="}
        assert await api.tell("/carve/block", body) == {"node_invalid": False}
        await api.do(carves.delete, session)
        assert await api.ask("/carve/block", body) is None
        stalled = (await api.tell("/carve/begin", {**CARVE, "node_key": await api.enroll()}))["session_id"]
        await api.tell("/carve/block", {**body, "session_id": stalled})
        api.clock.at += carves.IDLE_S + 1

        def left() -> Any:
            return api.store.peek(
                lambda db: (
                    db.execute("SELECT count(*) FROM osquery_carve_blocks").fetchone()[0],
                    db.execute("SELECT session_id, state FROM osquery_carves").fetchall(),
                )
            )

        assert left()[0] == 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            await until(lambda: left() == (0, [(stalled, "expired")]))
            nursery.cancel_scope.cancel()

    api(test)


def test_old_logs_go_by_age(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        await api.ask("/log", {"node_key": key, "log_type": "status", "data": [{"m": "old"}]})
        api.clock.at += 100
        await api.ask("/log", {"node_key": key, "log_type": "status", "data": [{"m": "new"}]})
        await api.upkeep._prune()
        assert api.store.peek(lambda db: list(logs.export(db, LogFilter()))) == ['{"m": "new"}']

    api(test, retention=Retention(log_age_s=60))


def test_a_failure_is_logged_and_tried_again(
    api: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk for a while must not end the box."""
    failures = iter([OSError("disk full"), OSError("disk full")])
    real = logs.prune

    def sometimes(*args: Any) -> bool:
        if (failure := next(failures, None)) is not None:
            raise failure
        return real(*args)

    monkeypatch.setattr(logs, "prune", sometimes)

    async def test(api: Any) -> None:
        key = await api.enroll()
        await api.ask("/log", {"node_key": key, "log_type": "result", "data": [{}, {}]})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.upkeep.run)
            await until(lambda: api.store.peek(drops).get("logs"))
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.ERROR):
        api(test, retention=Retention(log_lines=1))
    assert len([record for record in caplog.records if "upkeep failed" in record.message]) == 2


def test_the_audit_keeps_its_newest_rows_and_its_chain(api: Run) -> None:
    async def test(api: Any) -> None:
        for number in range(8):
            await api.do(audit.record, "operator", "job.run", f"job-{number}")
        await api.upkeep._prune()
        rows = api.store.peek(audit.rows)
        assert [row["subject"] for row in rows] == ["job-5", "job-6", "job-7"]
        assert api.store.peek(audit.verify).broken_at is None
        assert api.store.peek(drops)["audit"] == 5

    api(test, retention=Retention(audit_rows=3))
