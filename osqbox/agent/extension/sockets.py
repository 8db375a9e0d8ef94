"""The unix sockets of the extension API: path rules, binding, and one bounded conversation over a stream."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from osqbox.agent.extension import messages
from osqbox.agent.extension.thrift import Message, ProtocolError
from osqbox.errors import BadSetup, OsqboxError

MAX_PATH_BYTES = 107
"""Of a unix socket on Linux: sockaddr_un holds 108 with the final NUL."""
MAX_MANAGER_PATH_BYTES = 97
"""osquery-go refuses longer ones, since an extension's path is the manager's and up to ten bytes."""
MAX_CONNECTIONS = 128
MESSAGE_TIMEOUT_S = 30.0
"""From the first byte of a message to its last, and for a reply to be taken."""
CHUNK_BYTES = 64 * 1024

Answer = Callable[[Message], Awaitable[bytes]]
"""The reply to a call, as bytes."""


def check_path(path: Path, limit_bytes: int = MAX_PATH_BYTES) -> Path:
    """Raises BadSetup when no socket can be at ``path``."""
    size = len(os.fsencode(path))
    if size > limit_bytes:
        raise BadSetup(
            f"the extension socket's path has {size} bytes, expected at most {limit_bytes}: {path}",
            hint="--extensions_socket=/tmp/osquery.em, or another short path",
        )
    if not path.parent.is_dir():
        raise BadSetup(
            f"cannot make the extension socket {path}: {path.parent} is no directory", hint=f"mkdir -p {path.parent}"
        )
    return path


def extension_path(manager: Path, uuid: int) -> Path:
    return manager.with_name(f"{manager.name}.{uuid}")


def remove_sockets(manager: Path) -> None:
    """Remove ``<path>`` and ``<path>.<uuid>``, as a manager does at its start and at its end.

    Other names are left alone, and so is what is neither a socket nor the empty file that the Python package puts
    there.
    """
    found = [manager, *manager.parent.glob(f"{_escaped(manager.name)}.[0-9]*")]
    for path in found:
        if path == manager or path.name.removeprefix(f"{manager.name}.").isdigit():
            _remove(path)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        facts = path.lstat()
        if stat.S_ISSOCK(facts.st_mode) or (stat.S_ISREG(facts.st_mode) and facts.st_size == 0):
            path.unlink()


async def listen(path: Path) -> trio.SocketListener:
    """A socket only its user may connect to, in place of what was there. Raises BadSetup."""
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        _remove(path)
        await socket.bind(str(path))
        path.chmod(0o600)  # noqa: ASYNC240 - before anyone can connect
        socket.listen(MAX_CONNECTIONS)
    except OSError as error:
        socket.close()
        raise BadSetup(
            f"cannot listen on the extension socket {path}: {error.strerror or error}",
            hint="--extensions_socket=PATH in a directory you may write to",
        ) from error
    return trio.SocketListener(socket)


# -- the side that serves ----------------------------------------------------------------------------------------


class Service:
    """Answers calls on any number of connections, each of which only harms itself."""

    def __init__(self, answer: Answer, *, message_timeout_s: float = MESSAGE_TIMEOUT_S) -> None:
        self._answer = answer
        self._message_timeout_s = message_timeout_s
        self.connections = 0
        self.calls = 0
        self.dropped = 0
        """Connections ended for what came over them, or because there were too many."""

    async def serve(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._converse, [listener])

    async def _converse(self, stream: trio.SocketStream) -> None:
        if self.connections >= MAX_CONNECTIONS:
            self.dropped += 1
            await stream.aclose()
            return
        self.connections += 1
        try:
            async with stream:
                await self._take_calls(stream)
        except (ProtocolError, trio.TooSlowError):
            self.dropped += 1
        except trio.BrokenResourceError:
            pass
        finally:
            self.connections -= 1

    async def _take_calls(self, stream: trio.SocketStream) -> None:
        decoder = messages.requests()
        deadline = math.inf
        while True:
            with trio.fail_at(deadline):
                data = await stream.receive_some(CHUNK_BYTES)
            if not data:
                return
            for call in decoder.feed(data):
                reply = await self._reply(call)
                with trio.fail_after(self._message_timeout_s):
                    await stream.send_all(reply)
                deadline = math.inf
            if not decoder.is_pending:
                deadline = math.inf
            elif deadline == math.inf:
                deadline = trio.current_time() + self._message_timeout_s

    async def _reply(self, call: Message) -> bytes:
        self.calls += 1
        if call.kind is not messages.CALL:
            raise ProtocolError(f"expected a call, got {call.kind.name}")
        if call.name not in messages.METHODS:
            return messages.encode_trouble(call, messages.UNKNOWN_METHOD, f"Invalid method name: '{call.name}'")
        try:
            return await self._answer(call)
        except Exception as error:  # noqa: BLE001 - a plugin's or a host's bug fails its call, never the server
            return messages.encode_trouble(call, messages.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


# -- the side that calls -----------------------------------------------------------------------------------------


class ExtensionGone(OsqboxError):
    """The peer could not be reached, did not answer in time, or did not speak the protocol."""


class NotListening(ExtensionGone):
    """Nothing accepts connections at the path: not yet, or not any more."""
