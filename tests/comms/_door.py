"""The comms API behind real sockets: its listener with TLS, its unix socket, and agents that can log in."""

from __future__ import annotations

import itertools
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import h11
import httpx
import trio
import trustme

from osqbox import audit, tenants
from osqbox.clock import SystemClock
from osqbox.comms.front import Comms, open_comms
from osqbox.comms.keys import DIRECTORY, _new_key
from osqbox.comms.registration import new_agent
from osqbox.comms.sqlite import MIGRATIONS
from osqbox.feed import Feed
from osqbox.listen import Limits, Listener, agents_asgi, server_context
from osqbox.settings import CommsSettings, Retention
from osqbox.store import Store

KEY = "k" * 32
SECRET = "the default tenant's enroll secret"


@cache
def signing_key() -> bytes:
    return _new_key("ES256")


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def client_tls() -> ssl.SSLContext:
    """A new one each time: httpx changes the ALPN of what it is given."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


@cache
def server_tls() -> ssl.SSLContext:
    ca = authority()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    folder = Path(mkdtemp())
    try:
        issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
        issued.private_key_pem.write_to_path(str(folder / "key"))
        server = server_context(folder / "cert", folder / "key")
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return server


class Door:
    """``ask`` speaks as an agent or a stranger, ``publish`` as a component of this machine."""

    def __init__(self, comms: Comms, listener: Listener, socket: Path) -> None:
        self.comms, self.listener, self.socket = comms, listener, socket
        self.url = f"https://localhost:{listener.port}"
        self.client = httpx.AsyncClient(verify=client_tls(), base_url=self.url, trust_env=False, timeout=15)
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        self.local = httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False, timeout=15)
        self._numbers = itertools.count(1)

    async def agent(self, name: str | None = None, *, tenant: str = "default", groups: tuple[str, ...] = ()) -> Known:
        """A new agent that has logged in."""
        number = next(self._numbers)
        uuid = f"00000000-0000-4000-8000-{number:012}"
        new = new_agent(
            uuid=uuid, name=name or f"agent {number}", now=self.comms.clock.now(), tenant=tenant,
            groups=groups or ("default",),
        )  # fmt: skip
        added = await self.comms.indexer.agents.add(new, await self.comms.hasher.hash(KEY), actor="test")
        token = self.comms.tokens.issue(added, self.comms.clock.now())
        return Known(self, uuid, token)

    async def ask(self, method: str, path: str, status: int, **kwargs: Any) -> httpx.Response:
        answered = await self.client.request(method, path, **kwargs)
        return checked(answered, status)

    async def local_ask(self, method: str, path: str, status: int, **kwargs: Any) -> httpx.Response:
        return checked(await self.local.request(method, path, **kwargs), status)

    async def publish(self, uuid: str, name: str = "restart", **args: Any) -> str:
        """The id of one command for one agent."""
        body = {"command": {"name": name, "args": args}, "uuids": [uuid]}
        answered = await self.local_ask("POST", "/commands", 202, json=body)
        return str(answered.json()["commands"][0]["document_id"])

    async def raw(self) -> trio.SSLStream[trio.SocketStream]:
        """A connection to write bytes to."""
        tcp = await trio.open_tcp_stream("127.0.0.1", self.listener.port)
        stream = trio.SSLStream(tcp, client_tls(), server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        return stream


class Known:
    """An agent with its token."""

    def __init__(self, door: Door, uuid: str, token: str) -> None:
        self.door, self.uuid, self.token = door, uuid, token
        self.headers = {"Authorization": f"Bearer {token}"}

    async def ask(self, method: str, path: str, status: int, **kwargs: Any) -> httpx.Response:
        headers = {**self.headers, **kwargs.pop("headers", {})}
        return await self.door.ask(method, path, status, headers=headers, **kwargs)

    @asynccontextmanager
    async def listening(self, **headers: str) -> AsyncIterator[Sse]:
        """Its command stream, over HTTP/1.1 on a connection of its own."""
        stream = await self.door.raw()
        try:
            yield await Sse.open(stream, {**self.headers, **headers})
        finally:
            await trio.aclose_forcefully(stream)


class Sse:
    """Server-sent events one by one, as (event, id, data)."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._text = b""
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, stream: trio.abc.Stream, headers: dict[str, str]) -> Sse:
        self = cls(stream)
        head = h11.Request(method="GET", target="/commands", headers=list({"Host": "localhost", **headers}.items()))
        await stream.send_all((self._http.send(head) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        response = await self._event()
        assert isinstance(response, h11.Response)
        assert response.status_code == 200
        self.headers = {name.decode(): value.decode() for name, value in response.headers}
        return self

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(65536)))
        return event

    async def next(self) -> tuple[str, str | None, Any]:
        """``("end", None, None)`` at the end."""
        while True:
            while b"\n\n" not in self._text:
                event = await self._event()
                if isinstance(event, h11.EndOfMessage):
                    return "end", None, None
                self._text += bytes(event.data)
            text, _, self._text = self._text.partition(b"\n\n")
            fields = dict(line.split(": ", 1) for line in text.decode().splitlines() if not line.startswith(":"))
            if "data" in fields:
                return fields["event"], fields.get("id"), json.loads(fields["data"])


def checked(answered: httpx.Response, status: int) -> httpx.Response:
    """Every failure is JSON of one shape."""
    assert answered.status_code == status, answered.text
    if status >= 400 and answered.request.method != "HEAD":
        assert answered.headers["content-type"] == "application/json"
        failure = answered.json()
        assert set(failure) == {"message", "code"}
        assert isinstance(failure["message"], str)
        assert failure["message"]
        assert isinstance(failure["code"], int)
        assert (status == 503) <= ("retry-after" in answered.headers)
    return answered


async def read_answer(stream: trio.abc.ReceiveStream) -> tuple[int, dict[str, str], bytes]:
    """One HTTP/1.1 answer with a length, from a raw connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some()
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers.get("content-length", "0")):
        piece = await stream.receive_some()
        assert piece, body
        body += piece
    return int(status.split()[1]), headers, body


def run_door(
    tmp_path: Path, test: Callable[[Door], Awaitable[None]], *, settings: CommsSettings | None = None, **limits: Any
) -> None:
    """Everything opened as a box does it, then ``test``, then everything closed."""
    trio.run(_run, tmp_path, test, settings or CommsSettings(token_algorithm="ES256"), limits)


async def _run(
    tmp_path: Path, test: Callable[[Door], Awaitable[None]], settings: CommsSettings, limits: dict[str, Any]
) -> None:
    with trio.fail_after(40):
        async with opened(tmp_path, settings, **limits) as door:
            await test(door)


@asynccontextmanager
async def opened(folder: Path, settings: CommsSettings, **limits: Any) -> AsyncIterator[Door]:
    clock = SystemClock()
    keys = settings.keys_dir or folder / DIRECTORY
    if settings.token_algorithm == "ES256" and not keys.exists():
        keys.mkdir(parents=True)
        (keys / "1000.key").write_bytes(signing_key())
    store = Store.open(folder / "osqbox.db", (tenants.migrations, audit.migrations, *MIGRATIONS), clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            await store.write(_prepare)
            async with (
                open_comms(
                    settings, Retention(), store, clock, data_dir=folder, certs_dir=folder, new_id=_ids()
                ) as comms,
                _listening(comms, folder, limits) as door,
            ):  # fmt: skip
                yield door
        finally:
            await store.aclose()


def _prepare(tx: Any) -> None:
    for tenant in ("default", "other"):
        if tenants.find(tx.db, tenant) is None:
            tenants.create(tx, tenant, tenants.TenantOptions())
            tenants.add_secret(tx, tenant, SECRET if tenant == "default" else "another secret")


def _ids() -> Callable[[], str]:
    import secrets

    return lambda: secrets.token_hex(12)


@asynccontextmanager
async def _listening(comms: Comms, folder: Path, limits: dict[str, Any]) -> AsyncIterator[Door]:
    socket = folder / "comms.sock"
    listener = Listener(
        "comms", ssl_context=server_tls(), handler=comms.api,
        app=agents_asgi(comms.api, websocket_app=comms.api.websocket), limits=Limits(drain_timeout_s=1, **limits),
    )  # fmt: skip
    publishers = Listener("comms_socket", handler=comms.publishers)
    await listener.bind("127.0.0.1", 0)
    publishers.bind_unix(socket)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        await nursery.start(publishers.run)
        door = Door(comms, listener, socket)
        try:
            async with door.client, door.local:
                yield door
        finally:
            with trio.CancelScope(shield=True):
                comms.hub.stop()
                await listener.drain()
                await publishers.drain()
    assert listener.statistics().open_connections == 0
    assert listener.statistics().errors == 0
