"""A small process that has everything imported and forks a keeper per job: no interpreter start, shared memory.

Run by ``wire.zygote_command``. It ends when the box closes its end; its keepers live on.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket

from .cgroups import Hierarchies, find_hierarchies
from .clients import Client
from .keeper import fail, keep
from .native import name_process
from .spec import StartError
from .status import Status
from .wire import SPEC_FDS, receive


def main(control_fd: int) -> None:
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    name_process(b"osqbox-zygote")
    _let_go_of_surroundings()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that end before us leave no zombies
    hierarchies = find_hierarchies()
    gc.collect()
    gc.freeze()  # collections in keepers then leave shared pages alone
    while (fds := receive(control)) is not None:
        try:
            if len(fds) == SPEC_FDS:
                _fork_keeper(control, fds, hierarchies)
        finally:
            for fd in fds:
                os.close(fd)


def _let_go_of_surroundings() -> None:
    """What outlives the box must not hold its terminal, its directory, or a pipe somebody reads to the end."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")


def _fork_keeper(control: socket.socket, fds: list[int], hierarchies: Hierarchies) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        status = Status("")
        fail(status, StartError("fork", error.errno or errno.EAGAIN))
        client = Client(socket.socket(fileno=os.dup(fds[-1])))
        client.answer({"ended": status.facts()})
        client.close()
        return
    if pid == 0:
        try:
            control.close()
            keep(fds, hierarchies)
        finally:
            os._exit(0)
