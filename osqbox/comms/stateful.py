"""A stateful request: its documents stored, its commands' results taken, and one answer for each item."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from osqbox.store import Tx

from .bodies import MODULES, Bad, ResultReport, Stateful
from .messages import Agent, Applied, Json, Profile, ResultOutcome, StateChange
from .seams import Indexer

NOTED_ITEMS = 5


class ItemResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one item, as the answer tells it."""

    index: str
    id: str
    result: str
    status: int
    code: int = 0
    """The protocol's number for a refusal: 1763, 1765, 2709."""


_OUTCOMES: Mapping[ResultOutcome, tuple[str, int]] = MappingProxyType(
    {
        ResultOutcome.TAKEN: ("updated", 200),
        ResultOutcome.REPEATED: ("updated", 200),
        ResultOutcome.ENDED: ("the command had ended before its result came", 409),
        ResultOutcome.FOREIGN: ("not_found", 404),
    }
)
"""What an agent reads of its command's result; a repeated one gets the same answer."""


def batch_name(body: bytes, idempotency_key: str | None = None) -> str:
    """What this request is recognised by when it is sent again.

    The digest of the body is part of it, so that a key used for another body does not hide that one.
    """
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    return f"key:{idempotency_key}:{digest}" if idempotency_key else digest


async def apply(indexer: Indexer, agent: Agent, parsed: Stateful, *, batch: str, now: float) -> list[ItemResult]:
    """One result for each item, in order; all of them are durable. Raises IndexerDown: nothing may be taken as stored.

    The results of commands go first, in their order. After a failure the whole request is sent again and finds what
    was done: results that are taken already, and the batch.
    """
    outcomes = [
        await indexer.commands.take_result(agent.uuid, item.id, item.result, now)
        for item in parsed.items
        if isinstance(item, ResultReport)
    ]
    changes = [item for item in parsed.items if isinstance(item, StateChange)]
    applied = await indexer.states.apply(_as_told(agent, parsed.facts), changes, batch=batch) if changes else []
    return _in_order(parsed, outcomes, applied)


def _in_order(parsed: Stateful, outcomes: Sequence[ResultOutcome], applied: Sequence[Applied]) -> list[ItemResult]:
    next_outcome, next_applied = iter(outcomes), iter(applied)
    results = []
    for item in parsed.items:
        match item:
            case Bad():
                results.append(ItemResult("", item.id, item.message, 400, item.code))
            case ResultReport():
                result, status = _OUTCOMES[next(next_outcome)]
                results.append(ItemResult(MODULES["command"], item.id, result, status))
            case StateChange():
                done = next(next_applied)
                results.append(ItemResult(item.index, done.id, done.result, done.status))
    return results


def answer(profile: Profile, results: Sequence[ItemResult]) -> bytes:
    """The body of the 200. The spike's says whether any item was refused; g1's has the results only."""
    if profile is Profile.G1:
        return msgspec.json.encode({"results": results})
    return msgspec.json.encode({"results": results, "errors": any(is_refused(result) for result in results)})


def is_refused(result: ItemResult) -> bool:
    return result.status >= 300


def note_refused(tx: Tx, agent: Agent, results: Sequence[ItemResult]) -> None:
    """Tell the feed which items were refused: an agent that reads only the status of the answer loses them silently."""
    refused = [result for result in results if is_refused(result)]
    if refused:
        first = msgspec.to_builtins(refused[:NOTED_ITEMS])
        tx.emit("comms_items_refused", tenant=agent.tenant, agent=agent.uuid, count=len(refused), first=first)


def _as_told(agent: Agent, facts: Mapping[str, Json]) -> Agent:
    """The agent with what line 1 says of its host; who it is and its groups are as the box knows them."""
    host, version = facts.get("host"), facts.get("version")
    if isinstance(host, dict):
        agent = msgspec.structs.replace(agent, host=host)
    if isinstance(version, str):
        agent = msgspec.structs.replace(agent, version=version)
    return agent
