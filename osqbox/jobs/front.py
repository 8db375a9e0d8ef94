"""The application of the jobs listener before anybody has called it.

gRPC and its libraries take a third of a box's whole start-up time, and most boxes never run a job.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import trio

from osqbox.listen import Limits

from .messages import Caller

if TYPE_CHECKING:
    from osqbox.listen import ASGIApp

    from .health import Stopping
    from .runner import JobRunner

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def jobs_limits() -> Limits:
    """Many calls on one connection, bodies that are streams, readers that may pause but not vanish."""
    return Limits(app_body_bytes=None, h2_streams=2000, h2_stall_timeout_s=600, vanished_after_s=10)


class JobsFront:
    """An ASGI application that makes the real one (`rpc.make_jobs_app`) for the first request."""

    def __init__(self, runner: JobRunner, *, caller: Callable[[], Caller], stopping: Stopping) -> None:
        self._runner = runner
        self._caller = caller
        self._stopping = stopping
        self._app: ASGIApp | None = None
        self._making = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        async with self._making:
            if self._app is None:
                self._app = await self._make()
        await self._app(scope, receive, send)

    async def _make(self) -> ASGIApp:
        app = await trio.to_thread.run_sync(self._import)
        assert self._nursery is not None
        await self._nursery.start(self._start, app)
        return app

    def _import(self) -> ASGIApp:
        from .rpc import make_jobs_app

        return make_jobs_app(self._runner, caller=self._caller, stopping=self._stopping)

    async def _start(self, app: ASGIApp, *, task_status: trio.TaskStatus[None]) -> None:
        """Run the real application's lifespan until this one's ends."""
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "lifespan.startup"}
            return await trio.sleep_forever()

        async def send(_message: Message) -> None:
            await trio.lowlevel.checkpoint()
            task_status.started()

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as self._nursery:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self._nursery.cancel_scope.cancel()
        await send({"type": "lifespan.shutdown.complete"})
