"""One end of a session's connections as the session sees it: what waits to be sent, when it was heard, why it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from osqbox import shell_frames as frames
from osqbox import shell_legacy
from osqbox.shell_frames import PING_INTERVAL_S, CloseCode, Frame, Size, ViewerHello
from osqbox.shells.keyboard import Client
from osqbox.shells.messages import Grant


class Side:
    """One connection of the session, the agent's or a viewer's."""

    __slots__ = ("closing", "heard_at", "pinged_at", "queue", "sending_since", "sent_at", "told_exit", "wake")

    def __init__(self, now: float, wake: Callable[[], None]) -> None:
        self.wake = wake
        """Called when there may be something to send, or the connection is to be closed."""
        self.queue: deque[Frame] = deque()
        self.closing: tuple[CloseCode, str] | None = None
        self.heard_at = now
        self.pinged_at = now
        self.sent_at = now
        """Set by who sends, as is the next."""
        self.sending_since: float | None = None
        """Since when a send is under way."""
        self.told_exit = False

    def say(self, frame: Frame) -> None:
        self.queue.append(frame)
        self.wake()

    def close(self, code: CloseCode, reason: str = "") -> None:
        """The first code stays."""
        self.closing = self.closing or (code, reason)
        self.wake()

    @property
    def ping_at(self) -> float:
        """When a ping is due: where both ends are heard anyway, never."""
        return max(self.pinged_at, min(self.heard_at, self.sent_at)) + PING_INTERVAL_S

    def ping_due(self, now: float) -> Frame | None:
        if now < self.ping_at:
            return None
        self.pinged_at = now
        return frames.ping(int(now * 1e6))

    def is_stuck(self, now: float, limit_s: float) -> bool:
        return self.sending_since is not None and now - self.sending_since > limit_s


class AgentSide(Side):
    __slots__ = ("ack_sent", "acked_at", "is_legacy", "size_sent", "size_sent_at")

    def __init__(self, now: float, wake: Callable[[], None], *, is_legacy: bool, acked: int) -> None:
        super().__init__(now, wake)
        self.is_legacy = is_legacy
        self.ack_sent = acked
        self.acked_at = now
        self.size_sent: Size | None = None
        self.size_sent_at = -inf

    @property
    def ping_at(self) -> float:
        return self.pinged_at + shell_legacy.PING_INTERVAL_S if self.is_legacy else super().ping_at


class ViewerSide(Side):
    __slots__ = (
        "ack_sent",
        "acked",
        "blocked_since",
        "by",
        "client",
        "grant",
        "id",
        "progress_at",
        "sent",
        "wants_control",
    )

    def __init__(
        self, now: float, wake: Callable[[], None], by: str, grant: Grant, hello: ViewerHello, client: Client
    ) -> None:
        super().__init__(now, wake)
        self.by = by
        self.grant = grant
        self.id = (by, hello.client)
        self.client = client
        self.wants_control = grant is Grant.CONTROLLER and hello.role != Grant.VIEWER
        self.sent = self.acked = 0
        self.ack_sent = client.acked
        self.progress_at = now
        """When it last acknowledged something."""
        self.blocked_since: float | None = None
        """There is output it may not be sent, for it does not acknowledge."""
