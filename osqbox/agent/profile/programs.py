"""Processes, what hangs on a process, and the units and services that started them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from osqbox.agent.functions import SqlValue
from osqbox.agent.profile.description import fill
from osqbox.agent.profile.moment import Moment, Running
from osqbox.agent.sql import Context, Row

_LINUX_NAMESPACES = {"cgroup": 4026531835, "ipc": 4026531839, "mnt": 4026531841, "net": 4026531840}
_MORE_NAMESPACES = {"pid": 4026531836, "user": 4026531837, "uts": 4026531838}


def about(m: Moment, context: Context) -> Iterable[Running]:
    """The processes a query is about: one, or all."""
    wanted = context.integers("pid")
    if wanted is None:
        return m.processes
    found = (m.process(pid) for pid in wanted)
    return [process for process in found if process is not None]


def processes(m: Moment, context: Context) -> Iterator[Row]:
    """Times in milliseconds, sizes in bytes."""
    sizes = context.wants("resident_size", "total_size", "wired_size")
    texts = context.wants("cmdline", "cwd", "cgroup_path", "root", "on_disk", "path")
    ids = context.wants("uid", "gid", "euid", "egid", "suid", "sgid")
    rest = context.wants(
        "user_time", "system_time", "disk_bytes_read", "disk_bytes_written", "threads", "nice", "pgroup"
    )
    for process in about(m, context):
        row: dict[str, SqlValue] = {
            "pid": process.pid,
            "name": process.stream.program.name,
            "parent": process.parent,
            "start_time": process.start,
            "state": process.stream.program.state,
        }
        if texts:
            _add_texts(m, process, row)
        if ids:
            uid, gid = process.user.uid, process.user.gid
            row.update(uid=uid, euid=uid, suid=uid, gid=gid, egid=gid, sgid=gid)
        if sizes:
            resident = m.resident_bytes(process)
            row.update(resident_size=resident, total_size=resident * 3 + (4_096_000 if resident else 0), wired_size=0)
        if rest:
            _add_costs(m, process, row)
        yield row


def _add_texts(m: Moment, process: Running, row: dict[str, SqlValue]) -> None:
    program = process.stream.program
    known = m.process_texts(process) if "{" in program.cmdline + program.path + program.cwd else {}
    row["path"] = fill(program.path, known)
    row["cmdline"] = fill(program.cmdline, known)
    row["cwd"] = fill(program.cwd, known)
    row["root"] = "/" if m.description.platform == "linux" else ""
    row["on_disk"] = 1 if program.path else -1
    if m.description.platform == "linux":
        row["cgroup_path"] = _cgroup(process)


def _cgroup(process: Running) -> str:
    stream = process.stream
    if stream.person >= 0:
        return f"/user.slice/user-{process.user.uid}.slice/session-{stream.number}.scope"
    if not stream.program.path:
        return "/"
    return f"/system.slice/{stream.program.unit}" if stream.program.unit else "/init.scope"


def _add_costs(m: Moment, process: Running, row: dict[str, SqlValue]) -> None:
    """What grows while it lives, at a rate of its own."""
    program, age_s = process.stream.program, m.at - process.start
    rate = program.cpu * (0.5 + m.dice.share("rate", process.stream.number))
    row["user_time"] = int(age_s * rate * 1000)
    row["system_time"] = int(age_s * rate * 400)
    row["disk_bytes_read"] = int(age_s * rate * 60_000) * 4096 if program.path else 0
    row["disk_bytes_written"] = int(age_s * rate * 9_000) * 4096 if program.path else 0
    row["threads"], row["nice"] = program.threads, program.nice
    row["pgroup"] = process.pid if program.path else 0


def process_envs(m: Moment, context: Context) -> Iterator[Row]:
    for process in about(m, context):
        program = process.stream.program
        if not program.path:
            continue
        texts = m.process_texts(process)
        envs = dict(program.envs)
        if m.description.platform == "linux":
            envs.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            envs.setdefault("LANG", "C.UTF-8")
        if process.stream.person >= 0:
            envs.update(USER="{user}", HOME="{home}", LOGNAME="{user}")
        for key, value in envs.items():
            yield {"pid": process.pid, "key": key, "value": fill(value, texts)}


def process_open_files(m: Moment, context: Context) -> Iterator[Row]:
    for process in about(m, context):
        for fd, path in m.files(process):
            yield {"pid": process.pid, "fd": fd, "path": path}


def process_open_sockets(m: Moment, context: Context) -> Iterator[Row]:
    namespace = _net_namespace(m)
    for process in about(m, context):
        for found in m.sockets(process):
            yield {
                "pid": process.pid,
                "fd": found.fd,
                "socket": found.inode,
                "family": found.family,
                "protocol": found.protocol,
                "local_address": found.local,
                "remote_address": found.remote,
                "local_port": found.local_port,
                "remote_port": found.remote_port,
                "path": found.path,
                "state": found.state,
                "net_namespace": namespace,
            }


def _net_namespace(m: Moment) -> str:
    return str(_LINUX_NAMESPACES["net"]) if m.description.platform == "linux" else ""


def listening_ports(m: Moment, _context: Context) -> Iterator[Row]:
    """Sockets waiting for peers: TCP that listens, UDP without a peer, unix with a name."""
    namespace = _net_namespace(m)
    for process in m.processes:
        for found in m.sockets(process):
            if found.state == "LISTEN" or (found.protocol != 6 and not found.remote_port):
                yield {
                    "pid": process.pid,
                    "port": found.local_port,
                    "protocol": found.protocol,
                    "family": found.family,
                    "address": found.local,
                    "fd": found.fd,
                    "socket": found.inode,
                    "path": found.path,
                    "net_namespace": namespace,
                }


def process_namespaces(m: Moment, context: Context) -> Iterator[Row]:
    known = {f"{kind}_namespace": str(inode) for kind, inode in {**_LINUX_NAMESPACES, **_MORE_NAMESPACES}.items()}
    for process in about(m, context):
        yield {"pid": process.pid, **known}


def process_memory_map(m: Moment, context: Context) -> Iterator[Row]:
    """The program, its heap, the C library and the stack."""
    for process in about(m, context):
        path = fill(process.stream.program.path, m.process_texts(process))
        if not path:
            continue
        base = 0x550000000000 + m.dice.below(2**20, "base", process.pid) * 0x1000000
        library = 0x7F0000000000 + m.dice.below(2**20, "library", process.pid) * 0x10000
        inode, size = m.fleet.below(2**20, "inode", path), max(8192, m.resident_bytes(process) // 4096 * 4096)
        libc = "/usr/lib/x86_64-linux-gnu/libc.so.6"
        for start, length, permissions, offset, mapped in (
            (base, 0x8000, "r--p", 0, path),
            (base + 0x8000, 0x40000, "r-xp", 0x8000, path),
            (base + 0x48000, 0x4000, "rw-p", 0x48000, path),
            (base + 0x100000, size, "rw-p", 0, "[heap]"),
            (library, 0x28000, "r--p", 0, libc),
            (library + 0x28000, 0x188000, "r-xp", 0x28000, libc),
            (0x7FFC00000000, 0x21000, "rw-p", 0, "[stack]"),
        ):
            pseudo = mapped.startswith("[")
            yield {
                "pid": process.pid,
                "start": f"0x{start:x}",
                "end": f"0x{start + length:x}",
                "permissions": permissions,
                "offset": offset,
                "device": "00:00" if pseudo else "08:01",
                "inode": 0 if pseudo else inode,
                "path": mapped,
                "pseudo": int(pseudo),
            }


# -- units and services ------------------------------------------------------------------------------------------


def _started_units(m: Moment) -> Iterator[Running]:
    """One process for each unit: the one that was started."""
    seen: set[str] = set()
    for process in m.processes:
        unit = process.stream.program.unit
        if unit and unit not in seen and not process.stream.is_timed:
            seen.add(unit)
            yield process


def systemd_units(m: Moment, _context: Context) -> Iterator[Row]:
    for process in _started_units(m):
        program = process.stream.program
        user = "" if process.user.uid == 0 else process.user.name
        yield _unit(program.unit, program.description or program.name, "active", "running", "enabled", user)
    for role in m.roles.values():
        for unit in role.units:
            yield _unit(unit.id, unit.description or unit.id, unit.active, unit.sub, unit.file_state, "")


def _unit(name: str, description: str, active: str, sub: str, state: str, user: str) -> Row:
    escaped = "".join(c if c.isalnum() else f"_{ord(c):02x}" for c in name)
    return {
        "id": name,
        "description": description,
        "load_state": "loaded",
        "active_state": active,
        "sub_state": sub,
        "unit_file_state": state,
        "following": "",
        "object_path": f"/org/freedesktop/systemd1/unit/{escaped}",
        "job_id": 0,
        "job_type": "",
        "job_path": "/",
        "fragment_path": f"/lib/systemd/system/{name}",
        "user": user,
        "source_path": "",
    }


def services(m: Moment, _context: Context) -> Iterator[Row]:
    """Windows."""
    for process in _started_units(m):
        program = process.stream.program
        yield {
            "name": program.unit,
            "service_type": "SHARE_PROCESS" if "svchost" in program.path else "OWN_PROCESS",
            "display_name": program.description or program.unit,
            "status": "RUNNING",
            "pid": process.pid,
            "start_type": "AUTO_START",
            "win32_exit_code": 0,
            "service_exit_code": 0,
            "path": program.cmdline or program.path,
            "module_path": "",
            "description": program.description,
            "user_account": "LocalSystem" if process.user.name == "SYSTEM" else f"NT AUTHORITY\\{process.user.name}",
        }


def launchd(m: Moment, _context: Context) -> Iterator[Row]:
    """macOS."""
    for process in _started_units(m):
        program = process.stream.program
        folder = "/System/Library/LaunchDaemons" if program.unit.startswith("com.apple.") else "/Library/LaunchDaemons"
        yield {
            "path": f"{folder}/{program.unit}.plist",
            "name": f"{program.unit}.plist",
            "label": program.unit,
            "program": program.path,
            "run_at_load": "1",
            "keep_alive": "1",
            "on_demand": "",
            "disabled": "0",
            "username": process.user.name,
            "program_arguments": program.cmdline,
            "process_type": "",
        }


def startup_items(m: Moment, _context: Context) -> Iterator[Row]:
    for process in _started_units(m):
        program = process.stream.program
        yield {
            "name": program.unit,
            "path": f"/lib/systemd/system/{program.unit}",
            "args": "",
            "type": "systemd unit",
            "source": f"/lib/systemd/system/{program.unit}",
            "status": "active",
            "username": "" if process.user.uid == 0 else process.user.name,
        }


TABLES: Mapping[str, Any] = {
    "processes": (processes, "pid"),
    "process_envs": (process_envs, "pid"),
    "process_open_files": (process_open_files, "pid"),
    "process_open_sockets": (process_open_sockets, "pid"),
    "process_memory_map": (process_memory_map, "pid"),
    "process_namespaces": (process_namespaces, "pid"),
    "listening_ports": (listening_ports,),
    "systemd_units": (systemd_units,),
    "startup_items": (startup_items,),
    "services": (services,),
    "launchd": (launchd,),
}
