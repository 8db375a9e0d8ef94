"""``osqueryd -S``: SQL from the command line, from a file, from standard input or typed at a prompt."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from osqbox.agent.messages import VERSION
from osqbox.agent.osqueryd.commandline import CommandLine
from osqbox.agent.osqueryd.database import Database
from osqbox.agent.osqueryd.printing import MODES, Style, shown
from osqbox.agent.sql import QueryResult
from osqbox.schema import load_schema

PROMPT, CONTINUATION = "osquery> ", "    ...> "
_CODES = {"constraint failed": 19, "interrupted": 9}
"""SQLite's codes where the text tells them; every other failure is 1."""
_EXIT = -1

_HELP = """Welcome to the osquery shell of osqbox.

.all [TABLE]     Select all from a table
.bail ON|OFF     Stop after hitting an error
.echo ON|OFF     Turn command echo on or off
.exit            Exit this program
.features        List osquery's features and their statuses
.headers ON|OFF  Turn display of headers on or off
.help            Show this message
.mode MODE       Set output mode: column, csv, json, json_pretty, line, list, pretty
.print STR...    Print literal STRING
.quit            Exit this program
.schema [TABLE]  Show the CREATE statements
.separator STR   Change separator used by output mode
.show            Show the current values for various settings
.socket          Show the osquery extensions socket path
.tables [TABLE]  List names of tables
.version         Show the version
"""


def run_shell(line: CommandLine, database: Database, source: IO[str], sink: IO[str], errors: IO[str]) -> int:
    """Run what the command line asks for, else what ``source`` brings; returns the exit code."""
    shell = Shell(line, database, _style(line), sink, errors)
    if line.true("L"):
        return shell.command(".tables")
    if line.text("A"):
        return shell.run(f"SELECT * FROM {line.text('A')}")
    if line.text("pack"):
        return shell.pack(line.text("pack"))
    asked = _asked(line)
    if asked is not None:
        return shell.command(asked) if asked.startswith(".") else shell.run(asked)
    return shell.typed() if source.isatty() else shell.read(source)


def _asked(line: CommandLine) -> str | None:
    """The SQL the command line holds or names. Raises OSError for a file that cannot be read."""
    if line.text("query"):
        return line.text("query")
    if line.text("query_file"):
        return Path(line.text("query_file")).read_text(encoding="utf-8")
    return line.words[0] if line.words else None


def _style(line: CommandLine) -> Style:
    """The first of these flags wins, in upstream's order."""
    style = Style(header=line.true("header"), separator=line.text("separator"))
    for mode in ("list", "line", "csv", "json_pretty", "json"):
        if line.true(mode):
            style.mode = mode
            break
    if style.mode == "csv" and not line.is_given("separator"):
        style.separator = ","
    return style


@dataclass(slots=True)
class Shell:
    line: CommandLine
    database: Database
    style: Style
    sink: IO[str]
    errors: IO[str]
    bail: bool = False
    echo: bool = False
    _failures: int = field(default=0, init=False)

    def run(self, sql: str, prefix: str = "Error:") -> int:
        """Run SQL and show it; the exit code is SQLite's."""
        if self.echo:
            self._say(f"{sql}\n")
        if self.style.mode in ("pretty", "json", "json_pretty"):  # one table, whatever the number of statements
            return self._show_result(sql, prefix)
        return next(filter(None, (self._show_result(each, prefix) for each in _statements(sql))), 0)

    def _show_result(self, sql: str, prefix: str) -> int:
        result = self.database.query(sql)
        for warning in result.warnings:
            self._complain(f"Warning: {warning}")
        self._say(shown(result.rows, result.columns, self.style))
        if not result.status:
            return 0
        self._complain(f"{prefix} {result.message}")
        return _code(result)

    def pack(self, name: str) -> int:
        """Run every query of a pack of the config."""
        from osqbox.agent.osqueryd.configs import pack_queries

        for query_name, sql in pack_queries(self.line.text("config_path"), name):
            code = self.run(sql)
            if code:
                self._complain(f"Could not execute query {query_name}: {sql}")
                return code
        return 0

    # -- input ---------------------------------------------------------------------------------------------------

    def read(self, source: Iterable[str]) -> int:
        """Statements from a file or pipe; 1 if any failed."""
        self._feed(source, interactive=False)
        return int(self._failures > 0)

    def typed(self) -> int:
        """The prompt."""
        with suppress(ImportError):
            import readline  # noqa: F401 - input() then edits and remembers lines
        self._say("Using a virtual database. Need help, type '.help'\n")
        signal.signal(signal.SIGINT, lambda *_: self.database.interrupt())
        self._feed(self._prompted(), interactive=True)
        return int(self._failures > 0)

    def _prompted(self) -> Iterable[str]:
        while True:
            try:
                yield input(CONTINUATION if self._unfinished else PROMPT) + "\n"
            except EOFError:
                self._say("\n")
                return

    _unfinished: bool = field(default=False, init=False)

    def _feed(self, lines: Iterable[str], *, interactive: bool) -> None:
        import apsw

        pending, first = "", 0
        for number, text in enumerate(lines, 1):
            if not pending and not text.strip():
                continue
            if not pending and text.startswith("."):
                code = self.command(text.strip())
                if code == _EXIT:
                    return
                self._failures += code != 0
            else:
                first = first if pending else number
                pending += text
                if ";" in text and apsw.complete(pending):
                    self._statement(pending, first, interactive=interactive)
                    pending = ""
            self._unfinished = bool(pending)
            if self._failures and self.bail and not interactive:
                return
        if pending.strip():
            self._statement(pending, first, interactive=interactive)

    def _statement(self, sql: str, line: int, *, interactive: bool) -> None:
        code = self.run(sql.strip(), "Error:" if interactive else f"Error: near line {line}:")
        self._failures += code != 0

    # -- meta commands -------------------------------------------------------------------------------------------

    def command(self, text: str) -> int:
        """One ``.command``; 0, 1 for a wrong one, or the sign to leave."""
        try:
            name, *words = shlex.split(text[1:])
        except ValueError:
            name, words = "", []
        found = self._commands().get(name)
        if found is None:
            self._complain(f'Error: unknown command or invalid arguments:  "{name}". Enter ".help" for help')
            return 1
        return found(words)

    def _commands(self) -> dict[str, Callable[[list[str]], int]]:
        return {
            "all": lambda w: self.run(f"SELECT * FROM {w[0]}") if w else 1,
            "bail": lambda w: self._set("bail", w),
            "echo": lambda w: self._set("echo", w),
            "exit": lambda _: _EXIT,
            "features": self._features,
            "header": self._header,
            "headers": self._header,
            "help": lambda _: self._tell(_HELP),
            "list": self._tables,
            "mode": self._mode,
            "print": lambda w: self._tell(" ".join(w) + "\n"),
            "quit": lambda _: _EXIT,
            "schema": self._schema,
            "separator": self._separator,
            "show": self._show,
            "socket": lambda _: self._tell(self.line.text("extensions_socket") + "\n"),
            "summary": self._show,
            "tables": self._tables,
            "version": lambda _: self._tell(_version()),
        }

    def _set(self, name: str, words: list[str]) -> int:
        value = words[:1] != [] and words[0].lower() in ("on", "yes", "1", "true")
        if name == "bail":
            self.bail = value
        else:
            self.echo = value
        return 0

    def _header(self, words: list[str]) -> int:
        self.style.header = words[:1] != [] and words[0].lower() in ("on", "yes", "1", "true")
        return 0

    def _mode(self, words: list[str]) -> int:
        mode = {"lines": "line", "columns": "column"}.get(words[0], words[0]) if words else ""
        if mode not in MODES:
            self._complain(f"Error: mode should be one of: {' '.join(sorted(MODES))}")
            return 1
        self.style.mode = mode
        if mode == "csv":
            self.style.separator = ","
        return 0

    def _separator(self, words: list[str]) -> int:
        if not words:
            return 1
        self.style.separator = words[0].encode().decode("unicode_escape")
        return 0

    def _tables(self, words: list[str]) -> int:
        """Of the registry when it can be asked: tables of extensions are among them."""
        result = self.database.query("select name from osquery_registry where registry = 'table' order by name")
        names = [row["name"] for row in result.rows] or sorted(table.name for table in load_schema())
        start = words[0] if words else ""
        return self._tell("".join(f"  => {name}\n" for name in names if name.startswith(start)))

    def _schema(self, words: list[str]) -> int:
        start = words[0] if words else ""
        found = [table for table in load_schema() if table.name.startswith(start)]
        return self._tell("".join(f"{table.ddl};\n" for table in found))

    def _features(self, _words: list[str]) -> int:
        flags = self.database.query("select name, value from osquery_flags where type = 'bool' order by name").rows
        shown_flags = [row for row in flags if row["name"].startswith(("disable_", "enable_"))]
        return self._tell("".join(f"{row['name']}: {row['value']}\n" for row in shown_flags))

    def _show(self, _words: list[str]) -> int:
        settings = {
            "Flagfile": self.line.text("flagfile"),
            "Config": f"{self.line.text('config_plugin')} ({self.line.text('config_path')})",
            "Logger": self.line.text("logger_plugin"),
            "Distributed": self.line.text("distributed_plugin"),
            "Socket": self.line.text("extensions_socket"),
            "headers": "on" if self.style.header else "off",
            "mode": self.style.mode,
            "separator": f'"{self.style.separator}"',
        }
        return self._tell(_version() + "\n" + "".join(f"{name:>13}: {value}\n" for name, value in settings.items()))

    # -- output --------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.sink.write(text)
        self.sink.flush()

    def _tell(self, text: str) -> int:
        self._say(text)
        return 0

    def _complain(self, text: str) -> None:
        self.errors.write(text + "\n")
        self.errors.flush()


def _statements(sql: str) -> Iterator[str]:
    """One by one; what follows the last semicolon too, unless it is blank."""
    import apsw

    pending = ""
    for piece in sql.split(";"):
        pending += piece
        if apsw.complete(pending + ";"):
            if pending.strip():
                yield pending
            pending = ""
        else:
            pending += ";"
    if pending.strip(" \t\n;"):
        yield pending


def _code(result: QueryResult) -> int:
    return next((code for words, code in _CODES.items() if result.message.startswith(words)), 1)


def _version() -> str:
    import apsw

    return f"osquery {VERSION}\nusing SQLite {apsw.sqlite_lib_version()}\n"


def open_output(path: str) -> IO[str]:
    """Standard output, or the file --output names. Raises OSError."""
    return Path(path).open("w", encoding="utf-8") if path else sys.stdout
