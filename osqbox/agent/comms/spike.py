"""An agent of the design spike, written as one would write it: backs off, resumes, recognises repetitions. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import quote

from osqbox.agent.comms.core import (
    AGENT,
    NOT_VALID,
    SHARED,
    Core,
    Outcome,
    group_names,
    timed_out,
)
from osqbox.agent.comms.download import Download
from osqbox.agent.comms.effects import POLL, Follow, Headers, Reply, Send, ServerEvent, Sleep, Thread
from osqbox.agent.comms.messages import (
    BASE,
    FAILURE,
    IN_PROGRESS,
    SUCCESS,
    Order,
    Stateful,
    Stateless,
    read_object,
    read_order,
    read_orders,
    refused_items,
    spike_result_of,
)
from osqbox.agent.comms.queue import Queue

_LOGIN_AGAIN = (401, 403)
_NEVER = (400, 404, 409, 413, 415, 422)
"""Refusals that the same request will meet again."""
MAX_RETRY_AFTER_S = 300.0
_ARGUMENTS = {"set-group": (), "fetch-config": (), "restart": (), "upgrade": ("file_name",)}
_DOWNLOAD_TRIES = 10


class SpikeCore(Core):
    __slots__ = ("_bye_s", "_is_open", "_was_open", "last_seq", "numbered")

    product = "osqbox-agent"
    login_path = f"{BASE}/login"
    secret_name = "password"  # noqa: S105 - the name of a field

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.last_seq = int(self.store.get(AGENT, "last_event_id") or 0)
        """Of the command stream: where it is taken up again."""
        self.numbered = int(self.store.get(AGENT, "events") or 0)
        """How many log events have been given an id."""
        self._bye_s: float | None = None
        self._is_open = self._was_open = False

    def threads(self) -> dict[str, Callable[[], Thread[None]]]:
        return {
            "login": self.authenticate,
            "commands": self.poll if self.options.transport == POLL else self.follow,
            "stateful": partial(self.stream, "stateful", self.stateful),
            "stateless": partial(self.stream, "stateless", self.stateless),
            "execute": self.execute,
            "configuration": self.first_configuration,
            "inventory": self.inventory,
            "logs": self.logs,
        }

    # -- events --------------------------------------------------------------------------------------------------

    def stream(self, call: str, queue: Queue) -> Thread[None]:
        """One of the two event streams. A batch stays the same until it is answered, so a repetition is seen."""
        while True:
            yield from self.with_token()
            yield from self._deliver(call, queue, (yield from self.batch(queue)))

    def _deliver(self, call: str, queue: Queue, batch: list[bytes]) -> Thread[None]:
        body = b'{"events":[' + b",".join(batch) + b"]}"
        attempt = 0
        while True:
            yield from self.with_token()
            self.sent(queue, batch)
            reply = yield self._post(call, body)
            if reply.ok or reply.status in _NEVER:
                break
            attempt += 1
            yield from self._again(call, reply, attempt)
        if not reply.ok:
            self.failed(call, reply)
            self.statistics.events_refused += len(batch)
            self._drop(queue, batch)
            return
        self.statistics.events_refused += refused_items(reply.body) if call == "stateful" else 0
        self.acknowledged(queue, batch)

    def _post(self, call: str, body: bytes) -> Send:
        key = hashlib.sha256(body).hexdigest()
        headers = (*self.headers(self.bearer(), has_body=True), ("Idempotency-Key", key))
        return Send(call, "POST", f"{BASE}/events/{call}", headers, body, self.options.pace.request_s)

    def _drop(self, queue: Queue, batch: list[bytes]) -> None:
        """A batch that will be refused for ever must not stand in the way of the rest."""
        queue.accepted(batch)
        self.store.commit()

    def _again(self, call: str, reply: Reply, attempt: int) -> Thread[None]:
        self.failed(call, reply)
        if reply.status in _LOGIN_AGAIN:
            is_old = self.now() - self.token_at > self.options.pace.first_retry_s
            self.log_in_again()
            if is_old:  # with a new token there is nothing to wait for
                return
        yield Sleep(self.back_off_s(attempt, reply))

    def back_off_s(self, attempt: int, reply: Reply) -> float:
        """What the server asks for, else twice as long each time, spread so that a fleet does not come at once."""
        pace, asked = self.options.pace, reply.headers.get("retry-after", "")
        if asked.isascii() and asked.isdecimal():
            return min(MAX_RETRY_AFTER_S, float(asked[:6])) * (1 + 0.2 * self.throw())
        longest_s = min(pace.retry_s, pace.first_retry_s * 2.0 ** min(attempt - 1, 20))
        return longest_s * (0.5 + 0.5 * self.throw())

    # -- commands ------------------------------------------------------------------------------------------------

    def follow(self) -> Thread[None]:
        """Hold the stream; after an end take it up where it was."""
        attempt = 0
        while True:
            yield from self.with_token()
            self._bye_s = None
            try:
                ended = yield self._follow()
            finally:  # also when the agent ends
                was_open, self._is_open = self._is_open, False
                self.statistics.streams_open -= was_open
            attempt = 1 if was_open else attempt + 1
            if (asked_s := self._asked_to_wait_s()) is not None:
                yield Sleep(asked_s * (1 + 0.2 * self.throw()))
                continue
            yield from self._again("commands", ended, attempt)

    def _follow(self) -> Follow:
        headers: Headers = self.headers(self.bearer(), accept="text/event-stream")
        if self.last_seq:
            headers = (*headers, ("Last-Event-ID", str(self.last_seq)))
        pace = self.options.pace
        return Follow(
            self.options.transport,
            f"{BASE}/commands",
            headers,
            self.heard,
            self._opened,
            pace.request_s,
            pace.silence_s,
        )

    def _opened(self) -> None:
        self.statistics.streams_open += 1
        self.statistics.reconnects += self._was_open
        self._is_open = self._was_open = True
        self.tell("stream_open", transport=self.options.transport, after=self.last_seq)

    def heard(self, event: ServerEvent) -> bool:
        """One event of the stream. False ends it."""
        match event.kind:
            case "command":
                return self._heard_command(event)
            case "reset":
                self.statistics.resets += 1
                self._resume_from(0)
            case "bye":
                self._heard_bye(event)
                return False
        return True

    def _heard_command(self, event: ServerEvent) -> bool:
        seq = int(event.id[:18]) if event.id.isascii() and event.id.isdecimal() else 0
        order = read_order(read_object(event.data), seq)
        if order is None:
            self.statistics.error("commands", "an event that is no command")
            return True
        if order.seq and order.seq < self.last_seq and self.store.get("commands", order.id) is None:
            self.statistics.commands_out_of_order += 1
        if not self.offered(order):
            return False
        self._resume_from(max(seq, self.last_seq))
        return True

    def _resume_from(self, seq: int) -> None:
        """Durable together with the command itself."""
        self.last_seq = seq
        self.store.put(AGENT, "last_event_id", str(seq))
        self.store.commit()

    def _heard_bye(self, event: ServerEvent) -> None:
        found = read_object(event.data) or {}
        retry_ms = found.get("retry_ms")
        if not isinstance(retry_ms, int | float) or retry_ms < 0:
            retry_ms = self.options.pace.first_retry_s * 1000
        self._bye_s = min(MAX_RETRY_AFTER_S, retry_ms / 1000)
        reason = str(found.get("reason", ""))[:100]
        self.statistics.byes += 1
        self.tell("bye", reason=reason)
        match reason:
            case "replaced":  # whoever has this agent's key too would throw us out again
                self._bye_s = max(self._bye_s, self.options.pace.retry_s)
            case "token_expired" | "revoked":
                self.log_in_again()

    def _asked_to_wait_s(self) -> float | None:
        """None: the stream ended without a word."""
        return self._bye_s

    def poll(self) -> Thread[None]:
        """Ask again and again; the server holds each request for as long as it is asked to."""
        attempt, wait_s = 0, self.options.pace.wait_s
        while True:
            yield from self.with_token()
            path = f"{BASE}/commands?wait={wait_s:g}&last_event_id={self.last_seq}"
            timeout_s = self.options.pace.request_s + wait_s
            reply = yield self.send("commands", "GET", path, b"", self.bearer(), timeout_s)
            if reply.status in (204, 408):
                attempt = 0
                continue
            if not reply.ok:
                attempt += 1
                self.statistics.reconnects += 1
                yield from self._again("commands", reply, attempt)
                continue
            attempt = 0
            left = [order for order in read_orders(reply.body) or [] if not self.offered(order)]
            place = (read_object(reply.body) or {}).get("last_event_id")
            if not left and isinstance(place, int):
                self._resume_from(place)
            self.store.commit()

    def refusal(self, order: Order) -> Outcome | None:
        args = order.args if order.args is not None else {}
        if order.name not in _ARGUMENTS or not isinstance(args, dict):
            return FAILURE, NOT_VALID
        if order.name == "set-group" and group_names(args) is None:
            return FAILURE, f"{NOT_VALID}: groups is no list of names"
        for name in _ARGUMENTS[order.name]:
            if not isinstance(args.get(name), str):
                return FAILURE, f"{NOT_VALID}: {name} is missing"
        return None

    def repeated(self, order: Order, kept: dict[str, Any]) -> None:
        """Not done again; the server is told once more what came of it."""
        if kept["code"] != IN_PROGRESS:
            self.report(order, kept["code"], kept["message"])

    def perform(self, order: Order, until: float) -> Thread[Outcome]:
        match order.name:
            case "upgrade":
                return (yield from self._upgrade(order.args["file_name"], until))
            case "set-group":
                self.set_groups(group_names(order.args) or [])
        return (yield from self._configure(until))

    # -- configuration and upgrades ------------------------------------------------------------------------------

    def first_configuration(self) -> Thread[None]:
        yield from self.with_token()
        attempt = 0
        while True:
            reply = yield self._get_configuration()
            if reply.status == 404 or self._configured(reply)[0] == SUCCESS:
                return
            attempt += 1
            yield from self._again("config", reply, attempt)
            yield from self.with_token()

    def _configure(self, until: float) -> Thread[Outcome]:
        """Fetch it, again and again while the server is away or busy."""
        for attempt in count(1):
            yield from self.with_token()
            reply = yield self._get_configuration()
            code, message = self._configured(reply)
            if code == SUCCESS:
                break
            if reply.ok or reply.status in _NEVER:
                self.failed("config", reply, message if reply.ok else "")
                break
            yield from self._again("config", reply, attempt)
            if self.now() > until:
                return timed_out()
        return code, message

    def _get_configuration(self) -> Send:
        headers, etag = self.headers(self.bearer()), self.store.get(AGENT, "etag")
        if etag:
            headers = (*headers, ("If-None-Match", etag))
        return Send("config", "GET", f"{BASE}/configuration", headers, timeout_s=self.options.pace.request_s)

    def _configured(self, reply: Reply) -> Outcome:
        if reply.status == 304:
            return SUCCESS, "Configuration is unchanged"
        if not reply.ok:
            return FAILURE, f"Cannot fetch the configuration: {reply.told}"
        found = read_object(reply.body)
        files = found.get("files") if found else None
        if found is None or not isinstance(files, list):
            return FAILURE, "Cannot read the configuration: expected a JSON object with files"
        for name, _ in list(self.store.scan(SHARED)):
            self.store.delete(SHARED, name)
        for file in files:
            outcome = self._keep_file(file)
            if outcome is not None:
                return outcome
        etag = reply.headers.get("etag", "")
        self.store.put(AGENT, "etag", etag if etag.isascii() and etag.isprintable() else "")
        groups = found.get("groups")
        if isinstance(groups, list) and all(isinstance(name, str) for name in groups):
            self.set_groups(groups)
        self.store.commit()
        return SUCCESS, f"Configuration of {len(files)} groups applied"

    def _keep_file(self, file: Any) -> Outcome | None:
        """What is wrong with one group's file; None when it is kept."""
        group, text = (file.get("group"), file.get("configuration")) if isinstance(file, dict) else (None, None)
        if not isinstance(group, str):
            return FAILURE, "Cannot read the configuration: a file without a group"
        body = text.encode() if isinstance(text, str) else json.dumps(text).encode()
        told = file.get("sha256")
        if isinstance(text, str) and told and told != hashlib.sha256(body).hexdigest():
            return FAILURE, f"The configuration of {group} does not match its checksum"
        self.keep_configuration(group, body)
        return None

    def _upgrade(self, name: str, until: float) -> Thread[Outcome]:
        """Fetch a file, taking it up where it broke off, and check it against the server's SHA-256."""
        download = Download(name, self.options.bounds.upgrade_bytes)
        problem: str | None = None
        for attempt in range(1, _DOWNLOAD_TRIES + 1):
            if self.now() > until:
                return timed_out()
            yield from self.with_token()
            reply = yield self._get_upgrade(download)
            problem = download.problem(reply)
            if problem is None:
                self.statistics.upgrades += 1
                self.statistics.upgrades_resumed += download.resumed
                self.tell("upgrade", file_name=name, sha256=download.sha256, bytes=download.size)
                return SUCCESS, f"Fetched {name}: {download.size} bytes, sha256 {download.sha256}"
            if reply.status in _NEVER or download.is_hopeless:
                self.failed("upgrade", reply, problem)
                return FAILURE, f"Cannot fetch {name}: {problem}"
            yield from self._again("upgrade", reply, attempt)
        return FAILURE, f"Cannot fetch {name}: {problem}"

    def _get_upgrade(self, download: Download) -> Send:
        headers = (*self.headers(self.bearer(), accept="*/*"), *download.headers())
        path = f"{BASE}/upgrade?file_name={quote(download.name, safe='')}"
        return Send("upgrade", "GET", path, headers, timeout_s=self.options.pace.request_s, sink=download)

    # -- items ---------------------------------------------------------------------------------------------------

    def result_item(self, id: str, code: int, message: str) -> bytes:
        return spike_result_of(id, code, message).spike()

    def stateful_item(self, event: Stateful) -> bytes:
        return event.spike()

    def stateless_item(self, event: Stateless) -> bytes:
        self.numbered += 1
        self.store.put(AGENT, "events", str(self.numbered))
        return event.spike(f"{self.uuid}-{self.numbered}")
