"""Listening sockets: all addresses of a host on one port, or a clear word why not."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import TypeAlias

import trio

from osqbox.errors import AddressInUse, BadSetup, UserError

BACKLOG = 4096
PORT_ATTEMPTS = 50
"""Tries to find a port that is free on every address at once."""
PROBES = 3
"""Unanswered questions to a silent peer before its connection is over."""

Address: TypeAlias = tuple[socket.AddressFamily, str]

_NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}


class _PortTaken(Exception):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} on {host} is already taken by another program")


async def open_sockets(name: str, host: str, port: int) -> list[trio.socket.SocketType]:
    """Listening sockets of ``host``, all on one port. ``localhost`` is 127.0.0.1 and, where it exists, ::1.

    Raises AddressInUse when a port is taken, BadSetup when the host is not of this machine.
    """
    addresses = await _addresses(name, host)
    for attempt in range(PORT_ATTEMPTS):
        try:
            return _bind_all(name, addresses, port, optional_v6=host == "localhost")
        except _PortTaken as taken:
            if port == 0 and attempt + 1 < PORT_ATTEMPTS:
                continue  # the port picked for one address is taken on another
            raise AddressInUse(f"{name}: {taken}", hint=f"osqbox serve --{name}-port 0") from None
    raise AssertionError("unreachable")


def notice_vanished_peers(sock: trio.socket.SocketType, after_s: int) -> None:
    """Let the kernel ask machines that are silent; connections inherit it from their listening socket (tcp(7))."""
    probe_s = max(1, after_s // 5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, after_s - PROBES * probe_s))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


async def _addresses(name: str, host: str) -> list[Address]:
    if host == "localhost":  # not asked of the resolver, which may know one of the two only
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    if not host:
        raise BadSetup(
            f"{name}: expected a host name or address, got an empty one", hint="osqbox serve --host localhost"
        )
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise BadSetup(
            f"{name}: host {host!r} has no address ({error})", hint="osqbox serve --host localhost"
        ) from error
    addresses = [(family, str(where[0])) for family, _, _, _, where in found]
    return [a for a in dict.fromkeys(addresses) if a[0] in (socket.AF_INET, socket.AF_INET6)]


def _bind_all(name: str, addresses: Sequence[Address], port: int, *, optional_v6: bool) -> list[trio.socket.SocketType]:
    sockets: list[socket.socket] = []
    try:
        for family, host in addresses:
            try:
                sockets.append(_bind(family, host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _PortTaken(host, port) from None
                if not (sockets and optional_v6 and error.errno in _NO_SUCH_FAMILY):
                    raise _cannot_listen(name, host, port, error) from error
            else:
                port = sockets[0].getsockname()[1]
        return [trio.socket.from_stdlib_socket(sock) for sock in sockets]
    except (UserError, _PortTaken):
        for sock in sockets:
            sock.close()
        raise


def _bind(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere this option would let two programs share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _cannot_listen(name: str, host: str, port: int, error: OSError) -> BadSetup:
    if error.errno == errno.EADDRNOTAVAIL:
        return BadSetup(f"{name}: this machine has no address {host}", hint="osqbox serve --host localhost")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadSetup(f"{name}: no permission to listen on port {port}", hint=f"osqbox serve --{name}-port 0")
    return BadSetup(f"{name}: cannot listen on {host} port {port}: {error.strerror}", hint="osqbox doctor")
