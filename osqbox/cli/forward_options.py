"""The flags of `serve` that forward what the box records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from osqbox.forward.messages import SinkSpec

F = TypeVar("F", bound=Callable[..., Any])

SOURCES = ("logs", "events", "jobs")
_PATH = click.Path(path_type=Path)


def forward_options(command: F) -> F:
    """Gives a command ``--forward`` and what goes with it; `forward_sinks` reads them."""
    options = [
        click.option("--forward", "forward", multiple=True, metavar="PLACE", help="Send what is recorded on to "
                     "file:PATH, stdout:, https://HOST/PATH or opensearch+https://HOST:9200/PREFIX; repeatable."),
        click.option("--forward-source", "forward_sources", multiple=True, type=click.Choice(SOURCES),
                     help="Only osquery's logs, the events of comms agents, or the output of jobs; repeatable."),
        click.option("--forward-ca", "forward_ca_file", type=_PATH,
                     help="The CA of an https place. Default: the system's."),
        click.option("--forward-auth-file", type=_PATH, help="USER:PASSWORD or a bearer token for such a place."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def forward_sinks(options: dict[str, Any]) -> tuple[SinkSpec, ...]:
    """What those flags say. Raises BadUsage."""
    if not options["forward"]:
        return ()
    from osqbox.forward.messages import EVERY_SOURCE, SourceName, check_sinks, parse_sink

    sources = tuple(SourceName(name) for name in options["forward_sources"]) or EVERY_SOURCE
    here = Path.cwd()
    ca_file, auth_file = (file and here / file for file in (options["forward_ca_file"], options["forward_auth_file"]))
    sinks = tuple(
        parse_sink(text, directory=here, sources=sources, ca_file=ca_file, auth_file=auth_file)
        for text in options["forward"]
    )
    check_sinks(sinks)
    return sinks
