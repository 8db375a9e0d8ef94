"""A Locust user that is an osquery agent: the same core as the swarm's, on gevent's sockets.

Needs ``osqbox[locust]``. ``osqbox swarm --locustfile`` prints a file that uses it; Locust's master and workers then
spread the agents over machines. Import it from a locustfile: Locust has patched the standard library by then.
"""

from __future__ import annotations

import gzip
import http.client
import itertools
import ssl
import time
from pathlib import Path

import gevent
from gevent.event import Event
from gevent.lock import RLock
from gevent.pool import Group
from locust import User, task

from osqbox.agent.client import Failure, Query, Send
from osqbox.agent.messages import REPLY_MAX_BYTES, VERSION, Reply, enrolled_key, read_reply
from osqbox.agent.profile.dice import Dice
from osqbox.agent.sql import QueryResult
from osqbox.agent.swarm.build import Nursery, ProfileHosts
from osqbox.agent.swarm.member import (
    SLOW_PAUSE_S,
    SLOW_PIECE_BYTES,
    Member,
    Shared,
    Strand,
    Timeline,
    Work,
    counted_as,
)
from osqbox.agent.swarm.plan import SwarmPlan
from osqbox.agent.swarm.tally import Tally

CALL_TIMEOUT_S = 16.0
WORKER_SPAN = 1_000_000
"""How many agents a worker may number before it would meet those of the next one."""
_LONGEST_NAP_S = 1.0
_CROWD = "osqbox_crowd"


class CallRefused(Exception):
    """What a call failed with, as Locust's statistics show it."""


class Crowd:
    """What the agents of one Locust process share."""

    def __init__(self, plan: SwarmPlan, ca: Path | None, worker: int) -> None:
        self.plan = plan
        self.tls = ssl.create_default_context(cafile=str(ca) if ca else None)
        self.hosts = ProfileHosts(plan)
        self.started = time.perf_counter()
        self.began = time.time() if plan.start_time is None else plan.start_time
        self.numbers = itertools.count(worker * WORKER_SPAN)

    def now(self) -> float:
        return self.began + time.perf_counter() - self.started

    def member(self) -> tuple[Member, Timeline]:
        """The next agent, on a timeline of its own."""
        plan, timeline = self.plan, Timeline()
        shared = Shared(timeline, Tally(), Dice("swarm", plan.seed), plan.trouble, time.perf_counter, self.began)
        now = self.now()
        member = Nursery(plan, self.hosts, shared).member(next(self.numbers), now)
        member.begin(now)
        return member, timeline


class OsqueryAgent(User):
    """One agent. A subclass gives ``plan``, and ``ca`` unless the server's certificate is a public one."""

    abstract = True
    plan: SwarmPlan
    ca: Path | None = None

    def on_start(self) -> None:
        environment = self.environment
        crowd: Crowd | None = getattr(environment, _CROWD, None)
        if crowd is None:
            worker = getattr(environment.runner, "worker_index", 0)
            crowd = Crowd(self.plan, self.ca, max(0, worker))
            setattr(environment, _CROWD, crowd)
        self._crowd = crowd
        self._member, self._timeline = crowd.member()
        self._line = _Line(crowd.plan, crowd.tls, is_slow=self._member.is_slow)
        self._calls = Group()
        self._earlier = Event()
        """Set when somebody is due before `live` thinks so."""

    def on_stop(self) -> None:
        self._calls.kill()
        self._line.close()

    @task
    def live(self) -> None:
        """Wake the agent's threads as their time comes, for about a second; Locust may stop it in between."""
        until = time.perf_counter() + _LONGEST_NAP_S
        while time.perf_counter() < until:
            now = self._crowd.now()
            found = self._timeline.pop(now)
            if found is None:
                next_due = self._timeline.next_due
                pause_s = _LONGEST_NAP_S if next_due is None else min(next_due - now, _LONGEST_NAP_S)
                self._earlier.clear()
                self._earlier.wait(max(0.0, pause_s))
                continue
            told, member, strand, outcome = found
            work = member.resume(strand, outcome, told)
            if work is not None:
                self._calls.spawn(self._work, strand, work)

    def _work(self, strand: Strand, work: Work | None) -> None:
        while work is not None:
            outcome = self._send(work) if isinstance(work, Send) else self._query(work)
            work = self._member.resume(strand, outcome, self._crowd.now())
            self._earlier.set()

    def _query(self, query: Query) -> QueryResult:
        """In a thread, where a long query holds back nobody."""
        run = self._member.long_query(query.sql, self._crowd.now())
        result: QueryResult = gevent.get_hub().threadpool.apply(run)
        return result

    def _send(self, command: Send) -> bytes | Failure:
        with self._line.turn:
            began = time.perf_counter()
            outcome = self._line.post(command)
            took_s = time.perf_counter() - began
        reason = _refusal(command, outcome)
        self.environment.events.request.fire(
            request_type="osquery",
            name=counted_as(command, outcome, took_s),
            response_time=took_s * 1000,
            response_length=len(outcome) if isinstance(outcome, bytes) else 0,
            exception=CallRefused(reason) if reason else None,
            context=self.context(),
        )
        return outcome


def _refusal(command: Send, outcome: bytes | Failure) -> str:
    """Why a call failed, "" when it did not; the HTTP status is not looked at, as osqueryd does not."""
    if isinstance(outcome, Failure):
        return outcome.message
    reply: Reply = read_reply(outcome)
    if command.call == "enroll":
        return "" if enrolled_key(outcome) else reply.message or "no node key"
    return "" if reply.ok else reply.message


class _Line:
    """One keep-alive connection; a broken one is made anew once for each call. Redirects are not followed."""

    def __init__(self, plan: SwarmPlan, tls: ssl.SSLContext, *, is_slow: bool) -> None:
        self.turn = RLock()
        self._is_slow = is_slow
        self._host = plan.server.hostname
        self._connection = http.client.HTTPSConnection(self._host, timeout=CALL_TIMEOUT_S, context=tls)

    def post(self, command: Send) -> bytes | Failure:
        for is_last in (False, True):
            try:
                return self._exchange(command)
            except TimeoutError:
                self.close()
                return Failure("Request error: timeout")
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if is_last:
                    return Failure(f"Request error: {getattr(error, 'verify_message', '') or error or type(error)}")
        raise AssertionError

    def close(self) -> None:
        self._connection.close()

    def _exchange(self, command: Send) -> bytes:
        connection, body = self._connection, command.body
        if command.compress:
            body = gzip.compress(body, 9, mtime=0)
        connection.putrequest(command.method, command.path, skip_host=True, skip_accept_encoding=True)
        for name, value in _headers(command, self._host, len(body)):
            connection.putheader(name, value)
        connection.endheaders()
        piece_bytes = SLOW_PIECE_BYTES if self._is_slow else max(1, len(body))
        for at in range(0, len(body), piece_bytes):
            connection.send(body[at : at + piece_bytes])
            if self._is_slow:
                gevent.sleep(SLOW_PAUSE_S)
        response = connection.getresponse()
        reply = response.read(REPLY_MAX_BYTES + 1)
        if len(reply) > REPLY_MAX_BYTES:
            raise http.client.HTTPException(f"body limit of {REPLY_MAX_BYTES} bytes exceeded")
        return reply


def _headers(command: Send, host: str, size_bytes: int) -> list[tuple[str, str]]:
    """In osqueryd's order."""
    key = command.node_key
    is_sendable = key and key.isascii() and key.isprintable()
    return [
        ("Content-Type", "application/json"),
        ("Accept", "application/json"),
        ("User-Agent", f"osquery/{VERSION}"),
        *([("Authorization", f"NodeKey {key}")] if is_sendable else []),
        *([("Content-Encoding", "gzip")] if command.compress else []),
        ("Host", host.removesuffix(":443")),
        ("Content-Length", str(size_bytes)),
    ]
