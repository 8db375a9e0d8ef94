"""A `Terminal` behind which a script answers: for pretended hosts, which must not run real programs."""

from __future__ import annotations

import trio

from osqbox.agent.shell.script import Console, Outcome, Script
from osqbox.agent.shell.terminal import Ending
from osqbox.shell_frames import Size

MAX_TYPED_BYTES = 64 * 1024
"""What waits to be read; who types more has to wait."""
PIECE_BYTES = 1024


class ScriptedShell:
    """Runs in the task of whoever reads it."""

    def __init__(self, script: Script, hostname: str, size: Size) -> None:
        self._console = Console(script, hostname, size)
        self._hostname = hostname
        self._typed = bytearray()
        self._news = trio.Event()
        """Something was typed, or it is over."""
        self._room = trio.Event()
        self._late: Outcome | None = None
        self._late_at = float("inf")
        self._exit: Ending | None = None
        self._exited = trio.Event()

    @property
    def shell(self) -> str:
        return "scripted"

    @property
    def user(self) -> str:
        return self._console.commands.script.user

    @property
    def pid(self) -> int:
        return 0

    @property
    def title(self) -> str:
        return f"{self._console.commands.script.user}@{self._hostname}"

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if data := self._console.take():
                return data
            if self._console.exit_code is not None:
                self._end(Ending(code=self._console.exit_code))
            if self._exit is not None:
                return b""
            await self._step()

    async def _step(self) -> None:
        if not self._typed:
            with trio.CancelScope(deadline=self._due_at()) as patience:
                await self._news.wait()
            if patience.cancelled_caught:
                self._console.answer()
                return
        piece = bytes(self._typed[:PIECE_BYTES])
        del self._typed[:PIECE_BYTES]
        if not self._typed and self._exit is None:
            self._news = trio.Event()
        self._room.set()
        self._console.type(piece)

    def _due_at(self) -> float:
        """When the late answer is due. The clock starts once for each."""
        late = self._console.late
        if late is not self._late:
            self._late = late
            self._late_at = trio.current_time() + late.delay_s if late else float("inf")
        return self._late_at

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        for at in range(0, len(data), PIECE_BYTES):
            while len(self._typed) >= MAX_TYPED_BYTES and self._exit is None:
                self._room = trio.Event()
                await self._room.wait()
            if self._exit is not None:
                return
            self._typed += data[at : at + PIECE_BYTES]
            self._news.set()

    async def send_eof(self) -> None:
        await self.send_all(b"\x04")

    def resize(self, size: Size) -> None:
        self._console.commands.size = size

    async def wait(self) -> Ending:
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    async def close(self, grace_s: float) -> None:  # noqa: ARG002 - nothing has to be waited for
        self._end(Ending(signal=1))  # SIGHUP
        await trio.lowlevel.checkpoint()

    async def interrupt(self, grace_s: float) -> None:
        await self.close(grace_s)

    def _end(self, how: Ending) -> None:
        self._exit = self._exit or how
        self._exited.set()
        self._news.set()
        self._room.set()
