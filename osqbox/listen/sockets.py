"""Listening sockets: all addresses of a host on one port, or a clear word why not."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import trio

from osqbox.errors import AddressInUse, BadSetup, UserError

BACKLOG = 4096
PORT_ATTEMPTS = 50
"""Tries to find a port that is free on every address at once."""
PROBES = 3
"""Unanswered questions to a silent peer before its connection is over."""

UNIX_PATH_BYTES = 104 if sys.platform == "darwin" else 108
"""Room for a path in a unix socket's address, its final NUL included (unix(7))."""

Address: TypeAlias = tuple[socket.AddressFamily, str]

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: process, user, group (socket(7))."""

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


def open_unix_socket(name: str, path: Path) -> socket.socket:
    """A socket bound at ``path`` which only the same user may use (mode 0600); `listen` opens it to others.

    A socket file that nobody listens on is taken over. Raises AddressInUse when somebody does, BadSetup when the path
    cannot be used.
    """
    hint = f"osqbox serve --{name.replace('_', '-')} /a/shorter/path.sock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reachable_path(path) as address:
            _remove_stale(name, path, address)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.bind(address)
                Path(address).chmod(0o600)  # before listen: until then nobody can connect, whatever the umask
                sock.listen(BACKLOG)
            except OSError:
                sock.close()
                raise
    except OSError as error:
        raise BadSetup(f"{name}: cannot listen at {path}: {error.strerror or error}", hint=hint) from error
    return sock


def unix_user(sock: trio.socket.SocketType) -> int | None:
    """User id of the process at the other end; None where the kernel does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    found = sock.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[1])


@contextmanager
def reachable_path(path: Path) -> Iterator[str]:
    """A path to the same socket file that fits into an address, inside the block."""
    if len(os.fsencode(path)) < UNIX_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{directory}/{path.name}"
        if not Path(short).parent.exists() or len(os.fsencode(short)) >= UNIX_PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, f"expected a path shorter than {UNIX_PATH_BYTES} bytes")
        yield short
    finally:
        os.close(directory)


def _remove_stale(name: str, path: Path, address: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadSetup(f"{name}: expected {path} to be free or a socket, got another kind of file")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (FileNotFoundError, BlockingIOError):
            pass
    if path.exists():
        raise AddressInUse(f"{name}: somebody listens at {path} already", hint="osqbox status")


def bound_unacknowledged(sock: trio.socket.SocketType, after_s: int) -> None:
    """Let the kernel give up a connection whose other end acknowledges nothing; inherited as above (tcp(7))."""
    if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, after_s * 1000)


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
