"""What a job is given, and what it is told when it cannot start."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import osqbox
from osqbox.jobs import messages
from osqbox.jobs.keeper import spec, status
from osqbox.jobs.keeper.child import environment

ROOT = os.geteuid() == 0
SYSTEM_PYTHON = "/usr/bin/python3"
PYTHON = SYSTEM_PYTHON if Path(SYSTEM_PYTHON).exists() else sys.executable
"""One that other users can run too."""
needs_root = pytest.mark.skipif(not ROOT, reason="becoming another user takes root")


def test_the_environment_is_what_was_given_and_the_id(keepers: Any) -> None:
    env = environment(
        user="alice", home="/home/alice", shell="/bin/sh", job_id="ignored", extra={"LANG": "C", "A": "1"}
    )
    kept = keepers.run(command="env", args=["-0"], env=env)
    assert kept.end()["exit_code"] == 0
    seen = dict(pair.split(b"=", 1) for pair in kept.output.split(b"\0") if pair)
    assert seen == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"HOME": b"/home/alice",
        b"USER": b"alice",
        b"LOGNAME": b"alice",
        b"SHELL": b"/bin/sh",
        b"LANG": b"C",
        b"A": b"1",
        b"JOB_ID": kept.id.encode(),
    }


PROBE = """
import json, os, resource, signal, sys
try:
    os.close(os.open("/dev/tty", os.O_RDWR)); tty = True
except OSError:
    tty = False
with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file)
def names(mask):
    return [n for n in range(1, 65) if int(mask, 16) >> (n - 1) & 1 and n not in (32, 33)]
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False  # the listing's own
json.dump({
    "fds": sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if is_open(fd)),
    "stdin": os.readlink("/proc/self/fd/0"), "tty": tty, "umask": os.umask(0), "cwd": os.getcwd(),
    "sid": os.getsid(0) == os.getpid(), "ids": [os.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups()],
    "blocked": names(status["SigBlk"]), "ignored": names(status["SigIgn"]),
    "no_new_privs": status["NoNewPrivs"].strip(), "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "oom": open("/proc/self/oom_score_adj").read().strip(),
}, sys.stdout)
"""


def probe(keepers: Any, **words: Any) -> dict[str, Any]:
    kept = keepers.run(command=PYTHON, args=["-I", "-S", "-c", PROBE], **words)
    assert kept.end()["exit_code"] == 0, kept.output
    return json.loads(kept.output)


def test_a_job_has_three_descriptors_no_terminal_and_default_signals(keepers: Any, tmp_path: Path) -> None:
    seen = probe(keepers, cwd=str(tmp_path))
    assert seen.pop("ids")[:2] == [os.getuid()] * 2
    assert seen.pop("ignored") == [signal.SIGPIPE, signal.SIGXFSZ]  # by the probe's own Python
    assert seen == {
        "fds": [0, 1, 2],
        "stdin": "/dev/null",
        "tty": False,
        "umask": 0o077,
        "cwd": str(tmp_path),
        "sid": True,
        "blocked": [],
        "no_new_privs": "1",
        "core": 0,
        "oom": "500",
    }


GLIBCS_OWN = 3 << 31
"""Signals 32 and 33: whatever posix_spawn starts ignores them, and nobody but glibc can change that."""


def test_a_shell_sees_nothing_ignored(keepers: Any) -> None:
    kept = keepers.run("grep -E '^Sig(Ign|Blk)' /proc/self/status")
    kept.end()
    name, blocked, other, ignored = kept.output.split()
    assert (name, other) == (b"SigBlk:", b"SigIgn:")
    assert int(blocked, 16) == 0
    assert int(ignored, 16) & ~GLIBCS_OWN == 0


@needs_root
def test_a_job_becomes_its_user_whole_and_can_open_its_own_stdout(keepers: Any) -> None:
    nobody = pwd.getpwnam("nobody")
    user = {"uid": nobody.pw_uid, "gid": nobody.pw_gid, "groups": [nobody.pw_gid, 12345]}
    seen = probe(keepers, user=user)
    assert seen["ids"] == [nobody.pw_uid] * 2 + [nobody.pw_gid] * 2 + [sorted(user["groups"])]
    kept = keepers.run("echo here > /dev/stdout; echo there > /dev/stderr; id -u", user=user)
    assert kept.end()["exit_code"] == 0
    assert sorted(kept.output.split()) == sorted([b"here", b"there", str(nobody.pw_uid).encode()])


@needs_root
def test_no_way_back_to_root(keepers: Any) -> None:
    kept = keepers.run("grep -E '^Cap(Prm|Eff|Amb)' /proc/self/status", user={"uid": 65534, "gid": 65534, "groups": []})
    kept.end()
    assert set(kept.output.split()[1::2]) == {b"0" * 16}


def test_bytes_of_every_kind_arrive(keepers: Any, tmp_path: Path) -> None:
    odd = bytes(number for number in range(1, 256))
    directory = tmp_path.joinpath("d\udcff")
    directory.mkdir()
    kept = keepers.run(
        command="printf",
        args=["%s", odd.decode("utf-8", "surrogateescape")],
        cwd=str(directory),
        env={"PATH": "/usr/bin"},
    )
    assert kept.end()["exit_code"] == 0
    assert kept.output == odd


def test_two_megabytes_of_arguments(keepers: Any) -> None:
    args = ["x" * 100_000] * 20
    kept = keepers.run(command="sh", args=["-c", 'printf %s "$*" | wc -c', "sh", *args])
    assert kept.end()["exit_code"] == 0
    assert int(kept.output) == 20 * 100_000 + 19


def test_files_are_for_nobody_else(keepers: Any) -> None:
    kept = keepers.run("echo x; sleep 60").until_output(b"x")
    modes = {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in kept.directory.iterdir()}
    assert modes == dict.fromkeys(["output", "index", "status.json", "status.reserve", "socket"], "0o600")
    kept.ask("stop", signal=9)
    kept.end()
    assert sorted(file.name for file in kept.directory.iterdir()) == ["index", "output", "status.json"]


FAILURES: list[tuple[dict[str, Any], str, int]] = [
    ({"command": "no-such-command"}, "exec", errno.ENOENT),
    ({"command": "/no/such/file"}, "exec", errno.ENOENT),
    ({"command": "/etc/passwd"}, "exec", errno.EACCES),
    ({"command": "/etc"}, "exec", errno.EACCES),
    ({"command": "/bin/sh", "cwd": "/no/such/directory"}, "cwd", errno.ENOENT),
    ({"command": "/bin/sh", "cwd": "/etc/passwd"}, "cwd", errno.ENOTDIR),
    ({"command": "/bin/true", "args": ["x" * 4_000_000]}, "exec", errno.E2BIG),
    ({"command": ""}, "spec", errno.EINVAL),
    ({"command": "a\0b"}, "spec", errno.EINVAL),
    ({"command": "true", "args": ["a\0b"]}, "spec", errno.EINVAL),
    ({"command": "true", "env": {"A=B": "1"}}, "spec", errno.EINVAL),
    ({"command": "true", "timeout_s": -1}, "spec", errno.EINVAL),
    ({"command": "true", "timeout_s": float("nan")}, "spec", errno.EINVAL),
    ({"command": "true", "overflow": "ring"}, "spec", errno.EINVAL),
    ({"command": "true", "limits": {"disk": 1}}, "spec", errno.EINVAL),
    ({"command": "true", "user": {"uid": "root"}}, "spec", errno.EINVAL),
    ({"command": "true", "id": "../../escape"}, "spec", errno.EINVAL),
]


@pytest.mark.parametrize(("words", "step", "number"), FAILURES, ids=lambda value: str(value)[:30])
def test_what_cannot_start_says_why_and_leaves_nothing(
    keepers: Any, words: dict[str, Any], step: str, number: int
) -> None:
    kept = keepers.run(**words)
    message = kept.next()
    assert message is not None
    ended = message["ended"]
    assert (ended["state"], ended["failure"]["step"], ended["errno"]) == ("failed_to_start", step, number)
    assert ended["failure"]["message"]
    assert (ended["pid"], ended["cgroups"]) == (None, [])
    assert kept.next() is None
    assert "socket" not in {file.name for file in kept.directory.iterdir()}


def test_a_script_without_an_interpreter_is_not_handed_to_a_shell(keepers: Any, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo never\n")
    script.chmod(0o755)
    assert keepers.run(command=str(script)).end()["errno"] == errno.ENOEXEC


def test_path_is_searched_past_what_does_not_fit(keepers: Any, tmp_path: Path) -> None:
    for name, mode in (("first", 0o644), ("second", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").write_text(f"#!/bin/sh\necho {name}\n")
        (tmp_path / name / "tool").chmod(mode)
    kept = keepers.run(command="tool", env={"PATH": f"/no/such:{tmp_path}/first:{tmp_path}/second"})
    kept.end()
    assert kept.output == b"second\n"
    # alone, the file that may not be executed is the better error than "not found"
    refused = keepers.run(command="tool", env={"PATH": f"{tmp_path}/first:/no/such"})
    assert refused.end()["errno"] == errno.EACCES


@needs_root
def test_a_directory_of_path_that_may_not_be_searched_hides_what_is_in_it(keepers: Any, tmp_path: Path) -> None:
    (tmp_path / "tool").touch(0o755)
    tmp_path.chmod(0o700)
    kept = keepers.run(command="tool", env={"PATH": str(tmp_path)}, user={"uid": 65534, "gid": 65534, "groups": []})
    assert kept.end()["errno"] == errno.ENOENT


def test_without_privileges_another_user_is_refused(make_keepers: Callable[..., Any], tmp_path: Path) -> None:
    if not ROOT:
        keepers = make_keepers()
        words = {"uid": 0, "gid": 0, "groups": [0]}
        assert keepers.run("true", user=words).end()["failure"]["step"] == "user"
        return
    keepers, directory = as_nobody(make_keepers)
    try:
        kept = keepers.run("true", directory=directory, user={"uid": 0, "gid": 0, "groups": [0]})
        failure = kept.end()["failure"]
        assert (failure["step"], failure["errno"]) == ("user", errno.EPERM)
    finally:
        shutil.rmtree(directory)


@needs_root
def test_an_unprivileged_box_runs_jobs_too(make_keepers: Callable[..., Any]) -> None:
    """Without any cgroup it can write."""
    keepers, directory = as_nobody(make_keepers)
    try:
        kept = keepers.run(
            "id -u; setsid sh -c 'trap \"\" TERM; sleep 60' & exec sleep 60", directory=directory, stop_grace_s=0.2
        ).until_output(b"65534")
        assert kept.status["containment"] == "process_group"
        kept.ask("stop")
        ended = kept.end()
        assert (ended["state"], ended["reason"], kept.family()) == ("signaled", "stopped", set())
    finally:
        shutil.rmtree(directory)


def as_nobody(make_keepers: Callable[..., Any]) -> tuple[Any, Path]:
    """A zygote of another user, and a job directory it may use."""
    package = Path(osqbox.__file__ or "")
    if not all(parent.stat().st_mode & 0o001 for file in (Path(PYTHON), package) for parent in file.parents):
        pytest.skip("nobody can read this interpreter or this checkout")
    directory = Path(tempfile.mkdtemp())
    os.chown(directory, 65534, 65534)
    return make_keepers(python=PYTHON, user=65534, group=65534, extra_groups=[]), directory


def test_words_are_those_of_the_runner() -> None:
    assert set(status.ENDED) == {state.value for state in messages.ENDED}
    assert set(spec.OVERFLOWS) == {overflow.value for overflow in messages.Overflow}
    assert set(spec.Limits.__slots__) == set(messages.Limits.__dataclass_fields__)
