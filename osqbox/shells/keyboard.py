"""What operators type, on its way to the agent: in order, no faster than the rate, kept until it has arrived. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from osqbox import shell_frames as frames
from osqbox.shell_frames import DATA_BYTES, INPUT_WINDOW_BYTES, Frame, FrameError
from osqbox.shells.messages import ShellBounds

PASTE_BEGIN, PASTE_END = b"\x1b[200~", b"\x1b[201~"


@dataclass(slots=True)
class Client:
    """Input counted under one name, over all its connections."""

    received: int = 0
    acked: int = 0
    """Of that, what has arrived at the agent, or never will."""


class Keyboard:
    """One session's input, counted in bytes since it began: ``acked`` <= ``sent`` <= ``head``."""

    def __init__(self, bounds: ShellBounds, now: float) -> None:
        self._bounds = bounds
        self._waiting = bytearray()
        """From `acked` on."""
        self.acked = self.sent = self.head = 0
        self._owners: deque[tuple[int, Client, int]] = deque()
        """Whose input it is: (end in the session's input, client, end in the client's)."""
        self._eof_at: int | None = None
        self._tokens = float(bounds.input_burst_bytes)
        self._tokens_at = now
        self.is_pasting = False
        """In the middle of a bracketed paste."""
        self._tail = b""

    @property
    def is_full(self) -> bool:
        return self.head - self.acked >= self._bounds.input_queue_bytes

    def type(self, data: bytes, client: Client) -> None:
        client.received += len(data)
        self._waiting += data
        self.head += len(data)
        self._own(client)
        self._follow_paste(data)

    def ignore(self, count_bytes: int, client: Client) -> None:
        """Input without effect: it is done with as soon as everything before it is."""
        client.received += count_bytes
        if any(owner is client for _, owner, _ in self._owners):
            self._owners.append((self.head, client, client.received))
        else:
            client.acked = client.received

    def end_of_input(self) -> None:
        self._eof_at = self.head

    def _own(self, client: Client) -> None:
        """Note whose the input is, up to both heads; what is of one piece is noted as one."""
        if self._owners:
            end, last, last_end = self._owners[-1]
            if last is client and self.head - end == client.received - last_end:
                self._owners.pop()
        self._owners.append((self.head, client, client.received))

    def _follow_paste(self, data: bytes) -> None:
        recent = self._tail + data
        begin, end = recent.rfind(PASTE_BEGIN), recent.rfind(PASTE_END)
        if begin != end:
            self.is_pasting = begin > end
        self._tail = recent[-len(PASTE_BEGIN) + 1 :]

    def hand_over(self) -> None:
        """Somebody else types now; what was typed before stays before."""
        self.is_pasting = False
        self._tail = b""

    # to the agent

    def next(self, now: float) -> Frame | None:
        """The next frame that may be sent, if any."""
        self._refill(now)
        start = self.sent
        room = min(self.head - start, self.acked + INPUT_WINDOW_BYTES - start, int(self._tokens), DATA_BYTES)
        if room > 0:
            begin = start - self.acked
            self.sent += room
            self._tokens -= room
            return frames.data_in(start, bytes(self._waiting[begin : begin + room]))
        if self._eof_at is not None and self._eof_at == self.sent:
            self._eof_at = None
            return frames.eof_in(self.sent)
        return None

    def _refill(self, now: float) -> None:
        gained = (now - self._tokens_at) * self._bounds.input_bytes_per_s
        self._tokens = min(float(self._bounds.input_burst_bytes), self._tokens + gained)
        self._tokens_at = now

    @property
    def is_rationed(self) -> bool:
        """Something waits for nothing but time."""
        return self.head > self.sent and self._tokens < 1

    @property
    def ration_s(self) -> float:
        """Until a worthwhile piece may be sent."""
        return min(DATA_BYTES, self._bounds.input_burst_bytes) / self._bounds.input_bytes_per_s

    # from the agent

    def arrived(self, offset: int) -> None:
        """The agent has everything up to here. Raises FrameError for what was never sent."""
        if offset > self.sent:
            raise FrameError(f"ACK: expected at most {self.sent}, got {offset}")
        if offset <= self.acked:
            return
        del self._waiting[: offset - self.acked]
        self.acked = offset
        while self._owners:
            end, client, client_end = self._owners[0]
            client.acked = max(client.acked, client_end - max(0, end - offset))
            if end > offset:
                break
            self._owners.popleft()

    def resume(self, offset: int) -> None:
        """The agent is back and has so much; the rest is sent again. Raises FrameError when it cannot be so."""
        if not self.acked <= offset <= self.sent:
            raise FrameError(f"HELLO: expected input {self.acked}..{self.sent}, got {offset}")
        self.arrived(offset)
        self.sent = offset

    def restart(self, offset: int) -> None:
        """Nothing waits; the agent has so much."""
        self._waiting.clear()
        self._owners.clear()
        self._eof_at = None
        self.acked = self.sent = self.head = offset
