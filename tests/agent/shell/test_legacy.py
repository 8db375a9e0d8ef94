"""The Launcher of 2018, fault by fault."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed

from osqbox.agent.shell.legacy import run_2018
from osqbox.agent.shell.offers import Offer, read_offers_2018
from osqbox.agent.shell.program import find_program
from osqbox.agent.shell.pty import living, open_pty
from osqbox.agent.shell.script import Script
from osqbox.agent.shell.scripted import ScriptedShell
from osqbox.agent.shell.terminal import Terminal
from osqbox.shell_frames import Size

WithBroker = Callable[[Callable[[Any, trio.Nursery], Any]], None]
OFFER = Offer("room-1", "the secret")


class Agent:
    def __init__(self, broker: Any, *program: str, deadline_s: float = 30.0, grace_s: float = 0.2) -> None:
        self._broker = broker
        broker.subprotocol = None
        self._program = program
        self._times = {"deadline_s": deadline_s, "interrupt_grace_s": grace_s}
        self.terminal: Any = None
        self.outcome = ""
        self._over = trio.Event()

    async def _open(self, size: Size) -> Terminal:
        if self._program:
            program = replace(find_program("/bin/bash", None), argv=self._program)
            self.terminal = await open_pty(program, size, job_control=False)
        else:
            self.terminal = ScriptedShell(Script(prompt="> "), "web-1", size)
        return self.terminal

    async def run(self, nursery: trio.Nursery) -> None:
        self.outcome = await run_2018(
            OFFER,
            self._broker.dialer,
            self._open,
            nursery,
            hostname="web-1",
            on_event=lambda kind, facts: None,
            **self._times,
        )
        self._over.set()

    async def over(self) -> str:
        with trio.fail_after(10):
            await self._over.wait()
        return self.outcome


async def output(link: Any, until: bytes) -> bytes:
    seen = b""
    while until not in seen:
        text = await link.message()
        assert text[0] == "1"
        piece = base64.b64decode(text[1:], validate=True)
        assert len(piece) <= 2048
        seen += piece
    return seen


def programs_of(pid: int) -> list[int]:
    return [each.pid for each in living() if each.parent == pid]


async def begun(agent: Agent, broker: Any, nursery: trio.Nursery) -> Any:
    """Past the first two frames."""
    nursery.start_soon(agent.run, nursery)
    link = await broker.joined()
    assert await link.message() == "0the secret"
    assert (await link.message()).startswith("3")
    return link


def test_it_joins_without_headers_and_says_secret_and_title_first(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/bash", "--login")
        nursery.start_soon(agent.run, nursery)
        link = await broker.joined()
        assert link.path == "/api/v1/shells/room-1"
        for name in ("authorization", "origin", "sec-websocket-protocol"):
            assert name not in link.headers
        assert await link.message() == "0the secret"
        assert await link.message() == "3/bin/bash@web-1"

    with_broker(test)


def test_its_shell_has_no_job_control(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        link = await begun(Agent(broker, "/bin/bash", "--login"), broker, nursery)
        assert b"no job control in this shell" in await output(link, b"no job control in this shell")
        await link.socket.send_message("1(echo </dev/tty) 2>&1; echo rea''dy\r")
        assert b"No such device or address" in await output(link, b"ready")

    with_broker(test)


def test_input_is_raw_and_cut_at_2047_bytes(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        code = "stty raw -echo; printf R; exec head -c 2057"
        link = await begun(Agent(broker, "/bin/sh", "-c", code), broker, nursery)
        await output(link, b"R")
        await link.socket.send_message("1")
        await link.socket.send_message("1" + "a" * 2047 + "LOST")
        await link.socket.send_message("1" + "b" * 10)
        seen = await output(link, b"b" * 10)
        assert seen == b"a" * 2047 + b"b" * 10

    with_broker(test)


def test_ping_resize_and_what_it_ignores(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        link = await begun(Agent(broker), broker, nursery)
        await output(link, b"> ")
        await link.socket.send_message(b"1binary is skipped\r")
        await link.socket.send_message('{"AuthToken": "", "Arguments": ""}')
        await link.socket.send_message("0foreign secret")
        await link.socket.send_message('3{"Columns": 99.7, "ROWS": 33}')
        await link.socket.send_message("2")
        assert await link.message() == "2"
        await link.socket.send_message("1stty size\r")
        assert await output(link, b"> ") == b"stty size\r\n33 99\r\n> "

    with_broker(test)


@pytest.mark.parametrize("message", ["", "3", "3{", '3{"columns": "80"}', "3[]"])
def test_a_bad_resize_or_nothing_ends_the_session(with_broker: WithBroker, message: str) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        link = await begun(agent, broker, nursery)
        await link.socket.send_message(message)
        assert await link.closed_with() == 1006  # without a close frame
        await agent.over()

    with_broker(test)


def test_the_end_of_the_shell_closes_without_a_word(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "seq 1 3000")
        link = await begun(agent, broker, nursery)
        seen = b""
        wanted = b"".join(b"%d\r\n" % number for number in range(1, 3001))
        while len(seen) < len(wanted):
            seen += base64.b64decode((await link.message())[1:])
        assert seen == wanted
        assert await link.closed_with() == 1006
        assert await agent.over() == "PTY closed"

    with_broker(test)


def test_only_text_keeps_it_alive_and_the_deadline_kills_the_program_alone(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        script = "trap '' INT; sleep 611 & echo up; while :; do sleep 0.05; done"
        agent = Agent(broker, "/bin/bash", "-c", script, deadline_s=0.5)
        link = await begun(agent, broker, nursery)
        await output(link, b"up")
        leader = agent.terminal.pid
        shell = programs_of(leader)[0]
        for _ in range(4):
            await trio.sleep(0.2)
            await link.socket.send_message("2")
            assert await link.message() == "2"
        began = trio.current_time()
        with contextlib.suppress(ConnectionClosed):
            while True:
                await link.socket.send_message(b"binary")
                await trio.sleep(0.05)
        assert link.socket.closed.code == 1006
        assert 0.3 < trio.current_time() - began < 2
        link.is_done.set()
        assert await agent.over() == "deadline"
        with trio.fail_after(5):
            while shell in {each.pid for each in living()}:
                await trio.sleep(0.02)
        # By the whole command line: a fork of the script, on its way to its next sleep, has the number in its own.
        left = [each.pid for each in living() if each.session == leader and cmdline(each.pid) == b"sleep\x00611\x00"]
        assert len(left) == 1  # the sleep: Launcher kills the leader only

    before = {each.pid for each in living()}
    with_broker(test)
    sleeping = {each.pid for each in living()} - before
    assert not [pid for pid in sleeping if b"611" in cmdline(pid)]  # but nothing outlives the agent


def cmdline(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


def test_a_server_that_leaves_leaves_the_shell_running(with_broker: WithBroker) -> None:
    pids: list[int] = []

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/bash", "-c", "echo up; sleep 612")
        link = await begun(agent, broker, nursery)
        await output(link, b"up")
        await link.close()
        assert await agent.over() == "closed by the server"
        await trio.sleep(0.1)
        pids.append(agent.terminal.pid)
        assert pids[0] in {each.pid for each in living()}

    with_broker(test)
    assert pids[0] not in {each.pid for each in living()}


def test_a_refused_join_is_given_up(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        broker.refuses_with = 403
        agent = Agent(broker)
        await agent.run(nursery)
        assert agent.outcome == "refused: refused with HTTP status 403"
        assert agent.terminal is None

    with_broker(test)


# -- polling -----------------------------------------------------------------------------------------------------

GOOD = {"session_id": "s-1", "secret": "x"}


@pytest.mark.parametrize(
    ("answer", "sessions"),
    [
        ({"sessions": [GOOD]}, ["s-1"]),
        ({"sessions": [GOOD, {**GOOD, "session_id": "s-2", "extra": "text"}]}, ["s-1", "s-2"]),
        ({"sessions": [GOOD, GOOD]}, ["s-1", "s-1"]),
        ({"sessions": [GOOD], "node_invalid": True}, ["s-1"]),
        ({"sessions": [GOOD], "error": ""}, ["s-1"]),
        ({"sessions": [GOOD], "error": None}, ["s-1"]),
        ({"sessions": [GOOD], "error": "no"}, []),
        ({"sessions": [GOOD, {**GOOD, "number": 1}]}, []),
        ({"sessions": [{"session_id": "s-1"}, {"secret": "x"}, GOOD]}, ["s-1"]),
        ({"sessions": None}, []),
        ({}, []),
        ([], []),
        ({"sessions": "abc"}, []),
        ({"sessions": [1]}, []),
        ({"sessions": [{**GOOD, "session_id": "../../etc"}]}, []),
    ],
)
def test_answers_to_get_shells(answer: Any, sessions: list[str]) -> None:
    assert [offer.session for offer in read_offers_2018(json.dumps(answer).encode())] == sessions


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 100_000, b"null"])
def test_an_answer_that_is_no_json_is_none(body: bytes) -> None:
    assert read_offers_2018(body) == []
