"""``osqbox logs``: log lines searched, followed, exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, count, json_option, moment, print_json_line, printable, quiet_pipe, tell
from osqbox.errors import BadSetup

LINES = 20
PREVIEW_CHARS = 120
SEVERITIES = ("info", "warning", "error", "fatal")


@click.group("logs", cls=Listing)
def command() -> None:
    """What the hosts logged. Without a verb: print the newest lines, which takes the options of `logs list`."""


@command.command("list")
@click.option("--type", "type_", type=click.Choice(["result", "status"]), help="Only results, or only status lines.")
@click.option("--node", help="Only of this node.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--name", help="Only of the scheduled query of this name.")
@click.option("--search", metavar="TEXT", help="Only lines that contain this.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000_000), help=f"At most so many. Default: {LINES}, all with --after."
)
@click.option("--after", type=click.IntRange(0), metavar="SEQ", help="The lines after that one, instead of the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines as they come.")
@json_option
@box_options
def list_logs(box: Where, type_: str | None, follow: bool, as_json: bool, **which: Any) -> None:
    """Print lines, the oldest first."""
    if which["after"] is None:
        which["limit"] = which["limit"] or LINES
    with quiet_pipe():
        try:
            for entry in box.client.lines("logs", type=type_, follow=follow or None, **which):
                if as_json:
                    print_json_line(entry)
                else:
                    click.echo(_as_text(entry))
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        if follow:
            tell("the box has stopped")


def _as_text(entry: dict[str, Any]) -> str:
    line = entry["line"] if isinstance(entry["line"], dict) else {}
    at = moment(entry["received_at"])
    host = line.get("hostIdentifier") or entry["node"]
    return f"{at}  {printable(host)}  {_status_text(line) if entry['log_type'] == 'status' else _result_text(line)}"


def _status_text(line: dict[str, Any]) -> str:
    severity = str(line.get("severity", ""))
    known = severity.isascii() and severity.isdigit() and int(severity) < len(SEVERITIES)
    word = SEVERITIES[int(severity)] if known else severity
    place = f"{line.get('filename', '')}:{line.get('line', '')}"
    return f"{printable(word)}  {printable(place)}  {printable(line.get('message'))}"


def _result_text(line: dict[str, Any]) -> str:
    name, action = printable(line.get("name")), printable(line.get("action"))
    if isinstance(line.get("columns"), dict):
        return f"{name}  {action}  {_pairs(line['columns'])}"
    if isinstance(line.get("snapshot"), list):
        rows = line["snapshot"]
        first = _pairs(rows[0]) if rows and isinstance(rows[0], dict) else ""
        more = " ..." if len(rows) > 1 or len(first) > PREVIEW_CHARS else ""
        return f"{name}  snapshot of {count(len(rows), 'row')}  {first[:PREVIEW_CHARS]}{more}".rstrip()
    if isinstance(line.get("diffResults"), dict):
        changes = line["diffResults"]
        return f"{name}  added {_number(changes.get('added'))}, removed {_number(changes.get('removed'))}"
    return f"{name}  {action}  {printable(line)}"


def _number(rows: Any) -> int:
    return len(rows) if isinstance(rows, list) else 0


def _pairs(columns: dict[str, Any]) -> str:
    return " ".join(f"{printable(name)}={printable(value)}" for name, value in columns.items())


@command.command()
@click.option(
    "--type", "type_", type=click.Choice(["result", "snapshot", "status"]), default="result", show_default=True
)
@click.option("--tenant", help="Only of this tenant.")
@click.option("--node", help="Only of this node.")
@click.option("--out", default="-", metavar="FILE", help="Write there instead of stdout.")
@box_options
def export(type_: str, tenant: str | None, node: str | None, out: str, box: Where) -> None:
    """Print or save lines in the format of osquery's log files.

    Every kept line is there, one JSON object per line, the oldest first.
    """
    which = {"type": type_, "tenant": tenant, "node": node}
    client = box.client
    if out == "-":
        with quiet_pipe():
            client.download("logs/export", sys.stdout.buffer, **which)
        return
    try:
        with Path(out).open("wb") as file:
            size_bytes = client.download("logs/export", file, **which)
    except OSError as error:
        raise BadSetup(f"cannot write {out}: {error.strerror}") from None
    tell(f"{out}: {size_bytes} bytes")
