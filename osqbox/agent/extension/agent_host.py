"""What an agent's extension manager answers for the agent itself: its SQL, flags, tables, config."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import trio

from osqbox.agent import logs
from osqbox.agent.client import TLS, Core
from osqbox.agent.extension import routes
from osqbox.agent.extension.messages import OptionInfo, Response, Row, refused
from osqbox.agent.extension.registry import Items
from osqbox.agent.sql import DEFAULT_MAX_ROWS, Engine, QueryResult, Tables
from osqbox.errors import OsqboxError
from osqbox.schema import load_schema

_CORE_PLUGINS = {
    "config": frozenset({"tls", "filesystem"}),
    "distributed": frozenset({"tls"}),
    "enroll": frozenset({"tls"}),
    "logger": frozenset({"tls", "filesystem", "stdout"}),
}


class Agent(Protocol):
    """The driver of an agent's core, as far as its manager needs it."""

    @property
    def core(self) -> Core: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def tables(self) -> Tables:
        """Those its queries see: with a `LiveTables` that the manager fills, extensions' are among them."""
        ...

    async def query(self, sql: str) -> QueryResult: ...
    def settle(self) -> None:
        """Called after a change to the core: wakes who waits for it."""
        ...


class AgentHost:
    """A `Host` over a running agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def items(self) -> Items:
        return {**_CORE_PLUGINS, "table": frozenset(load_schema().names)}

    def options(self) -> Mapping[str, OptionInfo]:
        flags = self._agent.core.flags
        known = {
            str(row["name"]): OptionInfo(str(row["value"]), str(row["default_value"]), str(row["type"]))
            for row in flags.rows()
        }
        return {**known, **{name: OptionInfo(value, "", "string") for name, value in flags.custom().items()}}

    async def query(self, sql: str) -> Response:
        result = await self._agent.query(sql)
        if result.status:
            return refused(result.message)
        return Response(rows=[dict(sorted(row.items())) for row in result.rows])

    async def columns(self, sql: str) -> Response:
        ask = functools.partial(self._agent.engine.columns, sql, tables=self._agent.tables)
        found, error = await _in_thread(ask)
        return refused(error) if error else Response(rows=[{name: kind} for name, kind in found])

    async def call(self, registry: str, item: str, request: Row) -> Response:
        match registry:
            case "table":
                return await self._call_table(item, request)
            case "config":
                return self._call_config(request)
            case "logger" if item == TLS:
                return self._call_logger(request)
        return refused(f"The core's {registry} plugin {item} cannot be called by an extension")

    async def _call_table(self, item: str, request: Row) -> Response:
        table = load_schema()[item]
        match request.get("action"):
            case "columns":
                return Response(rows=routes.table_routes(table))
            case "generate":
                found = self._agent.tables.get(table.name)
                context = routes.read_context(request.get("context", ""))
                if found is None:
                    return Response()
                try:
                    rows = await _in_thread(lambda: routes.texts(found.generate(context)))
                except (OsqboxError, OSError, ValueError) as error:
                    return refused(f"Error generating table {item}: {error}")
                return Response(rows=rows[:DEFAULT_MAX_ROWS])
        return refused(f"Unknown table plugin action: {request.get('action')}")

    def _call_config(self, request: Row) -> Response:
        """ConfigPlugin::call: an extension pushes a source, or asks for an option (config_plugin.cpp)."""
        match request.get("action"):
            case "update" if "source" in request and "data" in request:
                self._agent.core.push_config(request["source"], request["data"])
                self._agent.settle()
                return Response()
            case "update":
                return refused("Missing source or data")
            case "option" if "name" in request:
                option = self.options().get(request["name"])
                return Response(rows=[{"name": request["name"], "value": option.value if option else ""}])
            case "option":
                return refused("Missing option name")
        return refused(f"Config plugin action unknown: {request.get('action')}")

    def _call_logger(self, request: Row) -> Response:
        """Lines of an extension's own go out with the agent's."""
        core = self._agent.core
        if TLS not in core.logger_plugins:
            return refused("The tls logger is not active")
        line = request.get("string", request.get("snapshot", ""))
        try:
            is_object = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            return refused("Expected a JSON object in string or snapshot")
        core.buffer.add(logs.RESULT, line, core.now, core.flags.integer("buffered_log_max"))
        self._agent.settle()
        return Response()


async def _in_thread(call: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
