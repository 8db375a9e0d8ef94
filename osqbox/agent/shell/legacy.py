"""The Launcher of 2018 to 2020 as an agent of a broker, its faults included: for testing brokers, not for use.

pkg/control, pkg/wsrelay, pkg/webtty and pkg/ptycmd of kolide/launcher 0.11.11.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from osqbox import shell_legacy as legacy
from osqbox.agent import messages
from osqbox.agent.client import Core
from osqbox.agent.shell.offers import SHELLS_PATH, Offer, read_offers_2018
from osqbox.agent.shell.socket import Dialer, JoinFailed
from osqbox.agent.shell.terminal import ShellRefused, Terminal
from osqbox.agent.wire import CallFailed, Channel
from osqbox.shell_frames import Size
from osqbox.shell_legacy import BrokerFrame, LegacyError

INTERRUPT_GRACE_S = 10.0
_OK = 200
_DEADLINE, _PTY_CLOSED = "deadline", "PTY closed"

OpenTerminal = Callable[[Size], Awaitable[Terminal]]
OnEvent = Callable[[str, dict[str, Any]], None]


async def poll_2018(core: Core, dialer: Dialer, interval_s: float, start: Callable[[Offer], None]) -> None:
    """Ask after one whole interval, and so on, with the key there is, be it none or one the server has called invalid.

    Failures change nothing, and a server that never answers stops the asking for ever: there is no timeout.
    """
    channel = Channel(dialer.hostname(), dialer.context, replace(dialer.transport, timeout_s=float("inf")))
    try:
        while True:
            await trio.sleep(interval_s)
            try:
                status, body = await channel.fetch(SHELLS_PATH, messages.node_body(core.node_key))
            except CallFailed:
                continue
            for offer in read_offers_2018(body) if status == _OK else ():
                start(offer)
    finally:
        with trio.CancelScope(shield=True):
            await channel.aclose()


async def run_2018(
    offer: Offer,
    dialer: Dialer,
    open_terminal: OpenTerminal,
    nursery: trio.Nursery,
    *,
    hostname: str,
    on_event: OnEvent,
    deadline_s: float = legacy.DEADLINE_S,
    interrupt_grace_s: float = INTERRUPT_GRACE_S,
) -> str:
    """Why it ended. A shell that only lost its broker is left running, in ``nursery``, until the agent stops."""
    try:
        async with dialer.dial(offer.path, polite=False) as connection:
            terminal = await open_terminal(Size(80, 24))
            on_event("shell_started", {"session": offer.session, "shell": terminal.shell, "user": terminal.user})
            try:
                reason = await _Relay(connection, terminal, deadline_s).run(
                    offer.secret, f"{terminal.shell}@{hostname}"
                )
            except BaseException:
                await terminal.close(0.0)
                raise
    except (JoinFailed, ShellRefused) as error:
        return f"refused: {error}"
    nursery.start_soon(_leave, terminal, reason, interrupt_grace_s)
    return reason


async def _leave(terminal: Terminal, reason: str, grace_s: float) -> None:
    """Only the deadline ends the program, and only the program: what it started stays until the agent stops."""
    try:
        if reason == _DEADLINE:
            await terminal.interrupt(grace_s)
        if reason != _PTY_CLOSED:
            await trio.sleep_forever()
    finally:
        await terminal.close(0.0)


class _Relay:
    def __init__(self, connection: WebSocketConnection, terminal: Terminal, deadline_s: float) -> None:
        self._connection = connection
        self._terminal = terminal
        self._deadline_s = deadline_s
        self._reason = ""

    async def run(self, secret: str, title: str) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_over, partial(self._say, secret, title), nursery.cancel_scope)
            nursery.start_soon(self._until_over, self._hear, nursery.cancel_scope)
        return self._reason

    async def _until_over(self, task: Callable[[], Awaitable[str]], scope: trio.CancelScope) -> None:
        try:
            reason = await task()
        except ConnectionClosed:
            reason = "closed by the server"
        except LegacyError as error:
            reason = str(error)
        self._reason = self._reason or reason
        scope.cancel()

    async def _say(self, secret: str, title: str) -> str:
        await self._connection.send_message(legacy.authenticate(secret))
        await self._connection.send_message(legacy.title(title))
        while data := await self._terminal.receive_some():
            for at in range(0, len(data), legacy.OUTPUT_BYTES):
                await self._connection.send_message(legacy.output(data[at : at + legacy.OUTPUT_BYTES]))
        return _PTY_CLOSED

    async def _hear(self) -> str:
        """Only text counts against the deadline, and binary messages are not read at all."""
        with trio.move_on_after(self._deadline_s) as patience:
            while True:
                message = await self._connection.get_message()
                if isinstance(message, str):
                    patience.deadline = trio.current_time() + self._deadline_s
                    await self._heard(message)
        return _DEADLINE

    async def _heard(self, message: str) -> None:
        # One read into a buffer of 2,048 bytes; what does not fit is gone.
        whole = message.encode("utf-8", "surrogatepass")[: legacy.INPUT_BYTES + 1]
        kind, _ = legacy.decode_broker(message)
        if kind is BrokerFrame.INPUT:
            await self._terminal.send_all(whole[1:])
        elif kind is BrokerFrame.PING:
            await self._connection.send_message(legacy.pong())
        elif kind is BrokerFrame.RESIZE:
            self._terminal.resize(legacy.decode_resize(whole[1:].decode("utf-8", "replace")))
