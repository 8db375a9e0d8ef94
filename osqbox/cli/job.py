"""``osqbox job``: the jobs of the running box."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.find import Where
from osqbox.cli.jobs_text import Duration
from osqbox.cli.jobs_verbs import Front, connection_option

if TYPE_CHECKING:
    from osqbox.cli.jobs_connection import Target


def _find(options: Mapping[str, Any]) -> Target:
    from osqbox.cli.jobs_connection import box_target, whole

    return whole(box_target(Where(options.get("url"), options.get("token"), options.get("data"))))


FRONT = Front(
    "osqbox job",
    {},
    (
        connection_option("--url", help="The box at that URL. Default: OSQBOX_URL, else the newest box of this user."),
        connection_option("--token", help="Its token. Default: OSQBOX_TOKEN."),
        connection_option(
            "--data", type=click.Path(path_type=Path), metavar="DIR", help="The box on that data directory."
        ),
        connection_option("--reconnect", type=Duration(), help="Wait so long for a lost server. Default: 60s."),
    ),
    _find,
)


@click.group("job", context_settings={"obj": FRONT}, commands=FRONT.commands())
def command() -> None:
    """Linux processes run by the box: started, followed, stopped, listed.

    A job goes on without the terminal it was started from, and through a restart of the box.
    """
