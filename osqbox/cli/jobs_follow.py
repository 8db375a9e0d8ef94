"""Output of a job as it comes, to two pipes or a terminal; and staying with a job until it ends, or leaving it."""

from __future__ import annotations

import base64
import locale
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

import click

from osqbox.cli import as_called
from osqbox.cli.jobs_text import Stamped, TerminalText, facts
from osqbox.cli.output import print_json_line, printable, tell
from osqbox.clock import rfc3339
from osqbox.jobs.messages import Chunk, End, OutputEvent, OutputRequest, Stream, Truncated

if TYPE_CHECKING:
    from osqbox.jobs.client import JobClient
    from osqbox.jobs.messages import Status

SECOND_CTRL_C_S = 2.0
"""How long after the first Ctrl-C a second one still stops the job."""
STDIN_BYTES = 48 * 1024
SANITIZE = ("auto", "never", "always")


class OutputPrinter:
    """The job's stdout to stdout and its stderr to stderr, byte by byte as they are, but for what is asked for.

    Raises BrokenPipeError when nobody reads on.
    """

    def __init__(self, *, sanitize: str = "auto", timestamps: bool = False) -> None:
        self._stdout = _Sink(sys.stdout.buffer, sanitize, timestamps)
        self._stderr = _Sink(sys.stderr.buffer, sanitize, timestamps)
        self.offset = 0
        """Behind the last byte that was taken."""

    def take(self, event: OutputEvent) -> None:
        match event:
            case Chunk(stream, offset, data, at):
                self.offset = offset + len(data)  # before it is printed: a Ctrl-C in between must not bring it again
                (self._stderr if stream is Stream.STDERR else self._stdout).write(data, at)
            case Truncated(start, end):
                self.offset = end
                tell(f"bytes {start} to {end} of the output are not kept")

    def close(self) -> None:
        """Print what was held back of a character that never came whole."""
        for sink in (self._stdout, self._stderr):
            sink.close()


class _Sink:
    def __init__(self, file: IO[bytes], sanitize: str, timestamps: bool) -> None:
        self._file = file
        self._stamped = Stamped() if timestamps else None
        is_clean = sanitize == "always" or (sanitize == "auto" and file.isatty())
        self._text = TerminalText(is_utf8=_speaks_utf8()) if is_clean else None

    def write(self, data: bytes, at: float) -> None:
        if self._text is not None:
            data = self._text.feed(data)
        if self._stamped is not None:
            data = self._stamped.feed(data, at)
        _write(self._file, data)

    def close(self) -> None:
        if self._text is not None:
            _write(self._file, self._text.feed(b"", is_last=True))


def _write(file: IO[bytes], data: bytes) -> None:
    """All of it, past any buffer: what cannot be written must not come up again when the program ends.

    A terminal may be non-blocking, if another program that shares it has made it so.
    """
    try:
        descriptor = file.fileno()
    except OSError:
        file.write(data)
        return
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select((), (descriptor,), ())


def _speaks_utf8() -> bool:
    return locale.getpreferredencoding(False).lower().replace("-", "") == "utf8"


class JsonPrinter:
    """One JSON object per event and line; data in base64."""

    def take(self, event: OutputEvent) -> None:
        match event:
            case Chunk(stream, offset, data, at):
                text = base64.b64encode(data).decode()
                print_json_line({"stream": stream.value, "offset": offset, "data": text, "time": rfc3339(at)})
            case Truncated(start, end):
                print_json_line({"truncated": {"from": start, "to": end}})
            case End(status):
                print_json_line({"end": facts(status)})

    def close(self) -> None:
        pass


Printer = OutputPrinter | JsonPrinter


def follow(jobs: JobClient, job: str, request: OutputRequest, printer: Printer) -> Status | None:
    """Print the output from ``request`` on; the status, if the job has ended."""
    try:
        with closing(jobs.output(job, request)) as events:
            for event in events:
                printer.take(event)
                if isinstance(event, End):
                    return event.status
        return None
    finally:
        with suppress(BrokenPipeError):
            printer.close()


class Gone(BaseException):
    """A signal asks this program to leave its job alone or to take it along."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Attended:
    """A job that somebody waits for: what happens to it when they leave.

    The first Ctrl-C lets it go on without them, a second one soon after stops it. With ``takes_along`` whatever ends
    the waiting (Ctrl-C, SIGTERM, SIGHUP, a reader that has gone) stops it.
    """

    def __init__(self, open_jobs: Callable[[], JobClient], job: str, *, takes_along: bool, how_to_follow: str) -> None:
        self._open_jobs = open_jobs
        self._job = job
        self._takes_along = takes_along
        self._how_to_follow = how_to_follow

    def until_end(self, stay: Callable[[], Status]) -> Status:
        """The status that ``stay`` waits for. Raises Exit when it was left."""
        with _signals_raise(self._takes_along):
            try:
                return stay()
            except KeyboardInterrupt:
                if not self._takes_along:
                    self._let_go()
                return self._stop_it(stay)
            except Gone as gone:
                self._stop_it()
                raise click.exceptions.Exit(128 + gone.number) from None
            except BrokenPipeError:
                if self._takes_along:
                    self._stop_it()
                raise

    def _let_go(self) -> None:
        """Returns if the job is to be stopped."""
        hint = as_called(f"\n{printable(self._job)} goes on without us: {self._how_to_follow}; Ctrl-C again stops it")
        try:  # around the hint too: whoever has read it may be quick
            tell(hint)
            threading.Event().wait(SECOND_CTRL_C_S)
        except KeyboardInterrupt:
            return
        raise click.exceptions.Exit(130)

    def _stop_it(self, stay: Callable[[], Status] | None = None) -> Status:
        """Returns once it has ended, and ``stay`` has seen its end as well."""
        tell(f"stopping {printable(self._job)} ...")
        with self._open_jobs() as jobs:
            jobs.stop(self._job)
            return stay() if stay else jobs.wait(self._job)


@contextmanager
def _signals_raise(wanted: bool) -> Iterator[None]:
    """SIGTERM and SIGHUP as `Gone`."""

    def leave(number: int, _: Any) -> None:
        raise Gone(number)

    numbers = (signal.SIGTERM, signal.SIGHUP) if wanted else ()
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_stdin() -> Iterator[bytes]:
    """What comes on stdin, as it comes. Unbuffered: a thread may be left behind in the reading."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, AttributeError, ValueError):
        while data := sys.stdin.buffer.read(STDIN_BYTES):
            yield data
        return
    while data := os.read(descriptor, STDIN_BYTES):
        yield data


def forward_stdin(open_jobs: Callable[[], JobClient], job: str) -> None:
    """Give our stdin to the job from a thread of its own, until either has had enough; then close the job's."""
    threading.Thread(target=_forward, args=(open_jobs, job), daemon=True).start()


def _forward(open_jobs: Callable[[], JobClient], job: str) -> None:
    from osqbox.errors import OsqboxError
    from osqbox.jobs.errors import Code, JobError

    try:
        with open_jobs() as jobs:
            for data in read_stdin():
                jobs.send_input(job, data)
            jobs.send_input(job, b"", eof=True)
    except JobError as error:
        if error.code not in (Code.FAILED_PRECONDITION, Code.NOT_FOUND):  # it has ended, or has closed its stdin
            tell(printable(f"input broke off: {error.code.name}: {error.message}"))
    except (OsqboxError, OSError) as error:
        tell(printable(f"input broke off: {error}"))
