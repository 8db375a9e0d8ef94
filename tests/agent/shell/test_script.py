"""The scripted shell without a loop: what is typed, what it says."""

from __future__ import annotations

import pytest

from osqbox.agent.shell.script import MAX_LINE_LETTERS, Console, Script, read_script
from osqbox.errors import BadSetup
from osqbox.shell_frames import Size

PLAIN = Script(prompt="> ")


def console(script: Script = PLAIN) -> Console:
    found = Console(script, "web-1", Size(80, 24))
    found.take()
    return found


def said(typed: bytes, script: Script = PLAIN) -> str:
    shell = console(script)
    shell.type(typed)
    return shell.take().decode()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("whoami", "root\r\n"),
        ("hostname", "web-1\r\n"),
        ("pwd", "/root\r\n"),
        ("cd /etc; pwd", None),
        ("echo  a 'b  c'", "a b  c\r\n"),
        ("stty size", "24 80\r\n"),
        ("nonsense --now", "nonsense: command not found\r\n"),
        ("echo 'open", "sh: syntax error: unterminated quoted string\r\n"),
        ("", ""),
        ("   ", ""),
        ("# only a comment", ""),
    ],
)
def test_its_own_commands(line: str, answer: str | None) -> None:
    if answer is not None:
        assert said(line.encode() + b"\r") == f"{line}\r\n{answer}> "


def test_exit_codes_are_kept_and_given() -> None:
    shell = console()
    shell.type(b"false\recho $?\rnope\recho $?\rexit 7\r")
    assert "1\r\n> nope" in (text := shell.take().decode())
    assert "127\r\n> exit 7\r\n" in text
    assert shell.exit_code == 7


def test_what_is_typed_after_exit_is_not_run() -> None:
    shell = console()
    shell.type(b"exit 3\recho still here\r")
    assert shell.take().decode() == "exit 3\r\n"
    assert shell.exit_code == 3


def test_the_prompt_names_user_host_and_place() -> None:
    shell = Console(Script(user="ana"), "db-7", Size(80, 24))
    assert shell.take() == b"ana@db-7:~# "
    shell.type(b"cd ../..\rcd etc\r")
    assert shell.take().endswith(b"ana@db-7:/etc# ")


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (b"ab\x7fc\r", "ab\b \bc\r\nac: command not found\r\n> "),
        (b"\x7f\x7f", ""),
        ("日\x7f".encode(), "日\b \b\b \b"),
        (b"echo x\x15pwd\r", "echo x" + "\b \b" * 6 + "pwd\r\n/root\r\n> "),
        (b"echo one two\x17three\r", "echo one two" + "\b \b" * 3 + "three\r\none three\r\n> "),
        (b"half a line\x03", "half a line^C\r\n> "),
        (b"\x1b[A\x1b[1;5C\x1bOHpwd\r", "pwd\r\n/root\r\n> "),
        (b"\x00\x01\x1fpwd\r\n", "pwd\r\n/root\r\n> "),
        (b"ab\x0c", "ab\x1b[H\x1b[2J> ab"),
    ],
)
def test_editing(typed: bytes, shown: str) -> None:
    assert said(typed) == shown


def test_a_character_split_between_two_pieces_is_one() -> None:
    shell = console()
    for byte in "é".encode():
        shell.type(bytes([byte]))
    assert shell.take().decode() == "é"


def test_end_of_input_exits_only_on_an_empty_line() -> None:
    shell = console()
    shell.type(b"x\x04")
    assert shell.exit_code is None
    shell.type(b"\x7f\x04")
    assert shell.exit_code == 0
    assert shell.take().decode() == "x\b \bexit\r\n"


def test_a_line_is_bounded() -> None:
    assert said(b"x" * (MAX_LINE_LETTERS + 3)).count("\a") == 3


SCRIPT = """
prompt: "$hostname% "
banner: "Welcome to $hostname, $user.\\n"
user: ana
files: [b.txt, a.txt]
unknown: "what is $word?\\n"
answers:
  - match: "uname( -a)?"
    output: "Linux $hostname 6.8.0\\n"
  - match: "cat (?P<file>\\\\S+)"
    output: "cat: $file: no\\n"
    exit_code: 1
  - {match: slow, output: "at last\\n", delay_s: 5}
  - {match: "(a|aa)+", output: "never"}
"""


def test_a_file_gives_prompt_answers_and_codes() -> None:
    shell = Console(read_script(SCRIPT), "web-1", Size(80, 24))
    assert shell.take().decode() == "Welcome to web-1, ana.\r\nweb-1% "
    shell.type(b"uname -a\rcat /etc/x\recho $?\rls\rwhoami\rdance\r")
    lines = shell.take().decode().split("\r\n")
    answers = [line for line in lines[1:] if "% " not in line]
    assert answers == ["Linux web-1 6.8.0", "cat: /etc/x: no", "1", "a.txt", "b.txt", "ana", "what is dance?"]


def test_a_pattern_that_would_run_for_ever_is_given_up() -> None:
    script = read_script("answers: [{match: '(a|a)+(a|a)+(a|a)+b', output: never}]")
    assert "command not found" in said(b"a" * 60 + b"\r", script)


def test_a_slow_answer_holds_what_is_typed_but_not_ctrl_c() -> None:
    shell = Console(read_script(SCRIPT), "web-1", Size(80, 24))
    shell.type(b"slow\rwhoami\r")
    shell.take()
    assert shell.late is not None
    assert shell.late.delay_s == 5
    shell.answer()
    assert shell.take().decode() == "at last\r\nweb-1% whoami\r\nana\r\nweb-1% "
    shell.type(b"slow\rpwd\r\x03echo $?\r")
    assert shell.take().decode() == "slow\r\n^C\r\nweb-1% echo $?\r\n130\r\nweb-1% "


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n", "expected a shell's script"),
        ("promt: x\n", "expected a shell's script"),
        ("prompt: [1]\n", "prompt is of the wrong type"),
        ("answers: {}\n", "answers is of the wrong type"),
        ("answers: [1]\n", "expected an answer"),
        ("answers: [{output: x}]\n", "expected an answer"),
        ("answers: [{match: x, outptu: y}]\n", "expected an answer"),
        ("answers: [{match: '('}]\n", "expected a regular expression"),
        ("answers: [{match: x, delay_s: -1}]\n", "expected delay_s"),
        ("answers: [{match: x, exit_code: 256}]\n", "expected delay_s"),
        ("a: [\n", "no YAML"),
    ],
)
def test_a_bad_file_is_named(text: str, complaint: str) -> None:
    with pytest.raises(BadSetup, match=complaint):
        read_script(text)


def test_json_is_a_script_too_and_nothing_is_the_default() -> None:
    assert read_script('{"prompt": "$ "}').prompt == "$ "
    assert read_script("") == Script()
