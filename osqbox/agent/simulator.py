"""Hosts in the YAML format of Launcher's old simulator: patterns of SQL and the rows that answer them.

One type per ``*.yaml`` of a flat directory (``pkg/simulator``, Launcher 0.5 to 1.4)::

    name: base_darwin                 # unique in the directory
    parent: another_type              # optional; its answers come after this one's
    queries:
      - pattern: "select .* from system_info"
        results: [{hostname: mac-1}]

A pattern is a regular expression searched for anywhere in the SQL, both in lower case; the first that fits answers,
in the order of the file. SQL that nothing fits succeeds without rows, and is told once per type. Further than the
format: ``error: TEXT`` instead of results fails the query, and ``{index}`` and ``{name}`` in results are the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import regex

from osqbox.agent.profile.dice import Dice
from osqbox.agent.profile.host import AgentProcess, HostIdentity
from osqbox.agent.sql import DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT_S, Cancelled, QueryResult, Tables
from osqbox.errors import BadSetup

log = logging.getLogger(__name__)

FILE_MAX_BYTES = 16 * 1024 * 1024
MATCH_TIMEOUT_S = 1.0
PARENTS = 32
LINUX_PLATFORM_TYPE, DARWIN_PLATFORM_TYPE = 9, 21


class _Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pattern: str
    results: list[dict[str, Any]] = []
    error: str | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parent: str | None = None
    queries: list[_Query] = []


@dataclass(frozen=True, slots=True)
class _Answer:
    pattern: regex.Pattern[str]
    results: list[dict[str, str]]
    error: str | None


class HostType:
    """A kind of host: its answers, its parent's after them."""

    def __init__(self, name: str, answers: list[_Answer]) -> None:
        self.name = name
        self._answers = answers
        self._told: set[str] = set()

    def answer(self, sql: str, index: int) -> QueryResult:
        """What host number ``index`` says to ``sql``."""
        lowered = sql.lower()
        for each in self._answers:
            try:
                found = each.pattern.search(lowered, timeout=MATCH_TIMEOUT_S)
            except TimeoutError:
                return QueryResult(status=1, message=f"the pattern {each.pattern.pattern!r} took too long")
            if found:
                return _result(each, self.name, index)
        self._tell_once(sql)
        return QueryResult()

    def _tell_once(self, sql: str) -> None:
        if sql not in self._told and len(self._told) < 1000:
            self._told.add(sql)
            log.info("host type %s has no answer to: %s", self.name, sql[:200])


def _result(answer: _Answer, name: str, index: int) -> QueryResult:
    if answer.error is not None:
        return QueryResult(status=1, message=answer.error)
    rows = [
        {column: value.replace("{index}", str(index)).replace("{name}", f"{name}_{index}")
         for column, value in row.items()}
        for row in answer.results
    ]  # fmt: skip
    return QueryResult(tuple(rows[0]) if rows else (), [dict(row) for row in rows])


def load_host_types(directory: Path) -> dict[str, HostType]:
    """The types of a directory by name. Raises BadSetup with the file and what is wrong with it."""
    files = {path: _read(path) for path in _yaml_files(directory)}
    by_name: dict[str, _File] = {}
    for path, file in files.items():
        if file.name in by_name:
            raise BadSetup(f"{path}: expected a name of its own, got {file.name!r} once more")
        by_name[file.name] = file
    own = {file.name: _answers(path, file) for path, file in files.items()}
    return {name: HostType(name, [a for each in _line(name, by_name) for a in own[each]]) for name in by_name}


def _yaml_files(directory: Path) -> list[Path]:
    try:
        found = sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and path.is_file())
    except OSError as error:
        raise BadSetup(f"cannot read the host types of {directory}: {error.strerror}") from None
    if not found:
        raise BadSetup(f"{directory}: expected *.yaml files with host types, found none")
    return found


def _read(path: Path) -> _File:
    import yaml

    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise BadSetup(f"{path}: expected at most {FILE_MAX_BYTES} bytes")
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _File)
    except OSError as error:
        raise BadSetup(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadSetup(f"{path}: expected YAML: {error}") from None
    except msgspec.ValidationError as error:
        raise BadSetup(f"{path}: {error}") from None


def _answers(path: Path, file: _File) -> list[_Answer]:
    return [
        _Answer(_compiled(path, query.pattern), [_texts(row) for row in query.results], query.error)
        for query in file.queries
    ]


def _compiled(path: Path, pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern.lower())
    except regex.error as error:
        raise BadSetup(f"{path}: pattern {pattern!r}: {error}") from None


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    """YAML reads ``1`` as a number and ``yes`` as true; osquery's values are text."""
    return {str(name): "" if value is None else str(value) for name, value in row.items()}


def _line(name: str, by_name: Mapping[str, _File]) -> Iterator[str]:
    """The type and its ancestors, nearest first."""
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current not in by_name:
            raise BadSetup(f"host type {seen[-1]!r}: its parent {current!r} is in no file")
        if current in seen or len(seen) >= PARENTS:
            raise BadSetup(f"host type {name!r}: its parents go round in a circle: {' > '.join((*seen, current))}")
        seen.append(current)
        yield current
        current = by_name[current].parent


# -- as agents need them -----------------------------------------------------------------------------------------


class SimulatedHost:
    """One host of a type, as the swarm and the runner take a machine; it has no tables."""

    __slots__ = ("_dice", "host_type", "index")

    def __init__(self, host_type: HostType, seed: int | str, index: int, hardware_of: int | None = None) -> None:
        self.host_type = host_type
        self.index = index
        self._dice = Dice(str(seed), host_type.name, index if hardware_of is None else hardware_of)

    @property
    def identity(self) -> HostIdentity:
        version = self.host_type.answer("select * from os_version", self.index).rows
        platform = version[0].get("platform", "") if version else ""
        return HostIdentity(
            hostname=f"{self.host_type.name}_{self.index}",
            uuid=self._dice.uuid("hardware"),
            hardware_serial=self._dice.uuid("serial")[:12],
            platform=platform,
            platform_type=DARWIN_PLATFORM_TYPE if platform == "darwin" else LINUX_PLATFORM_TYPE,
            instance_id=Dice(self.host_type.name, self.index).uuid("instance").lower(),
        )

    def agent_process(self, now: float) -> AgentProcess:
        return AgentProcess(1000 + self.index % 30_000, 1, int(now))

    def tables(self, _now: Any, *, standalone: bool = False) -> Tables:  # noqa: ARG002 - a host's shape
        return {}


class SimulatedEngine:
    """Answers by patterns where `osqbox.agent.sql.Engine` runs SQL."""

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host

    def query(
        self,
        sql: str,
        *,
        tables: Tables | None = None,  # noqa: ARG002 - an engine's shape
        timeout_s: float = DEFAULT_TIMEOUT_S,  # noqa: ARG002
        max_rows: int = DEFAULT_MAX_ROWS,  # noqa: ARG002
        cancelled: Cancelled | None = None,  # noqa: ARG002
    ) -> QueryResult:
        return self._host.host_type.answer(sql, self._host.index)

    def raw_rows(self, name: str, *, tables: Tables | None = None) -> list[dict[str, str]]:  # noqa: ARG002
        """What enrollment sends of the host: its answer to the whole table."""
        return self.query(f"select * from {name}").rows
