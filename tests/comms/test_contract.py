"""The contract of the indexer, kept by the box's own database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from osqbox.comms.seams import Indexer, OnChange
from osqbox.comms.sqlite import SqliteIndexer
from osqbox.store import Store

from . import contract


@asynccontextmanager
async def open_sqlite(store: Store, clock: contract.HandClock, on_change: OnChange) -> AsyncIterator[Indexer]:
    yield SqliteIndexer(store, on_change, clock)


@pytest.mark.parametrize("promise", contract.CONTRACTS, ids=contract.name_of)
def test_sqlite_keeps_the_contract(promise: Any, tmp_path: Path) -> None:
    contract.run(promise, tmp_path, open_sqlite)
