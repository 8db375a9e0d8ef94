"""An accepted ASGI WebSocket whose close never waits for the other end."""

from __future__ import annotations

from contextlib import suppress

import trio

from .asgi import ClientGone, Receive, Send
from .connection import current_connection

CLOSE_TIMEOUT_S = 1.0
"""For the close frame, when the other end has stopped reading; then the connection is cut."""
REASON_BYTES = 123
"""A close frame holds no more (RFC 6455, 5.5)."""
GONE_CODE = 1006


class WebSocket:
    """One task receives, others send, any may close."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._connection = current_connection()
        self._closed = self._closed_here = False
        self.close_code: int | None = None
        """With what the other end closed, once `receive` has returned None; 1006 when it vanished, or we closed."""

    @property
    def is_closed(self) -> bool:
        """Either end has closed, as far as is known: what is sent now goes nowhere."""
        return self._closed

    async def receive(self) -> bytes | str | None:
        """The next message; None when there will be none any more."""
        if self.close_code is not None:
            return None
        message = await self._receive()
        if message["type"] == "websocket.connect":
            message = await self._receive()
        if message["type"] != "websocket.receive":
            # After our own close the server says 1000 here, whatever the other end does.
            self.close_code = GONE_CODE if self._closed_here else int(message.get("code") or GONE_CODE)
            self._closed = True
            return None
        data, text = message.get("bytes"), message.get("text")
        return text if data is None and text is not None else data or b""

    async def send(self, message: bytes | str) -> None:
        """Does nothing when the other end has gone: `receive` tells."""
        await trio.lowlevel.checkpoint()
        if self._closed:
            return
        kind = "text" if isinstance(message, str) else "bytes"
        try:
            await self._send({"type": "websocket.send", kind: message})
        except ClientGone:
            self._closed = True
        except Exception:
            if not self._closed:  # closed by another task while this one was on its way: the server minds, nobody else
                raise

    async def aclose(self, code: int, reason: str = "") -> None:
        """Returns within CLOSE_TIMEOUT_S, also when a write hangs: then the connection is cut. May be called again."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = self._closed_here = True
        text = reason.encode()[:REASON_BYTES].decode(errors="ignore")
        in_time = trio.CancelScope(shield=True)  # also whoever is cancelled must not wait for a peer that does not read
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut_when_late, in_time)
            with suppress(ClientGone):
                await self._send({"type": "websocket.close", "code": int(code), "reason": text})
            in_time.cancel()

    async def _cut_when_late(self, in_time: trio.CancelScope) -> None:
        with in_time:
            await trio.sleep(CLOSE_TIMEOUT_S)
            if self._connection is not None:
                self._connection.abort()
