"""The indices of a fleet of boxes: what they are called, what their documents hold, and how they come to be.

    agents            one document per agent, its id is the uuid; key_hash is not searchable
    agent-names       one document per tenant and name, so that a name is taken once
    groups            the current configuration of each group
    group-versions    the earlier ones
    wazuh-states-*    one index per kind of stateful event, named as upstream names them
    batches           the answers given to stateful requests
    commands, known-commands, journal

All names have the fleet's prefix (``osqbox-``) in front. Documents are strict: a field that is not listed here is
refused. What agents send is kept as it is under a field that is not parsed (``enabled: false``), so no event can add a
field to a mapping; `words` makes it searchable. A write is confirmed after the translog's sync (``request``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from osqbox.comms.errors import IndexerDown
from osqbox.comms.messages import Json

from .client import FOREIGN, Client, Unexpected

KEYWORD = MappingProxyType({"type": "keyword"})
HIDDEN = MappingProxyType({"type": "keyword", "index": False, "doc_values": False})
"""Kept, but neither searched nor sorted by."""
WHOLE = MappingProxyType({"type": "long"})
TIME = MappingProxyType({"type": "double"})
"""Seconds since the epoch."""
YES_NO = MappingProxyType({"type": "boolean"})
OPAQUE = MappingProxyType({"type": "object", "enabled": False})
"""Any JSON object, kept as it is and not looked into."""
TEXT = MappingProxyType({"type": "text", "norms": False})

Fields: TypeAlias = Mapping[str, Mapping[str, Json]]

FIELDS: Mapping[str, Fields] = MappingProxyType(
    {
        "agents": {
            **dict.fromkeys(("uuid", "tenant", "name", "type", "version", "groups", "status"), KEYWORD),
            **dict.fromkeys(("created_at", "last_login_at", "last_seen_at"), TIME),
            "host": OPAQUE,
            "key_version": WHOLE,
            "key_hash": HIDDEN,
        },
        "agent-names": {"tenant": KEYWORD, "name": KEYWORD, "uuid": KEYWORD, "at": TIME},
        "groups": {
            **dict.fromkeys(("tenant", "name", "changed_by"), KEYWORD),
            "configuration": HIDDEN,
            "version": WHOLE,
            "sha256": KEYWORD,
            "changed_at": TIME,
        },
        "commands": {
            **dict.fromkeys(
                ("id", "agent", "tenant", "request_id", "source", "user", "target_type", "target_id", "status"), KEYWORD
            ),
            **dict.fromkeys(("created_at", "expires_at", "sent_at", "ended_at"), TIME),
            **dict.fromkeys(("seq", "deliveries"), WHOLE),
            "answered": YES_NO,
            "action": OPAQUE,
            "result": OPAQUE,
        },
        "known-commands": {**dict.fromkeys(("name", "version", "required_args"), KEYWORD), "description": HIDDEN},
        "journal": {"n": WHOLE, "kind": KEYWORD, "at": TIME, "entry": OPAQUE},
        "batches": {"agent": KEYWORD, "at": TIME, "batch": HIDDEN, "answer": OPAQUE, "documents": WHOLE},
    }
)
"""Of the indices that are there from the start. ``group-versions`` has those of ``groups``."""

STATES = "wazuh-states-*"
TEMPLATE_VERSION = 1
"""Grows with every change of `STATE_FIELDS`."""
STATE_FIELDS: Fields = MappingProxyType(
    {
        **dict.fromkeys(("index", "id", "agent_id", "tenant"), KEYWORD),
        "version": WHOLE,
        "changed_at": TIME,
        "agent": OPAQUE,
        "data": OPAQUE,
        "words": TEXT,
        "batch": HIDDEN,
        "answers": HIDDEN,
    }
)
_STATE_INDEX = re.compile(r"wazuh-states-[a-z][a-z0-9-]{0,63}")


def is_state_index(name: str) -> bool:
    return _STATE_INDEX.fullmatch(name) is not None


async def prepare(client: Client) -> None:
    """Create what is missing. Returns when every index of the box's own can be written; raises CommsError."""
    if "version" not in await client.call("GET", "/", even_down=True):
        raise IndexerDown(FOREIGN)
    wanted = {client.index_name(name): fields for name, fields in core_fields()}
    every = "/" + ",".join(wanted)
    there = await client.call("GET", f"{every}/_mapping", params={"ignore_unavailable": "true"}, even_down=True)
    for name, fields in wanted.items():
        if name not in there:
            await _create(client, name, fields)
        elif missing := fields.keys() - there[name]["mappings"].get("properties", {}).keys():
            more = {"properties": properties({field: fields[field] for field in missing})}
            await client.call("PUT", f"/{name}/_mapping", body=more, even_down=True)
    await _prepare_states(client)
    health = {"wait_for_status": "yellow", "timeout": "2s"}
    await client.call("GET", f"/_cluster/health{every}", params=health, even_down=True)


async def _create(client: Client, name: str, fields: Fields) -> None:
    try:
        await client.call("PUT", f"/{name}", body=definition(fields), even_down=True)
    except Unexpected as error:
        if "resource_already_exists_exception" not in error.message:  # another box was quicker
            raise


async def _prepare_states(client: Client) -> None:
    """Indices of states come into being with their first document, from a template."""
    name = client.index_name("states")
    found = await client.call("GET", f"/_index_template/{client.prefix}state*", even_down=True)
    versions = [each["index_template"].get("version") for each in found["index_templates"] if each["name"] == name]
    if TEMPLATE_VERSION not in versions:
        body = {
            "index_patterns": [client.index_name(STATES)],
            "priority": 100,
            "version": TEMPLATE_VERSION,
            "template": definition(STATE_FIELDS),
        }
        await client.call("PUT", f"/_index_template/{name}", body=body, even_down=True)


def core_fields() -> Iterator[tuple[str, Fields]]:
    yield from FIELDS.items()
    yield "group-versions", FIELDS["groups"]


def definition(fields: Fields) -> dict[str, Json]:
    return {
        "settings": {"number_of_shards": 1, "auto_expand_replicas": "0-1", "translog.durability": "request"},
        "mappings": {"dynamic": "strict", "properties": properties(fields)},
    }


def properties(fields: Fields) -> dict[str, Json]:
    return {name: dict(kind) for name, kind in fields.items()}
