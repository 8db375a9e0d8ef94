"""A strict stand-in for OpenSearch: the part of its REST interface that opensearch-py sends for the comms API.

Near-real-time as the real one: a search sees what was refreshed; get and mget see what was written. What it does not
know (a path, a parameter, a query, a field of a strict mapping) is 400, so that a slip in a query fails a test
instead of matching nothing. Documents outlive `stop` and `start`, as those of a real server outlive its restart.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

Json = Any
Source = dict[str, Any]

MAX_BODY_BYTES = 100 * 1024 * 1024
"""http.max_content_length"""
MAX_TERM_BYTES = 32_766
MAX_WINDOW = 10_000
"""index.max_result_window"""
MAX_ID_BYTES = 512
VERSION = "2.19.1"


class Refused(Exception):
    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason = status, kind, reason

    def cause(self) -> Json:
        return {"type": self.kind, "reason": self.reason}

    def body(self) -> Json:
        return {"error": {"root_cause": [self.cause()], **self.cause()}, "status": self.status}


def bad(reason: str, kind: str = "illegal_argument_exception") -> Refused:
    return Refused(400, kind, reason)


def no_index(name: str) -> Refused:
    return Refused(404, "index_not_found_exception", f"no such index [{name}]")


# documents


@dataclass(frozen=True)
class Document:
    id: str
    source: Source
    seq_no: int
    primary_term: int
    version: int

    def address(self, index: str) -> Source:
        return {
            "_index": index,
            "_id": self.id,
            "_version": self.version,
            "_seq_no": self.seq_no,
            "_primary_term": self.primary_term,
        }


class Index:
    def __init__(self, name: str, definition: Source, *, primary_term: int) -> None:
        known(definition, {"mappings", "settings", "aliases"}, "create index")
        self.name = name
        self.settings = flat_settings(definition.get("settings", {}))
        self.mapping: Source = {"dynamic": True, "properties": {}}
        self.documents: dict[str, Document] = {}
        self.visible: dict[str, Document] = {}
        self.unrefreshed: dict[str, Document | None] = {}
        self.unrefreshed_since = 0.0
        self.versions: dict[str, int] = {}
        self.next_seq_no = 0
        self.primary_term = primary_term
        self.put_mapping(definition.get("mappings", {}))

    # mapping

    def put_mapping(self, mapping: Source) -> None:
        known(mapping, {"dynamic", "properties", "_source", "date_detection", "dynamic_templates", "_meta"}, "mapping")
        if "dynamic" in mapping:
            self.mapping["dynamic"] = mapping["dynamic"]
        merge_properties(self.mapping["properties"], mapping.get("properties", {}))

    def field(self, path: str) -> Source | None:
        """The mapping of a dotted field; a part of a flat_object counts as a keyword."""
        here: Source = self.mapping
        parts = path.split(".")
        for number, part in enumerate(parts):
            found = here.get("properties", {}).get(part) or here.get("fields", {}).get(part)
            if found is None:
                return None
            if found.get("type") in ("flat_object", "flattened") and number + 1 < len(parts):
                return {"type": "keyword"}
            here = found
        return here

    def fields(self, pattern: str) -> list[str]:
        return [path for path in leaves(self.mapping) if fnmatch.fnmatchcase(path, pattern)]

    # writing

    def write(
        self,
        operation: str,
        id: str,
        source: Source | None,
        *,
        if_seq_no: int | None = None,
        if_primary_term: int | None = None,
    ) -> tuple[int, Source]:
        """Status and answer of index, create or delete."""
        if len(id.encode()) > MAX_ID_BYTES:
            raise bad(f"id [{id[:20]}...] is too long, must be no longer than {MAX_ID_BYTES} bytes")
        if (if_seq_no is None) != (if_primary_term is None):
            raise bad(
                "Validation Failed: if_seq_no and if_primary_term come together", "action_request_validation_exception"
            )
        if if_seq_no is not None and operation == "create":
            raise bad(
                "Validation Failed: create operations do not support compare and set",
                "action_request_validation_exception",
            )
        current = self.documents.get(id)
        if operation == "create" and current is not None:
            raise conflict(id, f"document already exists (current version [{current.version}])")
        if if_seq_no is not None and (
            current is None or (current.seq_no, current.primary_term) != (if_seq_no, if_primary_term)
        ):
            raise conflict(id, f"required seqNo [{if_seq_no}], primary term [{if_primary_term}]")
        if source is not None:
            self.check(source)
        return self.store(id, source, current)

    def store(self, id: str, source: Source | None, current: Document | None) -> tuple[int, Source]:
        version = self.versions.get(id, 0) + 1
        self.versions[id] = version
        document = Document(id, source or {}, self.next_seq_no, self.primary_term, version)
        self.next_seq_no += 1
        if not self.unrefreshed:
            self.unrefreshed_since = time.monotonic()
        answer = document.address(self.name) | {"_shards": {"total": 1, "successful": 1, "failed": 0}}
        if source is None:
            self.documents.pop(id, None)
            self.unrefreshed[id] = None
            return (404, answer | {"result": "not_found"}) if current is None else (200, answer | {"result": "deleted"})
        self.documents[id] = self.unrefreshed[id] = document
        return (201, answer | {"result": "created"}) if current is None else (200, answer | {"result": "updated"})

    def update(self, id: str, body: Source, **only_if: int | None) -> tuple[int, Source]:
        known(body, {"doc", "doc_as_upsert", "upsert", "detect_noop", "_source"}, "update (scripts are not offered)")
        current = self.documents.get(id)
        if current is None:
            first = body.get("upsert", body.get("doc") if body.get("doc_as_upsert") else None)
            if first is None:
                raise Refused(404, "document_missing_exception", f"[{id}]: document missing")
            if only_if.get("if_seq_no") is not None:
                raise conflict(id, "document does not exist")
            return self.write("index", id, first)
        merged = merged_document(current.source, body["doc"])
        if merged == current.source and body.get("detect_noop", True):
            return 200, current.address(self.name) | {"result": "noop"}
        return self.write("index", id, merged, **only_if)

    def check(self, source: Json) -> None:
        if not isinstance(source, dict):
            raise bad("failed to parse: the document is not an object", "mapper_parsing_exception")
        self.check_object(source, self.mapping, "")

    def check_object(self, source: Source, mapping: Source, prefix: str) -> None:
        dynamic = str(mapping.get("dynamic", "true")).lower()
        properties = mapping.setdefault("properties", {})
        for name, value in source.items():
            path = prefix + name
            if name not in properties:
                if dynamic == "strict":
                    where = prefix.rstrip(".") or "_doc"
                    reason = f"mapping set to strict, dynamic introduction of [{name}] within [{where}] is not allowed"
                    raise bad(reason, "strict_dynamic_mapping_exception")
                if dynamic == "false" or value is None or value == []:
                    continue
                properties[name] = guessed_mapping(value)
            kind = properties[name]
            kind.setdefault("dynamic", mapping.get("dynamic", True)) if "type" not in kind else None
            for item in value if isinstance(value, list) else [value]:
                self.check_value(item, kind, path)

    def check_value(self, value: Json, kind: Source, path: str) -> None:
        if value is None:
            return
        name = kind.get("type", "object")
        if not kind.get("enabled", True):
            return
        if name in ("object", "nested", "flat_object"):
            if not isinstance(value, dict):
                raise bad(
                    f"object mapping for [{path}] tried to parse as object, but found a concrete value",
                    "mapper_parsing_exception",
                )
            if name == "object":
                self.check_object(value, kind, path + ".")
            return
        if isinstance(value, dict) or not TYPE_CHECKS[name](value):
            raise bad(f"failed to parse field [{path}] of type [{name}]", "mapper_parsing_exception")
        if (
            name == "keyword"
            and "ignore_above" not in kind
            and len(str(value).encode()) > MAX_TERM_BYTES
            and kind.get("index", True)
        ):
            raise bad(f'Document contains at least one immense term in field="{path}"')

    # refreshing

    @property
    def refresh_s(self) -> float:
        text = str(self.settings.get("refresh_interval", "1s"))
        return float("inf") if text == "-1" else duration_s(text)

    def refresh(self) -> None:
        for key, document in self.unrefreshed.items():
            if document is None:
                self.visible.pop(key, None)
            else:
                self.visible[key] = document
        self.unrefreshed.clear()

    def refresh_if_due(self) -> None:
        if self.unrefreshed and time.monotonic() >= self.unrefreshed_since + self.refresh_s:
            self.refresh()


def conflict(id: str, why: str) -> Refused:
    return Refused(409, "version_conflict_engine_exception", f"[{id}]: version conflict, {why}")


def known(given: Source, names: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise bad(f"{where}: expected an object, got {given!r}", "parsing_exception")
    if unknown := given.keys() - names:
        raise bad(f"{where}: unknown {sorted(unknown)}", "parsing_exception")


def flat_settings(settings: Source, prefix: str = "") -> Source:
    """``{"index": {"number_of_shards": 1}}`` as ``{"number_of_shards": 1}``."""
    flat: Source = {}
    for name, value in settings.items():
        path = (prefix + name).removeprefix("index.")
        flat |= flat_settings(value, path + ".") if isinstance(value, dict) else {path: value}
    flat = {name.removeprefix("index."): value for name, value in flat.items()}
    allowed = {"number_of_shards", "number_of_replicas", "refresh_interval", "hidden", "auto_expand_replicas"}
    allowed |= {"translog.durability", "mapping.total_fields.limit", "mapping.ignore_malformed", "max_result_window"}
    if not prefix and (unknown := {name for name in flat if name not in allowed and not name.startswith("analysis.")}):
        raise bad(f"unknown setting {sorted(unknown)}")
    return flat


def merge_properties(old: Source, new: Source) -> None:
    allowed = {"type", "properties", "fields", "dynamic", "enabled", "index", "ignore_above", "doc_values", "format"}
    allowed |= {"null_value", "copy_to", "analyzer", "normalizer", "norms", "store", "ignore_malformed"}
    for name, kind in new.items():
        known(kind, allowed, f"mapping of [{name}]")
        if "type" in kind and kind["type"] not in (*TYPE_CHECKS, "object", "nested", "flat_object"):
            raise bad(f"No handler for type [{kind['type']}] declared on field [{name}]", "mapper_parsing_exception")
        if name in old and old[name].get("type") != kind.get("type"):
            raise bad(f"mapper [{name}] cannot be changed from type [{old[name].get('type')}] to [{kind.get('type')}]")
        here = old.setdefault(name, {key: value for key, value in kind.items() if key != "properties"})
        if "properties" in kind:
            merge_properties(here.setdefault("properties", {}), kind["properties"])


def guessed_mapping(value: Json) -> Source:
    sample = next(iter(value)) if isinstance(value, list) else value
    match sample:
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "long"}
        case float():
            return {"type": "float"}
        case dict():
            return {"properties": {}}
    return {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}


def leaves(mapping: Source, prefix: str = "") -> Iterator[str]:
    for name, kind in mapping.get("properties", {}).items():
        if kind.get("type", "object") in ("object", "nested"):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
        yield from (f"{prefix}{name}.{part}" for part in kind.get("fields", {}))


def merged_document(old: Source, new: Source) -> Source:
    merged = dict(old)
    for name, value in new.items():
        here = merged.get(name)
        merged[name] = merged_document(here, value) if isinstance(here, dict) and isinstance(value, dict) else value
    return merged


def is_number(value: Json) -> bool:
    if isinstance(value, bool):
        return False
    with suppress(ValueError, TypeError):
        return float(value) is not None
    return False


def is_whole(value: Json) -> bool:
    return is_number(value) and -(2**63) <= float(value) < 2**63


def is_date(value: Json) -> bool:
    with suppress(ValueError, TypeError):
        return date_ms(value) is not None
    return False


def date_ms(value: Json) -> float:
    if isinstance(value, str) and not value.lstrip("-").replace(".", "", 1).isdigit():
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000
    return float(value)


TYPE_CHECKS: dict[str, Callable[[Json], bool]] = {
    "keyword": lambda value: True,
    "constant_keyword": lambda value: True,
    "wildcard": lambda value: True,
    "text": lambda value: True,
    "match_only_text": lambda value: True,
    "ip": lambda value: isinstance(value, str),
    "long": is_whole,
    "integer": is_whole,
    "short": is_whole,
    "double": is_number,
    "float": is_number,
    "boolean": lambda value: value in (True, False, "true", "false", ""),
    "date": is_date,
    "binary": lambda value: isinstance(value, str),
}
NUMBERS = {"long", "integer", "short", "double", "float"}
TEXTS = {"text", "match_only_text"}


# searching


Match = Callable[[Document], bool]


def values_at(source: Json, path: str) -> list[Json]:
    """Every value under a dotted path, lists taken apart; keys may hold dots themselves."""
    if isinstance(source, list):
        return [value for item in source for value in values_at(item, path)]
    if not isinstance(source, dict):
        return []
    found: list[Json] = []
    if path in source:
        value = source[path]
        found += value if isinstance(value, list) else [value]
    parts = path.split(".")
    for cut in range(1, len(parts)):
        head = ".".join(parts[:cut])
        if head in source:
            found += values_at(source[head], ".".join(parts[cut:]))
    return [value for value in found if value is not None]


def words(text: Json) -> list[str]:
    """As the standard analyzer, nearly."""
    return re.findall(r"\w+(?:[.']\w+)*", str(text).lower())


class Searcher:
    """The queries of one search on one index."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def kind(self, path: str) -> Source:
        if path in ("_id", "_index"):
            return {"type": "keyword"}
        kind = self.index.field(path)
        if kind is None:
            raise bad(f"no mapping for field [{path}] in [{self.index.name}]", "query_shard_exception")
        return kind

    def values(self, document: Document, path: str) -> list[Json]:
        if path == "_id":
            return [document.id]
        if path == "_index":
            return [self.index.name]
        values = values_at(document.source, path)
        if not values and "." in path and "fields" in (self.index.field(path.rpartition(".")[0]) or {}):
            values = values_at(document.source, path.rpartition(".")[0])
        return [value for value in values if not isinstance(value, dict)]

    def terms(self, document: Document, path: str) -> list[Json]:
        kind = self.kind(path)["type"]
        values = self.values(document, path)
        if kind in TEXTS:
            return [word for value in values for word in words(value)]
        return [self.term(kind, value) for value in values]

    @staticmethod
    def term(kind: str, value: Json) -> Json:
        if kind in NUMBERS:
            return float(value)
        if kind == "date":
            return date_ms(value)
        if kind == "boolean":
            return value in (True, "true")
        return json.dumps(value) if isinstance(value, bool) else str(value)

    def compile(self, query: Source) -> Match:
        if not isinstance(query, dict) or len(query) != 1:
            raise bad("[bool] query malformed: expected one query clause", "parsing_exception")
        ((name, body),) = query.items()
        method = getattr(self, f"query_{name}", None)
        if method is None:
            raise bad(f"unknown query [{name}]", "parsing_exception")
        compiled: Match = method(body)
        return compiled

    def query_match_all(self, body: Source) -> Match:
        known(body, {"boost"}, "match_all")
        return lambda document: True

    def query_match_none(self, body: Source) -> Match:
        known(body, set(), "match_none")
        return lambda document: False

    def query_bool(self, body: Source) -> Match:
        known(body, {"must", "filter", "should", "must_not", "minimum_should_match", "boost"}, "bool")
        part = {
            name: [self.compile(clause) for clause in (given if isinstance(given, list) else [given])]
            for name, given in body.items()
            if name in ("must", "filter", "should", "must_not")
        }
        needed = part.get("must", []) + part.get("filter", [])
        should, never = part.get("should", []), part.get("must_not", [])
        least = int(body.get("minimum_should_match", 1 if should and not needed else 0))
        return lambda document: (
            all(match(document) for match in needed)
            and not any(match(document) for match in never)
            and sum(match(document) for match in should) >= least
        )

    @staticmethod
    def one(body: Source, name: str) -> tuple[str, Json]:
        given = {key: value for key, value in body.items() if key != "boost"}
        if len(given) != 1:
            raise bad(f"[{name}] query doesn't support multiple fields", "parsing_exception")
        ((path, wanted),) = given.items()
        return path, wanted

    def query_term(self, body: Source) -> Match:
        path, wanted = self.one(body, "term")
        if isinstance(wanted, dict):
            known(wanted, {"value", "boost", "case_insensitive"}, "term")
            if wanted.get("case_insensitive"):
                low = str(wanted["value"]).lower()
                return lambda document: any(str(term).lower() == low for term in self.terms(document, path))
            wanted = wanted["value"]
        return self.query_terms({path: [wanted]})

    def query_terms(self, body: Source) -> Match:
        path, wanted = self.one(body, "terms")
        if not isinstance(wanted, list):
            raise bad("[terms] query requires a list of values", "parsing_exception")
        name = self.kind(path)["type"]
        accepted = {self.term(name, value) for value in wanted}
        return lambda document: not accepted.isdisjoint(self.terms(document, path))

    def query_ids(self, body: Source) -> Match:
        known(body, {"values"}, "ids")
        wanted = set(body["values"])
        return lambda document: document.id in wanted

    def query_range(self, body: Source) -> Match:
        path, limits = self.one(body, "range")
        known(limits, {"gt", "gte", "lt", "lte", "format", "boost"}, "range")
        type_name = self.kind(path)["type"]
        scale = 1000.0 if limits.get("format") == "epoch_second" else 1.0

        def limit(name: str) -> Json:
            value = limits.get(name)
            return None if value is None else self.term(type_name, float(value) * scale if scale != 1.0 else value)

        gt, gte, lt, lte = (limit(name) for name in ("gt", "gte", "lt", "lte"))

        def inside(term: Json) -> bool:
            return (
                (gt is None or term > gt)
                and (gte is None or term >= gte)
                and (lt is None or term < lt)
                and (lte is None or term <= lte)
            )

        return lambda document: any(inside(term) for term in self.terms(document, path))

    def query_prefix(self, body: Source) -> Match:
        path, wanted = self.one(body, "prefix")
        return self.pattern(path, wanted, lambda term, text: term.startswith(text))

    def query_wildcard(self, body: Source) -> Match:
        path, wanted = self.one(body, "wildcard")
        return self.pattern(path, wanted, wildcard_matches)

    def pattern(self, path: str, wanted: Json, matches: Callable[[str, str], bool]) -> Match:
        given = wanted if isinstance(wanted, dict) else {"value": wanted}
        known(given, {"value", "wildcard", "case_insensitive", "boost"}, "pattern")
        text, fold = str(given.get("value", given.get("wildcard"))), bool(given.get("case_insensitive"))
        name = self.kind(path)["type"]
        if name in NUMBERS | {"date", "boolean"}:
            raise bad(f"Can only use prefix and wildcard queries on keyword and text fields, not on [{path}]")
        text = text.lower() if fold else text
        return lambda document: any(
            matches(str(term).lower() if fold else str(term), text) for term in self.terms(document, path)
        )

    def query_exists(self, body: Source) -> Match:
        known(body, {"field", "boost"}, "exists")
        path = body["field"]
        self.kind(path)
        return lambda document: bool(values_at(document.source, path))

    def query_match(self, body: Source) -> Match:
        path, wanted = self.one(body, "match")
        given = wanted if isinstance(wanted, dict) else {"query": wanted}
        known(given, {"query", "operator", "lenient", "boost"}, "match")
        if self.kind(path)["type"] not in TEXTS:
            return self.query_term({path: given["query"]})
        asked, every = words(given["query"]), str(given.get("operator", "or")).lower() == "and"

        def matches(document: Document) -> bool:
            there = set(self.terms(document, path))
            return (all if every else any)(word in there for word in asked)

        return matches

    def query_simple_query_string(self, body: Source) -> Match:
        known(
            body,
            {"query", "fields", "default_operator", "lenient", "analyze_wildcard", "flags", "boost"},
            "simple_query_string",
        )
        patterns = body.get("fields") or ["*"]
        paths = [path for pattern in patterns for path in self.paths(pattern.partition("^")[0])]
        every = str(body.get("default_operator", "or")).lower() == "and"
        clauses = simple_clauses(str(body["query"]), every)

        def matches(document: Document) -> bool:
            return bool(clauses) and all(any(self.holds(document, paths, part) for part in group) for group in clauses)

        return matches

    def paths(self, pattern: str) -> list[str]:
        if "*" in pattern:
            return self.index.fields(pattern)
        self.kind(pattern)
        return [pattern]

    def holds(self, document: Document, paths: list[str], part: tuple[bool, str, str]) -> bool:
        negated, form, text = part
        return any(self.field_holds(document, path, form, text) for path in paths) != negated

    def field_holds(self, document: Document, path: str, form: str, text: str) -> bool:
        kind = self.kind(path)["type"]
        if kind == "flat_object":
            terms = [str(value) for value in flat_values(values_at(document.source, path))]
        elif kind in NUMBERS | {"date", "boolean"}:
            terms = [str(value) for value in self.values(document, path)]
        else:
            terms = [str(term) for term in self.terms(document, path)]
        wanted = text.lower() if kind in TEXTS else text
        if form == "prefix":
            return any(term.startswith(wanted) for term in terms)
        if kind in TEXTS:
            return phrase_in(words(text), terms)
        return wanted in terms


def flat_values(value: Json) -> Iterator[Json]:
    if isinstance(value, dict):
        for item in value.values():
            yield from flat_values(item)
    elif isinstance(value, list):
        for item in value:
            yield from flat_values(item)
    elif value is not None:
        yield value


def phrase_in(asked: list[str], there: list[str]) -> bool:
    return bool(asked) and any(there[at : at + len(asked)] == asked for at in range(len(there) - len(asked) + 1))


def wildcard_matches(term: str, pattern: str) -> bool:
    """``*``, ``?``, and a backslash before either that is meant as it is."""
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    wild = {"*": ".*", "?": "."}
    return re.fullmatch("".join(wild.get(part) or re.escape(part[-1]) for part in parts), term, re.DOTALL) is not None


def simple_clauses(query: str, every: bool) -> list[list[tuple[bool, str, str]]]:
    """Groups that must all hold, each of alternatives: (negated, form, text)."""
    groups: list[list[tuple[bool, str, str]]] = []
    join = every
    for sign, phrase, word in re.findall(r'([+|-]?)(?:"([^"]*)"|([^\s+|"]+))', query):
        form = "phrase" if phrase else "prefix" if word.endswith("*") and len(word) > 1 else "term"
        part = (sign == "-", form, phrase or word.removesuffix("*"))
        must = (join or sign == "+") and sign != "|"
        if must or not groups:
            groups.append([part])
        else:
            groups[-1].append(part)
    return groups


@dataclass(frozen=True)
class Hit:
    index: Index
    document: Document
    sort: tuple[Json, ...] = ()


def sort_key(value: Json, descending: bool, missing_last: bool) -> tuple[Any, ...]:
    if value is None:
        return (1 if missing_last else -1, 0)
    return (0, Descending(value) if descending else value)


@dataclass(frozen=True)
class Descending:
    value: Any

    def __lt__(self, other: Descending) -> bool:
        return bool(other.value < self.value)


@dataclass(frozen=True)
class Order:
    path: str
    descending: bool
    missing_last: bool
    unmapped_type: str | None

    def value(self, hit: Hit) -> Json:
        if self.path == "_doc":
            return hit.document.seq_no
        kind = hit.index.field(self.path)
        if kind is None:
            if self.unmapped_type is None:
                raise bad(f"No mapping found for [{self.path}] in order to sort on", "query_shard_exception")
            return None
        if kind.get("type") in TEXTS | {None, "flat_object"}:
            raise bad(f"Text fields are not optimised for sorting: [{self.path}]")
        terms = Searcher(hit.index).terms(hit.document, self.path)
        if not terms:
            return None
        value = (max if self.descending else min)(terms)
        return int(value) if kind["type"] in ("long", "integer", "short", "date") else value

    def key(self, value: Json) -> tuple[Any, ...]:
        return sort_key(value, self.descending, self.missing_last)


def orders(given: Json) -> list[Order]:
    found = []
    for one in given if isinstance(given, list) else [given]:
        clause = {one: {}} if isinstance(one, str) else one
        ((path, how),) = clause.items()
        options = {"order": how} if isinstance(how, str) else how
        known(options, {"order", "missing", "unmapped_type"}, f"sort on [{path}]")
        if path in ("_id", "_score"):
            raise bad(f"sorting on [{path}] is not offered here: give the document a field of its own")
        if options.get("order", "asc") not in ("asc", "desc"):
            raise bad(f"no enum constant for sort order [{options['order']}]")
        found.append(
            Order(
                path,
                options.get("order", "asc") == "desc",
                options.get("missing", "_last") == "_last",
                options.get("unmapped_type"),
            )
        )
    return found


def chosen_source(source: Source, wanted: Json) -> Source | None:
    """``_source``: false, true, a list of patterns, or includes and excludes."""
    if wanted is False or wanted == "false":
        return None
    if wanted in (None, True, "true", ""):
        return source
    given = wanted if isinstance(wanted, dict) else {"includes": wanted}
    known(given, {"includes", "excludes", "include", "exclude"}, "_source")
    listed = lambda value: value.split(",") if isinstance(value, str) else list(value or [])  # noqa: E731
    return picked(source, listed(given.get("includes")), listed(given.get("excludes")))


def picked(source: Source, includes: list[str], excludes: list[str], prefix: str = "") -> Source:
    kept: Source = {}
    for name, value in source.items():
        path = prefix + name
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in excludes):
            continue
        if not includes or any(fnmatch.fnmatchcase(path, pattern) for pattern in includes):
            kept[name] = picked(value, [], excludes, path + ".") if isinstance(value, dict) else value
        elif isinstance(value, dict) and (inner := picked(value, includes, excludes, path + ".")):
            kept[name] = inner
    return kept


def duration_s(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if found is None:
        raise bad(f"failed to parse [{text}] as a time value")
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


# requests


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    parameters: dict[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    def json(self) -> Source:
        if not self.body:
            return {}
        try:
            parsed = json.loads(self.body)
        except ValueError as error:
            raise bad(f"json_parse_exception: {error}", "parse_exception") from None
        if not isinstance(parsed, dict):
            raise bad("expected a JSON object", "parse_exception")
        return parsed

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.parameters.get(name)
        if value is None:
            return default
        if value not in ("true", "false", ""):
            raise bad(f"Failed to parse value [{value}] as only [true] or [false] are allowed")
        return value != "false"

    def whole(self, name: str) -> int | None:
        return int(self.parameters[name]) if name in self.parameters else None


Answer = tuple[int, Json]

COMMON = "pretty human error_trace filter_path"
WRITING = "refresh timeout wait_for_active_shards routing require_alias"
CHOOSING = "_source _source_includes _source_excludes"
INDICES = "ignore_unavailable allow_no_indices expand_wildcards"
ROUTES: tuple[tuple[str, str, str, str], ...] = (
    ("GET", "/", "info", ""),
    ("HEAD", "/", "info", ""),
    ("GET", "/_cluster/health(?:/(?P<name>[^/]+))?", "health", "wait_for_status timeout level local"),
    ("GET", "/_cat/indices(?:/(?P<name>[^/]+))?", "cat_indices", "format h s bytes expand_wildcards"),
    ("PUT|POST", "/_index_template/(?P<name>[^/]+)", "put_template", "create cluster_manager_timeout"),
    ("GET|HEAD", "/_index_template/(?P<name>[^/]+)", "get_template", ""),
    ("DELETE", "/_index_template/(?P<name>[^/]+)", "delete_template", ""),
    ("POST|PUT", "/_bulk", "bulk", f"{WRITING} {CHOOSING}"),
    ("POST|PUT", "/(?P<name>[^/_][^/]*)/_bulk", "bulk", f"{WRITING} {CHOOSING}"),
    ("POST|GET", "/_mget", "mget", f"realtime refresh preference routing {CHOOSING}"),
    ("POST|GET", "/(?P<name>[^/_][^/]*)/_mget", "mget", f"realtime refresh preference routing {CHOOSING}"),
    ("POST|GET", "/_refresh", "refresh", INDICES),
    ("POST|GET", "/(?P<name>[^/_][^/]*)/_refresh", "refresh", INDICES),
    ("POST|GET", "/_search", "search", f"size from timeout track_total_hits preference {CHOOSING} {INDICES}"),
    (
        "POST|GET",
        "/(?P<name>[^/_][^/]*)/_search",
        "search",
        f"size from timeout track_total_hits seq_no_primary_term version preference {CHOOSING} {INDICES}",
    ),
    ("POST|GET", "/(?P<name>[^/_][^/]*)/_count", "count", INDICES),
    (
        "POST",
        "/(?P<name>[^/_][^/]*)/_delete_by_query",
        "delete_by_query",
        f"refresh conflicts wait_for_completion max_docs scroll_size slices timeout {INDICES}",
    ),
    ("POST|PUT", "/(?P<name>[^/_][^/]*)/_create/(?P<id>[^/]+)", "create", WRITING),
    ("PUT|POST", "/(?P<name>[^/_][^/]*)/_doc/(?P<id>[^/]+)", "index", f"{WRITING} op_type if_seq_no if_primary_term"),
    ("POST", "/(?P<name>[^/_][^/]*)/_doc", "index", f"{WRITING} op_type"),
    ("GET|HEAD", "/(?P<name>[^/_][^/]*)/_doc/(?P<id>[^/]+)", "get", f"realtime refresh preference routing {CHOOSING}"),
    ("DELETE", "/(?P<name>[^/_][^/]*)/_doc/(?P<id>[^/]+)", "delete", f"{WRITING} if_seq_no if_primary_term"),
    (
        "POST",
        "/(?P<name>[^/_][^/]*)/_update/(?P<id>[^/]+)",
        "update",
        f"{WRITING} {CHOOSING} if_seq_no if_primary_term retry_on_conflict",
    ),
    ("PUT|POST", "/(?P<name>[^/_][^/]*)/_mapping", "put_mapping", "timeout write_index_only"),
    ("GET", "/(?P<name>[^/_][^/]*)/_mapping", "get_mapping", INDICES),
    ("PUT", "/(?P<name>[^/_][^/]*)/_settings", "put_settings", "timeout preserve_existing"),
    ("GET", "/(?P<name>[^/_][^/]*)/_settings", "get_settings", INDICES),
    ("PUT", "/(?P<name>[^/_][^/]*)", "create_index", "timeout wait_for_active_shards cluster_manager_timeout"),
    ("HEAD", "/(?P<name>[^/_][^/]*)", "index_exists", INDICES),
    ("GET", "/(?P<name>[^/_][^/]*)", "get_index", INDICES),
    ("DELETE", "/(?P<name>[^/_][^/]*)", "delete_index", f"timeout {INDICES}"),
)


class Cluster:
    """What the server holds; every method runs under its lock."""

    def __init__(self, *, refresh_interval: str | None = None) -> None:
        self.lock = threading.RLock()
        self.indices: dict[str, Index] = {}
        self.templates: dict[str, Source] = {}
        self.refresh_interval = refresh_interval
        self.primary_term = 1
        self.item_refusals: list[int] = []
        self.missing_shards = 0

    def answer(self, request: Request) -> tuple[Answer, Callable[[], None] | None]:
        """The answer, and what has to be waited for before it goes out (``refresh=wait_for``)."""
        method, names, parts = self.route(request)
        if unknown := request.parameters.keys() - set(f"{COMMON} {names}".split()):
            raise bad(f"request [{request.path}] contains unrecognized parameter: {sorted(unknown)}")
        with self.lock:
            touched: set[str] = set()
            answer: Answer = getattr(self, method)(request, touched=touched, **parts)
            return answer, self.refreshing(request, touched)

    @staticmethod
    def route(request: Request) -> tuple[str, str, dict[str, Any]]:
        allowed = []
        for methods, pattern, method, names in ROUTES:
            if found := re.fullmatch(pattern, request.path):
                if request.method in methods.split("|"):
                    return method, names, {key: unquote(value) for key, value in found.groupdict().items() if value}
                allowed.append(methods)
        if allowed:
            raise Refused(
                405, "method_not_allowed", f"Incorrect HTTP method for uri [{request.path}], allowed {allowed}"
            )
        raise bad(f"no handler found for uri [{request.path}] and method [{request.method}]")

    def refreshing(self, request: Request, touched: set[str]) -> Callable[[], None] | None:
        match request.parameters.get("refresh", "false"):
            case "true" | "":
                for name in touched:
                    self.indices[name].refresh()
            case "wait_for":
                return lambda: self.wait_refreshed(touched)
            case "false":
                pass
            case other:
                raise bad(f"Unknown value for refresh: [{other}]")
        return None

    def wait_refreshed(self, names: set[str]) -> None:
        for name in names:
            with self.lock:
                index = self.indices.get(name)
                left_s = (
                    index.unrefreshed_since + index.refresh_s - time.monotonic() if index and index.unrefreshed else 0
                )
            if left_s > 0:
                time.sleep(min(left_s, 5))
            with self.lock:
                if index is not None:
                    index.refresh_if_due()

    # finding indices

    def existing(self, name: str) -> Index:
        if name not in self.indices:
            raise no_index(name)
        return self.indices[name]

    def matching(self, request: Request, names: str) -> list[Index]:
        found: dict[str, Index] = {}
        for name in (names or "*").split(","):
            if "*" in name or name == "_all":
                pattern = "*" if name == "_all" else name
                found |= {key: index for key, index in self.indices.items() if fnmatch.fnmatchcase(key, pattern)}
            elif name in self.indices:
                found[name] = self.indices[name]
            elif not request.flag("ignore_unavailable"):
                raise no_index(name)
        for index in found.values():
            index.refresh_if_due()
        return list(found.values())

    def writable(self, name: str) -> Index:
        """An index that is not there is made only where a template speaks of it; a real server makes any."""
        if name not in self.indices:
            definition = self.from_templates(name)
            if definition is None:
                raise no_index(name)
            self.make(name, definition)
        return self.indices[name]

    def from_templates(self, name: str) -> Source | None:
        fitting = [
            template
            for template in self.templates.values()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in template["index_patterns"])
        ]
        best = max(fitting, key=lambda template: template.get("priority", 0), default=None)
        return None if best is None else best.get("template", {})

    def make(self, name: str, definition: Source) -> None:
        if name != name.lower() or re.search(r'[\\/*?"<>| ,#:]', name) or name.startswith(("-", "_", "+")):
            raise bad(f"Invalid index name [{name}]", "invalid_index_name_exception")
        index = Index(name, definition, primary_term=self.primary_term)
        if self.refresh_interval is not None:
            index.settings["refresh_interval"] = self.refresh_interval
        self.indices[name] = index

    # indices

    def info(self, request: Request, touched: set[str]) -> Answer:
        return 200, {
            "name": "stand-in",
            "cluster_name": "stand-in",
            "version": {"distribution": "opensearch", "number": VERSION},
            "tagline": "The OpenSearch Project: https://opensearch.org/",
        }

    def health(self, request: Request, touched: set[str], name: str = "") -> Answer:
        return 200, {"status": "green", "timed_out": False, "number_of_nodes": 1}

    def cat_indices(self, request: Request, touched: set[str], name: str = "*") -> Answer:
        if request.parameters.get("format") != "json":
            raise bad("only format=json is offered here")
        return 200, [
            {"index": index.name, "docs.count": str(len(index.visible)), "health": "green", "status": "open"}
            for index in self.matching(request, name)
        ]

    def put_template(self, request: Request, touched: set[str], name: str) -> Answer:
        body = request.json()
        known(body, {"index_patterns", "template", "priority", "version", "_meta", "composed_of"}, "index template")
        Index("check", body.get("template", {}), primary_term=1)
        for other, template in self.templates.items():
            same = set(template["index_patterns"]) & set(body["index_patterns"])
            if other != name and same and template.get("priority", 0) == body.get("priority", 0):
                raise bad(
                    f"index template [{name}] has index patterns {same} matching [{other}] with the same priority"
                )
        self.templates[name] = body
        return 200, {"acknowledged": True}

    def get_template(self, request: Request, touched: set[str], name: str) -> Answer:
        found = [key for key in self.templates if fnmatch.fnmatchcase(key, name)]
        if not found and "*" not in name:
            raise Refused(404, "resource_not_found_exception", f"index template matching [{name}] not found")
        return 200, {"index_templates": [{"name": key, "index_template": self.templates[key]} for key in found]}

    def delete_template(self, request: Request, touched: set[str], name: str) -> Answer:
        if self.templates.pop(name, None) is None:
            raise Refused(404, "index_template_missing_exception", f"index_template [{name}] missing")
        return 200, {"acknowledged": True}

    def create_index(self, request: Request, touched: set[str], name: str) -> Answer:
        if name in self.indices:
            raise bad(f"index [{name}] already exists", "resource_already_exists_exception")
        given, base = request.json(), self.from_templates(name) or {}
        definition = base | given
        if "mappings" in base and "mappings" in given:
            properties = base["mappings"].get("properties", {}) | given["mappings"].get("properties", {})
            definition["mappings"] = base["mappings"] | given["mappings"] | {"properties": properties}
        self.make(name, definition)
        return 200, {"acknowledged": True, "shards_acknowledged": True, "index": name}

    def index_exists(self, request: Request, touched: set[str], name: str) -> Answer:
        try:
            return (200 if self.matching(request, name) else 404), None
        except Refused:
            return 404, None

    def get_index(self, request: Request, touched: set[str], name: str) -> Answer:
        found = self.matching(request, name)
        return 200, {
            index.name: {"mappings": index.mapping, "settings": {"index": index.settings}, "aliases": {}}
            for index in found
        }

    def delete_index(self, request: Request, touched: set[str], name: str) -> Answer:
        for index in self.matching(request, name):
            del self.indices[index.name]
        return 200, {"acknowledged": True}

    def put_mapping(self, request: Request, touched: set[str], name: str) -> Answer:
        for index in self.matching(request, name):
            index.put_mapping(request.json())
        return 200, {"acknowledged": True}

    def get_mapping(self, request: Request, touched: set[str], name: str) -> Answer:
        return 200, {index.name: {"mappings": index.mapping} for index in self.matching(request, name)}

    def put_settings(self, request: Request, touched: set[str], name: str) -> Answer:
        for index in self.matching(request, name):
            index.settings |= flat_settings(request.json())
        return 200, {"acknowledged": True}

    def get_settings(self, request: Request, touched: set[str], name: str) -> Answer:
        return 200, {index.name: {"settings": {"index": index.settings}} for index in self.matching(request, name)}

    def refresh(self, request: Request, touched: set[str], name: str = "*") -> Answer:
        for index in self.matching(request, name):
            index.refresh()
        return 200, {"_shards": {"total": 1, "successful": 1, "failed": 0}}

    # one document

    def create(self, request: Request, touched: set[str], name: str, id: str) -> Answer:
        touched.add(name)
        return self.writable(name).write("create", id, request.json())

    def index(self, request: Request, touched: set[str], name: str, id: str = "") -> Answer:
        touched.add(name)
        index = self.writable(name)
        kind = request.parameters.get("op_type", "index" if id else "create")
        if kind not in ("index", "create"):
            raise bad(f"opType must be 'create' or 'index', found: [{kind}]")
        return index.write(kind, id or f"made-{index.next_seq_no}", request.json(), **only_if(request))

    def update(self, request: Request, touched: set[str], name: str, id: str) -> Answer:
        touched.add(name)
        return self.writable(name).update(id, request.json(), **only_if(request))

    def delete(self, request: Request, touched: set[str], name: str, id: str) -> Answer:
        touched.add(name)
        return self.existing(name).write("delete", id, None, **only_if(request))

    def get(self, request: Request, touched: set[str], name: str, id: str) -> Answer:
        index = self.existing(name)
        document = (index.documents if request.flag("realtime", True) else index.visible).get(id)
        if document is None:
            return 404, {"_index": name, "_id": id, "found": False}
        return 200, found_document(index, document, request.parameters.get("_source"))

    def mget(self, request: Request, touched: set[str], name: str = "") -> Answer:
        body = request.json()
        known(body, {"docs", "ids"}, "mget")
        if not body.get("docs") and not body.get("ids"):
            raise bad("Validation Failed: 1: no documents to get;", "action_request_validation_exception")
        asked = body.get("docs") or [{"_id": one} for one in body["ids"]]
        return 200, {"docs": [self.mget_one(request, one, name) for one in asked]}

    def mget_one(self, request: Request, asked: Source, name: str) -> Source:
        known(asked, {"_index", "_id", "_source", "routing"}, "mget")
        name, key = asked.get("_index", name), str(asked["_id"])
        if self.missing_shards:
            self.missing_shards -= 1
            error = {"type": "no_shard_available_action_exception", "reason": "No shard available for [...]"}
            return {"_index": name, "_id": key, "error": error}
        if name not in self.indices:
            return {"_index": name, "_id": key, "error": no_index(name).cause()}
        index = self.indices[name]
        document = (index.documents if request.flag("realtime", True) else index.visible).get(key)
        if document is None:
            return {"_index": name, "_id": key, "found": False}
        return found_document(index, document, asked.get("_source", request.parameters.get("_source")))

    # many documents

    def bulk(self, request: Request, touched: set[str], name: str = "") -> Answer:
        if not request.body.endswith(b"\n"):
            raise bad("The bulk request must be terminated by a newline [\\n]")
        lines = iter(request.body.split(b"\n"))
        operations = list(self.bulk_operations(lines))
        if not operations:
            raise bad("request body is required", "parse_exception")
        items = [self.bulk_item(action, meta, source, name, touched) for action, meta, source in operations]
        return 200, {"took": 1, "errors": any("error" in next(iter(item.values())) for item in items), "items": items}

    @staticmethod
    def bulk_operations(lines: Iterator[bytes]) -> Iterator[tuple[str, Source, Source | None]]:
        for line in lines:
            if not line.strip():
                continue
            given = json.loads(line)
            ((action, meta),) = given.items()
            if action not in ("index", "create", "update", "delete"):
                raise bad(
                    f"Malformed action/metadata line, expected one of [create, delete, index, update], got [{action}]"
                )
            known(
                meta,
                {"_index", "_id", "if_seq_no", "if_primary_term", "retry_on_conflict", "routing", "require_alias"},
                "bulk action line",
            )
            yield action, meta, None if action == "delete" else json.loads(next(lines))

    def bulk_item(self, action: str, meta: Source, source: Source | None, name: str, touched: set[str]) -> Source:
        name, key = meta.get("_index", name), meta.get("_id", "")
        when = {key: meta.get(key) for key in ("if_seq_no", "if_primary_term")}
        try:
            if self.item_refusals:
                raise Refused(self.item_refusals.pop(), "rejected_execution_exception", "the write queue is full")
            index = self.writable(name)
            touched.add(name)
            if action == "update":
                status, answer = index.update(key, source or {}, **when)
            else:
                if not key:
                    key = f"made-{index.next_seq_no}"
                status, answer = index.write(action, key, source, **when)
        except Refused as refused:
            status, answer = refused.status, {"_index": name, "_id": key, "error": refused.cause()}
        return {action: answer | {"status": status}}

    def search(self, request: Request, touched: set[str], name: str = "*") -> Answer:
        body = request.json()
        known(
            body,
            {"query", "sort", "search_after", "size", "from", "_source", "track_total_hits", "seq_no_primary_term"}
            | {"version", "aggs", "aggregations", "timeout"},
            "search",
        )
        size, start = (
            int(body.get("size", request.whole("size") or 10)),
            int(body.get("from", request.whole("from") or 0)),
        )
        if size + start > MAX_WINDOW:
            raise bad(f"Result window is too large, from + size must be less than or equal to: [{MAX_WINDOW}]")
        by = orders(body.get("sort", []))
        hits = self.hits(request, name, body.get("query"), by)
        total = len(hits)
        aggregations = {
            key: aggregation(hits, how) for key, how in (body.get("aggs") or body.get("aggregations") or {}).items()
        }
        if (after := body.get("search_after")) is not None:
            if len(after) != len(by) or not by:
                raise bad(f"search_after has {len(after)} value(s) but sort has {len(by)}.")
            wall = tuple(order.key(value) for order, value in zip(by, after, strict=True))
            hits = [
                hit for hit in hits if wall < tuple(order.key(value) for order, value in zip(by, hit.sort, strict=True))
            ]
        chosen = [self.shown_hit(hit, body, request) for hit in hits[start : start + size]]
        answer = {"took": 1, "timed_out": False, "_shards": {"total": 1, "successful": 1, "skipped": 0, "failed": 0}}
        answer["hits"] = {"total": {"value": total, "relation": "eq"}, "max_score": None, "hits": chosen}
        return 200, answer | ({"aggregations": aggregations} if aggregations else {})

    def hits(self, request: Request, name: str, query: Source | None, by: list[Order]) -> list[Hit]:
        hits = []
        for index in self.matching(request, name):
            matches = Searcher(index).compile(query or {"match_all": {}})
            hits += [Hit(index, document) for document in index.visible.values() if matches(document)]
        if not by:
            return hits
        hits = [replace(hit, sort=tuple(order.value(hit) for order in by)) for hit in hits]
        return sorted(hits, key=lambda hit: tuple(order.key(value) for order, value in zip(by, hit.sort, strict=True)))

    @staticmethod
    def shown_hit(hit: Hit, body: Source, request: Request) -> Source:
        shown: Source = {"_index": hit.index.name, "_id": hit.document.id, "_score": None}
        if body.get("seq_no_primary_term") or request.flag("seq_no_primary_term"):
            shown |= {"_seq_no": hit.document.seq_no, "_primary_term": hit.document.primary_term}
        if body.get("version") or request.flag("version"):
            shown["_version"] = hit.document.version
        source = chosen_source(hit.document.source, body.get("_source", request.parameters.get("_source")))
        shown |= {} if source is None else {"_source": source}
        return shown | ({"sort": list(hit.sort)} if hit.sort else {})

    def count(self, request: Request, touched: set[str], name: str) -> Answer:
        body = request.json()
        known(body, {"query"}, "count")
        return 200, {"count": len(self.hits(request, name, body.get("query"), [])), "_shards": {"failed": 0}}

    def delete_by_query(self, request: Request, touched: set[str], name: str) -> Answer:
        body = request.json()
        known(body, {"query", "max_docs"}, "delete_by_query")
        if "query" not in body:
            raise bad("Validation Failed: query is missing", "action_request_validation_exception")
        most = request.whole("max_docs") or body.get("max_docs")
        deleted = conflicts = 0
        for hit in self.hits(request, name, body["query"], [])[:most]:
            if hit.index.documents.get(hit.document.id) != hit.document:  # changed since it was refreshed
                conflicts += 1
                continue
            hit.index.write("delete", hit.document.id, None)
            touched.add(hit.index.name)
            deleted += 1
        answer = {"deleted": deleted, "version_conflicts": conflicts, "total": deleted + conflicts, "failures": []}
        if conflicts and request.parameters.get("conflicts", "abort") == "abort":
            return 409, answer
        return 200, answer


def only_if(request: Request) -> dict[str, int | None]:
    return {name: request.whole(name) for name in ("if_seq_no", "if_primary_term")}


def found_document(index: Index, document: Document, wanted: Json) -> Source:
    source = chosen_source(document.source, wanted)
    return document.address(index.name) | {"found": True} | ({} if source is None else {"_source": source})


def aggregation(hits: list[Hit], how: Source) -> Source:
    known(how, {"terms", "max", "min", "value_count", "cardinality"}, "aggregation")
    ((kind, body),) = how.items()
    known(body, {"field", "size", "order"}, kind)
    found = [term for hit in hits for term in Searcher(hit.index).terms(hit.document, body["field"])]
    match kind:
        case "terms":
            counted = sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))
            shown = counted[: body.get("size", 10)]
            rest = sum(count for _, count in counted) - sum(count for _, count in shown)
            return {"buckets": [{"key": key, "doc_count": n} for key, n in shown], "sum_other_doc_count": rest}
        case "value_count":
            return {"value": len(found)}
        case "cardinality":
            return {"value": len(set(found))}
    return {"value": (max if kind == "max" else min)(found, default=None)}


# the server


@dataclass
class Fault:
    """What happens to requests whose line (``PUT /index/_create/7``) the pattern is found in."""

    pattern: str
    left: float
    status: int = 0
    drop: bool = False
    slow_s: float = 0.0


@dataclass
class StandIn:
    """``with StandIn() as server:`` an OpenSearch at ``server.url``."""

    port: int = 0
    user: str = ""
    password: str = ""
    tls: ssl.SSLContext | None = None
    refresh_interval: str | None = None
    """Instead of that of the indices' settings, such as ``50ms``."""
    cluster: Cluster = field(init=False)
    seen: list[str] = field(default_factory=list)
    """The lines of all requests answered or refused, in order."""
    _faults: list[Fault] = field(default_factory=list)
    _server: Server | None = None
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.cluster = Cluster(refresh_interval=self.refresh_interval)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Accept again, on the same port; what was acknowledged is there."""
        assert self._server is None
        self._server = Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="stand-in")
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and cut those that are open. What was written and not refreshed is searchable after."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.cut()
        server.server_close()
        self._thread.join()
        with self.cluster.lock:
            self.cluster.primary_term += 1
            for index in self.cluster.indices.values():
                index.primary_term += 1
                index.refresh()

    # switches

    def slow(self, slow_s: float, pattern: str = "", *, times: float = float("inf")) -> None:
        self._faults.append(Fault(pattern, times, slow_s=slow_s))

    def fail(self, status: int, pattern: str = "", *, times: float = 1) -> None:
        """Refuse the next ``times`` requests, unprocessed."""
        self._faults.append(Fault(pattern, times, status=status))

    def drop(self, pattern: str = "", *, times: float = 1) -> None:
        """Process the next ``times`` requests and cut the connection instead of answering."""
        self._faults.append(Fault(pattern, times, drop=True))

    def miss_shards(self, times: int) -> None:
        """The next ``times`` documents asked for by _mget are in an index that is just being made."""
        with self.cluster.lock:
            self.cluster.missing_shards += times

    def reject_items(self, times: int, status: int = 429) -> None:
        """Refuse the next ``times`` operations inside bulk requests."""
        with self.cluster.lock:
            self.cluster.item_refusals += [status] * times

    def mend(self) -> None:
        with self.cluster.lock:
            self._faults.clear()
            self.cluster.item_refusals.clear()

    def fault_for(self, line: str) -> Fault | None:
        with self.cluster.lock:
            self.seen.append(line)
            for fault in self._faults:
                if fault.left > 0 and re.search(fault.pattern, line):
                    fault.left -= 1
                    return fault
        return None

    # looking in

    def documents(self, index: str) -> dict[str, Source]:
        """Everything written to an index, refreshed or not."""
        with self.cluster.lock:
            found = self.cluster.indices.get(index)
            return {} if found is None else {key: document.source for key, document in found.documents.items()}

    def count_seen(self, pattern: str) -> int:
        return sum(1 for line in list(self.seen) if re.search(pattern, line))


class Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], standin: StandIn) -> None:
        self.standin = standin
        self.stopping = threading.Event()
        self.open: set[socket.socket] = set()
        self.guard = threading.Lock()
        super().__init__(address, Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.standin.tls is not None:
            request.settimeout(10)
            try:
                request = self.standin.tls.wrap_socket(request, server_side=True)
            except OSError:
                return
        with self.guard:
            self.open.add(request)
        try:
            if not self.stopping.is_set():
                Handler(request, client_address, self)
        except OSError:  # the client, or stop(), cut it
            pass
        finally:
            with self.guard:
                self.open.discard(request)
            request.close()

    def cut(self) -> None:
        self.stopping.set()
        with self.guard:
            for connection in self.open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_any(self) -> None:
        try:
            request = self.read_request()
        except Refused as refused:
            self.close_connection = True
            self.reply((refused.status, refused.body()))
            return
        fault = self.server.standin.fault_for(request.line)
        if fault is not None and fault.slow_s:
            self.server.stopping.wait(fault.slow_s)
        if self.server.stopping.is_set():
            self.close_connection = True
            return
        if fault is not None and fault.status:
            self.reply((fault.status, Refused(fault.status, "rejected_execution_exception", "as a test asked").body()))
            return
        answer = self.answer(request)
        if fault is not None and fault.drop:
            self.close_connection = True
            return
        self.reply(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815

    def read_request(self) -> Request:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            raise Refused(413, "content_too_long_exception", f"entity content is too long [{length}]")
        body = self.rfile.read(length)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        expected = base64.b64encode(f"{self.server.standin.user}:{self.server.standin.password}".encode()).decode()
        if self.server.standin.user and self.headers.get("Authorization") != f"Basic {expected}":
            raise Refused(401, "security_exception", "missing or wrong credentials")
        if body and not str(self.headers.get("Content-Type")).startswith(("application/json", "application/x-ndjson")):
            raise Refused(
                406, "not_acceptable", f"Content-Type header [{self.headers.get('Content-Type')}] is not supported"
            )
        parts = urlsplit(self.path)
        return Request(self.command, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), body)

    def answer(self, request: Request) -> Answer:
        try:
            answer, wait = self.server.standin.cluster.answer(request)
        except Refused as refused:
            return refused.status, refused.body()
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
            return 400, bad(f"{type(error).__name__}: {error}", "parse_exception").body()
        if wait is not None:
            wait()
        return answer

    def reply(self, answer: Answer) -> None:
        status, value = answer
        body = b"" if value is None or self.command == "HEAD" else json.dumps(value).encode()
        reason = "OK" if status < 400 else "Refused"
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json; charset=UTF-8\r\n"
        close = "Connection: close\r\n" if self.close_connection else ""
        self.wfile.write(f"{head}{close}Content-Length: {len(body)}\r\n\r\n".encode() + body)
