"""The job runner over gRPC, gRPC-Web and Connect JSON: one ASGI application behind `osqbox.listen.Listener`.

Connectrpc speaks the three protocols. What it lacks on Trio is here: a call ends the moment its client is gone, a
request is bounded in size and time before it is whole, an error before the first message has its trailers (grpcio
takes no others), an unexpected exception says nothing but an id, and calls that wait end when the box stops.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import trio
from connectrpc.code import Code as WireCode
from connectrpc.codec import Codec, proto_binary_codec, proto_json_codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.server import ConnectASGIApplication, Endpoint
from protobuf import Oneof

from osqbox.listen import ASGIApp
from osqbox.listen.connection import Budget

from . import plain, translate
from .errors import Code, JobError, invalid
from .health import Health, Stopping
from .messages import KIB, MIB, Caller
from .reflection import Descriptors, Reflection
from .v1 import error_details_pb, health_pb, jobs_pb, reflection_pb, reflection_v1alpha_pb
from .v1 import jobs_pb as wire

if TYPE_CHECKING:
    from .runner import JobRunner

REQUEST_BYTES = 4 * MIB
"""Largest message taken; arguments of a process are at most 2 MiB (Linux, MAX_ARG_STRLEN and stack limit)."""
REQUEST_TIMEOUT_S = 60
"""For a whole request message; a stream of input may take as long as it likes."""
HELD_BYTES = 256 * MIB
"""Request messages in memory at once, over all connections."""
INPUT_BYTES = 32 * KIB
"""Largest piece of input handed to the runner."""
RETRY_AFTER_S = 1.0

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_Each = TypeVar("_Each")

_IDEMPOTENCY = {0: IdempotencyLevel.UNKNOWN, 1: IdempotencyLevel.NO_SIDE_EFFECTS, 2: IdempotencyLevel.IDEMPOTENT}
_STREAM_TYPES = {
    "unary": StreamType.UNARY,
    "server_streaming": StreamType.SERVER_STREAM,
    "client_streaming": StreamType.CLIENT_STREAM,
    "bidi_streaming": StreamType.BIDI_STREAM,
}
_UPPER = re.compile(r"(?<!^)(?=[A-Z])")


def make_jobs_app(runner: JobRunner, *, caller: Callable[[], Caller], stopping: Stopping) -> ASGIApp:
    """Everything of the jobs listener. Serve it with the limits of `front.jobs_limits`.

    ``caller`` says who sent the request that the current task serves, or raises JobError. ``stopping`` is set before
    the listener drains: what waits ends with UNAVAILABLE and may be tried again.
    """
    return _JobsApp(runner, caller, Waits(stopping))


# stopping


class Waits:
    """What waits for a job ends when the box stops."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping
        self._scopes: set[trio.CancelScope] = set()

    def refuse_when_stopping(self) -> None:
        if self.stopping.is_set():
            raise JobError(
                Code.UNAVAILABLE, "the server is stopping, try again", reason="STOPPING", retry_after_s=RETRY_AFTER_S
            )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises JobError (UNAVAILABLE) out of its block when the box stops. Never hold it over a ``yield``."""
        self.refuse_when_stopping()
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            self.refuse_when_stopping()

    def until_stopping(self, source: AsyncIterator[_Each]) -> AsyncIterator[_Each]:
        return _UntilStopping(self, source)

    async def interrupt_when_stopping(self) -> None:
        await self.stopping.wait()
        for scope in self._scopes:
            scope.cancel()


class _UntilStopping(Generic[_Each]):
    """An iterator that is interruptible while it waits for the next."""

    def __init__(self, waits: Waits, source: AsyncIterator[_Each]) -> None:
        self._waits = waits
        self._source = source

    def __aiter__(self) -> AsyncIterator[_Each]:
        return self

    async def __anext__(self) -> _Each:
        with self._waits.interruptible():
            return await anext(self._source)
        raise AssertionError("unreachable")


# the service


class JobService:
    """The methods of osqbox.jobs.v1.JobService, each a call of the runner."""

    def __init__(self, runner: JobRunner, caller: Callable[[], Caller], waits: Waits) -> None:
        self._runner = runner
        self._caller = caller
        self._waits = waits

    def _who(self) -> Caller:
        self._waits.refuse_when_stopping()
        return self._caller()

    async def run_process(self, request: wire.RunProcessRequest) -> wire.RunProcessResponse:
        caller = self._who()
        status = await self._runner.run(translate.job_spec(request), caller)
        return wire.RunProcessResponse(process_id=status.id, status=translate.status_message(status))

    async def stop_process(self, request: wire.StopProcessRequest) -> wire.StopProcessResponse:
        status, already_ended = await self._runner.stop(
            request.process_id,
            self._who(),
            signal=request.signal or None,
            grace_s=translate.stop_grace_s(request),
            leader_only=request.leader_only,
            strict=request.strict,
        )
        return wire.StopProcessResponse(status=translate.status_message(status), already_ended=already_ended)

    async def get_process_status(self, request: wire.ProcessStatusRequest) -> wire.ProcessStatus:
        return translate.status_message(await self._runner.status(request.process_id, self._who()))

    async def get_process_output(self, request: wire.ProcessOutputRequest) -> AsyncIterator[wire.ProcessOutput]:
        caller, wanted = self._who(), translate.output_request(request)
        async with self._runner.output(request.process_id, caller, wanted) as events:
            async for event in self._waits.until_stopping(events):
                yield translate.output_message(event, timestamps=request.timestamps)

    async def list_processes(self, request: wire.ListProcessesRequest) -> wire.ListProcessesResponse:
        listing = partial(
            self._runner.list,
            self._who(),
            states=translate.states(request),
            owner=request.owner or None,
            labels=dict(request.labels),
            before=request.page_token or None,
        )
        page = await listing(limit=translate.page_size(request))
        if (count := translate.fitting(page.jobs)) < len(page.jobs):
            page = await listing(limit=count)
        return wire.ListProcessesResponse(
            processes=[translate.status_message(status) for status in page.jobs], next_page_token=page.next_page or ""
        )

    async def signal_process(self, request: wire.SignalProcessRequest) -> wire.ProcessStatus:
        job, caller = request.process_id, self._who()
        match request.action:
            case Oneof("signal", number):
                status = await self._runner.signal(job, caller, number)
            case Oneof("control", wire.Control.SUSPEND):
                status = await self._runner.suspend(job, caller)
            case Oneof("control", wire.Control.RESUME):
                status = await self._runner.resume(job, caller)
            case _:
                raise invalid("action", "expected a signal, CONTROL_SUSPEND or CONTROL_RESUME, got none of them")
        return translate.status_message(status)

    async def wait_process(self, request: wire.WaitProcessRequest) -> wire.ProcessStatus:
        timeout_s = translate.wait_timeout_s(request)
        with self._waits.interruptible():
            status = await self._runner.wait(request.process_id, self._who(), timeout_s)
        return translate.status_message(status)

    async def send_input(self, chunks: AsyncIterator[wire.InputChunk]) -> wire.SendInputResponse:
        caller, job, accepted_bytes = self._who(), "", 0
        try:
            async for chunk in self._waits.until_stopping(chunks):
                job = _same_job(job, chunk.process_id)
                for start in range(0, max(1, len(chunk.data)), INPUT_BYTES):
                    piece = chunk.data[start : start + INPUT_BYTES]
                    is_last = start + INPUT_BYTES >= len(chunk.data)
                    with self._waits.interruptible():
                        await self._runner.send_input(job, caller, piece, eof=chunk.eof and is_last)
                    accepted_bytes += len(piece)
            _same_job(job, "")
        except JobError as error:
            raise translate.wire_error(error, accepted_bytes=str(accepted_bytes)) from error
        return wire.SendInputResponse(accepted_bytes=accepted_bytes)

    async def delete_process(self, request: wire.DeleteProcessRequest) -> wire.DeleteProcessResponse:
        await self._runner.delete(request.process_id, self._who())
        return wire.DeleteProcessResponse()


def _same_job(job: str, named: str) -> str:
    if not job and not named:
        raise invalid("process_id", "expected in the first chunk, got none")
    if job and named and job != named:
        raise invalid("process_id", f"expected one job for the whole stream ({job!r}), got {named!r} too")
    return named or job


# methods to endpoints


def endpoints_of(module: ModuleType, service: object) -> Iterator[tuple[str, Endpoint[Any, Any]]]:
    """Path and endpoint of every method that the generated ``module`` declares; ``service`` has them in snake_case."""
    for described in module.desc().services:
        for method in described.methods:
            info = MethodInfo(
                name=method.name,
                service_name=described.type_name,
                input=getattr(module, method.input.name),
                output=getattr(module, method.output.name),
                idempotency_level=_IDEMPOTENCY[int(method.idempotency)],
                stream_type=_STREAM_TYPES[method.method_kind],
            )
            function = getattr(service, _UPPER.sub("_", method.name).lower())
            yield f"/{described.type_name}/{method.name}", _endpoint(info, function)


def _endpoint(info: MethodInfo[Any, Any], function: Callable[[Any], Any]) -> Endpoint[Any, Any]:
    async def answer(request: Any, _context: object) -> Any:
        with _refusals_told(info.name):
            return await function(request)

    async def stream(request: Any, _context: object) -> AsyncIterator[Any]:
        with _refusals_told(info.name):
            async with aclosing(function(request)) as messages:
                async for message in messages:
                    yield message

    match info.stream_type:
        case StreamType.UNARY:
            return Endpoint.unary(info, answer)
        case StreamType.CLIENT_STREAM:
            return Endpoint.client_stream(info, answer)
        case StreamType.SERVER_STREAM:
            return Endpoint.server_stream(info, stream)
        case _:
            return Endpoint.bidi_stream(info, stream)


@contextmanager
def _refusals_told(method: str) -> Iterator[None]:
    try:
        yield
    except ConnectError:
        raise
    except JobError as error:
        raise translate.wire_error(error) from error
    except Exception as error:
        raise translate.wire_error(plain.internal(method, error)) from error


class _Discreet(Codec[Any, Any]):
    """A codec whose failures to write are told as every other bug is."""

    def __init__(self, codec: Codec[Any, Any]) -> None:
        self._codec = codec

    def name(self) -> str:
        return self._codec.name()

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        return self._codec.decode(data, message_class)

    def encode(self, message: Any) -> bytes:
        with _refusals_told(f"writing {type(message).__name__}"):
            return self._codec.encode(message)


class _Connect(ConnectASGIApplication[None]):
    """Connectrpc's application with the endpoints of several services."""

    path = "/"

    def __init__(self, endpoints: Any) -> None:
        super().__init__(
            service=None,
            endpoints=lambda _service: endpoints,
            read_max_bytes=REQUEST_BYTES,
            codecs=(_Discreet(proto_binary_codec()), _Discreet(proto_json_codec())),
        )


# the application


class _JobsApp:
    def __init__(self, runner: JobRunner, caller: Callable[[], Caller], waits: Waits) -> None:
        self._waits = waits
        self._plain = plain.Plain(runner, caller, waits)
        modules = (jobs_pb, health_pb, reflection_pb, reflection_v1alpha_pb)
        descriptors = Descriptors(module.desc() for module in (*modules, error_details_pb))
        services = (
            JobService(runner, caller, waits),
            Health(descriptors.services, waits.stopping),
            *(_GuardedReflection(module, descriptors, caller, waits) for module in modules[2:]),
        )
        self._endpoints = {
            path: endpoint
            for module, service in zip(modules, services, strict=True)
            for path, endpoint in endpoints_of(module, service)
        }
        self._connect = _Connect(self._endpoints)
        self._held = Budget(HELD_BYTES)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._live(receive, send)
            case "http":
                with trio.CancelScope() as call:
                    scope["extensions"]["osqbox.on_disconnect"](call.cancel)
                    await self._answer(scope, receive, send)
            case _:
                await send({"type": "websocket.close", "code": 1000})

    async def _live(self, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            await receive()
            nursery.start_soon(self._waits.interrupt_when_stopping)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if plain.serves(path):
            await self._plain.answer(scope, send)
            return
        if _is_grpc(scope):
            send = _with_trailers(send)
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            await _unknown_method(scope, send)
            return
        call = _Call(receive, self._held, endpoint.method.stream_type)
        try:
            with suppress(ConnectError):  # raised again only where it could not be sent: the stream ends by a reset
                await self._connect(_uncompressed(scope), call.receive, send)
        finally:
            call.close()


class _GuardedReflection(Reflection):
    """For those who have an identity, until the box stops."""

    def __init__(
        self, module: ModuleType, descriptors: Descriptors, caller: Callable[[], Caller], waits: Waits
    ) -> None:
        super().__init__(module, descriptors)
        self._caller = caller
        self._waits = waits

    def server_reflection_info(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        self._caller()
        return super().server_reflection_info(self._waits.until_stopping(requests))


class _Call:
    """The receiving side of one call: its request message is bounded in time and paid for while the call lasts."""

    def __init__(self, receive: Receive, held: Budget, kind: StreamType) -> None:
        self._receive = receive
        self._held = held
        self._is_whole = kind in (StreamType.CLIENT_STREAM, StreamType.BIDI_STREAM)
        """Nothing (more) of the request is to be bounded: its flow control bounds a stream."""
        self._deadline = trio.current_time() + REQUEST_TIMEOUT_S
        self._bytes = 0

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        with trio.move_on_at(self._deadline) as scope:
            message = await self._receive()
        if scope.cancelled_caught:
            raise ConnectError(
                WireCode.DEADLINE_EXCEEDED, f"expected the whole request within {REQUEST_TIMEOUT_S} s, got a part of it"
            )
        self._is_whole = not message.get("more_body", False)
        self._take(len(message.get("body", b"")))
        return message

    def _take(self, size_bytes: int) -> None:
        if self._bytes + size_bytes > REQUEST_BYTES:
            raise ConnectError(
                WireCode.RESOURCE_EXHAUSTED, f"expected a request of at most {REQUEST_BYTES} bytes, got more"
            )
        if not self._held.take(size_bytes):
            busy = "too many large requests at once, try again"
            raise translate.wire_error(
                JobError(Code.RESOURCE_EXHAUSTED, busy, reason="REQUEST_MEMORY", retry_after_s=RETRY_AFTER_S)
            )
        self._bytes += size_bytes

    def close(self) -> None:
        self._held.give_back(self._bytes)


def _header(scope: Message, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _is_grpc(scope: Message) -> bool:
    kind = _header(scope, b"content-type").partition(b";")[0].strip()
    return kind == b"application/grpc" or kind.startswith(b"application/grpc+")


def _uncompressed(scope: Message) -> Message:
    """Asks for answers as they are: packing every chunk would hold up the loop, for readers on the same machine."""
    headers = [(name, value) for name, value in scope["headers"] if not name.endswith(b"accept-encoding")]
    return {**scope, "headers": headers}


def _with_trailers(send: Send) -> Send:
    """Gives an answer whose status stands in its head the trailers that gRPC clients read it from.

    Over Hypercorn the end of such a head is an empty DATA frame, which grpcio takes for a broken answer.
    """
    trailers: list[tuple[bytes, bytes]] = []

    async def send_with_trailers(message: Message) -> None:
        if message["type"] == "http.response.start":
            trailers.extend(field for field in message["headers"] if field[0].startswith(b"grpc-status"))
            trailers.extend(field for field in message["headers"] if field[0] == b"grpc-message")
            if trailers:
                rest = [field for field in message["headers"] if field not in trailers]
                message = {**message, "headers": rest, "trailers": True}
        await send(message)
        if trailers and message["type"] == "http.response.body" and not message.get("more_body", False):
            await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    return send_with_trailers


async def _unknown_method(scope: Message, send: Send) -> None:
    path = scope["path"]
    if _is_grpc(scope):
        status = [(b"grpc-status", b"%d" % Code.UNIMPLEMENTED.value), (b"grpc-message", b"no such method here")]
        head = [(b"content-type", b"application/grpc"), *status]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b""})
    else:
        await plain.send_json(send, {"code": "unimplemented", "message": f"nothing is served at {path!r}"}, 404)
