"""``osqbox shell``: a terminal on a node, watched by others, replayed afterwards."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from osqbox.cli.find import Where, box_options, pause
from osqbox.cli.output import (
    Listing,
    ago,
    json_option,
    print_facts,
    print_json,
    print_table,
    printable,
    quiet_pipe,
    tell,
)
from osqbox.client import Client, at
from osqbox.errors import BadUsage

if TYPE_CHECKING:
    from osqbox.cli.terminal import Address
    from osqbox.shells.recording import Event

DETACH_KEY = "^]"
CAST_SUFFIX = ".cast"
READ_BYTES = 256 * 1024
LONGEST_PAUSE_S = 86_400.0
OPEN, LIST = "open", "list"
BOX_OPTIONS = ("--url", "--token", "--data")
STATES = ("requested", "offered", "open", "detached", "ended")


class _Shells(Listing):
    """A word that is no verb is a node: ``osqbox shell web-1`` is ``osqbox shell open web-1``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._with_verb(ctx, args))

    def _with_verb(self, ctx: click.Context, args: list[str]) -> list[str]:
        shared, rest = _split_box_options(args)
        word = rest[0] if rest else LIST
        if word in ctx.help_option_names:
            return args
        if not word.startswith("-"):
            return [word, *shared, *rest[1:]] if word in self.commands else [OPEN, *args]
        of_list = {name for option in self.commands[LIST].params for name in option.opts}
        return [LIST if word.partition("=")[0] in of_list else OPEN, *args]


def _split_box_options(args: list[str]) -> tuple[list[str], list[str]]:
    """The leading options that every verb takes, and the rest."""
    end = 0
    while end < len(args) and args[end].partition("=")[0] in BOX_OPTIONS:
        end += 1 if "=" in args[end] else 2
    return args[:end], args[end:]


@click.group("shell", cls=_Shells)
def command() -> None:
    """A terminal on a node: osqbox shell NODE. Without a node: list the sessions.

    NODE is an id, a beginning of one, a hostname or a host identifier; one that is called like a verb is reached by
    osqbox shell open NODE. The agent must run with --control.
    """


def _prefix(_context: click.Context, _option: click.Parameter, value: str) -> bytes | None:
    if value.lower() == "none":
        return None
    if len(value) == 2 and value[0] == "^" and "@" <= value[1].upper() <= "_":
        return bytes([ord(value[1].upper()) - 64])
    if len(value) == 1 and value.isascii():
        return value.encode()
    raise click.BadParameter("expected a key such as ^], one ASCII letter, or none")


_key_option = click.option(
    "--detach-key", "prefix", default=DETACH_KEY, show_default=True, metavar="KEY", callback=_prefix,
    help="Key before a command to this program; none gives all keys to the shell.",
)  # fmt: skip
_role_option = click.option(
    "--role", type=click.Choice(["controller", "viewer"]), default="controller", show_default=True,
    help="Whether to type, or only to watch.",
)  # fmt: skip


@command.command(OPEN)
@click.argument("node")
@click.option("--reason", default="", help="Why; it is kept in the audit.")
@click.option("--shell", metavar="PROGRAM", help="What to run. Default: the agent's choice.")
@click.option("--user", help="Who runs it. Default: the agent's choice.")
@click.option("--no-record", is_flag=True, help="Keep no recording of the output.")
@click.option("--record-input", is_flag=True, help="Record what is typed too, passwords included.")
@_role_option
@_key_option
@box_options
def open_shell(
    box: Where, node: str, reason: str, shell: str | None, user: str | None, no_record: bool, record_input: bool,
    role: str, prefix: bytes | None,
) -> None:  # fmt: skip
    """Open a terminal on a node, and exit as its shell does.

    Keys from a pipe work too: echo 'uname -a; exit 3' | osqbox shell NODE.
    """
    from osqbox.cli.terminal import Here

    size = Here().size()
    wanted = {"node": node, "reason": reason, "cols": size.cols, "rows": size.rows, "shell": shell, "user": user}
    recording = {"record": False if no_record else None, "record_input": record_input}
    facts = box.client.post("shells", {**wanted, **recording})
    _stay(box, facts, role, prefix)


@command.command()
@click.argument("session", metavar="ID")
@_key_option
@box_options
def attach(box: Where, session: str, prefix: bytes | None) -> None:
    """Take up a session again, and its keyboard."""
    _stay(box, box.client.get(at("shells", session)), "controller", prefix)


@command.command()
@click.argument("session", metavar="ID")
@_key_option
@box_options
def watch(box: Where, session: str, prefix: bytes | None) -> None:
    """Watch a session without typing."""
    _stay(box, box.client.get(at("shells", session)), "viewer", prefix)


def _stay(box: Where, facts: dict[str, Any], role: str, prefix: bytes | None) -> None:
    """Be its terminal. Leaves with the shell's exit code."""
    from osqbox.cli.terminal import Wish, help_line, outcome_of, run_terminal

    box = _same_box(box)
    session, host = facts["id"], facts["hostname"] or facts["node"]
    if sys.stdin.isatty():
        tell(f"osqbox: {printable(host)}, session {printable(session)}; {help_line(prefix)}")
    outcome = run_terminal(Wish(session, role, prefix), lambda: _address(box.client, session))
    if outcome.is_unknown:
        ended = box.client.get(at("shells", session))
        outcome = outcome_of(ended["exit_code"], ended["signal"], ended["end_reason"] or "")
    if outcome.told and (sys.stderr.isatty() or outcome.status):
        tell(f"osqbox: {printable(outcome.told)}")
    raise click.exceptions.Exit(outcome.status)


def _same_box(box: Where) -> Where:
    """That box and no other, also when it was the newest only just now: it may restart while others run."""
    found = box.find()
    return Where(None, box.token, Path(found.ready["data"])) if found.pid and not box.named_url else box


def _address(client: Client, session: str) -> Address:
    import ssl

    from osqbox.cli.terminal import Address

    scheme, _, rest = client.url.partition("://")
    url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/api/v1/{at('shells', session, 'terminal')}"
    # A context of its own: one that HTTP/2 was offered on cannot carry a WebSocket.
    context = ssl.create_default_context(cafile=os.environ.get("OSQBOX_CA_FILE") or None) if scheme == "https" else None
    return Address(url, client.token or "", context)


@command.command(LIST)
@click.option("--node", help="Only of the node with that id.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--state", type=click.Choice(STATES), help="Only in this state.")
@click.option("--live", is_flag=True, default=None, help="Not those that have ended.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@json_option
@box_options
def list_shells(box: Where, as_json: bool, **which: Any) -> None:
    """List sessions, the newest first."""
    found = box.client.get("shells", **which)
    with quiet_pipe():
        if as_json:
            print_json(found)
            return
        now = time.time()
        print_table(
            ("ID", "HOSTNAME", "STATE", "BY", "BEGAN", "END", "VIEWERS", "BYTES", "TITLE", "REASON"),
            [_row(session, now) for session in found],
            empty="no shell sessions",
        )


def _row(session: dict[str, Any], now: float) -> tuple[Any, ...]:
    viewers = ", ".join(f"{each['by']}{'*' if each['role'] == 'controller' else ''}" for each in session["viewers"])
    return (
        session["id"], session["hostname"] or session["node"], session["state"], session["by"],
        ago(session["created_at"], now), _end_of(session), viewers, session["output_bytes"], session["title"],
        session["reason"],
    )  # fmt: skip


def _end_of(session: dict[str, Any]) -> str:
    if session["exit_code"] is not None:
        return f"exit {session['exit_code']}"
    return f"signal {session['signal']}" if session["signal"] is not None else session["end_reason"] or ""


@command.command()
@click.argument("session", metavar="ID")
@json_option
@box_options
def show(box: Where, session: str, as_json: bool) -> None:
    """Everything known about one session."""
    facts = box.client.get(at("shells", session))
    with quiet_pipe():
        print_json(facts) if as_json else print_facts(facts.items())


@command.command()
@click.argument("sessions", metavar="ID...", nargs=-1, required=True)
@box_options
def kill(box: Where, sessions: tuple[str, ...]) -> None:
    """End sessions, with everything that runs in their terminals."""
    client = box.client
    for session in sessions:
        client.delete(at("shells", session))
        tell(f"{printable(session)}: killed")


@command.command()
@click.argument("session", metavar="ID|FILE.cast")
@click.option("--speed", type=click.FloatRange(0.01, 10_000), default=1.0, show_default=True, help="So many times.")
@click.option("--idle-limit", type=click.FloatRange(0), metavar="SECONDS", help="Shorten longer pauses to this.")
@click.option("--no-wait", is_flag=True, help="All at once: exactly the bytes that were printed.")
@click.option("--sanitize", is_flag=True, help="Leave out what steers the terminal beyond its own screen.")
@box_options
def replay(box: Where, session: str, speed: float, idle_limit: float | None, no_wait: bool, sanitize: bool) -> None:
    """Print what a session printed, as it happened.

    The recording may also be a file of asciicast v2 or v3.
    """
    longest_s = LONGEST_PAUSE_S if idle_limit is None else idle_limit
    with quiet_pipe(), tempfile.TemporaryFile() as cast, tempfile.TemporaryFile() as spool:
        try:
            pieces = _printed(box, session, cast, spool, timed=not no_wait)
            _print_timed(pieces, speed, longest_s, _cleaner(sanitize))
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None


def _cleaner(sanitize: bool) -> Callable[[bytes], bytes]:
    from osqbox.cli.sanitize import Sanitizer

    return Sanitizer().clean if sanitize else bytes


def _print_timed(
    pieces: Iterable[tuple[float, bytes]], speed: float, longest_s: float, clean: Callable[[bytes], bytes]
) -> None:
    """Each piece at its own moment, so that what printing takes does not add up."""
    due = time.monotonic()
    for wait_s, data in pieces:
        due += min(wait_s, longest_s) / speed
        if (left_s := due - time.monotonic()) > 0:
            pause(left_s)
        sys.stdout.buffer.write(clean(data))
        sys.stdout.buffer.flush()


def _printed(
    box: Where, session: str, cast: IO[bytes], spool: IO[bytes], *, timed: bool
) -> Iterator[tuple[float, bytes]]:
    """Seconds since the piece before, and what was printed then. Raises BadRecording."""
    from osqbox.shells.recording import read_cast

    if session.endswith(CAST_SUFFIX) or "/" in session:
        try:
            with Path(session).open("rb") as file:
                shutil.copyfileobj(file, cast)
        except OSError as error:
            raise BadUsage(f"{session}: {error.strerror}") from None
        is_exact = False
    else:
        client = box.client
        client.download(at("shells", session, "bytes"), spool)
        is_exact = True
        if timed:
            client.download(at("shells", session, "recording"), cast)
    cast.seek(0)
    spool.seek(0)
    if not timed and is_exact:
        while data := spool.read(READ_BYTES):
            yield 0.0, data
        return
    recorded = read_cast(iter(cast.readline, b""))
    _compare_sizes(recorded.cols, recorded.rows)
    wait_s = 0.0
    for event in recorded.events:
        wait_s += event.interval_s
        if event.code == "o":
            yield (wait_s if timed else 0.0), _bytes_of(event, spool if is_exact else None)
            wait_s = 0.0


def _bytes_of(event: Event, spool: IO[bytes] | None) -> bytes:
    """What was printed exactly, where the recording is ours; else what the cast says."""
    if spool is None or event.spool is None:
        return event.data.encode(errors="replace")
    start, end = event.spool
    spool.seek(start)
    return spool.read(end - start)


def _compare_sizes(cols: int, rows: int) -> None:
    if sys.stdout.isatty():
        here = shutil.get_terminal_size()
        if here.columns < cols or here.lines < rows:
            tell(f"osqbox: recorded in {cols}x{rows}, larger than this terminal's {here.columns}x{here.lines}")
