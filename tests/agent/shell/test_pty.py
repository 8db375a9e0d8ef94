"""Real programs on real terminals: job control, the last byte, and what is left afterwards (nothing)."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from osqbox.agent.shell.cgroup import make_cgroup
from osqbox.agent.shell.program import MARK, find_program
from osqbox.agent.shell.pty import Pty, living, open_pty
from osqbox.agent.shell.terminal import Ending, ShellRefused
from osqbox.shell_frames import Size

SHELLS = [path for path in ("/bin/bash", "/bin/dash") if Path(path).exists()]
USUAL = Size(80, 24)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Screen:
    """Types into a terminal and waits for what appears."""

    def __init__(self, pty: Pty) -> None:
        self.pty = pty
        self.seen = b""

    async def type(self, text: str) -> None:
        await self.pty.send_all(text.encode())

    async def command_runs(self, runs: bool = True) -> None:
        """Whether a command has the keyboard, or the shell."""
        with trio.fail_after(10):
            while (os.tcgetpgrp(self.pty._master) != self.pty.pid) != runs:
                await trio.sleep(0.01)

    async def until(self, text: str) -> bytes:
        """What appeared up to and with ``text``."""
        wanted = text.encode()
        with trio.move_on_after(10) as patience:
            while wanted not in self.seen:
                data = await self.pty.receive_some()
                assert data, f"ended before {text!r}: {self.seen!r}"
                self.seen += data
        assert not patience.cancelled_caught, f"waited for {text!r}, saw {self.seen!r}"
        found, _, self.seen = self.seen.partition(wanted)
        return found + wanted

    async def rest(self) -> bytes:
        with trio.fail_after(10):
            while data := await self.pty.receive_some():
                self.seen += data
        return self.seen


def run(
    argv: Sequence[str] | None,
    conversation: Callable[[Screen], Awaitable[None]],
    shell: str = "/bin/sh",
    size: Size = USUAL,
) -> Ending:
    """Ending of a program after ``await conversation(screen)``; nothing of it is left then."""

    async def main() -> Ending:
        program = find_program(shell, None, login=False)
        pty = await open_pty(replace(program, argv=tuple(argv)) if argv else program, size)
        endings: list[Ending] = []

        async def wait() -> None:
            endings.append(await pty.wait())

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                try:
                    await conversation(Screen(pty))
                finally:
                    await pty.close(0.3)
        assert left_of(pty) == []
        return endings[0]

    before = open_fds()
    ending = trio.run(main)
    assert open_fds() == before
    return ending


def open_fds() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


def left_of(pty: Pty) -> list[int]:
    """Whoever has this terminal's mark in the environment."""
    wanted, found = f"{MARK}={pty._mark}".encode(), []
    for each in living():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{each.pid}/environ").read_bytes():
                found.append(each.pid)
    return found


# -- what programs write -----------------------------------------------------------------------------------------


def test_a_short_program_never_loses_a_byte() -> None:
    wanted = b"".join(b"%d\r\n" % number for number in range(1, 1001))

    program = replace(find_program("/bin/sh", None), argv=("/bin/sh", "-c", "seq 1 1000; exit 3"))

    async def runs() -> None:
        for _ in range(50):
            pty = await open_pty(program, Size(80, 24))
            async with trio.open_nursery() as nursery:
                endings: list[Ending] = []

                async def wait(pty: Pty = pty, endings: list[Ending] = endings) -> None:
                    endings.append(await pty.wait())

                nursery.start_soon(wait)
                output = b""
                while data := await pty.receive_some():
                    output += data
            await pty.close(0.1)
            assert output == wanted
            assert endings == [Ending(code=3)]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(runs)

    trio.run(main)


def test_the_last_byte_comes_although_somebody_holds_the_terminal_open() -> None:
    async def conversation(screen: Screen) -> None:
        assert await screen.rest() == b"last words\r\n"

    script = "trap '' HUP; sleep 600 & echo last words; exit 4"
    assert run(("/bin/sh", "-c", script), conversation) == Ending(code=4)


def test_a_program_that_is_not_read_is_held_by_the_kernel(tmp_path: Path) -> None:
    """Beyond the terminal's own buffer, `yes` waits; what it wrote is less than a few hundred KiB."""
    count = tmp_path / "count"

    async def conversation(screen: Screen) -> None:
        with trio.fail_after(5):
            before = -1
            while True:
                written = int(count.read_text() or 0) if count.exists() else 0
                if written == before and written > 0:
                    break
                before = written
                await trio.sleep(0.2)
        assert written < 1024 * 1024

    code = "import os,sys\nn=0\nwhile 1:\n n+=os.write(1,b'y'*1024)\n open(sys.argv[1],'w').write(str(n))"
    assert run((sys.executable, "-c", code, str(count)), conversation).signal in (signal.SIGHUP, signal.SIGKILL)


def test_raw_bytes_pass_exactly_both_ways() -> None:
    data = bytes(range(256)) * 1024

    async def conversation(screen: Screen) -> None:
        await screen.until("ready")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(screen.pty.send_all, data)
            while len(screen.seen) < len(data):
                screen.seen += await screen.pty.receive_some()
        assert screen.seen == data

    code = "stty raw -echo; printf ready; exec head -c 262144"
    assert run(("/bin/sh", "-c", code), conversation) == Ending(code=0)


# -- shells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_ctrl_c_ends_the_command_and_not_the_shell(shell: str) -> None:
    async def conversation(screen: Screen) -> None:
        await screen.type("sh -c \"echo go''ing; exec sleep 600\"; echo not rea''ched\n")
        await screen.until("going\r\n")
        await screen.type("\x03")
        await screen.command_runs(False)
        await screen.type("echo al''ive; exit 7\n")
        assert b"reached" not in await screen.until("alive")
        await screen.rest()

    assert run(None, conversation, shell) == Ending(code=7)


@pytest.mark.parametrize("shell", SHELLS)
def test_ctrl_z_stops_a_command_and_fg_goes_on_with_it(shell: str) -> None:
    async def conversation(screen: Screen) -> None:
        await screen.type("set -m; sh -c \"echo go''ing; exec cat\"\n")
        await screen.until("going\r\n")
        await screen.type("one\n")
        await screen.until("one\r\none\r\n")
        await screen.type("\x1a")
        await screen.command_runs(False)
        await screen.type("echo ba''ck\n")
        await screen.until("back\r\n")
        await screen.type("fg\n")
        await screen.command_runs()
        await screen.type("two\n")
        await screen.until("two\r\ntwo\r\n")
        await screen.type("\x04")
        await screen.command_runs(False)
        await screen.type("exit 0\n")
        await screen.rest()

    assert run(None, conversation, shell) == Ending(code=0)


def test_it_has_a_controlling_terminal_of_its_size() -> None:
    async def conversation(screen: Screen) -> None:
        await screen.type("stty size </dev/tty; tput cols 2>/dev/null || echo 132\n")
        await screen.until("40 132")
        screen.pty.resize(Size(90, 30, 900, 600))
        await screen.type("stty size\n")
        await screen.until("30 90")

    assert run(None, conversation, size=Size(132, 40)).signal == signal.SIGHUP


def test_a_full_screen_program_follows_a_change_of_size() -> None:
    code = """
import curses
def main(screen):
    while True:
        rows, cols = screen.getmaxyx()
        screen.clear(); screen.addstr(0, 0, f"<{cols}x{rows}>"); screen.refresh()
        if screen.getch() == ord("q"):
            return
curses.wrapper(main)
"""

    async def conversation(screen: Screen) -> None:
        await screen.until("<80x24>")
        screen.pty.resize(Size(100, 30))
        await screen.type("x")  # curses looks at the size between two keys, and may just have done so
        await screen.until("<100x30>")
        await screen.type("q")
        await screen.rest()

    assert run((sys.executable, "-c", code), conversation) == Ending(code=0)


def test_a_death_by_signal_is_told() -> None:
    async def conversation(screen: Screen) -> None:
        await screen.rest()

    assert run(("/bin/sh", "-c", "kill -TERM $$"), conversation) == Ending(signal=signal.SIGTERM)


def test_what_the_agent_ignores_its_programs_hear() -> None:
    """As when the agent was started with ``&``: Ctrl-C works in its shells all the same."""

    async def conversation(screen: Screen) -> None:
        await screen.type("sh -c \"echo rea''dy; exec sleep 600\"\n")
        await screen.until("ready\r\n")
        await screen.type("\x03")
        await screen.command_runs(False)
        await screen.type("echo $?; exit 0\n")
        await screen.until("130")
        await screen.rest()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(None, conversation, "/bin/bash") == Ending(code=0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_agents_environment_stays_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSQBOX_TOKEN", "do-not-show")

    async def conversation(screen: Screen) -> None:
        seen = await screen.rest()
        assert b"do-not-show" not in seen
        assert b"TERM=xterm-256color\r\n" in seen

    run(("/usr/bin/env",), conversation)


# -- the end -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_session(tmp_path: Path) -> None:
    """Not the background job, not the one that ignores hanging up, not the one with a session of its own."""

    async def conversation(screen: Screen) -> None:
        await screen.type(f"cd {tmp_path}; sleep 601 & nohup sleep 602 & (trap '' HUP TERM; sleep 603) &\n")
        await screen.type("setsid sleep 604 & sleep 0.1; echo rea''dy\n")
        await screen.until("ready")
        assert len(left_of(screen.pty)) >= 5  # and afterwards none, which `run` looks for

    run(None, conversation, "/bin/bash")


def test_one_that_forgot_its_name_is_found_by_its_control_group(tmp_path: Path) -> None:
    group = make_cgroup("osqbox-test-probe")
    if group is None:
        pytest.skip("no cgroup v2 we may write to")
    group.remove()
    pidfile = tmp_path / "pid"

    async def conversation(screen: Screen) -> None:
        await screen.type(f"env -i setsid -f sh -c 'echo $$ >{pidfile}; exec sleep 605'; echo rea''dy\n")
        await screen.until("ready")
        with trio.fail_after(5):
            while not (pidfile.exists() and pidfile.read_text().strip()):
                await trio.sleep(0.01)

    run(None, conversation, "/bin/bash")
    assert int(pidfile.read_text()) not in {each.pid for each in living()}


def test_a_shell_that_does_not_hear_is_killed_and_closing_twice_is_once() -> None:
    async def conversation(screen: Screen) -> None:
        await screen.until("deaf")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(screen.pty.close, 0.2)
            nursery.start_soon(screen.pty.close, 0.2)

    script = "trap '' HUP TERM INT; echo deaf; while :; do sleep 1; done"
    assert run(("/bin/bash", "-c", script), conversation) == Ending(signal=signal.SIGKILL)


# -- who and what ------------------------------------------------------------------------------------------------


@AS_ROOT
def test_a_shell_runs_as_the_user_asked_for() -> None:
    async def main() -> bytes:
        program = replace(find_program("/bin/sh", "nobody"), argv=("/bin/sh", "-c", "id -un; tty; echo hi >/dev/tty"))
        assert program.changes_user
        pty = await open_pty(program, Size(80, 24))
        screen = Screen(pty)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pty.wait)
            seen = await screen.rest()
        await pty.close(0.1)
        return seen

    lines = trio.run(main).split()
    assert lines[0] == b"nobody"
    assert lines[1].startswith(b"/dev/pts/")
    assert lines[2] == b"hi"


def test_another_user_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: pwd.getpwnam("nobody").pw_uid)
    with pytest.raises(ShellRefused, match=r"cannot run a shell as root: .* only root may change users"):
        find_program(None, "root")


@pytest.mark.parametrize(
    ("shell", "user", "complaint"),
    [
        ("/no/such/shell", None, "expected a shell that can be executed"),
        ("bash", None, "by its whole path"),
        ("/etc/passwd", None, "expected a shell that can be executed"),
        ("/tmp", None, "expected a shell that can be executed"),
        ("/bin/sh\0", None, "expected a shell that can be executed"),
        (None, "no-such-user", "expected a user of this host"),
        (None, "ro\0ot", "expected a user of this host"),
    ],
)
def test_what_cannot_be_run_is_refused_with_words(shell: str | None, user: str | None, complaint: str) -> None:
    with pytest.raises(ShellRefused, match=complaint):
        find_program(shell, user)


def test_a_login_shell_reads_its_profile() -> None:
    assert find_program("/bin/bash", None).argv == ("/bin/bash", "--login")
    assert find_program("/bin/sh", None).argv == ("/bin/sh", "-l")
    assert find_program(shutil.which("env"), None).argv == (shutil.which("env"),)
