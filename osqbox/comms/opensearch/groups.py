"""Groups and their configurations in an indexer that several boxes share.

The current configuration of a group is one document, changed only over the one that was read; the earlier ones are
copied aside before it is replaced, so a box that dies in between leaves nothing to repair.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import msgspec

from osqbox import audit
from osqbox.clock import Clock
from osqbox.comms.errors import conflict, not_found
from osqbox.comms.messages import Change, Group
from osqbox.comms.registration import DEFAULT_GROUP, check_group_name, check_tenant
from osqbox.comms.sqlite.groups import GROUPS_MAX, KEPT_VERSIONS, encoded
from osqbox.store import Store, Tx

from .client import Client, Conflict, Document, Source
from .journal import Journal
from .kept import Kept

TRIES = 10
"""How often a change is tried anew when somebody else was quicker."""


class OpenSearchGroups:
    """The seam `Groups`."""

    def __init__(self, client: Client, journal: Journal, store: Store, clock: Clock) -> None:
        self._client, self._journal, self._store, self._clock = client, journal, store, clock
        self._kept: Kept[tuple[str, str], Group] = Kept(self._read, clock)

    async def find(self, tenant: str, name: str) -> Group | None:
        return await self._kept.find((tenant, name))

    async def _read(self, key: tuple[str, str]) -> Group | None:
        document = await self._client.get("groups", _id(*key))
        return _group(document) or _unwritten(*key)

    async def put(
        self, tenant: str, name: str, configuration: str, *, actor: str, expected_version: int | None
    ) -> Group:
        check_group_name(name)
        data = encoded(configuration)
        self._store.peek(partial(check_tenant, name=tenant))
        digest = hashlib.sha256(data).hexdigest()
        with self._client.whole_answer():
            group, is_changed = await self._put(tenant, name, configuration, digest, actor, expected_version)
            if is_changed:
                self._kept.forget()
                await self._journal.tell(Change(kind="groups", tenant=tenant))
        if is_changed:
            await self._record("group.put", group, actor, version=group.version, sha256=group.sha256)
        return group

    async def _put(
        self, tenant: str, name: str, configuration: str, digest: str, actor: str, expected_version: int | None
    ) -> tuple[Group, bool]:
        for _ in range(TRIES):
            document = await self._client.get("groups", _id(tenant, name))
            before = _group(document) or _unwritten(tenant, name)
            version = before.version if before else 0
            if expected_version is not None and expected_version != version:
                raise conflict(
                    f"group {name!r}: expected version {expected_version}, got {version}; read it again first"
                )
            if before is not None and configuration == before.configuration:
                return before, False
            if document is None:
                await self._check_room(tenant)
            is_configured = bool(version or configuration)
            group = Group(
                tenant=tenant,
                name=name,
                configuration=configuration,
                version=version + is_configured,
                sha256=digest if is_configured else "",
                changed_at=self._clock.now(),
                changed_by=actor,
            )
            try:
                await self._replace(document, before, group)
            except Conflict:
                continue
            return group, True
        raise Conflict(f"group {name!r}")

    async def _replace(self, document: Document | None, before: Group | None, group: Group) -> None:
        key, source = _id(group.tenant, group.name), msgspec.to_builtins(group)
        if document is None or before is None:
            await self._client.create("groups", key, source)
            return
        if before.version:
            await self._client.put("group-versions", f"{key}/{before.version}", document.source)
        await self._client.put("groups", key, source, over=document)
        if group.version > KEPT_VERSIONS:
            await self._client.delete("group-versions", f"{key}/{group.version - KEPT_VERSIONS}")

    async def _check_room(self, tenant: str) -> None:
        if await self._count("groups", {"term": {"tenant": tenant}}) >= GROUPS_MAX:
            raise conflict(f"expected at most {GROUPS_MAX} groups in a tenant; delete one first")

    async def _count(self, index: str, query: Source) -> int:
        await self._client.refresh(index)
        answer = await self._client.search(index, {"size": 0, "query": query, "track_total_hits": True})
        return int(answer["hits"]["total"]["value"])

    async def page(self, tenant: str) -> list[Group]:
        await self._client.refresh("groups")
        where = {"term": {"tenant": tenant}}
        found = {group.name: group for group in await self._search("groups", where, "name", "asc", GROUPS_MAX)}
        default = found.pop(DEFAULT_GROUP, None) or Group(tenant=tenant, name=DEFAULT_GROUP)
        return [default, *found.values()]

    async def versions(self, tenant: str, name: str) -> list[Group]:
        document = await self._client.get("groups", _id(tenant, name))
        current = _group(document) or _unwritten(tenant, name)
        if current is None:
            raise not_found(f"Group {name!r}")
        await self._client.refresh("group-versions")
        earlier = {"range": {"version": {"lt": current.version}}}
        where = {"bool": {"filter": [{"term": {"tenant": tenant}}, {"term": {"name": name}}, earlier]}}
        found = await self._search("group-versions", where, "version", "desc", KEPT_VERSIONS - 1)
        return [current, *found] if current.version else []

    async def _search(self, index: str, query: Source, by: str, order: str, limit: int) -> list[Group]:
        answer = await self._client.search(index, {"size": limit, "query": query, "sort": [{by: order}]})
        return [msgspec.convert(hit["_source"], Group) for hit in answer["hits"]["hits"]]

    async def delete(self, tenant: str, name: str, *, actor: str) -> None:
        if name == DEFAULT_GROUP:
            raise conflict(f"the group {DEFAULT_GROUP!r} always exists and cannot be deleted")
        with self._client.whole_answer():
            group = await self._delete(tenant, name)
            self._kept.forget()
            await self._journal.tell(Change(kind="groups", tenant=tenant))
        await self._record("group.delete", group, actor, deleted=True)

    async def _delete(self, tenant: str, name: str) -> Group:
        for _ in range(TRIES):
            document = await self._client.get("groups", _id(tenant, name))
            group = _group(document)
            if group is None:
                raise not_found(f"Group {name!r}")
            inside = {"bool": {"filter": [{"term": {"tenant": tenant}}, {"term": {"groups": name}}]}}
            if members := await self._count("agents", inside):
                raise conflict(f"group {name!r}: expected one without agents, got one with {members}; move them first")
            try:
                await self._client.delete("groups", _id(tenant, name), over=document)
            except Conflict:
                continue
            return group
        raise Conflict(f"group {name!r}")

    async def _record(self, action: str, group: Group, actor: str, **facts: Any) -> None:
        def record(tx: Tx) -> None:
            told = {key: value for key, value in facts.items() if key != "deleted"}
            audit.record(tx, actor, action, group.name, tenant=group.tenant, **told)
            tx.emit("configuration_changed", tenant=group.tenant, group=group.name, **facts)

        await self._store.write(record)

    def heard(self, change: Change) -> None:
        """News from the journal."""
        if change.kind == "groups":
            self._kept.forget()


def _id(tenant: str, name: str) -> str:
    """Neither may hold a slash."""
    return f"{tenant}/{name}"


def _unwritten(tenant: str, name: str) -> Group | None:
    return Group(tenant=tenant, name=name) if name == DEFAULT_GROUP else None


def _group(document: Document | None) -> Group | None:
    return None if document is None else msgspec.convert(document.source, Group)
