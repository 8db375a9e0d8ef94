"""What `--forward` may say."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from osqbox.errors import BadUsage
from osqbox.forward.messages import MIB, SinkKind, SourceName, check_sinks, credentials, parse_sink

HERE = Path("/home/me")


@pytest.mark.parametrize(
    ("text", "kind", "name", "target"),
    [
        ("file:out.ndjson", SinkKind.FILE, "file:/home/me/out.ndjson", "/home/me/out.ndjson"),
        ("file:/var/log/a b", SinkKind.FILE, "file:/var/log/a b", "/var/log/a b"),
        ("stdout:", SinkKind.STDOUT, "stdout:", ""),
        ("https://h/in?key=s", SinkKind.HTTP, "https://h/in", "https://h/in?key=s"),
        ("http://[::1]:80", SinkKind.HTTP, "http://[::1]:80", "http://[::1]:80"),
        ("opensearch+https://h:9200/box", SinkKind.OPENSEARCH, "opensearch+https://h:9200/box", "https://h:9200"),
        ("opensearch+http://h/", SinkKind.OPENSEARCH, "opensearch+http://h/osqbox", "http://h"),
        ("opensearch+http://h/base/x", SinkKind.OPENSEARCH, "opensearch+http://h/base/x", "http://h/base"),
    ],
)
def test_places(text: str, kind: SinkKind, name: str, target: str) -> None:
    """The name holds no query; the target is where it goes."""
    spec = parse_sink(text, directory=HERE)
    assert (spec.kind, spec.name, spec.target) == (kind, name, target)


def test_options_of_a_file_and_sources() -> None:
    spec = parse_sink("file:x?rotate_mib=3&keep=0", directory=HERE, sources=[SourceName.JOBS, SourceName.JOBS])
    assert (spec.rotate_bytes, spec.keep_files, spec.sources) == (3 * MIB, 0, (SourceName.JOBS,))
    assert parse_sink("opensearch+http://h/my.prefix_1", directory=HERE).index_prefix == "my.prefix_1"


@pytest.mark.parametrize(
    "text",
    [
        "", "out.ndjson", "file:", "file:dir/", "file:a?rotate_mib=0", "file:a?keep=x", "file:a?colour=red", "stdout:x",
        "http://", "http:///in", "https://h:99999/", "https://h:0/", "https://h/#f", "https://h/a b", "https://h/\u00fc",
        "ftp://h/", "opensearch+https://h/UPPER", "opensearch+https://h/_x", "opensearch+https://h/a?b=c",
        "file:a\0b", "file:x?rotate_mib=\u0663",
    ],
)  # fmt: skip
def test_what_is_not_a_place(text: str) -> None:
    """A sentence with what was expected."""
    with pytest.raises(BadUsage, match=r"--forward: expected"):
        parse_sink(text, directory=HERE)


@pytest.mark.parametrize(
    "text", ["https://me:s3cret@h/in", "opensearch+https://me:s3cret@h/x", "x://me:s3cret@h?s3cret"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadUsage) as refused:
        parse_sink(text, directory=HERE)
    assert "s3cret" not in str(refused.value)


def test_two_sinks_may_not_share_cursors() -> None:
    sinks = [parse_sink(text, directory=HERE) for text in ("https://h/in?a=1", "https://h/in?a=2")]
    with pytest.raises(BadUsage, match="https://h/in twice"):
        check_sinks(sinks)
    check_sinks(sinks[:1])


def test_credentials() -> None:
    assert credentials(" token-1\n") == "Bearer token-1"
    assert credentials("me:pass word\n") == "Basic " + b64encode(b"me:pass word").decode()
    for bad in ("", "\n", "two words", "a\nb:c", "\u00fc:x"):
        with pytest.raises(ValueError, match="expected"):
            credentials(bad)
