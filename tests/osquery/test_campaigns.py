"""Campaigns: every target ends in exactly one way, whatever gets lost in between."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox import tenants
from osqbox.errors import BadUsage
from osqbox.osquery import campaigns, nodes
from osqbox.osquery.campaigns import Order
from osqbox.osquery.messages import Answer
from osqbox.osquery.nodes import Node, Selector
from osqbox.tenants import TenantOptions

SQL = "select 1"


def start(world: Any, sql: str = SQL, reachable: Any = lambda chosen: {n.id for n in chosen}, **more: Any) -> Any:
    """A campaign; to all active nodes unless told otherwise."""
    order = Order(sql, more.pop("selector", Selector()), more.pop("timeout_s", 60.0), **more)
    campaign, _ = world.do(campaigns.start, order, reachable, world.new_id)
    return campaign


def answer(campaign: Any, ok: bool = True, rows: list[dict[str, Any]] | None = None, message: str = "") -> Answer:
    return Answer(campaign.id, ok, 0 if ok else 1, rows or [], message, {})


def states(world: Any, campaign: Any) -> dict[str, int]:
    counts: dict[str, int] = campaigns.get(world.db, campaign.id).counts
    return counts


def accounts(world: Any, campaign: Any) -> list[dict[str, Any]]:
    return [json.loads(ended.encoded) for ended in campaigns.ended_after(world.db, campaign.id, 0)]


def test_a_query_goes_out_and_its_answer_comes_back(world: Any) -> None:
    node = world.node()
    campaign = start(world)
    assert campaigns.has_work(world.db, node.id)
    assert world.do(campaigns.offer, node) == {"queries": {campaign.id: SQL}}
    assert states(world, campaign) == {"sent": 1}
    world.now += 1.5
    said = Answer(campaign.id, True, 0, [{"a": "1"}], "", {"wall_time_ms": 3})
    assert world.do(campaigns.write, node, [said]) == 1
    assert not campaigns.has_work(world.db, node.id)
    assert accounts(world, campaign) == [
        {
            "node": node.id,
            "hostname": "web-1.example",
            "status": "answered",
            "rows": [{"a": "1"}],
            "message": "",
            "osquery_status": 0,
            "stats": {"wall_time_ms": 3},
            "ended_at": "2023-11-14T22:13:21.500000Z",
        }
    ]
    assert campaigns.get(world.db, "latest").as_json()["summary"] == {
        "targets": 1, "answered": 1, "failed": 0, "expired": 0, "cancelled": 0, "open": 0,
        "first_ms": 1500.0, "last_ms": 1500.0,
    }  # fmt: skip
    assert world.kinds()[-3:] == ["campaign_started", "target_ended", "campaign_ended"]


def test_a_failed_query_keeps_its_message(world: Any) -> None:
    node = world.node()
    campaign = start(world)
    world.do(campaigns.write, node, [answer(campaign, ok=False, message="no such table: x")])
    (account,) = accounts(world, campaign)
    assert (account["status"], account["message"], account["osquery_status"]) == ("failed", "no such table: x", 1)


def test_what_was_read_but_not_written_is_offered_again(world: Any) -> None:
    node = world.node()
    campaign = start(world)
    for _ in range(5):
        assert campaign.id in world.do(campaigns.offer, node)["queries"]
    assert campaigns.open_targets(world.db, campaign.id) == [
        {"node": node.id, "hostname": "web-1.example", "status": "sent", "offers": 5}
    ]
    world.do(campaigns.write, node, [answer(campaign)])
    assert world.do(campaigns.offer, node) == {"queries": {}}


def test_only_the_first_answer_counts(world: Any) -> None:
    """A write sent again, or one that comes after the end, changes nothing and is no error."""
    node = world.node()
    campaign = start(world)
    assert world.do(campaigns.write, node, [answer(campaign, rows=[{"n": "1"}])]) == 1
    assert world.do(campaigns.write, node, [answer(campaign, ok=False)]) == 0
    assert states(world, campaign) == {"answered": 1}
    assert accounts(world, campaign)[0]["rows"] == [{"n": "1"}]
    assert world.events[-1].kind == "answers_ignored"


def test_an_answer_given_twice_in_one_write_counts_once(world: Any) -> None:
    node, other = world.node("a"), world.node("b")
    campaign = start(world)
    twice = [answer(campaign, rows=[{"n": "1"}]), answer(campaign, rows=[{"n": "2"}]), answer(campaign, ok=False)]
    assert world.do(campaigns.write, node, twice) == 1
    assert states(world, campaign) == {"answered": 1, "pending": 1}
    assert campaigns.get(world.db, campaign.id).ended_at is None
    assert [account["rows"] for account in accounts(world, campaign)] == [[{"n": "1"}]]
    assert world.do(campaigns.write, other, [answer(campaign)]) == 1
    assert campaigns.get(world.db, campaign.id).ended_at is not None
    assert world.kinds().count("target_ended") == 2
    assert world.kinds().count("campaign_ended") == 1


def test_a_node_answers_for_itself_only(world: Any) -> None:
    asked, other = world.node("a"), world.node("b")
    campaign = start(world, selector=Selector(nodes=("a",)))
    assert world.do(campaigns.offer, other) == {"queries": {}}
    assert world.do(campaigns.write, other, [answer(campaign)]) == 0
    assert world.do(campaigns.write, asked, [Answer("no-such-campaign", True, 0, [], "", {})]) == 0
    assert states(world, campaign) == {"pending": 1}


def test_a_campaign_of_a_tenant_stays_in_it(world: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    mine, theirs = world.node("a"), world.node("b", enroll_secret="s")
    start(world, selector=Selector(tenant="acme"))
    assert world.do(campaigns.offer, mine) == {"queries": {}}
    assert world.do(campaigns.offer, theirs)["queries"]
    assert campaigns.latest(world.db, 10, "default") == []
    assert len(campaigns.latest(world.db, 10, "acme")) == len(campaigns.latest(world.db, 10)) == 1
    started = next(event for event in world.events if event.kind == "campaign_started")
    assert started.tenant == "acme"


def test_expiry_ends_what_is_open(world: Any) -> None:
    first, second = world.node("a"), world.node("b")
    campaign = start(world, timeout_s=10)
    world.do(campaigns.write, first, [answer(campaign)])
    assert campaigns.next_expiry(world.db) == world.now + 10
    world.now += 9.9
    assert world.do(campaigns.expire) == 0
    world.now += 0.1
    assert world.do(campaigns.offer, second) == {"queries": {}}
    assert world.do(campaigns.expire) == 1
    assert states(world, campaign) == {"answered": 1, "expired": 1}
    assert campaigns.next_expiry(world.db) is None
    assert world.do(campaigns.write, second, [answer(campaign)]) == 0
    assert campaigns.count_open(world.db) == 0


def test_cancelling_ends_what_is_open(world: Any) -> None:
    node = world.node()
    campaign = start(world)
    world.do(campaigns.offer, node)
    assert world.do(campaigns.cancel, campaign.id).counts == {"cancelled": 1}
    assert world.do(campaigns.offer, node) == {"queries": {}}
    with pytest.raises(BadUsage, match="no campaign"):
        world.do(campaigns.cancel, "nothing")


def test_a_removed_node_ends_its_targets(world: Any) -> None:
    node = world.node()
    running = [start(world), start(world)]
    world.do(campaigns.cancel_for_node, node.id)
    world.do(nodes.delete, node.id)
    for campaign in running:
        assert states(world, campaign) == {"cancelled": 1}
        assert accounts(world, campaign)[0]["hostname"] == "web-1.example"


def test_nobody_to_ask_is_an_end_at_once(world: Any) -> None:
    campaign = start(world)
    assert campaign.ended_at == world.now
    assert campaign.summary()["targets"] == 0
    assert world.kinds()[-2:] == ["campaign_started", "campaign_ended"]


def test_without_a_selector_only_reachable_nodes_are_asked(world: Any) -> None:
    here, away = world.node("here"), world.node("away")

    def heard(chosen: list[Node]) -> set[str]:
        assert {node.id for node in chosen} == {here.id, away.id}
        return {here.id}

    def never(chosen: list[Node]) -> set[str]:
        raise AssertionError("not asked for")

    assert start(world, reachable=heard).summary()["targets"] == 1
    assert start(world, reachable=never, everyone=True).summary()["targets"] == 2
    assert start(world, reachable=never, selector=Selector(nodes=("away",))).summary()["targets"] == 1
    assert start(world, reachable=heard, selector=Selector(tenant="default")).summary()["targets"] == 1


def test_only_active_nodes_are_asked(world: Any) -> None:
    world.do(nodes.decide, world.node("a").id, "rejected")
    world.do(nodes.decide, world.node("b").id, "pending")
    assert start(world, everyone=True).summary()["targets"] == 0
    assert start(world, selector=Selector(nodes=("a", "b"))).summary()["targets"] == 0


@pytest.mark.parametrize(
    "order",
    [
        {"sql": ""}, {"sql": " \n"}, {"sql": "x" * (1024 * 1024 + 1)}, {"timeout_s": 0}, {"timeout_s": -1},
        {"timeout_s": 8 * 86400}, {"timeout_s": float("nan")}, {"accelerate_s": 0}, {"accelerate_s": -5},
    ],
)  # fmt: skip
def test_a_bad_order_is_refused(world: Any, order: dict[str, Any]) -> None:
    with pytest.raises(BadUsage):
        start(world, **order)
    assert world.count("osquery_campaigns") == 0


def test_discovery_and_acceleration_travel_with_the_queries(world: Any) -> None:
    node = world.node()
    plain, fast, faster = (
        start(world),
        start(world, accelerate_s=30, discovery="select 2"),
        start(world, accelerate_s=60),
    )
    offered = world.do(campaigns.offer, node)
    assert list(offered["queries"]) == [plain.id, fast.id, faster.id]
    assert offered["discovery"] == {fast.id: "select 2"}
    assert offered["accelerate"] == 60


def test_a_query_that_its_discovery_dropped_ends(world: Any) -> None:
    """osqueryd drops it silently; it was read twice and asked for again, so it never will be answered."""
    node = world.node()
    campaign = start(world, discovery="select 1 where 0")
    for _ in range(campaigns.DISCOVERY_OFFERS):
        assert world.do(campaigns.offer, node)["queries"]
    assert world.do(campaigns.offer, node) == {"queries": {}}
    (account,) = accounts(world, campaign)
    assert (account["status"], account["rows"]) == ("answered", [])
    assert "discovery" in account["message"]


def test_an_offer_is_bounded_and_the_rest_comes_next_time(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """osqueryd reads 8 MiB of an answer."""
    monkeypatch.setattr(campaigns, "OFFER_BYTES", 1000)
    monkeypatch.setattr(campaigns, "OFFER_QUERIES", 4)
    node = world.node()
    made = [start(world, sql="x" * 300) for _ in range(7)]
    seen: list[list[str]] = []
    while queries := world.do(campaigns.offer, node)["queries"]:
        seen.append(list(queries))
        world.do(campaigns.write, node, [Answer(name, True, 0, [], "", {}) for name in queries])
    assert [len(names) for names in seen] == [3, 3, 1]
    assert [name for names in seen for name in names] == [campaign.id for campaign in made]
    start(world, sql="x" * 5000)
    assert len(world.do(campaigns.offer, node)["queries"]) == 1


def test_answers_are_paged_in_the_order_in_which_they_came(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [world.node(name) for name in "abcde"]
    campaign = start(world)
    order = [hosts[number] for number in (3, 0, 4, 1, 2)]
    for node in order:
        world.do(campaigns.write, node, [answer(campaign)])
    assert [ended.node for ended in campaigns.ended_after(world.db, campaign.id, 0)] == [node.id for node in order]
    assert [ended.order for ended in campaigns.ended_after(world.db, campaign.id, 2, limit=2)] == [3, 4]
    monkeypatch.setattr(campaigns, "ANSWERS_BYTES", 1)
    assert len(campaigns.ended_after(world.db, campaign.id, 0)) == 1


def test_rows_of_any_json_are_kept(world: Any) -> None:
    node = world.node()
    campaign = start(world)
    rows = [{"text": "é\u2028\x00", "null": None, "big": 2**100, "nested": [{}], "float": 1.5}]
    world.do(campaigns.write, node, [answer(campaign, rows=rows)])
    assert accounts(world, campaign)[0]["rows"] == rows


def test_old_campaigns_are_dropped_with_their_answers_but_no_open_one(world: Any) -> None:
    node = world.node()
    first = start(world)
    ended = [start(world) for _ in range(5)]
    world.do(campaigns.write, node, [answer(campaign) for campaign in ended])
    world.do(campaigns.prune, 2)
    assert [campaign.id for campaign in campaigns.latest(world.db, 10)] == [ended[4].id, ended[3].id, first.id]
    assert world.count("osquery_targets") == 3
    assert world.db.execute("SELECT count FROM store_drops WHERE kind = 'campaigns'").fetchone() == (3,)


def test_looking_for_work_uses_an_index(world: Any) -> None:
    """It is done inline for every distributed read."""
    seen: list[str] = []
    world.db.set_trace_callback(seen.append)
    campaigns.has_work(world.db, "n")
    world.db.set_trace_callback(None)
    plan = str(world.db.execute(f"EXPLAIN QUERY PLAN {seen[-1]}").fetchall())
    assert "osquery_targets_open" in plan
    assert "SCAN" not in plan


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_target_is_ever_lost(kit: Any, data: st.DataObject) -> None:
    """Whatever nodes, operator and clock do in whatever order: each target is open or has ended once, and all end."""
    with kit.World() as world:
        fleet = [world.node(name) for name in ("a", "b")]
        made: list[Any] = []
        for _ in range(data.draw(st.integers(1, 25))):
            step = data.draw(st.sampled_from(("start", "read", "write", "late", "cancel", "wait", "remove")))
            node = data.draw(st.sampled_from(fleet))
            if step == "start":
                made.append(start(world, timeout_s=data.draw(st.sampled_from((1, 5))), everyone=True))
            elif step == "read":
                world.do(campaigns.offer, node)
            elif step in ("write", "late") and made:
                world.do(campaigns.write, node, [answer(data.draw(st.sampled_from(made)), ok=step == "write")])
            elif step == "cancel" and made:
                world.do(campaigns.cancel, data.draw(st.sampled_from(made)).id)
            elif step == "wait":
                world.now += data.draw(st.sampled_from((0.5, 2, 6)))
                world.do(campaigns.expire)
            elif step == "remove":
                world.do(campaigns.cancel_for_node, node.id)
        world.now += 10
        world.do(campaigns.expire)
        for campaign in made:
            summary = campaigns.get(world.db, campaign.id).summary()
            assert summary["open"] == 0
            assert (
                sum(summary[state] for state in ("answered", "failed", "expired", "cancelled"))
                == summary["targets"]
                == 2
            )
            orders = [ended.order for ended in campaigns.ended_after(world.db, campaign.id, 0)]
            assert orders == list(itertools.islice(itertools.count(1), 2))
        ended = [event for event in world.events if event.kind == "target_ended"]
        assert len(ended) == 2 * len(made)
        assert len([event for event in world.events if event.kind == "campaign_ended"]) == len(made)
