"""A box in a thread of its own, driven from synchronous code."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import trio

from osqbox.box import Box, open_box
from osqbox.settings import CommsSettings, JobSettings, Settings

T = TypeVar("T")

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class OsqboxServer:
    """One running box. Everything of it happens in its own Trio thread; calls here may come from any thread.

    ``start`` and ``stop`` come from the fixture; use it as a context manager elsewhere.
    """

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._settings = Settings(
            data_dir=directory,
            certs_dir=settings.pop("certs_dir", directory / "certs"),
            agents_port=settings.pop("agents_port", 0),
            operator_port=settings.pop("operator_port", 0),
            jobs=settings.pop("jobs", JobSettings(port=0)),
            comms=settings.pop("comms", CommsSettings(port=0)),
            ephemeral=True,
            **settings,
        )
        self._thread = threading.Thread(target=self._run, name="osqbox", daemon=True)
        self._started: Future[None] = Future()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self.box: Box
        """For what this class has no words for; touch it only inside `call` or `call_async`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the box is ready. Raises UserError when it cannot start."""
        self._settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        self._started.result(START_TIMEOUT_S)

    def stop(self) -> None:
        """Drain and end; returns when the thread is gone."""
        if self._token is not None and self._thread.is_alive():
            self._token.run_sync_soon(self.box.stop)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"osqbox: the box did not stop within {STOP_TIMEOUT_S} s")

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(_sole(error))

    async def _serve(self) -> None:
        async with open_box(self._settings) as self.box, trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._started.set_result(None)
            await self.box.stopping.wait()
            self._nursery.cancel_scope.cancel()

    def call(self, function: Callable[[], T]) -> T:
        """Run a plain function on the box's loop."""
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def call_async(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run an async function on the box's loop and return its value."""
        return trio.from_thread.run(function, trio_token=self._token)

    def spawn(self, task: Callable[[], Awaitable[object]]) -> None:
        """Start a task that ends with the box at the latest."""
        nursery = self._nursery
        assert nursery is not None
        self.call(lambda: nursery.start_soon(task))

    @property
    def url(self) -> str:
        """Where agents connect to: ``https://localhost:PORT``."""
        return self.box.agents_url

    @property
    def operator_url(self) -> str:
        return self.box.operator_url

    @property
    def token(self) -> str:
        """Of the operator API."""
        return self.box.token

    @property
    def ca_file(self) -> Path:
        assert self.box.identity.ca is not None
        return self.box.identity.ca

    @property
    def ready(self) -> dict[str, Any]:
        """The ready object, as `osqbox serve --json` prints it."""
        return self.box.ready()


def _sole(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
