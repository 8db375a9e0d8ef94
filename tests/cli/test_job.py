"""``osqbox job``: the same verbs at the running box; and the words that both programs read and print."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.cli import main
from osqbox.cli.jobs_connection import Target, check_key, read_config, validity
from osqbox.cli.jobs_text import (
    Duration,
    Pair,
    Signal,
    Size,
    Stamped,
    TerminalText,
    command_line,
    exit_code_of,
    facts,
    in_words,
    told,
)
from osqbox.errors import BadSetup, BadUsage
from osqbox.jobs.login_token import LoginToken
from osqbox.jobs.messages import Containment, Reason, State, Status

from .conftest import JobsBox, ready_object

STATUS = Status("j1", "default/alice", "root", b"ls", (b"-la",), State.RUNNING, 0.0)


def status(**changes: Any) -> Status:
    from dataclasses import replace

    return replace(STATUS, **changes)


# ---- the verbs at the running box ------------------------------------------------------------------------


@pytest.fixture
def job(jobs_box: JobsBox, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.setenv("OSQBOX_HOME", str(jobs_box.home))

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(["job", *words]), *capfd.readouterr()

    return run


def test_a_job_from_start_to_end(job: Callable[..., Any]) -> None:
    """Every verb under its own name."""
    code, out, err = job("run", "--stdin", "sh", "-c", "read x; echo got $x; exit 3")
    name = out.strip()
    assert (code, err) == (0, "")
    assert job("suspend", name)[2] == f"{name}: suspended\n"
    assert job("resume", name)[0] == 0
    assert json.loads(job("status", "--json", name)[1])["state"] == "running"
    assert name in job("list", "--running")[1]
    assert job("stop", name) == (0, "", f"{name}: killed by SIGTERM (stopped by default/client)\n")
    assert job("wait", name)[0] == 143
    assert job("output", name) == (0, "", "")
    assert job("rm", name) == (0, "", f"{name}: removed\n")
    assert job("status", name) == (1, "", f"osqbox: NOT_FOUND: no job '{name}'\n")
    assert job("run", "--attach", "sh", "-c", "echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")


def test_the_box_by_its_url(job: Callable[..., Any], jobs_box: JobsBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by URL and token only, it tells where its jobs and the certificates for them are."""
    monkeypatch.setenv("OSQBOX_HOME", str(jobs_box.home / "elsewhere"))
    where = ("--url", jobs_box.ready["operator"], "--token", jobs_box.ready["token"])
    assert job("run", *where, "--wait", "sh", "-c", "exit 4")[0] == 4
    code, _, err = job("list", "--url", jobs_box.ready["operator"], "--token", "wrong")
    assert (code != 0, "wrong" in err) == (True, False)


def test_a_box_that_runs_no_jobs(run: Any, box: Any) -> None:
    result = run("job", "list")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "does not run jobs" in str(result.exception)


def test_a_box_without_a_client_of_its_own(run: Any, box: Any, api: Any, tmp_path: Path) -> None:
    """It was given certificates of somebody else's making, and has no key for them."""
    ready = ready_object(api.url, tmp_path) | {"jobs": "localhost:1", "client_cert": None, "client_key": None}
    box.update("ready", ready)
    result = run("job", "list")
    assert (result.exit_code, result.stdout) == (3, "")
    assert str(result.exception) == "the server is localhost:1, but nothing names the cert and the key"


def test_what_is_wrong_with_the_words_is_said_before_anything_is_asked(run: Any) -> None:
    """No box runs here: nothing was waited for."""
    for words, code in (
        (("run",), 125),
        (("run", "--timeout", "-1", "ls"), 125),
        (("run", "--env", "A", "ls"), 125),
        (("run", "--limit-memory", "much", "ls"), 125),
        (("status",), 2),
        (("status", ""), 2),
        (("signal", "j1", "SIGNOTHING"), 2),
        (("output", "--tail", "-1", "j1"), 2),
        (("output", "--offset", "1", "--tail", "1", "j1"), 2),
        (("list", "--state", "asleep"), 2),
        (("rm",), 2),
    ):
        assert run("job", *words).exit_code == code, words


# ---- words that are read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Duration(), "5", 5.0),
        (Duration(), "500ms", 0.5),
        (Duration(), "1.5h", 5400.0),
        (Duration(), "2min", 120.0),
        (Duration(), "0s", 0.0),
        (Size(), "1000", 1000),
        (Size(), "64k", 65536),
        (Size(), "1.5MiB", 3 * 2**19),
        (Size(), "2GB", 2**31),
        (Signal(), "term", 15),
        (Signal(), "SIGKILL", 9),
        (Signal(), "64", 64),
        (Pair(), "a=b=c", ("a", "b=c")),
        (Pair(), "a=", ("a", "")),
    ],
)
def test_words_that_are_understood(kind: click.ParamType, text: str, value: Any) -> None:
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (Duration(), ("", "s", "-1s", "5 s", "1e9", "nan", "inf", "1w", "9" * 20)),
        (Size(), ("", "k", "-1", "1.5x", "0x10", "1 k", "9" * 30)),
        (Signal(), ("", "0", "65", "-9", "NOPE", "SIG", "999999999999")),
        (Pair(), ("", "a", "=b", os.fsdecode(b"a=\xff"))),
    ],
)
def test_words_that_are_not(kind: click.ParamType, texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(click.BadParameter, match="expected"):
            kind.convert(text, None, None)


# ---- a job in words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"state": State.EXITED, "exit_code": 0, "reason": Reason.EXIT}, 0, "exited 0"),
        ({"state": State.EXITED, "exit_code": 137, "reason": Reason.EXIT}, 137, "exited 137"),
        ({"state": State.SIGNALED, "signal": 9, "reason": Reason.OOM}, 137, "killed by SIGKILL (oom)"),
        ({"state": State.SIGNALED, "signal": 11, "core_dumped": True}, 139, "killed by SIGSEGV, core dumped"),
        ({"state": State.SIGNALED, "signal": 15, "reason": Reason.TIMEOUT}, 124, "killed by SIGTERM (timeout)"),
        ({"state": State.EXITED, "exit_code": 0, "reason": Reason.TIMEOUT}, 124, "exited 0 (timeout)"),
        ({"state": State.SIGNALED, "signal": 40}, 168, "killed by signal 40"),
        ({"state": State.FAILED_TO_START, "errno": 2}, 127, "failed to start"),
        ({"state": State.FAILED_TO_START, "errno": 13}, 126, "failed to start"),
        ({"state": State.LOST, "reason": Reason.LOST}, 125, "lost"),
        (
            {"state": State.SIGNALED, "signal": 15, "reason": Reason.STOPPED, "stopped_by": "bob"},
            143,
            "killed by SIGTERM (stopped by bob)",
        ),
    ],
)
def test_how_a_job_ended(changes: dict[str, Any], code: int, words: str) -> None:
    assert (exit_code_of(status(**changes)), in_words(status(**changes))) == (code, words)


def test_facts_are_stable_and_told_is_more() -> None:
    ended = status(
        state=State.EXITED, exit_code=0, reason=Reason.EXIT, started_at=0.25, containment=Containment.CGROUP,
        enforced=("memory:cgroup1",), labels={"b": "2", "a": "1"}, output_truncated=True, leftover_processes=2,
    )  # fmt: skip
    assert json.dumps(facts(ended)) == (
        '{"id": "j1", "state": "exited", "owner": "default/alice", "run_as": "root", "pid": null, "exit_code": 0, '
        '"signal": null, "reason": "exit", "started_at": "1970-01-01T00:00:00.250000Z", "ended_at": null, '
        '"stdout_bytes": 0, "stderr_bytes": 0, "containment": "cgroup", "enforced": ["memory:cgroup1"]}'
    )
    shown = dict(told(ended))
    assert (shown["labels"], shown["leftover_processes"], shown["command"]) == ("a=1, b=2", 2, "ls -la")
    assert command_line(status(command=b"a b", args=(b"\xff", b""))) == r"'a b' '\xff' ''"


# ---- output for a terminal -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\ttext\r\n", b"plain\ttext\r\n"),
        (b"\x1b[2J\x07\0\x7f\x08", rb"\x1b[2J\x07\x00\x7f\x08"),
        ("\x9b31m".encode(), rb"\x9b31m"),
        (b"\x9b31m\xff", rb"\x9b31m\xff"),
        ("ü 界 👩‍🔬".encode(), "ü 界 👩‍🔬".encode()),
        ("\u202eevil\u2066".encode(), rb"\u202eevil\u2066"),
        (b"\xe2\x82", rb"\xe2\x82"),
        (b"\xed\xa0\x80", rb"\xed\xa0\x80"),
    ],
)
def test_a_terminal_gets_text(data: bytes, shown: bytes) -> None:
    text = TerminalText()
    assert text.feed(data) + text.feed(b"", is_last=True) == shown


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), st.integers(1, 7))
def test_whatever_comes_in_whatever_pieces_steers_no_terminal(data: bytes, size: int) -> None:
    """The pieces make no difference, the result is UTF-8, and nothing in it is a control character."""
    whole, pieces = TerminalText(), TerminalText()
    at_once = whole.feed(data, is_last=True)
    cut = b"".join(pieces.feed(data[at : at + size]) for at in range(0, len(data), size))
    assert cut + pieces.feed(b"", is_last=True) == at_once
    assert not [each for each in at_once.decode() if unicodedata.category(each) == "Cc" and each not in "\n\r\t"]


@given(st.binary(max_size=60))
def test_a_terminal_without_utf_8_gets_ascii(data: bytes) -> None:
    shown = TerminalText(is_utf8=False).feed(data, is_last=True)
    assert shown.isascii()
    assert not set(shown) & (set(range(32)) - {9, 10, 13} | {127})


def test_times_before_lines_that_come_in_pieces() -> None:
    stamped = Stamped()
    pieces = [(b"a", 0.0), (b"b\nc\n", 1.0), (b"", 2.0), (b"\n", 3.0), (b"d", 4.0)]
    shown = b"".join(stamped.feed(data, at) for data, at in pieces).decode()
    assert re.sub(r"1970-01-01T00:00:0(\d)\.000000Z", r"\1", shown) == "0 ab\n1 c\n3 \n4 d"


# ---- the connection --------------------------------------------------------------------------------------


def test_a_target_is_filled_up() -> None:
    full = Target("s:1", Path("c"), Path("k"), Path("a"))
    assert Target(cert=Path("x")).over(full) == Target("s:1", Path("x"), Path("k"), Path("a"))
    assert (Target().missing(), full.missing()) == (["server", "cert", "key", "ca"], [])


def test_where_settings_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cmdctl/cmdctl.toml before cmdctl.toml; never the working directory, where others may write."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("CMDCTL_CONFIG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("cmdctl.toml").write_text('server = "evil:1"\n')
    assert read_config(None) == {}
    (tmp_path / "cmdctl.toml").write_text('server = "a:1"\ncert = "~/c.pem"\nkey = "/k"\n')
    assert read_config(None) == {"server": "a:1", "cert": Path.home() / "c.pem", "key": Path("/k")}
    (tmp_path / "cmdctl").mkdir()
    (tmp_path / "cmdctl" / "cmdctl.toml").write_text('ca = "ca.pem"\n')
    assert read_config(None) == {"ca": tmp_path / "cmdctl" / "ca.pem"}


def test_a_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    key = tmp_path / "k"
    with pytest.raises(BadSetup, match="cannot be read"):
        check_key(key)
    key.touch(0o600)
    check_key(key)
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        with pytest.raises(BadSetup, match="expected 0600"):
            check_key(key)


@pytest.mark.parametrize("year", [2024, 2049, 2050, 2100])
def test_validity_is_what_cryptography_reads(year: int) -> None:
    """Before and after 2050 dates are written in two ways."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    start, end = dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=dt.UTC), dt.datetime(year, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 2**150, start, end)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    assert validity(b"text before\n" + pem + pem) == (start.timestamp(), end.timestamp())


@pytest.mark.parametrize("text", [b"", b"\xff", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_has_no_dates(text: bytes) -> None:
    assert validity(text) is None
    assert validity(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n") is None


@given(st.text(min_size=1, max_size=50), st.text(min_size=1, max_size=50))
def test_a_login_token_comes_back_as_it_was(server: str, secret: str) -> None:
    token = LoginToken("https://localhost:8443", server, secret)
    assert LoginToken.unpack(token.pack()) == token
    with pytest.raises(BadUsage, match="whole"):
        LoginToken.unpack(LoginToken("http://localhost", server, secret).pack())
