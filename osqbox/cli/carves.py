"""``osqbox carves``: files that hosts sent, and asking for more."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from pathlib import Path
from typing import IO, Any

import click

from osqbox.cli import query
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, ago, json_option, print_facts, print_json, print_table, quiet_pipe, tell
from osqbox.client import Client, at
from osqbox.errors import BadSetup, UserError

START_TIMEOUT_S = 600.0


@click.group("carves", cls=Listing)
def command() -> None:
    """Files carved from hosts. Without a verb: list them. ID is a carve's id, the agent's carve GUID, or latest."""


@command.command("list")
@json_option
@box_options
def list_carves(box: Where, as_json: bool) -> None:
    """List carves, the newest first."""
    carves = box.client.get("carves")
    with quiet_pipe():
        if as_json:
            print_json(carves)
            return
        now = time.time()
        print_table(
            ("ID", "HOSTNAME", "STATUS", "BLOCKS", "BYTES", "STARTED"),
            [
                (
                    carve["id"],
                    carve.get("hostname") or carve["node"],
                    carve["status"],
                    f"{carve['received_blocks']}/{carve['block_count']}",
                    carve["carve_size"],
                    ago(carve["created_at"], now),
                )
                for carve in carves
            ],
            empty="no carves yet; start one with: osqbox carves start NODE PATH",
        )


@command.command()
@click.argument("id")
@json_option
@box_options
def show(id: str, box: Where, as_json: bool) -> None:
    """Everything known about one carve."""
    facts = box.client.get(at("carves", id))
    if as_json:
        print_json(facts)
    else:
        print_facts(facts.items())


@command.command()
@click.argument("id")
@json_option
@box_options
def members(id: str, box: Where, as_json: bool) -> None:
    """List the files inside a complete carve."""
    found = box.client.get(at("carves", id, "members"))
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        print_table(
            ("TYPE", "MODE", "BYTES", "CHANGED", "NAME"),
            [
                (each["type"], f"{each['mode']:o}", each["size"], (each["mtime"] or "")[:19], each["name"])
                for each in found
            ],
            empty="an empty archive",
        )


@command.command()
@click.argument("id")
@click.option("--out", metavar="FILE", help="Where to; - is stdout. Default: carve-HOST-ID.tar in this directory.")
@box_options
def download(id: str, out: str | None, box: Where) -> None:
    """Save a carve's archive as the host sent it.

    What is saved is checked against the carve's SHA-256.
    """
    client = box.client
    facts = client.get(at("carves", id))
    if out == "-":
        with quiet_pipe():
            client.download(at("carves", facts["id"], "archive"), sys.stdout.buffer)
        return
    path = Path(out or _file_name(facts))
    try:
        with path.open("xb") as file:
            _save(client, facts, file, path)
    except FileExistsError:
        raise BadSetup(f"{path} exists already", hint=f"osqbox carves download {id} --out FILE") from None
    except OSError as error:
        raise BadSetup(f"cannot write {path}: {error.strerror}") from None
    click.echo(path)


def _file_name(facts: dict[str, Any]) -> str:
    words = (re.sub(r"[^A-Za-z0-9_-]", "_", str(facts.get(name) or ""))[:64] for name in ("hostname", "id"))
    return f"carve-{'-'.join(filter(None, words))}.tar{'.zst' if facts.get('compressed') else ''}"


def _save(client: Client, facts: dict[str, Any], file: IO[bytes], path: Path) -> None:
    """A file that is not the whole archive does not stay."""
    try:
        client.download(at("carves", facts["id"], "archive"), file)
        file.flush()
        with path.open("rb") as saved:
            got = hashlib.file_digest(saved, "sha256").hexdigest()
        if facts.get("sha256") and got != facts["sha256"]:
            raise UserError(f"expected an archive with SHA-256 {facts['sha256']}, got {got}; download it again")
    except BaseException:
        path.unlink()
        raise


@command.command()
@click.argument("id")
@box_options
def delete(id: str, box: Where) -> None:
    """Remove a carve and its blocks."""
    box.client.delete(at("carves", id))
    tell(f"{id}: deleted")


@command.command()
@click.argument("node")
@click.argument("path")
@click.option("--timeout", "timeout_s", type=float, default=START_TIMEOUT_S, show_default=True, metavar="SECONDS")
@json_option
@box_options
def start(node: str, path: str, timeout_s: float, box: Where, as_json: bool) -> None:
    """Have NODE carve PATH.

    % in PATH is a wildcard. The host uploads within the minute after it answers.
    """
    operator = "LIKE" if "%" in path else "="
    quoted = path.replace("'", "''")
    sql = f"SELECT * FROM carves WHERE path {operator} '{quoted}' AND carve = 1"
    campaign = query.start(box.client, sql, {"nodes": (node,), "timeout_s": timeout_s})
    if not campaign["summary"]["targets"]:
        raise UserError(f"nobody was asked: {node} is not active", hint=f"osqbox nodes show {node}")
    if as_json:
        print_json(campaign)
    else:
        click.echo(campaign["id"])
        tell(f"asked {node}; then see: osqbox carves, or osqbox query --show {campaign['id']}")
