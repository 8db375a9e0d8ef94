"""A box's operator API with a real store, asked in process or over a real socket."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import httpx
import msgspec
import pytest
import trio
from quart_trio import QuartTrio

from osqbox import audit, tenants
from osqbox.exchange import Peer
from osqbox.feed import Feed
from osqbox.jobs import login
from osqbox.jobs.tables import migrations as job_migrations
from osqbox.listen import Limits, Listener
from osqbox.operator.app import Parts, make_app
from osqbox.osquery import campaigns, logs, messages, nodes
from osqbox.osquery.messages import Answer
from osqbox.osquery.nodes import Enrollment, Node
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.osquery.tables import migrations
from osqbox.settings import Bounds
from osqbox.shells.tables import migrations as shell_migrations
from osqbox.store import Store

TOKEN = "a-token-of-tests"
HOST = "127.0.0.1:8080"
NOW = 1_700_000_000.0


class HandClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> float:
        return self.at


class Answered:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]

    @property
    def events(self) -> list[tuple[str, str, Any]]:
        """Name, id and data of each server-sent event."""
        found = []
        for text in self.body.decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in text.splitlines() if not line.startswith(":"))
            if fields:
                found.append((fields["event"], fields["id"], json.loads(fields["data"])))
        return found


class Rig:
    """``get``, ``post``, ... ask with the token and check every answer against what the document says of it."""

    def __init__(self, parts: Parts, clock: HandClock, stops: list[str], nursery: trio.Nursery) -> None:
        self.parts, self.clock, self.stops = parts, clock, stops
        self.store, self.presence = parts.store, parts.presence
        self.app: QuartTrio = make_app(parts)
        self.hosts = {HOST, "localhost:8080", "[::1]:8080"}
        self._nursery = nursery
        self._numbers = itertools.count(1)

    async def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **kwargs: Any) -> Answered:
        response = await self.app.test_client().open(
            path, method=method, headers={"Host": HOST, **(headers or {})}, **kwargs
        )
        data = await response.get_data()
        assert isinstance(data, bytes)
        return Answered(response.status_code, response.headers, data)

    async def call(self, method: str, path: str, *, status: int, **kwargs: Any) -> Answered:
        headers = {"Authorization": f"Bearer {TOKEN}", **kwargs.pop("headers", {})}
        answered = await self.ask(method, path, headers=headers, **kwargs)
        assert answered.status == status, answered.body
        self.check_documented(method, path, answered)
        return answered

    async def get(self, path: str, status: int = 200, **kwargs: Any) -> Answered:
        return await self.call("GET", path, status=status, **kwargs)

    async def post(self, path: str, body: Any = None, status: int = 200, **kwargs: Any) -> Answered:
        return await self.call("POST", path, status=status, json={} if body is None else body, **kwargs)

    async def put(self, path: str, body: Any, status: int = 200, **kwargs: Any) -> Answered:
        return await self.call("PUT", path, status=status, json=body, **kwargs)

    async def patch(self, path: str, body: Any, status: int = 200) -> Answered:
        return await self.call("PATCH", path, status=status, json=body)

    async def delete(self, path: str, status: int = 200) -> Answered:
        return await self.call("DELETE", path, status=status)

    def check_documented(self, method: str, path: str, answered: Answered) -> None:
        """Every member of an answer is in its documented shape, and the other way round."""
        kind = answered.headers["Content-Type"].split(";")[0]
        if answered.status >= 400 and "ready" not in answered.json:
            failure = answered.json
            assert kind == "application/json"
            assert set(failure) - {"problems", "job"} == {"error", "reason", "hint"}
            assert isinstance(failure["error"], str)
            assert failure["reason"].replace("_", "").isalpha()
            return
        endpoint, _ = self.app.url_map.bind("").match(path.partition("?")[0], method)
        view = self.app.view_functions[endpoint]
        shape, _ = view._quart_schema_response_schemas[answered.status]  # type: ignore[attr-defined]
        found = view.operation  # type: ignore[attr-defined]
        if kind == "text/event-stream" and found.or_events is not None:
            for _, _, facts in answered.events:
                assert_shape(facts, found.or_events)
            return
        if kind != found.media[answered.status]:
            assert (kind, found.or_json is None) == ("application/json", False)
            shape = found.or_json
        if kind == "application/json":
            assert_shape(answered.json, shape)
        elif kind == "application/x-ndjson":
            for line in answered.lines:
                assert_shape(line, shape)

    # the agents' side

    async def enroll(self, name: str, tenant: str = "default", *, tags: tuple[str, ...] = (), **system: str) -> Node:
        number = next(self._numbers)
        secret = f"secret {number}"
        details = {
            "os_version": {"platform": "ubuntu", "name": "Ubuntu", "version": "24.04"},
            "system_info": {"hostname": name, "uuid": f"uuid-{number}", **system},
            "osquery_info": {"version": "5.23.1", "instance_id": f"instance-{number}"},
        }
        request = Enrollment((secret,), name, "9", details, b"digest %d" % number)

        def run(tx: Any) -> Node:
            tenants.add_secret(tx, tenant, secret, tags=tags)
            peer = Peer("192.0.2.1", f"c{number}")
            return nodes.enroll(tx, request, peer, lambda: f"key {number}", lambda: f"node{number}").node

        node = await self.store.write(run)
        self.presence.heard(node.id, self.clock.now())
        return node

    async def send_log(self, node: Node, *lines: Any, log_type: str = "result") -> None:
        batch = messages.LogBatch(log_type, [msgspec.Raw(json.dumps(line).encode()) for line in lines])
        number = next(self._numbers)
        await self.store.write(
            lambda tx: logs.receive(tx, node, log_type, messages.log_lines(batch), b"%d" % number, f"c{number}")
        )

    async def answer(self, node: Node, campaign: str, rows: list[dict[str, Any]], *, ok: bool = True) -> None:
        written = Answer(campaign, ok, 0 if ok else 1, rows, "" if ok else "no such table", {"memory": 1})
        await self.store.write(lambda tx: campaigns.write(tx, node, [written]))

    # a real socket

    @asynccontextmanager
    async def served(self) -> AsyncIterator[httpx.AsyncClient]:
        listener = Listener("operator", app=self.app, limits=Limits(drain_timeout_s=1))
        await listener.bind("127.0.0.1", 0)
        self.hosts.add(f"127.0.0.1:{listener.port}")
        await self._nursery.start(listener.run)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{listener.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=20,
            trust_env=False,
        ) as client:
            yield client
        await listener.drain()


class Stream:
    """An answer that is read as it comes, in lines."""

    def __init__(self, transport: trio.SocketStream) -> None:
        self._transport, self._protocol = transport, h11.Connection(h11.CLIENT)
        self._text = b""
        self.ended = False
        self.headers: dict[str, str] = {}

    async def open(self, client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
        wanted = {"Host": client.base_url.netloc.decode(), "Authorization": f"Bearer {TOKEN}", **headers}
        head = h11.Request(method="GET", target=path, headers=list(wanted.items()))
        await self._transport.send_all(
            (self._protocol.send(head) or b"") + (self._protocol.send(h11.EndOfMessage()) or b"")
        )
        response = await self._event()
        assert isinstance(response, h11.Response)
        assert response.status_code == 200
        self.headers = {name.decode(): value.decode() for name, value in response.headers}

    async def _event(self) -> Any:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            self._protocol.receive_data(await self._transport.receive_some(65536))
        return event

    async def read(self) -> bytes:
        """The next piece of the body, empty at its end. Raises h11.RemoteProtocolError when it breaks off."""
        event = await self._event()
        self.ended = isinstance(event, h11.EndOfMessage)
        return b"" if self.ended else bytes(event.data)

    async def line(self) -> str | None:
        """The next line, None at the end."""
        while b"\n" not in self._text:
            if not (piece := await self.read()):
                return None
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    async def object(self) -> Any:
        """The next line that is not blank, from JSON; None at the end."""
        while (line := await self.line()) == "":
            pass
        return None if line is None else json.loads(line)

    async def objects(self, count: int) -> list[Any]:
        return [await self.object() for _ in range(count)]


@asynccontextmanager
async def streamed(
    client: httpx.AsyncClient, path: str, headers: dict[str, str] | None = None
) -> AsyncIterator[Stream]:
    async with await trio.open_tcp_stream(client.base_url.host, client.base_url.port or 0) as transport:
        stream = Stream(transport)
        await stream.open(client, path, headers or {})
        yield stream


@pytest.fixture
def stream() -> Any:
    """``async with stream(client, path) as reader``: an answer read as it comes."""
    return streamed


def assert_shape(value: Any, shape: Any) -> None:
    if shape is not bytes:
        assert msgspec.to_builtins(msgspec.convert(value, shape)) == value


@pytest.fixture
def rig(tmp_path: Path) -> Callable[[Callable[[Rig], Awaitable[None]]], None]:
    """Runs an async test function with a `Rig`, within 30 s."""

    async def main(test: Callable[[Rig], Awaitable[None]]) -> None:
        clock, feed, presence, stops = HandClock(), Feed(), Presence(), []
        steps = [tenants.migrations, migrations, audit.migrations, job_migrations, login.migrations, shell_migrations]
        store = Store.open(tmp_path / "osqbox.db", steps, clock, feed)
        numbers = itertools.count(1)

        def fresh() -> str:
            return f"fresh-{next(numbers)}"

        osquery = OsqueryApi(store, presence, clock, Bounds(), read_hold_s=0, new_key=fresh, new_id=fresh)
        stopping = trio.Event()

        def stop() -> None:
            stops.append("stop")
            stopping.set()

        def info() -> dict[str, Any]:
            return {
                "pid": 1,
                "token": TOKEN,
                "enroll_secret": "never shown",
                "data": tmp_path,
                "statistics": {"store": store.statistics(), "operator": LISTENER},
            }

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.writer)
                await store.write(lambda tx: tenants.create(tx, tenants.DEFAULT, tenants.TenantOptions()))
                parts = Parts(
                    store=store,
                    feed=feed,
                    clock=clock,
                    presence=presence,
                    osquery=osquery,
                    token=TOKEN,
                    info=info,
                    ready=lambda: True,
                    stop=stop,
                    stopping=stopping,
                    allowed_hosts=lambda: frozenset(made.hosts),
                    new_id=fresh,
                    new_key=fresh,
                )
                made = Rig(parts, clock, stops, nursery)
                try:
                    await test(made)
                finally:
                    await store.aclose()

    return lambda test: trio.run(main, test)


LISTENER = {
    "open_connections": 2,
    "accepted": 3,
    "requests": 4,
    "dropped": 0,
    "errors": 0,
    "handshake_failures": {"no_certificate": 1},
    "refused": {'a "quoted" reason': 1},
}
