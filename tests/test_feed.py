"""The feed: numbered events in order, followers that are told what they missed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio
import trio.testing

from osqbox import feed
from osqbox.feed import Event, Feed, Gap
from osqbox.store import Store, Tx

T0 = 1_700_000_000.25


class StoppedClock:
    def now(self) -> float:
        return T0


@pytest.fixture
def db() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:", isolation_level=None)
    feed.create_tables(made)
    return made


@pytest.fixture(autouse=True)
def _closed(db: sqlite3.Connection) -> object:
    yield
    db.close()


def event(seq: int) -> Event:
    return Event(seq, T0, "thing_happened", None, None, {})


def test_events_are_numbered_in_order_and_found_again(db: sqlite3.Connection) -> None:
    first = feed.append(db, T0, "node_enrolled", "default", "n1", {"hostname": "web-1"})
    second = feed.append(db, T0, "log_received", "other", None, {"lines": 2})
    assert (first.seq, second.seq) == (1, 2)
    assert feed.events_after(db, 0) == [first, second]
    assert feed.events_after(db, 1) == [second]
    assert feed.events_after(db, 0, limit=1) == [first]
    assert feed.bounds(db) == (1, 2)


def test_events_are_chosen_by_tenant_and_kind(db: sqlite3.Connection) -> None:
    for tenant in ("a", "b", None):
        for kind in ("x", "y"):
            feed.append(db, T0, kind, tenant, None, {})
    assert [e.seq for e in feed.events_after(db, 0, tenant="b")] == [3, 4]
    assert [e.seq for e in feed.events_after(db, 0, kind="y")] == [2, 4, 6]
    assert [e.seq for e in feed.events_after(db, 0, tenant="a", kind="x")] == [1]


def test_a_number_is_never_used_again(db: sqlite3.Connection) -> None:
    feed.append(db, T0, "a", None, None, {})
    db.execute("DELETE FROM feed_events")
    assert feed.append(db, T0, "b", None, None, {}).seq == 2
    assert feed.bounds(db) == (2, 2)


def test_an_event_as_json(db: sqlite3.Connection) -> None:
    assert feed.append(db, T0, "a", "default", "n1", {"k": [1]}).as_json() == {
        "seq": 1,
        "at": "2023-11-14T22:13:20.250000Z",
        "kind": "a",
        "tenant": "default",
        "node": "n1",
        "data": {"k": [1]},
    }


def test_an_empty_feed_has_no_bounds(db: sqlite3.Connection) -> None:
    assert feed.bounds(db) == (0, 0)


def test_a_follower_gets_what_happens_from_now_on() -> None:
    async def main() -> None:
        made = Feed()
        made.publish([event(1)])
        follower = made.subscribe()
        made.publish([event(2), event(3)])
        assert [await follower.next(), await follower.next()] == [event(2), event(3)]
        assert follower.next_nowait() is None
        assert made.statistics() == feed.FeedStatistics(followers=1, last_seq=3, skipped=0)
        made.unsubscribe(follower)
        made.publish([event(4)])
        assert follower.next_nowait() is None
        assert made.statistics().followers == 0

    trio.run(main)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_gap_stands_where_the_events_are_missing(monkeypatch: pytest.MonkeyPatch, waiting: bool) -> None:
    """Room that comes free before the gap is told takes no later event: it would hide where the hole is."""
    monkeypatch.setattr(feed, "FOLLOWER_QUEUE_EVENTS", 3)

    async def main() -> None:
        made = Feed()
        follower = made.subscribe()
        made.publish([event(n) for n in range(1, 6)])
        got: list[Event | Gap | None] = [follower.next_nowait()]
        made.publish([event(6)])
        got += [await follower.next() if waiting else follower.next_nowait() for _ in range(3)]
        made.publish([event(7)])
        got.append(await follower.next())
        assert got == [event(1), event(2), event(3), Gap(3), event(7)]
        assert made.statistics().skipped == 3

    trio.run(main)


def test_followers_see_events_after_the_commit_and_only_those(tmp_path: Path) -> None:
    """What a follower hears it finds in the database; an undone job is never heard of."""

    def fails(tx: Tx) -> None:
        tx.emit("undone")
        raise LookupError

    async def main() -> None:
        made = Feed()
        store = Store.open(tmp_path / "a.db", (), StoppedClock(), made)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            follower = made.subscribe()
            with pytest.raises(LookupError):
                await store.write(fails)
            await store.write(lambda tx: tx.emit("done", tenant="t", node="n", size=3))
            heard = await follower.next()
            assert isinstance(heard, Event)
            assert (heard.kind, heard.tenant, heard.node, heard.data, heard.at) == ("done", "t", "n", {"size": 3}, T0)
            assert store.peek(lambda db: feed.events_after(db, 0)) == [heard]
            await store.aclose()

    trio.run(main)
