"""What verbs print: tables for people, JSON for programs; nothing an agent sends can steer the terminal."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def printable(value: Any) -> str:
    """Text on one line: control, formatting and other invisible characters as ``\\x1b`` and the like."""
    text = "" if value is None else value if isinstance(value, str) else _compact(value)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode() for letter in text
    )


def _compact(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple | bool) else str(value)


def print_json(document: Any) -> None:
    """One JSON document, indented. ASCII only, so it prints under any locale."""
    click.echo(json.dumps(document, indent=2))


def print_json_line(document: Any) -> None:
    """One JSON value on one line, flushed."""
    click.echo(json.dumps(document, separators=(",", ":")))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """A table on stdout; ``empty`` on stderr when there are no rows."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        tell(empty)
        return
    from tabulate import tabulate

    table = tabulate(cells, headers, tablefmt="plain", disable_numparse=True)
    head, _, body = table.partition("\n")
    click.echo(_styled(head, bold=True) + "\n" + "\n".join(line.rstrip() for line in body.split("\n")))


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one per line."""
    lines = [(name, printable(value)) for name, value in facts]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        click.echo(f"{name:{width}}  {value}".rstrip())


def tell(text: str) -> None:
    """A sentence for a person, on stderr."""
    click.echo(text, err=True)


def _styled(text: str, **style: Any) -> str:
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, **style) if wanted else text


class GrowingTable:
    """A table whose rows are printed as they come: columns widen when they must, and never narrow again."""

    def __init__(self) -> None:
        self._headers: tuple[str, ...] = ()
        self._widths: list[int] = []

    def add(self, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print rows, under a new head when their columns are not those of the rows before."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if not cells:
            return
        titles = tuple(printable(header) for header in headers)
        is_new = titles != self._headers
        if is_new:
            if self._headers:
                click.echo()
            self._headers, self._widths = titles, [0] * len(titles)
        for row in (titles, *cells):
            self._widths = [max(width, _columns(cell)) for width, cell in zip(self._widths, row, strict=True)]
        if is_new:
            click.echo(_styled(self._line(titles), bold=True))
        for row in cells:
            click.echo(self._line(row))

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell + " " * (width - _columns(cell)) for cell, width in zip(cells, self._widths, strict=True))
        return "  ".join(padded).rstrip()


def _columns(text: str) -> int:
    """How many terminal columns a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) != 0 for letter in text)


def ago(moment: str | None, now: float) -> str:
    """An RFC 3339 time as ``12 s ago``; a time the box did not tell as ``never``."""
    if not moment:
        return "never"
    age_s = max(0.0, now - dt.datetime.fromisoformat(moment).timestamp())
    return f"{span(age_s)} ago"


def moment(at: str | None, otherwise: str = "") -> str:
    """An RFC 3339 time as ``2026-01-31 12:00:00``, in UTC as it was; ``otherwise`` where the box did not tell one."""
    return at[:19].replace("T", " ") if at else otherwise


def span(seconds: float) -> str:
    """``5400`` as ``1 h``: the largest unit that fits."""
    size, unit = next((each for each in _AGES if seconds >= each[0]), _AGES[-1])
    return f"{int(seconds // size)} {unit}"


def count(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """A reader that has had enough, such as ``head``, ends the verb in peace."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(0) from None


class Listing(click.Group):
    """A group whose bare name, with or without options, means its ``list`` verb."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        records = [record for option in self.commands["list"].params if (record := option.get_help_record(ctx))]
        with formatter.section("Options of list"):
            formatter.write_dl(records)
