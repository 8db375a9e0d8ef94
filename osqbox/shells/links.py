"""Connections of a session as the broker sees them: frames in, frames out, whatever the other end speaks."""

from __future__ import annotations

from typing import Protocol

import trio

from osqbox import shell_frames as frames
from osqbox import shell_legacy as legacy
from osqbox.listen.websocket import WebSocket
from osqbox.shell_frames import AGENT_FRAME_BYTES, CloseCode, Frame, FrameError, FrameType
from osqbox.shell_legacy import AgentFrame, InputSplitter, LegacyError


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
