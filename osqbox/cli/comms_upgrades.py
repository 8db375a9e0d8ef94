"""``osqbox comms upgrades``: files for agents to download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click

from osqbox.cli.comms_agents import tenant_option
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, json_option, moment, print_json, print_table, quiet_pipe, tell
from osqbox.client import at
from osqbox.errors import BadSetup, UserError

_NAMES = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@click.group("upgrades", cls=Listing)
def upgrades() -> None:
    """Files that agents download, such as their next version. Without a verb: list them."""


@upgrades.command("list")
@tenant_option
@json_option
@box_options
def list_upgrades(tenant: str, box: Where, as_json: bool) -> None:
    """List them."""
    found = box.client.get("upgrades", tenant=tenant)
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        print_table(
            ("NAME", "BYTES", "SHA-256", "ADDED"),
            [(each["name"], each["size_bytes"], each["sha256"], moment(each["added_at"])) for each in found],
            empty="no files; add one with: osqbox comms upgrades add FILE",
        )


@upgrades.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What agents ask for. Default: the name of FILE.")
@tenant_option
@json_option
@box_options
def add(file: Path, name: str | None, tenant: str, box: Where, as_json: bool) -> None:
    """Keep FILE for agents to download.

    The box's SHA-256 of it is compared with that of FILE.
    """
    try:
        if not file.is_file() and file.exists():
            raise BadSetup(f"{file}: expected a regular file")
        with file.open("rb") as source:
            size_bytes = os.fstat(source.fileno()).st_size
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
            source.seek(0)
            done = box.client.upload(at("upgrades", name or file.name), source, size_bytes, tenant=tenant)
    except OSError as error:
        raise BadSetup(f"cannot read {file}: {error.strerror}") from None
    if done["sha256"] != sha256:
        raise UserError(f"{file} changed on its way: the box has SHA-256 {done['sha256']}, it was {sha256}")
    if as_json:
        print_json(done)
    else:
        tell(f"{done['name']}: {size_bytes} bytes, SHA-256 {sha256}")


@upgrades.command()
@_NAMES
@tenant_option
@box_options
def rm(names: tuple[str, ...], tenant: str, box: Where) -> None:
    """Delete files.

    A download under way ends with the bytes it began with.
    """
    client = box.client
    for name in names:
        client.delete(at("upgrades", name), tenant=tenant)
        tell(f"{name}: deleted")
