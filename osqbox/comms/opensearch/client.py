"""The one door to an OpenSearch-compatible indexer: opensearch-py in worker threads, bounded in every direction.

A call either returns what the indexer confirmed or raises. `IndexerDown` covers everything that may be different the
next time: not reachable, not in time, 429, 5xx, a shard that failed. Once the indexer cannot be reached, calls fail at
once; a probe once a second finds out when it is back, prepares the indices again, and lets calls through. The same
probe looks when a request has been under way for long, so that a frozen indexer is noticed before the request's limit.

Index names are given without the prefix that the boxes of one fleet share.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import trio

from osqbox.comms.errors import CommsError, IndexerDown
from osqbox.comms.messages import Json
from osqbox.errors import BadSetup, BadUsage, Unsafe

log = logging.getLogger(__name__)

REQUEST_S = 10.0
"""One request to the indexer."""
ANSWER_S = 25.0
"""Everything one call of a seam may take; agents are promised their answer within 30 s."""
PROBE_S = 1.0
PROBE_TIMEOUT_S = 3.0
SLOW_S = 2.0
"""A request under way this long makes the probe look."""
START_S = 8.0
"""How long a box waits at its start for the indexer before it goes on without."""
THREADS = 8
WAITING = 1000
"""Requests under way or waiting for a thread; more are refused at once."""
READ_MAX = 1000
"""Documents read in one request."""
BULK_BYTES = 8 * 1024 * 1024
BULK_LINES = 4000
"""One bulk request ends behind either; far below what an indexer accepts, so that no piece takes long."""
NO_SHARD_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
LATENCIES = 2000
"""The latest ones, of which the percentiles are."""

NOT_FOUND = 404
CONFLICT = 409
OVERLOADED = 429
PASSING = frozenset((401, 403, 408, OVERLOADED))
"""May be different the next time: credentials that are mended, a cluster that has not found its shards in time."""
SERVER_ERROR = 500
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
FOREIGN = "expected an OpenSearch-compatible indexer, got another kind of answer"

Source: TypeAlias = dict[str, Json]
T = TypeVar("T")


class Document(msgspec.Struct, frozen=True):
    """A stored document, with what an optimistic change names as its precondition."""

    id: str
    source: Source
    seq_no: int
    primary_term: int


class Conflict(CommsError):
    """409: the document exists already, or was changed by somebody else since it was read."""

    def __init__(self, what: str) -> None:
        super().__init__(CONFLICT, "conflict", f"{what} was changed at the same time; send the request again")


class NoIndex(IndexerDown):
    """The index does not exist; of the box's own ones that means they have to be prepared again."""


class NoShard(IndexerDown):
    """A part of an index is not there: it is being made, or its node is lost."""


class Unexpected(CommsError):
    """The indexer refused what the box sent: a fault of the set-up or of the box, not of the agent."""

    def __init__(self, message: str) -> None:
        super().__init__(500, "indexer_refused", message)


class Client:
    """Made by `open_client`."""

    def __init__(self, transport: Any, url: str, prefix: str, prepare: Callable[[Client], Awaitable[None]]) -> None:
        self.url = url
        self.prefix = prefix
        self._transport = transport
        self._prepare = prepare
        self._threads = trio.CapacityLimiter(THREADS)
        self._probe_threads = trio.CapacityLimiter(1)
        self._under_way: dict[trio.CancelScope, float] = {}
        """When each call began, oldest first; they end when the probe finds the indexer down."""
        self._up = False
        self._arrived = trio.Event()
        self._suspect = trio.Event()
        self._problem = "has not answered yet"
        """What the indexer did or did not."""
        self._down_since = monotonic()
        self._down_s = 0.0
        self._is_told = False
        """Whether the log has said that it is down: once for each time."""
        self._counts: Counter[str] = Counter()
        self._latencies_s: deque[float] = deque(maxlen=LATENCIES)

    @property
    def up(self) -> bool:
        return self._up

    async def wait_up(self) -> None:
        while not self._up:
            await self._arrived.wait()

    # documents

    async def get(self, index: str, id: str) -> Document | None:
        """The latest state of a document, whether refreshed or not; None when there is none."""
        return _document(await self.call("GET", self.path(index, "_doc", id), idempotent=True))

    async def mget(self, index: str, ids: Sequence[str]) -> list[Document | None]:
        """As `get`, one for each id in order."""
        return await self._read(self.path(index, "_mget"), [{"_id": each} for each in ids], empty_ok=False)

    async def read(self, addresses: Sequence[tuple[str, str]]) -> list[Document | None]:
        """As `get`, one for each index and id in order; an index that is not there has no documents.

        One that is just being made, with the first document of any agent, is waited for.
        """
        docs = [{"_index": self.index_name(index), "_id": name} for index, name in addresses]
        for pause_s in NO_SHARD_PAUSES_S:
            try:
                return await self._read("/_mget", docs, empty_ok=True)
            except NoShard:
                self._counts["no_shard"] += 1
                await trio.sleep(pause_s)
        return await self._read("/_mget", docs, empty_ok=True)

    async def _read(self, path: str, docs: Sequence[Source], *, empty_ok: bool) -> list[Document | None]:
        found: list[Document | None] = []
        for some in _slices(docs, READ_MAX):
            answer = await self.call("POST", path, body={"docs": some}, idempotent=True)
            found += [_document(each, empty_ok=empty_ok) for each in answer["docs"]]
        return found

    async def create(self, index: str, id: str, source: Source) -> Document:
        """Store a new document; raises `Conflict` when the id is taken."""
        return _written(await self.call("PUT", self.path(index, "_create", id), body=source), id, source)

    async def put(self, index: str, id: str, source: Source, *, over: Document | None = None) -> Document:
        """Store a document. ``over``: only if that is still the one stored, else `Conflict`."""
        answer = await self.call("PUT", self.path(index, "_doc", id), params=precondition(over), body=source)
        return _written(answer, id, source)

    async def delete(self, index: str, id: str, *, over: Document | None = None) -> bool:
        """Whether there was one. ``over`` as for `put`."""
        answer = await self.call("DELETE", self.path(index, "_doc", id), params=precondition(over))
        return bool(answer.get("result") == "deleted")

    async def bulk(self, index: str, operations: Iterable[tuple[Source, Source | None]]) -> list[Source]:
        """Actions such as ``{"create": {"_id": "1"}}`` with their documents; the indexer's items, in order.

        An item is ``{"_id", "status", "result"?, "error"?, "_seq_no"?, "_primary_term"?}``. Raises `IndexerDown` if any
        failed for a reason that may pass; the others may be stored all the same, so the caller sends them all again.
        An action may name another index (with prefix, see `index_name`). Sent in pieces when they are many.
        """
        items: list[Source] = []
        for lines in _bulk_bodies(operations):
            answer = await self.call("POST", self.path(index, "_bulk"), body=b"".join(lines))
            items += [next(iter(item.values())) for item in answer["items"]]
        for item in items:
            if item["status"] == OVERLOADED or item["status"] >= SERVER_ERROR:
                self._counts["item"] += 1
                raise IndexerDown(f"the indexer could not store a document: {_reason(item)}")
            self._check_shards(item)
        return items

    async def search(self, index: str, body: Source) -> Source:
        """The indexer's answer to a search of all shards. Writes appear in it after a refresh (see `refresh`).

        ``index`` may be a pattern; where there is no such index nothing is found.
        """
        params = {"ignore_unavailable": "true", "allow_no_indices": "true"}
        answer: Source = await self.call("POST", self.path(index, "_search"), params=params, body=body, idempotent=True)
        return answer

    async def refresh(self, index: str) -> None:
        """Make what was written until now visible to searches."""
        params = {"ignore_unavailable": "true", "allow_no_indices": "true"}
        await self.call("POST", self.path(index, "_refresh"), params=params, idempotent=True)

    def index_name(self, index: str) -> str:
        """As the indexer knows it."""
        return self.prefix + index

    def path(self, index: str, *rest: str) -> str:
        return "/" + "/".join(quote(part, safe="*,") for part in (self.index_name(index), *rest))

    # calls

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Source | None = None,
        body: Json = None,
        idempotent: bool = False,
        even_down: bool = False,
    ) -> Any:
        """The decoded answer of a 2xx, or of a 404 for a document. 409 is a `Conflict`, the rest as `errors` has it.

        An ``idempotent`` call is sent once more when its connection broke. ``even_down`` is for what prepares the
        indexer: it does not wait among the others and has a short limit.
        """
        if not (self._up or even_down):
            raise self._refused(f"the indexer {self._problem}")
        if len(self._under_way) >= WAITING:
            raise self._refused(f"{WAITING} requests are waiting for the indexer already")
        encoded = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        timeout_s = PROBE_TIMEOUT_S if even_down else REQUEST_S
        send = partial(self._send, method, path, params, encoded, timeout_s)
        if even_down:
            return await self._run(send, self._probe_threads, timeout_s, repeat=False)
        scope = trio.CancelScope()
        self._under_way[scope] = monotonic()
        try:
            with scope:
                return await self._run(send, self._threads, timeout_s, repeat=idempotent)
        finally:
            del self._under_way[scope]
        raise self._refused(f"the indexer {self._problem}")

    @contextmanager
    def whole_answer(self) -> Generator[None]:
        """Everything inside together ends within `ANSWER_S`, else `IndexerDown`."""
        with trio.move_on_after(ANSWER_S) as scope:
            yield
        if scope.cancelled_caught:
            raise self._late(f"no confirmation within {ANSWER_S:.0f} s")

    async def _run(
        self, send: Callable[[], Any], threads: trio.CapacityLimiter, timeout_s: float, *, repeat: bool
    ) -> Any:
        from opensearchpy import exceptions

        try:
            # The waiting for a thread and the request together; the thread itself ends by its own limit.
            with trio.fail_after(2 * REQUEST_S):
                answer = await trio.to_thread.run_sync(send, limiter=threads, abandon_on_cancel=True)
        except (exceptions.ConnectionTimeout, trio.TooSlowError) as error:
            raise self._late(f"no answer within {timeout_s:.0f} s") from error
        except exceptions.ConnectionError as error:
            if repeat and self._up:
                self._counts["repeated"] += 1
                return await self._run(send, threads, timeout_s, repeat=False)
            raise self._lost(_cause(error)) from error
        except exceptions.SerializationError as error:
            raise self._lost(FOREIGN) from error
        except exceptions.TransportError as error:
            return self._judge(int(error.status_code), error.info)
        if not isinstance(answer, dict):
            raise self._lost(FOREIGN)
        self._check_shards(answer)
        return answer

    def _send(self, method: str, path: str, params: Source | None, body: bytes | None, timeout_s: float) -> Any:
        """In a worker thread."""
        began = monotonic()
        try:
            # A copy: the transport takes what it knows out of the parameters.
            return self._transport.perform_request(
                method, path, params=dict(params or {}), body=body, timeout=timeout_s
            )
        finally:
            self._counts["requests"] += 1
            self._latencies_s.append(monotonic() - began)

    def _judge(self, status: int, body: Json) -> Any:
        """What an answer other than 2xx means."""
        if status == NOT_FOUND and isinstance(body, dict) and not isinstance(body.get("error"), dict):
            return body  # no such document
        reason = _reason(body)
        if status == CONFLICT:
            raise Conflict("the document")
        if status == NOT_FOUND:
            self._suspect.set()
            raise NoIndex(f"the indexer has no such index: {reason}")
        if status in PASSING or status >= SERVER_ERROR:
            self._counts[str(status)] += 1
            self._problem = f"answered HTTP {status}: {reason}"
            raise IndexerDown(f"the indexer {self._problem}")
        self._counts["unexpected"] += 1
        raise Unexpected(f"the indexer refused a request of this box: HTTP {status}: {reason}")

    def _check_shards(self, answer: Source) -> None:
        shards = answer.get("_shards")
        if answer.get("timed_out") is True or (isinstance(shards, dict) and shards.get("failed")):
            self._counts["partial"] += 1
            raise IndexerDown(f"a part of the indexer did not answer: {_reason(answer)}")

    # up and down

    def _refused(self, message: str) -> IndexerDown:
        self._counts["refused"] += 1
        return IndexerDown(message)

    def _late(self, problem: str) -> IndexerDown:
        """Whether the indexer or only this request is slow, the probe finds out."""
        self._counts["timeout"] += 1
        self._problem = f"gave {problem}"
        self._suspect.set()
        return IndexerDown(f"the indexer {self._problem}")

    def _lost(self, problem: str) -> IndexerDown:
        self._counts["unreachable"] += 1
        self._set_down(f"cannot be reached: {problem}")
        self._suspect.set()
        return IndexerDown(f"the indexer {self._problem}")

    def _set_down(self, problem: str) -> None:
        self._problem = problem
        if self._up:
            self._up = False
            self._down_since = monotonic()
            self._counts["went_down"] += 1

    def _tell_down(self) -> None:
        if not self._is_told:
            self._is_told = True
            log.warning("the indexer %s %s; it is tried every second", self.url, self._problem)

    def _set_up(self) -> None:
        if not self._up:
            self._up = True
            down_s = monotonic() - self._down_since
            self._down_s += down_s
            if self._is_told:
                self._is_told = False
                log.warning("the indexer %s is up again after %.0f s", self.url, down_s)
            self._arrived.set()
            self._arrived = trio.Event()

    async def watch(self) -> None:
        """Probes when something is wrong, at most once a second; runs as long as the client is used."""
        while True:
            await self._probe()
            await trio.sleep(PROBE_S)
            while self._up and not self._suspect.is_set() and not self._is_slow():
                with trio.move_on_after(PROBE_S):
                    await self._suspect.wait()

    def _is_slow(self) -> bool:
        return bool(self._under_way) and monotonic() - next(iter(self._under_way.values())) > SLOW_S

    async def _probe(self) -> None:
        self._suspect = trio.Event()
        self._counts["probes"] += 1
        try:
            await self._prepare(self)
        except CommsError as error:
            self._set_down(error.message.removeprefix("the indexer "))
            self._tell_down()
            for scope in self._under_way:  # the same answer, without the wait for it
                scope.cancel()
        else:
            self._set_up()

    def statistics(self) -> dict[str, Any]:
        latencies_s = sorted(self._latencies_s)
        return {
            "url": self.url,
            "up": self._up,
            "problem": "" if self._up else self._problem,
            "down_s": round(self._down_s + (0.0 if self._up else monotonic() - self._down_since), 3),
            "under_way": len(self._under_way),
            "counts": dict(self._counts),
            "latency_ms": {
                name: round(1000 * _percentile(latencies_s, share), 3)
                for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
            },
        }


class Together(Generic[T]):
    """Those who come while a write is under way share the next one. Each returns when its own item is written."""

    def __init__(self, write: Callable[[list[T]], Awaitable[None]]) -> None:
        self._write = write
        self._turn = trio.Lock()
        self._waiting: list[_Item[T]] = []

    async def add(self, value: T) -> None:
        item = _Item(value)
        self._waiting.append(item)
        try:
            async with self._turn:
                if not item.is_done:
                    await self._write_all()
        finally:
            if not item.is_done:  # cancelled
                self._waiting.remove(item)
        if item.error is not None:
            raise item.error

    async def _write_all(self) -> None:
        items = list(self._waiting)
        error: CommsError | None = None
        try:
            await self._write([item.value for item in items])
        except CommsError as failure:
            error = failure
        for item in items:  # not reached when cancelled: then the next in turn writes them
            item.is_done, item.error = True, error
        del self._waiting[: len(items)]


class _Item(msgspec.Struct, Generic[T], eq=False):
    value: T
    is_done: bool = False
    error: CommsError | None = None


@asynccontextmanager
async def open_client(
    url: str,
    prepare: Callable[[Client], Awaitable[None]],
    *,
    ca: Path | None,
    auth: tuple[str, str] | None,
    prefix: str,
) -> AsyncGenerator[Client]:
    """A client, up or (after `START_S`) still down: then it becomes usable by itself as soon as the indexer answers."""
    client = Client(_transport(url, ca, auth), url, prefix, prepare)
    try:
        async with running(client.watch):
            with trio.move_on_after(START_S):
                await client.wait_up()
            yield client
    finally:
        client._transport.close()


@asynccontextmanager
async def running(task: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
    """As long as the body runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        yield
        nursery.cancel_scope.cancel()


def check_url(url: str, *, has_password: bool) -> None:
    """Raises BadUsage for one that cannot be right, Unsafe where the password would be in the clear."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadUsage(f"--indexer-url: expected the indexer as https://HOST:PORT, got {parts.scheme or 'no'} scheme")
    if parts.username is not None:
        raise BadUsage("--indexer-url: expected the indexer's URL without credentials", hint="--indexer-auth-file FILE")
    if has_password and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise Unsafe(
            f"--indexer-auth-file: its password would go to {parts.hostname} in the clear",
            hint=f"--indexer-url https://{parts.netloc}",
        )


def _transport(url: str, ca: Path | None, auth: tuple[str, str] | None) -> Any:
    import ssl

    from opensearchpy import Transport, Urllib3HttpConnection

    class Connection(Urllib3HttpConnection):
        """Keeps requests out of logs: their bodies hold hashes of keys, and a failure is told to who asked."""

        def log_request_success(self, *_: Any, **__: Any) -> None: ...

        def log_request_fail(self, *_: Any, **__: Any) -> None: ...

        def _raise_warnings(self, _: Any) -> None: ...

    check_url(url, has_password=auth is not None)
    parts = urlsplit(url)
    options: dict[str, Any] = {}
    if parts.scheme == "https":
        try:
            options["ssl_context"] = ssl.create_default_context(cafile=None if ca is None else str(ca))
        except (OSError, ssl.SSLError) as error:
            raise BadSetup(f"cannot use the indexer's CA {ca}: {error}") from error
    host = {"host": parts.hostname, "port": parts.port or (443 if parts.scheme == "https" else 80)}
    if parts.path.strip("/"):
        host["url_prefix"] = parts.path.strip("/")
    return Transport(
        [{**host, "use_ssl": parts.scheme == "https"}],
        connection_class=Connection,
        http_auth=auth,
        max_retries=0,
        retry_on_timeout=False,
        retry_on_status=(),
        pool_maxsize=THREADS + 1,
        **options,
    )


def precondition(over: Document | None) -> Source | None:
    """The parameters by which a change is made only over that state of the document."""
    return None if over is None else {"if_seq_no": over.seq_no, "if_primary_term": over.primary_term}


def _document(answer: Source, *, empty_ok: bool = False) -> Document | None:
    error = answer.get("error")  # of one item of an mget
    if error and not (empty_ok and error.get("type") == "index_not_found_exception"):
        kind = NoShard if error.get("type") == "no_shard_available_action_exception" else IndexerDown
        raise kind(f"the indexer could not read a document: {_reason(answer)}")
    if not answer.get("found"):
        return None
    return Document(answer["_id"], answer["_source"], answer["_seq_no"], answer["_primary_term"])


def _bulk_bodies(operations: Iterable[tuple[Source, Source | None]]) -> Iterator[list[bytes]]:
    """Lines of one request each."""
    lines: list[bytes] = []
    size_bytes = 0
    for operation in operations:
        for part in operation:
            if part is not None:
                lines.append(msgspec.json.encode(part) + b"\n")
                size_bytes += len(lines[-1])
        if size_bytes >= BULK_BYTES or len(lines) >= BULK_LINES:
            yield lines
            lines, size_bytes = [], 0
    if lines:
        yield lines


def _slices(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[at : at + size] for at in range(0, len(values), size))


def _written(answer: Source, id: str, source: Source) -> Document:
    return Document(id, source, answer["_seq_no"], answer["_primary_term"])


def _reason(body: Json) -> str:
    """The indexer's own words, short."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = f"{error.get('type', '')}: {error.get('reason', '')}" if "type" in error else "no reason given"
    return str(error)[:300]


def _cause(error: Any) -> str:
    """Of a connection that failed, without the library's wrappings."""
    return type(error.info).__name__ if isinstance(error.info, Exception) else type(error).__name__


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
