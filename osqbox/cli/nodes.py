"""``osqbox nodes``: the enrolled hosts, and what is decided about them."""

from __future__ import annotations

import time
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import (
    Listing,
    ago,
    json_option,
    print_facts,
    print_json,
    print_table,
    quiet_pipe,
    tell,
)
from osqbox.client import at

STATUSES = ("active", "pending", "rejected")

_nodes_argument = click.argument("nodes", metavar="NODE...", nargs=-1, required=True)


@click.group("nodes", cls=Listing)
def command() -> None:
    """The enrolled hosts. Without a verb: list them.

    NODE is an id, a beginning of one, a hostname or a host identifier.
    """


@command.command("list")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--tag", help="Only with this tag.")
@click.option("--platform", help="Only of this platform, such as linux, ubuntu or darwin.")
@click.option("--status", type=click.Choice(STATUSES), help="Only in this state.")
@json_option
@box_options
def list_nodes(box: Where, as_json: bool, **which: str | None) -> None:
    """List nodes."""
    found = box.client.get("nodes", **which)
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        now = time.time()
        print_table(
            ("ID", "HOSTNAME", "TENANT", "STATUS", "PLATFORM", "OSQUERY", "TAGS", "SEEN"),
            [_row(node, now) for node in found],
            empty="no nodes" + (" fit" if any(which.values()) else " yet; enroll one with: osqueryd --flagfile FILE, "
            "where FILE is the output of: osqbox flags"),
        )  # fmt: skip


def _row(node: dict[str, Any], now: float) -> tuple[Any, ...]:
    names = ("id", "hostname", "tenant", "status", "platform", "osquery_version", "tags")
    return (*(node.get(name) for name in names), ago(node.get("last_seen_at"), now))


@command.command()
@click.argument("node")
@json_option
@box_options
def show(node: str, box: Where, as_json: bool) -> None:
    """Everything known about one node."""
    facts = box.client.get(at("nodes", node))
    with quiet_pipe():
        if as_json:
            print_json(facts)
            return
        details = facts.pop("host_details", None) or {}
        print_facts(facts.items())
        for table, row in details.items():
            click.echo()
            print_facts((f"{table}.{column}", value) for column, value in row.items())


@command.command()
@_nodes_argument
@box_options
def approve(nodes: tuple[str, ...], box: Where) -> None:
    """Let pending nodes in."""
    _decide(box, nodes, "approve", "approved")


@command.command()
@_nodes_argument
@box_options
def reject(nodes: tuple[str, ...], box: Where) -> None:
    """Refuse nodes from now on."""
    _decide(box, nodes, "reject", "rejected")


@command.command()
@_nodes_argument
@box_options
def reenroll(nodes: tuple[str, ...], box: Where) -> None:
    """Revoke node keys, so that the agents enroll again.

    It happens at an agent's next request; its history stays.
    """
    _decide(box, nodes, "reenroll", "will enroll again")


def _decide(box: Where, nodes: tuple[str, ...], verb: str, done: str) -> None:
    client = box.client
    for node in nodes:
        client.post(at("nodes", node, verb))
        tell(f"{node}: {done}")


@command.command()
@_nodes_argument
@box_options
def delete(nodes: tuple[str, ...], box: Where) -> None:
    """Forget nodes; a living agent enrolls again as a new node."""
    client = box.client
    for node in nodes:
        client.delete(at("nodes", node))
        tell(f"{node}: deleted")


@command.command()
@click.argument("node")
@click.argument("tags", metavar="TAG...", nargs=-1, required=True)
@click.option("--remove", is_flag=True, help="Take the tags away instead.")
@box_options
def tag(node: str, tags: tuple[str, ...], remove: bool, box: Where) -> None:
    """Give a node tags; its config may change with them."""
    client = box.client
    facts = client.get(at("nodes", node))
    kept = [tag for tag in facts["tags"] if tag not in tags]
    after = kept if remove else [*kept, *dict.fromkeys(tags)]
    client.patch(at("nodes", facts["id"]), {"tags": after})
    tell(f"{node}: {', '.join(after) or 'no tags'}")
