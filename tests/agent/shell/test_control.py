"""Asking for sessions: when, with which key, and what is started."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from osqbox.agent.client import Core, Failure, HostDetails, Identity, Send, Sleep
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.shell.control import ControlOptions, Poller, Sessions
from osqbox.agent.shell.offers import Offer, read_offers
from osqbox.agent.store import MemoryStore
from osqbox.shell_frames import Exit

WithBroker = Callable[[Callable[[Any, trio.Nursery], Any]], None]


def offered(*names: str, **more: Any) -> bytes:
    """A success as the design shows it: with an empty ``error``."""
    sessions = [{"session_id": name, "secret": f"secret-of-{name}"} for name in names]
    return json.dumps({"sessions": sessions, "error": "", "node_invalid": False, **more}).encode()


class Asked:
    """A poller by hand: what it sends, and what it is answered."""

    def __init__(self, interval_s: float = 5.0) -> None:
        identity = Identity("web-1", "U", "I", "E", 1, 0.0)
        flags = Flags({"tls_hostname": "localhost:1", "host_identifier": "hostname"})
        self.core = Core(
            identity, flags, Endpoints(), MemoryStore(), enroll_secret=lambda: "s", rng=random.Random(1), now=0.0
        )
        self.core.store.put("configurations", "nodeKey", "key-1")
        self.started: list[str] = []
        self._running: set[str] = set()
        self._thread = Poller(self.core, interval_s, self._start).run()
        self.command: Any = self._thread.send(None)

    def _start(self, offer: Offer) -> bool:
        if offer.session in self._running:
            return False
        self._running.add(offer.session)
        self.started.append(offer.session)
        return True

    def answer(self, body: bytes | Failure, *, after_s: float = 0.0) -> Any:
        assert isinstance(self.command, Send), self.command
        self.core.now += after_s
        self.command = self._thread.send(body)
        return self.command

    def slept(self) -> None:
        assert isinstance(self.command, Sleep), self.command
        self.core.now += self.command.seconds
        self.command = self._thread.send(False)


def test_it_asks_with_the_node_key() -> None:
    asked = Asked()
    assert (asked.command.call, asked.command.path) == ("shells", "/api/v1/shells")
    assert json.loads(asked.command.body) == {"node_key": "key-1"}
    assert asked.command.node_key == "key-1"


def test_a_held_question_is_asked_again_at_once() -> None:
    asked = Asked()
    assert isinstance(asked.answer(offered(), after_s=12.0), Send)


def test_a_server_that_does_not_hold_is_asked_each_interval() -> None:
    asked = Asked(interval_s=3.0)
    assert asked.answer(offered()) == Sleep(3.0)
    asked.slept()
    assert isinstance(asked.command, Send)


def test_a_new_session_is_started_once_and_the_next_question_follows_at_once() -> None:
    asked = Asked()
    assert isinstance(asked.answer(offered("s-1", "s-2")), Send)
    assert isinstance(asked.answer(offered("s-1")), Sleep)  # a server that repeats itself is not asked in a loop
    assert asked.started == ["s-1", "s-2"]


def test_an_invalid_key_enrolls_again_at_once() -> None:
    asked = Asked()
    command = asked.answer(json.dumps({"node_invalid": True}).encode())
    assert isinstance(command, HostDetails)
    asked.command = asked._thread.send({})
    assert asked.command.call == "enroll"
    assert isinstance(asked.answer(b'{"node_key": "key-2"}'), Send)
    assert asked.command.node_key == "key-2"
    assert isinstance(asked.answer(offered("s-1")), Send)
    assert asked.started == ["s-1"]


def test_an_invalid_key_with_sessions_starts_none() -> None:
    asked = Asked()
    asked.answer(offered("s-1", node_invalid=True))
    assert asked.started == []


def test_keys_that_stay_invalid_are_not_a_loop() -> None:
    asked = Asked()
    asked.answer(b'{"node_invalid": true}')
    asked.command = asked._thread.send({})
    asked.answer(b'{"node_key": "key-2"}')
    assert isinstance(asked.answer(b'{"node_invalid": true}'), Sleep)


@pytest.mark.parametrize("answer", [b'{"error": "unknown path"}', b"<html>404", b"[]", Failure("refused")])
def test_a_server_without_shells_is_asked_ever_more_rarely_and_told_of_once(answer: Any) -> None:
    asked = Asked()
    pauses = []
    for _ in range(8):
        asked.answer(answer)
        pauses.append(asked.command.seconds)
        asked.slept()
    assert pauses == [5, 10, 20, 40, 60, 60, 60, 60]
    assert [kind for kind, _ in asked.core.events] == ["shells_refused"]
    asked.answer(offered("s-1"))
    assert asked.started == ["s-1"]
    asked.answer(answer)
    assert asked.command.seconds == 5


@pytest.mark.parametrize(
    "entry",
    [
        1,
        "s",
        [],
        {},
        {"session_id": "s"},
        {"session_id": 1, "secret": "x"},
        {"session_id": "../x", "secret": "x"},
        {"session_id": "", "secret": "x"},
        {"session_id": "a/b", "secret": "x"},
        {"session_id": "s" * 200, "secret": "x"},
        {"session_id": "s", "secret": "x\r\nHost: evil"},
        {"session_id": "s", "secret": ""},
    ],
)
def test_an_offer_that_could_be_no_path_or_header_is_left_out(entry: Any) -> None:
    good = {"session_id": "good", "secret": "x"}
    assert [offer.session for offer in read_offers({"sessions": [entry, good]})] == ["good"]


def test_the_extremes_of_an_answer() -> None:
    assert read_offers({}) == []
    assert read_offers({"sessions": None}) == []
    assert read_offers({"sessions": {"a": 1}}) == []


# -- sessions ----------------------------------------------------------------------------------------------------


def test_a_session_is_started_once_and_no_more_than_allowed(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        sessions = Sessions(
            ControlOptions(max_sessions=2),
            broker.dialer,
            lambda kind, facts: events.append((kind, facts)),
            hostname="web-1",
        )
        await nursery.start(sessions.run)
        assert sessions.start(Offer("s-1", "x"))
        assert not sessions.start(Offer("s-1", "x"))
        assert sessions.start(Offer("s-2", "x"))
        assert not sessions.start(Offer("s-3", "x"))
        assert events == [("shell_ended", {"session": "s-3", "reason": "2 sessions are open, which is the most"})]
        links = [await broker.joined(), await broker.joined()]
        for link in links:
            await link.welcome()
            await link.until(b"root@web-1:~# ")
            await link.close()
        with trio.fail_after(5):
            while len(events) < 5:
                await trio.sleep(0.01)
        assert sessions.start(Offer("s-1", "x"))  # by then it is another one

    with_broker(test)


@pytest.mark.parametrize(
    ("options", "wish", "says"),
    [
        (ControlOptions(real=True, shell="/bin/sh"), {"shell": "/bin/bash"}, "with shell /bin/sh only"),
        (ControlOptions(real=True, user="nobody"), {"user": "root"}, "with user nobody only"),
        (ControlOptions(real=True), {"user": "no-such-user"}, "expected a user of this host"),
        (ControlOptions(real=True), {"shell": "/no/such"}, "expected a shell that can be executed"),
    ],
)
def test_what_the_operator_may_not_choose_is_refused(
    with_broker: WithBroker, options: ControlOptions, wish: dict[str, str], says: str
) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        sessions = Sessions(options, broker.dialer, lambda kind, facts: events.append((kind, facts)), hostname="web-1")
        await nursery.start(sessions.run)
        sessions.start(Offer("s-1", "x"))
        link = await broker.joined()
        await link.welcome(**wish)
        assert await link.until_exit() == Exit(reason="refused")
        link.is_done.set()
        with trio.fail_after(5):
            while not events:
                await trio.sleep(0.01)
        assert says in events[0][1]["reason"]

    with_broker(test)


def test_without_consent_no_program_runs_whatever_the_operator_asks_for(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        started: list[dict[str, Any]] = []
        sessions = Sessions(
            ControlOptions(), broker.dialer, lambda _kind, facts: started.append(facts), hostname="web-1"
        )
        await nursery.start(sessions.run)
        sessions.start(Offer("s-1", "x"))
        link = await broker.joined()
        await link.welcome(shell="/bin/sh", user="root")
        await link.until(b"# ")
        assert started[0]["shell"] == "scripted"
        assert started[0]["pid"] == 0

    with_broker(test)
