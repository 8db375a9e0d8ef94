"""grpc.health.v1: serving until the box stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Protocol

from .errors import Code, JobError
from .v1 import health_pb as wire

_Status = wire.HealthCheckResponse.ServingStatus


class Stopping(Protocol):
    """An event, set when the box begins to stop."""

    def is_set(self) -> bool: ...

    async def wait(self) -> object: ...


class Health:
    """``services`` are the names it answers for, beside the empty one, which is the whole server."""

    def __init__(self, services: Collection[str], stopping: Stopping) -> None:
        self._services = {"", *services}
        self._stopping = stopping

    async def check(self, request: wire.HealthCheckRequest) -> wire.HealthCheckResponse:
        if request.service not in self._services:
            raise JobError(Code.NOT_FOUND, f"no service {request.service!r}", reason="SERVICE_UNKNOWN")
        return self._answer(request.service)

    async def list(self, _request: wire.HealthListRequest) -> wire.HealthListResponse:
        return wire.HealthListResponse(statuses={name: self._answer(name) for name in sorted(self._services)})

    async def watch(self, request: wire.HealthCheckRequest) -> AsyncIterator[wire.HealthCheckResponse]:
        """The status now and after every change; the call stays open, as the protocol asks, also for unknown names."""
        yield self._answer(request.service)
        if not self._stopping.is_set():
            await self._stopping.wait()
            yield self._answer(request.service)

    def _answer(self, service: str) -> wire.HealthCheckResponse:
        if service not in self._services:
            return wire.HealthCheckResponse(status=_Status.SERVICE_UNKNOWN)
        return wire.HealthCheckResponse(status=_Status.NOT_SERVING if self._stopping.is_set() else _Status.SERVING)
