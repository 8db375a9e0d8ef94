"""The running agent's control socket: JSON lines over a unix socket in its root that only its user may open.

One request, one reply: ``{"do": "status"}`` is answered with ``{"ok": ...}`` or ``{"error": ..., "hint": ...}``.
The client is on the standard library alone, so that a verb starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osqbox.errors import BadSetup, BadUsage, NotInTime, UserError

if TYPE_CHECKING:
    import trio

    from osqbox.agent.instances.manager import Runner

MAX_REQUEST_BYTES = 1024 * 1024
MAX_REPLY_BYTES = 256 * 1024 * 1024
MAX_CONNECTIONS = 16
REQUEST_TIMEOUT_S = 10.0
"""For a request to arrive once somebody has connected."""
REPLY_TIMEOUT_S = 90.0
_NAME = "control.sock"
_CHUNK_BYTES = 64 * 1024


def control_path(root: Path) -> Path:
    return root / _NAME


# -- the agent's side --------------------------------------------------------------------------------------------


async def serve_control(runner: Runner, *, task_status: trio.TaskStatus[None]) -> None:
    """Answer requests until cancelled. Raises BadSetup when there can be no such socket."""
    import trio

    path = control_path(runner.options.root)
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def converse(stream: trio.SocketStream) -> None:
        async with limiter, stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await _answer(runner, stream)

    _remove(path)  # of an agent that was killed: the root is locked, so nobody uses it
    listener = await _listen(path)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, converse, [listener])
            task_status.started()
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


async def _listen(path: Path) -> trio.SocketListener:
    import trio

    made = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await made.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101
        made.listen()
    except OSError as error:
        made.close()
        raise BadSetup(
            f"cannot make the control socket {path}: {error.strerror or error}", hint="osqbox agent --root SHORT_DIR"
        ) from error
    return trio.SocketListener(made)


async def _answer(runner: Runner, stream: trio.SocketStream) -> None:
    import trio

    with trio.move_on_after(REQUEST_TIMEOUT_S) as waiting:
        line = await _read_line(stream)
    if waiting.cancelled_caught:
        return
    try:
        reply = {"ok": await _do(runner, _read(line))}
    except UserError as error:
        reply = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
    await stream.send_all(json.dumps(reply).encode() + b"\n")


async def _read_line(stream: trio.SocketStream) -> bytes:
    """Up to the newline; what is too long or ends early is for `_read` to refuse."""
    line = bytearray()
    while b"\n" not in line and len(line) <= MAX_REQUEST_BYTES:
        chunk = await stream.receive_some(_CHUNK_BYTES)
        if not chunk:
            break
        line += chunk
    return bytes(line)


def _read(line_untrusted: bytes) -> Mapping[str, Any]:
    if len(line_untrusted) > MAX_REQUEST_BYTES:
        raise BadUsage(f"expected a request of at most {MAX_REQUEST_BYTES} bytes, got a longer one")
    try:
        request = json.loads(line_untrusted)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise BadUsage("expected one JSON object on a line")
    return request


async def _do(runner: Runner, request: Mapping[str, Any]) -> Any:
    from osqbox.agent.instances.options import InstanceSpec

    match request.get("do"):
        case "status":
            return await runner.status()
        case "add_instance":
            runner.add(InstanceSpec(_text(request, "name"), _text(request, "enroll_secret")))
            return None
        case "remove_instance":
            await runner.remove(_text(request, "name"))
            return None
        case "query":
            return await runner.query(_text(request, "sql"), instance=_text(request, "instance") or None)
        case other:
            raise BadUsage(f"expected status, add_instance, remove_instance or query, got {other!r}")


def _text(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name) or ""
    if not isinstance(value, str):
        raise BadUsage(f"expected {name} to be text, got {value!r}")
    return value


# -- the verbs' side ---------------------------------------------------------------------------------------------


def ask(root: Path, do: str, /, *, timeout_s: float = REPLY_TIMEOUT_S, **request: Any) -> Any:
    """What the agent on ``root`` answers. Raises UserError: its own refusals, or that no agent is there."""
    nobody = UserError(f"no agent with instances runs on {root}", hint="osqbox agent --instances default")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(control_path(root)))
            connection.sendall(json.dumps({"do": do, **request}).encode() + b"\n")
            reply = _receive(connection)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise nobody from None
    except TimeoutError:
        raise NotInTime(f"no answer from the agent on {root} within {timeout_s:g} s") from None
    except OSError as error:
        raise UserError(f"cannot talk to the agent on {root}: {error.strerror or error}") from None
    if "error" in reply:
        raise _refusal(reply)
    return reply.get("ok")


def _receive(connection: socket.socket) -> dict[str, Any]:
    text = bytearray()
    while chunk := connection.recv(_CHUNK_BYTES):
        text += chunk
        if len(text) > MAX_REPLY_BYTES:
            raise UserError(f"expected at most {MAX_REPLY_BYTES} bytes from the agent, got more")
    try:
        reply = json.loads(text)
    except ValueError:
        raise UserError("the agent ended before it answered", hint="osqbox agent status") from None
    if not isinstance(reply, dict):
        raise UserError("expected a JSON object from the agent, got something else")
    return reply


def _refusal(reply: Mapping[str, Any]) -> UserError:
    kind = BadUsage if reply.get("exit_code") == BadUsage.exit_code else UserError
    return kind(str(reply["error"]), hint=reply.get("hint"))
