"""Where to forward what, and how it goes. Times are seconds since the epoch. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias
from urllib.parse import SplitResult, parse_qsl, urlsplit

from osqbox.errors import BadUsage

MIB = 1024 * 1024
ROTATE_BYTES = 256 * MIB
KEEP_FILES = 5
INDEX_PREFIX = "osqbox"
FORMS = "file:PATH, stdout:, https://HOST/PATH or opensearch+https://HOST:9200/INDEX-PREFIX"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
# OpenSearch: lower case, none of \/*?"<>|, # : and space, not beginning with - _ +
_INDEX_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


class SourceName(StrEnum):
    LOGS = "logs"
    """osquery's log lines."""
    EVENTS = "events"
    """Stateless events of comms agents."""
    JOBS = "jobs"
    """Records of the output of jobs."""


EVERY_SOURCE = tuple(SourceName)


class SinkKind(StrEnum):
    FILE = "file"
    STDOUT = "stdout"
    HTTP = "http"
    OPENSEARCH = "opensearch"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSpec:
    """One place to forward to."""

    kind: SinkKind
    name: str
    """What the cursors belong to, and what is shown: never holds a query, which may be a secret."""
    target: str = ""
    """The file's path, or the URL without its path for OpenSearch."""
    sources: tuple[SourceName, ...] = EVERY_SOURCE
    rotate_bytes: int = ROTATE_BYTES
    """A file that would grow beyond this is moved to PATH.1 first."""
    keep_files: int = KEEP_FILES
    """PATH.1 to PATH.n; 0 keeps none beside PATH itself."""
    index_prefix: str = INDEX_PREFIX
    """The index of a record is the prefix, a dash and its source."""
    ca_file: Path | None = None
    """Trusted for https instead of the system's CAs."""
    auth_file: Path | None = None
    """Holds ``USER:PASSWORD``, else a bearer token; read anew for every connection."""


class Record(NamedTuple):
    """One thing to forward."""

    id: str
    """Stable, also over restarts, and different between boxes: what a consumer recognises a repetition by."""
    source: SourceName
    part: str
    """Of which cursor of the source: a job's id; empty where there is only one."""
    number: int
    """Where the cursor stands once this is confirmed."""
    text: bytes
    """A JSON object on one line, without its end."""


class Page(NamedTuple):
    """What comes after a cursor."""

    records: list[Record]
    missing: int
    """How many numbers between the cursor and the oldest record are gone."""


Piece: TypeAlias = tuple[int, int, str, float, bytes]
"""One record of a job's output log: its number from 0, its offset, its stream (stdout, stderr, mixed), when, bytes."""

Output: TypeAlias = tuple[Sequence[Piece], int, int, int]
"""Pieces in order; the number of the piece to read next; how many there are behind these; how many were taken out."""

ReadOutput = Callable[[str, int, int], Output]
"""Of the job with this id, from this number on, about so many bytes. Blocks; FileNotFoundError: the log is gone."""


class Refusal(NamedTuple):
    """A record that a sink does not want, and its reason."""

    record: Record
    reason: str


class SinkDown(Exception):
    """Nothing or only a part of the batch is confirmed; it is sent again, after ``retry_after_s`` if the sink says."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class BatchRefused(Exception):
    """The sink does not want the batch as it is, because of one of its records or of its size: send smaller ones."""

    def __init__(self, reason: str, *, is_too_large: bool = False) -> None:
        super().__init__(reason)
        self.is_too_large = is_too_large


@dataclass(frozen=True, slots=True)
class SinkStatistics:
    sink: str
    up: bool
    """False from a failure to the next confirmed batch."""
    waiting: int
    """Records that are stored and not yet confirmed."""
    lag_s: float
    """Age of the oldest of these; 0 where there is none. Of job output: since the sink last had all of it."""
    forwarded: int
    """Confirmed, ever; a repetition counts once."""
    dropped: int
    """Removed by retention before they were confirmed."""
    set_aside: int
    """Refused by the sink for what they are."""
    last_error: str
    last_error_at: float | None


def parse_sink(
    text: str,
    *,
    directory: Path,
    sources: Sequence[SourceName] = EVERY_SOURCE,
    ca_file: Path | None = None,
    auth_file: Path | None = None,
) -> SinkSpec:
    """What ``--forward`` says; a relative path is taken from ``directory``. Raises BadUsage."""
    scheme, colon, rest = text.partition(":")
    match scheme if colon else "":
        case "file":
            spec = _file(rest, directory)
        case "stdout" if rest:
            raise BadUsage(f"--forward: expected stdout: with nothing behind it, got {text!r}")
        case "stdout":
            spec = SinkSpec(kind=SinkKind.STDOUT, name="stdout:")
        case "http" | "https":
            url = _url(text)
            spec = SinkSpec(kind=SinkKind.HTTP, name=url._replace(query="").geturl(), target=url.geturl())
        case "opensearch+http" | "opensearch+https":
            spec = _opensearch(_url(text.removeprefix("opensearch+")))
        case _:
            raise BadUsage(f"--forward: expected {FORMS}, got {_shown(text)!r}")
    return replace(spec, sources=tuple(dict.fromkeys(sources)), ca_file=ca_file, auth_file=auth_file)


def check_sinks(sinks: Sequence[SinkSpec]) -> None:
    """Raises BadUsage where two would share their cursors."""
    names = [sink.name for sink in sinks]
    for name in names:
        if names.count(name) > 1:
            raise BadUsage(f"--forward: expected different places, got {name} twice")


def _file(rest: str, directory: Path) -> SinkSpec:
    path, _, query = rest.partition("?")
    if not path or path.endswith("/") or "\0" in path:
        raise BadUsage(f"--forward: expected file:PATH with the path of a file, got {rest!r}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    rotate_mib = _number(options.pop("rotate_mib", ROTATE_BYTES // MIB), "rotate_mib", 1, 1024 * 1024)
    keep = _number(options.pop("keep", KEEP_FILES), "keep", 0, 1000)
    if options:
        raise BadUsage(f"--forward: expected the options rotate_mib and keep of a file, got {', '.join(options)}")
    place = str(PurePosixPath(directory, path))
    return SinkSpec(
        kind=SinkKind.FILE,
        name=f"file:{place}",
        target=place,
        rotate_bytes=rotate_mib * MIB,
        keep_files=keep,
    )


def _number(value: str | int, name: str, least: int, most: int) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise BadUsage(f"--forward: expected {name} to be a number from {least} to {most}, got {text!r}")
    return int(text)


def _url(text: str) -> SplitResult:
    shown = _shown(text)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise BadUsage(f"--forward: expected a URL, got {shown!r}: {error}") from None
    if not url.hostname or url.fragment or port == 0 or not text.isascii() or not text.isprintable() or " " in text:
        raise BadUsage(f"--forward: expected {FORMS}, got {shown!r}")
    if "@" in url.netloc:
        raise BadUsage(
            f"--forward: expected a URL without a user and password, got one at {url.hostname}",
            hint="write USER:PASSWORD to a file that only you may read, and use --forward-auth-file FILE",
        )
    return url


def _opensearch(url: SplitResult) -> SinkSpec:
    base, _, prefix = url.path.rstrip("/").rpartition("/")
    prefix = prefix or INDEX_PREFIX
    if not _INDEX_PREFIX.fullmatch(prefix) or url.query:
        raise BadUsage(
            "--forward: expected opensearch+https://HOST:9200/INDEX-PREFIX with a prefix of lower case letters, "
            f"digits, dots, dashes and underscores, got {_shown(url.geturl())!r}"
        )
    return SinkSpec(
        kind=SinkKind.OPENSEARCH,
        name=f"opensearch+{url._replace(path=f'{base}/{prefix}').geturl()}",
        target=url._replace(path=base).geturl(),
        index_prefix=prefix,
    )


def _shown(text: str) -> str:
    """Without what may be a secret."""
    return re.sub(r"//[^/@]*@", "//...@", text.partition("?")[0])[:200]


def credentials(text: str) -> str:
    """The Authorization header for what an auth file holds. Raises ValueError, which never quotes it."""
    from base64 import b64encode

    word = text.strip()
    if not word or not word.isascii() or not word.isprintable():
        raise ValueError("expected one line of printable ASCII: USER:PASSWORD, or a bearer token")
    if ":" in word:
        return "Basic " + b64encode(word.encode()).decode()
    if " " in word:
        raise ValueError("expected USER:PASSWORD or a bearer token, got several words")
    return f"Bearer {word}"
