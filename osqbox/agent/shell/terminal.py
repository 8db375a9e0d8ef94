"""What a session needs of a terminal, whether a program runs behind it or a script answers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from osqbox.errors import OsqboxError
from osqbox.shell_frames import Size


class ShellRefused(OsqboxError):
    """A shell that is not started: the text says why, and is told to the operator."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a program ended: one of the two."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def of_returncode(cls, returncode: int) -> Ending:
        return cls(code=returncode) if returncode >= 0 else cls(signal=-returncode)


class Terminal(Protocol):
    """One reader, one writer. Whoever opened it ends it with `close`."""

    @property
    def shell(self) -> str: ...

    @property
    def user(self) -> str: ...

    @property
    def pid(self) -> int:
        """Of its program; 0 where there is none."""
        ...

    @property
    def title(self) -> str: ...

    async def receive_some(self) -> bytes:
        """The next output; empty when the program has exited and everything it wrote has been read."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Type; returns when the terminal took it. What nobody will ever read is dropped."""
        ...

    async def send_eof(self) -> None:
        """No more will be typed."""
        ...

    def resize(self, size: Size) -> None: ...

    async def wait(self) -> Ending: ...

    async def close(self, grace_s: float) -> None:
        """Hang up; what has not ended after ``grace_s`` is killed, with everything it started. Idempotent."""
        ...

    async def interrupt(self, grace_s: float) -> None:
        """Launcher's end: SIGINT to the program alone, SIGKILL after ``grace_s``. `close` is still to come."""
        ...
