"""``osqbox shell`` against a real box and a real agent, in a real terminal where that matters."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.cli.sanitize import Sanitizer
from osqbox.cli.shell import DETACH_KEY
from osqbox.cli.terminal import Command, Keys, key_name, outcome_of
from osqbox.client import Client

from .conftest import JobsBox, start_jobs_box

WAIT_S = 20.0
LEADER = 'exec "$@" <"$0" >"$0" 2>&1'
"""Opening the terminal as the leader of a session makes it the controlling one."""
PREFIX = b"\x1d"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JobsBox, subprocess.Popen[bytes]]]:
    """A box with shells on, and an agent on this machine whose shells are dash."""
    serve, box = start_jobs_box(tmp_path_factory.mktemp("shell-box"), "--ephemeral", "--control")
    words = ["agent", "--control", "--allow-real-shell", "--shell", "/bin/sh"]
    with (box.home / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "osqbox", *words],
            env={**box.environment(), "PS1": "$ ", "ENV": ""}, stdout=log, stderr=log, cwd=box.home,
        )  # fmt: skip
    client = Client(box.ready["operator"], box.ready["token"])
    deadline = time.monotonic() + WAIT_S
    while not client.get("nodes"):
        assert time.monotonic() < deadline, (box.home / "agent.log").read_text()
        time.sleep(0.05)
    yield box, agent
    for process in (agent, serve):
        process.terminate()
        process.wait(WAIT_S)


@pytest.fixture(scope="module")
def box(running: tuple[JobsBox, subprocess.Popen[bytes]]) -> JobsBox:
    return running[0]


@pytest.fixture
def agent(running: tuple[JobsBox, subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    return running[1]


@pytest.fixture
def client(box: JobsBox) -> Client:
    return Client(box.ready["operator"], box.ready["token"])


@pytest.fixture
def node(client: Client) -> str:
    name: str = client.get("nodes")[0]["id"]
    return name


def shell(box: JobsBox, *words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The verb with pipes."""
    return subprocess.run(
        [sys.executable, "-m", "osqbox", "shell", *words],
        env=box.environment(), cwd=box.home, input=given, capture_output=True, timeout=40,
    )  # fmt: skip


class Screen:
    """The verb in a terminal of its own."""

    def __init__(self, box: JobsBox, *words: str, cols: int = 80, rows: int = 24) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(cols, rows)
        self.before = termios.tcgetattr(self._slave)
        command = [sys.executable, "-m", "osqbox", "shell", *words]
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", LEADER, os.ttyname(self._slave), *command],
            env=box.environment(), cwd=box.home, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.seen = b""

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def until(self, pattern: bytes) -> re.Match[bytes]:
        """Read on until something is there that was not asked for before; it is then taken away."""
        deadline = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            self._read(deadline, pattern)
        self.seen = self.seen[found.end() :]
        return found

    def _read(self, deadline: float, wanted: bytes = b"") -> bool:
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"expected {wanted!r}, got {self.seen!r}"
        if select.select([self.master], [], [], min(left_s, 0.1))[0]:
            self.seen += os.read(self.master, 65536)
            return True
        return False

    def run(self, line: bytes, pattern: bytes) -> re.Match[bytes]:
        self.type(line + b"\r")
        return self.until(pattern)

    def wait(self) -> int:
        """The exit code; what was printed until then is in ``seen``."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            self._read(deadline, b"the end")
        while self._read(deadline):
            pass
        return self.process.returncode

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        os.close(self.master)
        os.close(self._slave)


@pytest.fixture
def screen(box: JobsBox) -> Iterator[Any]:
    opened: list[Screen] = []

    def open_screen(*words: str, **size: int) -> Screen:
        opened.append(Screen(box, *words, **size))
        return opened[-1]

    yield open_screen
    for each in opened:
        each.close()


def newest(client: Client) -> dict[str, Any]:
    facts: dict[str, Any] = client.get("shells")[0]
    return facts


def wait_for(fact: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# with pipes


def test_a_script_runs_through_it_and_its_exit_code_comes_back(box, node, client):
    done = shell(box, node, "--reason", "a test", given=b"echo $((6 * 7)); exit 3\n")
    assert (done.returncode, b"42\r\n" in done.stdout) == (3, True), done
    assert b"\x1d" not in done.stderr
    facts = newest(client)
    assert (facts["reason"], facts["exit_code"], facts["end_reason"]) == ("a test", 3, "exit")


def test_a_pipe_that_ends_ends_the_shell(box, node):
    assert shell(box, node).returncode == 0
    done = shell(box, node, given=b"cat > /dev/null; echo after $((6 * 7))\n")
    assert (done.returncode, b"after 42\r\n" in done.stdout) == (0, True), done


def test_a_signal_is_told_as_shells_tell_it(box, node):
    done = shell(box, node, given=b"kill -9 $$\n")
    assert done.returncode == 137
    assert b"ended by SIGKILL" in done.stderr


def test_binary_output_is_exact_and_so_is_its_replay(box, node, client, tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "data").write_bytes(data)
    done = shell(box, node, given=f"stty -opost -echo; printf BEGIN; cat {tmp_path}/data; exit\n".encode())
    assert done.stdout.rpartition(b"BEGIN")[2] == data
    session = newest(client)["id"]
    for options in (["--no-wait"], ["--speed", "1000"]):
        again = shell(box, "replay", session, *options)
        assert (again.returncode, again.stdout == done.stdout) == (0, True)


def test_an_unknown_node_and_a_useless_shell_are_explained(box, node):
    done = shell(box, "nobody")
    assert (done.returncode, b"no node called 'nobody'" in done.stderr) == (2, True), done
    done = shell(box, node, "--shell", "/nowhere")
    assert (done.returncode, b"refused" in done.stderr) == (1, True), done


# in a terminal


def test_a_terminal_behaves_like_one(screen, node, client):
    """Prompt, size, resize, Ctrl-C, job control, exit code; and the local terminal is left as it was."""
    here = screen(node, cols=90, rows=31)
    here.until(b"Ctrl-] then d: detach")
    here.until(rb"[$#] ")
    here.run(b"stty size", b"\r\n31 90\r\n")
    here.resize(100, 40)
    wait_for(lambda: newest(client)["cols"] == 100)
    here.run(b"while [ \"$(stty size)\" != '40 100' ]; do sleep 0.02; done; echo re''sized", b"\r\nresized\r\n")
    here.run(b"sleep 100; echo never", b"sleep 100")
    time.sleep(0.2)
    here.type(b"\x03")
    here.until(rb"\^C")
    here.run(b"tty", rb"/dev/pts")
    here.run(b"sleep 100 & jobs; kill -9 %1; wait", rb"Running")
    here.type(PREFIX + PREFIX + b"\x15")
    here.type(b"exit 7\r")
    assert here.wait() == 7
    assert here.is_as_before()
    assert newest(client)["exit_code"] == 7


def test_a_program_that_draws_works(screen, node, tmp_path):
    """The alternate screen, single keys and a redraw after a resize."""
    (tmp_path / "draw.py").write_text(
        "import curses\n"
        "def main(screen):\n"
        "    while True:\n"
        "        rows, cols = screen.getmaxyx()\n"
        "        screen.clear(); screen.addstr(0, 0, f'SIZE {cols}x{rows} '); screen.refresh()\n"
        "        key = screen.getch()\n"
        "        if key == ord('q'): return\n"
        "        if key != curses.KEY_RESIZE: screen.addstr(1, 0, f'KEY {key} '); screen.refresh(); screen.getch()\n"
        "curses.wrapper(main)\n"
    )
    here = screen(node, cols=70, rows=20)
    here.until(rb"[$#] ")
    here.run(f"TERM=xterm {sys.executable} {tmp_path}/draw.py".encode(), b"SIZE 70x20")
    here.type(b"\x1bOA")
    here.until(b"KEY 259")
    here.type(b"x")
    here.until(b"SIZE 70x20")
    here.resize(72, 22)
    here.until(b"72x22")
    here.type(b"q")
    here.until(rb"[$#] ")
    here.type(b"exit\r")
    assert here.wait() == 0


def test_a_second_one_watches_and_cannot_type(screen, node, client):
    one = screen(node)
    one.until(rb"[$#] ")
    session = newest(client)["id"]
    two = screen("watch", session)
    two.until(rb"[$#] ")
    two.type(b"echo from the watcher\r")
    one.run(b"echo se''en by both", b"\r\nseen by both\r\n")
    two.until(b"\r\nseen by both\r\n")
    assert b"from the watcher" not in two.seen + one.seen
    assert [each["role"] for each in client.get(f"shells/{session}")["viewers"]] == ["controller", "viewer"]
    one.type(b"exit 4\r")
    assert (one.wait(), two.wait()) == (4, 4)


def test_the_keyboard_changes_hands(screen, node, client):
    one = screen(node)
    one.until(rb"[$#] ")
    session = newest(client)["id"]
    two = screen("watch", session)
    two.until(rb"[$#] ")
    two.type(PREFIX + b"c")
    one.until(b"types now")
    two.until(b"you type now")
    two.run(b"echo ha''nded over", b"\r\nhanded over\r\n")
    two.type(PREFIX + b"q")
    assert two.wait() == 0
    one.type(PREFIX + b"c")
    one.type(b"exit\r")
    assert one.wait() == 0


def test_detached_it_waits_and_is_taken_up_again(screen, node, client):
    one = screen(node)
    one.until(rb"[$#] ")
    one.run(b"MARK=kept", rb"[$#] ")
    one.type(PREFIX + b"d")
    assert one.wait() == 0
    session = newest(client)["id"]
    assert f"osqbox shell attach {session}".encode() in one.seen
    assert one.is_as_before()
    assert client.get(f"shells/{session}")["state"] == "open"
    two = screen("attach", session)
    two.until(b"MARK=kept")
    two.run(b'echo "<$MARK>"', b"\r\n<kept>\r\n")
    two.type(b"exit 2\r")
    assert two.wait() == 2


def test_leaving_ends_it(screen, node, client):
    one = screen(node)
    one.until(rb"[$#] ")
    one.type(PREFIX + b"q")
    assert one.wait() == 0
    wait_for(lambda: newest(client)["end_reason"] == "operator_left")


def test_a_killed_session_says_so(screen, box, node, client):
    one = screen(node)
    one.until(rb"[$#] ")
    session = newest(client)["id"]
    assert shell(box, "kill", session).returncode == 0
    assert one.wait() == 1
    assert b"the session was killed" in one.seen
    assert one.is_as_before()
    assert b"\x1b[?1049l" in one.seen  # whatever was on the screen is left behind
    listed = shell(box, "list", "--state", "ended").stdout.decode()
    assert re.search(rf"{session} .* killed ", listed)
    assert json.loads(shell(box, "show", session, "--json").stdout)["end_reason"] == "killed"


def test_waiting_for_an_agent_can_be_given_up(screen, node, agent, client):
    """Ctrl-C is this program's as long as there is no shell."""
    agent.send_signal(signal.SIGSTOP)
    try:
        one = screen(node)
        one.until(b"waiting for")
        one.type(b"\x03")
        assert one.wait() == 130
        wait_for(lambda: newest(client)["end_reason"] == "operator_left")
    finally:
        agent.send_signal(signal.SIGCONT)


def test_taking_up_an_ended_session_tells_how_it_ended(box, node, client):
    assert shell(box, node, given=b"exit 6\n").returncode == 6
    done = shell(box, "attach", newest(client)["id"])
    assert done.returncode == 6, done


# replay


def replay_file(box: JobsBox, tmp_path: Path, *lines: str, options: tuple[str, ...] = ()) -> Any:
    (tmp_path / "x.cast").write_text("\n".join(lines) + "\n")
    return shell(box, "replay", str(tmp_path / "x.cast"), *options)


V2 = '{"version": 2, "width": 80, "height": 24}'
V3 = '{"version": 3, "term": {"cols": 80, "rows": 24}}'


def test_replay_keeps_time_as_asked(box, tmp_path):
    lines = (V3, '[0.0, "o", "a"]', '[2.0, "r", "90x30"]', '[2.0, "o", "b"]', '[4000.0, "o", "c"]', '[0, "x", "0"]')
    began = time.monotonic()
    done = replay_file(box, tmp_path, *lines, options=("--speed", "10", "--idle-limit", "5"))
    took_s = time.monotonic() - began
    assert (done.returncode, done.stdout) == (0, b"abc")
    assert 0.9 <= took_s < 0.9 + 10
    assert replay_file(box, tmp_path, *lines, options=("--no-wait",)).stdout == b"abc"


def test_replay_reads_version_2_and_explains_what_is_none(box, tmp_path):
    assert replay_file(box, tmp_path, V2, '[0.1, "o", "é"]', options=("--no-wait",)).stdout == "é".encode()
    for lines, told in (((V2, "nonsense"), b"line 2: expected [time, code, text]"), (("{}",), b"asciicast v2 or v3")):
        done = replay_file(box, tmp_path, *lines)
        assert (done.returncode, told in done.stderr) == (1, True), done
    done = shell(box, "replay", "/nowhere.cast")
    assert (done.returncode, b"No such file" in done.stderr) == (2, True)
    done = shell(box, "replay", "nothing")
    assert (done.returncode, b"no such shell session" in done.stderr) == (2, True)


def test_replay_alters_nothing_unless_asked(box, tmp_path):
    hostile = '[0, "o", "\\u001b]0;title\\u0007\\u001b]52;c;cm0=\\u0007red\\u001b[31m!\\u001b[6n\\u001b[?1049h"]'
    plain = replay_file(box, tmp_path, V3, hostile, options=("--no-wait",)).stdout
    assert plain == b"\x1b]0;title\x07\x1b]52;c;cm0=\x07red\x1b[31m!\x1b[6n\x1b[?1049h"
    assert (
        replay_file(box, tmp_path, V3, hostile, options=("--no-wait", "--sanitize")).stdout
        == b"red\x1b[31m!\x1b[?1049h"
    )


# the parts


def sanitized(data: bytes, size: int = 10**6) -> bytes:
    cleaner = Sanitizer()
    return b"".join(cleaner.clean(data[at : at + size]) for at in range(0, len(data), size))


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b"plain\r\n\ttext\b", b"plain\r\n\ttext\b"),
        ("grüße 😀".encode(), "grüße 😀".encode()),
        (b"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[10;20H\x1b[K", b"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[10;20H\x1b[K"),
        (b"\x1b[?25l\x1b[?1049h\x1b[?1000h\x1b[?2004h\x1b[?25;1000h", b"\x1b[?25l\x1b[?1049h"),
        (b"\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", b"link"),
        (b'\x1bP$q"p\x1b\\\x1b_apc\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\.', b"."),
        (b"\x1b[c\x1b[>c\x1b[5n\x1b[18t\x1b[21t\x05", b""),
        (b"\x1b(B\x1b7\x1b8\x1bM\x1bc", b"\x1b(B\x1b7\x1b8\x1bM\x1bc"),
        ("\x9b31m\x9d0;x\x9c".encode(), b"31m0;x"),
        (b"\x1bZ\x1b#8", b"Z#8"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_sanitizing_keeps_drawing_and_drops_the_rest_at_any_border(data, kept, size):
    assert sanitized(data, size) == kept


@given(st.binary(max_size=80), st.integers(1, 9))
def test_nothing_that_answers_or_reaches_beyond_the_screen_comes_through(noise, size):
    """Whatever stands before, between and after."""
    out = sanitized(noise + b"\x1b]52;c;AAAA\x07" + noise + b"\x1b[6n" + noise + b"\x05", size)
    assert not re.search(rb"\x1b[\]P_^X]|\x1b\[[0-9;?>=]*[cnt]|\x05", out)


def test_a_string_without_an_end_is_not_waited_for_for_ever():
    out = sanitized(b"\x1b]0;" + b"x" * 200_000 + b"visible", 4096)
    assert out.endswith(b"visible")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ([b"ls\r"], [b"ls\r"]),
        ([PREFIX + b"d"], [Command.DETACH]),
        ([PREFIX, b"Q"], [Command.LEAVE]),
        ([b"a" + PREFIX + b"?b"], [b"a", Command.HELP, b"b"]),
        ([PREFIX + PREFIX + b"x"], [PREFIX, b"x"]),
        ([PREFIX + b"z"], [PREFIX + b"z"]),
        ([PREFIX + b"d" + PREFIX + b"c"], [Command.DETACH, Command.TAKE]),
    ],
)
def test_commands_are_found_behind_the_prefix(typed, found):
    keys = Keys(PREFIX)
    assert [each for data in typed for each in keys.typed(data)] == found


@given(st.lists(st.binary(max_size=5), max_size=5))
def test_without_a_prefix_every_byte_is_the_shells(pieces):
    keys = Keys(None)
    assert b"".join(each for piece in pieces for each in keys.typed(piece)) == b"".join(pieces)


@pytest.mark.parametrize(("prefix", "name"), [(b"\x1d", "Ctrl-]"), (b"\x01", "Ctrl-A"), (b"~", "~")])
def test_keys_have_names(prefix, name):
    assert key_name(prefix) == name


@pytest.mark.parametrize(
    ("code", "signal", "reason", "status"),
    [(7, None, "exit", 7), (None, 9, "exit", 137), (None, None, "expired", 5), (None, None, "operator_left", 0),
     (None, None, "killed", 1), (None, None, "something new", 1)],
)  # fmt: skip
def test_every_end_has_an_exit_code(code, signal, reason, status):
    outcome = outcome_of(code, signal, reason)
    assert outcome.status == status
    assert outcome.told or code is not None


# the words of the verb, against a scripted API

FACTS = {"id": "s1", "hostname": "web\x1b[31m", "node": "n1"}


def test_a_node_called_like_a_verb_is_reached_by_open(api, run, tmp_path):
    """Any other word is a node, before or after options; a bare call lists."""
    api.on("POST", "shells", FACTS, 201)
    api.on("GET", "shells", [])
    here = ("--url", api.url, "--token", "t")
    for words in (["open", "list"], ["--reason", "r", "web-1"], ["web-1", "--reason", "r"]):
        api.asked.clear()
        result = run("shell", *words, *here)
        assert (words, api.seen("POST", "shells").body["node"]) == (words, "list" if "list" in words else "web-1")
        assert result.exit_code == 2  # the script has no WebSocket, and says 404
    for words in ([], ["list"]):
        assert run("shell", *words, *here).exit_code == 0
    assert run("shell", "--help").exit_code == 0


@pytest.mark.parametrize("key", ["^]", "^a", "~", "none", DETACH_KEY])
def test_the_detach_key_can_be_chosen(api, run, key):
    api.on("POST", "shells", FACTS, 201)
    assert "Invalid value" not in run("shell", "web-1", "--detach-key", key, "--url", api.url, "--token", "t").output


@pytest.mark.parametrize("key", ["", "^]]", "ctrl-a", "é", "^1"])
def test_a_useless_detach_key_is_refused(api, run, key):
    result = run("shell", "web-1", "--detach-key", key, "--url", api.url, "--token", "t")
    assert (result.exit_code, api.asked) == (2, [])


def test_what_agents_say_cannot_steer_the_terminal_of_who_lists(api, run):
    row = {
        **dict.fromkeys(("exit_code", "signal", "end_reason")),
        "id": "s1", "hostname": "a\x1b[2J", "node": "n", "state": "open", "by": "operator", "reason": "b\x07",
        "created_at": "2026-01-01T00:00:00Z", "viewers": [{"by": "operator", "role": "controller"}],
        "output_bytes": 5, "title": "c\u202e\x1b]0;x\x07",
    }  # fmt: skip
    api.on("GET", "shells", [row])
    shown = run("shell", "list", "--url", api.url, "--token", "t").output
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "operator*" in shown
