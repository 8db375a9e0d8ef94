"""What a host profile's YAML may say: the shapes it is read into, and what is checked before anybody uses it.

docs/hosts.md describes the members for people.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from osqbox.errors import BadSetup
from osqbox.schema import Column, Schema, Table, fixture_path, load_schema

PROFILE_BYTES = 8 * 1024 * 1024
MAX_EXTENDS = 8
MAX_STREAMS = 4096
MAX_VALUES, MAX_LEVELS = 500_000, 100
_JOINED = frozenset({"users", "processes", "files", "units"})
COLUMN_TYPES = frozenset({"TEXT", "INTEGER", "BIGINT", "UNSIGNED BIGINT", "DOUBLE"})

Span = tuple[float, float]
"""Lowest and highest."""
Scalar = str | int | float | None
Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Described(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """A part of the YAML. A member nobody knows is an error."""


class OsRelease(Described, frozen=True, kw_only=True):
    name: str
    version: str
    platform: str
    version_id: str = ""
    major: int = 0
    minor: int = 0
    patch: int = 0
    build: str = ""
    platform_like: str = ""
    codename: str = ""
    arch: str = "x86_64"


class Kernel(Described, frozen=True, kw_only=True):
    version: str
    arguments: str = ""
    path: str = ""
    device: str = ""
    modules: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    """Kernel threads, the first being the parent of the others."""
    first_pid: Positive = 300
    """The lowest that programs get, above those of the kernel threads."""
    pid_max: Positive = 4_194_304
    pid_step: Positive = 1
    """4 on Windows."""


class Hardware(Described, frozen=True, kw_only=True):
    """One model; hosts draw one by ``weight``."""

    vendor: str
    model: str
    version: str = ""
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    serial: str = "???#######"
    """``#`` is a digit, ``?`` a letter."""
    board: str = ""
    board_vendor: str = ""
    cpu: str
    cpu_type: str = "x86_64"
    cpu_subtype: str = ""
    cpu_vendor: str = "GenuineIntel"
    microcode: str = ""
    mhz: int = 2400
    sockets: Positive = 1
    cores: Positive
    """In each socket."""
    threads: Positive = 2
    """In each core."""
    memory_gib: Positive
    dimm_gib: Positive = 16
    bios_vendor: str = ""
    bios_version: str = ""
    bios_date: str = ""
    bios_revision: str = ""
    firmware: str = "uefi"


class Partition(Described, frozen=True, kw_only=True):
    mount: str = ""
    type: str = "ext4"
    size_mib: Count = 0
    """0 is what the others leave."""
    flags: str = "rw,relatime"
    label: str = ""
    used: Span = (0.1, 0.7)
    encrypted: str = ""
    """``LUKS`` or the like; empty is not."""
    device: str = ""
    """What is mounted, such as ``/dev/mapper/root``; empty is the partition itself."""


class Disk(Described, frozen=True, kw_only=True):
    name: str
    vendor: str = ""
    model: str = ""
    serial: str = "S###??#########"
    size_gib: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]
    """Hosts draw one."""
    partitions: tuple[Partition, ...] = ()
    block_size: Positive = 512


class Pseudo(Described, frozen=True, kw_only=True):
    """A mount without a disk."""

    path: str
    type: str
    device: str = ""
    flags: str = "rw,nosuid,nodev,noexec,relatime"
    size_mib: Count = 0


class Interface(Described, frozen=True, kw_only=True):
    name: str
    mtu: int = 1500
    mac: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{2}(:[0-9a-f]{2}){2}$")] = "52:54:00"
    """The first three bytes."""
    speed_mbit: int = 1000
    slot: str = ""
    description: str = ""


class Network(Described, frozen=True, kw_only=True):
    network: str = "10.20.0.0/16"
    domain: str = "example.internal"
    loopback: str = "lo"
    interface: Interface
    resolvers: tuple[str, ...] = ()
    neighbours: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 6


class User(Described, frozen=True, kw_only=True):
    name: str
    uid: int
    gid: int
    description: str = ""
    home: str = "/"
    shell: str = "/usr/sbin/nologin"
    uuid: str = ""
    """``guid`` and ``sid`` are made up for the host."""
    type: str = ""
    groups: tuple[str, ...] = ()


class People(Described, frozen=True, kw_only=True):
    """Those who work on the host: some of ``names`` become accounts."""

    names: tuple[str, ...] = ()
    count: tuple[Count, Count] = (0, 2)
    uid_from: int = 1000
    gid: int | None = None
    """The primary group of all; None is a group of each one's own."""
    groups: tuple[str, ...] = ()
    home: str = "/home/{user}"
    shell: str = "/bin/bash"
    uuid: str = ""
    type: str = ""


class Package(Described, frozen=True, kw_only=True):
    version: str
    section: str = ""
    size: int = 0
    source: str = ""
    arch: str = ""
    vendor: str = ""
    summary: str = ""
    path: str = ""
    identifier: str = ""
    held: bool = False
    """Never upgraded."""


class Process(Described, frozen=True, kw_only=True):
    """A program that runs: all the time, or with ``every_s`` now and then for ``lasts_s``.

    ``{user} {home} {uid} {tty} {host} {hostname} {address} {n}`` in its texts are replaced.
    """

    name: str
    path: str = ""
    cmdline: str = ""
    user: str = "root"
    """``@person`` is everyone of the host's people, each with a process."""
    package: str = ""
    unit: str = ""
    description: str = ""
    cwd: str = "/"
    state: str = "S"
    threads: int = 1
    nice: int = 0
    memory_mib: Span = (2, 12)
    cpu: float = 0.0005
    """Share of one processor it uses."""
    pid: Count = 0
    """Fixed; 0 is given out."""
    count: Count = 1
    every_s: Count = 0
    lasts_s: Span = (1, 1)
    for_each_person: bool = False
    """One for everyone of the host's people, also when it runs as somebody else."""
    login: bool = False
    """It is a log-in session of that person."""
    agent: bool = False
    """It is osqueryd's worker."""
    listens: tuple[str, ...] = ()
    """``tcp 0.0.0.0:22``, ``udp [::]:68`` or ``unix /run/x.sock``."""
    connects: tuple[str, ...] = ()
    """``tcp HOST:PORT``, where HOST may also be ``gateway``, ``resolver``, ``neighbour`` or ``internet``."""
    clients: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Peers connected to its first TCP port, coming and going."""
    files: tuple[str, ...] = ()
    envs: dict[str, str] = {}
    children: tuple[Process, ...] = ()


class File(Described, frozen=True, kw_only=True):
    path: str
    mode: str = "0644"
    size: int = 0
    user: str = "root"
    type: Literal["regular", "directory", "symlink"] = "regular"
    package: str = ""


class Unit(Described, frozen=True, kw_only=True):
    id: str
    description: str = ""
    active: str = "active"
    sub: str = "running"
    file_state: str = "enabled"


class Rows(Described, frozen=True, kw_only=True):
    """A table that does not change, as it stands."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Scalar, ...], ...] = ()


class Role(Described, frozen=True, kw_only=True):
    """What some of the hosts are for, with all that belongs to it."""

    chance: float = 1.0
    packages: dict[str, dict[str, str | Package]] = {}
    """By table: ``deb_packages``, ``rpm_packages``, ``python_packages``, ``apps``, ``homebrew_packages``,
    ``programs``; then name -> ``VERSION [SECTION]`` or all members."""
    users: tuple[User, ...] = ()
    groups: dict[str, int] = {}
    processes: tuple[Process, ...] = ()
    files: tuple[File, ...] = ()
    units: tuple[Unit, ...] = ()
    tables: dict[str, Rows] = {}


class Description(Described, frozen=True, kw_only=True):
    """A whole profile."""

    name: str
    platform: Literal["linux", "macos", "windows", "freebsd"] = "linux"
    as_of: int
    """Unix time at which the packages had the versions given; later they are upgraded."""
    upgrade_days: tuple[Positive, Positive] = (14, 60)
    """How long a package waits for its next version."""
    reboot_days: Positive = 30
    hostname: str = "{name}-{index:04d}"
    os: OsRelease
    kernel: Kernel
    hardware: Annotated[tuple[Hardware, ...], msgspec.Meta(min_length=1)]
    disks: Annotated[tuple[Disk, ...], msgspec.Meta(min_length=1)]
    pseudo: tuple[Pseudo, ...] = ()
    network: Network
    people: People = People()
    base: Role
    roles: dict[str, Role] = {}
    schema: dict[str, tuple[str, ...]] = {}
    """Tables osquery has on this platform and not on Linux: name -> ``COLUMN TYPE``."""

    def all_roles(self) -> Iterator[tuple[str, Role]]:
        yield "base", self.base
        yield from self.roles.items()


# -- reading -----------------------------------------------------------------------------------------------------


def read_description(name_or_path: str | Path) -> Description:
    """A profile by the name of a shipped one, or by the path of a file ending .yaml or .yml.

    Raises BadSetup, naming the file and the member, for one that cannot be used.
    """
    where, raw = _load(str(name_or_path), MAX_EXTENDS)
    try:
        found = msgspec.convert(raw, Description)
    except msgspec.ValidationError as error:
        raise BadSetup(f"{where}: {error}", hint="see docs/hosts.md for the members of a host profile") from error
    problems = list(_problems(found))
    if problems:
        raise BadSetup(f"{where}: " + "; ".join(problems[:5]), hint="see docs/hosts.md")
    return found


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with osqbox."""
    folder = fixture_path("hosts/ubuntu.yaml")
    with_names = Path(str(folder)).parent.glob("[a-z]*.yaml")
    return sorted(path.stem for path in with_names)


def _load(name: str, depth: int) -> tuple[str, dict[str, Any]]:
    if depth <= 0:
        raise BadSetup(f"host profile {name}: 'extends' goes deeper than {MAX_EXTENDS} profiles, or in a circle")
    where, text = _text(name)
    raw = _parse(where, text)
    parent = raw.pop("extends", None)
    if parent is None:
        return where, raw
    if not isinstance(parent, str):
        raise BadSetup(f"{where}: expected the name of a profile in 'extends', got {parent!r}")
    return where, _merged(_load(parent, depth - 1)[1], raw)


def _text(name: str) -> tuple[str, str]:
    is_path = name.endswith((".yaml", ".yml"))
    try:
        if is_path:
            path = Path(name)
            if path.stat().st_size > PROFILE_BYTES:
                raise BadSetup(f"{name}: expected at most {PROFILE_BYTES} bytes, got {path.stat().st_size}")
            return name, path.read_text(encoding="utf-8")
        if not name.replace("-", "").replace("_", "").isalnum():
            raise BadSetup(f"expected a profile's name or a file ending .yaml, got {name!r}", hint=_known())
        return name, fixture_path(f"hosts/{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"cannot read the host profile {name}: {error}") from error
    except BadSetup as error:
        if is_path or error.hint == _known():
            raise
        raise BadSetup(f"there is no host profile named {name!r}", hint=_known()) from None


def _known() -> str:
    return f"one of {', '.join(shipped_profiles())}, or a file ending .yaml"


def _parse(where: str, text: str) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadSetup(f"{where}: expected YAML, got {error}") from error
    if not isinstance(raw, dict):
        raise BadSetup(f"{where}: expected a mapping at the top, got {type(raw).__name__}")
    _check_size(where, raw)
    return raw


def _check_size(where: str, raw: Any) -> None:
    """A few lines of YAML can stand for any number of values: what an alias names is counted each time."""
    level, count = [raw], 0
    for _ in range(MAX_LEVELS):
        children = (child for value in level if isinstance(value, dict | list) for child in _inside(value))
        level = list(itertools.islice(children, MAX_VALUES))
        count += len(level)
        if count >= MAX_VALUES:
            raise BadSetup(f"{where}: expected at most {MAX_VALUES} values, aliases counted each time")
    if level:
        raise BadSetup(f"{where}: expected at most {MAX_LEVELS} levels")


def _inside(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _merged(under: Any, over: Any, key: str = "") -> Any:
    """Mappings join, so do the lists of `_JOINED`; anything else is replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {k: _merged(under.get(k), over[k], k) if k in over else under[k] for k in {**under, **over}}
    if key in _JOINED and isinstance(under, list) and isinstance(over, list):
        return under + over
    return over


# -- checking ----------------------------------------------------------------------------------------------------


def _problems(found: Description) -> Iterator[str]:
    """What does not agree with itself, in words."""
    if not found.base.users or not found.base.processes:
        yield "expected at least one entry in base.users and base.processes"
    for name, (low, high) in {"upgrade_days": found.upgrade_days, "people.count": found.people.count}.items():
        if low > high:
            yield f"{name}: expected the lower number first, got {low}, {high}"
    try:
        ipaddress.IPv4Network(found.network.network, strict=False)
    except ValueError as error:
        yield f"network: expected an IPv4 network such as 10.20.0.0/16: {error}"
    yield from _pid_problems(found)
    yield from _table_problems(found)
    groups = {gid for _, role in found.all_roles() for gid in role.groups.values()}
    group_names = {name for _, role in found.all_roles() for name in role.groups}
    base_users = {user.name for user in found.base.users}
    for name, role in found.all_roles():
        users = base_users | {user.name for user in role.users} | {"@person"}
        packages = {p for r in (found.base, role) for listed in r.packages.values() for p in listed}
        for user in role.users:
            if user.gid not in groups:
                yield f"{name}: user {user.name!r} has gid {user.gid}, which no group has"
            yield from (
                f"{name}: user {user.name!r} is in unknown group {g!r}" for g in user.groups if g not in group_names
            )
        for process in walk(role.processes):
            if process.user not in users:
                yield f"{name}: process {process.name!r} runs as unknown user {process.user!r}"
            if process.package and process.package not in packages:
                yield f"{name}: process {process.name!r} is of package {process.package!r}, which is not listed"
            if process.every_s and not 0 < process.lasts_s[0] <= process.lasts_s[1] <= process.every_s:
                yield f"{name}: process {process.name!r}: expected 0 < lasts_s <= every_s ({process.every_s})"
            yield from _socket_problems(process)


def _pid_problems(found: Description) -> Iterator[str]:
    kernel = found.kernel
    fixed = [process.pid for _, role in found.all_roles() for process in walk(role.processes) if process.pid]
    fixed += range(2, 2 + len(kernel.threads))
    lowest = kernel.first_pid * kernel.pid_step
    yield from (f"two processes have pid {pid}" for pid in sorted({pid for pid in fixed if fixed.count(pid) > 1}))
    yield from (f"pid {pid}: expected one below first_pid {lowest}" for pid in fixed if pid >= lowest)
    places = sum(_places(role.processes, found.people.count[1]) for _, role in found.all_roles())
    if places > MAX_STREAMS:
        yield f"expected at most {MAX_STREAMS} processes, copies counted, got {places}"
    elif (kernel.first_pid + places) * kernel.pid_step > kernel.pid_max:
        yield f"pid_max: {kernel.pid_max} is too low for {places} processes from {kernel.first_pid}"


def _places(processes: Iterable[Process], people: int) -> int:
    """At least how many processes there may be: each copy has all the children."""
    total = 0
    for process in processes:
        is_personal = process.for_each_person or process.user == "@person"
        total += (max(1, people) if is_personal else process.count) * (1 + _places(process.children, 1))
    return total


def walk(processes: Iterable[Process]) -> Iterator[Process]:
    for process in processes:
        yield process
        yield from walk(process.children)


def _socket_problems(process: Process) -> Iterator[str]:
    for text in (*process.listens, *process.connects):
        protocol, _, where = text.partition(" ")
        is_inet = protocol in ("tcp", "udp") and where.rpartition(":")[2].isdigit()
        if not is_inet and not (protocol == "unix" and where):
            yield f"process {process.name!r}: expected 'tcp HOST:PORT', 'udp HOST:PORT' or 'unix PATH', got {text!r}"


def _table_problems(found: Description) -> Iterator[str]:
    for name, columns in found.schema.items():
        wrong = [column for column in columns if column.partition(" ")[2] not in COLUMN_TYPES]
        yield from (f"schema: {name}: expected 'NAME TYPE', got {column!r}" for column in wrong)
    schema = platform_schema(found)
    for role_name, role in found.all_roles():
        for name, table in role.tables.items():
            if name not in schema:
                yield f"{role_name}: osquery has no table {name!r} on {found.platform}; declare it under schema"
                continue
            unknown = set(table.columns) - {column.name for column in schema[name].all_columns}
            if unknown:
                yield f"{role_name}: table {name!r} has no column {', '.join(sorted(unknown))}"
            for row in table.rows:
                if len(row) != len(table.columns):
                    yield f"{role_name}: table {name!r}: expected {len(table.columns)} values in a row, got {len(row)}"


def platform_schema(found: Description) -> Schema:
    """The tables osquery has on the profile's platform, and those the profile declares."""
    tables: dict[str, Table] = {t.name: t for t in load_schema() if found.platform in t.platforms}
    for name, texts in found.schema.items():
        columns = tuple(Column(*text.partition(" ")[::2]) for text in texts)
        tables[name] = Table(name, columns, platforms=(found.platform,))
    return Schema(tables)


def split_version(version: str, table: str) -> tuple[str, int, str]:
    """What stands before, in and after the number that the next version raises."""
    start = version.find("-") + 1 if table == "rpm_packages" else 0
    digits = _number_from(version, start) if start else _last_number(version)
    if digits is None:
        return version + ".", 0, ""
    return version[: digits[0]], int(version[digits[0] : digits[1]]), version[digits[1] :]


def _number_from(text: str, start: int) -> tuple[int, int] | None:
    begin = next((at for at in range(start, len(text)) if text[at].isdigit()), None)
    if begin is None:
        return None
    end = next((at for at in range(begin, len(text)) if not text[at].isdigit()), len(text))
    return begin, end


def _last_number(text: str) -> tuple[int, int] | None:
    end = next((at for at in range(len(text), 0, -1) if text[at - 1].isdigit()), None)
    if end is None:
        return None
    begin = next((at for at in range(end, 0, -1) if not text[at - 1].isdigit()), 0)
    return begin, end


def packages_of(role: Role) -> Iterator[tuple[str, str, Package]]:
    """Table, name and description of each."""
    for table, listed in role.packages.items():
        for name, described in listed.items():
            if isinstance(described, str):
                version, _, section = described.partition(" ")
                yield table, name, Package(version=version, section=section)
            else:
                yield table, name, described


Texts = Mapping[str, str]


def fill(text: str, texts: Texts) -> str:
    """``{name}`` replaced; braces that name nothing stay."""
    if "{" in text:
        for name, value in texts.items():
            text = text.replace(f"{{{name}}}", value)
    return text
