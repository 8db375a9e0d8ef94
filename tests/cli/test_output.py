"""What is printed: safe for a terminal, readable as a table."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from osqbox.cli.output import GrowingTable, ago, count, print_json, print_table, printable, span


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain ü 漢字", "plain ü 漢字"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b2J", "\\x9b2J"),
        ("file\u202egpj.exe", "file\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("half \ud800 pair", "half \\ud800 pair"),
        (None, ""),
        (7, "7"),
        (True, "true"),
        (["a", "b"], "a, b"),
        ({"a": [1]}, '{"a": [1]}'),
    ],
)
def test_printable(given: object, shown: str) -> None:
    """Nothing an agent sends moves the cursor, hides text or breaks a line."""
    assert printable(given) == shown


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_table_keeps_values_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """No number is reformatted."""
    print_table(("A", "B"), [("007", "1e5"), ("1.10", None)], empty="")
    assert [line.split() for line in printed(capsys)] == [["A", "B"], ["007", "1e5"], ["1.10"]]


def test_an_empty_table_is_a_sentence_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe then gets nothing."""
    print_table(("A",), [], empty="nothing yet")
    assert capsys.readouterr() == ("", "nothing yet\n")


def test_a_growing_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns widen, a new head only comes with other columns, wide letters count twice."""
    table = GrowingTable()
    table.add(("host", "a"), [("h1", "x"), ("h2", "漢字")])
    table.add(("host", "a"), [])
    table.add(("host", "a"), [("a-longer-name", "y")])
    table.add(("host", "b"), [("h1", "\x1b")])
    assert printed(capsys) == [
        "host  a",
        "h1    x",
        "h2    漢字",
        "a-longer-name  y",
        "",
        "host  b",
        "h1    \\x1b",
    ]


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints under any locale, half surrogate pairs included."""
    print_json({"a": "ü\ud800\x1b"})
    assert capsys.readouterr().out.isascii()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (5400, "1 h"), (200_000, "2 d")]
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_ago() -> None:
    assert ago("1970-01-01T00:01:00.000000Z", 62) == "2 s ago"
    assert ago("1970-01-01T00:01:00Z", 0) == "0 s ago"
    assert ago(None, 0) == "never"
    assert (count(1, "node"), count(0, "node")) == ("1 node", "0 nodes")


def test_a_reader_that_leaves_ends_a_verb_in_peace() -> None:
    """As in ``osqbox logs | head -1``: no traceback, no complaint at exit."""
    program = (
        "from osqbox.cli.output import quiet_pipe, print_json_line\n"
        "import click\n"
        "@click.command()\n"
        "def verb():\n"
        "    with quiet_pipe():\n"
        "        while True: print_json_line({'a': 'x' * 1000})\n"
        "verb()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


def test_no_colour_without_a_terminal() -> None:
    """A file of results has no escapes in it."""
    import click

    @click.command()
    def verb() -> None:
        print_table(("A",), [("b",)], empty="")

    assert "\x1b" not in CliRunner().invoke(verb, color=True).output
