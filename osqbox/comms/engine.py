"""Where stateless events go: this box's database, or a real engine behind a unix socket.

The engine of 2024-25 takes ``POST /events/stateless`` with application/x-ndjson: a line about the agent, then headers
and events. It parses every line first: 200 all are queued, 400 none is, 500 it failed.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import msgspec
import trio

from .bodies import agent_facts
from .errors import CommsError, IndexerDown
from .intake import Delivery, EngineDown
from .messages import Agent, Event
from .seams import Events

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
"""As upstream's front waits for its engine."""
ANSWER_MAX_BYTES = 16 * 1024 * 1024
READ_BYTES = 64 * 1024
LINKS = 4
"""Requests at once; those of one agent go one after another."""
WHY_MAX_CHARS = 200

FindAgent = Callable[[str], Awaitable[Agent | None]]


class StandIn:
    """The engine of a box that has none: events are stored, searched and forwarded from there."""

    def __init__(self, events: Events) -> None:
        self._events = events

    async def deliver(self, events: Sequence[Event]) -> Delivery:
        try:
            await self._events.add(events)
        except trio.ClosedResourceError as error:
            raise EngineDown("the database is closing") from error
        except sqlite3.Error as error:
            raise EngineDown(f"the database failed: {error}") from error
        except Exception:
            if len(events) > 1:
                return await self._deliver_each(events)
            log.exception("an event cannot be stored and is dropped")
            return Delivery(0, 1)
        return Delivery(len(events))

    async def _deliver_each(self, events: Sequence[Event]) -> Delivery:
        """One that cannot be stored may not hold up the others."""
        done = [await self.deliver((event,)) for event in events]
        return Delivery(sum(each.delivered for each in done), sum(each.dropped for each in done))

    async def scan(self, _body: bytes) -> tuple[int, bytes]:
        raise CommsError(503, "no_engine", "no engine that scans for vulnerabilities: start with --engine-socket PATH")

    def statistics(self) -> dict[str, Any]:
        return {"kind": "sqlite", "up": True}


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    status: int
    body: bytes


class SocketEngine:
    """A real engine at the other end of a unix socket."""

    def __init__(
        self, path: Path, find_agent: FindAgent, *, timeout_s: float = ANSWER_TIMEOUT_S, links: int = LINKS
    ) -> None:
        self._path = path
        self._find_agent = find_agent
        self._timeout_s = timeout_s
        self._links = trio.CapacityLimiter(links)
        self._up = False
        self._requests = 0
        self._refused = 0

    async def deliver(self, events: Sequence[Event]) -> Delivery:
        """One request for the events of each agent, a few agents at once.

        A refused request (400, 413) is cut in halves until the events are found that are refused by themselves.
        """
        places: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            places.setdefault(event.agent, []).append(place)
        tally = _Tally()
        async with trio.open_nursery() as nursery:
            for agent, own in places.items():
                nursery.start_soon(self._deliver_agent, agent, events, own, tally)
        if len(tally.left) == len(events):
            raise EngineDown(tally.why)
        if tally.dropped:
            self._refused += tally.dropped
            log.warning("the engine refused %d events, such as one of %s", tally.dropped, tally.refusal)
        return Delivery(tally.delivered, tally.dropped, sorted(tally.left), tally.why)

    async def _deliver_agent(self, agent: str, events: Sequence[Event], places: list[int], tally: _Tally) -> None:
        async with self._links:
            if tally.why:  # the engine is away: the others need not find out too
                tally.left += places
                return
            try:
                header = await self._header(agent)
            except IndexerDown as error:
                tally.stop(places, error.message)
                return
            pieces = [places]
            while pieces:
                piece = pieces.pop()
                try:
                    answer = await self._post(header, [events[place] for place in piece])
                except EngineDown as error:
                    tally.stop([place for each in (*pieces, piece) for place in each], str(error))
                    return
                if answer.status in (400, 413) and len(piece) > 1:
                    half = len(piece) // 2
                    pieces += (piece[half:], piece[:half])
                elif answer.status in (400, 413):
                    tally.dropped += 1
                    tally.refusal = f"agent {agent}: {_why(answer)}"
                else:
                    tally.delivered += len(piece)

    async def _header(self, agent: str) -> bytes:
        found = await self._find_agent(agent)
        facts = {"id": agent} if found is None else agent_facts(found)
        return msgspec.json.encode({"agent": facts}) + b"\n"

    async def _post(self, header: bytes, events: Sequence[Event]) -> EngineAnswer:
        """200, 400 or 413. Raises EngineDown for everything else."""
        body = [header]
        for event in events:
            body.append(msgspec.json.encode({"module": event.module, "collector": event.collector}) + b"\n")
            body.append(msgspec.json.encode(event.data) + b"\n")
        answer = await self.request("/events/stateless", "application/x-ndjson", b"".join(body))
        self._up = answer.status in (200, 202, 204, 400, 413)
        if not self._up:
            raise EngineDown(f"{self._path} answered {answer.status}: {_why(answer)}")
        return answer

    async def scan(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of ``POST /vulnerability/scan``, as the engine gave them. Raises CommsError 503."""
        try:
            answer = await self.request("/vulnerability/scan", "application/json", body)
        except EngineDown as error:
            raise CommsError(503, "engine_down", "the engine cannot be reached; try again", retry_after_s=5) from error
        if answer.status in (404, 405, 501):
            raise CommsError(503, "no_engine", "the engine does not scan for vulnerabilities")
        return answer.status, answer.body

    async def request(self, path: str, content_type: str, body: bytes) -> EngineAnswer:
        """One request on a connection of its own. Raises EngineDown."""
        self._requests += 1
        try:
            with trio.fail_after(self._timeout_s):
                return await self._exchange(path, content_type, body)
        except trio.TooSlowError:
            self._up = False
            raise EngineDown(f"{self._path}: no answer within {self._timeout_s:g} s") from None
        except h11.RemoteProtocolError as error:
            self._up = False
            raise EngineDown(f"{self._path}: expected a whole HTTP answer: {error}") from error
        except (OSError, trio.BrokenResourceError) as error:
            self._up = False
            raise EngineDown(f"{self._path}: {error}") from error

    async def _exchange(self, path: str, content_type: str, body: bytes) -> EngineAnswer:
        async with await trio.open_unix_socket(str(self._path)) as stream:
            http = h11.Connection(h11.CLIENT)
            head = h11.Request(
                method="POST",
                target=path,
                headers=[
                    ("Host", "localhost"),
                    ("Content-Type", content_type),
                    ("Content-Length", str(len(body))),
                    ("Connection", "close"),
                ],
            )
            message = b"".join(http.send(event) or b"" for event in (head, h11.Data(data=body), h11.EndOfMessage()))
            with suppress(trio.BrokenResourceError):  # refused before all was read: the answer says why
                await stream.send_all(message)
            return await _read_answer(http, stream)

    def statistics(self) -> dict[str, Any]:
        """``up``: whether the last request was answered as an engine does."""
        return {
            "kind": "socket",
            "path": str(self._path),
            "up": self._up,
            "requests": self._requests,
            "refused_events": self._refused,
        }


class _Tally:
    """What became of a batch so far."""

    def __init__(self) -> None:
        self.delivered = 0
        self.dropped = 0
        self.left: list[int] = []
        self.why = ""
        """Why something is left."""
        self.refusal = ""
        """Why the last event that was dropped was refused."""

    def stop(self, places: Sequence[int], why: str) -> None:
        self.left += places
        self.why = self.why or why


async def _read_answer(http: h11.Connection, stream: trio.abc.ReceiveStream) -> EngineAnswer:
    status, body = 0, bytearray()
    while True:
        match http.next_event():
            case h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(READ_BYTES)))
            case h11.Response(status_code=code):
                status = code
            case h11.Data(data=data):
                body += data
                if len(body) > ANSWER_MAX_BYTES:
                    raise EngineDown(f"its answer is longer than {ANSWER_MAX_BYTES} bytes")
            case h11.EndOfMessage():
                return EngineAnswer(status, bytes(body))
            case h11.ConnectionClosed():
                raise EngineDown("it closed the connection before its answer")


def _why(answer: EngineAnswer) -> str:
    """The engine's own words, one bounded line."""
    text = answer.body[: 4 * WHY_MAX_CHARS].decode(errors="replace")
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        told = msgspec.json.decode(answer.body)
        if isinstance(told, dict) and isinstance(told.get("error"), str):
            text = told["error"]
    return "".join(letter if letter.isprintable() else " " for letter in text)[:WHY_MAX_CHARS]
