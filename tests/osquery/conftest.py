"""What the tests of the osquery system stand on.

`world`  a database without a loop: service functions run in hand-made transactions at a time of the test's choosing
`api`    the handler with its store, asked without a socket
`served` the same behind a real TLS listener
"""

from __future__ import annotations

import gzip
import itertools
import json
import sqlite3
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h11
import pytest
import trio
from sqlite_utils import Database

from osqbox import audit, feed, tenants
from osqbox.certs import ensure_identity, issue_client
from osqbox.door import Door
from osqbox.exchange import Peer, Request, Response
from osqbox.feed import Event, Feed
from osqbox.identity import Identity
from osqbox.listen import Limits, Listener, server_context
from osqbox.osquery import nodes
from osqbox.osquery.launcher import LauncherApi
from osqbox.osquery.nodes import Node
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.osquery.tables import migrations
from osqbox.osquery.upkeep import Upkeep
from osqbox.settings import Bounds, Retention
from osqbox.store import Store, Tx
from osqbox.tenants import TenantOptions

SECRET = "a-secret-that-nobody-may-see"
START = 1_700_000_000.0
DETAILS = {
    "os_version": {"name": "Ubuntu", "version": "24.04", "platform": "ubuntu", "platform_like": "debian"},
    "osquery_info": {"version": "5.23.1", "instance_id": "instance-web-1"},
    "system_info": {"hostname": "web-1.example", "uuid": "hardware-web-1"},
}


class ManualClock:
    def __init__(self, at: float = START) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


def host(name: str = "web-1", **members: Any) -> dict[str, Any]:
    """An enrollment as osqueryd 5.23 sends it; every name is a machine of its own."""
    details = {
        **DETAILS,
        "osquery_info": {"version": "5.23.1", "instance_id": f"instance-{name}"},
        "system_info": {"hostname": f"{name}.example", "uuid": f"hardware-{name}"},
    }
    body = {"enroll_secret": SECRET, "host_identifier": name, "platform_type": "9", "host_details": details}
    return {**body, **members}


def peer(connection: str = "c-1", certificate: str | None = None, tenant: str | None = None) -> Peer:
    return Peer("192.0.2.1", connection, certificate, 1 if certificate else None, tenant, "TLSv1.3")


class World:
    """Tables, a clock and ids that count; `do` runs one transaction."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.execute("PRAGMA foreign_keys=ON")
        feed.create_tables(self.db)
        self.db.execute(
            "CREATE TABLE store_drops (kind TEXT PRIMARY KEY, count INTEGER NOT NULL, last_at REAL NOT NULL)"
        )
        for step in (tenants.migrations, audit.migrations, migrations):
            step.apply(Database(self.db))
        self.now = START
        self.events: list[Event] = []
        self._ids = itertools.count(1)
        self.do(tenants.create, tenants.DEFAULT, TenantOptions())
        self.do(tenants.add_secret, tenants.DEFAULT, SECRET)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.db.close()

    def new_id(self) -> str:
        return f"id-{next(self._ids)}"

    def do(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """What ``work(tx, ...)`` returns; undone as a whole when it raises."""
        tx = Tx(self.db, self.now)
        self.db.execute("SAVEPOINT test")
        try:
            value = work(tx, *args, **named)
        except BaseException:
            self.db.execute("ROLLBACK TO test")
            self.db.execute("RELEASE test")
            raise
        self.db.execute("RELEASE test")
        self.events += tx.events
        return value

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def enroll(self, body: dict[str, Any] | None = None, who: Peer | None = None, uri: tuple[str, ...] = ()) -> Any:
        from osqbox.osquery import protocol

        body = host() if body is None else body
        secrets = [*protocol.body_secrets(body), *uri]
        request = nodes.parse_enrollment(body, secrets, protocol.body_digest("enroll", json.dumps(body).encode()))
        return self.do(nodes.enroll, request, who or peer(), self.new_id, self.new_id)

    def node(self, name: str = "web-1", **members: Any) -> Node:
        found: Node = self.enroll(host(name, **members)).node
        return found

    def count(self, table: str, where: str = "1") -> int:
        return int(self.db.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0])


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.db.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """The handler, its store and its upkeep, with a clock that stands still; `ask` needs no socket."""

    def __init__(
        self, store: Store, clock: ManualClock, bounds: Bounds, read_hold_s: float, retention: Retention
    ) -> None:
        self.store = store
        self.clock = clock
        self.presence = Presence()
        self._ids = itertools.count(1)
        self.handler = OsqueryApi(
            store, self.presence, clock, bounds, read_hold_s=read_hold_s, new_key=self.new_key, new_id=self.new_id
        )
        self.door = Door(self.handler, LauncherApi(self.handler, bounds))
        self.upkeep = Upkeep(store, self.presence, self.handler, clock, retention, {})

    def new_id(self) -> str:
        return f"id{next(self._ids)}"

    def new_key(self) -> str:
        return f"node-key-or-session-{next(self._ids)}"

    async def do(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return await self.store.write(lambda tx: work(tx, *args, **named))

    async def ask(
        self,
        target: str,
        body: Any = b"",
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        who: Peer | None = None,
        gone: trio.Event | None = None,
    ) -> Response | None:
        """The answer to a request; a body that is no bytes is sent as JSON."""
        gone = trio.Event() if gone is None else gone
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.door.answer(Request(method, target, headers or {}, raw, who or peer(), gone.wait))

    async def tell(self, target: str, body: Any = b"", **named: Any) -> Any:
        """The decoded JSON answer."""
        answer = await self.ask(target, body, **named)
        assert answer is not None
        return json.loads(answer.body)

    async def enroll(self, name: str = "web-1", who: Peer | None = None, **members: Any) -> str:
        """The node key of a host that enrolls now."""
        answer = await self.tell("/enroll", host(name, **members), who=who)
        assert "error" not in answer, answer
        key: str = answer["node_key"]
        return key

    def node(self, name: str = "web-1") -> Node:
        return self.store.peek(lambda db: nodes.resolve(db, name))

    def events(self, kind: str | None = None) -> list[Event]:
        return self.store.peek(lambda db: feed.events_after(db, 0, kind=kind, limit=1_000_000))


@asynccontextmanager
async def running_api(
    folder: Path,
    *,
    bounds: Bounds | None = None,
    read_hold_s: float = 0,
    retention: Retention | None = None,
    options: TenantOptions | None = None,
) -> AsyncIterator[Api]:
    clock = ManualClock()
    store = Store.open(folder / "osqbox.db", (tenants.migrations, audit.migrations, migrations), clock, Feed())
    made = Api(store, clock, bounds or Bounds(), read_hold_s, retention or Retention())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            if store.peek(lambda db: tenants.find(db, tenants.DEFAULT)) is None:
                await made.do(tenants.create, tenants.DEFAULT, options or TenantOptions())
                await made.do(tenants.add_secret, tenants.DEFAULT, SECRET)
            yield made
        finally:
            await store.aclose()


@pytest.fixture
def api(tmp_path: Path) -> Callable[..., None]:
    """``api(test, **options)`` runs ``await test(Api)`` on a fresh database."""

    def run(test: Callable[[Api], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                async with running_api(tmp_path, **options) as made:
                    await test(made)

        trio.run(main)

    return run


class Client:
    """HTTP/1.1 over TLS, one request at a time on one connection."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT)

    async def ask(
        self, target: str, body: Any = b"", *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> Answer:
        """Raises EOFError when the connection ends instead of an answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Host": "localhost", "Content-Length": str(len(raw)), **(headers or {})}
        data = self._http.send(h11.Request(method=method, target=target, headers=list(fields.items())))
        data = (
            (data or b"") + (self._http.send(h11.Data(data=raw)) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        )
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            raise EOFError from None
        return await self._answer()

    async def _answer(self) -> Answer:
        head, parts = None, []
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                    self._http.start_next_cycle()
                headers = {name.decode().lower(): value.decode() for name, value in head.headers}
                return Answer(head.status_code, headers, b"".join(parts))
            else:
                raise EOFError

    async def _receive(self) -> None:
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise EOFError
        self._http.receive_data(bytes(data))

    async def tell(self, target: str, body: Any = b"", **named: Any) -> Any:
        return (await self.ask(target, body, **named)).json

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)


class Served:
    """An `Api` behind a listener."""

    def __init__(self, made: Api, listener: Listener, identity: Identity) -> None:
        self.api = made
        self.listener = listener
        self.identity = identity
        self._clients: list[Client] = []

    async def connect(self, certificate: tuple[Path, Path] | None = None) -> Client:
        context = ssl.create_default_context(cafile=str(self.identity.ca))
        if certificate:
            context.load_cert_chain(*certificate)
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", self.listener.port, ssl_context=context)
        self._clients.append(Client(stream))
        return self._clients[-1]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Certificates for all tests of a process."""
    return ensure_identity(tmp_path_factory.mktemp("certs"), now=time.time())


@pytest.fixture(scope="session")
def client_certificate(identity: Identity) -> tuple[Path, Path]:
    """Certificate and key that say ``osqbox://default/laptop-7``."""
    assert identity.directory is not None
    certificate, key, _ = issue_client(identity.directory, "laptop-7", now=time.time())
    return certificate, key


@pytest.fixture
def served(tmp_path: Path, identity: Identity) -> Callable[..., None]:
    """``served(test, **options)`` runs ``await test(Served)``; the listener is drained afterwards."""

    def run(test: Callable[[Served], Awaitable[None]], *, limits: Limits | None = None, **options: Any) -> None:
        async def main() -> None:
            with trio.fail_after(40):
                async with running_api(tmp_path, **options) as made:
                    context = server_context(
                        identity.server_cert,
                        identity.server_key,
                        client_ca_file=identity.client_ca,
                        client_auth="optional",
                    )
                    listener = Listener(
                        "agents",
                        ssl_context=context,
                        handler=made.door,
                        on_event=made.handler.count_refused,
                        limits=limits or Limits(),
                    )
                    await listener.bind("127.0.0.1", 0)
                    async with trio.open_nursery() as nursery:
                        await nursery.start(listener.run)
                        server = Served(made, listener, identity)
                        try:
                            await test(server)
                        finally:
                            await server.close()
                            made.presence.stop()
                            with trio.CancelScope(shield=True):
                                await listener.drain()

        trio.run(main)

    return run


def zipped(body: Any) -> bytes:
    return gzip.compress(body if isinstance(body, bytes) else json.dumps(body).encode(), mtime=0)


class Kit:
    """The names above for test files, which cannot import this one."""

    SECRET = SECRET
    START = START
    host = staticmethod(host)
    peer = staticmethod(peer)
    zipped = staticmethod(zipped)
    World = World


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
