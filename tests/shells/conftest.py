"""What the broker's tests stand on: a real store, a real TLS listener, and clients that are independent of the server.

`shells` opens the whole of it, as often as a test wants on the same files: that is a restart.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_websocket
import trustme
from sqlite_utils import Migrations
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from osqbox import audit
from osqbox import shell_frames as frames
from osqbox.clock import SystemClock
from osqbox.errors import Refused
from osqbox.exchange import Peer
from osqbox.feed import Feed
from osqbox.listen import Limits, Listener, agents_asgi, server_context
from osqbox.listen.websocket import WebSocket
from osqbox.shell_frames import (
    SUBPROTOCOL,
    VIEWER_FRAME_BYTES,
    AgentHello,
    AgentWelcome,
    Exit,
    Frame,
    FrameError,
    FrameType,
    Role,
    Size,
    ViewerHello,
    ViewerWelcome,
)
from osqbox.shells import tables
from osqbox.shells.broker import Broker, open_broker
from osqbox.shells.links import FrameLink
from osqbox.shells.messages import Grant, Session, ShellBounds
from osqbox.shells.recording import RecordingRules
from osqbox.shells.routes import ShellsApi
from osqbox.store import Store

NODE_KEYS = {"key-of-n1": ("n1", "default", "web-1"), "key-of-n2": ("n2", "default", "web-2")}
MIGRATIONS: list[Migrations] = [audit.migrations, tables.migrations]


def authenticate(node_key: str, _peer: Peer) -> tuple[str, str, str]:
    if node_key not in NODE_KEYS:
        raise Refused("node_invalid", "the node key is unknown", node_invalid=True)
    return NODE_KEYS[node_key]


class Client:
    """One WebSocket of a test, frame by frame."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self.socket = socket

    async def send(self, *sent: Frame | bytes | str) -> None:
        for each in sent:
            await self.socket.send_message(frames.encode(each) if isinstance(each, Frame) else each)

    async def receive(self) -> Frame:
        return frames.decode(await self.socket.get_message())

    async def next(self, *kinds: FrameType) -> Frame:
        """The next frame of these kinds; others are passed over, pings answered."""
        while True:
            frame = await self.receive()
            if frame.type is FrameType.PING:
                await self.send(frames.pong(frame))
            elif frame.type in kinds:
                return frame

    async def close_code(self) -> int:
        """Read on until it is closed, and say with what."""
        try:
            while True:
                await self.socket.get_message()
        except ConnectionClosed as closed:
            return closed.reason.code if closed.reason else 1006


class Agent(Client):
    """A `shell.v1` agent without a terminal: the test is the program."""

    welcome: AgentWelcome

    def __init__(self, socket: WebSocketConnection) -> None:
        super().__init__(socket)
        self.head = self.acked = self.input = 0
        self.typed = bytearray()
        self.sizes: list[Size] = []

    async def hello(self, session: str, **facts: Any) -> AgentWelcome:
        await self.send(frames.hello(AgentHello(session=session, **facts)))
        self.welcome = frames.parse(await self.next(FrameType.HELLO), AgentWelcome)
        self.head = self.acked = self.welcome.wanted
        self.input = self.welcome.input
        return self.welcome

    async def print(self, data: bytes) -> None:
        """Output, no more than the window allows."""
        while data:
            while (room := self.acked + self.welcome.window_bytes - self.head) <= 0:
                await self.heed()
            piece, data = data[: min(room, frames.DATA_BYTES)], data[min(room, frames.DATA_BYTES) :]
            await self.send(frames.data_out(self.head, piece))
            self.head += len(piece)

    async def heed(self, *, ack: bool = True) -> Frame:
        """One frame from the broker, obeyed."""
        frame = await self.receive()
        match frame.type:
            case FrameType.ACK:
                self.acked = frame.offset
            case FrameType.DATA_IN:
                new = frames.unseen(frame, self.input)
                self.typed += new
                self.input += len(new)
                if ack:
                    await self.send(frames.ack(self.input))
            case FrameType.RESIZE:
                self.sizes.append(frames.parse_resize(frame))
            case FrameType.PING:
                await self.send(frames.pong(frame))
        return frame

    async def read_typed(self, count_bytes: int) -> bytes:
        while len(self.typed) < count_bytes:
            await self.heed()
        return bytes(self.typed)

    async def exit(self, **how: Any) -> None:
        await self.send(frames.exit_frame(Exit(**how), self.head))


class Viewer(Client):
    welcome: ViewerWelcome
    role: Role

    def __init__(self, socket: WebSocketConnection) -> None:
        super().__init__(socket)
        self.shown = bytearray()
        self.offset = self.typed = 0
        self.exit: Exit | None = None
        self.resets: list[tuple[int, int]] = []
        self.notices: list[frames.Error] = []
        self.input_acked = 0

    async def hello(self, client: str, **facts: Any) -> ViewerWelcome:
        await self.send(frames.hello(ViewerHello(client=client, **facts)))
        self.welcome = frames.parse(await self.next(FrameType.HELLO), ViewerWelcome)
        self.offset, self.typed = self.welcome.offset, self.welcome.input
        return self.welcome

    async def type(self, data: bytes) -> None:
        for start in range(0, len(data), frames.DATA_BYTES):
            piece = data[start : start + frames.DATA_BYTES]
            await self.send(frames.data_in(self.typed, piece))
            self.typed += len(piece)

    async def heed(self, *, ack: bool = True) -> Frame:
        frame = await self.receive()
        match frame.type:
            case FrameType.DATA_OUT:
                new = frames.unseen(frame, self.offset)
                self.shown += new
                self.offset += len(new)
                if ack:
                    await self.send(frames.ack(self.offset))
            case FrameType.ACK:
                self.input_acked = frame.offset
            case FrameType.RESET:
                self.resets.append(frames.parse_reset(frame))
                self.offset = self.resets[-1][1]
            case FrameType.ROLE:
                self.role = frames.parse(frame, Role)
            case FrameType.ERROR:
                self.notices.append(frames.parse(frame, frames.Error))
            case FrameType.EXIT:
                self.exit = frames.parse(frame, Exit)
            case FrameType.PING:
                await self.send(frames.pong(frame))
        return frame

    async def until(self, done: Callable[[Viewer], bool]) -> None:
        while not done(self):
            await self.heed()

    async def read(self, count_bytes: int) -> bytes:
        """So many bytes of output have been shown."""
        await self.until(lambda me: len(me.shown) >= count_bytes)
        return bytes(self.shown)

    async def read_exit(self) -> Exit:
        await self.until(lambda me: me.exit is not None)
        assert self.exit is not None
        return self.exit

    async def has_role(self, role: Grant) -> None:
        await self.until(lambda me: hasattr(me, "role") and me.role.role == role)


class Launcher(Client):
    """The text frames of 2018."""

    async def print(self, data: bytes) -> None:
        for start in range(0, len(data), 2048):
            await self.socket.send_message("1" + base64.b64encode(data[start : start + 2048]).decode())

    async def text(self) -> str:
        message = await self.socket.get_message()
        assert isinstance(message, str)
        return message


class Shells:
    """One box's worth of shells, running."""

    def __init__(self, broker: Broker, api: ShellsApi, listener: Listener, store: Store, tls: ssl.SSLContext) -> None:
        self.broker, self.api, self.listener, self.store, self._tls = broker, api, listener, store, tls

    # HTTP

    async def ask(
        self, target: str, body: Any = None, *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """One request on a connection of its own: status and JSON body."""
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        fields = {"Host": f"localhost:{self.listener.port}", "Content-Length": str(len(data)), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in (fields | (headers or {})).items())
        stream = await trio.open_ssl_over_tcp_stream("localhost", self.listener.port, ssl_context=self._tls)
        async with stream:
            await stream.send_all(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + data)
            answer = b"".join([piece async for piece in stream])
        lines, _, content = answer.partition(b"\r\n\r\n")
        return int(lines.split()[1]), json.loads(content)

    async def offers(self, node_key: str = "key-of-n1", path: str = "/api/v1/shells") -> list[dict[str, str]]:
        status, answer = await self.ask(path, {"node_key": node_key})
        assert (status, answer["error"], answer["node_invalid"]) == (200, "", False)
        offers: list[dict[str, str]] = answer["sessions"]
        return offers

    # sessions

    async def open(self, node: str = "n1", by: str = "alice", **wish: Any) -> Session:
        return await self.broker.open(node, "default", f"host-of-{node}", by, **wish)

    async def offered(self, **wish: Any) -> tuple[str, str]:
        """A session and its secret, fetched."""
        session = (await self.open(**wish)).id
        [offer] = await self.offers()
        assert offer["session_id"] == session
        return session, offer["secret"]

    @asynccontextmanager
    async def socket(self, path: str, *, subprotocol: str | None = SUBPROTOCOL, **headers: str) -> Any:
        stream = await trio.open_ssl_over_tcp_stream("localhost", self.listener.port, ssl_context=self._tls)
        try:
            async with trio.open_nursery() as nursery:
                socket = await trio_websocket.wrap_client_stream(
                    nursery,
                    stream,
                    f"localhost:{self.listener.port}",
                    path,
                    subprotocols=[subprotocol] if subprotocol else None,
                    extra_headers=[(name.encode(), value.encode()) for name, value in headers.items()],
                    max_message_size=2**21,
                    message_queue_size=4,
                )
                yield socket
                with trio.move_on_after(1):
                    await socket.aclose()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(stream)  # which trio-websocket leaves open when the server closed first

    async def rejected(self, path: str, **socket: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a handshake that is refused."""
        refused: ConnectionRejected | None = None
        try:
            async with self.socket(path, **socket):
                pass
        except* ConnectionRejected as group:
            refused = group.exceptions[0]  # type: ignore[assignment]
        assert refused is not None
        return refused.status_code, json.loads(refused.body)

    @asynccontextmanager
    async def client(self, path: str, **socket: Any) -> AsyncIterator[Client]:
        async with self.socket(path, **socket) as connected:
            yield Client(connected)

    @asynccontextmanager
    async def agent(
        self, session: str, secret: str | None = None, *, resume: str | None = None, **facts: Any
    ) -> AsyncIterator[Agent]:
        async with self.socket(f"/api/v1/shells/{session}") as socket:
            agent = Agent(socket)
            await agent.hello(session, secret=secret, resume=resume, **facts)
            yield agent

    @asynccontextmanager
    async def launcher(self, session: str, secret: str, title: str = "/bin/bash@web-1") -> AsyncIterator[Launcher]:
        async with self.socket(f"/api/v1/shells/{session}", subprotocol=None) as socket:
            launcher = Launcher(socket)
            await launcher.send("0" + secret, "3" + title)
            yield launcher

    @asynccontextmanager
    async def viewer(
        self, session: str, client: str = "c1", *, by: str = "alice", grant: str = Grant.CONTROLLER, **hello: Any
    ) -> AsyncIterator[Viewer]:
        async with self.socket(f"/view/{session}/{by}/{grant}") as socket:
            viewer = Viewer(socket)
            await viewer.hello(client, **hello)
            yield viewer

    async def audited(self, action: str | None = None, **where: Any) -> list[dict[str, Any]]:
        await self.broker.wait_written()
        return await self.store.read(lambda db: audit.rows(db, action=action, **where))

    async def state_becomes(self, session: str, state: str) -> Session:
        while (facts := self.broker.session(session)).state != state:
            await trio.sleep(0.01)
        return facts


def operators(broker: Broker, otherwise: Any) -> Any:
    """A WebSocket app for viewers, as small as can be: who asks is in the path."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket" or not scope["path"].startswith("/view/"):
            await otherwise(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        link = FrameLink(WebSocket(receive, send), VIEWER_FRAME_BYTES)
        _, _, session, by, grant = scope["path"].split("/")
        try:
            await broker.view(session, by, Grant(grant), link)
        except Refused as refused:
            await link.aclose(4000 + refused.status, refused.message)
        except FrameError as wrong:
            await link.aclose(wrong.code, str(wrong))

    return app


class Pki:
    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        issued = ca.issue_cert("localhost", "127.0.0.1")
        self._ca_file, self._cert_file, self._key_file = folder / "ca", folder / "cert", folder / "key"
        ca.cert_pem.write_to_path(str(self._ca_file))
        issued.cert_chain_pems[0].write_to_path(str(self._cert_file))
        issued.private_key_pem.write_to_path(str(self._key_file))

    def server(self) -> ssl.SSLContext:
        return server_context(self._cert_file, self._key_file)

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._ca_file))


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


OpenShells = Callable[..., Any]


@pytest.fixture
def shells(tmp_path: Path, pki: Pki) -> OpenShells:
    numbers = count(1)

    @asynccontextmanager
    async def opened(
        bounds: ShellBounds | None = None, *, rules: RecordingRules | None = None, port: int = 0
    ) -> AsyncIterator[Shells]:
        store = Store.open(tmp_path / "osqbox.db", MIGRATIONS, SystemClock(), Feed())
        rules = rules or RecordingRules(reserve_bytes=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                async with open_broker(
                    store, tmp_path / "shells", SystemClock(), bounds, new_id=lambda: f"s{next(numbers)}", rules=rules
                ) as broker:
                    api = ShellsApi(broker, authenticate)
                    listener = Listener(
                        "agents",
                        ssl_context=pki.server(),
                        handler=api,
                        app=agents_asgi(api, websocket_app=operators(broker, api.join)),
                        limits=Limits(websocket_message_bytes=2**21, drain_timeout_s=0.5),
                    )
                    await listener.bind("127.0.0.1", port)
                    await nursery.start(listener.run)
                    try:
                        yield Shells(broker, api, listener, store, pki.client())
                    finally:
                        with trio.CancelScope(shield=True):
                            await broker.stop()
                            await listener.drain()
            finally:
                await store.aclose()

    return opened


@pytest.fixture
def run() -> Callable[[Callable[[], Awaitable[None]], float], None]:
    """Run a test's loop, with a limit."""

    def run_limited(main: Callable[[], Awaitable[None]], limit_s: float = 20) -> None:
        async def limited() -> None:
            with trio.fail_after(limit_s):
                await main()

        trio.run(limited)

    return run_limited
