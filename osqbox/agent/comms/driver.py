"""A comms agent on Trio: a task per thread of its core that is busy, requests over TLS, the host's tables.

A thread that sleeps has no task, only its deadline: eight tasks for each of thousands of agents that wait would cost
more than their connections.
"""

from __future__ import annotations

import contextlib
import math
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import trio

from osqbox.agent.comms.core import Core, RefusedByServer
from osqbox.agent.comms.effects import Collect, Follow, Reply, Restart, Send, ServerEvent, Sleep, Thread
from osqbox.agent.comms.facts import Fact
from osqbox.agent.comms.g1 import G1Core
from osqbox.agent.comms.messages import About, Stateless
from osqbox.agent.comms.options import G1, Options
from osqbox.agent.comms.spike import SpikeCore
from osqbox.agent.comms.statistics import Statistics
from osqbox.agent.comms.wire import Target, Wire
from osqbox.agent.store import Store

OnEvent = Callable[[str, dict[str, Any]], None]
OnRequest = Callable[[str, float, Reply], None]
"""Call, how long it took in seconds, what came of it."""
RESTART_PAUSE_S = 1.0


class Host(Protocol):
    """The machine an agent speaks for."""

    @property
    def about(self) -> About: ...

    async def inventory(self, limit: int | None) -> Sequence[Fact]: ...

    async def logs(self, since: float, until: float, limit: int) -> Sequence[Stateless]: ...


class _Sleeper(NamedTuple):
    thread: Thread[None]
    wake: str
    due: float
    """By Trio's clock."""


class CommsAgent:
    """One agent; `run` is its whole life, restarts included."""

    __slots__ = (
        "_looked_at",
        "_now",
        "_nursery",
        "_on_event",
        "_on_request",
        "_rest",
        "_sleeping",
        "_throw",
        "_wire",
        "core",
        "host",
        "options",
        "statistics",
        "store",
    )

    def __init__(
        self,
        target: Target,
        context: ssl.SSLContext,
        host: Host,
        options: Options,
        store: Store,
        *,
        now: Callable[[], float],
        throw: Callable[[], float],
        statistics: Statistics | None = None,
        on_event: OnEvent | None = None,
        on_request: OnRequest | None = None,
    ) -> None:
        self.host, self.options, self.store = host, options, store
        self.statistics = Statistics() if statistics is None else statistics
        self._now, self._throw = now, throw
        self._on_event, self._on_request = on_event, on_request
        is_g1 = options.profile == G1
        self._wire = Wire(target, context, keep_alive=options.keep_alive and not is_g1, as_g1=is_g1)
        self._sleeping: dict[str, _Sleeper] = {}
        self._nursery: trio.Nursery
        self._rest = trio.CancelScope()
        """Of who wakes sleepers; ends with the first deadline."""
        self._looked_at = now()
        self.core = self._new_core()

    def _new_core(self) -> Core:
        kind = G1Core if self.options.profile == G1 else SpikeCore
        return kind(
            self.host.about,
            self.options,
            self.store,
            now=self._now,
            throw=self._throw,
            statistics=self.statistics,
        )

    @property
    def connections(self) -> int:
        return self._wire.connections

    async def run(self) -> None:
        """Until cancelled. Raises RefusedByServer when the server does not know the agent."""
        try:
            while True:
                with _one_refusal():
                    async with trio.open_nursery() as self._nursery:
                        for name, thread in self.core.threads().items():
                            self._nursery.start_soon(self._live, name, thread())
                        await self._wake_in_time()
                self._close_sleepers()
                self.statistics.restarts += 1
                await trio.lowlevel.checkpoint()
                self.core = self._new_core()
        finally:
            self._close_sleepers()
            with trio.CancelScope(shield=True):
                await self._wire.aclose()
            self.store.commit()

    async def enroll(self, uuid: str, key: str, secret: str, *, adopt: bool = False) -> None:
        """Register with the server. Raises RefusedByServer."""
        thread = self.core.enroll(uuid, key, secret, adopt=adopt)
        try:
            effect = await self._advance(thread, None)
            while isinstance(effect, Sleep):
                await trio.sleep(effect.seconds or 0)
                effect = await self._advance(thread, None)
        finally:
            with trio.CancelScope(shield=True):
                await self._wire.aclose()

    # -- driving threads -----------------------------------------------------------------------------------------

    async def _live(self, name: str, thread: Thread[None], outcome: bool | None = None) -> None:
        """Drive one thread until it sleeps; its restart ends all of them."""
        while True:
            try:
                effect = await self._advance(thread, outcome)
                break
            except RefusedByServer:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a server sent, the agent goes on
                self.statistics.error(name, f"{type(error).__name__}: {error}")
            thread, outcome = self.core.threads()[name](), None
            await trio.sleep(RESTART_PAUSE_S)
        if isinstance(effect, Restart):
            self._nursery.cancel_scope.cancel()
        elif effect is not None:
            due = math.inf if effect.seconds is None else trio.current_time() + max(0.0, effect.seconds)
            self._sleeping[name] = _Sleeper(thread, effect.wake, due)
            self._rest.deadline = min(self._rest.deadline, due)

    async def _advance(self, thread: Thread[None], outcome: bool | None) -> Sleep | Restart | None:
        """Do what a thread asks for until it sleeps, wants a restart, or has ended."""
        result: Any = outcome
        try:
            while True:
                try:
                    effect = thread.send(result)
                except StopIteration:
                    return None
                finally:
                    self._settle()
                if isinstance(effect, Sleep | Restart):
                    return effect
                result = None  # not kept while the thread waits
                result = await self._perform(effect)
        except BaseException:
            thread.close()
            raise

    async def _wake_in_time(self) -> None:
        """For ever: go on with every thread that has slept long enough."""
        while True:
            due = min((sleeper.due for sleeper in self._sleeping.values()), default=math.inf)
            with trio.CancelScope(deadline=due) as self._rest:
                await trio.sleep_forever()
            now = trio.current_time()
            for name in [name for name, sleeper in self._sleeping.items() if sleeper.due <= now]:
                self._wake(name, raised=False)

    def _wake(self, name: str, *, raised: bool) -> None:
        self._nursery.start_soon(self._live, name, self._sleeping.pop(name).thread, raised)

    def _close_sleepers(self) -> None:
        while self._sleeping:
            _, sleeper = self._sleeping.popitem()
            sleeper.thread.close()

    async def _perform(self, effect: Send | Follow | Collect) -> Any:
        match effect:
            case Send():
                return await self._send(effect)
            case Follow():
                return await self._follow(effect)
            case Collect():
                return await self._collect(effect)

    async def _send(self, send: Send) -> Reply:
        began = trio.current_time()
        reply = await self._wire.exchange(send)
        if self._on_request:
            self._on_request(send.call, trio.current_time() - began, reply)
        return reply

    async def _follow(self, follow: Follow) -> Reply:
        def heard(event: ServerEvent) -> bool:
            goes_on = follow.heard(event)
            self._settle()
            return goes_on

        def opened() -> None:
            follow.opened()
            self._settle()

        return await self._wire.follow(replace(follow, heard=heard, opened=opened))

    async def _collect(self, collect: Collect) -> Sequence[Any]:
        load = self.options.load
        if collect.what == "inventory":
            return await self.host.inventory(load.inventory_items)
        since, self._looked_at = self._looked_at, self._now()
        return await self.host.logs(since, self._looked_at, load.logs_items)

    def _settle(self) -> None:
        """After every step: sleepers are woken, what happened is told."""
        core = self.core
        if core.wakes:
            wakes, core.wakes = core.wakes, []
            for name in [name for name, sleeper in self._sleeping.items() if sleeper.wake in wakes]:
                self._wake(name, raised=True)
        if core.events:
            events, core.events = core.events, []
            if self._on_event:
                for kind, facts in events:
                    self._on_event(kind, facts)


@contextlib.contextmanager
def _one_refusal() -> Iterator[None]:
    """What a nursery wraps into a group comes out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException | None = group.subgroup(RefusedByServer)
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if found is None:
            raise
        raise found from None
