"""The terminal client over a line that breaks: nothing is shown or typed twice, nothing is lost."""

from __future__ import annotations

import os

import pytest
import trio

from osqbox.cli import terminal
from osqbox.cli.terminal import Address, Here, Outcome, Terminal, Wish

from .shell_desk import opened

TOKEN = "a-token-of-tests"


class Line:
    """A TCP line between client and box that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._scopes: list[trio.CancelScope] = []
        self.connections = 0
        self.port = 0
        self.is_up = True

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, listeners)

    def cut(self) -> None:
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    async def _serve(self, near: trio.SocketStream) -> None:
        self.connections += 1
        if not self.is_up:
            await near.aclose()
            return
        async with near, await trio.open_tcp_stream("127.0.0.1", self._port) as far, trio.open_nursery() as nursery:
            self._scopes.append(nursery.cancel_scope)
            for one, other in ((near, far), (far, near)):
                nursery.start_soon(self._copy, one, other, nursery.cancel_scope)

    async def _copy(self, one: trio.SocketStream, other: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            async for data in one:
                await other.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


class Pipes:
    """What the client has for keys and screen."""

    def __init__(self) -> None:
        self.keys_out, self.keys_in = os.pipe()
        self.screen_out, self.screen_in = os.pipe()
        self.seen = b""

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self.screen_out)
            self.seen += os.read(self.screen_out, 65536)

    async def until(self, text: bytes) -> None:
        with trio.fail_after(10):
            while text not in self.seen:
                await trio.sleep(0.005)

    def type(self, data: bytes) -> None:
        os.write(self.keys_in, data)

    def close(self) -> None:
        for fd in (self.keys_out, self.keys_in, self.screen_out, self.screen_in):
            os.close(fd)


@pytest.fixture
def broken_line(rig, tmp_path, monkeypatch):
    """Runs a test with a desk, the line, the client's pipes, and a way to start the client."""
    monkeypatch.setattr(terminal, "RETRY_S", (0.02, 0.1))

    def run(test):
        async def main(box):
            pipes = Pipes()
            outcomes: list[Outcome] = []
            async with opened(box, tmp_path / "shells") as desk, box.served() as http, trio.open_nursery() as nursery:
                line = Line(http.base_url.port)
                await nursery.start(line.run)
                await nursery.start(pipes.read)
                box.hosts.add(f"127.0.0.1:{line.port}")

                async def client(session: str, role: str = "controller") -> None:
                    url = f"ws://127.0.0.1:{line.port}/api/v1/shells/{session}/terminal"
                    here = Here(pipes.keys_out, pipes.screen_in)
                    found = Terminal(Wish(session, role, None), lambda: Address(url, TOKEN), here)
                    outcomes.append(await found.run())

                await test(desk, line, pipes, lambda *words: nursery.start_soon(client, *words), outcomes)
                nursery.cancel_scope.cancel()
            pipes.close()

        rig(main)

    return run


async def ended(outcomes):
    with trio.fail_after(10):
        while not outcomes:
            await trio.sleep(0.005)
    return outcomes[0]


def test_a_cut_line_is_taken_up_where_it_broke(broken_line):
    async def test(desk, line, pipes, start, outcomes):
        session, agent = await desk.open()
        start(session)
        await pipes.until(b"$ ")
        expected = b"$ "
        for number in range(5):
            pipes.type(b"word%d\r" % number)
            agent_says = b"word%d\r\nran word%d\r\n$ " % (number, number)
            await pipes.until(b"ran word%d\r\n$ " % number)
            expected += agent_says
            line.cut()
            said = b"<%d>" % number * 20_000
            agent.say(said)
            expected += said
        pipes.type(b"exit 9\r")
        outcome = await ended(outcomes)
        assert (outcome.status, outcome.told) == (9, "")
        assert bytes(agent.typed) == b"".join(b"word%d\r" % number for number in range(5)) + b"exit 9\r"
        await pipes.until(expected)
        assert pipes.seen == expected + b"exit 9\r\n"
        assert line.connections >= 6

    broken_line(test)


def test_keys_typed_while_the_line_is_down_arrive_once(broken_line):
    async def test(desk, line, pipes, start, outcomes):
        session, agent = await desk.open()
        start(session)
        await pipes.until(b"$ ")
        data = b"".join(b"%06d." % number for number in range(30_000))

        async def cutting():
            for _ in range(8):
                await trio.sleep(0.03)
                line.cut()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cutting)
            await trio.to_thread.run_sync(pipes.type, data)
        with trio.fail_after(20):
            while len(agent.typed) < len(data):
                await trio.sleep(0.01)
        assert bytes(agent.typed) == data
        pipes.type(b"\rexit 0\r")
        assert (await ended(outcomes)).status == 0

    broken_line(test)


def test_a_session_that_ended_meanwhile_tells_how(broken_line):
    async def test(desk, line, pipes, start, outcomes):
        session, agent = await desk.open()
        start(session)
        await pipes.until(b"$ ")
        line.is_up = False
        line.cut()
        agent.exit(5)
        await agent.hung_up.wait()
        await trio.sleep(0.05)
        line.is_up = True
        outcome = await ended(outcomes)
        assert outcome.is_unknown
        assert "has ended: exit" in outcome.told

    broken_line(test)


def test_a_line_that_stays_down_ends_the_client_with_a_word(broken_line, monkeypatch):
    monkeypatch.setattr(terminal, "COME_BACK_S", 0.2)
    monkeypatch.setattr(terminal, "CONNECT_TIMEOUT_S", 0.3)

    async def test(desk, line, pipes, start, outcomes):
        session, _ = await desk.open()
        start(session)
        await pipes.until(b"$ ")
        line.is_up = False
        line.cut()
        outcome = await ended(outcomes)
        assert outcome.status == 1
        assert "did not come back within 0.2 s" in outcome.told

    broken_line(test)


def test_an_unknown_session_is_not_tried_again(broken_line):
    async def test(desk, line, pipes, start, outcomes):
        start("unknown")
        outcome = await ended(outcomes)
        assert (outcome.status, "no such shell session" in outcome.told) == (2, True)
        assert line.connections == 1

    broken_line(test)
