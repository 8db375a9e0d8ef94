"""Performs what an extension's threads ask for: HTTPS by one client that may be shared, and waiting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from osqbox.agent.client import Command, Core, Failure, HostDetails, Send, Sleep, Thread
from osqbox.agent.wire import CallFailed, Channel
from osqbox.clock import Clock

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

Details = Callable[[], Awaitable[Mapping[str, Mapping[str, str]]]]
OnEvent = Callable[[str, dict[str, Any]], None]


class HttpClient:
    """Keep-alive connections to one server, one per enrollment and kind of call, as osqueryd's threads hold them."""

    def __init__(self, hostname: str, context: ssl.SSLContext) -> None:
        self._hostname = hostname
        self._context = context
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self.requests = 0
        self.failures = 0

    async def post(self, enrollment: str, command: Send) -> bytes | Failure:
        lane = self._lanes.setdefault(
            (enrollment, command.call), _Lane(Channel(self._hostname, self._context), trio.Lock())
        )
        self.requests += 1
        async with lane.lock:
            try:
                return await lane.channel.post(
                    command.path, command.body, node_key=command.node_key, compress=command.compress
                )
            except CallFailed as error:
                self.failures += 1
                return Failure(str(error))

    async def forget(self, enrollment: str) -> None:
        """Close that enrollment's connections."""
        for key in [key for key in self._lanes if key[0] == enrollment]:
            await self._lanes.pop(key).channel.aclose()

    async def aclose(self) -> None:
        for enrollment in {key[0] for key in self._lanes}:
            await self.forget(enrollment)


@dataclass(frozen=True, slots=True)
class _Lane:
    channel: Channel
    lock: trio.Lock


@dataclass(slots=True)
class Driver:
    """Runs threads of one core. Several may run at once."""

    core: Core
    client: HttpClient
    enrollment: str
    clock: Clock
    details: Details
    """Asks the osquery process what the host is; may raise."""
    on_event: OnEvent
    _wakes: dict[str, trio.Event] = field(default_factory=dict)

    async def run(self, thread: Thread[T]) -> T:
        outcome: Any = None
        try:
            while True:
                self.core.now = self.clock.now()
                command = thread.send(outcome)
                self.settle()
                outcome = await self._perform(command)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            thread.close()
            self.settle()

    def do(self, step: Callable[[], object]) -> None:
        """Something the core's parts do at once; what it changed is durable when this returns."""
        self.core.now = self.clock.now()
        step()
        self.settle()

    def settle(self) -> None:
        """Make what changed durable, wake sleepers, tell watchers."""
        self.core.store.commit()
        wakes, self.core.wakes = self.core.wakes, []
        for name in wakes:
            self._wakes.pop(name, trio.Event()).set()
        events, self.core.events = self.core.events, []
        for name, facts in events:
            self.on_event(name, facts)

    async def _perform(self, command: Command) -> Any:
        match command:
            case Send():
                return await self.client.post(self.enrollment, command)
            case Sleep():
                return await self._sleep(command)
            case HostDetails():
                return await self.details()
        raise AssertionError(f"an extension does not {command!r}")

    async def _sleep(self, command: Sleep) -> bool:
        event = self._wakes.setdefault(command.wake, trio.Event()) if command.wake else trio.Event()
        with trio.move_on_after(command.seconds):
            await event.wait()
            return True
        return False


async def within(seconds: float, call: Callable[[], Awaitable[T]], otherwise: Callable[[], T]) -> T:
    """The call's value, or that of ``otherwise`` when it takes longer."""
    with trio.move_on_after(seconds):
        return await call()
    return otherwise()


__all__ = ["Driver", "HttpClient", "within"]
