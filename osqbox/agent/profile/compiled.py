"""A description made ready for many hosts: processes and packages as flat, numbered tuples. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from osqbox.agent.profile.description import (
    Description,
    Package,
    Process,
    packages_of,
    platform_schema,
    split_version,
)
from osqbox.agent.profile.dice import Dice
from osqbox.schema import Schema

DAY_S = 86_400
BOOT_SETTLES_S = 20
"""Within this time after the boot every permanent program has started."""


@dataclass(frozen=True, slots=True)
class Software:
    """One package and when it gets its next versions, which is the same for all hosts of a profile."""

    number: int
    table: str
    role: str
    name: str
    package: Package
    before: str
    count: int
    after: str
    period_days: int
    first_day: int
    """Days since the epoch when the first upgrade comes out."""

    def version(self, release: int) -> str:
        return f"{self.before}{self.count + release}{self.after}" if release else self.package.version


@dataclass(frozen=True, slots=True)
class Stream:
    """One place in the process tree: a program that is there always, or time after time."""

    number: int
    role: str
    program: Process
    parent: int
    """Number of its parent's stream; -1 is the kernel."""
    is_timed: bool
    """It, or a program above it, comes and goes."""
    ordinal: int
    """Which of ``count``, or of the host's people."""
    person: int
    """Ordinal of the person it runs for; -1 is nobody."""
    software: Software | None
    delay_s: int


@dataclass(frozen=True)
class Compiled:
    description: Description
    schema: Schema
    software: tuple[Software, ...]
    streams: tuple[Stream, ...]
    """Parents before their children."""
    by_fixed_pid: dict[int, int]
    sessions: tuple[Stream, ...]
    """Those that are log-ins."""


def compile_description(description: Description) -> Compiled:
    software = tuple(_software(description))
    by_name = {(item.role, item.name): item for item in software}
    streams = tuple(_Flatten(description, by_name).all())
    return Compiled(
        description,
        platform_schema(description),
        software,
        streams,
        {stream.program.pid: stream.number for stream in streams if stream.program.pid},
        tuple(stream for stream in streams if stream.program.login),
    )


def _software(description: Description) -> Iterator[Software]:
    low, high = description.upgrade_days
    number = 0
    for role_name, role in description.all_roles():
        for table, name, package in packages_of(role):
            upstream = Dice("upstream", table, name)
            period = low + upstream.below(high - low + 1, "period")
            first = description.as_of // DAY_S + 1 + upstream.below(period, "first")
            yield Software(
                number, table, role_name, name, package, *split_version(package.version, table), period, first
            )
            number += 1


class _Flatten:
    """Numbers the process trees of all roles."""

    def __init__(self, description: Description, software: dict[tuple[str, str], Software]) -> None:
        self._description = description
        self._software = software
        self._next = 0

    def all(self) -> Iterator[Stream]:
        yield from self._kernel_threads()
        for role_name, role in self._description.all_roles():
            for program in role.processes:
                yield from self._tree(role_name, program, self._root(), None)

    def _kernel_threads(self) -> Iterator[Stream]:
        for at, name in enumerate(self._description.kernel.threads):
            thread = Process(name=name, pid=2 + at, state="S" if at == 0 else "I", memory_mib=(0, 0), cpu=0.0001)
            yield Stream(at, "base", thread, -1 if at == 0 else 0, False, 0, -1, None, 0)
        self._next = len(self._description.kernel.threads)
        self._init = self._next

    def _root(self) -> int:
        """Whatever has no parent in the description is a child of the first process, which is nobody's."""
        return -1 if self._next == self._init else self._init

    def _tree(self, role: str, program: Process, parent: int, above: Stream | None) -> Iterator[Stream]:
        people = self._description.people
        is_personal = program.for_each_person or program.user == "@person"
        per_person = is_personal and (above is None or above.person < 0)
        copies = people.count[1] if per_person else program.count
        for ordinal in range(copies):
            stream = Stream(
                number=self._next,
                role=role,
                program=program,
                parent=parent,
                is_timed=bool(program.every_s) or (above is not None and above.is_timed),
                ordinal=above.ordinal if above and copies == 1 else ordinal,
                person=ordinal if per_person else (above.person if above else -1),
                software=self._software.get((role, program.package)) or self._software.get(("base", program.package)),
                delay_s=self._next % BOOT_SETTLES_S,
            )
            self._next += 1
            yield stream
            for child in program.children:
                yield from self._tree(role, child, stream.number, stream)
