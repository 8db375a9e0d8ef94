"""Connections of a session as the broker sees them: frames in, frames out, whatever the other end speaks."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import trio

from osqbox import shell_frames as frames
from osqbox import shell_legacy as legacy
from osqbox.listen.asgi import ASGIApp, ClientGone, Receive, Send
from osqbox.listen.connection import current_connection
from osqbox.shell_frames import AGENT_FRAME_BYTES, CloseCode, Frame, FrameError, FrameType
from osqbox.shell_legacy import AgentFrame, InputSplitter, LegacyError

__all__ = ["ASGIApp", "FrameLink", "LauncherLink", "Link", "Receive", "Send", "WebSocket"]

CLOSE_TIMEOUT_S = 1.0
"""For the close frame, when the other end has stopped reading; then the connection is cut."""
REASON_BYTES = 123
"""A close frame holds no more (RFC 6455, 5.5)."""
GONE_CODE = 1006


class Link(Protocol):
    """One task receives, another sends, a third may close at any time."""

    @property
    def close_code(self) -> int | None:
        """With what the other end closed, once `receive` has returned None; 1000 is on purpose."""
        ...

    async def receive(self) -> Frame | None:
        """None when the other end has gone. Raises FrameError."""
        ...

    async def send(self, frame: Frame) -> None:
        """Does nothing when the other end has gone: `receive` tells."""
        ...

    async def aclose(self, code: int, reason: str = "") -> None:
        """Returns soon, also when a `send` hangs, and then ends that too. May be called again."""
        ...


class WebSocket:
    """An accepted ASGI WebSocket."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._connection = current_connection()
        self._closed = False
        self.close_code: int | None = None

    async def receive(self) -> bytes | str | None:
        if self.close_code is not None:
            return None
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self.close_code = int(message.get("code") or GONE_CODE)
            self._closed = True
            return None
        data, text = message.get("bytes"), message.get("text")
        return text if data is None and text is not None else data or b""

    async def send(self, message: bytes | str) -> None:
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
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
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


class FrameLink:
    """``shell.v1``."""

    def __init__(self, socket: WebSocket, limit_bytes: int = AGENT_FRAME_BYTES) -> None:
        self._socket = socket
        self._limit_bytes = limit_bytes

    @property
    def close_code(self) -> int | None:
        return self._socket.close_code

    async def receive(self) -> Frame | None:
        message = await self._socket.receive()
        return None if message is None else frames.decode(message, self._limit_bytes)

    async def send(self, frame: Frame) -> None:
        await self._socket.send(frames.encode(frame))

    async def aclose(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)


class LauncherLink:
    """The text frames of the Launcher of 2018. What it has no word for is left out."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._splitter = InputSplitter()
        self._head = 0

    @property
    def close_code(self) -> int | None:
        return self._socket.close_code

    async def receive(self) -> Frame | None:
        while True:
            message = await self._socket.receive()
            if message is None:
                return None
            frame = self._read(message)
            if frame is not None:
                return frame

    def _read(self, message: bytes | str) -> Frame | None:
        if isinstance(message, bytes):
            raise FrameError("expected a text message, got a binary one", CloseCode.UNSUPPORTED_DATA)
        if len(message) > legacy.FRAME_CHARS:
            raise FrameError(f"expected at most {legacy.FRAME_CHARS} characters, got {len(message)}", CloseCode.TOO_BIG)
        try:
            kind, payload = legacy.decode_agent(message)
            if kind is AgentFrame.OUTPUT:
                return self._output(legacy.decode_output(payload))
        except LegacyError as wrong:
            raise FrameError(str(wrong)) from None
        if kind is AgentFrame.TITLE:
            return frames.title(payload)
        return Frame(FrameType.PONG) if kind is AgentFrame.PONG else None

    def _output(self, data: bytes) -> Frame:
        frame = frames.data_out(self._head, data)
        self._head += len(data)
        return frame

    async def send(self, frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        match frame.type:
            case FrameType.DATA_IN:
                for text in self._splitter.frames(frame.payload):
                    await self._socket.send(text)
            case FrameType.RESIZE:
                await self._socket.send(legacy.resize(frames.parse_resize(frame)))
            case FrameType.PING:
                await self._socket.send(legacy.ping())

    async def aclose(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)
