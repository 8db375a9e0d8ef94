"""Who is there: sightings, intervals, and reads that are held until there is work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from osqbox.osquery.nodes import Node
from osqbox.osquery.presence import Presence, PresenceStatistics

T0 = 1_700_000_000.0


def node(name: str) -> Node:
    return Node(name, "default", "active", name, name, "ubuntu", "", (), None)


def is_reachable(presence: Presence, now: float, name: str = "n") -> bool:
    return name in presence.reachable([node(name)], now)


def test_a_node_is_reachable_for_three_of_its_intervals() -> None:
    presence = Presence()
    assert not is_reachable(presence, T0)
    presence.read("n", T0)
    presence.read("n", T0 + 20)
    assert is_reachable(presence, T0 + 80)
    assert not is_reachable(presence, T0 + 80.1)
    presence.heard("n", T0 + 100)
    assert is_reachable(presence, T0 + 160)


def test_an_unknown_interval_is_osquerys_default_and_a_short_one_is_not_taken_literally() -> None:
    presence = Presence()
    presence.heard("n", T0)
    assert is_reachable(presence, T0 + 180)
    assert not is_reachable(presence, T0 + 181)
    for step in range(5):
        presence.read("n", T0 + step / 100)
    assert is_reachable(presence, T0 + 15)
    assert not is_reachable(presence, T0 + 16)


def test_a_held_read_is_as_reachable_as_can_be() -> None:
    presence = Presence()
    woken = presence.hold("n")
    assert is_reachable(presence, T0 + 1e9)
    presence.release("n", woken)
    assert not is_reachable(presence, T0 + 1e9)
    assert presence.statistics() == PresenceStatistics(nodes_seen=0, reads_held=0)


def test_sightings_are_taken_once_and_survive_a_restart() -> None:
    presence = Presence()
    presence.load([("n", T0, 10.0), ("m", T0, None)])
    assert presence.take_dirty() == {}
    assert is_reachable(presence, T0 + 30)
    assert not is_reachable(presence, T0 + 31)
    presence.heard("m", T0 + 1)
    presence.read("k", T0 + 2)
    presence.read("k", T0 + 5)
    assert presence.take_dirty() == {"m": (T0 + 1, None), "k": (T0 + 5, 3.0)}
    assert presence.take_dirty() == {}
    assert presence.seen() == {"n": T0, "m": T0 + 1, "k": T0 + 5}


def test_a_forgotten_node_is_not_written() -> None:
    presence = Presence()
    presence.heard("n", T0)
    presence.forget("n")
    presence.forget("n")
    assert presence.take_dirty() == presence.seen() == {}


def test_waking_reaches_every_read_of_the_nodes_named() -> None:
    async def main() -> None:
        presence = Presence()
        first, second, other = presence.hold("a"), presence.hold("a"), presence.hold("b")
        presence.wake(["a", "nobody"])
        assert [woken.is_set() for woken in (first, second, other)] == [True, True, False]
        presence.release("a", first)
        assert presence.statistics().reads_held == 2
        presence.release("a", first)
        presence.release("a", second)
        presence.release("b", other)
        assert presence.statistics().reads_held == 0

    trio.run(main)


def test_stopping_wakes_all_and_holds_no_more() -> None:
    presence = Presence()
    held = presence.hold("a")
    presence.stop()
    assert held.is_set()
    assert presence.hold("b").is_set()


@pytest.mark.parametrize("deed", ["hold", "heard"])
def test_reachability_is_asked_from_another_thread_while_the_loop_goes_on(deed: str) -> None:
    """The writer's thread asks in the transaction that starts a campaign."""
    presence = Presence()
    fleet = [node(str(number)) for number in range(300)]
    done = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not done.is_set():
                assert len(presence.reachable(fleet, T0)) <= len(fleet)
        except Exception as error:  # noqa: BLE001 - told by the test's own thread
            failures.append(error)

    def hold() -> None:
        for one in fleet:
            presence.release(one.id, presence.hold(one.id))

    def heard() -> None:
        for one in fleet:
            presence.read(one.id, T0)
            presence.forget(one.id)

    deeds: dict[str, Callable[[], Any]] = {"hold": hold, "heard": heard}
    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(200):
        deeds[deed]()
    done.set()
    thread.join()
    assert failures == []
