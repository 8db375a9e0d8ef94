"""Terminals over WebSocket: who gets one, what goes through it, and GoTTY's clients."""

from __future__ import annotations

import base64
import json

import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected

from osqbox import shell_frames as frames
from osqbox.shell_frames import CloseCode, FrameType, Role, Size

from .shell_desk import Viewer, opened, websocket

TOKEN = "a-token-of-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BASIC = {"Authorization": "Basic " + base64.b64encode(f"anyone:{TOKEN}".encode()).decode()}
V1 = ["shell.v1"]


@pytest.fixture
def desk(rig, tmp_path):
    """Runs an async test with a `Desk` and an HTTP client of its real listener."""

    def run(test, **bounds):
        async def main(box):
            async with opened(box, tmp_path / "shells", **bounds) as desk, box.served() as client:
                await test(desk, client)

        rig(main)

    return run


async def refusal(client, path, headers=None, subprotocols=V1):
    """Status and body of a handshake that is refused; 101 when it is not."""
    try:
        async with websocket(client, path, headers or {}, list(subprotocols)):
            return 101, {}
    except ConnectionRejected as rejected:
        return rejected.status_code, json.loads(rejected.body)


def terminal(session):
    return f"/api/v1/shells/{session}/terminal"


async def close_code(socket):
    try:
        while True:
            await socket.get_message()
    except ConnectionClosed as closed:
        return closed.reason.code


async def comes_true(fact):
    with trio.fail_after(5):
        while not fact():
            await trio.sleep(0.005)


def test_what_is_typed_reaches_the_shell_and_its_exit_comes_back(desk):
    async def test(desk, client):
        session, agent = await desk.open()
        async with websocket(client, terminal(session), BEARER, V1) as socket:
            assert socket.subprotocol == "shell.v1"
            viewer = Viewer(socket)
            welcome = await viewer.greet(cols=100, rows=30)
            assert (welcome.session, welcome.hostname, welcome.role) == (session, "web-1", "controller")
            await viewer.until(b"$ ")
            await viewer.type(b"ls\r")
            await viewer.until(b"ran ls\r\n")
            await viewer.say(frames.resize(Size(120, 40)))
            await comes_true(lambda: agent.sizes[-1] == (120, 40))
            await viewer.type(b"exit 7\r", 3)
            ended = frames.parse(await viewer.until_type(FrameType.EXIT), frames.Exit)
            assert (ended.code, ended.signal) == (7, None)
            assert await close_code(socket) == 1000
        assert bytes(agent.typed) == b"ls\rexit 7\r"
        facts = (await desk.box.get(f"/api/v1/shells/{session}")).json
        assert (facts["state"], facts["exit_code"], facts["end_reason"]) == ("ended", 7, "exit")

    desk(test)


# the door

OURS = "http://{host}"


@pytest.mark.parametrize(
    ("origin", "with_bearer", "with_ticket"),
    [
        (OURS, 101, 101),
        (None, 101, 403),
        ("null", 403, 403),
        ("", 403, 403),
        ("http://127.0.0.1:1", 403, 403),
        ("http://127.0.0.1", 403, 403),
        ("http://evil.{host}", 403, 403),
        ("http://{host}.evil.example", 403, 403),
        ("http://{host}@evil.example", 403, 403),
        ("http://user@{host}", 403, 403),
        ("HTTP://{host}", 403, 403),
        ("http://{host}/", 403, 403),
        ("http://LOCALHOST:8080", 403, 403),
        ("http://localhost.:8080", 403, 403),
        ("ws://{host}", 403, 403),
        ("file://{host}", 403, 403),
        ("http://evil.example http://{host}", 403, 403),
    ],
)
def test_every_origin_has_its_answer(desk, origin, with_bearer, with_ticket):
    async def test(desk, client):
        session, _ = await desk.open()
        host = client.base_url.netloc.decode()
        given = {} if origin is None else {"Origin": origin.format(host=host)}
        status, body = await refusal(client, terminal(session), {**BEARER, **given})
        assert (status, body.get("reason")) == (with_bearer, None if with_bearer == 101 else "foreign")
        ticket = (await desk.box.post(f"/api/v1/shells/{session}/tickets", {}, 201)).json["ticket"]
        status, body = await refusal(client, terminal(session), given, [*V1, f"ticket.{ticket}"])
        assert (status, body.get("reason")) == (with_ticket, None if with_ticket == 101 else "foreign")

    desk(test)


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({}, 401, "unauthorized"),
        ({"Authorization": "Bearer wrong"}, 401, "unauthorized"),
        (BASIC, 401, "unauthorized"),
        ({**BEARER, "Host": "evil.example"}, 421, "wrong_host"),
        ({**BEARER, "Sec-Fetch-Site": "cross-site"}, 403, "foreign"),
        ({**BEARER, "Sec-Fetch-Site": "same-site"}, 403, "foreign"),
    ],
)
def test_strangers_and_foreign_pages_get_no_terminal(desk, headers, status, reason):
    async def test(desk, client):
        session, _ = await desk.open()
        for path in (terminal(session), terminal("unknown"), "/nope"):
            found, body = await refusal(client, path, headers)
            assert (found, body["reason"]) == (status, reason)
        assert TOKEN not in json.dumps(body)
        assert (await desk.box.get(f"/api/v1/shells/{session}")).json["viewers"] == []

    desk(test)


def test_a_header_given_twice_means_nothing(rig, tmp_path):
    """No client library sends one, so the scope is made by hand."""

    async def test(box):
        async with opened(box, tmp_path / "shells") as desk:
            session, _ = await desk.open()
            sent = []
            headers = [(b"host", b"127.0.0.1:8080"), (b"authorization", f"Bearer {TOKEN}".encode())]
            origins = [(b"origin", b"http://127.0.0.1:8080"), (b"origin", b"http://evil.example")]

            async def receive():
                return {"type": "websocket.connect"}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "websocket",
                "path": terminal(session),
                "raw_path": terminal(session).encode(),
                "headers": headers + origins,
                "subprotocols": V1,
                "extensions": {"websocket.http.response": {}},
            }
            await box.app(scope, receive, send)
            assert [message.get("status") for message in sent] == [403, None]

    rig(test)


@pytest.mark.parametrize(
    ("path", "subprotocols", "status"),
    [
        ("/api/v1/shells/{session}/terminal", [], 400),
        ("/api/v1/shells/{session}/terminal", ["webtty"], 400),
        ("/api/v1/shells/{session}/gotty/ws", ["shell.v1"], 400),
        ("/api/v1/shells/{session}/terminal/", V1, 404),
        ("/api/v1/shells/{session}", V1, 404),
        ("/api/v1/shells//terminal", V1, 404),
        ("/api/v1/shells/unknown/terminal", V1, 404),
        ("/api/v1/shells/{session}%2Fterminal", V1, 404),
        ("/api/v1/shells/../{session}/terminal", V1, 404),
        ("/api/v1/shells/{session}/gotty/auth_token.js", V1, 404),
    ],
)
def test_wrong_paths_and_subprotocols_are_told(desk, path, subprotocols, status):
    async def test(desk, client):
        session, _ = await desk.open()
        assert (await refusal(client, path.format(session=session), BEARER, subprotocols))[0] == status

    desk(test)


def test_without_control_there_is_no_terminal(rig):
    async def test(box):
        async with box.served() as client:
            assert (await refusal(client, terminal("any"), BEARER))[0] == 404

    rig(test)


def test_a_ticket_opens_once_and_only_its_own_session(desk):
    async def test(desk, client):
        one, _ = await desk.open("web-1")
        two, _ = await desk.open("web-2")
        ours = {"Origin": f"http://{client.base_url.netloc.decode()}"}

        async def ticket():
            return "ticket." + (await desk.box.post(f"/api/v1/shells/{one}/tickets", {}, 201)).json["ticket"]

        first = await ticket()
        assert (await refusal(client, terminal(one), ours, [*V1, first]))[0] == 101
        assert (await refusal(client, terminal(one), ours, [*V1, first]))[1]["reason"] == "ticket"
        assert (await refusal(client, terminal(two), ours, [*V1, await ticket()]))[0] == 403
        assert (await refusal(client, terminal(one), ours, [*V1, "ticket."]))[0] == 403
        # a wrong ticket is not made good by the token
        assert (await refusal(client, terminal(one), {**ours, **BEARER}, [*V1, "ticket.wrong"]))[0] == 403

    desk(test)


def test_a_ticket_to_watch_can_neither_type_nor_open(desk):
    async def test(desk, client):
        session, agent = await desk.open()
        ours = {"Origin": f"http://{client.base_url.netloc.decode()}"}
        ticket = (await desk.box.post(f"/api/v1/shells/{session}/tickets", {"role": "viewer"}, 201)).json["ticket"]
        async with websocket(client, terminal(session), ours, [*V1, f"ticket.{ticket}"]) as socket:
            viewer = Viewer(socket)
            assert (await viewer.greet(role="controller", cols=3, rows=3)).role == "viewer"
            await viewer.type(b"rm -rf /\r")
            await viewer.say(frames.role(Role(want="controller")))
            await viewer.say(frames.resize(Size(3, 3)))
            await viewer.say(frames.eof_in(9))
            told = frames.parse(await viewer.until_type(FrameType.ERROR), frames.Error)
            assert told.code == "read_only"
            await viewer.say(frames.ping(1))
            await viewer.until_type(FrameType.PONG)
            facts = (await desk.box.get(f"/api/v1/shells/{session}")).json
            assert (facts["dropped_input_bytes"], facts["controller"]) == (9, None)
        assert (bytes(agent.typed), agent.sizes, agent.ended_input) == (b"", [(80, 24)], False)
        asked = await desk.box.ask("POST", "/api/v1/shells", headers={"Authorization": f"Bearer {ticket}"}, json={})
        assert asked.status == 401

    desk(test)


# what comes through it


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", CloseCode.UNSUPPORTED_DATA),
        (b"", CloseCode.PROTOCOL_ERROR),
        (b"\x0e", CloseCode.PROTOCOL_ERROR),
        (b"\xff" * 10, CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(0, b"x")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.Frame(FrameType.HELLO, 0, b"{")), CloseCode.PROTOCOL_ERROR),
        (b"\x0e" + bytes(frames.VIEWER_FRAME_BYTES), CloseCode.TOO_BIG),
    ],
)
def test_what_is_no_hello_closes_with_its_code_and_disturbs_nobody(desk, message, code):
    async def test(desk, client):
        session, _ = await desk.open()
        async with websocket(client, terminal(session), BEARER, V1) as socket:
            viewer = Viewer(socket)
            await viewer.greet()
            async with websocket(client, terminal(session), BEARER, V1) as bad:
                await bad.send_message(message)
                assert await close_code(bad) == code
            await viewer.type(b"still here\r")
            await viewer.until(b"ran still here")

    desk(test)


def test_a_second_one_watches_and_sees_the_same_bytes(desk):
    async def test(desk, client):
        session, agent = await desk.open()
        data = bytes(range(256)) * 2048
        async with (
            websocket(client, terminal(session), BEARER, V1) as one,
            websocket(client, terminal(session), BEARER, V1) as two,
        ):
            viewers = [Viewer(one), Viewer(two)]
            await viewers[0].greet("one")
            assert (await viewers[1].greet("two", role="viewer")).role == "viewer"
            agent.say(data)
            async with trio.open_nursery() as nursery:
                for viewer in viewers:
                    nursery.start_soon(read_and_acknowledge, viewer, len(data) + 2)
            assert [viewer.output for viewer in viewers] == [b"$ " + data] * 2

    desk(test)


async def read_and_acknowledge(viewer, count):
    while len(viewer.output) < count:
        await viewer.receive()
        await viewer.say(frames.ack(len(viewer.output)))


def test_leaving_on_purpose_ends_the_session_and_dropping_does_not(desk):
    async def test(desk, client):
        kept, agent = await desk.open("web-1")
        async with websocket(client, terminal(kept), BEARER, V1) as socket:
            await Viewer(socket).greet()
            await socket.aclose(1001)
        left, gone = await desk.open("web-2")
        async with websocket(client, terminal(left), BEARER, V1) as socket:
            await Viewer(socket).greet()
            await socket.aclose(1000)
        with trio.fail_after(5):
            await gone.hung_up.wait()
        facts = (await desk.box.get(f"/api/v1/shells/{left}")).json
        assert (facts["state"], facts["end_reason"]) == ("ended", "operator_left")
        assert (await desk.box.get(f"/api/v1/shells/{kept}")).json["state"] == "open"
        assert not agent.hung_up.is_set()

    desk(test)


def test_an_ended_session_says_so(desk):
    async def test(desk, client):
        session, _ = await desk.open()
        await desk.box.delete(f"/api/v1/shells/{session}")
        async with websocket(client, terminal(session), BEARER, V1) as socket:
            viewer = Viewer(socket)
            told = frames.parse(await viewer.until_type(FrameType.ERROR), frames.Error)
            assert "has ended: killed" in told.message
            assert await close_code(socket) == CloseCode.ENDED

    desk(test)


def test_a_viewer_that_stops_reading_holds_up_nobody(desk):
    """The end of the session closes it, although its socket takes no more."""

    async def test(desk, client):
        session, agent = await desk.open()
        async with websocket(client, terminal(session), BEARER, V1) as one:
            viewer = Viewer(one)
            await viewer.greet("one")
            async with websocket(client, terminal(session), BEARER, V1) as stalled:
                await Viewer(stalled).greet("two", role="viewer")
                agent.say(bytes(900_000))
                await read_and_acknowledge(viewer, 900_002)
                agent.exit(0)
                with trio.fail_after(10):
                    await viewer.until_type(FrameType.EXIT)

    desk(test, flush_s=0.5)


# GoTTY


class Gotty:
    """A client as GoTTY's own, of either generation."""

    def __init__(self, client, session, base="gotty"):
        self.client, self.base = client, f"/api/v1/shells/{session}/{base}"
        self.old = base == "gotty1"
        self.output, self.titles, self.others = b"", [], []

    async def token(self, headers=None):
        answer = await self.client.get(f"{self.base}/auth_token.js", headers=headers or BASIC)
        assert answer.status_code == 200
        return answer.text.removeprefix("var gotty_auth_token = '").removesuffix("';")

    def connect(self, headers=None):
        return websocket(self.client, f"{self.base}/ws", headers or BASIC, ["webtty"])

    async def begin(self, socket, token):
        self.socket = socket
        await socket.send_message(json.dumps({"Arguments": "?arg=x", "AuthToken": token}))
        await socket.send_message(("2" if self.old else "3") + json.dumps({"columns": 90, "rows": 33}))

    async def type(self, text):
        await self.socket.send_message(("0" if self.old else "1") + text)

    async def receive(self):
        message = await self.socket.get_message()
        assert isinstance(message, str)
        kind = str(int(message[0]) + 1) if self.old else message[0]
        if kind == "1":
            self.output += base64.b64decode(message[1:], validate=True)
        elif kind == "3":
            self.titles.append(message[1:])
        else:
            self.others.append(kind + message[1:])

    async def until(self, text):
        while text not in self.output:
            await self.receive()


@pytest.mark.parametrize("base", ["gotty", "gotty1"])
def test_a_gotty_client_gets_the_terminal(desk, base):
    async def test(desk, client):
        session, agent = await desk.open()
        gotty = Gotty(client, session, base)
        config = await client.get(f"{gotty.base}/config.js", headers=BASIC)
        assert config.text == "var gotty_term = 'xterm';"
        token = await gotty.token()
        async with gotty.connect() as socket:
            assert socket.subprotocol == "webtty"
            await gotty.begin(socket, token)
            await gotty.until(b"$ ")
            await gotty.type("grüße\r")
            await gotty.until("ran grüße\r\n".encode())
            await socket.send_message("1" if gotty.old else "2")
            await gotty.receive()
            assert gotty.others == ["2"]
            await gotty.type("exit 3\r")
            assert await close_code(socket) == 1000
        assert gotty.titles[0] == "web-1"
        assert agent.sizes[-1] == (90, 33)
        assert agent.typed == "grüße\rexit 3\r".encode()
        assert (await desk.box.get(f"/api/v1/shells/{session}")).json["exit_code"] == 3

    desk(test)


def test_the_fork_chooses_an_encoding_and_is_told_its_buffer(desk):
    async def test(desk, client):
        session, agent = await desk.open()
        gotty = Gotty(client, session)
        async with gotty.connect() as socket:
            await gotty.begin(socket, await gotty.token())
            await socket.send_message("4base64")
            await gotty.type(base64.b64encode(b"\xff\x00raw\r").decode())
            await gotty.until(b"ran \xff\x00raw")
            assert [other[0] for other in gotty.others] == ["6"]
            assert json.loads(gotty.others[0][1:]) > 1024
            await socket.send_message("4null")
            await gotty.type("plain\r")
            await gotty.until(b"ran plain")
        assert bytes(agent.typed) == b"\xff\x00raw\rplain\r"

    desk(test)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("", CloseCode.PROTOCOL_ERROR),
        ("9", CloseCode.PROTOCOL_ERROR),
        ("3{", CloseCode.PROTOCOL_ERROR),
        ("4rot13", CloseCode.PROTOCOL_ERROR),
        ("1" + "x" * 70_000, CloseCode.TOO_BIG),
        (b"1ls\r", CloseCode.UNSUPPORTED_DATA),
    ],
)
def test_what_is_no_frame_of_gotty_ends_that_connection(desk, message, code):
    async def test(desk, client):
        session, agent = await desk.open()
        gotty = Gotty(client, session)
        async with gotty.connect() as socket:
            await gotty.begin(socket, await gotty.token())
            await gotty.until(b"$ ")
            await socket.send_message(message)
            assert await close_code(socket) == code
        assert bytes(agent.typed) == b""
        assert (await desk.box.get(f"/api/v1/shells/{session}")).json["state"] == "open"

    desk(test)


@pytest.mark.parametrize("first", ["{}", '{"AuthToken": "wrong"}', '{"AuthToken": 1}', "[]", "1ls", b"{}", "x" * 5000])
def test_gotty_without_its_token_gets_nothing(desk, first):
    async def test(desk, client):
        session, agent = await desk.open()
        async with Gotty(client, session).connect() as socket:
            await socket.send_message(first)
            assert await close_code(socket) in (CloseCode.FORBIDDEN, CloseCode.PROTOCOL_ERROR)
        assert bytes(agent.typed) == b""
        assert (await desk.box.get(f"/api/v1/shells/{session}")).json["viewers"] == []

    desk(test)


def test_gottys_paths_are_guarded_like_the_terminal(desk):
    async def test(desk, client):
        session, _ = await desk.open()
        gotty = Gotty(client, session)
        nobody = {"Authorization": ""}
        wrong = {"Authorization": "Basic " + base64.b64encode(b"a:b").decode()}
        for path in ("auth_token.js", "config.js"):
            for headers, status in (
                (nobody, 401),
                (wrong, 401),
                ({"Authorization": "Basic !"}, 401),
                ({**BASIC, "Origin": "http://evil.example"}, 403),
                ({**BASIC, "Sec-Fetch-Site": "cross-site"}, 403),
                (BEARER, 200),
            ):
                answer = await client.get(f"{gotty.base}/{path}", headers=headers)
                assert (path, headers, answer.status_code) == (path, headers, status)
                assert "Basic" in answer.headers.get("WWW-Authenticate", "Basic")
        assert (await client.get(f"/api/v1/shells/{session}/other/config.js")).status_code == 404
        assert (await refusal(client, f"{gotty.base}/ws", {}, ["webtty"]))[0] == 401
        assert (await refusal(client, f"{gotty.base}/ws", {**BASIC, "Origin": "null"}, ["webtty"]))[0] == 403
        # Basic is for those only who know nothing else
        assert (await client.get("/api/v1/shells", headers=BASIC)).status_code == 401
        used = await gotty.token()
        for expected in (None, CloseCode.FORBIDDEN):
            async with gotty.connect() as socket:
                await gotty.begin(socket, used)
                if expected is None:
                    await gotty.until(b"$ ")
                    await socket.aclose(1001)
                else:
                    assert await close_code(socket) == expected

    desk(test)


def test_a_large_paste_through_gotty_arrives_whole(desk):
    """More than the window of input: it waits for the agent, and is neither cut nor mixed up."""

    async def test(desk, client):
        session, agent = await desk.open()
        text = "".join(f"{number:06d}." for number in range(100_000))
        gotty = Gotty(client, session)
        async with gotty.connect() as socket:
            await gotty.begin(socket, await gotty.token())

            async def read():
                while len(gotty.output) < len(text) + 2:
                    await gotty.receive()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for start in range(0, len(text), 16_000):
                    await gotty.type(text[start : start + 16_000])
            assert agent.typed == text.encode()
            assert gotty.output == b"$ " + text.encode()

    desk(test)
