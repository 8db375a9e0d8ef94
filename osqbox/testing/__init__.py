"""What other projects' test suites import; the fixtures come by themselves with the package (`pytest_plugin`).

Loaded lazily: pytest imports this package in every run on a machine where osqbox is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osqbox.testing.handle import AgentHandle, CommsAgent, Osqbox, QueryResult
    from osqbox.testing.server import OsqboxServer

__all__ = ["AgentHandle", "CommsAgent", "Osqbox", "OsqboxServer", "QueryResult"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "server" if name == "OsqboxServer" else "handle"
    return getattr(importlib.import_module(f"osqbox.testing.{room}"), name)
