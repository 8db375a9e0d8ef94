"""A session over shell.v1 against a broker that says what a test wants."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio

from osqbox import shell_frames as frames
from osqbox.agent.shell import session as sessions
from osqbox.agent.shell.offers import Offer
from osqbox.agent.shell.program import find_program
from osqbox.agent.shell.pty import living, open_pty
from osqbox.agent.shell.script import Script
from osqbox.agent.shell.scripted import ScriptedShell
from osqbox.agent.shell.session import Limits, Session
from osqbox.agent.shell.terminal import ShellRefused, Terminal
from osqbox.shell_frames import CloseCode, Exit, FrameType, Size

OFFER = Offer("session-1", "secret-1")
QUICK = Limits(hang_up_s=0.3)
WithBroker = Callable[[Callable[[Any, trio.Nursery], Any]], None]


class Agent:
    """Runs one session and remembers what became of it."""

    def __init__(self, broker: Any, *program: str, limits: Limits = QUICK, refuses: str = "") -> None:
        self.program = program
        self.refuses = refuses
        self.asked: list[tuple[str | None, str | None, Size]] = []
        self.terminal: Terminal | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.outcome = ""
        self._over = trio.Event()
        self._session = Session(
            OFFER,
            broker.dialer,
            self._open,
            hostname="web-1",
            limits=limits,
            on_event=lambda kind, facts: self.events.append((kind, facts)),
        )

    async def _open(self, shell: str | None, user: str | None, size: Size) -> Terminal:
        self.asked.append((shell, user, size))
        if self.refuses:
            raise ShellRefused(self.refuses)
        if self.program:
            self.terminal = await open_pty(replace(find_program("/bin/sh", None), argv=self.program), size)
        else:
            self.terminal = ScriptedShell(Script(prompt="> "), "web-1", size)
        return self.terminal

    async def run(self) -> None:
        self.outcome = await self._session.run()
        self._over.set()

    async def over(self) -> str:
        with trio.fail_after(10):
            await self._over.wait()
        return self.outcome


def is_alive(pid: int) -> bool:
    return pid in {each.pid for each in living()}


# -- one connection ----------------------------------------------------------------------------------------------


def test_a_session_from_hello_to_exit(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        assert link.path == "/api/v1/shells/session-1"
        assert link.headers["authorization"] == "Bearer secret-1"
        hello = await link.welcome(cols=100, rows=30, shell="/bin/x", user="ana")
        assert (hello.session, hello.secret, hello.resume, hello.host) == ("session-1", "secret-1", None, "web-1")
        await link.send(frames.data_in(0, b"stty size\rexit 7\r"))
        assert await link.until_exit() == Exit(code=7, reason="exit")
        assert bytes(link.output) == b"> stty size\r\n30 100\r\n> exit 7\r\n"
        assert link.title == "root@web-1"
        assert link.acked_input == 17
        await link.close()
        assert await agent.over() == "exit"
        assert agent.asked == [("/bin/x", "ana", Size(100, 30))]

    with_broker(test)


def test_the_exit_is_after_the_last_byte_and_names_its_place(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "seq 1 2000; kill -USR1 $$")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        while (frame := await link.take()).type is not FrameType.EXIT:
            pass
        assert bytes(link.output) == b"".join(b"%d\r\n" % number for number in range(1, 2001))
        assert frame.offset == len(link.output)
        assert frames.parse(frame, Exit) == Exit(signal=signal.SIGUSR1, reason="exit")
        await link.close(CloseCode.ENDED)
        assert await agent.over() == "exit"

    with_broker(test)


def test_sizes_titles_and_pings(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.send(frames.ping(77))
        await link.send(frames.resize(Size(132, 50)))
        await link.send(frames.data_in(0, b"stty size\r"))
        await link.until(b"50 132")
        assert link.pongs == [77]
        await link.send(frames.eof_in(10))
        assert await link.until_exit() == Exit(code=0, reason="exit")
        await link.close()

    with_broker(test)


def test_output_never_passes_the_window(with_broker: WithBroker) -> None:
    """The program is held; it goes on as far as the broker acknowledges, and not a byte farther."""

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "stty raw; exec yes 0123456789abcde")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome(window_bytes=100_000)
        while len(link.output) < 100_000:
            await link.take(ack=False)
        with trio.move_on_after(0.3):
            await link.take(ack=False)
        assert len(link.output) == 100_000
        await link.send(frames.ack(60_000))
        while len(link.output) < 160_000:
            await link.take(ack=False)
        with trio.move_on_after(0.2):
            await link.take(ack=False)
        assert len(link.output) == 160_000
        assert bytes(link.output) == (b"0123456789abcde\n" * 10_000)
        await link.close()

    with_broker(test)


def test_many_bytes_both_ways_exactly(with_broker: WithBroker) -> None:
    size = 8 * 1024 * 1024
    data = os.urandom(size)

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", f"stty raw -echo; printf R; exec head -c {size}")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.until(b"R")

        async def type_all() -> None:
            sent = 0
            while sent < size:
                room = link.acked_input + frames.INPUT_WINDOW_BYTES - sent
                if room <= 0:
                    await trio.sleep(0.001)
                    continue
                piece = data[sent : sent + min(room, frames.DATA_BYTES)]
                await link.send(frames.data_in(sent, piece))
                sent += len(piece)

        async with trio.open_nursery() as typing:
            typing.start_soon(type_all)
            assert await link.until_exit() == Exit(code=0, reason="exit")
        assert hashlib.sha256(link.output[1:]).digest() == hashlib.sha256(data).digest()
        await link.close()

    with_broker(test)


# -- more than one connection ------------------------------------------------------------------------------------


def test_a_dropped_connection_loses_nothing_and_types_nothing_twice(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.send(frames.data_in(0, b"echo one\r"))
        await link.until(b"one\r\n> ")
        await link.drop()

        again = await broker.joined()
        assert again.headers["authorization"] == "Bearer token-1"
        # The broker has kept less than it was sent, and sends input again that was taken.
        hello = await again.welcome(wanted=link.output.index(b"echo"), input=0, resume="token-2")
        assert (hello.secret, hello.resume, hello.head, hello.input) == (None, "token-1", len(link.output), 9)
        await again.send(frames.data_in(0, b"echo one\recho two\r"))
        await again.until(b"two\r\n> ")
        assert bytes(again.output) == b"echo one\r\none\r\n> echo two\r\ntwo\r\n> "
        await again.drop()

        third = await broker.joined()
        assert third.headers["authorization"] == "Bearer token-2"
        await third.welcome()
        await third.send(frames.data_in(18, b"exit 3\r"))
        assert await third.until_exit() == Exit(code=3, reason="exit")
        await third.close()
        assert await agent.over() == "exit"
        assert len(agent.asked) == 1

    # What was acknowledged cannot be wanted again, so nothing is acknowledged before the first drop.
    original = sessions.Outbox.acknowledge
    first: list[int] = []

    def late(self: Any, offset: int) -> None:
        first.append(offset)
        if len(first) > 6:
            original(self, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions.Outbox, "acknowledge", late)
        with_broker(test)


def test_a_program_goes_on_while_nobody_is_connected(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "printf go; read x; seq 1 30000; exit 5")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.until(b"go")
        await link.send(frames.data_in(0, b"\n"))
        await link.drop()
        again = await broker.joined()
        await again.welcome(wanted=len(link.output))
        assert await again.until_exit() == Exit(code=5, reason="exit")
        wanted = b"".join(b"%d\r\n" % number for number in range(1, 30001))
        assert (bytes(link.output) + bytes(again.output)).endswith(wanted)
        await again.close()

    with_broker(test)


def test_an_exit_that_was_lost_is_said_again(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "exit 9")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.until_exit()
        await link.drop()
        again = await broker.joined()
        await again.welcome()
        assert await again.until_exit() == Exit(code=9, reason="exit")
        await again.drop()
        broker.refuses_with = 404  # it has had it, and forgotten the session
        assert await agent.over() == "exit"

    with_broker(test)


def test_without_a_broker_the_terminal_is_kept_for_its_grace_only(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "sleep 600", limits=Limits(grace_s=0.5, hang_up_s=0.1))
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.frame()
        broker.refuses_with = 503
        assert agent.terminal is not None
        assert is_alive(agent.terminal.pid)
        await link.drop()
        assert await agent.over() == "broker_lost"
        assert not is_alive(agent.terminal.pid)

    with_broker(test)


@pytest.mark.parametrize("code", [CloseCode.GOING_AWAY, CloseCode.INTERNAL_ERROR, CloseCode.TOO_SLOW, CloseCode.BUSY])
def test_a_broker_that_restarts_finds_it_again(with_broker: WithBroker, code: int) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.until(b"> ")
        await link.close(code)
        again = await broker.joined()
        await again.welcome()
        await again.send(frames.data_in(0, b"exit\r"))
        assert await again.until_exit() == Exit(code=0, reason="exit")
        await again.close()

    with_broker(test)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(1000, "closed: 1000"), (CloseCode.ENDED, "closed: 4410"), (CloseCode.FORBIDDEN, "refused: 4403")],
)
def test_a_broker_that_closes_for_good_ends_the_terminal(with_broker: WithBroker, code: int, outcome: str) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "sleep 600")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.frame()
        await link.close(code)
        assert await agent.over() == outcome
        assert agent.terminal is not None
        assert not is_alive(agent.terminal.pid)

    with_broker(test)


def test_a_silent_broker_is_left_for_a_new_connection(with_broker: WithBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "PEER_LOST_S", 0.3)
    monkeypatch.setattr(frames, "PING_INTERVAL_S", 0.1)

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        while (await link.take()).type is not FrameType.PING:
            pass
        again = await broker.joined()
        assert (await again.hello()).resume == "token-1"

    with_broker(test)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refused_join_starts_nothing(with_broker: WithBroker, status: int) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        broker.refuses_with = status
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        assert await agent.over() == f"refused: refused with HTTP status {status}"
        assert agent.asked == []

    with_broker(test)


def test_a_server_without_our_framing_is_told_of(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        broker.subprotocol = None
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        assert "does not speak shell.v1" in await agent.over()
        assert agent.asked == []

    with_broker(test)


def test_a_shell_that_is_refused_says_why(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, refuses="no such user")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome(user="mallory")
        error = await link.frame()
        assert frames.parse(error, frames.Error).message == "no such user"
        assert await link.until_exit() == Exit(reason="refused")
        assert await agent.over() == "refused: no such user"
        link.is_done.set()

    with_broker(test)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", CloseCode.UNSUPPORTED_DATA),
        (b"\x02\x00", CloseCode.PROTOCOL_ERROR),
        (b"", CloseCode.PROTOCOL_ERROR),
        (bytes([99]) + bytes(9), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(5, b"gap")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.ack(10_000)), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.Frame(FrameType.RESIZE, 0, b"abc")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.Frame(FrameType.EXIT, 0, b"{")), CloseCode.PROTOCOL_ERROR),
        (frames.encode(frames.data_in(0, bytes(2 * frames.INPUT_WINDOW_BYTES + 1))), CloseCode.PROTOCOL_ERROR),
        (bytes(frames.AGENT_FRAME_BYTES + 1), CloseCode.TOO_BIG),
    ],
    ids=["text", "short", "empty", "type", "gap", "ack", "resize", "exit", "flood", "big"],
)
def test_nonsense_closes_with_the_right_code_and_ends_the_terminal(
    with_broker: WithBroker, message: bytes | str, code: int
) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "sleep 600")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.frame()
        await link.socket.send_message(message)
        assert await link.closed_with() == code
        assert (await agent.over()).startswith("closed: ")
        assert agent.terminal is not None
        assert not is_alive(agent.terminal.pid)

    with_broker(test)


@pytest.mark.parametrize("changes", [{"wanted": 5}, {"input": 5}])
def test_a_welcome_that_fits_nothing_is_refused(with_broker: WithBroker, changes: dict[str, int]) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome(**changes)
        assert await link.closed_with() == CloseCode.PROTOCOL_ERROR
        assert "HELLO: expected" in await agent.over()
        assert agent.asked == []

    with_broker(test)


# -- limits and ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "reason"), [({"idle_s": 0.2}, "idle"), ({"max_s": 0.2}, "max_time")])
def test_idle_and_maximum_time_hang_up(with_broker: WithBroker, limits: dict[str, float], reason: str) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "exec sleep 600", limits=Limits(idle_s=60, max_s=60, hang_up_s=3))
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome(**limits)
        assert await link.until_exit() == Exit(signal=signal.SIGHUP, reason=reason)
        await link.close()
        assert await agent.over() == reason

    with_broker(test)


def test_a_busy_session_is_not_idle(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done; exit 2")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome(idle_s=0.4)
        assert await link.until_exit() == Exit(code=2, reason="exit")
        await link.close()

    with_broker(test)


def test_the_broker_can_hang_up(with_broker: WithBroker) -> None:
    """What the program says to that still comes, and how it ended."""

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "trap 'echo bye; exit 6' HUP; echo up; while :; do sleep 0.02; done")
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.until(b"up")
        await link.send(frames.exit_frame(Exit(reason="killed")))
        assert await link.until_exit() == Exit(code=6, reason="killed")
        assert b"bye" in link.output
        await link.close()
        assert await agent.over() == "killed"

    with_broker(test)


def test_an_agent_that_stops_says_so_and_leaves_nothing(with_broker: WithBroker) -> None:
    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker, "/bin/sh", "-c", "sleep 600")
        async with trio.open_nursery() as life:
            life.start_soon(agent.run)
            link = await broker.joined()
            await link.welcome()
            await link.frame()
            life.cancel_scope.cancel()

            async def hear() -> None:
                assert await link.until_exit() == Exit(reason="agent_stopped")
                link.is_done.set()

            nursery.start_soon(hear)
        assert agent.terminal is not None
        assert not is_alive(agent.terminal.pid)
        with trio.fail_after(5):
            await link.is_done.wait()

    with_broker(test)


def test_the_secret_is_in_no_event_and_no_text(with_broker: WithBroker) -> None:
    assert OFFER.secret not in repr(OFFER)

    async def test(broker: Any, nursery: trio.Nursery) -> None:
        agent = Agent(broker)
        nursery.start_soon(agent.run)
        link = await broker.joined()
        await link.welcome()
        await link.send(frames.data_in(0, b"exit\r"))
        await link.until_exit()
        await link.close()
        assert "secret-1" not in repr(agent.events) + await agent.over() + link.path
        assert "token-1" not in repr(agent.events)

    with_broker(test)
