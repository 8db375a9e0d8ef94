"""All sinks of a box: opened with it, woken by its feed, finished before its store closes."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import assert_never

import trio

from osqbox.clock import Clock
from osqbox.errors import BadSetup, Unsafe
from osqbox.feed import Follower, Gap
from osqbox.store import Store

from .delivery import Delivery
from .http import Connection, client_context
from .messages import (
    EVERY_SOURCE,
    LOOPBACK,
    ReadOutput,
    SinkKind,
    SinkSpec,
    SinkStatistics,
    SourceName,
    check_sinks,
)
from .sinks import BulkSink, CollectorSink, FileSink, OpenSink, Sink, StdoutSink

FINISH_S = 2.0
"""How long the end of a box waits for sinks that are up."""


class Forwarding:
    """What runs; made by `open_forwarding`."""

    def __init__(self, deliveries: list[Delivery], announced: trio.Event) -> None:
        self._deliveries = deliveries
        self._announced = announced

    def statistics(self) -> list[SinkStatistics]:
        return [each.statistics() for each in self._deliveries]

    def begin_stdout(self) -> None:
        """The box has said on stdout that it is ready: from here on stdout belongs to the records."""
        self._announced.set()

    async def follow(self, follower: Follower) -> None:
        while True:
            heard = await follower.next()
            for source in EVERY_SOURCE if isinstance(heard, Gap) else _concerned(heard.kind):
                for delivery in self._deliveries:
                    delivery.notice(source)

    def finish(self) -> None:
        """Forward what is there to the sinks that are up, FINISH_S at most; the rest goes at the next start."""
        self._announced.set()
        for delivery in self._deliveries:
            delivery.finish()


def _concerned(kind: str) -> tuple[SourceName, ...]:
    if kind == "log_received":
        return (SourceName.LOGS,)
    if kind == "comms_events_stored":
        return (SourceName.EVENTS,)
    return (SourceName.JOBS,) if kind.startswith("job_") else ()


@asynccontextmanager
async def open_forwarding(
    store: Store, sinks: Sequence[SinkSpec], clock: Clock, *, read_output: ReadOutput | None = None
) -> AsyncIterator[Forwarding]:
    """Forward inside the block; at its end the sinks that are up get what is stored by then.

    The store must be open around it, with `tables.migrations`. Without ``read_output`` there is no output of jobs.
    Raises BadUsage, BadSetup or Unsafe for sinks that cannot be right; a sink that does not answer is tried again.
    """
    check_sinks(sinks)
    announced = trio.Event()
    deliveries = []
    for spec in sinks:
        opened = await trio.to_thread.run_sync(_opener, spec, clock, announced)
        deliveries.append(Delivery(store, spec, opened, clock, read_output))
    forwarding = Forwarding(deliveries, announced)
    follower = store.feed.subscribe()
    try:
        async with trio.open_nursery() as listening:
            listening.start_soon(forwarding.follow, follower)
            async with trio.open_nursery() as running:
                for delivery in deliveries:
                    await delivery.open()
                    running.start_soon(delivery.run)
                try:
                    yield forwarding
                finally:
                    forwarding.finish()
                    running.cancel_scope.deadline = trio.current_time() + FINISH_S
            listening.cancel_scope.cancel()
    finally:
        store.feed.unsubscribe(follower)


def _opener(spec: SinkSpec, clock: Clock, announced: trio.Event) -> OpenSink:
    """How the sink is made, once it is known that it can be. Raises BadSetup, Unsafe."""
    match spec.kind:
        case SinkKind.FILE:
            if not Path(spec.target).parent.is_dir():
                raise BadSetup(
                    f"--forward: expected a directory for {spec.target}, got none at {Path(spec.target).parent}"
                )
            if Path(spec.target).is_dir():
                raise BadSetup(f"--forward: expected the path of a file, got the directory {spec.target}")
            return partial(FileSink, spec)
        case SinkKind.STDOUT:
            return partial(StdoutSink, announced)
        case SinkKind.HTTP:
            return partial(_collector, spec, _context(spec), clock)
        case SinkKind.OPENSEARCH:
            return partial(_bulk, spec, _context(spec), clock)
        case _:
            assert_never(spec.kind)


def _collector(spec: SinkSpec, context: ssl.SSLContext | None, clock: Clock) -> Sink:
    return CollectorSink(Connection(spec.target, context, spec.auth_file), clock)


def _bulk(spec: SinkSpec, context: ssl.SSLContext | None, clock: Clock) -> Sink:
    return BulkSink(Connection(spec.target, context, spec.auth_file), spec.index_prefix, clock)


def _context(spec: SinkSpec) -> ssl.SSLContext | None:
    if spec.target.startswith("https:"):
        return client_context(spec.ca_file)
    if spec.auth_file is not None and Connection(spec.target, None, None).host not in LOOPBACK:
        raise Unsafe(
            f"--forward-auth-file: its secret would go to {spec.name} in the clear",
            hint=f"--forward {spec.name.replace('http:', 'https:')}",
        )
    return None
