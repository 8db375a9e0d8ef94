"""``osqbox comms config``: what the agents of a group fetch."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import click

from osqbox.cli.comms_agents import tenant_option
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, json_option, moment, print_json, print_table, printable, quiet_pipe, tell
from osqbox.client import at
from osqbox.errors import BadSetup, BadUsage

CONFIGURATION_BYTES = 4 * 1024 * 1024


@click.group("config", cls=Listing)
def config() -> None:
    """Groups of agents and their configuration. Without a verb: list the groups."""


@config.command("list")
@tenant_option
@json_option
@box_options
def list_groups(tenant: str, box: Where, as_json: bool) -> None:
    """List groups."""
    found = box.client.get("groups", tenant=tenant)
    if as_json:
        print_json(found)
    else:
        _print_groups(found)


def _print_groups(found: list[dict[str, Any]]) -> None:
    print_table(
        ("GROUP", "VERSION", "CHANGED", "BY", "SHA-256"),
        [
            (
                group["name"],
                group["version"],
                moment(group.get("changed_at"), "never"),
                group.get("changed_by"),
                (group.get("sha256") or "")[:12],
            )
            for group in found
        ],
        empty="no groups; make one with: osqbox comms config set GROUP FILE",
    )


@config.command()
@click.argument("group", default="default")
@click.option("--version", type=int, help="That one instead of the current.")
@tenant_option
@json_option
@box_options
def show(group: str, version: int | None, tenant: str, box: Where, as_json: bool) -> None:
    """Print the configuration of a group.

    With --json also what is known about it.
    """
    client = box.client
    if version is None:
        found = client.get(at("groups", group), tenant=tenant)
    else:
        versions = client.get(at("groups", group, "versions"), tenant=tenant)
        found = next((each for each in versions if each["version"] == version), None)
        if found is None:
            raise BadUsage(f"group {group!r} has no version {version}", hint=f"osqbox comms config versions {group}")
    with quiet_pipe():
        if as_json:
            print_json(found)
        else:
            _print_text(found["configuration"])


def _print_text(text: str) -> None:
    """To the letter, but for a terminal."""
    if sys.stdout.isatty():
        text = "".join(f"{printable(line)}\n" for line in text.splitlines())
    click.echo(text, nl=False)


@config.command("set")
@click.argument("group")
@click.argument("file", metavar="FILE|-", type=click.File("rb"))
@click.option("--expect", type=click.IntRange(0), metavar="VERSION", help="Only if the group has this version now.")
@tenant_option
@json_option
@box_options
def set_configuration(group: str, file: BinaryIO, expect: int | None, tenant: str, box: Where, as_json: bool) -> None:
    """Make a group, or change its configuration.

    FILE (- for stdin) is YAML. The group's agents are told.
    """
    raw, name = file.read(CONFIGURATION_BYTES + 1), getattr(file, "name", "stdin")
    if len(raw) > CONFIGURATION_BYTES:
        raise BadUsage(f"{name}: expected at most {CONFIGURATION_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadSetup(f"{name}: expected UTF-8, got the byte {raw[error.start]:#04x}") from None
    body = {"configuration": text, **({} if expect is None else {"expected_version": expect})}
    done = box.client.put(at("groups", group), body, tenant=tenant)
    if as_json:
        print_json(done)
    else:
        tell(f"{group}: version {done['version']}")


@config.command()
@click.argument("group", default="default")
@tenant_option
@json_option
@box_options
def versions(group: str, tenant: str, box: Where, as_json: bool) -> None:
    """List what a group's configuration was, newest first."""
    found = box.client.get(at("groups", group, "versions"), tenant=tenant)
    with quiet_pipe():
        if as_json:
            print_json(found)
        else:
            _print_groups(found)


@config.command()
@click.argument("group")
@tenant_option
@box_options
def rm(group: str, tenant: str, box: Where) -> None:
    """Delete a group that no agent is in."""
    box.client.delete(at("groups", group), tenant=tenant)
    tell(f"{group}: deleted")
