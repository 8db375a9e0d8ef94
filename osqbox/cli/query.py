"""``osqbox query``: ask live hosts with SQL, and see every answer as it comes."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import (
    GrowingTable,
    ago,
    count,
    json_option,
    print_json,
    print_json_line,
    print_table,
    printable,
    quiet_pipe,
    tell,
)
from osqbox.client import Client, at
from osqbox.errors import BadUsage, UserError

ACCOUNT = ("node", "hostname", "status", "rows", "message")
SUMMARY = ("targets", "answered", "failed", "expired", "cancelled", "first_ms", "last_ms")
LISTED_CAMPAIGNS = 20
NAMED_HOSTS = 5
SQL_BYTES = 1024 * 1024


@click.command("query")
@click.argument("sql", required=False)
@click.option("--node", "nodes", multiple=True, metavar="NODE", help="Ask this node; repeatable.")
@click.option("--tag", "tags", multiple=True, help="Ask nodes with this tag; repeatable.")
@click.option("--platform", "platforms", multiple=True, help="Ask nodes of this platform; repeatable.")
@click.option("--tenant", help="Ask only nodes of this tenant.")
@click.option("--all", "everyone", is_flag=True, help="Also nodes not heard of lately, until the time is over.")
@click.option("--timeout", "timeout_s", type=float, default=60.0, show_default=True, metavar="SECONDS")
@click.option(
    "--accelerate", type=click.IntRange(1), metavar="SECONDS", help="Have the nodes ask more often for so long."
)
@click.option("--discovery", metavar="SQL", help="Only nodes where this has a row run the query.")
@click.option("--no-wait", is_flag=True, help="Print the campaign and leave.")
@click.option("--list", "list_all", is_flag=True, help="List the latest campaigns instead.")
@click.option("--show", metavar="ID", help="Print what came for a campaign, or for the latest, instead.")
@json_option
@box_options
def command(
    sql: str | None,
    list_all: bool,
    show: str | None,
    no_wait: bool,
    as_json: bool,
    box: Where,
    **order: Any,
) -> None:
    """Ask live hosts. SQL of - is read from stdin.

    Without --node, --tag or --platform every active node that is reachable is asked. The exit code is 0 when all
    answered, 1 when any failed, did not answer in time, or none was asked.

    \b
    Examples:
      osqbox query "SELECT name, version FROM os_version"
      osqbox query --tag web --json "SELECT * FROM listening_ports" | jq .hostname
      osqbox query --show latest
    """  # fmt: skip
    if sum((sql is not None, list_all, show is not None)) != 1:
        raise BadUsage("expected one of SQL, --list or --show", hint='osqbox query "SELECT * FROM osquery_info"')
    with quiet_pipe():
        if list_all:
            _list(box.client, as_json)
        elif show is not None:
            _show(box.client, show, as_json)
        else:
            _ask(box.client, _sql(sql or ""), order, as_json, wait=not no_wait)


def _sql(given: str) -> str:
    if given != "-":
        return given
    text = sys.stdin.read(SQL_BYTES + 1)
    if len(text) > SQL_BYTES:
        raise BadUsage(f"SQL on stdin: expected at most {SQL_BYTES} characters")
    return text


def start(client: Client, sql: str, order: dict[str, Any]) -> dict[str, Any]:
    """Post a campaign; ``order`` has the members of the API, None and empty ones left out. Raises UserError."""
    wanted = {("all" if name == "everyone" else name): value for name, value in order.items() if value}
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
    campaign: dict[str, Any] = client.post("campaigns", {"sql": sql, **wanted})
    return campaign


def _ask(client: Client, sql: str, order: dict[str, Any], as_json: bool, *, wait: bool) -> None:
    if order["timeout_s"] <= 0:
        raise BadUsage(f"--timeout: expected more than 0 seconds, got {order['timeout_s']:g}")
    campaign = start(client, sql, order)
    if not campaign["summary"]["targets"]:
        if as_json:
            print_json_line({"summary": _pick(campaign["summary"], SUMMARY)})
        _refuse_nobody(order)
    if not wait:
        _print_started(campaign, as_json)
        return
    summary = _follow(client, campaign, as_json)
    if summary["answered"] < summary["targets"]:
        raise click.exceptions.Exit(1)


def _refuse_nobody(order: dict[str, Any]) -> None:
    if any(order[kind] for kind in ("nodes", "tags", "platforms", "everyone")):
        raise UserError("nobody was asked: no active node fits", hint="osqbox nodes")
    raise UserError(
        "nobody was asked: no active node was heard of lately", hint="osqbox query --all SQL, or osqbox nodes"
    )


def _print_started(campaign: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(campaign)
    else:
        click.echo(campaign["id"])
        tell(f"asked {count(campaign['summary']['targets'], 'node')}; osqbox query --show {campaign['id']}")


def _follow(client: Client, campaign: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Print the accounts of a campaign until its summary comes, which is returned."""
    report = _JsonReport() if as_json else _TextReport()
    path = at("campaigns", campaign["id"])
    with _ctrl_c_cancels(client, path):
        try:
            for item in client.lines(f"{path}/stream"):
                if "summary" in item:
                    report.end(item["summary"])
                    summary: dict[str, Any] = item["summary"]
                    return summary
                report.add(item)
        except BrokenPipeError:
            with contextlib.suppress(UserError):
                client.post(f"{path}/cancel")
            raise
    raise UserError("the box ended before the last answer", hint=f"osqbox query --show {campaign['id']}")


@contextlib.contextmanager
def _ctrl_c_cancels(client: Client, path: str) -> Iterator[None]:
    """The first Ctrl-C ends the campaign, whose last accounts then come as ever; a second ends the verb at once."""
    cancelled = False

    def cancel(*_: Any) -> None:
        nonlocal cancelled
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tell("\ncancelling ...")
        cancelled = True
        client.post(f"{path}/cancel")

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if cancelled:
        raise click.exceptions.Exit(130)


class _JsonReport:
    """One account per line, then the summary."""

    def add(self, account: dict[str, Any]) -> None:
        print_json_line(_pick(account, ACCOUNT))

    def end(self, summary: dict[str, Any]) -> None:
        print_json_line({"summary": _pick(summary, SUMMARY)})


def _pick(facts: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: facts.get(name) for name in names}


class _TextReport:
    """Rows as they come, in one table as long as their columns agree; then who has none, and why."""

    def __init__(self) -> None:
        self._table = GrowingTable()
        self._notes: dict[tuple[str, str], list[str]] = {}
        self._rows = 0

    def add(self, account: dict[str, Any]) -> None:
        rows, hostname = account.get("rows") or [], account.get("hostname") or account["node"]
        self._rows += len(rows)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        self._table.add(("hostname", *columns), [(hostname, *(row.get(name) for name in columns)) for row in rows])
        if account["status"] != "answered" or account.get("message"):
            note = (account["status"], account.get("message") or "")
            self._notes.setdefault(note, []).append(hostname)

    def end(self, summary: dict[str, Any]) -> None:
        sys.stdout.flush()
        for (status, message), hostnames in self._notes.items():
            more = f" and {len(hostnames) - NAMED_HOSTS} more" if len(hostnames) > NAMED_HOSTS else ""
            names = ", ".join(map(printable, hostnames[:NAMED_HOSTS]))
            tell(f"{status}: {names}{more}" + (f": {printable(message)}" if message else ""))
        tell(f"{count(self._rows, 'row')}; {_in_words(summary)}")


def _in_words(summary: dict[str, Any]) -> str:
    words = [f"{summary['answered']} of {count(summary['targets'], 'node')} answered"]
    words += [f"{summary[name]} {name}" for name in ("failed", "expired", "cancelled", "open") if summary.get(name)]
    if summary.get("first_ms") is not None:
        words.append(f"first after {summary['first_ms']:.0f} ms, last after {summary['last_ms']:.0f} ms")
    return ", ".join(words)


def _list(client: Client, as_json: bool) -> None:
    campaigns = client.get("campaigns", limit=LISTED_CAMPAIGNS)
    if as_json:
        print_json(campaigns)
        return
    import time

    now = time.time()
    print_table(
        ("ID", "STARTED", "NODES", "ANSWERED", "FAILED", "EXPIRED", "OPEN", "SQL"),
        [
            (
                campaign["id"],
                ago(campaign["created_at"], now),
                *(campaign["summary"].get(name) for name in ("targets", "answered", "failed", "expired", "open")),
                " ".join(campaign["sql"].split())[:80],
            )
            for campaign in campaigns
        ],
        empty="no campaigns yet",
    )


def _show(client: Client, wanted: str, as_json: bool) -> None:
    campaign = client.get(at("campaigns", wanted))
    report = _JsonReport() if as_json else _TextReport()
    for account in client.get(at("campaigns", campaign["id"], "results"), after=0):
        report.add(account)
    for target in campaign.get("open") or ():
        report.add({**target, "rows": [], "message": "not answered yet"})
    report.end(campaign["summary"])
