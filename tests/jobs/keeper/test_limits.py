"""Limits are enforced, by a cgroup or by an rlimit, or the job is refused; which one is stated."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import cgroups
from osqbox.jobs.keeper.capabilities import capabilities
from osqbox.jobs.keeper.spec import Limits

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def able() -> dict[str, object]:
    return capabilities()


def python(keepers: Any, code: str, **words: Any) -> Any:
    return keepers.run(command=sys.executable, args=["-I", "-S", "-c", code], **words)


def test_capabilities_name_what_there_is_and_leave_nothing(able: dict[str, object]) -> None:
    assert able.keys() == {"setuid", "containment", "kill", "freezer", "memory", "cpu", "pids"}
    assert able["containment"] in ("cgroup", "process_group")
    for home in cgroups.find_hierarchies().v2:
        assert not list(Path(home).glob("*probe*"))


def test_memory_ends_the_job_and_says_so(keepers: Any, able: dict[str, object]) -> None:
    if not able["memory"]:
        pytest.skip("no writable memory cgroup")
    kept = python(keepers, f"x = bytearray({200 * MIB})", limits={"memory_bytes": 60 * MIB})
    ended = kept.end()
    assert (ended["state"], ended["signal"], ended["reason"]) == ("signaled", 9, "oom")
    assert ended["enforced"] == [f"memory:{able['memory']}"]
    assert not any(Path(group).exists() for group in ended["cgroups"])


def test_a_child_that_ran_out_of_memory_is_told_too(keepers: Any, able: dict[str, object]) -> None:
    if not able["memory"]:
        pytest.skip("no writable memory cgroup")
    kept = keepers.run(
        f"{sys.executable} -I -S -c 'x = bytearray({200 * MIB})'; exit $?", limits={"memory_bytes": 60 * MIB}
    )
    assert kept.end()["reason"] == "oom"


def test_memory_without_a_cgroup_is_an_rlimit(keepers: Any) -> None:
    kept = python(
        keepers,
        f"try:\n bytearray({800 * MIB})\nexcept MemoryError:\n raise SystemExit(4)",
        limits={"memory_bytes": 400 * MIB},
        containment="process_group",
    )
    ended = kept.end()
    assert (ended["exit_code"], ended["enforced"]) == (4, ["memory:rlimit"])


def test_processes(keepers: Any, able: dict[str, object]) -> None:
    if not able["pids"]:
        pytest.skip("no writable pids cgroup")
    kept = keepers.run("for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; echo all", limits={"processes": 4})
    ended = kept.end()
    assert ended["enforced"] == [f"processes:{able['pids']}"]
    assert b"all" not in kept.output
    assert ended["exit_code"] != 0


def test_cpu_share(keepers: Any, able: dict[str, object]) -> None:
    if not able["cpu"]:
        pytest.skip("no writable cpu cgroup")
    kept = keepers.run("while :; do :; done", limits={"cpu_cores": 0.1}).until_running()
    time.sleep(1.0)
    kept.ask("stop", signal=9)
    ended = kept.end()
    assert ended["enforced"] == [f"cpu:{able['cpu']}"]
    assert (
        ended["usage"]["user_s"] + ended["usage"]["system_s"] < 0.1 * (ended["ended_at"] - ended["started_at"]) + 0.15
    )


def test_cpu_time_of_the_whole_tree(keepers: Any, able: dict[str, object]) -> None:
    """Each process alone is below the limit, so no rlimit would end them."""
    if able["kill"] != "cgroup.kill":
        pytest.skip("no cgroup that counts")
    burn = "timeout 0.3 sh -c 'while :; do :; done'"
    kept = keepers.run(f"while :; do {burn}; done", limits={"cpu_time_s": 1})
    ended = kept.end()
    assert (ended["reason"], ended["enforced"]) == ("timeout", ["cpu_time:cgroup2"])
    assert ended["usage"]["user_s"] + ended["usage"]["system_s"] < 2


def test_cpu_time_without_a_cgroup(keepers: Any) -> None:
    kept = keepers.run("while :; do :; done", limits={"cpu_time_s": 0.5}, containment="process_group")
    ended = kept.end()
    assert (ended["signal"], ended["reason"]) == (signal.SIGXCPU, "timeout")
    assert ended["enforced"] == ["cpu_time:rlimit"]


def test_files(keepers: Any, tmp_path: Path) -> None:
    limits = {"open_files": 20, "file_bytes": 1000}
    kept = keepers.run(
        "ulimit -n; trap '' XFSZ; head -c 5000 /dev/zero > big; wc -c < big", limits=limits, cwd=str(tmp_path)
    )
    ended = kept.end()
    assert (tmp_path / "big").stat().st_size == 1000
    assert kept.output.split()[0] == b"20"
    assert sorted(ended["enforced"]) == ["file_bytes:rlimit", "open_files:rlimit"]


def test_open_files_are_1024_unless_asked(keepers: Any) -> None:
    kept = keepers.run("ulimit -Sn; ulimit -Hn")
    kept.end()
    soft, hard = kept.output.split()
    assert int(soft) == min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert hard == (b"%d" % resource.getrlimit(resource.RLIMIT_NOFILE)[1])


@pytest.mark.parametrize("limits", [{"cpu_cores": 1.0}, {"processes": 10}])
def test_what_cannot_be_enforced_is_refused(keepers: Any, limits: dict[str, float]) -> None:
    user = {"uid": 0, "gid": 0, "groups": []} if os.geteuid() == 0 else None
    if user is None and "processes" in limits:
        pytest.skip("an rlimit does it for other users")
    kept = keepers.run("echo never", limits=limits, containment="process_group", user=user)
    ended = kept.end()
    assert (ended["state"], ended["failure"]["step"]) == ("failed_to_start", "limits")
    assert "cgroup" in ended["failure"]["message"]
    assert kept.output == b""


def test_a_value_the_kernel_refuses(keepers: Any, able: dict[str, object]) -> None:
    if not able["cpu"]:
        pytest.skip("no writable cpu cgroup")
    kept = keepers.run("echo never", limits={"cpu_cores": 0.000001})
    ended = kept.end()
    assert (ended["failure"]["step"], ended["cgroups"]) == ("limits", [])
    assert not [name for home in cgroups.find_hierarchies().v1.values() for name in Path(home).glob(f"*{kept.id}*")]


def test_hierarchies_of_every_kind(tmp_path: Path) -> None:
    """From what /proc would say on a v2 host, in a container that sees a part of it, and where nothing is writable."""
    mount = tmp_path / "cgroup"
    (mount / "a" / "b").mkdir(parents=True)
    for directory in (mount, mount / "a", mount / "a" / "b"):
        (directory / "cgroup.procs").touch()

    def found(mountinfo: str, own: str) -> cgroups.Hierarchies:
        (tmp_path / "mountinfo").write_text(mountinfo)
        (tmp_path / "own").write_text(own)
        return cgroups.find_hierarchies(str(tmp_path / "mountinfo"), str(tmp_path / "own"))

    line = f"30 24 0:26 {{root}} {mount} rw,nosuid - {{kind}}\n"
    v2 = found(line.format(root="/", kind="cgroup2 cgroup2 rw"), "0::/a/b\n")
    assert (v2.v2, v2.v1) == ([str(mount / "a" / "b"), str(mount / "a"), str(mount)], {})
    part = found(line.format(root="/host/pod", kind="cgroup2 cgroup2 rw"), "0::/host/pod/a\n")
    assert part.v2 == [str(mount / "a"), str(mount)]
    v1 = found(line.format(root="/", kind="cgroup cgroup rw,cpu,cpuacct"), "4:cpu,cpuacct:/a\n1:name=systemd:/\n")
    assert (v1.v2, v1.v1) == ([], {"cpu": str(mount / "a")})
    gone = found(line.format(root="/", kind="cgroup2 cgroup2 rw"), "0::/not/here\n")
    assert gone.v2 == [str(mount)]
    nothing = found("", "")
    assert (nothing.v2, nothing.v1) == ([], {})


def test_a_host_with_controllers_in_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the files of such a host would be: the nearest directory that offers the controllers takes the job."""
    home, own = tmp_path, tmp_path / "own"
    own.mkdir()
    (home / "cgroup.subtree_control").write_text("cpu memory pids")
    (own / "cgroup.subtree_control").write_text("")
    mkdir = os.mkdir

    def mkdir_as_a_kernel(path: str, mode: int) -> None:
        mkdir(path, mode)
        for name in ("cgroup.procs", "memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max"):
            Path(path, name).touch()

    monkeypatch.setattr(os, "mkdir", mkdir_as_a_kernel)
    hierarchies = cgroups.Hierarchies([str(own), str(home)], {})
    limits = Limits({"memory_bytes": 1000, "cpu_cores": 1.5, "processes": 7})
    group = cgroups.make_group(hierarchies, "j" * 8, limits)
    made = home / f"{cgroups.PREFIX}{'j' * 8}"
    assert (group.directory, group.directories, group.is_v2) == (str(made), [str(made)], True)
    assert group.enforced == ["memory:cgroup2", "cpu:cgroup2", "processes:cgroup2"]
    values = {file.name: file.read_text() for file in made.iterdir() if file.stat().st_size}
    quota = "150000 100000"
    assert values == {
        "memory.max": "1000", "memory.swap.max": "0", "memory.oom.group": "1", "cpu.max": quota, "pids.max": "7"
    }  # fmt: skip
    (made / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert group.oom_kills() == 2
    assert cgroups.make_group(hierarchies, "k" * 8, Limits({})).directory == str(own / f"{cgroups.PREFIX}{'k' * 8}")


@pytest.mark.parametrize("memory_bytes", [1, 4096, 100_000])
def test_far_too_little_memory_is_an_end_and_no_hang(keepers: Any, containment: str | None, memory_bytes: int) -> None:
    ended = keepers.run("echo never", limits={"memory_bytes": memory_bytes}, containment=containment).end()
    assert ended["state"] in ("failed_to_start", "signaled", "exited")
    assert ended["exit_code"] != 0
    assert ended["cgroups"] == []
