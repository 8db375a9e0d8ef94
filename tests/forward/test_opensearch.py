"""`_bulk` against a real OpenSearch; skipped where it cannot be had."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

from osqbox.forward.messages import SourceName

from ._rig import add_events, all_sent, forwarding, log_lines, open_store

SOURCES = (SourceName.LOGS, SourceName.EVENTS)

pytestmark = pytest.mark.timeout(240)


def ask(url: str, path: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def count(url: str, index: str, query: Any = None) -> int:
    ask(url, f"/{index}/_refresh", {}, "POST")
    found = ask(url, f"/{index}/_count", {"query": query or {"match_all": {}}}, "POST")["count"]
    assert isinstance(found, int)
    return found


def test_records_are_stored_once_and_found(opensearch_url: str, tmp_path: Path) -> None:
    """Whatever shape lines have, each is one document; sent again they stay one; a field of a line can be searched."""
    prefix = f"fwd-{uuid4().hex[:8]}"
    shapes = [
        {"columns": {"pid": "7"}}, {"columns": {"pid": {"deep": 1}}}, {"columns": "text"}, {"snapshot": [{"a": 1}]},
        {"columns": {"cmdline": "x" * 100_000}}, {f"field{n}": n for n in range(1500)},
    ]  # fmt: skip

    async def test() -> None:
        with trio.fail_after(120):
            async with open_store(tmp_path) as store:
                await log_lines(store, [{"columns": {"n": str(n)}} for n in range(3000)])
                await log_lines(store, shapes)
                await add_events(store, [{"port": 22}, "text", 5, {"port": "ssh"}])
                place = f"opensearch+{opensearch_url}/{prefix}"
                async with forwarding(store, place, sources=SOURCES) as opened:
                    only = await all_sent(opened, 3010)
                    assert (only.set_aside, only.last_error) == (0, "")
                await store.write(lambda tx: tx.db.execute("UPDATE forward_cursors SET position = 0"))
                async with forwarding(store, place, sources=SOURCES) as opened:
                    await all_sent(opened, 6020)

    trio.run(test)
    try:
        assert count(opensearch_url, f"{prefix}-logs") == 3006
        assert count(opensearch_url, f"{prefix}-events") == 4
        assert count(opensearch_url, f"{prefix}-logs", {"term": {"line.columns.n": "17"}}) == 1
        assert count(opensearch_url, f"{prefix}-logs", {"term": {"tenant": "acme"}}) == 3006
        assert count(opensearch_url, f"{prefix}-logs", {"range": {"at": {"gte": "now-1h"}}}) == 3006
        assert count(opensearch_url, f"{prefix}-events", {"term": {"data.port": "ssh"}}) == 1
    finally:
        ask(opensearch_url, f"/{prefix}-logs,{prefix}-events", method="DELETE")
        ask(opensearch_url, f"/_index_template/{prefix}-forward", method="DELETE")


def test_an_index_with_another_mapping_refuses_single_records(opensearch_url: str, tmp_path: Path) -> None:
    """What it cannot map is set aside and counted; the rest is stored."""
    prefix = f"fwd-{uuid4().hex[:8]}"
    mapping = {"mappings": {"properties": {"line": {"properties": {"n": {"type": "long"}}}}}}

    async def test() -> None:
        with trio.fail_after(120):
            async with open_store(tmp_path) as store:
                await log_lines(store, [{"n": "not a number" if n == 3 else n} for n in range(10)])
                async with forwarding(store, f"opensearch+{opensearch_url}/{prefix}") as opened:
                    only = await all_sent(opened, 10)
                    assert (only.forwarded, only.set_aside, only.up) == (9, 1, True)

    ask(opensearch_url, f"/{prefix}-logs", mapping, "PUT")
    try:
        trio.run(test)
        assert count(opensearch_url, f"{prefix}-logs") == 9
    finally:
        ask(opensearch_url, f"/{prefix}-logs", method="DELETE")
        ask(opensearch_url, f"/_index_template/{prefix}-forward", method="DELETE")
