"""What a host has to tell: inventory documents and log lines, from the rows of osquery's tables. Pure."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from osqbox.agent.comms.messages import Stateless

Row = Mapping[str, str]
ReadTable = Callable[[str], Sequence[Row]]
"""A table's rows, empty where the host does not have it."""

_PACKAGES = (("deb_packages", "deb"), ("rpm_packages", "rpm"), ("homebrew_packages", "macports"), ("programs", "win"))
_PROTOCOLS = {"6": "tcp", "17": "udp"}
_OS_TYPES = {"darwin": "macOS", "windows": "Windows"}


@dataclass(frozen=True, slots=True)
class Fact:
    """One document of an inventory."""

    collector: str
    """hardware, system, networks, packages, ports, processes or hotfixes."""
    id: str
    data: dict[str, Any]


def host_of(read: ReadTable) -> dict[str, Any]:
    """hostname, architecture, ip and os, as an agent tells them of itself."""
    system, os = _first(read("system_info")), _first(read("os_version"))
    platform = os.get("platform", "")
    return {
        "hostname": system.get("hostname", ""),
        "architecture": system.get("cpu_type", ""),
        "ip": [row["address"] for row in read("interface_addresses") if _is_outside(row.get("address", ""))],
        "os": {
            "name": os.get("name", ""),
            "type": _OS_TYPES.get(platform, "Linux"),
            "version": os.get("version", ""),
        },
    }


def inventory(read: ReadTable, *, limit: int | None = None) -> Iterator[Fact]:
    """What the host consists of, at most ``limit`` documents of each collector; without values that always change."""
    for collect in (_hardware, _system, _networks, _packages, _hotfixes, _ports, _processes):
        yield from islice(collect(read), limit)


def _hardware(read: ReadTable) -> Iterator[Fact]:
    for row in read("system_info")[:1]:
        cpu = {"name": row.get("cpu_brand", ""), "cores": _number(row.get("cpu_logical_cores"))}
        data = {
            "observer": {"serial_number": row.get("hardware_serial", "")},
            "host": {"cpu": cpu, "memory": {"total": _number(row.get("physical_memory"))}},
        }
        yield _fact("hardware", data, row.get("hardware_serial", ""))


def _system(read: ReadTable) -> Iterator[Fact]:
    system, kernel = _first(read("system_info")), _first(read("kernel_info"))
    for row in read("os_version")[:1]:
        os = {"name": row.get("name", ""), "version": row.get("version", ""), "platform": row.get("platform", "")}
        os["kernel"] = kernel.get("version", "")
        host = {"hostname": system.get("hostname", ""), "architecture": system.get("cpu_type", ""), "os": os}
        yield _fact("system", {"host": host}, row.get("name", ""))


def _networks(read: ReadTable) -> Iterator[Fact]:
    macs = {row.get("interface", ""): row.get("mac", "") for row in read("interface_details")}
    for row in read("interface_addresses"):
        name, address = row.get("interface", ""), row.get("address", "")
        host = {"ip": [address], "mac": [macs.get(name, "")]}
        data = {
            "host": host,
            "observer": {"ingress": {"interface": {"name": name}}},
            "network": {"mask": row.get("mask", "")},
        }
        yield _fact("networks", data, name, address)


def _packages(read: ReadTable) -> Iterator[Fact]:
    for table, kind in _PACKAGES:
        for row in read(table):
            name = row.get("name", "")
            package = {
                "name": name,
                "version": row.get("version", ""),
                "architecture": row.get("arch", ""),
                "type": kind,
            }
            yield _fact("packages", {"package": package}, table, name, row.get("arch", ""), row.get("version", ""))


def _hotfixes(read: ReadTable) -> Iterator[Fact]:
    for row in read("patches"):
        name = row.get("hotfix_id", "")
        yield _fact("hotfixes", {"package": {"hotfix": {"name": name}}}, name)


def _ports(read: ReadTable) -> Iterator[Fact]:
    for row in read("listening_ports"):
        protocol = _PROTOCOLS.get(row.get("protocol", ""))
        if protocol:
            port, address = _number(row.get("port")), row.get("address", "")
            data = {
                "network": {"protocol": protocol},
                "source": {"ip": [address], "port": port},
                "process": {"pid": _number(row.get("pid"))},
                "interface": {"state": "listening"},
            }
            yield _fact("ports", data, protocol, address, str(port), row.get("pid", ""))


def _processes(read: ReadTable) -> Iterator[Fact]:
    for row in read("processes"):
        pid = row.get("pid", "")
        process = {
            "pid": _number(pid),
            "name": row.get("name", ""),
            "command_line": row.get("cmdline", ""),
            "start": _number(row.get("start_time")),
            "parent": {"pid": _number(row.get("parent"))},
            "user": {"id": row.get("uid", "")},
        }
        yield _fact("processes", {"process": process}, pid, row.get("start_time", ""))


def log_lines(read: ReadTable, since: float, until: float, *, limit: int) -> list[Stateless]:
    """What a collector of logs finds of that stretch of time: logins and programs that began; else a sign of life."""
    hostname = _first(read("system_info")).get("hostname", "host")
    began = [
        *(_logged_in(row) for row in read("last") if row.get("type_name", "user-process") == "user-process"),
        *(_started(row) for row in read("processes")),
    ]
    found = sorted((at, text) for at, text in began if since < at <= until)[-limit:]
    return [_log(hostname, at, text) for at, text in found or [(until, "systemd[1]: logcollector is running.")]]


def _logged_in(row: Row) -> tuple[float, str]:
    who, pid = row.get("username", ""), row.get("pid", "")
    return float(_number(row.get("time"))), f"sshd[{pid}]: Accepted publickey for {who} from {row.get('host', '')}"


def _started(row: Row) -> tuple[float, str]:
    return float(_number(row.get("start_time"))), f"systemd[1]: Started {row.get('name', '')}[{row.get('pid', '')}]."


def _log(hostname: str, at: float, text: str) -> Stateless:
    when = dt.datetime.fromtimestamp(at, dt.UTC)
    original = f"{when:%b} {when.day:2d} {when:%H:%M:%S} {hostname} {text}"
    data = {"@timestamp": when.isoformat(timespec="milliseconds"), "event": {"original": original}}
    return Stateless("logcollector", "file", {**data, "log": {"file": {"path": "/var/log/syslog"}}})


def _fact(collector: str, data: dict[str, Any], *key: str) -> Fact:
    return Fact(collector, hashlib.blake2b(repr((collector, key)).encode(), digest_size=10).hexdigest(), data)


def _first(rows: Sequence[Row]) -> Row:
    return rows[0] if rows else {}


def _number(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _is_outside(address: str) -> bool:
    return bool(address) and not address.startswith(("127.", "::1", "fe80"))
