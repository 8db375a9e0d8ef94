"""Stateful events in an indexer that several boxes share: applied once, answered when the indexer has confirmed.

A request is three round trips: read the documents it is about, with the answer to the agent's last request; store what
they become, each only over what was read; store the answer. Each document says which attempt wrote it, so that the
same request, sent again after a failure in the middle, finds what is done and does the rest. What it is going to delete
is written down before, because a deleted document says nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence

import msgspec

from osqbox.clock import Clock
from osqbox.comms.bodies import agent_facts
from osqbox.comms.errors import IndexerDown, bad_request
from osqbox.comms.messages import Agent, Applied, Json, Operation, StateChange, StateDocument
from osqbox.comms.sqlite.states import DIGEST, DOCUMENTS_MAX, PAGE_MAX
from osqbox.store import Store

from .client import Client, Document, Source
from .mapping import STATES, is_state_index

TRIES = 5
"""How often a request is tried anew when another of the same agent touched the same documents."""
ID_BYTES = 512
"""As OpenSearch allows for a document's."""
WORDS_CHARS = 8192
"""Of a document, searchable."""
CONFLICT, NOT_FOUND = 409, 404

Address = tuple[str, str]
"""Index and id of a document."""


class _Slot(msgspec.Struct):
    """One document on its way through a request."""

    address: Address
    stored: Document | None
    data: dict[str, Json] | None
    """What it is to become; None: it is not to be there."""
    version: int
    is_changed: bool = False
    answers: list[Applied] = msgspec.field(default_factory=list)

    @property
    def is_deleted(self) -> bool:
        return self.is_changed and self.data is None and self.stored is not None


class _Before(msgspec.Struct, frozen=True):
    """What is known of the agent's requests."""

    last: Document | None
    """The last one that was answered, and how many documents the agent has."""
    same: Document | None
    """This one, answered; only if its sender named it."""
    intent: Document | None
    """What this one was going to delete."""

    def answer(self, batch: str) -> list[Applied] | None:
        """A body's digest means a repetition only while nothing else of the agent came after it (as in SQLite)."""
        found = self.last if batch.startswith(DIGEST) else self.same
        if not batch or found is None or found.source["batch"] != batch:
            return None
        return msgspec.convert(found.source["answer"]["items"], list[Applied])

    def deleted(self, mark: str) -> dict[str, list[Applied]]:
        if self.intent is None or self.intent.source["batch"] != mark:
            return {}
        return msgspec.convert(self.intent.source["answer"]["deleted"], dict[str, list[Applied]])

    @property
    def documents(self) -> int:
        return int(self.last.source["documents"]) if self.last else 0


class OpenSearchStates:
    """The seam `States`."""

    def __init__(self, client: Client, store: Store, clock: Clock) -> None:
        self._client, self._store, self._clock = client, store, clock

    # changing

    async def apply(self, agent: Agent, changes: Sequence[StateChange], *, batch: str) -> list[Applied]:
        with self._client.whole_answer():
            answer, is_new = await self._apply(agent, changes, batch)
        stored = sum(applied.status < 300 for applied in answer)
        if stored and is_new:
            await self._store.write(
                lambda tx: tx.emit("comms_states_stored", tenant=agent.tenant, agent=agent.uuid, count=stored)
            )
        return answer

    async def _apply(self, agent: Agent, changes: Sequence[StateChange], batch: str) -> tuple[list[Applied], bool]:
        """The answer, and whether it is given for the first time."""
        problems = [_problem(change) for change in changes]
        good = [change for change, problem in zip(changes, problems, strict=True) if problem is None]
        addresses = list(dict.fromkeys(_address(agent, change) for change in good))
        mark: str | None = None
        for _ in range(TRIES):
            before, stored = await self._read(agent, batch, addresses)
            if (answer := before.answer(batch)) is not None:
                return answer, False
            if mark is None:
                mark = f"{before.last.seq_no if before.last else ''}:{batch}"
            slots = _slots(addresses, stored)
            room = _fold(agent, good, slots, mark, before)
            if await self._store_slots(agent, batch, mark, before, slots):
                answers = {address: iter(slot.answers) for address, slot in slots.items()}
                answer = [
                    problem or next(answers[_address(agent, change)])
                    for change, problem in zip(changes, problems, strict=True)
                ]
                if batch:
                    await self._remember(agent, batch, answer, room)
                return answer, True
        raise IndexerDown("other requests of this agent keep changing the same documents")

    async def _read(
        self, agent: Agent, batch: str, addresses: Sequence[Address]
    ) -> tuple[_Before, list[Document | None]]:
        own = [("batches", name) for name in (_last_id(agent), _same_id(agent, batch), _intent_id(agent, batch))]
        found = await self._client.read([*own, *addresses])
        return _Before(*found[: len(own)]), found[len(own) :]

    async def _store_slots(
        self, agent: Agent, batch: str, mark: str, before: _Before, slots: dict[Address, _Slot]
    ) -> bool:
        """Whether all of it stands; not so when somebody else was quicker."""
        changed = [slot for slot in slots.values() if slot.is_changed]
        if deleted := {"/".join(slot.address): slot.answers for slot in changed if slot.is_deleted}:
            intent = {**before.deleted(mark), **deleted}
            await self._client.put(
                "batches", _intent_id(agent, batch), self._batch(agent, mark, {"deleted": msgspec.to_builtins(intent)})
            )
        facts, now = agent_facts(agent), self._clock.now()
        operations = [
            (_action(slot, self._client), None if slot.is_deleted else _source(agent, facts, slot, mark, now))
            for slot in changed
        ]
        is_complete = True
        for slot, item in zip(changed, await self._client.bulk("batches", operations), strict=True):
            if item["status"] in (CONFLICT, NOT_FOUND):
                is_complete = False
            elif item["status"] >= 300:
                refusal = str(item["error"].get("reason", ""))[:300]
                slot.answers = [
                    Applied(id=answer.id, result=f"the indexer refused it: {refusal}", status=400)
                    for answer in slot.answers
                ]
        return is_complete

    async def _remember(self, agent: Agent, batch: str, answer: list[Applied], documents: int) -> None:
        kept = self._batch(agent, batch, {"items": msgspec.to_builtins(answer)})
        operations: list[tuple[Source, Source | None]] = [
            ({"index": {"_id": _last_id(agent)}}, {**kept, "documents": documents})
        ]
        if not batch.startswith(DIGEST):
            operations.append(({"index": {"_id": _same_id(agent, batch)}}, kept))
        for item in await self._client.bulk("batches", operations):
            if item["status"] >= 300:
                raise IndexerDown("the indexer refused to keep an answer")

    def _batch(self, agent: Agent, batch: str, answer: Source) -> Source:
        return {"agent": agent.uuid, "batch": batch, "at": self._clock.now(), "answer": answer}

    async def forget_answers(self, keep_s: float) -> int:
        """Those to named requests older than that, and intents; how many. The last answer of an agent stays."""
        old = {"range": {"at": {"lt": self._clock.now() - keep_s}}}
        query = {"bool": {"filter": [old], "must_not": [{"exists": {"field": "documents"}}]}}
        answer = await self._client.call(
            "POST",
            self._client.path("batches", "_delete_by_query"),
            params={"conflicts": "proceed"},
            body={"query": query},
        )
        return int(answer["deleted"])

    # reading

    async def find(self, tenant: str, agent: str, index: str, id: str) -> StateDocument | None:
        if not is_state_index(index):
            return None
        [found] = await self._client.read([(index, _document_id(agent, id))])
        return _state(found.source) if found and found.source["tenant"] == tenant else None

    async def search(
        self,
        *,
        tenant: str | None = None,
        agent: str | None = None,
        index: str | None = None,
        text: str = "",
        limit: int = 100,
        after: str = "",
    ) -> tuple[list[StateDocument], str]:
        fields = (("tenant", tenant), ("agent_id", agent), ("index", index))
        where: list[Source] = [{"term": {field: value}} for field, value in fields if value is not None]
        if text:
            where.append({"bool": {"should": _in_words_or_id(text), "minimum_should_match": 1}})
        limit = max(1, min(limit, PAGE_MAX))
        body: Source = {
            "size": limit + 1,
            "query": {"bool": {"filter": where}} if where else {"match_all": {}},
            "sort": [{name: {"order": "asc", "unmapped_type": "keyword"}} for name in ("agent_id", "index", "id")],
        }
        if after:
            body["search_after"] = _read_cursor(after)
        pattern = index if index is not None and is_state_index(index) else STATES
        await self._client.refresh(pattern)
        hits = (await self._client.search(pattern, body))["hits"]["hits"]
        cursor = _cursor(hits[limit - 1]["sort"]) if len(hits) > limit else ""
        return [_state(hit["_source"]) for hit in hits[:limit]], cursor

    async def count(self) -> dict[str, int]:
        """Documents by index, of a second ago."""
        body = {"size": 0, "query": {"match_all": {}}, "aggs": {"indices": {"terms": {"field": "index", "size": 1000}}}}
        answer = await self._client.search(STATES, body)
        if "aggregations" not in answer:  # no index yet
            return {}
        buckets = answer["aggregations"]["indices"]["buckets"]
        return {bucket["key"]: bucket["doc_count"] for bucket in sorted(buckets, key=lambda bucket: bucket["key"])}


def _problem(change: StateChange) -> Applied | None:
    """Why a change cannot be stored, if so."""
    if not is_state_index(change.index):
        return _refused(change, f"expected an index such as wazuh-states-fim, got {change.index[:80]!r}")
    if not change.id or len(change.id.encode(errors="replace")) > ID_BYTES:
        return _refused(change, f"expected an id of 1-{ID_BYTES} bytes")
    if change.operation is not Operation.DELETE and change.data is None:
        return _refused(change, "expected data, got none")
    try:
        msgspec.json.encode((change.id, change.data))
    except (OverflowError, UnicodeEncodeError, TypeError, RecursionError) as error:
        return _refused(change, f"expected JSON, got something else: {error}")
    return None


def _refused(change: StateChange, why: str) -> Applied:
    return Applied(id=change.id, result=why, status=400)


# a request and its documents


def _slots(addresses: Sequence[Address], stored: Sequence[Document | None]) -> dict[Address, _Slot]:
    return {
        address: _Slot(
            address,
            document,
            document.source["data"] if document else None,
            document.source["version"] if document else 0,
        )
        for address, document in zip(addresses, stored, strict=True)
    }


def _fold(agent: Agent, changes: Sequence[StateChange], slots: dict[Address, _Slot], mark: str, before: _Before) -> int:
    """Apply the changes to the slots in order, but those that an earlier attempt has applied already.

    Returns how many documents the agent has then.
    """
    deleted = before.deleted(mark)
    done = set()
    for address, slot in slots.items():
        if slot.stored is not None and slot.stored.source["batch"] == mark:
            slot.answers = msgspec.json.decode(slot.stored.source["answers"], type=list[Applied])
            done.add(address)
        elif slot.stored is None and (answers := deleted.get("/".join(address))):
            slot.answers = answers
            done.add(address)
    documents = before.documents
    for change in changes:
        address = _address(agent, change)
        if address not in done:
            slot = slots[address]
            was_there = slot.data is not None
            slot.answers.append(_apply_one(slot, change, is_full=documents >= DOCUMENTS_MAX))
            documents += (slot.data is not None) - was_there
    return documents


def _apply_one(slot: _Slot, change: StateChange, *, is_full: bool) -> Applied:
    """As `sqlite.states` does it."""
    if change.operation is Operation.DELETE:
        if slot.data is None:
            return Applied(id=change.id, result="not_found", status=404)
        slot.data, slot.version, slot.is_changed = None, 0, True
        return Applied(id=change.id, result="deleted", status=200)
    if slot.data is None and is_full:
        why = f"too many documents: expected at most {DOCUMENTS_MAX} of one agent; delete some first"
        return Applied(id=change.id, result=why, status=429)
    is_new = slot.data is None
    if change.operation is Operation.CREATE and not is_new:
        if _canonical(slot.data) == _canonical(change.data):
            return Applied(id=change.id, result="created", status=201)
        return Applied(id=change.id, result="version conflict: it exists already, with other data", status=409)
    slot.data, slot.version, slot.is_changed = change.data, slot.version + 1, True
    return Applied(id=change.id, result="created" if is_new else "updated", status=201 if is_new else 200)


def _canonical(data: Json) -> bytes:
    return msgspec.json.encode(data, order="sorted")


def _action(slot: _Slot, client: Client) -> Source:
    index, name = slot.address
    target: Source = {"_index": client.index_name(index), "_id": name}
    if slot.stored is None:
        return {"create": target}
    target |= {"if_seq_no": slot.stored.seq_no, "if_primary_term": slot.stored.primary_term}
    return {"delete" if slot.data is None else "index": target}


def _source(agent: Agent, facts: Source, slot: _Slot, mark: str, now: float) -> Source:
    return {
        "index": slot.address[0],
        "id": slot.answers[-1].id,
        "agent_id": agent.uuid,
        "tenant": agent.tenant,
        "version": slot.version,
        "changed_at": now,
        "agent": facts,
        "data": slot.data,
        "words": " ".join(_words(slot.data))[:WORDS_CHARS],
        "batch": mark,
        "answers": msgspec.json.encode(slot.answers).decode(),
    }


def _words(value: Json) -> Iterator[str]:
    match value:
        case dict():
            for name, inner in value.items():
                yield name
                yield from _words(inner)
        case list():
            for inner in value:
                yield from _words(inner)
        case str():
            yield value
        case bool() | int() | float():
            yield msgspec.json.encode(value).decode()


def _state(source: Source) -> StateDocument:
    return StateDocument(
        index=source["index"],
        id=source["id"],
        agent=source["agent_id"],
        tenant=source["tenant"],
        version=source["version"],
        data={**source["data"], "agent": source["agent"]},
        changed_at=source["changed_at"],
    )


# names of documents; an agent's uuid holds no slash


def _address(agent: Agent, change: StateChange) -> Address:
    return change.index, _document_id(agent.uuid, change.id)


def _document_id(agent: str, id: str) -> str:
    plain = f"{agent}/{id}"
    return plain if len(plain.encode()) <= ID_BYTES else f"{agent}/sha256:{_digest(id)}"


def _last_id(agent: Agent) -> str:
    return agent.uuid


def _same_id(agent: Agent, batch: str) -> str:
    return f"{agent.uuid}/answer/{_digest(batch)}"


def _intent_id(agent: Agent, batch: str) -> str:
    return f"{agent.uuid}/intent/{_digest(batch)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# searching


def _in_words_or_id(text: str) -> list[Source]:
    """All words, each as the beginning of one in the document; or the text anywhere in the id."""
    quoted = (f"{word}*" if word.isalnum() else '"' + word.replace('"', " ") + '"' for word in text.split())
    literal = "".join(f"\\{char}" if char in "\\*?" else char for char in text)
    return [
        {"simple_query_string": {"query": " ".join(quoted), "fields": ["words"], "default_operator": "and"}},
        {"wildcard": {"id": {"value": f"*{literal}*", "case_insensitive": True}}},
    ]


def _cursor(last: Sequence[Json]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(last)).decode()


def _read_cursor(after_untrusted: str) -> tuple[str, str, str]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(after_untrusted), type=tuple[str, str, str])
    except (ValueError, msgspec.DecodeError):
        raise bad_request(f"after: expected a cursor of the page before, got {after_untrusted[:40]!r}") from None
