"""The verbs over jobs, for two programs: ``osqbox job`` and ``cmdctl`` differ in names and in how they connect."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from osqbox.cli.jobs_text import (
    FAILED,
    NOT_EXECUTABLE,
    NOT_FOUND,
    TIMED_OUT,
    Duration,
    Pair,
    ParamType,
    Signal,
    Size,
    command_line,
    exit_code_of,
    facts,
    in_words,
    told,
)
from osqbox.cli.output import ago, json_option, print_facts, print_json, print_table, printable, quiet_pipe, tell
from osqbox.errors import BadUsage, OsqboxError, UserError

if TYPE_CHECKING:
    from osqbox.cli.jobs_connection import Target
    from osqbox.jobs.client import JobClient
    from osqbox.jobs.errors import JobError
    from osqbox.jobs.messages import JobSpec, Status

F = TypeVar("F", bound=Callable[..., Any])

STATES = ("pending", "running", "suspended", "stopping", "exited", "signaled", "failed_to_start", "lost")
COMPLETED_JOBS = 50
RECONNECT_S = 60.0
_META = "osqbox.jobs."
_COMMAND_CODES = {"COMMAND_NOT_FOUND": NOT_FOUND, "NOT_EXECUTABLE": NOT_EXECUTABLE}


class Refused(UserError):
    """What the server said, or why there is none; told as ``NOT_FOUND: ...``."""

    def __init__(self, error: JobError, exit_code: int = 1, hint: str | None = None) -> None:
        super().__init__(f"{error.code.name}: {error.message}", hint)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Front:
    """One of the two programs."""

    called: str
    """As it is typed, up to the verb."""
    names: Mapping[str, str]
    """Verbs that have another name here."""
    options: Sequence[click.Option]
    """How to connect; every verb takes them."""
    find: Callable[[Mapping[str, Any]], Target]
    """Where to, from the values of these options by name."""

    def line(self, verb: str, *words: str) -> str:
        return " ".join((self.called, self.names.get(verb, verb), *words))

    def commands(self) -> dict[str, click.Command]:
        found = {}
        for command in VERBS:
            twin = copy.copy(command)
            assert command.name is not None
            twin.name = self.names.get(command.name, command.name)
            twin.params = [*command.params, *self.options]
            found[twin.name] = twin
        return found


def connection_option(*words: str, **attributes: Any) -> click.Option:
    """An option that is kept beside the context: nearer to the verb wins."""

    def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.meta[f"{_META}{param.name}"] = value

    return click.Option(words, expose_value=False, callback=keep, **attributes)


class Jobs:
    """What a verb works with."""

    def __init__(self, front: Front, meta: Mapping[str, Any]) -> None:
        from osqbox.cli.jobs_connection import Dialer

        self.front = front
        options = {name.removeprefix(_META): value for name, value in meta.items() if name.startswith(_META)}
        self._reconnect_s = float(options.get("reconnect", RECONNECT_S))
        self._dialer = Dialer(functools.partial(front.find, options), front.called.partition(" ")[0])

    def open(self) -> JobClient:
        from osqbox.cli.jobs_connection import connect

        return connect(self._dialer, self._reconnect_s)


def with_jobs(function: F) -> F:
    """Gives a verb its `Jobs`; what the server refuses is told in words."""

    @functools.wraps(function)
    def with_them(*args: Any, **options: Any) -> Any:
        ctx = click.get_current_context()
        front = ctx.find_object(Front)
        assert front is not None
        with quiet_pipe(), refusals_told():
            return function(Jobs(front, ctx.meta), *args, **options)

    return with_them  # type: ignore[return-value]


@contextmanager
def refusals_told() -> Iterator[None]:
    from osqbox.jobs.errors import JobError

    try:
        yield
    except JobError as error:
        raise Refused(error) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"reading or writing failed: {error.strerror or error}") from None


class JobId(ParamType):
    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.isascii() or not text.isprintable() or not text:
            self.fail(f"expected the id of a job, got {text!r}", param, ctx)
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Of the newest jobs; none where there is no server to ask."""
        front = ctx.find_object(Front)
        assert front is not None
        try:
            with Jobs(front, {**ctx.meta, f"{_META}reconnect": 0}).open() as jobs:
                found = jobs.list(limit=COMPLETED_JOBS)
        except OsqboxError:
            return []
        return [
            CompletionItem(status.id, help=f"{in_words(status)}  {command_line(status)}"[:60])
            for status in found
            if status.id.startswith(incomplete)
        ]


_job = click.argument("job", metavar="ID", type=JobId())
_sanitize = click.option(
    "--sanitize",
    type=click.Choice(("auto", "never", "always")),
    default="auto",
    show_default=True,
    help="Show what would steer the terminal as \\x1b and the like. auto: where output goes to a terminal.",
)


# ---- run -------------------------------------------------------------------------------------------------


class _Run(click.Command):
    """Whatever goes wrong here is not the command's own exit code: 125."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _as_ours():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _as_ours():
            return super().invoke(ctx)


@contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        error.show()
        raise click.exceptions.Exit(FAILED) from None
    except UserError as error:
        if not (isinstance(error, Refused) and error.exit_code in _COMMAND_CODES.values()):
            error.exit_code = FAILED
        raise


@click.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-w", "--wait", is_flag=True, help="Wait for the end and exit as the command did.")
@click.option("-a", "--attach", is_flag=True, help="Print its stdout and stderr meanwhile, and not the id.")
@click.option("-i", "--stdin", is_flag=True, help="Open its stdin; with --wait or --attach ours is given to it.")
@click.option("--kill-on-disconnect", is_flag=True, help="Stop the job when this program is told to leave.")
@click.option("-e", "--env", "env", type=Pair(), multiple=True, metavar="NAME=VALUE", help="Set a variable for it.")
@click.option("-C", "--cwd", metavar="DIR", help="Where it runs. Default: the home of its user.")
@click.option("-u", "--run-as", metavar="USER", help="One of the certificate's principals. Default: the first.")
@click.option("-t", "--timeout", "timeout_s", type=Duration(), help="Stop it after so long: 90, 30s, 5m, 2h.")
@click.option("--grace", "grace_s", type=Duration(), help="Between the stop signal and SIGKILL. Default: 10s.")
@click.option("--stop-signal", type=Signal(), help="Asks it to end. Default: TERM.")
@click.option("--merged", is_flag=True, help="One pipe for stdout and stderr: their exact order, but not apart.")
@click.option("--max-output", "max_output_bytes", type=Size(1), help="Keep at most so much output: 64k, 512M, 2G.")
@click.option(
    "--overflow",
    type=click.Choice(("kill", "discard-new", "keep-head-and-tail")),
    default="keep-head-and-tail",
    show_default=True,
    help="What happens at --max-output.",
)
@click.option("--keep-leftovers", is_flag=True, help="Spare background processes when the command itself ends.")
@click.option("--link-output", is_flag=True, help="Also link the output into ~/.osqbox/jobs of its user.")
@click.option("--idempotency-key", metavar="KEY", help="The same key with the same request is the same job.")
@click.option("-l", "--label", "labels", type=Pair(), multiple=True, metavar="NAME=VALUE", help="To find it by.")
@click.option("--limit-memory", "memory_bytes", type=Size(1), help="Bytes of memory: 512M.")
@click.option("--limit-cpu", "cpu_cores", type=click.FloatRange(0, min_open=True), help="Share of CPU time: 0.5, 2.")
@click.option("--limit-cpu-time", "cpu_time_s", type=Duration(), help="CPU time in all.")
@click.option("--limit-processes", "processes", type=click.IntRange(1), help="Processes at once.")
@click.option("--limit-open-files", "open_files", type=click.IntRange(1), help="Open files of each process.")
@click.option("--limit-file-size", "file_bytes", type=Size(1), help="Largest file it may write.")
@_sanitize
@json_option
@with_jobs
def run(
    jobs: Jobs,
    command: tuple[str, ...],
    wait: bool,
    attach: bool,
    stdin: bool,
    kill_on_disconnect: bool,
    sanitize: str,
    as_json: bool,
    **order: Any,
) -> None:
    """Run a command, and print the id of its job.

    Options end at the command: what follows is its own, and it never goes through a shell. The job goes on without
    us. With --wait or --attach the exit code is the command's, 128+n if signal n ended it, 124 after --timeout,
    127 if it was not found, 126 if it cannot be executed, 125 if we or the server failed.
    """
    from osqbox.jobs.errors import JobError

    if not command or not command[0]:
        raise BadUsage("expected a command to run", hint=jobs.front.line("run", "ls", "-la"))
    if attach and as_json:
        raise BadUsage("expected --attach or --json, got both", hint=jobs.front.line("output", "ID", "--json"))
    if kill_on_disconnect and not (wait or attach):
        raise BadUsage("--kill-on-disconnect needs --wait or --attach")
    spec = _spec(command, stdin, order)
    with jobs.open() as client:
        try:
            status = client.run(spec)
        except JobError as error:
            hint = jobs.front.line("status", error.job_id) if error.job_id else None
            raise Refused(error, _COMMAND_CODES.get(error.reason, FAILED), hint) from None
        if not (wait or attach):
            _print_job(status, as_json)
            return
        if not attach and not as_json:
            click.echo(printable(status.id))
        ended = _attend(jobs, client, status.id, attach, stdin, sanitize, kill_on_disconnect)
    if as_json:
        print_json(facts(ended))
    _exit_as(ended)


def _spec(command: tuple[str, ...], stdin: bool, order: dict[str, Any]) -> JobSpec:
    from osqbox.jobs.messages import JobSpec, Limits, OutputMode, Overflow

    defaults = JobSpec(b"")
    return JobSpec(
        os.fsencode(command[0]),
        tuple(os.fsencode(word) for word in command[1:]),
        env=dict(order["env"]),
        cwd=os.fsencode(order["cwd"]) if order["cwd"] else None,
        run_as=order["run_as"],
        limits=Limits(**{each: order[each] for each in Limits.__slots__}),
        timeout_s=order["timeout_s"],
        stop_grace_s=defaults.stop_grace_s if order["grace_s"] is None else order["grace_s"],
        stop_signal=order["stop_signal"] or defaults.stop_signal,
        output_mode=OutputMode.MERGED if order["merged"] else OutputMode.SPLIT,
        max_output_bytes=order["max_output_bytes"],
        overflow=Overflow(order["overflow"].replace("-", "_")),
        open_stdin=stdin,
        keep_leftovers=order["keep_leftovers"],
        link_output=order["link_output"],
        idempotency_key=order["idempotency_key"],
        labels=dict(order["labels"]),
    )


def _attend(
    jobs: Jobs, client: JobClient, job: str, attach: bool, stdin: bool, sanitize: str, takes_along: bool
) -> Status:
    from osqbox.cli.jobs_follow import Attended, OutputPrinter, follow, forward_stdin
    from osqbox.jobs.messages import OutputRequest

    printer = OutputPrinter(sanitize=sanitize)

    def stay() -> Status:
        if attach and (ended := follow(client, job, OutputRequest(printer.offset), printer)):
            return ended
        return client.wait(job)

    if stdin:
        forward_stdin(jobs.open, job)
    how = jobs.front.line("output", job)
    return Attended(jobs.open, job, takes_along=takes_along, how_to_follow=how).until_end(stay)


def _exit_as(status: Status) -> NoReturn:
    raise click.exceptions.Exit(exit_code_of(status))


def _print_job(status: Status, as_json: bool) -> None:
    if as_json:
        print_json(facts(status))
    else:
        click.echo(printable(status.id))


# ---- looking -----------------------------------------------------------------------------------------------


@click.command()
@_job
@click.option("--exit-code", is_flag=True, help="Exit as the command did, once it has ended.")
@json_option
@with_jobs
def status(jobs: Jobs, job: str, exit_code: bool, as_json: bool) -> None:
    """What became of a job. ID: an id, a unique beginning of one, or the pid of a running job."""
    with jobs.open() as client:
        found = client.status(job)
    if as_json:
        print_json(facts(found))
    else:
        print_facts(told(found))
    if exit_code and found.has_ended:
        _exit_as(found)


@click.command()
@_job
@click.option("--no-follow", is_flag=True, help="End at what is there now, instead of following the job to its end.")
@click.option("--tail", "tail_bytes", type=Size(), metavar="BYTES", help="Begin so many bytes before the end.")
@click.option("--offset", type=click.IntRange(0), default=0, metavar="BYTES", help="Begin at this byte.")
@click.option("--stdout", "only_stdout", is_flag=True, help="Only its stdout.")
@click.option("--stderr", "only_stderr", is_flag=True, help="Only its stderr.")
@click.option("--timestamps", is_flag=True, help="The time before every line.")
@_sanitize
@json_option
@with_jobs
def output(
    jobs: Jobs,
    job: str,
    no_follow: bool,
    tail_bytes: int | None,
    offset: int,
    only_stdout: bool,
    only_stderr: bool,
    timestamps: bool,
    sanitize: str,
    as_json: bool,
) -> None:
    """The output of a job, its stdout to stdout and its stderr to stderr, until it ends.

    Bytes come as they are, unless they go to a terminal. A connection that breaks is mended at the next byte.
    """
    from osqbox.cli.jobs_follow import JsonPrinter, OutputPrinter, follow
    from osqbox.jobs.messages import OutputRequest, Stream
    from osqbox.jobs.protocol import ID_LENGTH

    if offset and tail_bytes is not None:
        raise BadUsage("expected --offset or --tail, got both")
    streams = {Stream.STDOUT: only_stdout, Stream.STDERR: only_stderr}
    wanted = frozenset(stream for stream, is_wanted in streams.items() if is_wanted)
    request = OutputRequest(offset, tail_bytes, wanted if len(wanted) == 1 else frozenset(), not no_follow)
    printer = JsonPrinter() if as_json else OutputPrinter(sanitize=sanitize, timestamps=timestamps)
    with jobs.open() as client:
        if len(job) < ID_LENGTH:  # a pid or a beginning may mean another job when the connection has to be mended
            job = client.status(job).id
        follow(client, job, request, printer)


@click.command("list")
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="Only in this state; repeatable.")
@click.option("--running", is_flag=True, help="Only those that have not ended.")
@click.option("--owner", help="Only of this owner.")
@click.option("-l", "--label", "labels", type=Pair(), multiple=True, metavar="NAME=VALUE", help="Only with this label.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@json_option
@with_jobs
def list_jobs(
    jobs: Jobs,
    states: tuple[str, ...],
    running: bool,
    owner: str | None,
    labels: Any,
    limit: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Jobs, the newest first."""
    import time

    from osqbox.jobs.messages import State

    wanted = (*states, *(("pending", "running", "suspended", "stopping") if running else ()))
    with jobs.open() as client:
        found = client.list(states=[State(each) for each in wanted], owner=owner, labels=dict(labels), limit=limit)
    if as_json:
        print_json([facts(each) for each in found])
    elif quiet:
        for each in found:
            click.echo(printable(each.id))
    else:
        now = time.time()
        print_table(
            ("ID", "STATE", "OWNER", "RUN AS", "STARTED", "COMMAND"),
            [_row(each, now) for each in found],
            empty="no jobs" + (" fit" if wanted or owner or labels else " yet; " + jobs.front.line("run", "ls", "-la")),
        )


def _row(status: Status, now: float) -> tuple[str, ...]:
    from osqbox.clock import rfc3339

    started = ago(rfc3339(status.started_at), now)
    return status.id, in_words(status), status.owner, status.run_as, started, command_line(status)[:80]


@click.command()
@_job
@click.option("-t", "--timeout", "timeout_s", type=Duration(), help="Wait no longer; exit code 124.")
@json_option
@with_jobs
def wait(jobs: Jobs, job: str, timeout_s: float | None, as_json: bool) -> None:
    """Wait for the end of a job, and exit as its command did."""
    with jobs.open() as client:
        found = client.wait(job, timeout_s)
    if as_json:
        print_json(facts(found))
    if not found.has_ended:
        tell(printable(f"{found.id} is still {in_words(found)}"))
        raise click.exceptions.Exit(TIMED_OUT)
    _exit_as(found)


# ---- doing -------------------------------------------------------------------------------------------------


@click.command()
@_job
@click.option("-s", "--signal", "number", type=Signal(), help="Ask it to end with this one. Default: its own, or TERM.")
@click.option("--grace", "grace_s", type=Duration(), help="Until SIGKILL. Default: the job's own.")
@click.option("--leader-only", is_flag=True, help="Signal its first process only; SIGKILL is for all.")
@click.option("--strict", is_flag=True, help="Fail if it has ended already.")
@click.option("--wait/--no-wait", "is_awaited", default=True, help="Until nothing of it is left. Default: --wait.")
@json_option
@with_jobs
def stop(jobs: Jobs, job: str, number: int | None, is_awaited: bool, as_json: bool, **how: Any) -> None:
    """End a job with all its processes."""
    with jobs.open() as client:
        found, had_ended = client.stop(job, signal=number, **how)
        if is_awaited and not found.has_ended:
            found = client.wait(found.id)
    _report(found, "had ended: " if had_ended else "", as_json)


@click.command()
@_job
@json_option
@with_jobs
def suspend(jobs: Jobs, job: str, as_json: bool) -> None:
    """Freeze a job with all its processes, until resume."""
    with jobs.open() as client:
        _report(client.suspend(job), "", as_json)


@click.command()
@_job
@json_option
@with_jobs
def resume(jobs: Jobs, job: str, as_json: bool) -> None:
    """Let a suspended job go on."""
    with jobs.open() as client:
        _report(client.resume(job), "", as_json)


@click.command("signal")
@_job
@click.argument("number", metavar="SIGNAL", type=Signal())
@json_option
@with_jobs
def send_signal(jobs: Jobs, job: str, number: int, as_json: bool) -> None:
    """Send a signal to the command of a job; what it started gets none."""
    with jobs.open() as client:
        _report(client.signal(job, number), "", as_json)


@click.command("input")
@_job
@click.option("--keep-open", is_flag=True, help="Leave the job's stdin open for another input.")
@with_jobs
def send_input(jobs: Jobs, job: str, keep_open: bool) -> None:
    """Give our stdin to a job that was run with --stdin, and close it."""
    from osqbox.cli.jobs_follow import read_stdin

    with jobs.open() as client:
        for data in read_stdin():
            client.send_input(job, data)
        if not keep_open:
            client.send_input(job, b"", eof=True)


@click.command("rm")
@click.argument("jobs_to_remove", metavar="ID...", type=JobId(), nargs=-1, required=True)
@with_jobs
def remove(jobs: Jobs, jobs_to_remove: tuple[str, ...]) -> None:
    """Forget jobs that have ended, with their output."""
    with jobs.open() as client:
        for job in jobs_to_remove:
            client.delete(job)
            tell(f"{job}: removed")


def _report(status: Status, before: str, as_json: bool) -> None:
    if as_json:
        print_json(facts(status))
    else:
        tell(printable(f"{status.id}: {before}{in_words(status)}"))


VERBS = (run, status, output, stop, list_jobs, wait, suspend, resume, send_signal, send_input, remove)
