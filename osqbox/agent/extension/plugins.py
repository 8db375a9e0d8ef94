"""What an extension serves: plugins that answer ``call``. Their own work is done by functions given to them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from osqbox.agent.extension import routes
from osqbox.agent.extension.messages import OK, Response, Row, Rows, Status, refused
from osqbox.agent.sql import Context
from osqbox.schema import Column, Table

WANTS_STATUS, WANTS_EVENTS = 1, 2
"""Bits of a logger's features."""


class Plugin(Protocol):
    @property
    def registry(self) -> str: ...
    @property
    def name(self) -> str: ...
    def routes(self) -> Rows: ...
    async def call(self, request: Row) -> Response:
        """A plugin's failure is a Response that says so; what is raised becomes one."""
        ...


@dataclass(frozen=True)
class ConfigPlugin:
    """``generate`` gives each source's JSON text by its name."""

    name: str
    generate: Callable[[], Awaitable[Mapping[str, str]]]
    generate_pack: Callable[[str, str], Awaitable[str]] | None = None
    """The JSON of a pack that the config names instead of holding it; gets its name and value."""
    registry: str = "config"

    def routes(self) -> Rows:
        return []

    async def call(self, request: Row) -> Response:
        action = request.get("action")
        if action == "genConfig":
            return Response(rows=[dict(await self.generate())])
        if action == "genPack" and self.generate_pack is not None:
            name = request.get("name", "")
            return Response(rows=[{name: await self.generate_pack(name, request.get("value", ""))}])
        return refused(f"Not a valid config plugin action: {action}")


LogLine = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class LoggerPlugin:
    """``log_string`` gets each result line, ``log_snapshot`` (or it) each snapshot line, ``log_status`` statuses."""

    name: str
    log_string: LogLine
    log_status: Callable[[Sequence[Mapping[str, Any]]], Awaitable[None]] | None = None
    """Gets objects with the members s, f, i, m, h, c, u: severity, file, line, message, host identifier, times."""
    log_snapshot: LogLine | None = None
    registry: str = "logger"

    def routes(self) -> Rows:
        return []

    async def call(self, request: Row) -> Response:
        if request.get("action") == "features":
            # The code is the answer here: which further kinds of log are wanted.
            return Response(Status(WANTS_STATUS if self.log_status else OK))
        if "string" in request or "event" in request:
            await self.log_string(request.get("string", request.get("event", "")))
        elif "snapshot" in request:
            await (self.log_snapshot or self.log_string)(request["snapshot"])
        elif "string_batch" in request:
            for line in _texts(request["string_batch"]):
                await self.log_string(line)
        elif "init" in request or "status" in request:
            await self._statuses(request.get("log", ""))
        else:
            return refused("Not a valid logger plugin action")
        return Response()

    async def _statuses(self, log: str) -> None:
        found = _list(log)
        if self.log_status is not None and found:
            await self.log_status([entry for entry in found if isinstance(entry, dict)])


@dataclass(frozen=True)
class DistributedPlugin:
    """``get_queries`` gives the JSON of a distributed read, ``write_results`` gets that of a write."""

    name: str
    get_queries: Callable[[], Awaitable[str]]
    write_results: Callable[[str], Awaitable[None]]
    registry: str = "distributed"

    def routes(self) -> Rows:
        return []

    async def call(self, request: Row) -> Response:
        match request.get("action"):
            case "getQueries":
                return Response(rows=[{"results": await self.get_queries()}])
            case "writeResults":
                await self.write_results(request.get("results", ""))
                return Response(rows=[{"results": ""}])
        return refused("Not a valid distributed plugin action")


@dataclass(frozen=True)
class TablePlugin:
    """``generate`` gives rows of any values; it may make use of the query's constraints."""

    name: str
    columns: Sequence[tuple[str, str]]
    """Name and type: TEXT, INTEGER, BIGINT, UNSIGNED BIGINT, DOUBLE or BLOB."""
    generate: Callable[[Context], Awaitable[Iterable[Mapping[str, Any]]]]
    required: Sequence[str] = ()
    """At least one of these must be constrained."""
    index: Sequence[str] = ()
    """Columns by which ``generate`` finds rows cheaply."""
    registry: str = field(default="table")

    def routes(self) -> Rows:
        columns = tuple(Column(name, kind) for name, kind in self.columns)
        return routes.table_routes(Table(self.name, columns, required=tuple(self.required), index=tuple(self.index)))

    async def call(self, request: Row) -> Response:
        match request.get("action"):
            case "generate":
                return Response(rows=routes.texts(await self.generate(routes.read_context(request.get("context", "")))))
            case "columns":
                return Response(rows=self.routes())
        return refused("Not a valid table plugin action")


def _list(text: str) -> list[Any]:
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def _texts(text: str) -> list[str]:
    return [line if isinstance(line, str) else json.dumps(line) for line in _list(text)]
