"""``osqbox wait``: return when a box is ready; also a container's health check."""

from __future__ import annotations

import time

import click

from osqbox.cli.find import POLL_S, NoBox, Where, await_ready, box_options, client_at, pause
from osqbox.errors import NotInTime


@click.command("wait")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), default=30.0, show_default=True, metavar="SECONDS")
@box_options
def command(timeout_s: float, box: Where) -> None:
    """Return when a box is ready: every listener answers and the database takes writes.

    The exit code is 5 when that is not so within the time. No token is needed.
    """
    deadline = time.monotonic() + timeout_s
    url = box.named_url
    if url is None:
        try:
            found = await_ready(box.data, wait_s=timeout_s, grace_s=timeout_s)
        except NoBox as error:
            raise NotInTime(f"{error} after {timeout_s:g} s", hint=error.hint) from None
        assert found.ready is not None
        url = found.ready["operator"]
    client = client_at(url, None)
    client.timeout_s = max(0.5, timeout_s)
    while not client.is_up("/readyz"):
        if time.monotonic() >= deadline:
            raise NotInTime(f"the box at {url} was not ready within {timeout_s:g} s", hint="osqbox doctor")
        pause(POLL_S)
