"""No descriptors, no processes: a clear error, and nothing left behind."""

from __future__ import annotations

import errno
import resource
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper.cgroups import find_hierarchies


@pytest.fixture
def keepers(make_keepers: Callable[..., Any]) -> Any:
    """With a zygote that nobody else uses."""
    return make_keepers()


@pytest.fixture
def few_processes(keepers: Any) -> Iterator[Callable[[int], None]]:
    """The zygote and all it starts, limited in number."""
    home = find_hierarchies().v1.get("pids")
    if home is None:
        pytest.skip("no writable pids cgroup")
    group = Path(home, f"osqbox-test-{secrets.token_hex(6)}")
    group.mkdir()
    (group / "cgroup.procs").write_text(str(keepers.process.pid))

    def allow(number: int) -> None:
        (group / "pids.max").write_text(str(number))

    yield allow
    Path(home, "cgroup.procs").write_text(str(keepers.process.pid))
    deadline = time.monotonic() + 5
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    group.rmdir()


@pytest.mark.parametrize(("number", "step"), [(1, "fork"), (2, "fork")], ids=["keeper", "job"])
def test_no_process_to_be_had(keepers: Any, few_processes: Callable[[int], None], number: int, step: str) -> None:
    keepers.run("true").end()
    few_processes(number)
    kept = keepers.run("echo never")
    message = kept.next()
    assert message is not None
    ended = message["ended"]
    assert (ended["state"], ended["failure"]["step"], ended["errno"]) == ("failed_to_start", step, errno.EAGAIN)
    assert kept.next() is None
    assert not (kept.directory / "socket").exists()
    assert_no_groups(kept.id)
    few_processes(100)
    again = keepers.run("echo there")
    assert (again.end()["exit_code"], again.output) == (0, b"there\n")


def test_every_number_of_descriptors_is_survived(keepers: Any) -> None:
    """From too few for the zygote to take a job, over too few for its keeper, to enough."""
    pid = keepers.process.pid
    ends = []
    for limit in range(4, 32):
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
        kept = keepers.run("printf x")
        message = kept.next()
        while message is not None and "ended" not in message:
            message = kept.next()
        ended = message and message["ended"]
        ends.append("nothing" if ended is None else ended["state"])
        if ended is not None and ended["state"] == "failed_to_start":
            assert (ended["errno"], bool(ended["failure"]["step"])) == (errno.EMFILE, True)
        if ended is not None and ended["state"] == "exited":
            assert kept.output == b"x"
        assert not (kept.directory / "socket").exists()
        assert_no_groups(kept.id)
        assert kept.family() == set()
    order = ["nothing", "failed_to_start", "exited"]
    assert ends == sorted(ends, key=order.index)
    assert set(ends) == set(order)


def test_the_zygote_keeps_nothing_of_its_jobs(keepers: Any) -> None:
    keepers.run("true").end()
    descriptors = Path(f"/proc/{keepers.process.pid}/fd")
    before = sorted(descriptors.iterdir())
    for _ in range(10):
        keepers.run("true").end()
        keepers.run("no-such-command").end()
    assert sorted(descriptors.iterdir()) == before


def assert_no_groups(job_id: str) -> None:
    found = find_hierarchies()
    assert not [name for home in [*found.v2, *found.v1.values()] for name in Path(home).glob(f"*{job_id}*")]
