"""Writing as a seam promises it: what returned is on disk, what the database could not keep is `IndexerDown`."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from osqbox.comms.errors import IndexerDown
from osqbox.store import Store, Tx

T = TypeVar("T")

log = logging.getLogger(__name__)


async def durably(store: Store, work: Callable[[Tx], T], *, bulk: bool = False, weight_bytes: int = 0) -> T:
    """`Store.write`. Raises IndexerDown when the disk is full or fails: streams wait for it, agents are told 503."""
    try:
        return await store.write(work, bulk=bulk, weight_bytes=weight_bytes)
    except sqlite3.OperationalError as error:
        log.error("the database failed: %s", error)
        raise IndexerDown("the database cannot be written now: nothing was stored") from error
