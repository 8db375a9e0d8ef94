"""The job runner: Linux processes run, stopped, watched and followed, over gRPC with mutual TLS or as a library.

    async with open_jobs("jobs") as jobs:
        job = await jobs.run(["sh", "-c", "echo hello"])
        async with jobs.output(job.id) as events:
            async for event in events: ...

Names are imported when they are first used: the keeper processes of jobs import this package too, and stay small.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself would be one more import in every keeper
if TYPE_CHECKING:
    from typing import Any

    from . import messages as messages
    from .library import open_jobs as open_jobs
    from .runner import JobRunner as JobRunner

_WHERE = (("open_jobs", "library"), ("JobRunner", "runner"))

__all__ = ["JobRunner", "messages", "open_jobs"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for exported, module in _WHERE:
        if name == exported:
            return getattr(import_module(f"{__name__}.{module}"), name)
    if name == "messages":
        return import_module(f"{__name__}.messages")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
