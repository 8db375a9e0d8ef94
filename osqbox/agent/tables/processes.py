# ruff: noqa: PTH110, PTH208
# Thousands of paths per query: plain text and os.* cost a third of pathlib.
"""processes and what hangs on a process, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from osqbox.agent.functions import SqlValue
from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.reading import list_directory, pairs, read_bytes, read_lines, read_link, read_text

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def tables() -> dict[str, TableSource]:
    return {
        "processes": source(processes, "pid"),
        "process_envs": source(process_envs, "pid"),
        "process_open_files": source(process_open_files, "pid"),
        "process_memory_map": source(process_memory_map, "pid"),
        "process_namespaces": source(process_namespaces, "pid"),
    }


def pids(context: Context) -> Iterable[int]:
    """The processes a query is about: one, or all that run."""
    wanted = context.integers("pid")
    return [p for p in wanted if p > 0] if wanted is not None else all_pids()


def all_pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def boot_time() -> int:
    for line in read_lines("/proc/stat"):
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0


def processes(context: Context) -> Iterator[Row]:
    """One row per process (tables/system/linux/processes.cpp): times in milliseconds, sizes in bytes."""
    ticks, booted = os.sysconf("SC_CLK_TCK"), boot_time()
    for pid in pids(context):
        stat = read_text(f"/proc/{pid}/stat", 4096)
        if not stat:
            continue
        # The name may hold spaces and parentheses: it ends at the last one.
        name = stat[stat.find("(") + 1 : stat.rfind(")")]
        fields = stat[stat.rfind(")") + 2 :].split()
        row: dict[str, SqlValue] = {
            "pid": pid,
            "name": name,
            "state": fields[0],
            "parent": int(fields[1]),
            "pgroup": int(fields[2]),
            "user_time": int(fields[11]) * 1000 // ticks,
            "system_time": int(fields[12]) * 1000 // ticks,
            "nice": int(fields[16]),
            "threads": int(fields[17]),
            "start_time": booted + int(fields[19]) // ticks,
            "wired_size": 0,
        }
        _add_status(context, pid, row)
        _add_links(context, pid, row)
        _add_io(context, pid, row)
        yield row


def _add_status(context: Context, pid: int, row: dict[str, SqlValue]) -> None:
    if not context.wants("uid", "gid", "euid", "egid", "suid", "sgid", "resident_size", "total_size"):
        return
    status = pairs(f"/proc/{pid}/status")
    for prefix, key in (("u", "Uid"), ("g", "Gid")):
        numbers = status.get(key, "").split()
        if len(numbers) >= 3:
            row[f"{prefix}id"], row[f"e{prefix}id"], row[f"s{prefix}id"] = (int(n) for n in numbers[:3])
    for column, key in (("resident_size", "VmRSS"), ("total_size", "VmSize")):
        amount = status.get(key, "0 kB").split()
        row[column] = int(amount[0]) * 1024


def _add_links(context: Context, pid: int, row: dict[str, SqlValue]) -> None:
    if context.wants("path", "on_disk"):
        path = read_link(f"/proc/{pid}/exe")
        deleted = path.endswith(" (deleted)")
        row["path"] = path.removesuffix(" (deleted)")
        row["on_disk"] = -1 if not path else int(not deleted and os.path.exists(path))
    if context.wants("cmdline"):
        row["cmdline"] = read_text(f"/proc/{pid}/cmdline").replace("\0", " ").rstrip()
    if context.wants("cwd"):
        row["cwd"] = read_link(f"/proc/{pid}/cwd")
    if context.wants("root"):
        row["root"] = read_link(f"/proc/{pid}/root")
    if context.wants("cgroup_path"):
        first = read_text(f"/proc/{pid}/cgroup").partition("\n")[0]
        row["cgroup_path"] = first.split(":", 2)[2] if first.count(":") >= 2 else ""


def _add_io(context: Context, pid: int, row: dict[str, SqlValue]) -> None:
    if context.wants("disk_bytes_read", "disk_bytes_written"):
        io = pairs(f"/proc/{pid}/io")
        if "read_bytes" in io:
            row["disk_bytes_read"] = int(io["read_bytes"])
            row["disk_bytes_written"] = int(io["write_bytes"]) - int(io.get("cancelled_write_bytes", "0"))


def process_envs(context: Context) -> Iterator[Row]:
    for pid in pids(context):
        for entry in read_bytes(f"/proc/{pid}/environ").split(b"\0"):
            key, divider, value = entry.decode("utf-8", "replace").partition("=")
            if divider:
                yield {"pid": pid, "key": key, "value": value}


def open_descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Descriptor number and what it points at."""
    for number in list_directory(f"/proc/{pid}/fd"):
        target = read_link(f"/proc/{pid}/fd/{number}")
        if target:
            yield int(number), target


def process_open_files(context: Context) -> Iterator[Row]:
    """Descriptors of files: not sockets, pipes and anonymous inodes."""
    for pid in pids(context):
        for number, target in open_descriptors(pid):
            if target.startswith("/"):
                yield {"pid": pid, "fd": number, "path": target}


def process_memory_map(context: Context) -> Iterator[Row]:
    for pid in pids(context):
        for line in read_lines(f"/proc/{pid}/maps"):
            fields = line.split(None, 5)
            if len(fields) < 5:
                continue
            start, _, end = fields[0].partition("-")
            path = fields[5] if len(fields) > 5 else ""
            yield {
                "pid": pid,
                "start": f"0x{start}",
                "end": f"0x{end}",
                "permissions": fields[1],
                "offset": int(fields[2], 16),
                "device": fields[3],
                "inode": int(fields[4]),
                "path": path,
                "pseudo": int(fields[4] == "0" and bool(path)),
            }


def process_namespaces(context: Context) -> Iterator[Row]:
    for pid in pids(context):
        row: dict[str, SqlValue] = {"pid": pid}
        for kind in _NAMESPACES:
            link = read_link(f"/proc/{pid}/ns/{kind}")
            row[f"{kind}_namespace"] = link[link.find("[") + 1 : -1] if link else ""
        if any(row[f"{kind}_namespace"] for kind in _NAMESPACES):
            yield row
