"""A box as a program: signals, limits of the process, what is printed when it is ready."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from osqbox import __version__
from osqbox.box import Box, open_box
from osqbox.cli import as_called
from osqbox.cli.tune import tune_process
from osqbox.errors import OsqboxError
from osqbox.running import Registration, write_private
from osqbox.settings import Settings


class Body(Protocol):
    """What runs beside the box; calls ``announce`` when the box is ready for its user, returns the exit code."""

    def __call__(self, box: Box, announce: Callable[[], None]) -> Awaitable[int]: ...


def run_program(settings: Settings, options: dict[str, Any], registration: Registration, body: Body | None) -> int:
    """Run the box to its end. Raises the one OsqboxError that stopped it, out of Trio's groups."""
    tune_process()
    try:
        return trio.run(_main, settings, options, registration, body or _serve)
    except BaseExceptionGroup as group:
        if (cause := _only_cause(group)) is not None:
            raise cause from None
        raise


def _only_cause(group: BaseExceptionGroup[BaseException]) -> OsqboxError | None:
    cause: BaseException | None = group.subgroup(OsqboxError)
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause if isinstance(cause, OsqboxError) else None


async def _serve(box: Box, announce: Callable[[], None]) -> int:
    announce()
    await box.stopping.wait()
    return 0


async def _main(settings: Settings, options: dict[str, Any], registration: Registration, body: Body) -> int:
    code = 0
    async with trio.open_nursery() as nursery:
        stop = _Stop(registration)
        await nursery.start(stop.watch_signals)
        async with open_box(settings) as box:
            stop.box = box

            def announce() -> None:
                _announce(box, options, registration)

            async with trio.open_nursery() as beside:
                beside.start_soon(_cancel_when_stopping, box, beside.cancel_scope)
                code = await body(box, announce)
                beside.cancel_scope.cancel()
            registration.update("stopping")
        nursery.cancel_scope.cancel()
    return code


async def _cancel_when_stopping(box: Box, scope: trio.CancelScope) -> None:
    await box.stopping.wait()
    scope.cancel()


class _Stop:
    """First signal drains, second ends at once."""

    def __init__(self, registration: Registration) -> None:
        self.box: Box | None = None
        self._registration = registration

    async def watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        asked = False
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if asked or self.box is None:
                    self._registration.close()
                    os._exit(128 + number)
                asked = True
                self.box.stop()


def _announce(box: Box, options: dict[str, Any], registration: Registration) -> None:
    ready = box.ready()
    if options["ready_file"] is not None:
        write_private(options["ready_file"], json.dumps(ready) + "\n")
    registration.update("ready", ready)
    for note in box.identity.notes:
        print(f"osqbox: {note}", file=sys.stderr)
    if not options["quiet"]:
        _print_ready(box, options["as_json"], ready)
    if box.forwarding:
        box.forwarding.begin_stdout()


def _print_ready(box: Box, as_json: bool, ready: dict[str, Any]) -> None:
    if as_json or not sys.stdout.isatty():
        print(json.dumps(ready if as_json else _without_secrets(ready)), flush=True)
    else:
        print(as_called(banner(box)), flush=True)


def _without_secrets(ready: dict[str, Any]) -> dict[str, Any]:
    """Standard output that is not a terminal often ends in a log."""
    return {name: value for name, value in ready.items() if name not in ("token", "enroll_secret")}


def _jobs_line(box: Box) -> str:
    if box.job_runner is None or box.settings.jobs is None:
        return ""
    from osqbox.jobs.users import start_line, unix_facts

    has_cgroup = box.job_runner.statistics().capabilities.get("containment") == "cgroup"
    able = start_line(unix_facts(box.settings.jobs.user), cgroup=has_cgroup)
    return f"\n  jobs          {box.ready()['jobs']}   {able}"


def _comms_line(ready: dict[str, Any]) -> str:
    return f"\n  comms         {ready['comms']}   osqbox comms --help" if ready["comms"] else ""


def banner(box: Box) -> str:
    """The first screen: where everything is, and lines to paste."""
    ready = box.ready()
    kept = "ephemeral (--data DIR keeps it)" if box.settings.ephemeral else ready["data"]
    secret = ready["enroll_secret_file"]
    base = f"{ready['agents']}/api/v1/osquery"
    return f"""osqbox {__version__}  ready in {box.clock.now() - box.started_at:.2f} s
  osquery TLS   {ready["agents"]}   CA {ready["ca"]}
  pages, API    {ready["operator"]}   OSQBOX_TOKEN of `osqbox env` signs in{_comms_line(ready)}{_jobs_line(box)}
  data          {kept}
try it:
  real osquery  osqueryd --flagfile {ready["flagfile"]}
  this machine  osqbox agent
  nodes         osqbox nodes
  query         osqbox query "select * from osquery_info"
  curl          curl --cacert {ready["ca"]} {base}/enroll -d '{{"enroll_secret":"'$(cat {secret})'"}}'
  pytest        pip install osqbox ; def test_it(osqbox): osqbox.agent(); assert osqbox.query("select 1 as a")
  CI            osqbox exec -- make integration
Ctrl-C drains and stops."""
