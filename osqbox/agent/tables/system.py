# ruff: noqa: PTH110, PTH112, PTH113
# Thousands of paths per query: plain text and os.* cost a third of pathlib.
"""The machine itself: identity, operating system, kernel, processors, memory, clocks, disks."""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import time as _time
from collections.abc import Callable, Iterator

from osqbox.agent.functions import SqlValue
from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.reading import list_directory, pairs, read_lines, read_link, read_text, read_word

_DMI = "/sys/class/dmi/id"
_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")


def tables(hostname: str, uuid: str, now: Callable[[], float]) -> dict[str, TableSource]:
    return {
        "system_info": source(functools.partial(system_info, hostname=hostname, uuid=uuid)),
        "os_version": source(os_version),
        "platform_info": source(platform_info),
        "time": source(functools.partial(time, now=now)),
        "uptime": source(uptime),
        "kernel_info": source(kernel_info),
        "kernel_modules": source(kernel_modules),
        "cpu_info": source(cpu_info),
        "cpu_time": source(cpu_time),
        "memory_info": source(memory_info),
        "load_average": source(load_average),
        "mounts": source(mounts),
        "block_devices": source(block_devices),
        "system_controls": source(system_controls, "name", "subsystem"),
    }


# -- identity ----------------------------------------------------------------------------------------------------


def machine_hostname() -> str:
    return platform.node()


def machine_uuid() -> str:
    """The hardware's UUID, else the operating system's machine id in that form, else empty; upper case."""
    hardware = read_word(f"{_DMI}/product_uuid").upper()
    if re.fullmatch(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}", hardware) and set(hardware) - set("0F-"):
        return hardware
    machine = read_word("/etc/machine-id").upper()
    if not re.fullmatch(r"[0-9A-F]{32}", machine):
        return ""
    return "-".join((machine[:8], machine[8:12], machine[12:16], machine[16:20], machine[20:]))


def system_info(_context: Context, *, hostname: str, uuid: str) -> Iterator[Row]:
    processors = _processors()
    first = processors[0] if processors else {}
    # Machines without a topology in /proc/cpuinfo have one core per processor, in one socket.
    cores = {(p.get("physical id", "0"), p.get("core id", p.get("processor", ""))) for p in processors}
    sockets = {p.get("physical id", "0") for p in processors}
    yield {
        "hostname": hostname,
        "uuid": uuid,
        "cpu_type": platform.machine(),
        "cpu_subtype": first.get("model", ""),
        "cpu_brand": first.get("model name", ""),
        "cpu_physical_cores": len(cores) or os.cpu_count(),
        "cpu_logical_cores": os.cpu_count(),
        "cpu_sockets": len(sockets) or "",
        "cpu_microcode": first.get("microcode", ""),
        "physical_memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "hardware_vendor": read_word(f"{_DMI}/sys_vendor"),
        "hardware_model": read_word(f"{_DMI}/product_name"),
        "hardware_version": read_word(f"{_DMI}/product_version"),
        "hardware_serial": read_word(f"{_DMI}/product_serial"),
        "board_vendor": read_word(f"{_DMI}/board_vendor"),
        "board_model": read_word(f"{_DMI}/board_name"),
        "board_version": read_word(f"{_DMI}/board_version"),
        "board_serial": read_word(f"{_DMI}/board_serial"),
        "computer_name": hostname,
        "local_hostname": hostname,
    }


def os_version(_context: Context) -> Iterator[Row]:
    """From os-release; ``_id`` is no column, but enrollment sends it (tables/system/linux/os_version.cpp)."""
    release = _os_release()
    version_id = release.get("VERSION_ID", "")
    numbers = [int(n) for n in re.findall(r"\d+", version_id)[:3]] if version_id else []
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    yield {
        "_id": version_id,
        "arch": platform.machine(),
        "build": release.get("BUILD_ID", ""),
        "codename": release.get("VERSION_CODENAME", ""),
        "major": major,
        "minor": minor,
        "name": release.get("NAME", ""),
        "patch": patch,
        "pid_with_namespace": 0,
        "platform": release.get("ID", ""),
        "platform_like": release.get("ID_LIKE", ""),
        "version": release.get("VERSION", version_id),
    }


def _os_release() -> dict[str, str]:
    path = next((p for p in _OS_RELEASE if os.path.exists(p)), _OS_RELEASE[0])
    found: dict[str, str] = {}
    for line in read_lines(path):
        key, divider, value = line.partition("=")
        if divider:
            try:
                found[key.strip()] = " ".join(shlex.split(value))
            except ValueError:
                found[key.strip()] = value.strip()
    return found


def platform_info(_context: Context) -> Iterator[Row]:
    """The firmware; no row without SMBIOS."""
    vendor = read_word(f"{_DMI}/bios_vendor")
    if vendor:
        yield {
            "vendor": vendor,
            "version": read_word(f"{_DMI}/bios_version"),
            "date": read_word(f"{_DMI}/bios_date"),
            "revision": read_word(f"{_DMI}/bios_release"),
            "extra": "",
            "firmware_type": "uefi" if os.path.isdir("/sys/firmware/efi") else "bios",
            "address": "",
            "size": "",
            "volume_size": "",
        }


# -- clocks and loads --------------------------------------------------------------------------------------------


def time(_context: Context, *, now: Callable[[], float]) -> Iterator[Row]:
    at = int(now())
    utc, stamp = _time.gmtime(at), _time.strftime("%Y-%m-%dT%H:%M:%SZ", _time.gmtime(at))
    yield {
        "weekday": _time.strftime("%A", utc),
        "year": utc.tm_year,
        "month": utc.tm_mon,
        "day": utc.tm_mday,
        "hour": utc.tm_hour,
        "minutes": utc.tm_min,
        "seconds": utc.tm_sec,
        "timezone": "UTC",
        "local_timezone": _time.tzname[_time.localtime(at).tm_isdst > 0],
        "unix_time": at,
        "timestamp": _time.strftime("%a %b ", utc) + f"{utc.tm_mday:2d}" + _time.strftime(" %H:%M:%S %Y UTC", utc),
        "datetime": stamp,
        "iso_8601": stamp,
    }


def uptime(_context: Context) -> Iterator[Row]:
    seconds = int(float(read_text("/proc/uptime").split()[0]))
    yield {
        "days": seconds // 86400,
        "hours": seconds // 3600 % 24,
        "minutes": seconds // 60 % 60,
        "seconds": seconds % 60,
        "total_seconds": seconds,
    }


def load_average(_context: Context) -> Iterator[Row]:
    for period, average in zip(("1m", "5m", "15m"), read_text("/proc/loadavg").split(), strict=False):
        yield {"period": period, "average": f"{float(average):.6f}"}


def cpu_time(_context: Context) -> Iterator[Row]:
    """In clock ticks since boot, one row per core."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    for line in read_lines("/proc/stat"):
        found = re.match(r"cpu(\d+) (.*)", line)
        if found:
            yield {"core": int(found[1]), **dict(zip(names, map(int, found[2].split()), strict=False))}


def memory_info(_context: Context) -> Iterator[Row]:
    """In bytes."""
    known = pairs("/proc/meminfo")
    columns = {
        "memory_total": "MemTotal",
        "memory_free": "MemFree",
        "memory_available": "MemAvailable",
        "buffers": "Buffers",
        "cached": "Cached",
        "swap_cached": "SwapCached",
        "active": "Active",
        "inactive": "Inactive",
        "swap_total": "SwapTotal",
        "swap_free": "SwapFree",
    }
    if known:
        yield {c: int(known[key].split()[0]) * 1024 for c, key in columns.items() if key in known}


# -- kernel and processors ---------------------------------------------------------------------------------------


def kernel_info(_context: Context) -> Iterator[Row]:
    arguments = read_word("/proc/cmdline").split()
    known = dict(argument.partition("=")[::2] for argument in arguments)
    kept = [a for a in arguments if not a.startswith(("BOOT_IMAGE=", "root="))]
    yield {
        "version": platform.release(),
        "arguments": " ".join(kept),
        "path": known.get("BOOT_IMAGE", ""),
        "device": _argument(arguments, "root"),
    }


def _argument(arguments: list[str], name: str) -> str:
    """The whole value, which may hold ``=`` itself, as in ``root=UUID=...``."""
    prefix = f"{name}="
    return next((a.removeprefix(prefix) for a in arguments if a.startswith(prefix)), "")


def kernel_modules(_context: Context) -> Iterator[Row]:
    for line in read_lines("/proc/modules"):
        fields = line.split()
        if len(fields) >= 6:
            yield {
                "name": fields[0],
                "size": int(fields[1]),
                "used_by": fields[3].rstrip(","),
                "status": fields[4],
                "address": fields[5],
            }


def _processors() -> list[dict[str, str]]:
    """One entry per logical processor of /proc/cpuinfo."""
    blocks = read_text("/proc/cpuinfo", 4 * 1024 * 1024).split("\n\n")
    found = [dict(_cpu_lines(block)) for block in blocks]
    return [entry for entry in found if "processor" in entry]


def _cpu_lines(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def cpu_info(_context: Context) -> Iterator[Row]:
    """One row per socket."""
    sockets: dict[str, list[dict[str, str]]] = {}
    for processor in _processors():
        sockets.setdefault(processor.get("physical id", "0"), []).append(processor)
    for name, members in sockets.items():
        first = members[0]
        speed = first.get("cpu MHz", "")
        flags = first.get("flags", "").split()
        yield {
            "device_id": f"CPU{name}",
            "model": first.get("model name", ""),
            "manufacturer": first.get("vendor_id", ""),
            "number_of_cores": first.get("cpu cores", str(len(members))),
            "logical_processors": len(members),
            "address_width": "64" if "lm" in flags or platform.machine() == "aarch64" else "",
            "current_clock_speed": int(float(speed)) if speed else "",
            "socket_designation": "",
        }


# -- disks -------------------------------------------------------------------------------------------------------


def mounts(context: Context) -> Iterator[Row]:
    measured = ("blocks_size", "blocks", "blocks_free", "blocks_available", "inodes", "inodes_free")
    for line in read_lines("/proc/self/mounts"):
        fields = [_unescape(field) for field in line.split(" ")]
        if len(fields) < 4:
            continue
        device, path, kind, flags = fields[:4]
        row: dict[str, SqlValue] = {
            "device": device,
            "device_alias": os.path.realpath(device) if device.startswith("/dev/") else device,
            "path": path,
            "type": kind,
            "flags": flags,
        }
        if context.wants(*measured):
            row.update(_measure(path))
        yield row


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _measure(path: str) -> Row:
    try:
        found = os.statvfs(path)
    except OSError:
        return {}
    return {
        "blocks_size": found.f_bsize,
        "blocks": found.f_blocks,
        "blocks_free": found.f_bfree,
        "blocks_available": found.f_bavail,
        "inodes": found.f_files,
        "inodes_free": found.f_ffree,
    }


def block_devices(_context: Context) -> Iterator[Row]:
    uuids = _by_device("/dev/disk/by-uuid")
    labels = _by_device("/dev/disk/by-label")
    mounted = {line.split(" ")[0]: line.split(" ")[2] for line in read_lines("/proc/self/mounts")}
    for disk in list_directory("/sys/block"):
        base = f"/sys/block/{disk}"
        parts = [name for name in list_directory(base) if name.startswith(disk)]
        for name, folder, parent in (
            (disk, base, ""),
            *((part, f"{base}/{part}", f"/dev/{disk}") for part in parts),
        ):
            yield {
                "name": f"/dev/{name}",
                "parent": parent,
                "vendor": read_word(f"{base}/device/vendor"),
                "model": read_word(f"{base}/device/model"),
                "serial": read_word(f"{base}/device/serial"),
                "size": read_word(f"{folder}/size"),
                "block_size": read_word(f"{base}/queue/logical_block_size"),
                "uuid": uuids.get(name, ""),
                "type": mounted.get(f"/dev/{name}", ""),
                "label": labels.get(name, ""),
            }


def _by_device(directory: str) -> dict[str, str]:
    return {read_link(f"{directory}/{name}").rpartition("/")[2]: name for name in list_directory(directory)}


# -- sysctl ------------------------------------------------------------------------------------------------------


def system_controls(context: Context) -> Iterator[Row]:
    """Kernel parameters; ``config_value`` is what /etc/sysctl.conf and /etc/sysctl.d set."""
    configured = _configured_controls()
    name, subsystem = context.equal_to("name"), context.equal_to("subsystem")
    if name is not None:
        paths = ["/proc/sys/" + name.replace(".", "/")] if ".." not in name else []
    else:
        paths = list(_control_files(f"/proc/sys/{subsystem or ''}".rstrip("/"), context))
    for path in paths:
        dotted = path.removeprefix("/proc/sys/").replace("/", ".")
        value = read_text(path, 4096) if os.path.isfile(path) else ""
        if value or dotted in configured:
            yield {
                "name": dotted,
                "oid": "",
                "subsystem": dotted.partition(".")[0],
                "current_value": value.rstrip("\n"),
                "config_value": configured.get(dotted, ""),
                "type": "string",
            }


def _control_files(base: str, context: Context) -> Iterator[str]:
    for folder, folders, names in os.walk(base):
        context.checkpoint()
        folders.sort()
        yield from (f"{folder}/{name}" for name in sorted(names))


def _configured_controls() -> dict[str, str]:
    found: dict[str, str] = {}
    names = [f"/etc/sysctl.d/{name}" for name in list_directory("/etc/sysctl.d") if name.endswith(".conf")]
    for path in (*names, "/etc/sysctl.conf"):
        for line in read_lines(path):
            key, divider, value = line.partition("=")
            if divider and not key.lstrip().startswith(("#", ";")):
                found[key.strip().lstrip("-").replace("/", ".")] = value.strip()
    return found
