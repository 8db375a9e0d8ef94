"""The pytest plugin: ``osqbox_server`` (one box per process) and ``osqbox`` (a tenant per test).

Sync fixtures over a box that runs Trio in its own thread: no other plugin is needed, and tests may be plain
functions or use any event loop. Nothing of osqbox is imported until a test asks for a fixture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from osqbox.testing.handle import Osqbox
    from osqbox.testing.server import OsqboxServer


@pytest.fixture(scope="session")
def osqbox_config() -> dict[str, Any]:
    """Override to change the box: keyword arguments of `osqbox.settings.Settings`, such as ``read_hold_s``."""
    return {}


@pytest.fixture(scope="session")
def osqbox_server(tmp_path_factory: pytest.TempPathFactory, osqbox_config: dict[str, Any]) -> Iterator[OsqboxServer]:
    """One box for the whole session (one per pytest-xdist worker), on free ports, with its own CA."""
    from osqbox.testing.server import OsqboxServer

    with OsqboxServer(tmp_path_factory.mktemp("osqbox"), **osqbox_config) as server:
        yield server


@pytest.fixture
def osqbox(
    osqbox_server: OsqboxServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Osqbox]:
    """A fresh tenant of the box. At the end its agents are stopped, and internal errors fail the test."""
    from osqbox.box import new_id
    from osqbox.testing.handle import Osqbox

    word = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40] or "test"
    handle = Osqbox(osqbox_server, f"{word}-{new_id()[:6]}", tmp_path_factory.mktemp("tenant"))
    try:
        yield handle
    finally:
        troubles = handle.close()
    if troubles:
        pytest.fail("osqbox: " + "; ".join(troubles))
