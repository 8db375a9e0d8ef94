"""The run's real OpenSearch, as the tests of the comms API's indexer have it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ..comms.opensearch import _real  # noqa: TID252 - one test bed for both


@pytest.fixture(scope="session")
def opensearch_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = tmp_path_factory.getbasetemp()
    try:
        with _real.shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) as url:
            yield url
    except _real.Missing as reason:
        pytest.skip(str(reason))
