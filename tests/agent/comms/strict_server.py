"""A small comms server whose every answer a test says: real TLS, h11, and a record of exactly what came."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import trio
import trustme
from trio.testing import MockClock

from osqbox.agent.comms.driver import CommsAgent
from osqbox.agent.comms.facts import Fact
from osqbox.agent.comms.messages import About, Stateless
from osqbox.agent.comms.options import Load, Options
from osqbox.agent.comms.statistics import Statistics
from osqbox.agent.comms.wire import Target
from osqbox.agent.store import MemoryStore, Store

EPOCH = 1_800_000_000.0
UUID, KEY = "0192f0aa-0000-7000-8000-000000000001", "k" * 32
HOST = {
    "hostname": "web-1",
    "architecture": "x86_64",
    "ip": ["10.0.0.5"],
    "os": {"name": "Ubuntu", "type": "Linux", "version": "22.04"},
}
ABOUT = About("web-1", host=HOST)


def now() -> float:
    """Seconds since the epoch, by the run's clock."""
    return EPOCH + trio.current_time()


def run(main: Callable[[], Awaitable[None]]) -> None:
    """With a clock that jumps over waits: an hour of an agent's life takes a moment."""
    trio.run(main, clock=MockClock(autojump_threshold=0.03))


def token_until(expires_at: float) -> str:
    """Unsigned, as agents do not check signatures."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expires_at}).encode()).rstrip(b"=").decode()
    return f"e30.{claims}.c2ln"


@dataclass
class Seen:
    """One request."""

    connection: int
    at: float
    method: str
    target: str
    headers: list[tuple[str, str]]
    """In their order and spelling."""
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def lines(self) -> list[Any]:
        """Of an NDJSON body."""
        return [json.loads(line) for line in self.body.split(b"\n")]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    """Close the connection after so many bytes of the body, although more were promised."""
    rude: bool = False
    """Close without close_notify."""


def told(status: int, value: Any, *headers: tuple[str, str]) -> Answer:
    return Answer(status, json.dumps(value).encode(), headers)


Answers = Callable[[Seen], "Answer | Awaitable[Answer]"]
Stream = Callable[[Seen, "Talk"], Awaitable[None]]


@dataclass
class Talk:
    """A stream to an agent: raw bytes in chunks, or WebSocket frames by hand."""

    stream: trio.SSLStream[trio.SocketStream]
    connection: h11.Connection

    async def start(self, status: int = 200, content_type: str = "text/event-stream") -> None:
        """Once is enough."""
        if self.connection.our_state is not h11.SEND_RESPONSE:
            return
        head = h11.Response(
            status_code=status, headers=[("Content-Type", content_type), ("Transfer-Encoding", "chunked")]
        )
        await self.stream.send_all(self.connection.send(head) or b"")

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(self.connection.send(h11.Data(data=data)) or b"")

    async def command(self, seq: int, document_id: str, name: str, args: Any = None) -> None:
        data = {"id": document_id, "document_id": document_id, "action": {"name": name, "version": "", "args": args}}
        await self.send(f"id: {seq}\nevent: command\ndata: {json.dumps(data)}\n\n".encode())


@dataclass
class StrictServer:
    """``answers`` by call (login, stateless, stateful, commands, config, upgrade, authenticate, agents, files)."""

    answers: dict[str, Answers] = field(default_factory=dict)
    stream: Stream | None = None
    """Takes over GET /commands."""
    token_s: float = 900.0
    seen: list[Seen] = field(default_factory=list)
    closed_cleanly: list[int] = field(default_factory=list)
    """Connections that the agent closed with close_notify."""
    port: int = 0
    context: ssl.SSLContext = field(init=False)
    _connections: int = 0
    _news: trio.Event = field(default_factory=trio.Event)

    def of(self, call: str) -> list[Seen]:
        return [seen for seen in self.seen if call_of(seen.target) == call]

    async def until(self, true: Callable[[], bool], wait_s: float = 20_000.0) -> None:
        with trio.fail_after(wait_s):
            while not true():
                self._news = trio.Event()
                await self._news.wait()

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        ca = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(context)
        self.context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(partial(self._connection, context), listeners, task_status=_Ignored(task_status))

    async def _connection(self, context: ssl.SSLContext, socket: trio.SocketStream) -> None:
        self._connections += 1
        number, stream = self._connections, trio.SSLStream(socket, context, server_side=True)
        try:
            with contextlib.suppress(trio.BrokenResourceError, h11.RemoteProtocolError):
                await self._serve(number, stream)
        finally:
            self._news.set()
            await trio.aclose_forcefully(socket)

    async def _serve(self, number: int, stream: trio.SSLStream[trio.SocketStream]) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            request, body = None, b""
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(65536)))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    self.closed_cleanly.append(number)
                    await stream.aclose()
                    return
                else:
                    break
            assert request is not None
            headers = [(name.decode(), value.decode()) for name, value in request.headers.raw_items()]
            seen = Seen(number, trio.current_time(), request.method.decode(), request.target.decode(), headers, body)
            self.seen.append(seen)
            self._news.set()
            if not await self._answer(seen, stream, connection):
                return
            connection.start_next_cycle()

    async def _answer(self, seen: Seen, stream: trio.SSLStream[trio.SocketStream], connection: h11.Connection) -> bool:
        call = call_of(seen.target)
        if call == "commands" and self.stream is not None:
            await self.stream(seen, Talk(stream, connection))
            return False
        made = self.answers.get(call, self._default)(seen)
        answer = made if isinstance(made, Answer) else await made
        if answer.status == 204:
            answer = Answer(204)
        headers = [*answer.headers, ("Content-Length", str(len(answer.body)))] if answer.status != 204 else []
        data = connection.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        await stream.send_all(data + answer.body[: answer.cut])
        if answer.cut is not None or answer.rude:
            await trio.testing.wait_all_tasks_blocked()
            return False
        if answer.body:
            connection.send(h11.Data(data=answer.body))
        connection.send(h11.EndOfMessage())
        if connection.our_state is h11.MUST_CLOSE:
            await stream.aclose()
            return False
        return True

    def _default(self, seen: Seen) -> Answer | Awaitable[Answer]:
        match call_of(seen.target):
            case "login":
                return told(200, {"token": token_until(now() + self.token_s)})
            case "commands":
                return self._held()
            case "stateless":
                return Answer(204)
            case "stateful":
                return told(200, {"results": []})
            case "config":
                return told(200, {"groups": ["default"], "files": []}, ("ETag", '"1"'))
            case "authenticate":
                return told(200, {"data": {"token": "enroll-token"}})
            case "agents":
                return Answer(201)
        return told(404, {"message": "no such path", "code": 404})

    async def _held(self) -> Answer:
        await trio.sleep(300)
        return told(408, {"message": "Request exceeded the processing time limit", "code": 408})


class _Ignored:
    """`trio.serve_listeners` reports its listeners; nobody here asks."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status

    def started(self, _value: Any = None) -> None:
        self._status.started()


def call_of(target: str) -> str:
    path = target.partition("?")[0].removeprefix("/api/v1")
    words = {"authentication": "login", "configuration": "config"}
    last = path.rsplit("/", 1)[-1]
    return words.get(last, last)


@dataclass
class FakeHost:
    """Tells what a test put there."""

    about: About = ABOUT
    facts: list[Fact] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """Each is told once."""

    async def inventory(self, limit: int | None) -> list[Fact]:
        await trio.lowlevel.checkpoint()
        return list(self.facts)

    async def logs(self, since: float, until: float, limit: int) -> list[Stateless]:
        await trio.lowlevel.checkpoint()
        lines, self.lines = self.lines, []
        return [Stateless("logcollector", "file", {"event": {"original": line}}) for line in lines]


QUIET = Load(inventory_every_s=0, logs_every_s=0)


@contextlib.asynccontextmanager
async def serving(**given: Any) -> AsyncIterator[StrictServer]:
    server = StrictServer(**given)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server
        nursery.cancel_scope.cancel()


def agent_of(
    server: StrictServer,
    options: Options,
    *,
    host: FakeHost | None = None,
    store: Store | None = None,
    statistics: Statistics | None = None,
    registered: bool = True,
    on_event: Any = None,
) -> CommsAgent:
    agent = CommsAgent(
        Target(f"https://127.0.0.1:{server.port}"),
        server.context,
        host or FakeHost(),
        options,
        store or MemoryStore(),
        now=now,
        throw=lambda: 0.5,
        statistics=statistics,
        on_event=on_event,
    )
    if registered:
        agent.core.identify(UUID, KEY)
    return agent


@contextlib.asynccontextmanager
async def meeting(
    options: Options, *, store: Store | None = None, **given: Any
) -> AsyncIterator[tuple[StrictServer, CommsAgent]]:
    """A server and an agent that lives with it."""
    async with serving(**given) as server, living(agent_of(server, options, store=store)) as agent:
        yield server, agent


@contextlib.asynccontextmanager
async def living(agent: CommsAgent) -> AsyncIterator[CommsAgent]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        yield agent
        nursery.cancel_scope.cancel()
