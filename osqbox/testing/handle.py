"""What one test holds: a tenant of its own in the shared box."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import trio

from osqbox import feed, tenants
from osqbox.agent.runner import AgentOptions, run_agent
from osqbox.box import new_id, new_key
from osqbox.comms.front import Comms
from osqbox.comms.messages import Action
from osqbox.comms.publication import Order, Publication
from osqbox.comms.registration import new_agent
from osqbox.errors import BadUsage, NotInTime
from osqbox.feed import Event
from osqbox.flagfile import flagfile
from osqbox.osquery import campaigns, configs, logs, nodes
from osqbox.osquery.amalgamate import Source, Target
from osqbox.osquery.logs import LogFilter
from osqbox.osquery.nodes import Selector
from osqbox.running import write_private
from osqbox.store import Tx
from osqbox.testing.server import OsqboxServer

DEFAULT_TIMEOUT_S = 5.0
ENROLL_TIMEOUT_S = 10.0
SHORT_NAMES = {
    "enroll": "node_enrolled",
    "config": "config_served",
    "log": "log_received",
    "answer": "target_ended",
    "carve": "carve_completed",
}
"""Words of the osquery API for the events they cause."""


class QueryResult(list[dict[str, Any]]):
    """All rows of all hosts, in the order in which the hosts answered; also each host's account and the summary."""

    def __init__(self, accounts: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
        super().__init__(row for account in accounts for row in account["rows"])
        self.accounts = list(accounts)
        """One per target: ``{node, hostname, status, rows, message, ...}``."""
        self.summary = summary

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self)

    @property
    def messages(self) -> dict[str, str]:
        """Error texts by hostname, of the hosts that failed."""
        return {one["hostname"]: one["message"] for one in self.accounts if one["status"] != "answered"}


class AgentHandle:
    """An agent that runs inside the box's thread, enrolled over real TLS."""

    def __init__(self, box: Osqbox, hostname: str, scope: trio.CancelScope, done: trio.Event) -> None:
        self._box = box
        self._scope = scope
        self._done = done
        self.hostname = hostname
        self.node: str = ""
        """The node's id."""

    def stop(self) -> None:
        """Stop it and wait until its connections are closed."""
        self._box.server.call(self._scope.cancel)
        self._box.server.call_async(self._done.wait)


class CommsAgent(NamedTuple):
    """What an agent of the comms API logs in with."""

    uuid: str
    key: str


class Osqbox:
    """A tenant that no other test sees: its own enroll secret, nodes, configs, logs and events."""

    def __init__(self, server: OsqboxServer, name: str, directory: Path) -> None:
        self.server = server
        self.tenant = name
        self.enroll_secret = new_key()
        self.flagfile = directory / f"{name}.flags"
        """For a real osqueryd: ``osqueryd --flagfile``."""
        self.enroll_secret_file = directory / f"{name}.secret"
        self._agents: list[AgentHandle] = []
        self._internal_errors = self._count_internal_errors()
        self._first_seq = 0
        self._open()

    def _open(self) -> None:
        def create(tx: Any) -> int:
            tenants.create(tx, self.tenant, tenants.TenantOptions())
            tenants.add_secret(tx, self.tenant, self.enroll_secret, label="test")
            return feed.bounds(tx.db)[1]

        self._first_seq = self._write(create)
        write_private(self.enroll_secret_file, self.enroll_secret + "\n")
        mine = {"enroll_secret": self.enroll_secret, "enroll_secret_file": str(self.enroll_secret_file)}
        write_private(self.flagfile, flagfile({**self.server.ready, **mine}))

    def close(self) -> list[str]:
        """Stop the agents and close the tenant; returns what went wrong unnoticed, one sentence each."""
        for agent in self._agents:
            agent.stop()
        self._write(self._close_tenant)
        errors = self._count_internal_errors() - self._internal_errors
        where = "osqbox.osquery.routes and osqbox.comms.routes"
        return [f"{errors} internal errors while answering agents; see the logs of {where}"] if errors else []

    def _count_internal_errors(self) -> int:
        box = self.server.box
        comms = (box.comms.api, box.comms.publishers) if box.comms else ()
        return sum(each.refused["internal"] for each in (box.osquery, *comms))

    def _close_tenant(self, tx: Tx) -> None:
        tenants.close(tx, self.tenant)
        if (comms := self.server.box.comms) is not None:
            tx.after_commit.append(partial(comms.tenant_closed, self.tenant))

    def _write(self, work: Callable[[Any], Any]) -> Any:
        return self.server.call_async(lambda: self.server.box.store.write(work))

    def _read(self, work: Callable[[Any], Any]) -> Any:
        return self.server.call_async(lambda: self.server.box.store.read(work))

    @property
    def url(self) -> str:
        """Where agents connect to: ``https://localhost:PORT``."""
        return self.server.url

    @property
    def ca_file(self) -> Path:
        return self.server.ca_file

    @property
    def env(self) -> dict[str, str]:
        """Environment for a program under test: OSQBOX_AGENTS, OSQBOX_CA_FILE, OSQBOX_ENROLL_SECRET, ..."""
        from osqbox.cli.env import environment

        mine = {"enroll_secret": self.enroll_secret, "enroll_secret_file": str(self.enroll_secret_file)}
        found: dict[str, str] = environment({**self.server.ready, **mine, "flagfile": str(self.flagfile)})
        return found

    def agent(self, hostname: str | None = None, *, timeout: float = ENROLL_TIMEOUT_S, **options: Any) -> AgentHandle:
        """Start an agent of this machine and return when it has enrolled. ``options`` are AgentOptions.

        Raises NotInTime when it does not enroll.
        """
        name = hostname or f"{self.tenant}-agent-{len(self._agents) + 1}"
        wanted = AgentOptions(
            **{
                "tls_hostname": self.url.removeprefix("https://"),
                "server_certs": self.ca_file,
                "enroll_secret": self.enroll_secret,
                "host_identifier": "specified",
                "specified_identifier": name,
                "distributed_interval": 1,
                "config_refresh": 1,
                "logger_period": 1,
                **options,
            }
        )
        handle = self.server.call(lambda: AgentHandle(self, name, trio.CancelScope(), trio.Event()))

        async def run() -> None:
            try:
                with handle._scope:
                    await run_agent(wanted)
            finally:
                handle._done.set()

        self.server.spawn(run)
        self._agents.append(handle)
        event = self.wait_for("enroll", timeout=timeout, host_identifier=name)
        assert event.node is not None
        handle.node = event.node
        return handle

    def comms_agent(self, name: str | None = None) -> CommsAgent:
        """A new agent of this tenant that may log in to the comms API at ``env["OSQBOX_COMMS"]``."""
        comms = self._comms()
        uuid = str(uuid4())
        agent = new_agent(uuid=uuid, name=name or uuid, now=comms.clock.now(), tenant=self.tenant)
        _, key = self.server.call_async(lambda: comms.add_agent(agent, None, actor="test"))
        return CommsAgent(uuid, key)

    def send(self, agent: str, action: str, **args: Any) -> str:
        """Publish a command for an agent of the comms API, by its uuid; the command's id.

        Raises CommsError for one that is not known. ``wait_for("command_ended", id=...)`` waits for its result.
        """
        comms = self._comms()
        order = Order(action=Action(name=action, args=args), agents=(agent,))
        publication = Publication(orders=(order,))
        publish = partial(comms.publisher.publish, publication, tenant=self.tenant, actor="test")
        return self.server.call_async(publish)[0].id

    def _comms(self) -> Comms:
        if self.server.box.comms is None:
            raise BadUsage("the box of this session serves no comms API: osqbox_config says comms=None")
        return self.server.box.comms

    def config(self, content: Mapping[str, Any], *, name: str | None = None, target: Target | None = None) -> None:
        """Serve this osquery config to this tenant's nodes, merged with what is there already."""
        where = target or Target(tenants=(self.tenant,))
        source = Source(name=name or self.tenant, content=dict(content), target=where, origin="api")
        self._write(lambda tx: configs.put(tx, source, "from a test"))

    def query(
        self, sql: str, *, hosts: Sequence[str] = (), timeout: float = DEFAULT_TIMEOUT_S, **order: Any
    ) -> QueryResult:
        """Ask this tenant's nodes, and wait until every one has an account (answered, failed or expired)."""
        selector = Selector(nodes=tuple(hosts), tenant=self.tenant)
        wanted = campaigns.Order(sql, selector, timeout, everyone=True, **order)
        return self.server.call_async(lambda: _ask(self.server, wanted))

    @property
    def events(self) -> list[Event]:
        """Everything that has happened in this tenant so far, oldest first."""
        found: list[Event] = self._read(
            lambda db: feed.events_after(db, self._first_seq, tenant=self.tenant, limit=100_000)
        )
        return found

    def wait_for(
        self, kind: str | Callable[[Event], bool], *, timeout: float = DEFAULT_TIMEOUT_S, after: int = 0, **where: Any
    ) -> Event:
        """The first event that fits, past or coming. Raises NotInTime naming what was seen instead.

        ``kind`` is an event's kind, one of the words enroll, config, log, answer, carve, or a predicate. ``where``
        are values of the event's ``node`` or of members of its ``data``;
        ``after`` is the seq of an event to be later than.
        """
        fits = kind if callable(kind) else _fitting(SHORT_NAMES.get(kind, kind), where)
        first = max(after, self._first_seq)
        return self.server.call_async(lambda: _wait(self.server, self.tenant, first, fits, timeout, str(kind), where))

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """This tenant's nodes, as `osqbox nodes --json` shows them."""
        found: list[dict[str, Any]] = self._read(lambda db: nodes.facts_json(db, Selector(tenant=self.tenant)))
        return found

    def logs(
        self, *, log_type: str | None = None, name: str | None = None, limit: int = 10_000
    ) -> list[dict[str, Any]]:
        """This tenant's log lines, oldest first: ``{seq, tenant, node, log_type, received_at, line}``."""
        which = LogFilter(log_type=log_type, name=name, tenant=self.tenant)
        return [msgspec.json.decode(one) for one in self._read(lambda db: logs.latest(db, which, limit=limit))]


def _fitting(kind: str, where: Mapping[str, Any]) -> Callable[[Event], bool]:
    def fits(event: Event) -> bool:
        facts = {**event.data, "node": event.node}
        return event.kind == kind and all(facts.get(name) == value for name, value in where.items())

    return fits


async def _wait(
    server: OsqboxServer,
    tenant: str,
    after: int,
    fits: Callable[[Event], bool],
    timeout_s: float,
    wanted: str,
    where: Mapping[str, Any],
) -> Event:
    store, seen, started = server.box.store, [], time.monotonic()
    follower = server.box.feed.subscribe()
    try:
        with trio.move_on_after(timeout_s):
            last = after
            while True:
                for event in await store.read(partial(feed.events_after, seq=last, tenant=tenant)):
                    seen.append(event.kind)
                    last = event.seq
                    if fits(event):
                        return event
                await follower.next()
    finally:
        server.box.feed.unsubscribe(follower)
    condition = "".join(f" {name}={value!r}" for name, value in where.items())
    kinds = ", ".join(f"{kind} x {seen.count(kind)}" for kind in dict.fromkeys(seen)) or "nothing at all"
    raise NotInTime(
        f"expected: {wanted}{condition} within {time.monotonic() - started:.1f} s\nseen in tenant {tenant}: {kinds}"
    )


async def _ask(server: OsqboxServer, order: campaigns.Order) -> QueryResult:
    box = server.box
    follower = box.feed.subscribe()
    try:
        campaign, asked = await box.store.write(lambda tx: campaigns.start(tx, order, lambda _: (), new_id))
        box.presence.wake(asked)
        while (campaign := await box.store.read(lambda db: campaigns.get(db, campaign.id))).ended_at is None:
            await follower.next()
        ended = await box.store.read(lambda db: campaigns.ended_after(db, campaign.id, 0, limit=100_000))
    finally:
        box.feed.unsubscribe(follower)
    return QueryResult([msgspec.json.decode(one.encoded) for one in ended], campaign.summary())
