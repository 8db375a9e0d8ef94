"""The tables in which an agent shows itself: osquery_info, its flags, schedule, packs and registry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from osqbox.agent.client import Core
from osqbox.agent.messages import VERSION
from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.schema import load_schema

_PLUGINS = (
    *(("config", name) for name in ("filesystem", "tls")),
    *(("distributed", "tls"), ("enroll", "tls")),
    *(("logger", name) for name in ("filesystem", "stdout", "tls")),
)
_BUILDS = {16: ("darwin", "10.15"), 2: ("windows", "10"), 8: ("linux", "centos7")}
"""Platform and distribution as the official packages say, by bit of the platform type."""


def own_tables(core: Core) -> dict[str, TableSource]:
    """Read from query threads while the core moves on: every value is replaced whole, never changed in place."""

    def osquery_info(_context: Context) -> Iterator[Row]:
        who = core.identity
        platform, distro = next((b for bit, b in _BUILDS.items() if who.platform_type & bit), ("linux", "centos7"))
        yield {
            "pid": who.pid,
            "uuid": who.uuid,
            "instance_id": who.instance_id,
            "version": VERSION,
            "config_hash": core.config_hash,
            "config_valid": int(core.config_valid),
            "extensions": "inactive",
            "build_platform": platform,
            "build_distro": distro,
            "start_time": int(who.started),
            "watcher": -1,
            "platform_mask": who.platform_type,
        }

    def osquery_flags(_context: Context) -> Iterable[Row]:
        return core.flags.rows()

    def osquery_schedule(_context: Context) -> Iterator[Row]:
        performance = core.performance
        denylist = core.denylist.until
        for _, query in core.config.queries():
            cost = performance.get(query.name)
            if cost is None:
                continue
            yield {
                "name": query.name,
                "query": query.query,
                "interval": query.interval_s,
                "executions": cost.executions,
                "last_executed": cost.last_executed,
                "denylisted": int(denylist.get(query.name, 0) > core.now),
                "output_size": cost.output_size,
                "wall_time": cost.wall_time_ms // 1000,
                "wall_time_ms": cost.wall_time_ms,
                "last_wall_time_ms": cost.last_wall_time_ms,
                "user_time": cost.user_time,
                "last_user_time": cost.last_user_time,
                "system_time": cost.system_time,
                "last_system_time": cost.last_system_time,
                "average_memory": cost.memory // cost.executions if cost.executions else 0,
                "last_memory": cost.last_memory,
            }

    def osquery_packs(_context: Context) -> Iterator[Row]:
        for pack in core.config.packs:
            yield {
                "name": pack.name,
                "platform": pack.platform,
                "version": pack.version,
                "shard": pack.shard,
                "discovery_cache_hits": 0,
                "discovery_executions": 0,
                "active": int(pack.applies and core.pack_active.get(pack.name, True)),
            }

    def osquery_extensions(_context: Context) -> Iterator[Row]:
        yield {
            "uuid": 0,
            "name": "core",
            "version": VERSION,
            "sdk_version": "0.0.0",
            "path": "",
            "type": "core",
        }

    def osquery_registry(_context: Context) -> Iterator[Row]:
        tables = (("table", table.name) for table in load_schema())
        active = {
            ("config", core.config_plugin),
            ("distributed", core.distributed_plugin),
            *(("logger", name) for name in core.logger_plugins),
        }
        for registry, name in (*_PLUGINS, *tables):
            runs = registry in ("table", "enroll") or (registry, name) in active
            yield {"registry": registry, "name": name, "owner_uuid": 0, "internal": 0, "active": int(runs)}

    def osquery_events(_context: Context) -> Iterator[Row]:
        return iter(())  # no publisher runs: --disable_events

    rows = (
        *(osquery_info, osquery_flags, osquery_schedule, osquery_packs),
        *(osquery_extensions, osquery_registry, osquery_events),
    )
    return {generate.__name__: source(generate) for generate in rows}
