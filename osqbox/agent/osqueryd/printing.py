"""A shell's results as text, byte for byte as osqueryi prints them (devtools/{shell,printer}.cpp). Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Rows = Sequence[Mapping[str, str]]

MODES = ("pretty", "json", "json_pretty", "csv", "line", "list", "column")
_MIN_COLUMN_WIDTH = 10
_MIN_LABEL_WIDTH = 5


@dataclass(slots=True)
class Style:
    """How results are shown; meta commands change it."""

    mode: str = "pretty"
    header: bool = True
    separator: str = "|"


def shown(rows: Rows, columns: Sequence[str], style: Style) -> str:
    """The text for one query's result."""
    printers: dict[str, Callable[[], str]] = {
        "json": lambda: json_text(rows),
        "json_pretty": lambda: json_pretty_text(rows),
        "pretty": lambda: pretty_text(rows, columns),
        "csv": lambda: _csv(rows, columns, style),
        "line": lambda: _lines(rows, columns),
        "list": lambda: _list(rows, columns, style),
        "column": lambda: _columns(rows, columns, style),
    }
    return printers[style.mode]()


def json_text(rows: Rows) -> str:
    """``[\\n  {row},\\n  {row}\\n]\\n``: keys alphabetical, values strings."""
    return "[\n" + ",\n".join(f"  {_compact(row)}" for row in rows) + "\n]\n"


def json_pretty_text(rows: Rows) -> str:
    """RapidJSON's PrettyWriter, four spaces."""
    if not rows:
        return "[]\n"
    return json.dumps([dict(sorted(row.items())) for row in rows], ensure_ascii=False, indent=4) + "\n"


def _compact(row: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(row.items())), ensure_ascii=False, separators=(",", ":"))


def pretty_text(rows: Rows, columns: Sequence[str]) -> str:
    """The boxed table; nothing at all for no rows."""
    if not rows:
        return ""
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns}
    rule = "+" + "".join("-" * (widths[name] + 2) + "+" for name in columns) + "\n"

    def line(cells: Mapping[str, str]) -> str:
        return "|" + "".join(f" {cells.get(name, ''):<{widths[name]}} |" for name in columns) + "\n"

    return rule + line({name: name for name in columns}) + rule + "".join(map(line, rows)) + rule


def _csv(rows: Rows, columns: Sequence[str], style: Style) -> str:
    def line(values: Sequence[str]) -> str:
        return style.separator.join(_quoted(value, style.separator) for value in values) + "\n"

    return _with_header(rows, columns, style, line)


def _quoted(text: str, separator: str) -> str:
    """SQLite's rule: quoted when empty, or with a control, a blank, a quote, or anything past ASCII in it."""
    plain = text and separator not in text and all("!" <= letter <= "~" and letter not in "\"'" for letter in text)
    return text if plain else '"' + text.replace('"', '""') + '"'


def _list(rows: Rows, columns: Sequence[str], style: Style) -> str:
    return _with_header(rows, columns, style, lambda values: style.separator.join(values) + "\n")


def _with_header(rows: Rows, columns: Sequence[str], style: Style, line: Callable[[Sequence[str]], str]) -> str:
    """A header comes with the first row: no rows, no header."""
    if not rows:
        return ""
    head = line(columns) if style.header else ""
    return head + "".join(line([row.get(name, "") for name in columns]) for row in rows)


def _lines(rows: Rows, columns: Sequence[str]) -> str:
    width = max([_MIN_LABEL_WIDTH, *map(len, columns)])
    return "\n".join("".join(f"{name:>{width}} = {row.get(name, '')}\n" for name in columns) for row in rows)


def _columns(rows: Rows, columns: Sequence[str], style: Style) -> str:
    """Widths come from the names and the first row; longer values are cut."""
    if not rows:
        return ""
    widths = [max(_MIN_COLUMN_WIDTH, len(name), len(rows[0].get(name, ""))) for name in columns]

    def line(values: Sequence[str]) -> str:
        return "  ".join(f"{value[:width]:<{width}}" for value, width in zip(values, widths, strict=True)) + "\n"

    head = line(columns) + line(["-" * width for width in widths]) if style.header else ""
    return head + "".join(line([row.get(name, "") for name in columns]) for row in rows)
