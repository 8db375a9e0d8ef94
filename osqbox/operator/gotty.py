"""A viewer that came with a GoTTY client: this end plays GoTTY's server, towards the broker it is a viewer like any.

GoTTY 2 (yudai) and its living fork (sorenisanerd) share a table; the fork shows itself by choosing an encoding.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from osqbox.shell_frames import (
    DATA_BYTES,
    INPUT_WINDOW_BYTES,
    VIEWER_FRAME_BYTES,
    CloseCode,
    Error,
    Frame,
    FrameError,
    FrameType,
    ViewerHello,
    ViewerWelcome,
    ack,
    data_in,
    hello,
    parse,
    parse_reset,
    parse_title,
    pong,
    resize,
)
from osqbox.shell_legacy import Gotty, GottyTable, LegacyError, decode_resize

from .socket import Socket

WEBTTY = "webtty"
INIT_TIMEOUT_S = 10.0
INIT_CHARS = 4096
MESSAGE_CHARS = VIEWER_FRAME_BYTES
BUFFER_BYTES = 16 * 1024
"""What the fork's client is told to put into one message at most: encoded it is still below MESSAGE_CHARS."""


class Init(msgspec.Struct):
    """A client's first message."""

    AuthToken: Annotated[str, Meta(max_length=1024)] = ""
    Arguments: str = ""
    """Of the program, in GoTTY; nothing here takes them."""


class GottyLink:
    """Translates both ways. `read_token` comes first, then `pump` must run beside the broker's view."""

    def __init__(self, socket: Socket, table: GottyTable, client: str) -> None:
        self._socket = socket
        self._table = table
        self._due: list[Frame] = [hello(ViewerHello(client=client))]
        """What we say to the broker ourselves; acknowledgements among it are merged."""
        self._typed, self._incoming = trio.open_memory_channel[Frame | FrameError](1)
        self._stirred = trio.Event()
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._room = trio.Event()
        self._speaks_base64 = False

    @property
    def close_code(self) -> int | None:
        """With what the client closed, once it has."""
        return self._socket.close_code

    async def aclose(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)

    async def read_token(self) -> str | None:
        """The token of the client's first message; None, and the socket closed, when there is none in time."""
        message: bytes | str | None = None
        with trio.move_on_after(INIT_TIMEOUT_S):
            message = await self._socket.receive()
        try:
            if not isinstance(message, str) or len(message) > INIT_CHARS:
                raise msgspec.DecodeError("no text of that length")
            return msgspec.json.decode(message, type=Init).AuthToken
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            await self._socket.aclose(CloseCode.PROTOCOL_ERROR, 'expected {"Arguments": "", "AuthToken": "..."} first')
            return None

    # from the client

    async def receive(self) -> Frame | None:
        """As a viewer of ours would say it; None when the client has gone. Raises FrameError."""
        await trio.lowlevel.checkpoint()
        while True:
            self._stirred = trio.Event()
            if self._due:
                return self._due.pop(0)
            try:
                typed = self._incoming.receive_nowait()
            except trio.WouldBlock:
                await self._stirred.wait()
            except trio.EndOfChannel:
                return None
            else:
                if isinstance(typed, FrameError):
                    raise typed
                return typed

    async def pump(self) -> None:
        """Read the client until it goes. Input waits while the agent has a whole window of it to take."""
        with self._typed:
            while (message := await self._socket.receive()) is not None:
                try:
                    await self._heard(message)
                except FrameError as wrong:
                    await self._say(wrong)
                    break
        self._stirred.set()

    async def _heard(self, message: bytes | str) -> None:
        if isinstance(message, bytes):
            raise FrameError("expected a text message of webtty, got a binary one", CloseCode.UNSUPPORTED_DATA)
        if len(message) > MESSAGE_CHARS:
            raise FrameError(f"expected at most {MESSAGE_CHARS} characters, got {len(message)}", CloseCode.TOO_BIG)
        try:
            kind, payload = self._table.decode(message)
            if kind is Gotty.INPUT:
                await self._type(self._input(payload))
            elif kind is Gotty.PING:
                await self._socket.send(self._table.encode(Gotty.PONG))
            elif kind is Gotty.RESIZE:
                await self._say(resize(decode_resize(payload)))
            elif kind is Gotty.SET_ENCODING:
                await self._set_encoding(payload)
        except LegacyError as wrong:
            raise FrameError(str(wrong)) from None

    def _input(self, payload: str) -> bytes:
        if not self._speaks_base64:
            return payload.encode(errors="replace")
        try:
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise FrameError("input: expected base64, which this client has chosen") from None

    async def _set_encoding(self, payload: str) -> None:
        if payload not in ("base64", "null"):
            raise FrameError(f"set-encoding: expected base64 or null, got {payload[:20]!r}")
        self._speaks_base64 = payload == "base64"
        if Gotty.BUFFER_SIZE in self._table.server:  # only the fork chooses an encoding, and only it knows this
            await self._socket.send(self._table.encode(Gotty.BUFFER_SIZE, str(BUFFER_BYTES)))

    async def _type(self, data: bytes) -> None:
        for start in range(0, len(data), DATA_BYTES):
            piece = data[start : start + DATA_BYTES]
            while self._sent_bytes + len(piece) - self._taken_bytes > INPUT_WINDOW_BYTES:
                self._room = trio.Event()
                await self._room.wait()
            await self._say(data_in(self._sent_bytes, piece))
            self._sent_bytes += len(piece)

    async def _say(self, typed: Frame | FrameError) -> None:
        await self._typed.send(typed)
        self._stirred.set()

    # to the client

    async def send(self, frame: Frame) -> None:
        """Show it the way GoTTY's server would; what GoTTY has no word for is answered or left out here."""
        match frame.type:
            case FrameType.HELLO:
                welcome = parse(frame, ViewerWelcome)
                await self._title(welcome.hostname or welcome.node)
            case FrameType.TITLE:
                await self._title(parse_title(frame))
            case FrameType.DATA_OUT:
                await self._socket.send(self._table.output(frame.payload))
                self._answer(ack(frame.offset + len(frame.payload)))
            case FrameType.SNAPSHOT:
                await self._socket.send(self._table.output(frame.payload))
                self._answer(ack(frame.offset))
            case FrameType.RESET:
                start, end = parse_reset(frame)
                note = f"\x1b[!p\r\n[{end - start} bytes were too much for this connection]\r\n"
                await self._socket.send(self._table.output(note.encode()))
                self._answer(ack(end))
            case FrameType.ERROR:
                note = f"\r\n[{parse(frame, Error).message}]\r\n"
                await self._socket.send(self._table.output(note.encode()))
            case FrameType.ACK:
                self._taken_bytes = frame.offset
                self._room.set()
            case FrameType.PING:
                self._answer(pong(frame))

    async def _title(self, text: str) -> None:
        await self._socket.send(self._table.encode(Gotty.TITLE, text))

    def _answer(self, frame: Frame) -> None:
        if self._due and self._due[-1].type is frame.type is FrameType.ACK:
            self._due.pop()
        self._due.append(frame)
        self._stirred.set()
