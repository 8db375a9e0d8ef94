"""``osqbox demo``: a throw-away box with this machine in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli import as_called
from osqbox.cli.agent_comms import run_demo_agent
from osqbox.cli.serve import run_box, serve_options

if TYPE_CHECKING:
    import trio

    from osqbox.box import Box
    from osqbox.jobs.messages import Caller
    from osqbox.jobs.runner import JobRunner

ENROLL_WAIT_S = 10.0


@click.command()
@serve_options
def command(**options: Any) -> int:
    """Run a throw-away box with this machine in it: enrolled over real TLS, with a schedule, a job, and shells on.

    Beside it two pretended hosts are agents of the comms API.

    Ready means that this machine has enrolled: `osqbox query "select pid, name from processes"` answers, and
    `osqbox shell NODE` opens a real shell on it, for you alone: with the token of this box, on the loopback.
    """
    if not options["configs"]:
        options["configs"] = (_demo_config(),)
    options["control"] = True

    async def body(box: Box, announce: Callable[[], None]) -> int:
        import trio

        async with trio.open_nursery() as nursery:
            await nursery.start(partial(run_local_agents, shells=True), box, 1)
            announce()
            for index, profile in enumerate(("spike", "g1")):
                nursery.start_soon(run_demo_agent, box, profile, "ubuntu", index)
            if box.job_runner:
                nursery.start_soon(_run_job, box, box.job_runner)
            if sys.stdout.isatty() and not options["as_json"]:
                _tell_what_to_try()
            await box.stopping.wait()
            nursery.cancel_scope.cancel()
        return 0

    ephemeral = options["ephemeral"] is not False and options["data"] is None
    return run_box(options, ephemeral=ephemeral, body=body)


def _tell_what_to_try() -> None:
    from osqbox.agent.tables.system import machine_hostname

    for what, line in (
        ("this machine is enrolled", 'osqbox query "select pid, name from processes limit 5"'),
        ("a shell on it", f"osqbox shell {machine_hostname()}"),
        ("a job that runs", "osqbox job list"),
        ("two comms agents", "osqbox comms agents"),
        ("a command to one", "osqbox comms send ubuntu-0000 fetch-config --wait"),
        ("what they say", "osqbox comms events -f"),
    ):
        print(as_called(f"{what + ':':<26} {line}"))


async def _run_job(box: Box, runner: JobRunner) -> None:
    """Something to list, follow and stop; it belongs to the certificate that `osqbox job` comes with."""
    from osqbox.jobs.errors import JobError
    from osqbox.jobs.messages import JobSpec

    script = b"while :; do uptime 2>/dev/null || date; sleep 5; done"
    try:
        await runner.run(JobSpec(b"/bin/sh", (b"-c", script), labels={"demo": "uptime"}), _own_caller(box))
    except JobError as error:
        print(f"osqbox: no demo job: {error.message}", file=sys.stderr)


def _own_caller(box: Box) -> Caller:
    import ssl

    from osqbox.jobs.access import OPERATOR
    from osqbox.jobs.messages import Caller
    from osqbox.listen.tls import certificate_authority

    if box.identity.client_cert is None:
        return OPERATOR
    der = ssl.PEM_cert_to_DER_cert(box.identity.client_cert.read_text())
    return Caller("default/client", certificate_authority(der) or "", frozenset(("runner",)))


def _demo_config() -> Any:
    from osqbox.schema import fixture_path

    return fixture_path("configs/demo.yaml")


async def run_local_agents(box: Box, count: int, *, shells: bool = False, task_status: trio.TaskStatus[None]) -> None:
    """Agents of this machine enrolled into ``box``; started when all have enrolled, at most after ENROLL_WAIT_S.

    With ``shells`` they give real shells of this machine.
    """
    from pathlib import Path

    import trio

    from osqbox.agent.runner import AgentOptions, run_agent
    from osqbox.agent.shell.control import ControlOptions

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
                control=ControlOptions(real=True) if shells else None,
            )
            nursery.start_soon(partial(run_agent, agent, on_event=on_event))
        with trio.move_on_after(ENROLL_WAIT_S):
            for _ in range(count):
                await enrolled.acquire()
        task_status.started()
