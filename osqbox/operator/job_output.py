"""A job's output as a response: bytes, or server-sent events."""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self

import trio
from quart import request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from osqbox.clock import rfc3339
from osqbox.jobs.messages import Chunk, End, OutputEvent, Status, Truncated

from .answers import EVENTS, encoded
from .ear import KEEP_ALIVE_S
from .parts import Parts

OCTETS = "application/octet-stream"
KEEP_ALIVE = b":\n\n"

Opened = AbstractAsyncContextManager[AsyncIterator[OutputEvent]]


class Body(ResponseBody, AsyncIterator[bytes]):
    """Follows the output for as long as the response is sent, and no longer than the box serves.

    The events come from a task of their own, so that what reads the log is never cancelled half-way by a timeout.
    """

    content_type: str
    silence_s: float = float("inf")
    """After which something is sent to keep the connection alive."""
    head = b""
    """Sent at once: Hypercorn sends the response's head with the first bytes of its body."""

    def __init__(self, parts: Parts, output: Callable[[], Opened], facts: Callable[[Status], dict[str, Any]]) -> None:
        self._parts = parts
        self._output = output
        self._facts = facts
        self._stack = AsyncExitStack()
        self._head = self.head

    async def __aenter__(self) -> Self:
        events = await self._stack.enter_async_context(self._output())
        nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._scope = nursery.cancel_scope
        sender, self._receiver = trio.open_memory_channel[OutputEvent](0)
        nursery.start_soon(self._pump, events, sender)
        nursery.start_soon(self._end_at_stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._scope.cancel()
        await self._stack.__aexit__(kind, error, at)

    async def _pump(self, events: AsyncIterator[OutputEvent], sender: trio.MemorySendChannel[OutputEvent]) -> None:
        with sender:
            async for event in events:
                await sender.send(event)

    async def _end_at_stop(self) -> None:
        await self._parts.stopping.wait()
        self._receiver.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        with trio.move_on_after(self.silence_s):
            try:
                return self.text(await self._receiver.receive())
            except (trio.EndOfChannel, trio.ClosedResourceError):
                raise StopAsyncIteration from None
        return KEEP_ALIVE

    @abstractmethod
    def text(self, event: OutputEvent) -> bytes: ...


class Download(Body):
    content_type = OCTETS

    def text(self, event: OutputEvent) -> bytes:
        return event.data if isinstance(event, Chunk) else b""


class Events(Body):
    content_type = EVENTS
    silence_s = KEEP_ALIVE_S
    head = KEEP_ALIVE

    def text(self, event: OutputEvent) -> bytes:
        match event:
            case Chunk(stream, offset, data, at):
                facts = {"stream": stream, "offset": offset, "at": rfc3339(at), **_content(data)}
                return _event("chunk", offset + len(data), facts)
            case Truncated(start, end):
                return _event("truncated", end, {"start": start, "end": end})
            case End(status):
                return _event("end", status.output_bytes, {"job": self._facts(status)})


def sent(body: Body, status: Status) -> TrioResponse:
    """The response; HEAD gets its head only."""
    response = TrioResponse(b"" if request.method == "HEAD" else body, content_type=body.content_type)
    response.timeout = None
    response.headers["X-Job-Id"] = status.id
    if isinstance(body, Download):
        response.headers["X-Output-Truncated"] = "true" if status.output_truncated else "false"
        response.headers["Content-Disposition"] = f'attachment; filename="job-{status.id}.log"'
    return response


def _content(data: bytes) -> dict[str, str]:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _event(name: str, resume_at: int, facts: dict[str, Any]) -> bytes:
    return b"event: %s\nid: %d\ndata: %s\n\n" % (name.encode(), resume_at, encoded(facts))
