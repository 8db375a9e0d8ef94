"""A broker whose every word a test says, over real TLS and WebSockets."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trustme
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from osqbox import shell_frames as frames
from osqbox.agent.shell.socket import Dialer
from osqbox.agent.wire import Transport
from osqbox.shell_frames import AgentHello, AgentWelcome, Exit, Frame, FrameType

WAIT_S = 10.0


@dataclass
class Link:
    """One connection of an agent."""

    socket: WebSocketConnection
    path: str
    headers: dict[str, str]
    is_done: trio.Event = field(default_factory=trio.Event)
    output: bytearray = field(default_factory=bytearray)
    title: str = ""
    acked_input: int = 0
    pongs: list[int] = field(default_factory=list)

    async def message(self) -> bytes | str:
        with trio.fail_after(WAIT_S):
            return await self.socket.get_message()

    async def frame(self) -> Frame:
        return frames.decode(await self.message())

    async def send(self, frame: Frame) -> None:
        with trio.fail_after(WAIT_S):
            await self.socket.send_message(frames.encode(frame))

    async def hello(self) -> AgentHello:
        return frames.parse(await self.frame(), AgentHello)

    async def welcome(self, **changes: Any) -> AgentHello:
        """Take the agent's HELLO and answer it."""
        hello = await self.hello()
        given = {"session": hello.session, "resume": "token-1", "wanted": hello.head, "input": hello.input}
        room = {"window_bytes": frames.AGENT_WINDOW_BYTES, "cols": 80, "rows": 24}
        await self.send(frames.hello(AgentWelcome(**{**given, **room, **changes})))
        return hello

    async def take(self, *, ack: bool = True) -> Frame:
        """The next frame; output is collected, and acknowledged."""
        frame = await self.frame()
        if frame.type is FrameType.DATA_OUT:
            self.output += frame.payload
            if ack:
                await self.send(frames.ack(frame.offset + len(frame.payload)))
        elif frame.type is FrameType.ACK:
            self.acked_input = frame.offset
        elif frame.type is FrameType.TITLE:
            self.title = frames.parse_title(frame)
        elif frame.type is FrameType.PONG:
            self.pongs.append(frame.offset)
        return frame

    async def until(self, text: bytes) -> None:
        while text not in self.output:
            frame = await self.take()
            assert frame.type is not FrameType.EXIT, (text, bytes(self.output))

    async def until_exit(self) -> Exit:
        while (frame := await self.take()).type is not FrameType.EXIT:
            pass
        return frames.parse(frame, Exit)

    async def close(self, code: int = 1000) -> None:
        with trio.move_on_after(WAIT_S):
            await self.socket.aclose(code)
        self.is_done.set()

    async def drop(self) -> None:
        """As when a cable is pulled: no close frame."""
        await trio.aclose_forcefully(self.socket._stream)  # type: ignore[arg-type]
        self.is_done.set()

    async def closed_with(self) -> int:
        """The code the agent closes with."""
        try:
            while True:
                await self.message()
        except ConnectionClosed:
            assert self.socket.closed is not None
            return self.socket.closed.code
        finally:
            self.is_done.set()


class Broker:
    def __init__(self, ca: trustme.CA) -> None:
        self.refuses_with = 0
        self.subprotocol: str | None = frames.SUBPROTOCOL
        self.port = 0
        self._send, self._joined = trio.open_memory_channel[Link](10)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("localhost").configure_cert(self._tls)
        self._client = ssl.create_default_context()
        ca.configure_trust(self._client)

    @property
    def dialer(self) -> Dialer:
        return Dialer(lambda: f"localhost:{self.port}", self._client, Transport(timeout_s=WAIT_S))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_websocket, self._serve, "localhost", 0, self._tls)
            endpoints = [each for each in server.listeners if "127.0.0.1" in str(each.address)]
            self.port = endpoints[0].port
            task_status.started()

    async def _serve(self, request: WebSocketRequest) -> None:
        if self.refuses_with:
            await request.reject(self.refuses_with, body=b'{"error":"no"}')
            return
        socket = await request.accept(subprotocol=self.subprotocol)
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        link = Link(socket, request.path, headers)
        await self._send.send(link)
        await link.is_done.wait()

    async def joined(self) -> Link:
        with trio.fail_after(WAIT_S):
            return await self._joined.receive()


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def with_broker(ca: trustme.CA) -> Callable[..., Any]:
    """Runs ``await test(broker, nursery)`` beside a broker; what it starts in the nursery ends with it."""

    def run(test: Callable[[Broker, trio.Nursery], Any]) -> None:
        async def main() -> None:
            broker = Broker(ca)
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    await nursery.start(broker.run)
                    async with trio.open_nursery() as inner:
                        await test(broker, inner)
                        inner.cancel_scope.cancel()
                    nursery.cancel_scope.cancel()

        trio.run(main)

    return run
