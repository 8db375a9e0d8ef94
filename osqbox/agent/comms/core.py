"""What both dialects share: token, queues, enrollment, commands one after another and each once. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from osqbox.agent.comms.effects import Collect, Headers, Reply, Restart, Send, Sleep, Thread
from osqbox.agent.comms.facts import Fact
from osqbox.agent.comms.messages import (
    FAILURE,
    FATAL_MESSAGES,
    IN_PROGRESS,
    SUCCESS,
    TIMED_OUT,
    About,
    Order,
    Stateful,
    Stateless,
    basic,
    code_of,
    message_of,
    packed,
    read_object,
    read_token,
)
from osqbox.agent.comms.options import Options
from osqbox.agent.comms.queue import Queue
from osqbox.agent.comms.statistics import Statistics
from osqbox.agent.store import Store
from osqbox.errors import OsqboxError

AGENT, COMMANDS, INVENTORY, SHARED = "agent", "commands", "inventory", "shared"
"""Domains of the store; the queues have their own."""
STATELESS, STATEFUL, COMMAND = "stateless", "stateful", "command"
TOKEN, RENEW, OFFERED = "token", "renew", "offered"
"""What threads sleep on: a token that came, one that is needed, commands that came."""

DUPLICATE_ID_CODE, DUPLICATE_NAME_CODE = 1708, 1705
NOT_VALID = "Command is not valid"
DATABASE_FAILURE = "Agent's database failure"
STOPPED = "Agent stopped during execution"
MIN_TOKEN_S = 1.0
"""A token is used at least so long, whatever its ``exp`` says, or clocks that differ would make a storm of logins."""

Outcome = tuple[int, str]
"""Code and message of a result."""


class RefusedByServer(OsqboxError):
    """The server does not know this agent, or not with this key: it has nothing else to try."""


class Core:
    """One agent between two restarts. Its store is all that a later one knows of it."""

    __slots__ = (
        "about",
        "events",
        "expires_at",
        "groups",
        "kept_commands",
        "key",
        "now",
        "options",
        "queues",
        "stateful",
        "stateless",
        "statistics",
        "store",
        "throw",
        "token",
        "token_at",
        "uuid",
        "wakes",
    )

    product = ""
    """In its User-Agent, by which servers may tell the dialects."""
    login_path = ""
    secret_name = ""

    def __init__(
        self,
        about: About,
        options: Options,
        store: Store,
        *,
        now: Callable[[], float],
        throw: Callable[[], float],
        statistics: Statistics,
    ) -> None:
        name = store.get(AGENT, "name")
        self.about, self.options, self.store = replace(about, name=name) if name else about, options, store
        self.now = now
        """Seconds since the epoch."""
        self.throw = throw
        """From 0 to 1: spreads what many agents would do at once."""
        self.statistics = statistics
        self.uuid = store.get(AGENT, "uuid") or ""
        self.key = store.get(AGENT, "key") or ""
        self.groups: list[str] = _texts(store.get(AGENT, "groups"))
        self.token, self.token_at, self.expires_at = "", 0.0, 0.0
        self.stateless = Queue(STATELESS, store, options.bounds.queue_items)
        self.stateful = Queue(STATEFUL, store, options.bounds.queue_items)
        self.queues = {STATELESS: self.stateless, STATEFUL: self.stateful}
        self.queues[COMMAND] = Queue(COMMAND, store, options.bounds.queue_items)
        self.kept_commands = deque(_by_age(store))
        self.wakes: list[str] = []
        """Names to be woken, emptied by who drives the threads."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        """What happened, for who drives the threads."""

    # -- who it is -----------------------------------------------------------------------------------------------

    def identify(self, uuid: str, key: str) -> None:
        """Be the agent that was registered with these."""
        self.uuid, self.key = uuid, key
        self.store.put(AGENT, "uuid", uuid)
        self.store.put(AGENT, "key", key)
        self.store.commit()

    def enroll(self, uuid: str, key: str, secret: str, *, adopt: bool = False) -> Thread[None]:
        """Register under ``uuid`` and ``key``; retried until the server says yes or no. Raises RefusedByServer.

        A name that is taken gets a suffix from the uuid. With ``adopt`` a taken uuid is this very agent of an earlier
        run.
        """
        about, attempt = self.about, 0
        while True:
            reply = yield self.send("enroll", "POST", "/security/user/authenticate", b"", basic("agent", secret))
            data = (read_object(reply.body) or {}).get("data")
            token = data.get("token") if isinstance(data, dict) else None
            if reply.ok and isinstance(token, str):
                body = about.registration(uuid, key)
                reply = yield self.send("enroll", "POST", "/agents", body, f"Bearer {token}")
                code = code_of(reply.body)
                if reply.status == 201 or (adopt and code == DUPLICATE_ID_CODE):
                    self.statistics.enrollments += reply.status == 201
                    self.about = about
                    self.store.put(AGENT, "name", about.name)
                    self.identify(uuid, key)
                    self.tell("enrolled", uuid=uuid, name=about.name)
                    return
                if code == DUPLICATE_NAME_CODE and about is self.about:
                    about = replace(about, name=f"{about.name}-{uuid[:8]}")
                    continue
            self.failed("enroll", reply)
            if reply.status in (400, 401, 403, 404, 405, 409, 413):
                raise RefusedByServer(f"not enrolled: {reply.told}: {message_of(reply.body)}")
            attempt += 1
            yield Sleep(self.back_off_s(attempt, reply))

    def send(
        self, call: str, method: str, path: str, body: bytes = b"", authorization: str = "", timeout_s: float = 0
    ) -> Send:
        """A request in the C++ agent's order of headers."""
        timeout_s = timeout_s or self.options.pace.request_s
        return Send(call, method, path, self.headers(authorization, has_body=bool(body)), body, timeout_s)

    def headers(self, authorization: str = "", *, has_body: bool = False, accept: str = "application/json") -> Headers:
        found = [("User-Agent", self.about.user_agent(self.product)), ("Accept", accept)]
        if authorization:
            found.append(("Authorization", authorization))
        if has_body:
            found.append(("Content-Type", "application/json"))
        return tuple(found)

    def bearer(self) -> str:
        return f"Bearer {self.token}"

    # -- logging in ----------------------------------------------------------------------------------------------

    def authenticate(self) -> Thread[None]:
        """Keep a token that is good: a new one before it expires, or when a stream says that it is not."""
        pace, attempt = self.options.pace, 0
        while True:
            body = packed({"uuid": self.uuid, self.secret_name: self.key})
            reply = yield self.send("login", "POST", self.login_path, body)
            found = read_token(reply.body) if reply.ok else None
            if found is None:
                attempt += 1
                self._not_logged_in(reply)
                yield Sleep(self.back_off_s(attempt, reply))
                continue
            attempt = 0
            self._logged_in(*found)
            left_s = self.expires_at - self.now() - pace.renew_before_s
            yield Sleep(max(MIN_TOKEN_S, left_s), wake=RENEW)

    def _logged_in(self, token: str, expires_at: float) -> None:
        counted = self.statistics
        counted.logins += 1
        counted.renewals += bool(self.token) and self.now() < self.expires_at
        self.token, self.token_at, self.expires_at = token, self.now(), expires_at
        self.wakes.append(TOKEN)
        self.tell("logged_in", uuid=self.uuid, expires_at=expires_at)

    def _not_logged_in(self, reply: Reply) -> None:
        self.failed("login", reply, "without a token" if reply.ok else "")
        if reply.status in (401, 403) and message_of(reply.body) in FATAL_MESSAGES:
            self.statistics.refused_agents += 1
            raise RefusedByServer(f"login refused: {message_of(reply.body)}")

    def with_token(self) -> Thread[None]:
        """Wait for the first token."""
        while not self.token:
            yield Sleep(None, wake=TOKEN)

    def log_in_again(self) -> None:
        """Somebody was refused with the token there is."""
        if self.token:
            self.token = ""
            self.wakes.append(RENEW)

    # -- queues --------------------------------------------------------------------------------------------------

    def push(self, name: str, item: bytes) -> bool:
        """Into a queue; wakes who sends from it. False: it was full."""
        queue = self.queues[name]
        if len(item) > self.options.bounds.batch_bytes or not queue.push(item):
            self.statistics.events_dropped += 1
            return False
        limit = self.options.bounds.batch_bytes
        if len(queue) == 1 or queue.size_bytes - len(item) < limit <= queue.size_bytes:
            self.wakes.append(name)
        return True

    def batch(self, queue: Queue) -> Thread[list[bytes]]:
        """The next batch: as many bytes as a request takes, or what came within the wait.

        The wait begins when the last batch was done with, and again when it brought nothing (upstream looks every
        0.1 s; here an event wakes the wait).
        """
        limit, wait_s = self.options.bounds.batch_bytes, self.options.pace.batch_s
        began = self.now()
        while queue.size_bytes < limit:
            if not queue:
                yield Sleep(None, wake=queue.name)
                continue
            waited_s = self.now() - began
            left_s = wait_s - waited_s % wait_s if wait_s > 0 else 0.0
            woken = yield Sleep(left_s, wake=queue.name)
            if not woken:
                break
        return queue.head(limit)

    def acknowledged(self, queue: Queue, batch: list[bytes]) -> None:
        queue.accepted(batch)
        self.store.commit()
        if queue is self.stateless:
            self.statistics.stateless_acknowledged += len(batch)
        else:
            self.statistics.stateful_acknowledged += len(batch)
            self.statistics.results_sent += sum(b'"module":"command"' in item[:400] for item in batch)

    def sent(self, queue: Queue, batch: Sequence[bytes]) -> None:
        if queue is self.stateless:
            self.statistics.stateless_sent += len(batch)
        else:
            self.statistics.stateful_sent += len(batch)

    # -- commands ------------------------------------------------------------------------------------------------

    def offered(self, order: Order) -> bool:
        """A command arrived. False: no room for it."""
        self.statistics.commands_received += 1
        item = packed({"id": order.id, "name": order.name, "args": order.args, "seq": order.seq})
        if not self.queues[COMMAND].push(item):
            self.statistics.events_dropped += 1
            return False
        self.wakes.append(OFFERED)
        return True

    def execute(self) -> Thread[None]:
        """Commands one after another, each once: what is known is in the store before it is begun."""
        self._clean_up()
        queue = self.queues[COMMAND]
        while True:
            head = queue.head(1)
            if not head:
                yield Sleep(None, wake=OFFERED)
                continue
            found = json.loads(head[0])
            order = Order(found["id"], found["name"], found["args"], found["seq"])
            kept = _command(self.store.get(COMMANDS, order.id))
            refusal = self.refusal(order)
            if refusal is None and kept is None:
                self._keep(order, IN_PROGRESS, "")
            queue.accepted(head)
            self.store.commit()
            if refusal is not None:
                self.statistics.commands_invalid += 1
                self.report(order, *refusal)
            elif kept is not None:
                self.statistics.commands_duplicate += 1
                self.repeated(order, kept)
            else:
                yield from self._carry_out(order)

    def _carry_out(self, order: Order) -> Thread[None]:
        if order.name == "restart":
            self.tell("restart", command=order.id)
            yield Restart()
        code, message = yield from self.perform(order, self.now() + self.options.pace.command_s)
        self._keep(order, code, message)
        self.report(order, code, message)

    def _clean_up(self) -> None:
        """What was being done when the agent stopped: a restart has succeeded by that, anything else has failed."""
        for known in list(self.kept_commands):
            kept = _command(self.store.get(COMMANDS, known))
            if kept is not None and kept["code"] == IN_PROGRESS:
                order = Order(known, kept["name"])
                restarted = kept["name"] == "restart"
                code, message = (SUCCESS, "Agent restarted") if restarted else (FAILURE, STOPPED)
                self._keep(order, code, message)
                self.report(order, code, message)

    def _keep(self, order: Order, code: int, message: str) -> None:
        if self.store.get(COMMANDS, order.id) is None:
            self.kept_commands.append(order.id)
            while len(self.kept_commands) > self.options.bounds.commands_kept:
                self.store.delete(COMMANDS, self.kept_commands.popleft())
        kept = {"at": self.now(), "name": order.name, "code": code, "message": message}
        self.store.put(COMMANDS, order.id, packed(kept).decode())

    def report(self, order: Order, code: int, message: str) -> None:
        self.push(STATEFUL, self.result_item(order.id, code, message))
        self.store.commit()
        self.tell("command", id=order.id, name=order.name, code=code, message=message)

    # -- what a dialect says -------------------------------------------------------------------------------------

    def threads(self) -> dict[str, Callable[[], Thread[None]]]:
        raise NotImplementedError

    def refusal(self, order: Order) -> Outcome | None:
        """Why a command is not carried out, in what it is called and what it is given; None when it can be."""
        raise NotImplementedError

    def repeated(self, order: Order, kept: dict[str, Any]) -> None:
        """A command arrived that is known already."""
        raise NotImplementedError

    def perform(self, order: Order, until: float) -> Thread[Outcome]:
        raise NotImplementedError

    def result_item(self, id: str, code: int, message: str) -> bytes:
        raise NotImplementedError

    def stateful_item(self, event: Stateful) -> bytes:
        raise NotImplementedError

    def stateless_item(self, event: Stateless) -> bytes:
        raise NotImplementedError

    def back_off_s(self, attempt: int, reply: Reply) -> float:
        raise NotImplementedError

    # -- what the host has to tell -------------------------------------------------------------------------------

    def inventory(self) -> Thread[None]:
        """Tell what has changed since the last look."""
        load = self.options.load
        yield from self.with_token()
        while load.inventory_every_s > 0:
            self._tell_changes((yield Collect(INVENTORY)))
            yield Sleep(load.inventory_every_s * (0.9 + 0.2 * self.throw()))

    def _tell_changes(self, found: Iterable[Fact]) -> None:
        gone = {key for key, _ in self.store.scan(INVENTORY)}
        for fact in found:
            key = f"{fact.collector}/{fact.id}"
            digest = hashlib.blake2b(packed(fact.data), digest_size=8).hexdigest()
            before = self.store.get(INVENTORY, key)
            gone.discard(key)
            if before == digest:
                continue
            operation = "create" if before is None else "update"
            event = Stateful("inventory", fact.collector, fact.id, operation, fact.data)
            if self.push(STATEFUL, self.stateful_item(event)):
                self.store.put(INVENTORY, key, digest)
        for key in gone:
            collector, _, found_id = key.partition("/")
            if self.push(STATEFUL, self.stateful_item(Stateful("inventory", collector, found_id, "delete", None))):
                self.store.delete(INVENTORY, key)
        self.store.commit()

    def logs(self) -> Thread[None]:
        load = self.options.load
        yield from self.with_token()
        while load.logs_every_s > 0:
            yield Sleep(load.logs_every_s * (0.5 + self.throw()))
            self._tell_events((yield Collect("logs")))

    def _tell_events(self, events: Iterable[Stateless]) -> None:
        for event in events:
            self.push(STATELESS, self.stateless_item(event))
        self.store.commit()

    # -- configuration -------------------------------------------------------------------------------------------

    def set_groups(self, groups: Sequence[str]) -> None:
        self.groups = list(groups)
        self.store.put(AGENT, "groups", packed(self.groups).decode())

    def keep_configuration(self, name: str, text: bytes) -> None:
        digest = hashlib.sha256(text).hexdigest()
        kept = text.decode() if self.options.keep_configuration else digest
        self.store.put(SHARED, name, kept)
        self.statistics.configurations += 1
        self.tell("configuration", group=name, sha256=digest, bytes=len(text))

    # -- telling -------------------------------------------------------------------------------------------------

    def tell(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    def failed(self, call: str, reply: Reply, what: str = "") -> None:
        self.statistics.error(call, what or reply.told)
        self.tell("call_failed", call=call, reason=what or " ".join((reply.told, message_of(reply.body))).strip())


def timed_out() -> Outcome:
    return TIMED_OUT, "Command timed out"


def is_yaml(text: bytes) -> bool:
    """Whether it can be read as YAML; its aliases are not followed."""
    import yaml

    try:
        for _ in yaml.parse(text.decode(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            pass
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return False
    return True


def group_names(args: Any) -> list[str] | None:
    """The groups of a ``set-group``; None when its arguments are not what they should be."""
    groups = args.get("groups") if isinstance(args, dict) else None
    if not isinstance(groups, list) or not all(isinstance(name, str) and name for name in groups):
        return None
    return groups


def _texts(kept: str | None) -> list[str]:
    return [str(name) for name in json.loads(kept)] if kept else ["default"]


def _command(kept: str | None) -> dict[str, Any] | None:
    return json.loads(kept) if kept is not None else None


def _by_age(store: Store) -> list[str]:
    return [known for _, known in sorted((json.loads(value)["at"], key) for key, value in store.scan(COMMANDS))]
