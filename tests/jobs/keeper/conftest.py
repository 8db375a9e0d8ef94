"""What the tests of the keeper stand on: real zygotes, real keepers, real jobs.

`keepers`  one zygote; `keepers.run(...)` starts a job in a directory of its own and gives a `Kept`
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import tree, wire
from osqbox.jobs.keeper.cgroups import find_hierarchies

LIMIT_S = 20.0
PATH = os.environ["PATH"]


@dataclass
class Kept:
    """One job: its directory, and a client of its keeper."""

    id: str
    directory: Path
    sock: socket.socket
    status: dict[str, Any] = field(default_factory=dict)
    """The latest."""
    grew: list[int] = field(default_factory=list)
    calls: int = 0
    _lines: wire.Lines = field(default_factory=wire.Lines)
    _ahead: list[dict[str, Any]] = field(default_factory=list)

    def next(self) -> dict[str, Any] | None:
        """The next message; None at the end of file."""
        while not self._ahead:
            self.sock.settimeout(LIMIT_S)
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:  # a call crossed the end
                return None
            if not data:
                return None
            self._ahead += self._lines.feed(data)
        message = self._ahead.pop(0)
        self.status = message.get("status") or message.get("ended") or self.status
        self.grew = message.get("grew", self.grew)
        return message

    def until(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while (message := self.next()) is not None and time.monotonic() < deadline:
            if wanted(message):
                return message
        raise AssertionError(f"never came; the latest was {self.status}")

    def until_running(self) -> Kept:
        if not self.status:
            self.until(lambda message: "status" in message or "ended" in message)
        assert self.status["state"] == "running", self.status
        return self

    def until_output(self, text: bytes) -> Kept:
        """Also after a moment in which it was seen already."""
        self.until_running()
        while text not in self.output:
            self.until(lambda message: "grew" in message or "ended" in message)
        return self

    def end(self) -> dict[str, Any]:
        """The last status; checks that it is the last word and on disk."""
        ended = self.until(lambda message: "ended" in message)["ended"]
        assert self.next() is None
        assert json.loads((self.directory / "status.json").read_bytes()) == ended
        return ended

    def send(self, do: str, **words: Any) -> int:
        self.calls += 1
        self.sock.settimeout(LIMIT_S)
        self.sock.sendall(wire.encode({"call": self.calls, "do": do, **words}))
        return self.calls

    def ask(self, do: str, **words: Any) -> dict[str, Any]:
        """The answer to this call."""
        call = self.send(do, **words)
        return self.until(lambda message: message.get("call") == call)

    @property
    def output(self) -> bytes:
        return (self.directory / "output").read_bytes()

    @property
    def records(self) -> list[tuple[int, int, int, int]]:
        data = (self.directory / "index").read_bytes()[wire.HOLE.size :]
        return list(wire.RECORD.iter_unpack(data))

    def reconnect(self) -> Kept:
        """As a box does that was started again."""
        self.sock.close()
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            self.sock = wire.connect(fd)
        finally:
            os.close(fd)
        self._lines, self._ahead = wire.Lines(), []
        return self

    @property
    def keeper_pid(self) -> int:
        return int(Path(f"/proc/{self.status['pid']}/stat").read_bytes().rpartition(b")")[2].split()[1])

    def family(self) -> set[int]:
        """Living processes with the JOB_ID of this job."""
        return tree.with_job_id(self.id)


class Zygote:
    def __init__(self, python: str | None = None, before: str = "", **popen: Any) -> None:
        """`before`: code that it runs first, to make its world another one."""
        self.sock, theirs = wire.zygote_sockets()
        with theirs:
            *command, code = wire.zygote_command(theirs.fileno())
            self.process = subprocess.Popen(
                [python or command[0], *command[1:], code.replace("; from", f"; {before or 'pass'}; from")],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={},
                **popen,
            )

    def close(self) -> int:
        self.sock.close()
        return self.process.wait(LIMIT_S)


class Keepers:
    """The jobs of one test."""

    def __init__(self, directory: Path, zygote: Zygote) -> None:
        self.directory, self.zygote = directory, zygote
        self.sock, self.process = zygote.sock, zygote.process
        self.started: list[Kept] = []
        self.waits = 0

    def run(self, script: str | None = None, *, directory: Path | None = None, **spec: Any) -> Kept:
        """`script` by sh; or `command` and `args`."""
        job_id = secrets.token_hex(16)
        directory = directory or self.directory / job_id
        directory.mkdir(0o700, exist_ok=True)
        command = {} if script is None else {"command": "sh", "args": ["-c", script]}
        fd = os.open(directory, os.O_RDONLY)
        try:
            spec = {"id": job_id, "env": {"PATH": PATH}, "cwd": "/", "stop_grace_s": 5.0} | command | spec
            while (sock := self._spawn(spec, fd)) is None:
                assert select.select((), (self.sock,), (), LIMIT_S)[1]
        finally:
            os.close(fd)
        kept = Kept(job_id, directory, sock)
        self.started.append(kept)
        return kept

    def _spawn(self, spec: dict[str, Any], directory: int) -> socket.socket | None:
        """None when the zygote is behind."""
        try:
            return wire.spawn(self.sock, spec, directory)
        except BlockingIOError:
            self.waits += 1
            return None

    def close(self) -> None:
        """No process of any test is left."""
        for kept in self.started:
            kept.sock.close()
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, KeyError):
                keeper = kept.keeper_pid
                if Path(f"/proc/{keeper}/comm").read_text() == "osqbox-keeper\n" and not kept.status.get("ended_at"):
                    os.kill(keeper, signal.SIGKILL)
            if kept.status.get("ended_at") is None or kept.status.get("leftover_processes"):
                tree.end_orphans(kept.id, kept.status.get("cgroups", []))


CGROUP_1 = (
    "import osqbox.jobs.keeper.cgroups as c; found = c.find_hierarchies(); "
    "c.find_hierarchies = lambda: c.Hierarchies([], found.v1)"
)
OLD_KERNEL = (
    "import osqbox.jobs.keeper.cgroups as c; write = c._write; "
    "c._write = lambda file, value: not file.endswith('/cgroup.kill') and write(file, value)"
)
WORLDS = {"cgroup": "", "process_group": "", "cgroup1": CGROUP_1, "without cgroup.kill": OLD_KERNEL}


@pytest.fixture(scope="session")
def zygotes() -> Iterator[Callable[[str], Zygote]]:
    """One for each world, for all tests."""
    made: dict[str, Zygote] = {}

    def get(world: str) -> Zygote:
        return made.get(world) or made.setdefault(world, Zygote(before=WORLDS[world]))

    yield get
    assert [zygote.close() for zygote in made.values()] == [0] * len(made)


@pytest.fixture
def keepers(tmp_path: Path, request: pytest.FixtureRequest, zygotes: Callable[[str], Zygote]) -> Iterator[Keepers]:
    callspec = getattr(request.node, "callspec", None)
    world = str((callspec and callspec.params.get("containment")) or "cgroup")
    if world == "cgroup1" and "freezer" not in find_hierarchies().v1:
        pytest.skip("no writable v1 freezer")
    keepers = Keepers(tmp_path, zygotes(world))
    yield keepers
    keepers.close()


@pytest.fixture
def make_keepers(tmp_path: Path) -> Iterator[Callable[..., Keepers]]:
    """With a zygote of its own, which a test may treat as it likes."""
    made: list[Keepers] = []

    def make(**words: Any) -> Keepers:
        made.append(Keepers(tmp_path, Zygote(**words)))
        return made[-1]

    yield make
    for keepers in made:
        keepers.close()
        keepers.zygote.close()


@pytest.fixture(params=list(WORLDS))
def containment(request: pytest.FixtureRequest) -> str | None:
    """Every way to end a tree, for `keepers.run`; all are the last where no cgroup is writable."""
    return "process_group" if request.param == "process_group" else None
