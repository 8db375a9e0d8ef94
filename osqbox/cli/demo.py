"""``osqbox demo``: a throw-away box with this machine in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli import as_called
from osqbox.cli.serve import run_box, serve_options

if TYPE_CHECKING:
    import trio

    from osqbox.box import Box

ENROLL_WAIT_S = 10.0


@click.command()
@serve_options
def command(**options: Any) -> int:
    """Run a throw-away box, enroll this machine into it over real TLS, and give it a schedule.

    Ready means that this machine has enrolled: `osqbox query "select pid, name from processes"` answers.
    """
    if not options["configs"]:
        options["configs"] = (_demo_config(),)

    async def body(box: Box, announce: Callable[[], None]) -> int:
        import trio

        async with trio.open_nursery() as nursery:
            await nursery.start(run_local_agents, box, 1)
            announce()
            if sys.stdout.isatty() and not options["as_json"]:
                print(as_called('this machine is enrolled:  osqbox query "select pid, name from processes limit 5"'))
            await box.stopping.wait()
            nursery.cancel_scope.cancel()
        return 0

    ephemeral = options["ephemeral"] is not False and options["data"] is None
    return run_box(options, ephemeral=ephemeral, body=body)


def _demo_config() -> Any:
    from osqbox.schema import fixture_path

    return fixture_path("configs/demo.yaml")


async def run_local_agents(box: Box, count: int, *, task_status: trio.TaskStatus[None]) -> None:
    """Agents of this machine enrolled into ``box``; started when all have enrolled, at most after ENROLL_WAIT_S."""
    from pathlib import Path

    import trio

    from osqbox.agent.runner import AgentOptions, run_agent

    ready = box.ready()
    enrolled = trio.Semaphore(0)

    def on_event(kind: str, _facts: Mapping[str, Any]) -> None:
        if kind == "enrolled":
            enrolled.release()

    async with trio.open_nursery() as nursery:
        for index in range(count):
            agent = AgentOptions(
                tls_hostname=ready["agents"].removeprefix("https://"),
                server_certs=Path(ready["ca"]),
                enroll_secret=ready["enroll_secret"],
                distributed_interval=1,
                host_identifier="hostname" if count == 1 else "specified",
                specified_identifier=f"agent-{index + 1}",
            )
            nursery.start_soon(partial(run_agent, agent, on_event=on_event))
        with trio.move_on_after(ENROLL_WAIT_S):
            for _ in range(count):
                await enrolled.acquire()
        task_status.started()
