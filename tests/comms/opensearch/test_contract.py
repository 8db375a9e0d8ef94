"""The contract of the indexer, kept on the strict stand-in and on a real OpenSearch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from osqbox.comms.opensearch import open_opensearch
from osqbox.comms.seams import Indexer, OnChange
from osqbox.store import Store
from tests.comms import contract

from .standin import StandIn


def opener(url: str) -> contract.OpenIndexer:
    @asynccontextmanager
    async def open_it(store: Store, clock: contract.HandClock, on_change: OnChange) -> AsyncIterator[Indexer]:
        async with open_opensearch(
            url, ca=None, auth=None, store=store, clock=clock, on_change=on_change, prefix="contract-"
        ) as indexer:
            assert indexer.statistics()["up"] is True
            yield indexer

    return open_it


@pytest.fixture(scope="module")
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.mark.parametrize("promise", contract.CONTRACTS, ids=contract.name_of)
def test_the_stand_in_keeps_the_contract(promise: Any, standin: StandIn, tmp_path: Path) -> None:
    contract.run(promise, tmp_path, opener(standin.url))


@pytest.mark.timeout(300)  # the first one starts OpenSearch, and the first run ever downloads it
@pytest.mark.parametrize("promise", contract.CONTRACTS, ids=contract.name_of)
def test_a_real_opensearch_keeps_the_contract(promise: Any, opensearch_url: str, tmp_path: Path) -> None:
    contract.run(promise, tmp_path, opener(opensearch_url))
