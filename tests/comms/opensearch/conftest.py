"""A real OpenSearch for the tests that ask for one; they are skipped with a reason where it cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import _real


@pytest.fixture(scope="session")
def opensearch_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run's one OpenSearch, for tests that only use it."""
    base = tmp_path_factory.getbasetemp()
    try:
        with _real.shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) as url:
            yield url
    except _real.Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def own_opensearch() -> Iterator[_real.Real]:
    """One of the module's own, for tests that stop and kill it."""
    try:
        with _real.own() as real:
            yield real
    except _real.Missing as reason:
        pytest.skip(str(reason))
