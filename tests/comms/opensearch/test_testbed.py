"""The OpenSearch of the tests: real, and gone when nobody uses it any more."""

from __future__ import annotations

import json
import urllib.request

import pytest

pytestmark = pytest.mark.timeout(300)  # the first run ever downloads it


def test_it_is_an_opensearch(opensearch_url: str) -> None:
    with urllib.request.urlopen(opensearch_url, timeout=10) as answer:
        told = json.load(answer)
    assert told["version"]["distribution"] == "opensearch"
    assert told["version"]["number"].startswith("2.19.")
