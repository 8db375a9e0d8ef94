"""The comms listener on a free port, with agents that hold a token, and clients made of nothing but sockets."""

from __future__ import annotations

import itertools
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio_websocket
import trustme

from osqbox import audit, tenants
from osqbox.clock import SystemClock
from osqbox.comms.front import Comms, open_comms
from osqbox.comms.messages import Action, Agent, Command, NewCommand
from osqbox.comms.registration import new_agent
from osqbox.comms.sqlite import MIGRATIONS, agents
from osqbox.feed import Feed
from osqbox.listen import Limits, Listener, agents_asgi, server_context
from osqbox.settings import CommsSettings, Retention
from osqbox.store import Store


class Served:
    def __init__(self, comms: Comms, port: int, tls: ssl.SSLContext) -> None:
        self.comms, self.port, self._tls = comms, port, tls
        self._numbers = itertools.count(1)

    async def add(self, *uuids: str) -> None:
        made = [new_agent(uuid=uuid, name=uuid, now=time.time()) for uuid in uuids]
        await self.comms.store.write(lambda tx: [agents.add(tx, each, "no login", actor="test") for each in made])

    async def agent(self, uuid: str) -> Agent:
        found = await self.comms.indexer.agents.find(uuid)
        assert found is not None
        return found

    async def token(self, uuid: str) -> str:
        return self.comms.tokens.issue(await self.agent(uuid), time.time())

    async def publish(self, *uuids: str, args: Any = None) -> list[Command]:
        now, action = time.time(), Action(name="restart", args=args or {})
        new = [
            NewCommand(
                id=f"c{next(self._numbers)}", agent=uuid, tenant="default", action=action, request_id="r",
                created_at=now, expires_at=now + 3600,
            )
            for uuid in uuids
        ]  # fmt: skip
        return await self.comms.indexer.commands.publish(new, actor="test")

    @asynccontextmanager
    async def connection(self, *, narrow: bool = False) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
        """``narrow``: with as small a window as the kernel allows."""
        sock = trio.socket.socket()
        if narrow:
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        await sock.connect(("127.0.0.1", self.port))
        tcp = trio.SocketStream(sock)
        try:
            yield trio.SSLStream(tcp, self._tls, server_hostname="localhost", https_compatible=True)
        finally:
            await trio.aclose_forcefully(tcp)

    @asynccontextmanager
    async def events(self, uuid: str, after: str | None = None, **kwargs: Any) -> AsyncIterator[EventReader]:
        async with self.connection(**kwargs) as stream:
            lines = [
                "GET /api/v1/commands HTTP/1.1",
                "Host: localhost",
                "Accept: text/event-stream",
                f"Authorization: Bearer {await self.token(uuid)}",
                *([] if after is None else [f"Last-Event-ID: {after}"]),
            ]
            await stream.send_all("\r\n".join((*lines, "", "")).encode())
            yield EventReader(stream)

    @asynccontextmanager
    async def socket(self, uuid: str, path: str = "/api/v1/commands") -> AsyncIterator[Any]:
        headers = [(b"authorization", f"Bearer {await self.token(uuid)}".encode())]
        async with self.connection() as stream, trio.open_nursery() as nursery:
            yield await trio_websocket.wrap_client_stream(
                nursery, stream, "localhost", path, subprotocols=["commands.v1"], extra_headers=headers
            )
            nursery.cancel_scope.cancel()


class EventReader:
    """Takes an HTTP/1.1 answer in chunks apart, byte by byte as it comes."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.head = b""
        self.raw_bytes = 0
        self._raw = self._text = b""
        self.ended = False

    async def _more(self, most_bytes: int = 65536) -> bool:
        piece = await self.stream.receive_some(most_bytes)
        self._raw += piece
        self.raw_bytes += len(piece)
        if not self.head and b"\r\n\r\n" in self._raw:
            self.head, _, self._raw = self._raw.partition(b"\r\n\r\n")
        while self.head and b"\r\n" in self._raw:
            size, _, rest = self._raw.partition(b"\r\n")
            length = int(size, 16)
            if len(rest) < length + 2:
                break
            self._text, self._raw = self._text + rest[:length], rest[length + 2 :]
            self.ended = length == 0
        return bool(piece) and not self.ended

    async def read_bytes(self, count: int) -> None:
        """No more than so many bytes of the body's TLS records are looked at."""
        while not self.head:
            await self._more()
        while count > 0 and await self._more(count):
            count -= 1

    async def event(self) -> dict[str, str] | None:
        """The next event; None when there will be none."""
        while True:
            while b"\n\n" not in self._text:
                if not await self._more():
                    return None
            block, _, self._text = self._text.partition(b"\n\n")
            lines = [line for line in block.decode().split("\n") if not line.startswith(":")]
            fields = dict(line.split(": ", 1) for line in lines)
            if "data" in fields:
                return fields


@asynccontextmanager
async def serve(folder: Path, limits: Limits | None = None) -> AsyncIterator[Served]:
    ca = trustme.CA()
    issued = ca.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
    issued.private_key_pem.write_to_path(str(folder / "key"))
    tls = ssl.create_default_context()
    ca.configure_trust(tls)
    numbers = itertools.count(1)
    steps = [tenants.migrations, audit.migrations, *MIGRATIONS]
    store = Store.open(folder / "box.db", steps, SystemClock(), Feed())
    with trio.fail_after(25):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.writer)
            try:
                await store.write(lambda tx: tenants.create(tx, tenants.DEFAULT, tenants.TenantOptions()))
                async with open_comms(
                    CommsSettings(token_algorithm="ES256"), Retention(), store, SystemClock(),
                    data_dir=folder, certs_dir=folder, new_id=lambda: f"id-{next(numbers)}",
                ) as comms:  # fmt: skip
                    listener = Listener(
                        "comms",
                        ssl_context=server_context(folder / "cert", folder / "key"),
                        handler=comms.api,
                        app=agents_asgi(comms.api, websocket_app=comms.api.websocket),
                        limits=limits or Limits(drain_timeout_s=1),
                    )
                    await listener.bind("127.0.0.1", 0)
                    await nursery.start(listener.run)
                    assert listener.port is not None
                    try:
                        yield Served(comms, listener.port, tls)
                    finally:
                        with trio.CancelScope(shield=True):
                            comms.hub.stop()
                            await listener.drain()
            finally:
                await store.aclose()
