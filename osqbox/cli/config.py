"""``osqbox config``: what the hosts are told to do, where each part of it comes from, and back to what it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, json_option, moment, print_json, print_table, printable, quiet_pipe, tell
from osqbox.client import at
from osqbox.errors import BadSetup, BadUsage

if TYPE_CHECKING:
    from osqbox.osquery.amalgamate import Source
    from osqbox.osquery.sqlcheck import SqlChecker

KINDS = ("tenants", "tags", "platforms", "nodes")
STDIN_BYTES = 4 * 1024 * 1024

_PATH = click.Path(path_type=Path)


@click.group("config", cls=Listing)
def command() -> None:
    """Config sources, which the box merges into one config per node. Without a verb: list them."""


@command.command("list")
@json_option
@box_options
def list_sources(box: Where, as_json: bool) -> None:
    """List the sources."""
    sources = box.client.get("configs")
    if as_json:
        print_json(sources)
        return
    print_table(
        ("NAME", "VERSION", "ORIGIN", "FOR", "PRIORITY", "CHANGED", "NOTE"),
        [
            (
                source["name"],
                source["version"],
                "removed" if source.get("removed") else source["origin"],
                _audience(source["target"]),
                source["priority"],
                moment(source["changed_at"]),
                source.get("note"),
            )
            for source in sources
        ],
        empty="no config sources; add one with: osqbox config put NAME FILE",
    )


def _audience(target: Mapping[str, Any]) -> str:
    return "; ".join(f"{kind} {', '.join(target[kind])}" for kind in KINDS if target.get(kind)) or "everybody"


@command.command()
@click.argument("name")
@click.option("--version", type=int, help="That one instead of the current.")
@json_option
@box_options
def show(name: str, version: int | None, box: Where, as_json: bool) -> None:
    """Print a source's content.

    With --json also what is known about it.
    """
    versions = box.client.get(at("configs", name))
    wanted = [each for each in versions if (each["version"] == version if version else each["current"])]
    if not wanted:
        raise BadUsage(f"config source {name!r} has no version {version}", hint=f"osqbox config versions {name}")
    with quiet_pipe():
        print_json(wanted[0] if as_json else wanted[0]["content"])


@command.command()
@click.argument("name")
@json_option
@box_options
def versions(name: str, box: Where, as_json: bool) -> None:
    """List the kept versions of a source, the newest first."""
    found = box.client.get(at("configs", name))
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        print_table(
            ("VERSION", "CURRENT", "CHANGED", "FOR", "PRIORITY", "NOTE"),
            [
                (
                    each["version"],
                    "*" if each["current"] else "",
                    moment(each["changed_at"]),
                    "nobody (removed)" if each["content"] is None else _audience(each["target"]),
                    each["priority"],
                    each["note"],
                )
                for each in found
            ],
            empty="no versions",
        )


@command.command()
@click.argument("name")
@click.argument("file", metavar="FILE|-")
@click.option("--tenant", "tenants", multiple=True, help="Only for nodes of this tenant; repeatable.")
@click.option("--tag", "tags", multiple=True, help="Only for nodes with this tag; repeatable.")
@click.option("--platform", "platforms", multiple=True, help="Only for this platform; repeatable.")
@click.option("--node", "nodes", multiple=True, help="Only for this node, * and ? allowed; repeatable.")
@click.option("--priority", type=int, help="Among equally specific sources the higher wins.")
@click.option("--note", help="Why; kept with the version.")
@click.option("--force", is_flag=True, help="Even if some SQL looks wrong.")
@json_option
@box_options
def put(
    name: str, file: str, priority: int | None, note: str | None, force: bool, as_json: bool, box: Where, **target: Any
) -> None:
    """Serve FILE as the newest version of a source.

    JSON with comments, YAML, packs and Fleet documents are read; packs that a file points to become part of it. Of -
    JSON is read from stdin.
    """
    body = _body(_from_stdin() if file == "-" else _from_file(Path(file)), target, priority, note)
    done = box.client.put(at("configs", name), body, force=force or None)
    if as_json:
        print_json(done)
        return
    tell(f"{name}: version {done['version']}")
    for problem in done.get("problems") or ():
        tell(f"{printable(problem.get('severity'))}: {printable(problem.get('path'))}: {printable(problem['message'])}")


def _from_stdin() -> dict[str, Any]:
    try:
        return {"content": json.loads(sys.stdin.read(STDIN_BYTES))}
    except ValueError as error:
        raise BadSetup(f"stdin: expected a JSON config, got: {error}") from None


def _from_file(path: Path) -> dict[str, Any]:
    from osqbox.osquery.sources import load_source

    source = load_source(path)
    target = {kind: list(names) for kind in KINDS if (names := getattr(source.target, kind))}
    more = {"target": target, "priority": source.priority}
    return {"content": source.content, **{name: value for name, value in more.items() if value}}


def _body(source: dict[str, Any], target: dict[str, Any], priority: int | None, note: str | None) -> dict[str, Any]:
    """Options beat what the file itself says about its audience."""
    asked = {kind: list(names) for kind, names in target.items() if names}
    more: dict[str, Any] = {"target": asked} if asked else {}
    more |= {name: value for name, value in (("priority", priority), ("note", note)) if value is not None}
    return source | more


@command.command()
@click.argument("name")
@box_options
def delete(name: str, box: Where) -> None:
    """Stop serving a source; its versions stay for a rollback."""
    box.client.delete(at("configs", name))
    tell(f"{name}: no longer served; osqbox config rollback {name}")


@command.command()
@click.argument("name")
@click.option("--to", type=int, metavar="VERSION", help="That version instead of the one before.")
@json_option
@box_options
def rollback(name: str, to: int | None, box: Where, as_json: bool) -> None:
    """Serve an older version again."""
    done = box.client.post(at("configs", name, "rollback"), {} if to is None else {"to": to})
    if as_json:
        print_json(done)
    else:
        tell(f"{name}: version {done['version']}")


@command.command()
@click.argument("node")
@box_options
def get(node: str, box: Where) -> None:
    """Print the config that a node gets."""
    served = box.client.get(at("nodes", node, "config"))
    with quiet_pipe():
        print_json(served["config"])


@command.command()
@click.argument("node")
@json_option
@box_options
def explain(node: str, box: Where, as_json: bool) -> None:
    """Say where each value of a node's config comes from.

    Also which sources it beat.
    """
    parts = box.client.get(at("nodes", node, "config"))["explain"]
    with quiet_pipe():
        if as_json:
            print_json(parts)
            return
        print_table(
            ("KEY", "VALUE", "SOURCE", "VERSION", "BEAT"),
            [
                (part["key"], _short(part["value"]), part["source"], part["version"], _beaten(part.get("overrode")))
                for part in parts
            ],
            empty="an empty config; add a source with: osqbox config put NAME FILE",
        )


def _short(value: Any, limit: int = 60) -> str:
    text = printable(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _beaten(overrode: Any) -> str:
    others = overrode if isinstance(overrode, list) else []
    return ", ".join(str(each.get("source", each)) if isinstance(each, dict) else str(each) for each in others)


@command.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_PATH)
@json_option
def validate(files: tuple[Path, ...], as_json: bool) -> None:
    """Check config files; needs no box.

    Structure, options, and every query against osquery's schema.

    The exit code is 3 when there is an error; warnings leave it 0.
    """
    from osqbox.osquery.sqlcheck import SqlChecker

    checker = SqlChecker()
    found = {path: list(_problems(path, checker)) for path in files}
    problems = [problem for each in found.values() for problem in each]
    if as_json:
        print_json(problems)
    else:
        for path, each in found.items():
            _print_problems(path, each)
    if any(problem["severity"] == "error" for problem in problems):
        raise click.exceptions.Exit(BadSetup.exit_code)


def _problems(path: Path, checker: SqlChecker) -> Iterator[dict[str, str]]:
    from osqbox.osquery.amalgamate import dotted
    from osqbox.osquery.sources import load_source
    from osqbox.osquery.sqlcheck import validate

    try:
        source: Source = load_source(path)
    except BadSetup as error:
        message = str(error).removeprefix(f"{path}:").strip()
        yield {"file": str(path), "path": "", "severity": "error", "message": message}
        return
    for problem in validate(source.content, checker):
        yield {
            "file": str(path),
            "path": dotted(problem.path),
            "severity": problem.severity,
            "message": problem.message,
        }


def _print_problems(path: Path, problems: Iterable[dict[str, str]]) -> None:
    text = [f"{each['severity']}: {each['path'] + ': ' if each['path'] else ''}{each['message']}" for each in problems]
    for line in text or ["ok"]:
        click.echo(f"{printable(str(path))}: {printable(line)}")
