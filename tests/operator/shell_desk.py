"""A broker behind the operator API, and an agent in the process whose shell echoes and knows ``exit N``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from trio_websocket import ConnectionRejected, WebSocketConnection, wrap_client_stream
from wsproto.utilities import LocalProtocolError

from osqbox import shell_frames as frames
from osqbox.operator.app import make_app
from osqbox.shell_frames import AgentHello, AgentWelcome, Exit, Frame, FrameType, ViewerHello, ViewerWelcome
from osqbox.shells.broker import Broker, open_broker
from osqbox.shells.messages import ShellBounds

PROMPT = b"$ "


class Agent:
    """The agent's end of a session, as the broker's link."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.close_code: int | None = None
        self.head = self.taken = 0
        self.line = bytearray()
        self.typed = bytearray()
        self.sizes: list[tuple[int, int]] = []
        self.ended_input = False
        self.hung_up = trio.Event()
        self._acked = 0
        self._unsaid = bytearray()
        self._ended: Exit | None = None
        self._frames, self._received = trio.open_memory_channel[Frame](10_000)

    async def receive(self) -> Frame | None:
        try:
            return await self._received.receive()
        except trio.EndOfChannel:
            self.close_code = 1000
            return None

    async def aclose(self, code: int, reason: str = "") -> None:
        await trio.lowlevel.checkpoint()
        self._frames.close()

    async def send(self, frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        match frame.type:
            case FrameType.HELLO:
                welcome = frames.parse(frame, AgentWelcome)
                self.sizes.append((welcome.cols, welcome.rows))
                self.say(PROMPT)
            case FrameType.DATA_IN:
                self._take(frames.unseen(frame, self.taken))
            case FrameType.RESIZE:
                size = frames.parse_resize(frame)
                self.sizes.append((size.cols, size.rows))
            case FrameType.EOF_IN:
                self.ended_input = True
                self.exit(0)
            case FrameType.ACK:
                self._acked = frame.offset
                self._say_more()
            case FrameType.PING:
                self._frames.send_nowait(frames.pong(frame))
            case FrameType.EXIT:
                self.hung_up.set()
                self._frames.close()

    def say(self, data: bytes) -> None:
        self._unsaid += data
        self._say_more()

    def _say_more(self) -> None:
        """As much as the window allows, and how it ended when that was all."""
        while room := min(self._acked + frames.AGENT_WINDOW_BYTES - self.head, frames.DATA_BYTES, len(self._unsaid)):
            self._frames.send_nowait(frames.data_out(self.head, bytes(self._unsaid[:room])))
            self.head += room
            del self._unsaid[:room]
        if self._ended is not None and not self._unsaid:
            self._frames.send_nowait(frames.exit_frame(self._ended, self.head))
            self._ended = None

    def exit(self, code: int | None, signal: int | None = None) -> None:
        self._ended = Exit(code=code, signal=signal, reason="exit")
        self._say_more()

    def _take(self, data: bytes) -> None:
        self.taken += len(data)
        self.typed += data
        self._frames.send_nowait(frames.ack(self.taken))
        self.say(data.replace(b"\r", b"\r\n"))
        for byte in data:
            if byte in b"\r\n":
                line, self.line = bytes(self.line), bytearray()
                self._run(line)
            else:
                self.line.append(byte)

    def _run(self, line: bytes) -> None:
        if line.startswith(b"exit "):
            self.exit(int(line[5:]))
        elif line.startswith(b"kill "):
            self.exit(None, int(line[5:]))
        else:
            self.say(b"ran " + line + b"\r\n" + PROMPT)


class Desk:
    """What a test has: the rig with shells on."""

    def __init__(self, box: Any, broker: Broker, nursery: trio.Nursery, directory: Path) -> None:
        self.box, self.broker, self.directory = box, broker, directory
        self._nursery = nursery

    async def session(self, name: str = "web-1", **wish: Any) -> str:
        """Asked for over the API; no agent has come yet."""
        node = await self.box.enroll(name)
        facts = (await self.box.post("/api/v1/shells", {"node": node.id, **wish}, 201)).json
        return str(facts["id"])

    async def agent(self, session: str) -> Agent:
        """The agent comes, and prints its prompt."""
        facts = self.broker.session(session)
        offers = await self.broker.poll(facts.node, facts.tenant, trio.sleep_forever)
        secret = dict(offers)[session]
        agent = Agent(session)
        hello = AgentHello(session=session, secret=secret, shell="/bin/echo", user="root")
        self._nursery.start_soon(self.broker.join, self.broker.claim(session, secret), agent, hello)
        while not agent.head:
            await trio.sleep(0.001)
        return agent

    async def open(self, name: str = "web-1", **wish: Any) -> tuple[str, Agent]:
        session = await self.session(name, **wish)
        return session, await self.agent(session)


@asynccontextmanager
async def opened(box: Any, directory: Path, **bounds: Any) -> AsyncIterator[Desk]:
    parts = box.parts
    async with trio.open_nursery() as nursery:
        async with open_broker(
            parts.store, directory, parts.clock, ShellBounds(**bounds), new_id=parts.new_id, new_key=parts.new_key
        ) as broker:
            box.parts = replace(parts, shells=broker)
            box.app = make_app(box.parts)
            yield Desk(box, broker, nursery, directory)
        nursery.cancel_scope.cancel()


class Viewer:
    """A hand-made ``shell.v1`` client that keeps what it saw."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self.socket = socket
        self.output = b""
        self.welcome: ViewerWelcome | None = None
        self.seen: list[Frame] = []

    async def greet(self, client: str = "c", **words: Any) -> ViewerWelcome:
        await self.say(frames.hello(ViewerHello(client=client, **words)))
        frame = await self.receive()
        self.welcome = frames.parse(frame, ViewerWelcome)
        return self.welcome

    async def say(self, frame: Frame) -> None:
        await self.socket.send_message(frames.encode(frame))

    async def type(self, data: bytes, offset: int = 0) -> None:
        await self.say(frames.data_in(offset, data))

    async def receive(self) -> Frame:
        frame = frames.decode(await self.socket.get_message())
        self.seen.append(frame)
        if frame.type is FrameType.DATA_OUT:
            self.output += frame.payload
        return frame

    async def until(self, text: bytes) -> None:
        while text not in self.output:
            await self.receive()

    async def until_type(self, kind: FrameType) -> Frame:
        while (frame := await self.receive()).type is not kind:
            pass
        return frame


@asynccontextmanager
async def websocket(
    client: Any, path: str, headers: dict[str, str], subprotocols: list[str]
) -> AsyncIterator[WebSocketConnection]:
    """Raises ConnectionRejected when refused."""
    host = headers.get("Host", client.base_url.netloc.decode())
    named = [(name.encode(), value.encode()) for name, value in headers.items() if name != "Host"]
    rejected: BaseException | None = None
    stream = await trio.open_tcp_stream(client.base_url.host, client.base_url.port)
    try:
        async with stream, trio.open_nursery() as nursery:
            socket = await wrap_client_stream(
                nursery, stream, host, path, subprotocols=subprotocols, extra_headers=named
            )
            yield socket
            with trio.move_on_after(2):
                await socket.aclose()
            nursery.cancel_scope.cancel()
    except* ConnectionRejected as group:
        rejected = group.exceptions[0]
    except* LocalProtocolError:
        pass  # trio-websocket answers a ping when it is closing already
    if rejected is not None:
        raise rejected
