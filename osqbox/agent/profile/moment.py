"""A pretended host at one second: what runs, who is there, which versions. A pure function of the host and the time.

Nothing is remembered between two moments, so any two evaluations agree, in whatever order and process they are made:

- A host boots once in every window of ``reboot_days``.
- A package gets releases on days that are the same for all hosts of a profile, and each host installs them at its own
  time of day. A program starts at the boot, or when its package was upgraded after it.
- A program with ``every_s`` runs once in every such window of time, for a drawn ``lasts_s``.
- A pid is the second of the start, counted from the boot, times the number of places in the process tree, plus the
  place: it grows with time and no two processes alive share it. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from osqbox.agent.profile.compiled import BOOT_SETTLES_S, DAY_S, Compiled, Software, Stream
from osqbox.agent.profile.description import Hardware, Role, User, fill
from osqbox.agent.profile.dice import Dice

BOOT_TAKES_S = 120
"""Until then a host that boots still shows what was before."""
LOGINS_KEPT = 12
_TCP, _UDP = 6, 17
_INET, _INET6, _UNIX = 2, 10, 1
_INET6_BY_PLATFORM = {"macos": 30, "windows": 23, "freebsd": 28}


@dataclass(frozen=True, slots=True)
class Running:
    """A process."""

    pid: int
    parent: int
    start: int
    stream: Stream
    user: User


@dataclass(frozen=True, slots=True)
class Login:
    """A session, now or in the past."""

    stream: Stream
    user: User
    start: int
    end: int
    pid: int


@dataclass(frozen=True, slots=True)
class Socket:
    fd: int
    inode: int
    family: int
    protocol: int
    local: str = ""
    local_port: int = 0
    remote: str = ""
    remote_port: int = 0
    path: str = ""
    state: str = ""


class Moment:
    def __init__(
        self, compiled: Compiled, dice: Dice, metal: Dice, fleet: Dice, index: int, name: str, at: int
    ) -> None:
        self.compiled = compiled
        self.description = compiled.description
        self.dice = dice
        self.metal = metal
        """Decides hardware and its serial numbers: another host's when the ids are duplicates."""
        self.fleet = fleet
        """Decides what hosts know of each other."""
        self.index = index
        self.hostname = name
        self.at = at
        self.boot = self.boot_at(at)
        self._upgrade_phase_s = dice.below(DAY_S, "upgrades")
        self._running: dict[int, Running | None] = {}

    # -- what this host is ---------------------------------------------------------------------------------------

    @cached_property
    def roles(self) -> dict[str, Role]:
        described = self.description.all_roles()
        return {
            name: role for name, role in described if role.chance >= 1 or self.dice.share("role", name) < role.chance
        }

    @cached_property
    def hardware(self) -> Hardware:
        models = [model for model in self.description.hardware for _ in range(max(1, model.weight))]
        return self.metal.pick(models, "model")

    @cached_property
    def machine_sid(self) -> str:
        return "S-1-5-21-" + "-".join(str(self.dice.below(2**32, "sid", part)) for part in range(3))

    @cached_property
    def users(self) -> dict[str, User]:
        found = {user.name: user for role in self.roles.values() for user in role.users}
        found.update((user.name, user) for user in self.people)
        return found

    @cached_property
    def people(self) -> tuple[User, ...]:
        rule = self.description.people
        count = rule.count[0] + self.dice.below(rule.count[1] - rule.count[0] + 1, "people")
        return tuple(
            User(
                name=name,
                uid=rule.uid_from + at,
                gid=rule.uid_from + at if rule.gid is None else rule.gid,
                description=name.replace(".", " ").title(),
                home=fill(rule.home, {"user": name}),
                shell=rule.shell,
                uuid=rule.uuid,
                type=rule.type,
                groups=rule.groups,
            )
            for at, name in enumerate(self.dice.sample(rule.names, count, "person"))
        )

    def user_uuid(self, user: User) -> str:
        if user.uuid == "sid":
            return f"{self.machine_sid}-{user.uid}"
        return self.dice.uuid("user", user.name) if user.uuid == "guid" else user.uuid

    @cached_property
    def groups(self) -> dict[str, int]:
        found = {name: gid for role in self.roles.values() for name, gid in role.groups.items()}
        if self.description.people.gid is None:
            found.update((user.name, user.gid) for user in self.people)
        return found

    @cached_property
    def texts(self) -> dict[str, str]:
        """What every text of the description may name."""
        network = self.description.network
        return {
            "hostname": self.hostname,
            "domain": network.domain,
            "address": self.address(),
            "gateway": self.gateway,
            "kernel": self.description.kernel.version,
            "uuid": self.metal.uuid("hardware"),
        }

    # -- time ----------------------------------------------------------------------------------------------------

    def boot_at(self, at: int) -> int:
        """When the host had last booted at some time."""
        period = max(1, self.description.reboot_days) * DAY_S
        phase = self.dice.below(period, "boot phase")
        window = (at - BOOT_TAKES_S - phase) // period
        boot = self._boot(window, period, phase)
        return boot if boot + BOOT_TAKES_S <= at else self._boot(window - 1, period, phase)

    def _boot(self, window: int, period: int, phase: int) -> int:
        return phase + window * period + self.dice.below(period // 2, "boot", window)

    def release(self, software: Software) -> tuple[int, int]:
        """How many upgrades the package has seen, and when the last was installed (or the host itself)."""
        phase = self._upgrade_phase_s + 2 * software.number
        elapsed = (self.at - phase) // DAY_S - software.first_day
        if elapsed < 0 or software.package.held:
            return 0, self.installed_at
        past = elapsed // software.period_days
        return past + 1, (software.first_day + past * software.period_days) * DAY_S + phase

    @cached_property
    def installed_at(self) -> int:
        """When the operating system came onto the host."""
        return min(self.boot, self.description.as_of) - DAY_S - self.dice.below(300 * DAY_S, "installed")

    def software(self, table: str) -> Iterator[tuple[Software, str, int]]:
        """Packages of one kind with version and time of installation."""
        for item in self.compiled.software:
            if item.table == table and item.role in self.roles:
                release, installed = self.release(item)
                yield item, item.version(release), installed

    # -- processes -----------------------------------------------------------------------------------------------

    @cached_property
    def processes(self) -> list[Running]:
        found = (self._run(stream.number) for stream in self.compiled.streams)
        return sorted((process for process in found if process is not None), key=lambda process: process.pid)

    def process(self, pid: int) -> Running | None:
        """The process with that pid: found from the number itself, without making the others."""
        number = self.compiled.by_fixed_pid.get(pid)
        if number is None:
            kernel = self.description.kernel
            place, rest = divmod(pid, kernel.pid_step)
            if rest or place < kernel.first_pid:
                return None
            number = (place - kernel.first_pid) % len(self.compiled.streams)
        found = self._run(number)
        return found if found is not None and found.pid == pid else None

    def of_agent(self) -> Running | None:
        """osqueryd's worker."""
        number = next((s.number for s in self.compiled.streams if s.program.agent and s.role in self.roles), None)
        return None if number is None else self._run(number)

    def _run(self, number: int) -> Running | None:
        if number not in self._running:
            self._running[number] = self._make(self.compiled.streams[number])
        return self._running[number]

    def _make(self, stream: Stream) -> Running | None:
        program = stream.program
        user = self._user_of(stream)
        if user is None or stream.role not in self.roles:
            return None
        parent = self._run(stream.parent) if stream.parent >= 0 else None
        if parent is None and stream.parent >= 0:
            return None
        if program.every_s:
            start, end = self.occurrence(stream, self.at)
            if start < self.boot + BOOT_SETTLES_S or not start <= self.at < end:
                return None
            if parent is not None and parent.start > start:  # its parent was restarted since: init's child now
                parent = self._run(len(self.description.kernel.threads))
        elif stream.is_timed:
            start = parent.start + 1 if parent else self.boot
            if start > self.at:
                return None
        else:
            start = self._started(stream, parent)
        return Running(self._pid(stream, start, self.boot), parent.pid if parent else 0, start, stream, user)

    def _user_of(self, stream: Stream) -> User | None:
        """Whom it runs as; None when there is nobody of that name, or no such person."""
        if stream.person >= len(self.people):
            return None
        return self.people[stream.person] if stream.program.user == "@person" else self.users.get(stream.program.user)

    def _whose(self, stream: Stream, user: User) -> User:
        return self.people[stream.person] if stream.person >= 0 else user

    def _started(self, stream: Stream, parent: Running | None) -> int:
        start = self.boot + (0 if stream.program.pid else stream.delay_s)
        if parent is not None:
            start = max(start, parent.start)
        if stream.software is not None and not stream.program.pid:
            start = max(start, self.release(stream.software)[1])
        return start

    def occurrence(self, stream: Stream, at: int) -> tuple[int, int]:
        """Start and end of what comes and goes, in the window that ``at`` is in."""
        every = stream.program.every_s
        phase = self.dice.below(every, "phase", stream.number)
        window = (at - phase) // every
        lasts = max(1, int(self.dice.between(stream.program.lasts_s, "lasts", stream.number, window)))
        start = phase + window * every + self.dice.below(every - lasts + 1, "start", stream.number, window)
        return start, start + lasts

    def _pid(self, stream: Stream, start: int, boot: int) -> int:
        if stream.program.pid:
            return stream.program.pid
        kernel, places = self.description.kernel, len(self.compiled.streams)
        ticks = max(1, (kernel.pid_max // kernel.pid_step - kernel.first_pid) // places)
        return (kernel.first_pid + (start - boot) % ticks * places + stream.number) * kernel.pid_step

    def process_texts(self, process: Running) -> dict[str, str]:
        stream = process.stream
        person = self._whose(stream, process.user)
        return {
            **self.texts,
            "user": person.name,
            "home": person.home,
            "uid": str(person.uid),
            "tty": self.tty(stream),
            "host": self.visitor(stream, process.start),
            "n": str(stream.ordinal),
            "job": str(1000 + self.dice.below(9000, "job", stream.number, process.start)),
        }

    # -- log-ins -------------------------------------------------------------------------------------------------

    def tty(self, stream: Stream) -> str:
        return {"macos": "ttys", "windows": "rdp-tcp#"}.get(self.description.platform, "pts/") + (
            f"{stream.ordinal:03d}" if self.description.platform == "macos" else str(stream.ordinal)
        )

    def visitor(self, stream: Stream, start: int) -> str:
        """Where a session comes from."""
        return self._neighbour("visitor", stream.number, start // DAY_S)

    def sessions(self) -> Iterator[Login]:
        """Who is logged in, and the process of each."""
        for stream in self.compiled.sessions:
            process = self._run(stream.number)
            if process is not None:
                top = self._timed_top(stream)
                _, end = self.occurrence(top, self.at) if top else (0, 0)
                yield Login(stream, self._whose(stream, process.user), process.start, end, process.pid)

    def past_sessions(self) -> Iterator[Login]:
        """Log-ins since the host was installed, the newest first; those of now among them."""
        for stream in self.compiled.sessions:
            top, user = self._timed_top(stream), self._user_of(stream)
            if top is None or user is None or stream.role not in self.roles:
                continue
            for back in range(LOGINS_KEPT):
                at = self.at - back * top.program.every_s
                start, end = self.occurrence(top, at)
                start += self._depth(stream, top)
                if self.installed_at < start <= self.at and start < end:
                    boot = self.boot_at(start) if start < self.boot else self.boot
                    if start >= boot + BOOT_SETTLES_S:
                        yield Login(stream, self._whose(stream, user), start, end, self._pid(stream, start, boot))

    def _timed_top(self, stream: Stream) -> Stream | None:
        """The program above whose coming and going this one shares."""
        found: Stream | None = stream
        while found is not None and not found.program.every_s:
            found = self.compiled.streams[found.parent] if found.parent >= 0 else None
        return found

    def _depth(self, stream: Stream, top: Stream) -> int:
        depth = 0
        while stream.number != top.number:
            stream, depth = self.compiled.streams[stream.parent], depth + 1
        return depth

    # -- network -------------------------------------------------------------------------------------------------

    @cached_property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.description.network.network, strict=False)

    @cached_property
    def gateway(self) -> str:
        return str(self.network[1])

    def address(self, index: int | None = None) -> str:
        """Of the host with that index; they begin again where the network ends."""
        number = self.index if index is None else index
        size = self.network.num_addresses
        return str(self.network[(10 + number % (size - 12)) if size > 16 else number % size])

    def mac(self, index: int | None = None) -> str:
        number = self.index if index is None else index
        low = (self.fleet.below(2**24, "mac") + number) % 2**24
        return f"{self.description.network.interface.mac}:{low >> 16:02x}:{low >> 8 & 255:02x}:{low & 255:02x}"

    def _neighbour(self, *what: str | int) -> str:
        return self.address(self.index + 1 + self.dice.below(max(1, self.description.network.neighbours), *what))

    def files(self, process: Running) -> Iterator[tuple[int, str]]:
        """Descriptors of files."""
        program = process.stream.program
        if not program.path:
            return
        standard = f"/dev/{self.tty(process.stream)}" if process.stream.person >= 0 else "/dev/null"
        if self.description.platform != "windows":
            yield from ((fd, standard) for fd in range(3))
        texts = self.process_texts(process)
        yield from ((3 + at, fill(path, texts)) for at, path in enumerate(program.files))

    def sockets(self, process: Running) -> Iterator[Socket]:
        program = process.stream.program
        fd = 3 + len(program.files)
        for number, text in enumerate((*program.listens, *program.connects)):
            is_listening = number < len(program.listens)
            yield self._socket(process, fd + number, text, is_listening)
        fd += len(program.listens) + len(program.connects)
        yield from self._clients(process, fd)

    def _socket(self, process: Running, fd: int, text: str, is_listening: bool) -> Socket:
        protocol, _, where = fill(text, self.process_texts(process)).partition(" ")
        inode = self._inode(process, fd)
        if protocol == "unix":
            return Socket(fd, inode, _UNIX, 0, path=where)
        host, _, port = where.rpartition(":")
        host = host.strip("[]")
        family = _INET6_BY_PLATFORM.get(self.description.platform, _INET6) if ":" in host else _INET
        kind = _TCP if protocol == "tcp" else _UDP
        if is_listening:
            anyone = "::" if ":" in host else "0.0.0.0"  # noqa: S104 - text in a table; nothing is bound
            state = "LISTEN" if kind == _TCP else ""
            return Socket(fd, inode, family, kind, host, int(port), anyone, 0, state=state)
        local_port = 32_768 + self.dice.below(28_000, "port", process.pid, fd)
        state = "ESTABLISHED" if kind == _TCP else ""
        peer = self._peer(host, process, fd)
        local = peer if peer.startswith("127.") else self.address()
        return Socket(fd, inode, family, kind, local, local_port, peer, int(port), state=state)

    def _peer(self, host: str, process: Running, fd: int) -> str:
        match host:
            case "gateway":
                return self.gateway
            case "resolver":
                return next(iter(self.description.network.resolvers), self.gateway)
            case "neighbour":
                return self._neighbour("peer", process.pid, fd)
            case "internet":  # the networks set aside for documentation
                return f"203.0.113.{1 + self.dice.below(254, 'peer', process.pid, fd)}"
        return host

    def _clients(self, process: Running, fd: int) -> Iterator[Socket]:
        program = process.stream.program
        port = next((int(text.rpartition(":")[2]) for text in program.listens if text.startswith("tcp ")), None)
        for slot in range(program.clients if port is not None else 0):
            period = 20 + self.dice.below(100, "client", process.stream.number, slot)
            window = self.at // period
            peer = self._neighbour("client", process.stream.number, slot, window)
            far = 32_768 + self.dice.below(28_000, "client port", process.stream.number, slot, window)
            if window * period >= process.start:
                inode = self._inode(process, fd + slot, window)
                yield Socket(fd + slot, inode, _INET, _TCP, self.address(), port or 0, peer, far, state="ESTABLISHED")

    def _inode(self, process: Running, fd: int, window: int = 0) -> int:
        """Room for 1024 descriptors in each process, each with 256 sockets in a row."""
        return 20_000 + ((process.pid * 1024 + fd % 1024) * 256 + window % 256)

    # -- load ----------------------------------------------------------------------------------------------------

    def wave(self, *what: str | int, every_s: int = 60) -> float:
        """A share that changes from window to window."""
        return self.dice.share(*what, self.at // every_s)

    def resident_bytes(self, process: Running) -> int:
        program = process.stream.program
        size_mib = self.dice.between(program.memory_mib, "memory", process.stream.number)
        pages = int(size_mib * 256 * (1 + 0.06 * self.wave("memory", process.stream.number)))
        return pages * 4096
