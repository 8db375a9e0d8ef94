"""The boxes at the keeper's socket: each with bounded buffers, none able to hold up the job or another.

What is news (status, growth) is sent as the latest of its kind; only answers queue up, and who leaves them
unread is not read from either.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping

from .loop import Loop
from .wire import KIB, Lines, encode

READ_BYTES = 64 * KIB
MAX_UNREAD_BYTES = 256 * KIB
"""Of answers to one client; beyond it, its calls wait in its own socket."""
MAX_CLIENTS = 16
LAST_WORD_S = 1.0
"""For a client to read the end; status.json has it anyway."""

Latest = Callable[[], Mapping[str, object]]
"""A message made when it can be sent."""
OnCall = Callable[["Client", dict[str, object]], None]


class Client:
    """One connection. ``is_open`` turns false when it has gone or spoke nonsense."""

    __slots__ = ("_growth", "_lines", "_pending", "_status", "is_open", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.is_open = True
        self._lines = Lines()
        self._pending = bytearray()
        self._status: Latest | None = None
        self._growth: Latest | None = None

    @property
    def wants_to_read(self) -> bool:
        return len(self._pending) < MAX_UNREAD_BYTES

    @property
    def wants_to_write(self) -> bool:
        return bool(self._pending) or self._status is not None or self._growth is not None

    def read(self) -> Iterator[dict[str, object]]:
        """The calls that have arrived."""
        try:
            data = self.sock.recv(READ_BYTES)
            if data:
                yield from self._lines.feed(data)
                return
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError, RecursionError):
            pass
        self.is_open = False

    def answer(self, message: Mapping[str, object]) -> None:
        self._pending += encode(message)
        self.write()

    def tell_status(self, latest: Latest) -> None:
        """`latest` is asked when the socket has room."""
        self._status = latest
        self.write()

    def tell_growth(self, latest: Latest) -> None:
        self._growth = latest
        self.write()

    def tell_end(self, message: Mapping[str, object]) -> None:
        """The last word: what was news before it is none any more."""
        self._status = self._growth = None
        self.answer(message)

    def write(self) -> None:
        """As much as the socket takes now."""
        while self.is_open and self.wants_to_write:
            if not self._pending:
                latest = self._status or self._growth
                if latest is self._status:
                    self._status = None
                else:
                    self._growth = None
                self._pending += encode(latest()) if latest is not None else b""
            try:
                sent = self.sock.send(self._pending, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.is_open = False
                return
            del self._pending[:sent]

    def close(self) -> None:
        self.is_open = False
        self.sock.close()


class Clients:
    """All of them, and the socket they come by; `on_call` gets what they ask. Making one raises OSError."""

    __slots__ = ("_clients", "_directory", "_latest_status", "_listener", "_loop", "_on_call")

    def __init__(self, loop: Loop, directory: int, latest_status: Latest, on_call: OnCall) -> None:
        self._loop, self._directory, self._latest_status, self._on_call = loop, directory, latest_status, on_call
        self._clients: list[Client] = []
        self._listener = _listen(directory)
        loop.watch(self._listener.fileno(), select.EPOLLIN, lambda _: self._accept())

    def add(self, client: Client) -> None:
        self._clients.append(client)
        self._loop.watch(client.sock.fileno(), select.EPOLLIN, lambda events: self._serve(client, events))

    def answer(self, client: Client, message: Mapping[str, object]) -> None:
        if client.is_open:
            client.answer(message)
            self._adjust(client)

    def tell_status(self) -> None:
        for client in list(self._clients):
            client.tell_status(self._latest_status)
            self._adjust(client)

    def tell_growth(self, latest: Latest) -> None:
        for client in list(self._clients):
            client.tell_growth(latest)
            self._adjust(client)

    def tell_end(self, message: Mapping[str, object]) -> bool:
        """To everybody, within reason. False: nobody has got it."""
        has_told = False
        for client in self._clients:
            client.tell_end(message)
            poll = select.poll()
            poll.register(client.sock, select.POLLOUT)
            while client.is_open and client.wants_to_write and poll.poll(LAST_WORD_S * 1000):
                client.write()
            has_told |= client.is_open and not client.wants_to_write
        return has_told

    def stop_listening(self) -> None:
        """Who came in the last moment is still let in."""
        with contextlib.suppress(OSError):
            os.unlink("socket", dir_fd=self._directory)
        self._accept()
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors left: come back to it
                self._loop.rest(self._listener.fileno(), 1.0)
                return
            if len(self._clients) >= MAX_CLIENTS:
                sock.close()
                continue
            client = Client(sock)
            self.add(client)
            client.tell_status(self._latest_status)
            self._adjust(client)

    def _serve(self, client: Client, events: int) -> None:
        if events & select.EPOLLOUT:
            client.write()
        if events & ~select.EPOLLOUT:
            for message in client.read():
                self._on_call(client, message)
        self._adjust(client)

    def _adjust(self, client: Client) -> None:
        """Wait for what this client can do next, or let it go."""
        if client not in self._clients:
            return
        fd = client.sock.fileno()
        if not client.is_open:
            self._clients.remove(client)
            self._loop.unwatch(fd)
            client.close()
            return
        mask = (select.EPOLLIN if client.wants_to_read else 0) | (select.EPOLLOUT if client.wants_to_write else 0)
        self._loop.adjust(fd, mask)


def _listen(directory: int) -> socket.socket:
    """``socket`` in the job directory, reached through its descriptor: paths of sockets end at 108 bytes."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(f"/proc/self/fd/{directory}/socket")
        os.chmod(f"/proc/self/fd/{directory}/socket", 0o600)
        sock.listen(MAX_CLIENTS)
    except BaseException:
        sock.close()
        raise
    return sock
