"""The audit over the operator API: the newest rows, filters, following, and the chain."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
import trio

from osqbox import audit
from osqbox.operator import audit as window

PATH = "/api/v1/audit"


async def fill(
    rig: Any, count: int, *, actor: str = "default/alice", action: str = "job.run", emit: bool = False
) -> None:
    def work(tx: Any) -> None:
        for number in range(count):
            audit.record(tx, actor, action, f"id{number}", serial=255, address="192.0.2.1", argv=["ls"])
        if emit:
            tx.emit("job_started")

    await rig.store.write(work)


def test_the_newest_rows_come_oldest_first(rig: Any) -> None:
    async def test(rig: Any) -> None:
        assert (await rig.get(PATH)).lines == []
        await fill(rig, 150)
        rows = (await rig.get(PATH)).lines
        assert [row["seq"] for row in rows] == list(range(51, 151))
        assert (rows[0]["actor"], rows[0]["serial"], rows[0]["data"]) == ("default/alice", "ff", {"argv": ["ls"]})
        assert [row["seq"] for row in (await rig.get(f"{PATH}?limit=2")).lines] == [149, 150]
        assert [row["seq"] for row in (await rig.get(f"{PATH}?after=10&limit=2")).lines] == [11, 12]
        assert len((await rig.get(f"{PATH}?after=0")).lines) == 150

    rig(test)


def test_rows_are_found_among_many_pages_of_others(rig: Any) -> None:
    async def test(rig: Any) -> None:
        await fill(rig, 1, actor="operator", action="shell.open")
        await fill(rig, 2500)
        await fill(rig, 1, actor="operator", action="shell.kill")
        for query in ("actor=operator", "action=shell", "actor=operator&after=0"):
            assert [row["action"] for row in (await rig.get(f"{PATH}?{query}")).lines] == ["shell.open", "shell.kill"]
        assert [row["seq"] for row in (await rig.get(f"{PATH}?action=shell.kill")).lines] == [2502]
        assert len((await rig.get(f"{PATH}?after=0")).lines) == 2502
        assert len((await rig.get(f"{PATH}?after=0&limit=1500")).lines) == 1500
        assert (await rig.get(f"{PATH}?subject=nothing")).lines == []

    rig(test)


@pytest.mark.parametrize(("look_s", "emit"), [(60, True), (0.02, False)])
def test_new_rows_are_followed_with_and_without_an_event(
    rig: Any, stream: Any, monkeypatch: pytest.MonkeyPatch, look_s: float, emit: bool
) -> None:
    """At once where an event tells of them, else at the next look."""
    monkeypatch.setattr(window, "LOOK_S", look_s)

    async def test(rig: Any) -> None:
        await fill(rig, 3)
        async with rig.served() as client, stream(client, f"{PATH}?follow=1&limit=1") as reader:
            with trio.fail_after(15):
                assert (await reader.object())["seq"] == 3
                await fill(rig, 2, emit=emit)
                assert [(await reader.object())["seq"] for _ in range(2)] == [4, 5]
                rig.parts.stop()
                assert await reader.object() is None

    rig(test)


def test_a_followers_filter_holds_for_what_comes(rig: Any, stream: Any) -> None:
    async def test(rig: Any) -> None:
        async with rig.served() as client, stream(client, f"{PATH}?follow=1&actor=operator") as reader:
            await fill(rig, 2, emit=True)
            await fill(rig, 1, actor="operator", emit=True)
            with trio.fail_after(15):
                assert (await reader.object())["seq"] == 3

    rig(test)


def test_the_chain_is_walked(rig: Any) -> None:
    async def test(rig: Any) -> None:
        empty = (await rig.get(f"{PATH}/verify")).json
        assert empty == {"rows": 0, "broken_at": None, "last_seq": 0, "chain": audit.GENESIS}
        await fill(rig, 5)
        whole = (await rig.get(f"{PATH}/verify")).json
        assert (whole["rows"], whole["broken_at"], whole["last_seq"]) == (5, None, 5)
        assert whole["chain"] == (await rig.get(f"{PATH}?limit=1")).lines[0]["chain"]
        db = sqlite3.connect(rig.store.path)
        db.execute("DROP TRIGGER audit_no_update")
        db.execute("UPDATE audit SET actor = 'somebody else' WHERE seq = 3")
        db.commit()
        db.close()
        assert (await rig.get(f"{PATH}/verify")).json["broken_at"] == 3

    rig(test)


def test_nobody_without_the_token_reads_it(rig: Any) -> None:
    async def test(rig: Any) -> None:
        await fill(rig, 1)
        for path in (PATH, f"{PATH}/verify"):
            assert (await rig.ask("GET", path)).status == 401
        await rig.get(f"{PATH}?limit=0", 400)
        await rig.get(f"{PATH}?after=-1", 400)
        await rig.get(f"{PATH}?unknown=1", 400)

    rig(test)


def test_a_reader_that_leaves_stops_following(rig: Any, stream: Any) -> None:
    async def test(rig: Any) -> None:
        async with rig.served() as client:
            async with stream(client, f"{PATH}?follow=1") as reader:
                assert await reader.line() == ""
                assert rig.parts.feed.statistics().followers == 1
            with trio.fail_after(15):
                while rig.parts.feed.statistics().followers:
                    await trio.sleep(0.001)

    rig(test)
