"""A real engine over a real unix socket: what it is sent, and every way it can fail."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import msgspec
import pytest
import trio

from osqbox.comms.bodies import read_stateless, stored_events
from osqbox.comms.engine import SocketEngine, StandIn
from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.intake import EngineDown, Intake
from osqbox.comms.messages import Agent, Event

from ._events import agent, event


class FakeEngine:
    """As upstream's: reads every line first, refuses a request in which one is bad, else queues all."""

    def __init__(self) -> None:
        self.queued: list[tuple[str, str, str, Any]] = []
        """Agent, module, collector and data."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.answer: Callable[[], tuple[int, bytes] | None] | None = None
        """Instead of the above; None closes the connection."""
        self.pause_s = 0.0
        self.is_refused: Callable[[Any], bool] = lambda _: False
        self.connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            async with stream:
                await self._serve(stream)
        except trio.BrokenResourceError:
            pass

    async def _serve(self, stream: trio.SocketStream) -> None:
        http, body, head = h11.Connection(h11.SERVER), b"", None
        while not isinstance(found := http.next_event(), h11.EndOfMessage):
            if found is h11.NEED_DATA:
                http.receive_data(await stream.receive_some())
            elif isinstance(found, h11.Request):
                head = found
            elif isinstance(found, h11.Data):
                body += found.data
            else:
                return
        assert head is not None
        headers = {name.decode(): value.decode() for name, value in head.headers}
        self.requests.append((head.method.decode(), head.target.decode(), headers))
        await trio.sleep(self.pause_s)
        answered = self.answer() if self.answer else self.judge(body)
        if answered is not None:
            status, text = answered
            response = h11.Response(status_code=status, headers=[("Content-Length", str(len(text)))])
            sent = (response, h11.Data(data=text), h11.EndOfMessage())
            await stream.send_all(b"".join(http.send(each) or b"" for each in sent))

    def judge(self, body: bytes) -> tuple[int, bytes]:
        parsed = read_stateless(body)
        if any(self.is_refused(each.data) for each in parsed.events):
            return 400, b'{"error": "Invalid event", "code": 400}'
        self.queued += [(parsed.facts["id"], each.module, each.collector, each.data) for each in parsed.events]
        return 200, b""

    def numbers(self, uuid: str = "a1") -> list[int]:
        return [data["number"] for who, _, _, data in self.queued if who == uuid]


def waiting(number: int, uuid: str) -> Event:
    return event(number, uuid, data=msgspec.Raw(b'{"number":%d}' % number))


async def known(uuid: str) -> Agent | None:
    await trio.lowlevel.checkpoint()
    return None if uuid == "gone" else agent(uuid)


@asynccontextmanager
async def served(path: Path, fake: FakeEngine) -> AsyncIterator[None]:
    with trio.socket.socket(trio.socket.AF_UNIX) as listening:
        await listening.bind(str(path))
        listening.listen(64)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, fake.serve, [trio.SocketListener(listening)])
            yield
            nursery.cancel_scope.cancel()
    await trio.Path(path).unlink()


def with_engine(test: Callable[[FakeEngine, SocketEngine], Any], directory: Path, **options: Any) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            fake, path = FakeEngine(), directory / "engine.sock"
            async with served(path, fake):
                await test(fake, SocketEngine(path, known, **options))

    trio.run(main)


def test_each_agents_events_arrive_as_one_request(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        events = [event(n, f"a{n % 3}", module=f"m{n}") for n in range(9)]
        done = await engine.deliver(events)
        assert (done.delivered, done.dropped, done.left) == (9, 0, [])
        assert len(fake.requests) == 3
        method, target, headers = fake.requests[0]
        assert (method, target, headers["content-type"]) == ("POST", "/events/stateless", "application/x-ndjson")
        for uuid, wanted in (("a0", [0, 3, 6]), ("a1", [1, 4, 7]), ("a2", [2, 5, 8])):
            assert fake.numbers(uuid) == wanted
        assert ("a1", "m4", "file", {"number": 4}) in fake.queued
        assert engine.statistics()["up"] is True

    with_engine(test, tmp_path)


def test_an_agent_that_was_deleted_is_still_named(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        assert (await engine.deliver([event(1, "gone")])).delivered == 1
        assert fake.numbers("gone") == [1]

    with_engine(test, tmp_path)


def test_a_refused_event_is_found_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.is_refused = lambda data: data["number"] in (3, 77)
        done = await engine.deliver([event(n) for n in range(100)])
        assert (done.delivered, done.dropped, done.left) == (98, 2, [])
        assert fake.numbers() == [n for n in range(100) if n not in (3, 77)], "in order"
        assert len(fake.requests) < 40
        assert "refused 2 events, such as one of agent a1: Invalid event" in caplog.text

    with_engine(test, tmp_path)


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        engine = SocketEngine(tmp_path / "none.sock", known)
        with pytest.raises(EngineDown, match=r"none\.sock"):
            await engine.deliver([event(1)])
        assert engine.statistics()["up"] is False
        with pytest.raises(CommsError) as caught:
            await engine.scan(b"{}")
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
        assert "none.sock" not in caught.value.message

    trio.run(main)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((500, b'{"error": "queue\\nis full"}'), "answered 500: queue is full"),
        ((404, b"not here"), "answered 404: not here"),
        ((503, b""), "answered 503"),
        (None, "expected a whole HTTP answer|reset"),
    ],
)
def test_failures_leave_everything_waiting(tmp_path: Path, answer: Any, why: str) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.answer = lambda: answer
        with pytest.raises(EngineDown, match=why):
            await engine.deliver([event(1), event(2)])
        fake.answer = None
        assert (await engine.deliver([event(1), event(2)])).delivered == 2

    with_engine(test, tmp_path)


def test_an_answer_that_is_no_http(tmp_path: Path) -> None:
    async def main() -> None:
        async def babble(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(b"SSH-2.0-OpenSSH\r\n\r\n")

        fake, path = FakeEngine(), tmp_path / "engine.sock"
        fake.serve = babble  # type: ignore[method-assign]
        async with served(path, fake):
            with pytest.raises(EngineDown):
                await SocketEngine(path, known).deliver([event(1)])

    trio.run(main)


def test_an_endless_answer_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osqbox.comms.engine.ANSWER_MAX_BYTES", 1000)

    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.answer = lambda: (200, b"x" * 2000)
        with pytest.raises(EngineDown, match="longer than 1000 bytes"):
            await engine.deliver([event(1)])

    with_engine(test, tmp_path)


def test_a_slow_engine_is_waited_for_so_long(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.pause_s = 10
        with pytest.raises(EngineDown, match=r"no answer within 0\.2 s"):
            await engine.deliver([event(1, f"a{n}") for n in range(20)])
        assert fake.connections <= 4, "the first ones wait, the others need not"

    with_engine(test, tmp_path, timeout_s=0.2)


def test_what_was_delivered_before_the_engine_went_is_not_sent_again(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.is_refused = lambda data: data["number"] == 2
        events = [event(n) for n in range(4)]
        judge = fake.judge
        bodies: list[bytes] = []

        def counted(body: bytes) -> tuple[int, bytes]:
            bodies.append(body)
            return (500, b"") if len(bodies) == 3 else judge(body)

        fake.judge = counted  # type: ignore[method-assign]
        done = await engine.deliver(events)
        assert (done.delivered, done.dropped, list(done.left)) == (2, 0, [2, 3])
        assert "answered 500" in done.why
        rest = await engine.deliver([events[place] for place in done.left])
        assert (rest.delivered, rest.dropped) == (1, 1)
        assert fake.numbers() == [0, 1, 3]

    with_engine(test, tmp_path)


def test_an_indexer_that_is_down_holds_events_back(tmp_path: Path) -> None:
    """Without it nobody can say who the agent is."""

    async def main() -> None:
        async def find(_: str) -> Agent | None:
            raise IndexerDown("no answer from the indexer")

        with pytest.raises(EngineDown, match="no answer from the indexer"):
            await SocketEngine(tmp_path / "engine.sock", find).deliver([event(1)])

    trio.run(main)


def test_a_storm_with_an_engine_that_comes_and_goes(tmp_path: Path) -> None:
    """Nothing is lost, nothing twice, every agent's events in order."""

    async def main() -> None:
        path, fake = tmp_path / "engine.sock", FakeEngine()
        intake = Intake(SocketEngine(path, known))
        with trio.fail_after(25):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(intake.run)
                for around in range(3):
                    for number in range(100):
                        uuid = f"a{number % 7}"
                        intake.take([waiting(around * 1000 + number * 10 + each, uuid) for each in range(5)])
                    while not intake.statistics().trouble:
                        await trio.sleep(0.01)
                    async with served(path, fake):
                        while intake.statistics().waiting:
                            await trio.sleep(0.01)
                assert await intake.drain(1) == 0
        assert intake.statistics().delivered == len(fake.queued) == 1500
        for agent_number in range(7):
            numbers = fake.numbers(f"a{agent_number}")
            assert numbers == sorted(set(numbers))

    trio.run(main)


def test_scans_are_passed_on(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        fake.answer = lambda: (200, b'{"findings": []}')
        assert await engine.scan(b'{"type": "packagelist"}') == (200, b'{"findings": []}')
        assert fake.requests[-1][:2] == ("POST", "/vulnerability/scan")
        fake.answer = lambda: (400, b'{"error": "no packages"}')
        assert (await engine.scan(b"{}"))[0] == 400
        fake.answer = lambda: (404, b"")
        with pytest.raises(CommsError, match="does not scan"):
            await engine.scan(b"{}")
        with pytest.raises(CommsError, match="start with --engine-socket"):
            await StandIn(None).scan(b"{}")  # type: ignore[arg-type]

    with_engine(test, tmp_path)


def test_events_of_both_dialects_reach_the_engine_alike(tmp_path: Path) -> None:
    async def test(fake: FakeEngine, engine: SocketEngine) -> None:
        data = {"message": 'quoted "text" and\na line', "ü": [1, None]}
        g1 = "\n".join(map(json.dumps, ({"agent": {"id": "a1"}}, {"module": "m", "collector": "c"}, data)))
        spike = json.dumps({"module": "m", "collector": "c", "data": data})
        for body in (g1, spike):
            parsed = read_stateless(body.encode())
            await engine.deliver(stored_events(parsed, agent(), now=0.0, new_id=lambda: "r", key=""))
        assert fake.queued == [("a1", "m", "c", data)] * 2

    with_engine(test, tmp_path)
