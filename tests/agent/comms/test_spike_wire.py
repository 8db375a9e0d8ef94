"""The spike agent against a server that says exactly what a test wants: streams, resumption, retries, downloads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws

from osqbox.agent.comms.effects import POLL, WEBSOCKET
from osqbox.agent.comms.messages import Stateless
from osqbox.agent.comms.options import Bounds, Options
from osqbox.agent.store import MemoryStore

from .strict_server import (
    KEY,
    QUIET,
    UUID,
    Answer,
    Seen,
    StrictServer,
    Talk,
    agent_of,
    living,
    meeting,
    run,
    serving,
    told,
)

OPTIONS = Options(load=QUIET)


def log(agent: Any, text: str) -> None:
    agent.core.push("stateless", agent.core.stateless_item(Stateless("logcollector", "file", {"text": text})))
    agent._settle()


def results(server: StrictServer) -> list[tuple[str, int, str]]:
    events = [event for seen in server.of("stateful") for event in seen.json["events"]]
    assert all(event["module"] == "command" and event["operation"] == "update" for event in events)
    return [(event["id"], *event["data"]["result"].values()) for event in events]


def test_login_configuration_and_events() -> None:
    async def main() -> None:
        async with serving(stream=waiting) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: bool(server.of("config")) and bool(server.of("commands")))
            log(agent, "hello")
            await server.until(lambda: bool(server.of("stateless")))
        login, config, stateless = server.of("login")[0], server.of("config")[0], server.of("stateless")[0]
        assert (login.target, login.json) == ("/api/v1/login", {"uuid": UUID, "password": KEY})
        assert login.header("User-Agent") == "osqbox-agent/5.0.0 (Endpoint; x86_64; Linux)"
        assert login.header("Host") == f"127.0.0.1:{server.port}"
        assert (config.method, config.target) == ("GET", "/api/v1/configuration")
        event = {"id": f"{UUID}-1", "module": "logcollector", "collector": "file", "data": {"text": "hello"}}
        assert stateless.json == {"events": [event]}
        assert stateless.header("Idempotency-Key") == hashlib.sha256(stateless.body).hexdigest()
        assert login.connection == config.connection == stateless.connection, "one connection is kept for requests"

    run(main)


def has(server: StrictServer, call: str, count: int) -> bool:
    return len(server.of(call)) == count


async def waiting(_seen: Seen, talk: Talk) -> None:
    await talk.start()
    await talk.send(b"retry: 2000\n\n: hello\n\n")
    while True:
        await trio.sleep(15)
        await talk.send(b":\n\n")


def test_commands_over_a_stream_are_resumed_where_it_was_cut() -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            match seen.header("Last-Event-ID"):
                case None:
                    await talk.command(3, "c3", "fetch-config")
                    await talk.command(5, "c5", "nonsense")
                    await talk.send(b"id: 6\nevent: command\ndata: {")  # and the connection ends
                case "5":
                    await talk.command(6, "c6", "set-group", {"groups": ["web"]})
                    await waiting(seen, talk)

        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(results(server)) == 3)
            await trio.sleep(1)
            statistics = agent.statistics
            assert (statistics.commands_received, statistics.reconnects, statistics.streams_open) == (3, 1, 1)
            assert (statistics.results_sent, statistics.commands_invalid) == (3, 1)
        first, second = server.of("commands")
        assert first.header("Accept") == "text/event-stream"
        assert 0.4 < second.at - first.at < 2
        assert server.of("stateful")[0].at < 15, "a command is done when it comes"
        assert results(server) == [
            ("c3", 0, "Configuration of 0 groups applied"),
            ("c5", 1, "Command is not valid"),
            ("c6", 0, "Configuration of 0 groups applied"),
        ]

    run(main)


def test_a_server_that_is_not_there_is_told_in_its_own_words() -> None:
    async def main() -> None:
        async with serving() as server:
            agent = agent_of(server, OPTIONS)
        async with living(agent):
            while not agent.statistics.errors:
                await trio.sleep(0.1)
        assert list(agent.statistics.errors) == ["login: Connection refused"]

    run(main)


def test_a_configuration_is_fetched_again_when_the_server_was_away() -> None:
    """The command has succeeded then, and failed at once where asking again would not help."""

    async def main() -> None:
        statuses = [200, 503, 401, 200, 404]

        def config(_seen: Seen) -> Answer:
            status = statuses.pop(0)
            return told(status, {"groups": ["default"], "files": []} if status == 200 else {"message": "no"})

        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            for seq in (1, 2):
                await talk.command(seq, f"c{seq}", "fetch-config")
            await waiting(seen, talk)

        async with serving(stream=stream, answers={"config": config}) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(results(server)) == 2)
        assert results(server) == [
            ("c1", 0, "Configuration of 0 groups applied"),
            ("c2", 1, "Cannot fetch the configuration: HTTP status 404"),
        ]
        assert len(server.of("login")) == 2

    run(main)


def test_a_command_that_comes_again_is_reported_again_and_not_done_again() -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            await talk.command(1, "c1", "fetch-config")
            await trio.sleep(30)
            await talk.send(b"event: reset\ndata: {}\n\n")
            await talk.command(1, "c1", "fetch-config")
            await talk.command(2, "c2", "fetch-config")
            await waiting(seen, talk)

        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(results(server)) == 3)
            statistics = agent.statistics
            assert (statistics.commands_received, statistics.commands_duplicate, statistics.resets) == (3, 1, 1)
            assert statistics.commands_out_of_order == 0
            assert agent.core.last_seq == 2
        assert [result[0] for result in results(server)] == ["c1", "c1", "c2"]
        assert len({result for result in results(server) if result[0] == "c1"}) == 1, "the same result both times"
        assert len(server.of("config")) == 3, "at the start, and once for each command"

    run(main)


def test_a_new_command_with_an_older_number_is_counted() -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            for seq in (7, 4):
                await talk.command(seq, f"c{seq}", "fetch-config")
            await waiting(seen, talk)

        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(results(server)) == 2)
            assert agent.statistics.commands_out_of_order == 1
            assert agent.core.last_seq == 7

    run(main)


@pytest.mark.parametrize(
    ("reason", "retry_ms", "wait_s", "logins"),
    [
        ("box_stopping", 4000, 4.4, 1),
        ("replaced", 100, 33, 1),
        ("token_expired", 0, 0, 2),
        ("too_slow", "soon", 1.1, 1),
    ],
)
def test_a_bye_is_obeyed(reason: str, retry_ms: object, wait_s: float, logins: int) -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            if len(server.of("commands")) == 1:
                data = json.dumps({"reason": reason, "retry_ms": retry_ms})
                await talk.send(f"event: bye\ndata: {data}\n\n".encode())
            await waiting(seen, talk)

        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(server.of("commands")) == 2)
            assert agent.statistics.byes == 1
        first, second = server.of("commands")
        assert second.at - first.at == pytest.approx(wait_s, abs=0.5)
        assert len(server.of("login")) == logins

    run(main)


def test_a_silent_stream_is_given_up() -> None:
    async def main() -> None:
        async def stream(_seen: Seen, talk: Talk) -> None:
            await talk.start()
            await trio.sleep_forever()

        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(server.of("commands")) == 2)
            assert agent.statistics.errors["commands: silence"] == 1
        first, second = server.of("commands")
        assert second.at - first.at == pytest.approx(60.75, abs=0.5)

    run(main)


@pytest.mark.parametrize(("status", "content_type"), [(200, "text/html"), (204, "text/event-stream"), (500, "x/y")])
def test_what_is_no_stream_is_tried_again_more_and_more_slowly(status: int, content_type: str) -> None:
    async def main() -> None:
        headers = (("Content-Type", content_type),)
        answers = {"commands": lambda _: Answer(status, b"" if status == 204 else b"{}", headers)}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(server.of("commands")) == 8)
            assert agent.statistics.streams_open == 0
        gaps = [later.at - earlier.at for earlier, later in pairwise(server.of("commands"))]
        assert gaps == pytest.approx([0.75, 1.5, 3, 6, 12, 22.5, 22.5], abs=0.4)

    run(main)


def test_a_busy_server_is_obeyed_and_a_batch_stays_the_same() -> None:
    async def main() -> None:
        scripted = [
            told(503, {"message": "busy", "code": 503}, ("Retry-After", "20")),
            told(401, {"message": "expired", "code": 401}),
            told(202, {"message": "Event received", "events": 1}),
        ]
        answers = {"stateless": lambda _: scripted.pop(0) if scripted else Answer(202)}
        async with serving(answers=answers, stream=waiting) as server, living(agent_of(server, OPTIONS)) as agent:
            log(agent, "one")
            await server.until(lambda: len(server.of("stateless")) == 1)
            log(agent, "two")
            await server.until(lambda: len(server.of("stateless")) == 4)
            await trio.sleep(1)
            statistics = agent.statistics
            assert (statistics.stateless_sent, statistics.stateless_acknowledged, statistics.logins) == (4, 2, 2)
        first, second, third, fourth = server.of("stateless")
        assert second.at - first.at == pytest.approx(22, abs=0.5), "Retry-After and a fifth of it at most"
        assert third.at - second.at < 0.5, "with a new token at once"
        assert first.body == second.body == third.body
        assert [event["data"]["text"] for event in fourth.json["events"]] == ["two"]

    run(main)


def test_a_batch_that_is_refused_for_good_does_not_block_the_next() -> None:
    async def main() -> None:
        scripted = [told(400, {"message": "line 1: expected ...", "code": 2709}), told(202, {})]
        answers = {"stateless": lambda _: scripted.pop(0)}
        async with serving(answers=answers, stream=waiting) as server, living(agent_of(server, OPTIONS)) as agent:
            log(agent, "bad")
            await server.until(lambda: len(server.of("stateless")) == 1)
            log(agent, "good")
            await server.until(lambda: len(server.of("stateless")) == 2)
            await trio.sleep(1)
            statistics = agent.statistics
            assert (statistics.events_refused, statistics.stateless_acknowledged) == (1, 1)

    run(main)


def test_items_that_were_not_stored_are_counted() -> None:
    async def main() -> None:
        result = {"index": "i", "id": "x", "result": "version conflict", "status": 409}
        answers = {"stateful": lambda _: told(200, {"results": [result, {**result, "status": 201}], "errors": True})}
        async with serving(answers=answers, stream=waiting) as server, living(agent_of(server, OPTIONS)) as agent:
            agent.core.push("stateful", b'{"id":"x"}')
            agent.core.push("stateful", b'{"id":"y"}')
            agent._settle()
            await server.until(lambda: len(server.of("stateful")) == 1)
            await trio.sleep(1)
            assert (agent.statistics.events_refused, agent.statistics.stateful_acknowledged) == (1, 2)

    run(main)


def test_a_kept_connection_that_the_server_closed_is_replaced_without_an_error() -> None:
    async def main() -> None:
        answers = {"stateless": lambda _: Answer(202, b"{}", (("Connection", "close"),))}
        async with serving(answers=answers, stream=waiting) as server, living(agent_of(server, OPTIONS)) as agent:
            for number in range(3):
                log(agent, str(number))
                await server.until(partial(has, server, "stateless", number + 1))
            await trio.sleep(1)
            assert agent.statistics.stateless_acknowledged == 3
            assert not agent.statistics.errors

    run(main)


# -- configuration and upgrades ----------------------------------------------------------------------------------


def test_a_configuration_is_asked_for_by_its_tag_and_checked() -> None:
    async def main() -> None:
        text = "events: {interval: 5}\n"
        file = {
            "group": "web",
            "version": 3,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "configuration": text,
        }
        scripted = [
            told(200, {"groups": ["web"], "files": [file]}, ("ETag", '"v3"')),
            Answer(304),
            told(200, {"groups": ["web"], "files": [{**file, "sha256": "0" * 64}]}),
            Answer(200, b"[]"),
        ]

        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            await trio.sleep(5)
            for seq in (1, 2, 3):
                await talk.command(seq, f"c{seq}", "fetch-config")
            await waiting(seen, talk)

        answers = {"config": lambda _: scripted.pop(0)}
        store = MemoryStore()
        options = replace(OPTIONS, keep_configuration=True)
        async with meeting(options, answers=answers, stream=stream, store=store) as (server, agent):
            await server.until(lambda: len(results(server)) == 3)
            assert agent.core.groups == ["web"]
        tags = [seen.header("If-None-Match") for seen in server.of("config")]
        assert tags == [None, '"v3"', '"v3"', '"v3"']
        assert [message for *_, message in results(server)] == [
            "Configuration is unchanged",
            "The configuration of web does not match its checksum",
            "Cannot read the configuration: expected a JSON object with files",
        ]

    run(main)


FILE = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(FILE).hexdigest()


def upgrading(*commands: str):  # type: ignore[no-untyped-def]
    async def stream(seen: Seen, talk: Talk) -> None:
        await talk.start()
        for seq, name in enumerate(commands, 1):
            await talk.command(seq, f"u{seq}", "upgrade", {"file_name": name})
        await waiting(seen, talk)

    return stream


def ranged(seen: Seen, **more: Any) -> Answer:
    start = int((seen.header("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    headers = [("ETag", '"f1"'), ("X-Checksum-SHA256", SHA256)]
    if start:
        assert seen.header("If-Range") == '"f1"'
        headers.append(("Content-Range", f"bytes {start}-{len(FILE) - 1}/{len(FILE)}"))
    return Answer(206 if start else 200, FILE[start:], tuple(headers), **more)


def test_an_upgrade_is_taken_up_where_it_broke_off_and_checked() -> None:
    async def main() -> None:
        cuts = [100_000, 50_000, None]
        answers = {"upgrade": lambda seen: ranged(seen, cut=cuts.pop(0))}
        async with meeting(OPTIONS, answers=answers, stream=upgrading("agent one.wpk")) as (server, agent):
            await server.until(lambda: bool(results(server)))
            assert (agent.statistics.upgrades, agent.statistics.upgrades_resumed) == (1, 2)
        assert results(server) == [("u1", 0, f"Fetched agent one.wpk: {len(FILE)} bytes, sha256 {SHA256}")]
        asked = server.of("upgrade")
        assert [seen.target for seen in asked] == ["/api/v1/upgrade?file_name=agent%20one.wpk"] * 3
        assert [seen.header("Range") for seen in asked] == [None, "bytes=100000-", "bytes=150000-"]

    run(main)


@pytest.mark.parametrize(
    ("answer", "requests", "problem"),
    [
        (told(404, {"message": "no such file", "code": 404}), 1, "HTTP status 404"),
        (Answer(200, FILE), 1, "the server tells no SHA-256 of it"),
        (Answer(200, FILE, (("X-Checksum-SHA256", "0" * 64),)), 2, f"expected SHA-256 {'0' * 64}, got {SHA256}"),
        (Answer(200, FILE * 2, (("X-Checksum-SHA256", SHA256),)), 1, f"larger than {len(FILE)} bytes"),
    ],
)
def test_an_upgrade_that_cannot_be_trusted_fails(answer: Answer, requests: int, problem: str) -> None:
    async def main() -> None:
        options = replace(OPTIONS, bounds=Bounds(upgrade_bytes=len(FILE)))
        async with meeting(options, answers={"upgrade": lambda _: answer}, stream=upgrading("f")) as (server, _):
            await server.until(lambda: bool(results(server)))
        assert results(server) == [("u1", 1, f"Cannot fetch f: {problem}")]
        assert len(server.of("upgrade")) == requests

    run(main)


def test_a_file_that_changes_meanwhile_is_fetched_anew() -> None:
    async def main() -> None:
        def answer(seen: Seen) -> Answer:
            if len(server.of("upgrade")) == 1:
                return Answer(200, b"x" * 5000, (("ETag", '"old"'), ("X-Checksum-SHA256", "1" * 64)), cut=1000)
            return Answer(200, FILE, (("X-Checksum-SHA256", SHA256),))

        async with meeting(OPTIONS, answers={"upgrade": answer}, stream=upgrading("f")) as (server, _):
            await server.until(lambda: bool(results(server)))
        assert results(server)[0][1] == 0
        assert server.of("upgrade")[1].header("If-Range") == '"old"'

    run(main)


# -- the other transports ----------------------------------------------------------------------------------------


class Socket:
    """The server's side of a WebSocket, frame by frame."""

    def __init__(self, seen: Seen, talk: Talk) -> None:
        self.stream = talk.stream
        self.connection = WSConnection(ConnectionType.SERVER)
        head = "".join(f"{name}: {value}\r\n" for name, value in seen.headers)
        self.connection.receive_data(f"GET {seen.target} HTTP/1.1\r\n{head}\r\n".encode())
        (self.request,) = self.connection.events()
        self.heard: list[Any] = []

    async def send(self, event: Any) -> None:
        await self.stream.send_all(self.connection.send(event))

    async def event(self, kind: str, seq: int, data: Any, pieces: int = 1) -> None:
        text = json.dumps({"event": kind, "id": seq, "data": data})
        size = -(-len(text) // pieces)
        for at in range(0, len(text), size):
            await self.send(ws.TextMessage(text[at : at + size], message_finished=at + size >= len(text)))

    async def listen(self) -> None:
        while True:
            self.connection.receive_data(bytes(await self.stream.receive_some()) or None)
            self.heard += self.connection.events()


def order(document_id: str, name: str) -> dict[str, Any]:
    return {"document_id": document_id, "action": {"name": name, "version": "", "args": {}}}


def test_commands_over_a_websocket() -> None:
    async def main() -> None:
        sockets: list[Socket] = []

        async def stream(seen: Seen, talk: Talk) -> None:
            socket = Socket(seen, talk)
            sockets.append(socket)
            assert isinstance(socket.request, ws.Request)
            assert socket.request.subprotocols == ["commands.v1"]
            await socket.send(ws.AcceptConnection(subprotocol="commands.v1"))
            if len(sockets) == 1:
                await socket.send(ws.Ping(b"there?"))
                await socket.event("command", 4, order("c4", "fetch-config"), pieces=3)
                await socket.send(ws.TextMessage("no json"))
                with trio.move_on_after(20):
                    await socket.listen()
                await socket.send(ws.CloseConnection(1001, "going away"))
                return
            await socket.event("command", 9, order("c9", "fetch-config"))
            await socket.listen()

        options = replace(OPTIONS, transport=WEBSOCKET)
        async with serving(stream=stream) as server, living(agent_of(server, options)) as agent:
            await server.until(lambda: len(results(server)) == 2)
            assert agent.statistics.reconnects == 1
            assert agent.statistics.errors == {"commands: closed with code 1001": 1}
        first, second = server.of("commands")
        assert first.header("Upgrade") == "websocket"
        assert (first.header("Authorization") or "").startswith("Bearer e30.")
        assert second.header("Last-Event-ID") == "4"
        assert any(isinstance(event, ws.Pong) for event in sockets[0].heard)

    run(main)


def test_a_websocket_that_is_refused_for_the_token_logs_in_again() -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            socket = Socket(seen, talk)
            if len(server.of("commands")) == 1:
                body = b'{"message":"Invalid token","code":401}'
                await socket.send(ws.RejectConnection(status_code=401, has_body=True))
                await socket.send(ws.RejectData(body))
                return
            await socket.send(ws.AcceptConnection())
            await socket.listen()

        options = replace(OPTIONS, transport=WEBSOCKET)
        async with serving(stream=stream) as server, living(agent_of(server, options)) as agent:
            await server.until(lambda: len(server.of("commands")) == 2)
            assert agent.statistics.errors == {"commands: HTTP status 401": 1}
        assert len(server.of("login")) == 2

    run(main)


def test_commands_by_polling() -> None:
    async def main() -> None:
        scripted: list[Any] = [
            Answer(204),
            told(408, {"message": "nothing", "code": 408}),
            told(200, {"commands": [order("c1", "fetch-config")], "last_event_id": 7}),
            told(503, {"message": "busy", "code": 503}, ("Retry-After", "3")),
        ]

        async def answer(_seen: Seen) -> Answer:
            if scripted:
                found: Answer = scripted.pop(0)
                return found
            await trio.sleep_forever()
            raise AssertionError

        options = replace(OPTIONS, transport=POLL)
        async with serving(answers={"commands": answer}) as server, living(agent_of(server, options)):
            await server.until(lambda: len(server.of("commands")) == 5 and bool(results(server)))
        asked = server.of("commands")
        places = [seen.target.partition("last_event_id=")[2] for seen in asked]
        assert {seen.target.partition("&")[0] for seen in asked} == {"/api/v1/commands?wait=60"}
        assert places == ["0", "0", "0", "7", "7"]
        assert asked[3].at - asked[0].at < 0.5
        assert asked[4].at - asked[3].at == pytest.approx(3.3, abs=0.3)

    run(main)


def test_a_full_command_queue_loses_nothing_that_will_be_offered_again() -> None:
    """What there is no room for is left to the server, which has no acknowledgement of it."""

    async def main() -> None:
        async def stream(_seen: Seen, talk: Talk) -> None:
            await talk.start()
            for seq in range(1, 6):
                await talk.command(seq, f"c{seq}", "fetch-config")
            await trio.sleep_forever()

        async def never(_seen: Seen) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        options = replace(OPTIONS, bounds=Bounds(queue_items=3))
        async with (
            serving(answers={"config": never}, stream=stream) as server,
            living(agent_of(server, options)),
        ):
            await server.until(lambda: len(server.of("commands")) == 2)
        second = server.of("commands")[1]
        assert second.header("Last-Event-ID") == "4", "one in hand and three that wait"

    run(main)


def test_an_agent_that_is_told_to_restart_takes_the_stream_up_again() -> None:
    async def main() -> None:
        async def stream(seen: Seen, talk: Talk) -> None:
            await talk.start()
            if seen.header("Last-Event-ID") is None:
                await talk.command(1, "c1", "restart")
            await waiting(seen, talk)

        store = MemoryStore()
        async with serving(stream=stream) as server, living(agent_of(server, OPTIONS, store=store)) as agent:
            await server.until(lambda: bool(results(server)))
            assert (agent.statistics.restarts, agent.statistics.streams_open) == (1, 1)
        assert results(server) == [("c1", 0, "Agent restarted")]
        assert [seen.header("Last-Event-ID") for seen in server.of("commands")] == [None, "1"]

    run(main)


def test_a_stopped_agent_takes_up_its_queue() -> None:
    async def main() -> None:
        store = MemoryStore()
        busy = {"stateless": lambda _: Answer(503)}
        async with meeting(OPTIONS, answers=busy, stream=waiting, store=store) as (server, agent):
            log(agent, "kept")
            await server.until(lambda: bool(server.of("stateless")))
        async with serving(stream=waiting) as server, living(agent_of(server, OPTIONS, store=store)):
            await server.until(lambda: bool(server.of("stateless")))
        assert [event["data"]["text"] for event in server.of("stateless")[0].json["events"]] == ["kept"]

    run(main)
