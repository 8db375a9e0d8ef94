"""yara_file, which is also called yara: files matched by rules from a group, a file, the query or a URL.

osquery/tables/yara/{yara,yara_utils}.cpp of osquery 5.23. Rules are matched by the package ``yara`` (yara-python) where
that is installed, else by our own reading of them; what that cannot do is said in the status log. Fetched rules are
not kept: each query fetches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.contents import Contents
from osqbox.agent.tables.yara_rules import Hit, Match, RulesRefused, match, read_rules

if TYPE_CHECKING:
    from osqbox.agent.client import Core

YARA_HOME = "/etc/osquery/yara/"
MAX_RULE_BYTES = 8 * 1024 * 1024

Fetch = Callable[[str, bytes | None], tuple[int, bytes]]
"""GET a URL, or POST a body to it: status and body. Raises OSError."""
Scan = Callable[[bytes], list[Match]]


def yara_tables(core: Core, *, fetch: Fetch, contents: Contents) -> dict[str, TableSource]:
    """``contents``: of the host whose files are matched."""

    def generate(context: Context) -> Iterator[Row]:
        scans = list(_scans(core, context, fetch))
        for path in _paths(context, contents) if scans else ():
            content = _content(contents, path, core.flags.integer("read_max"), context)
            if content is None:
                continue
            for column, name, scan in scans:
                row = _row(core, context, path, content, scan)
                if row is not None:
                    yield {**row, column: name}

    return {"yara_file": source(generate, "path", "sig_group", "sigfile", "sigrule", "sigurl")}


def _row(core: Core, context: Context, path: str, content: bytes, scan: Scan) -> Row | None:
    context.checkpoint()
    try:
        matches = scan(content)
    except TimeoutError:
        context.warn(f"YARA scan of {path} took too long and was given up")
        return None
    shown = core.flags.true("enable_yara_string")  # strings are private unless this is on
    return {
        "path": path,
        "matches": ",".join(found.rule for found in matches),
        "count": len(matches),
        "strings": ",".join(f"{hit.identifier}:{hit.offset:x}" for found in matches for hit in found.hits)
        if shown
        else "",
        "tags": ",".join(tag for found in matches for tag in found.tags),
    }


def _paths(context: Context, contents: Contents) -> Iterable[str]:
    path, like = context.equal_to("path"), context.like("path")
    return [path] if path is not None else contents.find(like, context) if like is not None else []


def _content(contents: Contents, path: str, max_bytes: int, context: Context) -> bytes | None:
    """A regular file's bytes; one over --read_max is left out with a warning."""
    opened = contents.open(path)
    if opened is None:
        return None
    with opened.content as content:
        if opened.size_bytes > max_bytes:
            context.warn(f"Cannot read {path}: size {opened.size_bytes} is over --read_max {max_bytes}")
            return None
        return content.read(max_bytes)


# -- rules -------------------------------------------------------------------------------------------------------


def _scans(core: Core, context: Context, fetch: Fetch) -> Iterator[tuple[str, str, Scan]]:
    """Column, its value and what to do with contents, for each source of rules a query names."""
    for column in ("sig_group", "sigfile", "sigrule", "sigurl"):
        name = context.equal_to(column)
        if not name:
            continue
        try:
            texts = _texts(core, column, name, fetch)
            yield column, name, _compiled(texts)
        except (OSError, RulesRefused) as error:
            context.warn(f"YARA rules of {column} {name[:200]} cannot be used: {error}")


def _texts(core: Core, column: str, name: str, fetch: Fetch) -> list[str]:
    if column == "sigrule":
        return [name]
    if column == "sigurl":
        return [_fetched(core, name, fetch)]
    if column == "sigfile":
        return [_rule_file(name)]
    if name not in core.config.signatures:
        raise RulesRefused("the config has no such group")
    return [_rule_file(path) for path in core.config.signatures[name]]


def _rule_file(name: str) -> str:
    with (Path(YARA_HOME) / name).open("rb") as file:
        return file.read(MAX_RULE_BYTES).decode("utf-8", "replace")


def _fetched(core: Core, url: str, fetch: Fetch) -> str:
    """The rules at a URL that the config allows; with --yara_sigurl_authenticate it is told the node key."""
    if not url_is_allowed(url, core.config.signature_urls):
        raise RulesRefused("the config's signature_urls do not allow it")
    authenticate = core.flags.true("yara_sigurl_authenticate")
    body = json.dumps({"node_key": core.node_key}, separators=(",", ":")).encode() if authenticate else None
    status, content = fetch(url, body)
    if status != 200:
        raise OSError(f"the server answered {status}")
    return content.decode("utf-8", "replace")


def url_is_allowed(url: str, allowed: Iterable[str]) -> bool:
    """Scheme and host must be equal, and the path wholly match the pattern's, a regular expression."""
    try:
        wanted = urlsplit(url)
        for each in allowed:
            # The pattern's path may hold any character of a regular expression, a question mark too.
            found = re.fullmatch(r"(https?)://([^/]+)(/.*)?", each)
            if found is None or (wanted.scheme, wanted.netloc) != (found[1], found[2]):
                continue
            if wanted.scheme == "https" and _matches(found[3] or "", wanted.path):
                return True
    except ValueError:
        return False
    return False


def _matches(pattern: str, path: str) -> bool:
    import regex

    try:
        return regex.fullmatch(pattern, path, timeout=1.0) is not None
    except (regex.error, TimeoutError):
        return False


def _compiled(texts: list[str]) -> Scan:
    """Raises RulesRefused."""
    try:
        import yara
    except ImportError:
        rules = [rule for text in texts for rule in read_rules(text)]
        return lambda content: match(rules, content)
    try:
        compiled = yara.compile(sources={str(number): text for number, text in enumerate(texts)}, includes=False)
    except yara.Error as error:
        raise RulesRefused(str(error)) from error
    return lambda content: _by_libyara(yara, compiled, content)


def _by_libyara(yara: object, compiled: object, content: bytes) -> list[Match]:
    try:
        found = compiled.match(data=content, timeout=60)  # type: ignore[attr-defined]
    except yara.TimeoutError as error:  # type: ignore[attr-defined]
        raise TimeoutError from error
    return [
        Match(
            each.rule,
            tuple(each.tags),
            tuple(Hit(text.identifier, place.offset) for text in each.strings for place in text.instances),
        )
        for each in found
    ]
