"""What the operator API may touch, handed over by the composition root."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from osqbox.clock import Clock
from osqbox.comms.front import Comms
from osqbox.comms.routes import Timing
from osqbox.errors import Refused
from osqbox.feed import Feed
from osqbox.identity import Identity
from osqbox.jobs.messages import Caller, JobSpec, JobStatistics, OutputEvent, OutputRequest, Page, State, Status
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.shell_frames import Frame
from osqbox.shells.messages import BrokerStatistics, Grant, Redeemed, Session, Ticket
from osqbox.store import Store

__all__ = ["OPERATOR", "Comms", "Jobs", "Parts", "Shells", "Stopping", "Timing", "Viewer"]

OPERATOR = "operator"
"""Who the bearer of the box's token is, in the audit."""


class Stopping(Protocol):
    """As much of `trio.Event` as a stream needs."""

    def is_set(self) -> bool: ...

    async def wait(self) -> None: ...


class Viewer(Protocol):
    """A terminal that is connected, as the broker sees it."""

    @property
    def close_code(self) -> int | None: ...

    async def send(self, frame: Frame) -> None: ...

    async def receive(self) -> Frame | None: ...

    async def aclose(self, code: int, reason: str = "") -> None: ...


class Shells(Protocol):
    """As much of the shell broker as operators use. Everything raises Refused."""

    async def open(
        self, node: str, tenant: str, hostname: str, by: str, *, reason: str, cols: int, rows: int,
        shell: str | None, user: str | None, record: bool, record_input: bool,
    ) -> Session: ...  # fmt: skip

    def session(self, session: str) -> Session: ...

    async def sessions(
        self, *, tenant: str | None, node: str | None, states: tuple[str, ...], limit: int
    ) -> Sequence[Session]: ...

    async def kill(self, session: str, by: str) -> None: ...

    async def ticket(self, session: str, by: str, grant: Grant) -> Ticket: ...

    async def redeem(self, session: str, ticket: str) -> Redeemed: ...

    async def view(self, session: str, by: str, grant: Grant, link: Viewer) -> None: ...

    def recording_directory(self, session: str) -> Path: ...

    def statistics(self) -> BrokerStatistics: ...


class Jobs(Protocol):
    """As much of the job runner as operators use. Everything raises JobError."""

    async def run(self, spec: JobSpec, caller: Caller) -> Status: ...

    async def status(self, job: str, caller: Caller) -> Status: ...

    async def list(
        self, caller: Caller, *, states: tuple[State, ...], owner: str | None, labels: dict[str, str],
        limit: int, before: str | None,
    ) -> Page: ...  # fmt: skip

    async def stop(
        self, job: str, caller: Caller, *, signal: int | None, grace_s: float | None, leader_only: bool, strict: bool
    ) -> tuple[Status, bool]: ...

    async def signal(self, job: str, caller: Caller, number: int) -> Status: ...

    async def suspend(self, job: str, caller: Caller) -> Status: ...

    async def resume(self, job: str, caller: Caller) -> Status: ...

    async def wait(self, job: str, caller: Caller, timeout_s: float | None) -> Status: ...

    async def send_input(self, job: str, caller: Caller, data: bytes, *, eof: bool) -> None: ...

    async def delete(self, job: str, caller: Caller) -> None: ...

    def output(
        self, job: str, caller: Caller, request: OutputRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputEvent]]: ...

    def statistics(self) -> JobStatistics: ...


@dataclass(frozen=True, slots=True)
class Parts:
    store: Store
    feed: Feed
    clock: Clock
    presence: Presence
    osquery: OsqueryApi
    token: str = field(repr=False)
    info: Callable[[], dict[str, Any]]
    """The ready facts and ``statistics``, by part; those of listeners have ``open_connections``."""
    ready: Callable[[], bool]
    stop: Callable[[], None]
    """Asks the box to stop."""
    stopping: Stopping
    """Set when the box drains: streams end at once."""
    allowed_hosts: Callable[[], frozenset[str]]
    """Values of the Host header that mean this listener, in lower case, such as ``localhost:8080``."""
    new_id: Callable[[], str]
    new_key: Callable[[], str]
    shells: Shells | None = None
    """None when the box serves no shells."""
    record_shells: bool = True
    """Whether a session is recorded when its request does not say."""
    jobs: Jobs | None = None
    """None when the box runs no jobs."""
    comms: Comms | None = None
    """None when the box serves no comms API."""
    identity: Identity | None = None
    """Whose certificates the metrics count the days of."""

    def served_comms(self) -> Comms:
        """Raises Refused where there is none."""
        if self.comms is None:
            raise Refused("no_comms", "this box serves no comms API: it was started with --no-comms", status=404)
        return self.comms
