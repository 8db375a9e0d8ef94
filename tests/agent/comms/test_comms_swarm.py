"""Many comms agents at once, against the strict server, and what the report says of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from osqbox.agent.comms.options import Load, Pace
from osqbox.agent.comms.statistics import Statistics
from osqbox.agent.swarm.build import ProfileHosts
from osqbox.agent.swarm.comms import CommsPlan, identity, read_kinds, run_comms_swarm
from osqbox.agent.swarm.plan import Growth, SwarmPlan, read_mix, read_threshold
from osqbox.errors import BadUsage

from .strict_server import Answer, Seen, StrictServer, Talk, serving, told

COUNT = 6


def plan_of(server: StrictServer, kinds: str, **more: Any) -> CommsPlan:
    from osqbox.agent.swarm.plan import server as server_of

    swarm = SwarmPlan(
        server=server_of(f"https://127.0.0.1:{server.port}"),
        growth=Growth(COUNT, 1000.0, 45.0),
        mix=read_mix("ubuntu"),
        enroll_secret="secret",
        seed=more.pop("seed", 0),
    )
    load = Load(inventory_items=2, logs_every_s=0.2, logs_items=1)
    return CommsPlan(swarm, read_kinds(kinds), Pace().times_faster(50), load)


def order(number: int) -> dict[str, Any]:
    return {"document_id": f"d{number}", "action": {"name": "restart" if number == 1 else "fetch-config", "args": {}}}


async def until(true: Any) -> None:
    with trio.fail_after(40):
        while not true():
            await trio.sleep(0.02)


def run_against(kinds: str, is_done: Any, **given: Any) -> tuple[dict[str, Any], StrictServer]:
    reports: list[dict[str, Any]] = []
    servers: list[StrictServer] = []

    async def main() -> None:
        async with serving(**given) as server:
            servers.append(server)
            server.token_s = 1e9
            plan, stop, statistics = plan_of(server, kinds), trio.Event(), Statistics()

            async def watch() -> None:
                await until(lambda: is_done(server, statistics))
                with trio.move_on_after(2):  # what was just counted is told as well
                    await wait_all_tasks_blocked(0.02)
                stop.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                reports.append(
                    await run_comms_swarm(
                        plan, ProfileHosts(plan.swarm), server.context, stop=stop, statistics=statistics
                    )
                )

    trio.run(main)
    return reports[0], servers[0]


def told_all(server: StrictServer, _statistics: Statistics) -> bool:
    """Inventory and logs of everybody have come."""
    hosts = {name for seen in server.of("stateful") for name in re.findall(rb'"hostname":"(ubuntu-\d+)"', seen.body)}
    return len(hosts) == COUNT and len(server.of("stateless")) > COUNT


def reported_all(server: StrictServer, statistics: Statistics) -> bool:
    """And the results of the command that each has got."""
    results = sum(seen.body.count(b'"module":"command"') for seen in server.of("stateful"))
    return told_all(server, statistics) and results == COUNT


def test_spike_agents_register_and_tell() -> None:
    async def stream(_seen: Seen, talk: Talk) -> None:
        await talk.start()
        await talk.command(1, "d1", "fetch-config")
        await trio.sleep_forever()

    report, server = run_against("sse", reported_all, stream=stream)
    comms = report["comms"]
    assert (report["agents"], report["enrolled"], report["enrollments"]) == (COUNT, COUNT, COUNT)
    assert (comms["logins"], comms["streams_open"], comms["commands_received"]) == (COUNT, COUNT, COUNT)
    assert comms["stateless_acknowledged"] >= len(server.of("stateless")) - COUNT
    assert not report["errors"], report["errors_by_kind"]
    assert {"enroll", "login", "stateless", "stateful", "config"} <= set(report["latency_ms"])
    registered = {seen.json["id"]: seen.json for seen in server.of("agents")}
    assert len(registered) == COUNT
    assert all(re.fullmatch(r"[0-9A-Za-z]{32}", agent["key"]) for agent in registered.values())
    assert {seen.json["uuid"] for seen in server.of("login")} == set(registered)
    assert {agent["name"] for agent in registered.values()} == {f"ubuntu-{number:04d}" for number in range(COUNT)}


def test_g1_agents_beside_polling_ones() -> None:
    async def commands(seen: Seen) -> Answer:
        if "wait" in seen.target:
            await trio.sleep(0.5)
            return Answer(204)
        await trio.sleep(0.5)
        return told(408, {"message": "nothing", "code": 408})

    report, server = run_against("g1,poll", told_all, answers={"commands": commands})
    assert not report["errors"], report["errors_by_kind"]
    kinds = {seen.target.partition("?")[0]: 0 for seen in server.of("login")}
    assert set(kinds) == {"/api/v1/login", "/api/v1/authentication"}
    used = len({seen.connection for seen in server.seen})
    assert used <= report["connections"] <= used + 3 * COUNT, "some may have been opened as the swarm was stopped"


def test_agents_of_an_earlier_run_are_the_same() -> None:
    """The second run is told that its ids are taken, and logs in with the keys it had."""
    taken = told(400, {"message": "Agent already exists", "code": 1708})
    report, server = run_against(
        "sse", lambda server, _: len(server.of("config")) == COUNT, answers={"agents": lambda _: taken}
    )
    assert (report["enrolled"], report["enrollments"]) == (COUNT, 0)
    uuids = {identity("secret", 0, index)[0] for index in range(COUNT)}
    assert {seen.json["uuid"] for seen in server.of("login")} == uuids
    assert identity("other", 0, 0) != identity("secret", 0, 0) != identity("secret", 1, 0)


def test_agents_that_are_refused_end_and_are_counted() -> None:
    refusal = told(403, {"message": "Agent does not exist", "code": 403})
    answers = {"login": lambda _: refusal}
    report, _ = run_against("g1", lambda _, statistics: statistics.refused_agents == COUNT, answers=answers)
    assert report["comms"]["refused_agents"] == COUNT
    assert report["enrolled"] == 0
    assert report["errors_by_kind"]["agent: login refused: Agent does not exist"] == COUNT


@pytest.mark.parametrize("text", ["grpc", "sse:0", "", "sse,xml"])
def test_kinds_that_are_none(text: str) -> None:
    with pytest.raises(BadUsage):
        read_kinds(text)


def test_the_calls_of_comms_agents_have_thresholds() -> None:
    assert read_threshold("stateless.p95>100").metric == "stateless.p95"


def test_a_faster_pace_keeps_the_limits() -> None:
    pace = Pace().times_faster(10)
    assert pace == replace(Pace(), after_success_s=0.1, again_s=0.1, retry_s=3.0, batch_s=1.0, first_retry_s=0.1)
