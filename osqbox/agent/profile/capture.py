"""A host profile from the tables of a real machine: described anew, not copied, so that what is not meant to leave
has to be put in on purpose. Pure but for the rows it asks for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from osqbox.agent.profile.redaction import Redactor
from osqbox.agent.profile.tables import SOURCES

TableRow = Mapping[str, str]
AskTable = Callable[[str], list[dict[str, str]]]
Part = dict[str, Any]

MAX_ROWS = 3000
MAX_PROCESSES = 2000
MAX_DEPTH = 24
MAX_PER_PROCESS = 24
FIRST_PERSON, NOBODY = 1000, 65534
SHORT_LIVED_S = 600
"""A leaf process younger than this is taken for one that comes and goes."""
_MIB, _GIB = 1024**2, 1024**3
_KEPT_TABLES = ("apt_sources", "crontab", "etc_protocols", "etc_services", "system_controls", "ulimit_info")
_PUBLIC_ARCHIVES = re.compile(
    r"^https?://([\w-]+\.)*(debian\.org|ubuntu\.com|fedoraproject\.org|postgresql\.org|docker\.com)/"
)
_PLAIN_INTERFACE = re.compile(r"(eth|en|wl|ww)[a-z0-9]{0,12}")
_FILLED_CONTROLS = {"kernel.hostname": "{hostname}", "kernel.osrelease": "{kernel}"}
_PLAIN_OPTION = re.compile(r"[a-z_]+(=[0-9]{1,6})?")
_NUMBERS = re.compile(r"[-\d\s.]*")


def capture(
    ask: AskTable, table_names: Iterable[str], *, name: str, redact: bool = True, now: float, own_pid: int = 0
) -> Part:
    """A document for `load_profile`. ``ask`` gives a table's rows; ``own_pid`` is left out of the processes.

    Redacted, it holds no host name, no name of a person, address, hardware id, command line argument or value of an
    environment; the same thing has the same stand-in everywhere.
    """
    rows = {table: ask(table)[:MAX_ROWS] for table in table_names if table not in ("file", "hash")}
    machine = _Machine(rows, redact, now, own_pid)
    return machine.describe(name, sorted(table_names))


class _Machine:
    def __init__(self, rows: dict[str, list[dict[str, str]]], redact: bool, now: float, own_pid: int) -> None:
        self.rows = rows
        self.now = now
        self.own_pid = str(own_pid)
        self.redactor = Redactor(self._secrets(), enabled=redact)

    def _secrets(self) -> Iterable[tuple[str, str]]:
        system = self.one("system_info")
        for column in ("hostname", "computer_name", "local_hostname"):
            yield system.get(column, ""), "host"
            yield system.get(column, "").partition(".")[0], "host"
            yield system.get(column, "").partition(".")[2], "domain"
        for column in ("uuid", "hardware_serial", "board_serial"):
            yield system.get(column, ""), "serial"
        yield from ((row["serial"].strip(), "serial") for row in self.table("block_devices") if row.get("serial"))
        for user in self.table("users"):
            if _is_person(user["uid"]):
                yield user["username"], "user"
                yield from ((word, "name") for word in re.findall(r"\w{3,}", user.get("description", "")))
        for row in self.table("dns_resolvers"):
            if row.get("type") == "search":
                yield row["address"], "domain"

    def table(self, name: str) -> list[dict[str, str]]:
        return self.rows.get(name, [])

    def one(self, name: str) -> TableRow:
        return next(iter(self.table(name)), {})

    # -- the whole -----------------------------------------------------------------------------------------------

    def describe(self, name: str, table_names: list[str]) -> Part:
        kernel_threads = self._kernel_threads()
        users, groups = self._accounts()
        packages = self._packages()
        made = {table for table in SOURCES if table not in ("deb_packages", "python_packages", "rpm_packages")}
        made |= set(packages)
        standing = {table: self._standing(table) for table in table_names if table not in made}
        return {
            "name": name,
            "platform": "linux",
            "as_of": int(self.now),
            "hostname": f"{name}-{{index:04d}}" if self.redactor.enabled else self.one("system_info")["hostname"],
            "os": self._os(),
            "kernel": self._kernel(kernel_threads),
            "hardware": [self._hardware()],
            "disks": self._disks(),
            "pseudo": self._pseudo(),
            "network": self._network(),
            "base": {
                "users": users,
                "groups": groups,
                "packages": packages,
                "processes": self._processes(kernel_threads),
                "tables": standing,
            },
        }

    def _os(self) -> Part:
        found = self.one("os_version")
        texts = {
            key: found.get(key, "")
            for key in ("name", "version", "build", "platform", "platform_like", "codename", "arch")
        }
        numbers = {key: _number(found.get(key)) for key in ("major", "minor", "patch")}
        return {**texts, **numbers, "version_id": found.get("_id", "")}

    def _kernel(self, threads: list[dict[str, str]]) -> Part:
        found = self.one("kernel_info")
        kept = (
            {}
            if self.redactor.enabled
            else {"arguments": found.get("arguments", ""), "device": found.get("device", "")}
        )
        return {
            "version": found.get("version", "unknown"),
            "path": self.redactor.path(found.get("path", "")),
            **kept,
            "modules": [row["name"] for row in self.table("kernel_modules")],
            "threads": [self.redactor.text(row["name"]) for row in threads],
            "first_pid": max(300, len(threads) + 50),
        }

    def _hardware(self) -> Part:
        system, cpu, bios = self.one("system_info"), self.one("cpu_info"), self.one("platform_info")
        sockets = max(1, _number(system.get("cpu_sockets")))
        cores = max(1, _number(system.get("cpu_physical_cores")) // sockets)
        logical = max(1, _number(system.get("cpu_logical_cores")))
        memory_gib = max(1, round(_number(system.get("physical_memory")) / _GIB))
        serial = {} if self.redactor.enabled else {"serial": system.get("hardware_serial", "")}
        return {
            **serial,
            "vendor": system.get("hardware_vendor", ""),
            "model": system.get("hardware_model", ""),
            "version": self.redactor.text(system.get("hardware_version", "")),
            "board": system.get("board_model", ""),
            "board_vendor": system.get("board_vendor", ""),
            "cpu": system.get("cpu_brand", ""),
            "cpu_type": system.get("cpu_type", ""),
            "cpu_subtype": system.get("cpu_subtype", ""),
            "cpu_vendor": cpu.get("manufacturer", ""),
            "microcode": system.get("cpu_microcode", ""),
            "mhz": _number(cpu.get("current_clock_speed")) or 2000,
            "sockets": sockets,
            "cores": cores,
            "threads": max(1, logical // (cores * sockets)),
            "memory_gib": memory_gib,
            "dimm_gib": min(16, memory_gib),
            "bios_vendor": bios.get("vendor", ""),
            "bios_version": bios.get("version", ""),
            "bios_date": bios.get("date", ""),
            "bios_revision": bios.get("revision", ""),
            "firmware": bios.get("firmware_type", ""),
        }

    # -- disks ---------------------------------------------------------------------------------------------------

    def _disks(self) -> list[Part]:
        mounted = {row["device"]: row for row in self.table("mounts")}
        devices = self.table("block_devices")
        found = [self._disk(row, devices, mounted) for row in devices if not row["parent"] and _number(row["size"])]
        return found or [{"name": "vda", "size_gib": [20], "partitions": [{"mount": "/"}]}]

    def _disk(self, disk: dict[str, str], devices: list[dict[str, str]], mounted: Mapping[str, TableRow]) -> Part:
        block = _number(disk["block_size"]) or 512
        size_bytes = _number(disk["size"]) * block
        parts = [row for row in devices if row["parent"] == disk["name"]] or ([disk] if disk["name"] in mounted else [])
        described = [self._partition(row, block, mounted.get(row["name"])) for row in parts]
        if described:
            described[-1].pop("size_mib")
        return {
            "name": disk["name"].removeprefix("/dev/"),
            "vendor": disk.get("vendor", ""),
            "model": disk.get("model", ""),
            **({} if self.redactor.enabled else {"serial": disk.get("serial", "")}),
            "size_gib": [max(1, round(size_bytes / _GIB))],
            "block_size": block,
            "partitions": described,
        }

    def _partition(self, row: TableRow, block: int, mount: TableRow | None) -> Part:
        part: Part = {"type": row.get("type") or "unknown", "size_mib": max(1, _number(row["size"]) * block // _MIB)}
        if mount is None:
            return part
        blocks, free = _number(mount.get("blocks")), _number(mount.get("blocks_free"))
        used = round(1 - free / blocks, 2) if blocks else 0.0
        place = self.redactor.path(mount["path"]) if mount["path"] != "/" else "/"
        return {**part, "type": mount["type"], "mount": place, "flags": _flags(mount["flags"]), "used": [used, used]}

    def _pseudo(self) -> list[Part]:
        disks = {row["name"] for row in self.table("block_devices")}
        return [
            {
                "path": self.redactor.path(row["path"]) if row["path"] != "/" else "/",
                "type": row["type"],
                "device": self.redactor.path(row["device"])
                if "/" in row["device"]
                else self.redactor.text(row["device"]),
                "flags": _flags(row["flags"]),
                "size_mib": _number(row.get("blocks")) * _number(row.get("blocks_size")) // _MIB,
            }
            for row in self.table("mounts")
            if row["device"] not in disks
        ]

    # -- network -------------------------------------------------------------------------------------------------

    def _network(self) -> Part:
        cards = {row["interface"]: row for row in self.table("interface_details")}
        addresses = [
            row for row in self.table("interface_addresses") if row["interface"] in cards and ":" not in row["address"]
        ]
        first = next((row for row in addresses if not row["address"].startswith("127.")), None)
        card = cards[first["interface"]] if first else {}
        name = card.get("interface", "eth0")
        interface = {
            "name": name if _PLAIN_INTERFACE.fullmatch(name) or not self.redactor.enabled else "eth0",
            "mtu": _number(card.get("mtu")) or 1500,
            "speed_mbit": max(0, _number(card.get("link_speed"))),
            "slot": card.get("pci_slot", ""),
        }
        if self.redactor.enabled or first is None:
            return {"interface": interface}
        network = ipaddress.ip_network(f"{first['address']}/{first['mask'] or 24}", strict=False)
        resolvers = [row["address"] for row in self.table("dns_resolvers") if row["type"] == "nameserver"]
        return {"network": str(network), "interface": {**interface, "mac": card["mac"][:8]}, "resolvers": resolvers}

    # -- accounts ------------------------------------------------------------------------------------------------

    def _accounts(self) -> tuple[list[Part], dict[str, int]]:
        names = {row["gid"]: row["groupname"] for row in self.table("groups")}
        owners = {row["gid"]: row["username"] for row in self.table("users") if _is_person(row["uid"])}
        groups = {self._group(row, owners): int(row["gid"]) for row in self.table("groups")}
        by_gid = {gid: name for name, gid in groups.items()}
        memberships: dict[str, list[str]] = {}
        for row in self.table("user_groups"):
            memberships.setdefault(row["uid"], []).append(by_gid.get(int(row["gid"]), ""))
        users: list[Part] = []
        seen: set[str] = set()
        for row in self.table("users"):
            if row["uid"] in seen:
                continue
            seen.add(row["uid"])
            if row["gid"] not in names:
                groups[self.redactor.stand_in("group", row["gid"]) if self.redactor.enabled else f"gid{row['gid']}"] = (
                    int(row["gid"])
                )
            users.append(self._user(row, [name for name in memberships.get(row["uid"], []) if name]))
        for uid in sorted({row["uid"] for row in self.table("processes") if row.get("uid")} - seen, key=int):
            groups.setdefault(f"gid{uid}", int(uid))
            users.append({"name": f"uid{uid}", "uid": int(uid), "gid": int(uid)})
        return users, groups

    def _group(self, row: TableRow, owners: Mapping[str, str]) -> str:
        if not _is_person(row["gid"]):
            return row["groupname"]
        owner = owners.get(row["gid"])
        is_own = owner == row["groupname"]
        return self.redactor.stand_in("user" if is_own else "group", row["groupname"])

    def _user(self, row: TableRow, groups: list[str]) -> Part:
        person = _is_person(row["uid"])
        name = self.redactor.stand_in("user", row["username"]) if person else row["username"]
        hides = self.redactor.enabled
        return {
            "name": name,
            "uid": int(row["uid"]),
            "gid": int(row["gid"]),
            "description": "" if hides else row.get("description", ""),
            "home": f"/home/{name}" if hides and person else self.redactor.text(row.get("directory", "/")),
            "shell": self.redactor.path(row.get("shell", "")),
            "groups": groups,
        }

    # -- software ------------------------------------------------------------------------------------------------

    def _packages(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for row in self.table("deb_packages"):
            if row["name"] and row["version"]:
                version = f"{row['version']} {row.get('section', '')}".strip()
                found.setdefault("deb_packages", {})[row["name"]] = version
        for row in self.table("python_packages"):
            if row["name"]:
                place = {"version": row["version"], "path": self.redactor.path(row.get("directory", ""))}
                found.setdefault("python_packages", {})[row["name"]] = place
        return found

    # -- processes -----------------------------------------------------------------------------------------------

    def _kernel_threads(self) -> list[dict[str, str]]:
        rows = self.table("processes")
        has_kernel = any(row["pid"] == "2" and row["name"] == "kthreadd" for row in rows)
        return [row for row in rows if has_kernel and "2" in (row["pid"], row["parent"])]

    def _processes(self, kernel_threads: list[dict[str, str]]) -> list[Part]:
        skipped = {row["pid"] for row in kernel_threads} | {self.own_pid}
        rows = [row for row in self.table("processes") if row["pid"] not in skipped][:MAX_PROCESSES]
        pids = {row["pid"] for row in rows}
        children: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            children.setdefault(row["parent"] if row["parent"] in pids and row["parent"] != "1" else "", []).append(row)
        tops = sorted(children.get("", []), key=lambda row: int(row["pid"]))
        hanging = _Hanging(self)
        found = [self._process(row, children, hanging, 0) for row in tops]
        first: Part = next(
            (part for part in found if part.get("pid") == 1), {"name": "init", "pid": 1, "path": "/sbin/init"}
        )
        first.setdefault("user", self._root())
        return [first, *(part for part in found if part is not first)]

    def _root(self) -> str:
        return next((row["username"] for row in self.table("users") if row["uid"] == "0"), "root")

    def _process(
        self, row: dict[str, str], children: Mapping[str, list[dict[str, str]]], hanging: _Hanging, depth: int
    ) -> Part:
        pid = row["pid"]
        resident_mib = round(_number(row.get("resident_size")) / _MIB, 1)
        below = children.get(pid, []) if depth < MAX_DEPTH else []
        age_s = max(1, int(self.now) - _number(row.get("start_time")))
        part: Part = {
            "name": self.redactor.text(row["name"]),
            "path": self.redactor.path(row.get("path", "")),
            "cmdline": self.redactor.arguments(row.get("cmdline", "")),
            "user": self._user_name(row.get("uid", "0")),
            "cwd": self.redactor.path(row["cwd"]) if len(row.get("cwd", "")) > 1 else "/",
            "state": row.get("state") or "S",
            "threads": max(1, _number(row.get("threads"))),
            "nice": _number(row.get("nice")),
            "memory_mib": [resident_mib, resident_mib],
            "cpu": round(_number(row.get("user_time")) / 1000 / age_s, 5),
            **hanging.of(pid),
            "children": [self._process(child, children, hanging, depth + 1) for child in below],
        }
        if pid == "1":
            part["pid"] = 1
        elif not below and age_s < SHORT_LIVED_S and not part["listens"]:
            part.update(every_s=max(60, 2 * age_s), lasts_s=[age_s, age_s])
        return {key: value for key, value in part.items() if value not in ("", [], {})}

    def _user_name(self, uid: str) -> str:
        row = next((row for row in self.table("users") if row["uid"] == uid), None)
        if row is None:
            return f"uid{uid}"
        return self.redactor.stand_in("user", row["username"]) if _is_person(uid) else row["username"]

    # -- tables as they stand ------------------------------------------------------------------------------------

    def _standing(self, name: str) -> Part:
        rows = self.table(name) if name in _KEPT_TABLES or not self.redactor.enabled else []
        columns = [column for column in (rows[0] if rows else ()) if column != "_id"]
        redacted = (self._redacted(name, row) for row in rows)
        return {"columns": columns, "rows": [[row.get(column, "") for column in columns] for row in redacted]}

    def _redacted(self, name: str, row: dict[str, str]) -> dict[str, str]:
        if not self.redactor.enabled:
            return row
        match name:
            case "crontab":
                return {
                    **row,
                    "command": self.redactor.arguments(row["command"]),
                    "path": self.redactor.path(row["path"]),
                }
            case "apt_sources":
                if not _PUBLIC_ARCHIVES.match(row["base_uri"]):
                    row = {**row, "base_uri": f"https://{self.redactor.stand_in('archive', row['base_uri'])}.example/"}
                    row["components"] = row["release"] = ""
                return {
                    **row,
                    "name": f"{row['base_uri']} {row['release']}",
                    "source": self.redactor.path(row["source"]),
                    "maintainer": "",
                }
            case "system_controls":
                if row["name"] in _FILLED_CONTROLS:
                    return {**row, "current_value": _FILLED_CONTROLS[row["name"]], "config_value": ""}
                return {
                    **row,
                    "name": self.redactor.text(row["name"]),
                    **{c: self._control(row.get(c, "")) for c in ("current_value", "config_value")},
                }
        return {column: self.redactor.text(value) for column, value in row.items()}

    def _control(self, value: str) -> str:
        kept = _NUMBERS.fullmatch(value) is not None
        return self.redactor.text(value) if kept else self.redactor.stand_in("value", value)


class _Hanging:
    """Sockets, files and environments by pid."""

    def __init__(self, machine: _Machine) -> None:
        self._redactor = machine.redactor
        self._tables = {
            name: _by_pid(machine.table(table))
            for name, table in (
                ("listens", "listening_ports"),
                ("connects", "process_open_sockets"),
                ("files", "process_open_files"),
                ("envs", "process_envs"),
            )
        }

    def of(self, pid: str) -> Part:
        rows = {name: by_pid.get(pid, [])[:MAX_PER_PROCESS] for name, by_pid in self._tables.items()}
        established = [row for row in self._tables["connects"].get(pid, []) if row.get("state") == "ESTABLISHED"]
        listens = [self._listens(row) for row in rows["listens"]]
        connects = [self._connects(row) for row in established[:MAX_PER_PROCESS]]
        return {
            "listens": list(dict.fromkeys(text for text in listens if text)),
            "connects": [text for text in connects if text],
            "files": [self._redactor.path(row["path"]) for row in rows["files"] if int(row["fd"]) > 2],
            "envs": {row["key"]: self._redactor.stand_in("value", row["value"]) for row in rows["envs"]},
        }

    def _listens(self, row: TableRow) -> str:
        if row.get("path"):
            return f"unix {self._redactor.path(row['path'])}"
        protocol = {"6": "tcp", "17": "udp"}.get(row["protocol"])
        if protocol is None:
            return ""
        address = row["address"]
        if self._redactor.enabled and self._redactor.address(address) != address:
            address = "::" if ":" in address else "{address}"
        return f"{protocol} {_bracketed(address)}:{row['port']}"

    def _connects(self, row: TableRow) -> str:
        address = row["remote_address"]
        if self._redactor.enabled and self._redactor.address(address) != address:
            is_private = ipaddress.ip_address(address).is_private
            address = "neighbour" if is_private else "internet"
        return f"tcp {_bracketed(address)}:{row['remote_port']}" if row["protocol"] == "6" else ""


def _by_pid(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["pid"], []).append(row)
    return found


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _is_person(number: str) -> bool:
    return int(number) >= FIRST_PERSON and int(number) != NOBODY


def _number(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0


def _flags(text: str) -> str:
    """Mount options that are words or numbers: others name servers, accounts and the paths of overlays."""
    return ",".join(option for option in text.split(",") if _PLAIN_OPTION.fullmatch(option))
