"""``osqbox stop``: stop the running box, and return when it is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click

from osqbox import running
from osqbox.cli.find import POLL_S, Where, box_options, is_running, pause
from osqbox.cli.output import tell
from osqbox.errors import NotInTime


@click.command("stop")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), default=10.0, show_default=True, metavar="SECONDS")
@box_options
def command(timeout_s: float, box: Where) -> None:
    """Stop the running box, and return when it is gone.

    What is being answered is answered first. The exit code is 5 when it takes too long, 1 when no box runs.
    """
    deadline = time.monotonic() + timeout_s
    pid, is_alive = _stop(box, timeout_s)
    while is_alive():
        if time.monotonic() >= deadline:
            raise NotInTime(f"the box did not stop within {timeout_s:g} s", hint=f"kill {pid}" if pid else None)
        pause(POLL_S)
    tell(f"stopped the box with pid {pid}" if pid else "stopped")


def _stop(box: Where, wait_s: float) -> tuple[int | None, Callable[[], bool]]:
    """Ask for the stop; the pid, if the box runs here, and what tells whether it still lives."""
    boxes = [] if box.named_url else running.boxes(box.data)
    if boxes and all(each.state == "stopping" for each in boxes):
        return boxes[0].pid, partial(is_running, boxes[0].pid)
    found = box.find(wait_s=wait_s, grace_s=0.0)
    found.client.post("stop")
    return found.pid, partial(is_running, found.pid) if found.pid else partial(found.client.is_up, "/livez")
