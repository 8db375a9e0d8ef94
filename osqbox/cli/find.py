"""Which box a verb talks to: the one it is told, else the one that runs here."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from osqbox import running
from osqbox.cli.output import tell
from osqbox.client import Client
from osqbox.errors import BadUsage, NotInTime, UserError
from osqbox.running import RunningBox

F = TypeVar("F", bound=Callable[..., Any])

WAIT_S = 60.0
"""How long a verb waits for a box that is starting."""
GRACE_S = 2.0
"""How long it waits for one to appear, as in ``osqbox serve & osqbox nodes``."""
GRACE_WAITED_S = 10.0
"""The same when OSQBOX_WAITED=1 says that one was just started."""
TELL_AFTER_S = 1.0
POLL_S = 0.02


class NoBox(UserError):
    """Nothing to talk to."""


class Found:
    """The box a verb talks to."""

    def __init__(self, client: Client, ready: dict[str, Any] | None = None, pid: int | None = None) -> None:
        self.client = client
        self.pid = pid
        """Of a box found on this machine; None when only its URL is known."""
        self._ready = ready

    @property
    def ready(self) -> dict[str, Any]:
        """The ready object; of a box known by its URL, what ``/api/v1/info`` tells, without the enroll secret."""
        if self._ready is None:
            self._ready = {**self.client.get("info"), "token": self.client.token}
        return self._ready


class Where:
    """The options of a verb that say which box."""

    def __init__(self, url: str | None, token: str | None, data: Path | None) -> None:
        self.url = url
        self.token = token
        self.data = data

    def find(self, *, wait_s: float = WAIT_S, grace_s: float | None = None) -> Found:
        """The box, as `find_box` finds it. Raises UserError."""
        return find_box(self.url, self.token, self.data, wait_s=wait_s, grace_s=grace_s)

    @property
    def client(self) -> Client:
        return self.find().client

    @property
    def named_url(self) -> str | None:
        """The URL that options or environment name; None when the box is to be found on this machine."""
        return self.url or (None if self.data else os.environ.get("OSQBOX_URL") or None)


def box_options(function: F) -> F:
    """Gives a command ``--url --token --data``, which it gets as one ``box: Where``."""

    @functools.wraps(function)
    def with_box(*args: Any, url: str | None, token: str | None, data: Path | None, **options: Any) -> Any:
        return function(*args, box=Where(url, token, data), **options)

    for option in (
        click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The box on that data directory."),
        click.option("--token", help="Its token. Default: OSQBOX_TOKEN."),
        click.option("--url", help="The box at that URL. Default: OSQBOX_URL, else the newest box of this user."),
    ):
        with_box = option(with_box)
    return with_box  # type: ignore[return-value]


def find_box(
    url: str | None = None,
    token: str | None = None,
    data: Path | None = None,
    *,
    wait_s: float = WAIT_S,
    grace_s: float | None = None,
) -> Found:
    """The box of ``url``, of ``data``, of OSQBOX_URL, or the newest that runs here, in that order.

    Waits at most ``wait_s`` for a box that is starting, and ``grace_s`` for one to appear. Raises NoBox when there
    is none, NotInTime when it does not get ready, BadUsage when a URL comes without a token.
    """
    if url and data:
        raise BadUsage("expected --url or --data, got both")
    wanted = Where(url, token, data)
    if named := wanted.named_url:
        return _at_url(named, token or os.environ.get("OSQBOX_TOKEN"))
    box = await_ready(data, wait_s=wait_s, grace_s=grace_s)
    assert box.ready is not None
    return Found(Client(box.ready["operator"], token or box.ready["token"]), box.ready, box.pid)


def client_at(url: str, token: str | None) -> Client:
    """A client of a named URL; OSQBOX_CA_FILE is trusted for https."""
    return Client(url, token, ca_file=os.environ.get("OSQBOX_CA_FILE") or None)


def _at_url(url: str, token: str | None) -> Found:
    local = next(
        (box for box in running.boxes() if box.ready and box.ready["operator"].rstrip("/") == url.rstrip("/")), None
    )
    if local and local.ready:
        return Found(client_at(url, token or local.ready["token"]), local.ready, local.pid)
    client = client_at(url, token)
    if not token:
        raise BadUsage(f"a token is needed for the box at {client.url}", hint=f"osqbox ... --url {url} --token TOKEN")
    return Found(client)


def await_ready(data: Path | None, *, wait_s: float = WAIT_S, grace_s: float | None = None) -> RunningBox:
    """The newest box of this user, or the one on ``data``, once it is ready. Raises NoBox or NotInTime."""
    if grace_s is None:
        grace_s = GRACE_WAITED_S if os.environ.get("OSQBOX_WAITED") == "1" else GRACE_S
    starting: RunningBox | None = None
    for waited_s in _polls(wait_s):
        box = next((box for box in running.boxes(data) if box.state != "stopping"), None)
        if box is not None and box.state == "ready" and box.ready is not None:
            return box
        if box is None and starting is not None:
            raise NoBox(f"the box with pid {starting.pid} ended before it was ready", hint="osqbox serve")
        if box is None and waited_s >= min(grace_s, wait_s):
            break
        starting = box
    if starting is not None:
        raise NotInTime(
            f"the box with pid {starting.pid} was not ready within {wait_s:g} s", hint="osqbox wait --timeout 120"
        )
    where = f" on {data}" if data else ""
    raise NoBox(f"no box is running{where}", hint=f"osqbox serve --data {data}" if data else "osqbox serve")


def _polls(wait_s: float) -> Iterator[float]:
    """Seconds waited so far, at once and then until ``wait_s`` are over; says so to a person who waits."""
    began = time.monotonic()
    told = False
    while True:
        waited_s = time.monotonic() - began
        if waited_s >= TELL_AFTER_S and not told and sys.stderr.isatty():
            tell("waiting for the box to be ready ...")
            told = True
        yield waited_s
        if waited_s >= wait_s:
            return
        pause(POLL_S)


def pause(seconds: float) -> None:
    """Sleep: a file that another process writes has no event to wait for."""
    threading.Event().wait(seconds)


def is_running(pid: int) -> bool:
    """Whether a box of this user with that process id lives."""
    with suppress(OSError):
        return any(box.pid == pid for box in running.boxes())
    return False
