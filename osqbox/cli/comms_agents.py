"""``osqbox comms agents`` and ``osqbox comms keys``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, ago, json_option, moment, print_facts, print_json, print_table, quiet_pipe, tell
from osqbox.client import Client, at
from osqbox.errors import BadUsage

PAGE_AGENTS = 1000

tenant_option = click.option("--tenant", default="default", show_default=True, help="Whose agents.")
_agents_argument = click.argument("agents", metavar="AGENT...", nargs=-1, required=True)


@click.group("agents", cls=Listing)
def agents() -> None:
    """Agents of the comms API. Without a verb: list them.

    AGENT is a UUID or a name.
    """


@agents.command("list")
@click.option("--group", help="Only of this group.")
@click.option("--text", help="Only with this in the name or the UUID.")
@click.option("--limit", type=click.IntRange(1), help="At most so many. Default: all.")
@tenant_option
@json_option
@box_options
def list_agents(box: Where, as_json: bool, limit: int | None, **which: str | None) -> None:
    """List agents in the order of their UUIDs."""
    client = box.client
    found = list(every_agent(client, limit, **which))
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        now = time.time()
        is_narrowed = any(value for name, value in which.items() if name != "tenant")
        print_table(
            ("UUID", "NAME", "STATUS", "GROUPS", "TYPE", "VERSION", "HOST", "SEEN"),
            [_row(agent, now) for agent in found],
            empty="no agents fit" if is_narrowed else "no agents yet; add one with: osqbox comms agents add NAME",
        )


def every_agent(client: Client, limit: int | None = None, **which: str | None) -> Iterator[dict[str, Any]]:
    """Page by page."""
    after, left = "", limit
    while left is None or left > 0:
        size = PAGE_AGENTS if left is None else min(PAGE_AGENTS, left)
        page = client.get("agents", after=after or None, limit=size, **which)
        yield from page
        if len(page) < size:
            return
        after, left = page[-1]["uuid"], None if left is None else left - len(page)


def _row(agent: dict[str, Any], now: float) -> tuple[Any, ...]:
    names = ("uuid", "name", "status", "groups", "type", "version")
    host = agent.get("host") or {}
    return (*(agent.get(name) for name in names), host.get("hostname"), ago(agent.get("last_seen_at"), now))


@agents.command()
@click.argument("name")
@click.option("--group", "groups", multiple=True, help="Its groups, in order; repeatable. Default: default.")
@click.option("--uuid", help="Its UUID. Default: the box makes one.")
@click.option("--key", help="Its key, 32 letters and digits (visible to others here). Default: the box makes one.")
@tenant_option
@json_option
@box_options
def add(
    name: str, groups: tuple[str, ...], uuid: str | None, key: str | None, tenant: str, box: Where, as_json: bool
) -> None:
    """Add an agent; prints its UUID and its key.

    The key is shown only now: the box keeps its hash.
    """
    given = {"groups": list(groups), "uuid": uuid, "key": key}
    body = {"name": name, **{word: value for word, value in given.items() if value}}
    agent = box.client.post("agents", body, tenant=tenant)
    if as_json:
        print_json(agent)
    else:
        print_facts([("uuid", agent["uuid"]), ("key", agent["key"])])


@agents.command()
@click.argument("agent")
@tenant_option
@json_option
@box_options
def show(agent: str, tenant: str, box: Where, as_json: bool) -> None:
    """Everything known about one agent."""
    facts = box.client.get(at("agents", agent), tenant=tenant)
    with quiet_pipe():
        if as_json:
            print_json(facts)
        else:
            print_facts(facts.items())


@agents.command("groups")
@click.argument("agent")
@click.argument("groups", metavar="GROUP...", nargs=-1, required=True)
@tenant_option
@json_option
@box_options
def set_groups(agent: str, groups: tuple[str, ...], tenant: str, box: Where, as_json: bool) -> None:
    """Put an agent into these groups and no others, and tell it.

    The configuration of a later group overrides that of an earlier one.
    """
    changed = box.client.patch(at("agents", agent), {"groups": list(groups)}, tenant=tenant)
    if as_json:
        print_json(changed)
    else:
        tell(f"{agent}: {', '.join(changed['groups'])}")


@agents.command()
@click.argument("agent")
@click.option("--key", help="The new key (visible to others here). Default: the box makes one.")
@tenant_option
@json_option
@box_options
def key(agent: str, key: str | None, tenant: str, box: Where, as_json: bool) -> None:
    """Give an agent a new key; prints it, only now.

    The old key and its tokens are refused at once.
    """
    made = box.client.post(at("agents", agent, "key"), {"key": key} if key else {}, tenant=tenant)
    if as_json:
        print_json(made)
    else:
        click.echo(made["key"])


@agents.command()
@_agents_argument
@tenant_option
@box_options
def revoke(agents: tuple[str, ...], tenant: str, box: Where) -> None:
    """Refuse agents from now on; their streams end at once."""
    _set_status(box, agents, tenant, "revoked")


@agents.command()
@_agents_argument
@tenant_option
@box_options
def allow(agents: tuple[str, ...], tenant: str, box: Where) -> None:
    """Let revoked agents in again, with the key they have."""
    _set_status(box, agents, tenant, "active")


def _set_status(box: Where, agents: tuple[str, ...], tenant: str, status: str) -> None:
    client = box.client
    for agent in agents:
        client.patch(at("agents", agent), {"status": status}, tenant=tenant)
        tell(f"{agent}: {'revoked' if status == 'revoked' else 'allowed'}")


@agents.command()
@_agents_argument
@tenant_option
@box_options
def rm(agents: tuple[str, ...], tenant: str, box: Where) -> None:
    """Forget agents and cancel their open commands."""
    client = box.client
    for agent in agents:
        client.delete(at("agents", agent), tenant=tenant)
        tell(f"{agent}: deleted")


@click.group("keys", cls=Listing)
def keys() -> None:
    """The keys that sign agents' tokens. Without a verb: list them."""


@keys.command("list")
@json_option
@box_options
def list_keys(box: Where, as_json: bool) -> None:
    """List them, the oldest first."""
    _print_keys(box.client.get("comms/keys"), as_json)


def _print_keys(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print_table(
        ("KID", "ALGORITHM", "MADE", "SIGNS", "FILE"),
        [
            (key["kid"], key["algorithm"], moment(key.get("made_at")), "*" if key.get("signs") else "", key["file"])
            for key in found
        ],
        empty="no keys",
    )


@keys.command()
@json_option
@box_options
def rotate(box: Where, as_json: bool) -> None:
    """Sign with a new key from now on.

    Tokens of the older ones stay good until those are removed.
    """
    _print_keys(box.client.post("comms/keys"), as_json)


@keys.command("rm")
@click.argument("kid")
@box_options
def remove_key(kid: str, box: Where) -> None:
    """Remove a key that no longer signs; its tokens are refused at once."""
    box.client.delete(at("comms", "keys", kid))
    tell(f"{kid}: removed")


def uuid_of(client: Client, word: str, tenant: str) -> str:
    """Of an agent by any of its names. Raises BadUsage."""
    found = client.get(at("agents", word), tenant=tenant)
    if not isinstance(found, dict) or "uuid" not in found:
        raise BadUsage(f"expected an agent, got {word!r}", hint="osqbox comms agents")
    return str(found["uuid"])
