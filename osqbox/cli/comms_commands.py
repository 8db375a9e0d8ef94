"""``osqbox comms send`` and ``osqbox comms commands``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import click

from osqbox.cli.comms_agents import tenant_option, uuid_of
from osqbox.cli.find import Where, box_options, pause
from osqbox.cli.output import Listing, ago, count, json_option, print_facts, print_json, print_table, quiet_pipe, tell
from osqbox.client import Client, at
from osqbox.errors import BadUsage, NotInTime

STATUSES = ("pending", "sent", "in_progress", "success", "failed", "expired", "cancelled")
ENDED = frozenset(("success", "failed", "expired", "cancelled"))
PAGE_COMMANDS = 1000
FIRST_LOOK_S = 0.05
LONGEST_LOOK_S = 1.0
EXIT_FAILED = 1


@click.command(options_metavar="[OPTIONS]")
@click.argument("words", metavar="[AGENT...] COMMAND [KEY=VALUE...]", nargs=-1, required=True)
@click.option("--group", "groups", multiple=True, help="To the agents of this group; repeatable.")
@click.option("--all", "everyone", is_flag=True, help="To every agent of the tenant.")
@click.option("--version", "version", default="", help="Of the command.")
@click.option(
    "--expires-in",
    "expires_in_s",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End it when it was not answered by then. Default: 24 hours.",
)
@click.option("--wait", is_flag=True, help="Until every agent has answered; exit code 1 unless all succeeded.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --wait waits.",
)
@tenant_option
@json_option
@box_options
def send(
    words: tuple[str, ...],
    groups: tuple[str, ...],
    everyone: bool,
    version: str,
    expires_in_s: float | None,
    wait: bool,
    timeout_s: float,
    tenant: str,
    box: Where,
    as_json: bool,
) -> None:  # fmt: skip
    """Publish a command to agents, groups or everyone.

    AGENT is a UUID or a name. KEY=VALUE gives text, KEY:=JSON anything else.

    \b
    Examples:
      osqbox comms send web-1 web-2 restart
      osqbox comms send --group web upgrade file_name=agent-2.wpk
      osqbox comms send --all fetch-config --wait
    """
    agents, name, args = split_words(words)
    if not (agents or groups or everyone):
        raise BadUsage(
            f"expected agents, --group or --all for the command {name!r}, got none",
            hint=f"osqbox comms send AGENT {name}",
        )
    if everyone and (agents or groups):
        raise BadUsage("expected agents and groups, or --all, got both")
    client = box.client
    body: dict[str, Any] = {"action": {"name": name, "version": version, "args": args}, "tenant": tenant}
    if everyone:
        body["all"] = True
    else:
        body |= {"agents": [uuid_of(client, agent, tenant) for agent in agents], "groups": list(groups)}
    if expires_in_s is not None:
        body["expires_in"] = expires_in_s
    published = client.post("commands", body)
    if not wait:
        _tell_published(published, as_json)
        return
    _follow(client, published, tenant, timeout_s, as_json)


def split_words(words: Sequence[str]) -> tuple[list[str], str, dict[str, Any]]:
    """Agents, the command's name and its arguments. Raises BadUsage."""
    plain = [word for word in words if "=" not in word]
    pairs = words[len(plain) :]
    if not plain or any("=" not in word for word in pairs):
        raise BadUsage(
            f"expected [AGENT...] COMMAND [KEY=VALUE...], got {' '.join(words)}", hint="osqbox comms send --help"
        )
    return plain[:-1], plain[-1], dict(_pair(word) for word in pairs)


def _pair(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    is_json = name.endswith(":")
    name = name.removesuffix(":")
    if not name:
        raise BadUsage(f"expected KEY=VALUE, got {word!r}")
    if not is_json:
        return name, value
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise BadUsage(f"expected JSON behind {name}:=, got {value!r}: {error}") from None


def _tell_published(published: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(published)
        return
    tell(f"{count(published['count'], 'command')} published")
    for each in published["commands"]:
        click.echo(each["id"])
    if published["count"] > len(published["commands"]):
        tell(f"the others: osqbox comms commands --request {published['request_id']}")


def _follow(client: Client, published: dict[str, Any], tenant: str, timeout_s: float, as_json: bool) -> None:
    """Look until all have ended. Raises NotInTime, or Exit unless all succeeded."""
    request_id, look_s, until = published["request_id"], FIRST_LOOK_S, time.monotonic() + timeout_s
    while True:
        found = list(every_command(client, request_id=request_id, tenant=tenant))
        is_open = [each for each in found if each["status"] not in ENDED]
        if not is_open or time.monotonic() >= until:
            break
        pause(min(look_s, max(0.0, until - time.monotonic())))
        look_s = min(LONGEST_LOOK_S, look_s * 1.5)
    with quiet_pipe():
        _print_commands(found, as_json)
    counted = Counter(each["status"] for each in found)
    tell(", ".join(f"{number} {status}" for status, number in counted.items()) or "no agents")
    if is_open:
        raise NotInTime(
            f"{count(len(is_open), 'command')} not ended within {timeout_s:g} s",
            hint=f"osqbox comms commands --request {request_id}",
        )
    if not set(counted) <= {"success"}:
        raise click.exceptions.Exit(EXIT_FAILED)


def every_command(client: Client, limit: int | None = None, **which: Any) -> Iterator[dict[str, Any]]:
    """The newest first, page by page."""
    before, left = None, limit
    while left is None or left > 0:
        size = PAGE_COMMANDS if left is None else min(PAGE_COMMANDS, left)
        page = client.get("commands", before=before, limit=size, **which)
        yield from page
        if len(page) < size:
            return
        before, left = page[-1]["seq"], None if left is None else left - len(page)


@click.group("commands", cls=Listing)
def commands() -> None:
    """Published commands. Without a verb: list them."""


@commands.command("list")
@click.option("--agent", help="Only of this agent.")
@click.option("--status", type=click.Choice(STATUSES), help="Only in this state.")
@click.option("--request", "request_id", metavar="ID", help="Only of this publication.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@tenant_option
@json_option
@box_options
def list_commands(box: Where, as_json: bool, limit: int, agent: str | None, tenant: str, **which: str | None) -> None:
    """List them, the newest first."""
    client = box.client
    uuid = uuid_of(client, agent, tenant) if agent else None
    found = list(every_command(client, limit, agent=uuid, tenant=tenant, **which))
    with quiet_pipe():
        _print_commands(found, as_json)


def _print_commands(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    now = time.time()
    print_table(
        ("ID", "AGENT", "COMMAND", "ARGS", "STATUS", "CREATED", "RESULT"),
        [_row(each, now) for each in found],
        empty="no commands",
    )


def _row(command: dict[str, Any], now: float) -> tuple[Any, ...]:
    action, result = command["action"], command.get("result") or {}
    args = action.get("args") or ""
    said = " ".join(str(result[name]) for name in ("code", "message") if name in result)
    created = ago(command.get("created_at"), now)
    return command["id"], command["agent"], action["name"], args, command["status"], created, said


@commands.command()
@click.argument("id")
@tenant_option
@json_option
@box_options
def show(id: str, tenant: str, box: Where, as_json: bool) -> None:
    """Everything known about one command, its result included."""
    facts = box.client.get(at("commands", id), tenant=tenant)
    with quiet_pipe():
        if as_json:
            print_json(facts)
        else:
            print_facts(facts.items())


@commands.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@tenant_option
@box_options
def cancel(ids: tuple[str, ...], tenant: str, box: Where) -> None:
    """End commands that have no final result.

    An agent that has one already may still carry it out.
    """
    client = box.client
    for each in ids:
        client.delete(at("commands", each), tenant=tenant)
        tell(f"{each}: cancelled")


@commands.command()
@json_option
@box_options
def known(box: Where, as_json: bool) -> None:
    """The commands that may be published."""
    found = box.client.get("known-commands")
    if as_json:
        print_json(found)
        return
    print_table(
        ("NAME", "VERSION", "REQUIRED", "DESCRIPTION"),
        [
            (each["name"], each["version"] or "any", each["required_args"], each["description"])
            for each in found
        ],
        empty="none; add one with: osqbox comms commands known-add NAME",
    )  # fmt: skip


@commands.command("known-add")
@click.argument("name")
@click.option("--version", default="", help="Only this version may be published. Default: any.")
@click.option("--requires", "required_args", multiple=True, metavar="KEY", help="An argument it needs; repeatable.")
@click.option("--description", default="")
@json_option
@box_options
def known_add(name: str, required_args: tuple[str, ...], box: Where, as_json: bool, **facts: str) -> None:
    """Let a command be published, or change what it needs."""
    done = box.client.put(at("known-commands", name), {**facts, "required_args": list(required_args)})
    if as_json:
        print_json(done)
    else:
        tell(f"{name}: may be published")


@commands.command("known-rm")
@click.argument("name")
@box_options
def known_rm(name: str, box: Where) -> None:
    """Refuse a command from now on; what was published stays."""
    box.client.delete(at("known-commands", name))
    tell(f"{name}: refused from now on")
