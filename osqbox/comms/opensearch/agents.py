"""Agents in an indexer that several boxes share. One document each; another holds their name, so that it is unique.

Changes are optimistic: read, change, store only over what was read, else again. Then the journal tells every box.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from osqbox import audit
from osqbox.clock import Clock
from osqbox.comms.errors import CommsError, conflict, not_found
from osqbox.comms.messages import Agent, AgentStatus, Change, Credentials, Json
from osqbox.comms.registration import check_groups, check_name, check_tenant, check_uuid
from osqbox.comms.seams import Groups
from osqbox.comms.sqlite.agents import TAKEN_NAME, TAKEN_UUID
from osqbox.store import Store, Tx

from .client import Client, Conflict, Document, Source, Together
from .commands import OpenSearchCommands
from .journal import Journal
from .kept import Kept

TRIES = 10
"""How often a change is tried anew when somebody else was quicker."""
CLAIM_S = 60.0
"""A name whose agent does not exist this long after the name was taken was left behind by a box that died."""
PAGE_MAX = 5000
WITHOUT_KEY = {"excludes": ["key_hash"]}
Login = tuple[str, float, Mapping[str, Json]]


class OpenSearchAgents:
    """The seam `Agents`."""

    def __init__(
        self, client: Client, journal: Journal, groups: Groups, commands: OpenSearchCommands, store: Store, clock: Clock
    ) -> None:
        self._client, self._journal, self._groups, self._commands = client, journal, groups, commands
        self._store, self._clock = store, clock
        self._kept: Kept[str, Agent] = Kept(self._read, clock)
        self._logins: Together[Login] = Together(self._write_logins)

    # reading

    async def find(self, uuid: str) -> Agent | None:
        return await self._kept.find(uuid) if _is_uuid(uuid) else None

    async def _read(self, uuid: str) -> Agent | None:
        document = await self._client.get("agents", uuid)
        return None if document is None else _agent(document.source)

    async def credentials(self, uuid: str) -> Credentials | None:
        document = await self._client.get("agents", uuid) if _is_uuid(uuid) else None
        if document is None:
            return None
        return Credentials(agent=_agent(document.source), key_hash=document.source["key_hash"])

    async def page(
        self, *, tenant: str | None = None, group: str | None = None, after: str = "", limit: int = 100, text: str = ""
    ) -> list[Agent]:
        where: list[Source] = [
            {"term": {field: value}} for field, value in (("tenant", tenant), ("groups", group)) if value is not None
        ]
        if text:
            pattern = {"value": f"*{_literal(text)}*", "case_insensitive": True}
            either = [{"wildcard": {field: pattern}} for field in ("name", "uuid")]
            where.append({"bool": {"should": either, "minimum_should_match": 1}})
        await self._client.refresh("agents")
        return [_agent(source) for source in await self._sources(where, after, min(limit, PAGE_MAX), WITHOUT_KEY)]

    async def _sources(self, where: Sequence[Source], after: str, limit: int, wanted: Json) -> list[Source]:
        """Of the agents behind ``after`` in the order of uuid."""
        body: Source = {"size": limit, "query": _all_of(where), "sort": [{"uuid": "asc"}], "_source": wanted}
        if after:
            body["search_after"] = [after]
        answer = await self._client.search("agents", body)
        return [hit["_source"] for hit in answer["hits"]["hits"]]

    async def addressed(
        self, tenant: str, *, agents: Sequence[str] = (), groups: Sequence[str] = (), everyone: bool = False
    ) -> list[str]:
        named = list(dict.fromkeys(agents))
        found = await self._client.mget("agents", [uuid for uuid in named if _is_uuid(uuid)])
        known = {each.id: each.source for each in found if each is not None and each.source["tenant"] == tenant}
        for uuid in named:
            if uuid not in known:
                raise not_found(f"Agent {uuid!r}")
        for group in groups:
            if await self._groups.find(tenant, group) is None:
                raise not_found(f"Group {group!r}")
        uuids = {uuid for uuid, source in known.items() if source["status"] != AgentStatus.REVOKED}
        if everyone or groups:
            uuids.update(await self._members(tenant, None if everyone else groups))
        return sorted(uuids)

    async def _members(self, tenant: str, groups: Sequence[str] | None) -> list[str]:
        where: list[Source] = [{"term": {"tenant": tenant}}]
        if groups is not None:
            where.append({"terms": {"groups": list(groups)}})
        where.append({"bool": {"must_not": [{"term": {"status": AgentStatus.REVOKED.value}}]}})
        await self._client.refresh("agents")
        uuids: list[str] = []
        while True:
            some = await self._sources(where, uuids[-1] if uuids else "", PAGE_MAX, ["uuid"])
            uuids += [source["uuid"] for source in some]
            if len(some) < PAGE_MAX:
                return uuids

    # changing

    async def add(self, agent: Agent, key_hash: str, *, actor: str) -> Agent:
        check_groups(agent.groups)
        self._store.peek(partial(check_tenant, name=agent.tenant))
        with self._client.whole_answer():
            if await self._client.get("agents", agent.uuid) is not None:
                raise _taken_uuid(agent.uuid)
            await self._check_groups(agent.tenant, agent.groups)
            await self._take_name(agent)
            try:
                await self._client.create("agents", agent.uuid, _source(agent, key_hash))
            except Conflict:
                await self._release_name(agent)
                raise _taken_uuid(agent.uuid) from None
            await self._tell(agent)

        def record(tx: Tx) -> None:
            audit.record(tx, actor, "agent.add", agent.uuid, tenant=agent.tenant, name=agent.name, groups=agent.groups)
            tx.emit("comms_agent_added", tenant=agent.tenant, agent=agent.uuid, name=agent.name)

        await self._store.write(record)
        return agent

    async def change(
        self,
        uuid: str,
        *,
        actor: str,
        name: str | None = None,
        groups: Sequence[str] | None = None,
        status: AgentStatus | None = None,
        key_hash: str | None = None,
    ) -> Agent:
        with self._client.whole_answer():
            before, after = await self._change(uuid, name, groups, status, key_hash)
            await self._tell(after)
        changed: dict[str, Any] = {
            each: getattr(after, each)
            for each in ("name", "groups", "status", "key_version")
            if getattr(after, each) != getattr(before, each)
        }
        is_revoked_now = status is AgentStatus.REVOKED is not before.status

        def record(tx: Tx) -> None:
            action = "agent.revoke" if is_revoked_now else "agent.change"
            audit.record(tx, actor, action, uuid, tenant=after.tenant, changed=changed)
            tx.emit("comms_agent_changed", tenant=after.tenant, agent=uuid, name=after.name, changed=sorted(changed))

        await self._store.write(record)
        return after

    async def _change(
        self,
        uuid: str,
        name: str | None,
        groups: Sequence[str] | None,
        status: AgentStatus | None,
        key_hash: str | None,
    ) -> tuple[Agent, Agent]:
        for _ in range(TRIES):
            document = await self._get(uuid)
            before = _agent(document.source)
            is_revoked_now = status is AgentStatus.REVOKED is not before.status
            after = msgspec.structs.replace(
                before,
                name=before.name if name is None else name,
                groups=before.groups if groups is None else tuple(groups),
                status=_status(before, status),
                key_version=before.key_version + (is_revoked_now or key_hash is not None),
            )
            if groups is not None:
                check_groups(groups)
                await self._check_groups(before.tenant, groups)
            if after.name != before.name:
                check_name(after.name)
                await self._take_name(after)
            try:
                source = _source(after, key_hash or document.source["key_hash"])
                await self._client.put("agents", uuid, source, over=document)
            except Conflict:
                continue
            if after.name != before.name:
                await self._release_name(before)
            return before, after
        raise Conflict(f"agent {uuid!r}")

    async def delete(self, uuid: str, *, actor: str) -> None:
        with self._client.whole_answer():
            agent = await self._delete(uuid, actor)
            await self._tell(agent)

        def record(tx: Tx) -> None:
            audit.record(tx, actor, "agent.delete", uuid, tenant=agent.tenant, name=agent.name)
            tx.emit("comms_agent_deleted", tenant=agent.tenant, agent=uuid, name=agent.name)

        await self._store.write(record)

    async def _delete(self, uuid: str, actor: str) -> Agent:
        for _ in range(TRIES):
            document = await self._get(uuid)
            agent = _agent(document.source)
            await self._commands.cancel_of_agent(uuid, actor=actor)
            try:
                await self._client.delete("agents", uuid, over=document)
            except Conflict:
                continue
            await self._release_name(agent)
            return agent
        raise Conflict(f"agent {uuid!r}")

    async def _tell(self, *agents: Agent) -> None:
        """This box reads them anew from now on; the others, and this one's streams, hear of it by the journal."""
        for agent in agents:
            self._kept.forget(agent.uuid)
        await self._journal.tell(
            *(Change(kind="agents", agents=(agent.uuid,), tenant=agent.tenant) for agent in agents)
        )

    def heard(self, change: Change) -> None:
        """News from the journal."""
        if change.kind == "agents":
            for uuid in change.agents or (None,):
                self._kept.forget(uuid)

    async def _get(self, uuid: str) -> Document:
        document = await self._client.get("agents", uuid) if _is_uuid(uuid) else None
        if document is None:
            raise not_found(f"Agent {uuid!r}")
        return document

    async def _check_groups(self, tenant: str, names: Sequence[str]) -> None:
        for name in names:
            if await self._groups.find(tenant, name) is None:
                raise not_found(f"Group {name!r}")

    # names

    async def _take_name(self, agent: Agent) -> None:
        name, now = _name_id(agent), self._clock.now()
        claim: Source = {"tenant": agent.tenant, "name": agent.name, "uuid": agent.uuid, "at": now}
        try:
            await self._client.create("agent-names", name, claim)
        except Conflict:
            held = await self._client.get("agent-names", name)
            if held is None or (await self._is_held(held, now) and held.source["uuid"] != agent.uuid):
                raise conflict(f"an agent named {agent.name!r} exists already", code=TAKEN_NAME) from None
            await self._client.put("agent-names", name, claim, over=held)

    async def _is_held(self, claim: Document, now: float) -> bool:
        if abs(now - claim.source["at"]) < CLAIM_S:
            return True
        holder = await self._client.get("agents", claim.source["uuid"])
        return holder is not None and _name_id(_agent(holder.source)) == claim.id

    async def _release_name(self, agent: Agent) -> None:
        claim = await self._client.get("agent-names", _name_id(agent))
        if claim is not None and claim.source["uuid"] == agent.uuid:
            await self._client.delete("agent-names", claim.id, over=claim)

    # what happens all the time

    async def note_login(self, uuid: str, at: float, facts: Mapping[str, Json]) -> None:
        """A fleet that logs in at once shares a few writes."""
        await self._logins.add((uuid, at, facts))

    async def _write_logins(self, logins: list[Login]) -> None:
        newest = {uuid: (at, facts) for uuid, at, facts in logins}

        def logged_in(agent: Agent) -> Agent:
            at, facts = newest[agent.uuid]
            told = {name: facts[name] for name in ("type", "version", "host") if facts.get(name) is not None}
            status = agent.status if agent.status is AgentStatus.REVOKED else AgentStatus.ACTIVE
            seen_at = max(agent.last_seen_at or 0.0, at)
            return msgspec.structs.replace(agent, status=status, last_login_at=at, last_seen_at=seen_at, **told)

        changed = await self._change_many(list(newest), logged_in)
        for _, after in changed:
            self._kept.forget(after.uuid)
        news = [after for before, after in changed if _is_news(before, after)]
        if news:
            await self._tell(*news)

    async def note_seen(self, seen: Mapping[str, float]) -> None:
        await self._change_many(
            list(seen),
            lambda agent: msgspec.structs.replace(agent, last_seen_at=max(agent.last_seen_at or 0.0, seen[agent.uuid])),
        )

    async def _change_many(self, uuids: Sequence[str], change: Callable[[Agent], Agent]) -> list[tuple[Agent, Agent]]:
        """Those that were changed, before and after; who was changed by somebody else meanwhile is tried again."""
        done: list[tuple[Agent, Agent]] = []
        left = [uuid for uuid in uuids if _is_uuid(uuid)]
        for _ in range(TRIES):
            documents = [each for each in await self._client.mget("agents", left) if each is not None]
            pairs = [(each, _agent(each.source), change(_agent(each.source))) for each in documents]
            pairs = [each for each in pairs if each[1] != each[2]]
            if not pairs:
                break
            operations = [
                (
                    {"index": {"_id": each.id, "if_seq_no": each.seq_no, "if_primary_term": each.primary_term}},
                    _source(after, each.source["key_hash"]),
                )
                for each, _, after in pairs
            ]
            items = await self._client.bulk("agents", operations)
            is_stored = [item["status"] < 300 for item in items]
            done += [(before, after) for (_, before, after), ok in zip(pairs, is_stored, strict=True) if ok]
            left = [each.id for (each, _, _), ok in zip(pairs, is_stored, strict=True) if not ok]
            if not left:
                break
        return done

    def statistics(self) -> dict[str, int]:
        return {"kept": len(self._kept), "hits": self._kept.hits, "misses": self._kept.misses}


def _is_uuid(uuid: str) -> bool:
    try:
        check_uuid(uuid)
    except CommsError:
        return False
    return True


def _status(before: Agent, wanted: AgentStatus | None) -> AgentStatus:
    """An agent that is allowed again is what it was before."""
    if wanted is None or wanted is AgentStatus.REVOKED:
        return wanted or before.status
    return AgentStatus.NEVER_CONNECTED if before.last_login_at is None else AgentStatus.ACTIVE


def _is_news(before: Agent, after: Agent) -> bool:
    """Whether other boxes have to know; times alone they read when they are asked for them."""
    return (before.status, before.type, before.version, before.host) != (
        *(after.status, after.type, after.version, after.host),
    )


def _taken_uuid(uuid: str) -> CommsError:
    return conflict(f"an agent with the id {uuid!r} exists already", code=TAKEN_UUID)


def _name_id(agent: Agent) -> str:
    return hashlib.sha256(f"{agent.tenant}\n{agent.name}".encode()).hexdigest()


def _literal(text: str) -> str:
    """For a wildcard query."""
    return "".join(f"\\{char}" if char in "\\*?" else char for char in text)


def _all_of(where: Sequence[Source]) -> Source:
    return {"bool": {"filter": list(where)}} if where else {"match_all": {}}


def _source(agent: Agent, key_hash: str) -> Source:
    source: Source = msgspec.to_builtins(agent)
    return {**source, "key_hash": key_hash}


def _agent(source: Source) -> Agent:
    return msgspec.convert(source, Agent)
