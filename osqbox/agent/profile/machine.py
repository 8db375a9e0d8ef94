"""The machine: identity, operating system, processors, memory, clocks, disks."""

from __future__ import annotations

import time as _time
from collections.abc import Iterator, Mapping
from typing import Any

from osqbox.agent.functions import SqlValue
from osqbox.agent.messages import VERSION
from osqbox.agent.profile.description import Disk, Partition
from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row

GIB, MIB = 1024**3, 1024**2
_BUILDS = {"linux": ("linux", "centos7"), "macos": ("darwin", "12"), "windows": ("windows", "10")}
PLATFORM_MASKS = {"linux": 9, "macos": 21, "windows": 2, "freebsd": 37}
"""Bits of osquery/utils/info/platform_type.h."""
_TICKS = 100


def serial(m: Moment) -> str:
    return m.metal.fill(m.hardware.serial, "serial")


# -- identity ----------------------------------------------------------------------------------------------------


def system_info(m: Moment, _context: Context) -> Iterator[Row]:
    metal = m.hardware
    yield {
        "hostname": m.hostname,
        "uuid": m.metal.uuid("hardware"),
        "cpu_type": metal.cpu_type,
        "cpu_subtype": metal.cpu_subtype,
        "cpu_brand": metal.cpu,
        "cpu_physical_cores": metal.cores * metal.sockets,
        "cpu_logical_cores": _processors(m),
        "cpu_sockets": metal.sockets,
        "cpu_microcode": metal.microcode,
        "physical_memory": _memory_bytes(m),
        "hardware_vendor": metal.vendor,
        "hardware_model": metal.model,
        "hardware_version": metal.version,
        "hardware_serial": serial(m),
        "board_vendor": metal.board_vendor,
        "board_model": metal.board,
        "board_version": "",
        "board_serial": m.metal.fill(metal.serial, "board") if metal.board else "",
        "computer_name": m.hostname,
        "local_hostname": m.hostname.partition(".")[0],
    }


def _processors(m: Moment) -> int:
    return m.hardware.cores * m.hardware.threads * m.hardware.sockets


def _memory_bytes(m: Moment) -> int:
    return m.hardware.memory_gib * GIB


def os_version(m: Moment, _context: Context) -> Iterator[Row]:
    """``_id`` is no column, but enrollment sends it from Linux (tables/system/linux/os_version.cpp)."""
    release = m.description.os
    hidden: Row = {"_id": release.version_id} if m.description.platform == "linux" else {}
    if m.description.platform == "windows":
        hidden = {"install_date": str(m.installed_at)}
    yield {
        **hidden,
        "name": release.name,
        "version": release.version,
        "major": release.major,
        "minor": release.minor,
        "patch": release.patch,
        "build": release.build,
        "platform": release.platform,
        "platform_like": release.platform_like,
        "codename": release.codename,
        "arch": release.arch,
        "pid_with_namespace": 0,
    }


def platform_info(m: Moment, _context: Context) -> Iterator[Row]:
    metal = m.hardware
    if metal.bios_vendor:
        yield {
            "vendor": metal.bios_vendor,
            "version": metal.bios_version,
            "date": metal.bios_date,
            "revision": metal.bios_revision,
            "extra": "",
            "firmware_type": metal.firmware,
            "address": "0xe000" if m.description.platform == "linux" else "",
            "size": "",
            "volume_size": 0,
        }


def kernel_info(m: Moment, _context: Context) -> Iterator[Row]:
    kernel = m.description.kernel
    yield {"version": kernel.version, "arguments": kernel.arguments, "path": kernel.path, "device": kernel.device}


def kernel_modules(m: Moment, _context: Context) -> Iterator[Row]:
    modules = m.description.kernel.modules
    for at, name in enumerate(modules):
        users = [other for other in modules if other != name and other.startswith(name + "_")]
        yield {
            "name": name,
            "size": 12_288 + 4096 * m.fleet.below(60, "module", name),
            "used_by": ",".join(users) or "-",
            "status": "Live",
            "address": f"0x{0xFFFFFFFFC0000000 + (at * 61 + m.dice.below(61, 'module', m.boot)) * 4096:016x}",
        }


def osquery_info(m: Moment, _context: Context) -> Iterator[Row]:
    process = m.of_agent()
    build_platform, build_distro = _BUILDS.get(m.description.platform, ("linux", "centos7"))
    yield {
        "pid": process.pid if process else 0,
        "uuid": m.metal.uuid("hardware"),
        "instance_id": m.dice.uuid("instance").lower(),
        "version": VERSION,
        "config_hash": "",
        "config_valid": 0,
        "extensions": "inactive",
        "build_platform": build_platform,
        "build_distro": build_distro,
        "start_time": process.start if process else m.boot,
        "watcher": process.parent if process else -1,
        "platform_mask": PLATFORM_MASKS[m.description.platform],
    }


# -- clocks and loads --------------------------------------------------------------------------------------------


def time(m: Moment, _context: Context) -> Iterator[Row]:
    utc = _time.gmtime(m.at)
    stamp = _time.strftime("%Y-%m-%dT%H:%M:%SZ", utc)
    yield {
        "weekday": _time.strftime("%A", utc),
        "year": utc.tm_year,
        "month": utc.tm_mon,
        "day": utc.tm_mday,
        "hour": utc.tm_hour,
        "minutes": utc.tm_min,
        "seconds": utc.tm_sec,
        "timezone": "UTC",
        "local_timezone": "UTC",
        "unix_time": m.at,
        "timestamp": _time.strftime("%a %b ", utc) + f"{utc.tm_mday:2d}" + _time.strftime(" %H:%M:%S %Y UTC", utc),
        "datetime": stamp,
        "iso_8601": stamp,
        "win_timestamp": str((m.at + 11_644_473_600) * 10_000_000) if m.description.platform == "windows" else None,
    }


def uptime(m: Moment, _context: Context) -> Iterator[Row]:
    seconds = m.at - m.boot
    yield {
        "days": seconds // 86400,
        "hours": seconds // 3600 % 24,
        "minutes": seconds // 60 % 60,
        "seconds": seconds % 60,
        "total_seconds": seconds,
    }


def load_average(m: Moment, _context: Context) -> Iterator[Row]:
    for period, minutes in (("1m", 1), ("5m", 5), ("15m", 15)):
        average = m.wave("load", every_s=60 * minutes) ** 2 * _processors(m) * 0.6
        yield {"period": period, "average": f"{average:.6f}"}


def cpu_time(m: Moment, _context: Context) -> Iterator[Row]:
    """In clock ticks since boot: the shares add up to the uptime."""
    ticks = (m.at - m.boot) * _TICKS
    for core in range(_processors(m)):
        shares = {"user": 0.02, "nice": 0.001, "system": 0.01, "iowait": 0.004, "softirq": 0.001}
        busy = {name: int(ticks * share * (0.5 + m.dice.share("cpu", name, core))) for name, share in shares.items()}
        idle = {"idle": ticks - sum(busy.values()), "irq": 0, "steal": 0, "guest": 0, "guest_nice": 0}
        yield {"core": core, **busy, **idle}


def memory_info(m: Moment, _context: Context) -> Iterator[Row]:
    """In bytes; what the processes hold is what is not available."""
    total = _memory_bytes(m) * 97 // 100
    used = min(total * 9 // 10, sum(m.resident_bytes(process) for process in m.processes) + 180 * MIB)
    cached = int((total - used) * (0.3 + 0.3 * m.wave("cached", every_s=300)))
    buffers = cached // 9
    swap = 2 * GIB
    yield {
        "memory_total": total,
        "memory_free": total - used - cached - buffers,
        "memory_available": total - used,
        "buffers": buffers,
        "cached": cached,
        "swap_cached": 0,
        "active": used // 2 + cached // 3,
        "inactive": cached // 2,
        "swap_total": swap,
        "swap_free": swap - m.dice.below(64, "swap", m.at // 3600) * MIB,
    }


# -- processors and memory modules -------------------------------------------------------------------------------


def cpu_info(m: Moment, _context: Context) -> Iterator[Row]:
    metal = m.hardware
    for number in range(metal.sockets):
        yield {
            "device_id": f"CPU{number}",
            "model": metal.cpu,
            "manufacturer": metal.cpu_vendor,
            "processor_type": "3",
            "cpu_status": 1,
            "number_of_cores": str(metal.cores),
            "logical_processors": metal.cores * metal.threads,
            "address_width": "64",
            "current_clock_speed": int(metal.mhz * (0.9 + 0.2 * m.wave("clock", number, every_s=10))),
            "max_clock_speed": metal.mhz,
            "socket_designation": f"CPU {number}",
        }


def memory_devices(m: Moment, _context: Context) -> Iterator[Row]:
    metal = m.hardware
    for slot in range(max(1, metal.memory_gib // metal.dimm_gib)):
        yield {
            "handle": f"0x{0x1100 + slot:04X}",
            "array_handle": "0x1000",
            "form_factor": "DIMM",
            "total_width": 72,
            "data_width": 64,
            "size": min(metal.dimm_gib, metal.memory_gib) * 1024,
            "set": 0,
            "device_locator": f"DIMM {slot}",
            "bank_locator": f"BANK {slot}",
            "memory_type": "DDR4",
            "memory_type_details": "Synchronous",
            "max_speed": 3200,
            "configured_clock_speed": 3200,
            "manufacturer": "Samsung",
            "serial_number": m.metal.hexadecimal(8, "dimm", slot).upper(),
            "asset_tag": "",
            "part_number": "M393A2K43DB3-CWE",
            "min_voltage": 1200,
            "max_voltage": 1200,
            "configured_voltage": 1200,
        }


# -- disks -------------------------------------------------------------------------------------------------------


def _size_bytes(m: Moment, disk: Disk) -> int:
    return m.metal.pick(disk.size_gib, "disk", disk.name) * GIB


def _partitions(m: Moment, disk: Disk) -> Iterator[tuple[str, Partition, int]]:
    """Device, description and size in bytes."""
    fixed = sum(part.size_mib for part in disk.partitions) * MIB
    rest = max(0, _size_bytes(m, disk) - fixed - 2 * MIB) // max(1, sum(not p.size_mib for p in disk.partitions))
    divider = "p" if disk.name[-1:].isdigit() and m.description.platform == "linux" else ""
    divider = "s" if m.description.platform == "macos" else divider
    for number, part in enumerate(disk.partitions, 1):
        size = part.size_mib * MIB or rest
        yield f"/dev/{disk.name}{divider}{number}", part, size


def block_devices(m: Moment, _context: Context) -> Iterator[Row]:
    """Disks, their partitions, and what is mapped onto a partition."""
    nameless = {"vendor": "", "model": "", "serial": ""}
    for disk in m.description.disks:
        whole = {"vendor": disk.vendor, "model": disk.model, "serial": m.metal.fill(disk.serial, "disk", disk.name)}
        device = f"/dev/{disk.name}"
        yield {**whole, **_device(device, "", _size_bytes(m, disk), disk), "uuid": "", "type": "", "label": ""}
        for name, part, size in _partitions(m, disk):
            made = {"uuid": _filesystem_uuid(m, name, part), "label": part.label}
            kind = "crypto_LUKS" if part.encrypted and part.device else part.type
            yield {**nameless, **_device(name, device, size, disk), **made, "type": kind}
            if part.device.startswith("/dev/"):
                inside = {"uuid": m.dice.uuid("mapped", name).lower(), "type": part.type, "label": part.label}
                yield {**nameless, **_device(part.device, name, size - 16 * MIB, disk), **inside}


def _device(name: str, parent: str, size_bytes: int, disk: Disk) -> Row:
    return {"name": name, "parent": parent, "size": size_bytes // disk.block_size, "block_size": disk.block_size}


def _filesystem_uuid(m: Moment, name: str, part: Partition) -> str:
    if part.type == "vfat":
        digits = m.dice.hexadecimal(8, "filesystem", name).upper()
        return f"{digits[:4]}-{digits[4:]}"
    return m.dice.uuid("filesystem", name).lower()


def mounts(m: Moment, context: Context) -> Iterator[Row]:
    measured = context.wants("blocks", "blocks_free", "blocks_available", "inodes", "inodes_free", "blocks_size")
    for disk in m.description.disks:
        for name, part, size in _partitions(m, disk):
            if part.mount:
                device = part.device or name
                row = {"device": device, "device_alias": device, "path": part.mount, "type": part.type}
                yield {**row, "flags": part.flags, **(_space(m, part, size) if measured else {})}
    for pseudo in m.description.pseudo:
        device = pseudo.device or pseudo.type
        blocks = pseudo.size_mib * 256
        yield {
            "device": device,
            "device_alias": device,
            "path": pseudo.path,
            "type": pseudo.type,
            "blocks_size": 4096,
            "blocks": blocks,
            "blocks_free": blocks * 99 // 100,
            "blocks_available": blocks * 99 // 100,
            "inodes": blocks,
            "inodes_free": blocks * 99 // 100,
            "flags": pseudo.flags,
        }


def _space(m: Moment, part: Partition, size_bytes: int) -> dict[str, SqlValue]:
    blocks = size_bytes // 4096 * 98 // 100
    used = m.dice.between(part.used, "used", part.mount) + 0.01 * m.wave("used", part.mount, every_s=300)
    free = int(blocks * max(0.01, 1 - used))
    inodes = 0 if part.type in ("vfat", "xfs", "btrfs") else blocks // 4
    return {
        "blocks_size": 4096,
        "blocks": blocks,
        "blocks_free": free,
        "blocks_available": free * 95 // 100,
        "inodes": inodes,
        "inodes_free": int(inodes * (1 - used / 2)),
    }


def disk_encryption(m: Moment, _context: Context) -> Iterator[Row]:
    for disk in m.description.disks:
        for name, part, _ in _partitions(m, disk):
            yield {
                "name": name,
                "uuid": _filesystem_uuid(m, name, part),
                "encrypted": int(bool(part.encrypted)),
                "type": part.encrypted,
                "encryption_status": "encrypted" if part.encrypted else "not encrypted",
            }


def logical_drives(m: Moment, _context: Context) -> Iterator[Row]:
    """Windows."""
    for disk in m.description.disks:
        for _, part, size in _partitions(m, disk):
            if part.mount:
                space = _space(m, part, size)
                yield {
                    "device_id": part.mount,
                    "type": "Local Fixed Disk",
                    "description": "Local Fixed Disk",
                    "free_space": int(str(space["blocks_free"])) * 4096,
                    "size": size,
                    "file_system": part.type,
                    "boot_partition": int(part.mount == "C:"),
                }


TABLES: Mapping[str, Any] = {
    "system_info": (system_info,),
    "os_version": (os_version,),
    "platform_info": (platform_info,),
    "kernel_info": (kernel_info,),
    "kernel_modules": (kernel_modules,),
    "osquery_info": (osquery_info,),
    "time": (time,),
    "uptime": (uptime,),
    "load_average": (load_average,),
    "cpu_time": (cpu_time,),
    "memory_info": (memory_info,),
    "cpu_info": (cpu_info,),
    "memory_devices": (memory_devices,),
    "block_devices": (block_devices,),
    "mounts": (mounts,),
    "disk_encryption": (disk_encryption,),
    "logical_drives": (logical_drives,),
}
