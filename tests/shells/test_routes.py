"""The agents' paths: the design's own calls, the Launcher's way, and everything that is refused."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from osqbox import shell_frames as frames
from osqbox import shell_legacy as legacy
from osqbox.shell_frames import AgentHello, CloseCode, Frame, FrameType, Size
from osqbox.shells import protocol
from osqbox.shells.messages import EndReason, ShellBounds, State

QUICK = ShellBounds(hold_s=0.05, hello_s=0.3)


def test_paths() -> None:
    for prefix in ("/api/v1/shells", "/api/shells"):
        assert protocol.session_id(prefix) == protocol.session_id(f"{prefix}/") == ""
        assert protocol.session_id(f"{prefix}/991464f3-2745") == "991464f3-2745"
        assert protocol.session_id(f"{prefix}/a?x=1") == "a"
        assert protocol.session_id(f"{prefix}/%2e%2e") == protocol.session_id(f"{prefix}/..") == "-"
    for other in ("/", "/api/v2/shells", "/api/v1/shellsx", "/api/v1/shells/a/b", "/x/api/v1/shells"):
        assert not protocol.serves(other)


@given(st.text(max_size=80))
def test_any_path_is_read(path: str) -> None:
    found = protocol.session_id(path)
    assert (found is not None) == protocol.serves(path)


@pytest.mark.parametrize("prefix", ["/api/v1/shells", "/api/shells"])
def test_the_designs_own_calls(shells: Any, run: Any, prefix: str) -> None:
    """Get-shells and the join's POST as the control server's design shows them; the secret stays good."""

    async def main() -> None:
        async with shells(QUICK) as box:
            status, answer = await box.ask(prefix, {"node_key": "key-of-n1"})
            assert (status, answer) == (200, {"sessions": [], "error": "", "node_invalid": False})
            session = (await box.open()).id
            [offer] = await box.offers(path=prefix)
            assert set(offer) == {"session_id", "secret"}
            assert offer["session_id"] == session
            assert len(offer["secret"]) >= 43  # 256 bits
            assert await box.offers() == []
            bearer = {"Authorization": f"Bearer {offer['secret']}", "Content-Type": "application/json"}
            for _ in range(2):
                status, answer = await box.ask(f"{prefix}/{session}", {}, headers=bearer)
                assert (status, answer["error"], answer["node_invalid"]) == (200, "", False)
                assert answer["url"] == f"wss://localhost:{box.listener.port}{prefix}/{session}"
            async with box.agent(session, offer["secret"]) as agent:
                assert agent.welcome.session == session

    run(main)


def test_an_unknown_node_is_told_to_enroll(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            for key in ("nobody", ""):
                _, answer = await box.ask("/api/v1/shells", {"node_key": key})
                assert answer["node_invalid"] is True
                assert answer["error"]

    run(main)


def test_a_node_gets_its_own_sessions_only(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session = (await box.open("n1")).id
            assert await box.offers("key-of-n2") == []
            assert [offer["session_id"] for offer in await box.offers("key-of-n1")] == [session]

    run(main)


@pytest.mark.parametrize(
    ("target", "body", "method", "status"),
    [
        ("/api/v1/shells", b"", "POST", 400),
        ("/api/v1/shells", b"[]", "POST", 400),
        ("/api/v1/shells", b'{"node_key": 7}', "POST", 400),
        ("/api/v1/shells", b"\xff\xfe", "POST", 400),
        ("/api/v1/shells", b"[" * 5000, "POST", 400),
        ("/api/v1/shells", b"x" * (protocol.BODY_BYTES + 1), "POST", 413),
        ("/api/v1/shells", b"", "GET", 405),
        ("/api/v1/shells/s1", b"", "GET", 426),
        ("/api/v1/shells/s1", b"", "POST", 404),
        ("/api/v1/shells/..%2f", b"", "POST", 404),
    ],
)
def test_bad_requests_are_answered_with_an_error(
    shells: Any, run: Any, target: str, body: bytes, method: str, status: int
) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            got, answer = await box.ask(target, body, method=method)
            assert got == status
            assert answer["error"]
            assert answer["node_invalid"] is False

    run(main)


def test_who_may_not_join(shells: Any, run: Any) -> None:
    """Wrong, missing, foreign and expired secrets, by POST, bearer, HELLO and first message: refused and audited."""

    async def main() -> None:
        async with shells(ShellBounds(join_s=0.4, hold_s=0.05)) as box:
            session, secret = await box.offered()
            other = (await box.open("n2")).id
            [foreign] = await box.offers("key-of-n2")
            for token, status in (("wrong", 403), (foreign["secret"], 403), (None, 401)):
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                got, answer = await box.ask(f"/api/v1/shells/{session}", {}, headers=headers)
                assert (got, bool(answer["error"])) == (status, True)
            status, answer = await box.rejected(f"/api/v1/shells/{session}", Authorization="Bearer wrong")
            assert (status, bool(answer["error"])) == (403, True)
            for hello in (
                AgentHello(session=session, secret="wrong"),
                AgentHello(session=session),
                AgentHello(session=session, resume="wrong"),
                AgentHello(session=other, secret=foreign["secret"]),
                AgentHello(session=session, secret=secret, node_key="key-of-n2"),
            ):
                assert await join_code(box, session, frames.hello(hello)) in (4401, 4403, 4404)
            for text in ("0wrong", "0" + foreign["secret"]):
                assert await join_code(box, session, text, subprotocol=None) == CloseCode.FORBIDDEN
            assert await join_code(box, "nobody", "0" + secret, subprotocol=None) == CloseCode.NOT_FOUND
            await trio.sleep(0.5)
            assert await join_code(box, session, "0" + secret, subprotocol=None) == CloseCode.FORBIDDEN
            refused = [row["result"] for row in await box.audited("shell.join")]
            assert set(refused) >= {
                "wrong_secret", "no_secret", "wrong_token", "foreign_session", "foreign_node", "unknown_session",
            }  # fmt: skip
            assert "ok" not in refused
            assert secret not in json.dumps(await box.audited())

    run(main)


async def join_code(box: Any, session: str, first: Frame | str, **socket: Any) -> int:
    """With what a join with this first message is closed."""
    async with box.client(f"/api/v1/shells/{session}", **socket) as client:
        await client.send(first)
        code: int = await client.close_code()
        return code


def test_an_expired_secret_is_replaced_by_the_next_poll(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(ShellBounds(join_s=0.1, hold_s=0.05)) as box:
            session, first = await box.offered()
            await box.state_becomes(session, State.REQUESTED)
            [second] = await box.offers()
            assert second["secret"] != first
            async with box.agent(session, second["secret"]):
                assert box.broker.session(session).state is State.OPEN

    run(main)


def test_a_secret_used_twice_kills_the_session(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent:
                headers = {"Authorization": f"Bearer {secret}"}
                status, answer = await box.ask(f"/api/v1/shells/{session}", {}, headers=headers)
                assert status == 403
                assert "used before" in answer["error"]
                await agent.next(FrameType.EXIT)
            assert box.broker.session(session).end_reason is EndReason.SECRET_REUSED
            assert [row["result"] for row in await box.audited("shell.join")] == ["ok", "used_secret"]

    run(main)


def test_browsers_and_strange_subprotocols_are_refused(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            for origin in ("https://evil.example", "null", f"https://localhost:{box.listener.port}"):
                status, answer = await box.rejected(f"/api/v1/shells/{session}", Origin=origin)
                assert (status, bool(answer["error"])) == (403, True)
            assert (await box.rejected(f"/api/v1/shells/{session}", subprotocol="webtty"))[0] == 400
            assert (await box.rejected("/api/v1/shells"))[0] == 404
            async with box.agent(session, secret):
                pass

    run(main)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("0text", CloseCode.UNSUPPORTED_DATA),
        (b"", CloseCode.PROTOCOL_ERROR),
        (b"\x01", CloseCode.PROTOCOL_ERROR),
        (b"\x63" + bytes(9), CloseCode.PROTOCOL_ERROR),
        (bytes([14]) + bytes(9) + b"{", CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_out(10, b"gap")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.ack(99)), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(0, b"x")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(Frame(FrameType.EXIT, 0, b"[]")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_out(0, bytes(frames.AGENT_FRAME_BYTES))), CloseCode.TOO_BIG),
    ],
)
def test_frames_an_agent_is_closed_for(shells: Any, run: Any, message: bytes | str, code: CloseCode) -> None:
    """It may come back; nobody else notices."""

    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.viewer(session) as viewer:
                async with box.agent(session, secret) as agent:
                    resume = agent.welcome.resume
                    await agent.send(message)
                    assert await agent.close_code() == code
                async with box.agent(session, resume=resume) as agent:
                    await agent.print(b"still here")
                    assert await viewer.read(10) == b"still here"

    run(main)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", CloseCode.UNSUPPORTED_DATA),
        (b"\x02", CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(5, b"gap")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_out(0, b"x")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.ack(1)), CloseCode.PROTOCOL_ERROR),
        (frames.encode(Frame(FrameType.RESIZE, 0, b"1")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(Frame(FrameType.ROLE, 0, b"{}")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(0, bytes(frames.VIEWER_FRAME_BYTES))), CloseCode.TOO_BIG),
    ],
)
def test_frames_a_viewer_is_closed_for(shells: Any, run: Any, message: bytes | str, code: CloseCode) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as good:
                async with box.viewer(session, "bad", by="bob") as bad:
                    await bad.send(message)
                    assert await bad.close_code() == code
                await agent.print(b"still here")
                assert await good.read(10) == b"still here"

    run(main)


def test_an_agent_that_says_nothing_or_something_else_first(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, _ = await box.offered()
            for subprotocol in (frames.SUBPROTOCOL, None):
                async with box.client(f"/api/v1/shells/{session}", subprotocol=subprotocol) as silent:
                    assert await silent.close_code() == CloseCode.TOO_SLOW
            for first, subprotocol in ((frames.ping(1), frames.SUBPROTOCOL), ("1aGk=", None), (b"0binary", None)):
                async with box.client(f"/api/v1/shells/{session}", subprotocol=subprotocol) as rude:
                    await rude.send(first)
                    assert await rude.close_code() in (CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA)

    run(main)


def test_noise_disturbs_nobody(shells: Any, run: Any) -> None:
    """Random messages, well and badly framed, from agents and viewers, beside a session that goes on."""
    rolls = [os.urandom(size) for size in (0, 1, 9, 10, 11, 100, 1000) for _ in range(3)]
    rolls += [bytes([kind, 0]) + bytes(8) + os.urandom(20) for kind in range(16)]

    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.agent(session, secret) as agent, box.viewer(session) as viewer:

                async def noise(message: bytes, number: int) -> None:
                    with suppress(Exception):
                        async with box.client(f"/view/{session}/eve/viewer") as rude:
                            if number % 2:
                                await rude.send(frames.hello(frames.ViewerHello(client=f"e{number}")))
                            await rude.send(message)
                            with trio.move_on_after(0.2):
                                await rude.close_code()
                    with suppress(Exception):
                        async with box.client(f"/api/v1/shells/{session}") as rude:
                            await rude.send(message)
                            with trio.move_on_after(0.2):
                                await rude.close_code()

                for start in range(0, len(rolls), 12):
                    async with trio.open_nursery() as nursery:
                        for number, message in enumerate(rolls[start : start + 12], start):
                            nursery.start_soon(noise, message, number)
                await agent.print(b"still here")
                assert await viewer.read(10) == b"still here"
            assert box.listener.statistics().errors == 0

    run(main, 30)


# the Launcher of 2018


def test_a_launcher_gives_a_shell(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered(cols=132, rows=50)
            async with box.launcher(session, secret) as agent, box.viewer(session) as viewer:
                assert await agent.text() == legacy.resize(Size(132, 50))
                await agent.print(b"bash-3.2$ \xff\xfe")
                assert await viewer.read(12) == b"bash-3.2$ \xff\xfe"
                await viewer.type("grün\r".encode())
                assert await agent.text() == "1grün\r"
                await viewer.send(frames.resize(Size(100, 30)))
                assert await agent.text() == '3{"columns": 100, "rows": 30}'
                assert box.broker.session(session).title == "/bin/bash@web-1"
                assert box.broker.session(session).protocol == "launcher"
            assert (await box.state_becomes(session, State.ENDED)).exit_code is None

    run(main)


def test_a_launcher_with_a_bearer_header(shells: Any, run: Any) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with (
                box.client(f"/api/shells/{session}", subprotocol=None, Authorization=f"Bearer {secret}") as agent,
                box.viewer(session) as viewer,
            ):
                await agent.send("1aGk=")
                assert await viewer.read(2) == b"hi"

    run(main)


def test_a_big_paste_reaches_a_launcher_whole(shells: Any, run: Any) -> None:
    """In frames it can read, cut between characters."""
    paste = "€uro ünd ß 𝄞 " * 20_000

    async def main() -> None:
        async with shells(ShellBounds(hold_s=0.05, input_bytes_per_s=2**24)) as box:
            session, secret = await box.offered()
            async with box.launcher(session, secret) as agent, box.viewer(session) as viewer:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(viewer.type, paste.encode())
                    got = ""
                    while len(got) < len(paste):
                        text = await agent.text()
                        if text[0] == "1":
                            assert 1 <= len(text[1:].encode()) <= 2047
                            got += text[1:]
                assert got == paste

    run(main)


def test_a_launcher_hears_something_in_time(shells: Any, run: Any, monkeypatch: Any) -> None:
    """Or it closes after 30 s; also while a controller that does not acknowledge keeps its output from being read."""
    monkeypatch.setattr("osqbox.shell_legacy.PING_INTERVAL_S", 0.2)

    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.launcher(session, secret) as agent, box.viewer(session) as viewer:
                assert await agent.text() == legacy.resize(Size(80, 24))

                async def flood() -> None:
                    await agent.print(bytes(8 * 2**20))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(flood)
                    for _ in range(5):
                        with trio.fail_after(1):
                            assert await agent.text() == "2"
                    assert box.broker.session(session).output_bytes < 3 * 2**20
                    while viewer.offset < 8 * 2**20:
                        await viewer.heed()
                        viewer.shown.clear()

    run(main, 30)


@pytest.mark.parametrize("message", ["", "9", "1%%%", b"1aGk="])
def test_what_a_launcher_is_closed_for(shells: Any, run: Any, message: bytes | str) -> None:
    async def main() -> None:
        async with shells(QUICK) as box:
            session, secret = await box.offered()
            async with box.launcher(session, secret) as agent:
                await agent.send(message)
                assert await agent.close_code() in (CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA)
            await box.state_becomes(session, State.ENDED)

    run(main)
