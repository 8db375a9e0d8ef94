"""``osqbox comms events`` and ``osqbox comms states``: what agents have said."""

from __future__ import annotations

from typing import Any

import click

from osqbox.cli.comms_agents import tenant_option, uuid_of
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import json_option, moment, print_json, print_json_line, print_table, printable, quiet_pipe, tell

EVENTS = 20
DATA_CHARS = 200


@click.command()
@click.option("--agent", help="Only of this agent.")
@click.option("--module", help="Only of this module.")
@click.option("--search", "text", metavar="TEXT", help="Only those with all of these words.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000_000), help=f"At most so many. Default: {EVENTS}, all with --after."
)
@click.option("--after", type=click.IntRange(0), metavar="NUMBER", help="Those after that one, instead of the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new events as they come.")
@tenant_option
@json_option
@box_options
def events(box: Where, as_json: bool, follow: bool, agent: str | None, tenant: str, **which: Any) -> None:
    """Print stateless events, the oldest first."""
    client = box.client
    if which["after"] is None:
        which["limit"] = which["limit"] or EVENTS
    uuid = uuid_of(client, agent, tenant) if agent else None
    with quiet_pipe():
        try:
            is_empty = True
            for event in client.lines("events.ndjson", agent=uuid, tenant=tenant, follow=follow or None, **which):
                is_empty = False
                if as_json:
                    print_json_line(event)
                else:
                    click.echo(_as_text(event))
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        if follow:
            tell("the box has stopped")
        elif is_empty and not as_json:
            is_narrowed = agent or any(which[name] for name in ("module", "text", "after"))
            tell("no events fit" if is_narrowed else "no events yet")


def _as_text(event: dict[str, Any]) -> str:
    place = "/".join(printable(event[name]) for name in ("module", "collector") if event.get(name))
    return f"{moment(event['received_at'])}  {printable(event['agent'])}  {place}  {_short(event['data'])}"


def _short(data: Any) -> str:
    text = printable(data)
    return text if len(text) <= DATA_CHARS else f"{text[: DATA_CHARS - 3]}..."


@click.command()
@click.option("--agent", help="Only of this agent.")
@click.option("--index", help="Only of this index, such as wazuh-states-inventory-packages.")
@click.option("--search", "text", metavar="TEXT", help="Only those that contain this.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--after", metavar="CURSOR", help="The page behind the one that told this cursor.")
@tenant_option
@json_option
@box_options
def states(box: Where, as_json: bool, agent: str | None, tenant: str, **which: Any) -> None:
    """List the documents that agents keep with stateful events."""
    client = box.client
    uuid = uuid_of(client, agent, tenant) if agent else None
    found = client.get("states", agent=uuid, tenant=tenant, **which)
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        print_table(
            ("INDEX", "ID", "AGENT", "VERSION", "CHANGED", "DATA"),
            [_state_row(each) for each in found["states"]],
            empty="no states fit" if agent or which["index"] or which["text"] or which["after"] else "no states yet",
        )
    if found.get("next"):
        tell(f"there are more: --after {found['next']}")


def _state_row(state: dict[str, Any]) -> tuple[Any, ...]:
    return (
        state["index"],
        state["id"],
        state["agent"],
        state["version"],
        moment(state["changed_at"]),
        _short(state["data"]),
    )
