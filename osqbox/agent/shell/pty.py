"""A program on a pseudo-terminal of its own, with job control, read to its last byte, and ended with all it started.

The program is started by a few words of ``/bin/sh``: as leader of a new session it opens the terminal, which makes it
the controlling one for every shell (dash does not do that by itself), once it has been put into its control group.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from osqbox.agent.shell.cgroup import Cgroup, make_cgroup
from osqbox.agent.shell.program import MARK, Program
from osqbox.agent.shell.terminal import Ending, ShellRefused
from osqbox.shell_frames import Size

CHUNK_BYTES = 32 * 1024
"""Read at most so much at once; the kernel hands out no more than 4 KiB each time."""
SWEEP_S = 5.0
"""How long the end of a session keeps killing what is left of it."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.1
_SHIM = 'read -r _ && exec "$@" <>"$0" >&0 2>&0'
_SHIM_WITHOUT_JOB_CONTROL = 'read -r _ && "$@" <&1; exit $?'
"""Nobody opens the terminal, and the program is no session leader: it gets no controlling one."""
_IUTF8 = 0o40000
_EOF = b"\x04"
_RESET_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTIN,
                  signal.SIGTTOU, signal.SIGCHLD)  # fmt: skip


class Pty:
    """A `Terminal` with a program behind it. Use `open_pty`."""

    def __init__(
        self, master: int, process: trio.Process, program: Program, mark: str, group: Cgroup | None, *, leads: bool
    ) -> None:
        self._master = master
        self._process = process
        self._program = program
        self._mark = mark
        self._group = group
        self._leads = leads
        self._over = False
        """The program has exited: what can be read now is all there is."""
        self._closed = False
        """The terminal is given back."""
        self._closing = False
        self._gone = trio.Event()
        self._reading: trio.CancelScope | None = None

    @property
    def shell(self) -> str:
        return self._program.shell

    @property
    def user(self) -> str:
        return self._program.user.name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def title(self) -> str:
        return f"{self._program.shell}@{os.uname().nodename}"

    # -- its two directions --------------------------------------------------------------------------------------

    async def receive_some(self) -> bytes:
        while not self._closed:
            over = self._over  # asked first: what it wrote before it exited is there by then
            data, at_end = self._read_now()
            if data or at_end or over:
                await trio.lowlevel.checkpoint()
                return data
            with trio.CancelScope() as self._reading, contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._master)
            self._reading = None
        await trio.lowlevel.checkpoint()
        return b""

    def _read_now(self) -> tuple[bytes, bool]:
        """What is there, and whether that was the end."""
        pieces: list[bytes] = []
        room = CHUNK_BYTES
        while room > 0:
            try:
                piece = os.read(self._master, room)
            except BlockingIOError:
                break
            except OSError:  # EIO: nobody holds the other end any more
                return b"".join(pieces), not pieces
            if not piece:
                return b"".join(pieces), not pieces
            pieces.append(piece)
            room -= len(piece)
        return b"".join(pieces), False

    async def send_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self._closed:
            try:
                rest = rest[os.write(self._master, rest) :]
            except BlockingIOError:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_writable(self._master)
            except OSError:
                break
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await self.send_all(_EOF)

    def resize(self, size: Size) -> None:
        if not self._closed:
            with contextlib.suppress(OSError):
                _set_size(self._master, size)

    # -- its end -------------------------------------------------------------------------------------------------

    async def wait(self) -> Ending:
        await self._process.wait()
        self._over = True
        if self._reading is not None:
            self._reading.cancel()
        assert self._process.returncode is not None
        return Ending.of_returncode(self._process.returncode)

    async def close(self, grace_s: float) -> None:
        first, self._closing = not self._closing, True
        with trio.CancelScope(shield=True):
            if not first:
                await self._gone.wait()
                return
            try:
                if not self._closed:
                    await self._hang_up(grace_s)
                self._let_go()
                await self._sweep()
            finally:
                self._gone.set()

    async def interrupt(self, grace_s: float) -> None:
        with trio.CancelScope(shield=True):
            for number in (signal.SIGINT, signal.SIGKILL):
                for pid in self._programs():
                    _signal(pid, number)
                with trio.move_on_after(grace_s):
                    await self._process.wait()
                    break
            self._let_go()

    def _programs(self) -> set[int]:
        """The program itself: the leader, or the only one it started where it is not to lead."""
        if self._leads:
            return {self._process.pid}
        return {each.pid for each in living() if each.parent == self._process.pid}

    async def _hang_up(self, grace_s: float) -> None:
        """SIGHUP to everyone in the session, as when a line drops, and time to end."""
        for pid in self._members():
            _signal(pid, signal.SIGHUP)
            _signal(pid, signal.SIGCONT)
        with trio.move_on_after(grace_s):
            await self._process.wait()
            await self._until_alone()

    def _let_go(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._master)
            os.close(self._master)

    async def _sweep(self) -> None:
        """Kill until nothing is left, and reap the leader."""
        with trio.move_on_after(SWEEP_S):
            await self._until_alone(kill=True)
        await self._process.wait()
        if self._group is not None:
            with trio.move_on_after(SWEEP_S):
                pause_s = _FIRST_LOOK_S
                while not self._group.remove():
                    await trio.sleep(pause_s)
                    pause_s = min(_LONGEST_LOOK_S, 2 * pause_s)

    async def _until_alone(self, *, kill: bool = False) -> None:
        pause_s = _FIRST_LOOK_S
        while members := self._members():
            if kill:
                if self._group is not None:
                    self._group.kill()
                for pid in members:
                    _signal(pid, signal.SIGKILL)
            await trio.sleep(pause_s)
            pause_s = min(_LONGEST_LOOK_S, 2 * pause_s)

    def _members(self) -> set[int]:
        """Everyone of the session who lives: by session id, by the mark in the environment, by control group."""
        leader = self._process.pid
        found = {each.pid for each in living() if each.session == leader or _is_marked(each.pid, self._mark)}
        if self._process.returncode is None:
            found.add(leader)
        return found | (self._group.pids() if self._group is not None else set())


async def open_pty(program: Program, size: Size, *, job_control: bool = True) -> Pty:
    """Start a program. Raises ShellRefused."""
    mark = secrets.token_hex(8)
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise ShellRefused(f"no terminal can be had on this host: {error.strerror}") from error
    group = make_cgroup(f"osqbox-shell-{mark}")
    try:
        _prepare(master, slave, program, size)
        process = await _start(slave, program, mark, group, _SHIM if job_control else _SHIM_WITHOUT_JOB_CONTROL)
    except BaseException as error:
        os.close(master)
        if group is not None:
            group.remove()
        if isinstance(error, OSError | subprocess.SubprocessError):
            raise ShellRefused(f"cannot start {program.shell} as {program.user.name}: {error}") from error
        raise
    finally:
        os.close(slave)
    return Pty(master, process, program, mark, group, leads=job_control)


def _prepare(master: int, slave: int, program: Program, size: Size) -> None:
    os.set_blocking(master, False)
    _set_size(slave, size)
    modes = termios.tcgetattr(slave)
    modes[0] |= _IUTF8  # backspace takes a whole character
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    if program.changes_user:
        os.fchown(slave, program.user.uid, -1)


async def _start(slave: int, program: Program, mark: str, group: Cgroup | None, shim: str) -> trio.Process:
    user = program.user if program.changes_user else None
    ready, go = os.pipe()
    try:
        with _ignored_signals_heard():
            process: trio.Process = await trio.lowlevel.open_process(
                ["/bin/sh", "-c", shim, os.ttyname(slave), *program.argv],
                stdin=ready,
                stdout=slave,
                stderr=slave,
                cwd=program.directory,
                env={**program.environment, MARK: mark},
                start_new_session=True,
                user=user.uid if user else None,
                group=user.gid if user else None,
                extra_groups=os.getgrouplist(user.name, user.gid) if user else None,
            )
        if group is not None:
            group.add(process.pid)
        os.write(go, b"\n")
    finally:
        os.close(ready)
        os.close(go)
    return process


@contextlib.contextmanager
def _ignored_signals_heard() -> Iterator[None]:
    """What the agent ignores, as one started by nohup or with ``&`` does, its programs would ignore for ever, Ctrl-C
    included. A signal that is handled becomes the default one in a program that is started."""
    ignored: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        ignored = [number for number in _RESET_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    try:
        for number in ignored:
            signal.signal(number, _nothing)
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def _nothing(_number: int, _frame: object) -> None:
    """A signal that stays ignored."""


def _set_size(fd: int, size: Size) -> None:
    packed = struct.pack("HHHH", size.rows, size.cols, size.x_pixels, size.y_pixels)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, packed)


# -- processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Living:
    pid: int
    parent: int
    session: int


def living() -> Iterator[Living]:
    """Everything that runs on this machine; zombies do not."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path each is what takes the time
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
                if words[0] not in (b"Z", b"X"):
                    yield Living(int(name), int(words[1]), int(words[3]))


def _is_marked(pid: int, mark: str) -> bool:
    wanted = f"{MARK}={mark}".encode()
    try:
        return wanted in _read(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return False


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
