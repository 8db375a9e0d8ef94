"""``osqbox audit``: who did what to shells, jobs and certificates."""

from __future__ import annotations

from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import count, json_option, moment, print_json, print_json_line, printable, quiet_pipe, tell
from osqbox.errors import BadUsage, VerdictFailed

ROWS = 50


@click.command("audit")
@click.option("-f", "--follow", is_flag=True, help="Go on with new rows as they come.")
@click.option("--verify", is_flag=True, help="Walk the chain instead: was a row changed, removed or slipped in?")
@click.option("--action", help="Only such as job.run, or all of a system, such as job.")
@click.option("--actor", help="Only what this owner of a certificate did, such as default/alice; or operator.")
@click.option("--subject", metavar="ID", help="Only what was done to this job, session or token.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000_000), help=f"At most so many. Default: {ROWS}, all with --after."
)
@click.option("--after", type=click.IntRange(0), metavar="SEQ", help="The rows after that one, instead of the newest.")
@json_option
@box_options
def command(box: Where, verify: bool, follow: bool, as_json: bool, **which: Any) -> None:
    """Who did what, with which certificate, and what came of it: append-only and hash-chained.

    Prints the newest rows, the oldest first. --verify exits with 6 when the chain is broken.
    """
    if verify:
        if follow or any(value is not None for value in which.values()):
            raise BadUsage("expected --verify alone: it walks the whole chain")
        _verify(box, as_json)
        return
    if which["after"] is None:
        which["limit"] = which["limit"] or ROWS
    with quiet_pipe():
        try:
            for row in box.client.lines("audit", follow=follow or None, **which):
                if as_json:
                    print_json_line(row)
                else:
                    click.echo(_as_text(row))
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        if follow:
            tell("the box has stopped")


def _verify(box: Where, as_json: bool) -> None:
    verdict = box.client.get("audit/verify")
    if as_json:
        print_json(verdict)
    if verdict["broken_at"] is not None:
        raise VerdictFailed(
            f"the audit is broken at row {verdict['broken_at']}: it, or one before it, is not what was written",
            hint=f"osqbox audit --after {max(0, verdict['broken_at'] - 2)} --limit 3 --json",
        )
    if not as_json:
        click.echo(f"{count(verdict['rows'], 'row')} unbroken up to {verdict['last_seq']}, chain {verdict['chain']}")


def _as_text(row: dict[str, Any]) -> str:
    at = moment(row["at"])
    serial = f"  serial {row['serial']}" if row["serial"] else ""
    address = f"  from {row['address']}" if row["address"] else ""
    facts = " ".join(f"{name}={value if isinstance(value, str) else _json(value)}" for name, value in _told(row))
    who = row["actor"] or "nobody"
    words = (at, who, row["action"], row["subject"], row["result"])
    return printable("  ".join(word for word in words if word) + serial + address + (f"  {facts}" if facts else ""))


def _told(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in row["data"].items() if value not in (None, "", [], {})]


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
