"""``cmdctl`` against a real box: its verbs, exit codes, connection and manners."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from osqbox.certs import issue_client
from osqbox.cli.cmdctl import main, program
from osqbox.cli.job import command as osqbox_job

from .conftest import JobsBox, start_jobs_box

LIMIT_S = 20.0
NO_TOKENS = ["", "osqbox1.", "osqbox1.AAAA", "osqbox1.W10", "osqbox2.e30", "osqbox1.ü", "x" * 5000]
KEYS = [
    "id", "state", "owner", "run_as", "pid", "exit_code", "signal", "reason", "started_at", "ended_at",
    "stdout_bytes", "stderr_bytes", "containment", "enforced",
]  # fmt: skip


@dataclass(frozen=True)
class Done:
    code: int
    out: bytes
    err: str

    @property
    def id(self) -> str:
        """The one line on stdout."""
        assert re.fullmatch(rb"[a-z][0-9a-z]{25}\n", self.out), self
        return self.out.decode().strip()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cmdctl = Callable[..., Done]


@pytest.fixture
def cmdctl(jobs_box: JobsBox, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Cmdctl:
    """Run a verb in this process, as the user whose box it is."""
    for name, value in jobs_box.environment().items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Done:
        capfdbinary.readouterr()
        code = main(list(words))
        out, err = capfdbinary.readouterr()
        return Done(code, out, err.decode())

    return run


@pytest.fixture
def start(jobs_box: JobsBox) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the program itself, for what only a process of its own has: signals, pipes, a terminal."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        program = [sys.executable, "-m", "osqbox.cli.cmdctl", *words]
        process = subprocess.Popen(program, **{"env": jobs_box.environment(), "bufsize": 0, **pipes, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def until(is_so: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := is_so()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_the_surface_is_the_golden_one() -> None:
    """The same verbs in both programs, but for two older names and the login."""
    ours, theirs = set(program.commands), set(osqbox_job.commands)
    assert sorted(ours) == [
        "get-output", "get-status", "input", "list", "login", "resume", "rm", "run", "signal", "stop", "suspend", "wait"
    ]  # fmt: skip
    assert ours ^ theirs == {"get-output", "get-status", "login", "output", "status"}
    for name in ours & theirs:
        one, other = (
            [each for each in group.commands[name].params if each.expose_value] for group in (program, osqbox_job)
        )
        assert one == other


# ---- run -------------------------------------------------------------------------------------------------


def test_the_four_words_of_old(cmdctl: Cmdctl) -> None:
    """run prints the id and nothing else; the others take it."""
    job = cmdctl("run", "sh", "-c", "echo out; echo err >&2; sleep 60").id
    until(lambda: cmdctl("get-output", "--no-follow", job).out)
    assert cmdctl("get-status", job).out.decode().splitlines()[1].split() == ["state", "running"]
    assert cmdctl("stop", job).code == 0
    assert cmdctl("get-output", job) == Done(0, b"out\n", "err\n")
    assert "killed by SIGTERM (stopped by default/client)" in cmdctl("get-status", job).out.decode()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("printf", "[%s]", "-la", "--json", "--"), b"[-la][--json][--]"),
        (("--", "printf", "[%s]", "--", "f"), b"[--][f]"),
        (("--", "printf", "[%s]", ""), b"[]"),
        (("printf", "[%s]", "$HOME;`id`*"), b"[$HOME;`id`*]"),
        (("printf", "[%s]", os.fsdecode(b"\xff\xfe"), "ü"), b"[\xff\xfe][\xc3\xbc]"),
        (("-e", "A=b=c", "-e", "E=", "sh", "-c", 'printf %s "$A|${E-unset}"'), b"b=c|"),
        (("-C", "/proc", "pwd"), b"/proc\n"),
        (("--merged", "sh", "-c", "echo 1; echo 2 >&2; echo 3"), b"1\n2\n3\n"),
    ],
)
def test_what_follows_the_command_is_its_own(cmdctl: Cmdctl, words: tuple[str, ...], expected: bytes) -> None:
    """Options stop at the command, one -- is ours, no shell ever, and bytes that are not text pass."""
    assert cmdctl("run", "--attach", *words) == Done(0, expected, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--wait", "true"), 0),
        (("--wait", "sh", "-c", "exit 3"), 3),
        (("--attach", "sh", "-c", "exit 255"), 255),
        (("--attach", "sh", "-c", "kill -9 $$"), 128 + 9),
        (("--wait", "sh", "-c", "exit 137"), 137),
        (("--wait", "--timeout", "200ms", "sleep", "60"), 124),
        (("no-such-program",), 127),
        (("--wait", "/etc/passwd"), 126),
        (("--cwd", "/nowhere", "true"), 125),
        ((), 125),
        (("--no-such-option", "true"), 125),
        (("--timeout", "soon", "true"), 125),
        (("--kill-on-disconnect", "true"), 125),
        (("--attach", "--json", "true"), 125),
        (("--server", "localhost:1", "true"), 125),
        (("--run-as", "nobody-at-all", "true"), 125),
    ],
)
def test_exit_codes_tell_the_command_from_ourselves(cmdctl: Cmdctl, words: tuple[str, ...], code: int) -> None:
    done = cmdctl("run", *words)
    assert done.code == code
    if code == 125:
        assert (done.out, done.err != "") == (b"", True)


def test_errors_begin_with_the_program_and_the_code(cmdctl: Cmdctl) -> None:
    assert cmdctl("get-status", "abcdefgh") == Done(1, b"", "cmdctl: NOT_FOUND: no job 'abcdefgh'\n")
    refused = cmdctl("run", "no-such-program").err.splitlines()
    assert refused[0].startswith("cmdctl: FAILED_PRECONDITION: ")
    kept = refused[1].removeprefix("try: cmdctl get-status ")
    assert cmdctl("get-status", "--exit-code", kept).code == 127
    assert "failed to start" in cmdctl("get-status", kept).out.decode()
    assert cmdctl("get-status", "a b").err.startswith("cmdctl: INVALID_ARGUMENT: ")


def test_limits_are_enforced_or_refused(cmdctl: Cmdctl) -> None:
    done = cmdctl("run", "--limit-open-files", "64", "--limit-cpu-time", "1m", "--json", "sh", "-c", "ulimit -n")
    assert {limit.partition(":")[0] for limit in done.json["enforced"]} == {"open_files", "cpu_time"}
    assert cmdctl("get-output", done.json["id"]).out == b"64\n"


def test_the_same_key_is_the_same_job(cmdctl: Cmdctl) -> None:
    words = ("run", "--idempotency-key", "test-key-1", "true")
    assert cmdctl(*words).id == cmdctl(*words).id
    assert cmdctl(*words[:-1], "false").err.startswith("cmdctl: ALREADY_EXISTS: ")


def test_json_has_exactly_these_members(cmdctl: Cmdctl) -> None:
    done = cmdctl("run", "--wait", "--json", "sh", "-c", "printf abc; exit 4")
    found = done.json
    assert (done.code, list(found)) == (4, KEYS)
    assert (found["state"], found["exit_code"], found["signal"], found["reason"]) == ("exited", 4, None, "exit")
    assert (found["stdout_bytes"], found["stderr_bytes"], found["owner"]) == (3, 0, "default/client")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found[at]) for at in ("started_at", "ended_at"))
    assert cmdctl("get-status", "--json", found["id"]).json == found
    assert [list(each) for each in cmdctl("list", "--json", "--limit", "1").json] == [KEYS]


def test_stdin_is_forwarded_byte_by_byte(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    data = os.urandom(300_000) + b"no newline"
    out, err = start("run", "--attach", "--stdin", "cat").communicate(data, LIMIT_S)
    assert (out, err) == (data, b"")


def test_a_job_that_does_not_read_ends_without_complaint(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("run", "--attach", "--stdin", "sh", "-c", "head -c 1; exit 5")
    out, err = process.communicate(b"x" * 1_000_000, LIMIT_S)
    assert (process.returncode, out, err) == (5, b"x", b"")


# ---- output ----------------------------------------------------------------------------------------------


def test_output_from_anywhere_in_any_form(cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "sh", "-c", "printf 'one\\ntwo\\n\\0\\377'; echo e >&2").id
    cmdctl("wait", job)
    assert cmdctl("get-output", job) == Done(0, b"one\ntwo\n\0\xff", "e\n")
    assert cmdctl("get-output", "--stdout", job) == Done(0, b"one\ntwo\n\0\xff", "")
    assert cmdctl("get-output", "--stderr", job) == Done(0, b"", "e\n")
    assert cmdctl("get-output", "--offset", "4", "--stdout", job).out == b"two\n\0\xff"
    assert cmdctl("get-output", "--tail", "0", job).out == b""
    assert cmdctl("get-output", "--sanitize", "always", job).out == b"one\ntwo\n\\x00\\xff"
    stamped = cmdctl("get-output", "--timestamps", job).out.decode("latin-1").split("\n")
    assert [re.sub(r"^\S+T\S+Z ", "", line) for line in stamped] == ["one", "two", "\0\xff"]
    assert cmdctl("get-output", "--offset", "1000", job).err.startswith("cmdctl: OUT_OF_RANGE: ")
    assert cmdctl("get-output", "--offset", "1", "--tail", "1", job).code == 2


def test_output_as_json(cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "sh", "-c", "printf '\\377'; exit 2").id
    chunk, end = (json.loads(line) for line in cmdctl("get-output", "--json", job).out.splitlines())
    assert (chunk["stream"], chunk["offset"], base64.b64decode(chunk["data"])) == ("stdout", 0, b"\xff")
    assert (list(end["end"]), end["end"]["exit_code"]) == (KEYS, 2)


def test_dropped_output_is_told(cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "--max-output", "64k", "--overflow", "discard-new", "head", "-c", "200000", "/dev/zero").id
    done = cmdctl("get-output", job)
    assert len(done.out) <= 64 * 1024
    assert re.fullmatch(r"bytes \d+ to \d+ of the output are not kept\n", done.err)


def test_followed_live_from_two_places_one_of_them_late(cmdctl: Cmdctl, start: Callable[..., Any]) -> None:
    """Both have everything, and the first has it before the job ends."""
    job = cmdctl("run", "-i", "sh", "-c", "echo 1; read x; echo 2; read x; echo 3").id
    first = start("get-output", job)
    assert first.stdout.readline() == b"1\n"
    feed = start("input", "--keep-open", job)
    feed.communicate(b"\n", LIMIT_S)
    assert first.stdout.readline() == b"2\n"
    late = start("get-output", job)
    assert [late.stdout.readline(), late.stdout.readline()] == [b"1\n", b"2\n"]
    start("input", job).communicate(b"\n", LIMIT_S)
    assert first.communicate(timeout=LIMIT_S)[0] == late.communicate(timeout=LIMIT_S)[0] == b"3\n"


def test_a_reader_that_has_had_enough_ends_it_in_peace(start: Callable[..., Any], cmdctl: Cmdctl) -> None:
    process = start("run", "--attach", "--kill-on-disconnect", "--label", "test=pipe", "yes")
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(LIMIT_S) == 0
    assert b"Traceback" not in process.stderr.read()
    assert [each["state"] for each in cmdctl("list", "--json", "--label", "test=pipe").json] == ["signaled"]


def test_a_full_disk_is_told(start: Callable[..., Any], cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "--wait", "echo", "hello").id
    with Path("/dev/full").open("wb") as full:
        process = start("get-output", job, stdout=full)
        _, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (1, b"cmdctl: reading or writing failed: No space left on device\n")


def test_a_pipe_that_does_not_block_gets_everything(start: Callable[..., Any], cmdctl: Cmdctl) -> None:
    """As another program may leave a terminal that both use."""
    job = cmdctl("run", "--wait", "head", "-c", "500000", "/dev/zero").id
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = start("get-output", job, stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert len(file.read()) == 500_000
    assert process.communicate(timeout=LIMIT_S)[1] == b""


def on_a_terminal(start: Callable[..., Any], *words: str) -> bytes:
    """What a person's terminal gets."""
    terminal, end = pty.openpty()
    process = start(*words, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with suppress(OSError):  # Linux: EIO when the last writer has gone
        while select.select([terminal], [], [], LIMIT_S)[0] and (data := os.read(terminal, 4096)):
            shown += data
    os.close(terminal)
    assert process.wait(LIMIT_S) == 0
    return shown.replace(b"\r\n", b"\n")


def test_a_terminal_is_not_steered_and_a_pipe_gets_every_byte(start: Callable[..., Any], cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "printf", r"a\033]0;title\007\302\233b\n").id
    assert on_a_terminal(start, "get-output", job) == b"a\\x1b]0;title\\x07\\x9bb\n"
    assert on_a_terminal(start, "get-output", "--sanitize", "never", job) == b"a\x1b]0;title\x07\xc2\x9bb\n"
    assert cmdctl("get-output", job).out == b"a\x1b]0;title\x07\xc2\x9bb\n"


# ---- staying and leaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("takes_along", "signals", "code", "state"),
    [
        (False, [signal.SIGINT], 130, "running"),
        (False, [signal.SIGINT, signal.SIGINT], 143, "signaled"),
        (True, [signal.SIGINT], 143, "signaled"),
        (True, [signal.SIGTERM], 143, "signaled"),
        (True, [signal.SIGHUP], 129, "signaled"),
    ],
)
def test_leaving_a_job(
    start: Callable[..., Any], cmdctl: Cmdctl, takes_along: bool, signals: list[signal.Signals], code: int, state: str
) -> None:
    """Ctrl-C lets it go on and says how to come back, a second one stops it; with the flag it is taken along."""
    label = f"test={os.urandom(4).hex()}"
    flags = ["--attach", *(["--kill-on-disconnect"] if takes_along else [])]
    process = start("run", *flags, "--label", label, "sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout.readline() == b"ready\n"
    job = cmdctl("list", "-q", "--label", label).id
    told = ""
    for number in signals:
        process.send_signal(number)
        line = process.stderr.readline().decode().strip() or process.stderr.readline().decode()
        told += line
    assert (f"{job} goes on without us: cmdctl get-output {job}" in told) is not takes_along
    assert process.wait(LIMIT_S) == code
    assert cmdctl("get-status", "--json", job).json["state"] == state
    cmdctl("stop", job)


def test_a_job_that_is_stopped_by_ctrl_c_has_its_last_words(start: Callable[..., Any]) -> None:
    """Each once, and its exit code."""
    script = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done"
    process = start("run", "--attach", "--merged", "sh", "-c", script)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    while b"Ctrl-C again" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 7
    assert [line for line in process.stdout.read().splitlines() if line != b"Terminated"] == [b"bye"]


def test_numbers_and_text_that_no_message_can_carry(cmdctl: Cmdctl) -> None:
    for words in (["run", "--limit-processes", str(2**40), "true"], ["list", "--owner", "\udcff"]):
        done = cmdctl(*words)
        assert done.code in (1, 125)
        assert done.err.startswith("cmdctl: INVALID_ARGUMENT: request: expected numbers and text")
    assert "expected at least 1, got 0" in cmdctl("run", "--limit-memory", "0", "true").err


def test_following_goes_on_when_the_box_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the box in the middle of a job, another box on its data at another port: the bytes are equal and the
    exit code known."""
    process, box = start_jobs_box(tmp_path, "--data", str(tmp_path / "data"))
    script = "for i in $(seq 1 300); do echo line $i; sleep 0.005; done; exit 7"
    words = [sys.executable, "-m", "osqbox.cli.cmdctl", "run", "--attach", "sh", "-c", script]
    with subprocess.Popen(words, env=box.environment(), bufsize=0, stdout=-1, stderr=-1) as follower:
        assert follower.stdout is not None
        first = follower.stdout.readline()
        process.kill()
        process.wait(LIMIT_S)
        process, box = start_jobs_box(tmp_path, "--data", str(tmp_path / "data"))
        try:
            rest, err = follower.communicate(timeout=LIMIT_S)
        finally:
            process.terminate()
            process.wait(LIMIT_S)
    assert first + rest == b"".join(f"line {number}\n".encode() for number in range(1, 301))
    assert (follower.returncode, err.count(b"trying again for up to 60 s")) == (7, 1)


# ---- the other verbs -------------------------------------------------------------------------------------


def ends_when_told(cmdctl: Cmdctl, code: int) -> str:
    """A job that exits with ``code`` at SIGUSR1, ready for it."""
    job = cmdctl("run", "sh", "-c", f"trap 'exit {code}' USR1; echo ready; while :; do sleep 0.05; done").id
    until(lambda: cmdctl("get-output", "--no-follow", job).out)
    return job


def test_wait_and_exit_codes(cmdctl: Cmdctl) -> None:
    job = ends_when_told(cmdctl, 6)
    assert cmdctl("wait", "--timeout", "10ms", job).code == 124
    assert cmdctl("get-status", "--exit-code", job).code == 0
    assert cmdctl("signal", job, "USR1").code == 0
    assert cmdctl("wait", job).code == 6
    assert cmdctl("get-status", job).code == 0
    assert cmdctl("get-status", "--exit-code", job).code == 6


def test_suspend_resume_and_signal(cmdctl: Cmdctl) -> None:
    job = ends_when_told(cmdctl, 8)
    assert cmdctl("suspend", "--json", job).json["state"] == "suspended"
    assert cmdctl("resume", job) == Done(0, b"", f"{job}: running\n")
    assert cmdctl("signal", job, "usr1").code == 0
    assert cmdctl("wait", job).code == 8
    assert cmdctl("suspend", job).err.startswith("cmdctl: FAILED_PRECONDITION: ")
    assert (cmdctl("stop", job).code, cmdctl("stop", "--strict", job).code) == (0, 1)


def test_stop_takes_the_whole_tree(cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "sh", "-c", "trap '' TERM; setsid sleep 61 & echo $!; wait").id
    child = int(until(lambda: cmdctl("get-output", "--no-follow", job).out))
    assert cmdctl("stop", "--grace", "100ms", job).code == 0
    until(lambda: not Path(f"/proc/{child}").exists())


def test_a_job_by_its_beginning_and_by_its_pid(cmdctl: Cmdctl) -> None:
    job = cmdctl("run", "sleep", "60").id
    pid = cmdctl("get-status", "--json", job[:12]).json["pid"]
    assert cmdctl("get-status", "--json", str(pid)).json["id"] == job
    assert cmdctl("stop", job[:12]).code == 0


def test_list_and_rm(cmdctl: Cmdctl) -> None:
    jobs = [cmdctl("run", "--wait", "--label", "test=list", "true").id for _ in range(2)]
    assert cmdctl("list", "-q", "--label", "test=list").out.decode().split() == jobs[::-1]
    table = cmdctl("list", "--label", "test=list", "--state", "exited").out.decode()
    assert [line.split()[0] for line in table.splitlines()] == ["ID", *jobs[::-1]]
    assert cmdctl("list", "--label", "test=list", "--running").err == "no jobs fit\n"
    assert cmdctl("rm", *jobs).code == 0
    assert cmdctl("list", "--json", "--label", "test=list").json == []
    assert cmdctl("get-status", jobs[0]).code == 1


def test_completion_of_ids(cmdctl: Cmdctl, jobs_box: JobsBox, start: Callable[..., Any]) -> None:
    job = cmdctl("run", "--wait", "true").id
    environment = {"_CMDCTL_COMPLETE": "bash_complete", "COMP_WORDS": f"cmdctl get-status {job[:6]}", "COMP_CWORD": "2"}
    done = start(env={**jobs_box.environment(), **environment}).communicate(timeout=LIMIT_S)
    assert done == (f"plain,{job}\n".encode(), b"")


# ---- the connection --------------------------------------------------------------------------------------


@pytest.fixture
def alice(jobs_box: JobsBox, tmp_path: Path) -> dict[str, str]:
    """Another identity, as `osqbox certs client alice` makes it: the options to be her."""
    cert, key, ca = issue_client(jobs_box.certs, "alice", out=tmp_path / "alice", now=time.time())
    return {"server": jobs_box.ready["jobs"], "cert": str(cert), "key": str(key), "ca": str(ca)}


def test_another_identity_sees_nothing_of_ours(cmdctl: Cmdctl, alice: dict[str, str]) -> None:
    """By options before the verb and after it; where only a certificate is named, at the box that runs here."""
    job = cmdctl("run", "true").id
    words = [word for name, value in alice.items() for word in (f"--{name}", value)]
    missing = Done(1, b"", f"cmdctl: NOT_FOUND: no job '{job}'\n")
    assert cmdctl(*words, "get-status", job) == missing
    assert cmdctl("get-status", *words, job) == missing
    assert cmdctl("get-status", "--cert", alice["cert"], "--key", alice["key"], job) == missing
    assert cmdctl(*words, "run", "--json", "true").json["owner"] == "default/alice"


def test_the_environment_and_the_file(
    cmdctl: Cmdctl, alice: dict[str, str], jobs_box: JobsBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, then CMDCTL_*, then cmdctl.toml, whose paths count from where it is; then the box here."""
    file = tmp_path / "alice" / "cmdctl.toml"
    file.write_text(f'server = "{alice["server"]}"\ncert = "alice.pem"\nkey = "alice.key"\nca = "ca.pem"\n')
    owner = ("run", "--json", "true")
    assert cmdctl(*owner).json["owner"] == "default/client"
    assert cmdctl("--config", str(file), *owner).json["owner"] == "default/alice"
    monkeypatch.setenv("CMDCTL_CONFIG", str(file))
    assert cmdctl(*owner).json["owner"] == "default/alice"
    monkeypatch.setenv("CMDCTL_SERVER", "localhost:1")
    assert "localhost:1" in cmdctl(*owner).err
    assert cmdctl("--server", alice["server"], *owner).json["owner"] == "default/alice"
    monkeypatch.delenv("CMDCTL_CONFIG")
    monkeypatch.delenv("CMDCTL_SERVER")
    for name, value in alice.items():
        monkeypatch.setenv(f"CMDCTL_{name.upper()}", value)
    assert cmdctl(*owner).json["owner"] == "default/alice"


def test_a_server_without_the_rest_is_told_what_is_missing(cmdctl: Cmdctl) -> None:
    done = cmdctl("list", "--server", "localhost:9090")
    assert (done.code, "nothing names the cert and the key and the ca" in done.err) == (3, True)


def test_a_key_that_others_can_read_is_refused(cmdctl: Cmdctl, alice: dict[str, str]) -> None:
    Path(alice["key"]).chmod(0o640)
    done = cmdctl("list", "--cert", alice["cert"], "--key", alice["key"])
    assert (done.code, done.out) == (3, b"")
    assert f"chmod 600 {alice['key']}" in done.err


def test_a_certificate_that_soon_ends_is_told(cmdctl: Cmdctl, jobs_box: JobsBox, tmp_path: Path) -> None:
    """One made for long under 14 days, one made for a day in its second half."""
    for name, days, age_days, is_told in (("long", 60, 50, True), ("fresh", 1, 0, False), ("old", 1, 0.7, True)):
        made_at = time.time() - age_days * 86_400
        cert, key, _ = issue_client(jobs_box.certs, name, days=days, out=tmp_path / name, now=made_at)
        done = cmdctl("list", "--cert", str(cert), "--key", str(key))
        assert (done.code, f"{cert} expires in" in done.err) == (0, is_told), done


def test_a_certificate_of_another_ca_is_refused_at_once(cmdctl: Cmdctl, alice: dict[str, str], tmp_path: Path) -> None:
    import trustme

    authority = trustme.CA()
    stranger = authority.issue_cert("alice@example.org")
    stranger.cert_chain_pems[0].write_to_path(tmp_path / "s.pem")
    (tmp_path / "s.key").write_bytes(stranger.private_key_pem.bytes())
    (tmp_path / "s.key").chmod(0o600)
    authority.cert_pem.write_to_path(tmp_path / "s-ca.pem")
    began = time.monotonic()
    done = cmdctl("list", "--cert", str(tmp_path / "s.pem"), "--key", str(tmp_path / "s.key"))
    assert (done.code, done.err.startswith("cmdctl: UNAVAILABLE: ")) == (1, True)
    done = cmdctl("list", "--server", alice["server"], "--ca", str(tmp_path / "s-ca.pem"),
                  "--cert", alice["cert"], "--key", alice["key"])  # fmt: skip
    assert "is not trusted" in done.err
    assert time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server = ", "expected TOML"),
        ("sever = 'localhost:1'", "expected server, cert, key, ca, got 'sever'"),
        ("server = 9090", "server: expected a text, got 9090"),
        ("key = ''", "key: expected a text"),
        ("\0", "expected TOML"),
    ],
)
def test_a_file_that_is_not_understood(cmdctl: Cmdctl, tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "cmdctl.toml"
    file.write_text(text)
    done = cmdctl("--config", str(file), "list")
    assert (done.code, expected in done.err) == (3, True), done
    assert cmdctl("--config", str(tmp_path / "none.toml"), "list").code == 3


def test_no_box_and_no_settings(cmdctl: Cmdctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSQBOX_HOME", str(tmp_path))
    monkeypatch.delenv("OSQBOX_CALLED_AS", raising=False)
    monkeypatch.setattr("osqbox.cli.find.GRACE_S", 0.0)
    done = cmdctl("list")
    assert (done.code, "no box is running" in done.err, "osqbox serve" in done.err) == (1, True, True)


# ---- login -----------------------------------------------------------------------------------------------


def token_for(jobs_box: JobsBox, name: str, capfdbinary: pytest.CaptureFixture[bytes]) -> str:
    from osqbox.cli import main as osqbox

    assert osqbox(["certs", "token", name, "--role", "viewer"]) == 0
    return capfdbinary.readouterr().out.decode().strip()


def test_login_makes_everything_that_is_needed(
    cmdctl: Cmdctl, jobs_box: JobsBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    """The key never leaves, only its owner can read it; a token is good for once."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    token = token_for(jobs_box, "carol", capfdbinary)
    done = cmdctl("login", token)
    directory = tmp_path / "cmdctl"
    assert (done.code, done.out.decode().strip()) == (0, str(directory / "cmdctl.toml"))
    assert sorted(each.name for each in directory.iterdir()) == ["ca.pem", "client.key", "client.pem", "cmdctl.toml"]
    assert stat.S_IMODE((directory / "client.key").stat().st_mode) == 0o600
    refused = cmdctl("run", "true")
    assert refused.err.startswith("cmdctl: PERMISSION_DENIED: ")
    assert cmdctl("list", "--json").code == 0
    again = cmdctl("login", token)
    assert (again.code, "not used" in again.err) == (1, True)
    assert "secret" not in again.err
    assert cmdctl("login", token_for(jobs_box, "carol", capfdbinary)).code == 0


def test_login_tells_the_secret_to_no_other_server(
    cmdctl: Cmdctl, jobs_box: JobsBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    """The fingerprint in the token is of another certificate: nothing is sent, and the token is still good."""
    from dataclasses import replace

    from osqbox.jobs.login_token import LoginToken

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    token = LoginToken.unpack(token_for(jobs_box, "dave", capfdbinary))
    done = cmdctl("login", replace(token, server="00" * 32).pack())
    assert (done.code, "nothing was sent" in done.err) == (1, True)
    assert not (tmp_path / "cmdctl" / "client.key").exists()
    assert cmdctl("login", token.pack()).code == 0


def test_login_leaves_settings_of_others_alone(
    cmdctl: Cmdctl, jobs_box: JobsBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "cmdctl" / "cmdctl.toml"
    file.parent.mkdir()
    file.write_text('server = "my.own:1"\n')
    done = cmdctl("login", token_for(jobs_box, "erin", capfdbinary))
    assert (done.code, "would be overwritten" in done.err) == (1, True)
    assert file.read_text() == 'server = "my.own:1"\n'


@pytest.mark.parametrize("token", NO_TOKENS)
def test_what_is_no_token(cmdctl: Cmdctl, token: str) -> None:
    done = cmdctl("login", "--", token)
    assert (done.code, "whole" in done.err, len(token) < 9 or token not in done.err) == (2, True, True)
