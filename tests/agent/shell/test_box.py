"""Whole agents against a real box: asked for, joined, typed into, gone."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import shell_frames as frames
from osqbox.agent.profile.host import load_profile
from osqbox.agent.runner import AgentOptions, run_agent
from osqbox.agent.shell.control import ControlOptions
from osqbox.agent.shell.script import read_script
from osqbox.agent.swarm import plan as plans
from osqbox.agent.swarm.build import ProfileHosts
from osqbox.agent.swarm.run import run_swarm
from osqbox.agent.wire import client_context
from osqbox.box import Box, open_box
from osqbox.settings import Settings, ShellSettings
from osqbox.shell_frames import Exit, Frame, FrameType
from osqbox.shells.messages import Grant, Session, State

WAIT_S = 15.0


class Operator:
    """A viewer without a socket."""

    def __init__(self) -> None:
        self.close_code: int | None = None
        self.shown = b""
        self.exit: Exit | None = None
        self._typed = 0
        self._to_broker, self._from_operator = trio.open_memory_channel[Frame | None](100)
        self._news = trio.Event()
        self._to_broker.send_nowait(frames.hello(frames.ViewerHello(client="c-1", cols=100, rows=30)))

    # the broker's side

    async def receive(self) -> Frame | None:
        return await self._from_operator.receive()

    async def send(self, frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        if frame.type is FrameType.DATA_OUT:
            self.shown += frame.payload
            await self._to_broker.send(frames.ack(frame.offset + len(frame.payload)))
        elif frame.type is FrameType.HELLO:
            self._typed = frames.parse(frame, frames.ViewerWelcome).input
        elif frame.type is FrameType.PING:
            await self._to_broker.send(frames.pong(frame))
        elif frame.type is FrameType.EXIT:
            self.exit = frames.parse(frame, Exit)
        self._news.set()
        self._news = trio.Event()

    async def aclose(self, code: int, reason: str = "") -> None:
        self.close_code = code
        await self._to_broker.send(None)

    # the person's

    async def type(self, text: str) -> None:
        await self._to_broker.send(frames.data_in(self._typed, text.encode()))
        self._typed += len(text.encode())

    async def resize(self, cols: int, rows: int) -> None:
        await self._to_broker.send(frames.resize(frames.Size(cols, rows)))

    async def until(self, done: Callable[[Operator], Any]) -> None:
        with trio.move_on_after(WAIT_S) as patience:
            while not done(self):
                await self._news.wait()
        assert not patience.cancelled_caught, self.shown[-500:]

    async def sees(self, text: str) -> None:
        """Since the last time."""
        await self.until(lambda me: text.encode() in me.shown)
        self.shown = self.shown.partition(text.encode())[2]

    async def leave(self) -> None:
        self.close_code = 1000
        await self._to_broker.send(None)


class House:
    """A box, and what its agents told."""

    def __init__(self, box: Box, nursery: trio.Nursery) -> None:
        self.box = box
        self.nursery = nursery
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._news = trio.Event()

    def heard(self, kind: str, facts: dict[str, Any]) -> None:
        self.events.append((kind, facts))
        self._news.set()
        self._news = trio.Event()

    async def happens(self, kind: str, times: int = 1) -> dict[str, Any]:
        with trio.move_on_after(WAIT_S):
            while len(found := [facts for each, facts in self.events if each == kind]) < times:
                await self._news.wait()
            return found[times - 1]
        raise AssertionError((kind, self.events))

    def options(self, control: ControlOptions | None) -> AgentOptions:
        ready = self.box.ready()
        return AgentOptions(
            tls_hostname=str(ready["agents"]).removeprefix("https://"),
            server_certs=Path(str(ready["ca"])),
            enroll_secret=str(ready["enroll_secret"]),
            hostname="web-1",
            distributed_interval=1,
            control=control,
        )

    async def agent(self, control: ControlOptions | None, **changes: Any) -> str:
        """Start one; its node's id."""
        options = replace(self.options(control), **changes)
        await self.nursery.start(partial(run_agent, options, on_event=self.heard))
        return self.nodes()[-1]

    def nodes(self) -> list[str]:
        """In the order of their enrollment."""
        query = "select id from osquery_nodes order by rowid"
        return [str(row[0]) for row in self.box.store.peek(lambda db: db.execute(query).fetchall())]

    @contextlib.asynccontextmanager
    async def shell(self, node: str, **wish: Any) -> AsyncIterator[tuple[Session, Operator]]:
        assert self.box.broker is not None
        session = await self.box.broker.open(node, "default", "web-1", "alice", **wish)
        operator = Operator()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.box.broker.view, session.id, "alice", Grant.CONTROLLER, operator)
            yield session, operator
            nursery.cancel_scope.cancel()

    async def state_becomes(self, session: str, state: State) -> Session:
        assert self.box.broker is not None
        with trio.fail_after(WAIT_S):
            while (facts := self.box.broker.session(session)).state is not state:
                await trio.sleep(0.01)
        return facts


def settings(folder: Path, **changes: Any) -> Settings:
    (folder / "data").mkdir(exist_ok=True)
    found = Settings(folder / "data", folder / "certs", agents_port=0, operator_port=0, shells=ShellSettings())
    return replace(found, **changes)


@pytest.fixture
def in_house(tmp_path: Path) -> Callable[..., None]:
    """Runs ``await test(house)``."""

    def run(test: Callable[[House], Awaitable[None]], **changes: Any) -> None:
        async def main() -> None:
            with trio.fail_after(45):
                async with open_box(settings(tmp_path, **changes)) as box, trio.open_nursery() as nursery:
                    await test(House(box, nursery))
                    nursery.cancel_scope.cancel()

        trio.run(main)

    return run


def test_a_real_shell_from_request_to_exit_code(in_house: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        node = await house.agent(ControlOptions(real=True))
        began = trio.current_time()
        async with house.shell(node, cols=100, rows=30, shell="/bin/bash") as (session, operator):
            await operator.sees("# ")
            opened_s = trio.current_time() - began
            assert house.box.broker
            facts = house.box.broker.session(session.id)
            assert (facts.shell, facts.user) == ("/bin/bash", getpass.getuser())
            await operator.type("stty size; tty\r")
            await operator.sees("30 100")
            await operator.resize(90, 20)
            await trio.sleep(0.3)  # the broker waits for the end of a storm of sizes
            await operator.type("stty size\r")
            await operator.sees("20 90")
            await operator.type("sh -c \"echo go''ing; exec sleep 600\"\r")
            await operator.sees("going\r\n")
            await operator.type("\x03")
            await operator.type("exit 7\r")
            await operator.until(lambda me: me.exit is not None)
            assert operator.exit is not None
            assert operator.exit.code == 7
            facts = await house.state_becomes(session.id, State.ENDED)
            assert (facts.end_reason, facts.exit_code, facts.protocol) == ("exit", 7, "shell.v1")
        assert (await house.happens("shell_ended"))["reason"] == "exit"
        assert opened_s < 3  # a held question is answered at once; its interval is 5 s

    in_house(test)


def test_several_shells_of_one_host_and_an_operator_who_leaves(in_house: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        script = read_script('prompt: "$hostname> "\nanswers: [{match: uptime, output: "up 3 days\\n"}]')
        node = await house.agent(ControlOptions(script=script))
        async with house.shell(node) as (first, one), house.shell(node) as (second, two):
            await one.sees("web-1> ")
            await two.sees("web-1> ")
            await two.type("uptime\r")
            await two.sees("up 3 days\r\nweb-1> ")
            assert b"up" not in one.shown
            await one.leave()
            assert (await house.state_becomes(first.id, State.ENDED)).end_reason == "operator_left"
            await house.happens("shell_ended")
            await two.type("exit 3\r")
            await two.until(lambda me: me.exit is not None)
            assert (await house.state_becomes(second.id, State.ENDED)).exit_code == 3

    in_house(test)


def test_the_launcher_of_2018_gets_its_shell_too(in_house: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        node = await house.agent(ControlOptions(mode="launcher-2018", real=True, interval_s=0.2))
        async with house.shell(node) as (session, operator):
            await operator.sees("no job control in this shell")
            for _ in range(20):  # the broker cuts it to what the agent can read
                await operator.type("#" * 400 + "\r")
            await operator.type("echo al''ive\r")
            await operator.sees("alive")
            await operator.type("exit\r")
            facts = await house.state_becomes(session.id, State.ENDED)
            assert facts.protocol == "launcher"

    in_house(test)


def test_a_key_that_became_invalid_is_replaced_and_shells_go_on(in_house: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        await house.agent(ControlOptions())
        node = "update osquery_nodes set key_digest = zeroblob(32)"
        await house.box.store.write(lambda tx: tx.db.execute(node))
        await house.happens("enrolled", times=2)
        async with house.shell(house.nodes()[-1]) as (_, operator):
            await operator.sees("# ")

    in_house(test, read_hold_s=1.1)


def test_without_control_nothing_is_asked_and_a_box_without_shells_is_told_of_once(
    in_house: Callable[..., None],
) -> None:
    async def quiet(house: House) -> None:
        await house.agent(None)
        await trio.sleep(0.3)
        assert house.box.broker is not None
        assert house.box.broker.statistics().held_polls == 0
        await house.agent(ControlOptions(), hostname="web-2")
        with trio.fail_after(5):
            while house.box.broker.statistics().held_polls != 1:
                await trio.sleep(0.01)

    async def refused(house: House) -> None:
        await house.agent(ControlOptions(interval_s=0.05))
        await house.happens("shells_refused")
        await trio.sleep(0.5)
        assert len([kind for kind, _ in house.events if kind == "shells_refused"]) == 1
        assert not [facts for kind, facts in house.events if kind == "call_failed"]

    in_house(quiet)
    in_house(refused, shells=None)


def test_a_swarm_gives_scripted_shells(in_house: Callable[..., None]) -> None:
    async def test(house: House) -> None:
        ready = house.box.ready()
        plan = plans.SwarmPlan(
            server=plans.server(str(ready["agents"])),
            growth=plans.Growth(3, 50, 30),
            mix=plans.read_mix("ubuntu"),
            enroll_secret=str(ready["enroll_secret"]),
            interval_s=1,
            control=ControlOptions(),
        )
        stop, reports = trio.Event(), []

        async def run() -> None:
            tls = client_context(Path(str(ready["ca"])))
            reports.append(await run_swarm(plan, ProfileHosts(plan), tls, stop=stop))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            assert house.box.broker is not None
            with trio.fail_after(WAIT_S):
                while house.box.broker.statistics().held_polls < 3:
                    await trio.sleep(0.02)
            async with house.shell(house.nodes()[1]) as (_, operator):
                names = {load_profile("ubuntu").host(seed=0, index=n).identity.hostname for n in range(3)}
                await operator.sees("# ")
                await operator.type("hostname\r")
                await operator.sees("hostname\r\n")
                await operator.until(lambda me: b"\r\n" in me.shown)
                assert operator.shown.split(b"\r\n")[0].decode() in names
            stop.set()
        assert reports[0]["shells"] == 1
        assert reports[0]["errors"] == 0

    in_house(test)


def test_a_shell_outlives_its_box(tmp_path: Path) -> None:
    """The box is stopped in the middle of a shell and started again; the program never notices."""

    async def main() -> None:
        async with trio.open_nursery() as agents:
            async with open_box(settings(tmp_path)) as box, trio.open_nursery() as nursery:
                house, port = House(box, nursery), box.agents.port
                options = house.options(ControlOptions(real=True, shell="/bin/sh"))
                await agents.start(partial(run_agent, options, on_event=house.heard))
                async with house.shell(house.nodes()[0]) as (session, operator):
                    await operator.sees("# ")
                    await operator.type("x=kept; sleep 1; echo $x for a''ll\r")
                    await trio.sleep(0.3)
            async with open_box(settings(tmp_path, agents_port=port)) as box, trio.open_nursery() as nursery:
                house, again = House(box, nursery), Operator()
                assert box.broker is not None
                nursery.start_soon(box.broker.view, session.id, "alice", Grant.CONTROLLER, again)
                await again.sees("kept for all")
                await again.type("exit 5\r")
                await again.until(lambda me: me.exit is not None)
                assert (await house.state_becomes(session.id, State.ENDED)).exit_code == 5
                nursery.cancel_scope.cancel()
            agents.cancel_scope.cancel()

    async def limited() -> None:
        with trio.fail_after(40):
            await main()

    trio.run(limited)
