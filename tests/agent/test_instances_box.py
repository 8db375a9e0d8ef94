"""Instances against a real box: three tenants, killing, adding, removing, and a runaway query that stays alone."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from osqbox.agent.extension.client import ExtensionClient
from osqbox.agent.instances.history import TABLE
from osqbox.agent.instances.instance import QueryFailed
from osqbox.agent.instances.manager import Runner, open_runner
from osqbox.agent.instances.options import InstanceSpec, RunnerOptions, Timing
from osqbox.errors import AddressInUse, BadSetup, BadUsage
from osqbox.testing import Osqbox, OsqboxServer

WAIT_S = 20.0
SPIN_S = 3
TENANTS = ("kolide", "tenant-a", "tenant-b", "tenant-c")
QUICK = Timing(launch_retry_s=0.2, stop_grace_s=2.0)


class Watched:
    """What a runner says, so that a test can wait for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        self._news = trio.Event()

    def __call__(self, name: str, kind: str, facts: dict[str, Any]) -> None:
        self.seen.append((name, kind, facts))
        self._news.set()
        self._news = trio.Event()

    async def wait(self, name: str, kind: str, times: int = 1) -> dict[str, Any]:
        """Facts of the last of ``times`` happenings of that kind."""
        with trio.move_on_after(WAIT_S):
            while len(found := self.of(name, kind)) < times:
                await self._news.wait()
            return found[times - 1]
        said = [facts["line"] for facts in self.of(name, "output")[-3:]]
        raise AssertionError(f"expected {name} {kind} x {times}, got {self.seen[:5]} ... {self.seen[-5:]}; {said}")

    def of(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [facts for n, k, facts in self.seen if (n, k) == (name, kind)]


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, for the sockets' sake."""
    with tempfile.TemporaryDirectory(prefix="ob") as folder:
        yield Path(folder)


@pytest.fixture
def tenants(osqbox_server: OsqboxServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Osqbox]]:
    from osqbox.box import new_id

    found = {name: Osqbox(osqbox_server, f"{name}-{new_id()[:6]}", tmp_path) for name in TENANTS}
    yield found
    troubles = [trouble for handle in found.values() for trouble in handle.close()]
    assert troubles == []


def options(server: OsqboxServer, root: Path, **given: Any) -> RunnerOptions:
    return RunnerOptions(
        **{
            "tls_hostname": server.url.removeprefix("https://"),
            "server_certs": server.ca_file,
            "root": root,
            "config_refresh": 1,
            "timing": QUICK,
            "program": (),
            **given,
        }
    )


def spec(tenants: dict[str, Osqbox], name: str) -> InstanceSpec:
    return InstanceSpec(name, tenants[name].enroll_secret)


async def in_thread(call: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(call)


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if "sock" in path.name or path.suffix == ".pid"]


def test_in_process_instances_come_and_go(osqbox_server: OsqboxServer, tenants: dict[str, Osqbox], root: Path) -> None:
    """Two tenants' instances in tasks, each enrolled in its own tenant and asked by its name; then none, then one."""

    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, root, in_process=True), on_event=watched) as runner:
            for name in TENANTS[:2]:
                runner.add(spec(tenants, name))
            for name in TENANTS[:2]:
                await watched.wait(name, "enrolled")
            for name in TENANTS[:2]:
                rows = await runner.query(f"select enrollment_id, connect_time from {TABLE} order by 1", instance=name)
                assert [row["enrollment_id"] for row in rows] == list(TENANTS[:2])
                assert all(row["connect_time"] for row in rows)
                answer = await in_thread(partial(tenants[name].query, "select 1 as one"))
                assert answer.rows == [{"one": "1"}]
            status = await runner.status()
            assert [one["status"] for one in status["instances"]] == ["healthy", "healthy"]
            await runner.restart("kolide", "to see it come back")
            await watched.wait("kolide", "connected", 2)
            assert [run.errors for run in runner.history.runs("kolide")] == ["to see it come back", ""]
            await runner.remove("kolide")
            await runner.remove("tenant-a")
            assert (await runner.status())["instances"] == []
            runner.add(spec(tenants, "kolide"))
            await watched.wait("kolide", "connected", 3)
            assert len(await in_thread(lambda: tenants["kolide"].nodes)) == 1

    trio.run(main)


# -- processes ---------------------------------------------------------------------------------------------------


def ticks(tenant: Osqbox) -> list[dict[str, Any]]:
    """Rows added by the query that runs each second, in the order of their counters."""
    lines = [entry["line"] for entry in tenant.logs(log_type="result", name="tick")]
    return sorted((line for line in lines if line["action"] == "added"), key=lambda line: int(line["counter"]))


def wait_for_ticks(tenant: Osqbox, since: int = 0, more: int = 2) -> list[dict[str, Any]]:
    """All ticks once there are ``more`` after a moment (unixTime)."""
    seq = 0
    while True:
        found = ticks(tenant)
        if sum(line["unixTime"] > since for line in found) >= more:
            return found
        seq = tenant.wait_for("log", after=seq, timeout=WAIT_S).seq


def assert_no_gap(tenant: Osqbox, since: int) -> None:
    """Wait for lines from after ``since``: every counter up to them is there, once."""
    counters = [int(line["counter"]) for line in wait_for_ticks(tenant, since)]
    assert counters == list(range(len(counters)))


def test_one_is_killed_again_and_again_and_its_neighbours_logs_show_no_gap(
    osqbox_server: OsqboxServer, tenants: dict[str, Osqbox], root: Path
) -> None:
    """Three tenants' instances, then a fourth, then none, then one again."""
    for tenant in tenants.values():
        tenant.config({"schedule": {"tick": {"query": "select unix_time from time", "interval": 1}}})

    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, root), on_event=watched) as runner:
            for name in TENANTS[:3]:
                runner.add(spec(tenants, name))
            for name in TENANTS[:3]:
                await watched.wait(name, "connected")
                await in_thread(partial(wait_for_ticks, tenants[name], more=1))
            pids = set()
            for kill in range(3):
                facts = await watched.wait("tenant-a", "connected", kill + 1)
                os.kill(facts["pid"], signal.SIGKILL)
                assert "SIGKILL" in (await watched.wait("tenant-a", "ended", kill + 1))["reason"]
                pids.add(facts["pid"])
            last = await watched.wait("tenant-a", "connected", 4)
            assert last["pid"] not in pids
            runner.add(spec(tenants, "tenant-c"))
            await watched.wait("tenant-c", "connected")
            now = int(time.time())
            for name in ("kolide", "tenant-b", "tenant-c"):
                await in_thread(partial(assert_no_gap, tenants[name], now))
            # The killed one goes on where its database was.
            lines = await in_thread(partial(wait_for_ticks, tenants["tenant-a"], more=4))
            assert max(int(line["counter"]) for line in lines) > 2
            status = await runner.status()
            restarts = {"kolide": 0, "tenant-a": 3, "tenant-b": 0, "tenant-c": 0}
            assert {one["name"]: one["restarts"] for one in status["instances"]} == restarts
            assert {one["status"] for one in status["instances"]} == {"healthy"}
            rows = await runner.query(f"select * from {TABLE} where enrollment_id='tenant-a'", instance="tenant-b")
            assert ["SIGKILL" in row["errors"] for row in rows] == [True, True, True, False]
            assert len({row["instance_id"] for row in rows}) == 1
            assert len({row["instance_run_id"] for row in rows}) == 4

            for name in TENANTS:
                await runner.remove(name)
            assert (await runner.status())["instances"] == []
            assert leftovers(root) == []
            runner.add(spec(tenants, "kolide"))
            await watched.wait("kolide", "connected", 2)
            answer = await in_thread(partial(tenants["kolide"].query, "select 1 as one", timeout=WAIT_S))
            assert answer.rows == [{"one": "1"}]
        nodes = {name: await in_thread(lambda name=name: tenants[name].nodes) for name in TENANTS}
        assert {name: len(found) for name, found in nodes.items()} == dict.fromkeys(TENANTS, 1)

    trio.run(main)


def test_a_runaway_query_of_one_tenant_stays_with_it(
    osqbox_server: OsqboxServer, tenants: dict[str, Osqbox], root: Path
) -> None:
    """While it spins, the other tenants' live queries are answered and their logs show no gap.

    All of them by one HTTPS client.
    """
    runaway = "with recursive c(x) as (select 1 union all select x+1 from c) select count(*) from c"
    for tenant in tenants.values():
        tenant.config({"schedule": {"tick": {"query": "select unix_time from time", "interval": 1}}})

    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, root, shared_client=True), on_event=watched) as runner:
            for name in TENANTS[:3]:
                runner.add(spec(tenants, name))
            for name in TENANTS[:3]:
                await watched.wait(name, "enrolled")
            spinning = psutil.Process((await watched.wait("kolide", "connected"))["pid"])
            before, started = spinning.cpu_times().user, int(time.time())
            outcome: list[Any] = []

            async def run_away() -> None:
                outcome.append(await in_thread(partial(tenants["kolide"].query, runaway, timeout=2 * WAIT_S)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_away)
                answered = 0
                while time.time() < started + SPIN_S or spinning.cpu_times().user - before < 0.5:
                    for name in ("tenant-a", "tenant-b"):
                        answer = await in_thread(partial(tenants[name].query, "select 1 as one", timeout=WAIT_S))
                        assert answer.rows == [{"one": "1"}]
                        answered += 1
                assert answered >= 4
                for name in ("tenant-a", "tenant-b"):
                    await in_thread(partial(assert_no_gap, tenants[name], started + SPIN_S))
                # Its extension and its SQL still answer; killed, it refuses that query and goes on.
                assert await runner.query("select 1 as one", instance="kolide") == [{"one": "1"}]
                assert (outcome, watched.of("kolide", "ended")) == ([], [])
                spinning.kill()
            (account,) = outcome[0].accounts
            assert (account["status"], account["message"]) == ("failed", "distributed query is denylisted")
            answer = await in_thread(partial(tenants["kolide"].query, "select 1 as one", timeout=WAIT_S))
            assert answer.rows == [{"one": "1"}]

    trio.run(main)


# -- ends, and their reasons -------------------------------------------------------------------------------------


def a_program(text: str) -> tuple[str, ...]:
    """A stand-in that takes osqueryd's flags as words it does not look at."""
    return (sys.executable, "-c", text)


def reasons(runner: Runner) -> list[str]:
    return [run.errors for run in runner.history.runs()]


def test_a_program_that_cannot_start_is_tried_again_after_a_pause_and_no_neighbour_notices(
    osqbox_server: OsqboxServer, root: Path
) -> None:
    """Its last words are the reason. Its status is unhealthy, and the agent lives on."""
    program = a_program("import sys; sys.exit('no such thing')")
    timing = replace(QUICK, launch_retry_s=0.4)

    async def main() -> None:
        watched = Watched()
        async with open_runner(
            options(osqbox_server, root, program=program, timing=timing), on_event=watched
        ) as runner:
            runner.add(InstanceSpec("broken"))
            await watched.wait("broken", "ended")
            began = trio.current_time()
            await watched.wait("broken", "launched", 2)
            assert 0.35 < trio.current_time() - began < 5
            await watched.wait("broken", "ended", 2)
            assert reasons(runner)[0] == "osqueryd exited with 1: no such thing"
            (status,) = (await runner.status())["instances"]
            assert (status["status"], status["last_error"]) == ("unhealthy", "osqueryd exited with 1: no such thing")
            with pytest.raises(QueryFailed, match="not connected"):
                await runner.query("select 1", instance="broken")

    trio.run(main)


def test_a_program_that_is_not_there_is_a_reason_too(osqbox_server: OsqboxServer, root: Path) -> None:
    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, root, program=("/no/osqueryd",)), on_event=watched) as runner:
            runner.add(InstanceSpec("broken"))
            assert "/no/osqueryd" in (await watched.wait("broken", "ended"))["reason"]

    trio.run(main)


def test_stopping_reaches_an_instance_that_is_still_launching_and_may_be_repeated(
    osqbox_server: OsqboxServer, root: Path
) -> None:
    """All at once, within the grace of one, though the programs do not listen to SIGTERM."""
    program = a_program("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
                        "signal.pause()")  # fmt: skip
    timing = replace(QUICK, stop_grace_s=0.5)

    async def main() -> None:
        watched = Watched()
        async with open_runner(
            options(osqbox_server, root, program=program, timing=timing), on_event=watched
        ) as runner:
            for number in range(5):
                runner.add(InstanceSpec(f"i{number}"))
            pids = [(await watched.wait(f"i{number}", "program_started"))["pid"] for number in range(5)]
            for number in range(5):
                assert (await watched.wait(f"i{number}", "output"))["line"] == "deaf"
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(runner.shutdown)
            await runner.shutdown()
            assert trio.current_time() - began < 2.0
            assert runner.names == []
            assert not any(psutil.pid_exists(pid) for pid in pids)
            assert reasons(runner) == ["stopped"] * 5
            with pytest.raises(BadUsage, match="stopping"):
                runner.add(InstanceSpec("late"))

    trio.run(main)


def test_a_launch_that_takes_too_long_ends(osqbox_server: OsqboxServer, root: Path) -> None:
    timing = replace(QUICK, launch_timeout_s=0.5)
    program = a_program("import time; time.sleep(60)")

    async def main() -> None:
        watched = Watched()
        async with open_runner(
            options(osqbox_server, root, program=program, timing=timing), on_event=watched
        ) as runner:
            runner.add(InstanceSpec("slow"))
            assert "within 0.5 s" in (await watched.wait("slow", "ended"))["reason"]
            assert (await runner.status())["instances"][0]["name"] == "slow"

    trio.run(main)


def test_a_process_that_hangs_fails_its_health_check_and_one_whose_extension_ends_is_replaced(
    osqbox_server: OsqboxServer, tenants: dict[str, Osqbox], root: Path
) -> None:
    """Each is launched again alone, with its reason in the history."""
    timing = replace(
        QUICK, health_startup_delay_s=0.2, health_interval_s=0.2, health_tries=2, health_try_pause_s=0.1,
        health_timeout_s=1.0, stop_grace_s=0.3,
    )  # fmt: skip

    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, root, timing=timing), on_event=watched) as runner:
            for name in TENANTS[:2]:
                runner.add(spec(tenants, name))
            hung = await watched.wait("kolide", "connected")
            other = await watched.wait("tenant-a", "connected")
            os.kill(hung["pid"], signal.SIGSTOP)
            (extension,) = [name for name in leftovers(root) if name.startswith(f"{Path(other['socket']).name}.")]
            await ExtensionClient(root / extension).shutdown()
            assert (await watched.wait("tenant-a", "ended"))["reason"].startswith("the extension ended: ")
            assert (await watched.wait("kolide", "ended"))["reason"].startswith("health check failed: ")
            for name in TENANTS[:2]:
                await watched.wait(name, "connected", 2)
            assert [len(watched.of(name, "launched")) for name in TENANTS[:2]] == [2, 2]

    trio.run(main)


def test_an_agent_with_a_root_that_is_taken_or_unusable_is_refused(osqbox_server: OsqboxServer, root: Path) -> None:
    async def main() -> None:
        async with open_runner(options(osqbox_server, root, in_process=True)) as runner:
            with pytest.raises(AddressInUse, match="already runs"):
                async with open_runner(options(osqbox_server, root)):
                    pass
            with pytest.raises(BadUsage, match="none runs"):
                await runner.query("select 1")
            with pytest.raises(BadUsage, match="'nobody'"):
                await runner.remove("nobody")
        (root / "file").write_text("")
        with pytest.raises(BadSetup, match="file"):
            async with open_runner(options(osqbox_server, root / "file" / "inside")):
                pass

    trio.run(main)


def test_without_its_server_an_instance_is_in_use_and_keeps_its_log_lines(
    osqbox_server: OsqboxServer, root: Path
) -> None:
    """It is healthy and not enrolled, and answers whoever asks it directly."""
    nowhere = options(osqbox_server, root, tls_hostname="localhost:1", timing=replace(QUICK, config_wait_s=0.2))

    async def main() -> None:
        watched = Watched()
        async with open_runner(nowhere, on_event=watched) as runner:
            runner.add(InstanceSpec("alone"))
            await watched.wait("alone", "connected")
            await watched.wait("alone", "enroll_failed", 2)
            assert await runner.query("select 1 as one") == [{"one": "1"}]
            (status,) = (await runner.status())["instances"]
            assert (status["status"], status["enrolled"]) == ("healthy", False)
            assert status["enroll_error"] == watched.of("alone", "enroll_failed")[-1]["reason"]
            assert status["statistics"]["lines_waiting"] > 0

    trio.run(main)


def test_a_root_too_deep_for_sockets_gets_them_elsewhere(
    osqbox_server: OsqboxServer, tenants: dict[str, Osqbox], root: Path
) -> None:
    deep = root / ("d" * 80)

    async def main() -> None:
        watched = Watched()
        async with open_runner(options(osqbox_server, deep, shared_client=True), on_event=watched) as runner:
            runner.add(spec(tenants, "kolide"))
            facts = await watched.wait("kolide", "connected")
            assert Path(facts["socket"]).parent != deep
            assert await runner.query("select 1 as one") == [{"one": "1"}]
            assert facts["database"].startswith(str(deep))
        assert not Path(facts["socket"]).parent.exists()

    trio.run(main)
