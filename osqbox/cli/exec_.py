"""``osqbox exec -- CMD``: a fresh box for one command."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.serve import run_box, serve_options
from osqbox.errors import BadUsage

if TYPE_CHECKING:
    from osqbox.box import Box

GRACE_S = 5.0


@click.command(name="exec", context_settings={"ignore_unknown_options": True})
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--agents", default=0, type=click.IntRange(0, 100), show_default=True, help="Agents of this machine in it."
)
@serve_options
def command(cmd: tuple[str, ...], agents: int, **options: Any) -> int:
    """Start a fresh box on free ports, run CMD with OSQBOX_* in its environment, stop; returns CMD's exit code.

    \b
    Examples:
      osqbox exec -- pytest tests/integration
      osqbox exec --agents 2 -- go test ./...
    """
    if shutil.which(cmd[0]) is None:
        raise BadUsage(f"exec: no program {cmd[0]!r} on PATH", hint="osqbox exec -- PROGRAM ARG...")
    options["agents_port"] = options["agents_port"] or 0
    options["operator_port"] = options["operator_port"] or 0
    options["jobs_port"] = options["jobs_port"] or 0
    options["comms_port"] = options["comms_port"] or 0
    options["quiet"] = True

    async def body(box: Box, announce: Callable[[], None]) -> int:
        import trio

        from osqbox.cli.demo import run_local_agents

        async with trio.open_nursery() as nursery:
            if agents:
                await nursery.start(run_local_agents, box, agents)
            announce()
            code = await _run(cmd, box)
            nursery.cancel_scope.cancel()
        return code

    ephemeral = options["ephemeral"] is not False and options["data"] is None
    return run_box(options, ephemeral=ephemeral, body=body)


async def _run(cmd: tuple[str, ...], box: Box) -> int:
    """The child's exit code, 128 + n when signal n ended it. A stop of the box ends the child first."""
    import trio

    from osqbox.cli.env import environment

    process = await trio.lowlevel.open_process(cmd, env={**os.environ, **environment(box.ready())})
    try:
        code = await process.wait()
    except trio.Cancelled:
        with trio.CancelScope(shield=True), suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(GRACE_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
        raise
    return 128 - code if code < 0 else code
