"""Errors out of nurseries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from osqbox.errors import OsqboxError


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the error of ours that is in a nursery's group by itself, the first of several."""
    try:
        yield
    except BaseExceptionGroup as group:
        cause: BaseException | None = group.subgroup(OsqboxError)
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if cause is None:
            raise
        raise cause from None
