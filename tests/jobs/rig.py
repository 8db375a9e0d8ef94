"""The jobs listener on a free port, real certificates, and a real grpcio client with its own protobuf runtime."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import trio

from osqbox.certs import ensure_identity, issue_client
from osqbox.jobs.access import caller_of
from osqbox.jobs.front import JobsFront, jobs_limits
from osqbox.jobs.v1 import jobs_pb
from osqbox.listen import Limits, Listener, current_peer, server_context

from .fake_runner import FakeRunner, open_fake_runner

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # the fake runner starts processes beside grpcio's threads

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2

SERVICE = "osqbox.jobs.v1.JobService"
JOBS = f"/{SERVICE}/"


class Pki:
    """A box's own certificates: `osqbox certs client NAME`."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        self.folder = folder
        self.identity = ensure_identity(folder, now=time.time())
        self.ca = folder / "ca.pem"

    @cache  # noqa: B019 - as long as its test module
    def client(self, name: str, *roles: str, age_days: float = 0, days: float = 30) -> tuple[Path, Path]:
        out = self.folder / f"{name}-{'-'.join(roles)}-{age_days}"
        cert, key, _ = issue_client(
            self.folder, name, roles=roles, days=days, out=out, now=time.time() - age_days * 86400
        )
        return cert, key

    def server_context(self) -> ssl.SSLContext:
        identity = self.identity
        return server_context(
            identity.server_cert,
            identity.server_key,
            client_ca_file=identity.client_ca,
            client_auth="required",
            minimum=ssl.TLSVersion.TLSv1_3,
            resumption=False,
        )

    def client_context(self, name: str | None = "alice", *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        if name is not None:
            context.load_cert_chain(*self.client(name))
        context.set_alpn_protocols(list(alpn or ("h2",)))
        return context


class Served:
    def __init__(self, pki: Pki, listener: Listener, runner: FakeRunner, stopping: trio.Event) -> None:
        self.pki = pki
        self.listener = listener
        self.runner = runner
        self.stopping = stopping
        self.clients: list[Client] = []

    @property
    def url(self) -> str:
        return f"https://localhost:{self.listener.port}"

    def client(self, name: str = "alice", *roles: str, **options: Any) -> Client:
        cert, key = self.pki.client(name, *roles)
        client = Client(self.listener.port, self.pki.ca.read_bytes(), key.read_bytes(), cert.read_bytes(), **options)
        self.clients.append(client)
        return client


@asynccontextmanager
async def serving(pki: Pki, runner: Any = None, *, limits: Limits | None = None) -> AsyncIterator[Served]:
    stopping = trio.Event()
    async with open_fake_runner() as fake:
        runner = runner or fake
        app: Any = JobsFront(runner, caller=lambda: caller_of(current_peer()), stopping=stopping)  # type: ignore[arg-type]
        listener = Listener("jobs", ssl_context=pki.server_context(), app=app, limits=limits or jobs_limits())
        await listener.bind("127.0.0.1", 0)
        served = Served(pki, listener, runner, stopping)
        with trio.fail_after(28):
            async with trio.open_nursery() as nursery:
                await nursery.start(listener.run)
                try:
                    yield served
                finally:
                    for client in served.clients:
                        client.channel.close()
                stopping.set()
                await listener.drain()
    assert listener.statistics().open_connections == 0


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    """For effects on the other side of a socket, which no event announces."""
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.002)


# grpcio


def descriptor_files(module: ModuleType) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Of a generated module, with what it imports before it, in Google's runtime."""

    def walk(file: Any) -> Iterator[Any]:
        for imported in file.dependencies:
            yield from walk(imported)
        yield file

    seen = set()
    for file in walk(module.desc()):
        if file.name not in seen:
            seen.add(file.name)
            yield descriptor_pb2.FileDescriptorProto.FromString(file.proto.to_binary())


class Messages:
    """Message classes and methods of a service, as a client generated from its .proto has them."""

    def __init__(self, module: ModuleType, service: str, change: Callable[[Any], None] = lambda _file: None) -> None:
        self.pool = descriptor_pool.DescriptorPool()
        for file in descriptor_files(module):
            change(file)
            self.pool.Add(file)
        self.service = self.pool.FindServiceByName(service)

    def __getitem__(self, name: str) -> Any:
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"{self.service.file.package}.{name}"))

    def method(self, name: str) -> tuple[str, Any, Any, str]:
        described = self.service.methods_by_name[name]
        kinds = (
            "stream" if described.client_streaming else "unary",
            "stream" if described.server_streaming else "unary",
        )
        request, answer = (
            message_factory.GetMessageClass(kind) for kind in (described.input_type, described.output_type)
        )
        return f"/{self.service.full_name}/{name}", request, answer, "_".join(kinds)


@cache
def job_messages() -> Messages:
    return Messages(jobs_pb, SERVICE)


class Client:
    def __init__(
        self,
        port: int,
        ca: bytes,
        key: bytes | None,
        cert: bytes | None,
        messages: Messages | None = None,
        options: tuple[tuple[str, Any], ...] = (),
    ) -> None:
        self.messages = messages or job_messages()
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
        own = ("grpc.use_local_subchannel_pool", 1)
        self.channel = grpc.secure_channel(f"localhost:{port}", credentials, options=(own, *options))

    def bound(self, method: str) -> tuple[Any, Any]:
        path, request, answer, kind = self.messages.method(method)
        make = getattr(self.channel, kind)
        return make(path, request.SerializeToString, answer.FromString), request

    def call(self, method: str, *, within_s: float = 20, options: dict[str, Any] | None = None, **fields: Any) -> Any:
        """A unary call; blocks."""
        call, request = self.bound(method)
        return call(request(**fields), timeout=within_s, **(options or {}))

    async def ask(self, method: str, **named: Any) -> Any:
        return await trio.to_thread.run_sync(partial(self.call, method, **named), abandon_on_cancel=True)

    async def fails(self, method: str, **named: Any) -> grpc.RpcError:
        try:
            answer = await self.ask(method, **named)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"expected a refusal, got {answer}")

    def stream(self, method: str, *, within_s: float = 20, **fields: Any) -> Any:
        call, request = self.bound(method)
        return call(request(**fields), timeout=within_s)

    async def follow(self, **fields: Any) -> tuple[bytes, Any]:
        """The whole output, checked to be contiguous, and the status at its end."""
        return await trio.to_thread.run_sync(lambda: whole(self.stream("GetProcessOutput", **fields)))

    async def run(self, *words: str | bytes, **fields: Any) -> str:
        command, *args = (word.encode() if isinstance(word, str) else word for word in words)
        answer = await self.ask("RunProcess", command=command, args=args, **fields)
        assert answer.process_id == answer.status.process_id
        return answer.process_id


def whole(messages: Any) -> tuple[bytes, Any]:
    output, end = b"", None
    for message in messages:
        assert end is None
        match message.WhichOneof("event"):
            case "chunk":
                assert message.chunk.offset == len(output)
                assert 0 < len(message.chunk.data) <= 65536
                output += message.chunk.data
            case "end":
                end = message.end
    return output, end


def details(error: Any) -> dict[str, Any]:
    """google.rpc details by the name of their type, read by Google's own classes."""
    packed = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
    found = {}
    for detail in status_pb2.Status.FromString(packed).details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name).FromString(detail.value)
    return found
