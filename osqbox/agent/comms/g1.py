"""The C++ agent of 2024-25 (wazuh-agent, communicator.cpp and command_handler.cpp). Pure.

It is kept as it is, oddities included: it waits a fixed 30 s after most failures and 1 s after a 408, does not look
at the results of single events, and takes a command that comes twice for a failure of its own database.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from osqbox.agent.comms.core import (
    DATABASE_FAILURE,
    NOT_VALID,
    SHARED,
    Core,
    Outcome,
    group_names,
    is_yaml,
    timed_out,
)
from osqbox.agent.comms.effects import Reply, Sleep, Thread
from osqbox.agent.comms.messages import (
    BASE,
    FAILURE,
    SUCCESS,
    Order,
    Stateful,
    Stateless,
    read_orders,
    result_of,
)
from osqbox.agent.comms.queue import Queue

_LOGIN_AGAIN = (401, 403)


class G1Core(Core):
    __slots__ = ()

    product = "WazuhXDR"
    login_path = f"{BASE}/authentication"
    secret_name = "key"  # noqa: S105 - the name of a field

    def threads(self) -> dict[str, Callable[[], Thread[None]]]:
        return {
            "login": self.authenticate,
            "commands": self.commands,
            "stateful": partial(self.stream, "stateful", self.stateful),
            "stateless": partial(self.stream, "stateless", self.stateless),
            "execute": self.execute,
            "inventory": self.inventory,
            "logs": self.logs,
        }

    def stream(self, call: str, queue: Queue) -> Thread[None]:
        """One of the two event streams: one request at a time, its events removed when it is answered with 2xx.

        A repeated request takes along what has come meanwhile.
        """
        while True:
            yield from self.with_token()
            reply = yield from self._deliver(call, queue, (yield from self.batch(queue)))
            yield from self._pause(call, reply)

    def _deliver(self, call: str, queue: Queue, batch: list[bytes]) -> Thread[Reply]:
        body = b"\n".join((self.about.line(self.uuid, self.groups), *batch))
        self.sent(queue, batch)
        reply: Reply = yield self.send(call, "POST", f"{BASE}/events/{call}", body, self.bearer())
        if reply.ok:
            self.acknowledged(queue, batch)
        return reply

    def commands(self) -> Thread[None]:
        """Ask for commands; the server holds the request until there are some."""
        while True:
            yield from self.with_token()
            held_s = self.options.pace.commands_s
            reply = yield self.send("commands", "GET", f"{BASE}/commands", b"", self.bearer(), held_s)
            if reply.ok:
                self._take(reply)
            yield from self._pause("commands", reply)

    def _take(self, reply: Reply) -> None:
        orders = read_orders(reply.body)
        if orders is None:
            self.failed("commands", reply, "a body that is not {commands: [...]}")
            return
        for order in orders:
            self.offered(order)
        self.store.commit()

    def _pause(self, call: str, reply: Reply) -> Thread[None]:
        pace = self.options.pace
        if reply.ok:
            yield Sleep(pace.after_success_s)
            return
        if reply.status == 408:
            yield Sleep(pace.again_s)
            return
        self.failed(call, reply)
        self.statistics.reconnects += call == "commands"
        if reply.status in _LOGIN_AGAIN:
            self.log_in_again()
        yield Sleep(pace.retry_s)

    def back_off_s(self, attempt: int, reply: Reply) -> float:  # noqa: ARG002 - always the same, whatever was said
        return self.options.pace.retry_s

    # -- commands ------------------------------------------------------------------------------------------------

    def refusal(self, order: Order) -> Outcome | None:
        args = order.args if order.args is not None else {}
        match order.name:
            case "set-group" if group_names(args) is not None:
                return None
            case "fetch-config" | "restart" if isinstance(args, dict):
                return None
        return FAILURE, NOT_VALID

    def repeated(self, order: Order, kept: dict[str, Any]) -> None:  # noqa: ARG002
        self.report(order, FAILURE, DATABASE_FAILURE)

    def perform(self, order: Order, until: float) -> Thread[Outcome]:
        if order.name == "set-group":
            self.set_groups(group_names(order.args) or [])
        for name, _ in list(self.store.scan(SHARED)):
            self.store.delete(SHARED, name)
        for group in self.groups:
            if self.now() > until:
                return timed_out()
            yield from self.with_token()
            path = f"{BASE}/files?file_name={group}.yml"
            reply = yield self.send("config", "GET", path, b"", self.bearer())
            if not reply.ok or not is_yaml(reply.body):
                self.failed("config", reply, "a file that is no YAML" if reply.ok else "")
                if reply.status in _LOGIN_AGAIN:
                    self.log_in_again()
                return FAILURE, f"Cannot fetch the configuration of {group}: {'no YAML' if reply.ok else reply.told}"
            self.keep_configuration(group, reply.body)
        done = "set" if order.name == "set-group" else "updated"
        return SUCCESS, f"CentralizedConfiguration group {done}"

    def result_item(self, id: str, code: int, message: str) -> bytes:
        return result_of(id, code, message).g1()

    def stateful_item(self, event: Stateful) -> bytes:
        return event.g1()

    def stateless_item(self, event: Stateless) -> bytes:
        return event.g1()
