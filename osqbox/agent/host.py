"""This machine as osquery tables: the sources an agent that pretends nothing answers from. Linux."""

from __future__ import annotations

import time
from collections.abc import Callable

from osqbox.agent.sql import TableSource
from osqbox.agent.tables import accounts, files, network, packages, processes, system


def host_tables(
    *,
    hostname: str | None = None,
    uuid: str | None = None,
    now: Callable[[], float] = time.time,
    read_max_bytes: int = files.READ_MAX_BYTES,
) -> dict[str, TableSource]:
    """Tables filled from the running machine; ``hostname`` and ``uuid`` override what it says of itself.

    The ``osquery_*`` tables and ``carves`` are the agent's own and not among them.
    """
    return {
        **system.tables(hostname or system.machine_hostname(), uuid or system.machine_uuid(), now),
        **processes.tables(),
        **network.tables(),
        **accounts.tables(),
        **files.tables(read_max_bytes),
        **packages.tables(),
    }
