"""What other projects' test suites import; the fixtures come by themselves with the package (`pytest_plugin`)."""

from osqbox.testing.handle import AgentHandle, Osqbox, QueryResult
from osqbox.testing.server import OsqboxServer

__all__ = ["AgentHandle", "Osqbox", "OsqboxServer", "QueryResult"]
